"""Kills, signals, full disks, dying ranks: what a run loses and what it says. Real processes wherever it matters."""

import contextlib
import importlib
import os
import random
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import TINY, assert_same, fails, position, run, state, weights
from torch.utils.data import DataLoader, TensorDataset

import main_pcl
import runtime.distributed
from features import compute_features, load_features, read_features

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
    """In every phase, at a random call of the function that the phase is about, and at random times.

    A failure prints its seed; KILL_SEED=... in the environment repeats it, but for the random times.
    """
    seed = int(os.environ.get("KILL_SEED", random.randrange(2**32)))
    print(f"KILL_SEED={seed}")
    rng = random.Random(seed)
    moments = [
        ["main_pcl", "info_nce", rng.randint(1, 6)],  # a step
        ["features", "tqdm", rng.randint(1, 6)],  # the start of a pass over the images
        ["main_pcl", "save_features", rng.randint(1, 3)],  # keys of a few steps
        ["main_pcl", "read_features", rng.randint(1, 4)],
        ["main_pcl", "run_kmeans", rng.randint(1, 2)],
        ["main_pcl", "knn_accuracy", rng.randint(1, 2)],
        ["os", "fsync", rng.randint(1, 6)],  # a checkpoint, in part on the disk
        ["os", "replace", rng.randint(1, 12)],  # a checkpoint or log.csv, not yet in its place
        *[[]] * 2,
    ]
    rng.shuffle(moments)
    directory = tmp_path / "run"
    arguments = [str(argument) for argument in (folder, *SMALL, "--exp-dir", directory, "--resume")]

    def complete():
        assert_same(whole, weights(directory))
        assert not [path for path in directory.rglob("*") if "features" in path.name or path.suffix == ".tmp"]
        assert len(list(directory.glob("checkpoint_000?.pth.tar"))) == 4  # of every epoch of so short a run
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


@pytest.mark.parametrize("number", runtime.distributed.STOP_SIGNALS)
def test_a_signal_finishes_the_step_saves_and_ends(folder, tmp_path, whole, monkeypatch, capfd, number):
    options = [folder, *SMALL, "--exp-dir", tmp_path, "--resume"]
    info_nce, calls, handler = main_pcl.info_nce, [], signal.getsignal(number)

    def signalled(*args):
        calls.append(0)
        if len(calls) in (2, 7, 8):  # in the warm-up, and in the middle of an epoch with clusters
            os.kill(os.getpid(), number)
        return info_nce(*args)

    monkeypatch.setattr(main_pcl, "info_nce", signalled)
    for where in ((0, 2), (1, 1), (1, 2)):
        with pytest.raises(SystemExit) as stop:
            run(*options)
        assert stop.value.code == 128 + number and "--resume" in capfd.readouterr().err
        assert position(tmp_path) == where
    assert "batch_size 8 -> 12 cannot change" in fails(capfd, main_pcl.main, *options, "-b", 12)
    run(*options)
    assert len(calls) == 24  # no step was taken twice
    assert_same(whole, weights(tmp_path))
    assert signal.getsignal(number) == handler


@pytest.mark.parametrize(
    "module, phase, call, where, calls_in_all",
    [
        ("main_pcl", "knn_accuracy", 1, (0, 1), 3),  # of the untrained network; then comes a step
        ("main_pcl", "knn_accuracy", 2, (1, 6), 4),  # it is not in the checkpoint
        ("main_pcl", "run_kmeans", 2, (1, 0), 6),
        ("runtime.checkpoint", "save", 2, (1, 0), None),  # at the end of epoch 0; then comes its E-step
    ],
)
def test_a_signal_between_the_steps_finishes_the_phase(
    folder, tmp_path, whole, monkeypatch, module, phase, call, where, calls_in_all
):
    options = [folder, *SMALL, "--exp-dir", tmp_path, "--resume"]
    module, calls = importlib.import_module(module), []
    original = getattr(module, phase)

    def signalled(*args, **kwargs):
        calls.append(0)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    monkeypatch.setattr(module, phase, signalled)
    with pytest.raises(SystemExit) as stop:
        run(*options)
    assert stop.value.code == 128 + signal.SIGTERM and position(tmp_path) == where
    assert (state(tmp_path)["clusters"] is None) == (where[0] == 0)
    run(*options)
    assert len(calls) == (calls_in_all or len(calls))
    assert_same(whole, weights(tmp_path))


