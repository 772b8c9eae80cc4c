"""Kills, signals, full disks, dying ranks: what a run loses and what it says. Real processes wherever it matters."""

import contextlib
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, assert_same, fails, run, weights
from torch.utils.data import DataLoader, TensorDataset

import main_pcl
from features import compute_features, load_features, saved_batches

MAIN = main_pcl.__file__
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
SMALL = [*TINY, "-b", "8", "--epochs", "4", "--warmup", "1", "--cos", "--amp", "--knn-every", "2"]

# main_pcl.py, with a process that ends itself at the n-th call of a function: python FILE MODULE FUNCTION N SIGNAL ...
DYING = f"""
import importlib, os, sys, time
restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
if restarted and os.environ["RANK"] == "0":
    time.sleep(3)  # the other ranks look for this one's address before it has a new one
sys.path.insert(0, {str(Path(MAIN).parent)!r})
import main_pcl
module, function, n, number, rank = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6])
sys.argv[1:6] = []
module = importlib.import_module(module)
original, calls = getattr(module, function), []

def dying(*args, **kwargs):
    calls.append(0)
    if len(calls) == n and os.environ.get("RANK", "0") == str(rank) and not restarted:
        os.kill(os.getpid(), number)
    return original(*args, **kwargs)

setattr(module, function, dying)
main_pcl.main()
"""


@pytest.fixture(scope="session")
def dying(tmp_path_factory):
    path = tmp_path_factory.mktemp("dying") / "dying.py"
    path.write_text(DYING)
    return path


@pytest.fixture(scope="session")
def whole(folder, tmp_path_factory):
    """The weights of a run that nothing disturbs."""
    directory = tmp_path_factory.mktemp("whole")
    run(folder, *SMALL, "--exp-dir", directory)
    return weights(directory)


def finish(*command, timeout=120, **kwargs):
    command = [str(part) for part in command]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, **kwargs)


# -- kills and signals


def test_ten_kills_change_nothing(folder, tmp_path, whole, dying):
    """In every phase, at a random call of the function that the phase is about, and at random times."""
    rng = random.Random()
    moments = [
        ["main_pcl", "info_nce", rng.randint(1, 6)],  # a step
        ["features", "tqdm", rng.randint(1, 4)],  # the start of a feature pass
        ["main_pcl", "load_features", rng.randint(1, 3)],  # its end
        ["main_pcl", "run_kmeans", rng.randint(1, 2)],
        ["os", "fsync", rng.randint(1, 6)],  # a checkpoint, in part on the disk
        ["os", "replace", rng.randint(1, 12)],  # a checkpoint or a feature file, not yet in its place
        ["main_pcl", "knn_accuracy", 1],
        *[[]] * 3,
    ]
    rng.shuffle(moments)
    directory = tmp_path / "run"
    arguments = [str(argument) for argument in (folder, *SMALL, "--exp-dir", directory, "--resume")]

    def complete():
        assert_same(whole, weights(directory))
        assert not [path for path in directory.rglob("*") if "features" in path.name or path.suffix == ".tmp"]
        shutil.rmtree(directory)

    while moments:
        if moments[0]:
            killed = finish(sys.executable, dying, *moments[0], int(signal.SIGKILL), 0, *arguments).returncode
        else:
            process = subprocess.Popen([sys.executable, MAIN, *arguments], stdout=subprocess.PIPE)
            process.stdout.readline()  # it has begun
            time.sleep(rng.uniform(0, 1.5))
            process.kill()
            killed = process.wait()
        assert killed in (0, -signal.SIGKILL)
        if killed:
            moments.pop(0)
        else:  # at its end before the moment came: from the start, then
            complete()
    assert finish(sys.executable, MAIN, *arguments).returncode == 0
    complete()


@pytest.mark.parametrize("number", main_pcl.STOP_SIGNALS)
def test_a_signal_finishes_the_step_saves_and_ends(folder, tmp_path, whole, monkeypatch, capfd, number):
    options = [folder, *SMALL, "--exp-dir", tmp_path, "--resume"]
    info_nce, calls = main_pcl.info_nce, []

    def signalled(*args):
        calls.append(0)
        if len(calls) in (2, 7, 8):  # in the warm-up, and in the middle of an epoch with clusters
            os.kill(os.getpid(), number)
        return info_nce(*args)

    monkeypatch.setattr(main_pcl, "info_nce", signalled)
    for epoch, step in ((0, 2), (1, 1), (1, 2)):
        with pytest.raises(SystemExit) as stop:
            run(*options)
        assert stop.value.code == 128 + number and "--resume" in capfd.readouterr().err
        state = torch.load(tmp_path / "checkpoint.pth.tar", weights_only=True)["run"]
        assert (state["epoch"], state["step"]) == (epoch, step)
    run(*options)
    assert len(calls) == 24  # no step was taken twice
    assert_same(whole, weights(tmp_path))
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)


