"""Processes, ranks, and the signals that ask a run to stop. One process alone works as well."""

import contextlib
import hashlib
import itertools
import math
import os
import signal
import socket
import sys
import threading
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from runtime.cli import fail, say

STOP_SIGNALS = [signal.SIGTERM, signal.SIGINT]
if hasattr(signal, "SIGUSR1"):  # not on Windows
    STOP_SIGNALS.append(signal.SIGUSR1)  # SLURM sends it before a job's time is up
RESTARTS = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))  # by `torchrun --max-restarts`
LAUNCH = ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets beside RANK
JOIN = 300  # seconds for all processes to start and to find each other
PATIENCE = timedelta(hours=2)  # for a process that is late, for example because it downloads
SIZES = 1000  # image files whose sizes are compared between ranks


# -- processes -------------------------------------------------------------------------------------
def init_distributed():
    """Join the other processes if torchrun has started any. Returns this process's device."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if os.environ.get("RANK"):
        check_launch()
    if device == "cuda":
        number = number_from_launcher("LOCAL_RANK", default=0)
        visible = torch.cuda.device_count()
        if number >= visible:
            fail(f"process {number} of this machine sees {visible} GPUs; start one process per GPU")
        torch.cuda.set_device(number)
    if not os.environ.get("RANK"):
        return device

    # on one machine, listen on the loopback device only
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        loopback = "lo0" if sys.platform == "darwin" else "lo"
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", loopback)

    wait_for_launcher()
    try:
        store, rank, world = next(dist.rendezvous("env://", timeout=timedelta(seconds=JOIN)))
        store.set_timeout(PATIENCE)
        # a prefix per start, so that a restarted process does not find the addresses of dead ones
        store = dist.PrefixStore(f"start {RESTARTS}", store)
        # gloo for tensors on the CPU, so that looking for a stop signal does not wait for the GPU
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        fail_to_join(error)
    return device


def check_launch():
    """End the program in one line if a variable that torchrun sets is missing or malformed."""
    advice = "start with torchrun, or unset RANK to use one process"
    missing = [name for name in LAUNCH if not os.environ.get(name)]
    if missing:
        fail(f"RANK is set, but {' and '.join(missing)} not; {advice}")
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        text = os.environ.get(name)
        if text and not text.isdecimal():
            fail(f"{name} is {text!r}, not a number; {advice}")
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if rank >= world:
        fail(f"RANK is {rank}, but WORLD_SIZE is {world}: ranks count from 0; {advice}")


def number_from_launcher(name, default=1):
    """The number in the variable `name`, which torchrun sets for each process, or `default`.

    Containers and jobs set some of these variables as well, but not RANK.
    """
    if not os.environ.get("RANK"):
        return default
    return int(os.environ.get(name) or default)


def wait_for_launcher():
    """Wait until torchrun's address accepts connections. Ends the program if it never does."""
    hosts_it = os.environ["RANK"] == "0" and "TORCHELASTIC_USE_AGENT_STORE" not in os.environ
    if hosts_it:
        return
    address = (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"])
    deadline = time.time() + JOIN
    while True:
        try:
            socket.create_connection(address, timeout=JOIN).close()
            return
        except OSError as error:
            if time.time() > deadline:
                fail_to_join(error)
            time.sleep(1)


def fail_to_join(error):
    """End the program because the processes of this run did not find each other."""
    reason = str(error).partition("\n")[0]
    fail(
        f"the processes of this run did not find each other within {JOIN / 60:.0f} minutes; start "
        f"all of them again ({reason})",
        1,
    )


def memory_of(device):
    """The memory of this process's device in bytes; infinite if it is not known."""
    if device == "cuda":
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError):  # Windows
        return math.inf


def check_memory(numbers, device):
    """End the program in one line if `device` has too little memory.

    numbers: {flags: how many float32 numbers they ask for}.
    """
    available = memory_of(device)
    for flags, number in numbers.items():
        if 4 * number > available / 2:  # the other half is for what comes with it
            owner = "this GPU" if device == "cuda" else "this machine"
            fail(
                f"{flags} would need {4 * number / 2**30:.3g} GiB of memory and more; {owner} has "
                f"{available / 2**30:.3g} GiB; choose lower values"
            )


