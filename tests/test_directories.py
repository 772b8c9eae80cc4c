"""A run's directory: never overwritten unasked, what may change on resuming, args.json."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, assert_same, fails, run, weights

import eval_lincls
import main_pcl
import runtime.directory
from runtime.directory import choose_directory

SHORT = [*TINY, "--epochs", 2, "--warmup", 1]


def snapshot(directory):
    """Time and size of every file, by name."""
    files = {}
    for path in directory.iterdir():
        status = path.stat()
        files[path.name] = (status.st_mtime_ns, status.st_size)
    return files


def read_args(directory):
    return json.loads((directory / "args.json").read_text())


def count_lines(path):
    return len(path.read_text().splitlines())


# -- names, and runs that are there already --------------------------------------------------------
def test_the_same_command_again_takes_the_next_free_directory(
    folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    for name in ("experiment_pcl", "experiment_pcl_2", "experiment_pcl_3"):
        before = {path: snapshot(path) for path in tmp_path.iterdir()}
        run(folder, *SHORT, "--seed", len(before))
        assert f"in {name}\n" in capsys.readouterr().out
        assert (tmp_path / name / "checkpoint.pth.tar").exists()
        assert all(snapshot(path) == files for path, files in before.items())

    # --resume and the evaluation take the newest
    run(folder, *SHORT, "--epochs", 3, "--seed", 2, "--resume")
    assert count_lines(tmp_path / "experiment_pcl_3" / "log.csv") == 4
    assert count_lines(tmp_path / "experiment_pcl" / "log.csv") == 3
    newest = eval_lincls.main(["--no-baselines"])
    assert newest == eval_lincls.main(["--exp-dir", "experiment_pcl_3", "--no-baselines"])


def test_the_newest_directory_is_the_one_with_the_highest_number(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("experiment_pcl_2", "experiment_pcl_10", "experiment_pcl_01", "experiment_pcl_x"):
        Path(name).mkdir()
    assert choose_directory(None, resume="") == Path("experiment_pcl_10")
    assert choose_directory(None, resume=None) == Path("experiment_pcl_11")


def test_a_run_from_another_runs_checkpoint_leaves_all_runs_alone(
    folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    run(folder, *SHORT, "--exp-dir", "other")
    run(folder, *SHORT, "--seed", 1)  # in experiment_pcl
    before = {name: snapshot(Path(name)) for name in ("other", "experiment_pcl")}
    checkpoint = "other/checkpoint_0000.pth.tar"

    # without --exp-dir it takes the next directory
    log = run(folder, *SHORT, "--resume", checkpoint)
    assert len(log) == 2
    assert_same(weights(Path("experiment_pcl_2")), weights(Path("other")))

    # a directory that holds another run is refused
    words = [folder, *SHORT, "--resume", checkpoint, "--exp-dir", "experiment_pcl"]
    assert "holds a run at epoch 2 of 2" in fails(capsys, main_pcl.main, *words)
    assert {name: snapshot(Path(name)) for name in before} == before
    run(*words, "--overwrite")
    assert_same(weights(Path("experiment_pcl")), weights(Path("other")))

    # in its own directory the run goes back to the checkpoint
    run(folder, *SHORT, "--resume", checkpoint, "--exp-dir", "other")
    assert count_lines(Path("other/log.csv")) == 3


def test_a_named_directory_that_holds_a_run_is_refused(folder, tmp_path, capsys):
    run(folder, *SHORT, "--exp-dir", tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "checkpoint_best.pth").write_text("mine, too")
    before = snapshot(tmp_path)
    message = fails(capsys, main_pcl.main, folder, *SHORT, "--exp-dir", tmp_path)
    assert "holds a run at epoch 2 of 2" in message
    assert "--resume" in message
    assert "--overwrite" in message
    assert snapshot(tmp_path) == before

    # --overwrite removes the run's files and no others
    run(folder, *TINY, "--epochs", 1, "--seed", 1, "--exp-dir", tmp_path, "--overwrite")
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / "checkpoint_best.pth").exists()
    names = {path.name for path in tmp_path.glob("checkpoint*.pth.tar")}
    assert names == {"checkpoint.pth.tar", "checkpoint_0000.pth.tar"}
    assert len(list(tmp_path.glob("events*"))) == 1
    assert not (tmp_path / "prototypes.png").exists()


# -- restarts by torchrun --------------------------------------------------------------------------
@pytest.fixture
def torchrun(monkeypatch):
    """A function of a name and a number: say that this torchrun has restarted us so many times."""

    def start(name, restarts):
        error_file = f"/tmp/{name}/attempt_{restarts}/0/error.json"
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", error_file)
        monkeypatch.setattr(runtime.directory, "RESTARTS", restarts)

    return start


class Killed(Exception):
    """Stands for the death of a process."""


def run_and_die_in(name, *words):
    """Train until main_pcl.py calls this function of its own."""

    def die(*_, **__):
        raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(main_pcl, name, die)
        run(*words)


def test_a_restart_does_what_its_first_start_was_to_do(folder, tmp_path, torchrun, capsys):
    """torchrun starts the same command again, whatever the reason for its end."""
    torchrun("a", 0)
    run(folder, *SHORT, "--exp-dir", tmp_path / "old")
    before = snapshot(tmp_path / "old")

    # another run's directory is refused again
    command = [folder, *SHORT, "--seed", 1, "--exp-dir", tmp_path / "old"]
    for restarts in (0, 1):
        torchrun("b", restarts)
        assert "holds a run" in fails(capsys, main_pcl.main, *command)
    assert snapshot(tmp_path / "old") == before

    # a run that is to overwrite another does not continue that one
    torchrun("c", 0)
    run_and_die_in("build_model", *command, "--overwrite")
    torchrun("c", 1)
    log = run(*command, "--overwrite")
    undisturbed = run(folder, *SHORT, "--seed", 1, "--exp-dir", tmp_path / "undisturbed")
    assert [row["loss"] for row in log] == [row["loss"] for row in undisturbed]


def test_a_restart_continues_the_run_of_its_own_torchrun(
    folder, tmp_path, monkeypatch, torchrun, capsys
):
    monkeypatch.chdir(tmp_path)

    # another job has been killed; this one dies before it has a directory
    torchrun("a", 0)
    run_and_die_in("e_step", folder, *SHORT)
    before = snapshot(Path("experiment_pcl"))
    torchrun("b", 0)
    run_and_die_in("build_model", folder, *SHORT, "--seed", 1)
    torchrun("b", 1)
    run_and_die_in("e_step", folder, *SHORT, "--seed", 1)
    assert snapshot(Path("experiment_pcl")) == before

    # each continues its own, also after its end
    for name, seed, directory in (("a", 0, "experiment_pcl"), ("b", 1, "experiment_pcl_2")):
        torchrun(name, 2)
        for said in ("resumed at epoch 0", "holds a finished run"):
            capsys.readouterr()
            assert len(run(folder, *SHORT, "--seed", seed)) == 2
            assert said in capsys.readouterr().out
            assert read_args(Path(directory))["seed"] == seed
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("name", ["old", "new"])
def test_a_restart_before_the_first_checkpoint_starts_from_the_same_file(
    folder, tmp_path, torchrun, capsys, name
):
    """In a directory of its own, or in that of the file, which has later checkpoints."""
    run(folder, *SHORT, "--exp-dir", tmp_path / "old")
    command = [folder, *SHORT, "--lr", 0.5, "--exp-dir", tmp_path / name]
    command += ["--resume", tmp_path / "old/checkpoint_0000.pth.tar"]
    torchrun("a", 0)
    run_and_die_in("speed_up_encoders", *command)
    capsys.readouterr()
    torchrun("a", 1)
    run(*command)
    assert "resumed at epoch 1" in capsys.readouterr().out
    assert read_args(tmp_path / name)["parts"][-1]["epoch"] == 1


def test_a_restart_takes_the_arch_of_init_again(folder, tmp_path, torchrun):
    run(folder, *SHORT, "--exp-dir", tmp_path / "old")
    command = [folder, *SHORT[2:], "--init", tmp_path / "old/checkpoint.pth.tar"]
    command += ["--exp-dir", tmp_path / "new"]  # without --arch
    torchrun("a", 0)
    run_and_die_in("e_step", *command)
    torchrun("a", 1)
    assert len(run(*command)) == 2


# -- what may change on resuming -------------------------------------------------------------------
def test_a_run_is_overwritten_only_if_the_new_one_begins(folder, tmp_path, capsys):
    run(folder, *SHORT, "--exp-dir", tmp_path / "old")
    before = snapshot(tmp_path / "old")
    run(folder, *SHORT, "-a", "resnet18_w8", "--exp-dir", tmp_path / "other")
    other = tmp_path / "other/checkpoint.pth.tar"
    command = [folder, *SHORT, "--exp-dir", tmp_path / "old", "--overwrite", "--resume"]
    assert "there is no file" in fails(capsys, main_pcl.main, *command, tmp_path / "typo.pth.tar")
    assert "cannot change arch" in fails(capsys, main_pcl.main, *command, other)
    run(*command, other, "-a", "resnet18_w8")
    assert f"{other} holds a finished run" in capsys.readouterr().out
    assert snapshot(tmp_path / "old") == before


def test_a_checkpoint_that_is_not_there_leaves_no_directory(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fails(capsys, main_pcl.main, folder, *SHORT, "--resume", "typo.pth.tar")
    assert list(tmp_path.iterdir()) == []


def test_resuming_a_finished_run_writes_nothing(folder, tmp_path, capsys):
    log = run(folder, *SHORT, "--exp-dir", tmp_path)
    before = snapshot(tmp_path)
    assert run(folder, *SHORT, "--exp-dir", tmp_path, "--resume") == log
    assert "holds a finished run of 2 epochs" in capsys.readouterr().out
    assert snapshot(tmp_path) == before


# -- changes on resuming ---------------------------------------------------------------------------
@pytest.mark.parametrize("optim", ["sgd", "lamb"])
def test_weight_decay_and_momentum_can_change_on_resuming(folder, tmp_path, optim):
    options = [folder, *TINY, "--optim", optim, "--exp-dir", tmp_path]
    run(*options, "--epochs", 1, "--wd", 0.5, "--momentum", 0.5)
    run(*options, "--epochs", 2, "--wd", 0.25, "--momentum", 0.75, "--resume")
    groups = torch.load(tmp_path / "checkpoint.pth.tar", weights_only=True)["optimizer"][
        "param_groups"
    ]
    assert {group["weight_decay"] for group in groups} - {0} == {0.25}
    if optim == "sgd":
        assert {group["momentum"] for group in groups} == {0.75}
    run(*options, "--epochs", 3, "--wd", 0, "--resume")
    assert len(run(*options, "--epochs", 4, "--wd", 0.5, "--resume")) == 4


def test_a_run_continues_without_the_file_it_started_from(folder, tmp_path):
    run(folder, *SHORT, "--exp-dir", tmp_path / "first")
    start = shutil.copy(tmp_path / "first/checkpoint.pth.tar", tmp_path)
    options = [folder, *TINY, "--init", start, "--exp-dir", tmp_path / "second"]
    run(*options, "--epochs", 1)
    Path(start).unlink()
    assert len(run(*options, "--epochs", 2, "--resume")) == 2


def test_changes_on_resuming_are_named_and_some_refused(folder, tmp_path, capsys):
    run(folder, *SHORT, "--exp-dir", tmp_path)
    before = snapshot(tmp_path)
    again = [folder, *SHORT, "--exp-dir", tmp_path, "--resume", "--epochs", 3]
    for flag, value, change in (
        ("-a", "resnet18_w8", "arch resnet18_w4 -> resnet18_w8"),
        ("--cluster-head", "report", "cluster_head none -> report"),
        ("--optim", "adamw", "optim sgd -> adamw"),
        ("--pcl-r", 16, "pcl_r 8 -> 16"),
        ("--low-dim", 64, "low_dim 128 -> 64"),
    ):
        assert change in fails(capsys, main_pcl.main, *again, flag, value)
        assert snapshot(tmp_path) == before

    run(*again, "--lr", 0.5, "--num-cluster", "3,5")
    output = capsys.readouterr().out
    assert "lr 0.001875 -> 0.5" in output
    assert "num_cluster [4, 8] -> [3, 5]" in output
    assert "seed" not in output

    stored = read_args(tmp_path)
    first, second = stored["parts"]
    assert stored["lr"] == 0.5
    assert first["epoch"] == 0
    assert first["changed"] == {}
    assert second["epoch"] == 2
    assert second["changed"]["lr"] == [0.001875, 0.5]
    assert second["torch"] == torch.__version__
    assert second["threads"] == torch.get_num_threads()


def test_within_an_epoch_batch_and_number_of_clusters_cannot_change(
    folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(main_pcl.distributed.StopSignals, "received_by_any", lambda self: True)
    with pytest.raises(SystemExit):
        run(folder, *SHORT, "--exp-dir", tmp_path)
    capsys.readouterr()
    again = [folder, *SHORT, "--exp-dir", tmp_path, "--resume"]
    for flag, value, change in (
        ("--num-cluster", "3", "num_cluster [4, 8] -> [3]"),
        ("-b", 8, "batch_size 16 -> 8"),
    ):
        assert change in fails(capsys, main_pcl.main, *again, flag, value)


@pytest.fixture
def finished(folder, tmp_path):
    """The checkpoint of a finished run of one epoch."""
    run(folder, *TINY, "--epochs", 1, "--exp-dir", tmp_path)
    return torch.load(tmp_path / "checkpoint.pth.tar", weights_only=True)


def assert_cannot_continue(checkpoint, folder, tmp_path, capsys):
    torch.save(checkpoint, tmp_path / "bad.pth.tar")
    options = ["--epochs", 2, "--exp-dir", tmp_path / "new", "--resume", tmp_path / "bad.pth.tar"]
    error = fails(capsys, main_pcl.main, folder, *TINY, *options)
    assert "this run cannot continue from the checkpoint" in error


@pytest.mark.parametrize("clusters", [1, [1], [(1, 2, 3)], [(torch.zeros(1), torch.zeros(1))]])
def test_a_checkpoint_with_malformed_clusters_gets_one_line(
    folder, tmp_path, capsys, finished, clusters
):
    finished["run"]["clusters"] = clusters
    assert_cannot_continue(finished, folder, tmp_path, capsys)


def test_a_checkpoint_without_clusters_gets_one_line(folder, tmp_path, capsys, finished):
    del finished["run"]["clusters"]
    assert_cannot_continue(finished, folder, tmp_path, capsys)


@pytest.mark.parametrize("totals", [torch.zeros(4), 1.0, {"loss_inst": "much"}])
def test_a_checkpoint_with_malformed_totals_gets_one_line(
    folder, tmp_path, capsys, finished, totals
):
    finished["run"]["totals"] = totals
    assert_cannot_continue(finished, folder, tmp_path, capsys)


def test_a_checkpoint_within_an_epoch_but_without_totals_gets_one_line(
    folder, tmp_path, capsys, finished
):
    finished["run"]["step"] = 3
    assert_cannot_continue(finished, folder, tmp_path, capsys)


# -- args.json -------------------------------------------------------------------------------------
def test_a_config_gives_the_same_run_and_flags_win(folder, tmp_path):
    options = ["--lr", 0.1, "--no-blur", "--amp", "--schedule", 1, "--wd", 0, "--crop-min", 0.4]
    run(folder, *SHORT, *options, "--exp-dir", tmp_path / "a")
    config = ["--config", tmp_path / "a" / "args.json"]
    run(*config, "--exp-dir", tmp_path / "b")
    assert_same(weights(tmp_path / "a"), weights(tmp_path / "b"))

    one = read_args(tmp_path / "a")
    other = read_args(tmp_path / "b")
    assert one.keys() == other.keys()
    different = {name for name in one if one[name] != other[name]}
    assert different <= {"exp_dir", "config", "parts"}

    run(*config, "--exp-dir", tmp_path / "c", "--seed", 5, "--epochs", 1)
    third = read_args(tmp_path / "c")
    assert third["seed"] == 5
    assert third["epochs"] == 1
    assert third["lr"] == 0.1


# -- log and errors --------------------------------------------------------------------------------
def test_both_losses_are_in_the_log(folder, tmp_path, capsys):
    log = run(folder, *SHORT, "--exp-dir", tmp_path)
    assert log[0]["loss_proto"] == 0
    assert log[1]["loss_proto"] > 0
    assert log[0]["loss_inst"] > 0
    header = (tmp_path / "log.csv").read_text().splitlines()[0].split(",")
    assert {"loss_inst", "loss_proto", "acc_inst", "acc_proto"} <= set(header)
    losses = f"loss_inst {log[1]['loss_inst']:.3f}  loss_proto {log[1]['loss_proto']:.3f}"
    assert losses in capsys.readouterr().out


def test_errors_of_our_own_are_shown_as_they_are(folder, tmp_path, monkeypatch):
    run(folder, *TINY, "--epochs", 1, "--exp-dir", tmp_path)

    def broken(*_, **__):
        raise ValueError("a mistake of ours")

    monkeypatch.setattr(eval_lincls, "knn_accuracy", broken)
    with pytest.raises(ValueError, match="a mistake of ours"):
        eval_lincls.main(["--exp-dir", str(tmp_path)])

    def vanished(*_, **__):
        raise FileNotFoundError("no file of ours")

    monkeypatch.setattr(main_pcl, "held_out_knn", vanished)
    with pytest.raises(FileNotFoundError, match="no file of ours"):
        run(folder, *TINY, "--exp-dir", tmp_path / "new")


# -- other machines, other data --------------------------------------------------------------------
# main_pcl.py as on Windows: python -c WITHOUT DIRECTORY_OF_MAIN_PCL ARGUMENTS
WITHOUT = """
import signal
import sys

