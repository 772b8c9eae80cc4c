"""Processes for tests, forked from a server that has imported the project.

A new interpreter would need five seconds of CPU time to import it.
"""

import io
import multiprocessing
import multiprocessing.forkserver
import os
import socket
import sys
import threading
from unittest import mock

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["main_pcl", "eval_lincls"])


def start_server():
    """Start the server if it does not run yet. It imports from where this process does."""
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
        multiprocessing.forkserver.ensure_running()


def start(function, *args, environment=None, new_session=False):
    """Call `function(*args)` in a process of its own, and leave it running.

    environment: further variables. new_session: be the first process of a session.
    Returns the multiprocessing.Process. Its `stdout` is a text file with all that it prints, on
    stderr as well.
    """
    start_server()
    reader, writer = SERVER.Pipe(duplex=False)
    method = multiprocessing.get_start_method()
    settings = (writer, method, environment or {}, new_session)
    process = SERVER.Process(target=_call, args=(*settings, function, args))
    process.start()
    writer.close()
    process.stdout = os.fdopen(os.dup(reader.fileno()))
    reader.close()
    return process


def _call(output, method, environment, new_session, function, args):
    """What a process does.

    method: how it starts loader workers, which would otherwise come from a server, too.
    """
    from conftest import take_shortcuts

    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    output.close()
    sys.stdout = text_output(1)  # the old objects may be of a file, not of a pipe
    sys.stderr = text_output(2)
    multiprocessing.set_start_method(method, force=True)
    if new_session:
        os.setsid()
    os.environ.update(environment)
    take_shortcuts(setattr)
    function(*args)


def text_output(descriptor):
    """A text stream that writes to a file descriptor at once."""
    return io.TextIOWrapper(io.FileIO(descriptor, "w", closefd=False), write_through=True)


def end(process, timeout=120):
    """Wait until a process ends. Returns its exit status and all that it has printed."""
    watchdog = threading.Timer(timeout, process.kill)
    watchdog.start()
    output = process.stdout.read()
    process.join()
    watchdog.cancel()
    process.stdout.close()
    return process.exitcode, output


def finish(function, *args):
    """Call `function(*args)` in a process of its own. Returns its exit status and output."""
    return end(start(function, *args))


def finish_ranks(world, function, *args):
    """Call `function(*args)` in `world` processes that belong together, as torchrun starts them.

    Returns the exit status and the output of each rank.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(world):
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        processes.append(start(function, *args, environment=environment))
    return [end(process) for process in processes]
