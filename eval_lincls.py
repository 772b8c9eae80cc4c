"""What the features of a checkpoint are worth: linear probe, kNN, and clusters against classes.

The backbone is frozen. Its features are the average-pooled ones, before the projection head. The
table compares the trained network with an untrained one, or the --init it started from, and with
raw pixels. The linear probe has two protocols: `fast`, logistic regression on the features of
centre crops, and `moco`, the published one (arXiv 1911.05722, section 4.1). If the largest class
has over ten times the training images of the smallest, frequent, middle and rare classes get
figures of their own.

    # the latest checkpoint of the newest default run; three runs: mean and standard deviation
    python eval_lincls.py
    python eval_lincls.py --exp-dir runs/a runs/b runs/c --json abc.json

    # another project's checkpoint
    python eval_lincls.py path/to/imagenet --pretrained moco_v2_800ep_pretrain.pth.tar \\
        --protocol moco

    # which image is in which cluster; the data need no labels
    python eval_lincls.py path/to/folder --exp-dir runs/a --clusters clusters.csv

It writes two files next to the checkpoint: eval.json, the figures of this and earlier evaluations,
and map.png, a map of the held-out images.
"""

import runtime.start  # isort: skip  # noqa: F401  # first: Ctrl-C during the slow imports
import argparse
import fnmatch
import functools
import hashlib
import itertools
import json
import math
import statistics
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader

from augment import normalize
from cluster import LARGEST, default_num_cluster, run_kmeans
from data import (
    DOWNLOADS,
    MANY,
    DataError,
    Datasets,
    EpochSampler,
    Images,
    build_datasets,
    identity_collate,
    linear_view,
)
from features import extract_features
from metrics import (
    accuracy_by_frequency,
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
from runtime.directory import (
    FILES_OF_EVALUATION,
    FILES_OF_RUN,
    choose_directory,
    ran_on,
    write_atomically,
)
from runtime.distributed import get_rank_and_world, print_main

EPOCHS = 100  # of the published probe
LR = 30.0  # its learning rate (MoCo)
DRAWS = 5  # random choices of few labels
MAX_NAMED = 10  # broken images in a message
IMBALANCED = 10  # times as many images in the largest class as in the smallest
READ_FROM_RUNS = {"data": str, "image_size": cli.image_side, "num_cluster": cli.int_list}
RAW_SIDE = 32  # pixels; the raw-pixel baseline shrinks larger images to this side
TEMPERATURE = 0.2  # run_kmeans scales its concentrations to this mean; nothing here reads them
AGREEMENT = ("NMI", "AMI", "ARI", "acc")

# what the map depends on, and what a figure depends on besides what its name says
MAP_SETTINGS = ("weights", "data", "fingerprint", "training_images", "held_out", "size", "seed")
SETTINGS = (*MAP_SETTINGS, "protocol", "batch_size", "lr")


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
        type=cli.path,
        nargs="+",
        action="extend",
        metavar="DIR",
        help="one or more runs to evaluate; default: the newest experiment_pcl",
    )
    add(
        "--pretrained",
        type=cli.path,
        metavar="FILE",
        help="evaluate the checkpoint FILE, of a run or of any project's ResNet; default: the "
        "checkpoint in --exp-dir",
    )
    add(
        "--protocol",
        choices=("fast", "moco"),
        default="fast",
        help="linear probe. fast: logistic regression on stored features, to its optimum; moco: "
        "SGD on random crops for 100 epochs, as published, for comparison with published figures "
        "and for the trained network alone; default: fast",
    )
    add(
        "--lr",
        "--learning-rate",
        type=cli.positive_float,
        help="learning rate of --protocol moco; PCL's published probes had 5; default: 30, MoCo's",
    )
    add(
        "--knn-k",
        type=cli.positive_int,
        nargs="+",
        action="extend",
        metavar="K",
        help="numbers of neighbours in the kNN vote; default: 200, fewer for little data",
    )
    add(
        "--labels",
        type=cli.amount,
        nargs="+",
        action="extend",
        default=[],
        metavar="L",
        help="also probe with few labels: a fraction of each class (0.01) or a number (1, 5), mean "
        "of five draws; default: all labels only",
    )
    add(
        "--num-cluster",
        type=cli.int_list,
        help="numbers of clusters, comma-separated, to which the number of classes is added; "
        "default: as in training; for weights from elsewhere, the number of classes alone",
    )
    add(
        "--export",
        metavar="FILE",
        help="write the backbone under torchvision's or timm's names, for other code; "
        "FILE.safetensors also holds arch, epoch, data and recipe; default: not written",
    )
    add(
        "--clusters",
        metavar="FILE",
        help="write the cluster of each training image, and its cosine to the prototype, as a "
        "table (CSV); the data need no labels for it; default: not written",
    )
    add(
        "--json",
        metavar="FILE",
        help="write all figures, and their mean and standard deviation over the runs; default: "
        "eval.json beside each checkpoint alone",
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
        type=cli.num_workers,
        help="processes per rank that load images; default: the cores per rank, at most 8, but 0 "
        "for little data",
    )
    add(
        "--skip-broken",
        action="store_true",
        help="leave out images that cannot be read, up to 1 %% of them; default: as in training",
    )
    add(
        "--image-size",
        type=cli.image_side,
        help="side of a view in pixels; default: as in training",
    )
    add(
        "--baselines",
        action=argparse.BooleanOptionalAction,
        help="also evaluate an untrained network, or the one in --init, and raw pixels; it takes "
        "three times as long; default: on with --protocol fast, off with moco",
    )
    add(
        "--seed",
        type=cli.nonnegative_int,
        default=0,
        help="random seed of the probes, the clustering and the untrained network",
    )
    return parser


