"""The pictures of a run: what is drawn, and that no data keeps them from being drawn."""

import math
import os
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, run
from matplotlib.figure import Figure
from PIL import Image
from sklearn.manifold import TSNE

import main_pcl
from cluster import Clusters
from runtime import report
from runtime.report import draw_curves, draw_map, draw_prototypes

pytestmark = pytest.mark.filterwarnings("error")

NAMES = ("loss_inst", "loss_proto", "acc_inst", "acc_proto", "rank", "spread", "lr", "epoch")


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """Function that calls a drawing function.

    It returns the axes of its figure and the pixels (H, W, 3) of its file.
    """
    figures = []
    savefig = Figure.savefig

    def remember(self, *args, **kwargs):
        figures.append(self)
        return savefig(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", remember)

    def draw(function, *args):
        function(tmp_path / "a.png", *args)
        with Image.open(tmp_path / "a.png", formats=["PNG"]) as image:
            pixels = np.asarray(image.convert("RGB"))
        assert all(200 < side < 2000 for side in pixels.shape[:2])
        return figures[-1].axes, pixels

    return draw


# -- curves ----------------------------------------------------------------------------------------
def make_rows():
    """A log of six epochs, whose figures are the number of the epoch; kNN for every other one."""
    rows = []
    for epoch in range(6):
        row = dict.fromkeys(NAMES, epoch)
        row["knn"] = epoch if epoch % 2 else None
        rows.append(row)
    return rows


def test_curves(draw):
    axes, _ = draw(draw_curves, make_rows(), 3, 40.0)
    titles = [panel.get_title() for panel in axes]
    assert titles[:3] == ["loss", "accuracy (%)", "kNN accuracy (%)"]
    assert titles[3:] == ["effective rank", "spread", "learning rate"]

    # values; those of ProtoNCE begin after the warm-up
    lines = {line.get_label(): list(line.get_ydata()) for panel in axes for line in panel.lines}
    for name in ("loss_inst", "acc_inst", "rank", "spread", "lr"):
        assert lines[name] == [0, 1, 2, 3, 4, 5]
    for name in ("loss_proto", "acc_proto"):
        assert lines[name] == [3, 4, 5]
    assert lines["knn"] == [1, 3, 5]
    assert lines["untrained"] == [40, 40]

    # the end of the warm-up is a line in every panel, and named once
    for panel in axes:
        assert [2.5, 2.5] in [list(line.get_xdata()) for line in panel.lines]
    legend = [text.get_text() for panel in axes for text in panel.get_legend().texts]
    assert legend.count("end of the warm-up") == 1


def test_curves_without_knn_accuracy_have_five_panels(draw):
    rows = make_rows()
    for row in rows:
        row["knn"] = None
    axes, _ = draw(draw_curves, rows, 0, None)
    assert len(axes) == 5


def test_curves_leave_out_figures_that_an_older_version_did_not_log(draw):
    rows = make_rows()
    for row in rows[:2]:
        del row["rank"]
    axes, _ = draw(draw_curves, rows, 0, None)
    lines = {line.get_label(): list(line.get_xdata()) for panel in axes for line in panel.lines}
    assert lines["rank"] == [2, 3, 4, 5]


@pytest.mark.parametrize("warmup", [0, 1, 9])
def test_curves_of_one_epoch_that_is_not_finite(draw, warmup):
    """No warm-up ends within it."""
    row = dict.fromkeys((*NAMES, "knn"), math.nan)
    row["epoch"] = 0
    axes, _ = draw(draw_curves, [row], warmup, math.nan)
    assert [len(panel.lines) for panel in axes] == [2, 2, 2, 1, 1, 1]


# -- prototypes ------------------------------------------------------------------------------------
FROM_TIGHT_TO_LOOSE = [1, 2, 0, 3, 4, 6, 5]  # the clusters below in order of their density


@pytest.fixture
def clustered():
    """Features of 300 images in 7 clusters; some images have no label, in cluster 2 none has.

    Image i has the colour (i % 256, i // 256, 77), which tells its number.
    """
    rng = np.random.default_rng(0)
    im2cluster = torch.from_numpy(rng.integers(7, size=300))
    labels = torch.from_numpy(rng.integers(4, size=300)) - 1
    labels[im2cluster == 2] = -1
    clusters = Clusters(im2cluster, torch.randn(7, 8), torch.tensor([3.0, 1, 2, 4, 5, 7, 6]))
    features = rng.normal(size=(300, 8)).astype(np.float32)

    def image(i):
        return Image.new("RGB", (40, 20), (i % 256, i // 256, 77))

    source = SimpleNamespace(classes=["cat", "dog", "猫"])
    return SimpleNamespace(labels=labels, image=image, source=source), features, clusters


def expected_text(members, images, density):
    """The text beside a prototype. members: numbers of its images."""
    text = f"{len(members)} images, phi {density:.3f}"
    known = Counter(int(images.labels[i]) for i in members if images.labels[i] >= 0)
    if not known:
        return text
    # of equally common classes, the first
    common = max(sorted(known), key=known.get)
    share = 100 * known[common] / known.total()
    return f"{share:.0f} % class {images.source.classes[common]}\n{text}"


def numbers_of(pictures):
    """The numbers of the images drawn, by the colour of their centre."""
    return [picture.get_array()[83, 83] @ (1, 256, 0) for picture in pictures]


def test_prototypes_with_their_nearest_images(draw, clustered):
    images, features, clusters = clustered
    (axes,), pixels = draw(draw_prototypes, images, features, clusters, 199)
    title, meaning, *texts = [text.get_text() for text in axes.texts]
    assert title == "epoch 199, 7 clusters"
    assert meaning == "phi: concentration, low = tight"
    assert len(texts) == 7
    assert len(axes.images) == 70

    for row, number in enumerate(FROM_TIGHT_TO_LOOSE):
        members = [i for i in range(300) if clusters.im2cluster[i] == number]
        assert texts[row] == expected_text(members, images, clusters.density[number])
        similarity = features @ clusters.centroids[number].numpy()
        nearest = sorted(members, key=lambda i: -similarity[i])[:10]
        assert numbers_of(axes.images[10 * row : 10 * row + 10]) == nearest

    # An image takes 90 x 90 pixels with its border, and the padded picture 83 x 41 of them.
    coloured = (pixels[54:, 252:] != 255).any(2).reshape(7, 90, 10, 90)
    heights = coloured.any(3).sum(1)
    widths = coloured.any(1).sum(2)
    assert (abs(heights - 41) <= 2).all()
    assert (abs(widths - 83) <= 2).all()


def test_few_prototypes_are_spread_from_the_tightest_to_the_loosest(draw, monkeypatch, clustered):
    monkeypatch.setattr(report, "PROTOTYPES", 3)
    monkeypatch.setattr(report, "NEAREST", 4)
    images, features, clusters = clustered
    (axes,), _ = draw(draw_prototypes, images, features, clusters, 199)
    assert len(axes.images) == 3 * 4
    densities = [text.get_text().split()[-1] for text in axes.texts[2:]]
    assert densities == ["1.000", "4.000", "7.000"]


@pytest.mark.parametrize(
    "classes, shown",
    [
        (["cat"], "cat"),
        (["a name that is longer than its place"], "a name that is …"),
        (["$x^$ and $"], r"\$x^\$ and \$"),
        (["two\nlines"], "two lines"),
        (["no text \udcff"], "no text ?"),
        ([], "0"),  # a data set without names
    ],
)
def test_any_name_of_a_class_is_shown_in_one_line(draw, clustered, classes, shown):
    images, features, clusters = clustered
    images.labels = torch.zeros(300).long()
    images.source.classes = classes
    (axes,), pixels = draw(draw_prototypes, images, features, clusters, 199)
    assert axes.texts[2].get_text().splitlines()[0] == f"100 % class {shown}"
    assert (pixels[:, :5] == 255).all()  # it ends before the edge of the picture


def test_prototypes_of_a_data_set_that_knows_no_classes(draw, clustered):
    images, features, clusters = clustered
    images.source = []
    (axes,), _ = draw(draw_prototypes, images, features, clusters, 199)
    assert any("% class 2\n" in text.get_text() for text in axes.texts)


# -- map -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("n", [4, 1])
def test_no_map_of_few_images(tmp_path, n):
    draw_map(tmp_path / "a.png", torch.randn(n, 8), torch.zeros(n).long(), ["a"], torch.randn(1, 8))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "n, k, num_classes",
    [(5, 1, 2), (40, 4, 10), (91, 9, 20), (60, 3, 21), (3100, 1100, 3)],
)
def test_map(draw, monkeypatch, n, k, num_classes):
    """Of `n` images, some of them without a class, and `k` prototypes."""
    if n > 3000:  # a t-SNE of so many takes long
        monkeypatch.setattr(TSNE, "fit_transform", lambda self, points: points[:, :2])
    features = torch.randn(n, 8) + torch.eye(8)[0]
    if n == 40:  # all features are the same: the network has collapsed
        features = torch.eye(8)[0].repeat(n, 1)
    labels = torch.arange(n) % (num_classes + 1) - 1
    names = ["_hidden", "$x^$ and $", *map(str, range(num_classes - 2))]
    (axes,), _ = draw(draw_map, features, labels, names, features[:k])

    shown = min(n, 3000)
    prototypes = min(k, 1000)
    dots = axes.collections[0]
    stars = axes.lines[-1].get_xdata()
    assert axes.get_title() == f"t-SNE of {shown} images and {prototypes} prototypes"
    assert axes.get_aspect() == 1
    assert len(stars) == prototypes
    assert np.isfinite(dots.get_offsets()).sum() == 2 * shown
    assert len(np.unique(dots.get_fc(), axis=0)) == min(shown, num_classes + 1)

    legends = axes.figure.legends
    legend = [text.get_text().strip() for legend in legends for text in legend.get_texts()]
    if num_classes <= 20:
        assert legend == [names[0], r"\$x^\$ and \$", *names[2:], "prototype"]
    else:
        assert legend == []


# -- when ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seconds, epochs_drawn", [(100, [1, 19]), (0, [1, *range(3, 20, 2)])])
def test_pictures_of_a_run_are_drawn_seldom_and_at_its_end(
    folder, tmp_path, monkeypatch, seconds, epochs_drawn
):
    """With 20 epochs, every second one is a milestone."""
    drawn = {"draw_curves": [], "draw_prototypes": []}

    def remember(name, path, epoch):
        drawn[name].append(epoch)
        path.write_text("a picture")
        past = path.stat().st_mtime - 1
        os.utime(path, (past, past))

    monkeypatch.setattr(main_pcl, "DRAW_EVERY", seconds)
    report = main_pcl.report
    monkeypatch.setattr(
        report, "draw_curves", lambda path, log, *_: remember("draw_curves", path, len(log) - 1)
    )
    monkeypatch.setattr(
        report, "draw_prototypes", lambda path, *rest: remember("draw_prototypes", path, rest[-1])
    )
    run(folder, *TINY, "--epochs", 20, "--warmup", 0, "--exp-dir", tmp_path)
    assert drawn == {"draw_curves": epochs_drawn, "draw_prototypes": epochs_drawn}
