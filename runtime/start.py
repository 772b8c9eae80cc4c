"""Ctrl-C during the slow imports of a script ends it in one line. Import this before them."""

import os
import signal
import sys


def leave(*_):
    """Signal handler: end the program in one line, whatever it is importing."""
    if os.environ.get("RANK", "0") == "0":  # as torchrun says it
        name = os.path.basename(sys.argv[0])
        text = f"\n{name}: stopped by Ctrl-C while starting; start again with the same command\n"
        os.write(2, text.encode(errors="replace"))
    os._exit(130)


def imports_are_done():
    """Let Ctrl-C raise KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def is_script():
    """Whether a script of this project is running. Other programs keep their own Ctrl-C."""
    path = getattr(sys.modules["__main__"], "__file__", None)
    here = os.path.dirname(os.path.realpath(__file__))
    return path is not None and os.path.dirname(os.path.realpath(path)) == os.path.dirname(here)


if is_script() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, leave)
