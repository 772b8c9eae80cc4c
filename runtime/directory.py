"""A run's directory: its name, its lock, files written whole or not at all, args.json."""

import contextlib
import errno
import fnmatch
import json
import os
import platform
import re
import shutil
import socket
import sys
import tempfile
import time
from pathlib import Path

import faiss
import filelock
import torch

from runtime.cli import DISK_IS_FULL, fail, program_name, say
from runtime.distributed import (
    RESTARTS,
    all_gather_objects,
    barrier,
    end_all_ranks,
    get_rank_and_world,
    print_main,
)

BEGUN = ".begun"  # a file in a run's directory: which torchrun has begun the run
LEASE = 60  # seconds without a sign of life after which another run may take the directory over
NO_FLOCK = (  # how file systems such as Lustre and NFS say that they have no locks
    errno.ENOSYS,
    errno.ENOLCK,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.EINVAL,
)

FILES_OF_RUN = (
    "checkpoint*.pth.tar",
    "args.json",
    "images.txt",
    "broken.txt",
    "log.csv",
    "clusters.csv",
    "events.out.tfevents.*",
    "curves.png",
    "prototypes.png",
)
FILES_OF_EVALUATION = (
    "probe.pth.tar",
    "eval.json",
    "map.png",
    "map_[0-9]*.png",
)


def choose_directory(exp_dir, resume):
    """The run's directory: `exp_dir` or, if that is None, one of the default names.

    The default names are experiment_pcl, experiment_pcl_2, ... A new run takes the next one, also
    if it starts from a checkpoint of another run. --resume alone takes the latest one, and a
    restart by torchrun its own.

    resume: the value of --resume: a checkpoint, "" for the latest of the run, None for a new run.
    """
    if exp_dir is not None:
        return Path(exp_dir)
    runs = {}  # {number: directory}
    for path in Path().iterdir():
        number = re.fullmatch(r"experiment_pcl(?:_([2-9]|[1-9][0-9]+))?", path.name)
        if number and not is_failed_start(path):
            runs[int(number[1] or 1)] = path
    for directory in runs.values():
        if is_restart(directory):
            return directory
    if not runs:
        return Path("experiment_pcl")
    latest = max(runs)
    if resume == "":
        return runs[latest]
    return Path(f"experiment_pcl_{latest + 1}")


def is_failed_start(directory):
    """Whether `directory` holds nothing but the list of the broken images that ended a start."""
    with contextlib.suppress(OSError):  # not a folder, or one that may not be read
        return os.listdir(directory) == ["broken.txt"]
    return False


def holds_foreign_files(directory):
    """Whether `directory` holds no run, but files or folders that no run would leave."""
    if not directory.is_dir() or (directory / "checkpoint.pth.tar").exists():
        return False
    for path in directory.iterdir():
        is_own = any(fnmatch.fnmatchcase(path.name, pattern) for pattern in FILES_OF_RUN)
        if not is_own and not path.name.startswith("."):
            return True
    return False


def is_restart(directory):
    """Whether torchrun has restarted the program after its run had begun in `directory`."""
    if RESTARTS == 0:
        return False
    with contextlib.suppress(OSError):
        return (directory / BEGUN).read_text() == folder_of_torchrun()
    return False


def mark_begun(directory):
    """If torchrun has started the program, note in `directory` that its run has begun."""
    folder = folder_of_torchrun()
    if folder:
        (directory / BEGUN).write_text(folder)


def folder_of_torchrun():
    """Where torchrun collects errors: the same folder in all its restarts. "" without torchrun."""
    if "TORCHELASTIC_ERROR_FILE" not in os.environ:
        return ""
    path = Path(os.environ["TORCHELASTIC_ERROR_FILE"])  # FOLDER/attempt_0/0/error.json
    return str(path.parent.parent.parent)


def check_writable(directory):
    """End the program in one line, before it reads the data, if `directory` cannot be written."""
    try:
        str(directory).encode()
    except UnicodeEncodeError:
        fail(f"{directory} is not valid UTF-8, which TensorBoard needs; choose another --exp-dir")
    place = directory
    while not os.path.lexists(place):  # it will be made below the first folder that is there
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        fail(f"cannot write to {directory}: {error.strerror}; choose another --exp-dir")


@contextlib.contextmanager
def lock(directory):
    """Context in which the run's directory exists and no other run can use it.

    The first rank creates and locks it. Ends the program in one line if that is impossible, or if
    the other ranks do not see the same directory.
    """
    holder = directory / ".holder"
    if get_rank_and_world()[0] > 0:
        refuse_unshared(holder)
        yield
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
        held = acquire(directory, holder)
        remove_partial(directory, (*FILES_OF_RUN, holder.name))
        write_atomically(holder, describe_this_process().encode())
    except filelock.Timeout:
        fail(
            f"another run is writing to {directory}{read_holder(holder)}; wait until it ends, or "
            "choose another --exp-dir"
        )
    except OSError as error:
        if error.errno in DISK_IS_FULL:
            raise
        fail(f"cannot write to {directory}: {error.strerror}; choose another --exp-dir")
    with held:
        try:
            refuse_unshared(holder)
            yield
        finally:
            with contextlib.suppress(OSError):
                holder.unlink()


