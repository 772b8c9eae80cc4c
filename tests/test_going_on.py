"""Going on: values of flags, a run that knows its arguments, precision, locks, ranks, Ctrl-C."""

import contextlib
import errno
import io
import json
import multiprocessing
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, assert_same, fails, picture, run, wait_for_line, weights

import eval_lincls
import main_pcl
import runtime.directory
from runtime import cli, distributed

ROOT = Path(main_pcl.__file__).parent
SHORT = [*TINY, "--epochs", 2, "--warmup", 1]


@pytest.fixture(scope="session")
def finished(folder, tmp_path_factory):
    """The directory of a run of one epoch. Tests must not write to it."""
    directory = tmp_path_factory.mktemp("finished") / "run"
    run(folder, *TINY, "--epochs", 1, "--warmup", 0, "--exp-dir", directory)
    return directory


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of that run, to write to."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Training without pictures, which take most of the time of so short runs."""
    for name in ("draw_curves", "draw_prototypes"):
        monkeypatch.setattr(main_pcl.report, name, lambda *_: None)


# -- values of flags -------------------------------------------------------------------------------
def works_or_is_refused(capsys, main, args):
    """Check that `main` finishes, or ends with one line and status 2. Returns whether it works.

    A run may also diverge, which it says.
    """
    capsys.readouterr()
    try:
        main([str(arg) for arg in args])
    except SystemExit as stop:
        lines = capsys.readouterr().err.strip().splitlines()
        if stop.code == 2:
            assert len(lines) == 1, lines
        else:
            assert str(stop.code).startswith("stopped at epoch"), stop.code
        return stop.code != 2
    return True


@pytest.mark.filterwarnings("ignore:Scale and ratio")
@pytest.mark.parametrize(
    "flag, works, refused",
    [
        ("--seed", [2**31 - 1], [2**31, 10**30]),
        ("--lr", [1e-300, 999], [1e300, "0"]),
        ("--wd", [999], [1000, "-0.1"]),
        ("--temperature", [0.001, 999], [1e-4, 1000]),
        ("--clip-grad", [1e-300, 1e8], [1e9]),
        ("--momentum", [0], [1]),
        ("--moco-m", [0], [1, "nan"]),
        ("--lr-warmup", [10**9], [2**31]),
        ("--schedule", [10**9], [-1]),
        ("--warmup", [10**9], ["inf"]),
        ("--knn-every", [10**9], [0]),
        ("--low-dim", [1, 9_999], [10_000]),
        ("--num-cluster", ["1", "1,1", ",".join(["3"] * 300), "48"], ["49", "0", str(10**30)]),
        ("--pcl-r", [1, 1000], [10**9, 10**30]),
        ("--batch-size", [4, 48], [1, 49, 10**9]),
        ("--bn-splits", [8], [9, 10**9]),
        ("--image-size", [1], [9_999, 10_000]),
        ("--crop-min", [1e-300], [1.1, 1e8]),
        ("--workers", [], [513, -1]),
        ("--arch", [], ["resnet18_w" + "9" * 40, "resnet18_w0", "", "x" * 5000]),
        ("--init", [], ["/dev/null", "/", "x" * 5000, "x\0y"]),
        ("--config", [], ["/dev/null", "/", "x" * 5000, "x\0y"]),
        ("--resume", [], ["/dev/null", "/", "x" * 5000, "x\0y"]),
        ("--exp-dir", [], ["/dev/null/x", "x" * 5000, "x\udcff"]),
    ],
)
def test_any_value_of_a_training_flag_works_or_is_refused(
    folder, tmp_path, capsys, flag, works, refused
):
    for value in [*works, *refused]:
        options = [*TINY, "--epochs", 1, "--warmup", 0, "--exp-dir", tmp_path, "--overwrite"]
        words = [f"{flag}={value}"]
        if flag == "--schedule":
            words = [flag, value]
        expected = value in works
        assert works_or_is_refused(capsys, main_pcl.main, [folder, *options, *words]) == expected


