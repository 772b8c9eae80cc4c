"""Whole runs in a reduced form: the README's commands, every combination, resuming, what stops a run."""

import argparse
import functools
import json
import shutil

import numpy as np
import pytest
import torch
import torchvision
from conftest import TINY, assert_same, fails, run, weights
from PIL import Image

import eval_lincls
import main_pcl
import runtime.checkpoint


@pytest.mark.parametrize("amp", [[], ["--amp"], ["--amp", "--amp-dtype", "fp16"]], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("head", ["none", "report"])
@pytest.mark.parametrize("optim", ["sgd", "adamw", "lamb", "lars"])
def test_every_combination_trains(folder, tmp_path, optim, head, amp):
    options = ["--optim", optim, "--cluster-head", head, "--epochs", 2, "--warmup", 1, "--clip-grad", 1]
    log = run(folder, *TINY, *options, *amp, "--exp-dir", tmp_path)
    assert len(log) == 2 and all(np.isfinite(row["loss"]) for row in log)
    assert log[0]["acc_proto"] == 0 and log[1]["loss"] > log[0]["loss"]  # ProtoNCE came in after the warm-up
    assert all(torch.isfinite(value).all() for value in weights(tmp_path).values())


def test_the_default_run_learns_and_leaves_its_files(tmp_path, monkeypatch, capsys):
    """Ten epochs on the digits at twice the rate are enough to see it."""
    monkeypatch.chdir(tmp_path)
    log = run("--amp", "--optim", "sgd", "--cos", "--warmup", 2, "--epochs", 10, "--lr", 0.03)
    table, directory = eval_lincls.main([]), tmp_path / "experiment_pcl"
    assert set(table) == {"trained", "untrained", "raw pixels"}
    assert table["trained"]["kNN 28"] > table["untrained"]["kNN 28"] + 3
    assert table["trained"]["AMI 10"] > table["untrained"]["AMI 10"] + 3
    assert log[-1]["knn"] == pytest.approx(table["trained"]["kNN 28"], abs=2)  # in mixed precision, and in full
    report = json.loads((directory / "eval.json").read_text())
    assert report["figures"] == table and report["epoch"] == 10 and report["protocol"] == "fast"
    assert "next: python eval_lincls.py" in capsys.readouterr().out
    names = {path.name for path in directory.iterdir()}
    assert {"args.json", "log.csv", "checkpoint.pth.tar", "checkpoint_0009.pth.tar", "eval.json"} <= names
    assert {"curves.png", "prototypes.png", "map.png"} <= names
    assert len((directory / "log.csv").read_text().splitlines()) == 11
    assert json.loads((directory / "args.json").read_text())["warmup"] == 2


def test_resuming_equals_never_having_stopped(folder, tmp_path, monkeypatch):
    options = [folder, *TINY, "--epochs", 4, "--warmup", 1, "--cos", "--amp"]
    run(*options, "--exp-dir", tmp_path / "whole", "--resume")  # nothing there yet: from the start

    whole, parts, save = tmp_path / "whole", tmp_path / "parts", runtime.checkpoint.save

    def save_and_die(directory, run, *rest, **kwargs):
        save(directory, run, *rest, **kwargs)
        if run.epoch == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(runtime.checkpoint, "save", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        run(*options, "--exp-dir", parts)
    monkeypatch.setattr(runtime.checkpoint, "save", save)
    run(*options, "--exp-dir", parts, "--resume")
    assert_same(weights(whole), weights(parts))
    run(*options, "--exp-dir", parts, "--resume", whole / "checkpoint_0000.pth.tar")
    assert_same(weights(whole), weights(parts))


def test_the_number_of_workers_changes_nothing(mixed, tmp_path, monkeypatch):
    """The number of threads, on which sums depend, follows from the data alone, too."""
    monkeypatch.delenv("OMP_NUM_THREADS")
    threads, seen = torch.get_num_threads(), set()
    for workers in (0, 2):
        run(mixed, *TINY, "-j", workers, "--epochs", 2, "--warmup", 1, "--exp-dir", tmp_path / str(workers))
        seen.add(torch.get_num_threads())
    torch.set_num_threads(threads)
    assert len(seen) == 1
    assert_same(weights(tmp_path / "0"), weights(tmp_path / "2"))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_every_step_has_its_rate_and_the_true_norm_is_clipped(folder, tmp_path, monkeypatch, dtype):
    norms, rates, step = [], [], torch.optim.SGD.step

    def spy(self, *args, **kwargs):
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms.append(torch.cat([g.flatten() for g in gradients]).norm().item())
        rates.extend(group["lr"] for group in self.param_groups)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", spy)
    options = ["--amp", "--amp-dtype", dtype, "--clip-grad", 0.01, "--epochs", 1, "--lr", 0.4, "--cos"]
    log = run(folder, *TINY, *options, "--exp-dir", tmp_path)
    assert norms == pytest.approx([0.01] * 3, rel=1e-3)
    assert rates == pytest.approx([0.4, 0.3, 0.1]) and log[0]["lr"] == pytest.approx(0.1)  # at 0, 1/3, 2/3 of a cosine


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(folder, tmp_path, monkeypatch):
    run(folder, *TINY, "--epochs", 1, "--exp-dir", tmp_path)
    before = weights(tmp_path)
    monkeypatch.setattr(main_pcl, "info_nce", lambda q, k, queue, t: ((q * torch.nan).sum(), torch.zeros(())))
    with pytest.raises(SystemExit, match=rf"epoch 1, step 0.*what was good is in {tmp_path}"):
        run(folder, *TINY, "--epochs", 2, "--resume", "--exp-dir", tmp_path)
    assert_same(before, weights(tmp_path))


def test_the_host_waits_for_the_device_every_few_steps(folder, tmp_path, monkeypatch):
    """A loss that is not finite is found at the step it came up in, at the latest SYNC_EVERY steps after."""
    info_nce, calls = main_pcl.info_nce, []

    def failing(q, *args):
        calls.append(0)
        return ((q * torch.nan).sum(), torch.zeros(())) if len(calls) == 4 else info_nce(q, *args)

    monkeypatch.setattr(main_pcl, "info_nce", failing)
    monkeypatch.setattr(main_pcl, "SYNC_EVERY", 6)
    with pytest.raises(SystemExit, match="epoch 0, step 3: the loss is nan"):
        run(folder, *TINY, "-b", 4, "--epochs", 1, "--exp-dir", tmp_path)
    assert len(calls) == 6
    assert all(torch.isfinite(value).all() for value in weights(tmp_path).values())


def test_the_keys_of_the_epoch_are_clustered_without_a_pass(folder, tmp_path, monkeypatch):
    """Every sample's key once, in a file for SYNC_EVERY steps; only what fills no batch is computed from its image."""
    run_kmeans, clustered, saved, computed = main_pcl.run_kmeans, [], [], []

    def spy(features, *args, **kwargs):
        files = [torch.load(path, weights_only=True) for path in tmp_path.glob("features/keys/batch_*")]
        clustered.append(features.copy())
        saved.append({tuple(batch["index"].tolist()): batch["features"] for batch in files})
        return run_kmeans(features, *args, **kwargs)

    encode = main_pcl.MoCo.encode
    monkeypatch.setattr(main_pcl, "run_kmeans", spy)
    monkeypatch.setattr(main_pcl, "SYNC_EVERY", 2)
    monkeypatch.setattr(main_pcl.MoCo, "encode", lambda self, x: computed.append(len(x)) or encode(self, x))
    options = [folder, *TINY, "-b", 14, "--bn-splits", 1, "--num-cluster", 4, "--warmup", 1]
    run(*options, "--epochs", 4, "--exp-dir", tmp_path)  # 3 steps of 14, 6 images left over
    assert computed == [6] * 3
    for features, files in zip(clustered, saved, strict=True):
        index = [i for part in files for i in part]
        assert sorted(map(len, files)) == [14, 28] and len(set(index)) == 42
        np.testing.assert_array_equal(features[index], torch.cat(list(files.values())))
        np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, rtol=1e-5)
    assert not (tmp_path / "features").exists()
    run(*options, "--epochs", 2, "--features", "pass", "--exp-dir", tmp_path / "pass")
    assert sum(computed[3:]) == 48


def test_a_huge_learning_rate_stops_the_run(folder, tmp_path):
    with pytest.raises(SystemExit, match=r"epoch 0, step \d: the loss is (nan|inf).*what was good is in"):
        run(folder, *TINY, "--epochs", 3, "--lr", 1e9, "--exp-dir", tmp_path)
    assert all(torch.isfinite(value).all() for value in weights(tmp_path).values())


def test_skipped_steps_are_shown_and_too_many_in_a_row_stop_the_run(folder, tmp_path, capsys, monkeypatch):
    """An fp16 scaler that starts from a scale that overflows finds its own by skipping steps."""
    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(torch.amp.GradScaler, init_scale=2.0**24))
    options = [folder, *TINY, "--amp", "--amp-dtype", "fp16", "--cluster-head", "none", "--exp-dir", tmp_path]
    log = run(*options, "--epochs", 4)
    assert 0 < log[0]["skipped"] <= log[-1]["skipped"] < 12 and "steps skipped" in capsys.readouterr().out
    monkeypatch.setattr(main_pcl, "MAX_SKIPPED", 1)
    with pytest.raises(SystemExit, match="epoch 0, step 1"):
        run(*options, "--epochs", 4, "--overwrite")


