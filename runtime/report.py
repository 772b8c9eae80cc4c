"""What a run shows: the line per epoch, log.csv, TensorBoard, clusters.csv, and pictures.

The pictures are the curves of a run, its prototypes with their nearest images, and a map of its
features.
"""

import contextlib
import csv
import io
import warnings

import numpy as np
from PIL import Image, ImageOps

from runtime.cli import say
from runtime.directory import write_atomically
from runtime.distributed import get_rank_and_world

PROTOTYPES = 10  # rows of prototypes.png
NEAREST = 10  # images per prototype
CELL = 0.6  # inches per image in prototypes.png
MAP_IMAGES = 3_000  # images in map.png at most, because t-SNE is slow
MAP_PROTOTYPES = 1_000
FEWEST_IN_MAP = 5  # images
ROWS = 2**13  # rows of features that are read at a time


# -- log -------------------------------------------------------------------------------------------
def write_log(directory, board, rows, warnings=()):
    """Print the latest of `rows` and the warnings, add it to TensorBoard, and write log.csv.

    board: a SummaryWriter. rows: {figure: value} per epoch. warnings: texts; an empty one is no
    warning. On the first rank only.
    """
    if get_rank_and_world()[0] > 0:
        return
    row = rows[-1]
    say(format_epoch(row))
    for warning in filter(None, warnings):
        say(warning)
    for name, value in row.items():
        if name != "epoch" and value is not None:
            board.add_scalar(name, value, row["epoch"])

    lines = [",".join(row)]
    for past in rows:
        values = [past.get(name) for name in row]  # an older version knew fewer figures
        cells = ["" if value is None else f"{value:.6g}" for value in values]
        lines.append(",".join(cells))
    text = "".join(f"{line}\n" for line in lines)
    write_atomically(directory / "log.csv", text.encode())


def format_epoch(row):
    """The figures of an epoch as one line of text."""
    line = (
        f"epoch {row['epoch']:3d}  "
        f"loss_inst {row['loss_inst']:.3f}  loss_proto {row['loss_proto']:.3f}  "
        f"acc_inst {row['acc_inst']:5.1f}  acc_proto {row['acc_proto']:5.1f}  "
        f"rank {row['rank']:3.0f}  "
        f"lr {row['lr']:.4f}  {row['images_per_second']:.0f} images/s"
    )
    if row["skipped"]:
        line += f"  steps skipped so far: {row['skipped']}"
    if row["knn"] is not None:
        line += f"  kNN {row['knn']:.1f}"
    return line