class Subject(NamedTuple):
    """A checkpoint and its data, read and checked: all that is needed to evaluate it."""

    path: Path  # of the checkpoint
    header: list  # lines that say what is evaluated, and on which data
    encoder: nn.Module
    networks: dict  # {row: module images -> features}: the trained network and the baselines
    identities: dict  # {row: what its figures depend on}, to tell networks apart
    datasets: Datasets
    args: argparse.Namespace  # with every default filled in
    about: dict  # what is evaluated, for eval.json
    metadata: dict  # {name: text}, what --export writes beside the weights
    unwritten: list  # files that were asked for and could not be written


def main(argv=None):
    """Evaluate checkpoints and print their tables.

    Returns {row: {figure: percent}} of the last checkpoint.
    """
    again = "start again with the same command; a published probe goes on from its last epoch"
    with cli.errors_in_one_line(DataError, again):
        args = cli.parse_args(get_parser(), argv)
        device = distributed.init_distributed()

        # read and check everything before the first evaluation begins
        paths = find_checkpoints(args)
        check_outputs(args, paths)
        built = {}
        subjects = [prepare(path, args, device, built) for path in paths]

        baselines = {}
        results = [evaluate(subject, baselines, device) for subject in subjects]
        if get_rank_and_world()[0] == 0:
            conclude(subjects, results, args)
    return results[-1]["figures"]


# -- reading and checking --------------------------------------------------------------------------
def find_checkpoints(args):
    """The paths of the checkpoints to evaluate.

    Ends the program in one line if one is missing, or if the arguments contradict each other.
    """
    if args.pretrained and not args.data:
        cli.fail(
            f"name the data to evaluate {args.pretrained} on: "
            "python eval_lincls.py DATA --pretrained FILE"
        )
    if args.pretrained and args.exp_dir:
        cli.fail("--pretrained and --exp-dir name two checkpoints; choose one")
    if args.lr is not None and args.protocol == "fast":
        cli.fail("--lr is for --protocol moco; add that, or leave --lr out")
    for flag in ("export", "clusters"):
        if getattr(args, flag) and len(args.exp_dir or ()) > 1:
            cli.fail(f"--{flag} is for one network; name one --exp-dir")

    if args.pretrained:
        checkpoint.refuse_missing(args.pretrained)
        return [Path(args.pretrained)]
    paths = []
    for directory in args.exp_dir or [None]:
        path = choose_directory(directory, resume="") / "checkpoint.pth.tar"
        if not path.is_file():
            cli.fail(
                f"there is no {path}; train first with python main_pcl.py, name the run's "
                "directory with --exp-dir (and data before it), or a file with --pretrained"
            )
        paths.append(path)
    return paths


def check_outputs(args, paths):
    """End the program in one line if a file of --export, --json or --clusters cannot be written.

    paths: the checkpoints to evaluate, whose files must not be overwritten.
    """
    if get_rank_and_world()[0] > 0:
        return
    seen = {}  # {file: flag}
    for flag in ("export", "json", "clusters"):
        name = getattr(args, flag)
        if name is None:
            continue
        file = Path(name)
        try:
            other = seen.setdefault(file.resolve(), flag)
            if other != flag:
                cli.fail(f"--{other} and --{flag} name the same file; name two")
            if any(belongs_to(file, path, args) for path in paths):
                cli.fail(f"{file} is a file of the run that is evaluated; name another one")
            if file.exists() and not file.is_file():
                cli.fail(f"{file} is not a file; name one")
            with tempfile.TemporaryFile(dir=file.parent):
                pass
        except OSError as error:
            cli.fail(f"cannot write {file} ({error.strerror}); name another file")


