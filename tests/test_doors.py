"""The changes that README's "Change one thing" names: ten lines are enough for each.

A door is a place to change the code. tests/doors has an example of each as a diff. It is applied to
a copy of the project, which then trains for two epochs and evaluates.
"""

import gzip
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
from conftest import TINY

import main_pcl

ROOT = Path(main_pcl.__file__).parent
DOORS = ROOT / "tests" / "doors"
README = (ROOT / "README.md").read_text()


def changed_lines(diff):
    """The lines that a diff adds or removes, with their sign."""
    return re.findall(r"^[+-](?![+-]{2} ).*", diff, re.MULTILINE)


def write_fashion_mnist(directory, n=64):
    """The four files of Fashion-MNIST, with n random images in each part."""
    rng = np.random.default_rng(0)
    directory.mkdir(parents=True)
    for part in ("train", "t10k"):
        images = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        labels = np.arange(n, dtype=np.uint8) % 10
        for name, array in [("images-idx3", images), ("labels-idx1", labels)]:
            header = np.array([2048 + array.ndim, *array.shape], ">i4").tobytes()
            data = header + array.tobytes()
            (directory / f"{part}-{name}-ubyte").write_bytes(data)
            (directory / f"{part}-{name}-ubyte.gz").write_bytes(gzip.compress(data))


def train_and_evaluate(copy, words):
    """What a process does: run both scripts of a copy of the project."""
    # forget the original, so that the copy is imported
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None) or ""
        if file.startswith(str(ROOT)):
            del sys.modules[name]
    os.chdir(copy)
    sys.path.insert(0, str(copy))
    from conftest import take_shortcuts

    import eval_lincls
    import main_pcl
    from augment import CHANCES

    assert Path(main_pcl.__file__).parent == copy
    take_shortcuts(setattr)
    print("a view is changed by", *CHANCES)
    main_pcl.main([*words, "--epochs", "2", "--warmup", "1", "--exp-dir", "run"])
    eval_lincls.main(["--exp-dir", "run", "--no-baselines"])


@pytest.mark.skipif(shutil.which("git") is None, reason="git applies the diffs")
@pytest.mark.parametrize("door", sorted(path.stem for path in DOORS.glob("*.diff")))
def test_ten_lines_are_enough(door, tmp_path):
    diff = (DOORS / f"{door}.diff").read_text()
    assert 0 < len(changed_lines(diff)) <= 10

    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    for directory in ("runtime", "assets"):
        shutil.copytree(ROOT / directory, tmp_path / directory)
    subprocess.run(["git", "apply", DOORS / f"{door}.diff"], cwd=tmp_path, check=True)

    words = TINY
    if door == "backbone":
        words = [*words, "-a", "regnet", "--image-size", "32"]
    if door == "data":
        write_fashion_mnist(tmp_path / "datasets" / "FashionMNIST" / "raw")
        words = ["fashion", *words]
    status, output = processes.finish(train_and_evaluate, tmp_path, words)
    assert status == 0, output

    log = (tmp_path / "run" / "log.csv").read_text()
    checkpoint = torch.load(tmp_path / "run" / "checkpoint.pth.tar", weights_only=False)
    names = checkpoint["state_dict"].keys()
    assert ("loss_uniformity" in log) == (door == "loss")
    assert ("module.b.weight" in names) == (door == "head")
    assert any("trunk_output" in name for name in names) == (door == "backbone")
    assert ("flip solarize" in output) == (door == "augmentation")
    assert ("fashion: 64 training images" in output) == (door == "data")


def test_the_readme_shows_lines_of_these_diffs():
    table = README.split("## Change one thing")[1].split("\n## ")[0]
    diffs = "".join(path.read_text() for path in DOORS.glob("*.diff"))
    for row in re.findall(r"^\| .*", table, re.MULTILINE)[1:]:
        code = re.findall(r"`([^`]+)`", row.split("|")[3])
        assert code
        for piece in code:
            assert piece in diffs
    assert len(re.findall(r"^\| ", table, re.MULTILINE)) == 1 + len(list(DOORS.glob("*.diff")))
