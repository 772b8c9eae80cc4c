"""Property-based tests of the losses, the clustering and the feature store."""

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
seeds, temperatures = st.integers(0, 2**31), st.floats(0.05, 2)


def unit(generator, *shape):
    return F.normalize(torch.randn(*shape, generator=generator), dim=-1)


@fuzz
@hypothesis.given(seeds, st.integers(1, 9), st.integers(1, 20), st.integers(1, 12), temperatures)
def test_info_nce(seed, n, r, dim, temperature):
    """A loss between its bounds, the same whatever the order of the queue, zero only without competition."""
    g = torch.Generator().manual_seed(seed)
    q, k, queue = unit(g, n, dim), unit(g, n, dim), unit(g, r, dim).T
    loss, acc = info_nce(q, k, queue, temperature)
    assert 0 <= loss <= math.log(r + 1) + 2 / temperature + 1e-4 and 0 <= acc <= 100
    again, _ = info_nce(q, k, queue[:, torch.randperm(r, generator=g)], temperature)
    torch.testing.assert_close(loss, again, atol=1e-5, rtol=1e-5)
    easier, _ = info_nce(q, q, queue, temperature)
    assert easier <= loss + 1e-5


@fuzz
@hypothesis.given(seeds, st.integers(1, 9), st.integers(1, 30), st.integers(1, 40), st.integers(1, 12))
def test_proto_nce(seed, n, num_cluster, num_negatives, dim):
    """Finite, not negative, at most the loss against all prototypes, and equal to it where all are taken."""
    g = torch.Generator().manual_seed(seed)
    q, index = unit(g, n, dim), torch.randint(50, (n,), generator=g)
    im2cluster = torch.randint(num_cluster, (50,), generator=g)
    level = Clusters(im2cluster, unit(g, num_cluster, dim), torch.rand(num_cluster, generator=g) + 0.05)
    torch.manual_seed(seed)
    loss, acc = proto_nce(q, index, [level], num_negatives)
    everything = F.cross_entropy(q @ level.centroids.T / level.density, im2cluster[index])
    assert torch.isfinite(loss) and loss >= 0 and 0 <= acc <= 100
    assert loss <= everything + 1e-4
    if num_cluster - len(im2cluster[index].unique()) <= num_negatives:
        torch.testing.assert_close(loss, everything, atol=1e-4, rtol=1e-4)


@fuzz
@hypothesis.given(seeds, st.integers(1, 60), st.integers(1, 60), st.integers(1, 6), temperatures, st.booleans())
def test_run_kmeans(seed, m, k, dim, temperature, duplicates):
    """Any data, also copies of few points: unit or zero prototypes, valid assignments, the mean concentration."""
    hypothesis.assume(k <= m)
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(m, dim)).astype(np.float32)
    if duplicates:
        x = x[rng.integers(0, max(1, m // 8), m)]
    (clusters,) = run_kmeans(x, [k], temperature, seed % 1000, niter=5)
    assert clusters.im2cluster.min() >= 0 and clusters.im2cluster.max() < k
    length = clusters.centroids.norm(dim=1)
    assert ((length - 1).abs() < 1e-4).all()
    assert (clusters.density > 0).all() and clusters.density.mean().item() == pytest.approx(temperature, rel=1e-4)


@fuzz
@hypothesis.given(st.data(), st.integers(1, 40), st.integers(1, 12))
def test_feature_store(data, n, batch_size):
    """Any order, any batch size, any files lost or broken: the rest in its rows, and what is missing can be added."""
    order = data.draw(st.permutations(range(n)))
    samples, lost = TensorDataset(torch.arange(3.0 * n).view(n, 3), torch.arange(n)), set()
    whole = samples.tensors[0].numpy()
    with tempfile.TemporaryDirectory() as directory:
        compute_features(DataLoader(samples, batch_size, sampler=order), lambda x: x, directory)
        for number in data.draw(st.sets(st.integers(0, math.ceil(n / batch_size) - 1))):
            file = Path(directory) / f"batch_{number}_features.pt"
            file.write_bytes(file.read_bytes()[: data.draw(st.sampled_from([0, 9, 200, -9]))])
            lost.update(order[number * batch_size : (number + 1) * batch_size])
        features, missing = read_features(directory, n)
        assert missing.tolist() == sorted(lost) and (features is None) == (len(lost) == n)
        if len(lost) < n:
            left = sorted(set(range(n)) - lost)
            np.testing.assert_array_equal(features[left], whole[left])
        compute_features(DataLoader(samples, batch_size, sampler=missing.tolist()), lambda x: x, directory)
        features, missing = read_features(directory, n, features=features)
        np.testing.assert_array_equal(features, whole)
        assert missing.tolist() == sorted(set(range(n)) - lost)