def test_a_leak_is_warned_of(tmp_path, capsys):
    """Noise with labels that mean nothing, and two views that are the same: acc_inst without anything learned."""
    rng = np.random.default_rng(0)
    for part, n in (("train", 16), ("val", 8)):
        for label in "abcd":
            (tmp_path / part / label).mkdir(parents=True)
            for i in range(n):
                noise = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
                noise.save(tmp_path / part / label / f"{i}.png")
    options = [*TINY, "--pcl-r", 32, "--bn-splits", 1, "--epochs", 3, "--knn-every", 1, "--exp-dir", tmp_path / "run"]
    same = ["--no-aug-plus", "--no-color-jitter", "--no-grayscale", "--no-flip", "--crop-min", 1]
    run(tmp_path, *options, *same)
    assert "warning: acc_inst is" in capsys.readouterr().out


def test_the_leak_warning_needs_both_signs():
    def row(acc_inst, knn):
        return {"acc_inst": acc_inst, "knn": knn}

    assert runtime.checkpoint.leaking([row(50, 80), row(99.9, 70)], 60)  # falling
    assert runtime.checkpoint.leaking([row(99.9, 60.5)], 60)  # nothing learned
    assert not runtime.checkpoint.leaking([row(50, 80), row(99.9, 85)], 60)
    assert not runtime.checkpoint.leaking([row(50, 80), row(98, 60)], 60)
    assert not runtime.checkpoint.leaking([row(99.9, None)], None)


