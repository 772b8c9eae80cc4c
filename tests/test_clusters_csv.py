"""clusters.csv: which image is in which cluster, compared with a computation of its own."""

import csv
import errno
import os
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, fails, run
from PIL import Image

import eval_lincls
import main_pcl
from cluster import run_kmeans
from data import plain_view
from model import build_encoder
from runtime import report

SHORT = [*TINY, "--epochs", 2, "--warmup", 1]


def evaluate(*args):
    return eval_lincls.main([str(arg) for arg in args])


def read(path):
    """The rows of a clusters.csv as dicts."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def column(rows, name, kind):
    return np.array([kind(row[name]) for row in rows])


def assert_matches(rows, features, clusters):
    """Check the rows against the features (M, D) and Clusters of the images in their order."""
    k = len(clusters.centroids)
    np.testing.assert_array_equal(column(rows, f"cluster_{k}", int), clusters.im2cluster)
    prototypes = clusters.centroids[clusters.im2cluster]
    cosines = torch.cosine_similarity(torch.as_tensor(features), prototypes, dim=1)
    np.testing.assert_allclose(column(rows, f"cosine_{k}", float), cosines, atol=2e-6)


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """A run of three epochs, and what the k-means of its last E-step was given and returned."""
    calls = []
    directory = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:

        def spy(features, num_cluster, *args, **options):
            found = run_kmeans(features, num_cluster, *args, **options)
            calls.append((np.array(features), found[0]))
            return found

        patch.setattr(main_pcl, "run_kmeans", spy)
        patch.setattr(report, "draw_curves", lambda *_: None)
        patch.setattr(report, "draw_prototypes", lambda *_: None)
        run(folder, *SHORT, "--epochs", 3, "--exp-dir", directory)
    return directory, calls


def test_a_run_leaves_the_clusters_of_its_last_e_step(folder, finished):
    directory, calls = finished
    assert len(calls) == 4  # two granularities before epoch 1, two before epoch 2
    rows = read(directory / "clusters.csv")
    assert list(rows[0]) == ["file", "label", "cluster_4", "cosine_4", "cluster_8", "cosine_8"]
    assert len(rows) == 48
    assert sorted(row["file"] for row in rows) == sorted(
        str(path.relative_to(folder / "train")) for path in folder.glob("train/*/*.png")
    )
    assert all(row["file"].split(os.sep)[0] == row["label"] for row in rows)
    for features, clusters in calls[-2:]:
        assert_matches(rows, features, clusters)


def test_a_run_that_ends_in_the_warm_up_has_no_clusters(folder, tmp_path):
    run(folder, *SHORT, "--warmup", 2, "--exp-dir", tmp_path)
    assert not (tmp_path / "clusters.csv").exists()


def features_of(directory, paths):
    """Unit features of image files by the backbone in a run's checkpoint: (M, D)."""
    stored = torch.load(directory / "checkpoint.pth.tar", weights_only=True)
    prefix = "module.encoder_q."
    encoder = build_encoder("resnet18_w4", small_images=True)
    encoder.fc = torch.nn.Identity()
    weights = {k.removeprefix(prefix): v for k, v in stored["state_dict"].items() if prefix in k}
    assert not encoder.load_state_dict(weights, strict=False).missing_keys
    view = plain_view(10)
    images = torch.stack([view(Image.open(path).convert("RGB")) for path in paths]).float()
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.no_grad():
        return F.normalize(encoder.eval()((images / 255 - mean) / std), dim=1)


def test_the_evaluation_writes_the_clusters_of_its_features(folder, finished, tmp_path):
    """Here the features of the files that the table names are computed once more."""
    directory, _ = finished
    file = tmp_path / "a.csv"
    evaluate("--exp-dir", directory, "--no-baselines", "--num-cluster", 5, "--clusters", file)
    rows = read(file)
    paths = [folder / "train" / row["file"] for row in rows]
    features = features_of(directory, paths)
    for k in (5, 3):  # 3 classes
        (clusters,) = run_kmeans(features.numpy(), [k], temperature=0.2, seed=0)
        assert_matches(rows, features, clusters)


