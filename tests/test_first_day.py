"""What a new user meets on the first day: help, suggestions, signs of life, long runs."""

import errno
import fnmatch
import io
import os
import sys
import time
from pathlib import Path

import pytest
from conftest import TINY, assert_same, fails, run, weights

import diagnose
import eval_lincls
import main_pcl
from runtime import cli, distributed

ROOT = Path(main_pcl.__file__).parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import experiments  # noqa: E402

SCRIPTS = [main_pcl, eval_lincls, experiments]


# -- help and suggestions --------------------------------------------------------------------------
@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "cp932", "gb18030"])
def test_help_can_be_printed_in_any_encoding(script, encoding, monkeypatch):
    output = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", output)
    with pytest.raises(SystemExit) as ended:
        script.main(["--help"])
    assert ended.value.code == 0
    output.flush()
    text = output.buffer.getvalue().decode(encoding)
    assert "usage:" in text
    assert "\\x" not in text
    assert "{'" not in text  # tables and words, no Python


def test_names_that_a_terminal_cannot_show_are_escaped(monkeypatch):
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", output)
    cli.show_any_text()
    print("猫 \udcff")
    output.flush()
    assert output.buffer.getvalue() == b"\\u732b \\udcff\n"


@pytest.mark.parametrize(
    "words, advice",
    [
        (["--data", "photos"], "python SCRIPT path/to/folder"),
        (["--data=photos"], "python SCRIPT path/to/folder"),
        (["--dataset", "cifar10"], "python SCRIPT path/to/folder"),
        (["--gpu", "0"], "CUDA_VISIBLE_DEVICES=0 python SCRIPT"),
        (["--device", "cuda"], "CUDA_VISIBLE_DEVICES=0 python SCRIPT"),
        (["--world-size", "8"], "torchrun --nproc_per_node=8 SCRIPT"),
        (["--output_dir", "x"], "did you mean --exp-dir?"),
        (["--batch_size", "8"], "did you mean --batch-size?"),
        (["--nothing-like-it"], None),
    ],
)
def test_a_flag_of_other_projects_gets_advice_that_works(capsys, monkeypatch, words, advice):
    monkeypatch.setattr(sys, "argv", ["path/to/SCRIPT"])
    error = fails(capsys, main_pcl.main, *words)
    if advice is None:
        assert error.rstrip().endswith(f"unrecognized arguments: {words[0]}")
    else:
        assert error.rstrip().endswith(advice)


@pytest.mark.parametrize(
    "words, advice",
    [
        (["--checkpoint", "x"], "did you mean --pretrained?"),
        (["--init", "x"], "did you mean --pretrained?"),
        (["-a", "resnet50"], "the checkpoint says which network it is"),
        (["--schedule", "60"], "--protocol moco is the published one"),
    ],
)
def test_a_flag_of_training_or_of_another_evaluation_gets_advice(capsys, words, advice):
    assert fails(capsys, eval_lincls.main, *words).rstrip().endswith(advice)


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()]
)
def test_an_interruption_says_how_this_program_goes_on(capsys, error):
    with pytest.raises(SystemExit), cli.errors_in_one_line(ValueError, "start again"):
        raise error
    assert capsys.readouterr().err.endswith("; start again\n")


def test_workers_follow_the_cores_per_rank_of_this_machine(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(32), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 128)  # most of them are another job's
    assert distributed.default_workers() == 8
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")  # of WORLD_SIZE 16 on two machines
    monkeypatch.setenv("WORLD_SIZE", "16")
    assert distributed.default_workers() == 4


# -- signs of life ---------------------------------------------------------------------------------
def test_a_long_phase_in_a_pipe_is_never_silent(monkeypatch, capsys):
    monkeypatch.setattr(cli, "EVERY", 0.15)
    with cli.phase("reading images"):
        time.sleep(0.7)
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) <= 7
    assert all(line.startswith("reading images: 00:0") for line in lines), lines
    time.sleep(0.3)
    assert capsys.readouterr().err == ""  # it ends with the phase


def test_a_phase_that_speaks_for_itself_gets_no_further_lines(monkeypatch, capsys):
    monkeypatch.setattr(cli, "EVERY", 0.4)
    with cli.phase("training"):
        for i in range(8):
            cli.say(f"line {i}")
            time.sleep(0.1)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["train_one_epoch", "e_step", "held_out_knn"])