def refuse_unshared(holder):
    """End the program in one line, on all ranks, unless all see the file of the first rank."""
    barrier()  # until it is written
    text = holder.read_text() if holder.is_file() else ""
    if len(set(all_gather_objects(text))) > 1:
        end_all_ranks(
            f"all nodes must share --exp-dir, but some do not see {holder.parent} of rank 0"
        )


def acquire(directory, holder):
    """Lock `directory`. Raises filelock.Timeout if a live process holds the lock.

    holder: file that says which process that is.
    Normally the kernel knows whether the holder still runs. Some file systems of clusters have no
    such locks. There the directory is leased.
    """
    lease = directory / ".lease"
    with contextlib.ExitStack() as held:
        try:
            lock = filelock.FileLock(directory / ".lock", fallback_to_soft=False)
            held.enter_context(lock.acquire(blocking=False))
            is_locked = True
        except OSError as error:
            if error.errno not in NO_FLOCK:
                raise
            is_locked = False
        if lease.exists() or not is_locked:
            if holder.exists() and not lease.exists():  # a run where the kernel has locks
                who = read_holder(holder)
                fail(f"{directory} is locked{who}; if that run has ended, delete {holder}")
            held.enter_context(acquire_lease(lease, holder))
        return held.pop_all()


def acquire_lease(path, holder):
    """Hold the file `path` by touching it every few seconds. Raises filelock.Timeout like acquire.

    A holder that has not touched it for LEASE seconds has died, perhaps on another machine. Then
    the lease is taken over.
    """
    lease = filelock.SoftFileLease(
        path,
        lease_duration=LEASE,
        heartbeat_interval=LEASE / 6,
        on_compromise=end_after_loss,
    )
    with contextlib.suppress(filelock.Timeout):
        return lease.acquire(blocking=False)

    touched = last_touch(path)
    print_main(
        f"{path.parent} is locked{read_holder(holder)}; waiting {LEASE} seconds for a sign of life"
    )

    def is_alive():
        return last_touch(path) not in (None, touched)

    try:
        held = lease.acquire(timeout=LEASE + 10, poll_interval=1, cancel_check=is_alive)
    except filelock.Timeout:
        if is_alive():
            raise
        who = read_holder(holder)
        fail(f"{path.parent} is locked{who}; if that run has ended, delete {path}")
    print_main(f"there is none: this run takes {path.parent} over")
    return held


def last_touch(path):
    """When the holder of a lease has last touched its file, or None if the file has gone."""
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_mtime_ns
    return None


def end_after_loss(_):
    """End the program at once, because another run has taken its directory over."""
    text = f"this process gave no sign of life for {LEASE} seconds; another run has its directory"
    say(f"{program_name()}: error: {text}", sys.stderr)
    os._exit(1)


def describe_this_process():
    """Which process this is, and since when it has held the lock."""
    now = time.strftime("%Y-%m-%d %H:%M")
    return f"process {os.getpid()} on {socket.gethostname()} since {now}"


def read_holder(path):
    """Which process holds the lock, such as " (process 7 on node1 since ...)"; "" if unknown."""
    with contextlib.suppress(OSError):
        text = path.read_text(errors="replace")
        if text.isprintable():
            return f" ({text})"
    return ""


def clear(directory):
    """Remove the files of an earlier run from `directory`; other files stay."""
    names = (*FILES_OF_RUN, *FILES_OF_EVALUATION)
    for pattern in names:
        for path in directory.glob(pattern):
            path.unlink()
    remove_partial(directory, names)
    remove_features(directory)


def remove_partial(directory, names):
    """Remove what `write_atomically` has left half written when it was killed.

    names: patterns of the files that were to be written.
    """
    for pattern in names:
        for partial in directory.glob(f"{pattern}.*.tmp"):
            partial.unlink()


def remove_features(directory):
    """Remove the features that a run keeps while it trains."""
    shutil.rmtree(directory / "features", ignore_errors=True)


def write_atomically(path, data):
    """Write the bytes `data` to the file `path` whole or not at all.

    If the process dies or the disk is full, `path` keeps its old content. Raises OSError.
    """
    # a name of its own, because two ranks, or two evaluations, may write the same file; not the
    # process's number, which processes on two nodes may share
    partial = path.with_name(f"{path.name}.{os.urandom(4).hex()}.tmp")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_args(directory, args, epoch, step, changes):
    """Write args.json: the arguments and, under "parts", what each part of the run ran on.

    A part lasts from a start of the program to its end. args: {name: value}.
    epoch, step: where this part begins. changes: {name: [old value, new value]} since the last one.
    """
    if get_rank_and_world()[0] > 0:
        return
    path = directory / "args.json"
    parts = []
    if epoch or step:
        with contextlib.suppress(OSError, RecursionError, ValueError, KeyError, TypeError):
            parts = list(json.loads(path.read_text())["parts"])  # unless it was lost or edited
    parts.append({"epoch": epoch, "step": step, "changed": changes, **ran_on(args["device"])})
    write_atomically(path, json.dumps({**args, "parts": parts}, indent=2).encode())


def ran_on(device):
    """What figures may depend on: versions, device, threads and processes, as a dict."""
    name = platform.machine()
    if torch.device(device).type == "cuda":
        name = torch.cuda.get_device_name()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "faiss": faiss.__version__,
        "device": name,
        "threads": torch.get_num_threads(),
        "world": get_rank_and_world()[1],
    }
