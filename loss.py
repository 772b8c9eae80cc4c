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
    Returns (loss, acc): the mean loss in nats and the top-1 accuracy in percent, both scalars.
    """
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
    Returns (loss, acc): the mean loss in nats and the top-1 accuracy in percent, both scalars.
    """
    losses, accs = [], []
    with torch.autocast(q.device.type, enabled=False):
        for im2cluster, centroids, density in clusters:
            target = im2cluster[index]
            chosen, surplus = _choose_prototypes(target, len(centroids), num_negatives)
            if chosen is not None:
                centroids, density = centroids[chosen], density[chosen]
                target = torch.searchsorted(chosen, target)
            logits = q.float() @ centroids.T / density
            if surplus is not None:
                logits = logits.masked_fill(surplus, -torch.inf)
            loss, acc = _cross_entropy(logits, target)
            losses.append(loss)
            accs.append(acc)
    return torch.stack(losses).mean(), torch.stack(accs).mean()


def _choose_prototypes(target, num_cluster, num_negatives):
    """The prototypes that one batch is compared with: its own, and `num_negatives` of the others at random.

    target: (N,) the prototype of each sample. Returns (chosen, surplus): ascending prototype numbers (S,), S fixed
    by the arguments' sizes so that no device has to wait for the host, and a mask (S,) of those that are one too
    many because samples share a prototype. (None, None) stands for all prototypes.
    """
    if num_cluster <= num_negatives + 1:
        return None, None
    priority = torch.randperm(num_cluster, device=target.device)
    priority[target] = num_cluster  # the batch's own come first
    size = min(num_cluster, num_negatives + len(target))
    top, chosen = priority.topk(size)
    own = (top == num_cluster).sum()
    last = top[(own + num_negatives).clamp(max=size) - 1]
    chosen = chosen.sort().values
    return chosen, priority[chosen] < last


def _cross_entropy(logits, target):
    """Mean cross-entropy, and the percentage of rows whose target logit exceeds all others.

    A tie is no hit: where all features have collapsed onto one point every logit is the same, and counting the
    first of them as the maximum would report an accuracy of 100 %.
    """
    hit = (logits >= logits.gather(1, target[:, None])).sum(1) == 1
    return F.cross_entropy(logits, target), 100 * hit.float().mean()
