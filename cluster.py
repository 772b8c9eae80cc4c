"""k-means at several granularities, and the concentration of each cluster: the E-step of PCL.

PCL (Li, Zhou, Xiong, Hoi, ICLR 2021, arXiv 2005.04966), algorithm 1 and eq. 12. faiss runs the
k-means. If there is a GPU that faiss cannot use, for example because faiss-cpu is installed, a
k-means in PyTorch runs on it instead.

    num_cluster = default_num_cluster(len(features))  # [25000, 50000, 100000] on ImageNet
    clusters = run_kmeans(features, num_cluster, temperature=0.2)
    im2cluster, centroids, density = clusters[0]
"""

import functools
from typing import NamedTuple

import faiss
import numpy as np
import torch

IMAGENET = 1_281_167  # number of ImageNet's training images
IMAGENET_CLUSTERS = (25_000, 50_000, 100_000)  # published for that many images
CHUNK = 2**28  # distances that are computed at a time: 1 GB in float32
ROWS = 2**16  # rows of features that are checked at a time
LARGEST = 1e18  # length of a row; k-means squares differences of rows, and float32 ends at 3e38
ROUNDING = 2e-3  # distances are off by up to this fraction of a row's length, about sqrt(32 eps)
POINT = 0.05  # a cluster with less than this fraction of the usual extent is a point


class Clusters(NamedTuple):
    """The clusters at one granularity: K prototypes of M samples."""

    im2cluster: torch.Tensor  # (M,) int64, the cluster of each sample
    centroids: torch.Tensor  # (K, D) float32 unit rows, the prototypes
    density: torch.Tensor  # (K,) float32 > 0, the concentration phi, a temperature per prototype

    def to(self, device):
        return Clusters(*(tensor.to(device) for tensor in self))


def default_num_cluster(n):
    """The published numbers of clusters, scaled from ImageNet to `n` samples."""
    return [min(n, max(2, round(k * n / IMAGENET))) for k in IMAGENET_CLUSTERS]


def run_kmeans(features, num_cluster, temperature, seed=0, niter=20, init=None):
    """Cluster `features` (M, D) once for each number in `num_cluster`.

    features: array in memory or memory-mapped. With faiss, k-means itself uses at most 1000 K of
        the samples, drawn at random.
    temperature: the mean of the concentrations.
    niter: number of k-means iterations.
    init: centroids to start from, one (K, D) per granularity, for example the prototypes of the
        previous epoch. With those, half the iterations are enough. None: start from random samples.
    Returns a list of Clusters in the order of `num_cluster`. A sample belongs to the
        centroid that is nearest to it before the centroids are normalised.
    Raises ValueError if a number is below 1 or exceeds M; if the centroids to start from are not
        (K, D); or if a row of `features` or `init` is not finite or longer than LARGEST. The
        message then has the number of the first such row.
    """
    with np.errstate(over="ignore"):  # a float64 may be infinite in float32; the next line finds it
        features = np.ascontiguousarray(features, dtype=np.float32)
    lengths = row_lengths(features, "features")
    if init is None:
        init = [None] * len(num_cluster)
    if torch.cuda.is_available() and not faiss.get_num_gpus():
        kmeans = _torch_kmeans
    else:
        kmeans = _faiss_kmeans

    results = []
    for k, start in zip(num_cluster, init, strict=True):
        if not 1 <= k <= len(features):
            raise ValueError(f"cannot make {k} clusters of {len(features)} samples")
        if start is not None:
            start = np.ascontiguousarray(start, dtype=np.float32)
            wanted = (k, features.shape[1])
            if start.shape != wanted:  # more centroids would end the process in faiss
                raise ValueError(f"the centroids to start from are {start.shape}, not {wanted}")
            row_lengths(start, "the centroids to start from")
        centroids, squared, assignment = kmeans(features, k, niter, seed, start)

        length = np.linalg.norm(centroids, axis=1, keepdims=True)
        prototypes = centroids / length.clip(1e-12)
        distances = np.sqrt(squared.clip(0))  # rounding can make a square negative
        density = concentration(distances, assignment, k, temperature, lengths)
        results.append(
            Clusters(
                im2cluster=torch.from_numpy(assignment.astype(np.int64)),
                centroids=torch.from_numpy(prototypes),
                density=torch.from_numpy(density),
            )
        )
    return results


def row_lengths(rows, name):
    """The Euclidean length of each row of `rows` (M, D), in float64: (M,).

    name: what the rows are, for the message.
    Raises ValueError with the number of the first row that is not finite or longer than LARGEST:
        one such row spoils every centroid in PyTorch, and ends the process in faiss.
    """
    lengths = np.empty(len(rows))
    for first in range(0, len(rows), ROWS):
        part = rows[first : first + ROWS]
        squares = np.einsum("ij,ij->i", part, part, dtype=np.float64)
        lengths[first : first + ROWS] = np.sqrt(squares)
    bad = np.flatnonzero(~(lengths <= LARGEST))  # also true of nan
    if len(bad):
        row = bad[0]
        problem = "too large to square"
        if not np.isfinite(rows[row]).all():
            problem = "not finite"
        raise ValueError(f"row {row} of {name} is {problem} ({len(bad)} of {len(rows)} rows are)")
    return lengths


