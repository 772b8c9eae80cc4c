"""What a checkpoint's features are worth: linear probe, kNN and agreement of clusters with the labels.

The backbone is frozen and its features (after the average pooling) are computed once; beside the trained network
stand an untrained one and the raw pixels. Linear probe: MoCo (arXiv 1911.05722, section 4.1); kNN: Wu et al. 2018
(arXiv 1805.01978, section 3.4); NMI: normalised mutual information of k-means clusters and classes.

    python eval_lincls.py                                         # the last checkpoint of the default run
    python eval_lincls.py --exp-dir runs/cifar                    # of another run, on the data it was trained on
    python eval_lincls.py path/to/imagenet --pretrained moco_v2_200ep_pretrain.pth.tar --augment
"""

import argparse
import math
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

from cluster import run_kmeans
from data import DataError, Images, as_it_is, build_datasets, linear_view, normalize
from features import compute_features, load_features
from model import backbone, build_encoder

REFERENCE = 1_281_167  # ImageNet's training images, for which 25,000, 50,000 and 100,000 clusters are published


def get_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.error = fail
    add = parser.add_argument
    add("data", nargs="?", help="folder, name or nothing, as for main_pcl.py; default: what the run was trained on")
    add("--exp-dir", default="experiment_pcl", help="the run whose last checkpoint is evaluated")
    add("--pretrained", metavar="FILE", help="a checkpoint instead, of this project or of published MoCo or PCL")
    add("--augment", action="store_true", help="the published probe: random crops through the backbone, every epoch")
    add("--epochs", type=positive_int, default=100, help="of the linear probe; the rate drops x0.1 at 60 %% and 80 %%")
    add("--lr", type=positive_float, default=30.0, help="of the linear probe: 30 in MoCo, 5 in PCL")
    add("-b", "--batch-size", type=positive_int, default=256)
    add("-j", "--workers", type=nonnegative_int, default=0, help="processes that load images")
    add("--image-size", type=positive_int, help="side of a view in pixels; default: as in training")
    add("--num-cluster", type=cluster_numbers, help="comma-separated; default: as in training")
    add("--baselines", action=argparse.BooleanOptionalAction, default=True, help="untrained network and raw pixels too")
    add("--seed", type=nonnegative_int, default=0)
    return parser


def main(argv=None):
    """Evaluate a checkpoint and print a table. Returns {row: {column: figure}}."""
    args = get_parser().parse_args(argv)
    path = Path(args.pretrained or Path(args.exp_dir) / "checkpoint.pth.tar")
    if not path.exists():
        fail(f"there is no {path}; train first with python main_pcl.py, or name a file with --pretrained")
    checkpoint = read_checkpoint(path)
    stored = checkpoint.get("args", {})
    data = args.data or (None if args.pretrained else stored.get("data"))  # a stranger's file names no folder here
    try:
        encoder = load_encoder(checkpoint)
        datasets = build_datasets(data, args.image_size or stored.get("image_size"), flip=stored.get("flip"))
        num_cluster = args.num_cluster or stored.get("num_cluster") or default_num_cluster(len(datasets.train))
        return evaluate(args, encoder, checkpoint["arch"], datasets, num_cluster, stored.get("flip", True))
    except ValueError as error:
        fail(one_line(error))


