"""The pictures of a run: what is drawn on them, and that nothing keeps them from being drawn."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from sklearn.manifold import TSNE

from runtime.pictures import draw_curves, draw_map, draw_prototypes

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """Calls a function that draws; returns the axes of its figure and the pixels of its file."""
    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: figures.append(self) or save(self, *args, **kw))

    def draw(function, *args):
        function(tmp_path / "a.png", *args)
        image = np.asarray(Image.open(tmp_path / "a.png", formats=["PNG"]).convert("RGB"))
        assert all(200 < side < 2000 for side in image.shape[:2])
        return figures[-1].axes, image

    return draw


def test_curves(draw):
    names = "loss_inst", "loss_proto", "acc_inst", "acc_proto", "lr", "epoch"
    rows = [dict.fromkeys(names, i) | {"knn": i if i % 2 else None} for i in range(6)]
    axes, _ = draw(draw_curves, rows, 3, 40.0)
    lines = {line.get_label(): list(line.get_ydata()) for panel in axes for line in panel.lines}
    assert [panel.get_title() for panel in axes] == ["loss", "accuracy (%)", "kNN accuracy (%)", "learning rate"]
    assert lines["loss_inst"] == lines["acc_inst"] == lines["lr"] == [0, 1, 2, 3, 4, 5] and lines["knn"] == [1, 3, 5]
    assert lines["loss_proto"] == lines["acc_proto"] == [3, 4, 5] and lines["untrained"] == [40, 40]
    assert all([2.5, 2.5] in [list(line.get_xdata()) for line in panel.lines] for panel in axes)
    assert sum(text.get_text() == "end of the warm-up" for panel in axes for text in panel.get_legend().texts) == 1
    assert len(draw(draw_curves, [row | {"knn": None} for row in rows], 0, None)[0]) == 3  # no panel for kNN accuracy
    for warmup in (0, 1, 9):  # none that ends within the epochs drawn
        axes, _ = draw(draw_curves, [dict.fromkeys(rows[0], math.nan) | {"epoch": 0}], warmup, math.nan)
        assert [len(panel.lines) for panel in axes] == [2, 2, 2, 1]


def test_prototypes_with_their_nearest_images(draw):
    rng, density = np.random.default_rng(0), torch.tensor([3.0, 1, 2, 4, 5, 7, 6])
    im2cluster, labels = torch.from_numpy(rng.integers([[7], [4]], size=(2, 300))) + torch.tensor([[0], [-1]])
    labels[im2cluster == 2] = -1
    features, centroids = rng.normal(size=(300, 8)).astype(np.float32), torch.randn(7, 8)
    images = SimpleNamespace(labels=labels, image=lambda i: Image.new("RGB", (40, 20), (i % 256, i // 256, 77)))
    (axes,), pixels = draw(draw_prototypes, images, features, (im2cluster, centroids, density), 199)
    assert axes.texts[0].get_text() == "epoch 199, 7 clusters" and len(axes.images) == 70 and len(axes.texts) == 8
    for line, number in enumerate([1, 2, 0, 3, 4, 6, 5]):
        members = [i for i in range(300) if im2cluster[i] == number]
        known = [int(labels[i]) for i in members if labels[i] >= 0]
        purity = f", {100 * max(map(known.count, known)) / len(known):.0f} % one class" if known else ""
        assert axes.texts[1 + line].get_text() == f"{len(members)} images{purity}\nphi {density[number]:.3f}"
        nearest = sorted(members, key=lambda i: -float(features[i] @ centroids[number].numpy()))[:10]
        assert [image.get_array()[83, 83] @ (1, 256, 0) for image in axes.images[10 * line : 10 * line + 10]] == nearest
    coloured = (pixels[54:, 252:] != 255).any(2).reshape(7, 90, 10, 90)  # an image has 90 x 90 pixels with its border
    assert (abs(coloured.any(3).sum(1) - 41) <= 2).all() and (abs(coloured.any(1).sum(2) - 83) <= 2).all()


@pytest.mark.parametrize(("n", "k", "c"), [(5, 1, 2), (40, 4, 10), (91, 9, 20), (60, 3, 21), (3100, 1100, 3)])
def test_map(draw, monkeypatch, n, k, c):
    labels, names = torch.arange(n) % (c + 1) - 1, ["_hidden", "$x^$ and $", *map(str, range(c - 2))]
    if n > 3000:  # a t-SNE of so many takes long
        monkeypatch.setattr(TSNE, "fit_transform", lambda self, points: points[:, :2])
    features = torch.randn(n, 8) * (n != 40) + torch.eye(8)[0]  # of 40 images all one: a network has collapsed
    draw_map(None, features[:4], labels, names, features)  # too few: nothing is written
    (axes,), _ = draw(draw_map, features, labels, names, features[:k])
    n, k, dots, stars = min(n, 3000), min(k, 1000), axes.collections[0], axes.lines[-1].get_xdata()
    assert axes.get_title() == f"{n} images, {k} prototypes" and axes.get_aspect() == 1 and len(stars) == k
    assert np.isfinite(dots.get_offsets()).sum() == 2 * n and len(np.unique(dots.get_fc(), axis=0)) == min(n, c + 1)
    legend = [text.get_text().strip() for legend in axes.figure.legends for text in legend.get_texts()]
    assert legend == ([names[0], r"\$x^\$ and \$", *names[2:], "prototype"] if c <= 20 else [])