def _faiss_kmeans(features, k, niter, seed, start):
    """k-means in faiss.

    Returns the centroids (k, D), and for each sample the squared distance to its nearest centroid
    (M,) and the number of that centroid (M,).
    """
    kmeans = faiss.Kmeans(
        features.shape[1],
        k,
        niter=niter,
        seed=seed,
        min_points_per_centroid=1,  # with fewer samples faiss warns
        max_points_per_centroid=1000,  # with more samples faiss trains on a random part of them
    )
    if faiss.get_num_gpus():
        # Use the GPU of this process. The option gpu=True would use all GPUs.
        config = faiss.GpuIndexFlatConfig()
        if torch.cuda.is_available():
            config.device = torch.cuda.current_device()
        kmeans.index = faiss.GpuIndexFlatL2(_gpu_resources(), features.shape[1], config)
    kmeans.train(features, init_centroids=start)
    squared, assignment = kmeans.assign(features)
    return kmeans.centroids, squared, assignment


@functools.cache
def _gpu_resources():
    """faiss's memory on the GPU. Allocating it is slow, so it is done once per process."""
    return faiss.StandardGpuResources()


def _torch_kmeans(features, k, niter, seed, start, device="cuda"):
    """k-means in PyTorch on `device`. Arguments and results are those of _faiss_kmeans."""
    rng = np.random.default_rng(seed)
    if start is None:
        start = features[np.sort(rng.choice(len(features), k, replace=False))]
    centroids = torch.from_numpy(start).to(device)
    features = torch.from_numpy(features).to(device)

    for _ in range(niter):
        # Move each centroid to the mean of its samples.
        sums = torch.zeros_like(centroids)
        size = torch.zeros(k, dtype=torch.long, device=device)
        for x, _, number in _nearest(features, centroids):
            sums.index_add_(0, number, x)
            size.index_add_(0, number, torch.ones_like(number))  # bincount waits for the GPU
        centroids = sums / size.clamp(min=1)[:, None]

        # Fill each empty cluster with half of another one, much as faiss does. Large clusters are
        # more likely to be split. Halves of the same one coincide until later iterations.
        empty = (size == 0).nonzero()[:, 0]
        if len(empty) > 0:  # then another cluster has two samples or more
            chances = (size.cpu().numpy() - 1).clip(0).astype(float)
            split = rng.choice(k, len(empty), p=chances / chances.sum())
            split = torch.from_numpy(split).to(device)
            centroids[empty] = centroids[split] * (1 + 2**-10)
            centroids[split] *= 1 - 2**-10

    squared = []
    assignment = []
    for _, distance, number in _nearest(features, centroids):
        squared.append(distance.cpu())
        assignment.append(number.cpu())
    return centroids.cpu().numpy(), torch.cat(squared).numpy(), torch.cat(assignment).numpy()


def _nearest(features, centroids):
    """Find the nearest centroid of each sample, chunk by chunk.

    Yields (x (n, D), squared distances (n,), numbers of the centroids (n,)).
    """
    half_norms = centroids.square().sum(1) / 2
    for x in features.split(max(1, CHUNK // len(centroids))):
        # |x - c|^2 = |x|^2 + 2 (|c|^2 / 2 - x c), and |x|^2 is the same for all centroids
        half, number = torch.addmm(half_norms, x, centroids.T, alpha=-1).min(1)
        yield x, 2 * half + x.square().sum(1), number


def concentration(distances, im2cluster, num_cluster, temperature, lengths=None):
    """The concentration phi of each cluster (PCL, eq. 12): (num_cluster,) float32 > 0.

    distances: (M,) Euclidean distance of each sample to its centroid.
    im2cluster: (M,) int, the cluster of each sample.
    lengths: (M,) Euclidean length of each sample, which limits the precision of its distance. None:
        the distances are exact.
    A cluster of Z samples has phi = sum(distances) / (Z log(Z + alpha)), with the published alpha
    of 10. A cluster that is a point gets the largest phi of the others. Then phi is clipped to its
    10th and 90th percentiles and scaled to the mean `temperature`. If all clusters are points, all
    get the mean.

    A cluster is a point if its extent, the mean distance of its samples, is
    - that of one sample or of none,
    - within the rounding error of the distances, or
    - less than POINT of the usual extent, the 90th percentile over the other clusters.
    The last two are clusters of copies: burst photos, frames of a film, empty tiles. In float32
    their distances are 1e-7 to 1e-3, not 0. Such an extent says nothing about how far the next
    image may lie from the prototype, just as one sample says nothing. At face value such a cluster
    would count as the most concentrated. If more than a tenth of the clusters were like this, the
    clip would leave them a phi near 0, and ProtoNCE, which divides by phi, would explode.
    """
    size = np.bincount(im2cluster, minlength=num_cluster)
    total = np.bincount(im2cluster, weights=distances, minlength=num_cluster)
    extent = total / size.clip(1)
    phi = total / (size.clip(1) * np.log(size + 10))

    # clusters that are points
    error = 0.0
    if lengths is not None:
        error = ROUNDING * np.bincount(im2cluster, weights=lengths, minlength=num_cluster)
    is_point = (size <= 1) | (total <= error)
    if is_point.all():
        return np.full(num_cluster, temperature, dtype=np.float32)
    usual = np.percentile(extent[~is_point], 90)
    is_point |= extent < POINT * usual
    phi[is_point] = phi[~is_point].max()

    low, high = np.percentile(phi, [10, 90])
    phi = phi.clip(low, high)
    return (temperature * phi / phi.mean()).astype(np.float32)
