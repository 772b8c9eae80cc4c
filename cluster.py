"""k-means at several granularities, and the concentration of each cluster: the E-step of PCL.

PCL (Li, Zhou, Xiong, Hoi, ICLR 2021, arXiv 2005.04966), algorithm 1 and eq. 12. The k-means is faiss's, on the GPU
where faiss sees one.

    clusters = run_kmeans(features, num_cluster=[25000, 50000, 100000], temperature=0.2)
    im2cluster, centroids, density = clusters[0]
"""

from typing import NamedTuple

import faiss
import numpy as np
import torch


class Clusters(NamedTuple):
    """One granularity: K prototypes of M samples."""

    im2cluster: torch.Tensor  # (M,) int64, the cluster of each sample
    centroids: torch.Tensor  # (K, D) float32 unit rows, the prototypes
    density: torch.Tensor  # (K,) float32 > 0, the concentration phi, a temperature per prototype


def run_kmeans(features, num_cluster, temperature, seed=0, niter=20):
    """Cluster `features` (M, D) once for each number in `num_cluster`.

    temperature: the mean of the concentrations. niter: k-means iterations.
    Returns a list of Clusters, in the order of `num_cluster`. Samples go to the nearest raw centroid; the centroids
    are normalised after that. Raises ValueError where a number is below 1 or exceeds M.
    """
    features = np.ascontiguousarray(features, dtype=np.float32)
    results = []
    for k in num_cluster:
        if not 1 <= k <= len(features):
            raise ValueError(f"cannot make {k} clusters of {len(features)} samples")
        kmeans = faiss.Kmeans(
            features.shape[1],
            k,
            niter=niter,
            seed=seed,
            gpu=faiss.get_num_gpus() > 0,
            min_points_per_centroid=1,
            max_points_per_centroid=1000,
        )
        kmeans.train(features)
        squared, assignment = kmeans.assign(features)
        centroids = kmeans.centroids / np.linalg.norm(kmeans.centroids, axis=1, keepdims=True).clip(1e-12)
        density = concentration(np.sqrt(squared.clip(0)), assignment, k, temperature)
        results.append(Clusters(*map(torch.from_numpy, (assignment.astype(np.int64), centroids, density))))
    return results


def concentration(distances, im2cluster, num_cluster, temperature):
    """The concentration phi of each cluster (PCL, eq. 12): (num_cluster,) float32 > 0 with mean `temperature`.

    distances: (M,) Euclidean, of each sample to its centroid; im2cluster: (M,) int.
    phi = sum(d) / (Z log(Z + 10)) over a cluster's Z samples; a cluster without extent (no sample, one, or copies
    of one) takes the largest phi; phi is clipped to its 10th and 90th percentile and scaled.
    """
    size = np.bincount(im2cluster, minlength=num_cluster)
    total = np.bincount(im2cluster, weights=distances, minlength=num_cluster)
    phi = total / (size.clip(1) * np.log(size + 10))
    point = (size <= 1) | (total == 0)
    if point.all():
        return np.full(num_cluster, temperature, dtype=np.float32)
    phi[point] = phi[~point].max()
    phi = phi.clip(*np.percentile(phi, [10, 90]))
    return (temperature * phi / phi.mean()).astype(np.float32)
