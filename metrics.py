"""What features are worth: linear probe and kNN.

Linear probe: MoCo (He et al. 2020, arXiv 1911.05722, 4.1). kNN: Wu et al. 2018 (arXiv 1805.01978, 3.4).

    accuracy = knn_accuracy(train_features, train_labels, val_features, val_labels)
    scores = linear_probe(stored_batches(train_features, train_labels, 256), val_features, num_classes=10)
    top1 = top_k(scores, val_labels, 1)
"""

import torch
import torch.nn as nn
import torch.nn.functional as F


def stored_batches(features, labels, batch_size):
    """`batches` for linear_probe, of stored features (M, D) and labels (M,): in a new order each epoch."""
    device = features.device
    return lambda _: ((features[i], labels[i]) for i in torch.randperm(len(labels), device=device).split(batch_size))


def linear_probe(batches, features, num_classes, lr=30.0, epochs=100):
    """Train a linear layer on unit-length features and return its scores (n, num_classes) of `features` (n, D).
    batches: callable epoch -> iterable of (features (B, D), labels (B,)). The published schedule: SGD with momentum
    0.9 and no weight decay, the learning rate x0.1 after 60 % and 80 % of the epochs."""
    layer = nn.Linear(features.shape[1], num_classes).to(features.device)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)
    optimizer = torch.optim.SGD(layer.parameters(), lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [epochs * 6 // 10, epochs * 8 // 10])
    for epoch in range(epochs):
        for inputs, labels in batches(epoch):
            loss = F.cross_entropy(layer(F.normalize(inputs, dim=1)), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    with torch.no_grad():
        return layer(F.normalize(features, dim=1))


def top_k(scores, labels, k):
    """How often the label is among the k highest of `scores` (n, classes), in percent."""
    return 100 * (scores.topk(k, dim=1).indices == labels[:, None]).any(1).float().mean().item()


def knn_accuracy(bank, bank_labels, queries, labels, k=None, temperature=0.1):
    """Top-1 accuracy in percent of a weighted kNN vote (Wu et al. 2018): weight exp(cosine / temperature).
    bank (M, D), queries (n, D): features of any length, bank_labels (M,), labels (n,) int64.
    k: None: 200, or a fiftieth of a bank of less than 10,000."""
    k = k or max(1, min(200, len(bank) // 50))
    bank = F.normalize(bank.float(), dim=1)
    votes = []
    for chunk in F.normalize(queries.float(), dim=1).split(1024):
        similarity, nearest = (chunk @ bank.T).topk(k, dim=1)
        weight = ((similarity - 1) / temperature).exp()
        vote = weight.new_zeros(len(chunk), int(bank_labels.max()) + 1)
        votes.append(vote.scatter_add_(1, bank_labels[nearest], weight).argmax(1))
    return 100 * (torch.cat(votes) == labels).float().mean().item()
