"""Prototypical Contrastive Learning (PCL) with MoCo v2 heads and an optional cluster head.

PCL (Li, Zhou, Xiong, Hoi, ICLR 2021, arXiv 2005.04966) alternates two steps. The E-step clusters
the features of all training images. The M-step trains with two losses: InfoNCE between two views of
an image, and ProtoNCE between an image and the prototypes, the centres of its clusters.

    # the handwritten digits in assets/, on any machine
    python main_pcl.py --amp --optim sgd --cos --warmup 20

    # one GPU; one node with 8 GPUs
    python main_pcl.py path/to/imagenet --amp --cos
    torchrun --nproc_per_node=8 main_pcl.py path/to/imagenet --amp --cos

    # two nodes with 8 GPUs each, which share --exp-dir: run this on both
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \\
        main_pcl.py path/to/imagenet --amp --cos

Then `python eval_lincls.py` measures the features.
"""

import runtime.start  # isort: skip  # noqa: F401  # first: Ctrl-C during the slow imports
import argparse
import contextlib
import functools
import itertools
import math
import shlex
import time
from pathlib import Path

import numpy as np
import torch
from torch.amp import GradScaler
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter

import diagnose
import recipes
from augment import RandomView, normalize
from cluster import Clusters, default_num_cluster, run_kmeans
from data import (
    DOWNLOADS,
    DataError,
    EpochSampler,
    build_datasets,
    derive_seed,
    identity_collate,
    load_into_memory,
)
from features import (
    clear_features,
    compute_features,
    extract_features,
    read_features,
    save_features,
)
from loss import info_nce, proto_nce
from metrics import effective_rank, knn_accuracy, moments, spread
from model import MoCo, backbone, build_encoder, capture_encoders, compile_encoders, is_timm
from runtime import checkpoint, cli, distributed, image_files, report, weights
from runtime.directory import (
    check_writable,
    choose_directory,
    holds_foreign_files,
    lock,
    remove_features,
    write_args,
)
from runtime.distributed import get_rank_and_world, print_main

SYNC_EVERY = 20  # read the results of so many steps at once: the host waits for the device then
SAVE_EVERY = 60  # seconds between checkpoints, so not every short epoch is saved
DRAW_EVERY = 100  # seconds between drawings of a picture; one takes about a second
# A GPU makes the views of several steps at once: at most this many pixels, counted over all
# processes, and this many steps. These steps share one order of the colour jitter.
PIXELS_AT_ONCE = 2**22
STEPS_AT_ONCE = 32
MAX_SKIPPED = 20  # steps in a row that the gradient scaler may skip after an overflow
MAX_KNN = 50_000  # training images, and held-out images, in the kNN accuracy during training
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
AUGMENTATION = (  # flags that are also arguments of RandomView
    "aug_plus",
    "crop_min",
    "color_jitter",
    "grayscale",
    "blur",
    "flip",
)
MAY_DIFFER = ("data", "workers", "init", "config", "resume")  # between ranks
ANNOUNCED = (  # settings that are printed at the start
    "arch",
    "stem",
    "batch_size",
    "lr",
    "wd",
    "temperature",
    "moco_m",
    "bn_splits",
    "pcl_r",
    "num_cluster",
    "cluster_head",
)


# -- the method: M-step, E-step, epochs ------------------------------------------------------------
@cli.phase("training")
def train_one_epoch(run, network, loader, random_view, keys, stop):
    """M-step: train epoch `run.epoch` from step `run.step` on (PCL, algorithm 1).

    network: `run.model` or, with several processes, its DistributedDataParallel wrapper.
    keys: directory for the keys of this epoch, which the next E-step clusters; None: not kept.
    stop: StopSignals; a signal ends the epoch after the current step.
    """
    args, model, optimizer, scaler = run.args, run.model, run.optimizer, run.scaler
    rank, _ = get_rank_and_world()
    steps = len(loader.dataset) // args.batch_size
    first_step = run.step
    clusters = None  # warm-up: InfoNCE alone
    if run.epoch >= args.warmup:
        clusters = run.clusters
    pending = []  # results of the latest steps, still on the device
    start = time.time()

    model.train()
    views = views_of_steps(run, loader, random_view)
    bar = cli.Progress(views, f"epoch {run.epoch}", total=steps - first_step, disable=rank > 0)
    for index, im_q, im_k in bar:  # (N,) positions of the images, (N, 3, S, S) each view
        # every step has its own seed, so a resumed run needs no saved random state
        torch.manual_seed(derive_seed(args.seed, run.epoch, run.step, rank))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(run.epoch + run.step / steps, args)

        samples = index
        if args.symmetric:  # each view is the query once: N doubles from here on
            im_q, im_k = torch.cat([im_q, im_k]), torch.cat([im_k, im_q])
            samples = torch.cat([index, index])

        # InfoNCE + ProtoNCE
        with autocast(args):
            q, k, c, features = network(im_q, im_k, clusters is not None)  # (N, D) each
        loss_inst, acc_inst = info_nce(q, k, model.queue, args.temperature)
        if clusters is None:
            loss_proto = acc_proto = torch.zeros_like(acc_inst)
        else:
            samples = samples.to(args.device, non_blocking=True)
            loss_proto, acc_proto = proto_nce(c, samples, clusters, args.pcl_r)
        loss = loss_inst + loss_proto

        # update the query encoder, then the key encoder and the queue
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        grad_norm = clip_gradients(optimizer, args.clip_grad)
        scaler.step(optimizer)
        scaler.update()
        model.momentum_update_key_encoder()
        model.dequeue_and_enqueue(k)
        run.step += 1

        # keep the results on the device, and read them every SYNC_EVERY steps, or in every step if
        # steps take more than a second
        figures = {
            "loss": loss.detach(),
            "loss_inst": loss_inst.detach(),
            "loss_proto": loss_proto.detach(),
            "acc_inst": acc_inst,
            "acc_proto": acc_proto,
            "grad_norm": grad_norm,
        }
        # with --symmetric, the second half repeats the images of the first
        pending.append((index, features[: len(index)], figures))
        steps_done = run.step - first_step
        seconds_per_step = (time.time() - start) / steps_done
        if len(pending) == SYNC_EVERY or seconds_per_step > 1:
            collect_results(run, pending, keys)
            show_progress(run, bar, steps, steps_done)
        if stop.received_by_any():
            break
    collect_results(run, pending, keys)
    run.seconds += time.time() - start
    share_results(run)


