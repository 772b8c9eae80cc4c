"""A run's directory: its name, its lock, files written whole or not at all, args.json."""

import contextlib
import itertools
import json
import os
import platform
import shutil
from pathlib import Path

import faiss
import filelock
import torch

from runtime.cli import fail
from runtime.distributed import RESTARTS, get_rank_and_world

FILES = (  # what a run and its evaluation leave
    "checkpoint*.pth.tar",
    "probe.pth.tar",
    "args.json",
    "eval.json",
    "log.csv",
    "events.out.tfevents.*",
    "curves.png",
    "prototypes.png",
    "map.png",
)


def choose_directory(exp_dir, resume):
    """The run's directory: `exp_dir` or, if that is None, one of the default names.

    The default names are experiment_pcl, experiment_pcl_2, ... A new run takes the next free one. A
    run that continues (`resume` is not None, or torchrun has restarted it) takes the newest.
    """
    if exp_dir is not None:
        return Path(exp_dir)
    newest = None
    for i in itertools.count(1):
        directory = Path("experiment_pcl" if i == 1 else f"experiment_pcl_{i}")
        if not directory.exists():
            break
        newest = directory
    continues = resume is not None or RESTARTS
    if continues and newest is not None:
        return newest
    return directory


@contextlib.contextmanager
def lock(directory):
    """Context in which the run's directory exists and no other run can use it.

    The first rank creates and locks it. Ends the program in one line if that is impossible.
    """
    held = contextlib.nullcontext()
    try:
        if get_rank_and_world()[0] == 0:
            directory.mkdir(parents=True, exist_ok=True)
            held = filelock.FileLock(directory / ".lock").acquire(blocking=False)
    except filelock.Timeout:
        fail(
            f"another run is writing to {directory}; wait until it ends, or choose another "
            "--exp-dir"
        )
    except OSError as error:
        fail(f"cannot write to {directory}: {error.strerror}; choose another --exp-dir")
    with held:
        yield


def clear(directory):
    """Remove the files of an earlier run from `directory`; other files stay."""
    for pattern in FILES:
        for path in directory.glob(pattern):
            path.unlink()
    clear_features(directory)


def clear_features(directory):
    """Remove the features that a run keeps while it trains."""
    shutil.rmtree(directory / "features", ignore_errors=True)


def write_atomically(path, data):
    """Write the bytes `data` to the file `path` whole or not at all.

    If the process dies or the disk is full, `path` keeps its old content. Raises OSError.
    """
    partial = path.with_name(path.name + ".tmp")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_args(directory, args, epoch, step, changes):
    """Write args.json: the arguments and, under "parts", what each part of the run ran on.

    A part lasts from a start of the program to its end. args: {name: value}.
    epoch, step: where this part begins. changes: {name: [old value, new value]} since the last one.
    """
    if get_rank_and_world()[0] > 0:
        return
    path = directory / "args.json"
    parts = []
    if epoch or step:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # lost or edited
            parts = json.loads(path.read_text())["parts"]
    parts.append({"epoch": epoch, "step": step, "changed": changes, **ran_on(args["device"])})
    write_atomically(path, json.dumps({**args, "parts": parts}, indent=2).encode())


def ran_on(device):
    """What figures may depend on: versions, device, threads and processes, as a dict."""
    name = platform.machine()
    if torch.device(device).type == "cuda":
        name = torch.cuda.get_device_name()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "faiss": faiss.__version__,
        "device": name,
        "threads": torch.get_num_threads(),
        "world": get_rank_and_world()[1],
    }
