"""What features are worth, against answers that are known."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn import metrics as sklearn_metrics
from sklearn.linear_model import LogisticRegression

import metrics
from metrics import agreement, draw_labels, knn_accuracy, linear_probe, logistic_regression, top_k


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
    assert knn_accuracy(bank, labels, queries, truth, k=99) == knn_accuracy(bank, labels, queries, truth, k=30)


def test_top_k_is_the_share_of_labels_among_the_k_highest():
    scores = torch.tensor([[3.0, 2, 1, 0], [0, 1, 2, 3], [1, 3, 0, 2]])
    labels = torch.tensor([1, 3, 2])  # second, first and last
    assert [round(top_k(scores, labels, k), 4) for k in (1, 2, 4)] == [33.3333, 66.6667, 100]


# -- the fast probe


def overlapping(n=600, classes=3, dims=6, seed=0):
    """Classes that overlap, in features of very different scale, one of them constant."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    centres = torch.randn(classes, dims, generator=torch.Generator().manual_seed(1))
    x = centres[labels] + 1.5 * torch.randn(n, dims, generator=generator)
    return torch.cat([x * 10.0 ** torch.arange(-2, dims - 2), torch.full((n, 1), 7.0)], 1), labels


@pytest.mark.parametrize("strength", [1e-1, 1e-3])
def test_logistic_regression_is_scikit_learns(monkeypatch, strength):
    monkeypatch.setattr(metrics, "STRENGTHS", [strength])
    monkeypatch.setattr(metrics, "CHUNK", 100)  # in parts, and the same
    x, labels = overlapping()
    queries = overlapping(seed=2)[0]
    mean, std = x[:, :-1].mean(0), x[:, :-1].std(0, correction=0)
    model = LogisticRegression(C=1 / (strength * len(x)), tol=1e-8, max_iter=5000)
    model.fit((x[:, :-1] - mean) / std, labels)
    expected = model.predict_proba((queries[:, :-1] - mean) / std)
    np.testing.assert_allclose(logistic_regression(x, labels, queries, 3).softmax(1), expected, atol=2e-3)


def test_the_strength_suits_the_features():
    """Few rows and many numbers that mean nothing need a strong penalty; classes with a margin need a weak one."""
    noisy, labels = overlapping(660)
    noisy = torch.cat([noisy, torch.randn(660, 50, generator=torch.Generator().manual_seed(3))], 1)
    for x, y, n, weak_is_better in ((noisy, labels, 60, False), (*separable(), 800, True)):
        args = x[:n], y[:n], x[n:], 4
        found = [F.cross_entropy(_at(strength, *args), y[n:]).item() for strength in (1, 1e-2, 1e-4)]
        assert (found[-1] < found[0] / 2) if weak_is_better else (found[0] < found[-1] / 2)
        assert F.cross_entropy(logistic_regression(*args), y[n:]).item() < 1.1 * min(found)


def _at(strength, *args):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "STRENGTHS", [strength])
        return logistic_regression(*args)


def separable(n=4000):
    """Features of any length, and classes told apart by known directions with a margin."""
    torch.manual_seed(1)
    x = F.normalize(torch.randn(n, 6), dim=1)
    scores = x @ F.normalize(torch.randn(6, 4), dim=0)
    best = scores.topk(2, dim=1).values
    clear = best[:, 0] - best[:, 1] > 0.2
    return x[clear] * torch.rand(int(clear.sum()), 1).add(0.5), scores[clear].argmax(1)


def test_a_probe_finds_a_separator_that_is_there():
    x, labels = separable()
    assert len(x) > 1000 and labels.bincount(minlength=4).min() > 100
    assert top_k(logistic_regression(x[:800], labels[:800], x[800:], 4), labels[800:], 1) > 99
    scores = linear_probe(stored(x[:800], labels[:800]), x[800:], 4, epochs=30)
    assert top_k(scores, labels[800:], 1) > 99


@pytest.mark.parametrize("probe", ["fast", "published"])
def test_a_probe_finds_nothing_in_labels_that_mean_nothing(probe):
    torch.manual_seed(2)
    x, labels = torch.randn(3000, 8), torch.randint(4, (3000,))
    fitted, rest = (x[:1000], labels[:1000]), (x[1000:], 4)
    scores = logistic_regression(*fitted, *rest) if probe == "fast" else linear_probe(stored(*fitted), *rest, epochs=9)
    assert abs(top_k(scores, labels[1000:], 1) - 25) < 5 * 100 * (0.25 * 0.75 / 2000) ** 0.5