def views_of_steps(run, loader, random_view):
    """Yield the images of each step from `run.step` on: index (N,), im_q and im_k (N, 3, S, S).

    The views of `steps_at_once` steps are made in one go. Groups start at fixed steps. A run
    that is resumed within a group makes the whole group again, so its views do not change.
    """
    args = run.args
    rank, world = get_rank_and_world()
    at_once = steps_at_once(args, loader.dataset)
    first_step = run.step
    step = first_step - first_step % at_once
    loader.sampler.set_epoch(run.epoch, step)
    loader.dataset.set_epoch(run.epoch)

    batches = iter(loader)
    while True:
        group = list(itertools.islice(batches, at_once))
        if not group:
            return
        # every rank draws for the whole batch and keeps its share, so the views do not depend on
        # the number of ranks
        seeds = [derive_seed(args.seed, run.epoch, step + i) for i in range(len(group))]
        draws = torch.cat([RandomView.draw(args.batch_size, seed) for seed in seeds], 1)
        images = torch.cat([images.to(args.device, non_blocking=True) for images, _ in group])
        im_q, im_k = random_view.two_views(images, draws[:, rank::world])
        # copied, because a tensor from a loader worker keeps a file open
        index = torch.cat([index for _, index in group])

        parts = [tensor.chunk(len(group)) for tensor in (index, im_q, im_k)]
        steps = list(zip(*parts, strict=True))
        skipped = max(0, first_step - step)  # if the run was resumed in the middle of this group
        yield from steps[skipped:]
        step += len(group)


def steps_at_once(args, images):
    """The number of steps whose views are made in one go.

    On a GPU, calls for a few small images take longer than their arithmetic. A CPU gains nothing,
    and images on the disk are delivered by the loader's workers batch by batch: one step at a time.
    """
    if args.device == "cpu" or images.pixels is None:
        return 1
    side = max(args.image_size, *images.pixels.shape[-2:])  # of the view, or of the whole image
    fitting = PIXELS_AT_ONCE // (args.batch_size * side**2)
    return min(max(1, fitting), STEPS_AT_ONCE)


def show_progress(run, bar, steps, steps_done):
    """Show the mean loss and the remaining time. Warn after a minute if the run takes days.

    bar: the epoch's Progress. steps: of an epoch. steps_done: those that the bar has counted.
    """
    mean_loss = run.totals["loss"] / run.step
    steps_left = (run.args.epochs - run.epoch) * steps - run.step
    seconds_left = bar.say(f"loss {mean_loss:.3f}", steps_left / steps_done)
    if run.epoch == 0 and bar.first_minute_ends():
        bar.note(diagnose.warn_of_days(seconds_left, vars(run.args)))


def clip_gradients(optimizer, largest):
    """Scale the gradient down to a norm of `largest`, or leave it as it is if that is None.

    Returns its norm before clipping, a scalar tensor.
    """
    # from the optimizer's lists, because a walk through the model's layers takes the host longer
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if largest:
        return clip_grad_norm_(parameters, largest, foreach=True)
    gradients = [p.grad for p in parameters if p.grad is not None]
    return torch.stack(torch._foreach_norm(gradients)).norm()


def collect_results(run, pending, keys):
    """Read the results of the `pending` steps from the device, and empty the list.

    pending: (index (N,), features (N, D), {figure: scalar tensor}) for each of the latest steps.
    keys: directory to save the features in, or None.
    Ends the program if the run has diverged.
    """
    if not pending:
        return
    first_step = run.step - len(pending)
    names = list(pending[0][2])
    scalars = torch.stack([figures[name] for _, _, figures in pending for name in names])
    rows = scalars.view(len(pending), len(names)).tolist()  # the host waits for the device here
    for step, values in enumerate(rows, first_step):
        figures = dict(zip(names, values, strict=True))
        stop_if_diverged(run, step, figures)
        for name, value in figures.items():
            if not math.isfinite(value):  # the gradient norm of a step that the scaler skipped
                value = 0.0
            run.totals[name] = run.totals.get(name, 0.0) + value

    features = torch.cat([features for _, features, _ in pending])
    run.totals["moments"] = run.totals.get("moments", 0.0) + moments(features).cpu()
    if keys is not None:
        index = torch.cat([index for index, _, _ in pending])
        # the position in the epoch of the first sample: unique, even if the number of ranks changes
        number = first_step * run.args.batch_size + get_rank_and_world()[0]
        save_features(keys, number, index, features)
    pending.clear()


def share_results(run):
    """Average the figures over the ranks, and copy rank 0's buffers (batch norm, queue) to all."""
    all_totals = distributed.all_gather_objects(run.totals)
    run.totals = {
        name: sum(totals[name] for totals in all_totals) / len(all_totals) for name in run.totals
    }
    for buffer in run.model.buffers():
        distributed.broadcast(buffer)


