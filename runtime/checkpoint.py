"""Checkpoints: save a run, find its latest state, restore it; read files of any project safely."""

import argparse
import contextlib
import dataclasses
import io
import json
import re
import zipfile
from pathlib import Path

import safetensors.torch
import torch

from runtime import directory as run_directory
from runtime import image_files
from runtime.cli import fail, format_error
from runtime.distributed import (
    barrier,
    broadcast_object,
    get_rank_and_world,
    number_from_launcher,
    print_main,
)

# arguments that belong to one start of the program, not to the run
PER_START = (
    "exp_dir",
    "resume",
    "overwrite",
    "config",
    "device",
    "workers",
    "knn_every",
    "cuda_graphs",
    "compile",
)
# arguments that a resumed run cannot change: at all, or within an epoch
FIXED = ("arch", "init", "stem", "image_size", "low_dim", "mlp", "cluster_head", "pcl_r", "optim")
FIXED_WITHIN_EPOCH = ("batch_size", "num_cluster")
# arguments whose right value depends on the number of processes
PER_PROCESS = ("workers", "bn_splits")
# totals that report.py needs
PRINTED = {"loss", "loss_inst", "loss_proto", "acc_inst", "acc_proto", "moments"}
SAVED_APART = ("args", "model", "optimizer", "scaler")  # not in a checkpoint's entry "run"


@dataclasses.dataclass
class Run:
    """Everything a checkpoint holds: what is trained, with which arguments, and how far it is."""

    args: argparse.Namespace
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler

    # how far it is: the entry "run" of a checkpoint
    data: str  # fingerprint of the training images
    epoch: int = 0  # completed epochs
    step: int = 0  # completed steps of the current epoch
    clusters: list | None = None  # the current epoch's Clusters, one per granularity, if any
    log: list = dataclasses.field(default_factory=list)  # {figure: value} per completed epoch
    knn_untrained: float | None = None  # kNN accuracy before the first step, in percent
    totals: dict = dataclasses.field(default_factory=dict)  # {figure: sum over the epoch's steps}
    seconds: float = 0.0  # time spent on the current epoch's steps
    skipped: int = 0  # steps that the gradient scaler has skipped
    skipped_in_a_row: int = 0

    def begin_epoch(self, epoch, clusters):
        """Move to step 0 of `epoch`, which trains with `clusters`."""
        self.epoch = epoch
        self.clusters = clusters
        self.step = 0
        self.totals = {}
        self.seconds = 0.0

    def position(self):
        """How far the run is, as {name: plain value}."""
        return {name: value for name, value in vars(self).items() if name not in SAVED_APART}


# -- writing ---------------------------------------------------------------------------------------
def save(directory, run, copy=None):
    """Write checkpoint.pth.tar on the first rank, and the same under the name `copy` if given.

    The keys are those of MoCo's and PCL's checkpoints, and more.
    """
    if get_rank_and_world()[0] > 0:
        return
    position = run.position()
    if run.clusters is not None:
        position["clusters"] = [tuple(level) for level in run.clusters]
    checkpoint = {
        "epoch": run.epoch,
        "arch": run.args.arch,
        "state_dict": {f"module.{k}": value for k, value in run.model.state_dict().items()},
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
        "args": vars(run.args),
        "run": position,
    }
    data = _serialize(checkpoint)
    # Write the copy first. After a kill between the two, the resumed run would not write it again.
    if copy is not None:
        run_directory.write_atomically(directory / copy, data)
    run_directory.write_atomically(directory / "checkpoint.pth.tar", data)


def save_tensors(path, value):
    """torch.save, but whole or not at all, and with an OSError if the disk is full."""
    run_directory.write_atomically(path, _serialize(value))


def _serialize(value):
    """The bytes that torch.save would write."""
    file = io.BytesIO()
    torch.save(value, file)
    return file.getbuffer()


# -- resuming --------------------------------------------------------------------------------------
def resume(directory, run, datasets):
    """Restore `run` from the checkpoint that --resume or a restart asks for, if there is one.

    datasets: the run's, to say which training images have changed since it began.
    Returns the arguments that have changed, as {name: [old value, new value]}.
    """
    is_first_rank = get_rank_and_world()[0] == 0
    latest = directory / "checkpoint.pth.tar"
    path = None
    if is_first_rank:
        path = find(directory, run.args.resume)
        has_other = holds_other_run(directory, path, run.args.overwrite)
    path = broadcast_object(path)
    changes = {}
    if path is not None:
        loaded = read(path)
        if "run" not in loaded:
            fail(f"{path} holds no run to continue; if it holds weights, name it with --init")
        changes = restore(loaded, run, path.parent, datasets)
        barrier()  # until all ranks have read the file, because the first one soon replaces it
        print_main(f"{directory}: resumed at epoch {run.epoch}, step {run.step}")
    if run.epoch >= run.args.epochs:
        if path == latest:
            run_directory.remove_features(directory)  # left by a kill at the very end
            path = directory
        print_main(f"{path} holds a finished run of {run.epoch} epochs: nothing left to do")
    elif is_first_rank:
        if has_other:
            run_directory.clear(directory)  # only now, because the checkpoint fits
        if path is not None and path.resolve() != latest.resolve():
            run_directory.remove_features(directory)  # keys of steps that `run` has not taken
            save(directory, run)  # a restart continues from here, not from a later checkpoint
        run_directory.mark_begun(directory)
    return changes


