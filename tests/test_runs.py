"""Whole runs at a small size: what they learn and leave, how they resume, what stops them."""

import argparse
import functools
import json
import shutil
import statistics

import numpy as np
import pytest
import torch
import torchvision
from conftest import TINY, assert_same, fails, run, weights
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import diagnose
import eval_lincls
import main_pcl
import runtime.checkpoint

SHORT = [*TINY, "--epochs", 2, "--warmup", 1]
CLUSTER_FIGURES = ("NMI", "AMI", "ARI", "acc")


class PowerCut(BaseException):
    """The process dies here."""


def evaluate(*args):
    """Evaluate with these arguments, of any type. Returns the table."""
    return eval_lincls.main([str(arg) for arg in args])


def assert_finite(weights):
    assert all(torch.isfinite(value).all() for value in weights.values())


def not_finite(q, *_):
    """A loss in place of info_nce: (nan, accuracy)."""
    return (q * torch.nan).sum(), torch.zeros(())


# -- training --------------------------------------------------------------------------------------
PRECISIONS = {"fp32": [], "bf16": ["--amp"], "fp16": ["--amp", "--amp-dtype", "fp16"]}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("head", ["none", "report"])
@pytest.mark.parametrize("optim", ["sgd", "adamw", "lamb", "lars"])
def test_every_combination_trains(folder, tmp_path, optim, head, precision):
    options = ["--optim", optim, "--cluster-head", head, "--clip-grad", 1, *PRECISIONS[precision]]
    log = run(folder, *SHORT, *options, "--exp-dir", tmp_path)
    assert len(log) == 2
    assert all(np.isfinite(row["loss"]) for row in log)
    assert log[0]["acc_proto"] == 0
    assert log[1]["loss"] > log[0]["loss"]  # ProtoNCE is added after the warm-up
    assert_finite(weights(tmp_path))


@pytest.mark.no_shortcuts
def test_the_default_run_learns_and_leaves_its_files(tmp_path, monkeypatch, capsys):
    """Ten epochs on the digits at twice the default learning rate are enough to see it learn."""
    monkeypatch.chdir(tmp_path)
    options = ["--amp", "--optim", "sgd", "--cos", "--warmup", 2]
    log = run(*options, "--epochs", 10, "--lr", 0.03)
    assert "next: python eval_lincls.py" in capsys.readouterr().out

    # the features are better than an untrained network's
    table = evaluate()
    trained = table["trained"]
    untrained = table["untrained"]
    assert set(table) == {"trained", "untrained", "raw pixels"}
    assert trained["kNN 28"] > untrained["kNN 28"] + 3
    assert trained["AMI 10"] > untrained["AMI 10"] + 3
    # training measures in mixed precision, the evaluation in float32
    assert log[-1]["knn"] == pytest.approx(trained["kNN 28"], abs=2)

    # files
    directory = tmp_path / "experiment_pcl"
    names = {path.name for path in directory.iterdir()}
    assert {"args.json", "log.csv", "eval.json"} <= names
    assert {"checkpoint.pth.tar", "checkpoint_0009.pth.tar"} <= names
    assert {"curves.png", "prototypes.png", "map.png"} <= names
    assert len((directory / "log.csv").read_text().splitlines()) == 11
    assert json.loads((directory / "args.json").read_text())["warmup"] == 2
    report = json.loads((directory / "eval.json").read_text())
    assert report["figures"] == table
    assert report["epoch"] == 10
    assert report["protocol"] == "fast"


def test_warmup_beyond_the_end_is_infonce_alone(folder, tmp_path, capsys):
    log = run(folder, *TINY, "--epochs", 1, "--warmup-epoch", 5, "--exp-dir", tmp_path)
    assert log[0]["acc_proto"] == 0
    assert "InfoNCE alone" in capsys.readouterr().out


