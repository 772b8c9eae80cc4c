"""Ctrl-C ends a script of this project in one line, whatever it is doing.

Import this before anything else, because the other imports are slow.
"""

import contextlib
import os
import signal
import sys
import threading

PATIENCE = 5  # seconds after Ctrl-C to print and save what has been measured
process = os.getpid()  # forked loader workers have another one
again = "start again with the same command"  # how to go on
is_caught = False  # whether errors_in_one_line is there to catch KeyboardInterrupt
is_interrupted = False


def is_first_rank():
    """Whether this is the first rank, also before there is a process group: torchrun sets RANK."""
    return os.environ.get("RANK", "") in ("", "0")


def interrupt(*_):
    """Signal handler: say that the program ends and how to go on, and raise KeyboardInterrupt.

    If nothing would catch it, the program ends at once. A library may wait forever for a worker
    that Ctrl-C has ended too, so the program ends after PATIENCE seconds in any case.
    """
    global is_interrupted
    if os.getpid() != process:  # a loader worker that has just been forked
        os._exit(130)
    is_interrupted = True
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one would only disturb the end
    if is_first_rank():
        text = f"\n{os.path.basename(sys.argv[0])}: stopped by Ctrl-C; {again}\n"
        with contextlib.suppress(OSError):  # nobody reads it
            os.write(2, text.encode(errors="replace"))
    if not is_caught:
        os._exit(130)
    sys.unraisablehook = end_if_swallowed
    timer = threading.Timer(PATIENCE, os._exit, [130])
    timer.daemon = True
    timer.start()
    raise KeyboardInterrupt


def end_if_swallowed(unraisable):
    """End the program if Python ignores a KeyboardInterrupt, as it does in a destructor."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        os._exit(130)


def is_script():
    """Whether a script of this project is running. Other programs keep their own Ctrl-C."""
    path = getattr(sys.modules["__main__"], "__file__", None)
    here = os.path.dirname(os.path.realpath(__file__))
    return path is not None and os.path.dirname(os.path.realpath(path)) == os.path.dirname(here)


if is_script() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, interrupt)