@pytest.mark.parametrize("script", [main_pcl, eval_lincls])
@pytest.mark.parametrize("data", ["", "x" * 5000, "x/" * 3000, "/dev/null", "x\0y", "x\n\udcff"])
def test_data_that_cannot_be_a_folder_gets_one_line(finished, tmp_path, capsys, script, data):
    exp_dir = tmp_path if script is main_pcl else finished
    assert not works_or_is_refused(capsys, script.main, [data, "--exp-dir", exp_dir])


@pytest.mark.parametrize(
    "flag, works, refused",
    [
        ("--knn-k", [1, 2**31 - 1], [0, 2**31]),
        ("--num-cluster", ["1", "48"], ["49", str(10**30)]),
        ("--seed", [2**31 - 1], [2**31]),
        ("--batch-size", [1, 2**31 - 1], [0]),
        ("--image-size", [1], [9_999]),
        ("--labels", ["1e8"], ["0", "1.5", "nan"]),
        ("--pretrained", [], ["/dev/null", "x" * 5000]),
        ("--export", [], ["/", "x" * 5000, "no/folder"]),
        ("--json", [], ["/", "x" * 5000, "no/folder"]),
    ],
)
def test_any_value_of_an_evaluation_flag_works_or_is_refused(
    copy, capsys, monkeypatch, flag, works, refused
):
    monkeypatch.setattr(eval_lincls, "DRAWS", 2)
    monkeypatch.setattr(eval_lincls, "draw_map", lambda *_: None)
    for value in [*works, *refused]:
        args = ["--exp-dir", copy, "--no-baselines", f"{flag}={value}"]
        assert works_or_is_refused(capsys, eval_lincls.main, args) == (value in works)


def test_amounts_of_labels_that_repeat_count_once(copy, monkeypatch):
    draws = []

    def draw_labels(labels, amount, seed):
        draws.append(seed)
        return torch.arange(len(labels))

    monkeypatch.setattr(eval_lincls, "draw_labels", draw_labels)
    eval_lincls.main(["--exp-dir", str(copy), "--no-baselines", "--labels", *["1"] * 20])
    assert len(draws) == eval_lincls.DRAWS


@pytest.mark.parametrize("script", [main_pcl, eval_lincls])
def test_a_file_without_permission_gets_one_line(finished, capsys, monkeypatch, script):
    def is_refused(name, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", name)

    monkeypatch.setattr(script, "build_datasets", is_refused)
    error = fails(capsys, script.main, "closed", "--exp-dir", finished)
    assert error.endswith("error: Permission denied: closed\n")


# -- a run knows its arguments ---------------------------------------------------------------------
def stop_after(monkeypatch, steps):
    """Let a signal arrive once, after this number of steps."""
    asked = []

    def received_by_any(self):
        asked.append(self)
        if len(asked) >= steps:
            self.received = signal.SIGTERM
        return self.received > 0

    monkeypatch.setattr(distributed.StopSignals, "received_by_any", received_by_any)


OWN = [*SHORT, "--epochs", 3, "--cos", "--amp", "--seed", 7, "--no-flip", "--lr", 0.02]
OWN += ["--schedule", 1, 2, "--symmetric", "--cluster-head", "report", "--clip-grad", 1]


def test_resume_alone_continues_with_the_run_s_own_arguments(folder, tmp_path, monkeypatch):
    run(folder, *OWN, "--exp-dir", tmp_path / "whole")
    for steps in (2, 5):  # in the warm-up, and within an epoch with clusters
        parts = tmp_path / str(steps)
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            stop_after(patch, steps)
            run(folder, *OWN, "--exp-dir", parts)
        run("--exp-dir", parts, "--resume")
        assert_same(weights(tmp_path / "whole"), weights(parts))


@pytest.mark.parametrize("text", [None, "", "[1]", "[" * 100_000, "\xff"])
def test_without_args_json_the_checkpoint_knows_the_arguments(copy, capsys, text):
    path = copy / "args.json"
    path.unlink()
    if text is not None:
        path.write_text(text, encoding="latin-1")
    log = run("--exp-dir", copy, "--resume", "--epochs", 2)
    assert len(log) == 2
    output = capsys.readouterr().out
    assert "epochs 1 -> 2" in output
    assert output.count(" -> ") == 1
    assert json.loads(path.read_text())["arch"] == "resnet18_w4"


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": "many"},
        {"lr": float("nan")},
        {"data": "a\0b"},
        {"data": 5},
        {"data": "\ud800"},
        {"amp": "yes"},
        {"num_cluster": [1.5]},
        {"num_cluster": []},
        {"schedule": [[1]]},
        {"epochs": {"a": 1}},
        {"lr": True},
        {"init": "a\0b"},
    ],
)
def test_an_edited_args_json_gets_one_line(copy, capsys, change):
    stored = json.loads((copy / "args.json").read_text())
    (copy / "args.json").write_text(json.dumps({**stored, **change}))
    fails(capsys, main_pcl.main, "--exp-dir", copy, "--resume")


