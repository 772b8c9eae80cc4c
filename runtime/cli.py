"""The command line: argument types, errors in one line, progress."""

import argparse
import contextlib
import difflib
import errno
import itertools
import json
import math
import os
import socket
import sys
import threading
import time
from pathlib import Path

import torch.distributed as dist
from tqdm import tqdm

from runtime import start
from runtime.start import is_first_rank

NOT_FROM_CONFIG = ("exp_dir", "resume", "overwrite", "config", "cuda_graphs")
FOREIGN = {  # {flags of similar projects: what to use here, a flag or a sentence}
    "--data --data-dir --data-path --data-root --dataset --root": (
        "name the data without a flag, for example: python {program} path/to/folder"
    ),
    "--gpu --gpus --gpu-id --gpu-ids --device --devices --cuda": (
        "choose the GPU in front of the command: CUDA_VISIBLE_DEVICES=0 python {program}"
    ),
    "--world-size --rank --local-rank --dist-url --dist-backend --distributed "
    "--multiprocessing-distributed --nproc --nproc-per-node --nodes --nnodes": (
        "start one process per GPU: torchrun --nproc_per_node=8 {program}"
    ),
    "-e --evaluate --eval": "evaluate with python eval_lincls.py",
    "-p --print-freq": "a run prints a line per epoch, and a line per minute in longer ones",
    "--output-dir --output --out --out-dir --save-dir --log-dir --name --id --tag": "--exp-dir",
    "--num-workers --n-workers --num-works": "--workers",
    "--pretrained --weights --checkpoint --ckpt": "--init",
    "--init --weights --checkpoint --ckpt": "--pretrained",
    "-a --arch": "the checkpoint says which network it is",
    "--schedule --epochs --wd --weight-decay": (
        "the probes have settings of their own; --protocol moco is the published one"
    ),
    "--moco-dim --dim --feat-dim --feature-dim": "--low-dim",
    "--moco-k --queue-size --nce-k": "--pcl-r",
    "--moco-t --tau --nce-t --temp": "--temperature",
    "--fp16 --bf16 --half --mixed-precision": "--amp",
    "--size --img-size --crop-size --resolution": "--image-size",
    "--bs --bsz --batch": "--batch-size",
}


# -- arguments -------------------------------------------------------------------------------------
class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Adds the default of every flag whose help does not mention it, in words."""

    def _get_help_string(self, action):
        default = action.default
        if default in (None, argparse.SUPPRESS) or "default" in action.help:
            return action.help
        if isinstance(default, bool):
            default = "on" if default else "off"
        return f"{action.help}; default: {default}"


class Parser(argparse.ArgumentParser):
    """An argument parser without abbreviations, whose errors are one line with a suggestion."""

    def __init__(self, description, epilog=None):
        super().__init__(
            description=description,
            epilog=epilog,
            formatter_class=HelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message):
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message and unknown.startswith("-"):
            message += self.suggest(unknown.split()[0].split("=")[0])
        fail(message)

    def suggest(self, unknown):
        """What to use in place of a flag that does not exist, or ""."""
        known = self._option_string_actions
        flag = unknown.lower().replace("_", "-")
        for names, instead in FOREIGN.items():
            if flag not in names.split():
                continue
            if not instead.startswith("-"):
                return f"; {instead.format(program=program_name())}"
            if instead in known:
                return f"; did you mean {instead}?"
        close = difflib.get_close_matches(flag, known, 1, cutoff=0.75)
        if close:
            return f"; did you mean {close[0]}?"
        return ""


def bounded(kind, low, below=math.inf, above_low=False):
    """An argparse type for finite numbers: `low` <= number < `below`.

    kind: int or float. above_low: exclude `low` itself.
    """

    def parse(text):
        value = kind(text)
        too_low = value <= low if above_low else value < low
        if too_low or not value < below:  # not (value < below) also refuses nan
            least = "above" if above_low else "at least"
            raise argparse.ArgumentTypeError(f"must be {least} {low} and below {below}, not {text}")
        return value

    parse.__name__ = kind.__name__  # argparse names it in its own message
    return parse


# faiss and numpy count in 32 bits, and float32 has no numbers above 3e38
positive_int = bounded(int, 1, 2**31)
nonnegative_int = bounded(int, 0, 2**31)
positive_float = bounded(float, 0, 10**9, above_low=True)
image_side = bounded(int, 1, 10_000)  # pixels; Pillow warns of larger images
num_workers = bounded(int, 0, 513)  # each is a process; few machines have as many cores


def fraction(text):
    """An argparse type for a part of a whole."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, not {text}")
    return value


