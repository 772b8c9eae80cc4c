"""Processes and ranks, and the signals that ask a run to end. Everything here works for one process alone, too."""

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
STOP_SIGNALS += [signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else []  # SLURM's, ahead of a job's end
RESTARTS = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))  # by `torchrun --max-restarts`


def init_distributed():
    """Join the other processes that torchrun has started, if it has. Returns the device of this one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if "RANK" in os.environ:
        if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:  # nothing to listen for outside
            for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
                os.environ.setdefault(name, "lo0" if sys.platform == "darwin" else "lo")
        timeout = timedelta(hours=2)
        store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
        store = dist.PrefixStore(f"start {RESTARTS}", store)  # else a restart finds the addresses of the dead
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"  # so that no device waits for a signal
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    return device


def get_rank_and_world():
    """(this process's rank, number of processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def print_main(text):
    """Print on the first rank alone."""
    if get_rank_and_world()[0] == 0:
        print(text, flush=True)


@contextlib.contextmanager
def main_process_first():
    """As a context: the first rank runs the body alone, such as a download, and then the others do."""
    rank, world = get_rank_and_world()
    if rank > 0:
        dist.barrier()
    yield
    if rank == 0 and world > 1:
        dist.barrier()


def broadcast_object(value):
    """The first rank's `value`, on every rank."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values, 0)
    return values[0]


def broadcast(tensor, source=0):
    """Make `tensor`, on every rank, that of rank `source`."""
    if dist.is_initialized():
        dist.broadcast(tensor, source)


def all_gather_objects(value):
    """All ranks' values, on every rank, in rank order."""
    values = [value]
    if dist.is_initialized():
        values *= dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


def data_parallel(model, unused=()):
    """`model` as the training loop calls it: where there are several processes, they average their gradients.
    unused: names of parameters that get no gradient; to search for them in every step would cost time."""
    if not dist.is_initialized():
        return model
    model._ddp_params_and_buffers_to_ignore = list(unused)  # as DistributedDataParallel reads it
    device_ids = [torch.cuda.current_device()] if next(model.parameters()).is_cuda else None
    parallel = DistributedDataParallel(model, device_ids, gradient_as_bucket_view=True)
    parallel.broadcast_buffers = False  # main_pcl.py makes them equal once an epoch
    return parallel


class StopSignals:
    """As a context: signals that ask a run to end set a flag, which the run reads where it can be taken up again."""

    def __enter__(self):
        self.received = 0
        self.before = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _receive(self, number, _):
        self.received = number

    def received_by_any(self):
        """Whether some rank has got a signal; all ranks have to ask."""
        if dist.is_initialized():
            received = torch.tensor(self.received)
            dist.all_reduce(received, dist.ReduceOp.MAX)
            self.received = received.item()
        return self.received > 0

    def exit_if_received(self, save):
        """Where some rank has got a signal, call `save` and end the program with 128 + the signal's number."""
        if self.received_by_any():
            save()
            if dist.is_initialized():  # torchrun ends the others soon after the first has left
                dist.barrier()
            if get_rank_and_world()[0] == 0:
                print("\nstopped by a signal; the same command with --resume goes on from here", file=sys.stderr)
            raise SystemExit(128 + self.received)


def ignore_stop_signals(_=None):
    """For loader workers: a stop signal may reach all processes of a job, and this one is needed to finish the step."""

    def wait():  # for the parent's own signal, with which it ends its workers
        while signal.sigwaitinfo(STOP_SIGNALS).si_pid != os.getppid():
            pass
        os._exit(0)

    if hasattr(signal, "sigwaitinfo"):  # macOS has none
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        threading.Thread(target=wait, daemon=True).start()