def stop_if_diverged(run, step, figures):
    """End the program if the loss or the gradient is not finite.

    With a gradient scaler, a few steps in a row may overflow: the scaler skips them.
    """
    loss = figures["loss"]
    if math.isfinite(figures["grad_norm"]):
        run.skipped_in_a_row = 0
    else:
        run.skipped += 1
        run.skipped_in_a_row += 1
    allowed = 0
    if run.scaler.is_enabled():
        allowed = MAX_SKIPPED
    if math.isfinite(loss) and run.skipped_in_a_row <= allowed:
        return
    end_diverged_run(
        run,
        f"step {step}: the loss is {loss:.4g} and the gradient norm {figures['grad_norm']:.4g}; "
        f"the last good state is in {run.args.exp_dir}",
    )


def end_diverged_run(run, problem):
    """End the program in one line: the problem, and what to try."""
    advice = "Try a lower --lr, a longer --lr-warmup, or --clip-grad 1"
    raise SystemExit(cli.in_one_line(f"stopped at epoch {run.epoch}, {problem}. {advice}"))


@cli.phase("E-step")
def e_step(run, images, epoch, keys=None):
    """E-step: cluster all training images for `epoch`, once per --num-cluster (PCL, algorithm 1).

    Before the last epoch it also writes clusters.csv, and at milestones it draws prototypes.png.

    images: the training images under the plain view, a centre crop.
    keys: directory of the keys that training has saved. Images without a saved key, and all images
        if `keys` is None, are passed through the momentum encoder.
    k-means starts from the centroids of the previous epoch if there are any.
    Returns one Clusters per granularity, the same on every rank.
    """
    args = run.args
    rank, world = get_rank_and_world()
    features = gather_features(run, images, keys)  # (n, D), on the disk
    previous = {}
    for clusters in run.clusters or []:
        previous[len(clusters.centroids)] = clusters.centroids.cpu().numpy()

    # each rank clusters some of the granularities
    granularities = sorted(set(args.num_cluster))
    found = {}
    for k in granularities[rank::world]:
        options = {"niter": 10, "init": [previous[k]]} if k in previous else {}
        seed = (args.seed + epoch) % 2**31  # faiss takes no larger one
        try:
            found[k] = run_kmeans(features, [k], args.temperature, seed, **options)[0]
        except ValueError as error:  # features that are not finite; row i belongs to image i
            advice = f"the latest checkpoint in {args.exp_dir} may already hold these weights"
            end_diverged_run(run, f"clustering: {error}; {advice}")

    # then all ranks get all of them
    for i, k in enumerate(granularities):
        found[k] = distributed.broadcast_object(found.get(k), source=i % world)

    path = Path(args.exp_dir) / "clusters.csv"
    if rank == 0 and epoch == args.epochs - 1:
        with cli.warn_if_unwritable(path):
            report.write_clusters(path, images, features, [found[k] for k in granularities])
    path = Path(args.exp_dir) / "prototypes.png"
    if rank == 0 and is_milestone(epoch, args.epochs) and picture_is_due(path, epoch, args.epochs):
        with cli.warn_if_unwritable(path):
            report.draw_prototypes(path, images, features, found[args.num_cluster[0]], epoch)
    return [found[k].to(args.device) for k in args.num_cluster]


def gather_features(run, images, keys):
    """The features to cluster: (len(images), D) float32, one memory-mapped file for all ranks.

    The saved keys and, for images without one, the momentum encoder's output for the plain view.
    """
    args, n = run.args, len(images)
    rank, world = get_rank_and_world()
    directory = Path(args.exp_dir) / "features"
    path = directory / "features.npy"

    # the keys that training has saved
    features = None
    missing = np.arange(n)
    if keys is not None and rank == 0:
        features, missing = read_features(keys, n, path)
    missing = distributed.broadcast_object(missing)

    # a pass over the images without a key
    loader = plain_loader(images, missing, args)

    with autocast(args):
        compute_features(loader, lambda x: run.model.encode(normalize(x)), directory, args.device)
    if rank == 0:
        features, still_missing = read_features(directory, n, path, features)
        lost = np.intersect1d(missing, still_missing)
        if len(lost):
            cli.fail(
                f"{directory} lacks {len(lost)} features that were just saved there; all nodes "
                "must share --exp-dir",
                1,
            )
        if world > 1:
            features.flush()  # because closing a mapped file does not bring it to other nodes
        del features  # closes the file

    distributed.barrier()  # the other ranks wait for the file
    return np.load(path, mmap_mode="c")  # torch warns about arrays mapped with "r"


