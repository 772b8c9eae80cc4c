"""Prototypical Contrastive Learning with MoCo v2 heads and an optional cluster head.

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
import math
import os
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter

from augment import RandomView, normalize
from cluster import Clusters, default_num_cluster, run_kmeans
from data import SMALL, DataError, EpochSampler, build_datasets, derive_seed, identity_collate, load_into_memory
from features import clear_features, compute_features, extract_features, read_features, save_features
from loss import info_nce, proto_nce
from metrics import knn_accuracy
from model import MoCo, backbone, build_encoder
from runtime import checkpoint, cli, distributed, pictures, weights
from runtime.checkpoint import FIGURES, RunState, write_log
from runtime.distributed import get_rank_and_world, print_main

SYNC_EVERY = 20  # steps between the moments when the host waits for the device, to see the figures of those steps
SAVE_EVERY = 60  # seconds; of epochs shorter than that, not every one is saved
MAX_SKIPPED = 20  # steps in a row that the gradient scaler may skip for an overflow
MAX_KNN = 50_000  # images that the kNN accuracy during training looks at; the evaluation script takes all
# Recipes, with rates per batch of 256: MoCo v2's and PCL's, and those for images up to 64 pixels (README, Results)
IMAGENET = {"batch_size": 256, "lr": 0.03, "wd": 1e-4, "temperature": 0.2, "moco_m": 0.999, "bn_splits": 8}
SMALL_IMAGES = {"batch_size": 128, "lr": 0.12, "wd": 5e-4, "temperature": 0.1, "moco_m": 0.99, "bn_splits": 2}
FEW_SMALL_IMAGES = IMAGENET | {"moco_m": 0.99}  # below 5,000, as the digits
OPTIMIZERS = {"sgd": {"lr": 0.03}, "adamw": {"lr": 1e-3, "wd": 0.01}}  # rates go with the recipe's: these at 0.03
OPTIMIZERS |= {"lamb": {"lr": 5e-3, "wd": 0.02}, "lars": {"lr": 0.3, "wd": 1e-6}}
AUGMENTATION = ("aug_plus", "crop_min", "color_jitter", "grayscale", "blur", "flip")
SIZES = ("arch", "stem", *IMAGENET, "pcl_r", "num_cluster", "cluster_head")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


# -- the method ---------------------------------------------------------------------------------------------------
def train_one_epoch(model, forward, loader, random_view, optimizer, scaler, run, args, keys, stop):
    """M-step: the steps of one epoch from `run.step` on, up to its end or a stop signal (PCL, algorithm 1).
    forward: `model`, or what averages its gradients over the processes. keys: the directory for the epoch's keys, or
    None. The features to cluster, and the figures, stay on the device for SYNC_EVERY steps."""
    model.train()
    rank, world = get_rank_and_world()
    clusters = run.clusters if run.epoch >= args.warmup else None  # the warm-up is InfoNCE alone
    steps, first, pending = len(loader.dataset) // args.batch_size, run.step, []
    bar = cli.Progress(loader, desc=f"epoch {run.epoch}", disable=rank > 0)
    for images, index in bar:
        seeds = args.seed, run.epoch, run.step
        torch.manual_seed(derive_seed(*seeds, rank))  # so that resuming needs no random state
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(run.epoch + run.step / steps, args)

        draws = RandomView.draw(args.batch_size, derive_seed(*seeds))[:, rank::world]  # (2, N, DRAWS)
        im_q, im_k = random_view.two_views(images.to(args.device, non_blocking=True), draws)  # (N, 3, S, S)
        if args.symmetric:  # each view is the query once; all that follows is of 2 N views
            im_q, im_k, index = torch.cat([im_q, im_k]), torch.cat([im_k, im_q]), torch.cat([index, index])
        with autocast(args):
            q, k, to_cluster = forward(im_q, im_k, clusters is not None, features=True)  # (N, D) each
        loss_inst, acc_inst = info_nce(q, k, model.queue, args.temperature)
        loss_proto = acc_proto = torch.zeros_like(acc_inst)
        if clusters is not None:
            loss_proto, acc_proto = proto_nce(q, index.to(args.device, non_blocking=True), clusters, args.pcl_r)
        loss = loss_inst + loss_proto

        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = clip_grad_norm_(model.parameters(), args.clip_grad or math.inf, foreach=True)
        scaler.step(optimizer)
        scaler.update()
        model.momentum_update_key_encoder()
        model.dequeue_and_enqueue(k)

        figures = torch.stack([loss_inst.detach(), loss_proto.detach(), acc_inst, acc_proto, norm])  # as in FIGURES
        pending.append((index[: len(images)], to_cluster[: len(images)], figures))
        run.step += 1
        if len(pending) == SYNC_EVERY:
            sync(pending, scaler, run, args, keys)
            left = (args.epochs - run.epoch) * steps - run.step
            bar.say(f"loss {run.totals[:2].sum() / run.step:.3f}", left / (run.step - first))
        if stop.received_by_any():
            break
    sync(pending, scaler, run, args, keys)


def e_step(model, images, previous, epoch, args, keys=None):
    """E-step: the Clusters of all training images for `epoch`, a list with one for each of --num-cluster (PCL, eq. 12).
    images: the training images under the plain view. previous: the Clusters to start from, or None. keys: the
    directory with the features that training has left; those of images that it left out, and without `keys` all, are
    computed from the plain images. The granularities are spread over the ranks; every rank gets the same list."""
    rank, world = get_rank_and_world()
    directory, n = Path(args.exp_dir) / "features", len(images)
    clear_features(directory)
    file, features, missing = directory / "features.npy", None, np.arange(n)
    if keys is not None and rank == 0:
        features, missing = read_features(keys, n, file)
    missing = distributed.broadcast_object(missing)
    with autocast(args):
        plain = plain_loader(images, missing, args)
        compute_features(plain, lambda x: model.encode(normalize(x)), directory, args.device)
    if rank == 0:
        _, left = read_features(directory, n, file, features)
        if len(lost := np.intersect1d(missing, left)):
            raise RuntimeError(f"{directory} lacks the features of {len(lost)} images that were just saved there")
        del features  # closes the file
    distributed.broadcast_object(None)  # the others wait for the first rank
    features = np.load(file, mmap_mode="c")  # (n, D), on the disk; "r" makes torch warn

    start = {len(level.centroids): level.centroids.cpu().numpy() for level in previous or ()}
    found, granularities = {}, sorted(set(args.num_cluster))
    for k in granularities[rank::world]:
        warm = {"niter": 10, "init": [start[k]]} if k in start else {}
        (found[k],) = run_kmeans(features, [k], args.temperature, args.seed + epoch, **warm)
    for i, k in enumerate(granularities):
        level = found.setdefault(k, Clusters.empty(n, k, features.shape[1]))
        for tensor in level:
            distributed.broadcast(tensor, source=i % world)
    if rank == 0 and is_milestone(epoch, args):
        path = directory.parent / "prototypes.png"
        pictures.draw_prototypes(path, images, features, found[args.num_cluster[0]], epoch)
    return [found[k].to(args.device) for k in args.num_cluster]


def train(model, optimizer, scaler, datasets, run, args, stop):
    """All epochs: M-step, E-step for the next one; kNN accuracy, log and checkpoints in between."""
    rank, world = get_rank_and_world()
    directory, steps = Path(args.exp_dir), len(datasets.train) // args.batch_size
    save = functools.partial(checkpoint.save, directory, run, model, optimizer, scaler, args)
    save()
    board = SummaryWriter(directory, purge_step=run.epoch) if rank == 0 else None
    if run.knn_untrained is None and datasets.labelled:
        run.knn_untrained = held_out_knn(model, datasets, args)
        print_main(f"kNN accuracy of the untrained network: {run.knn_untrained:.1f} %")
    in_memory = datasets.train.pixels is not None  # else the loader's workers have cropped the images
    random_view = RandomView(args.image_size, crop=in_memory, **datasets.augmentation)
    sampler = EpochSampler(len(datasets.train), args.batch_size, args.seed, rank, world)
    loader = make_loader(datasets.train, sampler, args.batch_size // world, args)
    first, saved = run.epoch, 0.0 if run.step else time.time()  # half an epoch's keys are lost once the next begins

    while run.epoch < args.epochs:
        epoch, last = run.epoch, run.epoch == args.epochs - 1
        if epoch >= args.warmup and run.clusters is None:
            run.clusters = e_step(model, datasets.plain, None, epoch, args)
        keys = None
        if args.features == "keys" and epoch + 1 >= args.warmup and not last:
            keys = directory / "features" / "keys"
            clear_features(keys, first=run.step * args.batch_size)
        if epoch in (first, args.warmup):
            forward = distributed.data_parallel(model, model.cluster_head_parameters() if epoch < args.warmup else ())
        sampler.set_epoch(epoch, run.step)
        datasets.train.set_epoch(epoch)
        start = time.time()
        train_one_epoch(model, forward, loader, random_view, optimizer, scaler, run, args, keys, stop)
        run.seconds += time.time() - start
        run.totals = sum(distributed.all_gather_objects(run.totals)) / world
        stop.exit_if_received(save)
        for buffer in model.buffers():  # running statistics: the first rank's, on every rank
            distributed.broadcast(buffer)

        due = is_milestone(epoch, args) or distributed.broadcast_object(time.time() - saved > SAVE_EVERY)
        if due:
            save()
        knn = next_clusters = None
        if datasets.labelled and (last or (epoch + 1) % args.knn_every == 0):
            knn = held_out_knn(model, datasets, args)
            stop.exit_if_received(save)
        if epoch + 1 >= args.warmup and not last:
            next_clusters = e_step(model, datasets.plain, run.clusters, epoch + 1, args, keys)
        means = (run.totals / steps).tolist()
        row = {"epoch": epoch, "loss": means[0] + means[1], **dict(zip(FIGURES, means, strict=True))}
        row |= {"lr": learning_rate(epoch + 1 - 1 / steps, args)}
        row |= {"images_per_second": steps * args.batch_size / run.seconds, "skipped": run.skipped, "knn": knn}
        run.log.append(row)
        write_log(directory, board, run.log, run.knn_untrained, args)
        run.epoch, run.step, run.totals, run.seconds, run.clusters = epoch + 1, 0, torch.zeros(5), 0.0, next_clusters
        if due:
            save(copy=f"checkpoint_{epoch:04d}.pth.tar" if is_milestone(epoch, args) else None)
            saved = time.time()
            if rank == 0:
                pictures.draw_curves(directory / "curves.png", run.log, args.warmup, run.knn_untrained)
        stop.exit_if_received(save)
    if rank == 0:
        board.close()
        shutil.rmtree(directory / "features", ignore_errors=True)


def sync(pending, scaler, run, args, keys):
    """Take over what the `pending` steps, of which `run.step` - 1 is the last, have left on the device; empty the list.
    pending: of each step its samples' positions (N,), features to cluster (N, D) and FIGURES (5,). Ends the program at
    a loss that is not finite, or a gradient, unless a gradient scaler is at work and it is one of few in a row."""
    first, allowed = run.step - len(pending), MAX_SKIPPED if scaler.is_enabled() else 0
    for step, (*_, figures) in enumerate(pending, first):
        loss_inst, loss_proto, *_, norm = figures = figures.cpu()  # the host waits for the device here
        loss = loss_inst + loss_proto
        overflow = not math.isfinite(norm)  # with a scaler, a step that was skipped
        run.skipped += overflow
        run.skipped_in_a_row = run.skipped_in_a_row + 1 if overflow else 0
        if not math.isfinite(loss) or run.skipped_in_a_row > allowed:
            raise SystemExit(
                f"stopped at epoch {run.epoch}, step {step}: the loss is {loss:.4g} and the gradient norm {norm:.4g}; "
                f"what was good is in {args.exp_dir}. Try a lower --lr, a longer --lr-warmup or --clip-grad 1"
            )
        run.totals += figures.nan_to_num(posinf=0.0)
    if keys is not None and pending:
        index, to_cluster, _ = zip(*pending, strict=True)
        number = first * args.batch_size + get_rank_and_world()[0]  # which no other rank has, nor number of ranks
        save_features(keys, number, torch.cat(index), torch.cat(to_cluster))
    pending.clear()


def held_out_knn(model, datasets, args):
    """kNN accuracy in percent of the query backbone on the held-out images."""
    network, labelled = backbone(model.encoder_q).eval(), []
    for images in (datasets.plain, datasets.val):
        some = np.arange(0, len(images), -(-len(images) // MAX_KNN))
        with autocast(args):
            found = extract_features(plain_loader(images, some, args), lambda x: network(normalize(x)), args.device)
        features, index = found  # (n, D), (n,)
        labels = images.labels[index]
        labelled += features[labels >= 0].to(args.device), labels[labels >= 0].to(args.device)
    return distributed.broadcast_object(knn_accuracy(*labelled) if get_rank_and_world()[0] == 0 else None)


def make_loader(images, sampler, batch_size, args):
    """A loader of `images`; those kept in memory need no workers, and are on the device already."""
    options = {"collate_fn": identity_collate}
    if images.pixels is None:
        options |= {"num_workers": args.workers, "worker_init_fn": distributed.ignore_stop_signals}
        options |= {"pin_memory": args.device == "cuda", "persistent_workers": args.workers > 0}
    return DataLoader(images, batch_size, sampler=sampler, **options)


def plain_loader(images, index, args):
    """A loader of this rank's share of the images number `index`."""
    rank, world = get_rank_and_world()
    return make_loader(images, index[rank::world].tolist(), 4 * args.batch_size // world, args)


def is_milestone(epoch, args):
    """Whether the checkpoint and the picture of `epoch` are kept: of ten in a run, the last among them."""
    return epoch == args.epochs - 1 or (epoch + 1) % max(1, args.epochs // 10) == 0


# -- schedule, optimizer, precision -------------------------------------------------------------------------------
def learning_rate(progress, args):
    """The learning rate at `progress` epochs: linear warm-up, then cosine (to 0) or x0.1 at each of --schedule."""
    if progress < args.lr_warmup:
        return args.lr * (progress + 1e-3) / args.lr_warmup
    if args.cos:
        return args.lr * 0.5 * (1 + math.cos(math.pi * progress / args.epochs))
    return args.lr * 0.1 ** sum(progress >= epoch for epoch in args.schedule)


def build_optimizer(model, args):
    """The optimizer of --optim. SGD decays all weights, as published; the others spare biases and batch norm."""
    if args.optim == "sgd":
        parameters = [p for p in model.parameters() if p.requires_grad]
        return torch.optim.SGD(parameters, args.lr, momentum=args.momentum, weight_decay=args.wd, foreach=True)
    from timm.optim import create_optimizer_v2  # takes a second to import

    extra = {"lamb": {"max_grad_norm": None}, "lars": {"momentum": args.momentum}}.get(args.optim, {})
    return create_optimizer_v2(model, args.optim, lr=args.lr, weight_decay=args.wd, **extra)


def autocast(args):
    """A context in which the networks compute in mixed precision, where --amp asks for it."""
    return torch.autocast(args.device, DTYPES[args.amp_dtype], enabled=args.amp)


# -- defaults and arguments ---------------------------------------------------------------------------------------
def fill_in_defaults(args, datasets, world, device):
    """The arguments with all that the command line left open and that follows from the data or from another flag."""
    n, image_size, epochs = len(datasets.train), datasets.image_size, args.epochs
    small = image_size <= SMALL
    base = IMAGENET if not small else SMALL_IMAGES if n >= 5000 else FEW_SMALL_IMAGES
    recipe = base | OPTIMIZERS[args.optim]
    batch_size = args.batch_size or min(recipe["batch_size"], 2 ** int(math.log2(max(8, n / 10)))) // world * world
    local_batch = batch_size // world
    bf16 = device == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    defaults = {
        **datasets.augmentation,
        **recipe,
        "arch": "resnet18_w16" if image_size <= 16 else "resnet18" if small else "resnet50",
        "stem": "small" if small else "imagenet",
        "batch_size": batch_size,
        "lr": recipe["lr"] * base["lr"] / OPTIMIZERS["sgd"]["lr"] * batch_size / 256,
        "lr_warmup": 0 if args.optim == "sgd" else epochs // 20,
        "schedule": [epochs * 6 // 10, epochs * 8 // 10],
        "pcl_r": min(16384, 2 ** int(math.log2(max(1, n / 12)))),
        "num_cluster": default_num_cluster(n),
        "bn_splits": 1 if local_batch % 2 else math.gcd(max(1, recipe["bn_splits"] // world), local_batch // 2),
        "knn_every": max(1, epochs // 20),
        "workers": min(8, max(1, (os.cpu_count() or 1) // world)),
    }
    given = {name: value for name, value in vars(args).items() if value is not None}
    auto = {"amp_dtype": "bf16" if bf16 else "fp16"} if args.amp_dtype == "auto" else {}
    given |= {"image_size": image_size, "device": device, **auto}
    return argparse.Namespace(**(vars(args) | defaults | given))


def check(args, n, world):
    """End the program in one line where the arguments do not fit each other or the `n` training images."""
    b, splits, most = args.batch_size // world, args.bn_splits, max(args.num_cluster)
    mistakes = {
        f"{n} training images are fewer than one batch of {args.batch_size}; lower --batch-size": args.batch_size > n,
        f"--batch-size {args.batch_size} is not a multiple of the {world} processes": args.batch_size % world,
        f"{b} images a process do not make {splits} equal groups of 2 or more; change --bn-splits": b % splits
        or b < 2 * splits,
        f"{most} clusters are more than the {n} training images; lower --num-cluster": most > n,
        f"--crop-min is a part of the image's area, at most 1, not {args.crop_min}": args.crop_min > 1,
        f"there is no checkpoint {args.resume}": args.resume and not Path(args.resume).exists(),
    }
    for message, made in mistakes.items():
        if made:
            cli.fail(message)
    try:
        build_encoder(args.arch)
    except ValueError as error:
        cli.fail(error)


def get_parser():
    recipes = {"above 64 pixels": IMAGENET, "up to 64": SMALL_IMAGES, "few of them": FEW_SMALL_IMAGES, **OPTIMIZERS}
    recipes = "\n".join(f"recipe {name}, lr per batch of 256: {values}" for name, values in recipes.items())
    parser, switch = cli.Parser(__doc__, epilog=recipes), argparse.BooleanOptionalAction
    head = "head b, on the momentum key: none, as published; report, one more layer, from the end of the warm-up on"
    features = "what is clustered: the keys of the epoch just trained, or what a pass over the plain images gives"

    add = parser.add_argument_group("data and augmentation").add_argument
    add("data", nargs="?", help="folder of images, maybe with train/, val/; cifar10, cifar100, stl10; default: digits")
    add("--image-size", type=cli.positive_int, help="side of a view, pixels; default: the images' own, at most 224")
    add("--aug-plus", action=switch, default=True, help="MoCo v2's augmentation; off: MoCo v1's")
    add("--crop-min", type=cli.positive_float, help="smallest area of a random crop; default: 0.2, digits 0.5")
    add("--color-jitter", action=switch, default=True, help="the augmentation's strongest part; slows the warm-up")
    add("--grayscale", action=switch, default=True, help="drop the colour of a fifth of the views")
    add("--blur", action=switch, help="default: above 64 pixels only; below it erases what there is")
    add("--flip", action=switch, help="default: on, but for digits, where a mirror image is another sign")
    add("-j", "--workers", type=cli.nonnegative_int, help="processes per rank to load images; default: cores, up to 8")

    add = parser.add_argument_group("model, losses and clustering").add_argument
    add("-a", "--arch", help="resnet18, 34, 50, 101, 152; resnet18_w16: 16 channels, not 64; default: by image size")
    add("--init", metavar="FILE", help="a ResNet's weights, of any project, to start from; default: random ones")
    add("--stem", choices=("small", "imagenet"), help="small: 3x3, stride 1, no max-pool; default: up to 64 pixels")
    add("--low-dim", type=cli.positive_int, default=128, help="dimension of the features that are compared")
    add("--mlp", action=switch, default=True, help="a hidden layer in the heads a and ã")
    add("--cluster-head", choices=("none", "report"), default="none", help=head)
    add("--symmetric", action=switch, default=False, help="both views as queries, at twice the work a step")
    add("--moco-m", type=cli.bounded(float, 0, 1), help="momentum of the key encoder; default: by recipe")
    add("--bn-splits", type=cli.positive_int, help="batch-norm groups per process, against leaks; default: by recipe")
    add("--pcl-r", type=cli.positive_int, help="queue length, negative prototypes; default: by data, 16384 at most")
    add("--temperature", type=cli.positive_float, help="of InfoNCE, mean of the concentrations; default: by recipe")
    add("--num-cluster", type=cli.int_list, help="comma-separated; default: by data, 25000,50000,100000 for ImageNet")
    add("--features", choices=("keys", "pass"), default="keys", help=features)
    add("--warmup", "--warmup-epoch", type=cli.nonnegative_int, default=20, help="epochs of InfoNCE alone at the start")

    add = parser.add_argument_group("optimization").add_argument
    add("--epochs", type=cli.positive_int, default=200, help="epochs in all, the warm-up among them")
    add("-b", "--batch-size", type=cli.positive_int, help="of all processes; default: by recipe, less for little data")
    add("--optim", choices=OPTIMIZERS, default="sgd", help="lamb and lars are timm's")
    add("--lr", "--learning-rate", type=cli.positive_float, help="default: optimizer's x recipe's / 0.03 x batch / 256")
    add("--lr-warmup", type=cli.nonnegative_int, help="epochs of linear increase; default: a twentieth, for sgd none")
    add("--cos", action="store_true", help="cosine schedule down to 0, in place of --schedule")
    add("--schedule", type=cli.positive_int, nargs="*", help="epochs where the rate drops x0.1; default: at 60, 80 %%")
    add("--momentum", type=cli.bounded(float, 0, 1), default=0.9, help="of sgd and lars")
    add("--wd", "--weight-decay", type=cli.nonnegative_float, dest="wd", help="weight decay; default: by recipe")
    add("--clip-grad", type=cli.positive_float, help="largest norm of the unscaled gradients; default: no limit")
    add("--amp", action="store_true", help="mixed precision: faster, in less memory")
    add("--amp-dtype", choices=("auto", *DTYPES), default="auto", help="auto: bf16 where the device has it, else fp16")

    add = parser.add_argument_group("run").add_argument
    add("--exp-dir", metavar="DIR", help="where all of a run goes; default: experiment_pcl, or _2, _3, ... if taken")
    add("--overwrite", action="store_true", help="remove the run that --exp-dir holds, and start anew")
    add("--config", metavar="FILE", help="another run's args.json, to take its arguments; default: none; flags win")
    add("--resume", nargs="?", const="", metavar="FILE", help="go on from FILE or the latest here; default: a new run")
    add("--seed", type=cli.nonnegative_int, default=0, help="the same seed on the same machine: the same weights")
    add("--knn-every", type=cli.positive_int, help="epochs between kNN accuracies; default: a twentieth of --epochs")
    return parser


# -- a run --------------------------------------------------------------------------------------------------------
def main(argv=None):
    """Train, and return the figures of every epoch: a list of {column of log.csv: value}."""
    with cli.errors_in_one_line(DataError):
        return build_and_train(cli.parse_args(get_parser(), argv))


def build_and_train(args):
    device, world = distributed.init_distributed(), get_rank_and_world()[1]
    directory = distributed.broadcast_object(checkpoint.choose_directory(args.exp_dir, args.resume))
    args.exp_dir, augmentation = str(directory), {name: getattr(args, name) for name in AUGMENTATION}
    with distributed.main_process_first():  # for the others may find what it has downloaded
        datasets = build_datasets(args.data, args.image_size, args.seed, **augmentation)
    print_main(f"{args.data or 'digits'}: {datasets.describe()}; on {world} x {device}")
    init = weights.find_resnet(checkpoint.read(args.init), args.init) if args.init else None
    if init:
        args.arch, args.stem = args.arch or init.arch, args.stem or ("small" if init.small_images else "imagenet")
        print_main(f"the encoder starts from {args.init}, {init.where}: {init.arch}")
    args = fill_in_defaults(args, datasets, world, device)
    check(args, len(datasets.train), world)
    datasets = load_into_memory(datasets, device)

    torch.manual_seed(args.seed)
    torch.backends.cudnn.benchmark = True
    encoder = functools.partial(build_encoder, args.arch, small_images=args.stem == "small")
    model = MoCo(encoder, args.low_dim, args.pcl_r, args.moco_m, args.mlp, args.cluster_head, args.bn_splits)
    for network in (model.encoder_q, model.encoder_k) if init else ():
        weights.load_backbone(network, init, args.init)
    model = model.to(device, memory_format=torch.channels_last)
    optimizer = build_optimizer(model, args)
    scaler = torch.amp.GradScaler(device, enabled=args.amp and args.amp_dtype == "fp16")
    run = RunState(data=datasets.fingerprint)

    with checkpoint.lock(directory), distributed.StopSignals() as stop:
        changes = checkpoint.go_on(directory, run, model, optimizer, scaler, args)
        run.clusters = run.clusters and [Clusters(*level).to(device) for level in run.clusters]
        if run.epoch >= args.epochs:
            return run.log
        checkpoint.write_args(directory, args, run, changes)
        print_main(f"images {'read as needed' if datasets.train.pixels is None else 'in memory'}, in {directory}")
        print_main(", ".join(f"{name} {getattr(args, name)}" for name in SIZES))
        checkpoint.warn(args, len(datasets.train), datasets.labelled)
        first, start = run.epoch, time.time()
        train(model, optimizer, scaler, datasets, run, args, stop)

    row, done, minutes = run.log[-1], len(run.log), (time.time() - start) / 60
    knn = "" if row["knn"] is None else f", kNN accuracy {row['knn']:.1f} % (untrained {run.knn_untrained:.1f} %)"
    print_main(f"reached loss {row['loss']:.3f}{knn} after {done} epochs, {done - first} in {minutes:.1f} minutes")
    print_main(f"next: python eval_lincls.py {'' if datasets.labelled else 'LABELLED_FOLDER '}--exp-dir {directory}")
    return run.log


if __name__ == "__main__":
    main()
