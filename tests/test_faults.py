"""Kills, signals, full disks, dying ranks: what a run loses and what it says.

Where it matters, the runs are processes of their own.
"""

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
from conftest import (
    TINY,
    assert_same,
    fails,
    position,
    run,
    state,
    wait_for_line,
    weights,
)
from processes import end, finish, finish_ranks, start
from torch.utils.data import DataLoader, TensorDataset

import main_pcl
import runtime.distributed
from features import compute_features, load_features, read_features

MAIN = main_pcl.__file__
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]

# 4 epochs of 6 steps; the second epoch is the first one with clusters
SMALL = [*TINY, "-b", "8", "--epochs", "4", "--warmup", "1", "--cos", "--amp", "--knn-every", "2"]


# -- processes -------------------------------------------------------------------------------------
def main(*arguments):
    """main_pcl.py with these arguments, of any type."""
    main_pcl.main([str(argument) for argument in arguments])


def main_with_signal(module, function, n, number, rank, *arguments):
    """main_pcl.py, but `rank` sends itself a signal at the `n`-th call of a function.

    number: of the signal. A rank that was restarted sends none.
    """
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    if restarted and os.environ["RANK"] == "0":
        time.sleep(3)  # so that the other ranks look for rank 0's address before it has a new one

    module = importlib.import_module(module)
    original = getattr(module, function)
    is_the_one = os.environ.get("RANK", "0") == str(rank) and not restarted
    calls = 0

    def dying(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == n and is_the_one:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    setattr(module, function, dying)
    main(*arguments)


# the same for torchrun: python FILE MODULE FUNCTION N SIGNAL RANK ARGUMENTS
SCRIPT = f"""
import sys

sys.path[:0] = [{str(Path(MAIN).parent)!r}, {str(Path(__file__).parent)!r}]

from test_faults import main_with_signal

module, function, n, number, rank, *arguments = sys.argv[1:]
main_with_signal(module, function, int(n), int(number), int(rank), *arguments)
"""


@pytest.fixture(scope="session")
def whole(folder, tmp_path_factory):
    """The weights of a run that nothing disturbs."""
    directory = tmp_path_factory.mktemp("whole")
    run(folder, *SMALL, "--exp-dir", directory)
    return weights(directory)


@pytest.fixture(scope="module")
def whole_of_20_epochs(folder, tmp_path_factory):
    """The same for a run of 20 epochs."""
    directory = tmp_path_factory.mktemp("whole")
    run(folder, *SMALL, "--epochs", 20, "--exp-dir", directory)
    return weights(directory)


class CallCounter:
    """Replaces `function` of `module`: counts its calls, and sends this process signals.

    signals: {number of the call, from 1: signal to send just before it}.
    """

    def __init__(self, monkeypatch, module, function, signals):
        self.original = getattr(module, function)
        self.signals = signals
        self.calls = 0
        monkeypatch.setattr(module, function, self)

    def __call__(self, *args, **kwargs):
        self.calls += 1
        if self.calls in self.signals:
            os.kill(os.getpid(), self.signals[self.calls])
        return self.original(*args, **kwargs)


# -- kills -----------------------------------------------------------------------------------------
def test_ten_kills_change_nothing(folder, tmp_path, whole):
    """Eight kills at a random call of a function, one for each phase; two at random times.

    A failure prints its seed. KILL_SEED=... in the environment repeats it, except for the random
    times.
    """
    seed = int(os.environ.get("KILL_SEED", random.randrange(2**32)))
    print(f"KILL_SEED={seed}")
    rng = random.Random(seed)
    any_time = None
    moments = [
        ["main_pcl", "info_nce", rng.randint(1, 6)],  # a step
        ["features", "tqdm", rng.randint(1, 6)],  # the start of a pass over the images
        ["main_pcl", "save_features", rng.randint(1, 3)],  # the keys of a few steps
        ["main_pcl", "read_features", rng.randint(1, 4)],
        ["main_pcl", "run_kmeans", rng.randint(1, 2)],
        ["main_pcl", "knn_accuracy", rng.randint(1, 2)],
        ["os", "fsync", rng.randint(1, 6)],  # a checkpoint that is partly on the disk
        ["os", "replace", rng.randint(1, 12)],  # a checkpoint or log.csv not yet in its place
        any_time,
        any_time,
    ]
    rng.shuffle(moments)
    directory = tmp_path / "run"
    arguments = [folder, *SMALL, "--exp-dir", directory, "--resume"]

    def run_until(moment):
        """Run up to `moment` and return the exit status."""
        if moment is not any_time:
            rank = 0
            status, _ = finish(main_with_signal, *moment, signal.SIGKILL, rank, *arguments)
            return status
        process = start(main, *arguments)
        process.stdout.readline()  # it has begun
        time.sleep(rng.uniform(0, 1.5))
        process.kill()
        status, _ = end(process)
        return status

    def check_and_remove_finished_run():
        assert_same(whole, weights(directory))
        paths = list(directory.rglob("*"))
        assert not [path for path in paths if "features" in path.name or path.suffix == ".tmp"]
        # so short a run keeps the checkpoint of every epoch
        assert len(list(directory.glob("checkpoint_000?.pth.tar"))) == 4
        shutil.rmtree(directory)

    while moments:
        status = run_until(moments[0])
        assert status in (0, -signal.SIGKILL)
        if status:
            moments.pop(0)
        else:  # it finished before the moment came: begin another run
            check_and_remove_finished_run()
    assert finish(main, *arguments)[0] == 0
    check_and_remove_finished_run()


def leave_half_written(path, monkeypatch):
    """Die while `path` is written."""

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            runtime.directory.write_atomically(path, b"half")


def test_what_a_kill_leaves_half_written_is_removed(folder, tmp_path, monkeypatch):
    """Even if the run is finished, so that nothing is written any more. Other files stay."""
    run(folder, *SMALL, "--epochs", 1, "--exp-dir", tmp_path)
    others = {"notes.tmp", "log.csv.mytmp"}
    for name in ("curves.png", "checkpoint_0000.pth.tar", ".holder"):
        leave_half_written(tmp_path / name, monkeypatch)
    for name in others:
        (tmp_path / name).write_text("")
    assert len(list(tmp_path.glob("*tmp"))) == 5
    run(folder, *SMALL, "--epochs", 1, "--exp-dir", tmp_path, "--resume")
    assert {path.name for path in tmp_path.glob("*tmp")} == others

    leave_half_written(tmp_path / "eval.json", monkeypatch)
    run(folder, *SMALL, "--epochs", 1, "--exp-dir", tmp_path, "--overwrite")
    assert {path.name for path in tmp_path.glob("*tmp")} == others


# -- signals ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("number", runtime.distributed.STOP_SIGNALS)
def test_on_a_signal_a_run_finishes_its_step_saves_and_ends(
    folder, tmp_path, whole, monkeypatch, capfd, number
):
    options = [folder, *SMALL, "--exp-dir", tmp_path, "--resume"]
    handler = signal.getsignal(number)
    # in the warm-up, and twice in the middle of an epoch with clusters
    signals = {2: number, 7: number, 8: number}
    steps = CallCounter(monkeypatch, main_pcl, "info_nce", signals)
    for expected in ((0, 2), (1, 1), (1, 2)):
        with pytest.raises(SystemExit) as stop:
            run(*options)
        assert stop.value.code == 128 + number
        assert "--resume" in capfd.readouterr().err
        assert position(tmp_path) == expected

    assert "cannot change batch_size 8 -> 12" in fails(capfd, main_pcl.main, *options, "-b", 12)
    run(*options)
    assert steps.calls == 24  # no step was taken twice
    assert_same(whole, weights(tmp_path))
    assert signal.getsignal(number) == handler


@pytest.mark.parametrize(
    "module, phase, call, expected, calls_in_all",
    [
        # kNN accuracy of the untrained network; one step follows
        ("main_pcl", "knn_accuracy", 1, (0, 1), 3),
        # kNN accuracy after epoch 1, which the checkpoint does not hold
        ("main_pcl", "knn_accuracy", 2, (1, 6), 4),
        ("main_pcl", "run_kmeans", 2, (1, 0), 6),
        # the checkpoint at the end of epoch 0; its E-step follows
        ("runtime.checkpoint", "save", 2, (1, 0), None),
    ],
)
def test_on_a_signal_between_steps_a_run_finishes_the_phase(
    folder, tmp_path, whole, monkeypatch, module, phase, call, expected, calls_in_all
):
    options = [folder, *SMALL, "--exp-dir", tmp_path, "--resume"]
    module = importlib.import_module(module)
    counter = CallCounter(monkeypatch, module, phase, {call: signal.SIGTERM})
    with pytest.raises(SystemExit) as stop:
        run(*options)
    assert stop.value.code == 128 + signal.SIGTERM
    assert position(tmp_path) == expected
    is_in_warmup = expected[0] == 0
    assert (state(tmp_path)["clusters"] is None) == is_in_warmup

    run(*options)
    if calls_in_all is not None:
        assert counter.calls == calls_in_all
    assert_same(whole, weights(tmp_path))


def test_a_signal_saves_an_epoch_that_is_not_due(folder, tmp_path, monkeypatch):
    """Epochs without a checkpoint of their own also finish clustering first, and lose nothing."""
    ninth = {9: signal.SIGTERM}  # with two granularities per epoch: at the end of epoch 4
    CallCounter(monkeypatch, main_pcl, "run_kmeans", ninth)
    with pytest.raises(SystemExit):
        run(folder, *SMALL, "--epochs", 300, "--exp-dir", tmp_path)
    assert position(tmp_path) == (5, 0)
    assert state(tmp_path)["clusters"]


def test_a_machine_without_sigusr1(monkeypatch):
    """Windows has no SIGUSR1."""
    monkeypatch.delattr(signal, "SIGUSR1")
    fresh = runpy.run_path(runtime.distributed.__file__)
    assert list(fresh["STOP_SIGNALS"]) == [signal.SIGTERM, signal.SIGINT]


def test_loader_workers_survive_a_signal_to_all_processes_of_a_run(mixed, tmp_path):
    options = [mixed, *SMALL, "--knn-every", "4", "--exp-dir"]
    interrupted = [*options, tmp_path / "run", "-j", "2", "--resume"]
    process = start(main, *interrupted, new_session=True)
    wait_for_line(process, "epoch   0")
    os.killpg(process.pid, signal.SIGTERM)
    assert end(process)[0] == 128 + signal.SIGTERM
    assert finish(main, *interrupted)[0] == 0
    run(*options, tmp_path / "whole", "-j", 0)
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "run"))