del signal.SIGUSR1
sys.modules["fcntl"] = None
sys.path.insert(0, sys.argv.pop(1))

import main_pcl

main_pcl.main()
"""


def test_a_machine_without_fcntl_and_sigusr1_trains(folder, tmp_path):
    command = [sys.executable, "-c", WITHOUT, Path(main_pcl.__file__).parent]
    command += [folder, *SHORT, "--exp-dir", tmp_path]
    command = [str(part) for part in command]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert all(torch.isfinite(value).all() for value in weights(tmp_path).values())


def test_a_stored_number_of_clusters_that_exceeds_the_evaluated_images(
    folder, tmp_path, capsys, monkeypatch
):
    run(*TINY, "--num-cluster", "40,60", "--epochs", 1, "--exp-dir", tmp_path)  # on the digits
    table = eval_lincls.main([str(folder), "--exp-dir", str(tmp_path), "--no-baselines"])
    trained = table["trained"]
    assert np.isfinite(list(trained.values())).all()
    assert "NMI 60" not in trained

    # a number given by the user is refused before anything is computed
    monkeypatch.setattr(eval_lincls, "extract_all", lambda *_: pytest.fail("it has started"))
    few = [folder, "--exp-dir", tmp_path, "--num-cluster", "49"]
    assert "49 clusters are more than the 48" in fails(capsys, eval_lincls.main, *few)
