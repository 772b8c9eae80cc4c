"""The momentum-contrast model: two encoders, their projection heads, the cluster head, the queue.

MoCo (He et al. 2020, arXiv 1911.05722) with the MLP heads of MoCo v2 (arXiv 2003.04297), as PCL
uses it (Li et al. 2021, arXiv 2005.04966). The query encoder ends in head a, the key encoder in
head ã, its momentum copy; the optional cluster head b (`MoCo.v`) takes the keys.

    model = MoCo(functools.partial(build_encoder, "resnet18", small_images=True), dim=128, r=4096)
    q, k, c, features = model(im_q, im_k)             # info_nce(q, k, model.queue, 0.2), then step
    model.momentum_update_key_encoder()
    model.dequeue_and_enqueue(k)
"""

import copy
import difflib
import functools
import gc
import re

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

NARROW = 16  # channels; narrower layers run channels first on a CPU, see WidthResNet
BLOCKS = {  # depth: residual blocks in each of the four stages
    18: [2, 2, 2, 2],
    34: [3, 4, 6, 3],
    50: [3, 4, 6, 3],
    101: [3, 4, 23, 3],
    152: [3, 8, 36, 3],
}
RESNET = re.compile(rf"resnet({'|'.join(map(str, BLOCKS))})(?:_w([1-9][0-9]{{0,4}}))?")


