"""Clustering against its definition, and saved features against the data they come from."""

import math

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from cluster import _faiss_kmeans, _torch_kmeans, concentration, default_num_cluster, run_kmeans
from features import (
    clear_features,
    compute_features,
    extract_features,
    load_features,
    read_features,
)


def points(n, dim=6, seed=0):
    """`n` random unit rows."""
    x = np.random.default_rng(seed).normal(size=(n, dim)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


# -- clustering


def test_concentration_follows_its_definition():
    rng = np.random.default_rng(0)
    im2cluster = np.concatenate([rng.integers(0, 8, 60), [8]])  # cluster 8 has one sample, 9 none
    distances = rng.random(61)

    phi = {}
    for c in range(10):
        d = [distances[i] for i in range(61) if im2cluster[i] == c]
        if len(d) > 1:
            phi[c] = sum(d) / (len(d) * math.log(len(d) + 10))
    assert len(phi) == 8
    largest = max(phi.values())
    phi = np.array([phi.get(c, largest) for c in range(10)])
    phi = np.clip(phi, np.percentile(phi, 10), np.percentile(phi, 90))
    expected = 0.2 * phi / phi.mean()
    np.testing.assert_allclose(concentration(distances, im2cluster, 10, 0.2), expected, rtol=1e-5)


def test_a_cluster_is_a_point_if_its_extent_is_a_twentieth_of_the_usual():
    """The usual extent is the 90th percentile, of ten clusters between the largest two: 9.1."""
    extents = np.array([0.4, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0])
    phi = extents / math.log(3 + 10)  # of three samples each
    for extent, is_point in ((0.46, False), (0.45, True)):  # 9.1 / 20 = 0.455
        phi[0] = phi[-1] if is_point else extent / math.log(3 + 10)
        clipped = phi.clip(*np.percentile(phi, [10, 90]))
        extents[0] = extent
        found = concentration(extents.repeat(3), np.arange(10).repeat(3), 10, 0.2)
        np.testing.assert_allclose(found, 0.2 * clipped / clipped.mean(), rtol=1e-5)


def test_samples_belong_to_the_nearest_centroid_and_prototypes_are_unit_rows():
    x = points(300)
    for clusters, k in zip(run_kmeans(x, [5, 12], 0.3), [5, 12], strict=True):
        im2cluster = clusters.im2cluster.numpy()
        assert clusters.im2cluster.dtype == torch.int64
        assert clusters.centroids.dtype == torch.float32
        assert clusters.centroids.shape == (k, 6)
        np.testing.assert_allclose(np.linalg.norm(clusters.centroids, axis=1), 1, rtol=1e-5)
        assert (clusters.density > 0).all()
        assert clusters.density.mean().item() == pytest.approx(0.3, rel=1e-5)

        # the raw centroids are almost the means of their samples
        means = np.stack([x[im2cluster == c].mean(0) for c in range(k)])
        nearest = ((x[:, None] - means) ** 2).sum(2).argmin(1)
        assert (nearest == im2cluster).mean() > 0.95


def test_clustering_is_repeatable_and_depends_on_the_seed():
    x = points(200)
    a, b, c = (run_kmeans(x, [9], 0.2, seed)[0].centroids for seed in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_there_may_be_as_many_clusters_as_samples_but_not_more():
    clusters = run_kmeans(points(20), [20], 0.2)[0]
    assert clusters.im2cluster.unique().numel() == 20
    assert torch.isfinite(clusters.density).all()
    with pytest.raises(ValueError, match="21 clusters of 20 samples"):
        run_kmeans(points(20), [21], 0.2)


def test_duplicates_give_finite_positive_concentrations():
    for x in (np.repeat(points(3), 20, axis=0), np.repeat(points(1), 40, axis=0)):
        clusters = run_kmeans(x, [8], 0.2)[0]
        assert torch.isfinite(clusters.centroids).all()
        assert (clusters.density > 0).all()


def test_the_concentration_is_that_of_euclidean_distances_to_the_centroids():
    """After k-means has converged, when its centroids are the means of their clusters."""
    x = points(400)
    x[:200] = 0.9 * x[0] + 0.1 * x[:200]  # clusters of different extents
    (clusters,) = run_kmeans(x, [12], 0.2, niter=100)
    phi = []
    for c in range(12):
        members = x[clusters.im2cluster.numpy() == c]
        distances = np.linalg.norm(members - members.mean(0), axis=1)
        phi.append(distances.sum() / (len(members) * math.log(len(members) + 10)))
    phi = np.clip(phi, *np.percentile(phi, [10, 90]))
    assert phi.max() > 2 * phi.min()
    np.testing.assert_allclose(clusters.density, 0.2 * phi / phi.mean(), rtol=1e-3)


def objective(x, clusters):
    """The sum of squared distances of the samples to the nearest cluster mean."""
    numbers = clusters.im2cluster.unique().tolist()
    means = np.stack([x[clusters.im2cluster.numpy() == c].mean(0) for c in numbers])
    return ((x[:, None] - means) ** 2).sum(2).min(1).sum()


def test_a_warm_start_needs_half_the_iterations():
    """Features move from epoch to epoch, and each clustering starts from the previous centroids.

    Ten such iterations are as good as the best of five runs of twenty from scratch. The tolerance
    is less than one iteration is worth.
    """
    x = points(3000, dim=16)
    warm = None
    for epoch in range(6):
        x = x + 0.1 * points(3000, dim=16, seed=1 + epoch)
        if warm is None:
            warm = run_kmeans(x, [60], 0.2, niter=20)[0]
        else:
            warm = run_kmeans(x, [60], 0.2, niter=10, init=[warm.centroids.numpy()])[0]

    scratch = [objective(x, run_kmeans(x, [60], 0.2, seed)[0]) for seed in range(5)]
    one_iteration = run_kmeans(x, [60], 0.2, niter=1)[0]
    assert objective(x, warm) < 1.005 * min(scratch)
    assert objective(x, one_iteration) > 1.02 * min(scratch)  # the objective shows a difference


def test_each_granularity_starts_from_its_own_centroids():
    x = points(200)
    first = run_kmeans(x, [5, 9], 0.2)
    init = [clusters.centroids.numpy() for clusters in first]
    again = run_kmeans(x, [5, 9], 0.2, seed=7, niter=20, init=init)
    mixed = run_kmeans(x, [5, 9], 0.2, seed=7, niter=20, init=[None, init[1]])
    assert torch.equal(again[1].im2cluster, mixed[1].im2cluster)
    assert not torch.equal(again[0].im2cluster, mixed[0].im2cluster)


@pytest.mark.parametrize("m, k, tolerance", [(3000, 60, 0.02), (40, 30, 0.2)])
def test_kmeans_in_torch_matches_faiss(m, k, tolerance):
    """From the same start both reach about the same objective.

    They differ a little because they fill empty clusters differently.
    """
    x = points(m, dim=16)
    start = points(k, dim=16, seed=5)
    centroids, squared, assignment = _torch_kmeans(x, k, 20, 0, start, device="cpu")
    _, faiss_squared, _ = _faiss_kmeans(x, k, 20, 0, start)

    distances = ((x[:, None] - centroids) ** 2).sum(2)
    np.testing.assert_allclose(squared, distances.min(1), atol=1e-5)
    assert (distances[np.arange(m), assignment] <= distances.min(1) + 1e-5).all()
    assert squared.sum() == pytest.approx(faiss_squared.sum(), rel=tolerance)
    assert np.bincount(assignment, minlength=k).min() > 0


def test_kmeans_in_torch_gives_finite_centroids_for_duplicates():
    copies = np.repeat(points(3), 20, axis=0)
    centroids, _, _ = _torch_kmeans(copies, 8, 5, 0, None, device="cpu")
    assert np.isfinite(centroids).all()


def test_default_numbers_of_clusters_are_scaled_from_imagenet():
    assert default_num_cluster(1_281_167) == [25_000, 50_000, 100_000]
    assert default_num_cluster(50_000) == [976, 1951, 3903]
    assert default_num_cluster(3) == [2, 2, 2]
    assert default_num_cluster(1) == [1, 1, 1]


# -- features


class Indexed(TensorDataset):
    """`n` rows of three numbers, and their positions."""

    def __init__(self, n):
        super().__init__(torch.arange(3 * n, dtype=torch.float32).view(n, 3), torch.arange(n))
        self.rows = self.tensors[0].numpy()


def save_pass(n, batch_size, directory):
    """Save the rows of Indexed(n) as features, in batches from front to back. Return the rows."""
    compute_features(DataLoader(Indexed(n), batch_size), lambda x: x, directory)
    return Indexed(n).rows


@pytest.mark.parametrize("batch_size, workers", [(1, 0), (7, 0), (50, 0), (7, 2)])
def test_features_are_loaded_in_data_set_order(tmp_path, batch_size, workers):
    data = Indexed(23)
    loader = DataLoader(data, batch_size, shuffle=True, num_workers=workers)
    compute_features(loader, lambda x: 2 * x, tmp_path)
    np.testing.assert_array_equal(load_features(tmp_path, 23), 2 * data.rows)
    assert len(list(tmp_path.iterdir())) == math.ceil(23 / batch_size)
    assert (tmp_path / "batch_0_features.pt").exists()


def test_a_pass_records_no_gradients_and_gives_float32(tmp_path):
    layer = torch.nn.Linear(3, 2, dtype=torch.bfloat16)
    loader = DataLoader(Indexed(5), 2)
    recorded = []

    def model(x):
        recorded.append(torch.is_grad_enabled())
        return layer(x.bfloat16())

    compute_features(loader, model, tmp_path)
    features, _ = extract_features(loader, model)
    assert recorded == 6 * [False]
    assert features.dtype == torch.float32
    saved = load_features(tmp_path, 5)
    assert saved.dtype == np.float32
    np.testing.assert_array_equal(saved, features)


def test_features_may_stay_on_the_disk(tmp_path):
    rows = save_pass(23, 7, tmp_path)
    mapped = load_features(tmp_path, 23, tmp_path / "features.npy")
    assert isinstance(mapped, np.memmap)
    np.testing.assert_array_equal(mapped, rows)
    (expected,) = run_kmeans(rows, [4], 0.2)
    for x in (mapped, np.load(tmp_path / "features.npy", mmap_mode="r")):
        (clusters,) = run_kmeans(x, [4], 0.2)
        assert all(map(torch.equal, clusters, expected))


def test_a_new_pass_removes_the_features_of_the_last(tmp_path):
    save_pass(40, 2, tmp_path)
    save_pass(10, 5, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    assert load_features(tmp_path, 10).shape == (10, 3)


def test_missing_samples_and_other_data_sets_are_reported(tmp_path):
    save_pass(10, 4, tmp_path)
    with pytest.raises(ValueError, match="outside 0 to 8"):
        load_features(tmp_path, 9)
    (tmp_path / "batch_1_features.pt").unlink()
    with pytest.raises(ValueError, match=r"4 of 10 samples: 4, 5, 6, 7$"):
        load_features(tmp_path, 10)


def test_samples_of_broken_files_are_missing(tmp_path):
    rows = save_pass(10, 3, tmp_path)
    first = tmp_path / "batch_0_features.pt"
    second = tmp_path / "batch_1_features.pt"
    first.write_bytes(b"")  # as after a power cut
    second.write_bytes(second.read_bytes()[:500])
    features, missing = read_features(tmp_path, 10)
    assert missing.tolist() == [0, 1, 2, 3, 4, 5]
    assert features.shape == (10, 3)
    np.testing.assert_array_equal(features[6:], rows[6:])

    for path in tmp_path.iterdir():
        path.unlink()
    features, missing = read_features(tmp_path, 10)
    assert features is None
    assert missing.tolist() == list(range(10))


def test_features_can_be_read_into_an_array(tmp_path):
    """For example to add features from a second directory."""
    rows = save_pass(10, 3, tmp_path)
    (tmp_path / "batch_3_features.pt").unlink()
    array = np.full((10, 3), -1, dtype=np.float32)
    features, missing = read_features(tmp_path, 10, features=array)
    assert features is array
    assert missing.tolist() == [9]
    np.testing.assert_array_equal(array, np.concatenate([rows[:9], [[-1, -1, -1]]]))


def test_features_can_be_cleared_from_a_batch_number_on(tmp_path):
    directory = tmp_path / "features"
    save_pass(10, 3, directory)
    clear_features(directory, 2)
    left = {path.name for path in directory.iterdir()}
    assert left == {"batch_0_features.pt", "batch_1_features.pt"}
    clear_features(directory)
    assert not list(directory.iterdir())


def test_clearing_features_creates_the_directory(tmp_path):
    clear_features(tmp_path / "new")
    assert (tmp_path / "new").is_dir()


def test_extracted_features_are_in_data_set_order():
    data = Indexed(23)
    order = [5, 22, 0, 7, 1]
    features, index = extract_features(DataLoader(data, 2, sampler=order), lambda x: 2 * x.half())
    assert features.dtype == torch.float32
    assert index.tolist() == sorted(order)
    np.testing.assert_array_equal(features, 2 * data.rows[sorted(order)])


def test_extracted_features_may_be_empty():
    """A rank without a share has none."""
    features, index = extract_features(DataLoader(Indexed(23), 2, sampler=[]), lambda x: x)
    assert len(features) == 0
    assert len(index) == 0
    assert features.dtype == torch.float32
    assert index.dtype == torch.int64
