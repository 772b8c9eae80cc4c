"""One pass over a data set, each batch of features saved as it comes, and reading it back.

The batches go to files of their own, so the pass needs the memory of one batch however large the data set is.
Under torch.distributed every rank passes over its own share of the data and saves into the same directory.

    loader = DataLoader(dataset, batch_size=256)                  # yields (images, index)
    compute_features(loader, encoder, "features")                 # features/batch_0_features.pt, ...
    features = load_features("features", n=len(dataset))          # (n, D) float32, row i = sample i
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
    """Save `model(images)` of every batch of `loader` as `directory`/batch_{i}_features.pt.
    loader: yields (images, index), index (B,) the positions in the data set; on several ranks, each has its share.
    model: images (B, ...) on `device` -> features (B, D), in eval mode already. What an earlier pass has left goes. A
    file holds {"index": (B,) int64, "features": (B, D) float32}. Raises OSError where one cannot be written."""
    rank, world = _rank_and_world()
    clear_features(directory)
    for i, (images, index) in enumerate(
        tqdm(loader, desc="features", leave=False, disable=None if rank == 0 else True)
    ):
        save_features(directory, i * world + rank, index, model(images.to(device, non_blocking=True)))
    if world > 1:
        dist.barrier()


@torch.no_grad()
def extract_features(loader, model, device="cpu"):
    """`model(images)` of all of `loader` and of those of the other ranks, kept in memory: (features (n, D) float32,
    index (n,) int64), in the order of the data set, on the CPU of every rank."""
    parts = [(torch.empty(0), torch.empty(0, dtype=torch.long))]  # all that a rank without a share has
    rank, world = _rank_and_world()
    for images, index in tqdm(loader, desc="features", leave=False, disable=None if rank == 0 else True):
        parts.append((model(images.to(device, non_blocking=True)).float().cpu(), torch.as_tensor(index)))
    shares = [tuple(map(torch.cat, zip(*parts, strict=True)))] * world
    if world > 1:
        dist.all_gather_object(shares, shares[rank])
    features, index = map(torch.cat, zip(*shares, strict=True))
    order = index.argsort()
    return features[order], index[order]


def save_features(directory, number, index, features):
    """Write `directory`/batch_{number}_features.pt. index: (B,) int64; features: (B, D). OSError on a full disk."""
    file = io.BytesIO()  # torch's own writer does not say that a disk is full
    torch.save({"index": torch.as_tensor(index), "features": features.float().cpu()}, file)
    (Path(directory) / f"batch_{number}_features.pt").write_bytes(file.getbuffer())


def clear_features(directory, first=0):
    """Create `directory` and remove the features in it from number `first` on; all ranks have to call it."""
    rank, world = _rank_and_world()
    if rank == 0:
        Path(directory).mkdir(parents=True, exist_ok=True)
        for path in Path(directory).glob("batch_*_features.pt"):
            if int(path.name.split("_")[1]) >= first:
                path.unlink()
    if world > 1:
        dist.barrier()


def load_features(directory, n, memory_map=None):
    """The saved features of samples 0 to n - 1 in data set order: (n, D) float32 array.
    memory_map: path of a file to keep the array in, so that it need not fit in memory; np.load(path, mmap_mode="c")
        opens it again.
    Raises ValueError where samples are missing (saying how many and which), or where a saved index is not below n,
    and OSError where the disk has no room for the file."""
    features, missing = read_features(directory, n, memory_map)
    if missing.size:
        some = ", ".join(map(str, missing[:5])) + (", ..." if missing.size > 5 else "")
        raise ValueError(f"{directory} lacks the features of {missing.size} of {n} samples: {some}")
    return features


def read_features(directory, n, memory_map=None, features=None):
    """As load_features, but samples may be missing: (features (n, D), missing (m,) int64 in ascending order).
    features: the array to put them in; None: a new one, and None comes back where there is nothing to put there. The
    samples of a file that is not whole, as after a power cut, are missing."""
    seen = np.zeros(n, dtype=bool)
    for path in Path(directory).glob("batch_*_features.pt"):
        try:
            batch = torch.load(path, weights_only=True)
            index, values = batch["index"].numpy(), batch["features"].numpy()
        except Exception:  # there is no end to what broken files make the reader raise
            continue
        if index.size and (index.min() < 0 or index.max() >= n):
            raise ValueError(f"{path} holds a sample outside 0 to {n - 1}: the features are of another data set")
        if features is None:
            features = _empty((n, values.shape[1]), memory_map)
        features[index] = values
        seen[index] = True
    return features, np.flatnonzero(~seen)


def _empty(shape, path):
    """A float32 array without values, in memory or in the file `path`."""
    if path is None:
        return np.empty(shape, dtype=np.float32)
    array = np.lib.format.open_memmap(path, "w+", np.float32, shape)
    if hasattr(os, "posix_fallocate"):  # a disk that fills up while the array is written would kill the process
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, os.path.getsize(path))
    return array


def _rank_and_world():
    """(this process's rank, number of processes)."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1
