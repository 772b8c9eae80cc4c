"""What features are worth, against answers that are known."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from metrics import knn_accuracy, linear_probe, stored_batches, top_k


def test_knn_is_its_formula():
    torch.manual_seed(0)
    bank, labels, queries = torch.randn(30, 5), torch.arange(30) % 3, torch.randn(8, 5)
    votes = []
    for query in queries:
        cosine = [torch.cosine_similarity(query, row, dim=0).item() for row in bank]
        nearest = sorted(range(30), key=lambda i: -cosine[i])[:7]
        votes.append(max(range(3), key=lambda c: sum(np.exp(cosine[i] / 0.1) for i in nearest if i % 3 == c)))
    truth = torch.arange(8) % 3
    expected = 100 * np.mean(np.array(votes) == truth.numpy())
    assert knn_accuracy(bank, labels, queries, truth, k=7) == pytest.approx(expected)


def test_top_k_is_the_share_of_labels_among_the_k_highest():
    scores = torch.tensor([[3.0, 2, 1, 0], [0, 1, 2, 3], [1, 3, 0, 2]])
    labels = torch.tensor([1, 3, 2])  # second, first and last
    assert [round(top_k(scores, labels, k), 4) for k in (1, 2, 4)] == [33.3333, 66.6667, 100]


def test_stored_batches_are_every_row_once_in_a_new_order():
    features, labels = torch.arange(20.0)[:, None], torch.arange(20)
    batches, orders = stored_batches(features, labels, 6), []
    for epoch in range(2):
        pairs = list(batches(epoch))
        assert [len(y) for _, y in pairs] == [6, 6, 6, 2] and all(torch.equal(x[:, 0].long(), y) for x, y in pairs)
        orders.append(torch.cat([y for _, y in pairs]).tolist())
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(20)) and orders[0] != orders[1]


def test_the_linear_probe_has_the_published_schedule(monkeypatch):
    seen, step = [], torch.optim.SGD.step

    def spy(self, *args, **kwargs):
        (group,) = self.param_groups
        seen.append((round(group["lr"], 6), group["momentum"], group["weight_decay"]))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", spy)
    batches = stored_batches(torch.randn(6, 4), torch.arange(6) % 2, 6)
    linear_probe(batches, torch.randn(2, 4), 2, epochs=10)
    assert seen == [(rate, 0.9, 0) for rate in [30] * 6 + [3] * 2 + [0.3] * 2]


def probe(features, labels, n, num_classes):
    """Top-1 accuracy on the rows from n on of a probe trained on those before."""
    torch.manual_seed(0)
    batches = stored_batches(features[:n], labels[:n], 64)
    return top_k(linear_probe(batches, features[n:], num_classes, epochs=30), labels[n:], 1)


def test_a_linear_probe_finds_a_separator_that_is_there():
    """Classes told apart by known directions, with a margin; features of any length."""
    torch.manual_seed(1)
    x = F.normalize(torch.randn(4000, 6), dim=1)
    scores = x @ F.normalize(torch.randn(6, 4), dim=0)
    best = scores.topk(2, dim=1).values
    clear = best[:, 0] - best[:, 1] > 0.2
    x, labels = x[clear], scores[clear].argmax(1)
    assert len(x) > 1000 and labels.bincount(minlength=4).min() > 100
    assert probe(x * torch.rand(len(x), 1).add(0.1), labels, 600, 4) == 100


def test_a_linear_probe_finds_nothing_in_labels_that_mean_nothing():
    torch.manual_seed(2)
    accuracy = probe(torch.randn(3000, 8), torch.randint(4, (3000,)), 1000, 4)
    assert abs(accuracy - 25) < 5 * 100 * (0.25 * 0.75 / 2000) ** 0.5
