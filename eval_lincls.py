"""What a checkpoint's features are worth: linear probe, kNN, and how well their clusters agree with the classes.

The backbone is frozen, its features are those after the average pooling; beside the trained network stand an untrained
one and the raw pixels. The linear probe has two protocols: `fast`, the best linear classifier on the features of the
plain images, and `moco`, the published one (arXiv 1911.05722, section 4.1).

    python eval_lincls.py                                         # the last checkpoint of the newest default run
    python eval_lincls.py --exp-dir runs/a runs/b runs/c          # of three runs: mean and standard deviation
    python eval_lincls.py path/to/imagenet --pretrained moco_v2_800ep_pretrain.pth.tar --protocol moco

Beside the checkpoint it leaves eval.json, with all figures, and map.png, a map of the held-out images.
"""

import argparse
import functools
import json
import statistics
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader

from augment import normalize
from cluster import default_num_cluster, run_kmeans
from data import DataError, EpochSampler, Images, build_datasets, identity_collate, linear_view
from features import extract_features
from metrics import agreement, default_k, draw_labels, knn_accuracy, linear_probe, logistic_regression, top_k
from model import backbone, build_encoder
from runtime import checkpoint, cli, distributed, pictures, weights
from runtime.distributed import get_rank_and_world, print_main

EPOCHS = 100  # of the published probe
DRAWS = 5  # of few labels
AGREEMENT = ("NMI", "AMI", "ARI", "acc")


def get_parser():
    parser, switch = cli.Parser(__doc__), argparse.BooleanOptionalAction
    protocol = "fast: logistic regression on stored features, to its optimum; moco: SGD on random crops, as published"
    labels = (
        "also probe with few labels: a part (0.01) or a number (1, 5) of each class, mean of five draws; default: all"
    )
    add = parser.add_argument
    add("data", nargs="?", help="folder, name or digits, as for main_pcl.py; default: what the run was trained on")
    add("--exp-dir", nargs="+", metavar="DIR", help="the run or runs to evaluate; default: the newest experiment_pcl")
    add("--pretrained", metavar="FILE", help="a ResNet's checkpoint, of any project; default: that of --exp-dir")
    add("--protocol", choices=("fast", "moco"), default="fast", help=protocol)
    add("--knn-k", type=cli.positive_int, nargs="+", metavar="K", help="neighbours; default: 200, less for little data")
    add("--labels", type=cli.positive_float, nargs="+", default=[], metavar="L", help=labels)
    add("--num-cluster", type=cli.int_list, help="comma-separated; default: as in training, and the number of classes")
    add("--export", metavar="FILE", help="write the backbone under torchvision's names; default: it is not written")
    add("-b", "--batch-size", type=cli.positive_int, default=256, help="of the published probe, and images at once")
    add("-j", "--workers", type=cli.nonnegative_int, default=0, help="processes that load images")
    add("--image-size", type=cli.positive_int, help="side of a view in pixels; default: as in training")
    add("--baselines", action=switch, default=True, help="the untrained network and raw pixels beside it")
    add("--seed", type=cli.nonnegative_int, default=0, help="of the probe, the clustering and the untrained network")
    return parser


def main(argv=None):
    """Evaluate checkpoints and print tables. Returns {row: {figure: percent}} of the last checkpoint."""
    args, tables = cli.parse_args(get_parser(), argv), []
    if args.pretrained and not args.data:
        cli.fail(f"name the data to evaluate {args.pretrained} on: python eval_lincls.py DATA --pretrained FILE")
    if len(args.exp_dir or ()) + bool(args.pretrained) > 1 and (args.pretrained or args.export):
        cli.fail("--pretrained and --export are of one checkpoint: name no other --exp-dir")
    device = distributed.init_distributed()
    with cli.errors_in_one_line(DataError):
        for directory in args.exp_dir or [None]:
            path = args.pretrained or checkpoint.choose_directory(directory, resume="") / "checkpoint.pth.tar"
            tables.append(evaluate(Path(path), args, device))
    if len(tables) > 1 and get_rank_and_world()[0] == 0:
        print(f"\nmean and standard deviation of {len(tables)} runs")
        print_table({row: spread([table[row] for table in tables]) for row in tables[0]})
    return tables[-1]