def evaluate(args, encoder, arch, datasets, num_cluster, flip):
    """The table of main(): a row for the trained network and, with args.baselines, the two it is compared with."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    networks = {"trained": backbone(encoder)}
    if args.baselines:
        small = encoder.conv1.kernel_size == (3, 3)
        networks["untrained"] = backbone(build_encoder(arch, small_images=small))
        networks["raw pixels"] = nn.Sequential(nn.AdaptiveAvgPool2d(min(datasets.image_size, 32)), nn.Flatten(1))
    labels = datasets.plain.labels.to(device)
    known = labels >= 0
    if not known.any():
        fail("the data set has no labels to evaluate with")
    table = {}
    for name, network in networks.items():
        network.to(device).eval()
        train = extract(network, datasets.plain, args.batch_size, args.workers, device)
        row = table[name] = {}
        if datasets.val is not None:
            val = extract(network, datasets.val, args.batch_size, args.workers, device)
            val_labels = datasets.val.labels.to(device)
            if args.augment:
                view = Images(datasets.plain.source, linear_view(datasets.image_size, flip), args.seed)
                batches = augmented_batches(network, view, args.batch_size, args.workers, device)
            else:
                batches = stored_batches(train[known], labels[known], args.batch_size)
            scores = linear_probe(batches, val, len(datasets.classes), args.lr, args.epochs)
            row["top-1"] = top_k(scores, val_labels, 1)
            if len(datasets.classes) > 5:
                row["top-5"] = top_k(scores, val_labels, 5)
            row["kNN"] = knn_accuracy(train[known], labels[known], val, val_labels)
        features = F.normalize(train, dim=1).cpu().numpy()
        for clusters in run_kmeans(features, sorted(num_cluster, reverse=True), 0.2, args.seed):
            agreement = nmi(clusters.im2cluster[known.cpu()].numpy(), labels[known].cpu().numpy())
            row[f"NMI {len(clusters.centroids)}"] = 100 * agreement
    columns = list(table["trained"])
    print("in percent".ljust(12) + "".join(column.rjust(max(8, len(column) + 2)) for column in columns))
    for name, row in table.items():
        print(name.ljust(12) + "".join(f"{row[column]:{max(8, len(column) + 2)}.1f}" for column in columns))
    return table


def extract(network, images, batch_size, workers, device):
    """Features of `images` in data set order: (n, D) float32 on `device`."""
    with tempfile.TemporaryDirectory() as directory:
        loader = DataLoader(images, batch_size, num_workers=workers, collate_fn=as_it_is)
        compute_features(loader, lambda pixels: network(normalize(pixels)), directory, device)
        return torch.from_numpy(load_features(directory, len(images))).to(device)


# -- the three figures --------------------------------------------------------------------------------------------


def stored_batches(features, labels, batch_size):
    """An epoch's batches of stored features, in a new order each time it is called."""

    def batches(epoch):
        for rows in torch.randperm(len(features), device=features.device).split(batch_size):
            yield features[rows], labels[rows]

    return batches


def augmented_batches(network, images, batch_size, workers, device):
    """An epoch's batches of features of random crops, computed anew each time it is called."""
    loading = {"num_workers": workers, "persistent_workers": workers > 0, "collate_fn": as_it_is}
    loader = DataLoader(images, batch_size, shuffle=True, **loading)

    def batches(epoch):
        images.set_epoch(epoch)
        for views, index in tqdm(loader, desc=f"probe {epoch}", leave=False, disable=None):
            labels = images.labels[index]
            known = labels >= 0
            with torch.no_grad():
                features = network(normalize(views[known].to(device)))
            yield features, labels[known].to(device)

    return batches


