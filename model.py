"""The momentum-contrast model: two encoders, their MLP heads a and ã, the cluster head b, the queue.

MoCo (He et al. 2020, arXiv 1911.05722) with the MLP head of MoCo v2 (arXiv 2003.04297), as used by PCL (Li et al.
2021, arXiv 2005.04966), and an optional cluster head on the momentum key.

    model = MoCo(functools.partial(build_encoder, "resnet18", small_images=True), dim=128, r=4096)
    q, k = model(im_q, im_k)                          # InfoNCE takes q, k and model.queue; ProtoNCE takes q
    model.momentum_update_key_encoder()               # after the optimizer's step
    model.dequeue_and_enqueue(k)
"""

import copy
import functools
import re

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

BLOCKS = {18: [2, 2, 2, 2], 34: [3, 4, 6, 3], 50: [3, 4, 6, 3], 101: [3, 4, 23, 3], 152: [3, 8, 36, 3]}


class WidthResNet(ResNet):
    """torchvision's ResNet with `width` channels in its first stage (64 is the published one, with the same keys).
    small_images: a 3x3 first convolution of stride 1 and no max-pool, for images of about 32 pixels."""

    def __init__(self, block, layers, num_classes, width=64, small_images=False, norm_layer=None):
        self.width = width
        super().__init__(block, layers, norm_layer=norm_layer)
        kernel, stride, padding = (3, 1, 1) if small_images else (7, 2, 3)
        self.conv1 = nn.Conv2d(3, width, kernel, stride, padding, bias=False)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.bn1 = self._norm_layer(width)
        if small_images:
            self.maxpool = nn.Identity()
        self.fc = nn.Linear(8 * width * block.expansion, num_classes)

    def _make_layer(self, block, planes, blocks, **kwargs):
        if planes == 64:  # the first stage follows the stem
            self.inplanes = self.width
        return super()._make_layer(block, planes * self.width // 64, blocks, **kwargs)


class SplitBatchNorm2d(nn.BatchNorm2d):
    """Batch norm whose training statistics are those of `num_splits` groups of consecutive samples.
    Its running statistics move when `move_running_statistics` is called, once after each training step's forward pass.
    fold: normalise all groups in one call, as channels of their own, which takes a GPU fewer launches but a CPU longer;
    None: on a GPU."""

    fold = None

    def __init__(self, num_features, num_splits=1):
        super().__init__(num_features)
        self.num_splits = num_splits

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        splits, weight, bias, rest = self.num_splits, self.weight, self.bias, (None, None, True, 0, self.eps)
        self.count = x.numel() // splits // self.num_features  # values that a mean is of
        if splits > 1 and not (x.is_cuda if self.fold is None else self.fold):
            groups = [torch.native_batch_norm(group, weight, bias, *rest) for group in x.chunk(splits)]
            y, *moments = zip(*groups, strict=True)
            self.moments = [torch.stack(moment) for moment in moments]  # mean and 1 / standard deviation (splits, C)
            return torch.cat(y)
        if splits > 1:
            x, weight, bias = torch.cat(x.chunk(splits), 1), weight.repeat(splits), bias.repeat(splits)
        y, *moments = torch.native_batch_norm(x, weight, bias, *rest)  # of (N / splits, splits * C, H, W)
        self.moments = [moment.view(splits, -1) for moment in moments]
        return torch.cat(y.chunk(splits, 1)) if splits > 1 else y


@torch.no_grad()
def move_running_statistics(norms):
    """Move the running statistics of SplitBatchNorm2d modules, where in training, by their last batch's, as the mean
    over its groups. All modules at once, as a call for each would cost a GPU more than its arithmetic."""
    norms = [norm for norm in norms if norm.training]
    if not norms:
        return
    mean, rstd = (torch.cat(moments, 1) for moments in zip(*(norm.moments for norm in norms), strict=True))
    sizes, counts = [norm.num_features for norm in norms], [norm.count for norm in norms]
    variance = rstd.pow(-2).mean(0).sub_(norms[0].eps).split(sizes)  # with / n
    torch._foreach_mul_(variance, [n / (n - 1) for n in counts])  # with / (n - 1)
    torch._foreach_lerp_([norm.running_mean for norm in norms], mean.mean(0).split(sizes), norms[0].momentum)
    torch._foreach_lerp_([norm.running_var for norm in norms], variance, norms[0].momentum)
    torch._foreach_add_([norm.num_batches_tracked for norm in norms], 1)


def build_encoder(arch, num_classes=128, small_images=False, norm_layer=None):
    """The ResNet named `arch`, as in torchvision; `resnet18_w16` has 16 channels in its first stage, not 64.
    Returns a module images (N, 3, H, W) -> (N, num_classes) with its last layer in `.fc`. Raises ValueError where the
    name is unknown."""
    known = re.fullmatch(rf"resnet({'|'.join(map(str, BLOCKS))})(?:_w([1-9][0-9]*))?", arch)
    if not known:
        raise ValueError(f"unknown arch {arch}; known are resnet{', '.join(map(str, BLOCKS))}, and resnet18_w16")
    depth, width = int(known[1]), int(known[2] or 64)
    block = BasicBlock if depth < 50 else Bottleneck
    return WidthResNet(block, BLOCKS[depth], num_classes, width, small_images, norm_layer)


def backbone(encoder):
    """`encoder` without its `.fc`, sharing its weights: images (N, 3, H, W) -> features (N, D), average-pooled."""
    return nn.Sequential(*(module for name, module in encoder.named_children() if name != "fc"), nn.Flatten(1))


class MoCo(nn.Module):
    """Query encoder, key encoder (the query encoder's moving average), queue of keys, cluster head.
    base_encoder: callable (num_classes=, norm_layer=) -> module with its last layer in `.fc`.
    dim: D, feature dimension. r: R, queue length. m: momentum of the key encoder.
    mlp: a hidden layer before the last one: heads a and ã.
    cluster_head: "none", PCL as published; "report", b, one Linear and ReLU on the momentum key, for all its uses.
    bn_splits: groups with batch-norm statistics of their own in this process's batch; the keys are dealt out anew
        over the groups of all processes, so that a key's statistics do not tell which query it belongs to.
    `queue`: (D, R) unit columns."""

    def __init__(self, base_encoder, dim=128, r=16384, m=0.999, mlp=True, cluster_head="none", bn_splits=1):
        super().__init__()
        self.cluster_head, self.bn_splits = cluster_head, bn_splits
        self.moving_average = get_ema_multi_avg_fn(m)
        norm_layer = functools.partial(SplitBatchNorm2d, num_splits=bn_splits)
        self.encoder_q = base_encoder(num_classes=dim, norm_layer=norm_layer)
        if mlp:
            dim_mlp = self.encoder_q.fc.in_features
            self.encoder_q.fc = nn.Sequential(nn.Linear(dim_mlp, dim_mlp), nn.ReLU(), self.encoder_q.fc)
        self.encoder_k = copy.deepcopy(self.encoder_q).requires_grad_(False)
        if cluster_head == "report":
            self.v = nn.Sequential(nn.Linear(dim, dim), nn.ReLU())
        elif cluster_head != "none":
            raise ValueError(f"unknown cluster head {cluster_head}; known are none and report")
        self.norms = [module for module in self.modules() if isinstance(module, SplitBatchNorm2d)]
        self.register_buffer("queue", F.normalize(torch.randn(dim, r), dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    def forward(self, im_q, im_k, clustering=False, features=False):
        """Two views (N, 3, H, W) of N images -> q, k, each (N, D) float32 with unit rows.
        q and k are InfoNCE's query and key; ProtoNCE compares q with the prototypes. clustering: the warm-up is over,
        the cluster head takes part, and k has a gradient for it alone. features: a third result, what `encode` makes of
        im_k, but with batch norm as in training. Raises ValueError where N is not a multiple of `bn_splits`."""
        if len(im_q) % self.bn_splits:
            raise ValueError(f"a batch of {len(im_q)} does not split into {self.bn_splits} equal groups")
        z_q = self.encoder_q(im_q)  # (N, D)
        with torch.no_grad():
            im_k, own_rows = self.batch_shuffle(im_k)
            z_k = concat_all_gather(self.encoder_k(im_k))[own_rows]  # (N, D), in the order of z_q again
            move_running_statistics(self.norms)
        q, k = _unit(z_q), _unit(z_k)
        if clustering and self.cluster_head == "report":
            k = _unit(self.v(k))
        return (q, k, self._to_cluster(z_k)) if features else (q, k)

    def cluster_head_parameters(self):
        """Names of the parameters that take no part before the cluster head does."""
        return [name for name, _ in self.named_parameters() if name.startswith("v.")]

    @torch.no_grad()
    def encode(self, images):
        """Images (N, 3, H, W) -> (N, D) float32 unit rows, the momentum branch's features to cluster."""
        training = self.training
        self.eval()
        features = self._to_cluster(self.encoder_k(images))
        self.train(training)
        return features

    @torch.no_grad()
    def _to_cluster(self, z_k):
        """The momentum head's output (N, D) -> (N, D) float32 unit rows in the space of the prototypes."""
        if self.cluster_head == "report":
            z_k = self.v(_unit(z_k))
        return _unit(z_k)

    @torch.no_grad()
    def momentum_update_key_encoder(self):
        """After the optimizer's step: key branch <- m * key branch + (1 - m) * query branch (MoCo, eq. 2)."""
        self.moving_average([*self.encoder_k.parameters()], [*self.encoder_q.parameters()], None)

    @torch.no_grad()
    def dequeue_and_enqueue(self, k):
        """The keys (N, D) of all processes take the place of the queue's oldest; any number of them."""
        r = self.queue.shape[1]
        keys = concat_all_gather(k)[-r:]
        self.queue[:, (self.queue_ptr + torch.arange(len(keys), device=k.device)) % r] = keys.T
        self.queue_ptr.copy_((self.queue_ptr + len(keys)) % r)

    @torch.no_grad()
    def batch_shuffle(self, images):
        """Deal the images of all processes out over the batch-norm groups of all processes.
        Each group's images go to all groups in equal shares, which is as little as a key's group can have in common
        with its query's. images: (N, 3, H, W). Returns this process's share (N, 3, H, W), and the rows (N,) of its own
        images among the gathered outputs, which undo the shuffle."""
        n, rank, world = len(images), *_rank_and_world()
        groups = world * self.bn_splits
        if groups == 1:
            return images, slice(None)
        order = torch.rand(groups, n * world // groups, device=images.device).argsort(1)
        order = (order + torch.arange(groups, device=images.device)[:, None] * order.shape[1]).T.flatten()
        if world > 1:
            dist.broadcast(order, 0)
            if torch.is_autocast_enabled(images.device.type):  # half as much to send
                images = images.to(torch.get_autocast_dtype(images.device.type))
        share = order.view(world, n)[rank]
        return concat_all_gather(images)[share], order.argsort().view(world, n)[rank]


@torch.no_grad()
def concat_all_gather(x):
    """The rows (N, ...) of all processes, in rank order: (N * processes, ...), without gradient."""
    _, world = _rank_and_world()
    if world == 1:
        return x.detach()
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world)]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def _rank_and_world():
    """(this process's rank, number of processes)."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _unit(x):
    """Rows of unit length in float32; a row of zeros stays one."""
    return F.normalize(x.float(), dim=1)