def train(run, datasets, stop):
    """Alternate M-steps and E-steps until the last epoch; evaluate, log and save in between."""
    args = run.args
    rank, _ = get_rank_and_world()
    directory = Path(args.exp_dir)
    save = functools.partial(checkpoint.save, directory, run)
    save()
    board = SummaryWriter(directory, purge_step=run.epoch) if rank == 0 else None
    evaluate_untrained(run, datasets)
    loader, random_view = build_training_loader(datasets, args)
    network = None
    last_save = time.time()
    if run.step > 0:
        # Resumed within an epoch: save at its end, whatever the time is. The next epoch deletes the
        # keys that the old checkpoint needs.
        last_save = -math.inf

    while run.epoch < args.epochs:
        epoch = run.epoch
        is_last = epoch == args.epochs - 1
        e_step_follows = epoch + 1 >= args.warmup and not is_last

        # M-step
        if epoch >= args.warmup and run.clusters is None:  # there was no E-step before this epoch
            run.clusters = e_step(run, datasets.plain, epoch)
        if network is None or epoch == args.warmup:  # the cluster head takes part from here on
            unused = run.model.cluster_head_parameters() if epoch < args.warmup else ()
            network = distributed.data_parallel(run.model, unused)
        keys = None
        if e_step_follows and args.features == "keys":
            keys = directory / "features" / "keys"
            clear_features(keys, first=run.step * args.batch_size)  # those of steps still to come
        train_one_epoch(run, network, loader, random_view, keys, stop)
        image_files.share_broken_images(directory, datasets)
        stop.exit_if_received(save)

        # kNN accuracy, and the E-step for the next epoch; saved first, because both can take long
        is_kept = is_milestone(epoch, args.epochs)
        due = is_kept or distributed.broadcast_object(time.time() - last_save > SAVE_EVERY)
        if due:
            save()
        knn = None
        if datasets.labelled and (is_last or (epoch + 1) % args.knn_every == 0):
            knn = held_out_knn(run.model, datasets, args)
            stop.exit_if_received(save)
        clusters = e_step(run, datasets.plain, epoch + 1, keys) if e_step_follows else None

        # log and checkpoint
        run.log.append(summarize_epoch(run, len(datasets.train) // args.batch_size, knn))
        warnings = [
            diagnose.warn_of_leak(run.log, run.knn_untrained, vars(args)),
            diagnose.warn_of_collapse(run.log, vars(args)),
        ]
        report.write_log(directory, board, run.log, warnings)
        run.begin_epoch(epoch + 1, clusters)
        if due:
            save(copy=f"checkpoint_{epoch:04d}.pth.tar" if is_kept else None)
            last_save = time.time()
            draw_curves(run, epoch)
        stop.exit_if_received(save)
    if rank == 0:
        board.close()
        remove_features(directory)


def build_training_loader(datasets, args):
    """The DataLoader of the training images, and the RandomView that makes two views of a batch."""
    rank, world = get_rank_and_world()
    sampler = EpochSampler(len(datasets.train), args.batch_size, args.seed, rank, world)
    loader = make_loader(datasets.train, sampler, args.batch_size // world, args)
    # images in memory are cropped on the device, others by the loader's workers
    in_memory = datasets.train.pixels is not None
    return loader, RandomView(args.image_size, crop=in_memory, **datasets.augmentation)


def summarize_epoch(run, steps, knn):
    """The row of log.csv for the epoch that has just ended, {column: value}.

    knn: kNN accuracy in percent, or None.
    """
    row = {"epoch": run.epoch}
    for name, total in run.totals.items():
        if name != "moments":
            row[name] = total / steps
    row["rank"] = effective_rank(run.totals["moments"])
    row["spread"] = spread(run.totals["moments"])
    row["lr"] = learning_rate(run.epoch + 1 - 1 / steps, run.args)  # of the last step
    row["images_per_second"] = steps * run.args.batch_size / run.seconds
    row["skipped"] = run.skipped
    row["knn"] = knn
    return row


def evaluate_untrained(run, datasets):
    """Store the kNN accuracy before the first step, to compare with, if there are labels."""
    if run.knn_untrained is None and datasets.labelled:
        run.knn_untrained = held_out_knn(run.model, datasets, run.args)
        start = name_of_start(run.args)
        print_main(f"kNN accuracy of the {start} network: {run.knn_untrained:.1f} %")


def draw_curves(run, epoch):
    """Draw the figures of all epochs up to `epoch` in curves.png, if picture_is_due."""
    path = Path(run.args.exp_dir) / "curves.png"
    if not picture_is_due(path, epoch, run.args.epochs):
        return
    start = name_of_start(run.args)
    with cli.warn_if_unwritable(path):
        report.draw_curves(path, run.log, run.args.warmup, run.knn_untrained, start)


def name_of_start(args):
    """What to call the network before the first step."""
    return "initial" if args.init else "untrained"


@cli.phase("kNN accuracy")
def held_out_knn(model, datasets, args):
    """kNN accuracy of the query backbone on the held-out images, in percent."""
    network = backbone(model.encoder_q).eval()
    parts = []  # features (n, D), labels (n,) of the training images, then of the held-out ones
    for images in (datasets.plain, datasets.val):
        stride = math.ceil(len(images) / MAX_KNN)
        loader = plain_loader(images, np.arange(0, len(images), stride), args)
        with autocast(args):
            features, index = extract_features(loader, lambda x: network(normalize(x)), args.device)
        distributed.set_where_any_rank_has(images.source.broken)
        labels = images.labels[index]
        labelled = labels >= 0
        parts += [features[labelled], labels[labelled]]
    knn = None
    if get_rank_and_world()[0] == 0:
        knn = knn_accuracy(*(part.to(args.device) for part in parts))
    return distributed.broadcast_object(knn)


def make_loader(images, sampler, batch_size, args):
    """A DataLoader over `images`; images in memory need no workers and no pinned copies."""
    options = {}
    if images.pixels is None:
        workers = min(args.workers, math.ceil(len(sampler) / batch_size))  # starting one takes time
        options["num_workers"] = workers
        options["persistent_workers"] = workers > 0
        options["pin_memory"] = args.device == "cuda"
        options["worker_init_fn"] = distributed.ignore_stop_signals
    return DataLoader(images, batch_size, sampler=sampler, collate_fn=identity_collate, **options)


def plain_loader(images, index, args):
    """A DataLoader over this rank's share of the images with the numbers `index`."""
    rank, world = get_rank_and_world()
    # more than in training, because there are no gradients
    batch_size = 4 * args.batch_size // world
    return make_loader(images, index[rank::world].tolist(), batch_size, args)


def is_milestone(epoch, epochs):
    """Whether `epoch` keeps a checkpoint and a picture: every tenth of the run, and at its end."""
    return epoch == epochs - 1 or (epoch + 1) % max(1, epochs // 10) == 0


def picture_is_due(path, epoch, epochs):
    """Whether to draw the picture `path` again: in the last epoch, or after DRAW_EVERY seconds."""
    is_last = epoch == epochs - 1
    return is_last or not path.exists() or time.time() - path.stat().st_mtime > DRAW_EVERY


# -- schedule, optimizer, precision ----------------------------------------------------------------
def learning_rate(progress, args):
    """The learning rate after `progress` epochs.

    Linear warm-up, then a cosine down to 0 (--cos) or a factor of 0.1 at each of --schedule.
    The warm-up starts slightly above 0, so that the first step moves the weights at all. The cosine
    counts from epoch 0, so it starts slightly below --lr: at 0.994 of it after 10 epochs of 200.
    """
    if progress < args.lr_warmup:
        return args.lr * (progress + 1e-3) / args.lr_warmup
    if args.cos:
        return args.lr * 0.5 * (1 + math.cos(math.pi * progress / args.epochs))
    drops = sum(progress >= epoch for epoch in args.schedule)
    return args.lr * 0.1**drops


def build_optimizer(model, args):
    """The optimizer of --optim. SGD decays all weights, as published.

    The others do not decay biases and norms, nor what a network of timm excludes.
    """
    if args.optim == "sgd":
        parameters = [p for p in model.parameters() if p.requires_grad]
        return torch.optim.SGD(
            parameters, args.lr, momentum=args.momentum, weight_decay=args.wd, foreach=True
        )
    from timm.optim import create_optimizer_v2  # here, because the import takes a second

    options = {}
    if args.optim == "lamb":
        options["max_grad_norm"] = None  # clipping is --clip-grad's
    if args.optim == "lars":
        options["momentum"] = args.momentum
    optimizer = create_optimizer_v2(model, args.optim, lr=args.lr, weight_decay=1, **options)
    # Made for a decay of 1 and scaled here: timm makes other groups for a decay of 0, and a resumed
    # run may change --wd to 0 or from it.
    for group in optimizer.param_groups:
        group["weight_decay"] *= args.wd
    return optimizer


def autocast(args, **options):
    """Context in which the networks compute in mixed precision, if --amp asks for it."""
    return torch.autocast(args.device, DTYPES[args.amp_dtype], enabled=args.amp, **options)


def speed_up_encoders(model, args):
    """Compile the encoders (--compile), and make them CUDA graphs (--cuda-graphs)."""
    if args.compile:
        compile_encoders(model)
    if args.cuda_graphs:
        queries = args.batch_size
        if args.symmetric:
            queries *= 2
        images = torch.randn(queries, 3, args.image_size, args.image_size, device=args.device)
        images = images.contiguous(memory_format=torch.channels_last)
        try:
            capture_encoders(model, images, autocast(args, cache_enabled=False))
        except torch.OutOfMemoryError:
            cli.fail(
                "too little GPU memory for CUDA graphs, which keep their own; lower --batch-size "
                "or --image-size, or add --no-cuda-graphs",
                1,
            )
        except RuntimeError as error:  # a network that copies to the host in its pass, for example
            reason = str(error).partition("\n")[0]
            advice = "add --no-cuda-graphs"
            if args.compile:  # it is compiled in its first pass, which is here
                advice = "leave out --compile, or add --no-cuda-graphs"
            cli.fail(f"{args.arch} cannot run as CUDA graphs ({reason}); {advice}", 1)


# -- arguments -------------------------------------------------------------------------------------
def fill_in_defaults(args, datasets, world, device):
    """`args` with every default filled in. A flag always wins."""
    n = len(datasets.train)
    defaults = recipes.default_settings(
        n, datasets.image_size, args.optim, args.epochs, world, args.batch_size
    )
    defaults |= datasets.augmentation
    defaults["num_cluster"] = default_num_cluster(n)
    if args.arch is not None and is_timm(args.arch):  # it has a stem and norms of its own
        defaults["stem"] = "imagenet"
        defaults["bn_splits"] = 1
    defaults["cuda_graphs"] = device == "cuda" and world == 1
    defaults["workers"] = distributed.default_workers()

    given = {name: value for name, value in vars(args).items() if value is not None}
    final = {**vars(args), **defaults, **given}
    final["image_size"] = datasets.image_size
    final["device"] = device
    if args.amp_dtype == "auto":
        has_bf16 = device == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
        final["amp_dtype"] = "bf16" if has_bf16 else "fp16"
    return argparse.Namespace(**final)


def check(args, n, world):
    """End the program in one line if the arguments contradict each other or `n` images."""
    if args.batch_size > n:
        cli.fail(
            f"{n} training images are fewer than one batch of {args.batch_size}; lower --batch-size"
        )
    if args.batch_size % world:
        cli.fail(f"--batch-size {args.batch_size} is not a multiple of the {world} processes")
    of_timm = {"--stem": (args.stem, "imagenet"), "--bn-splits": (args.bn_splits, 1)}
    for flag, (value, neutral) in of_timm.items():
        if value != neutral and is_timm(args.arch):
            cli.fail(
                f"{flag} {value} is for resnet18 and the like, not for {args.arch} of timm; give "
                f"{flag} {neutral}, or leave it out"
            )
    local_batch = args.batch_size // world
    if local_batch % args.bn_splits or local_batch < 2 * args.bn_splits:
        cli.fail(
            f"{local_batch} images per process do not split into {args.bn_splits} equal groups of "
            "2 or more; change --batch-size or --bn-splits"
        )
    for flag, value in (("--cuda-graphs", args.cuda_graphs), ("--compile", args.compile)):
        if value and (args.device != "cuda" or world > 1):
            cli.fail(f"{flag} is for one process on a GPU; leave it out, or give --no-{flag[2:]}")
    most = max(args.num_cluster)
    if most > n:
        cli.fail(f"{most} clusters are more than the {n} training images; lower --num-cluster")
    check_memory(args, local_batch)


def check_memory(args, local_batch):
    """End the program in one line if `args` ask for more memory than there is.

    Only the largest tensors count, so a run that passes may still need too much.
    """
    num_weights = 0
    try:
        with torch.device("meta"):  # shapes without memory
            encoder = build_encoder(args.arch, args.low_dim, image_size=args.image_size)
        num_weights = sum(parameter.numel() for parameter in encoder.parameters())
    except ValueError as error:
        cli.fail(error)
    except RuntimeError:  # a network of the reader's own that has to look at its weights
        pass
    numbers = {
        "--arch": 4 * num_weights,  # two encoders, gradients and momentum
        "--pcl-r and --low-dim": args.pcl_r * args.low_dim,  # the queue
        "--pcl-r and --batch-size": args.pcl_r * local_batch,  # the logits of InfoNCE
        # the views, and at least as much again for each of the first layers
        "--image-size and --batch-size": 8 * 2 * local_batch * 3 * args.image_size**2,
    }
    distributed.check_memory(numbers, args.device)


def get_parser():
    """The parser of all flags. A default of None follows from the data (recipes.py)."""
    parser = cli.Parser(__doc__, epilog=recipes.recipes_as_text())
    add_data_arguments(parser.add_argument_group("data and augmentation").add_argument)
    add_model_arguments(parser.add_argument_group("model, losses and clustering").add_argument)
    add_optimization_arguments(parser.add_argument_group("optimization").add_argument)
    add_run_arguments(parser.add_argument_group("run").add_argument)
    return parser


def add_data_arguments(add):
    switch = argparse.BooleanOptionalAction
    add(
        "data",
        nargs="?",
        help="a folder of images, with or without train/ and val/ or test/; or cifar10, "
        "cifar100, stl10, which are downloaded; default: the handwritten digits in assets/",
    )
    add(
        "--image-size",
        type=cli.image_side,
        help="side of a view in pixels; default: the images' own size, at most 224",
    )
    add(
        "--aug-plus",
        action=switch,
        default=True,
        help="the augmentation of MoCo v2; --no-aug-plus gives MoCo v1's, with a stronger hue "
        "change and no blur",
    )
    add(
        "--crop-min",
        type=cli.fraction,
        help="smallest area of a random crop, as a fraction of the image; smaller crops make the "
        "task harder; default: 0.2, digits 0.5",
    )
    add(
        "--color-jitter",
        action=switch,
        default=True,
        help="change brightness, contrast, saturation and hue at random; without it the losses "
        "fall faster and the features are worse",
    )
    add("--grayscale", action=switch, default=True, help="drop the colour of a fifth of the views")
    add(
        "--blur",
        action=switch,
        help="blur half of the views, which would wipe out the detail of small images; default: "
        "only above 64 pixels",
    )
    add(
        "--flip",
        action=switch,
        help="mirror half of the views; turn it off if left and right matter; default: on, except "
        "for digits",
    )
    add(
        "--skip-broken",
        action="store_true",
        help="leave out images that cannot be read, up to 1 %% of them, and list them in "
        "broken.txt; in training, another image stands in for each; default: a broken image ends "
        "the run",
    )
    add(
        "-j",
        "--workers",
        type=cli.num_workers,
        help="processes per rank that load images, unless all images fit in memory; default: the "
        "cores per rank, at most 8",
    )


def add_model_arguments(add):
    switch = argparse.BooleanOptionalAction
    add(
        "-a",
        "--arch",
        help="resnet18, resnet34, resnet50, resnet101 or resnet152; resnet18_w16 has 16 channels "
        "in its first stage, not 64; or any network of timm, such as convnext_nano or "
        "vit_tiny_patch16_224, made for --image-size; for ViTs, try --optim adamw with a long "
        "--lr-warmup; default: by image size",
    )
    add(
        "--init",
        type=cli.path,
        metavar="FILE",
        help="start from the weights in FILE: a run's checkpoint, or ResNet weights of any "
        "project; useful if you have few images; default: random weights",
    )
    add(
        "--stem",
        choices=("small", "imagenet"),
        help="small: a 3x3 first convolution of stride 1 and no max-pool, to keep the detail of "
        "small images; imagenet: torchvision's; for resnet18 and the like; default: small up to "
        "64 pixels",
    )
    add(
        "--low-dim",
        type=cli.bounded(int, 1, 10_000),
        default=128,
        help="dimension of the features that the losses compare",
    )
    add(
        "--mlp",
        action=switch,
        default=True,
        help="projection heads with a hidden layer, as in MoCo v2; --no-mlp gives MoCo v1's",
    )
    add(
        "--cluster-head",
        choices=("none", "report"),
        default="none",
        help="none: as in PCL; report: one more layer on the keys, head b of "
        "results/README.md, used after the warm-up, which has to be long",
    )
    add(
        "--symmetric",
        action=switch,
        default=False,
        help="use each view as the query once: twice the work per step, and about the gain of "
        "twice the epochs",
    )
    add(
        "--moco-m",
        type=cli.bounded(float, 0, 1),
        help="momentum of the key encoder; higher values keep the keys in the queue consistent, "
        "lower ones let the key encoder follow faster; default: by recipe",
    )
    add(
        "--bn-splits",
        type=cli.positive_int,
        help="groups per process with their own batch-norm statistics; more groups hide better "
        "which key belongs to a query; not for networks of timm; default: by recipe",
    )
    add(
        "--pcl-r",
        type=cli.positive_int,
        help="queue length, and negative prototypes per granularity; a long queue of a small data "
        "set holds every image several times; default: by data, at most 16384",
    )
    add(
        "--temperature",
        type=cli.bounded(float, 0.001, 1000),  # it divides cosines, which lie between -1 and 1
        help="temperature of InfoNCE, and mean concentration of the prototypes; lower values weigh "
        "the hardest negatives more; default: by recipe",
    )
    add(
        "--num-cluster",
        type=cli.int_list,
        help="numbers of clusters, comma-separated, one per granularity; default: by data, "
        "25000,50000,100000 for ImageNet",
    )
    add(
        "--features",
        choices=("keys", "pass"),
        default="keys",
        help="what is clustered. keys: the keys of the epoch just trained, of random views; pass: "
        "the features of the plain images, as published, for which all pass through the encoder",
    )
    add(
        "--warmup",
        "--warmup-epoch",
        type=cli.nonnegative_int,
        default=20,
        help="epochs of InfoNCE alone at the start; prototypes of untrained features mislead",
    )


def add_optimization_arguments(add):
    add(
        "--epochs",
        type=cli.positive_int,
        default=200,
        help="number of epochs, including the warm-up",
    )
    add(
        "-b",
        "--batch-size",
        type=cli.positive_int,
        help="images per step over all processes; default: by recipe, smaller for little data",
    )
    add(
        "--optim",
        choices=recipes.OPTIMIZERS,
        default="sgd",
        help="sgd as published; lamb and lars, which are timm's, adapt the rate per layer",
    )
    add(
        "--lr",
        "--learning-rate",
        type=cli.bounded(float, 0, 1000, above_low=True),
        help="peak learning rate; default: by recipe and optimizer, proportional to the batch size",
    )
    add(
        "--lr-warmup",
        type=cli.nonnegative_int,
        help="epochs of linear increase to --lr; with many small images they help at large rates; "
        "default: a twentieth of --epochs, but 0 for sgd with large images or few small ones",
    )
    add(
        "--cos",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="let the learning rate follow a cosine down to 0, instead of --schedule",
    )
    add(
        "--schedule",
        type=cli.nonnegative_int,
        nargs="*",
        help="epochs at which the learning rate drops by a factor of 10; default: at 60 and 80 %% "
        "of --epochs",
    )
    add("--momentum", type=cli.bounded(float, 0, 1), default=0.9, help="momentum of sgd and lars")
    add(
        "--wd",
        "--weight-decay",
        type=cli.bounded(float, 0, 1000),
        help="weight decay; default: by recipe and optimizer",
    )
    add(
        "--clip-grad",
        type=cli.positive_float,
        help="clip gradients to this norm, after unscaling; try 1 if the loss is unstable; "
        "default: no clipping",
    )
    add(
        "--amp",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="mixed precision: faster, and less memory",
    )
    add(
        "--amp-dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="auto: bf16 if the device has it, otherwise fp16 with a gradient scaler, for "
        "which the host waits in every step",
    )
    add(
        "--cuda-graphs",
        action=argparse.BooleanOptionalAction,
        help="replay each encoder's pass as one call; turn it off to profile a step or to step "
        "through it; default: on for one process on a GPU",
    )
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="compile the encoders: half a minute at the start, then faster steps; for one process "
        "on a GPU, because on a CPU it rounds the statistics of batch norm",
    )


def add_run_arguments(add):
    add(
        "--exp-dir",
        type=cli.path,
        metavar="DIR",
        help="directory for everything the run writes; default: the next free one of "
        "experiment_pcl, experiment_pcl_2, ...",
    )
    add(
        "--overwrite",
        action="store_true",
        help="remove the run in --exp-dir and start a new one",
    )
    add(
        "--config",
        type=cli.path,
        metavar="FILE",
        help="use the arguments in another run's args.json, including those that were worked out "
        "from its data, optimizer or epochs, such as --lr; flags win; default: none",
    )
    add(
        "--resume",
        nargs="?",
        const="",
        metavar="FILE",
        help="continue the run in --exp-dir, or from the checkpoint FILE, with its arguments; "
        "flags win; default: a new run",
    )
    add(
        "--seed",
        type=cli.nonnegative_int,
        default=0,
        help="random seed; on a CPU, the same seed and number of threads give the same weights",
    )
    add(
        "--knn-every",
        type=cli.positive_int,
        help="epochs between kNN accuracies; default: a twentieth of --epochs",
    )


# -- a run -----------------------------------------------------------------------------------------
def main(argv=None):
    """Train. Returns the figures of every epoch: a list of {column of log.csv: value}."""
    again = "the same command with --resume continues from the last checkpoint, if there is one"
    with cli.errors_in_one_line(DataError, again):
        return build_and_train(cli.parse_args(get_parser(), argv, find_stored_args))


def find_stored_args(args):
    """The arguments of the run that --resume continues, {name: value}. Flags win over them."""
    if args.resume is None:
        return {}
    return checkpoint.stored_args(choose_directory(args.exp_dir, args.resume), args.resume)


def build_and_train(args):
    """Everything from the parsed arguments to the log of the finished run."""
    device = distributed.init_distributed()
    _, world = get_rank_and_world()
    directory = distributed.broadcast_object(choose_directory(args.exp_dir, args.resume))
    args.exp_dir = str(directory)
    check_writable(directory)
    refuse_folder_of_data(args.data, directory)

    # data and arguments
    augmentation = {name: getattr(args, name) for name in AUGMENTATION}
    # the first rank before the others, so that they find its download
    with cli.phase("reading images"), distributed.main_process_first():
        datasets = build_datasets(
            args.data, args.image_size, args.seed, skip_broken=args.skip_broken, **augmentation
        )
    print_main(f"{args.data or 'digits'}: {datasets.describe()}; on {world} x {device}")
    for note in datasets.notes:
        print_main(f"note: {note}")
    distributed.refuse_other_images(datasets.sources, datasets.image_size)
    init = find_initial_weights(args)
    args = fill_in_defaults(args, datasets, world, device)
    refuse_other_arguments(args)
    check(args, len(datasets.train), world)
    with (
        cli.phase("reading images"),
        image_files.broken_images_listed(directory, datasets, DataError, is_held=False),
    ):
        datasets = load_into_memory(datasets, device, args.workers)

    # model, optimizer, and what a checkpoint holds besides
    torch.manual_seed(args.seed)
    torch.backends.cudnn.benchmark = True
    model = build_model(args, init)
    optimizer = build_optimizer(model, args)
    scaler = GradScaler(device, enabled=args.amp and args.amp_dtype == "fp16")
    run = checkpoint.Run(args, model, optimizer, scaler, data=datasets.fingerprint)

    with lock(directory), distributed.StopSignals() as stop:
        changes = checkpoint.resume(directory, run, datasets)
        if run.clusters is not None:
            run.clusters = [Clusters(*level).to(device) for level in run.clusters]
        if run.epoch >= args.epochs:
            return run.log
        write_args(directory, vars(args), run.epoch, run.step, changes)
        image_files.write_images_txt(directory, datasets)
        image_files.renew_list(directory, datasets, is_new=run.epoch == run.step == 0)
        announce(run, datasets)
        speed_up_encoders(model, args)
        first_epoch, start = run.epoch, time.time()
        known = datasets.num_broken()
        with image_files.broken_images_listed(directory, datasets, DataError, known):
            train(run, datasets, stop)
    conclude(run, len(run.log) - first_epoch, time.time() - start, datasets.has_labels)
    return run.log


def refuse_folder_of_data(data, directory):
    """End the program in one line if a run in `directory` would write among its own images.

    The next start would read the run's pictures as images. If the folder is that of a part or a
    class, it would leave out all images there. A directory with the name of a data set is refused
    as well, because a folder of that name is read in place of the data set.
    """
    if data in (None, "", "digits"):
        return
    with contextlib.suppress(ValueError):  # no file can have such a name
        folder = Path(data).resolve()
        place = directory.resolve()
        is_inside = folder in place.parents
        if place == folder or (is_inside and holds_foreign_files(place)):
            cli.fail(
                f"--exp-dir {directory} is also a folder of the data, whose images a run would mix "
                "with its pictures; choose another --exp-dir"
            )
        if is_inside and data in DOWNLOADS and not folder.is_dir():
            cli.fail(
                f"--exp-dir {directory} would make a folder {data}, which would be read in place "
                "of the data set; choose another --exp-dir"
            )


def refuse_other_arguments(args):
    """End the program in one line, on all ranks, if their arguments differ in what they compute."""
    facts = [f"{name} {value}" for name, value in vars(args).items() if name not in MAY_DIFFER]
    distributed.refuse_difference("other arguments", facts)


def find_initial_weights(args):
    """The weights in --init, or None. Sets --arch and --stem to theirs unless they are given.

    A run that --resume continues does not need them. One that torchrun restarts does: its command
    may not name --arch, so the file has to.
    """
    continues = args.resume is not None and checkpoint.find(Path(args.exp_dir), args.resume)
    if continues or not args.init:
        return None
    init = weights.find(checkpoint.read(args.init), args.init)
    if args.arch is None:
        args.arch = init.arch
    if args.stem is None and not is_timm(args.arch):
        args.stem = "small" if init.small_images else "imagenet"
    print_main(f"the encoder starts from {args.init}, {init.where}: {init.arch}")
    return init


def build_model(args, init):
    """The MoCo model on its device, its encoders starting from `init` if that is not None."""
    model = MoCo(
        functools.partial(
            build_encoder,
            args.arch,
            small_images=args.stem == "small",
            image_size=args.image_size,
        ),
        dim=args.low_dim,
        r=args.pcl_r,
        m=args.moco_m,
        mlp=args.mlp,
        cluster_head=args.cluster_head,
        bn_splits=args.bn_splits,
    )
    if init is not None:
        wanted = init._replace(arch=args.arch)
        advice = "; give --arch, --stem and --image-size as they were in training, or none of them"
        for encoder in (model.encoder_q, model.encoder_k):
            weights.load_backbone(encoder, wanted, args.init, advice)
    return model.to(args.device, memory_format=torch.channels_last)


def announce(run, datasets):
    """Say where the run goes, which settings follow from the data, and what to expect."""
    where = "read as needed" if datasets.train.pixels is None else "in memory"
    print_main(f"images {where}, in {run.args.exp_dir}")
    print_main(", ".join(f"{name} {getattr(run.args, name)}" for name in ANNOUNCED))
    if run.model.has_other_batch_norm():
        print_main(
            f"note: {run.args.arch} has batch norm of its own, which --bn-splits does not reach: "
            "with one process, its statistics may reveal which key belongs to which query"
        )
    n = len(datasets.train)
    settings = vars(run.args)
    for line in diagnose.expectations(n, datasets.labelled, settings, datasets.has_labels):
        print_main(line)


def conclude(run, epochs, seconds, has_labels):
    """Say what the run has reached, and which command comes next."""
    row = run.log[-1]
    knn = ""
    if row["knn"] is not None:
        start = name_of_start(run.args)
        knn = f", kNN accuracy {row['knn']:.1f} % ({start} {run.knn_untrained:.1f} %)"
    resumed = ""
    if epochs < len(run.log):
        resumed = f", the last {epochs} of them"
    print_main(
        f"reached loss {row['loss']:.3f}{knn} after {len(run.log)} epochs{resumed} "
        f"in {seconds / 60:.1f} minutes"
    )
    folder = "" if has_labels else "LABELLED_FOLDER "
    print_main(f"next: python eval_lincls.py {folder}--exp-dir {shlex.quote(run.args.exp_dir)}")


if __name__ == "__main__":
    main()