def test_a_signal_in_an_epoch_that_is_not_due_is_saved_for(folder, tmp_path, monkeypatch):
    """Epochs without a save of their own finish clustering first, too, and lose nothing."""
    run_kmeans, calls = main_pcl.run_kmeans, []

    def signalled(*args, **kwargs):
        calls.append(0)
        if len(calls) == 9:  # two granularities an epoch: at the end of epoch 4
            os.kill(os.getpid(), signal.SIGTERM)
        return run_kmeans(*args, **kwargs)

    monkeypatch.setattr(main_pcl, "run_kmeans", signalled)
    with pytest.raises(SystemExit):
        run(folder, *SMALL, "--epochs", 300, "--exp-dir", tmp_path)
    assert position(tmp_path) == (5, 0) and state(tmp_path)["clusters"]


def test_a_machine_without_sigusr1(monkeypatch):
    """Windows has no SIGUSR1."""
    monkeypatch.delattr(signal, "SIGUSR1")
    fresh = runpy.run_path(runtime.distributed.__file__)
    assert list(fresh["STOP_SIGNALS"]) == [signal.SIGTERM, signal.SIGINT]


def test_a_signal_to_all_processes_of_a_run_spares_its_loader_workers(mixed, tmp_path):
    options = [mixed, *SMALL, "--knn-every", "4", "--exp-dir"]
    command = [sys.executable, MAIN, *options, tmp_path / "run", "-j", "2", "--resume"]
    process = subprocess.Popen(map(str, command), stdout=subprocess.PIPE, start_new_session=True, text=True)
    while not process.stdout.readline().startswith("epoch   0"):
        pass
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    assert finish(*command).returncode == 0
    run(*options, tmp_path / "whole", "-j", 0)
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "run"))


