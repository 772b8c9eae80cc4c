"""How good features are: linear probes, kNN, few labels, and agreement of clusters with classes.

Without labels: their effective rank and their spread, which show a collapse.

The published linear probe is MoCo's (He et al. 2020, arXiv 1911.05722, section 4.1). The weighted
kNN vote is from Wu et al. 2018 (arXiv 1805.01978, section 3.4). The effective rank is RankMe
(Garrido et al. 2023, arXiv 2210.02885).

    train, val, labels = torch.randn(500, 16), torch.randn(100, 16), torch.arange(600) % 10
    scores = logistic_regression(train, labels[:500], val, num_classes=10)
    print(top_k(scores, labels[500:], 1), knn_accuracy(train, labels[:500], val, labels[500:]))
    print(effective_rank(moments(train)), spread(moments(F.normalize(train))))
"""

import math

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from sklearn import metrics
from sklearn.metrics.cluster import contingency_matrix

STRENGTHS = [10 ** (-k / 2) for k in range(13)]  # L2 penalties to try, the strongest first
CHUNK = 2**16  # rows of features scored at once


def logistic_regression(features, labels, queries, num_classes, seed=0):
    """Fit a linear classifier on `features` and return its scores (n, num_classes) of `queries`.

    Multinomial logistic regression on standardised features, run to its optimum. The strength of
    the L2 penalty is chosen on held-out rows. Then all rows are fitted. Runs on the device of
    `features`.

    features: (M, D). labels: (M,) int64. queries: (n, D).
    seed: chooses the rows to hold out.
    Raises ValueError if there are no features.
    """
    if len(features) == 0:
        raise ValueError("there are no features to fit a classifier on")

    # Standardise. A constant feature tells nothing and becomes 0.
    std, mean = torch.std_mean(features.float(), 0, correction=0)
    std = std.masked_fill(std <= 1e-6 * std.max(), torch.inf)
    x = (features.float() - mean).div_(std)  # in place, because features may fill the memory
    queries = (queries.float() - mean) / std

    strength = _best_strength(x, labels, num_classes, seed)
    layer = _fit(x, labels, num_classes, strength)
    return layer(queries).detach()


def _best_strength(x, labels, num_classes, seed):
    """The L2 penalty of STRENGTHS with the lowest cross-entropy on held-out rows of x (M, D).

    One tenth of the rows is held out. With fewer than 1,000 rows, further tenths are held out, one
    after another, until 100 rows or all rows have been held out.
    """
    if len(x) <= 1:
        return STRENGTHS[0]  # there is nothing to hold out

    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).to(x.device)
    folds = math.ceil(1000 / len(x))
    tenths = order.chunk(10)[:folds]

    # Weaken the penalty until the loss stops falling. Each fit starts from the previous one.
    layers = [None] * len(tenths)
    lowest_loss = torch.inf
    best_strength = STRENGTHS[0]
    for strength in STRENGTHS:
        loss = 0.0
        for i, tenth in enumerate(tenths):
            rest = torch.ones_like(labels, dtype=torch.bool).index_fill_(0, tenth, False)
            layers[i] = _fit(x[rest], labels[rest], num_classes, strength, layers[i])
            loss += F.cross_entropy(layers[i](x[tenth]), labels[tenth], reduction="sum").item()
        if loss >= lowest_loss:
            break
        lowest_loss = loss
        best_strength = strength
    return best_strength


def _fit(x, labels, num_classes, strength, layer=None):
    """Train a linear layer to minimise mean cross-entropy + strength / 2 * |weight|^2 on x (M, D).

    layer: the layer to start from. It is trained in place. None starts from zeros.
    """
    if layer is None:
        layer = nn.Linear(x.shape[1], num_classes, device=x.device)
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    optimizer = torch.optim.LBFGS(
        layer.parameters(), max_iter=2000, tolerance_grad=1e-5, line_search_fn="strong_wolfe"
    )

    def objective():
        optimizer.zero_grad()
        total = strength / 2 * layer.weight.square().sum()
        total.backward()
        # chunk by chunk, so that the scores of all rows are never in memory at once
        for rows, y in zip(x.split(CHUNK), labels.split(CHUNK), strict=True):
            loss = F.cross_entropy(layer(rows), y, reduction="sum") / len(x)
            loss.backward()
            total = total.detach() + loss.detach()
        return total

    optimizer.step(objective)
    return layer


