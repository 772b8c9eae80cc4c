"""A run's directory: lock, files written whole or not at all, checkpoints of this and other projects, log, picture."""

import contextlib
import dataclasses
import io
import os
import zipfile
from pathlib import Path

import filelock
import numpy as np
import torch
from PIL import Image, ImageDraw

from runtime.cli import fail
from runtime.distributed import RESTARTS, get_rank_and_world


@dataclasses.dataclass
class RunState:
    """Where a run stands: with the weights, the optimizer and the gradient scaler all that a checkpoint holds."""

    data: str  # fingerprint of the training images
    epoch: int = 0  # epochs completed
    step: int = 0  # steps completed of the epoch under way
    clusters: list | None = None  # one Clusters per granularity, for the epoch under way; None: none yet
    log: list = dataclasses.field(default_factory=list)  # a row of figures per completed epoch
    knn_untrained: float | None = None  # kNN accuracy before the first step
    totals: torch.Tensor = dataclasses.field(default_factory=lambda: torch.zeros(4))  # figures, summed over the steps
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
    file = io.BytesIO()
    torch.save(checkpoint, file)
    for name in ("checkpoint.pth.tar", copy):
        if name is not None:
            write_atomically(directory / name, file.getbuffer())


def find(resume, directory):
    """The checkpoint to go on from: what --resume says, the latest if torchrun has restarted us; None for a new run."""
    if resume and not RESTARTS:
        return Path(resume)
    latest = directory / "checkpoint.pth.tar"
    return latest if (resume is not None or RESTARTS) and latest.exists() else None


def restore(checkpoint, run, model, optimizer, scaler, args):
    """Bring `run`, the model, the optimizer and the scaler to where a checkpoint of `save` stands.
    Ends the program in one line where it does not fit them or the arguments."""
    state = {name.removeprefix("module."): value for name, value in checkpoint["state_dict"].items()}
    try:
        model.load_state_dict(state)
        optimizer.load_state_dict(checkpoint["optimizer"])
        scaler.load_state_dict(checkpoint["scaler"])
        stored = checkpoint["run"]
        kinds = {name: type(value) for name, value in vars(run).items() if value is not None}
        shapes = [(value, p) for p, state in optimizer.state.items() for value in state.values() if value.dim()]
        if any(type(stored[n]) is not k for n, k in kinds.items()) or any(v.shape != p.shape for v, p in shapes):
            raise ValueError
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        fail(
            f"the checkpoint (a {checkpoint['arch']}) does not fit {args.arch}, --cluster-head {args.cluster_head}, "
            f"--optim {args.optim} and the sizes worked out; give the flags it was made with ({type(error).__name__})"
        )
    if stored["data"] != run.data:
        fail("the training images are not those that the checkpoint was trained on; restore them, or start a new run")
    batch_size = checkpoint.get("args", {}).get("batch_size")
    if stored["step"] and args.batch_size != batch_size:
        fail(f"the checkpoint stands in the middle of an epoch; go on with its --batch-size {batch_size}")
    vars(run).update({name: stored[name] for name in vars(run)})


def read(path):
    """The checkpoint at `path` as a dict with at least `arch` and `state_dict`; only tensors and plain values are read.
    Ends the program in one line, exit status 2, where it is not one or holds less than its tensors' sizes claim."""
    try:
        if zipfile.is_zipfile(path) and any(entry.compress_type for entry in zipfile.ZipFile(path).infolist()):
            raise ValueError  # torch stores plainly; what is packed may be of any size
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if any(value.untyped_storage().nbytes() < value.nbytes for value in _tensors_in(checkpoint)):
            raise ValueError
    except Exception as error:  # there is no end to what a malformed file makes the readers raise
        fail(f"{path} is truncated or not a checkpoint ({type(error).__name__}); name another file")
    arch, state = (checkpoint.get(name) if isinstance(checkpoint, dict) else None for name in ("arch", "state_dict"))
    if not isinstance(arch, str) or not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        fail(f"{path} is not a checkpoint of MoCo or PCL: it has no arch and state_dict")
    return checkpoint


def _tensors_in(value):
    """All tensors in nested dicts, lists and tuples."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors_in(part)


def write_log(directory, board, rows, knn_untrained):
    """Print the last of `rows`, a dict of figures per epoch, hand it to TensorBoard, write log.csv; warn of a leak.
    board: a SummaryWriter. knn_untrained: the kNN accuracy before the first step, or None."""
    row, line = rows[-1], "epoch {epoch:3d}  loss {loss:.3f}  acc_inst {acc_inst:5.1f}  acc_proto {acc_proto:5.1f}"
    line = (line + "  lr {lr:.4f}  {images_per_second:.0f} images/s").format(**row)
    line += f"  {row['skipped']} steps skipped" if row["skipped"] else ""
    line += "" if row["knn"] is None else f"  kNN {row['knn']:.1f}"
    if leaking(rows, knn_untrained):
        line += (
            f"\nwarning: acc_inst is {row['acc_inst']:.1f} % but kNN accuracy does not follow ({row['knn']:.1f} %): "
            "the query finds its key by something other than what the image shows. Most often batch-norm statistics "
            "tell which key belongs to which query; raise --bn-splits"
        )
    print(line, flush=True)
    for name, value in row.items():
        if name != "epoch" and value is not None:
            board.add_scalar(name, value, row["epoch"])
    table = [row, *(["" if v is None else f"{v:.6g}" for v in row.values()] for row in rows)]
    write_atomically(directory / "log.csv", "".join(f"{','.join(cells)}\n" for cells in table).encode())


def leaking(rows, knn_untrained):
    """Whether acc_inst is above 99 % while the kNN accuracy gains nothing on the untrained network's or is falling."""
    row, earlier = rows[-1], [row["knn"] for row in rows[:-1] if row["knn"] is not None]
    if row["knn"] is None or row["acc_inst"] <= 99:
        return False
    return row["knn"] < max(earlier, default=0) - 1 or row["knn"] < knn_untrained + 1


def draw_prototypes(path, images, features, clusters, rows=10, columns=10, side=56, gap=4, margin=96):
    """Write a picture: per row one prototype's nearest images, from the tightest cluster to the loosest.
    images: a data set whose `image(index)` is a stored PIL image of any size; features: (M, D) unit rows; clusters: one
    (im2cluster (M,), centroids (K, D), density (K,))."""
    im2cluster, centroids, density = (tensor.cpu() for tensor in clusters)
    size = torch.bincount(im2cluster, minlength=len(centroids))
    order = density.argsort()
    order = order[size[order] >= min(columns, int(size.max()))]
    order = order[torch.linspace(0, len(order) - 1, min(rows, len(order))).long()]
    picture = Image.new("RGB", (margin + columns * (side + gap), len(order) * (side + gap) + gap), "white")
    draw = ImageDraw.Draw(picture)
    for row, number in enumerate(order.tolist()):
        top = gap + row * (side + gap)
        draw.text((gap, top + side // 2 - 14), f"{size[number]} images\nphi {density[number]:.3f}", "black")
        members = np.flatnonzero(im2cluster.numpy() == number)
        nearest = members[np.argsort(-features[members] @ centroids[number].numpy())][:columns]
        for column, index in enumerate(nearest):
            image = images.image(int(index)).resize((side, side), Image.BICUBIC)
            picture.paste(image, (margin + column * (side + gap), top))
    file = io.BytesIO()
    picture.save(file, "PNG")
    write_atomically(path, file.getbuffer())