def test_flags_win_over_the_run_s_arguments_and_are_named(copy, capsys):
    run("--exp-dir", copy, "--resume", "--epochs", 2, "--lr", 0.5, "--no-flip")
    output = capsys.readouterr().out
    for change in ("epochs 1 -> 2", "lr 0.001875 -> 0.5", "flip True -> False"):
        assert change in output
    assert output.count(" -> ") == 3


# -- precision -------------------------------------------------------------------------------------
PRECISIONS = {
    "float32": ["--no-amp"],
    "bf16": ["--amp", "--amp-dtype", "bf16"],
    "fp16": ["--amp", "--amp-dtype", "fp16"],
}


@pytest.mark.parametrize(
    "before, after",
    [
        ("bf16", "fp16"),
        ("fp16", "bf16"),
        ("float32", "fp16"),
        ("fp16", "float32"),
        ("fp16", "fp16"),
    ],
)
def test_a_run_goes_on_in_another_precision(folder, tmp_path, capsys, before, after):
    options = [*SHORT, "-b", 48, "--exp-dir", tmp_path]  # one step per epoch
    run(folder, *options, "--epochs", 1, *PRECISIONS[before])
    path = tmp_path / "checkpoint.pth.tar"
    checkpoint = torch.load(path, weights_only=True)
    if before == "fp16":
        checkpoint["scaler"]["scale"] = 256.0
        torch.save(checkpoint, path)
    capsys.readouterr()
    run("--exp-dir", tmp_path, "--resume", "--epochs", 2, *PRECISIONS[after])

    named = capsys.readouterr().out
    for old, new in (("bf16", "fp16"), ("fp16", "bf16")):
        is_new = new == after and before != after  # with --no-amp, amp_dtype is bf16 here
        assert (f"amp_dtype {old} -> {new}" in named) == is_new
    assert ("amp True -> False" in named) == (after == "float32")
    assert ("amp False -> True" in named) == (before == "float32")
    scaler = torch.load(path, weights_only=True)["scaler"]
    if after == "fp16":  # a scaler's state goes on; without one, a new scaler begins
        assert scaler["scale"] == (256.0 if before == "fp16" else 2.0**16)
    else:
        assert not scaler


# -- locks -----------------------------------------------------------------------------------------
@pytest.fixture
def no_flock(monkeypatch):
    """A file system without locks, and a lease of two seconds."""
    fcntl = pytest.importorskip("fcntl")

    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(runtime.directory, "LEASE", 2)


HOLDER = "process 7 on node1 since 2026-01-01 10:00"


