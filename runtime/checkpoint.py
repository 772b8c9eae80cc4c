"""A run's directory: lock, files written whole or not at all, checkpoints of this and other projects, log."""

import contextlib
import dataclasses
import io
import itertools
import json
import math
import os
import platform
import re
import shutil
import zipfile
from pathlib import Path

import faiss
import filelock
import torch

from runtime.cli import fail
from runtime.distributed import RESTARTS, broadcast_object, get_rank_and_world, print_main

OF_THE_MOMENT = ("exp_dir", "resume", "overwrite", "config", "device", "workers", "knn_every")  # no part of a run
FIXED = ("arch", "stem", "image_size", "low_dim", "mlp", "cluster_head", "pcl_r", "optim")
FIXED_WITHIN_EPOCH = ("batch_size", "num_cluster")
FILES = ("checkpoint*.pth.tar", "probe.pth.tar", "args.json", "eval.json", "log.csv", "events.out.tfevents.*")
FILES += ("curves.png", "prototypes.png", "map.png")
FIGURES = ("loss_inst", "loss_proto", "acc_inst", "acc_proto", "grad_norm")  # of every step


@dataclasses.dataclass
class RunState:
    """Where a run stands: with the weights, the optimizer and the gradient scaler all that a checkpoint holds."""

    data: str  # fingerprint of the training images
    epoch: int = 0  # epochs completed
    step: int = 0  # steps completed of the epoch under way
    clusters: list | None = None  # one Clusters per granularity, for the epoch under way; None: none yet
    log: list = dataclasses.field(default_factory=list)  # a row of figures per completed epoch
    knn_untrained: float | None = None  # kNN accuracy before the first step
    totals: torch.Tensor = dataclasses.field(default_factory=lambda: torch.zeros(5))  # FIGURES, summed over the steps
    seconds: float = 0.0  # spent on the steps of the epoch under way
    skipped: int = 0  # steps that the gradient scaler has left out
    skipped_in_a_row: int = 0


@contextlib.contextmanager
def lock(directory):
    """As a context, on the first rank: the run's directory is there, and no other run can have it."""
    held = contextlib.nullcontext()
    try:
        if get_rank_and_world()[0] == 0:
            directory.mkdir(parents=True, exist_ok=True)
            held = filelock.FileLock(directory / ".lock").acquire(blocking=False)
    except filelock.Timeout:
        fail(f"another run is writing to {directory}; wait for its end or name another --exp-dir")
    except OSError as error:
        fail(f"cannot write to {directory}: {error.strerror}; name another --exp-dir")
    with held:
        yield


def write_atomically(path, data):
    """Make `path` hold the bytes `data` or, where the process dies or the disk is full, what it held before."""
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


def save_tensors(path, value):
    """torch.save, but whole or not at all, and an OSError where the disk is full."""
    write_atomically(path, _serialized(value))


def _serialized(value):
    """The bytes that torch.save makes of `value`."""
    file = io.BytesIO()
    torch.save(value, file)
    return file.getbuffer()