def test_symmetric_makes_each_view_the_query_once(folder, tmp_path, monkeypatch):
    """All keys enter the queue, but a sample is clustered by one of its two."""
    views = []  # (im_q, im_k) of every step
    samples = []  # those of ProtoNCE, in every step after the warm-up
    saved = []  # (index, features) of every file
    forward = main_pcl.MoCo.forward
    save_features = main_pcl.save_features
    proto_nce = main_pcl.proto_nce

    def spy_proto_nce(c, index, *args):
        samples.append(index)
        return proto_nce(c, index, *args)

    def spy_forward(self, im_q, im_k, *args, **kwargs):
        views.append((im_q, im_k))
        return forward(self, im_q, im_k, *args, **kwargs)

    def spy_save(directory, number, index, features):
        saved.append((index, features))
        save_features(directory, number, index, features)

    monkeypatch.setattr(main_pcl.MoCo, "forward", spy_forward)
    monkeypatch.setattr(main_pcl, "save_features", spy_save)
    monkeypatch.setattr(main_pcl, "proto_nce", spy_proto_nce)
    run(folder, *SHORT, "--pcl-r", 48, "--symmetric", "--exp-dir", tmp_path)

    assert len(views) == 6
    for im_q, im_k in views:
        assert len(im_q) == 32
        first_q, second_q = im_q.chunk(2)
        first_k, second_k = im_k.chunk(2)
        assert torch.equal(first_q, second_k)
        assert torch.equal(second_q, first_k)
        assert not torch.equal(first_q, second_q)
    assert len(samples) == 3
    for index in samples:
        first, second = index.chunk(2)
        assert torch.equal(first, second)
    ((index, features),) = saved
    assert len(features) == 48
    assert sorted(index.tolist()) == list(range(48))
    assert weights(tmp_path)["module.queue_ptr"] == 6 * 32 % 48


def test_keys_of_the_epoch_are_clustered_without_a_pass(folder, tmp_path, monkeypatch):
    """Every sample's key is saved once, in a file per SYNC_EVERY steps.

    Only samples that fill no batch pass through the encoder.
    """
    clustered = []  # the features of each E-step
    saved = []  # for each E-step, {index of a file: its features}
    encoded = []  # the sizes of the batches that passed through the encoder
    starts = []  # the centroids that each clustering starts from
    found = []  # the centroids that it finds
    run_kmeans = main_pcl.run_kmeans
    encode = main_pcl.MoCo.encode

    def spy_kmeans(features, *args, **kwargs):
        clustered.append(features.copy())
        files = {}
        for path in tmp_path.glob("features/keys/batch_*"):
            batch = torch.load(path, weights_only=True)
            files[tuple(batch["index"].tolist())] = batch["features"]
        saved.append(files)
        clusters = run_kmeans(features, *args, **kwargs)
        starts.append(kwargs.get("init", [None])[0])
        found.append(clusters[0].centroids.numpy())
        return clusters

    def spy_encode(self, images):
        encoded.append(len(images))
        return encode(self, images)

    monkeypatch.setattr(main_pcl, "run_kmeans", spy_kmeans)
    monkeypatch.setattr(main_pcl.MoCo, "encode", spy_encode)
    monkeypatch.setattr(main_pcl, "SYNC_EVERY", 2)
    options = [folder, *TINY, "-b", 14, "--bn-splits", 1, "--num-cluster", 4, "--warmup", 1]
    run(*options, "--epochs", 4, "--exp-dir", tmp_path)  # 3 steps of 14 leave 6 images over
    assert encoded == [6, 6, 6]
    for features, files in zip(clustered, saved, strict=True):
        assert sorted(len(part) for part in files) == [14, 28]
        index = [i for part in files for i in part]
        assert len(set(index)) == 42
        np.testing.assert_array_equal(features[index], torch.cat(list(files.values())))
        np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, rtol=1e-5)
    assert not (tmp_path / "features").exists()

    # each clustering starts from the centroids of the one before
    assert starts[0] is None
    for start, centroids in zip(starts[1:], found, strict=False):
        np.testing.assert_array_equal(start, centroids)
    assert len(starts) == 3

    encoded.clear()
    run(*options, "--epochs", 2, "--features", "pass", "--exp-dir", tmp_path / "pass")
    assert sum(encoded) == 48