def belongs_to(file, path, args):
    """Whether `file` is the checkpoint `path`, or a file that its run or its evaluation writes."""
    if file.resolve().parent != path.resolve().parent:
        return False
    names = [path.name, result_file(path, args, "eval.json").name]
    if not args.pretrained or (path.parent / "args.json").is_file():
        names += (*FILES_OF_RUN, *FILES_OF_EVALUATION)
    return any(fnmatch.fnmatchcase(file.name, name) for name in names)


def result_file(path, args, name):
    """Where a result of the checkpoint `path` is written: beside it."""
    if args.pretrained:
        name = f"{path.name}.{name}"
    return path.with_name(name)


def prepare(path, args, device, built):
    """Read the checkpoint and the data, and check them.

    built: {key: Datasets} of earlier checkpoints. This one's are added.
    Returns a Subject. Ends the program in one line if something is missing or does not fit.
    """
    loaded = checkpoint.read(path)
    found = weights.find(loaded, path)
    stored = read_arguments(loaded, path)

    # data
    name = choose_data(args, stored, path)
    skip_broken = args.skip_broken or bool(stored.get("skip_broken"))
    options = {"flip": stored.get("flip"), "skip_broken": skip_broken}
    datasets = find_data(name, args.image_size or stored.get("image_size"), options, built)
    check_labels(name, datasets, args)

    # defaults
    n = len(datasets.train)
    args = argparse.Namespace(**vars(args))
    args.num_cluster = choose_num_cluster(args.num_cluster, stored.get("num_cluster"), datasets)
    if args.lr is None:
        args.lr = LR
    if args.baselines is None:
        args.baselines = args.protocol == "fast"
    labelled = int((datasets.plain.labels >= 0).sum())  # the images that vote
    neighbours = args.knn_k or [default_k(labelled)]
    args.knn_k = list(dict.fromkeys(min(k, labelled) for k in neighbours))  # each once
    if args.workers is None:
        is_little = 3 * n * datasets.image_size**2 <= MANY
        args.workers = 0 if is_little else distributed.default_workers()
    views = 3 * min(args.batch_size, n) * datasets.image_size**2
    distributed.check_memory({"--image-size and --batch-size": 2 * views}, device)
    epoch = None
    epochs = ""
    if isinstance(loaded.get("epoch"), int):
        epoch = loaded["epoch"]
        epochs = f", {epoch} epochs"
    knn = ""
    if datasets.labelled:
        knn = f"; kNN of {', '.join(map(str, args.knn_k))}"
    header = [
        f"{path}, {found.where}: {found.arch}{epochs}",
        f"on {name}: {datasets.describe()}{knn}",
        *(f"note: {note}" for note in datasets.notes),
    ]
    if not datasets.has_labels:
        header.append("note: there are no labels, so no figures; --clusters is written")
    elif not datasets.labelled:
        header.append(
            "note: only clusters are evaluated: linear probe and kNN need labels in both parts"
        )

    # networks, and what their figures depend on
    encoder, networks, notes = build_networks(found, stored, path, datasets, args)
    header += notes
    hashes = {row: hash_weights(network) for row, network in networks.items()}
    about = {
        "checkpoint": str(path),
        "weights": hashes["trained"],
        "epoch": epoch,
        "arch": found.arch,
        "small_images": found.small_images,
        "data": str(Path(name).resolve()) if Path(name).is_dir() else name,
        "fingerprint": datasets.fingerprint,
        "training_images": n,
        "held_out": 0 if datasets.val is None else len(datasets.val),
        "size": datasets.image_size,
        "protocol": args.protocol,
        "batch_size": args.batch_size if args.protocol == "moco" else None,
        "lr": args.lr if args.protocol == "moco" else None,
        "seed": args.seed,
    }
    identities = {}
    for row, value in hashes.items():
        identity = {**about, "weights": value}
        identities[row] = [identity[name] for name in SETTINGS]
    metadata = describe_training(found.arch, epoch, stored)
    return Subject(
        path, header, encoder, networks, identities, datasets, args, about, metadata, unwritten=[]
    )


