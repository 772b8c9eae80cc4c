"""The measures of features, compared with known answers."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn import metrics as sklearn_metrics
from sklearn.linear_model import LogisticRegression

import metrics
from metrics import (
    accuracy_by_frequency,
    agreement,
    default_k,
    draw_labels,
    knn_accuracy,
    linear_probe,
    logistic_regression,
    top_k,
)

pytestmark = pytest.mark.no_shortcuts


def test_accuracy_by_frequency_is_a_mean_over_the_classes_of_a_third():
    torch.manual_seed(0)
    counts = torch.tensor([5, 900, 40, 300, 2, 70, 8])  # images of each class in training
    labels = torch.randint(7, (200,))
    labels[labels == 2] = 3  # none of class 2, which is in the middle third
    scores = torch.randn(200, 7)
    scores[range(200), labels] += 1

    def recall(classes):
        found = []
        for label in classes:
            predictions = [scores[i].argmax().item() for i in range(200) if labels[i] == label]
            found.append(sum(p == label for p in predictions) / len(predictions))
        return pytest.approx(100 * sum(found) / len(found))

    found = accuracy_by_frequency(scores, labels, counts)
    assert found == {"frequent": recall([1, 3, 5]), "middle": recall([6]), "rare": recall([0, 4])}

    # a third without images, and fewer than three classes
    assert accuracy_by_frequency(scores, torch.full((200,), 1), counts).keys() == {"frequent"}
    two = accuracy_by_frequency(scores[:, :2], labels.clamp(max=1), counts[:2])
    assert two.keys() == {"frequent", "rare"}


def test_knn_accuracy_matches_its_formula():
    torch.manual_seed(0)
    bank = torch.randn(30, 5)
    bank_labels = torch.arange(30) % 3
    queries = torch.randn(200, 5)  # so many that another temperature changes some votes
    labels = torch.arange(200) % 3

    predictions = []
    for query in queries:
        cosine = [torch.cosine_similarity(query, row, dim=0).item() for row in bank]
        nearest = sorted(range(30), key=lambda i: -cosine[i])[:7]
        votes = np.zeros(3)
        for i in nearest:
            votes[i % 3] += np.exp(cosine[i] / 0.1)
        predictions.append(votes.argmax())
    expected = 100 * np.mean(np.array(predictions) == labels.numpy())
    assert knn_accuracy(bank, bank_labels, queries, labels, k=7) == pytest.approx(expected)


def test_a_vote_needs_a_neighbour():
    x, labels = torch.randn(4, 3), torch.arange(4)
    with pytest.raises(ValueError, match="0 neighbours"):
        knn_accuracy(x, labels, x, labels, k=0)


def test_knn_accuracy_uses_the_whole_bank_if_k_is_larger():
    torch.manual_seed(0)
    bank = torch.randn(30, 5)
    bank_labels = torch.arange(30) % 3
    queries = torch.randn(8, 5)
    labels = torch.arange(8) % 3
    whole_bank = knn_accuracy(bank, bank_labels, queries, labels, k=30)
    assert knn_accuracy(bank, bank_labels, queries, labels, k=99) == whole_bank


@pytest.mark.parametrize(
    ("m", "k"), [(1, 1), (99, 1), (100, 2), (1437, 28), (10_049, 200), (50_000, 200)]
)
def test_a_fiftieth_of_the_bank_votes_but_at_most_200(m, k):
    assert default_k(m) == k


def test_top_k_is_the_share_of_labels_among_the_k_highest_scores():
    scores = torch.tensor([[3.0, 2, 1, 0], [0, 1, 2, 3], [1, 3, 0, 2]])
    labels = torch.tensor([1, 3, 2])  # their scores are second, first and last
    assert [round(top_k(scores, labels, k), 4) for k in (1, 2, 4)] == [33.3333, 66.6667, 100]


# -- the fast probe


def overlapping(n=600, classes=3, dims=6, seed=0):
    """Overlapping classes in features of very different scales. The last feature is constant."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    centres = torch.randn(classes, dims, generator=torch.Generator().manual_seed(1))
    x = centres[labels] + 1.5 * torch.randn(n, dims, generator=generator)
    scales = 10.0 ** torch.arange(-2, dims - 2)
    constant = torch.full((n, 1), 7.0)
    return torch.cat([x * scales, constant], 1), labels


def separable(n=4000):
    """Features of any norm, and 4 classes with a margin between them along known directions."""
    torch.manual_seed(1)
    x = F.normalize(torch.randn(n, 6), dim=1)
    scores = x @ F.normalize(torch.randn(6, 4), dim=0)
    best = scores.topk(2, dim=1).values
    clear = best[:, 0] - best[:, 1] > 0.2
    norms = torch.rand(int(clear.sum()), 1).add(0.5)
    return x[clear] * norms, scores[clear].argmax(1)


