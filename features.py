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
def compute_features(loader, model, directory, device="cpu", first=0):
    """Save `model(images)` of every batch of `loader` as `directory`/batch_{i}_features.pt.

    loader: yields (images, index), index (B,) the positions in the data set; on several ranks, each has its share.
    model: images (B, ...) on `device` -> features (B, D); it is called as it is, so put it in eval mode first.
    first: number of the first file; to take up an interrupted pass, what saved_batches says.
    Features left in `directory` by an earlier pass, from number `first` on, are removed. Each file appears whole or
    not at all, and holds {"index": (B,) int64, "features": (B, D) float32}. Returns when all ranks are done. Raises
    OSError where a file cannot be written.
    """
    directory = Path(directory)
    distributed = dist.is_available() and dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    if rank == 0:
        directory.mkdir(parents=True, exist_ok=True)
        for old in directory.glob("batch_*_features.pt*"):
            if _number(old) >= first or old.suffix == ".tmp":
                old.unlink()
    if distributed:
        dist.barrier()
    progress = tqdm(loader, desc="features", leave=False, disable=None if rank == 0 else True)
    for i, (images, index) in enumerate(progress):
        features = model(images.to(device, non_blocking=True))
        save_batch(directory, first + i * world + rank, index, features)
    if distributed:
        dist.barrier()


def save_batch(directory, number, index, features):
    """Write `directory`/batch_{number}_features.pt: whole or not at all. index: (B,) int64; features: (B, D)."""
    path = Path(directory) / f"batch_{number}_features.pt"
    file = io.BytesIO()  # torch's own writer does not say that a disk is full
    torch.save({"index": torch.as_tensor(index), "features": features.float().cpu()}, file)
    Path(f"{path}.tmp").write_bytes(file.getbuffer())
    os.replace(f"{path}.tmp", path)


def saved_batches(directory):
    """What an interrupted pass has left in `directory`: (index (m,) int64 of the samples done, `first` to go on with).

    A file that cannot be read, as after a power cut, is removed.
    """
    done, first = [torch.empty(0, dtype=torch.long)], 0
    for path in Path(directory).glob("batch_*_features.pt"):
        try:
            done.append(torch.load(path, weights_only=True)["index"])
            first = max(first, _number(path) + 1)
        except Exception:  # there is no end to what broken files make the reader raise
            path.unlink()
    return torch.cat(done), first


def _number(path):
    return int(path.name.split("_")[1])


def load_features(directory, n, memory_map=None):
    """The saved features of samples 0 to n - 1 in data set order: (n, D) float32 array.

    memory_map: path of a file to keep the array in, so that it need not fit in memory; np.load(path, mmap_mode="c")
        opens it again.
    Raises ValueError where samples are missing (saying how many and which), or where a saved index is not below n,
    and OSError where the disk has no room for the file.
    """
    features, seen = None, np.zeros(n, dtype=bool)
    for path in Path(directory).glob("batch_*_features.pt"):
        batch = torch.load(path, weights_only=True)
        index = batch["index"].numpy()
        if index.size and (index.min() < 0 or index.max() >= n):
            raise ValueError(f"{path} holds a sample outside 0 to {n - 1}: the features are of another data set")
        if features is None:
            features = _empty((n, batch["features"].shape[1]), memory_map)
        features[index] = batch["features"].numpy()
        seen[index] = True
    missing = np.flatnonzero(~seen)
    if missing.size:
        some = ", ".join(map(str, missing[:5])) + (", ..." if missing.size > 5 else "")
        raise ValueError(f"{directory} lacks the features of {missing.size} of {n} samples: {some}")
    return features


def _empty(shape, path):
    """A float32 array without values, in memory or in the file `path`."""
    if path is None:
        return np.empty(shape, dtype=np.float32)
    array = np.lib.format.open_memmap(path, "w+", np.float32, shape)
    if hasattr(os, "posix_fallocate"):  # a disk that fills up while the array is written would kill the process
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, os.path.getsize(path))
    return array
