"""What features are worth: linear probes, kNN, few labels, and how well clusters agree with classes.

The published linear probe: MoCo (He et al. 2020, arXiv 1911.05722, 4.1). kNN: Wu et al. 2018 (arXiv 1805.01978, 3.4).

    scores = logistic_regression(train_features, train_labels, val_features, num_classes=10)
    top1 = top_k(scores, val_labels, 1)
    knn = knn_accuracy(train_features, train_labels, val_features, val_labels)
"""

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from sklearn import metrics
from sklearn.metrics.cluster import contingency_matrix

STRENGTHS = [10 ** (-k / 2) for k in range(13)]  # of the L2 penalty, the strongest first
CHUNK = 2**16  # rows of features whose scores are in memory at once


def logistic_regression(features, labels, queries, num_classes, seed=0):
    """The best linear classifier on `features` (M, D), labels (M,) int64: its scores (n, num_classes) of `queries`.
    Multinomial logistic regression on standardised features, run to its optimum. The strength of its L2 penalty is the
    one with the lowest cross-entropy on a tenth of the rows (of fewer than 1,000, on as many tenths in turn as make 100
    rows); then all rows are fitted. Runs on the device of `features`."""
    std, mean = torch.std_mean(features.float(), 0, correction=0)
    std = std.masked_fill(std <= 1e-6 * std.max(), torch.inf)  # a constant tells nothing
    x, queries = (features.float() - mean) / std, (queries.float() - mean) / std
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).to(x.device)
    tenths = order.chunk(10)[: -(-1000 // len(x))] if len(x) > 1 else ()
    layers, lowest, best = [None] * len(tenths), torch.inf, STRENGTHS[0]
    for strength in STRENGTHS:
        loss = 0.0
        for i, tenth in enumerate(tenths):
            rest = torch.ones_like(labels, dtype=torch.bool).index_fill_(0, tenth, False)
            layers[i] = _fit(x[rest], labels[rest], num_classes, strength, layers[i])
            loss += F.cross_entropy(layers[i](x[tenth]), labels[tenth], reduction="sum").item()
        if loss >= lowest:  # the best one was the last
            break
        lowest, best = loss, strength
    return _fit(x, labels, num_classes, best)(queries).detach()


def _fit(x, labels, num_classes, strength, layer=None):
    """The linear layer that minimises mean cross-entropy + strength / 2 * |weight|^2 on x (M, D), from `layer` on."""
    if layer is None:
        layer = nn.Linear(x.shape[1], num_classes, device=x.device)
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=2000, tolerance_grad=1e-5, line_search_fn="strong_wolfe")

    def objective():
        optimizer.zero_grad()
        total = strength / 2 * layer.weight.square().sum()
        total.backward()
        for rows, y in zip(x.split(CHUNK), labels.split(CHUNK), strict=True):
            loss = F.cross_entropy(layer(rows), y, reduction="sum") / len(x)
            loss.backward()
            total = total.detach() + loss.detach()
        return total

    optimizer.step(objective)
    return layer


def linear_probe(batches, features, num_classes, lr=30.0, epochs=100, state=None, save=None):
    """The published probe: a linear layer trained by SGD; its scores (n, num_classes) of `features` (n, D).
    Momentum 0.9, no weight decay, the learning rate x0.1 after 60 % and 80 % of the epochs.
    batches: callable epoch -> iterable of (features (B, D), labels (B,)); under torch.distributed each process has a
    share of the same number of batches, and gradients are averaged. save: called with the state after each epoch;
    `state`: one of these to go on from."""
    layer = nn.Linear(features.shape[1], num_classes).to(features.device)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)
    optimizer, first = torch.optim.SGD(layer.parameters(), lr, momentum=0.9), 0
    if state is not None:
        first = state["epoch"]
        layer.load_state_dict(state["layer"])
        optimizer.load_state_dict(state["optimizer"])
    for epoch in range(first, epochs):
        optimizer.param_groups[0]["lr"] = lr * 0.1 ** sum(epoch >= epochs * tenths // 10 for tenths in (6, 8))
        for inputs, labels in batches(epoch):
            optimizer.zero_grad()
            F.cross_entropy(layer(inputs), labels).backward()
            for p in layer.parameters() if dist.is_initialized() else ():
                dist.all_reduce(p.grad)
                p.grad /= dist.get_world_size()
            optimizer.step()
        if save is not None:
            save({"epoch": epoch + 1, "layer": layer.state_dict(), "optimizer": optimizer.state_dict()})
    return layer(features).detach()


def top_k(scores, labels, k):
    """How often the label is among the k highest of `scores` (n, classes), in percent."""
    return 100 * (scores.topk(k, dim=1).indices == labels[:, None]).any(1).float().mean().item()


def knn_accuracy(bank, bank_labels, queries, labels, k=None, temperature=0.1):
    """Top-1 accuracy in percent of a weighted kNN vote (Wu et al. 2018): weight exp(cosine / temperature).
    bank (M, D), queries (n, D): features of any length, bank_labels (M,), labels (n,) int64.
    k: at most M; None: 200, or a fiftieth of a bank of less than 10,000."""
    k = min(len(bank), k or default_k(len(bank)))
    bank = F.normalize(bank.float(), dim=1)
    votes = []
    for chunk in F.normalize(queries.float(), dim=1).split(1024):
        similarity, nearest = (chunk @ bank.T).topk(k, dim=1)
        weight = ((similarity - 1) / temperature).exp()
        vote = weight.new_zeros(len(chunk), int(bank_labels.max()) + 1)
        votes.append(vote.scatter_add_(1, bank_labels[nearest], weight).argmax(1))
    return 100 * (torch.cat(votes) == labels).float().mean().item()


def default_k(m):
    """Neighbours that vote in a bank of `m` features."""
    return max(1, min(200, m // 50))


def draw_labels(labels, amount, seed):
    """Which of `labels` (M,) a probe with few labels sees: (m,) int64, drawn per class from `seed`.
    amount: below 1, that part of each class, at least one; else that number of each class, or all it has."""
    generator, drawn = torch.Generator().manual_seed(seed), []
    for label in labels.unique():
        members = (labels == label).nonzero()[:, 0].cpu()
        number = max(1, round(amount * len(members))) if amount < 1 else int(amount)
        drawn.append(members[torch.randperm(len(members), generator=generator)[:number]])
    return torch.cat(drawn).to(labels.device)


def agreement(clusters, labels):
    """How well `clusters` (M,) agree with `labels` (M,), in percent, as {name: figure}.
    NMI and AMI: mutual information, normalised, and adjusted for chance (AMI is PCL's own figure); ARI: adjusted Rand
    index; acc: accuracy where each class is given the one cluster that makes it highest."""
    clusters, labels = clusters.cpu().numpy(), labels.cpu().numpy()
    counts = contingency_matrix(labels, clusters)
    figures = {
        "NMI": metrics.normalized_mutual_info_score(labels, clusters),
        "AMI": metrics.adjusted_mutual_info_score(labels, clusters),
        "ARI": metrics.adjusted_rand_score(labels, clusters),
        "acc": counts[linear_sum_assignment(counts, maximize=True)].sum() / len(labels),
    }
    return {name: 100 * float(figure) for name, figure in figures.items()}
