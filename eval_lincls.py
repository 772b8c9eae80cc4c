"""What the features of a checkpoint are worth: linear probe, kNN, and clusters against classes.

The backbone is frozen. Its features are the average-pooled ones, before the projection head. Beside
the trained network stand an untrained one and the raw pixels. The linear probe has two protocols:
`fast`, the best linear classifier on the features of the plain images, and `moco`, the published
one (arXiv 1911.05722, section 4.1).

    # the latest checkpoint of the newest default run; three runs: mean and standard deviation
    python eval_lincls.py
    python eval_lincls.py --exp-dir runs/a runs/b runs/c

    # another project's checkpoint
    python eval_lincls.py path/to/imagenet --pretrained moco_v2_800ep_pretrain.pth.tar \\
        --protocol moco

Beside the checkpoint it leaves eval.json with all figures, and map.png, a map of the held-out
images.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader

from augment import normalize
from cluster import default_num_cluster, run_kmeans
from data import (
    DataError,
    EpochSampler,
    Images,
    build_datasets,
    identity_collate,
    linear_view,
)
from features import extract_features
from metrics import (
    agreement,
    default_k,
    draw_labels,
    knn_accuracy,
    linear_probe,
    logistic_regression,
    top_k,
)
from model import backbone, build_encoder
from runtime import checkpoint, cli, distributed, report, weights
from runtime.directory import choose_directory, ran_on, write_atomically
from runtime.distributed import get_rank_and_world, print_main

EPOCHS = 100  # of the published probe
DRAWS = 5  # random choices of few labels
RAW_SIDE = 32  # pixels; the raw-pixel baseline shrinks larger images to this side
TEMPERATURE = 0.2  # mean concentration of the clusters; it does not change them
AGREEMENT = ("NMI", "AMI", "ARI", "acc")


def get_parser():
    """The parser of all flags."""
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add(
        "data",
        nargs="?",
        help="folder or name, as for main_pcl.py; default: the data that the run was trained on",
    )
    add(
        "--exp-dir",
        nargs="+",
        metavar="DIR",
        help="one or more runs to evaluate; default: the newest experiment_pcl",
    )
    add(
        "--pretrained",
        metavar="FILE",
        help="evaluate a ResNet's checkpoint of any project; default: the checkpoint in --exp-dir",
    )
    add(
        "--protocol",
        choices=("fast", "moco"),
        default="fast",
        help="linear probe. fast: logistic regression on stored features, to its optimum; moco: "
        "SGD on random crops for 100 epochs, as published, for a row beside published ones",
    )
    add(
        "--knn-k",
        type=cli.positive_int,
        nargs="+",
        metavar="K",
        help="numbers of neighbours in the kNN vote; default: 200, fewer for little data",
    )
    add(
        "--labels",
        type=cli.positive_float,
        nargs="+",
        default=[],
        metavar="L",
        help="also probe with few labels: a fraction of each class (0.01) or a number (1, 5), mean "
        "of five draws; default: all labels only",
    )
    add(
        "--num-cluster",
        type=cli.int_list,
        help="numbers of clusters, comma-separated; default: as in training, and the number of "
        "classes",
    )
    add(
        "--export",
        metavar="FILE",
        help="write the backbone under torchvision's names, for other code; default: not written",
    )
    add(
        "-b",
        "--batch-size",
        type=cli.positive_int,
        default=256,
        help="images per step of the published probe, and per forward pass",
    )
    add(
        "-j",
        "--workers",
        type=cli.nonnegative_int,
        default=0,
        help="processes that load images; raise it for large images",
    )
    add(
        "--image-size",
        type=cli.positive_int,
        help="side of a view in pixels; default: as in training",
    )
    add(
        "--baselines",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also evaluate an untrained network and raw pixels; --no-baselines is three times as "
        "fast",
    )
    add(
        "--seed",
        type=cli.nonnegative_int,
        default=0,
        help="of the probes, the clustering and the untrained network",
    )
    return parser


def main(argv=None):
    """Evaluate checkpoints and print their tables.

    Returns {row: {figure: percent}} of the last checkpoint.
    """
    args = cli.parse_args(get_parser(), argv)
    if args.pretrained and not args.data:
        cli.fail(
            f"name the data to evaluate {args.pretrained} on: "
            "python eval_lincls.py DATA --pretrained FILE"
        )
    if args.pretrained and args.exp_dir:
        cli.fail("--pretrained and --exp-dir name two checkpoints; choose one")
    if args.export and len(args.exp_dir or ()) > 1:
        cli.fail("--export writes one backbone; name one --exp-dir")

    device = distributed.init_distributed()
    tables = []
    with cli.errors_in_one_line(DataError):
        for directory in args.exp_dir or [None]:
            path = args.pretrained
            if path is None:
                path = choose_directory(directory, resume="") / "checkpoint.pth.tar"
            tables.append(evaluate(Path(path), args, device))
    if len(tables) > 1 and get_rank_and_world()[0] == 0:
        print(f"\nmean and standard deviation of {len(tables)} runs")
        print_table({row: spread([table[row] for table in tables]) for row in tables[0]})
    return tables[-1]


def evaluate(path, args, device):
    """The table {row: {figure: percent}} of the checkpoint at `path`, printed and written."""
    encoder, datasets, args, about = prepare(path, args)
    rank, _ = get_rank_and_world()
    beside = f"{path}." if args.pretrained else f"{path.parent}/"
    table = {}
    for name, network in build_networks(encoder, datasets, args, about).items():
        # features, and with --protocol moco the scores of the published probe
        network = network.to(device).eval()
        train = extract_all(network, datasets.plain, args, device)
        val = None
        if datasets.val is not None:
            val = extract_all(network, datasets.val, args, device)
        scores = None
        if args.protocol == "moco" and name == "trained" and datasets.labelled:
            file = Path(f"{beside}probe.pth.tar")
            key = [path.stat().st_mtime_ns, datasets.fingerprint, datasets.image_size]
            store = ProbeStore(file, [*key, args.batch_size, args.seed])
            scores = published_probe(network, val, datasets, store, args)
        if rank > 0:
            continue

        # the row's figures
        table[name] = {}
        if datasets.labelled:
            table[name] |= probes(train, val, datasets, scores, args)
        unit_features = F.normalize(train, dim=1).cpu().numpy()
        levels = run_kmeans(unit_features, args.num_cluster, TEMPERATURE, args.seed)
        table[name] |= agreements(levels, val, datasets)
        if name == "trained":
            trained_val = val
            prototypes = levels[-1].centroids

    if rank == 0:
        figures = {**about, **ran_on(device), "figures": table}
        write_atomically(Path(f"{beside}eval.json"), json.dumps(figures, indent=2).encode())
        print_table(table)
        if datasets.val is not None:
            file = Path(f"{beside}map.png")
            labels = datasets.val.labels
            report.draw_map(file, trained_val, labels, datasets.classes, prototypes)
        if args.export:
            load = weights.export(args.export, encoder, about["arch"], about["small_images"])
            print(f"to load {args.export}: {load}")
    return table


def prepare(path, args):
    """Read the checkpoint and the data, and print a header.

    Returns the encoder with the checkpoint's weights, the Datasets, the arguments with every
    default filled in, and a dict that says what is evaluated. Ends the program in one line if
    something is missing or does not fit.
    """
    if not path.exists():
        cli.fail(
            f"there is no {path}; train first with python main_pcl.py, or name a file with "
            "--pretrained"
        )
    loaded = checkpoint.read(path)
    found = weights.find_own(loaded) or weights.find_resnet(loaded, path)
    stored = {}  # the arguments of one of our runs
    if "run" in loaded and isinstance(loaded.get("args"), dict):
        stored = loaded["args"]

    # data
    name = args.data or stored.get("data") or "digits"
    image_size = args.image_size or stored.get("image_size")
    datasets = build_datasets(name, image_size, flip=stored.get("flip"))
    parts = [images for images in (datasets.plain, datasets.val) if images is not None]
    if not any((images.labels >= 0).any() for images in parts):
        cli.fail(
            f"{name} has no labels to evaluate with; name a labelled folder: "
            "eval_lincls.py DATA --exp-dir DIR"
        )

    # defaults
    n = len(datasets.train)
    args = argparse.Namespace(**vars(args))
    args.num_cluster = choose_num_cluster(args.num_cluster, stored.get("num_cluster"), datasets)
    args.knn_k = [min(k, n) for k in args.knn_k or [default_k(n)]]
    epoch = loaded.get("epoch")
    epochs = f", {epoch} epochs" if isinstance(epoch, int) else ""
    print_main(f"{path}, {found.where}: {found.arch}{epochs}")
    neighbours = ", ".join(map(str, args.knn_k))
    print_main(f"on {name}: {datasets.describe()}; kNN of {neighbours}")

    # network
    torch.manual_seed(args.seed)
    try:
        encoder = build_encoder(found.arch, small_images=found.small_images)
    except ValueError as error:
        cli.fail(f"{path}: {error}")
    weights.load_backbone(encoder, found, path)
    about = {
        "checkpoint": str(path),
        "epoch": epoch,
        "arch": found.arch,
        "small_images": found.small_images,
        "data": name,
        "size": datasets.image_size,
        "protocol": args.protocol,
        "seed": args.seed,
    }
    return encoder, datasets, args, about


def choose_num_cluster(given, stored, datasets):
    """The numbers of clusters, in descending order, with the number of classes among them.

    given: --num-cluster or None; too large a number ends the program in one line.
    stored: the run's own or None; they are replaced if this data set is too small for them.
    """
    n = len(datasets.train)
    if given and max(given) > n:
        cli.fail(
            f"{max(given)} clusters are more than the {n} training images; lower --num-cluster"
        )
    num_cluster = given or stored or default_num_cluster(n)
    if max(num_cluster) > n:
        num_cluster = default_num_cluster(n)
    classes = min(n, max(2, len(datasets.classes)))
    return sorted({*num_cluster, classes}, reverse=True)


def build_networks(encoder, datasets, args, about):
    """The networks to compare, {row: module images -> features}: the trained one and baselines."""
    networks = {"trained": backbone(encoder)}
    if args.baselines:
        untrained = build_encoder(about["arch"], small_images=about["small_images"])
        networks["untrained"] = backbone(untrained)
        side = min(datasets.image_size, RAW_SIDE)
        networks["raw pixels"] = nn.Sequential(nn.AdaptiveAvgPool2d(side), nn.Flatten(1))
    return networks


def extract_all(network, images, args, device):
    """The features (n, D) of all `images`, on `device`. Every process computes a share."""
    rank, world = get_rank_and_world()
    loader = DataLoader(
        images,
        args.batch_size,
        sampler=range(rank, len(images), world),
        collate_fn=identity_collate,
        num_workers=args.workers,
    )
    features, _ = extract_features(loader, lambda x: network(normalize(x)), device)
    if not features.isfinite().all():
        raise DataError("the network's features of these images are not finite")
    return features.to(device)


def probes(train, val, datasets, scores, args):
    """Figures of the linear probe and of kNN, {figure: percent}. Unlabelled images are left out.

    train: (M, D) features. val: (n, D) features. scores: (n, classes) of the held-out images by the
    published probe, or None.
    """
    device = train.device
    num_classes = len(datasets.classes)
    labels = datasets.plain.labels.to(device)
    val_labels = datasets.val.labels.to(device)
    known = labels >= 0
    judged = val_labels >= 0
    train, labels = train[known], labels[known]
    val, val_labels = val[judged], val_labels[judged]

    def fast(features, labels):
        return logistic_regression(features, labels, val, num_classes, seed=args.seed)

    # all labels
    figures = {}
    if scores is not None:
        scores = scores[judged]
    elif args.protocol == "fast":
        scores = fast(train, labels)
    if scores is not None:
        figures["linear"] = top_k(scores, val_labels, 1)
        if num_classes > 5:
            figures["top-5"] = top_k(scores, val_labels, 5)

    # few labels
    for amount in args.labels:
        name = f"linear, {int(amount)} per class"
        if amount < 1:
            name = f"linear, {amount:.3g} of labels"
        draws = []
        for i in range(DRAWS):
            index = draw_labels(labels, amount, args.seed + i)
            draws.append(top_k(fast(train[index], labels[index]), val_labels, 1))
        figures[name] = statistics.mean(draws)
        figures[f"{name}, std"] = statistics.stdev(draws)

    for k in args.knn_k:
        figures[f"kNN {k}"] = knn_accuracy(train, labels, val, val_labels, k)
    return figures


class ProbeStore:
    """The state of a published probe in a file, so that it continues after an interruption.

    key: what the probe depends on. A state with another key is not used.
    """

    def __init__(self, path, key):
        self.path = path
        self.key = key

    def load(self):
        """The state to continue from on every rank, or None."""
        state = None
        if get_rank_and_world()[0] == 0 and self.path.exists():
            state = checkpoint.read(self.path)
        state = distributed.broadcast_object(state)
        if state is None or state.get("key") != self.key:
            return None
        return state

    def save(self, state):
        """Write `state`, on the first rank."""
        if get_rank_and_world()[0] == 0:
            checkpoint.save_tensors(self.path, {**state, "key": self.key})


def published_probe(network, val, datasets, store, args):
    """Scores (n, classes) of the features `val` (n, D) by the published linear probe.

    It trains on random crops of the labelled training images. store: a ProbeStore.
    """
    rank, world = get_rank_and_world()
    view = linear_view(datasets.image_size, datasets.augmentation["flip"])
    images = Images(datasets.plain.source, view, args.seed)
    labelled = (datasets.plain.labels >= 0).nonzero()[:, 0]
    batch_size = min(args.batch_size, len(labelled)) // world * world
    sampler = EpochSampler(len(labelled), batch_size, args.seed, rank, world)

    def batches(epoch):
        sampler.set_epoch(epoch)
        images.set_epoch(epoch)
        loader = DataLoader(
            images,
            batch_size // world,
            sampler=labelled[list(sampler)].tolist(),
            collate_fn=identity_collate,
            num_workers=args.workers,
        )
        bar = cli.Progress(loader, desc=f"probe, epoch {epoch} of {EPOCHS}", disable=rank > 0)
        for views, index in bar:
            with torch.no_grad():
                features = network(normalize(views.to(val.device)))
            yield features, images.labels[index].to(val.device)

    torch.manual_seed(args.seed)
    return linear_probe(batches, val, len(datasets.classes), epochs=EPOCHS, store=store)


def agreements(levels, val, datasets):
    """How well clusters agree with the classes, {figure: percent}.

    levels: one Clusters of the training images per granularity. val: features (n, D) of the
    held-out images, or None; each belongs to the cluster of the nearest prototype.
    """
    figures = {}
    for clusters in levels:
        k = len(clusters.centroids)
        parts = [("", clusters.im2cluster, datasets.plain.labels)]
        if val is not None:
            nearest = (F.normalize(val, dim=1).cpu() @ clusters.centroids.T).argmax(1)
            parts.append((" held out", nearest, datasets.val.labels))
        for part, im2cluster, labels in parts:
            labelled = labels >= 0
            if labelled.any():
                found = agreement(im2cluster[labelled], labels[labelled])
                for name, value in found.items():
                    figures[f"{name} {k}{part}"] = value
    return figures


# -- tables ----------------------------------------------------------------------------------------
def spread(rows):
    """{figure: "mean ± standard deviation"} over the same row of several tables."""
    figures = {}
    for name in rows[0]:
        values = [row[name] for row in rows if name in row]
        if len(values) > 1:
            figures[name] = f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"
    return figures


def print_table(table):
    """Print {row: {figure: number or text}}: the rows as columns, then the clusters of each row."""
    cells = {}
    for row, figures in table.items():
        cells[row] = {
            name: value if isinstance(value, str) else f"{value:.1f}"
            for name, value in figures.items()
        }

    # linear probes and kNN
    names = {}  # a dict, because it keeps the order
    for figures in cells.values():
        names |= dict.fromkeys(name for name in figures if not name.startswith(AGREEMENT))
    if names:
        print("in percent".ljust(28) + "".join(f"{row:>14}" for row in cells))
    for name in names:
        line = "".join(f"{figures.get(name, ''):>14}" for figures in cells.values())
        print(name.ljust(28) + line)

    # clusters: training images, then held-out ones
    print("clusters".ljust(17) + "".join(f"{name:>11}" for name in AGREEMENT * 2))
    for row, figures in cells.items():
        sizes = dict.fromkeys(name.split()[1] for name in figures if name.startswith("NMI"))
        for k in sizes:
            line = f"{row}, {k}".ljust(17)
            for part in ("", " held out"):
                for name in AGREEMENT:
                    line += f"{figures.get(f'{name} {k}{part}', ''):>11}"
            print(line)


if __name__ == "__main__":
    main()
