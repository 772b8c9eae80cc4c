"""Processes, ranks, and the signals that ask a run to stop. One process alone works as well."""

import contextlib
import os
import signal
import sys
import threading
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

STOP_SIGNALS = [signal.SIGTERM, signal.SIGINT]
if hasattr(signal, "SIGUSR1"):  # not on Windows
    STOP_SIGNALS.append(signal.SIGUSR1)  # SLURM sends it before a job's time is up
RESTARTS = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))  # by `torchrun --max-restarts`


# -- processes -------------------------------------------------------------------------------------
def init_distributed():
    """Join the other processes if torchrun has started any. Returns this process's device."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if "RANK" not in os.environ:
        return device

    # on one machine, listen on the loopback device only
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        loopback = "lo0" if sys.platform == "darwin" else "lo"
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", loopback)

    timeout = timedelta(hours=2)
    store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
    # a prefix per start, so that a restarted process does not find the addresses of dead ones
    store = dist.PrefixStore(f"start {RESTARTS}", store)
    # gloo for tensors on the CPU, so that looking for a stop signal does not wait for the GPU
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    return device


def get_rank_and_world():
    """This process's rank, and the number of processes."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def print_main(text):
    """Print on the first rank only."""
    if get_rank_and_world()[0] == 0:
        print(text, flush=True)


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


def broadcast_object(value):
    """The first rank's `value`, on every rank."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values, 0)
    return values[0]


def broadcast(tensor, source=0):
    """Overwrite `tensor` on every rank with that of rank `source`."""
    if dist.is_initialized():
        dist.broadcast(tensor, source)


def all_gather_objects(value):
    """The values of all ranks in rank order, on every rank."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def data_parallel(model, unused=()):
    """`model` or, with several processes, a wrapper that averages the gradients over them.

    unused: names of parameters that get no gradient. Searching for them in each step takes time.
    """
    if not dist.is_initialized():
        return model
    model._ddp_params_and_buffers_to_ignore = list(unused)  # DistributedDataParallel reads this
    device_ids = None
    if next(model.parameters()).is_cuda:
        device_ids = [torch.cuda.current_device()]
    parallel = DistributedDataParallel(model, device_ids, gradient_as_bucket_view=True)
    parallel.broadcast_buffers = False  # main_pcl.py broadcasts them once per epoch
    return parallel


# -- signals ---------------------------------------------------------------------------------------
class StopSignals:
    """Context in which a stop signal only sets a flag, to be read where the run can be resumed."""

    def __enter__(self):
        self.received = 0  # the signal's number
        self.before = {}
        for number in STOP_SIGNALS:
            self.before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _receive(self, number, _):
        self.received = number

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
            message = "\nstopped by a signal; the same command with --resume continues from here"
            print(message, file=sys.stderr)
        raise SystemExit(128 + self.received)


def ignore_stop_signals(_=None):
    """Let a loader worker live through a stop signal that reaches all processes of a job.

    The run needs the worker to finish its step. A signal from the run itself ends the worker.
    """

    def wait():
        while signal.sigwaitinfo(STOP_SIGNALS).si_pid != os.getppid():
            pass
        os._exit(0)

    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        threading.Thread(target=wait, daemon=True).start()