def read_arguments(loaded, path):
    """The arguments of one of our runs, {name: value}, or {} if `loaded` is of another project.

    Ends the program in one line if one that READ_FROM_RUNS names is malformed.
    """
    if "run" not in loaded or not isinstance(loaded.get("args"), dict):
        return {}
    stored = loaded["args"]
    for name, kind in READ_FROM_RUNS.items():
        value = stored.get(name)
        if value is None:
            continue
        try:
            stored[name] = cli.convert_stored(kind, value)
        except (argparse.ArgumentTypeError, ValueError) as error:
            cli.fail(f"{path} is no checkpoint of a run: its {name} is {value!r:.80} ({error})")
    return stored


def choose_data(args, stored, path):
    """The name of the data: DATA or, if that is not given, what the run was trained on."""
    if args.data is not None:
        return args.data
    name = stored.get("data") or "digits"
    if name not in ("digits", *DOWNLOADS) and not Path(name).is_dir():
        cli.fail(
            f"{path} was trained on {name}, which is not there; name the data: "
            "python eval_lincls.py DATA --exp-dir DIR"
        )
    return name


def build_networks(found, stored, path, datasets, args):
    """The networks to measure: the trained one and, with --baselines, what to compare it with.

    found: the weights.Found in the file `path`. stored: the arguments of one of our runs, or {}.
    Returns the trained encoder, {row of the table: module images -> features}, and a list of notes.
    """
    torch.manual_seed(args.seed)
    encoder = build(found, path, datasets.image_size, stored.get("image_size"))
    weights.load_backbone(encoder, found, path)
    networks = {"trained": backbone(encoder)}
    if not args.baselines or not datasets.has_labels:
        return encoder, networks, []

    # what training started from: untrained weights, or those of --init; a checkpoint from
    # elsewhere must not name another file to read
    start = build(found, path, datasets.image_size)
    row = "untrained"
    notes = []
    init = stored.get("init")
    if isinstance(init, str) and not args.pretrained:
        if Path(init).is_file():
            weights.load_backbone(start, weights.find(checkpoint.read(init), init), init)
            row = "initial"
        else:
            notes.append(
                f"note: {init}, which training started from, is gone; untrained weights stand in"
            )
    networks[row] = backbone(start)
    side = min(datasets.image_size, RAW_SIDE)
    networks["raw pixels"] = nn.Sequential(nn.AdaptiveAvgPool2d(side), nn.Flatten(1))
    return encoder, networks, notes


def describe_training(arch, epoch, stored):
    """How a network was trained, as far as its checkpoint says, {name: text}.

    epoch: number of epochs, or None. stored: the arguments of one of our runs, or {}. Of a path,
    only the last part is kept, because exported weights are passed on to others.
    """
    metadata = {"arch": arch}
    if epoch is not None:
        metadata["epoch"] = str(epoch)
    if stored:
        name = Path(str(stored.get("data") or "digits")).name
        metadata["data"] = name.encode(errors="backslashreplace").decode()
        left_out = (*checkpoint.PER_START, "data", "init")
        recipe = {name: value for name, value in stored.items() if name not in left_out}
        metadata["recipe"] = json.dumps(recipe, default=str, skipkeys=True)
    return metadata


def find_data(name, image_size, options, built):
    """The Datasets of `name`, from `built` if they are there already.

    options: further arguments of build_datasets, which say how the images are read.
    """
    key = str([name, image_size, options])
    if key not in built:
        # the first rank before the others, so that they find its download
        with cli.phase(f"reading {name}"), distributed.main_process_first():
            datasets = built[key] = build_datasets(name, image_size, **options)
        distributed.refuse_other_images(datasets.sources, datasets.image_size)
    return built[key]


def check_labels(name, datasets, args):
    """End the program in one line if there are too few labels."""
    if not datasets.has_labels and not args.clusters:
        cli.fail(
            f"{name} has no labels to evaluate with; name a labelled folder: "
            "eval_lincls.py DATA --exp-dir DIR, or write the clusters: --clusters FILE"
        )
    if args.protocol == "moco" and datasets.labelled:
        _, world = get_rank_and_world()
        labelled = int((datasets.plain.labels >= 0).sum())
        if min(args.batch_size, labelled) < world:
            advice = "start fewer processes"
            if args.batch_size < labelled:
                advice = "raise --batch-size or start fewer processes"
            cli.fail(
                f"{min(args.batch_size, labelled)} images per batch are fewer than the {world} "
                f"processes; {advice}"
            )