def hold(directory):
    """Leave the files of a run on another machine, in the form that such a run writes them."""
    lease = directory / ".lease"
    with contextlib.suppress(SystemExit), runtime.directory.lock(directory):
        held = lease.read_text()
    lease.write_text(held.replace(socket.gethostname(), "node1"))
    (directory / ".holder").write_text(HOLDER)
    return lease


def test_a_lock_left_by_another_machine_is_taken_over(copy, no_flock, capsys):
    lease = hold(copy)
    run("--exp-dir", copy, "--resume", "--epochs", 2)
    output = capsys.readouterr().out
    assert f"{copy} is locked ({HOLDER}); waiting 2 seconds for a sign of life" in output
    assert f"this run takes {copy} over" in output
    assert not lease.exists()
    assert not (copy / ".holder").exists()


def test_a_lock_that_another_machine_holds_names_the_holder(copy, no_flock, capsys):
    lease = hold(copy)
    ended = threading.Event()

    def live():
        while not ended.wait(0.2):
            os.utime(lease)

    thread = threading.Thread(target=live)
    thread.start()
    try:
        error = fails(capsys, main_pcl.main, "--exp-dir", copy, "--resume", "--epochs", 2)
    finally:
        ended.set()
        thread.join()
    assert f"another run is writing to {copy} ({HOLDER}); wait until it ends" in error
    assert (copy / ".holder").read_text() == HOLDER


def test_a_run_that_loses_its_lease_ends_at_once(monkeypatch, capsys):
    """It would overwrite the files of the run that has taken its directory over."""
    statuses = []
    monkeypatch.setattr(os, "_exit", statuses.append)
    runtime.directory.end_after_loss(None)
    assert statuses == [1]
    assert "another run has its directory" in capsys.readouterr().err


def test_a_holder_without_a_lease_says_how_to_take_over(copy, no_flock, capsys):
    """The run that holds the directory is on a machine where the kernel has locks."""
    (copy / ".holder").write_text(HOLDER)
    error = fails(capsys, main_pcl.main, "--exp-dir", copy, "--resume", "--epochs", 2)
    assert f"is locked ({HOLDER}); if that run has ended, delete {copy}/.holder" in error


# -- ranks -----------------------------------------------------------------------------------------
def train_as_rank(rank, port, arguments, file):
    """Run main_pcl.py as one of two ranks. Its stderr and exit status are written to `file`."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    status = 0
    error = io.StringIO()
    with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
        try:
            main_pcl.main([str(word) for word in arguments])
        except SystemExit as stop:
            status = stop.code
    file.write_text(json.dumps([status, error.getvalue()]))


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def two_ranks(tmp_path, first, second):
    """Exit status and stderr of two ranks, given their arguments."""
    context = multiprocessing.get_context("fork")  # a new Python would take seconds to import
    port = free_port()
    files = [tmp_path / "rank0.json", tmp_path / "rank1.json"]
    processes = []
    for rank, arguments in enumerate((first, second)):
        target = (rank, port, arguments, files[rank])
        processes.append(context.Process(target=train_as_rank, args=target))
        processes[-1].start()
    for process in processes:
        process.join(60)
        process.kill()
    return [json.loads(file.read_text()) for file in files]


def move_an_image(root):
    (root / "train" / "class 0" / "15.png").rename(root / "train" / "class 2" / "99.png")


def remove_the_last_image(root):
    (root / "train" / "class 2" / "9.png").unlink()


def replace_an_image(root):
    picture(31, 33).save(root / "train" / "class 1" / "3.png")


def remove_a_held_out_image(root):
    (root / "val" / "class 1" / "2.png").unlink()


@pytest.mark.parametrize(
    "change, named",
    [
        (move_an_image, "class 0/2.png, label 0"),
        (remove_the_last_image, "no further image"),
        (replace_an_image, "class 1/3.png, label 1"),
        (remove_a_held_out_image, "class 1/3.png, label 1"),
    ],
)
def test_ranks_with_other_images_are_named(folder, tmp_path, change, named):
    other = shutil.copytree(folder, tmp_path / "other")
    change(other)
    options = [*SHORT, "--bn-splits", 1, "--exp-dir", tmp_path / "run"]
    (status, error), (other_status, other_error) = two_ranks(
        tmp_path, [folder, *options], [other, *options]
    )
    assert (status, other_status) == (2, 2)
    assert len(error.strip().splitlines()) == 1
    assert f"other images on rank 1 ({socket.gethostname()}) than on rank 0: {named}" in error
    assert other_error == ""
    assert not (tmp_path / "run" / "checkpoint.pth.tar").exists()


def test_ranks_with_other_arguments_are_named(folder, tmp_path):
    options = [folder, *SHORT, "--bn-splits", 1, "--exp-dir", tmp_path / "run"]
    (status, error), _ = two_ranks(tmp_path, options, [*options, "--lr", 0.5])
    assert status == 2
    assert "other arguments on rank 1" in error
    assert "lr 0.5 instead of lr 0.001875" in error


@pytest.mark.parametrize("rank", ["0", "1"])
def test_joining_takes_minutes_at_most(monkeypatch, capsys, rank):
    """The other rank never comes. Rank 0 waits for it, and rank 1 for the address of rank 0."""
    environment = {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    environment["MASTER_PORT"] = str(free_port())
    monkeypatch.setattr(os, "environ", {**os.environ, **environment})
    assert distributed.JOIN <= 600
    monkeypatch.setattr(distributed, "JOIN", 1)
    begin = time.time()
    error = fails(capsys, lambda _: distributed.init_distributed(), status=1)
    assert "did not find each other" in error
    assert time.time() - begin < 20


# -- Ctrl-C ----------------------------------------------------------------------------------------
# stands for a script of the project: it says "ready" and waits inside errors_in_one_line
SCRIPT = """
import runtime.start
import os
import signal
import sys
import time

