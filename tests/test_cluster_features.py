"""Clustering against its definition, the feature store against the data it was made from."""

import math

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from cluster import _faiss_kmeans, _torch_kmeans, concentration, run_kmeans
from features import compute_features, load_features


def points(n, dim=6, seed=0):
    x = np.random.default_rng(seed).normal(size=(n, dim)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_concentration_is_its_definition():
    rng = np.random.default_rng(0)
    im2cluster = np.concatenate([rng.integers(0, 8, 60), [8]])  # cluster 8 has one sample, 9 none
    distances = rng.random(61)
    phi = []
    for c in range(10):
        d = [distances[i] for i in range(61) if im2cluster[i] == c]
        phi.append(sum(d) / (len(d) * math.log(len(d) + 10)) if len(d) > 1 else None)
    largest = max(p for p in phi if p is not None)
    phi = np.array([largest if p is None else p for p in phi])
    phi = np.clip(phi, np.percentile(phi, 10), np.percentile(phi, 90))
    np.testing.assert_allclose(concentration(distances, im2cluster, 10, 0.2), 0.2 * phi / phi.mean(), rtol=1e-5)


def test_samples_go_to_the_nearest_centroid_and_prototypes_are_unit_rows():
    x = points(300)
    for clusters, k in zip(run_kmeans(x, [5, 12], 0.3), [5, 12], strict=True):
        assert clusters.im2cluster.dtype == torch.int64 and clusters.centroids.dtype == torch.float32
        assert clusters.centroids.shape == (k, 6)
        np.testing.assert_allclose(np.linalg.norm(clusters.centroids, axis=1), 1, rtol=1e-5)
        assert clusters.density.mean().item() == pytest.approx(0.3, rel=1e-5) and (clusters.density > 0).all()
        means = np.stack([x[clusters.im2cluster.numpy() == c].mean(0) for c in range(k)])
        nearest = ((x[:, None] - means) ** 2).sum(2).argmin(1)
        assert (nearest == clusters.im2cluster.numpy()).mean() > 0.95  # the raw centroids are almost these means


def test_clustering_is_repeatable_and_follows_its_seed():
    x = points(200)
    a, b, c = (run_kmeans(x, [9], 0.2, seed)[0].centroids for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_as_many_clusters_as_samples_and_no_more():
    clusters = run_kmeans(points(20), [20], 0.2)[0]
    assert clusters.im2cluster.unique().numel() == 20 and torch.isfinite(clusters.density).all()
    with pytest.raises(ValueError, match="21 clusters of 20 samples"):
        run_kmeans(points(20), [21], 0.2)


def test_duplicates_give_finite_positive_concentrations():
    for x in (np.repeat(points(3), 20, axis=0), np.repeat(points(1), 40, axis=0)):
        clusters = run_kmeans(x, [8], 0.2)[0]
        assert torch.isfinite(clusters.centroids).all() and (clusters.density > 0).all()


def objective(x, clusters):
    means = np.stack([x[clusters.im2cluster.numpy() == c].mean(0) for c in clusters.im2cluster.unique().tolist()])
    return ((x[:, None] - means) ** 2).sum(2).min(1).sum()


def test_a_warm_start_needs_half_the_iterations():
    """Ten from the centroids of features that have since moved, a few epochs on: the best of five times twenty."""
    x, before = points(3000, dim=16), None
    for epoch in range(6):
        x = x + 0.1 * points(3000, dim=16, seed=1 + epoch)
        warm = run_kmeans(x, [60], 0.2, niter=10 if epoch else 20, init=before)[0]
        before = [warm.centroids.numpy()]
    scratch = [objective(x, run_kmeans(x, [60], 0.2, seed)[0]) for seed in range(5)]
    assert objective(x, warm) <= min(scratch)
    assert objective(x, run_kmeans(x, [60], 0.2, niter=1)[0]) > 1.02 * min(scratch)  # the measure tells them apart


def test_each_granularity_starts_from_its_own_centroids():
    x = points(200)
    first = run_kmeans(x, [5, 9], 0.2)
    again = run_kmeans(x, [5, 9], 0.2, seed=7, niter=20, init=[c.centroids.numpy() for c in first])
    mixed = run_kmeans(x, [5, 9], 0.2, seed=7, niter=20, init=[None, first[1].centroids.numpy()])
    assert torch.equal(again[1].im2cluster, mixed[1].im2cluster)
    assert not torch.equal(again[0].im2cluster, mixed[0].im2cluster)


@pytest.mark.parametrize("m, k", [(3000, 60), (40, 30)])
def test_torchs_kmeans_is_faisss(m, k):
    """From the same start the same objective, but for how empty clusters are filled; every sample at its nearest."""
    x, start = points(m, dim=16), points(k, dim=16, seed=5)
    found = _torch_kmeans(x, k, 20, 0, start, device="cpu")
    other = _faiss_kmeans(x, k, 20, 0, start)
    distances = ((x[:, None] - found[0]) ** 2).sum(2)
    np.testing.assert_allclose(found[1], distances.min(1), atol=1e-5)
    assert (distances[np.arange(m), found[2]] <= distances.min(1) + 1e-5).all()
    assert found[1].sum() == pytest.approx(other[1].sum(), rel=0.02 if m == 3000 else 0.2)
    assert np.bincount(found[2], minlength=k).min() > 0
    copies = np.repeat(points(3), 20, axis=0)
    assert np.isfinite(_torch_kmeans(copies, 8, 5, 0, None, device="cpu")[0]).all()


def test_features_may_stay_on_the_disk(tmp_path):
    compute_features(DataLoader(Indexed(23), 7), lambda x: x, tmp_path)
    mapped = load_features(tmp_path, 23, tmp_path / "features.npy")
    assert isinstance(mapped, np.memmap)
    np.testing.assert_array_equal(mapped, load_features(tmp_path, 23))
    for x in (mapped, np.load(tmp_path / "features.npy", mmap_mode="r")):
        for ours, theirs in zip(run_kmeans(x, [4], 0.2), run_kmeans(np.array(mapped), [4], 0.2), strict=True):
            assert all(map(torch.equal, ours, theirs))


class Indexed(TensorDataset):
    def __init__(self, n):
        super().__init__(torch.arange(3 * n, dtype=torch.float32).view(n, 3), torch.arange(n))


@pytest.mark.parametrize("batch_size, workers", [(1, 0), (7, 0), (50, 0), (7, 2)])
def test_features_come_back_in_data_set_order(tmp_path, batch_size, workers):
    data = Indexed(23)
    compute_features(DataLoader(data, batch_size, shuffle=True, num_workers=workers), lambda x: 2 * x, tmp_path)
    np.testing.assert_array_equal(load_features(tmp_path, 23), 2 * data.tensors[0].numpy())
    assert (tmp_path / "batch_0_features.pt").exists() and not list(tmp_path.glob("*.tmp"))


def test_features_of_an_earlier_pass_are_not_mixed_in(tmp_path):
    compute_features(DataLoader(Indexed(40), 2), lambda x: x, tmp_path)
    compute_features(DataLoader(Indexed(10), 5), lambda x: x, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2 and load_features(tmp_path, 10).shape == (10, 3)


def test_missing_and_foreign_samples_are_named(tmp_path):
    compute_features(DataLoader(Indexed(10), 4), lambda x: x, tmp_path)
    with pytest.raises(ValueError, match="outside 0 to 8"):
        load_features(tmp_path, 9)
    (tmp_path / "batch_1_features.pt").unlink()
    with pytest.raises(ValueError, match=r"4 of 10 samples: 4, 5, 6, 7$"):
        load_features(tmp_path, 10)
