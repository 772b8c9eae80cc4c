"""Clustering against its definition, the feature store against the data it was made from."""

import math

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from cluster import _faiss_kmeans, _torch_kmeans, concentration, default_num_cluster, run_kmeans
from features import clear_features, compute_features, extract_features, load_features, read_features


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
    """Ten from the centroids of features that have since moved, a few epochs on: as good as the best of five times
    twenty, give or take less than what one iteration costs."""
    x, before = points(3000, dim=16), None
    for epoch in range(6):
        x = x + 0.1 * points(3000, dim=16, seed=1 + epoch)
        warm = run_kmeans(x, [60], 0.2, niter=10 if epoch else 20, init=before)[0]
        before = [warm.centroids.numpy()]
    scratch = [objective(x, run_kmeans(x, [60], 0.2, seed)[0]) for seed in range(5)]
    assert objective(x, warm) < 1.005 * min(scratch)
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


def test_default_numbers_of_clusters_are_imagenets_scaled():
    assert default_num_cluster(1_281_167) == [25_000, 50_000, 100_000]
    assert default_num_cluster(50_000) == [976, 1951, 3903]
    assert default_num_cluster(3) == [2, 2, 2] and default_num_cluster(1) == [1, 1, 1]


# -- features


class Indexed(TensorDataset):
    """`n` rows of three numbers, and their positions."""

    def __init__(self, n):
        super().__init__(torch.arange(3 * n, dtype=torch.float32).view(n, 3), torch.arange(n))
        self.rows = self.tensors[0].numpy()


def save_pass(n, batch_size, directory):
    """A pass over Indexed(n), batch by batch from front to back."""
    compute_features(DataLoader(Indexed(n), batch_size), lambda x: x, directory)
    return Indexed(n).rows


@pytest.mark.parametrize("batch_size, workers", [(1, 0), (7, 0), (50, 0), (7, 2)])
def test_features_come_back_in_data_set_order(tmp_path, batch_size, workers):
    data = Indexed(23)
    compute_features(DataLoader(data, batch_size, shuffle=True, num_workers=workers), lambda x: 2 * x, tmp_path)
    np.testing.assert_array_equal(load_features(tmp_path, 23), 2 * data.rows)
    assert len(list(tmp_path.iterdir())) == math.ceil(23 / batch_size) and (tmp_path / "batch_0_features.pt").exists()


def test_features_may_stay_on_the_disk(tmp_path):
    rows = save_pass(23, 7, tmp_path)
    mapped = load_features(tmp_path, 23, tmp_path / "features.npy")
    assert isinstance(mapped, np.memmap)
    np.testing.assert_array_equal(mapped, rows)
    for x in (mapped, np.load(tmp_path / "features.npy", mmap_mode="r")):
        for ours, theirs in zip(run_kmeans(x, [4], 0.2), run_kmeans(rows, [4], 0.2), strict=True):
            assert all(map(torch.equal, ours, theirs))


def test_features_of_an_earlier_pass_are_not_mixed_in(tmp_path):
    save_pass(40, 2, tmp_path)
    save_pass(10, 5, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2 and load_features(tmp_path, 10).shape == (10, 3)


def test_missing_and_foreign_samples_are_named(tmp_path):
    save_pass(10, 4, tmp_path)
    with pytest.raises(ValueError, match="outside 0 to 8"):
        load_features(tmp_path, 9)
    (tmp_path / "batch_1_features.pt").unlink()
    with pytest.raises(ValueError, match=r"4 of 10 samples: 4, 5, 6, 7$"):
        load_features(tmp_path, 10)


def test_what_cannot_be_read_is_missing(tmp_path):
    rows = save_pass(10, 3, tmp_path)
    first, second = (tmp_path / f"batch_{number}_features.pt" for number in (0, 1))
    first.write_bytes(b"")  # as a power cut leaves it
    second.write_bytes(second.read_bytes()[:500])
    features, missing = read_features(tmp_path, 10)
    assert missing.tolist() == [0, 1, 2, 3, 4, 5] and features.shape == (10, 3)
    np.testing.assert_array_equal(features[6:], rows[6:])
    for path in tmp_path.iterdir():
        path.unlink()
    features, missing = read_features(tmp_path, 10)
    assert features is None and missing.tolist() == list(range(10))


def test_what_is_read_joins_what_is_there(tmp_path):
    """Such as keys that a second directory completes."""
    rows = save_pass(10, 3, tmp_path)
    (tmp_path / "batch_3_features.pt").unlink()
    before = np.full((10, 3), -1, dtype=np.float32)
    features, missing = read_features(tmp_path, 10, features=before)
    assert features is before and missing.tolist() == [9]
    np.testing.assert_array_equal(before, np.concatenate([rows[:9], [[-1, -1, -1]]]))


def test_only_features_from_a_number_on_are_cleared(tmp_path):
    save_pass(10, 3, tmp_path / "features")
    clear_features(tmp_path / "features", 2)
    assert {path.name for path in (tmp_path / "features").iterdir()} == {f"batch_{i}_features.pt" for i in (0, 1)}
    clear_features(tmp_path / "features")
    clear_features(tmp_path / "another")
    assert not list((tmp_path / "features").iterdir()) and (tmp_path / "another").is_dir()


def test_extracted_features_come_in_the_order_of_the_data_set():
    data, order = Indexed(23), [5, 22, 0, 7, 1]
    features, index = extract_features(DataLoader(data, 2, sampler=order), lambda x: 2 * x.half())
    assert index.tolist() == sorted(order) and features.dtype == torch.float32
    np.testing.assert_array_equal(features, 2 * data.rows[sorted(order)])
    features, index = extract_features(DataLoader(data, 2, sampler=[]), lambda x: x)  # a rank without a share
    assert len(features) == len(index) == 0 and (features.dtype, index.dtype) == (torch.float32, torch.int64)