def test_a_folder_without_held_out_images(folder, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train").symlink_to(folder / "train")
    log = run(tmp_path / "data", *TINY, "--epochs", 2, "--warmup", 1, "--exp-dir", tmp_path / "run")
    assert log[-1]["knn"] is None
    table = eval_lincls.main(["--exp-dir", str(tmp_path / "run")])
    names = [f"{name} {k}" for k in (8, 4, 3) for name in ("NMI", "AMI", "ARI", "acc")]
    assert list(table["trained"]) == names


def test_a_folder_without_classes_trains_and_is_evaluated_on_another(folder, tmp_path, capsys):
    (tmp_path / "flat").mkdir()
    for path in (folder / "train").rglob("*.png"):
        shutil.copy(path, tmp_path / "flat" / f"{path.parent.name} {path.name}")
    run(tmp_path / "flat", *TINY, "--epochs", 2, "--warmup", 1, "--exp-dir", tmp_path / "run")
    said = capsys.readouterr().out
    assert "48 training images, no classes" in said and said.count("no labels") == 1 and "are few" in said
    assert f"next: python eval_lincls.py LABELLED_FOLDER --exp-dir {tmp_path / 'run'}" in said
    assert "no labels" in fails(capsys, eval_lincls.main, "--exp-dir", tmp_path / "run")
    table = eval_lincls.main([str(folder), "--exp-dir", str(tmp_path / "run")])
    assert {"linear", "kNN 1", "AMI 3", "acc 3 held out"} <= set(table["trained"])


def test_unlabelled_training_images_are_evaluated_by_clusters_of_the_held_out_ones(folder, tmp_path):
    (tmp_path / "train").mkdir()
    for path in (folder / "train").rglob("*.png"):
        shutil.copy(path, tmp_path / "train" / f"{path.parent.name} {path.name}")
    (tmp_path / "val").symlink_to(folder / "val")
    log = run(tmp_path, *TINY, "--epochs", 1, "--exp-dir", tmp_path / "run")
    assert log[0]["knn"] is None
    table = eval_lincls.main(["--exp-dir", str(tmp_path / "run")])
    assert table["trained"] and all(name.endswith("held out") for name in table["trained"])


def test_a_run_starts_from_given_weights(folder, tmp_path, capsys):
    """Architecture and stem are the file's; of weights that do not fit one line says so."""
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "resnet18.pth")
    options = [folder, *TINY[2:], "--epochs", 1, "--init", tmp_path / "resnet18.pth", "--image-size", 8]
    run(*options, "--lr", 1e-9, "--exp-dir", tmp_path / "run")
    given, trained = torch.load(tmp_path / "resnet18.pth"), weights(tmp_path / "run")
    for name, value in given.items():
        if name.endswith("weight") and not name.startswith("fc"):
            for encoder in ("encoder_q", "encoder_k"):
                torch.testing.assert_close(trained[f"module.{encoder}.{name}"], value, rtol=1e-4, atol=1e-4)
    assert "resnet18" in capsys.readouterr().out
    error = fails(capsys, main_pcl.main, *options, "-a", "resnet34", "--exp-dir", tmp_path / "other")
    assert "resnet34" in error or "missing" in error
    assert "no file" in fails(capsys, main_pcl.main, folder, *TINY, "--init", tmp_path / "none")


