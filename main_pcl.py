"""Prototypical Contrastive Learning with MoCo v2 heads and a cluster head of its own.

PCL (Li, Zhou, Xiong, Hoi, ICLR 2021, arXiv 2005.04966). Each epoch after the warm-up clusters the momentum features
of the training images (E-step), then trains with InfoNCE + ProtoNCE against the clusters' prototypes (M-step).

    python main_pcl.py --amp --optim sgd --cos --warmup 20                              # digits, on any machine
    python main_pcl.py path/to/imagenet --amp --cos                                     # one GPU
    torchrun --nproc_per_node=8 main_pcl.py path/to/imagenet --amp --cos                # one node
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 main_pcl.py ...   # several

Then `python eval_lincls.py` says what the features are worth.
"""

import argparse
import functools
import json
import math
import os
import shutil
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Subset
from torch.utils.data.distributed import DistributedSampler
from tqdm import tqdm

from cluster import run_kmeans
from data import SMALL, DataError, Images, build_datasets
from eval_lincls import (
    cluster_numbers,
    default_num_cluster,
    fail,
    knn_accuracy,
    nonnegative_int,
    one_line,
    positive_float,
    positive_int,
    read_checkpoint,
)
from features import compute_features, load_features
from loss import info_nce, proto_nce
from model import MoCo, backbone, build_encoder

BASE_LR = {"sgd": 0.03, "adamw": 1e-3, "lamb": 5e-3, "lars": 0.3}  # per batch of 256
AUGMENTATION = ("aug_plus", "crop_min", "color_jitter", "grayscale", "blur", "flip")
SIZES = ("arch", "stem", "batch_size", "lr", "pcl_r", "num_cluster", "moco_m", "bn_splits", "cluster_head", "workers")
MAX_SKIPPED = 20  # steps in a row that the gradient scaler may skip for an overflow
MAX_BANK = 50_000  # images that the kNN accuracy during training looks at; the evaluation script takes all


def get_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.error = fail
    switch = argparse.BooleanOptionalAction
    add = parser.add_argument_group("data and augmentation").add_argument
    add(
        "data",
        nargs="?",
        help="folder with train/ and perhaps val/ or test/; cifar10, cifar100, stl10; default: digits",
    )
    add("--image-size", type=positive_int, help="side of a view in pixels; default: the images' own, at most 224")
    add("--aug-plus", action=switch, default=True, help="MoCo v2's augmentation; off: MoCo v1's")
    add("--crop-min", type=positive_float, help="smallest area of a random crop; default: 0.2, digits 0.5")
    add("--color-jitter", action=switch, default=True, help="its strongest part, and the hardest on the warm-up")
    add("--grayscale", action=switch, default=True)
    add("--blur", action=switch, help="default: above 64 pixels only, below it erases what there is")
    add("--flip", action=switch, help="default: on, but for digits, where a mirror image is another sign")
    add("-j", "--workers", type=nonnegative_int, help="processes per rank that load images; default: cores, at most 8")

    add = parser.add_argument_group("model").add_argument
    add("-a", "--arch", help="resnet18, 34, 50, ...; resnet18_w16: 16 channels wide, not 64; default by image size")
    add("--stem", choices=("small", "imagenet"), help="small: 3x3, stride 1, no max-pool; default: up to 64 pixels")
    add("--low-dim", type=positive_int, default=128, help="feature dimension")
    add("--mlp", action=switch, default=True, help="a hidden layer in the heads a and ã")
    add("--cluster-head", choices=("none", "report", "twin"), default="twin", help="head b for the clustering task")
    add("--moco-m", type=float, help="momentum of the key encoder; default: 0.999, up to 64 pixels 0.99")
    add("--bn-splits", type=positive_int, help="batch-norm groups per process; default: 8 over all, if equal")

    add = parser.add_argument_group("losses and clustering").add_argument
    add("--pcl-r", type=positive_int, help="queue length and number of negative prototypes; default by data, 16384")
    add("--temperature", type=positive_float, default=0.2)
    add("--num-cluster", type=cluster_numbers, help="comma-separated; default by data, 25000,50000,100000 for ImageNet")
    add("--warmup", "--warmup-epoch", type=nonnegative_int, default=20, help="epochs of InfoNCE alone")

    add = parser.add_argument_group("optimization").add_argument
    add("--epochs", type=positive_int, default=200)
    add("-b", "--batch-size", type=positive_int, help="over all processes; default: 256, less for little data")
    add("--optim", choices=BASE_LR, default="sgd")
    add("--lr", "--learning-rate", type=positive_float, help=f"default: batch size / 256 times {BASE_LR}")
    add("--lr-warmup", type=nonnegative_int, help="epochs of linear increase; default: a twentieth, 0 for sgd")
    add("--cos", action="store_true", help="cosine schedule, in place of --schedule")
    add("--schedule", type=positive_int, nargs="*", help="epochs where the rate drops x0.1; default: at 60, 80 %%")
    add("--momentum", type=float, default=0.9, help="of sgd and lars")
    add("--wd", "--weight-decay", type=float, default=1e-4, dest="wd")
    add("--clip-grad", type=positive_float, help="largest gradient norm, of the unscaled gradients; default: no limit")
    add("--amp", action="store_true", help="mixed precision")
    add("--amp-dtype", choices=("auto", "bf16", "fp16"), default="auto", help="auto: bf16 where the device has it")

    add = parser.add_argument_group("run").add_argument
    add("--exp-dir", default="experiment_pcl", help="where checkpoints and logs go")
    add("--resume", nargs="?", const="", metavar="FILE", help="go on from FILE, or from the latest in --exp-dir")
    add("--seed", type=nonnegative_int, default=0)
    add("--knn-every", type=positive_int, help="epochs between kNN accuracies; default: a twentieth of all")
    return parser