def test_two_runs_in_one_directory(folder, tmp_path, capsys):
    options = [folder, *TINY, "--epochs", 500, "--exp-dir", tmp_path]
    process = start(main, *options)
    wait_for_line(process, "images in memory")  # args.json has been written
    before = (tmp_path / "args.json").stat()
    assert "another run" in fails(capsys, main_pcl.main, *options)
    assert (tmp_path / "args.json").stat().st_ino == before.st_ino
    os.kill(process.pid, signal.SIGINT)
    assert end(process)[0] == 128 + signal.SIGINT


@pytest.mark.parametrize(
    "save_every, steps_lost",
    [
        (0, 10),  # every epoch is saved: a power cut loses steps of one
        (3600, 28),  # only milestones are saved, every second epoch: steps of up to two
    ],
)
def test_epochs_that_are_not_saved_are_trained_again(
    folder, tmp_path, monkeypatch, whole_of_20_epochs, save_every, steps_lost
):
    """Two signals and three power cuts, in short epochs."""
    options = [folder, *SMALL, "--epochs", 20, "--resume", "--exp-dir", tmp_path]
    steps = 0
    info_nce = main_pcl.info_nce

    def dying(*args):
        nonlocal steps
        steps += 1
        if steps in (25, 60):
            os.kill(os.getpid(), signal.SIGTERM)
        if steps in (47, 80, 112):
            raise KeyboardInterrupt  # a power cut
        return info_nce(*args)

    monkeypatch.setattr(main_pcl, "info_nce", dying)
    monkeypatch.setattr(main_pcl, "SAVE_EVERY", save_every)
    for _ in range(5):
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            run(*options)
    run(*options)
    assert steps == 20 * 6 + steps_lost
    assert_same(whole_of_20_epochs, weights(tmp_path))