def stored_args(directory, resume):
    """The arguments of the run to continue, {name: value}; {} if there is none.

    resume: the value of --resume: the path of a checkpoint, or "" for the latest of `directory`.
    """
    stored = None
    path = directory / "checkpoint.pth.tar"
    if resume:
        path = Path(resume)
    else:
        with contextlib.suppress(OSError, RecursionError, ValueError):  # lost or edited
            stored = json.loads((directory / "args.json").read_text())
    if not isinstance(stored, dict) and path.is_file():
        checkpoint = read(path)
        if "run" in checkpoint:  # it is one of ours
            stored = checkpoint.get("args")
    if not isinstance(stored, dict):
        return {}

    # another number of processes needs other values for each
    # only args.json has the number, and a variable may hold anything
    with contextlib.suppress(KeyError, IndexError, TypeError, ValueError):
        if stored["parts"][-1]["world"] != number_from_launcher("WORLD_SIZE"):
            stored = {name: stored[name] for name in stored if name not in PER_PROCESS}
    return stored


def find(directory, resume):
    """The checkpoint to continue from, or None for a new run.

    directory: the run's. resume: the value of --resume: a path, "" for the latest checkpoint in
        `directory`, None for a new run. If torchrun has restarted the run, the latest one counts.
    """
    latest = directory / "checkpoint.pth.tar"
    if latest.exists() and (resume == "" or run_directory.is_restart(directory)):
        return latest
    if not resume:
        return None
    refuse_missing(resume)
    return Path(resume)


def holds_other_run(directory, path, overwrite):
    """Whether another run is to be removed from `directory`.

    Ends the program in one line if it must stay.
    path: the checkpoint that the run continues from, or None. If it is in `directory`, the run
        there is this one. overwrite: remove another run, instead of refusing to start. A run that
        has taken no step is always removed.
    """
    latest = directory / "checkpoint.pth.tar"
    is_own = path is not None and path.resolve().parent == directory.resolve()
    if is_own or not latest.exists():
        return False
    if not overwrite:
        old = read(latest)
        has_begun = old.get("epoch") or old.get("run", {}).get("step")
        if has_begun:
            fail(
                f"{directory} holds a run at epoch {old['epoch']} of "
                f"{old.get('args', {}).get('epochs')}; continue it with --resume, remove it with "
                "--overwrite, or choose another --exp-dir"
            )
    return True


def restore(checkpoint, run, folder, datasets):
    """Bring `run` to the state of a checkpoint that `save` has written.

    folder: of the checkpoint. With `datasets`, it tells which training images have changed.
    Returns the arguments that have changed, as {name: [old value, new value]}, and prints them.
    Ends the program in one line if the checkpoint does not fit the run, or if an argument has
    changed that cannot.
    """
    try:
        stored = dict(checkpoint["run"])
        position = {name: stored[name] for name in run.position()}
        if position["data"] != run.data:  # first, because other defaults follow from other images
            text = image_files.describe_changes(folder, datasets)
            fail(
                f"the training images are not those of the checkpoint{text}; restore them, or "
                "start a new run"
            )
        changes = find_changes(checkpoint["args"], vars(run.args))
        refuse_changes(changes, within_epoch=position["step"] > 0)
        state = checkpoint["state_dict"]
        state = {name.removeprefix("module."): value for name, value in state.items()}
        run.model.load_state_dict(state)
        load_optimizer(run.optimizer, checkpoint["optimizer"])
        scaler_state = checkpoint.get("scaler")
        if scaler_state:  # empty if the run had none so far; then a new one is used
            run.scaler.load_state_dict(scaler_state)
        position["totals"] = with_loss(position["totals"])
        check_position(position, run)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {format_error(error)[:200]}"
        fail(f"this run cannot continue from the checkpoint ({reason}); name another file")
    vars(run).update(position)
    for name, (old, new) in changes.items():
        print_main(f"{name} {old} -> {new}")
    return changes


def load_optimizer(optimizer, state):
    """optimizer.load_state_dict(state), which keeps the options of `optimizer`, such as `wd`."""
    options = []
    for group in optimizer.param_groups:
        options.append({name: value for name, value in group.items() if name != "params"})
    optimizer.load_state_dict(state)
    for group, own in zip(optimizer.param_groups, options, strict=True):
        group.update(own)