def save(directory, run, model, optimizer, scaler, args, copy=None):
    """Write checkpoint.pth.tar, on the first rank; also under the name `copy`. The keys are those of MoCo and PCL."""
    if get_rank_and_world()[0] > 0:
        return
    checkpoint = {
        "epoch": run.epoch,
        "arch": args.arch,
        "state_dict": {f"module.{name}": value for name, value in model.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "args": vars(args),
        "run": vars(run) | {"clusters": run.clusters and [tuple(clusters) for clusters in run.clusters]},
    }
    data = _serialized(checkpoint)
    for name in (copy, "checkpoint.pth.tar"):  # in this order, or a kill in between would leave the copy out for good
        if name is not None:
            write_atomically(directory / name, data)


def choose_directory(exp_dir, resume):
    """The run's directory: --exp-dir or, where none is named, the next free experiment_pcl, experiment_pcl_2, ... for a
    new run, the newest of them for one that goes on (`resume` is not None)."""
    if exp_dir is not None:
        return Path(exp_dir)
    names = (Path("experiment_pcl" + (f"_{i}" if i > 1 else "")) for i in itertools.count(1))
    taken = list(itertools.takewhile(Path.exists, names))
    goes_on = resume is not None or RESTARTS
    return taken[-1] if taken and goes_on else Path("experiment_pcl" + (f"_{len(taken) + 1}" if taken else ""))


def find(directory, resume, overwrite):
    """The checkpoint to go on from: what --resume says, the latest if torchrun has restarted us; None for a new run.
    Ends the program in one line where a new run would destroy another one's, unless `overwrite`, which removes it."""
    latest = directory / "checkpoint.pth.tar"
    if resume and not RESTARTS:
        return Path(resume)
    if not latest.exists():
        return None
    if resume is not None or RESTARTS:
        return latest
    if not overwrite:
        old = read(latest)
        if old.get("epoch") or old.get("run", {}).get("step"):  # a run that stopped before its first step is none
            where = f"holds a run at epoch {old['epoch']} of {old.get('args', {}).get('epochs')}"
            fail(f"{directory} {where}; go on with --resume, clear it with --overwrite, or name another --exp-dir")
    for pattern in FILES:
        for path in directory.glob(pattern):
            path.unlink()
    shutil.rmtree(directory / "features", ignore_errors=True)
    return None


def go_on(directory, run, model, optimizer, scaler, args):
    """Take up the run that --resume or a restart asks for, as `restore` does; {} where a new one begins."""
    path = find(directory, args.resume, args.overwrite) if get_rank_and_world()[0] == 0 else None
    path = broadcast_object(path)
    if path is None:
        return {}
    changes = restore(read(path), run, model, optimizer, scaler, args)
    print_main(f"{directory}: resumed at epoch {run.epoch}, step {run.step}")
    if run.epoch >= args.epochs:
        print_main(f"{directory} holds a finished run of {run.epoch} epochs: nothing is left to do")
        shutil.rmtree(directory / "features", ignore_errors=True)  # of a kill at the very end
    return changes


def restore(checkpoint, run, model, optimizer, scaler, args):
    """Bring `run`, the model, the optimizer and the scaler to where a checkpoint of `save` stands.
    Returns the arguments that are not those it was made with, {name: [then, now]}, and prints them. Ends the program in
    one line where it does not fit them, or an argument differs that cannot change."""
    try:
        stored, before = {name: checkpoint["run"][name] for name in vars(run)}, checkpoint["args"]
        now = {name: value for name, value in vars(args).items() if name in before and name not in OF_THE_MOMENT}
        changes = {name: [before[name], value] for name, value in now.items() if before[name] != value}
        fixed = FIXED + (FIXED_WITHIN_EPOCH if stored["step"] else ())
        refused = [f"{name} {then} -> {value}" for name, (then, value) in changes.items() if name in fixed]
        if refused:
            fail(f"the checkpoint's {', '.join(refused)} cannot change; give the flags it was made with")
        model.load_state_dict({name.removeprefix("module."): x for name, x in checkpoint["state_dict"].items()})
        optimizer.load_state_dict(checkpoint["optimizer"])
        scaler.load_state_dict(checkpoint["scaler"])
        kinds = {name: type(value) for name, value in vars(run).items() if value is not None}
        shapes = [(value, p) for p, state in optimizer.state.items() for value in state.values() if value.dim()]
        shapes += [(stored["totals"], run.totals)]
        if any(type(stored[n]) is not k for n, k in kinds.items()) or any(v.shape != p.shape for v, p in shapes):
            raise ValueError
        if any(len([tensor.shape for tensor in level]) != 3 for level in stored["clusters"] or ()):
            raise ValueError
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        fail(f"the checkpoint is not one that this run can go on from ({type(error).__name__}); name another file")
    if stored["data"] != run.data:
        fail("the training images are not those that the checkpoint was trained on; restore them, or start a new run")
    vars(run).update(stored)
    for name, (then, value) in changes.items():
        print_main(f"{name} {then} -> {value}")
    return changes


def write_args(directory, args, run, changes):
    """Write args.json: the arguments and, under "parts", what each part of the run, from a start to its end, ran on."""
    if get_rank_and_world()[0] > 0:
        return
    try:
        parts = json.loads((directory / "args.json").read_text())["parts"] if run.epoch or run.step else []
    except (OSError, ValueError, KeyError, TypeError):  # lost or edited: what is known goes on
        parts = []
    parts.append({"epoch": run.epoch, "step": run.step, "changed": changes} | ran_on(args.device))
    write_atomically(directory / "args.json", json.dumps(vars(args) | {"parts": parts}, indent=2).encode())


def ran_on(device):
    """What figures may depend on: versions, device, threads, processes."""
    name = torch.cuda.get_device_name() if torch.device(device).type == "cuda" else platform.machine()
    versions = {"python": platform.python_version(), "torch": torch.__version__, "faiss": faiss.__version__}
    return versions | {"device": name, "threads": torch.get_num_threads(), "world": get_rank_and_world()[1]}


def read(path):
    """The dict in the file `path`; only tensors and plain values are read, nothing is run.
    Ends the program in one line, exit status 2, where it is none, or holds less than its tensors' sizes claim."""
    if not Path(path).is_file():
        fail(f"there is no file {path}")
    try:
        if zipfile.is_zipfile(path) and any(entry.compress_type for entry in zipfile.ZipFile(path).infolist()):
            raise ValueError  # torch stores plainly; what is packed may be of any size
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if any(value.untyped_storage().nbytes() < value.nbytes for value in _tensors_in(checkpoint)):
            raise ValueError
    except Exception as error:  # there is no end to what a malformed file makes the readers raise
        code = re.search(r"GLOBAL (\S+) was not an allowed", str(error))
        if code:
            fail(f"{path} holds more than tensors: {code[1]}, which is not read; save its state_dict alone to a file")
        fail(f"{path} is truncated or not a checkpoint ({type(error).__name__}); name another file")
    if not isinstance(checkpoint, dict):
        fail(f"{path} is not a checkpoint: it holds a {type(checkpoint).__name__}")
    return checkpoint


def _tensors_in(value):
    """All tensors in nested dicts, lists and tuples."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors_in(part)


def write_log(directory, board, rows, knn_untrained, args):
    """Print the last of `rows`, a dict of figures per epoch, hand it to TensorBoard, write log.csv; warn of a leak.
    board: a SummaryWriter. knn_untrained: the kNN accuracy before the first step, or None. On the first rank alone."""
    if get_rank_and_world()[0] > 0:
        return
    row, line = rows[-1], "epoch {epoch:3d}  loss_inst {loss_inst:.3f}  loss_proto {loss_proto:.3f}"
    line += "  acc_inst {acc_inst:5.1f}  acc_proto {acc_proto:5.1f}  lr {lr:.4f}  {images_per_second:.0f} images/s"
    line = line.format(**row) + (f"  {row['skipped']} steps skipped" if row["skipped"] else "")
    line += "" if row["knn"] is None else f"  kNN {row['knn']:.1f}"
    if leaking(rows, knn_untrained):
        line += (
            f"\nwarning: acc_inst is {row['acc_inst']:.1f} % but kNN accuracy does not follow ({row['knn']:.1f} %). "
            f"What to try, the likeliest first: {'; '.join(remedies(row, args))}"
        )
    print(line, flush=True)
    for name, value in row.items():
        if name != "epoch" and value is not None:
            board.add_scalar(name, value, row["epoch"])
    table = [row, *(["" if v is None else f"{v:.6g}" for v in row.values()] for row in rows)]
    write_atomically(directory / "log.csv", "".join(f"{','.join(cells)}\n" for cells in table).encode())


def warn(args, n, labelled):
    """Say what to expect of a run on `n` images that may disappoint."""
    if n < 1000 or args.pcl_r < 64:
        few = f"warning: {n} images and a queue of {args.pcl_r} are few: expect clusters of a handful, features little"
        print_main(f"{few} better than an untrained network's; take 1,000 images or more, or trained weights (--init)")
    if not labelled:
        print_main("no labels, so no kNN accuracy on the way; evaluate on a labelled folder when the run has ended")
    if args.warmup >= args.epochs:
        print_main(f"--warmup {args.warmup} of {args.epochs} epochs leaves none for ProtoNCE: InfoNCE alone")


def remedies(row, args):
    """What may lift acc_inst without better features, as remedies: the one that the run's figures point to first."""
    chance = math.log(args.pcl_r + 1)  # the loss where all logits are equal
    weak = not args.color_jitter or not args.grayscale or args.crop_min > 0.5
    one_point = row["loss_inst"] > chance / 2
    head = ("a longer --warmup, or --cluster-head none: on an untrained encoder the report's head collapses", one_point)
    found = [
        *([head] if args.cluster_head == "report" else []),
        ("a lower --lr, or a --moco-m nearer to 1, as the keys change faster than the queue is renewed", one_point),
        ("a stronger augmentation (--crop-min, --color-jitter, --grayscale), as the two views are too alike", weak),
        ("more --bn-splits, as batch-norm statistics tell which key belongs to which query", args.bn_splits == 1),
    ]
    return [remedy for remedy, likely in sorted(found, key=lambda pair: not pair[1])]


def leaking(rows, knn_untrained):
    """Whether acc_inst is above 99 % while the kNN accuracy gains nothing on the untrained network's or is falling."""
    row, earlier = rows[-1], [row["knn"] for row in rows[:-1] if row["knn"] is not None]
    if row["knn"] is None or row["acc_inst"] <= 99:
        return False
    return row["knn"] < max(earlier, default=0) - 1 or row["knn"] < knn_untrained + 1
