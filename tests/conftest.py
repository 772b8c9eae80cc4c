"""What several test files share: small folders of images, the flags of a small run, a look at what it leaves."""

import os
import shutil

import faiss
import numpy as np
import pytest
import torch
from PIL import Image

import main_pcl

os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start; so small a step only waits for more of them
torch.set_num_threads(1)
faiss.omp_set_num_threads(1)

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


def state(directory):
    """Where the latest checkpoint of a run stands."""
    return torch.load(directory / "checkpoint.pth.tar", weights_only=True)["run"]


def position(directory):
    """(epochs, steps of the epoch under way) that the latest checkpoint has behind it."""
    return state(directory)["epoch"], state(directory)["step"]


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


def picture(width=48, height=40, seed=0):
    """A smooth image in colour."""
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.BICUBIC)


def assert_same_distribution(ours, theirs):
    """Two samples of views (n, 3, S, S) have the same pixels, colours, contrast and sharpness, but for chance."""
    assert ours.shape == theirs.shape
    for a, b in zip(statistics_of(ours), statistics_of(theirs), strict=True):
        error = ((a.var(0) + b.var(0)) / len(a)).sqrt()
        assert ((a.mean(0) - b.mean(0)).abs() < 5 * error + 0.02).all()
        assert ((a.std(0) - b.std(0)).abs() < 0.1 * b.std(0) + 0.02).all()
        for tail in (0.05, 0.95) if a.shape[1] == 3 else ():  # a pixel's distribution has gaps
            assert ((a.quantile(tail, 0) - b.quantile(tail, 0)).abs() < 0.25).all()  # of a scale that spans 4.4


def statistics_of(x):
    """Of each view: its pixels; the mean of each channel; contrast, colourfulness and sharpness."""
    yield x.flatten(1)[:, ::7]
    yield x.mean((2, 3))
    differences = [x.flatten(1).std(1), (x[:, 0] - x[:, 1]).abs().mean((1, 2)), x.diff(dim=3).abs().mean((1, 2, 3))]
    yield torch.stack(differences, 1)