runtime.start.again = "go on"
runtime.start.is_caught = True
runtime.start.PATIENCE = 1


class Swallows:
    def __del__(self):
        wait()


def wait():
    print("ready", flush=True)
    time.sleep(30)


def swallow():
    value = Swallows()
    del value
    time.sleep(30)


def ignore():
    try:
        wait()
    except KeyboardInterrupt:
        time.sleep(30)


def fork():
    child = os.fork()  # a loader worker that does not ignore signals yet
    if child == 0:
        wait()
    os.waitpid(child, 0)


def importing():
    runtime.start.is_caught = False
    wait()


try:
    globals()[sys.argv[1]]()
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.parametrize(
    "how",
    [
        "wait",  # KeyboardInterrupt is raised
        "swallow",  # and ignored, because a destructor is running
        "ignore",  # or does not end the program
        "importing",
        "fork",
    ],
)
def test_ctrl_c_ends_a_script_in_one_line(tmp_path, how):
    (tmp_path / "runtime").mkdir()
    shutil.copy(ROOT / "runtime" / "start.py", tmp_path / "runtime")
    (tmp_path / "script.py").write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, "script.py", how],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for_line(process, "ready")
    os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it
    _, error = process.communicate(timeout=10)
    assert process.returncode == 130
    assert error == "\nscript.py: stopped by Ctrl-C; go on\n"


def test_ctrl_c_during_the_imports_and_during_an_evaluation(copy):
    command = [sys.executable, ROOT / "eval_lincls.py", "--exp-dir", copy, "-j", "2"]
    command += ["--protocol", "moco"]
    for waits_for in (None, "on "):
        process = subprocess.Popen(
            [str(word) for word in command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        if waits_for is None:
            time.sleep(0.5)
        else:
            wait_for_line(process, waits_for)
        os.killpg(process.pid, signal.SIGINT)  # the loader workers get it, too
        _, error = process.communicate(timeout=30)
        assert process.returncode == 130
        assert "Traceback" not in error
        assert len(error.strip().splitlines()) == 1, error
        assert "stopped by Ctrl-C; start again with the same command" in error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("a worker has exited")])