def amount(text):
    """An argparse type for a fraction below 1 or a whole number."""
    value = positive_float(text)
    if value > 1 and value != int(value):
        raise argparse.ArgumentTypeError(f"must be a fraction below 1 or a whole number: {text}")
    return value


def path(text):
    """An argparse type for the name of a file or folder: not "", a shell's unset variable."""
    if not text:
        raise argparse.ArgumentTypeError("is empty; name one, or leave the flag out")
    return text


def int_list(text):
    """An argparse type for positive whole numbers, separated by commas."""
    return [positive_int(number) for number in text.split(",")]


def parse_args(parser, argv=None, find_stored=None):
    """The arguments of the command line.

    They win over those of a --config, which win over those of the run to continue.
    find_stored: function of the command line's arguments; it returns that run's, {name: value}.
    """
    show_any_text()
    if argv is None:
        argv = sys.argv[1:]
    refuse_separate_numbers(parser, argv)
    if find_stored is not None:
        use_as_defaults(parser, find_stored(parser.parse_args(argv)), "the run to continue")
    args = parser.parse_args(argv)
    config = getattr(args, "config", None)
    if config:
        use_as_defaults(parser, read_config(config), config)
        args = parser.parse_args(argv)
        name_changes(parser.parse_args([]), args)
    return args


def show_any_text():
    """Escape characters that the terminal or file cannot show, where printing them would fail.

    Each line is written at once, so that none is lost if the program is killed.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # notebooks have streams of their own
            stream.reconfigure(errors="backslashreplace", line_buffering=True)


def refuse_separate_numbers(parser, argv):
    """End the program in one line if the numbers of an `int_list` are separated by spaces."""
    for i, word in enumerate(argv):
        action = parser._option_string_actions.get(word)
        if action is None or action.type is not int_list:
            continue
        numbers = list(itertools.takewhile(str.isdigit, argv[i + 1 :]))
        if len(numbers) > 1:
            parser.error(f"the numbers of {word} are comma-separated: {','.join(numbers)}")


def read_config(path):
    """The arguments in another run's args.json, {name: value}."""
    try:
        config = json.loads(Path(path).read_text())
    except (OSError, RecursionError, ValueError) as error:
        fail(f"{path} is not the args.json of a run ({type(error).__name__})")
    return config


def use_as_defaults(parser, stored, source):
    """Make the arguments {name: value} of a run the defaults of `parser`, so that flags win.

    source: where they come from, for the message that ends the program if they are malformed.
    """
    if not isinstance(stored, dict):
        fail(f"{source} is not the args.json of a run: it holds a {type(stored).__name__}")
    defaults = {}
    for action in parser._actions:
        name = action.dest
        value = stored.get(name)
        if value is None or name in NOT_FROM_CONFIG:
            continue
        try:
            defaults[name] = checked(action, value)
        except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
            reason = f", but {error}" if isinstance(error, argparse.ArgumentTypeError) else ""
            shown = repr(str(value)[:80])
            fail(f"{source} is not the args.json of a run: its {name} is {shown}{reason}")
    parser.set_defaults(**defaults)