def choose_num_cluster(given, stored, datasets):
    """The numbers of clusters, in descending order, with the number of classes if there are any.

    given: --num-cluster or None; too large a number ends the program in one line.
    stored: the run's own or None; they are replaced if this data set is too small for them.
    For weights from elsewhere, the number of classes is enough: thousands of clusters of features
    as wide as ResNet-50's take hours.
    """
    n = len(datasets.train)
    if given and max(given) > n:
        cli.fail(
            f"{max(given)} clusters are more than the {n} training images; lower --num-cluster"
        )
    num_cluster = given or stored or []
    are_too_many = max(num_cluster, default=0) > n
    there_are_none = not num_cluster and not datasets.has_labels
    if are_too_many or there_are_none:
        num_cluster = default_num_cluster(n)
    if datasets.has_labels:
        num_cluster = [*num_cluster, one_per_class(datasets)]
    return sorted(set(num_cluster), reverse=True)


def one_per_class(datasets):
    """The number of clusters that is the number of classes, within 2 and the number of images."""
    return min(len(datasets.train), max(2, len(datasets.classes)))


def build(found, path, image_size, trained_size=None):
    """A new encoder for a weights.Found in the file `path`, and for images of `image_size` pixels.

    trained_size: of the images that it was trained on, if that is known.
    Ends the program in one line if the weights are not those of such an encoder.
    """
    make = functools.partial(
        build_encoder, found.arch, small_images=found.small_images, image_size=image_size
    )
    advice = ""
    if trained_size not in (None, image_size):
        advice = f"; it was trained on {trained_size} pixels: leave out --image-size"
    try:
        with torch.device("meta"):  # without memory, because a file may name a network of any size
            shapes = make()
        weights.refuse_misfits(shapes, found, path, advice)
    except ValueError as error:
        cli.fail(f"{path}: {error}")
    except RuntimeError:  # a network of the reader's own that has to look at its weights
        pass
    return make()


def hash_weights(network):
    """A text of 16 characters that is the same for the same weights."""
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


# -- measuring -------------------------------------------------------------------------------------
def evaluate(subject, baselines, device):
    """Measure the networks of a Subject; print and write the figures.

    baselines: {key: figures} of networks that are the same for several runs, such as raw pixels.
        This Subject's are added.
    Returns a dict: what was evaluated, and "figures": {row: {figure: percent}}. On other ranks than
    the first, "figures" is empty.
    """
    rank, _ = get_rank_and_world()
    args = subject.args
    for line in subject.header:
        print_main(line)
    table = {}
    result = {**subject.about, **ran_on(device), "figures": table}
    try:
        for row, network in subject.networks.items():
            if row == "trained":
                figures, val, levels = measure(row, network, subject, device)
            else:
                key = str([subject.identities[row], args.num_cluster, args.knn_k, args.labels])
                if key not in baselines:
                    baselines[key], _, _ = measure(row, network, subject, device)
                figures = baselines[key]
            if rank > 0:
                continue
            table[row] = figures
            if row == "trained":
                draw_map(subject, result, val, levels)
    finally:  # whatever was measured is shown and kept, even if the next network fails
        if table:
            print_broken_images(subject.datasets)
        if table and subject.datasets.has_labels:
            print_table(table, {}, args.protocol)
            write_result(subject, result)
    return result


def print_broken_images(datasets):
    """Name the images that --skip-broken has left out, if there are any."""
    names = []
    for source in datasets.sources:
        names += map(repr, source.broken_names())
    if len(names) > MAX_NAMED:
        names[MAX_NAMED:] = [f"and {len(names) - MAX_NAMED} more"]
    if names:
        cli.say(f"left out, because they are broken: {', '.join(names)}")