def get_rank_and_world():
    """This process's rank, and the number of processes."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def default_workers():
    """The number of processes that load a rank's images: the cores per rank, at most 8."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # not on macOS; a container or job may use fewer cores
        cores = len(os.sched_getaffinity(0))
    ranks = max(1, number_from_launcher("LOCAL_WORLD_SIZE"))  # on this node
    return min(8, max(1, cores // ranks))


def print_main(text):
    """Print on the first rank only."""
    if get_rank_and_world()[0] == 0:
        say(text)


@contextlib.contextmanager
def main_process_first():
    """Context whose body the first rank runs alone, for example a download, then the others."""
    rank, _ = get_rank_and_world()
    if rank > 0:
        barrier()
    yield
    if rank == 0:
        barrier()


def barrier():
    """Wait until every rank has arrived here."""
    if dist.is_initialized():
        dist.barrier()


def broadcast_object(value, source=0):
    """The `value` of rank `source`, on every rank."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values, source)
    return values[0]


def broadcast(tensor):
    """Overwrite `tensor` on every rank with that of the first rank."""
    if dist.is_initialized():
        dist.broadcast(tensor, 0)


def set_where_any_rank_has(flags):
    """Set every element of the bool tensor `flags` (n,) that is set on any rank."""
    if dist.is_initialized():
        counts = flags.to(torch.uint8)
        dist.all_reduce(counts, dist.ReduceOp.MAX)
        flags.copy_(counts)


def all_gather_objects(value):
    """The values of all ranks in rank order, on every rank."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def refuse_other_images(sources, image_size):
    """End the program in one line, on all ranks, if one has other images than the first rank.

    sources: a data.Source for each part of the data set. Names and labels are compared and, for up
        to SIZES files, their sizes. Pixels are not.
    """
    if not dist.is_initialized():
        return
    facts = []
    for source in sources:
        names = source.names() or [f"image {i}" for i in range(len(source))]
        labels = source.labels.tolist()
        found = [f"{name}, label {label}" for name, label in zip(names, labels, strict=True)]
        if source.paths is not None:
            for i in range(0, len(found), math.ceil(len(found) / SIZES)):
                with contextlib.suppress(OSError):
                    found[i] += f", {os.path.getsize(source.paths[i])} bytes"
        facts += [*found, "no further image"]
    facts.append(f"views of {image_size} pixels")
    refuse_difference("other images", facts)


def refuse_difference(what, facts):
    """End the program in one line, on all ranks, if one has other `facts` than the first rank.

    what: says what differs. facts: a list of texts. The first one that differs is named.
    """
    digest = hashlib.sha256(repr(facts).encode()).hexdigest()
    if len(set(all_gather_objects(digest))) == 1:
        return
    rank, _ = get_rank_and_world()
    difference = None
    expected = broadcast_object(facts)
    for own, first in itertools.zip_longest(facts, expected, fillvalue="nothing"):
        if own != first:
            where = f"on rank {rank} ({socket.gethostname()}) than on rank 0"
            difference = f"{what} {where}: {own} instead of {first}; start all ranks with the same"
            break
    differences = [text for text in all_gather_objects(difference) if text is not None]
    end_all_ranks(differences[0])


def end_all_ranks(message):
    """End the program in one line, which the first rank prints. All ranks must call this."""
    rank, _ = get_rank_and_world()
    barrier()
    dist.destroy_process_group()
    if rank == 0:
        fail(message)
    raise SystemExit(2)


def data_parallel(model, unused=()):
    """`model` or, with several processes, a wrapper that averages the gradients over them.

    unused: names of parameters that get no gradient. Searching for them in each step takes time.
    """
    if get_rank_and_world()[1] == 1:
        return model
    model._ddp_params_and_buffers_to_ignore = list(unused)  # DistributedDataParallel reads this
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=True)
    # Set here, because the constructor with this option would not make the buffers of all ranks
    # equal at the start. main_pcl.py broadcasts them once per epoch.
    parallel.broadcast_buffers = False
    return parallel


# -- signals ---------------------------------------------------------------------------------------
class StopSignals:
    """Context in which a stop signal only sets a flag, to be read where the run can be resumed.

    A second Ctrl-C stops at once. Outside the main thread, where Python allows no signal handlers,
    signals keep their usual effect.
    """

    def __enter__(self):
        self.received = 0  # the signal's number
        self.before = {}
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                self.before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _receive(self, number, frame):
        # with several processes, torchrun repeats the signal
        is_second_ctrl_c = number == signal.SIGINT and self.received == signal.SIGINT
        if is_second_ctrl_c and not dist.is_initialized():
            if callable(self.before[number]):
                self.before[number](number, frame)
            return
        self.received = number
        if number == signal.SIGINT and sys.stderr.isatty():
            os.write(2, b"\nstopping after this step or clustering; Ctrl-C again stops at once\n")

    def received_by_any(self):
        """Whether any rank has received a signal. All ranks have to ask."""
        if dist.is_initialized():
            received = torch.tensor(self.received)
            dist.all_reduce(received, dist.ReduceOp.MAX)
            self.received = received.item()
        return self.received > 0

    def exit_if_received(self, save):
        """If any rank has received a signal, call `save` and exit with 128 + its number."""
        if not self.received_by_any():
            return
        save()
        barrier()  # torchrun kills the others soon after the first rank has left
        if get_rank_and_world()[0] == 0:
            say("", sys.stderr)  # to end the line in which a terminal may show ^C
            say(
                "stopped by a signal; the same command with --resume continues from here",
                sys.stderr,
            )
        raise SystemExit(128 + self.received)


def ignore_stop_signals(_=None):
    """Let a loader worker live through a stop signal that reaches all processes of a job.

    The run needs the worker to finish its step. A signal from the run itself ends the worker. If
    the run ends first, the worker does not complain about its lost connections.
    """

    def wait():
        while signal.sigwaitinfo(STOP_SIGNALS).si_pid != os.getppid():
            pass
        os._exit(0)

    sys.excepthook = lambda *_: None  # errors in the data set reach the run in another way
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        threading.Thread(target=wait, daemon=True).start()