def checked(action, value):
    """`value` if the flag of `action` can have it. Raises an error if not."""
    if action.nargs == 0:  # a switch
        if not isinstance(value, bool):
            raise TypeError
        return value
    kind = action.type or str
    if action.nargs == "*":
        return [kind(str(item)) for item in value]
    value = convert_stored(kind, value)
    if action.choices and value not in action.choices:
        raise ValueError
    return value


def convert_stored(kind, value):
    """A stored `value` as the argparse type `kind` gives it. Raises that type's errors."""
    if isinstance(value, list):
        value = ",".join(map(str, value))
    return kind(str(value))


def name_changes(old, new):
    """Print the arguments in which the command line overrules a --config."""
    for name, value in vars(new).items():
        before = getattr(old, name)
        if before != value and name not in NOT_FROM_CONFIG and is_first_rank():
            say(f"{name} {before} -> {value}")


# -- progress --------------------------------------------------------------------------------------
EVERY = 50  # without a terminal, seconds without a line after which one is printed
last_line = time.monotonic()  # when the last line was printed


def say(text, file=None):
    """Print a line at once, on stdout unless another `file` is given.

    If nobody reads the output any more, for example after `| head`, the program goes on silently.
    """
    global last_line
    last_line = time.monotonic()
    try:
        print(in_one_line(str(text)), file=file, flush=True)
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, (file or sys.stdout).fileno())
        os.close(nowhere)


class Progress(tqdm):
    """A progress bar on a terminal. Elsewhere, a line per minute for loops that take longer."""

    def __init__(self, *args, **kwargs):
        if not sys.stderr.isatty():
            kwargs |= {"delay": EVERY, "mininterval": EVERY, "maxinterval": EVERY}
        super().__init__(*args, leave=False, dynamic_ncols=True, **kwargs)
        self.in_first_minute = True

    def say(self, text, ratio):
        """Show `text` and the remaining time, which is `ratio` times this bar's elapsed time.

        Returns the remaining time in seconds.
        """
        seconds = self.format_dict["elapsed"] * ratio
        left = self.format_interval(seconds)
        self.set_postfix_str(f"{text}, the run ends in {left}", refresh=False)
        return seconds

    def first_minute_ends(self):
        """True at the first call after a minute, otherwise False."""
        ends = self.in_first_minute and self.format_dict["elapsed"] > 60
        if ends:
            self.in_first_minute = False
        return ends

    def note(self, text):
        """Print `text` above the bar if it is not empty. Other ranks print nothing."""
        if text and not self.disable:
            with self.external_write_mode():
                say(text)

    def display(self, msg=None, pos=None):
        if sys.stderr.isatty():
            super().display(msg, pos)
        elif msg is None:
            say(self, sys.stderr)


@contextlib.contextmanager
def phase(title):
    """Context or decorator for work that may be long.

    Without a terminal, it prints a line after EVERY seconds of silence, so that the program does
    not seem to hang.
    """
    begin = time.monotonic()
    finished = threading.Event()

    def report():
        while not finished.wait(max(0.1, last_line + EVERY - time.monotonic())):
            now = time.monotonic()
            if now >= last_line + EVERY:
                say(f"{title}: {tqdm.format_interval(now - begin)} so far", sys.stderr)

    if is_first_rank() and not sys.stderr.isatty():
        threading.Thread(target=report, daemon=True).start()
    try:
        yield
    finally:
        finished.set()


# -- errors ----------------------------------------------------------------------------------------
UNUSABLE_NAME = (errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ELOOP)
DISK_IS_FULL = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))
PEER_IS_GONE = (  # parts of the messages by which gloo and nccl report a dead process
    "by peer",
    "remote process",
    "remoteerror",
    "broken pipe",
    "timeout",
    "timed out",
    "connection refused",
)
WORKER_IS_GONE = "dataloader worker (pid"  # part of the message by which torch reports one
OUT_OF_MEMORY = (  # parts of the messages of torch, numpy and faiss
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "unable to allocate",
    "bad_alloc",
)