# -- steps -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_every_step_has_its_rate_and_the_true_norm_is_clipped(folder, tmp_path, monkeypatch, dtype):
    norms = []
    rates = []
    step = torch.optim.SGD.step

    def spy(self, *args, **kwargs):
        gradients = []
        for group in self.param_groups:
            rates.append(group["lr"])
            gradients += [p.grad.flatten() for p in group["params"] if p.grad is not None]
        norms.append(torch.cat(gradients).norm().item())
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", spy)
    options = ["--amp", "--amp-dtype", dtype, "--clip-grad", 0.01]
    options += ["--epochs", 1, "--lr", 0.4, "--cos"]
    log = run(folder, *TINY, *options, "--exp-dir", tmp_path)
    assert norms == pytest.approx([0.01] * 3, rel=1e-3)
    assert rates == pytest.approx([0.4, 0.3, 0.1])  # at 0, 1/3 and 2/3 of a cosine
    assert log[0]["lr"] == pytest.approx(0.1)


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(folder, tmp_path, monkeypatch):
    run(folder, *TINY, "--epochs", 1, "--exp-dir", tmp_path)
    before = weights(tmp_path)
    monkeypatch.setattr(main_pcl, "info_nce", not_finite)
    message = rf"epoch 1, step 0.*the last good state is in {tmp_path}"
    with pytest.raises(SystemExit, match=message):
        run(folder, *TINY, "--epochs", 2, "--resume", "--exp-dir", tmp_path)
    assert_same(before, weights(tmp_path))


def test_the_host_waits_for_the_device_every_few_steps(folder, tmp_path, monkeypatch):
    """A loss that is not finite is found at most SYNC_EVERY steps later, with its step."""
    calls = []
    info_nce = main_pcl.info_nce

    def failing(*args):
        calls.append(args)
        if len(calls) == 4:
            return not_finite(*args)
        return info_nce(*args)

    monkeypatch.setattr(main_pcl, "info_nce", failing)
    monkeypatch.setattr(main_pcl, "SYNC_EVERY", 6)
    with pytest.raises(SystemExit, match="epoch 0, step 3: the loss is nan"):
        run(folder, *TINY, "-b", 4, "--epochs", 1, "--exp-dir", tmp_path)
    assert len(calls) == 6
    assert_finite(weights(tmp_path))


def test_a_huge_learning_rate_stops_the_run(folder, tmp_path):
    steps = ["--epochs", 3, "-b", 4, "--bn-splits", 1]  # 12 steps per epoch
    message = r"epoch 0, step \d+: the loss is (nan|inf).*the last good state is in"
    with pytest.raises(SystemExit, match=message):
        run(folder, *TINY, *steps, "--lr", 999, "--wd", 900, "--exp-dir", tmp_path)
    assert_finite(weights(tmp_path))


def test_skipped_steps_are_shown_and_too_many_in_a_row_stop_the_run(
    folder, tmp_path, capsys, monkeypatch
):
    """An fp16 scaler that starts from too high a scale finds its own by skipping steps."""
    too_high = functools.partial(torch.amp.GradScaler, init_scale=2.0**24)
    monkeypatch.setattr(main_pcl, "GradScaler", too_high)
    options = [folder, *TINY, "--amp", "--amp-dtype", "fp16", "--cluster-head", "none"]
    options += ["--epochs", 4, "--exp-dir", tmp_path]
    log = run(*options)
    assert 0 < log[0]["skipped"] <= log[-1]["skipped"] < 12
    assert "steps skipped so far" in capsys.readouterr().out

    monkeypatch.setattr(main_pcl, "MAX_SKIPPED", 1)
    with pytest.raises(SystemExit, match="epoch 0, step 1"):
        run(*options, "--overwrite")