@pytest.mark.parametrize("phase", ["run_kmeans", "knn_accuracy", "save"])
def test_a_signal_between_the_steps(folder, tmp_path, whole, monkeypatch, phase):
    options = [folder, *SMALL, "--exp-dir", tmp_path, "--resume"]
    original, calls = getattr(main_pcl, phase), []

    def signalled(*args, **kwargs):
        calls.append(0)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    monkeypatch.setattr(main_pcl, phase, signalled)
    with pytest.raises(SystemExit) as stop:
        run(*options)
    assert stop.value.code == 128 + signal.SIGTERM
    state = torch.load(tmp_path / "checkpoint.pth.tar", weights_only=True)["run"]
    assert (state["epoch"], state["step"]) == {"run_kmeans": (0, 6), "knn_accuracy": (1, 6), "save": (0, 6)}[phase]
    run(*options)
    assert_same(whole, weights(tmp_path))


def test_a_signal_to_all_processes_of_a_run_spares_its_loader_workers(mixed, tmp_path):
    command = [sys.executable, MAIN, mixed, *SMALL, "-j", "2", "--exp-dir", tmp_path / "run", "--resume"]
    process = subprocess.Popen(map(str, command), stdout=subprocess.PIPE, start_new_session=True, text=True)
    while not process.stdout.readline().startswith("epoch   0"):
        pass
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    assert finish(*command).returncode == 0
    run(mixed, *SMALL, "-j", 0, "--exp-dir", tmp_path / "whole")
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "run"))