# -- clusters --------------------------------------------------------------------------------------
def write_clusters(path, images, features, levels):
    """Write the clusters of each image as a table, one row per image.

    The columns are `file`, relative to the data's folder, or the image's number if it has no file;
    `label`, the name of its class, if known; and `cluster_K` and `cosine_K` for each granularity K:
    the number of its cluster, and its cosine to that cluster's prototype.
    Broken images are left out. Bytes of a name that are not UTF-8 are written as \\udcXX.

    images: a data set with `labels` and `source` like data.Images. features: (M, D) unit rows.
    levels: their Clusters. Raises OSError if `path` cannot be written.
    """
    source = images.source
    columns = {"file": source.names() or range(len(source))}
    columns["label"] = [label_name(label, source.classes) for label in images.labels.tolist()]
    for clusters in levels:
        k = len(clusters.centroids)
        columns[f"cluster_{k}"] = clusters.im2cluster.tolist()
        columns[f"cosine_{k}"] = cosines_to_prototypes(features, clusters)

    text = io.StringIO()
    writer = csv.writer(text, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
    writer.writerow(columns)
    rows = zip(*columns.values(), strict=True)
    for row, is_broken in zip(rows, source.broken.tolist(), strict=True):
        if not is_broken:
            writer.writerow(row)
    write_atomically(path, text.getvalue().encode(errors="backslashreplace"))


def label_name(label, classes):
    """The name of a class, its number if it has no name, or "" for the label -1."""
    if label < 0:
        return ""
    if label < len(classes):
        return str(classes[label])
    return label


def cosines_to_prototypes(features, clusters):
    """The cosine of each feature to the prototype of its cluster, a list of M floats.

    features: (M, D) unit rows.
    """
    im2cluster = clusters.im2cluster.cpu().numpy()
    centroids = clusters.centroids.cpu().numpy()
    cosines = []
    for first in range(0, len(features), ROWS):
        rows = slice(first, first + ROWS)
        cosine = np.einsum("ij,ij->i", features[rows], centroids[im2cluster[rows]])
        cosines += cosine.astype(float).round(6).tolist()
    return cosines


# -- pictures --------------------------------------------------------------------------------------
@contextlib.contextmanager
def new_figure(path, width, height, layout=None):
    """Context with a matplotlib figure of `width` x `height` inches, written to `path` (PNG)."""
    from matplotlib.figure import Figure  # here, because it would delay the start of every process

    figure = Figure((width, height), layout=layout)
    yield figure
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # names in scripts that the font does not have
        figure.savefig(file, format="png", dpi=150)
    write_atomically(path, file.getbuffer())


def draw_curves(path, rows, warmup, knn_untrained, start="untrained"):
    """Draw losses, accuracies, the rank and spread of the features, and the learning rate.

    rows: {figure: value} per epoch. warmup: number of warm-up epochs.
    knn_untrained: kNN accuracy before the first step in percent, or None. start: what to call the
        network at that time. On the first rank only.
    """
    if get_rank_and_world()[0] > 0:
        return
    panels = {
        "loss": tuple(name for name in rows[-1] if name.startswith("loss_")),
        "accuracy (%)": tuple(name for name in rows[-1] if name.startswith("acc_")),
    }
    has_knn = knn_untrained is not None or any(row["knn"] is not None for row in rows)
    if has_knn:
        panels["kNN accuracy (%)"] = ("knn",)
        grid, size = (2, 3), (11, 5.2)
    else:
        grid, size = (1, 5), (13, 2.5)
    panels["effective rank"] = ("rank",)
    panels["spread"] = ("spread",)
    panels["learning rate"] = ("lr",)

    with new_figure(path, *size, layout="constrained") as figure:
        axes_grid = figure.subplots(*grid, sharex=True)
        for axes, (title, names) in zip(axes_grid.flat, panels.items(), strict=True):
            for name in names:
                draw_curve(axes, rows, name, first=warmup if name.endswith("_proto") else 0)
            if names == ("knn",) and knn_untrained is not None:
                axes.axhline(knn_untrained, linestyle=":", label=start)
            if rows[0]["epoch"] < warmup <= rows[-1]["epoch"]:
                label = "end of the warm-up" if title == "loss" else ""
                axes.axvline(warmup - 0.5, color="0.6", lw=0.8, label=label)
            axes.legend(frameon=False, fontsize="small")
            axes.set_title(title)
            if axes.get_subplotspec().is_last_row():
                axes.set_xlabel("epoch")
            axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
            axes.grid(alpha=0.3)


def draw_curve(axes, rows, name, first):
    """Draw the figure `name` from epoch `first` on, leaving out epochs without it."""
    rows = [row for row in rows if row["epoch"] >= first and row.get(name) is not None]
    epochs = [row["epoch"] for row in rows]
    values = [row[name] for row in rows]
    marker = "." if len(rows) < 30 else ""
    axes.plot(epochs, values, marker=marker, label=name if rows else "")


def draw_prototypes(path, images, features, clusters, epoch):
    """Draw one prototype per row with its nearest images, from the tightest cluster to the loosest.

    images: a data set with `image`, `labels` and `source` like data.Images; its source may have
        the names of the classes. features: (M, D) unit rows. clusters: their Clusters.
    """
    classes = getattr(images.source, "classes", [])
    im2cluster = clusters.im2cluster.cpu().numpy()
    centroids = clusters.centroids.cpu().numpy()
    density = clusters.density.cpu().numpy()

    # clusters that fill a row, evenly spread from the tightest to the loosest
    size = np.bincount(im2cluster, minlength=len(centroids))
    order = density.argsort(kind="stable")
    order = order[size[order] >= min(NEAREST, size.max())]
    rows = min(PROTOTYPES, len(order))
    order = order[np.linspace(0, len(order) - 1, rows).round().astype(int)]

    width = CELL * (NEAREST + 2.8)
    height = CELL * (len(order) + 0.6)
    with new_figure(path, width, height) as figure:
        axes = figure.add_axes(
            (0, 0, 1, 1),
            xlim=(-3.3, NEAREST - 0.5),
            ylim=(len(order) - 0.5, -1.1),
            frame_on=False,
        )
        title = f"epoch {epoch}, {len(centroids)} clusters"
        axes.text(-0.46, -0.8, title, va="center", weight="bold")
        meaning = "phi: concentration, low = tight"
        axes.text(NEAREST - 0.54, -0.8, meaning, ha="right", va="center", size=8)
        for row, k in enumerate(order):
            members = np.flatnonzero(im2cluster == k)
            text = describe_cluster(images.labels.numpy()[members], density[k], classes)
            axes.text(-0.62, row, text, ha="right", va="center", size=7)
            nearest = members[np.argsort(-features[members] @ centroids[k])][:NEAREST]
            for column, index in enumerate(nearest):
                image = images.image(int(index)).convert("RGB")
                image = ImageOps.pad(image, (166, 166), Image.BICUBIC, "white")
                extent = (column - 0.46, column + 0.46, row + 0.46, row - 0.46)
                axes.imshow(image, extent=extent)


def describe_cluster(labels, phi, classes):
    """The most common class of a cluster, its size and its concentration, as text.

    labels: (n,), -1 if unknown. classes: their names, which may be missing.
    """
    text = f"{len(labels)} images, phi {phi:.3f}"
    counts = np.bincount(labels[labels >= 0])
    if len(counts) == 0:
        return text
    common = int(counts.argmax())
    name = display_name(label_name(common, classes))
    return f"{100 * counts[common] / counts.sum():.0f} % class {name}\n{text}"


def display_name(name, length=16):
    """The name of a class for a picture: one line, not too long, and without formulas."""
    name = " ".join(str(name).encode(errors="replace").decode().split())
    if len(name) > length:
        name = name[: length - 1] + "…"
    return name.replace("$", r"\$")


def draw_map(path, features, labels, classes, prototypes):
    """Draw a t-SNE of images in the colours of their classes, with prototypes as stars.

    features: (n, D). labels: (n,) int64, -1 if unknown. classes: their names.
    prototypes: (K, D). Fewer than FEWEST_IN_MAP images are not drawn.
    """
    if len(features) < FEWEST_IN_MAP:
        return
    from sklearn.manifold import TSNE

    # an even choice of images, and the prototypes, on the unit sphere
    n = min(len(features), MAP_IMAGES)
    k = min(len(prototypes), MAP_PROTOTYPES)
    chosen = np.linspace(0, len(features) - 1, n).astype(int)
    points = np.concatenate([features.cpu()[chosen], prototypes.cpu()[:k]])
    points /= np.linalg.norm(points, axis=1, keepdims=True).clip(1e-12)

    # init="random", because PCA fails if all points are the same
    tsne = TSNE(perplexity=min(30, len(points) / 4), init="random", random_state=0)
    x, y = tsne.fit_transform(points).T

    has_legend = len(classes) <= 20
    colors = class_colors(len(classes))
    with new_figure(path, 7.5, 6, layout="constrained") as figure:
        axes = figure.add_subplot(
            title=f"t-SNE of {n} images and {k} prototypes",
            aspect=1,
            frame_on=False,
            xticks=[],
            yticks=[],
        )
        size = np.clip(6000 / n, 5, 18)
        axes.scatter(x[:n], y[:n], size, colors[labels[chosen]], lw=0)
        if has_legend:
            for name, color in zip(classes, colors, strict=False):
                label = " " + display_name(name, 30)  # the space keeps "_" from hiding the name
                axes.plot([], [], "o", color=color, label=label)
        size = np.clip(80 / k**0.5, 4, 10)
        axes.plot(x[n:], y[n:], "w*", mec="black", mew=0.6, ms=size, label=" prototype")
        if has_legend:
            figure.legend(loc="outside right center", frameon=False)


def class_colors(n):
    """(n + 1, 4) RGBA colours for `n` classes; the last one, index -1, is for images without."""
    from matplotlib import colormaps

    if n <= 10:
        colors = colormaps["tab10"](np.arange(n))
    elif n <= 20:
        colors = colormaps["tab20"](np.arange(n))
    else:
        colors = colormaps["turbo"](np.linspace(0, 1, n))
    return np.vstack([colors, [0.85, 0.85, 0.85, 1]])