def test_two_runs_in_one_directory(folder, tmp_path, capsys):
    options = [folder, *TINY, "--epochs", 500, "--exp-dir", tmp_path]
    process = subprocess.Popen([sys.executable, MAIN, *map(str, options)], stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.stdout.readline()  # what is said once args.json is there
    before = (tmp_path / "args.json").stat()
    assert "another run" in fails(capsys, main_pcl.main, *options)
    assert (tmp_path / "args.json").stat().st_ino == before.st_ino
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 128 + signal.SIGINT


def test_epochs_that_are_not_saved_are_trained_again(folder, tmp_path, monkeypatch):
    """Signals and power cuts in short epochs, of which all or none are saved between those that are kept."""
    options = [folder, *SMALL, "--epochs", 20, "--resume"]
    run(*options, "--exp-dir", tmp_path / "whole")
    info_nce, calls = main_pcl.info_nce, []

    def dying(*args):
        calls.append(0)
        if len(calls) in (25, 60):
            os.kill(os.getpid(), signal.SIGTERM)
        if len(calls) in (47, 80, 112):
            raise KeyboardInterrupt
        return info_nce(*args)

    monkeypatch.setattr(main_pcl, "info_nce", dying)
    for every, again in ((0, 10), (3600, 28)):  # steps lost by three power cuts: of an epoch, or of two
        monkeypatch.setattr(main_pcl, "SAVE_EVERY", every)
        calls.clear()
        for _ in range(5):
            with pytest.raises((KeyboardInterrupt, SystemExit)):
                run(*options, "--exp-dir", tmp_path / str(every))
        run(*options, "--exp-dir", tmp_path / str(every))
        assert len(calls) == 20 * 6 + again
        assert_same(weights(tmp_path / "whole"), weights(tmp_path / str(every)))


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
    return DataLoader(TensorDataset(torch.arange(2.0 * n).view(n, 2), torch.arange(n)), batch_size)


def test_no_room_for_features_on_the_disk_is_an_error_not_a_crash(tmp_path, full_disk):
    wide = torch.nn.Linear(2, 300)
    with full_disk(), pytest.raises(OSError, match="large"):
        compute_features(passes(10), wide, tmp_path)
    assert len(read_features(tmp_path, 10)[1]) == 10  # what is half there is missing
    compute_features(passes(400), lambda x: x, tmp_path)
    with full_disk(), pytest.raises(OSError, match="large"):
        load_features(tmp_path, 400, tmp_path / "features.npy")


# -- several processes


def test_ranks_stop_and_go_on_in_other_numbers(folder, tmp_path, dying):
    """Two ranks until a signal in the middle of an epoch, then three, then one: every step once, and every key."""
    options = [folder, *SMALL, "-b", 12, "--bn-splits", 1, "--epochs", 3, "--exp-dir", tmp_path, "--resume"]
    stop = ["main_pcl", "info_nce", 6, int(signal.SIGTERM), 1]
    done = finish(*TORCHRUN, "--nproc_per_node=2", dying, *stop, *options)
    assert done.returncode and "stopped by a signal" in done.stderr, done.stderr[-2000:]
    assert position(tmp_path) == (1, 2)
    done = finish(*TORCHRUN, "--nproc_per_node=3", dying, *stop[:-1], 2, *options)
    assert done.returncode and "resumed at epoch 1, step 2" in done.stdout, done.stderr[-2000:]
    assert position(tmp_path) == (2, 4)
    keys = [torch.load(path, weights_only=True)["index"] for path in tmp_path.glob("features/keys/batch*")]
    assert sorted(map(len, keys)) == [8, 8, 8, 12, 12]  # of epoch 1: a file per rank, two steps in each
    assert torch.cat(keys).sort().values.tolist() == list(range(48))
    log = run(*options)
    assert [row["epoch"] for row in log] == [0, 1, 2]


def test_a_rank_that_dies_ends_the_others(folder, tmp_path, dying):
    moment = ["main_pcl", "info_nce", 5, int(signal.SIGKILL), 1]
    options = [folder, *SMALL, "--exp-dir", tmp_path]
    done = finish(*TORCHRUN, "--nproc_per_node=2", dying, *moment, *options, timeout=60)
    assert done.returncode and "another process of this run has ended" in done.stderr


def test_max_restarts_brings_the_run_back(folder, tmp_path, dying):
    options = [folder, *SMALL, "--pcl-r", 10, "--exp-dir"]
    done = finish(*TORCHRUN, "--nproc_per_node=2", MAIN, *options, tmp_path / "whole")
    assert done.returncode == 0 and done.stdout.count("epoch   3") == 1 and "2 x cpu" in done.stdout
    whole = weights(tmp_path / "whole")
    torch.testing.assert_close(whole["module.queue"].norm(dim=0), torch.ones(10))
    assert whole["module.queue_ptr"].item() == 4 * 6 * 8 % 10  # both ranks' keys of all steps, which is not 0

    moment = ["main_pcl", "info_nce", 8, int(signal.SIGKILL), 1]
    restarts = ["--nproc_per_node=2", "--max-restarts=1"]
    done = finish(*TORCHRUN, *restarts, dying, *moment, *options, tmp_path / "parts")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "resumed at epoch 1, step 0" in done.stdout
    assert_same(whole, weights(tmp_path / "parts"))


def test_the_slurm_script(folder, tmp_path):
    (file,) = Path(MAIN).parent.glob("*/slurm.sh")
    command = " ".join(map(str, [MAIN, folder, *SMALL, "--epochs", 200, "--exp-dir", tmp_path / "run"]))
    script, commands = re.subn(r"main_pcl.py .* --resume", f"{command} --resume", file.read_text())
    script, ranks = re.subn("node=8 --max", "node=2 --max", script)
    assert commands == ranks == 1
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
    assert position(tmp_path / "run") >= (1, 0)