def linear_probe(batches, features, num_classes, lr=30.0, epochs=100):
    """Train a linear layer on unit-length features and return its scores (n, num_classes) of `features` (n, D).

    batches: callable epoch -> iterable of (features (B, D), labels (B,)). The published schedule: SGD with momentum
    0.9 and no weight decay, the learning rate x0.1 after 60 % and 80 % of the epochs.
    """
    layer = nn.Linear(features.shape[1], num_classes).to(features.device)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)
    optimizer = torch.optim.SGD(layer.parameters(), lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [epochs * 6 // 10, epochs * 8 // 10])
    for epoch in range(epochs):
        for inputs, labels in batches(epoch):
            loss = F.cross_entropy(layer(F.normalize(inputs, dim=1)), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    with torch.no_grad():
        return layer(F.normalize(features, dim=1))


def top_k(scores, labels, k):
    """How often the label is among the k highest of `scores` (n, classes), in percent."""
    return 100 * (scores.topk(k, dim=1).indices == labels[:, None]).any(1).float().mean().item()


def knn_accuracy(bank, bank_labels, queries, labels, k=None, temperature=0.1):
    """Top-1 accuracy in percent of a weighted kNN vote (Wu et al. 2018): weight exp(cosine / temperature).

    bank (M, D), queries (n, D): features of any length, bank_labels (M,), labels (n,) int64.
    k: None: 200, or a fiftieth of a bank of less than 10,000.
    """
    k = k or max(1, min(200, len(bank) // 50))
    bank = F.normalize(bank.float(), dim=1)
    votes = []
    for chunk in F.normalize(queries.float(), dim=1).split(1024):
        similarity, nearest = (chunk @ bank.T).topk(k, dim=1)
        weight = ((similarity - 1) / temperature).exp()
        vote = weight.new_zeros(len(chunk), int(bank_labels.max()) + 1)
        votes.append(vote.scatter_add_(1, bank_labels[nearest], weight).argmax(1))
    return 100 * (torch.cat(votes) == labels).float().mean().item()


def nmi(a, b):
    """Normalised mutual information of two labellings (n,) int, in 0 to 1: 2 I(a; b) / (H(a) + H(b))."""
    n = len(a)
    pairs = np.unique(np.stack([a, b]), axis=1, return_counts=True)[1]
    h_ab, h_a, h_b = (
        -(p := counts / n) @ np.log(p)
        for counts in (pairs, np.unique(a, return_counts=True)[1], np.unique(b, return_counts=True)[1])
    )
    return float(2 * (h_a + h_b - h_ab) / (h_a + h_b)) if h_a + h_b > 0 else 1.0


# -- shared with main_pcl.py --------------------------------------------------------------------------------------


def read_checkpoint(path):
    """The checkpoint at `path` as a dict with at least `arch` and `state_dict`; only tensors and plain values are read.

    Ends the program in one line, exit status 2, where it is not one or holds less than its tensors' sizes claim.
    """
    try:
        if zipfile.is_zipfile(path) and any(entry.compress_type for entry in zipfile.ZipFile(path).infolist()):
            raise ValueError  # torch stores plainly; what is packed may be of any size
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if any(value.untyped_storage().nbytes() < value.nbytes for value in tensors_in(checkpoint)):
            raise ValueError
    except Exception as error:  # there is no end to what a malformed file makes the readers raise
        fail(f"{path} is truncated or not a checkpoint ({type(error).__name__}); name another file")
    arch, state = (checkpoint.get(name) if isinstance(checkpoint, dict) else None for name in ("arch", "state_dict"))
    if not isinstance(arch, str) or not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        fail(f"{path} is not a checkpoint of MoCo or PCL: it has no arch and state_dict")
    return checkpoint


def tensors_in(value):
    """All tensors in nested dicts, lists and tuples."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(part)


def load_encoder(checkpoint):
    """The query encoder of a checkpoint of this project or of published MoCo and PCL; its heads are left out.

    Raises ValueError where the weights do not fit the architecture that the checkpoint names.
    """
    prefix = "module.encoder_q."
    state = {key[len(prefix) :]: value for key, value in checkpoint["state_dict"].items() if key.startswith(prefix)}
    state = {key: value for key, value in state.items() if not key.startswith("fc.")}
    if "conv1.weight" not in state:
        raise ValueError("the checkpoint has no weights under module.encoder_q; it is not one of MoCo or PCL")
    with torch.device("meta"):  # no memory for what the file only claims to hold
        encoder = build_encoder(checkpoint["arch"], small_images=state["conv1.weight"].shape[-1] == 3)
    encoder.fc = nn.Identity()
    try:
        encoder.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise ValueError(f"the checkpoint's weights are not those of a {checkpoint['arch']}") from error
    return encoder.float()


def default_num_cluster(n):
    """The published numbers of clusters, scaled from ImageNet to `n` samples."""
    return [min(n, max(2, round(k * n / REFERENCE))) for k in (25_000, 50_000, 100_000)]


def in_range(kind, low, below=math.inf, above_low=False):
    """An argparse type: finite numbers of `kind` from `low`, or with `above_low` beyond it, to less than `below`."""

    def parse(text):
        value = kind(text)
        if not low <= value < below or (above_low and value == low):
            limit = f"{'above' if above_low else 'at least'} {low}" + (
                f" and below {below}" if below < math.inf else ""
            )
            raise argparse.ArgumentTypeError(f"must be {limit}, not {text}")
        return value

    parse.__name__ = kind.__name__  # for argparse's own message
    return parse


positive_int, nonnegative_int = in_range(int, 1), in_range(int, 0)
positive_float = in_range(float, 0, above_low=True)


def cluster_numbers(text):
    return [positive_int(k) for k in text.split(",")]


def one_line(error):
    """The message of an error, without line breaks; of one that a loader worker passed on, the original's message."""
    text = str(error).strip()
    if "Original Traceback" in text:
        text = text.splitlines()[-1].removeprefix(f"{DataError.__module__}.{DataError.__name__}: ")
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def fail(message, status=2):
    """Say in one line what is wrong and end the program with `status`."""
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    raise SystemExit(status)


if __name__ == "__main__":
    main()
