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
import fcntl
import functools
import hashlib
import io
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from cluster import Clusters, run_kmeans
from data import SMALL, DataError, Images, RandomView, as_it_is, build_datasets, normalize
from eval_lincls import (
    cluster_numbers,
    default_num_cluster,
    fail,
    in_range,
    knn_accuracy,
    nonnegative_int,
    one_line,
    positive_float,
    positive_int,
    read_checkpoint,
)
from features import compute_features, load_features, save_batch, saved_batches
from loss import info_nce, proto_nce
from model import MoCo, backbone, build_encoder

BASE_LR = {"sgd": 0.03, "adamw": 1e-3, "lamb": 5e-3, "lars": 0.3}  # per batch of 256
AUGMENTATION = ("aug_plus", "crop_min", "color_jitter", "grayscale", "blur", "flip")
SIZES = ("arch", "stem", "batch_size", "lr", "pcl_r", "num_cluster", "moco_m", "bn_splits", "cluster_head", "workers")
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # SLURM sends the last ahead of a job's end
MAX_SKIPPED = 20  # steps in a row that the gradient scaler may skip for an overflow
LOOK_EVERY = 20  # steps between the moments when the host waits for the device, to see the figures of those steps
SAVE_EVERY = 60  # seconds; of epochs shorter than that, not every one is saved
THREADS = torch.get_num_threads()
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
    add(
        "-j",
        "--workers",
        type=nonnegative_int,
        help="processes per rank that load images, where these are not kept in memory; default: cores, at most 8",
    )

    add = parser.add_argument_group("model").add_argument
    add("-a", "--arch", help="resnet18, 34, 50, ...; resnet18_w16: 16 channels wide, not 64; default by image size")
    add("--stem", choices=("small", "imagenet"), help="small: 3x3, stride 1, no max-pool; default: up to 64 pixels")
    add("--low-dim", type=positive_int, default=128, help="feature dimension")
    add("--mlp", action=switch, default=True, help="a hidden layer in the heads a and ã")
    add("--cluster-head", choices=("none", "report", "twin"), default="twin", help="head b for the clustering task")
    add("--moco-m", type=in_range(float, 0, 1), help="key encoder's momentum; default: 0.999, up to 64 pixels 0.99")
    add("--bn-splits", type=positive_int, help="batch-norm groups per process; default: 8 over all, if equal")

    add = parser.add_argument_group("losses and clustering").add_argument
    add("--pcl-r", type=positive_int, help="queue length and number of negative prototypes; default by data, 16384")
    add("--temperature", type=positive_float, default=0.2)
    add("--num-cluster", type=cluster_numbers, help="comma-separated; default by data, 25000,50000,100000 for ImageNet")
    add(
        "--features",
        choices=("keys", "pass"),
        default="keys",
        help="what is clustered: the keys of the epoch just trained, or what a pass over the plain images gives",
    )
    add("--warmup", "--warmup-epoch", type=nonnegative_int, default=20, help="epochs of InfoNCE alone")

    add = parser.add_argument_group("optimization").add_argument
    add("--epochs", type=positive_int, default=200)
    add("-b", "--batch-size", type=positive_int, help="over all processes; default: 256, less for little data")
    add("--optim", choices=BASE_LR, default="sgd")
    add("--lr", "--learning-rate", type=positive_float, help=f"default: batch size / 256 times {BASE_LR}")
    add("--lr-warmup", type=nonnegative_int, help="epochs of linear increase; default: a twentieth, 0 for sgd")
    add("--cos", action="store_true", help="cosine schedule, in place of --schedule")
    add("--schedule", type=positive_int, nargs="*", help="epochs where the rate drops x0.1; default: at 60, 80 %%")
    add("--momentum", type=in_range(float, 0, 1), default=0.9, help="of sgd and lars")
    add("--wd", "--weight-decay", type=in_range(float, 0), default=1e-4, dest="wd")
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
        with StopSignals() as stop:
            return train(args, stop)
    except DataError as error:
        fail(one_line(error))
    except OSError as error:
        fail(f"{one_line(error)}; what was saved before is whole: make room, and go on with --resume", 1)
    except RuntimeError as error:
        if not dist.is_initialized() or not any(word in str(error).lower() for word in ("gloo", "nccl")):
            raise
        fail(f"another process of this run has ended, so this one does; go on with --resume ({one_line(error)})", 1)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def train(args, stop):
    rank, world, device = start_process()
    say = functools.partial(print, flush=True) if rank == 0 else lambda _: None
    augmentation = {name: getattr(args, name) for name in AUGMENTATION}
    datasets = build_datasets(args.data, args.image_size, args.seed, **augmentation)
    vars(args).update(datasets.augmentation)
    fill_in_defaults(args, datasets, world)
    check(args, len(datasets.train), world)
    kept = datasets.keep(device)
    args.workers = 0 if kept else args.workers
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:  # workers need cores, too
        torch.set_num_threads(THREADS if kept else max(1, (os.cpu_count() or 1) // 2))
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

    # -- where the run stands; all of it is in the checkpoint
    run = {"epoch": 0, "step": 0, "log": [], "knn_untrained": None, "data": datasets.fingerprint, "clusters": None}
    run |= {"totals": torch.zeros(4), "seconds": 0.0, "skipped": 0, "skipped_in_a_row": 0}
    lock = reserve(directory) if rank == 0 else None
    path = from_main(find_checkpoint(args.resume, directory) if rank == 0 else None)
    if path is not None:
        restore(read_checkpoint(path), run, model, optimizer, scaler, args, device)
        say(f"resumed at epoch {run['epoch']}, step {run['step']}")

    # -- data
    loading = {"num_workers": args.workers, "persistent_workers": args.workers > 0, "collate_fn": as_it_is}
    loading["pin_memory"] = device.type == "cuda" and not kept
    loading["generator"] = torch.Generator()  # of the workers' seeds, so that their number leaves other draws alone
    loading["worker_init_fn"] = heed_the_parent_alone
    local_batch = args.batch_size // world
    steps = len(datasets.train) // args.batch_size

    def load(images, batch_size=4 * local_batch, **options):  # whoever passes over the images first fills the sampler
        return DataLoader(images, batch_size, sampler=[], **options, **loading)

    loader, plain = load(datasets.train, local_batch, drop_last=True), load(datasets.plain)
    bank, held_out = plain, None
    if datasets.val is not None:
        held_out = load(thin_out(datasets.val, MAX_BANK))
        if len(datasets.plain) > MAX_BANK:
            bank = load(thin_out(datasets.plain, MAX_BANK))
    extract = functools.partial(extract_features, model, directory / "features", device, autocast)

    if rank == 0:
        from torch.utils.tensorboard import SummaryWriter

        board = SummaryWriter(directory, purge_step=run["epoch"])
        if path is None:
            shutil.rmtree(directory / "features", ignore_errors=True)
        write_whole(directory / "args.json", json.dumps(vars(args), indent=2).encode())
    save(directory, run, model, optimizer, scaler, args)
    say(
        f"{args.data or 'digits'}: {len(datasets.train)} training images, {len(datasets.val or ())} held out, "
        f"{len(datasets.classes)} classes, {args.image_size} pixels, {'kept in memory' if kept else 'read as needed'}; "
        f"on {world} x {device.type}"
    )
    say(", ".join(f"{name} {getattr(args, name)}" for name in SIZES))
    if args.warmup >= args.epochs:
        say(f"--warmup {args.warmup} leaves none of the {args.epochs} epochs for ProtoNCE: this run is InfoNCE alone")
    if run["knn_untrained"] is None and held_out is not None:
        run["knn_untrained"] = held_out_knn(model, bank, held_out, extract)
        say(f"kNN accuracy of the untrained network: {run['knn_untrained']:.1f} %")

    # -- the epochs
    began, start = time.time(), run["epoch"]
    saved = 0.0 if run["step"] else began  # half an epoch's keys are lost once the next one begins
    for epoch in range(start, args.epochs):
        last = epoch == args.epochs - 1
        if epoch in (start, args.warmup):
            forward = share_gradients(model, device, unused=epoch < args.warmup and args.cluster_head != "none")
        if epoch >= args.warmup and run["clusters"] is None:
            run["clusters"] = e_step(model, plain, extract, args, epoch, None, device, to_keep(epoch, args))
        clusters = run["clusters"] if epoch >= args.warmup else None
        keys = directory / "keys" if args.features == "keys" and epoch + 1 >= args.warmup and not last else None
        if keys is not None:
            make_room(keys, empty=run["step"] == 0)
        datasets.train.set_epoch(epoch)
        order = torch.randperm(len(datasets.train), generator=torch.Generator().manual_seed(seed_of(args.seed, epoch)))
        loader.sampler[:] = order[run["step"] * args.batch_size : steps * args.batch_size][rank::world].tolist()
        model.train()
        tic, recent, stopping = time.time(), [], False
        stop.deferred = True
        progress = tqdm(loader, desc=f"epoch {epoch}", leave=False, disable=None if rank == 0 else True)
        for step, (images, index) in enumerate(progress, run["step"]):
            torch.manual_seed(seed_of(args.seed, epoch, step, rank))  # so resuming needs no random state
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(epoch + step / steps, args)
            generator = torch.Generator().manual_seed(seed_of(args.seed, epoch, step))
            draws = torch.rand(2, args.batch_size, RandomView.DRAWS, generator=generator)[:, rank::world]
            im_q, im_k = datasets.two_views(images, draws, device)
            with autocast():
                q, k, c, to_cluster = forward(im_q, im_k, clusters is not None, features=True)
            loss, acc_inst = info_nce(q, k, model.queue, args.temperature)
            acc_proto = torch.zeros_like(acc_inst)
            if clusters is not None:
                loss_proto, acc_proto = proto_nce(c, index.to(device, non_blocking=True), clusters, args.pcl_r)
                loss = loss + loss_proto

            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(parameters, args.clip_grad or math.inf)
            scaler.step(optimizer)
            scaler.update()
            model.update(k)
            recent.append((step, index, to_cluster, torch.stack([loss.detach(), acc_inst, acc_proto, norm])))
            run["step"] = step + 1
            if len(recent) == LOOK_EVERY:
                look_at(recent, run, keys, args, scaler.is_enabled())
            stopping = stop.received_by_any()
            if stopping:
                break
        look_at(recent, run, keys, args, scaler.is_enabled())
        run["totals"] = mean_over_ranks(run["totals"])
        run["seconds"] += time.time() - tic
        if stopping:
            save(directory, run, model, optimizer, scaler, args)
            stop.leave()
        if world > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

        # -- what the epoch came to, and the next one's clusters
        due = from_main(time.time() - saved > SAVE_EVERY) or to_keep(epoch, args)
        if due:
            save(directory, run, model, optimizer, scaler, args)
            stop.allow()
        knn = next_clusters = None
        if held_out is not None and (last or (epoch + 1) % args.knn_every == 0):
            knn = held_out_knn(model, bank, held_out, extract)
        if epoch + 1 >= args.warmup and not last:
            picture = to_keep(epoch + 1, args)
            next_clusters = e_step(model, plain, extract, args, epoch + 1, run["clusters"], device, picture, keys)
        stop.deferred = True
        means = zip(("loss", "acc_inst", "acc_proto", "grad_norm"), (run["totals"] / steps).tolist(), strict=True)
        row = {"epoch": epoch, **dict(means), "lr": learning_rate(epoch + 1 - 1 / steps, args)}
        row |= {"images_per_second": steps * args.batch_size / run["seconds"], "skipped": run["skipped"], "knn": knn}
        run["log"].append(row)
        if rank == 0:
            report(run, board)
            write_log(directory, run["log"])
        run |= {"epoch": epoch + 1, "step": 0, "totals": torch.zeros(4), "seconds": 0.0, "clusters": next_clusters}
        stopping = stop.received_by_any()  # one answer for all ranks; what comes later waits for the next step
        if due or stopping:
            copy = f"checkpoint_{epoch:04d}.pth.tar" if to_keep(epoch, args) else None
            save(directory, run, model, optimizer, scaler, args, copy)
            saved = time.time()
        if rank == 0:
            shutil.rmtree(directory / "keys", ignore_errors=True)  # not before: the E-step may have to be done again
        if stopping:
            stop.leave()
    if rank == 0:
        board.close()
        shutil.rmtree(directory / "features", ignore_errors=True)
        lock.close()
    log = run["log"]
    reached = f"loss {log[-1]['loss']:.3f}"
    if log[-1]["knn"] is not None:
        reached += f", kNN accuracy {log[-1]['knn']:.1f} % (untrained {run['knn_untrained']:.1f} %)"
    minutes = (time.time() - began) / 60
    say(f"reached {reached} after {len(log)} epochs; {len(log) - start} of them in {minutes:.1f} minutes")
    where = f" --exp-dir {args.exp_dir}" if args.exp_dir != "experiment_pcl" else ""
    say(f"next: python eval_lincls.py{where}")
    return log


# -- the steps of an epoch ----------------------------------------------------------------------------------------


def look_at(recent, run, keys, args, scaling):
    """Take over what the `recent` steps have left on the device, and empty the list; the host waits for it here.

    recent: of each step its number, the samples' positions, their features to cluster, and its loss, two accuracies and
    gradient norm. The figures go into `run`, the features into the directory `keys`. Ends the program where a loss is
    not finite, or a gradient, unless a gradient scaler is at work and it is one of few in a row.
    """
    for step, index, features, figures in recent:
        loss, *_, norm = figures = figures.cpu()
        overflow = not math.isfinite(norm)  # with a scaler, a step that was skipped
        run["skipped"] += overflow
        run["skipped_in_a_row"] = run["skipped_in_a_row"] + 1 if overflow else 0
        if not math.isfinite(loss) or run["skipped_in_a_row"] > (MAX_SKIPPED if scaling else 0):
            raise SystemExit(
                f"stopped at epoch {run['epoch']}, step {step}: the loss is {loss:.4g} and the gradient norm {norm:.4g}"
                f"; last good checkpoint: {Path(args.exp_dir) / 'checkpoint.pth.tar'}. Try a lower --lr, a longer "
                "--lr-warmup or --clip-grad 1"
            )
        run["totals"] += figures.nan_to_num(posinf=0.0)
        if keys is not None:
            save_batch(keys, step * args.batch_size + ranks()[0], index, features)
    recent.clear()


def e_step(model, plain, extract, args, epoch, previous, device, picture, keys=None):
    """Cluster features of all training images for `epoch`; every rank gets the same list of Clusters.

    previous: the Clusters to start from, or None. keys: the directory with the features that training has left; those
    of samples that it left out, and without `keys` all, are computed from the plain images. The granularities are
    spread over the ranks. picture: whether to draw prototypes.png.
    """
    place = extract(model.encode, plain, "clustering", keys)
    file = place / "features.npy"
    if is_main():
        load_features(place, len(plain.dataset), file)
    wait_for_all()
    features = np.load(file, mmap_mode="c")  # "r" makes torch warn
    start = {len(clusters.centroids): clusters.centroids.cpu().numpy() for clusters in previous or ()}
    found = {}
    for k in fair_share(args.num_cluster):
        how = {"niter": 10, "init": [start[k]]} if k in start else {}
        (found[k],) = run_kmeans(features, [k], args.temperature, args.seed + epoch, **how)
    for more in from_all(found):
        found |= more
    results = [found[k] for k in args.num_cluster]
    if is_main():
        if picture:
            drawing = io.BytesIO()
            draw_prototypes(plain.dataset, features, results[0]).save(drawing, "PNG")
            write_whole(Path(args.exp_dir) / "prototypes.png", drawing.getbuffer())
        if keys is None:
            shutil.rmtree(place)
    return [Clusters(*(tensor.to(device) for tensor in clusters)) for clusters in results]


def fair_share(num_cluster):
    """Those of `num_cluster` that this rank is to see to, the work being proportional to the number."""
    rank, world = ranks()
    shares = [[] for _ in range(world)]
    for k in sorted(set(num_cluster), reverse=True):
        min(shares, key=sum).append(k)
    return shares[rank]


def held_out_knn(model, bank, held_out, extract):
    """kNN accuracy in percent of the query backbone on the held-out images."""
    network = backbone(model.encoder_q).eval()
    labelled = []
    for loader, name in ((bank, "bank"), (held_out, "held out")):
        place, labels = extract(network, loader, name), loader.dataset.labels
        if is_main():
            features = load_features(place, len(labels))
            labelled += torch.from_numpy(features)[labels >= 0], labels[labels >= 0]
            shutil.rmtree(place)
    return from_main(knn_accuracy(*labelled) if is_main() else None)


def extract_features(model, directory, device, autocast, network, loader, name, place=None):
    """Save what `network`, a part of `model`, makes of the loader's images, and return the directory it is in.

    place: a directory that may hold the features of some images already. None: one in `directory` for these weights, so
    that a pass that was interrupted is taken up where it stopped; what else lies in `directory` is removed.
    """
    found = None
    if is_main():
        if place is None:
            digest = hashlib.sha256(f"{name} {len(loader.dataset)} {loader.dataset.view}".encode())
            for value in model.state_dict().values():
                digest.update(value.cpu().numpy().tobytes())
            place = directory / digest.hexdigest()[:16]
            for other in directory.glob("*"):
                if other != place:
                    shutil.rmtree(other)
        found = place, *saved_batches(place)
    place, done, first = from_main(found)
    left = np.setdiff1d(np.arange(len(loader.dataset)), done)
    rank, world = ranks()
    loader.sampler[:] = left[rank::world].tolist()
    with autocast():
        compute_features(loader, lambda images: network(normalize(images)), place, device, first)
    return place


def make_room(directory, empty):
    """Create `directory` on behalf of all ranks; `empty`: without what an earlier attempt left there."""
    if is_main():
        if empty:
            shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(exist_ok=True)
    wait_for_all()


def to_keep(epoch, args):
    """Whether the checkpoint and the picture of `epoch` are kept: of ten in a run, the last among them."""
    return epoch == args.epochs - 1 or (epoch + 1) % max(1, args.epochs // 10) == 0


def thin_out(images, n):
    """At most `n` of the images, evenly spaced, as data.Images of their own."""
    step = -(-len(images) // n)
    source = Subset(images.source, range(0, len(images), step))
    source.targets = images.labels[::step]
    return Images(source, images.view, pixels=None if images.pixels is None else images.pixels[::step])


def learning_rate(progress, args):
    """The learning rate at `progress` epochs: linear warm-up, then cosine (to 0) or x0.1 at each of --schedule."""
    if progress < args.lr_warmup:
        return args.lr * (progress + 1e-3) / args.lr_warmup
    if args.cos:
        return args.lr * 0.5 * (1 + math.cos(math.pi * progress / args.epochs))
    return args.lr * 0.1 ** sum(progress >= epoch for epoch in args.schedule)


def report(run, board):
    """Print the figures of the latest epoch, warn where they hint at a leak, and hand them to TensorBoard."""
    row = run["log"][-1]
    print(
        "epoch {epoch:3d}  loss {loss:.3f}  acc_inst {acc_inst:5.1f}  acc_proto {acc_proto:5.1f}  lr {lr:.4f}  "
        "{images_per_second:.0f} images/s".format(**row)
        + (f"  {row['skipped']} steps skipped" if row["skipped"] else "")
        + (f"  kNN {row['knn']:.1f}" if row["knn"] is not None else ""),
        flush=True,
    )
    if leaking(run["log"], run["knn_untrained"]):
        print(
            f"warning: acc_inst is {row['acc_inst']:.1f} % but the kNN accuracy does not follow ({row['knn']:.1f} %): "
            "the query finds its key by something other than what the image shows. Most often batch-norm "
            "statistics tell which key belongs to which query; raise --bn-splits",
            flush=True,
        )
    for name, value in row.items():
        if name != "epoch" and value is not None:
            board.add_scalar(name, value, row["epoch"])


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


class StopSignals:
    """Catches the signals that ask a run to end: at once or, while deferred, when the loop looks.

    Either way the program ends with status 128 + the signal's number.
    """

    def __enter__(self):
        self.received, self.deferred = 0, False
        self.before = {number: signal.signal(number, self.receive) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def receive(self, number, _):
        self.received = number
        if not self.deferred:
            self.leave()

    def allow(self):
        self.deferred = False
        if self.received:
            self.leave()

    def received_by_any(self):
        """Whether some rank has got a signal; all ranks have to ask."""
        if dist.is_initialized():
            received = torch.tensor(self.received)
            dist.all_reduce(received, dist.ReduceOp.MAX)
            self.received = received.item()
        return self.received > 0

    def leave(self):
        if is_main():  # print() cannot be used where a signal may have interrupted another print()
            os.write(2, b"\nstopped by a signal; the same command with --resume goes on from here\n")
        raise SystemExit(128 + self.received)


def heed_the_parent_alone(_):
    """For loader workers: a stop signal may reach all processes of a job, and this one is needed to finish the step."""

    def wait():
        while signal.sigwaitinfo(STOP_SIGNALS).si_pid != os.getppid():
            pass
        os._exit(0)

    if hasattr(signal, "sigwaitinfo"):  # macOS has none
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        threading.Thread(target=wait, daemon=True).start()


def start_process():
    """(rank, number of processes, device), from torchrun's environment or for one process alone."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:  # nothing to listen for outside
            for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
                os.environ.setdefault(name, "lo0" if sys.platform == "darwin" else "lo")
        timeout = timedelta(hours=2)
        store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
        store = dist.PrefixStore(f"start {restarts()}", store)  # else a restart finds the addresses of the dead
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"  # so that no device waits for a signal
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    return *ranks(), device


def restarts():
    """How often `torchrun --max-restarts` has started this run again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def ranks():
    """(this process' rank, number of processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_main():
    return ranks()[0] == 0


def from_main(value):
    """The first rank's `value`, on every rank."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values, 0)
    return values[0]


def from_all(value):
    """All ranks' values, on every rank."""
    values = [value]
    if dist.is_initialized():
        values *= dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


def wait_for_all():
    if dist.is_initialized():
        dist.barrier()


def mean_over_ranks(values):
    if dist.is_initialized():
        dist.all_reduce(values)
    return values / ranks()[1]


def seed_of(*numbers):
    return hash(numbers) & 0xFFFFFFFF  # of integers: the same in every process


def share_gradients(model, device, unused):
    """The model as the loop calls it: where there are several processes, they average their gradients.

    unused: some parameters get no gradient, as head b during the warm-up; searching for them costs time.
    """
    if not dist.is_initialized():
        return model
    device_ids = [device.index] if device.type == "cuda" else None
    parallel = DistributedDataParallel(model, device_ids, find_unused_parameters=unused, gradient_as_bucket_view=True)
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
    if args.crop_min > 1:
        fail(f"--crop-min is a part of the image's area, at most 1, not {args.crop_min}")
    if args.resume and not Path(args.resume).exists():
        fail(f"there is no checkpoint {args.resume}")
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


def reserve(directory):
    """Create the run's directory; no other run can have it while the file that is returned is open."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = open(directory / ".lock", "w")  # noqa: SIM115
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return lock
    except BlockingIOError:
        fail(f"another run is writing to {directory}; wait for its end or name another --exp-dir")
    except OSError as error:
        fail(f"cannot write to {directory}: {error.strerror}; name another --exp-dir")


def save(directory, run, model, optimizer, scaler, args, copy=None):
    """Write checkpoint.pth.tar, on the first rank; also under the name `copy`."""
    if not is_main():
        return
    checkpoint = {
        "epoch": run["epoch"],
        "arch": args.arch,
        "state_dict": {f"module.{name}": value for name, value in model.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "args": vars(args),
        "run": run | {"clusters": run["clusters"] and [tuple(clusters) for clusters in run["clusters"]]},
    }
    file = io.BytesIO()
    torch.save(checkpoint, file)
    for name in ("checkpoint.pth.tar", copy):
        if name is not None:
            write_whole(directory / name, file.getbuffer())


def write_log(directory, log):
    rows = [log[0], *(["" if v is None else f"{v:.6g}" for v in row.values()] for row in log)]
    write_whole(directory / "log.csv", "".join(f"{','.join(row)}\n" for row in rows).encode())


def write_whole(path, data):
    """Make `path` hold the bytes `data` or, where the process dies or the disk is full, what it held before."""
    partial = path.with_name(path.name + ".tmp")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def find_checkpoint(resume, directory):
    """The checkpoint to go on from: what --resume says, the latest if torchrun has restarted us; None for a new run."""
    if resume and not restarts():
        return Path(resume)
    latest = directory / "checkpoint.pth.tar"
    return latest if (resume is not None or restarts()) and latest.exists() else None


def restore(checkpoint, run, model, optimizer, scaler, args, device):
    """Bring `run`, the model, the optimizer and the scaler to where a checkpoint of this script stands."""
    state = {name.removeprefix("module."): value for name, value in checkpoint["state_dict"].items()}
    try:
        model.load_state_dict(state)
        optimizer.load_state_dict(checkpoint["optimizer"])
        scaler.load_state_dict(checkpoint["scaler"])
        stored = checkpoint["run"]
        if any(value.dim() and value.shape != p.shape for p, s in optimizer.state.items() for value in s.values()):
            raise ValueError
        if any(type(stored[name]) is not type(value) for name, value in run.items() if value is not None):
            raise TypeError
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        fail(
            f"the checkpoint (a {checkpoint['arch']}) does not fit {args.arch}, --cluster-head {args.cluster_head}, "
            f"--optim {args.optim} and the sizes worked out; give the flags it was made with ({type(error).__name__})"
        )
    if stored["data"] != run["data"]:
        fail("the training images are not those that the checkpoint was trained on; restore them, or start a new run")
    batch_size = checkpoint.get("args", {}).get("batch_size")
    if stored["step"] and args.batch_size != batch_size:
        fail(f"the checkpoint stands in the middle of an epoch; go on with its --batch-size {batch_size}")
    run.update(stored)
    if run["clusters"]:
        run["clusters"] = [Clusters(*(tensor.to(device) for tensor in clusters)) for clusters in run["clusters"]]


if __name__ == "__main__":
    main()
