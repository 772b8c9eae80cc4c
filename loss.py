"""The two losses of Prototypical Contrastive Learning, as pure functions.

PCL (Li, Zhou, Xiong, Hoi, ICLR 2021, arXiv 2005.04966): InfoNCE compares two views of one instance (eq. 1),
ProtoNCE an instance with prototypes at several granularities (eq. 11). Both are computed in float32, also under
autocast: a logit at temperature 0.1 needs more digits than 16-bit formats have.

    loss_inst, acc_inst = info_nce(q, k, queue, temperature=0.2)
    loss_proto, acc_proto = proto_nce(c, index, clusters, num_negatives=16384)
    (loss_inst + loss_proto).backward()
"""

import torch
import torch.nn.functional as F


def info_nce(q, k, queue, temperature):
    """InfoNCE of queries against their keys and a queue of other keys (MoCo, arXiv 1911.05722, eq. 1).
    q, k: (N, D) unit rows; queue: (D, R) unit columns.
    Returns (loss, acc): the mean loss in nats and the top-1 accuracy in percent, both scalars."""
    with torch.autocast(q.device.type, enabled=False):
        q, k = q.float(), k.float()
        positive = (q * k).sum(1, keepdim=True)
        logits = torch.cat([positive, q @ queue.float()], dim=1) / temperature
        return _cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=q.device))


def proto_nce(q, index, clusters, num_negatives):
    """ProtoNCE of samples against their prototypes, averaged over the granularities (PCL, eq. 11, second term).
    q: (N, D) unit rows; index: (N,) their positions in the data set.
    clusters: one (im2cluster (M,) int64, centroids (K, D), density (K,)) per granularity, on q's device.
    num_negatives: beside the prototypes of the other samples in the batch, each of which counts once however many
        samples share it, up to so many more are drawn from the rest without replacement; all of them where there
        are no more than that, and then nothing is random.
    Returns (loss, acc): the mean loss in nats and the top-1 accuracy in percent, both scalars."""
    results = []
    with torch.autocast(q.device.type, enabled=False):
        for im2cluster, centroids, density in clusters:
            target, bias = im2cluster[index], None
            if len(centroids) > num_negatives + 1:
                chosen, bias, target = _choose_prototypes(target, len(centroids), num_negatives)
                centroids, density = centroids[chosen], density[chosen]
            prototypes = (centroids / density[:, None]).T  # fewer numbers to divide than the logits are
            logits = q.float() @ prototypes if bias is None else torch.addmm(bias, q.float(), prototypes)
            results.append(_cross_entropy(logits, target))
    losses, accs = zip(*results, strict=True)
    return torch.stack(losses).mean(), torch.stack(accs).mean()


def _choose_prototypes(target, num_cluster, num_negatives):
    """The prototypes that one batch is compared with: its own, and `num_negatives` of the others at random.
    target: (N,) the prototype of each sample. Returns chosen (S,) prototype numbers, S fixed by the arguments' sizes
    so that no device has to wait for the host; bias (S,), to add to the logits: 0, or -inf for those that are one too
    many because samples share a prototype; and (N,) where in `chosen` each sample's own prototype is."""
    n = len(target)
    order = torch.arange(n, device=target.device)
    owner = torch.full((num_cluster,), n, device=target.device).scatter_reduce_(0, target, order, "amin")
    others = torch.randperm(num_cluster, device=target.device)[: num_negatives + n]
    free = owner[others] == n
    keep = torch.cat([owner[target] == order, free & (free.cumsum(0) <= num_negatives)])
    bias = torch.zeros(len(keep), device=target.device).masked_fill_(~keep, -torch.inf)
    return torch.cat([target, others]), bias, owner[target]


def _cross_entropy(logits, target):
    """Mean cross-entropy, and the percentage of rows whose target logit exceeds all others; overwrites `logits`.
    A tie is no hit: where all features have collapsed onto one point every logit is the same, and counting the
    first of them as the maximum would report an accuracy of 100 %."""
    loss = F.cross_entropy(logits, target)
    with torch.no_grad():  # the loss keeps none of the logits for its gradient
        own = logits.gather(1, target[:, None])
        others = logits.scatter_(1, target[:, None], -torch.inf).amax(1, keepdim=True)
        return loss, 100 * (own > others).float().mean()