@pytest.mark.parametrize("strength", [1e-1, 1e-3])
def test_logistic_regression_matches_scikit_learns(monkeypatch, strength):
    monkeypatch.setattr(metrics, "STRENGTHS", [strength])
    monkeypatch.setattr(metrics, "CHUNK", 100)  # several chunks give the same result
    x, labels = overlapping()
    queries, _ = overlapping(seed=2)
    scores = logistic_regression(x, labels, queries, 3)

    # scikit-learn gets the standardised features without the constant one
    mean = x[:, :-1].mean(0)
    std = x[:, :-1].std(0, correction=0)
    model = LogisticRegression(C=1 / (strength * len(x)), tol=1e-8, max_iter=5000)
    model.fit((x[:, :-1] - mean) / std, labels)
    expected = model.predict_proba((queries[:, :-1] - mean) / std)
    np.testing.assert_allclose(scores.softmax(1), expected, atol=2e-3)


def held_out_losses(x, labels, n):
    """Cross-entropy of logistic_regression, fitted on the first n rows, on the other rows.

    Returns the losses with a strong, a medium and a weak penalty, and with the penalty that
    logistic_regression chooses.
    """

    def loss():
        return F.cross_entropy(logistic_regression(x[:n], labels[:n], x[n:], 4), labels[n:]).item()

    fixed = []
    for strength in (1, 1e-2, 1e-4):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(metrics, "STRENGTHS", [strength])
            fixed.append(loss())
    return fixed, loss()


@pytest.mark.parametrize("n, tenths", [(30, 10), (250, 4), (1000, 1), (3000, 1)])
def test_few_rows_are_held_out_in_turn(monkeypatch, n, tenths):
    """At least 100 rows are held out, or every row once."""
    fitted = []  # the number of rows of each fit
    fit = metrics._fit

    def spy(x, labels, *args):
        fitted.append(len(x))
        return fit(x, labels, *args)

    monkeypatch.setattr(metrics, "_fit", spy)
    monkeypatch.setattr(metrics, "STRENGTHS", [1.0])
    x, labels = overlapping(n)
    logistic_regression(x, labels, x[:1], 3)
    *in_turn, whole = fitted
    assert whole == n
    assert in_turn == [n * 9 // 10] * tenths


def test_few_rows_with_many_meaningless_features_get_a_strong_penalty():
    x, labels = overlapping(660)
    noise = torch.randn(660, 50, generator=torch.Generator().manual_seed(3))
    (strong, medium, weak), chosen = held_out_losses(torch.cat([x, noise], 1), labels, 60)
    assert strong < weak / 2
    assert chosen < 1.1 * min(strong, medium, weak)


def test_classes_with_a_margin_get_a_weak_penalty():
    x, labels = separable()
    (strong, medium, weak), chosen = held_out_losses(x, labels, 800)
    assert weak < strong / 2
    assert chosen < 1.1 * min(strong, medium, weak)


def fast_probe(x, labels, queries):
    return logistic_regression(x, labels, queries, 4)


def published_probe(x, labels, queries):
    return linear_probe(batches_of(x, labels), queries, 4, epochs=30)


def short_published_probe(x, labels, queries):
    return linear_probe(batches_of(x, labels), queries, 4, epochs=9)


@pytest.mark.parametrize("probe", [fast_probe, published_probe])
def test_a_probe_separates_classes_with_a_margin(probe):
    x, labels = separable()
    assert len(x) > 1000
    assert labels.bincount(minlength=4).min() > 100
    scores = probe(x[:800], labels[:800], x[800:])
    assert top_k(scores, labels[800:], 1) > 99


@pytest.mark.parametrize("probe", [fast_probe, short_published_probe])
def test_a_probe_of_random_labels_is_at_chance_level(probe):
    torch.manual_seed(2)
    x = torch.randn(3000, 8)
    labels = torch.randint(4, (3000,))
    scores = probe(x[:1000], labels[:1000], x[1000:])
    standard_error = 100 * (0.25 * 0.75 / 2000) ** 0.5
    assert abs(top_k(scores, labels[1000:], 1) - 25) < 5 * standard_error


@pytest.mark.parametrize("n", [1, 2, 7])
def test_a_probe_can_be_fitted_on_a_handful_of_labels(n):
    x, labels = separable()
    scores = logistic_regression(x[:n], labels[:n], x[n:], 4)
    assert scores.isfinite().all()
    assert top_k(scores, labels[n:], 1) > 15


# -- the published probe


def batches_of(features, labels, batch_size=64):
    """Batches for linear_probe, in an order that depends only on the epoch."""

    def batches(epoch):
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(epoch))
        for index in order.split(batch_size):
            yield features[index], labels[index]

    return batches


