"""What several test files share: small data sets, small runs, and comparisons of their results."""

import os

# Hide the GPUs, before torch looks for them. test_on_gpu.py lets test_cuda.py see them.
os.environ.setdefault("GPUS_BEFORE_TESTS", os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
if "TESTS_SEE_THE_GPUS" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import io
import shutil
import signal

import faiss
import numpy as np
import pytest
import torch
from PIL import Image

import main_pcl
import metrics
from runtime import report
from runtime.directory import write_atomically
from runtime.distributed import StopSignals, get_rank_and_world

# Steps this small run fastest on one thread. The variable is for the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
faiss.omp_set_num_threads(1)

# flags of a small run on one of the folders below
TINY = ["-a", "resnet18_w4", "-b", "16", "--bn-splits", "2", "-j", "0"]
TINY += ["--num-cluster", "4,8", "--pcl-r", "8"]


# -- shortcuts -------------------------------------------------------------------------------------
def write_small_picture(path, *_):
    """In place of a function that draws a picture."""
    if get_rank_and_world()[0] == 0:
        file = io.BytesIO()
        Image.new("L", (1, 1)).save(file, "PNG")
        write_atomically(path, file.getbuffer())


def take_shortcuts(setattr):
    """Leave out what takes most of the time of a small run, and has tests of its own.

    These are the pictures, and the weak penalties that the linear probe tries.
    setattr: a function of (object, name, value).
    """
    for name in ("draw_curves", "draw_prototypes", "draw_map"):
        setattr(report, name, write_small_picture)
    setattr(metrics, "STRENGTHS", metrics.STRENGTHS[:3])


@pytest.fixture(autouse=True)
def shortcuts(request, monkeypatch):
    """All tests take the shortcuts, except those marked with no_shortcuts."""
    if request.node.get_closest_marker("no_shortcuts") is None:
        take_shortcuts(monkeypatch.setattr)


# -- data ------------------------------------------------------------------------------------------
@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Three classes of coloured noise with 16 training and 6 held-out images each.

    There are RGB, grey, palette and RGBA images among them.
    """
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    modes = ("RGB", "L", "P", "RGBA")
    for part, n in (("train", 16), ("val", 6)):
        for label in range(3):
            directory = root / part / f"class {label}"
            directory.mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 90, (10, 12, 3), dtype=np.uint8)
                pixels[..., label] += 150
                image = Image.fromarray(pixels).convert(modes[i % 4])
                image.save(directory / f"{i}.png")
    return root


@pytest.fixture(scope="session")
def mixed(folder, tmp_path_factory):
    """`folder` with one image of another size, so that images are read on demand by workers."""
    root = tmp_path_factory.mktemp("mixed") / "images"
    shutil.copytree(folder, root)
    Image.new("RGB", (20, 14)).save(root / "train" / "class 0" / "0.png")
    return root


def picture(width=48, height=40, seed=0):
    """A smooth image in colour."""
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.BICUBIC)


# -- runs ------------------------------------------------------------------------------------------
def run(*args):
    """Train with these arguments, of any type. Returns the log."""
    return main_pcl.main([str(arg) for arg in args])


def fails(capsys, function, *args, status=2):
    """Check that `function` ends the program with one line on stderr. Returns that line."""
    with pytest.raises(SystemExit) as stop:
        function([str(arg) for arg in args])
    error = capsys.readouterr().err
    assert stop.value.code == status, error
    assert len(error.strip().splitlines()) == 1, error
    return error


def wait_for_line(process, beginning):
    """Read the output of a process up to a line that begins like this."""
    line = process.stdout.readline()
    while line and not line.startswith(beginning):
        line = process.stdout.readline()
    assert line, f"the output has ended without {beginning!r}"


def stop_in_step(number, monkeypatch, function, *args):
    """Call `function(*args)`, which trains, and end it as by SIGTERM after this many steps."""
    asked = []

    def receive_in_time(self):
        asked.append(self)
        if len(asked) == number:
            self.received = signal.SIGTERM
        return self.received > 0

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(StopSignals, "received_by_any", receive_in_time)
        function(*args)


def weights(directory):
    """The weights in the latest checkpoint of a run, {name: tensor}."""
    return torch.load(directory / "checkpoint.pth.tar", weights_only=True)["state_dict"]


def state(directory):
    """How far a run is, by its latest checkpoint, as {name: value}."""
    return torch.load(directory / "checkpoint.pth.tar", weights_only=True)["run"]


def position(directory):
    """Completed epochs, and completed steps of the current epoch, in the latest checkpoint."""
    stored = state(directory)
    return stored["epoch"], stored["step"]


def assert_same(a, b):
    """Check that two {name: tensor} are equal to the last bit."""
    assert a.keys() == b.keys()
    assert not [key for key in a if not torch.equal(a[key], b[key])]


# -- distributions of views ------------------------------------------------------------------------
def assert_same_distribution(ours, theirs):
    """Check that two samples of views (n, 3, S, S) differ by chance alone.

    Pixels, colours, contrast and sharpness are compared.
    """
    assert ours.shape == theirs.shape
    for a, b in zip(statistics_of(ours), statistics_of(theirs), strict=True):
        error = ((a.var(0) + b.var(0)) / len(a)).sqrt()
        assert ((a.mean(0) - b.mean(0)).abs() < 5 * error + 0.02).all()
        assert ((a.std(0) - b.std(0)).abs() < 0.1 * b.std(0) + 0.02).all()
        if a.shape[1] == 3:  # not for pixels, whose distribution has gaps
            for tail in (0.05, 0.95):
                difference = a.quantile(tail, 0) - b.quantile(tail, 0)
                assert (difference.abs() < 0.25).all()  # the scale spans 4.4


def statistics_of(x):
    """Yield statistics (n, any) of views (n, 3, S, S).

    First some pixels, then the mean of each channel, then contrast, colourfulness and sharpness.
    """
    yield x.flatten(1)[:, ::7]
    yield x.mean((2, 3))
    contrast = x.flatten(1).std(1)
    colourfulness = (x[:, 0] - x[:, 1]).abs().mean((1, 2))
    sharpness = x.diff(dim=3).abs().mean((1, 2, 3))
    yield torch.stack([contrast, colourfulness, sharpness], 1)
