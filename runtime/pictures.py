"""A run in pictures: its curves, its prototypes with their nearest images, a map of its features."""

import contextlib
import io

import numpy as np
from PIL import Image, ImageOps

from runtime.checkpoint import write_atomically


@contextlib.contextmanager
def new_figure(path, width, height, layout=None):
    """As a context: a matplotlib figure, in inches, that becomes the PNG file `path` at its end."""
    from matplotlib.figure import Figure  # not above, where it would delay the start of every process

    yield (figure := Figure((width, height), layout=layout))
    figure.savefig(file := io.BytesIO(), format="png", dpi=150)
    write_atomically(path, file.getbuffer())


def draw_curves(path, rows, warmup, knn_untrained):
    """Draw `rows`, a dict of figures per epoch. knn_untrained: the kNN accuracy before the first step, or None."""
    panels = {"loss": ("loss_inst", "loss_proto"), "accuracy (%)": ("acc_inst", "acc_proto")}
    tested = knn_untrained is not None or any(row["knn"] is not None for row in rows)
    panels |= ({"kNN accuracy (%)": ("knn",)} if tested else {}) | {"learning rate": ("lr",)}
    with new_figure(path, 11 - 3 * tested, 2.7 + 2.5 * tested, layout="constrained") as figure:
        grid = figure.subplots(1 + tested, 3 - tested, sharex=True)  # 2 x 2 panels or, without kNN, 1 x 3
        for axes, (title, names) in zip(grid.flat, panels.items(), strict=True):
            for name, first in zip(names, (0, warmup), strict=False):  # in the warm-up there is no ProtoNCE
                xy = [(row["epoch"], row[name]) for row in rows if row["epoch"] >= first and row[name] is not None]
                axes.plot(*np.reshape(xy, (-1, 2)).T, marker="." if len(xy) < 30 else "", label=name if xy else "")
            if names == ("knn",) and knn_untrained is not None:
                axes.axhline(knn_untrained, linestyle=":", label="untrained")
            if rows[0]["epoch"] < warmup <= rows[-1]["epoch"]:
                axes.axvline(warmup - 0.5, color="0.6", lw=0.8, label="end of the warm-up" if title == "loss" else "")
            axes.legend(frameon=False, fontsize="small")
            axes.set(title=title, xlabel="epoch" if axes.get_subplotspec().is_last_row() else "")
            axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
            axes.grid(alpha=0.3)


def draw_prototypes(path, images, features, clusters, epoch, rows=10, columns=10):
    """Draw one prototype's nearest images a row, from the tightest cluster to the loosest.
    images: a data set with `image` and `labels` as data.Images; features: (M, D) unit rows; clusters: of these."""
    im2cluster, centroids, density = (tensor.cpu().numpy() for tensor in clusters)
    size, order = np.bincount(im2cluster, minlength=len(centroids)), density.argsort(kind="stable")
    order = order[size[order] >= min(columns, size.max())]
    order = order[np.linspace(0, len(order) - 1, min(rows, len(order))).round().astype(int)]
    with new_figure(path, 0.6 * (columns + 2.8), 0.6 * (len(order) + 0.6)) as figure:  # an image has 0.6 inches
        axes = figure.add_axes((0, 0, 1, 1), xlim=(-3.3, columns - 0.5), ylim=(len(order) - 0.5, -1.1), frame_on=False)
        axes.text(-0.46, -0.8, f"epoch {epoch}, {len(centroids)} clusters", va="center", weight="bold")
        for row, k in enumerate(order):
            members = np.flatnonzero(im2cluster == k)
            counts = np.bincount(1 + images.labels.numpy()[members])[1:]  # of each class, without label -1
            pure = f", {100 * counts.max() / counts.sum():.0f} % one class" if len(counts) else ""
            axes.text(-0.62, row, f"{len(members)} images{pure}\nphi {density[k]:.3f}", ha="right", va="center", size=7)
            for column, index in enumerate(members[np.argsort(-features[members] @ centroids[k])][:columns]):
                image = ImageOps.pad(images.image(int(index)).convert("RGB"), (166, 166), Image.BICUBIC, "white")
                axes.imshow(image, extent=(column - 0.46, column + 0.46, row + 0.46, row - 0.46))


def draw_map(path, features, labels, classes, prototypes):
    """Draw a t-SNE of images' features (n, D) in the colours of their classes, and prototypes (K, D) as stars on it.
    labels: (n,) int64, -1 where there is none; classes: their names. Nothing is drawn for fewer than 5 images."""
    if len(features) < 5:
        return
    from matplotlib import colormaps
    from sklearn.manifold import TSNE

    n, k, c = min(len(features), 3000), min(len(prototypes), 1000), len(classes)
    some = np.linspace(0, len(features) - 1, n).astype(int)
    points = np.concatenate([features.cpu()[some], prototypes.cpu()[:k]])
    points /= np.linalg.norm(points, axis=1, keepdims=True).clip(1e-12)
    tsne = TSNE(perplexity=min(30, len(points) / 4), init="random", random_state=0)  # PCA fails where all are one
    (x, y), colors = tsne.fit_transform(points).T, colormaps["tab10" if c <= 10 else "tab20" if c <= 20 else "turbo"]
    colors = np.vstack([colors(np.arange(c) if c <= 20 else np.linspace(0, 1, c)), [0.85, 0.85, 0.85, 1]])  # no class
    with new_figure(path, 7.5, 6, layout="constrained") as figure:
        axes = figure.add_subplot(title=f"{n} images, {k} prototypes", aspect=1, frame_on=False, xticks=[], yticks=[])
        axes.scatter(x[:n], y[:n], np.clip(6000 / n, 5, 18), colors[labels[some]], lw=0)
        for name, color in zip(classes if c <= 20 else (), colors, strict=False):
            axes.plot([], [], "o", color=color, label=" " + name[:30].replace("$", r"\$"))  # not hidden, no formula
        axes.plot(x[n:], y[n:], "w*", mec="black", mew=0.6, ms=np.clip(80 / k**0.5, 4, 10), label=" prototype")
        if c <= 20:
            figure.legend(loc="outside right center", frameon=False)