def test_any_error_after_ctrl_c_is_the_end_that_was_asked_for(monkeypatch, capsys, error):
    is_interrupted = isinstance(error, RuntimeError)
    monkeypatch.setattr(cli.start, "is_interrupted", is_interrupted)

    def work(_):
        with cli.errors_in_one_line(main_pcl.DataError, "go on so"):
            raise error

    with pytest.raises(SystemExit) as stop:
        work([])
    assert stop.value.code == 130
    said = capsys.readouterr().err
    assert ("stopped by Ctrl-C; go on so" in said) == (not is_interrupted)  # it was said before


def test_an_error_without_ctrl_c_keeps_its_traceback():
    with (
        pytest.raises(RuntimeError, match="a mistake of ours"),
        cli.errors_in_one_line(main_pcl.DataError),
    ):
        raise RuntimeError("a mistake of ours")


def test_training_in_a_thread(folder, tmp_path):
    """Python allows no signal handlers there."""
    handlers = [signal.getsignal(number) for number in distributed.STOP_SIGNALS]
    result = []

    def work():
        result.append(run(folder, *SHORT, "--exp-dir", tmp_path))
        result.append(eval_lincls.main(["--exp-dir", str(tmp_path), "--no-baselines"]))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert len(result) == 2
    assert len(result[0]) == 2
    assert [signal.getsignal(number) for number in distributed.STOP_SIGNALS] == handlers


# -- names of any characters -----------------------------------------------------------------------
ODD = ("caf\udce9 \udcff", "new\nline", "quo'te\"$x_{$", "_under $\\frac$", "日本")


def test_names_of_any_characters(tmp_path, capsys, recwarn):
    """Bytes that are no UTF-8, line breaks, quotes and formulas; also in the run's directory."""
    root = tmp_path / "data \udcff'\n x"
    rng = np.random.default_rng(0)
    for part, n in (("train", 8), ("val", 2)):
        for i, name in enumerate(ODD):
            (root / part / name).mkdir(parents=True)
            for j in range(n):
                image = picture(9, 8, seed=int(rng.integers(1000)) + i)
                with open(root / part / name / f"\udcfe '\"\n{j}.png", "wb") as file:
                    image.save(file, "PNG")
    exp_dir = tmp_path / "a run's $HOME"
    run(root, *SHORT, "--epochs", 1, "--exp-dir", exp_dir)
    output = capsys.readouterr().out
    assert len(output.splitlines()[0].split("40 training images, 10 held out, 5 classes")) == 2
    run("--exp-dir", exp_dir, "--resume", "--epochs", 2)

    names = (exp_dir / "images.txt").read_bytes()
    assert names.count(b"\n") == 40
    assert b"caf\xe9 \xff/\xfe '\"\\n0.png" in names
    assert json.loads((exp_dir / "args.json").read_text())["data"] == str(root)

    # the printed command is the one to paste
    (command,) = [line for line in output.splitlines() if line.startswith("next: ")]
    words = shlex.split(command.removeprefix("next: "))
    assert words == ["python", "eval_lincls.py", "--exp-dir", str(exp_dir)]
    eval_lincls.main(words[2:])
    assert (exp_dir / "map.png").stat().st_size > 0
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]

    # an image that is gone, and one that is broken, are named in one line
    image = root / "train" / ODD[0] / "\udcfe '\"\n0.png"
    image.unlink()
    again = ["--exp-dir", exp_dir, "--resume", "--epochs", 3]
    assert "1 missing ('caf" in fails(capsys, main_pcl.main, *again)
    image.write_bytes(b"no image")
    options = [*SHORT, "--exp-dir", tmp_path / "new"]
    assert r"caf\udce9 \udcff/\udcfe" in fails(capsys, main_pcl.main, root, *options)
    assert b"caf\xe9 \xff" in (tmp_path / "new" / "broken.txt").read_bytes()
