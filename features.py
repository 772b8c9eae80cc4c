"""One pass over a data set that saves each batch of features to a file, and reading these back.

The pass needs the memory of one batch, however large the data set is. Under torch.distributed each
rank passes over its own share of the data, and all ranks save to the same directory.

    loader = DataLoader(dataset, batch_size=256)  # yields (images, index)
    compute_features(loader, encoder, "features")  # features/batch_0_features.pt, ...
    features = load_features("features", n=len(dataset))  # (n, D) float32, row i = sample i
"""

import io
import os
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm


@torch.no_grad()
def compute_features(loader, model, directory, device="cpu"):
    """Save `model(images)` of each batch of `loader` as `directory`/batch_{i}_features.pt.

    loader: yields (images, index), where index (B,) holds the positions in the data set. Each rank
        has a loader of its own share.
    model: maps images (B, ...) on `device` to features (B, D). It must be in eval mode already.
    Each file holds {"index": (B,) int64, "features": (B, D) float32}. Features that an earlier pass
        left in `directory` are removed first.
    Raises OSError if a file cannot be written.
    """
    rank, world = _rank_and_world()
    clear_features(directory)
    for i, (images, index) in enumerate(_progress(loader, rank)):
        features = model(images.to(device, non_blocking=True))
        save_features(directory, i * world + rank, index, features)
    if world > 1:
        dist.barrier()


@torch.no_grad()
def extract_features(loader, model, device="cpu"):
    """`model(images)` of all batches of all ranks, kept in memory.

    loader, model: as for compute_features.
    Returns (features (n, D) float32, index (n,) int64) on the CPU, in data set order, the same on
        every rank.
    """
    rank, world = _rank_and_world()

    # Start with empty parts, so that a rank without a share has something to send.
    features = [torch.empty(0)]
    indices = [torch.empty(0, dtype=torch.long)]
    for images, index in _progress(loader, rank):
        # Keep copies: a tensor from a loader worker holds a file open for as long as it lives.
        output = model(images.to(device, non_blocking=True)).float()
        features.append(output.to("cpu", copy=True))
        indices.append(torch.as_tensor(index).clone())
    # Each step below frees what the last one made: features of millions of images take gigabytes.
    features = torch.cat(features)
    index = torch.cat(indices)

    # Gather the shares of all ranks.
    if world > 1:
        shares = [None] * world
        dist.all_gather_object(shares, (features, index))
        features = torch.cat([share[0] for share in shares])
        index = torch.cat([share[1] for share in shares])
        del shares

    # Sort the samples by their position in the data set.
    order = index.argsort()
    return features[order], index[order]


def save_features(directory, number, index, features):
    """Write one batch to `directory`/batch_{number}_features.pt.

    index: (B,) int64 positions in the data set.
    features: (B, D).
    Raises OSError if the disk is full.
    """
    # Serialise in memory first: torch.save does not report a full disk when it writes a file.
    file = io.BytesIO()
    torch.save({"index": torch.as_tensor(index), "features": features.float().cpu()}, file)
    (Path(directory) / f"batch_{number}_features.pt").write_bytes(file.getbuffer())


def clear_features(directory, first=0):
    """Create `directory` and remove its features from batch number `first` on.

    Under torch.distributed all ranks must call this.
    """
    rank, world = _rank_and_world()
    if rank == 0:
        Path(directory).mkdir(parents=True, exist_ok=True)
        for path in Path(directory).glob("batch_*_features.pt"):
            if int(path.name.split("_")[1]) >= first:
                path.unlink()
    if world > 1:
        dist.barrier()


def load_features(directory, n, memory_map=None):
    """The saved features of samples 0 to n - 1: (n, D) float32 array in data set order.

    memory_map: path of a file to keep the array in, for features that do not fit in memory. To open
        the file again, use np.load(path, mmap_mode="c"): with mode "r", PyTorch warns that the
        array is not writable.
    Raises ValueError if samples are missing (it names the first five) or if a saved index is not in
        0 to n - 1; OSError if the disk has no room for the file.
    """
    features, missing = read_features(directory, n, memory_map)
    if missing.size:
        some = ", ".join(str(sample) for sample in missing[:5])
        if missing.size > 5:
            some += ", ..."
        raise ValueError(f"{directory} lacks the features of {missing.size} of {n} samples: {some}")
    return features


def read_features(directory, n, memory_map=None, features=None):
    """Like load_features, but samples may be missing.

    features: (n, D) array to fill. None: create one.
    Returns (features (n, D), missing (m,) int64). `missing` lists the samples without features, in
        ascending order; their rows are left as they are. `features` is None if no array was given
        and no file could be read.
    The samples of a file that cannot be read, for example after a power cut, are missing.
    Raises ValueError if a saved index is not below n; OSError if the disk has no room for the file.
    """
    seen = np.zeros(n, dtype=bool)
    for path in Path(directory).glob("batch_*_features.pt"):
        try:
            batch = torch.load(path, weights_only=True)
            index = batch["index"].numpy()
            values = batch["features"].numpy()
        except Exception:  # broken files can raise anything
            continue
        if index.size and (index.min() < 0 or index.max() >= n):
            raise ValueError(
                f"{path} holds a sample outside 0 to {n - 1}: the features are of another data set"
            )
        if features is None:
            features = _empty((n, values.shape[1]), memory_map)
        features[index] = values
        seen[index] = True
    return features, np.flatnonzero(~seen)


def _empty(shape, path):
    """A float32 array without values, in memory or, if `path` is not None, in that file."""
    if path is None:
        return np.empty(shape, dtype=np.float32)
    array = np.lib.format.open_memmap(path, "w+", np.float32, shape)

    # Reserve the file's space now and raise OSError if there is too little. Otherwise a disk that
    # fills up while the array is written would kill the process.
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, os.path.getsize(path))
    return array


def _progress(loader, rank):
    """A progress bar over `loader`, shown by rank 0 alone, and only on a terminal."""
    disable = True if rank > 0 else None  # None: disabled unless the output is a terminal
    return tqdm(loader, desc="features", leave=False, disable=disable)


def _rank_and_world():
    """(this process's rank, number of processes)."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1