# -- resuming and reproducing ----------------------------------------------------------------------
def test_resuming_equals_never_having_stopped(folder, tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    parts = tmp_path / "parts"
    options = [folder, *TINY, "--epochs", 4, "--warmup", 1, "--cos", "--amp"]
    run(*options, "--exp-dir", whole, "--resume")  # nothing is there yet: from the start

    save = runtime.checkpoint.save

    def save_and_die(directory, run, *args, **kwargs):
        save(directory, run, *args, **kwargs)
        if run.epoch == 2:
            raise PowerCut

    monkeypatch.setattr(runtime.checkpoint, "save", save_and_die)
    with pytest.raises(PowerCut):
        run(*options, "--exp-dir", parts)
    monkeypatch.setattr(runtime.checkpoint, "save", save)
    run(*options, "--exp-dir", parts, "--resume")
    assert_same(weights(whole), weights(parts))

    # from an earlier checkpoint of another run
    third = tmp_path / "third"
    run(*options, "--exp-dir", third, "--resume", whole / "checkpoint_0000.pth.tar")
    assert_same(weights(whole), weights(third))


def test_tensorboard_shows_an_epoch_that_was_run_twice_once(folder, tmp_path):
    options = [folder, *TINY, "--epochs", 3, "--exp-dir", tmp_path]
    log = run(*options)
    run(*options, "--resume", tmp_path / "checkpoint_0000.pth.tar")
    events = EventAccumulator(str(tmp_path)).Reload()
    shown = events.Scalars("loss")
    assert [event.step for event in shown] == [0, 1, 2]
    assert [event.value for event in shown] == pytest.approx([row["loss"] for row in log])


def test_the_number_of_workers_changes_nothing(mixed, tmp_path, monkeypatch):
    """Nor does it change the number of threads, on which the order of sums depends."""
    monkeypatch.delenv("OMP_NUM_THREADS")
    threads_before = torch.get_num_threads()
    threads = set()
    for workers in (0, 2):
        run(mixed, *SHORT, "-j", workers, "--exp-dir", tmp_path / str(workers))
        threads.add(torch.get_num_threads())
    torch.set_num_threads(threads_before)
    assert len(threads) == 1
    assert_same(weights(tmp_path / "0"), weights(tmp_path / "2"))


def test_a_run_starts_from_given_weights(folder, tmp_path, capsys):
    """Architecture and stem are those of the file. Weights that do not fit get one line."""
    file = tmp_path / "resnet18.pth"
    torch.save(torchvision.models.resnet18().state_dict(), file)
    without_arch = TINY[2:]
    options = [folder, *without_arch, "--epochs", 1, "--init", file, "--image-size", 8]
    run(*options, "--lr", 1e-9, "--exp-dir", tmp_path / "run")
    assert "resnet18" in capsys.readouterr().out

    given = torch.load(file)
    trained = weights(tmp_path / "run")
    for name, value in given.items():
        if name.endswith("weight") and not name.startswith("fc"):
            for encoder in ("encoder_q", "encoder_k"):
                found = trained[f"module.{encoder}.{name}"]
                torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-4)

    other = ["-a", "resnet34", "--exp-dir", tmp_path / "other"]
    error = fails(capsys, main_pcl.main, *options, *other)
    assert "resnet34" in error or "missing" in error
    assert "no file" in fails(capsys, main_pcl.main, folder, *TINY, "--init", tmp_path / "none")


# -- what the figures say is wrong -----------------------------------------------------------------
def test_a_leak_is_warned_of(tmp_path, capsys):
    """Two equal views, and noise whose labels mean nothing: acc_inst rises, kNN does not."""
    rng = np.random.default_rng(0)
    for part, n in (("train", 16), ("val", 8)):
        for label in "abcd":
            directory = tmp_path / part / label
            directory.mkdir(parents=True)
            for i in range(n):
                noise = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(noise).save(directory / f"{i}.png")
    options = ["--pcl-r", 32, "--bn-splits", 1, "--epochs", 3, "--knn-every", 1]
    equal = ["--no-aug-plus", "--no-color-jitter", "--no-grayscale", "--no-flip", "--crop-min", 1]
    run(tmp_path, *TINY, *options, *equal, "--exp-dir", tmp_path / "run")
    assert "warning: acc_inst is" in capsys.readouterr().out