def evaluate(path, args, device):
    """The table {row: {figure: percent}} of the checkpoint at `path`, printed and left beside it."""
    encoder, datasets, args, about = prepare(path, args)
    networks, table = {"trained": backbone(encoder)}, {}
    if args.baselines:
        networks["untrained"] = backbone(build_encoder(about["arch"], small_images=encoder.conv1.kernel_size == (3, 3)))
        networks["raw pixels"] = nn.Sequential(nn.AdaptiveAvgPool2d(min(datasets.image_size, 32)), nn.Flatten(1))
    beside = f"{path}." if args.pretrained else f"{path.parent}/"
    for name, network in networks.items():
        train = extract_all(network.to(device).eval(), datasets.plain, args, device)
        val = None if datasets.val is None else extract_all(network, datasets.val, args, device)
        scores = None
        if args.protocol == "moco" and name == "trained" and datasets.labelled:
            key = [path.stat().st_mtime_ns, datasets.fingerprint, datasets.image_size, args.batch_size, args.seed]
            scores = published_probe(network, val, datasets, args, device, Path(f"{beside}probe.pth.tar"), key)
        if get_rank_and_world()[0] > 0:
            continue
        table[name] = probes(train, val, datasets, scores, args) if datasets.labelled else {}
        levels = run_kmeans(F.normalize(train, dim=1).cpu().numpy(), args.num_cluster, 0.2, args.seed)
        table[name] |= agreements(levels, val, datasets)
        if name == "trained" and val is not None:
            of_map = val, datasets.val.labels, datasets.classes, levels[-1].centroids
    if get_rank_and_world()[0] == 0:
        report = json.dumps(about | checkpoint.ran_on(device) | {"figures": table}, indent=2)
        checkpoint.write_atomically(Path(f"{beside}eval.json"), report.encode())
        print_table(table)
        if datasets.val is not None:
            pictures.draw_map(Path(f"{beside}map.png"), *of_map)
        if args.export:
            small = encoder.conv1.kernel_size == (3, 3)
            print(f"to load {args.export}: {weights.export(args.export, encoder, about['arch'], small)}")
    return table


def prepare(path, args):
    """(encoder with the checkpoint's weights, Datasets, arguments filled in, dict of what is evaluated); a header.
    Ends the program in one line where something is missing or does not fit."""
    if not path.exists():
        cli.fail(f"there is no {path}; train first with python main_pcl.py, or name a file with --pretrained")
    loaded = checkpoint.read(path)
    found = weights.find_resnet(loaded, path)
    stored = loaded.get("args") if "run" in loaded and isinstance(loaded.get("args"), dict) else {}
    name = args.data or stored.get("data") or "digits"
    datasets = build_datasets(name, args.image_size or stored.get("image_size"), flip=stored.get("flip"))
    n, epoch = len(datasets.train), loaded.get("epoch")
    if not any((images.labels >= 0).any() for images in (datasets.plain, datasets.val) if images is not None):
        cli.fail(f"{name} has no labels to evaluate with; name a labelled folder: eval_lincls.py DATA --exp-dir DIR")
    if args.num_cluster and max(args.num_cluster) > n:
        cli.fail(f"{max(args.num_cluster)} clusters are more than the {n} training images; lower --num-cluster")
    num_cluster = args.num_cluster or stored.get("num_cluster") or default_num_cluster(n)
    num_cluster = num_cluster if max(num_cluster) <= n else default_num_cluster(n)  # a run's, on larger data
    filled_in = {"knn_k": [min(k, n) for k in args.knn_k or [default_k(n)]]}
    filled_in["num_cluster"] = sorted({*num_cluster, min(n, max(2, len(datasets.classes)))}, reverse=True)
    print_main(f"{path}, {found.where}: {found.arch}" + (f", {epoch} epochs" if isinstance(epoch, int) else ""))
    print_main(f"on {name}: {datasets.describe()}; kNN of {', '.join(map(str, filled_in['knn_k']))}")

    torch.manual_seed(args.seed)
    try:
        encoder = build_encoder(found.arch, small_images=found.small_images)
    except ValueError as error:
        cli.fail(f"{path}: {error}")
    weights.load_backbone(encoder, found, path)
    about = {"checkpoint": str(path), "epoch": epoch, "arch": found.arch, "data": name, "size": datasets.image_size}
    about |= {"protocol": args.protocol, "seed": args.seed}
    return encoder, datasets, argparse.Namespace(**vars(args) | filled_in), about


def extract_all(network, images, args, device):
    """The features (n, D) of all `images`, on `device`; every process computes a share."""
    rank, world = get_rank_and_world()
    options = {"collate_fn": identity_collate, "num_workers": args.workers}
    loader = DataLoader(images, args.batch_size, sampler=range(rank, len(images), world), **options)
    features, _ = extract_features(loader, lambda x: network(normalize(x)), device)
    if not features.isfinite().all():
        raise DataError("the network's features of these images are not finite")
    return features.to(device)


