"""The evaluation: what is checked before it, what it shows and writes, and what it never loses."""

import argparse
import errno
import json
import os
import shutil
import statistics

import pytest
import torch
import torchvision
from conftest import TINY, fails, run
from PIL import Image
from sklearn.manifold import TSNE

import data
import eval_lincls
import main_pcl
import runtime.checkpoint
import runtime.directory
from data import Digits
from model import build_encoder
from runtime import report

FAST = ["--no-baselines", "--num-cluster", "4"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Cheap stand-ins for what takes long and is tested elsewhere: probe and t-SNE."""

    def nearest_mean(features, labels, queries, num_classes, seed=0):
        means = [features[labels == label].mean(0) for label in range(num_classes)]
        return -torch.cdist(queries, torch.stack(means))

    monkeypatch.setattr(eval_lincls, "logistic_regression", nearest_mean)
    monkeypatch.setattr(TSNE, "fit_transform", lambda self, points: points[:, :2])


def evaluate(*args):
    """Evaluate with these arguments, of any type. Returns the table."""
    return eval_lincls.main([str(arg) for arg in args])


def refuses(capsys, monkeypatch, *args):
    """Check that these arguments are refused in one line before anything is measured."""
    with monkeypatch.context() as patch:
        patch.setattr(eval_lincls, "extract_all", lambda *_: pytest.fail("it has started"))
        return fails(capsys, eval_lincls.main, *args)


def read(path):
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def runs(folder, tmp_path_factory):
    """The directories of three runs with the seeds 0, 1 and 2."""
    root = tmp_path_factory.mktemp("runs")
    for seed in range(3):
        run(folder, *TINY, "--epochs", 1, "--seed", seed, "--exp-dir", root / str(seed))
    return [root / str(seed) for seed in range(3)]


@pytest.fixture
def finished(runs, tmp_path):
    """A copy of the first run, to write to."""
    return shutil.copytree(runs[0], tmp_path / "run")


# -- what is shown ---------------------------------------------------------------------------------
def test_rare_classes_have_figures_of_their_own(finished, folder, tmp_path, capsys):
    """If a class has more than ten times as many training images as another."""
    tailed = shutil.copytree(folder, tmp_path / "tailed")
    for label in ("class 1", "class 2"):
        for path in list((tailed / "train" / label).iterdir())[1:]:
            path.unlink()
    figures = evaluate(tailed, "--exp-dir", finished, *FAST)["trained"]
    names = ["frequent", "middle", "rare"]
    thirds = [figures[f"linear, {name} classes"] for name in names]
    assert statistics.mean(thirds) == pytest.approx(figures["linear"])  # held-out classes are equal
    output = capsys.readouterr().out
    for name in names:
        assert f"linear (fast), {name} classes" in output

    balanced = evaluate(folder, "--exp-dir", finished, *FAST)["trained"]
    assert not any("classes" in name for name in balanced)


# -- what cannot be written ------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["eval.json", "map.png", "probe.pth.tar"])
def test_the_table_is_shown_if_a_result_cannot_be_written(finished, capsys, monkeypatch, name):
    monkeypatch.setattr(eval_lincls, "EPOCHS", 2)
    (finished / name).mkdir()  # a folder is in the way
    table = evaluate("--exp-dir", finished, *FAST, "--protocol", "moco", "-b", 16)
    output = capsys.readouterr()
    assert f"{table['trained']['linear']:.1f}" in output.out
    assert output.err.splitlines() == [f"warning: cannot write {finished / name}: Is a directory"]
    others = {"eval.json", "map.png", "probe.pth.tar"} - {name}
    assert all((finished / other).is_file() for other in others)


@pytest.mark.parametrize("flag", ["--json", "--export"])
def test_a_disk_that_fills_up_costs_the_file_and_no_figures(
    finished, tmp_path, capsys, monkeypatch, flag
):
    """What was asked for is missing then, so the exit status is 1."""
    file = tmp_path / "result"

    def is_full(path, *_):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(eval_lincls, "write_atomically", is_full)
    monkeypatch.setattr(runtime.directory, "write_atomically", is_full)
    with pytest.raises(SystemExit) as stop:
        evaluate("--exp-dir", finished, *FAST, flag, file)
    assert stop.value.code == 1
    output = capsys.readouterr()
    assert "linear (fast)" in output.out
    assert f"warning: cannot write {file}: No space left on device" in output.err
    assert "Traceback" not in output.err


def test_what_was_measured_before_a_failure_is_shown_and_written(finished, capsys, monkeypatch):
    """The second network fails."""
    extract_all = eval_lincls.extract_all
    calls = []

    def failing(*args):
        calls.append(args)
        if len(calls) > 2:
            raise eval_lincls.DataError("cannot read an image")
        return extract_all(*args)

    monkeypatch.setattr(eval_lincls, "extract_all", failing)
    assert "cannot read" in fails(capsys, eval_lincls.main, "--exp-dir", finished)
    result = read(finished / "eval.json")
    assert "linear" in result["figures"]["trained"]
    assert (finished / result["map"]).is_file()


def test_a_failure_while_the_map_is_drawn_costs_no_figures(finished, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "draw_map", interrupted)
    with pytest.raises(SystemExit):
        evaluate("--exp-dir", finished, *FAST)
    result = read(finished / "eval.json")
    assert "linear" in result["figures"]["trained"]
    assert "map" not in result


def test_the_pictures_of_a_run_are_worth_less_than_the_run(folder, tmp_path, capsys):
    for name in ("curves.png", "prototypes.png"):
        (tmp_path / "run" / name).mkdir(parents=True)
    options = ["--epochs", 2, "--warmup", 1, "--exp-dir", tmp_path / "run"]
    assert len(run(folder, *TINY, *options)) == 2
    warnings = capsys.readouterr().err
    assert f"warning: cannot write {tmp_path}/run/curves.png" in warnings
    assert f"warning: cannot write {tmp_path}/run/prototypes.png" in warnings


# -- nothing is overwritten ------------------------------------------------------------------------
def test_a_narrower_evaluation_keeps_the_figures_of_the_wider_one(finished):
    wide = evaluate("--exp-dir", finished, "--num-cluster", 4)
    narrow = evaluate("--exp-dir", finished, "--no-baselines", "--knn-k", 3, "--num-cluster", 5)
    stored = read(finished / "eval.json")
    assert stored["earlier"] == []
    assert stored["figures"]["untrained"] == wide["untrained"]
    assert stored["figures"]["raw pixels"] == wide["raw pixels"]
    assert stored["figures"]["trained"] == {**wide["trained"], **narrow["trained"]}
    assert next(iter(stored["figures"])) == "trained"
    names = [name for name in stored["figures"]["trained"] if name.startswith("kNN")]
    assert names == ["kNN 3", "kNN 1"]  # the latest first


def test_evaluations_with_other_settings_stand_beside_each_other(
    finished, folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(eval_lincls, "EPOCHS", 2)
    other_data = shutil.copytree(folder, tmp_path / "other")
    settings = [
        [],
        ["--protocol", "moco"],
        ["--protocol", "moco", "-b", 16],
        ["--seed", 1],
        ["--image-size", 9],
        [other_data],
    ]
    tables = [evaluate(*chosen, "--exp-dir", finished, *FAST) for chosen in settings]
    tables.append(evaluate("--exp-dir", finished, "--num-cluster", 5))  # as the first, but wider
    stored = read(finished / "eval.json")
    assert stored["protocol"] == "fast"
    assert stored["figures"]["trained"] == {**tables[-1]["trained"], **tables[0]["trained"]}
    assert [old["figures"] for old in stored["earlier"]] == tables[-2:0:-1]

    # further training is another checkpoint
    run(folder, *TINY, "--epochs", 2, "--exp-dir", finished, "--resume")
    evaluate("--exp-dir", finished, *FAST)
    stored = read(finished / "eval.json")
    assert stored["epoch"] == 2
    assert stored["earlier"][0]["epoch"] == 1
    assert len(stored["earlier"]) == len(settings)


def test_a_map_of_other_images_gets_a_file_of_its_own(finished, folder, tmp_path):
    other_data = shutil.copytree(folder, tmp_path / "other")
    evaluate("--exp-dir", finished)
    before = (finished / "map.png").read_bytes()
    evaluate("--exp-dir", finished, *FAST, "--export", tmp_path / "backbone.pth")
    assert (finished / "map.png").read_bytes() == before

    evaluate(other_data, "--exp-dir", finished, *FAST)
    assert (finished / "map.png").read_bytes() == before
    assert (finished / "map_2.png").is_file()
    evaluate(other_data, "--exp-dir", finished)
    assert not (finished / "map_3.png").exists()
    assert read(finished / "eval.json")["map"] == "map_2.png"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "5",
        "{}",
        '{"figures": 5}',
        '{"figures": {"a": 1}}',
        '{"earlier": 5, "figures": {}}',
        "[" * 100_000,
    ],
)
def test_an_eval_json_of_another_form_is_no_obstacle(finished, text):
    (finished / "eval.json").write_text(text)
    table = evaluate("--exp-dir", finished, *FAST)
    assert read(finished / "eval.json")["figures"] == table


def test_an_eval_json_of_an_earlier_version_is_kept(finished):
    old = {"protocol": "fast", "figures": {"trained": {"linear": 50.0}}}
    (finished / "eval.json").write_text(json.dumps(old))
    evaluate("--exp-dir", finished, *FAST)
    assert read(finished / "eval.json")["earlier"] == [old]


def test_overwriting_a_run_removes_all_its_maps(finished, folder, tmp_path):
    other_data = shutil.copytree(folder, tmp_path / "other")
    evaluate("--exp-dir", finished, *FAST)
    evaluate(other_data, "--exp-dir", finished, *FAST)
    run(folder, *TINY, "--epochs", 1, "--exp-dir", finished, "--overwrite")
    assert not list(finished.glob("map*"))


# -- several runs ----------------------------------------------------------------------------------
def test_a_baseline_that_is_one_network_has_no_deviation(runs, tmp_path, capsys):
    evaluate("--exp-dir", *runs, "--num-cluster", 4, "--json", tmp_path / "all.json")
    summary = capsys.readouterr().out.split("mean and standard deviation of 3 runs")[1]
    assert "one network for all runs, so no deviation: untrained, raw pixels" in summary
    (linear,) = [line for line in summary.splitlines() if line.startswith("linear (fast)")]
    assert linear.count("±") == 1
    for line in summary.splitlines():
        if line.startswith("trained, "):
            assert line.count("±") == 8
        if line.startswith(("untrained, ", "raw pixels, ")):
            assert "±" not in line

    # the file has what is printed
    stored = read(tmp_path / "all.json")
    values = [result["figures"]["trained"]["linear"] for result in stored["runs"]]
    assert len(values) == 3
    assert stored["mean"]["trained"]["linear"] == pytest.approx(statistics.mean(values))
    assert stored["std"]["trained"]["linear"] == pytest.approx(statistics.stdev(values))
    assert stored["std"].keys() == {"trained"}
    assert f"{stored['mean']['untrained']['linear']:.1f}" in linear
    assert [result["checkpoint"] for result in stored["runs"]] == [
        str(directory / "checkpoint.pth.tar") for directory in runs
    ]


def test_a_baseline_that_is_one_network_is_measured_once(runs, tmp_path, monkeypatch):
    measure = eval_lincls.measure
    measured = []

    def recording(row, *args):
        measured.append(row)
        return measure(row, *args)

    monkeypatch.setattr(eval_lincls, "measure", recording)
    evaluate("--exp-dir", *runs, "--num-cluster", 4, "--json", tmp_path / "all.json")
    assert sorted(measured) == ["raw pixels", "trained", "trained", "trained", "untrained"]
    for result in read(tmp_path / "all.json")["runs"]:
        alone = evaluate("--exp-dir", result["checkpoint"].rpartition("/")[0], "--num-cluster", 4)
        assert alone == result["figures"]


def test_runs_of_different_images_are_noted(runs, folder, tmp_path, capsys):
    other = shutil.copytree(folder, tmp_path / "other")
    next((other / "train" / "class 0").iterdir()).unlink()
    run(other, *TINY, "--epochs", 1, "--exp-dir", tmp_path / "run")
    evaluate("--exp-dir", runs[0], tmp_path / "run", *FAST)
    assert "note: these runs are of different images" in capsys.readouterr().out
    evaluate("--exp-dir", *runs[:2], *FAST)
    assert "note: these runs" not in capsys.readouterr().out


def test_untrained_networks_of_two_architectures_are_two_networks(runs, folder, tmp_path, capsys):
    run(folder, *TINY, "-a", "resnet18_w5", "--epochs", 1, "--exp-dir", tmp_path)
    evaluate("--exp-dir", runs[0], tmp_path, "--num-cluster", 4)
    summary = capsys.readouterr().out.split("mean and standard deviation of 2 runs")[1]
    assert "so no deviation: raw pixels\n" in summary
    (linear,) = [line for line in summary.splitlines() if line.startswith("linear (fast)")]
    assert linear.count("±") == 2


def test_one_run_has_figures_and_no_deviation(runs, tmp_path):
    table = evaluate("--exp-dir", runs[0], *FAST, "--json", tmp_path / "one.json")
    stored = read(tmp_path / "one.json")
    assert stored["mean"] == table
    assert stored["std"] == {}


# -- names -----------------------------------------------------------------------------------------
def test_rows_name_their_protocol_and_columns_their_images(finished, capsys, monkeypatch):
    monkeypatch.setattr(eval_lincls, "EPOCHS", 2)
    evaluate("--exp-dir", finished, *FAST, "--labels", 2)
    output = capsys.readouterr().out
    assert "\nlinear (fast) " in output
    assert "\nlinear (fast), 2 per class " in output
    clusters = next(line for line in output.splitlines() if line.startswith("clusters"))
    assert clusters.split() == ["clusters", "training", "images", "held", "out"]

    evaluate("--exp-dir", finished, *FAST, "--labels", 2, "--protocol", "moco")
    output = capsys.readouterr().out
    assert "\nlinear (moco) " in output
    assert "\nlinear (fast), 2 per class " in output  # few labels have the fast protocol alone


def test_clusters_of_training_images_alone_have_one_title(folder, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train").symlink_to(folder / "train")
    run(tmp_path / "data", *TINY, "--epochs", 1, "--exp-dir", tmp_path / "run")
    capsys.readouterr()
    evaluate("--exp-dir", tmp_path / "run", *FAST)
    output = capsys.readouterr().out
    assert "training images\n" in output
    assert "held out" not in output.split("clusters  ")[1]
    assert "note: only clusters are evaluated" in output


def test_the_network_that_init_gives_is_the_initial_one(folder, tmp_path, capsys, monkeypatch):
    """In the line of its kNN accuracy, in the curves, in the last line and in the table."""
    labels = []
    draw_curves = report.draw_curves

    def spy(*args):
        labels.append(args[-1])
        draw_curves(*args)

    monkeypatch.setattr(report, "draw_curves", spy)
    init = tmp_path / "init.pth"
    torch.manual_seed(7)
    encoder = build_encoder("resnet18_w4", small_images=True)
    torch.save(encoder.state_dict(), init)
    options = [folder, *TINY, "--epochs", 1, "--lr", 1e-12, "--init", init]
    run(*options, "--exp-dir", tmp_path / "run")
    output = capsys.readouterr().out
    assert "kNN accuracy of the initial network: " in output
    assert "(initial " in output
    assert "untrained" not in output.split("epoch   0")[1]
    assert set(labels) == {"initial"}

    # its figures are those of the weights in the file
    table = evaluate("--exp-dir", tmp_path / "run")
    assert list(table) == ["trained", "initial", "raw pixels"]
    alone = evaluate(folder, "--pretrained", init, "--num-cluster", "4,8")
    assert table["initial"] == alone["trained"]

    # the file may be gone
    init.unlink()
    capsys.readouterr()
    table = evaluate("--exp-dir", tmp_path / "run", "--num-cluster", 4)
    assert "untrained" in table
    assert f"{init}, which training started from, is gone" in capsys.readouterr().out


# -- checks before the work ------------------------------------------------------------------------
def test_a_run_that_is_missing_is_named_before_the_first_is_evaluated(
    runs, tmp_path, capsys, monkeypatch
):
    missing = ["--exp-dir", runs[0], tmp_path / "none", runs[1]]
    assert f"there is no {tmp_path}/none" in refuses(capsys, monkeypatch, *missing)
    (tmp_path / "checkpoint.pth.tar").write_bytes(b"")
    assert "not a checkpoint" in refuses(capsys, monkeypatch, "--exp-dir", runs[0], tmp_path)


def test_labels_that_are_missing_are_named_before_the_first_is_evaluated(
    runs, tmp_path, capsys, monkeypatch
):
    (tmp_path / "data").mkdir()
    for i in range(40):
        Image.new("RGB", (8, 8), (6 * i, 9, 9)).save(tmp_path / "data" / f"{i}.png")
    run(tmp_path / "data", *TINY, "--epochs", 1, "--exp-dir", tmp_path / "run")
    error = refuses(capsys, monkeypatch, "--exp-dir", runs[0], tmp_path / "run")
    assert "no labels" in error


@pytest.mark.parametrize("flag", ["--json", "--export"])
def test_a_file_that_cannot_be_written_is_named_first(
    finished, tmp_path, capsys, monkeypatch, flag
):
    (tmp_path / "file").write_bytes(b"")
    run_files = [finished / "checkpoint.pth.tar", finished / "eval.json", finished / "log.csv"]
    for path in (
        "",
        tmp_path,
        tmp_path / "none" / "a",
        tmp_path / "file" / "a",
        "/proc/a",
        "/dev/full",
        tmp_path / ("long" * 100),
        *run_files,
    ):
        before = sorted(tmp_path.rglob("*"))
        error = refuses(capsys, monkeypatch, "--exp-dir", finished, flag, path)
        assert "name" in error
        assert sorted(tmp_path.rglob("*")) == before


def test_json_and_export_are_two_files(finished, tmp_path, capsys, monkeypatch):
    both = ["--json", tmp_path / "a", "--export", tmp_path / "b" / ".." / "a"]
    (tmp_path / "b").mkdir()
    assert "same file" in refuses(capsys, monkeypatch, "--exp-dir", finished, *both)


def test_a_checkpoint_from_elsewhere_names_no_file_to_read(folder, finished, tmp_path):
    stored = torch.load(finished / "checkpoint.pth.tar", weights_only=True)
    (tmp_path / "broken.pth").write_bytes(b"")
    stored["args"]["init"] = str(tmp_path / "broken.pth")
    stored["epoch"] = torch.ones(2)
    torch.save(stored, tmp_path / "odd.pth")
    table = evaluate(folder, "--pretrained", tmp_path / "odd.pth", "--num-cluster", 4)
    assert "untrained" in table


def test_a_checkpoint_of_another_project_is_not_overwritten(folder, tmp_path, capsys, monkeypatch):
    file = tmp_path / "resnet.pth"
    torch.save(torchvision.models.resnet18().state_dict(), file)
    options = [folder, "--pretrained", file, "--export", file]
    assert "is evaluated" in refuses(capsys, monkeypatch, *options)


@pytest.mark.parametrize("name", ["checkpoint.pth.tar", "checkpoint_0199.pth.tar", "log.csv"])
def test_a_checkpoint_of_a_run_named_as_a_file_keeps_its_run(finished, capsys, monkeypatch, name):
    old = shutil.copy(finished / "checkpoint.pth.tar", finished / "checkpoint_0000.pth.tar")
    options = ["digits", "--pretrained", old, "--clusters", finished / name]
    assert "a file of the run" in refuses(capsys, monkeypatch, *options)


def test_data_that_is_gone_is_to_be_named(finished, capsys, monkeypatch, tmp_path):
    """Here the run was started elsewhere, with a relative path."""
    stored = torch.load(finished / "checkpoint.pth.tar", weights_only=True)
    stored["args"]["data"] = "images"
    torch.save(stored, finished / "checkpoint.pth.tar")
    monkeypatch.chdir(tmp_path)
    error = refuses(capsys, monkeypatch, "--exp-dir", finished)
    assert "was trained on images, which is not there; name the data" in error


class HalfLabelled(Digits):
    """The digits; the second half of the training images has no labels."""

    def __init__(self, directory, download, train):
        super().__init__(slice(None, -360) if train else slice(-360, None))
        self.targets = self.targets.astype(int)
        if train:
            self.targets[len(self) // 2 :] = -1


def test_only_labelled_images_vote_and_count(finished, capsys, monkeypatch):
    monkeypatch.setitem(data.DOWNLOADS, "halves", HalfLabelled)
    figures = evaluate("halves", "--exp-dir", finished, "--image-size", 10, *FAST)["trained"]
    assert f"kNN {1437 // 2 // 50}" in figures
    figures = evaluate("halves", "--exp-dir", finished, "--image-size", 10, *FAST, "--knn-k", 1000)
    assert f"kNN {1437 // 2}" in figures["trained"]


def test_a_vote_of_the_same_neighbours_is_counted_once(finished, capsys):
    evaluate("--exp-dir", finished, *FAST, "--knn-k", 5, 5, 100, 200)  # of 48 training images
    output = capsys.readouterr().out
    assert "kNN of 5, 48\n" in output
    assert output.count("\nkNN 48") == 1


def test_features_that_are_not_finite_name_their_image(finished, folder, capsys, monkeypatch):
    stored = torch.load(finished / "checkpoint.pth.tar", weights_only=True)
    for name, value in stored["state_dict"].items():
        if name.endswith("encoder_q.bn1.weight"):
            value.fill_(3e38)  # a finite weight, whose products are not
    torch.save(stored, finished / "checkpoint.pth.tar")
    line = fails(capsys, eval_lincls.main, "--exp-dir", str(finished), *FAST)
    assert f"the features of '{folder}/train/class 0/0.png' are not finite" in line


# -- the published probe ---------------------------------------------------------------------------
def test_the_published_probe_starts_again_at_another_rate(finished, monkeypatch):
    monkeypatch.setattr(eval_lincls, "EPOCHS", 2)
    rates = []
    save = runtime.checkpoint.save_tensors

    def record(path, state):
        rates.append(state["optimizer"]["param_groups"][0]["lr"])
        save(path, state)

    monkeypatch.setattr(runtime.checkpoint, "save_tensors", record)
    options = ["--exp-dir", finished, "--protocol", "moco", "-b", 16, "--num-cluster", 4]
    table = evaluate(*options)
    assert list(table) == ["trained"]  # baselines are measured only on demand
    evaluate(*options, "--lr", 5)
    evaluate(*options, "--lr", 5)  # goes on from the end of the last one
    assert rates == [30, 30, 5, 5]
    results = [read(finished / "eval.json"), *read(finished / "eval.json")["earlier"]]
    assert [result["lr"] for result in results if result["protocol"] == "moco"] == [5, 30]


def test_the_published_probe_starts_again_for_other_weights(finished, runs, monkeypatch):
    """Even if their file is of the same time, for instance unpacked from an archive."""
    monkeypatch.setattr(eval_lincls, "EPOCHS", 3)
    options = ["--exp-dir", finished, *FAST, "--protocol", "moco", "-b", 16]
    evaluate(*options)
    path = finished / "checkpoint.pth.tar"
    before = path.stat()
    shutil.copy(runs[1] / "checkpoint.pth.tar", path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    monkeypatch.setattr(eval_lincls, "published_probe", lambda *arguments: store_of(arguments))
    with pytest.raises(Started, match="None"):
        evaluate(*options)
    shutil.copy(runs[0] / "checkpoint.pth.tar", path)
    with pytest.raises(Started, match="3"):
        evaluate(*options)


class Started(Exception):
    """A probe was to start from this epoch."""


def store_of(arguments):
    (store,) = (value for value in arguments if isinstance(value, eval_lincls.ProbeStore))
    state = store.load()
    raise Started(str(state and state["epoch"]))


def test_a_rate_for_the_fast_probe_is_refused(finished, capsys, monkeypatch):
    error = refuses(capsys, monkeypatch, "--exp-dir", finished, "--lr", 5)
    assert "--lr is for --protocol moco" in error


@pytest.mark.parametrize(
    "batch_size, advice", [(1, "raise --batch-size or"), (256, "; start fewer")]
)
def test_fewer_images_than_processes_get_advice_that_helps(
    folder, capsys, monkeypatch, batch_size, advice
):
    monkeypatch.setattr(eval_lincls, "get_rank_and_world", lambda: (0, 100))
    args = argparse.Namespace(clusters=None, protocol="moco", batch_size=batch_size)
    datasets = data.build_datasets(str(folder))
    line = fails(capsys, lambda _: eval_lincls.check_labels("x", datasets, args))
    assert advice in line


def test_a_damaged_probe_says_what_to_remove(finished, capsys, monkeypatch):
    monkeypatch.setattr(eval_lincls, "EPOCHS", 1)
    (finished / "probe.pth.tar").write_bytes(b"PK")
    line = fails(capsys, eval_lincls.main, "--exp-dir", str(finished), *FAST, "--protocol", "moco")
    assert f"{finished / 'probe.pth.tar'} is truncated" in line
    assert "remove it, and the probe starts again" in line


# -- checkpoints of other trainers -----------------------------------------------------------------
def test_weights_from_elsewhere_get_a_cluster_per_class_alone(folder, tmp_path):
    """Clusters as numerous as in training take hours on features of ImageNet."""
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "resnet.pth")
    options = [folder, "--pretrained", tmp_path / "resnet.pth", "--no-baselines"]
    figures = evaluate(*options)["trained"]
    assert {name for name in figures if name.startswith("NMI")} == {"NMI 3", "NMI 3 held out"}
    figures = evaluate(*options, "--num-cluster", 5)["trained"]
    assert "NMI 5" in figures


class Hostile:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def resnet_with(**others):
    return {"state_dict": torchvision.models.resnet18().state_dict(), **others}


@pytest.mark.parametrize("zipped", [True, False])
def test_arguments_beside_the_weights_are_left_out(folder, tmp_path, zipped):
    """As timm and DINO store them."""
    inner = argparse.Namespace(path=tmp_path, weight=torch.zeros(2), device=torch.device("cpu"))
    everything = argparse.Namespace(model="resnet18", inner=[inner, {"a": inner}])
    everything.itself = everything
    state = torchvision.models.resnet18().state_dict()
    loaded = {}
    for name, arguments in {"plain": {"model": "resnet18"}, "namespace": everything}.items():
        file = tmp_path / name
        value = {"state_dict": state, "args": arguments, "more": {"args": arguments}}
        torch.save(value, file, _use_new_zipfile_serialization=zipped)
        loaded[name] = runtime.checkpoint.read(file)
    assert loaded["namespace"].keys() == {"state_dict", "more"}
    kept = loaded["namespace"]["more"]["args"]
    assert not isinstance(kept, argparse.Namespace)
    assert vars(kept) == {}
    table = evaluate(folder, "--pretrained", tmp_path / "namespace", *FAST)
    assert table == evaluate(folder, "--pretrained", tmp_path / "plain", *FAST)


def test_a_namespace_opens_no_door(tmp_path, capsys):
    """Neither its attributes nor what it is called with can run code or be found later."""
    sign = tmp_path / "code has run"
    file = tmp_path / "bad.pth"
    touch = Hostile(eval, f"open({str(sign)!r}, 'w')")
    values = {
        "an attribute": argparse.Namespace(a=touch),
        "a method": argparse.Namespace(__setstate__=touch, __reduce__=touch),
        "an argument": Hostile(argparse.Namespace, touch),
        "a key": {touch: 1},
    }
    for value in values.values():
        torch.save(resnet_with(args=value), file)
        assert "holds more than tensors" in fails(capsys, lambda _: runtime.checkpoint.read(file))
        assert not sign.exists()

    # with nothing but tensors and plain values it is read, and still keeps nothing
    odd = argparse.Namespace(__setstate__=torch.zeros(1), get=3, keys=[])
    vars(odd)["__class__"] = "int"
    torch.save(resnet_with(args=odd, epoch=odd, run=odd), file)
    assert runtime.checkpoint.read(file).keys() == {"state_dict"}
    torch.save(odd, file)
    fails(capsys, lambda _: runtime.checkpoint.read(file))


def test_a_run_does_not_continue_from_arguments_that_were_left_out(folder, tmp_path, capsys):
    run(folder, *TINY, "--epochs", 1, "--exp-dir", tmp_path)
    stored = torch.load(tmp_path / "checkpoint.pth.tar", weights_only=True)
    stored["args"] = argparse.Namespace(**stored["args"])
    torch.save(stored, tmp_path / "odd.pth.tar")
    options = ["--epochs", 2, "--exp-dir", tmp_path / "new", "--resume", tmp_path / "odd.pth.tar"]
    fails(capsys, main_pcl.main, folder, *TINY, *options)


def test_reading_a_checkpoint_leaves_torchs_allow_list_as_it_was(tmp_path):
    before = set(torch.serialization.get_safe_globals())
    file = tmp_path / "file.pth"
    torch.save(resnet_with(args=argparse.Namespace()), file)
    runtime.checkpoint.read(file)
    assert set(torch.serialization.get_safe_globals()) == before


# -- the directory of a run ------------------------------------------------------------------------
def test_a_directory_that_cannot_be_written_is_named_before_the_data_is_read(
    tmp_path, capsys, monkeypatch
):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setattr(main_pcl, "build_datasets", lambda *_, **__: pytest.fail("it is read"))
    for directory in (tmp_path / "file", tmp_path / "file" / "a", "/proc/a/b"):
        error = fails(capsys, main_pcl.main, "--exp-dir", directory)
        assert f"cannot write to {directory}" in error
    assert len(list(tmp_path.iterdir())) == 1