def log_of(*figures):
    """A log with these (acc_inst, kNN accuracy)."""
    return [{"acc_inst": acc_inst, "knn": knn, "loss_inst": 0.1} for acc_inst, knn in figures]


@pytest.mark.parametrize(
    "figures, knn_untrained, expected",
    [
        ([(50, 80), (99.9, 70)], 60, True),  # kNN is falling
        ([(99.9, 60.5)], 60, True),  # nothing was learned
        ([(99.9, 100)], 99.5, False),  # there was nothing to learn
        ([(50, 80), (99.9, 85)], 60, False),
        ([(50, 80), (98, 60)], 60, False),
        ([(99.9, None)], None, False),
    ],
)
def test_a_leak_needs_a_high_acc_inst_and_a_poor_knn(figures, knn_untrained, expected):
    log = log_of(*figures)
    assert diagnose.is_leaking(log, knn_untrained) == expected
    warning = diagnose.warn_of_leak(log, knn_untrained, settings_of())
    assert bool(warning) == expected


def settings_of(*flags):
    """The settings of a run whose defaults are filled in as far as a diagnosis needs them."""
    options = ["--pcl-r", "64", "--bn-splits", "1", "--crop-min", "0.2"]
    return vars(main_pcl.get_parser().parse_args([*options, *flags]))


def test_the_warning_of_a_leak_names_figures_and_remedies():
    settings = settings_of()
    warning = diagnose.warn_of_leak(log_of((99.9, 60.5)), 60, settings)
    assert warning.startswith("warning: acc_inst is 99.9 %")
    assert "60.5 %" in warning
    assert warning.endswith("; ".join(diagnose.remedies(0.1, settings)))


@pytest.mark.parametrize(
    "loss_inst, flags, first",
    [
        (4.17, [], "a longer --lr-warmup, a lower --lr, or --moco-m"),
        (4.17, ["--cluster-head", "report"], "a longer --warmup"),
        (0.1, ["--no-color-jitter"], "a stronger augmentation"),
        (0.1, [], "more --bn-splits"),
        (0.1, ["--cluster-head", "report"], "more --bn-splits"),
    ],
)
def test_the_first_remedy_is_the_one_that_the_figures_point_to(loss_inst, flags, first):
    settings = settings_of(*flags)
    remedies = diagnose.remedies(loss_inst, settings)
    assert remedies[0].startswith(first)
    assert len(remedies) == (4 if settings["cluster_head"] == "report" else 3)


FEW = "are few"
SHORT_QUEUE = "is short"
NO_LABELS = "no labels"
NO_PROTO_NCE = "InfoNCE alone"
ENOUGH = {"pcl_r": 64, "warmup": 20, "epochs": 200, "init": None}


@pytest.mark.parametrize(
    "n, labelled, changes, expected",
    [
        (1000, True, {}, []),
        (999, True, {}, [FEW]),
        (1000, True, {"pcl_r": 63}, [SHORT_QUEUE]),
        (999, True, {"pcl_r": 63}, [FEW, SHORT_QUEUE]),
        (1000, False, {}, [NO_LABELS]),
        (1000, True, {"epochs": 21}, []),
        (1000, True, {"epochs": 20}, [NO_PROTO_NCE]),
        (999, False, {"epochs": 5}, [FEW, NO_LABELS, NO_PROTO_NCE]),
    ],
)
def test_expectations_of_a_run(n, labelled, changes, expected):
    lines = diagnose.expectations(n, labelled, {**ENOUGH, **changes})
    for line, part in zip(lines, expected, strict=True):
        assert part in line
        assert "\n" not in line


def test_expectations_name_the_numbers():
    settings = {"pcl_r": 8, "warmup": 20, "epochs": 5, "init": None}
    few, short_queue, no_proto_nce = diagnose.expectations(300, True, settings)
    assert "300 training images" in few
    assert "--init" in few
    assert "queue of 8 keys" in short_queue
    assert "--pcl-r" in short_queue
    assert "--warmup 20" in no_proto_nce
    assert "5 epochs" in no_proto_nce