ODD = ['a,b "c".png', "two\nlines.png", "cr\r.png", "näe.png", "#1;'.png", "NA.png"]


@pytest.fixture
def odd_names(folder, tmp_path):
    """Unlabelled images with names of any characters, 40 of them with plain ones."""
    target = tmp_path / "flat"
    target.mkdir()
    paths = sorted(folder.glob("train/*/*.png"))
    for i, path in enumerate(paths[: 40 + len(ODD) + 1]):
        name = os.fsencode([*ODD, *map("{}.png".format, range(40))][i - 1]) if i else b"\xff.png"
        shutil.copy(path, os.path.join(os.fsencode(target), name))
    return target


def test_names_of_any_characters_on_unlabelled_images(
    odd_names, finished, tmp_path, capsys, monkeypatch
):
    directory, _ = finished
    monkeypatch.chdir(tmp_path)
    eval_json = (directory / "eval.json").read_bytes()
    result = evaluate(odd_names, "--exp-dir", directory, "--clusters", "a.csv", "--num-cluster", 6)
    assert result == {"trained": {}}
    assert "there are no labels, so no figures" in capsys.readouterr().out
    assert (directory / "eval.json").read_bytes() == eval_json
    rows = read("a.csv")
    assert list(rows[0]) == ["file", "label", "cluster_6", "cosine_6"]
    names = {row["file"] for row in rows}
    assert names == {*ODD, "\\udcff.png", *(f"{i}.png" for i in range(40))}
    assert {row["label"] for row in rows} == {""}

    pandas = pytest.importorskip("pandas")
    table = pandas.read_csv("a.csv", keep_default_na=False)
    assert set(table["file"]) == names
    assert table["cosine_6"].dtype == float


def test_images_without_files_have_numbers_and_broken_ones_no_row(tmp_path):
    class Source:
        classes = ("one", "two, or more")
        broken = torch.tensor([False, True, False, False])

        def __len__(self):
            return 4

        def names(self):
            return []

    class Data:
        source = Source()
        labels = torch.tensor([1, 0, -1, 7])

    features = F.normalize(torch.randn(4, 3), dim=1)
    clusters = run_kmeans(features.numpy(), [2], 0.2)[0]
    report.write_clusters(tmp_path / "a.csv", Data, features.numpy(), [clusters])
    rows = read(tmp_path / "a.csv")
    assert [row["file"] for row in rows] == ["0", "2", "3"]
    assert [row["label"] for row in rows] == ["two, or more", "", "7"]


def test_a_full_disk_costs_the_table_alone(folder, finished, tmp_path, capsys, monkeypatch):
    directory, _ = finished

    def is_full(path, *_):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(report, "write_clusters", is_full)
    run(folder, *SHORT, "--exp-dir", tmp_path / "run")
    assert f"cannot write {tmp_path / 'run' / 'clusters.csv'}" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        evaluate("--exp-dir", directory, "--no-baselines", "--clusters", tmp_path / "a.csv")
    assert stop.value.code == 1
    output = capsys.readouterr()
    assert "linear (fast)" in output.out
    assert f"warning: cannot write {tmp_path / 'a.csv'}: No space left" in output.err


def test_files_that_cannot_be_written_are_refused(finished, tmp_path, capsys):
    directory, _ = finished

    def refuse(*args):
        return fails(capsys, eval_lincls.main, *args)

    assert "not a file" in refuse("--exp-dir", directory, "--clusters", tmp_path)
    assert "is evaluated" in refuse("--exp-dir", directory, "--clusters", directory / "log.csv")
    two = ["--json", tmp_path / "a", "--clusters", tmp_path / "a"]
    assert "same file" in refuse("--exp-dir", directory, *two)
    two = ["--export", tmp_path / "a", "--clusters", tmp_path / "a"]
    assert "same file" in refuse("--exp-dir", directory, *two)
    assert "one --exp-dir" in refuse("--exp-dir", directory, directory, "--clusters", tmp_path)