@pytest.mark.parametrize("n", [1, 2, 7])
def test_a_probe_of_a_handful_of_labels(n):
    x, labels = separable()
    scores = logistic_regression(x[:n], labels[:n], x[n:], 4)
    assert scores.isfinite().all() and top_k(scores, labels[n:], 1) > 15


# -- the published probe


def stored(features, labels, batch_size=64):
    """Batches for linear_probe, in an order that follows from the epoch."""

    def batches(epoch):
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(epoch))
        return ((features[i], labels[i]) for i in order.split(batch_size))

    return batches


def test_the_published_probe_is_a_plain_loop():
    torch.manual_seed(3)
    x, labels, queries = torch.randn(150, 5), torch.randint(3, (150,)), torch.randn(20, 5)
    torch.manual_seed(0)
    scores = linear_probe(stored(x, labels), queries, 3, lr=0.5, epochs=10)
    torch.manual_seed(0)
    torch.nn.Linear(5, 3)
    weight, bias = torch.empty(3, 5).normal_(std=0.01), torch.zeros(3)
    velocity = [torch.zeros(3, 5), torch.zeros(3)]
    for epoch in range(10):
        rate = 0.5 if epoch < 6 else 0.05 if epoch < 8 else 0.005
        for inputs, y in stored(x, labels)(epoch):
            error = ((inputs @ weight.T + bias).softmax(1) - F.one_hot(y, 3)) / len(y)
            for p, v, gradient in zip((weight, bias), velocity, (error.T @ inputs, error.sum(0)), strict=True):
                v.mul_(0.9).add_(gradient)
                p.sub_(rate * v)
    torch.testing.assert_close(scores, queries @ weight.T + bias, rtol=1e-4, atol=1e-5)


def test_the_published_probe_goes_on_where_it_was():
    x, labels, queries = torch.randn(100, 5), torch.arange(100) % 3, torch.randn(20, 5)
    torch.manual_seed(0)
    whole = linear_probe(stored(x, labels), queries, 3, epochs=10)

    class Killed(Exception):
        pass

    states = []

    def save(state):
        states.append({**state, "layer": {k: v.clone() for k, v in state["layer"].items()}})
        if len(states) == 7:
            raise Killed

    torch.manual_seed(0)
    with pytest.raises(Killed):
        linear_probe(stored(x, labels), queries, 3, epochs=10, save=save)
    torch.manual_seed(9)
    assert torch.equal(linear_probe(stored(x, labels), queries, 3, epochs=10, state=states[-1]), whole)


# -- few labels, clusters


def test_few_labels_are_drawn_per_class():
    labels = torch.arange(100) % 4
    labels[:40] = 0
    for amount, expected in (
        (0.1, [6, 2, 2, 2]),
        (0.001, [1] * 4),
        (1, [1] * 4),
        (5, [5] * 4),
        (1000, [55, 15, 15, 15]),
    ):
        index = draw_labels(labels, amount, seed=0)
        assert labels[index].bincount().tolist() == expected and len(set(index.tolist())) == len(index)
    draws = {tuple(draw_labels(labels, 5, seed).tolist()) for seed in (0, 0, 1, 2)}
    assert len(draws) == 3


def test_agreement_is_scikit_learns_and_the_best_of_all_matchings():
    rng = np.random.default_rng(0)
    for k in (2, 4, 6):
        labels, clusters = rng.integers(0, 4, 80), rng.integers(0, k, 80)
        clusters[:40] = labels[:40] % k
        found = agreement(torch.from_numpy(clusters), torch.from_numpy(labels))
        a, b = (
            (range(4), itertools.permutations(range(k), 4))
            if k >= 4
            else (range(k), itertools.permutations(range(4), k))
        )
        pairs = ((zip(p, a) if k >= 4 else zip(a, p)) for p in b)  # noqa: B905  # (cluster, class)
        best = max(sum(((clusters == c) & (labels == y)).sum() for c, y in pair) for pair in pairs)
        assert found["acc"] == pytest.approx(100 * best / 80)
        assert found["NMI"] == pytest.approx(100 * sklearn_metrics.normalized_mutual_info_score(labels, clusters))
        assert found["AMI"] == pytest.approx(100 * sklearn_metrics.adjusted_mutual_info_score(labels, clusters))
        assert found["ARI"] == pytest.approx(100 * sklearn_metrics.adjusted_rand_score(labels, clusters))
    assert agreement(torch.tensor([1, 1, 0]), torch.tensor([0, 0, 5])) == pytest.approx(dict.fromkeys(found, 100))