# -- full disks ------------------------------------------------------------------------------------
@contextlib.contextmanager
def full_disk():
    """Context in which no file can grow beyond 3,000 bytes, as on a disk without room."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_last_checkpoint(folder, tmp_path, capsys):
    options = [folder, *SMALL, "--exp-dir", tmp_path]
    run(*options, "--epochs", 1)
    before = weights(tmp_path)
    capsys.readouterr()
    with full_disk():
        error = fails(capsys, main_pcl.main, *options, "--resume", status=1)
    assert "checkpoint.pth.tar" in error
    assert "make room" in error
    assert_same(before, weights(tmp_path))
    assert not list(tmp_path.glob("*.tmp"))


def make_loader(n):
    """A loader of n samples with two numbers each, in batches of 4."""
    samples = torch.arange(2.0 * n).view(n, 2)
    return DataLoader(TensorDataset(samples, torch.arange(n)), batch_size=4)


def test_no_room_for_features_is_an_error_and_not_a_crash(tmp_path):
    wide = torch.nn.Linear(2, 300)
    with full_disk(), pytest.raises(OSError, match="large"):
        compute_features(make_loader(10), wide, tmp_path)
    _, missing = read_features(tmp_path, 10)
    assert len(missing) == 10  # a file that is cut off counts as missing

    compute_features(make_loader(400), lambda x: x, tmp_path)
    with full_disk(), pytest.raises(OSError, match="large"):
        load_features(tmp_path, 400, tmp_path / "features.npy")


# -- several processes -----------------------------------------------------------------------------
def test_ranks_stop_and_resume_in_other_numbers(folder, tmp_path):
    """Two ranks until a signal in the middle of an epoch, then three until another, then one.

    Every step is taken once, and every key is saved once.
    """
    options = [folder, *SMALL, "-b", 12, "--bn-splits", 1, "--epochs", 3]
    options += ["--exp-dir", tmp_path, "--resume"]
    sixth_step = ["main_pcl", "info_nce", 6, signal.SIGTERM]

    last_rank = 1
    ended = finish_ranks(2, main_with_signal, *sixth_step, last_rank, *options)
    assert [status for status, _ in ended] == [128 + signal.SIGTERM] * 2, ended
    assert "stopped by a signal" in ended[0][1], ended
    assert position(tmp_path) == (1, 2)

    last_rank = 2
    ended = finish_ranks(3, main_with_signal, *sixth_step, last_rank, *options)
    assert [status for status, _ in ended] == [128 + signal.SIGTERM] * 3, ended
    assert "resumed at epoch 1, step 2" in ended[0][1], ended
    assert position(tmp_path) == (2, 4)

    # the keys of epoch 1: a file per rank, two steps in each
    files = list(tmp_path.glob("features/keys/batch*"))
    keys = [torch.load(path, weights_only=True)["index"] for path in files]
    assert sorted(len(index) for index in keys) == [8, 8, 8, 12, 12]
    assert torch.cat(keys).sort().values.tolist() == list(range(48))

    log = run(*options)
    assert [row["epoch"] for row in log] == [0, 1, 2]


def test_a_rank_that_dies_ends_the_others(folder, tmp_path):
    fifth_step_of_rank_1 = ["main_pcl", "info_nce", 5, signal.SIGKILL, 1]
    options = [*fifth_step_of_rank_1, folder, *SMALL, "--exp-dir", tmp_path]
    (status, output), (killed, _) = finish_ranks(2, main_with_signal, *options)
    assert killed == -signal.SIGKILL
    assert status == 1
    assert "another process of this run has ended" in output


def main_in_a_folder_of_its_own(root, *arguments):
    """The program as on a node that shares no file system with the others."""
    folder = Path(root) / os.environ["RANK"]
    folder.mkdir()
    os.chdir(folder)
    main(*arguments)


def test_nodes_that_do_not_share_the_directory_are_told_so_at_the_start(folder, tmp_path):
    options = [folder, *SMALL, "--exp-dir", "run"]
    (status, output), (other_status, other) = finish_ranks(
        2, main_in_a_folder_of_its_own, tmp_path, *options
    )
    assert (status, other_status) == (2, 2)
    assert "all nodes must share --exp-dir, but some do not see run of rank 0" in output
    assert "Traceback" not in output + other
    assert not (tmp_path / "0" / "run" / "checkpoint.pth.tar").exists()


def test_max_restarts_brings_the_run_back(folder, tmp_path):
    options = [folder, *SMALL, "--pcl-r", 10, "--exp-dir"]
    ended = finish_ranks(2, main, *options, tmp_path / "whole")
    assert [status for status, _ in ended] == [0, 0], ended
    output = "".join(output for _, output in ended)
    assert output.count("epoch   3") == 1
    assert "2 x cpu" in output

    # the queue has taken both ranks' keys of all 4 x 6 steps; 10 does not divide their number
    whole = weights(tmp_path / "whole")
    torch.testing.assert_close(whole["module.queue"].norm(dim=0), torch.ones(10))
    assert whole["module.queue_ptr"].item() == 4 * 6 * 8 % 10

    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    eighth_step_of_rank_1 = ["main_pcl", "info_nce", 8, int(signal.SIGKILL), 1]
    command = [*TORCHRUN, "--nproc_per_node=2", "--max-restarts=1", script]
    command += [*eighth_step_of_rank_1, *options, tmp_path / "parts"]
    command = [str(word) for word in command]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "resumed at epoch 1, step 0" in done.stdout
    assert_same(whole, weights(tmp_path / "parts"))


def test_the_slurm_script(folder, tmp_path):
    """SLURM's signal saves the run and puts the job back into the queue."""
    (file,) = Path(MAIN).parent.glob("*/slurm.sh")
    options = [folder, *SMALL, "--epochs", 200, "--exp-dir", tmp_path / "run", "--resume"]
    command = " ".join(str(part) for part in (MAIN, *options))
    script = file.read_text()
    script, commands = re.subn(r"main_pcl.py .* --resume", command, script)
    script, ranks = re.subn("node=8 --max", "node=2 --max", script)
    assert commands == 1
    assert ranks == 1
    (tmp_path / "job.sh").write_text(script)

    # stands in for SLURM's scontrol
    (tmp_path / "scontrol").write_text(f"#!/bin/bash\necho $* > {tmp_path}/requeued\n")
    (tmp_path / "scontrol").chmod(0o755)
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "SLURM_JOB_ID": "7"}
    job = subprocess.Popen(
        ["bash", tmp_path / "job.sh"], stdout=subprocess.PIPE, text=True, env=environment
    )
    wait_for_line(job, "epoch   1")
    job.send_signal(signal.SIGUSR1)
    job.communicate(timeout=60)
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    assert position(tmp_path / "run") >= (1, 0)