def test_each_part_of_a_run_is_such_a_phase(folder, tmp_path, capsys, monkeypatch, name):
    """The slowest function inside each part takes longer than EVERY."""
    inside = {"train_one_epoch": "info_nce", "e_step": "run_kmeans", "held_out_knn": "knn_accuracy"}
    original = getattr(main_pcl, inside[name])

    def slow(*args, **options):
        time.sleep(0.5)
        return original(*args, **options)

    monkeypatch.setattr(main_pcl, inside[name], slow)
    monkeypatch.setattr(cli, "EVERY", 0.2)
    run(folder, *TINY, "--epochs", 2, "--warmup", 1, "--exp-dir", tmp_path)
    title = {"train_one_epoch": "training", "e_step": "E-step", "held_out_knn": "kNN accuracy"}
    assert f"{title[name]}: 00:0" in capsys.readouterr().err


# -- runs of days ----------------------------------------------------------------------------------
LAPTOP = {"device": "cpu", "amp": False, "arch": "resnet50", "image_size": 224}


def test_a_run_of_days_is_announced_with_what_makes_it_shorter():
    warning = diagnose.warn_of_days(10 * 86400, LAPTOP)
    assert "10.0 days" in warning
    for way in ("--image-size 64", "-a resnet18", "--amp", "--epochs", "GPU"):
        assert way in warning

    # only what is not so already
    small = {"device": "cuda", "amp": True, "arch": "resnet18", "image_size": 32}
    warning = diagnose.warn_of_days(2 * 86400, small)
    assert "2.0 days" in warning
    assert "--epochs" in warning
    for way in ("--image-size", "resnet18", "--amp", "GPU"):
        assert way not in warning
    assert diagnose.warn_of_days(86399, LAPTOP) == ""


class Clock:
    """Stands for the time module: every training step takes `step` seconds."""

    def __init__(self, step):
        self.step = step
        self.now = 1000.0

    def after_a_step(self, function):
        def wrapper(*args, **options):
            self.now += self.step
            return function(*args, **options)

        return wrapper

    def time(self):
        return self.now


@pytest.mark.parametrize("epochs, warnings", [(1000, 1), (10, 0)])
def test_a_run_is_timed_by_its_first_minute(
    folder, tmp_path, capsys, monkeypatch, epochs, warnings
):
    """The first two of three steps take 80 seconds: 1,000 epochs need 1.4 days."""
    clock = Clock(step=40)
    monkeypatch.setattr(main_pcl, "info_nce", clock.after_a_step(main_pcl.info_nce))
    monkeypatch.setattr(time, "time", clock.time)
    monkeypatch.setattr("tqdm.std.time", clock.time)
    share_results = main_pcl.share_results

    def share_once_then_stop(run):  # the warning comes once, in the first epoch
        if run.epoch == 1:
            raise KeyboardInterrupt
        share_results(run)

    monkeypatch.setattr(main_pcl, "share_results", share_once_then_stop)
    with pytest.raises(SystemExit):
        run(folder, *TINY, "--epochs", epochs, "--warmup", 0, "--exp-dir", tmp_path)
    output = capsys.readouterr().out
    assert output.count("warning: at this speed the run takes") == warnings
    if warnings:
        assert "the run takes 1.4 days" in output


def test_slow_steps_are_looked_at_one_by_one(folder, tmp_path, monkeypatch):
    """So that a loss that is not finite, and the remaining time, are known after minutes."""
    clock = Clock(step=40)
    counts = []
    collect_results = main_pcl.collect_results

    def count(run, pending, keys):
        counts.append(len(pending))
        collect_results(run, pending, keys)

    monkeypatch.setattr(main_pcl, "collect_results", count)
    run(folder, *TINY, "--epochs", 1, "--exp-dir", tmp_path / "fast")
    assert counts == [3]
    monkeypatch.setattr(main_pcl, "info_nce", clock.after_a_step(main_pcl.info_nce))
    monkeypatch.setattr(time, "time", clock.time)
    run(folder, *TINY, "--epochs", 1, "--exp-dir", tmp_path / "slow")
    assert counts == [3, 1, 1, 1, 0]
    assert_same(weights(tmp_path / "fast"), weights(tmp_path / "slow"))


# -- what is left behind ---------------------------------------------------------------------------
def test_what_runs_leave_is_ignored_by_git():
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    patterns = [pattern.strip("/") for pattern in ignored]
    for name in ("experiment_pcl", "experiment_pcl_12", "runs", "datasets", "features"):
        assert any(fnmatch.fnmatch(name, pattern) for pattern in patterns), name