@cli.phase("evaluation")
def measure(row, network, subject, device):
    """Measure one network, the `row` of the table.

    Returns its figures {figure: percent}, its features (n, D) of the held-out images or None, and
    its Clusters. On other ranks than the first, there are no figures and no Clusters.
    """
    datasets = subject.datasets
    args = subject.args
    network = network.to(device).eval()

    # features, and with --protocol moco the scores of the published probe
    train = extract_all(network, datasets.plain, args, device)
    val = None
    if datasets.val is not None:
        val = extract_all(network, datasets.val, args, device)
    scores = None
    if args.protocol == "moco" and row == "trained" and datasets.labelled:
        file = result_file(subject.path, args, "probe.pth.tar")
        key = [subject.about["weights"], datasets.fingerprint, datasets.image_size]
        store = ProbeStore(file, [*key, args.batch_size, args.lr, args.seed])
        scores = published_probe(network, val, datasets, store, args)
    if get_rank_and_world()[0] > 0:
        return {}, val, []

    # figures
    figures = {}
    if datasets.labelled:
        figures |= probes(train, val, datasets, scores, args)
    unit_features = F.normalize(train, dim=1).cpu().numpy()
    levels = run_kmeans(unit_features, args.num_cluster, TEMPERATURE, args.seed)
    figures |= agreements(levels, val, datasets)
    if args.clusters and row == "trained":
        with cli.warn_if_unwritable(args.clusters, subject.unwritten):
            report.write_clusters(Path(args.clusters), datasets.plain, unit_features, levels)
    return figures, val, levels


def extract_all(network, images, args, device):
    """The features (n, D) of all `images`, on `device`. Every process computes a share.

    Raises DataError, with the image's name, if a feature is not finite or too large to square.
    """
    rank, world = get_rank_and_world()
    loader = make_loader(images, args.batch_size, range(rank, len(images), world), args.workers)
    features, _ = extract_features(loader, lambda x: network(normalize(x)), device)
    distributed.set_where_any_rank_has(images.source.broken)  # their labels do not count
    fits = features.abs().amax(1) <= LARGEST  # nan <= x is False
    if not fits.all():
        image = images.source.name(int(fits.int().argmin()))
        raise DataError(f"the features of {image} are not finite, or too large to square")
    return features.to(device)


def make_loader(images, batch_size, sampler, workers):
    """A DataLoader over the Images that `sampler` names, with `workers` processes at most."""
    workers = min(workers, math.ceil(len(sampler) / batch_size))  # starting one takes time
    return DataLoader(
        images,
        batch_size,
        sampler=sampler,
        collate_fn=identity_collate,
        num_workers=workers,
        worker_init_fn=distributed.ignore_stop_signals,
    )


