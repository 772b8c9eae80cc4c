"""k-means at several granularities, and the concentration of each cluster: the E-step of PCL.

PCL (Li, Zhou, Xiong, Hoi, ICLR 2021, arXiv 2005.04966), algorithm 1 and eq. 12. The k-means is faiss's; on a GPU
that faiss does not see, as where faiss-gpu is not installed, it is torch's matrix products.

    clusters = run_kmeans(features, num_cluster=[25000, 50000, 100000], temperature=0.2)
    im2cluster, centroids, density = clusters[0]
"""

import functools
from typing import NamedTuple

import faiss
import numpy as np
import torch

IMAGENET = 1_281_167  # training images, for which 25,000, 50,000 and 100,000 clusters are published


class Clusters(NamedTuple):
    """One granularity: K prototypes of M samples."""

    im2cluster: torch.Tensor  # (M,) int64, the cluster of each sample
    centroids: torch.Tensor  # (K, D) float32 unit rows, the prototypes
    density: torch.Tensor  # (K,) float32 > 0, the concentration phi, a temperature per prototype

    def to(self, device):
        return Clusters(*(tensor.to(device) for tensor in self))

    @classmethod
    def empty(cls, m, k, d):
        """Room for what another process has found."""
        return cls(torch.empty(m, dtype=torch.long), torch.empty(k, d), torch.empty(k))


def default_num_cluster(n):
    """The published numbers of clusters, scaled from ImageNet to `n` samples."""
    return [min(n, max(2, round(k * n / IMAGENET))) for k in (25_000, 50_000, 100_000)]


def run_kmeans(features, num_cluster, temperature, seed=0, niter=20, init=None):
    """Cluster `features` (M, D) once for each number in `num_cluster`.
    features: an array in memory, or a memory-mapped one: each iteration is one pass over it from front to back.
    temperature: the mean of the concentrations. niter: k-means iterations.
    init: centroids to start from, one (K, D) per granularity, such as the prototypes of an epoch ago; then half of
        `niter` is enough. None: random samples.
    Returns a list of Clusters, in the order of `num_cluster`. Samples go to the nearest raw centroid; the centroids
    are normalised after that. Raises ValueError where a number is below 1 or exceeds M."""
    features = np.ascontiguousarray(features, dtype=np.float32)
    results = []
    for k, start in zip(num_cluster, init or [None] * len(num_cluster), strict=True):
        if not 1 <= k <= len(features):
            raise ValueError(f"cannot make {k} clusters of {len(features)} samples")
        start = None if start is None else np.ascontiguousarray(start, dtype=np.float32)
        kmeans = _torch_kmeans if torch.cuda.is_available() and not faiss.get_num_gpus() else _faiss_kmeans
        centroids, squared, assignment = kmeans(features, k, niter, seed, start)
        centroids = centroids / np.linalg.norm(centroids, axis=1, keepdims=True).clip(1e-12)
        density = concentration(np.sqrt(squared.clip(0)), assignment, k, temperature)
        results.append(Clusters(*map(torch.from_numpy, (assignment.astype(np.int64), centroids, density))))
    return results


def _faiss_kmeans(features, k, niter, seed, start):
    """(centroids (k, D), squared distance to the nearest (M,), its number (M,))."""
    sizes = {"min_points_per_centroid": 1, "max_points_per_centroid": 1000}
    kmeans = faiss.Kmeans(features.shape[1], k, niter=niter, seed=seed, **sizes)
    if faiss.get_num_gpus():  # this process's own; gpu=True would take all of them
        config = faiss.GpuIndexFlatConfig()
        config.device = torch.cuda.current_device() if torch.cuda.is_available() else 0
        kmeans.index = faiss.GpuIndexFlatL2(_gpu_resources(), features.shape[1], config)
    kmeans.train(features, init_centroids=start)
    return kmeans.centroids, *kmeans.assign(features)


@functools.cache
def _gpu_resources():
    """faiss's memory on a GPU, which takes a while to set up: once a process."""
    return faiss.StandardGpuResources()


def _torch_kmeans(features, k, niter, seed, start, device="cuda"):
    """The same on `device`, with the distances of a gigabyte at a time."""
    rng = np.random.default_rng(seed)
    if start is None:
        start = features[np.sort(rng.choice(len(features), k, replace=False))]
    centroids, features = (torch.from_numpy(array).to(device) for array in (start, features))

    def nearest():
        half = centroids.square().sum(1) / 2
        for x in features.split(max(1, 2**28 // k)):  # (n, D)
            distance, number = torch.addmm(half, x, centroids.T, alpha=-1).min(1)  # (n,), half of (x - c)^2 - x^2
            yield x, 2 * distance + x.square().sum(1), number

    for _ in range(niter):
        sums, size = torch.zeros_like(centroids), torch.zeros(k, dtype=torch.long, device=device)
        for x, _, number in nearest():
            sums.index_add_(0, number, x)
            size += number.bincount(minlength=k)
        centroids = sums / size.clamp(min=1)[:, None]
        empty = (size == 0).nonzero()[:, 0]  # each gets half of a cluster of some size, as in faiss
        chances = (size.cpu().numpy() - 1).clip(0).astype(float)
        if len(empty) and chances.any():
            split = torch.from_numpy(rng.choice(k, len(empty), p=chances / chances.sum())).to(device)
            centroids[empty] = centroids[split] * (1 + 2**-10)
            centroids[split] *= 1 - 2**-10
    squared, assignment = zip(*((d.cpu(), number.cpu()) for _, d, number in nearest()), strict=True)
    return centroids.cpu().numpy(), torch.cat(squared).numpy(), torch.cat(assignment).numpy()


def concentration(distances, im2cluster, num_cluster, temperature):
    """The concentration phi of each cluster (PCL, eq. 12): (num_cluster,) float32 > 0 with mean `temperature`.
    distances: (M,) Euclidean, of each sample to its centroid; im2cluster: (M,) int.
    phi = sum(d) / (Z log(Z + 10)) over a cluster's Z samples; a cluster without extent (no sample, one, or copies
    of one) takes the largest phi; phi is clipped to its 10th and 90th percentile and scaled."""
    size = np.bincount(im2cluster, minlength=num_cluster)
    total = np.bincount(im2cluster, weights=distances, minlength=num_cluster)
    phi = total / (size.clip(1) * np.log(size + 10))
    point = (size <= 1) | (total == 0)
    if point.all():
        return np.full(num_cluster, temperature, dtype=np.float32)
    phi[point] = phi[~point].max()
    phi = phi.clip(*np.percentile(phi, [10, 90]))
    return (temperature * phi / phi.mean()).astype(np.float32)
