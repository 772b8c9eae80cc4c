"""The two losses of Prototypical Contrastive Learning, as pure functions.

PCL (Li, Zhou, Xiong, Hoi, ICLR 2021, arXiv 2005.04966). InfoNCE compares two views of one image
(eq. 1). ProtoNCE compares an image with prototypes at several granularities (eq. 11). Both are
computed in float32, even under autocast: 16-bit formats have too few digits for a logit at a
temperature of 0.1.

    loss_inst, acc_inst = info_nce(q, k, queue, temperature=0.2)
    loss_proto, acc_proto = proto_nce(c, index, clusters, num_negatives=16384)
    (loss_inst + loss_proto).backward()
"""

import torch
import torch.nn.functional as F


def info_nce(q, k, queue, temperature):
    """InfoNCE: compare each query with its key and with a queue of other keys.

    q, k: (N, D) unit rows.
    queue: (D, R) unit columns.
    Returns (loss, acc), two scalars: the mean loss in nats and the top-1 accuracy in percent.
    Raises ValueError if the batch is empty, because then there is no mean.
    Source: MoCo (arXiv 1911.05722), eq. 1.
    """
    with torch.autocast(q.device.type, enabled=False):
        q = q.float()
        k = k.float()
        positive = (q * k).sum(1, keepdim=True)  # (N, 1)
        logits = torch.cat([positive, q @ queue.float()], dim=1) / temperature  # (N, 1 + R)
        target = torch.zeros(len(q), dtype=torch.long, device=q.device)
        loss, hits = _cross_entropy(logits, target)
    return loss, 100 * hits.mean(dtype=torch.float32)


def proto_nce(q, index, clusters, num_negatives):
    """ProtoNCE: compare each sample with its prototype and with others, at every granularity.

    q: (N, D) unit rows.
    index: (N,) positions of the samples in the data set.
    clusters: one (im2cluster (M,) int64, centroids (K, D) unit rows, density (K,)) per granularity,
        on the device of q; centroids and density are float32. The density is the paper's
        concentration phi: the temperature of each prototype.
    num_negatives: the number of negatives to draw, without replacement, from the prototypes to
        which no sample of the batch belongs. If there are at most num_negatives + 1 prototypes in
        all, all are used and nothing is drawn. The other samples' prototypes are negatives as well.
        A prototype that several samples share counts once.
    Returns (loss, acc), two scalars: the mean loss in nats and the top-1 accuracy in percent, both
        averaged over the granularities.
    Raises ValueError if the batch or the list of clusters is empty, because then there is no mean.
    Source: PCL, eq. 11, second term.
    """
    if not clusters:
        raise ValueError("proto_nce needs the clusters of at least one granularity")
    losses = []
    hits = []
    with torch.autocast(q.device.type, enabled=False):
        for im2cluster, centroids, density in clusters:
            target = im2cluster[index]  # (N,) the prototype of each sample

            # Divide the prototypes by their density, not the logits: the logits are more numbers.
            if len(centroids) > num_negatives + 1:
                chosen, bias, target = _choose_prototypes(target, len(centroids), num_negatives)
                prototypes = (centroids[chosen] / density[chosen][:, None]).T  # (D, S)
                logits = torch.addmm(bias, q.float(), prototypes)  # (N, S)
            else:
                prototypes = (centroids / density[:, None]).T  # (D, K)
                logits = q.float() @ prototypes  # (N, K)

            loss, hit = _cross_entropy(logits, target)
            losses.append(loss)
            hits.append(hit)
    return torch.stack(losses).mean(), 100 * torch.cat(hits).mean(dtype=torch.float32)


def _choose_prototypes(target, num_cluster, num_negatives):
    """Choose the prototypes to compare a batch with: its own, and `num_negatives` random others.

    target: (N,) the prototype of each sample.
    Returns three tensors:
        chosen: (S,) numbers of prototypes. S depends on the sizes of the arguments alone, so that
            the host need not wait for the device.
        bias: (S,) to add to the logits: -inf for entries of `chosen` that do not count, else 0. A
            repeated prototype does not count, nor does a negative beyond the first `num_negatives`.
        target: (N,) the position in `chosen` of each sample's prototype.

    For example, with target [7, 2, 7] and two negatives, `chosen` begins with 7, 2, 7. The second 7
    does not count: `bias` begins with 0, 0, -inf. Of the candidates after them, the first two that
    are neither 7 nor 2 count. The new target is [0, 1, 0].
    """
    n = len(target)
    order = torch.arange(n, device=target.device)

    # The first sample of each prototype; n if no sample of the batch has the prototype.
    first_sample = torch.full((num_cluster,), n, device=target.device)
    first_sample.scatter_reduce_(0, target, order, "amin")
    new_target = first_sample[target]

    # Draw candidates. At most n of them belong to the batch, which leaves enough negatives.
    others = torch.randperm(num_cluster, device=target.device)[: num_negatives + n]
    is_negative = first_sample[others] == n

    # Count each prototype of the batch once, and the first `num_negatives` negatives.
    keep_own = new_target == order
    keep_others = is_negative & (is_negative.cumsum(0) <= num_negatives)
    keep = torch.cat([keep_own, keep_others])
    bias = torch.zeros(len(keep), device=target.device).masked_fill_(~keep, -torch.inf)
    return torch.cat([target, others]), bias, new_target


def _cross_entropy(logits, target):
    """Mean cross-entropy, and which rows (N,) are top-1 hits. Overwrites `logits`.

    A row is a hit if the logit of its target exceeds all others; a tie is not. If all features
    collapse onto one point, all logits are equal, and taking the first as the maximum would report
    an accuracy of 100 %.
    """
    if len(logits) == 0:
        raise ValueError("the batch is empty: it has no mean loss")
    loss = F.cross_entropy(logits, target)
    with torch.no_grad():  # the gradient of the loss needs no logits, so they can be overwritten
        own = logits.gather(1, target[:, None])
        others = logits.scatter_(1, target[:, None], -torch.inf).amax(1, keepdim=True)
    return loss, (own > others)[:, 0]
