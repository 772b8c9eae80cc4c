"""The losses against their formulas in plain float64 loops."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from cluster import Clusters
from loss import info_nce, proto_nce


def unit(*shape):
    return F.normalize(torch.randn(*shape), dim=-1)


def dot(a, b):
    return sum(float(x) * float(y) for x, y in zip(a, b, strict=True))


def granularity(num_cluster, im2cluster, dim=8):
    return Clusters(torch.as_tensor(im2cluster), unit(num_cluster, dim), torch.rand(num_cluster) * 0.3 + 0.1)


def slow_proto_nce(q, index, clusters, chosen):
    losses, hits = [], []
    for row, i in zip(q, index.tolist(), strict=True):
        s = int(clusters.im2cluster[i])
        logits = {j: dot(row, clusters.centroids[j]) / float(clusters.density[j]) for j in chosen}
        losses.append(-math.log(math.exp(logits[s]) / sum(math.exp(x) for x in logits.values())))
        hits.append(max(logits, key=logits.get) == s)
    return sum(losses) / len(q), 100 * sum(hits) / len(q)


def test_info_nce_is_its_formula():
    torch.manual_seed(0)
    q, k, queue = unit(5, 8), unit(5, 8), unit(11, 8).T
    losses, hits = [], []
    for i in range(5):
        logits = [dot(q[i], k[i]) / 0.2] + [dot(q[i], queue[:, j]) / 0.2 for j in range(11)]
        losses.append(-math.log(math.exp(logits[0]) / sum(map(math.exp, logits))))
        hits.append(max(logits) == logits[0])
    loss, acc = info_nce(q, k, queue, 0.2)
    assert loss.item() == pytest.approx(sum(losses) / 5, rel=1e-5)
    assert acc.item() == pytest.approx(100 * sum(hits) / 5)


def test_collapsed_features_are_no_hit():
    same = F.normalize(torch.ones(4, 8), dim=1)
    assert info_nce(same, same, same.T, 0.2)[1] == 0


@pytest.mark.parametrize("im2cluster", [[0, 1, 2, 3, 4, 5], [3, 3, 3, 1, 1, 9]], ids=["distinct", "shared"])
def test_proto_nce_with_all_prototypes_is_its_formula(im2cluster):
    torch.manual_seed(1)
    q, index = unit(6, 8), torch.arange(6)
    levels = [granularity(10, im2cluster), granularity(7, [i % 7 for i in im2cluster])]
    expected = [slow_proto_nce(q, index, level, range(len(level.centroids))) for level in levels]
    for num_negatives in (9, 10, 100):
        loss, acc = proto_nce(q, index, levels, num_negatives)
        assert loss.item() == pytest.approx(sum(x[0] for x in expected) / 2, rel=1e-5)
        assert acc.item() == pytest.approx(sum(x[1] for x in expected) / 2)


def test_nothing_is_random_where_all_negatives_are_taken():
    torch.manual_seed(2)
    q, index, level = unit(4, 8), torch.arange(4), granularity(12, [0, 1, 2, 3])
    losses = {proto_nce(q, index, [level], 8)[0].item() for _ in range(5)}  # 4 of the batch and the other 8
    assert len(losses) == 1
    assert losses.pop() == pytest.approx(slow_proto_nce(q, index, level, range(12))[0], rel=1e-5)


def test_one_negative_fewer_than_there_are_leaves_one_out():
    torch.manual_seed(8)
    q, index, level = unit(3, 8), torch.arange(3), granularity(10, [4, 4, 4])
    everything = slow_proto_nce(q, index, level, range(10))[0]
    assert proto_nce(q, index, [level], 9)[0].item() == pytest.approx(everything, rel=1e-5)
    left_out = [slow_proto_nce(q, index, level, set(range(10)) - {j})[0] for j in set(range(10)) - {4}]
    assert any(proto_nce(q, index, [level], 8)[0].item() == pytest.approx(loss, rel=1e-5) for loss in left_out)


def test_negatives_are_drawn_evenly_without_replacement():
    """Every pair of the seven prototypes that are nobody's, the last one too, as often as any other pair."""
    torch.manual_seed(3)
    q, index, level = unit(6, 8), torch.arange(6), granularity(10, [7, 7, 7, 0, 5, 5])
    pairs = list(itertools.combinations([1, 2, 3, 4, 6, 8, 9], 2))
    expected = torch.tensor([slow_proto_nce(q, index, level, [0, 5, 7, *pair]) for pair in pairs])
    drawn = torch.tensor([[x.item() for x in proto_nce(q, index, [level], 2)] for _ in range(840)])
    error, pair = (drawn[:, None, 0] - expected[:, 0]).abs().min(1)
    assert error.max() < 1e-5 and expected[:, 0].sort().values.diff().min() > 1e-4
    torch.testing.assert_close(drawn[:, 1], expected[pair, 1])
    assert pair.bincount(minlength=21).sub(40).abs().max() < 5 * math.sqrt(40)


@pytest.mark.parametrize("name", ["info_nce", "proto_nce"])
def test_gradient_by_finite_differences(name):
    torch.manual_seed(6)
    q, k, queue, level = unit(5, 8), unit(5, 8), unit(9, 8).T, granularity(6, [0, 1, 1, 4, 5])

    def loss(x):
        return info_nce(x, k, queue, 0.2)[0] if name == "info_nce" else proto_nce(x, torch.arange(5), [level], 9)[0]

    x, step = q.clone().requires_grad_(), 1e-2 * torch.randn(5, 8)
    loss(x).backward()
    assert (x.grad * step).sum().item() == pytest.approx((loss(q + step) - loss(q - step)).item() / 2, rel=2e-2)


def test_float32_under_autocast():
    torch.manual_seed(7)
    q, k, queue, level = unit(5, 8), unit(5, 8), unit(9, 8).T, granularity(6, [0, 1, 1, 4, 5])
    losses = (lambda: info_nce(q, k, queue, 0.2)[0], lambda: proto_nce(q, torch.arange(5), [level], 9)[0])
    outside = [loss() for loss in losses]
    with torch.autocast("cpu", torch.bfloat16):
        assert (q @ queue).dtype == torch.bfloat16
        assert [loss() for loss in losses] == outside
    half = info_nce(q.bfloat16(), k.bfloat16(), queue.bfloat16(), 0.2)[0]  # 16 bits from outside are made 32
    assert half == info_nce(q.bfloat16().float(), k.bfloat16().float(), queue.bfloat16().float(), 0.2)[0]
