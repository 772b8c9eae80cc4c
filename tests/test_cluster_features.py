"""Clustering against its definition, the feature store against the data it was made from."""

import math

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from cluster import concentration, run_kmeans
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