def test_a_run_that_starts_from_weights_is_not_told_to():
    (line,) = diagnose.expectations(300, True, {**ENOUGH, "init": "resnet50.pth"})
    assert "initial" in line
    assert "untrained" not in line
    assert "--init" not in line


# -- data of all kinds -----------------------------------------------------------------------------
def copy_flat(folder, target):
    """Copy the training images of `folder` to `target`, without their class folders."""
    target.mkdir()
    for path in (folder / "train").rglob("*.png"):
        shutil.copy(path, target / f"{path.parent.name} {path.name}")


def test_a_folder_without_held_out_images(folder, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train").symlink_to(folder / "train")
    log = run(tmp_path / "data", *SHORT, "--exp-dir", tmp_path / "run")
    assert log[-1]["knn"] is None
    table = evaluate("--exp-dir", tmp_path / "run")
    names = [f"{name} {k}" for k in (8, 4, 3) for name in CLUSTER_FIGURES]
    assert list(table["trained"]) == names


@pytest.mark.no_shortcuts
def test_a_folder_without_classes_trains_and_is_evaluated_on_another(folder, tmp_path, capsys):
    copy_flat(folder, tmp_path / "flat")
    run(tmp_path / "flat", *SHORT, "--exp-dir", tmp_path / "run")
    output = capsys.readouterr().out
    assert "48 training images, no classes" in output
    assert output.count("no labels") == 1
    assert "are few" in output
    assert f"next: python eval_lincls.py LABELLED_FOLDER --exp-dir {tmp_path / 'run'}" in output

    assert "no labels" in fails(capsys, eval_lincls.main, "--exp-dir", tmp_path / "run")
    table = evaluate(folder, "--exp-dir", tmp_path / "run")
    assert {"linear", "kNN 1", "AMI 3", "acc 3 held out"} <= set(table["trained"])


def test_unlabelled_training_images_are_evaluated_by_held_out_clusters(folder, tmp_path):
    copy_flat(folder, tmp_path / "train")
    (tmp_path / "val").symlink_to(folder / "val")
    log = run(tmp_path, *TINY, "--epochs", 1, "--exp-dir", tmp_path / "run")
    assert log[0]["knn"] is None
    trained = evaluate("--exp-dir", tmp_path / "run")["trained"]
    assert trained
    assert all(name.endswith("held out") for name in trained)


def test_bad_folders_and_images_get_one_line(folder, tmp_path, capsys):
    train = tmp_path / "train"
    assert "has no images" in fails(capsys, main_pcl.main, tmp_path)
    train.mkdir()
    assert "train has no images" in fails(capsys, main_pcl.main, tmp_path)

    # one image is cut off
    (train / "a").mkdir()
    for i in range(40):
        Image.new("RGB", (8, 8)).save(train / "a" / f"{i}.png")
    broken = train / "a" / "7.png"
    broken.write_bytes(broken.read_bytes()[:40])
    options = [*TINY, "--image-size", 8, "--epochs", 1, "--exp-dir", tmp_path / "run"]
    assert str(broken) in fails(capsys, main_pcl.main, tmp_path, *options)

    # images of different sizes are read on demand
    Image.new("RGB", (9, 8)).save(train / "a" / "1.png")
    for workers in (0, 1):
        assert str(broken) in fails(capsys, main_pcl.main, tmp_path, *options, "-j", workers)


# -- evaluation and checkpoints --------------------------------------------------------------------
def test_an_interrupted_published_probe_continues(folder, tmp_path, monkeypatch):
    run(folder, *TINY, "--epochs", 1, "--exp-dir", tmp_path)
    options = ["--exp-dir", tmp_path, "--protocol", "moco", "--no-baselines", "-b", 16]
    probe = tmp_path / "probe.pth.tar"
    epochs = []
    save = runtime.checkpoint.save_tensors

    def save_and_die(path, state):
        save(path, state)
        epochs.append(state["epoch"])
        if state["epoch"] == 50:
            raise PowerCut

    # the first evaluation dies after 50 epochs, the second goes on from there
    monkeypatch.setattr(runtime.checkpoint, "save_tensors", save_and_die)
    with pytest.raises(PowerCut):
        evaluate(*options)
    evaluate(*options)
    assert epochs == list(range(1, 101))
    interrupted = torch.load(probe)["layer"]

    # the third one is not interrupted
    probe.unlink()
    monkeypatch.setattr(runtime.checkpoint, "save_tensors", save)
    table = evaluate(*options)
    assert {"linear", "kNN 1"} <= set(table["trained"])
    assert_same(torch.load(probe)["layer"], interrupted)
    assert json.loads((tmp_path / "eval.json").read_text())["protocol"] == "moco"


def test_several_runs_give_mean_and_standard_deviation(folder, tmp_path, capsys):
    directories = [tmp_path / str(seed) for seed in range(3)]
    linear = []
    for seed, directory in enumerate(directories):
        run(folder, *TINY, "--epochs", 1, "--seed", seed, "--exp-dir", directory)
        table = evaluate("--exp-dir", directory, "--no-baselines")
        linear.append(table["trained"]["linear"])
    capsys.readouterr()

    evaluate("--no-baselines", "--exp-dir", *directories)
    summary = capsys.readouterr().out.split("mean and")[1]
    (line,) = (line for line in summary.splitlines() if line.startswith("linear"))
    expected = f"{statistics.mean(linear):.1f} ± {statistics.stdev(linear):.1f}"
    assert line.split("(fast)")[1].strip() == expected


def test_bad_checkpoints_get_one_line(folder, tmp_path, capsys):
    run(folder, *TINY, "--epochs", 1, "--exp-dir", tmp_path)
    good = tmp_path / "checkpoint.pth.tar"
    bad = tmp_path / "bad"
    before = weights(tmp_path)

    # training
    again = [folder, *TINY, "--epochs", 2, "--exp-dir", tmp_path, "--resume"]
    assert "cannot change" in fails(capsys, main_pcl.main, *again, "-a", "resnet18_w8")
    bad.write_bytes(good.read_bytes()[:5000])
    assert "truncated" in fails(capsys, main_pcl.main, *again, bad)

    # evaluation
    pretrained = [folder, "--pretrained", bad]
    assert "truncated" in fails(capsys, eval_lincls.main, *pretrained)
    torch.save({"a": 1}, bad)
    assert "holds no ResNet" in fails(capsys, eval_lincls.main, *pretrained)
    torch.save({"args": argparse.Namespace(), "state_dict": {}}, bad)
    assert "holds no ResNet" in fails(capsys, eval_lincls.main, *pretrained)
    assert "name the data" in fails(capsys, eval_lincls.main, "--pretrained", good)
    assert "there is no" in fails(capsys, eval_lincls.main, "--exp-dir", tmp_path / "none")

    assert_same(before, weights(tmp_path))  # nothing has changed the run


def test_published_checkpoints_are_read(folder, tmp_path):
    """MoCo's and PCL's: torchvision's names under module.encoder_q, an MLP head in fc.0, fc.2."""
    resnet = torchvision.models.resnet18().state_dict()
    state = {f"module.encoder_q.{name}": value for name, value in resnet.items()}
    state["module.encoder_q.fc.0.weight"] = torch.zeros(512, 512)
    state["module.queue"] = torch.zeros(128, 8)
    checkpoint = {"epoch": 200, "arch": "resnet18", "state_dict": state, "optimizer": {}}
    file = tmp_path / "moco.pth.tar"
    torch.save(checkpoint, file)

    options = ["--no-baselines", "--knn-k", 5, 99, "--labels", 2, 0.5, "--num-cluster", 3]
    trained = evaluate(folder, "--pretrained", file, *options)["trained"]
    assert list(trained)[:7] == [
        "linear",
        "linear, 2 per class",
        "linear, 2 per class, std",
        "linear, 0.5 of labels",
        "linear, 0.5 of labels, std",
        "kNN 5",
        "kNN 48",
    ]
    assert "acc 3 held out" in trained
    assert (tmp_path / "moco.pth.tar.eval.json").exists()
    assert (tmp_path / "moco.pth.tar.map.png").exists()