def main(argv=None):
    """Train, and return the figures of every epoch: a list of {column of log.csv: value}."""
    args = get_parser().parse_args(argv)
    try:
        return train(args)
    except DataError as error:
        fail(one_line(error))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def train(args):
    rank, world, device = start_process()
    say = print if rank == 0 else lambda *_, **__: None
    augmentation = {name: getattr(args, name) for name in AUGMENTATION}
    datasets = build_datasets(args.data, args.image_size, args.seed, **augmentation)
    vars(args).update(datasets.augmentation)
    fill_in_defaults(args, datasets, world)
    check(args, len(datasets.train), world)
    directory = Path(args.exp_dir)

    # -- model, optimizer, precision
    torch.manual_seed(args.seed)
    torch.backends.cudnn.benchmark = True
    encoder = functools.partial(build_encoder, args.arch, small_images=args.stem == "small")
    model = MoCo(encoder, args.low_dim, args.pcl_r, args.moco_m, args.mlp, args.cluster_head, args.bn_splits)
    model = model.to(device, memory_format=torch.channels_last)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = build_optimizer(model, args)
    dtype, scaler = precision(args, device)
    autocast = functools.partial(torch.autocast, device.type, dtype, enabled=args.amp)
    start, log, knn_untrained = 0, [], None
    checkpoint = find_checkpoint(args.resume, directory)
    if checkpoint is not None:
        start, log, knn_untrained = restore(checkpoint, model, optimizer, scaler, args)
        say(f"resumed after epoch {start - 1}")

    # -- data
    loading = {"num_workers": args.workers, "persistent_workers": args.workers > 0, "pin_memory": device.type == "cuda"}
    loading["generator"] = torch.Generator()  # of the workers' seeds, so that their number leaves other draws alone
    sampler = DistributedSampler(datasets.train, world, rank, shuffle=True, seed=args.seed)
    local_batch = args.batch_size // world
    loader = DataLoader(datasets.train, local_batch, sampler=sampler, drop_last=True, **loading)

    def share(images):  # this rank's part of them; over all ranks every image once and none twice
        return DataLoader(Subset(images, range(rank, len(images), world)), local_batch, **loading)

    plain = share(datasets.plain)
    bank, held_out = plain, None
    if datasets.val is not None:
        held_out = share(thin_out(datasets.val, MAX_BANK))
        if len(datasets.plain) > MAX_BANK:
            bank = share(thin_out(datasets.plain, MAX_BANK))
    steps = len(loader)

    if rank == 0:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            write_whole(directory / "args.json", lambda f: f.write(json.dumps(vars(args), indent=2).encode()))
        except OSError as error:
            fail(f"cannot write to {directory}: {error.strerror}; name another --exp-dir")
        from torch.utils.tensorboard import SummaryWriter

        board = SummaryWriter(directory, purge_step=start)
    say(
        f"{args.data or 'digits'}: {len(datasets.train)} training images, {len(datasets.val or ())} held out, "
        f"{len(datasets.classes)} classes, {args.image_size} pixels; on {world} x {device.type}"
    )
    say(", ".join(f"{name} {getattr(args, name)}" for name in SIZES))
    if args.warmup >= args.epochs:
        say(f"--warmup {args.warmup} leaves none of the {args.epochs} epochs for ProtoNCE: this run is InfoNCE alone")
    if knn_untrained is None and held_out is not None:
        knn_untrained = held_out_knn(model, bank, held_out, directory / "features", device, autocast)
        say(f"kNN accuracy of the untrained network: {knn_untrained:.1f} %")

    # -- the epochs
    began, clusters, skipped = time.time(), None, 0
    for epoch in range(start, args.epochs):
        torch.manual_seed(hash((args.seed, epoch, rank)) & 0xFFFFFFFF)  # so resuming needs no random state
        last = epoch == args.epochs - 1
        keep = last or (epoch + 1) % max(1, args.epochs // 10) == 0
        if epoch in (start, args.warmup):
            forward = share_gradients(model, device, unused=epoch < args.warmup and args.cluster_head != "none")
        if epoch >= args.warmup:
            clusters = e_step(model, plain, args, epoch, device, autocast, keep and datasets.plain)
        datasets.train.set_epoch(epoch)
        sampler.set_epoch(epoch)
        model.train()
        totals, tic = torch.zeros(4, device=device), time.time()
        for step, ((im_q, im_k), index) in enumerate(
            tqdm(loader, desc=f"epoch {epoch}", leave=False, disable=None if rank == 0 else True)
        ):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(epoch + step / steps, args)
            im_q, im_k = (im.to(device, non_blocking=True, memory_format=torch.channels_last) for im in (im_q, im_k))
            with autocast():
                q, k, c = forward(im_q, im_k, clusters is not None)
            loss, acc_inst = info_nce(q, k, model.queue, args.temperature)
            acc_proto = torch.zeros_like(acc_inst)
            if clusters is not None:
                loss_proto, acc_proto = proto_nce(c, index.to(device), clusters, args.pcl_r)
                loss = loss + loss_proto

            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(parameters, args.clip_grad or math.inf)
            overflow = not math.isfinite(norm.item())  # with a scaler, a step to skip
            skipped = skipped + 1 if overflow else 0
            if not math.isfinite(loss.item()) or skipped > (MAX_SKIPPED if scaler.is_enabled() else 0):
                raise SystemExit(
                    f"stopped at epoch {epoch}, step {step}: the loss is {loss:.4g} and the gradient norm {norm:.4g}; "
                    f"this step's weights were not changed; last good checkpoint: {last_checkpoint(directory)}. "
                    "Try a lower --lr, a longer --lr-warmup or --clip-grad 1"
                )
            scaler.step(optimizer)
            scaler.update()
            model.update(k)
            totals += torch.stack([loss.detach(), acc_inst, acc_proto, norm.nan_to_num(posinf=0.0)])
        seconds = time.time() - tic

        # -- what the epoch came to
        if world > 1:
            dist.all_reduce(totals)
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)
        means = zip(("loss", "acc_inst", "acc_proto", "grad_norm"), (totals / steps / world).tolist(), strict=True)
        row = {"epoch": epoch, **dict(means), "lr": learning_rate(epoch + 1 - 1 / steps, args)}
        row |= {"images_per_second": steps * args.batch_size / seconds, "knn": None}
        if held_out is not None and (last or (epoch + 1) % args.knn_every == 0):
            row["knn"] = held_out_knn(model, bank, held_out, directory / "features", device, autocast)
        log.append(row)
        say(
            "epoch {epoch:3d}  loss {loss:.3f}  acc_inst {acc_inst:5.1f}  acc_proto {acc_proto:5.1f}  lr {lr:.4f}  "
            "{images_per_second:.0f} images/s".format(**row)
            + (f"  kNN {row['knn']:.1f}" if row["knn"] else "")
        )
        if leaking(log, knn_untrained):
            say(
                f"warning: acc_inst is {row['acc_inst']:.1f} % but the kNN accuracy does not follow "
                f"({row['knn']:.1f} %): the query finds its key by something other than what the image shows. Most "
                "often batch-norm statistics tell which key belongs to which query; raise --bn-splits"
            )
        if rank == 0:
            for name, value in row.items():
                if name != "epoch" and value is not None:
                    board.add_scalar(name, value, epoch)
            save(directory, epoch, model, optimizer, scaler, args, log, knn_untrained, keep)
    if rank == 0:
        board.close()
    reached = f"loss {log[-1]['loss']:.3f}"
    if log[-1]["knn"] is not None:
        reached += f", kNN accuracy {log[-1]['knn']:.1f} % (untrained {knn_untrained:.1f} %)"
    minutes = (time.time() - began) / 60
    say(f"reached {reached} after {len(log)} epochs; {len(log) - start} of them in {minutes:.1f} minutes")
    where = f" --exp-dir {args.exp_dir}" if args.exp_dir != "experiment_pcl" else ""
    say(f"next: python eval_lincls.py{where}")
    return log


