"""Property-based tests of the losses, the clustering and the saved features."""

import math
import tempfile
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from cluster import Clusters, run_kmeans
from features import compute_features, read_features
from loss import info_nce, proto_nce

fuzz = hypothesis.settings(max_examples=100, deadline=None)
seeds = st.integers(0, 2**31)
temperatures = st.floats(0.05, 2)


def unit(generator, *shape):
    return F.normalize(torch.randn(*shape, generator=generator), dim=-1)


@fuzz
@hypothesis.given(
    seed=seeds,
    n=st.integers(1, 9),
    r=st.integers(1, 20),
    dim=st.integers(1, 12),
    temperature=temperatures,
)
def test_info_nce(seed, n, r, dim, temperature):
    """The loss is within bounds, ignores the queue's order, and is lower if keys equal queries."""
    g = torch.Generator().manual_seed(seed)
    q, k, queue = unit(g, n, dim), unit(g, n, dim), unit(g, r, dim).T
    loss, acc = info_nce(q, k, queue, temperature)
    assert 0 <= loss <= math.log(r + 1) + 2 / temperature + 1e-4
    assert 0 <= acc <= 100

    shuffled = queue[:, torch.randperm(r, generator=g)]
    loss_shuffled, _ = info_nce(q, k, shuffled, temperature)
    torch.testing.assert_close(loss, loss_shuffled, atol=1e-5, rtol=1e-5)

    loss_equal, _ = info_nce(q, q, queue, temperature)
    assert loss_equal <= loss + 1e-5


@fuzz
@hypothesis.given(
    seed=seeds,
    n=st.integers(1, 9),
    num_cluster=st.integers(1, 30),
    num_negatives=st.integers(1, 40),
    dim=st.integers(1, 12),
)
def test_proto_nce(seed, n, num_cluster, num_negatives, dim):
    """The loss is at most the loss against all prototypes, and equal to it if all are negatives."""
    g = torch.Generator().manual_seed(seed)
    q = unit(g, n, dim)
    index = torch.randint(50, (n,), generator=g)
    im2cluster = torch.randint(num_cluster, (50,), generator=g)
    centroids = unit(g, num_cluster, dim)
    density = torch.rand(num_cluster, generator=g) + 0.05
    torch.manual_seed(seed)
    level = Clusters(im2cluster, centroids, density)
    loss, acc = proto_nce(q, index, [level], num_negatives)
    assert torch.isfinite(loss)
    assert loss >= 0
    assert 0 <= acc <= 100

    target = im2cluster[index]
    loss_all = F.cross_entropy(q @ centroids.T / density, target)
    assert loss <= loss_all + 1e-4
    if num_cluster - len(target.unique()) <= num_negatives:
        torch.testing.assert_close(loss, loss_all, atol=1e-4, rtol=1e-4)


@fuzz
@hypothesis.given(
    seed=seeds,
    m=st.integers(1, 60),
    k=st.integers(1, 60),
    dim=st.integers(1, 6),
    temperature=temperatures,
    duplicates=st.booleans(),
)
def test_run_kmeans(seed, m, k, dim, temperature, duplicates):
    """Any data, even copies of a few points, give valid clusters and the mean concentration."""
    hypothesis.assume(k <= m)
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(m, dim)).astype(np.float32)
    if duplicates:
        x = x[rng.integers(0, max(1, m // 8), m)]
    (clusters,) = run_kmeans(x, [k], temperature, seed % 1000, niter=5)
    assert clusters.im2cluster.min() >= 0
    assert clusters.im2cluster.max() < k
    assert ((clusters.centroids.norm(dim=1) - 1).abs() < 1e-4).all()
    assert (clusters.density > 0).all()
    assert clusters.density.mean().item() == pytest.approx(temperature, rel=1e-4)


@fuzz
@hypothesis.given(data=st.data(), n=st.integers(1, 40), batch_size=st.integers(1, 12))
def test_saved_features(data, n, batch_size):
    """If files are broken, the other samples are read, and the missing ones can be added later."""
    order = data.draw(st.permutations(range(n)))
    samples = TensorDataset(torch.arange(3.0 * n).view(n, 3), torch.arange(n))
    expected = samples.tensors[0].numpy()

    def save(directory, sampler):
        loader = DataLoader(samples, batch_size, sampler=sampler)
        compute_features(loader, lambda x: x, directory)

    with tempfile.TemporaryDirectory() as directory:
        # Save all samples, then cut some files short.
        save(directory, order)
        lost = set()
        for number in data.draw(st.sets(st.integers(0, math.ceil(n / batch_size) - 1))):
            file = Path(directory) / f"batch_{number}_features.pt"
            length = data.draw(st.sampled_from([0, 9, 200, -9]))
            file.write_bytes(file.read_bytes()[:length])
            lost.update(order[number * batch_size : (number + 1) * batch_size])

        # Read what is left.
        features, missing = read_features(directory, n)
        left = sorted(set(range(n)) - lost)
        assert missing.tolist() == sorted(lost)
        assert (features is None) == (not left)
        if left:
            np.testing.assert_array_equal(features[left], expected[left])

        # Add the missing samples.
        save(directory, missing.tolist())
        features, missing = read_features(directory, n, features=features)
        np.testing.assert_array_equal(features, expected)
        assert missing.tolist() == left
