"""What several test files share: a small folder of images, the flags of a small run, a look at its weights."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import main_pcl

TINY = ["-a", "resnet18_w4", "-b", "16", "--bn-splits", "2", "-j", "0", "--num-cluster", "4,8", "--pcl-r", "8"]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Three classes of coloured noise, 16 training and 6 held-out images each; grey, palette and RGBA among them."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for part, n in (("train", 16), ("val", 6)):
        for label in range(3):
            directory = root / part / f"class {label}"
            directory.mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 90, (10, 12, 3), dtype=np.uint8)
                pixels[..., label] += 150
                image = Image.fromarray(pixels)
                image.convert(("RGB", "L", "P", "RGBA")[i % 4]).save(directory / f"{i}.png")
    return root


@pytest.fixture(scope="session")
def mixed(folder, tmp_path_factory):
    """The same with one image of another size, so that loader workers read them instead of memory keeping them."""
    root = tmp_path_factory.mktemp("mixed") / "images"
    shutil.copytree(folder, root)
    Image.new("RGB", (20, 14)).save(root / "train" / "class 0" / "0.png")
    return root


def run(*args):
    return main_pcl.main([str(arg) for arg in args])


def weights(directory):
    return torch.load(directory / "checkpoint.pth.tar", weights_only=True)["state_dict"]


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert not [key for key in a if not torch.equal(a[key], b[key])]


def fails(capsys, function, *args, status=2):
    """The one line on stderr with which `function` ends the program."""
    with pytest.raises(SystemExit) as stop:
        function([str(arg) for arg in args])
    error = capsys.readouterr().err
    assert stop.value.code == status and len(error.strip().splitlines()) == 1, error
    return error