def linear_probe(batches, features, num_classes, lr=30.0, epochs=100, store=None):
    """Train the published linear probe and return its scores (n, num_classes) of `features` (n, D).

    A linear layer trained by SGD with momentum 0.9 and no weight decay. The learning rate is
    multiplied by 0.1 after 60 % and after 80 % of the epochs.

    batches: a function of the epoch that returns an iterable of (features (B, D), labels (B,)).
        Under torch.distributed, each process gets its own share and gradients are averaged, so all
        processes need the same number of batches.
    store: an object that keeps the probe's state, to resume after an interruption. None: no state
        is kept.
        store.load() is called once at the start. It returns a saved state to resume from, or None
        to start from scratch.
        store.save(state) is called after each epoch. `state` is a dict: `epoch` (number of epochs
        done), `layer` and `optimizer` (their state_dicts). It holds the tensors that are being
        trained, so save must write or copy them before it returns.
        Under torch.distributed, every process calls both, and load must return the same state in
        all.
    """
    layer = nn.Linear(features.shape[1], num_classes).to(features.device)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)
    distributed = dist.is_available() and dist.is_initialized()
    if distributed:  # all processes start from the weights of the first
        dist.broadcast(layer.weight.detach(), 0)
    optimizer = torch.optim.SGD(layer.parameters(), lr, momentum=0.9)

    # resume from a saved state
    first_epoch = 0
    state = None
    if store is not None:
        state = store.load()
    if state is not None:
        first_epoch = state["epoch"]
        layer.load_state_dict(state["layer"])
        optimizer.load_state_dict(state["optimizer"])

    for epoch in range(first_epoch, epochs):
        drops = sum(10 * epoch >= tenths * epochs for tenths in (6, 8))  # after 60 and 80 %
        optimizer.param_groups[0]["lr"] = lr * 0.1**drops
        for inputs, labels in batches(epoch):
            optimizer.zero_grad()
            F.cross_entropy(layer(inputs), labels).backward()
            if distributed:
                _average_gradients(layer)
            optimizer.step()
        if store is not None:
            state = {
                "epoch": epoch + 1,
                "layer": layer.state_dict(),
                "optimizer": optimizer.state_dict(),
            }
            store.save(state)
    return layer(features).detach()


def _average_gradients(layer):
    """Replace the layer's gradients by their mean over all processes."""
    for parameter in layer.parameters():
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()


def top_k(scores, labels, k):
    """Top-k accuracy in percent: how often the label is among the k highest scores.

    scores: (n, num_classes). labels: (n,) int64.
    """
    hits = (scores.topk(k, dim=1).indices == labels[:, None]).any(1)
    return 100 * hits.float().mean().item()


def accuracy_by_frequency(scores, labels, counts):
    """Top-1 accuracy in percent on frequent, middle and rare classes, a third of the classes each.

    Within a third, all classes count alike, however many images they have. Classes without an image
    in `labels` are left out, and so is a third without any other class.
    Of two classes, one is frequent and one is rare.

    scores: (n, C). labels: (n,) int64. counts: (C,) training images of each class.
    Returns {"frequent": percent, "middle": percent, "rare": percent}, without what is left out.
    """
    names = ("frequent", "middle", "rare")
    if len(counts) == 2:
        names = ("frequent", "rare")
    hits = (scores.argmax(1) == labels).double()
    images = torch.bincount(labels, minlength=len(counts))
    recall = torch.bincount(labels, hits, minlength=len(counts)) / images  # nan if no images
    order = counts.argsort(descending=True, stable=True)
    parts = zip(names, recall[order].tensor_split(len(names)), strict=True)
    means = {name: 100 * part.nanmean().item() for name, part in parts}
    return {name: mean for name, mean in means.items() if not math.isnan(mean)}