# -- the steps of an epoch ----------------------------------------------------------------------------------------


def e_step(model, plain, args, epoch, device, autocast, picture_of):
    """Cluster the momentum features of all training images; every rank gets the same list of Clusters.

    picture_of: images to draw prototypes.png from, or a false value.
    """
    directory = Path(args.exp_dir) / "features"
    with autocast():
        compute_features(plain, model.encode, directory, device)
    results = None
    if is_main():
        features = load_features(directory, len(plain.dataset.dataset))
        results = run_kmeans(features, args.num_cluster, args.temperature, args.seed + epoch)
        if picture_of:
            picture = draw_prototypes(picture_of, features, results[0])
            write_whole(Path(args.exp_dir) / "prototypes.png", lambda f: picture.save(f, "PNG"))
        shutil.rmtree(directory)
    return [type(clusters)(*(tensor.to(device) for tensor in clusters)) for clusters in from_main(results)]


def held_out_knn(model, bank, held_out, directory, device, autocast):
    """kNN accuracy in percent of the query backbone on the held-out images."""
    network = backbone(model.encoder_q).eval()
    labelled = []
    for loader in (bank, held_out):
        with autocast():
            compute_features(loader, network, directory, device)
        if is_main():
            images = loader.dataset.dataset
            known = images.labels >= 0
            labelled += torch.from_numpy(load_features(directory, len(images)))[known], images.labels[known]
            shutil.rmtree(directory)
    return from_main(knn_accuracy(*labelled) if is_main() else None)