def test_the_published_probe_matches_a_plain_loop():
    torch.manual_seed(3)
    x = torch.randn(150, 5)
    labels = torch.randint(3, (150,))
    queries = torch.randn(20, 5)
    torch.manual_seed(0)
    scores = linear_probe(batches_of(x, labels), queries, 3, lr=0.5, epochs=10)

    torch.manual_seed(0)
    torch.nn.Linear(5, 3)  # takes the random numbers of the layer's default weights
    weight = torch.empty(3, 5).normal_(std=0.01)
    bias = torch.zeros(3)
    weight_velocity = torch.zeros(3, 5)
    bias_velocity = torch.zeros(3)
    rates = [0.5] * 6 + [0.05] * 2 + [0.005] * 2
    for epoch, rate in enumerate(rates):
        for inputs, targets in batches_of(x, labels)(epoch):
            probabilities = (inputs @ weight.T + bias).softmax(1)
            error = (probabilities - F.one_hot(targets, 3)) / len(targets)
            weight_velocity.mul_(0.9).add_(error.T @ inputs)
            bias_velocity.mul_(0.9).add_(error.sum(0))
            weight.sub_(rate * weight_velocity)
            bias.sub_(rate * bias_velocity)
    torch.testing.assert_close(scores, queries @ weight.T + bias, rtol=1e-4, atol=1e-5)


class Killed(Exception):
    pass


class Store:
    """Keeps a probe's states in memory, and kills the probe after `last` epochs."""

    def __init__(self, last):
        self.last = last
        self.states = []
        self.loads = 0

    def load(self):
        self.loads += 1
        return self.states[-1] if self.states else None

    def save(self, state):
        layer = {name: value.clone() for name, value in state["layer"].items()}
        self.states.append({**state, "layer": layer})
        if len(self.states) == self.last:
            raise Killed


def test_the_published_probe_resumes_from_a_saved_state():
    x = torch.randn(100, 5)
    labels = torch.arange(100) % 3
    queries = torch.randn(20, 5)
    torch.manual_seed(0)
    whole = linear_probe(batches_of(x, labels), queries, 3, epochs=10)

    store = Store(last=7)
    torch.manual_seed(0)
    with pytest.raises(Killed):
        linear_probe(batches_of(x, labels), queries, 3, epochs=10, store=store)
    assert store.loads == 1
    assert [state["epoch"] for state in store.states] == [1, 2, 3, 4, 5, 6, 7]

    torch.manual_seed(9)  # the saved state counts, not the seed
    resumed = linear_probe(batches_of(x, labels), queries, 3, epochs=10, store=store)
    assert torch.equal(resumed, whole)
    assert store.loads == 2
    assert [state["epoch"] for state in store.states[7:]] == [8, 9, 10]


# -- few labels, clusters


@pytest.mark.parametrize(
    "amount, expected",
    [
        (0.1, [6, 2, 2, 2]),
        (0.001, [1, 1, 1, 1]),
        (1, [1, 1, 1, 1]),
        (5, [5, 5, 5, 5]),
        (1000, [55, 15, 15, 15]),
    ],
)
def test_few_labels_are_drawn_from_each_class(amount, expected):
    labels = torch.arange(100) % 4
    labels[:40] = 0
    index = draw_labels(labels, amount, seed=0)
    assert labels[index].bincount().tolist() == expected
    assert len(index.unique()) == len(index)


def test_the_labels_drawn_follow_from_the_seed():
    labels = torch.arange(100) % 4
    labels[:40] = 0
    draws = {tuple(draw_labels(labels, 5, seed).tolist()) for seed in (0, 0, 1, 2)}
    assert len(draws) == 3


def best_matching(clusters, labels, k):
    """The most images that match, over all one-to-one matchings of k clusters with 4 classes."""
    counts = np.zeros((k, 4), dtype=int)
    for cluster, label in zip(clusters, labels, strict=True):
        counts[cluster, label] += 1
    if k < 4:
        counts = counts.T
    columns = counts.shape[1]  # each is matched with one row of its own
    matchings = itertools.permutations(range(len(counts)), columns)
    return max(counts[list(rows), range(columns)].sum() for rows in matchings)


@pytest.mark.parametrize("k", [2, 4, 6])
def test_agreement_matches_scikit_learn_and_the_best_of_all_matchings(k):
    rng = np.random.default_rng(k)
    labels = rng.integers(0, 4, 80)
    clusters = rng.integers(0, k, 80)
    clusters[:40] = labels[:40] % k
    found = agreement(torch.from_numpy(clusters), torch.from_numpy(labels))
    expected = {
        "NMI": 100 * sklearn_metrics.normalized_mutual_info_score(labels, clusters),
        "AMI": 100 * sklearn_metrics.adjusted_mutual_info_score(labels, clusters),
        "ARI": 100 * sklearn_metrics.adjusted_rand_score(labels, clusters),
        "acc": 100 * best_matching(clusters, labels, k) / 80,
    }
    assert found == pytest.approx(expected)


def test_agreement_of_the_same_partition_is_perfect():
    found = agreement(torch.tensor([1, 1, 0]), torch.tensor([0, 0, 5]))
    assert found == pytest.approx({"NMI": 100, "AMI": 100, "ARI": 100, "acc": 100})
