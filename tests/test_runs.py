"""Whole runs in a reduced form: the README's commands, every combination, resuming, faults, several processes."""

import functools
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, assert_same, fails, run, weights
from PIL import Image

import eval_lincls
import main_pcl
from data import build_datasets

ROOT = Path(main_pcl.__file__).parent


@pytest.mark.parametrize("amp", [[], ["--amp"], ["--amp", "--amp-dtype", "fp16"]], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("head", ["none", "report", "twin"])
@pytest.mark.parametrize("optim", ["sgd", "adamw", "lamb", "lars"])
def test_every_combination_trains(folder, tmp_path, optim, head, amp):
    options = ["--optim", optim, "--cluster-head", head, "--epochs", 2, "--warmup", 1, "--clip-grad", 1]
    log = run(folder, *TINY, *options, *amp, "--exp-dir", tmp_path)
    assert len(log) == 2 and all(np.isfinite(row["loss"]) for row in log)
    assert log[0]["acc_proto"] == 0 and log[1]["loss"] > log[0]["loss"]  # ProtoNCE came in after the warm-up
    assert all(torch.isfinite(value).all() for value in weights(tmp_path).values())


def test_the_two_commands_of_the_readme(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    log = run("--amp", "--optim", "sgd", "--cos", "--warmup", 1, "--epochs", 3, "-a", "resnet18_w8")
    table = eval_lincls.main(["--epochs", "10"])
    assert 50 < log[-1]["knn"] <= 100 and set(table) == {"trained", "untrained", "raw pixels"}
    assert "next: python eval_lincls.py" in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "experiment_pcl").iterdir()}
    assert {"args.json", "log.csv", "checkpoint.pth.tar", "checkpoint_0002.pth.tar", "prototypes.png"} <= names
    assert len((tmp_path / "experiment_pcl/log.csv").read_text().splitlines()) == 4
    assert json.loads((tmp_path / "experiment_pcl/args.json").read_text())["warmup"] == 1