def test_two_runs_in_one_directory(folder, tmp_path, capsys):
    options = [folder, *TINY, "--epochs", 500, "--exp-dir", tmp_path]
    process = subprocess.Popen([sys.executable, MAIN, *map(str, options)], stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    before = (tmp_path / "args.json").stat()
    assert "another run" in fails(capsys, main_pcl.main, *options)
    assert (tmp_path / "args.json").stat().st_ino == before.st_ino
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 128 + signal.SIGINT


@pytest.mark.parametrize("every", [0, 3600])
def test_epochs_that_are_not_saved_are_trained_again(folder, tmp_path, monkeypatch, every):
    """Signals and a power cut in short epochs, of which none or all are saved between the three that are kept."""
    options = [folder, *SMALL, "--epochs", 30, "--resume"]
    run(*options, "--exp-dir", tmp_path / "whole")
    monkeypatch.setattr(main_pcl, "SAVE_EVERY", every)
    info_nce, calls = main_pcl.info_nce, []

    def dying(*args):
        calls.append(0)
        if len(calls) in (40, 90):
            os.kill(os.getpid(), signal.SIGTERM)
        if len(calls) in (70, 101, 140):
            raise KeyboardInterrupt
        return info_nce(*args)

    monkeypatch.setattr(main_pcl, "info_nce", dying)
    for _ in range(5):
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            run(*options, "--exp-dir", tmp_path / "parts")
    run(*options, "--exp-dir", tmp_path / "parts")
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


def test_a_signal_in_an_epoch_that_is_not_due_is_saved_for(folder, tmp_path, monkeypatch):
    """Epochs without a save of their own finish clustering first, and lose nothing."""
    run_kmeans, calls = main_pcl.run_kmeans, []

    def signalled(*args, **kwargs):
        calls.append(0)
        if len(calls) == 9:  # two granularities an epoch: at the end of epoch 4
            os.kill(os.getpid(), signal.SIGTERM)
        return run_kmeans(*args, **kwargs)

    monkeypatch.setattr(main_pcl, "run_kmeans", signalled)
    with pytest.raises(SystemExit):
        run(folder, *SMALL, "--epochs", 300, "--exp-dir", tmp_path)
    state = torch.load(tmp_path / "checkpoint.pth.tar", weights_only=True)["run"]
    assert (state["epoch"], state["step"]) == (5, 0) and state["clusters"]


# -- saving


@pytest.fixture
def full_disk():
    """As a context: no file can grow beyond 3,000 bytes, as on a disk without room."""

    @contextlib.contextmanager
    def limit():
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limit


def test_a_full_disk_leaves_the_last_checkpoint(folder, tmp_path, capsys, full_disk):
    options = [folder, *SMALL, "--exp-dir", tmp_path, "--resume"]
    run(*options[:-1], "--epochs", 1)
    before = weights(tmp_path)
    capsys.readouterr()
    with full_disk():
        error = fails(capsys, main_pcl.main, *options, status=1)
    assert "checkpoint.pth.tar" in error and "make room" in error
    assert_same(before, weights(tmp_path))
    assert not list(tmp_path.glob("*.tmp"))


def passes(n, batch_size=4):
    return DataLoader(TensorDataset(torch.arange(2.0 * n).view(n, 2), torch.arange(n)), batch_size, sampler=range(n))


def test_a_feature_file_is_whole_or_not_there(tmp_path, full_disk):
    wide = torch.nn.Linear(2, 300)
    with full_disk(), pytest.raises(OSError, match="large"):
        compute_features(passes(10), wide, tmp_path)
    assert not list(tmp_path.glob("*.pt"))
    compute_features(passes(10), wide, tmp_path)
    assert load_features(tmp_path, 10).shape == (10, 300) and not list(tmp_path.glob("*.tmp"))


def test_no_room_for_features_on_the_disk_is_an_error_not_a_crash(tmp_path, full_disk):
    compute_features(passes(400), lambda x: x, tmp_path)
    with full_disk(), pytest.raises(OSError, match="large"):
        load_features(tmp_path, 400, tmp_path / "features.npy")


def test_a_feature_pass_is_taken_up_where_it_stopped(tmp_path):
    compute_features(passes(12), lambda x: x, tmp_path)
    whole, seen = load_features(tmp_path, 12), []
    (tmp_path / "batch_2_features.pt").write_bytes(b"")  # as a power cut leaves it
    done, first = saved_batches(tmp_path)
    assert sorted(done.tolist()) == list(range(8)) and first == 2
    rest = DataLoader(passes(12).dataset, 4, sampler=range(8, 12))
    compute_features(rest, lambda x: seen.append(len(x)) or x, tmp_path, first=first)
    assert seen == [4]
    np.testing.assert_array_equal(load_features(tmp_path, 12), whole)


def test_features_of_other_weights_are_not_taken_up(folder, tmp_path, monkeypatch):
    options = [folder, *SMALL, "--features", "pass", "--exp-dir", tmp_path, "--resume"]
    taken_up = []
    monkeypatch.setattr(main_pcl, "saved_batches", lambda place: taken_up.append(saved_batches(place)) or taken_up[-1])

    def die(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(main_pcl, "load_features", die)
        run(*options)
    assert len(list(tmp_path.glob("features/*/*.pt"))) == 2
    run(*options)
    assert len(taken_up[1][0]) == 48 and all(len(index) == 0 for index, _ in taken_up[2:])


# -- several processes


def test_ranks_stop_and_go_on_in_other_numbers(folder, tmp_path, dying):
    """Two ranks until a signal in the middle of an epoch, then three, then one: every step once."""
    options = [folder, *SMALL, "-b", 12, "--bn-splits", 1, "--epochs", 3, "--exp-dir", tmp_path, "--resume"]
    stop = ["main_pcl", "info_nce", 6, int(signal.SIGTERM), 1]
    done = finish(*TORCHRUN, "--nproc_per_node=2", dying, *stop, *options)
    assert done.returncode and "stopped by a signal" in done.stderr, done.stderr[-2000:]
    state = torch.load(tmp_path / "checkpoint.pth.tar", weights_only=True)["run"]
    assert (state["epoch"], state["step"]) == (1, 2)
    done = finish(*TORCHRUN, "--nproc_per_node=3", dying, *stop[:-1], 2, *options)
    assert done.returncode and "resumed at epoch 1, step 2" in done.stdout, done.stderr[-2000:]
    state = torch.load(tmp_path / "checkpoint.pth.tar", weights_only=True)["run"]
    assert (state["epoch"], state["step"]) == (2, 4)
    log = run(*options)
    assert [row["epoch"] for row in log] == [0, 1, 2]


def test_a_rank_that_dies_ends_the_others(folder, tmp_path, dying):
    moment = ["main_pcl", "info_nce", 5, int(signal.SIGKILL), 1]
    options = [folder, *SMALL, "--exp-dir", tmp_path]
    done = finish(*TORCHRUN, "--nproc_per_node=2", dying, *moment, *options, timeout=60)
    assert done.returncode and "another process of this run has ended" in done.stderr


def test_max_restarts_brings_the_run_back(folder, tmp_path, dying):
    options = [folder, *SMALL, "--exp-dir"]
    assert finish(*TORCHRUN, "--nproc_per_node=2", MAIN, *options, tmp_path / "whole").returncode == 0
    moment = ["main_pcl", "info_nce", 8, int(signal.SIGKILL), 1]
    restarts = ["--nproc_per_node=2", "--max-restarts=1"]
    done = finish(*TORCHRUN, *restarts, dying, *moment, *options, tmp_path / "parts")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "resumed at epoch 1, step 0" in done.stdout
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


def test_the_slurm_script_of_the_readme(folder, tmp_path):
    (script,) = re.findall(
        r"```bash\n(#!/bin/bash\n#SBATCH.*?)```", Path(MAIN).with_name("README.md").read_text(), re.S
    )
    command = " ".join(map(str, [MAIN, folder, *SMALL, "--epochs", 200, "--exp-dir", tmp_path / "run"]))
    script = re.sub(r"main_pcl.py .* --resume", f"{command} --resume", script).replace("node=8 --max", "node=2 --max")
    (tmp_path / "job.sh").write_text(script)
    (tmp_path / "scontrol").write_text(f"#!/bin/bash\necho $* > {tmp_path}/requeued\n")
    (tmp_path / "scontrol").chmod(0o755)
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "SLURM_JOB_ID": "7"}
    job = subprocess.Popen(["bash", tmp_path / "job.sh"], env=environment, stdout=subprocess.PIPE, text=True)
    while not job.stdout.readline().startswith("epoch   1"):
        pass
    job.send_signal(signal.SIGUSR1)
    job.communicate(timeout=60)
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    state = torch.load(tmp_path / "run" / "checkpoint.pth.tar", weights_only=True)["run"]
    assert state["step"] or state["epoch"]
