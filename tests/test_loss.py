"""The losses against their formulas, written as plain float64 loops."""

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
    """Clusters with random prototypes."""
    centroids = unit(num_cluster, dim)
    density = torch.rand(num_cluster) * 0.3 + 0.1
    return Clusters(torch.as_tensor(im2cluster), centroids, density)


def slow_proto_nce(q, index, clusters, chosen):
    """(loss, acc) of ProtoNCE at one granularity, against the prototypes `chosen`."""
    losses = []
    hits = []
    for row, i in zip(q, index.tolist(), strict=True):
        s = int(clusters.im2cluster[i])
        logits = {j: dot(row, clusters.centroids[j]) / float(clusters.density[j]) for j in chosen}
        total = sum(math.exp(logit) for logit in logits.values())
        losses.append(-math.log(math.exp(logits[s]) / total))
        hits.append(max(logits, key=logits.get) == s)
    return sum(losses) / len(q), 100 * sum(hits) / len(q)


def test_info_nce_follows_its_formula():
    torch.manual_seed(0)
    q, k, queue = unit(5, 8), unit(5, 8), unit(11, 8).T
    losses = []
    hits = []
    for i in range(5):
        positive = dot(q[i], k[i]) / 0.2
        negatives = [dot(q[i], queue[:, j]) / 0.2 for j in range(11)]
        total = math.exp(positive) + sum(math.exp(logit) for logit in negatives)
        losses.append(-math.log(math.exp(positive) / total))
        hits.append(positive >= max(negatives))
    loss, acc = info_nce(q, k, queue, 0.2)
    assert loss.item() == pytest.approx(sum(losses) / 5, rel=1e-5)
    assert acc.item() == pytest.approx(100 * sum(hits) / 5)


def test_collapsed_features_are_no_hit():
    same = F.normalize(torch.ones(4, 8), dim=1)
    _, acc = info_nce(same, same, same.T, 0.2)
    assert acc == 0


BATCHES = {"distinct": [0, 1, 2, 3, 4, 5], "shared": [3, 3, 3, 1, 1, 9]}


@pytest.mark.parametrize("im2cluster", BATCHES.values(), ids=BATCHES.keys())
def test_proto_nce_with_all_prototypes_follows_its_formula(im2cluster):
    torch.manual_seed(1)
    q = unit(6, 8)
    index = torch.arange(6)
    fine = granularity(10, im2cluster)
    coarse = granularity(7, [i % 7 for i in im2cluster])
    fine_loss, fine_acc = slow_proto_nce(q, index, fine, range(10))
    coarse_loss, coarse_acc = slow_proto_nce(q, index, coarse, range(7))
    for num_negatives in (9, 10, 100):
        loss, acc = proto_nce(q, index, [fine, coarse], num_negatives)
        assert loss.item() == pytest.approx((fine_loss + coarse_loss) / 2, rel=1e-5)
        assert acc.item() == pytest.approx((fine_acc + coarse_acc) / 2)


def test_nothing_is_random_if_all_prototypes_are_negatives():
    torch.manual_seed(2)
    q = unit(4, 8)
    index = torch.arange(4)
    level = granularity(12, [0, 1, 2, 3])  # 4 prototypes of the batch and 8 others
    losses = {proto_nce(q, index, [level], 8)[0].item() for _ in range(5)}
    expected, _ = slow_proto_nce(q, index, level, range(12))
    assert len(losses) == 1
    assert losses.pop() == pytest.approx(expected, rel=1e-5)


def test_one_negative_less_than_all_leaves_one_out():
    torch.manual_seed(8)
    q = unit(3, 8)
    index = torch.arange(3)
    level = granularity(10, [4, 4, 4])
    everything, _ = slow_proto_nce(q, index, level, range(10))
    loss, _ = proto_nce(q, index, [level], 9)
    assert loss.item() == pytest.approx(everything, rel=1e-5)

    others = set(range(10)) - {4}
    without_one = [slow_proto_nce(q, index, level, set(range(10)) - {j})[0] for j in others]
    loss, _ = proto_nce(q, index, [level], 8)
    assert any(loss.item() == pytest.approx(expected, rel=1e-5) for expected in without_one)


def test_negatives_are_drawn_evenly_without_replacement():
    """Seven prototypes, also the last, belong to no sample. All pairs of them are drawn equally."""
    torch.manual_seed(3)
    q = unit(6, 8)
    index = torch.arange(6)
    level = granularity(10, [7, 7, 7, 0, 5, 5])
    pairs = list(itertools.combinations([1, 2, 3, 4, 6, 8, 9], 2))
    expected = torch.tensor([slow_proto_nce(q, index, level, [0, 5, 7, *pair]) for pair in pairs])
    drawn = torch.tensor([[x.item() for x in proto_nce(q, index, [level], 2)] for _ in range(840)])

    # Tell the pair by the loss.
    assert expected[:, 0].sort().values.diff().min() > 1e-4
    error, pair = (drawn[:, None, 0] - expected[:, 0]).abs().min(1)
    assert error.max() < 1e-5
    torch.testing.assert_close(drawn[:, 1], expected[pair, 1])

    # 840 draws of 21 pairs: 40 each
    assert pair.bincount(minlength=21).sub(40).abs().max() < 5 * math.sqrt(40)


@pytest.mark.parametrize("name", ["info_nce", "proto_nce"])
def test_gradient_matches_finite_differences(name):
    torch.manual_seed(6)
    q, k, queue = unit(5, 8), unit(5, 8), unit(9, 8).T
    level = granularity(6, [0, 1, 1, 4, 5])

    def loss(x):
        if name == "info_nce":
            return info_nce(x, k, queue, 0.2)[0]
        return proto_nce(x, torch.arange(5), [level], 9)[0]

    x = q.clone().requires_grad_()
    step = 1e-2 * torch.randn(5, 8)
    loss(x).backward()
    slope = (x.grad * step).sum().item()
    difference = (loss(q + step) - loss(q - step)).item() / 2
    assert slope == pytest.approx(difference, rel=2e-2)


def test_losses_are_float32_under_autocast():
    torch.manual_seed(7)
    q, k, queue = unit(5, 8), unit(5, 8), unit(9, 8).T
    level = granularity(6, [0, 1, 1, 4, 5])

    def both_losses():
        loss_inst, _ = info_nce(q, k, queue, 0.2)
        loss_proto, _ = proto_nce(q, torch.arange(5), [level], 9)
        return [loss_inst, loss_proto]

    outside = both_losses()
    with torch.autocast("cpu", torch.bfloat16):
        assert (q @ queue).dtype == torch.bfloat16
        assert both_losses() == outside


def test_16_bit_inputs_are_converted_to_float32():
    torch.manual_seed(7)
    q, k, queue = unit(5, 8).bfloat16(), unit(5, 8).bfloat16(), unit(9, 8).T.bfloat16()
    loss, _ = info_nce(q, k, queue, 0.2)
    expected, _ = info_nce(q.float(), k.float(), queue.float(), 0.2)
    assert loss == expected