def test_resuming_equals_never_having_stopped(folder, tmp_path, monkeypatch):
    options = [folder, *TINY, "--epochs", 4, "--warmup", 1, "--cos", "--amp"]
    run(*options, "--exp-dir", tmp_path / "whole", "--resume")  # nothing there yet: from the start

    whole, parts, save = tmp_path / "whole", tmp_path / "parts", main_pcl.save

    def save_and_die(directory, state, *rest):
        save(directory, state, *rest)
        if state["epoch"] == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(main_pcl, "save", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        run(*options, "--exp-dir", parts)
    monkeypatch.setattr(main_pcl, "save", save)
    run(*options, "--exp-dir", parts, "--resume")
    assert_same(weights(whole), weights(parts))
    run(*options, "--exp-dir", parts, "--resume", whole / "checkpoint_0000.pth.tar")
    assert_same(weights(whole), weights(parts))


def test_the_number_of_workers_changes_nothing(mixed, tmp_path):
    for workers in (0, 2):
        run(mixed, *TINY, "-j", workers, "--epochs", 2, "--warmup", 1, "--exp-dir", tmp_path / str(workers))
    assert_same(weights(tmp_path / "0"), weights(tmp_path / "2"))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_the_true_norm_is_clipped(folder, tmp_path, monkeypatch, dtype):
    norms, step = [], torch.optim.SGD.step

    def spy(self, *args, **kwargs):
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms.append(torch.cat([g.flatten() for g in gradients]).norm().item())
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", spy)
    run(folder, *TINY, "--epochs", 1, "--amp", "--amp-dtype", dtype, "--clip-grad", 0.01, "--exp-dir", tmp_path)
    assert norms == pytest.approx([0.01] * len(norms), rel=1e-3) and norms


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(folder, tmp_path, monkeypatch):
    run(folder, *TINY, "--epochs", 1, "--exp-dir", tmp_path)
    before = weights(tmp_path)
    monkeypatch.setattr(main_pcl, "info_nce", lambda q, k, queue, t: ((q * torch.nan).sum(), torch.zeros(())))
    with pytest.raises(SystemExit, match=r"epoch 1, step 0.*checkpoint\.pth\.tar"):
        run(folder, *TINY, "--epochs", 2, "--resume", "--exp-dir", tmp_path)
    assert_same(before, weights(tmp_path))


def test_the_host_looks_at_the_device_every_few_steps(folder, tmp_path, monkeypatch):
    """A loss that is not finite is found at the step it came up in, at the latest LOOK_EVERY steps after."""
    info_nce, calls = main_pcl.info_nce, []

    def failing(q, *args):
        calls.append(0)
        return ((q * torch.nan).sum(), torch.zeros(())) if len(calls) == 4 else info_nce(q, *args)

    monkeypatch.setattr(main_pcl, "info_nce", failing)
    monkeypatch.setattr(main_pcl, "LOOK_EVERY", 6)
    with pytest.raises(SystemExit, match="epoch 0, step 3: the loss is nan"):
        run(folder, *TINY, "-b", 4, "--epochs", 1, "--exp-dir", tmp_path)
    assert len(calls) == 6
    assert all(torch.isfinite(value).all() for value in weights(tmp_path).values())


def test_the_keys_of_the_epoch_are_clustered_without_a_pass(folder, tmp_path, monkeypatch):
    """Every sample's key once, under its index; only what does not fill a batch is computed from the plain image."""
    load, seen, computed = main_pcl.load_features, [], []

    def spy(place, n, *rest):
        if rest:  # of the clustering
            saved = [torch.load(file, weights_only=True) for file in place.glob("batch_*")]
            seen.append(torch.cat([batch["index"] for batch in saved]).sort().values.tolist())
        return load(place, n, *rest)

    encode = main_pcl.MoCo.encode
    monkeypatch.setattr(main_pcl, "load_features", spy)
    monkeypatch.setattr(main_pcl.MoCo, "encode", lambda self, x: computed.append(len(x)) or encode(self, x))
    run(folder, *TINY, "-b", 20, "--epochs", 4, "--warmup", 1, "--exp-dir", tmp_path)  # 2 steps of 20; 8 samples left
    assert seen == [list(range(48))] * 3 and computed == [8] * 3
    run(folder, *TINY, "-b", 20, "--epochs", 2, "--warmup", 1, "--features", "pass", "--exp-dir", tmp_path / "pass")
    assert sum(computed[3:]) == 48


def test_a_huge_learning_rate_stops_the_run(folder, tmp_path):
    with pytest.raises(
        SystemExit, match=r"epoch 0, step \d: the loss is (nan|inf).*last good checkpoint: \S+checkpoint"
    ):
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
        run(*options, "--epochs", 4)


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

    assert main_pcl.leaking([row(50, 80), row(99.9, 70)], 60)  # falling
    assert main_pcl.leaking([row(99.9, 60.5)], 60)  # nothing learned
    assert not main_pcl.leaking([row(50, 80), row(99.9, 85)], 60)
    assert not main_pcl.leaking([row(50, 80), row(98, 60)], 60)
    assert not main_pcl.leaking([row(99.9, None)], None)


def test_two_processes_share_queue_clusters_and_features(folder, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    options = [*TINY, "--epochs", "3", "--warmup", "1", "--cluster-head", "twin", "--exp-dir", str(tmp_path)]
    done = subprocess.run(
        [*command, ROOT / "main_pcl.py", folder, *options], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("epoch   2") == 1 and "2 x cpu" in done.stdout
    # 3 steps of 16 keys an epoch, and every one of them is a unit column
    state = weights(tmp_path)
    torch.testing.assert_close(state["module.queue"].norm(dim=0), torch.ones(8))
    assert state["module.queue_ptr"].item() == 9 * 16 % 8


def test_a_folder_without_held_out_images(folder, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train").symlink_to(folder / "train")
    log = run(tmp_path / "data", *TINY, "--epochs", 2, "--warmup", 1, "--exp-dir", tmp_path / "run")
    assert log[-1]["knn"] is None
    table = eval_lincls.main(["--exp-dir", str(tmp_path / "run")])
    assert list(table["trained"]) == ["NMI 8", "NMI 4"]


def test_warmup_beyond_the_end_is_infonce_alone(folder, tmp_path, capsys):
    log = run(folder, *TINY, "--epochs", 1, "--warmup-epoch", 5, "--exp-dir", tmp_path)
    assert log[0]["acc_proto"] == 0 and "InfoNCE alone" in capsys.readouterr().out


@pytest.mark.parametrize(
    "args, message",
    [
        (["no-such-data"], "neither a folder nor"),
        (["--epochs", "0"], "at least 1"),
        (["--lr", "-1"], "above 0"),
        (["--optim", "adam"], "invalid choice"),
        (["-a", "resnet19"], "unknown arch"),
        (["--num-cluster", "2000"], "more than the 1437"),
        (["--num-cluster", "a"], "num-cluster"),
        (["-b", "4000"], "fewer than one batch"),
        (["-b", "12", "--bn-splits", "8"], "equal groups"),
        (["--moco-m", "1.5"], "below 1"),
        (["--resume", "no-such-file"], "no checkpoint"),
        (["--wd", "nan"], "at least 0"),
    ],
)
def test_bad_arguments_get_one_line(tmp_path, capsys, args, message):
    assert message in fails(capsys, main_pcl.main, *args, "--exp-dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("script", [main_pcl, eval_lincls])
@pytest.mark.parametrize("value", ["x", "", "-1", "nan", "inf", "1e999", "1,,2", "٣x"])
def test_no_numeric_flag_takes_a_bad_value(capsys, script, value):
    flags = [action.option_strings[-1] for action in script.get_parser()._actions if action.type]
    assert len(flags) >= 5
    for flag in flags:
        assert flag in fails(capsys, script.main, f"{flag}={value}")


def test_bad_folders_and_images_get_one_line(folder, tmp_path, capsys):
    assert "no folder train/" in fails(capsys, main_pcl.main, tmp_path)
    (tmp_path / "train").mkdir()
    assert "class" in fails(capsys, main_pcl.main, tmp_path)
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
    good = tmp_path / "checkpoint.pth.tar"
    again = [folder, *TINY, "--epochs", 2, "--exp-dir", tmp_path, "--resume"]
    assert "does not fit" in fails(capsys, main_pcl.main, *again, "-a", "resnet18_w8")
    (tmp_path / "bad").write_bytes(good.read_bytes()[:5000])
    assert "truncated" in fails(capsys, main_pcl.main, *again, tmp_path / "bad")
    assert "truncated" in fails(capsys, eval_lincls.main, "--pretrained", tmp_path / "bad")
    torch.save({"a": 1}, tmp_path / "bad")
    assert "not a checkpoint" in fails(capsys, eval_lincls.main, "--pretrained", tmp_path / "bad")
    assert "there is no" in fails(capsys, eval_lincls.main, "--exp-dir", tmp_path / "none")
    torch.load(good, weights_only=True)


def test_published_checkpoints_are_read(folder, tmp_path):
    """MoCo's and PCL's files: torchvision's keys under module.encoder_q, an MLP head in fc.0 and fc.2."""
    from torchvision.models import resnet18

    state = {f"module.encoder_q.{key}": value for key, value in resnet18().state_dict().items()}
    state |= {"module.encoder_q.fc.0.weight": torch.zeros(512, 512), "module.queue": torch.zeros(128, 8)}
    torch.save({"epoch": 200, "arch": "resnet18", "state_dict": state, "optimizer": {}}, tmp_path / "moco.pth.tar")
    options = ["--no-baselines", "--augment", "--epochs", "3", "--num-cluster", "3"]
    table = eval_lincls.main([str(folder), "--pretrained", str(tmp_path / "moco.pth.tar"), *options])
    assert set(table["trained"]) == {"top-1", "kNN", "NMI 3"}


def test_knn_is_its_formula():
    torch.manual_seed(0)
    bank, labels, queries = torch.randn(30, 5), torch.arange(30) % 3, torch.randn(8, 5)
    votes = []
    for query in queries:
        cosine = [torch.cosine_similarity(query, row, dim=0).item() for row in bank]
        nearest = sorted(range(30), key=lambda i: -cosine[i])[:7]
        votes.append(max(range(3), key=lambda c: sum(np.exp(cosine[i] / 0.1) for i in nearest if i % 3 == c)))
    truth = torch.arange(8) % 3
    expected = 100 * np.mean(np.array(votes) == truth.numpy())
    assert eval_lincls.knn_accuracy(bank, labels, queries, truth, k=7) == pytest.approx(expected)


def test_nmi_is_its_formula():
    a, b = np.array([0, 0, 1, 1, 2, 2]), np.array([0, 0, 1, 1, 1, 0])
    entropy = lambda p: -sum(x * np.log(x) for x in p)  # noqa: E731
    h_a, h_b, joint = entropy([1 / 3] * 3), entropy([1 / 2] * 2), entropy([2 / 6, 2 / 6, 1 / 6, 1 / 6])
    assert eval_lincls.nmi(a, b) == pytest.approx(2 * (h_a + h_b - joint) / (h_a + h_b))
    assert eval_lincls.nmi(a, (a + 1) % 3) == pytest.approx(1)
    assert eval_lincls.nmi(a, np.zeros(6, int)) == pytest.approx(0)


def test_views_follow_seed_epoch_and_index_alone():
    train = build_datasets(seed=3).train
    first = train[5][0][0]
    torch.rand(9)
    assert torch.equal(first, train[5][0][0]) and not torch.equal(first, train[5][0][1])
    train.set_epoch(1)
    assert not torch.equal(first, train[5][0][0])


def test_the_readme_names_only_flags_that_exist():
    known = set(main_pcl.get_parser()._option_string_actions) | set(eval_lincls.get_parser()._option_string_actions)
    torchrun = {"--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint", "--max-restarts"}
    readme = re.sub(r"#SBATCH.*", "", (ROOT / "README.md").read_text())
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z_-]*", readme)) <= known | torchrun