def probes(train, val, datasets, scores, args):
    """Figures of the linear probe and of kNN, {figure: percent}. Unlabelled images are left out.

    train: (M, D) features. val: (n, D) features. scores: (n, classes) of the held-out images by the
        published probe, or None. With --protocol moco the baselines have no scores, and so no
        linear figure.
    """
    device = train.device
    num_classes = len(datasets.classes)
    labels = datasets.plain.labels.to(device)
    val_labels = datasets.val.labels.to(device)
    known = labels >= 0
    judged = val_labels >= 0
    if not known.all():  # indexing copies
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
        counts = torch.bincount(labels, minlength=num_classes)
        if counts.max() > IMBALANCED * counts.min():
            for name, percent in accuracy_by_frequency(scores, val_labels, counts).items():
                figures[f"linear, {name} classes"] = percent

    # few labels
    for amount in dict.fromkeys(args.labels):
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

    key: what the probe depends on. A state with another key is not used. If the file cannot be
    written, one line says so, and the probe goes on.
    """

    def __init__(self, path, key):
        self.path = path
        self.key = key
        self.unwritten = []  # the path, once it could not be written

    def load(self):
        """The state to continue from on every rank, or None."""
        state = None
        if get_rank_and_world()[0] == 0 and self.path.is_file():
            state = checkpoint.read(self.path, advice="remove it, and the probe starts again")
        state = distributed.broadcast_object(state)
        if state is None or state.get("key") != self.key:
            return None
        return state

    def save(self, state):
        """Write `state`, on the first rank."""
        if get_rank_and_world()[0] == 0 and not self.unwritten:
            with cli.warn_if_unwritable(self.path, self.unwritten):
                checkpoint.save_tensors(self.path, {**state, "key": self.key})


def published_probe(network, val, datasets, store, args):
    """Scores (n, classes) of the features `val` (n, D) by the published linear probe.

    It trains on random crops of the labelled training images. store: a ProbeStore.
    """
    rank, world = get_rank_and_world()
    view = linear_view(datasets.image_size, datasets.augmentation["flip"])
    images = Images(datasets.plain.source, view, args.seed)
    labels = datasets.plain.labels
    labelled = (labels >= 0).nonzero()[:, 0]
    batch_size = min(args.batch_size, len(labelled)) // world * world
    sampler = EpochSampler(len(labelled), batch_size, args.seed, rank, world)

    def batches(epoch):
        sampler.set_epoch(epoch)
        images.set_epoch(epoch)
        order = labelled[list(sampler)].tolist()
        loader = make_loader(images, batch_size // world, order, args.workers)
        bar = cli.Progress(loader, desc=f"probe, epoch {epoch} of {EPOCHS}", disable=rank > 0)
        for views, index in bar:
            with torch.no_grad():
                features = network(normalize(views.to(val.device)))
            yield features, labels[index].to(val.device)

    torch.manual_seed(args.seed)
    return linear_probe(batches, val, len(datasets.classes), args.lr, EPOCHS, store)


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
            prototypes = clusters.centroids.to(val.device)
            # chunk by chunk, so that the cosines of all images are never in memory at once
            chunks = F.normalize(val, dim=1).split(1024)
            nearest = torch.cat([(chunk @ prototypes.T).argmax(1) for chunk in chunks]).cpu()
            parts.append((" held out", nearest, datasets.val.labels))
        for part, im2cluster, labels in parts:
            labelled = labels >= 0
            if labelled.any():
                found = agreement(im2cluster[labelled], labels[labelled])
                for name, value in found.items():
                    figures[f"{name} {k}{part}"] = value
    return figures


# -- results ---------------------------------------------------------------------------------------
def write_result(subject, result):
    """Add a result to eval.json beside the checkpoint."""
    path = result_file(subject.path, subject.args, "eval.json")
    data = json.dumps(merge_results(result, read_results(path)), indent=2).encode()
    with cli.warn_if_unwritable(path):
        write_atomically(path, data)


def read_results(path):
    """The results in an eval.json, the latest first. A file that cannot be read has none."""
    try:
        results = [json.loads(path.read_text())]
        results += results[0].pop("earlier", [])
    except (AttributeError, OSError, RecursionError, TypeError, ValueError):
        return []
    return [result for result in results if is_result(result)]


def is_result(value):
    """Whether `value` is a dict with figures, {row: {figure: number}}."""
    figures = value.get("figures") if isinstance(value, dict) else None
    return isinstance(figures, dict) and all(isinstance(row, dict) for row in figures.values())


def merge_results(result, earlier):
    """What eval.json is to hold: a new result, and all `earlier` ones.

    Figures of the same settings become one result, in which new figures come first and replace
    earlier ones of the same name. Results of other settings are kept under "earlier".
    """
    figures = dict(result["figures"])
    others = []
    for old in earlier:
        if not is_same(old, result, SETTINGS):
            others.append(old)
            continue
        for row, old_figures in old["figures"].items():
            new_figures = figures.get(row, {})
            kept = {name: old_figures[name] for name in old_figures if name not in new_figures}
            figures[row] = {**new_figures, **kept}
    return {**result, "figures": figures, "earlier": others}


def is_same(a, b, names):
    """Whether two results agree in the entries `names`."""
    return all(name in a and a[name] == b[name] for name in names)


def choose_map(subject, result):
    """The path of the map: map.png, or map_2.png, ... if those show other results."""
    earlier = read_results(result_file(subject.path, subject.args, "eval.json"))
    for i in itertools.count(1):
        name = "map.png" if i == 1 else f"map_{i}.png"
        file = result_file(subject.path, subject.args, name)
        shown = [old for old in earlier if old.get("map") == file.name]
        if all(is_same(old, result, MAP_SETTINGS) for old in shown):
            return file


@cli.phase("drawing the map")
def draw_map(subject, result, val, levels):
    """Draw the held-out images by their features `val` (n, D), and a prototype per class.

    Adds the name of the picture to the result. Without labels, or with few held-out images, it
    draws nothing.
    """
    datasets = subject.datasets
    if result["held_out"] < report.FEWEST_IN_MAP or not datasets.has_labels:
        return
    file = choose_map(subject, result)
    by_number = {len(clusters.centroids): clusters.centroids for clusters in levels}
    prototypes = by_number[one_per_class(datasets)]
    with cli.warn_if_unwritable(file):
        report.draw_map(file, val, datasets.val.labels, datasets.classes, prototypes)
        result["map"] = file.name


def conclude(subjects, results, args):
    """Print the mean of several runs, and write the files of --json and --export."""
    mean, deviation = summarize(subjects, results)
    if len(results) > 1:
        cli.say("")
        cli.say(f"mean and standard deviation of {len(results)} runs")
        if not all(is_same(result, results[0], ("fingerprint", "size")) for result in results):
            cli.say("note: these runs are of different images or image sizes")
        fixed = [row for row in mean if row not in deviation]
        if fixed:
            cli.say(f"one network for all runs, so no deviation: {', '.join(fixed)}")
        print_table(mean, deviation, args.protocol)

    unwritten = [name for subject in subjects for name in subject.unwritten]
    if args.json:
        text = json.dumps({"runs": results, "mean": mean, "std": deviation}, indent=2)
        with cli.warn_if_unwritable(args.json, unwritten):
            write_atomically(Path(args.json), text.encode())
    if args.export:
        about = results[0]
        with cli.warn_if_unwritable(args.export, unwritten):
            load = weights.export(
                args.export,
                subjects[0].encoder,
                about["arch"],
                about["small_images"],
                subjects[0].metadata,
            )
            cli.say(f"to load {args.export}: {load}")
    if unwritten:
        raise SystemExit(1)  # what was asked for is not there


def summarize(subjects, results):
    """Mean and standard deviation over several results, both as {row: {figure: number}}.

    A row that is the same network on the same data in all results is one measurement: it has no
    deviation. A figure that only one result has gets none either.
    """
    mean = {}
    deviation = {}
    for row in dict.fromkeys(row for result in results for row in result["figures"]):
        rows = [result["figures"][row] for result in results if row in result["figures"]]
        identities = [subject.identities[row] for subject in subjects if row in subject.identities]
        is_one_network = all(identity == identities[0] for identity in identities)
        mean[row] = {}
        if not is_one_network:
            deviation[row] = {}
        for name in dict.fromkeys(name for figures in rows for name in figures):
            values = [figures[name] for figures in rows if name in figures]
            mean[row][name] = statistics.mean(values)
            if not is_one_network and len(values) > 1:
                deviation[row][name] = statistics.stdev(values)
    return mean, deviation


def print_table(table, deviation, protocol):
    """Print {network: {figure: number}}: probes and kNN, then the agreement of clusters.

    The first table has a column per network, the second a line per network and granularity.
    deviation: standard deviations, like `table`, for the figures that have one.
    protocol: of the linear probe.
    """
    cells = {}  # {network: {figure: text}}
    for row, figures in table.items():
        cells[row] = {name: f"{value:.1f}" for name, value in figures.items()}
        for name, value in deviation.get(row, {}).items():
            cells[row][name] += f" ± {value:.1f}"

    # linear probes and kNN
    names = {}  # {figure: what to call it}, which keeps the order
    for figures in cells.values():
        for name in figures:
            if not name.startswith(AGREEMENT):
                names[name] = with_protocol(name, protocol)
    if names:
        width = max(28, *(len(text) + 2 for text in names.values()))
        cli.say("in percent".ljust(width) + "".join(f"{row:>14}" for row in cells))
        for name, text in names.items():
            line = "".join(f"{figures.get(name, ''):>14}" for figures in cells.values())
            cli.say(text.ljust(width) + line)

    print_clusters(cells)


def print_clusters(cells):
    """Print how well clusters agree with the classes: a line per row of the table and granularity.

    cells: {row: {figure: text}}.
    """
    lines = {}  # {(row, granularity): figures of the row}
    endings = set()  # of the figures' names; held-out images have one, training images have not
    for row, figures in cells.items():
        for name in figures:
            if name.startswith("NMI"):
                _, k, *ending = name.split(" ", 2)
                endings.update(ending or [""])
                lines[row, k] = figures
    parts = [part for part in ("", "held out") if part in endings]
    if not parts:
        return

    width = max([17, *(len(f"{row}, {k} ") for row, k in lines)])
    titles = "".join((part or "training images").center(52) for part in parts)
    cli.say("clusters".ljust(width) + titles.rstrip())
    cli.say(" " * width + "".join(f"{name:>13}" for name in AGREEMENT * len(parts)))
    for (row, k), figures in lines.items():
        line = f"{row}, {k}".ljust(width)
        for part in parts:
            for name in AGREEMENT:
                line += f"{figures.get(f'{name} {k} {part}'.strip(), ''):>13}"
        cli.say(line)


def with_protocol(name, protocol):
    """The name of a figure with the protocol of its linear probe, such as "linear (moco)"."""
    probe, comma, part = name.partition(",")
    if probe not in ("linear", "top-5"):
        return name
    if part and not part.endswith("classes"):
        protocol = "fast"  # always, with few labels
    return f"{probe} ({protocol}){comma}{part}"


if __name__ == "__main__":
    main()
