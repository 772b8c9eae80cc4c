"""What a checkpoint's features are worth: linear probe, kNN and agreement of clusters with the labels.

The backbone is frozen and its features (after the average pooling) are computed once; beside the trained network
stand an untrained one and the raw pixels. Linear probe: MoCo (arXiv 1911.05722, section 4.1); kNN: Wu et al. 2018
(arXiv 1805.01978, section 3.4); NMI: normalised mutual information of k-means clusters and classes.

    python eval_lincls.py                                         # the last checkpoint of the default run
    python eval_lincls.py --exp-dir runs/cifar                    # of another run, on the data it was trained on
    python eval_lincls.py path/to/imagenet --pretrained moco_v2_200ep_pretrain.pth.tar --augment
"""

import argparse
import functools
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from sklearn.metrics import normalized_mutual_info_score
from torch.utils.data import DataLoader
from tqdm import tqdm

from augment import normalize
from cluster import default_num_cluster, run_kmeans
from data import DataError, Images, build_datasets, identity_collate, linear_view
from features import extract_features
from metrics import knn_accuracy, linear_probe, stored_batches, top_k
from model import backbone, build_encoder
from runtime import checkpoint, cli


def get_parser():
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    add("data", nargs="?", help="folder, name or nothing, as for main_pcl.py; default: what the run was trained on")
    add(
        "--exp-dir",
        metavar="DIR",
        help="the run whose last checkpoint is evaluated; default: the newest experiment_pcl",
    )
    add("--pretrained", metavar="FILE", help="a checkpoint of this project, MoCo or PCL; default: that of --exp-dir")
    add("--augment", action="store_true", help="the published probe: random crops through the backbone, every epoch")
    add("--epochs", type=cli.positive_int, default=100, help="of the probe; the rate drops x0.1 at 60 %% and 80 %%")
    add("--lr", type=cli.positive_float, default=30.0, help="of the linear probe: 30 in MoCo, 5 in PCL")
    add("-b", "--batch-size", type=cli.positive_int, default=256, help="of the probe, and images at once otherwise")
    add("-j", "--workers", type=cli.nonnegative_int, default=0, help="processes that load images")
    add("--image-size", type=cli.positive_int, help="side of a view in pixels; default: as in training")
    add("--num-cluster", type=cli.int_list, help="comma-separated; default: as in training")
    switch = argparse.BooleanOptionalAction
    add("--baselines", action=switch, default=True, help="the untrained network and raw pixels beside it")
    add("--seed", type=cli.nonnegative_int, default=0, help="of the probe, the clustering and the untrained network")
    return parser


def main(argv=None):
    """Evaluate a checkpoint and print a table. Returns {row: {column: figure}}."""
    args = get_parser().parse_args(argv)
    path = Path(args.pretrained or checkpoint.choose_directory(args.exp_dir, resume="") / "checkpoint.pth.tar")
    if not path.exists():
        cli.fail(f"there is no {path}; train first with python main_pcl.py, or name a file with --pretrained")
    loaded = checkpoint.read(path)
    stored = loaded.get("args", {})
    data = args.data or (None if args.pretrained else stored.get("data"))  # a stranger's file names no folder here
    try:
        encoder = load_encoder(loaded)
    except ValueError as error:
        cli.fail(cli.format_error(error))
    with cli.errors_in_one_line(DataError):
        datasets = build_datasets(data, args.image_size or stored.get("image_size"), flip=stored.get("flip"))
        n = len(datasets.train)
        num_cluster = args.num_cluster or stored.get("num_cluster") or default_num_cluster(n)
        if max(num_cluster) > n and args.num_cluster:
            cli.fail(f"{max(num_cluster)} clusters are more than the {n} training images; lower --num-cluster")
        num_cluster = num_cluster if max(num_cluster) <= n else default_num_cluster(n)  # a run's on larger data
        return evaluate(args, encoder, loaded["arch"], datasets, num_cluster, stored.get("flip", True))


def evaluate(args, encoder, arch, datasets, num_cluster, flip):
    """The table of main(): a row for the trained network and, with args.baselines, the two it is compared with."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    networks = {"trained": backbone(encoder)}
    if args.baselines:
        small = encoder.conv1.kernel_size == (3, 3)
        networks["untrained"] = backbone(build_encoder(arch, small_images=small))
        networks["raw pixels"] = nn.Sequential(nn.AdaptiveAvgPool2d(min(datasets.image_size, 32)), nn.Flatten(1))
    load = functools.partial(DataLoader, batch_size=args.batch_size, collate_fn=identity_collate)
    load = functools.partial(load, num_workers=args.workers, persistent_workers=args.workers > 0)
    labels = datasets.plain.labels.to(device)
    known = labels >= 0
    if not known.any():
        cli.fail("the data set has no labels to evaluate with")
    table = {}
    for name, network in networks.items():
        network.to(device).eval()

        def encode(x, network=network):
            return network(normalize(x))

        train = extract_features(load(datasets.plain), encode, device)[0].to(device)
        row = table[name] = {}
        if datasets.val is not None:
            val = extract_features(load(datasets.val), encode, device)[0].to(device)
            val_labels = datasets.val.labels.to(device)
            if args.augment:
                view = Images(datasets.plain.source, linear_view(datasets.image_size, flip), args.seed)
                batches = augmented_batches(encode, load(view, shuffle=True), device)
            else:
                batches = stored_batches(train[known], labels[known], args.batch_size)
            scores = linear_probe(batches, val, len(datasets.classes), args.lr, args.epochs)
            row["top-1"] = top_k(scores, val_labels, 1)
            if len(datasets.classes) > 5:
                row["top-5"] = top_k(scores, val_labels, 5)
            row["kNN"] = knn_accuracy(train[known], labels[known], val, val_labels)
        features = F.normalize(train, dim=1).cpu().numpy()
        for clusters in run_kmeans(features, sorted(num_cluster, reverse=True), 0.2, args.seed):
            nmi = normalized_mutual_info_score(labels[known].cpu(), clusters.im2cluster[known.cpu()])
            row[f"NMI {len(clusters.centroids)}"] = 100 * float(nmi)
    print("in percent".ljust(12) + "".join(f"{column:>10}" for column in table["trained"]))
    for name, row in table.items():
        print(name.ljust(12) + "".join(f"{figure:10.1f}" for figure in row.values()))
    return table


def augmented_batches(encode, loader, device):
    """An epoch's batches of features of random crops, computed anew each time it is called."""

    def batches(epoch):
        loader.dataset.set_epoch(epoch)
        for views, index in tqdm(loader, desc=f"probe {epoch}", leave=False, disable=None):
            labels = loader.dataset.labels[index]
            known = labels >= 0
            with torch.no_grad():
                features = encode(views[known].to(device))
            yield features, labels[known].to(device)

    return batches


def load_encoder(checkpoint):
    """The query encoder of a checkpoint of this project or of published MoCo and PCL; its heads are left out.
    Raises ValueError where the weights do not fit the architecture that the checkpoint names."""
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


if __name__ == "__main__":
    main()