def test_the_published_probe_goes_on_where_it_was_killed(folder, tmp_path, monkeypatch):
    run(folder, *TINY, "--epochs", 1, "--exp-dir", tmp_path)
    options = ["--exp-dir", str(tmp_path), "--protocol", "moco", "--no-baselines", "-b", "16"]
    probe, save, seen = tmp_path / "probe.pth.tar", runtime.checkpoint.save_tensors, []

    def save_and_die(path, state):
        save(path, state)
        seen.append(state["epoch"])
        if state["epoch"] == 50:
            raise KeyboardInterrupt

    monkeypatch.setattr(runtime.checkpoint, "save_tensors", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        eval_lincls.main(options)
    eval_lincls.main(options)
    assert seen == list(range(1, 101))
    layer = torch.load(probe)["layer"]
    probe.unlink()
    monkeypatch.setattr(runtime.checkpoint, "save_tensors", save)
    assert {"linear", "kNN 1"} <= set(eval_lincls.main(options)["trained"])
    assert_same(torch.load(probe)["layer"], layer)
    assert json.loads((tmp_path / "eval.json").read_text())["protocol"] == "moco"


def test_several_runs_give_mean_and_standard_deviation(folder, tmp_path, capsys):
    tables = []
    for seed in range(3):
        run(folder, *TINY, "--epochs", 1, "--seed", seed, "--exp-dir", tmp_path / str(seed))
        tables.append(eval_lincls.main(["--exp-dir", str(tmp_path / str(seed)), "--no-baselines"])["trained"])
    capsys.readouterr()
    eval_lincls.main(["--no-baselines", "--exp-dir", *(str(tmp_path / str(seed)) for seed in range(3))])
    mean, std = (f([table["linear"] for table in tables]) for f in (np.mean, functools.partial(np.std, ddof=1)))
    (line,) = (line for line in capsys.readouterr().out.split("mean and")[1].splitlines() if line.startswith("linear"))
    assert line.split(maxsplit=1)[1] == f"{mean:.1f} ± {std:.1f}"


def test_symmetric_makes_each_view_the_query_once(folder, tmp_path, monkeypatch):
    """Its keys all enter the queue, but a sample is clustered by one of its two, as without it."""
    forward, save, calls, saved = main_pcl.MoCo.forward, main_pcl.save_features, [], []

    def spy(self, im_q, im_k, *args, **options):
        calls.append((im_q, im_k))
        return forward(self, im_q, im_k, *args, **options)

    monkeypatch.setattr(main_pcl.MoCo, "forward", spy)
    monkeypatch.setattr(main_pcl, "save_features", lambda *args: saved.append(args[2:]) or save(*args))
    run(folder, *TINY, "--pcl-r", 48, "--epochs", 2, "--warmup", 1, "--symmetric", "--exp-dir", tmp_path)
    assert len(calls) == 6
    for im_q, im_k in calls:
        (a, b), (c, d) = im_q.chunk(2), im_k.chunk(2)
        assert len(im_q) == 32 and torch.equal(a, d) and torch.equal(b, c) and not torch.equal(a, b)
    ((index, features),) = saved
    assert len(features) == 48 and sorted(index.tolist()) == list(range(48))
    assert weights(tmp_path)["module.queue_ptr"] == 6 * 32 % 48


def test_warmup_beyond_the_end_is_infonce_alone(folder, tmp_path, capsys):
    log = run(folder, *TINY, "--epochs", 1, "--warmup-epoch", 5, "--exp-dir", tmp_path)
    assert log[0]["acc_proto"] == 0 and "InfoNCE alone" in capsys.readouterr().out


def test_bad_folders_and_images_get_one_line(folder, tmp_path, capsys):
    assert "has no images" in fails(capsys, main_pcl.main, tmp_path)
    (tmp_path / "train").mkdir()
    assert "train has no images" in fails(capsys, main_pcl.main, tmp_path)
    for i in range(40):
        Image.new("RGB", (8, 8)).save(
            (tmp_path / "train").joinpath("a").mkdir(exist_ok=True) or tmp_path / f"train/a/{i}.png"
        )
    broken = tmp_path / "train" / "a" / "7.png"
    broken.write_bytes(broken.read_bytes()[:40])
    options = [*TINY, "--image-size", 8, "--epochs", 1, "--exp-dir", tmp_path / "run"]
    assert str(broken) in fails(capsys, main_pcl.main, tmp_path, *options)
    Image.new("RGB", (9, 8)).save(tmp_path / "train/a/1.png")  # not all of one size: they are read as needed
    for workers in (0, 1):
        assert str(broken) in fails(capsys, main_pcl.main, tmp_path, *options, "-j", workers)


def test_bad_checkpoints_get_one_line(folder, tmp_path, capsys):
    run(folder, *TINY, "--epochs", 1, "--exp-dir", tmp_path)
    good, before = tmp_path / "checkpoint.pth.tar", weights(tmp_path)
    again = [folder, *TINY, "--epochs", 2, "--exp-dir", tmp_path, "--resume"]
    assert "cannot change" in fails(capsys, main_pcl.main, *again, "-a", "resnet18_w8")
    (tmp_path / "bad").write_bytes(good.read_bytes()[:5000])
    assert "truncated" in fails(capsys, main_pcl.main, *again, tmp_path / "bad")
    assert "truncated" in fails(capsys, eval_lincls.main, folder, "--pretrained", tmp_path / "bad")
    torch.save({"a": 1}, tmp_path / "bad")
    assert "holds no ResNet" in fails(capsys, eval_lincls.main, folder, "--pretrained", tmp_path / "bad")
    torch.save({"args": argparse.Namespace(), "state_dict": {}}, tmp_path / "bad")
    assert "argparse.Namespace" in fails(capsys, eval_lincls.main, folder, "--pretrained", tmp_path / "bad")
    assert "name the data" in fails(capsys, eval_lincls.main, "--pretrained", good)
    assert "there is no" in fails(capsys, eval_lincls.main, "--exp-dir", tmp_path / "none")
    assert_same(before, weights(tmp_path))  # what was refused has left the run as it was


def test_published_checkpoints_are_read(folder, tmp_path):
    """MoCo's and PCL's files: torchvision's keys under module.encoder_q, an MLP head in fc.0 and fc.2."""
    from torchvision.models import resnet18

    state = {f"module.encoder_q.{key}": value for key, value in resnet18().state_dict().items()}
    state |= {"module.encoder_q.fc.0.weight": torch.zeros(512, 512), "module.queue": torch.zeros(128, 8)}
    torch.save({"epoch": 200, "arch": "resnet18", "state_dict": state, "optimizer": {}}, tmp_path / "moco.pth.tar")
    options = ["--no-baselines", "--knn-k", "5", "99", "--labels", "2", "0.5", "--num-cluster", "3"]
    table = eval_lincls.main([str(folder), "--pretrained", str(tmp_path / "moco.pth.tar"), *options])
    figures = ["linear", "linear, 2 per class", "linear, 2 per class, std", "linear, 0.5 of labels"]
    figures += ["linear, 0.5 of labels, std", "kNN 5", "kNN 48"]
    assert list(table["trained"])[:7] == figures and "acc 3 held out" in table["trained"]
    assert (tmp_path / "moco.pth.tar.eval.json").exists() and (tmp_path / "moco.pth.tar.map.png").exists()