def knn_accuracy(bank, bank_labels, queries, labels, k=None, temperature=0.1):
    """Top-1 accuracy in percent of a weighted kNN vote (Wu et al. 2018).

    Each of the k nearest neighbours votes with weight exp(cosine / temperature).

    bank: (M, D) and queries: (n, D), features of any norm.
    bank_labels: (M,) and labels: (n,), their classes, int64.
    k: number of neighbours; all M if there are fewer. None: default_k(M).
    Raises ValueError if there are no features on either side, or if k is below 1.
    """
    if len(bank) == 0 or len(queries) == 0:
        raise ValueError(
            f"a kNN vote needs features: the bank has {len(bank)} rows, and there are "
            f"{len(queries)} queries"
        )
    if k is None:
        k = default_k(len(bank))
    if k < 1:
        raise ValueError(f"{k} neighbours cannot vote")
    k = min(len(bank), k)

    bank = F.normalize(bank.float(), dim=1)
    num_classes = int(bank_labels.max()) + 1
    predictions = []
    for chunk in F.normalize(queries.float(), dim=1).split(1024):
        similarity, nearest = (chunk @ bank.T).topk(k, dim=1)
        weight = ((similarity - 1) / temperature).exp()  # the -1 scales all votes alike
        votes = weight.new_zeros(len(chunk), num_classes)
        votes.scatter_add_(1, bank_labels[nearest], weight)
        predictions.append(votes.argmax(1))
    return 100 * (torch.cat(predictions) == labels).float().mean().item()


def default_k(m):
    """Number of neighbours that vote in a bank of m features: m // 50, but 1 to 200."""
    return max(1, min(200, m // 50))


def moments(features):
    """The moments of features, from which effective_rank and spread follow: (D + 1, D + 1) float64.

    features: (N, D). The sum of [x, 1]^T [x, 1] over their rows x: second moments, sums, and N. The
    moments of several parts of a data set add up to those of the whole.
    """
    rows = F.pad(features.double(), (0, 1), value=1.0)
    return rows.T @ rows


def effective_rank(moments):
    """How many dimensions features use, from 1 to D (RankMe: Garrido et al. 2023, eq. 1).

    exp(-sum_k p_k log p_k), where p_k = sigma_k / sum_j sigma_j + 1e-7 and sigma_1, ..., sigma_D
    are the singular values of the matrix of features.

    moments: (D + 1, D + 1) from `moments`. If they are not finite, the rank is nan.
    """
    if not moments.isfinite().all():
        return math.nan
    eigenvalues = torch.linalg.eigvalsh(moments[:-1, :-1])  # the squares of the singular values
    sigma = eigenvalues.clamp(min=0).sqrt()  # rounding can make a square negative
    p = sigma / sigma.sum().clamp(min=1e-12) + 1e-7
    return (-p * p.log()).sum().exp().item()


def spread(moments):
    """How far unit features spread over the sphere, from 0 (one point) to 1 (all dimensions).

    sqrt(D) times the mean over the D dimensions of their standard deviation. Chen and He 2021
    (arXiv 2011.10566, section 4.1) measure collapse in this way. Two opposite points can reach 1
    as well, so read it together with the rank.

    moments: (D + 1, D + 1) from `moments`.
    """
    mean = moments[-1, :-1] / moments[-1, -1]
    square = moments.diagonal()[:-1] / moments[-1, -1]
    std = (square - mean.square()).clamp(min=0).sqrt()
    return std.mean().item() * len(std) ** 0.5


def draw_labels(labels, amount, seed):
    """Draw the images whose labels a probe with few labels may use, class by class.

    labels: (M,) int64.
    amount: if below 1, the fraction of each class, at least one image. Otherwise the number of
        images of each class; all, if the class has fewer.
    Returns their positions in `labels`, (m,) int64.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for label in labels.unique():
        members = (labels == label).nonzero()[:, 0].cpu()
        number = max(1, round(amount * len(members))) if amount < 1 else int(amount)
        order = torch.randperm(len(members), generator=generator)
        drawn.append(members[order[:number]])
    return torch.cat(drawn).to(labels.device)


def agreement(clusters, labels):
    """How well clusters agree with classes: a dict of four figures, in percent.

    clusters, labels: (M,) integers.
    NMI: normalised mutual information.
    AMI: adjusted mutual information, the figure in PCL's paper.
    ARI: adjusted Rand index.
    acc: accuracy under the best one-to-one matching of classes and clusters.
    """
    clusters = clusters.cpu().numpy()
    labels = labels.cpu().numpy()
    counts = contingency_matrix(labels, clusters)
    matched = linear_sum_assignment(counts, maximize=True)  # (classes, their clusters)
    figures = {
        "NMI": metrics.normalized_mutual_info_score(labels, clusters),
        "AMI": metrics.adjusted_mutual_info_score(labels, clusters),
        "ARI": metrics.adjusted_rand_score(labels, clusters),
        "acc": counts[matched].sum() / len(labels),
    }
    return {name: 100 * float(figure) for name, figure in figures.items()}