@contextlib.contextmanager
def errors_in_one_line(data_error, again="start again with the same command"):
    """Context in which foreseeable errors end the program in one line.

    Errors in the data, of type `data_error`, exit with status 2; a full disk, a dead peer or loader
    worker and too little memory with status 1; Ctrl-C with status 130. Other errors are bugs and
    keep their traceback.
    again: how to go on after an interruption.
    """
    start.again = again
    start.is_caught = True
    try:
        yield
    except KeyboardInterrupt:
        stop_at_once(again)
    except Exception as error:
        if start.is_interrupted:  # for example because a loader worker has ended as well
            stop_at_once(again)
        fail_if_foreseeable(error, data_error, again)
        raise
    finally:
        start.is_caught = False
    if dist.is_initialized():  # only after success: nccl's shutdown can hang after a rank's error
        dist.destroy_process_group()


def fail_if_foreseeable(error, data_error, again):
    """End the program in one line if `error` is no bug of the program."""
    text = format_error(error)
    signs = str(error).lower()
    if isinstance(error, data_error):
        fail(text)
    if isinstance(error, MemoryError):
        fail_for_memory(error)
    if isinstance(error, OSError) and error.errno in DISK_IS_FULL:
        fail(f"{text}; make room; {again}", 1)
    if isinstance(error, OSError) and error.errno in UNUSABLE_NAME and error.filename:
        fail(f"{error.strerror}: {error.filename}")
    if not isinstance(error, RuntimeError):
        return
    if any(sign in signs for sign in OUT_OF_MEMORY):
        fail_for_memory(error)
    if WORKER_IS_GONE in signs:
        fail(
            f"{text.rstrip('. ')}; {again}, with fewer --workers if the system was short of memory",
            1,
        )
    if dist.is_initialized() and any(sign in signs for sign in PEER_IS_GONE):
        fail(f"another process of this run has ended ({text}); {again}", 1)


def stop_at_once(again):
    """End the program after Ctrl-C."""
    if is_first_rank() and not start.is_interrupted:  # else it has been said already
        say("", sys.stderr)  # to end the line in which a terminal may show ^C
        say(f"{program_name()}: stopped by Ctrl-C; {again}", sys.stderr)
    raise SystemExit(130)


def fail_for_memory(error):
    """End the program because memory has run out."""
    text = format_error(error).partition("\\n")[0]
    advice = "lower --batch-size or --image-size"
    if "shared memory" in text:  # in which loader workers hand over images
        advice = "give fewer --workers, or more shared memory: in Docker, with --shm-size"
    fail(f"out of memory ({text}); {advice}", 1)


@contextlib.contextmanager
def warn_if_unwritable(path, unwritten=None):
    """Context that writes the file `path`. If that fails, it ends with a warning line, no error.

    For files that are worth less than what is lost if the program ends. unwritten: list to which
    `path` is added if it could not be written.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        say(f"warning: cannot write {path}: {reason}", sys.stderr)
        if unwritten is not None:
            unwritten.append(path)


def format_error(error):
    """The message of an error in one line, without control characters.

    An error from a loader worker carries a traceback; its last line is the message.
    """
    text = str(error).strip()
    if "Original Traceback" in text:
        text = text.splitlines()[-1].partition(": ")[2]
    return in_one_line(text)


def in_one_line(text):
    """`text` with line breaks, and other characters that cannot be shown, escaped."""
    characters = []
    for character in text:
        if not character.isprintable():
            character = repr(character)[1:-1]
        characters.append(character)
    return "".join(characters)


def fail(message, status=2):
    """Say in one line what is wrong, and exit with `status`."""
    if not is_first_rank():
        message = f"rank {os.environ['RANK']} on {socket.gethostname()}: {message}"
    say(f"{program_name()}: error: {message}", sys.stderr)
    raise SystemExit(status)


def program_name():
    """The name of the script that is running."""
    return Path(sys.argv[0]).name