class MoCo(nn.Module):
    """Query encoder, key encoder (the query encoder's moving average), queue and cluster head.

    base_encoder: callable (num_classes=, norm_layer=) -> module whose last layer is `.fc`.
    dim: D, dimension of the features. r: R, queue length. m: momentum of the key encoder.
    mlp: whether the heads a and ã have a hidden layer.
    cluster_head: "none", as in PCL; "report", head b of the lab report in results/README.md:
        one Linear and ReLU on the keys, whose output replaces them in InfoNCE, in the queue and in
        the features to cluster.
    bn_splits: groups of this process's batch with their own batch-norm statistics, if the encoder's
        batch norm is SplitBatchNorm2d. The images of the keys are shuffled between the groups of
        all processes, so that a key's statistics do not reveal its query.
    The buffer `queue` is (D, R) with unit columns.
    """

    def __init__(  # noqa: PLR0913  # what the method varies, in one place
        self, base_encoder, dim=128, r=16384, m=0.999, mlp=True, cluster_head="none", bn_splits=1
    ):
        super().__init__()
        self.cluster_head = cluster_head
        self.bn_splits = bn_splits
        self.m = m

        # query encoder with head a, and its momentum copy with head ã
        norm_layer = functools.partial(SplitBatchNorm2d, num_splits=bn_splits)
        self.encoder_q = base_encoder(num_classes=dim, norm_layer=norm_layer)
        if mlp:
            dim_mlp = self.encoder_q.fc.in_features
            self.encoder_q.fc = nn.Sequential(
                nn.Linear(dim_mlp, dim_mlp), nn.ReLU(), self.encoder_q.fc
            )
        self.encoder_k = copy.deepcopy(self.encoder_q).requires_grad_(False)

        # cluster head b, on the keys; checkpoints call it v
        if cluster_head == "report":
            self.v = nn.Sequential(nn.Linear(dim, dim), nn.ReLU())
        elif cluster_head != "none":
            raise ValueError(f"unknown cluster head {cluster_head}; choose none or report")

        self.norms = [module for module in self.modules() if isinstance(module, SplitBatchNorm2d)]
        self.register_buffer("queue", F.normalize(torch.randn(dim, r), dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    def forward(self, im_q, im_k, clustering=False):
        """Two views (N, 3, H, W) of N images -> q, k, c, features, each (N, D) float32 unit rows.

        q and k are the query and the key of InfoNCE. c is what ProtoNCE compares with the
        prototypes. features is what the next E-step clusters; it has no gradient.
        clustering: the warm-up is over and the cluster head takes part. With the report's head, k
            then has a gradient for the head alone.
        Raises ValueError if N is not a multiple of `bn_splits`, or if batch norm has no statistics:
            in training, each of its groups needs more than one value per channel.
        """
        if len(im_q) % self.bn_splits:
            raise ValueError(
                f"a batch of {len(im_q)} does not split into {self.bn_splits} equal groups"
            )
        z_q = self.encoder_q(im_q)  # (N, D)
        with torch.no_grad():
            shuffled, own_rows = self.batch_shuffle(im_k)
            z_k = concat_all_gather(self.encoder_k(shuffled))
            z_k = z_k[own_rows]  # (N, D), in z_q's order again
            move_running_statistics(self.norms)

        q = _unit(z_q)
        k = _unit(z_k)
        c = q  # a head on the query side goes here
        features = self._features_to_cluster(k)
        if clustering and self.cluster_head == "report":
            k = _unit(self.v(k))
        return q, k, c, features

    @torch.no_grad()
    def encode(self, images):
        """Images (N, 3, H, W) -> (N, D) float32 unit rows: the features that the E-step clusters.

        They are the momentum branch's, in eval mode.
        """
        was_training = self.training
        self.eval()
        features = self._features_to_cluster(_unit(self.encoder_k(images)))
        self.train(was_training)
        return features

    @torch.no_grad()
    def _features_to_cluster(self, k):
        """The key encoder's output as unit rows (N, D) -> unit rows in the prototypes' space."""
        if self.cluster_head == "report":
            return _unit(self.v(k))
        return k

    def cluster_head_parameters(self):
        """Names of the parameters outside the encoders. During the warm-up they are not used."""
        names = [name for name, _ in self.named_parameters()]
        return [name for name in names if not name.startswith(("encoder_q.", "encoder_k."))]

    def no_weight_decay(self):
        """Names of parameters, such as positions, that timm's network exempts from weight decay.

        timm's optimizers ask for them. They exempt biases and norms in any case.
        """
        network = getattr(self.encoder_q, "network", None)
        if not hasattr(network, "no_weight_decay"):
            return set()
        return {f"encoder_q.network.{name}" for name in network.no_weight_decay()}

    def has_other_batch_norm(self):
        """Whether there is batch norm that `bn_splits` does not reach, as in networks of timm."""
        norms = [m for m in self.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
        return len(norms) > len(self.norms)

    @torch.no_grad()
    def momentum_update_key_encoder(self):
        """Key encoder <- m * key encoder + (1 - m) * query encoder (MoCo, eq. 2).

        Call it after the optimizer's step.
        """
        keys = list(self.encoder_k.parameters())
        queries = list(self.encoder_q.parameters())
        torch._foreach_lerp_(keys, queries, 1 - self.m)

    @torch.no_grad()
    def dequeue_and_enqueue(self, k):
        """Replace the oldest keys in the queue with the keys (N, D) of all processes, any N."""
        r = self.queue.shape[1]
        keys = concat_all_gather(k)[-r:]
        positions = (self.queue_ptr + torch.arange(len(keys), device=k.device)) % r
        self.queue[:, positions] = keys.T
        self.queue_ptr.add_(len(keys)).remainder_(r)

    @torch.no_grad()
    def batch_shuffle(self, images):
        """Deal the images (N, 3, H, W) of all processes out over all batch-norm groups.

        Each group's images go to all groups in shares as equal as possible. If they divide evenly,
        1/groups of the images in a key's group are also in its query's group, the least possible.
        Returns this process's share (N, 3, H, W), and the rows (N,) of its own images among the
        gathered outputs, which undo the shuffle.
        """
        n = len(images)
        rank, world = _rank_and_world()
        groups = world * self.bn_splits
        if groups == 1:
            return images, slice(None)

        # The orders are few numbers, so they are drawn on the CPU. All ranks use rank 0's.
        orders = deal_out(groups, n // self.bn_splits).to(images.device, non_blocking=True)
        if world > 1:
            dist.broadcast(orders, 0)
            if torch.is_autocast_enabled(images.device.type):  # half as much to send
                images = images.to(torch.get_autocast_dtype(images.device.type))
        share, own_rows = orders.view(2, world, n)[:, rank]
        return concat_all_gather(images)[share], own_rows


def deal_out(groups, size):
    """A random order of groups * size rows that deals those of each group out over all groups.

    The rows of a group are shuffled; then one row of each group comes in turn.
    Returns (2, groups * size) on the CPU: the order, and its inverse.
    """
    order = torch.rand(groups, size).argsort(1)
    order += torch.arange(groups)[:, None] * size
    order = order.T.flatten()
    return torch.stack([order, order.argsort()])


# -- encoders --------------------------------------------------------------------------------------
def build_encoder(arch, num_classes=128, small_images=False, norm_layer=None, image_size=224):
    """The network named `arch`: images (N, 3, H, W) -> (N, num_classes). Its last layer is `.fc`.

    resnet18, resnet34, ... are torchvision's; `resnet18_w16` has 16 channels in its first stage
    instead of 64. Every other name is timm's, see TimmEncoder.
    small_images: a stem for images of about 32 pixels, see WidthResNet. norm_layer: in place of
        batch norm. Both are for our ResNets alone.
    image_size: side of the images in pixels. It is for timm's networks alone.
    Raises ValueError if the name is unknown, or if the network cannot take such images.
    """
    known = RESNET.fullmatch(arch)
    if not known:
        return TimmEncoder(arch, num_classes, image_size)
    depth = int(known[1])
    width = int(known[2] or 64)
    block = BasicBlock if depth < 50 else Bottleneck
    return WidthResNet(block, BLOCKS[depth], num_classes, width, small_images, norm_layer)


def is_timm(arch):
    """Whether `arch` is a network of timm. Names of our ResNets are not, though timm has some."""
    if RESNET.fullmatch(arch):
        return False
    import timm  # here, because the import takes a second

    return arch in timm.list_models()


def backbone(encoder):
    """`encoder` without its `.fc`: (N, 3, H, W) -> pooled features (N, D).

    The layers are the same objects, so `backbone(encoder).eval()` puts those of `encoder` in eval
    mode too: call `encoder.train()` afterwards.
    """
    network = copy.copy(encoder)  # shallow
    network.__dict__.pop("forward", None)  # of a compiled or captured encoder
    network._modules = {**encoder._modules, "fc": nn.Identity()}
    return network


class WidthResNet(ResNet):
    """torchvision's ResNet with `width` channels in its first stage; 64 is the published width.

    small_images: a 3x3 first convolution of stride 1 and no max-pool, for about 32 pixels.

    On a CPU, a network of fewer than 16 channels runs channels first, whatever the memory format of
    its inputs and whatever format `.to` is given. With channels last, oneDNN writes past the end of
    a buffer there (uxlfoundation/oneDNN#6035).
    """

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

    def forward(self, x):
        if self.width < NARROW:
            x = channels_first_on_cpu(x)
        return super().forward(x)

    def _apply(self, fn, recurse=True):
        """What `.to`, `.cuda` and the like of this network, or of one around it, end in."""
        super()._apply(fn, recurse)
        if self.width < NARROW:
            for weight in self.parameters():
                weight.data = channels_first_on_cpu(weight.data)
        return self

    def _make_layer(self, block, planes, blocks, **kwargs):
        if planes == 64:  # the first stage takes the stem's output
            self.inplanes = self.width
        return super()._make_layer(block, planes * self.width // 64, blocks, **kwargs)


class TimmEncoder(nn.Module):
    """timm's network named `arch`, untrained and without a classifier, and `.fc` on its features.

    image_size: side of the images in pixels. The weights of some networks, such as a ViT's
        positions, depend on it.
    The attribute `timm_options` holds the arguments with which timm.create_model makes the network.
    On a CPU, it runs channels first, because some of these networks are narrow (see WidthResNet).
    Raises ValueError if timm has no such network, or if it has no pooled features of such images.
    """

    def __init__(self, arch, num_classes, image_size):
        super().__init__()
        import timm

        names = timm.list_models()
        if arch not in names:
            raise ValueError(describe_unknown(arch, names))
        self.timm_options = {"num_classes": 0}
        layout = {"memory_format": torch.channels_last}
        try:
            # timm marks the networks that are built for one size of image
            config = timm.get_pretrained_cfg(arch)  # None for a network that a reader registers
            if config is not None and config.fixed_input_size:
                self.timm_options["img_size"] = image_size
            # a pass without memory or arithmetic: does the network work with such images, and how
            # many features has it? timm has no attribute that tells this for every network
            with torch.device("meta"):
                trial = timm.create_model(arch, **self.timm_options).to(**layout)
                features = trial(torch.empty(2, 3, image_size, image_size).to(**layout))
            _, num_features = features.shape
        except Exception as error:  # networks refuse an image size with any error
            reason = f"{type(error).__name__}: {error}".partition("\n")[0].removesuffix(": ")
            raise ValueError(
                f"{arch} of timm gives no pooled features of images of {image_size} pixels; choose "
                f"another --arch or --image-size ({reason})"
            ) from error
        self.network = timm.create_model(arch, **self.timm_options)
        self.fc = nn.Linear(num_features, num_classes)

    def forward(self, x):
        return self.fc(self.network(channels_first_on_cpu(x)))

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        for weight in self.parameters():
            weight.data = channels_first_on_cpu(weight.data)
        return self


def describe_unknown(arch, names):
    """What is wrong with the name `arch`, and which of timm's `names` are like it."""
    resnets = ", ".join(f"resnet{depth}" for depth in BLOCKS)
    name, _, tag = arch.partition(".")
    close = difflib.get_close_matches(name, names)
    such_as = f", such as {', '.join(close)}" if close else ""
    if tag and name in names:
        such_as = f", such as {name}: without a tag, because training starts from random weights"
    return (
        f"unknown arch {arch[:80]}; choose one of {resnets}, or another width of these "
        f"(resnet18_w16), or any network of timm's{such_as}"
    )


def channels_first_on_cpu(x):
    """`x` channels first if it is on a CPU, otherwise as it is."""
    if x.device.type == "cpu":
        return x.clone(memory_format=torch.contiguous_format)
    return x


# -- faster steps on a GPU -------------------------------------------------------------------------
def compile_encoders(model):
    """Compile the training passes of both encoders. In eval mode they run as before."""
    for encoder in (model.encoder_q, model.encoder_k):
        encoder.forward = _in_training(torch.compile(encoder.forward), encoder)


def capture_encoders(model, images, precision):
    """Make the training passes of both encoders CUDA graphs. In eval mode they run as before.

    A graph is a recording of a pass. It replays all kernels of the pass in one call, and always
    reads and writes the same memory. So the weights must stay where they are (load_state_dict and
    optimizers change them in place), every batch must have the shape of `images`, and an output
    holds only until the next pass.

    model: a MoCo on its GPU. images: (N, 3, H, W) of any content, laid out as a step's queries.
    precision: the autocast context of the passes, with cache_enabled=False.
    """
    model.train()
    gc.collect()  # the graphs of an earlier model must not be destroyed during a recording
    for encoder in (model.encoder_q, model.encoder_k):
        before = [buffer.clone() for buffer in encoder.buffers()]
        # an input for each graph, because the queries' backward pass reads its images again when
        # the keys have been passed
        its_images = images.clone()
        with precision, torch.set_grad_enabled(encoder is model.encoder_q):
            # six passes come first, because a compiled encoder may compile again in the first few
            torch.cuda.make_graphed_callables(encoder, (its_images,), num_warmup_iters=6)
        # in these passes timm's batch norm has moved its running statistics
        for buffer, value in zip(encoder.buffers(), before, strict=True):
            buffer.copy_(value)
    # Gradients are stored on the stream of the recording. autograd synchronises the streams and
    # warns of it, which is silenced here.
    graph = torch.autograd.graph
    if hasattr(graph, "set_warn_on_accumulate_grad_stream_mismatch"):  # since torch 2.10
        graph.set_warn_on_accumulate_grad_stream_mismatch(False)


def _in_training(forward, encoder):
    """A function that is `forward` in training, and the encoder's present one in eval mode."""
    plain = encoder.forward

    def choose(images):
        if encoder.training:
            return forward(images)
        return plain(images)

    return choose


# -- batch norm in groups --------------------------------------------------------------------------
class SplitBatchNorm2d(nn.BatchNorm2d):
    """Batch norm with statistics of its own for each of `num_splits` groups of the batch.

    A group is a run of consecutive samples. The running statistics move only when
    `move_running_statistics` is called, once after each training step's forward pass. In training,
    raises ValueError if the batch does not split into equal groups.

    The groups are normalised one by one and joined, which copies the activations once. Groups as
    channels of their own, so that one call does all, would copy them twice if channels are last.
    """

    def __init__(self, num_features, num_splits=1):
        super().__init__(num_features)
        self.num_splits = num_splits

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        splits = self.num_splits
        if len(x) % splits:  # chunk would make fewer groups, or groups of different sizes
            raise ValueError(f"a batch of {len(x)} does not split into {splits} equal groups")
        self.count = x.numel() // splits // self.num_features  # values behind each mean
        if self.count < 2:
            raise ValueError(
                f"batch norm needs two values per channel and group, not {self.count}: its input "
                f"is {list(x.shape)} and bn_splits {splits}; use a larger batch or fewer groups"
            )

        # self.moments: mean and 1 / standard deviation, (splits, C) each
        if splits == 1:
            y, mean, rstd = self._normalize(x)
            self.moments = [mean[None], rstd[None]]
            return y
        results = [self._normalize(group) for group in x.chunk(splits)]
        ys, means, rstds = zip(*results, strict=True)
        self.moments = [torch.stack(means), torch.stack(rstds)]
        return torch.cat(ys)

    def _normalize(self, x):
        """x (N, C, H, W) normalised by its own statistics -> y, mean (C,), 1 / deviation (C,)."""
        # no running statistics, training, momentum 0
        return torch.native_batch_norm(x, self.weight, self.bias, None, None, True, 0, self.eps)


@torch.no_grad()
def move_running_statistics(norms):
    """Move the running statistics of SplitBatchNorm2d modules towards those of their last batch.

    A batch's statistics are the means over its groups. Modules in eval mode are left alone. All
    modules move in a few calls, because on a GPU a call per module costs more than its arithmetic.
    """
    norms = [norm for norm in norms if norm.training]
    if not norms:
        return
    sizes = [norm.num_features for norm in norms]
    momentum = norms[0].momentum

    # means over the groups, of all modules side by side
    mean = torch.cat([norm.moments[0] for norm in norms], 1).mean(0).split(sizes)
    rstd = torch.cat([norm.moments[1] for norm in norms], 1)
    variance = rstd.pow(-2).mean(0).sub_(norms[0].eps).split(sizes)

    # running variances are unbiased: n / (n - 1) times the batch's
    correction = [norm.count / (norm.count - 1) for norm in norms]
    torch._foreach_mul_(variance, correction)
    running = [norm.running_mean for norm in norms] + [norm.running_var for norm in norms]
    torch._foreach_lerp_(running, mean + variance, momentum)
    torch._foreach_add_([norm.num_batches_tracked for norm in norms], 1)


# -- helpers ---------------------------------------------------------------------------------------
@torch.no_grad()
def concat_all_gather(x):
    """The rows (N, ...) of all processes in rank order: (N * processes, ...), without gradient."""
    _, world = _rank_and_world()
    if world == 1:
        return x.detach()
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world)]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def _rank_and_world():
    """This process's rank, and the number of processes."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _unit(x):
    """Rows of unit length in float32; a row of zeros stays zero."""
    return F.normalize(x.float(), dim=1)