def probes(train, val, datasets, scores, args):
    """Figures of the linear probe, by `scores` (n, classes) of the held-out images where they are given, and of kNN.
    train (M, D), val (n, D): features; images without a label are left out."""
    num_classes = len(datasets.classes)
    labels, val_labels = datasets.plain.labels.to(train.device), datasets.val.labels.to(train.device)
    known, judged = labels >= 0, val_labels >= 0
    train, labels, val, val_labels = train[known], labels[known], val[judged], val_labels[judged]
    figures, fast = {}, functools.partial(logistic_regression, queries=val, num_classes=num_classes, seed=args.seed)
    if scores is not None or args.protocol == "fast":
        scores = fast(train, labels) if scores is None else scores[judged]
        figures["linear"] = top_k(scores, val_labels, 1)
        if num_classes > 5:
            figures["top-5"] = top_k(scores, val_labels, 5)
    for amount in args.labels:
        name = f"linear, {amount:.3g} of labels" if amount < 1 else f"linear, {int(amount)} per class"
        some = [draw_labels(labels, amount, args.seed + i) for i in range(DRAWS)]
        draws = [top_k(fast(train[index], labels[index]), val_labels, 1) for index in some]
        figures |= {name: statistics.mean(draws), f"{name}, std": statistics.stdev(draws)}
    return figures | {f"kNN {k}": knn_accuracy(train, labels, val, val_labels, k) for k in args.knn_k}


def published_probe(network, val, datasets, args, device, file, key):
    """Scores (n, classes) of the features `val` by the published probe, trained on random crops of the training images.
    file: where it stands after each epoch, to go on from where it was begun with the same `key`."""
    rank, world = get_rank_and_world()
    view, known = linear_view(datasets.image_size, datasets.augmentation["flip"]), datasets.plain.labels >= 0
    images, known = Images(datasets.plain.source, view, args.seed), known.nonzero()[:, 0]
    batch_size = min(args.batch_size, len(known)) // world * world
    sampler = EpochSampler(len(known), batch_size, args.seed, rank, world)
    options = {"collate_fn": identity_collate, "num_workers": args.workers}

    def batches(epoch):
        sampler.set_epoch(epoch)
        images.set_epoch(epoch)
        loader = DataLoader(images, batch_size // world, sampler=known[list(sampler)].tolist(), **options)
        for views, index in cli.Progress(loader, desc=f"probe, epoch {epoch} of {EPOCHS}", disable=rank > 0):
            with torch.no_grad():
                features = network(normalize(views.to(device)))
            yield features, images.labels[index].to(device)

    def save(state):
        if rank == 0:
            checkpoint.save_tensors(file, state | {"key": key})

    state = distributed.broadcast_object(checkpoint.read(file) if rank == 0 and file.exists() else None)
    state = state if state is not None and state.get("key") == key else None
    torch.manual_seed(args.seed)
    return linear_probe(batches, val, len(datasets.classes), epochs=EPOCHS, state=state, save=save)


def agreements(levels, val, datasets):
    """How well the Clusters in `levels`, of the training images, agree with their classes and, each held-out image in
    the cluster of the nearest prototype, with those of the held-out images (`val`: their features, or None)."""
    figures = {}
    for clusters in levels:
        parts = {"": (clusters.im2cluster, datasets.plain.labels)}
        if val is not None:
            nearest = (F.normalize(val, dim=1).cpu() @ clusters.centroids.T).argmax(1)
            parts[" held out"] = nearest, datasets.val.labels
        for part, (numbers, labels) in parts.items():
            if (labels >= 0).any():
                found = agreement(numbers[labels >= 0], labels[labels >= 0])
                figures |= {f"{name} {len(clusters.centroids)}{part}": value for name, value in found.items()}
    return figures


def spread(rows):
    """{figure: "mean ± standard deviation"} of the same row of several tables."""
    figures = {name: [row[name] for row in rows if name in row] for name in rows[0]}
    return {name: f"{statistics.mean(x):.1f} ± {statistics.stdev(x):.1f}" for name, x in figures.items() if len(x) > 1}


def print_table(table):
    """Print {row: {figure: number or text}}: a line a figure, then a line for each row's numbers of clusters."""
    table = {row: {k: v if isinstance(v, str) else f"{v:.1f}" for k, v in x.items()} for row, x in table.items()}
    figures = dict.fromkeys(name for row in table.values() for name in row if not name.startswith(AGREEMENT))
    if figures:
        print("in percent".ljust(28) + "".join(f"{row:>14}" for row in table))
    for name in figures:
        print(name.ljust(28) + "".join(f"{row.get(name, ''):>14}" for row in table.values()))
    print("clusters".ljust(17) + "".join(f"{name:>11}" for name in AGREEMENT * 2))
    for row, cells in table.items():
        for k in dict.fromkeys(name.split()[1] for name in cells if name.startswith("NMI")):
            found = [cells.get(f"{name} {k}{part}", "") for part in ("", " held out") for name in AGREEMENT]
            print(f"{row}, {k}".ljust(17) + "".join(f"{cell:>11}" for cell in found))


if __name__ == "__main__":
    main()