def thin_out(images, n):
    """At most `n` of the images, evenly spaced, as data.Images of their own."""
    step = -(-len(images) // n)
    source = Subset(images.source, range(0, len(images), step))
    source.targets = images.labels[::step]
    return Images(source, images.transform)


def learning_rate(progress, args):
    """The learning rate at `progress` epochs: linear warm-up, then cosine (to 0) or x0.1 at each of --schedule."""
    if progress < args.lr_warmup:
        return args.lr * (progress + 1e-3) / args.lr_warmup
    if args.cos:
        return args.lr * 0.5 * (1 + math.cos(math.pi * progress / args.epochs))
    return args.lr * 0.1 ** sum(progress >= epoch for epoch in args.schedule)


def leaking(log, knn_untrained):
    """Whether acc_inst is above 99 % while the kNN accuracy gains nothing on the untrained network's or is falling."""
    row, earlier = log[-1], [row["knn"] for row in log[:-1] if row["knn"] is not None]
    if row["knn"] is None or row["acc_inst"] <= 99:
        return False
    return row["knn"] < max(earlier, default=0) - 1 or row["knn"] < knn_untrained + 1


def draw_prototypes(images, features, clusters, rows=10, columns=10, side=56):
    """A picture: per row one prototype's nearest images, from the tightest cluster to the loosest.

    images: data.Images, stored images of any size; features: (M, D) unit rows; clusters: one granularity.
    """
    size = torch.bincount(clusters.im2cluster, minlength=len(clusters.centroids))
    order = clusters.density.argsort()
    order = order[size[order] >= min(columns, int(size.max()))]
    order = order[torch.linspace(0, len(order) - 1, min(rows, len(order))).long()]
    gap, margin = 4, 96
    picture = Image.new("RGB", (margin + columns * (side + gap), len(order) * (side + gap) + gap), "white")
    draw = ImageDraw.Draw(picture)
    for row, number in enumerate(order.tolist()):
        top = gap + row * (side + gap)
        draw.text((gap, top + side // 2 - 14), f"{size[number]} images\nphi {clusters.density[number]:.3f}", "black")
        members = np.flatnonzero(clusters.im2cluster.numpy() == number)
        nearest = members[np.argsort(-features[members] @ clusters.centroids[number].numpy())][:columns]
        for column, index in enumerate(nearest):
            image = images.image(int(index)).resize((side, side), Image.BICUBIC)
            picture.paste(image, (margin + column * (side + gap), top))
    return picture


# -- setting up ---------------------------------------------------------------------------------------------------


def start_process():
    """(rank, number of processes, device), from torchrun's environment or for one process alone."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:
        return 0, 1, device
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=2))
    return dist.get_rank(), dist.get_world_size(), device


def is_main():
    return not dist.is_initialized() or dist.get_rank() == 0


def from_main(value):
    """The first rank's `value`, on every rank."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values, 0)
    return values[0]


def share_gradients(model, device, unused):
    """The model as the loop calls it: where there are several processes, they average their gradients.

    unused: some parameters get no gradient, as head b during the warm-up; searching for them costs time.
    """
    if not dist.is_initialized():
        return model
    device_ids = [device.index] if device.type == "cuda" else None
    parallel = DistributedDataParallel(model, device_ids, find_unused_parameters=unused)
    parallel.broadcast_buffers = False  # the loop makes them equal once an epoch
    return parallel


def fill_in_defaults(args, datasets, world):
    """Set what the command line left open and what follows from the data or from another flag."""
    n, args.image_size = len(datasets.train), datasets.image_size
    small = args.image_size <= SMALL
    batch_size = args.batch_size or min(256, power_of_two(max(n / 10, 8))) // world * world
    local_batch = batch_size // world
    defaults = {
        "arch": "resnet18_w16" if args.image_size <= 16 else "resnet18" if small else "resnet50",
        "stem": "small" if small else "imagenet",
        "moco_m": 0.99 if small else 0.999,
        "batch_size": batch_size,
        "lr": BASE_LR[args.optim] * batch_size / 256,
        "lr_warmup": 0 if args.optim == "sgd" else args.epochs // 20,
        "schedule": [args.epochs * 6 // 10, args.epochs * 8 // 10],
        "pcl_r": min(16384, power_of_two(n / 12)),
        "num_cluster": default_num_cluster(n),
        "bn_splits": 1 if local_batch % 2 else math.gcd(max(1, 8 // world), local_batch // 2),
        "knn_every": max(1, args.epochs // 20),
        "workers": min(8, max(1, (os.cpu_count() or 1) // world)),
    }
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def power_of_two(x):
    """The largest power of two that is at most x, and at least 1."""
    return 1 << max(0, int(x).bit_length() - 1)


def check(args, n, world):
    """End the program in one line where the arguments do not fit each other or the `n` training images."""
    if args.batch_size > n:
        fail(f"{n} training images are fewer than one batch of {args.batch_size}; lower --batch-size")
    if args.batch_size % world:
        fail(f"--batch-size {args.batch_size} is not a multiple of the {world} processes")
    if args.batch_size // world % args.bn_splits or args.batch_size // world < 2 * args.bn_splits:
        fail(
            f"{args.batch_size // world} images per process do not make {args.bn_splits} equal groups of at least 2; "
            "change --batch-size or --bn-splits"
        )
    if max(args.num_cluster) > n:
        fail(f"{max(args.num_cluster)} clusters are more than the {n} training images; lower --num-cluster")
    if not 0 <= args.moco_m < 1 or not 0 <= args.momentum < 1:
        fail("--moco-m and --momentum must be at least 0 and below 1")
    if not 0 <= args.wd < math.inf:
        fail(f"--wd must be at least 0, not {args.wd}")
    if args.crop_min > 1:
        fail(f"--crop-min is a part of the image's area, at most 1, not {args.crop_min}")
    try:
        build_encoder(args.arch)
    except ValueError as error:
        fail(error)


def build_optimizer(model, args):
    """The optimizer of --optim. SGD decays all weights, as published; the others spare biases and batch norm."""
    if args.optim == "sgd":
        parameters = [p for p in model.parameters() if p.requires_grad]
        return torch.optim.SGD(parameters, args.lr, momentum=args.momentum, weight_decay=args.wd)
    from timm.optim import create_optimizer_v2  # takes seconds to import

    extra = {"lamb": {"max_grad_norm": None}, "lars": {"momentum": args.momentum}}.get(args.optim, {})
    return create_optimizer_v2(model, args.optim, lr=args.lr, weight_decay=args.wd, **extra)


def precision(args, device):
    """(autocast's dtype, gradient scaler); the scaler does nothing but where fp16 needs it."""
    bf16 = device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "auto": torch.bfloat16 if bf16 else torch.float16}
    dtype = dtype[args.amp_dtype]
    return dtype, torch.amp.GradScaler(device.type, enabled=args.amp and dtype == torch.float16)


# -- what a run leaves --------------------------------------------------------------------------------------------


def save(directory, epoch, model, optimizer, scaler, args, log, knn_untrained, keep):
    """Write log.csv and checkpoint.pth.tar, and a copy of the latter under the epoch's number where `keep`."""
    rows = [log[0], *(["" if value is None else f"{value:.6g}" for value in row.values()] for row in log)]
    write_whole(directory / "log.csv", lambda file: file.writelines(f"{','.join(row)}\n".encode() for row in rows))
    checkpoint = {
        "epoch": epoch + 1,
        "arch": args.arch,
        "state_dict": {f"module.{name}": value for name, value in model.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "args": vars(args),
        "log": log,
        "knn_untrained": knn_untrained,
    }
    write_whole(directory / "checkpoint.pth.tar", lambda file: torch.save(checkpoint, file))
    if keep:
        write_whole(directory / f"checkpoint_{epoch:04d}.pth.tar", lambda file: torch.save(checkpoint, file))


def write_whole(path, write):
    """Call write(file) so that `path` holds all of what it writes or, whenever the process dies, what it held."""
    partial = path.with_name(path.name + ".tmp")
    with open(partial, "wb") as file:
        write(file)
    os.replace(partial, path)


def last_checkpoint(directory):
    path = directory / "checkpoint.pth.tar"
    return path if path.exists() else "none"


def find_checkpoint(resume, directory):
    """The checkpoint to go on from, read; None where there is none to go on from."""
    if resume is None:
        return None
    path = Path(resume) if resume else directory / "checkpoint.pth.tar"
    if not path.exists():
        if resume:
            fail(f"there is no checkpoint {path}")
        return None
    return read_checkpoint(path)


def restore(checkpoint, model, optimizer, scaler, args):
    """Load a checkpoint of this script. Returns (next epoch, log, kNN accuracy of the untrained network)."""
    state = {name.removeprefix("module."): value for name, value in checkpoint["state_dict"].items()}
    try:
        model.load_state_dict(state)
        optimizer.load_state_dict(checkpoint["optimizer"])
        scaler.load_state_dict(checkpoint["scaler"])
        return checkpoint["epoch"], checkpoint["log"], checkpoint["knn_untrained"]
    except (RuntimeError, ValueError, KeyError) as error:
        fail(
            f"the checkpoint (a {checkpoint['arch']}) does not fit {args.arch}, --cluster-head {args.cluster_head}, "
            f"--optim {args.optim} and the sizes worked out; give the flags it was made with ({type(error).__name__})"
        )


if __name__ == "__main__":
    main()