def find_changes(old, new):
    """The arguments in both dicts whose values differ, as {name: [old value, new value]}."""
    changes = {}
    for name, value in new.items():
        if name in old and name not in PER_START and old[name] != value:
            changes[name] = [old[name], value]
    return changes


def refuse_changes(changes, within_epoch):
    """End the program in one line if one of `changes` is to an argument that cannot change."""
    fixed = FIXED
    if within_epoch:
        fixed += FIXED_WITHIN_EPOCH
    refused = [f"{name} {old} -> {new}" for name, (old, new) in changes.items() if name in fixed]
    if refused:
        fail(
            f"a run that continues cannot change {', '.join(refused)}; give the flags that it was "
            "started with"
        )


def with_loss(totals):
    """The totals of an epoch with the loss, which older versions did not store."""
    if "loss" in totals or "loss_inst" not in totals:
        return totals
    return {"loss": totals["loss_inst"] + totals["loss_proto"], **totals}


def check_position(position, run):
    """Raise ValueError or TypeError if a checkpoint's entry "run" or optimizer is malformed."""
    for name, value in run.position().items():
        if value is not None and type(position[name]) is not type(value):
            raise ValueError(name)
    for name, total in position["totals"].items():
        fits = isinstance(total, float)
        if name == "moments":
            fits = isinstance(total, torch.Tensor) and total.shape == (len(total), len(total))
        if not fits:
            raise ValueError("totals")
    if position["step"] and not position["totals"].keys() >= PRINTED:
        raise ValueError("totals")
    for level in position["clusters"] or ():
        are_tensors = [isinstance(value, torch.Tensor) for value in level]
        if are_tensors != [True, True, True]:
            raise ValueError("clusters")
    for parameter, state in run.optimizer.state.items():
        for value in state.values():
            if value.dim() and value.shape != parameter.shape:
                raise ValueError("optimizer")


# -- reading ---------------------------------------------------------------------------------------
# what trainers store beside the weights: their arguments, and figures from NumPy
LEFT_OUT = (
    "argparse.Namespace",
    "types.SimpleNamespace",
    "pathlib.PosixPath",
    "pathlib.WindowsPath",
    "pathlib._local.PosixPath",  # Python 3.13
    "pathlib._local.WindowsPath",
    "numpy.dtype",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",  # NumPy 2
)


class LeftOut:
    """Stands for an object that is not read: it accepts any state and keeps none.

    Each class in LEFT_OUT has a subclass of its name, which is read in its place. The class itself
    is never called.
    """

    def __init__(self, *_):
        pass

    def __setstate__(self, _):
        pass

    @classmethod
    def in_place_of(cls, name):
        module, _, name = name.rpartition(".")
        return type(name, (cls,), {"__module__": module})


STAND_INS = [LeftOut.in_place_of(name) for name in LEFT_OUT]


def read(path, advice="name another file"):
    """The dict in the file `path`. Only tensors and plain values are read; no code is run.

    Objects of the classes in LEFT_OUT are left out.
    Ends the program in one line, with exit status 2, if there is no such dict, or if a tensor
    claims more values than the file holds. advice: what to do then.
    """
    refuse_missing(path)
    try:
        if Path(path).suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        if zipfile.is_zipfile(path):
            entries = zipfile.ZipFile(path).infolist()
            if any(entry.compress_type for entry in entries):
                raise ValueError  # torch never compresses; compressed data may be of any size
        with torch.serialization.safe_globals(STAND_INS):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        for tensor in _tensors_in(checkpoint):
            if tensor.untyped_storage().nbytes() < tensor.nbytes:
                raise ValueError
    except Exception as error:  # malformed files can raise anything
        code = re.search(r"GLOBAL (\S+) was not an allowed", str(error))
        if code:
            fail(
                f"{path} holds more than tensors: {code[1]}, which is not read; save its "
                "state_dict alone to a file"
            )
        fail(f"{path} is truncated or not a checkpoint ({type(error).__name__}); {advice}")
    if not isinstance(checkpoint, dict):
        fail(f"{path} is not a checkpoint: it holds a {type(checkpoint).__name__}")
    return {key: value for key, value in checkpoint.items() if not isinstance(value, LeftOut)}


def refuse_missing(path):
    """End the program in one line if `path` is not a file."""
    if Path(path).is_dir():
        example = Path(path) / "checkpoint.pth.tar"
        fail(f"{path} is a folder; name a file in it, for example {example}")
    if not Path(path).is_file():
        fail(f"there is no file {path}")


def _tensors_in(value):
    """All tensors in nested dicts, lists and tuples."""
    if isinstance(value, torch.Tensor):
        yield value
        return
    parts = ()
    if isinstance(value, dict):
        parts = value.values()
    elif isinstance(value, list | tuple):
        parts = value
    for part in parts:
        yield from _tensors_in(part)
