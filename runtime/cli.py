"""The command line: argument types, errors in one line, progress."""

import argparse
import contextlib
import difflib
import errno
import itertools
import json
import math
import sys
from pathlib import Path

import torch.distributed as dist
from tqdm import tqdm

NOT_FROM_CONFIG = ("exp_dir", "resume", "overwrite", "config")


# -- arguments -------------------------------------------------------------------------------------
class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Adds the default of every flag whose help does not mention it."""

    def _get_help_string(self, action):
        if action.default is None or "default" in action.help:
            return action.help
        return super()._get_help_string(action)


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
        unknown = message.removeprefix("unrecognized arguments: ").split()[0].split("=")[0]
        close = []
        if unknown.startswith("-"):
            close = difflib.get_close_matches(unknown, self._option_string_actions, 1)
        if close:
            message += f"; did you mean {close[0]}?"
        fail(message)


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


positive_int = bounded(int, 1)
nonnegative_int = bounded(int, 0)
positive_float = bounded(float, 0, above_low=True)
nonnegative_float = bounded(float, 0)


def int_list(text):
    """An argparse type for positive whole numbers, separated by commas."""
    return [positive_int(number) for number in text.split(",")]


def parse_args(parser, argv=None):
    """The arguments of the command line. They win over those of a --config."""
    argv = sys.argv[1:] if argv is None else argv
    refuse_separate_numbers(parser, argv)
    config = getattr(parser.parse_args(argv), "config", None)
    if config:
        argv = [*config_arguments(config, parser), *argv]
    return parser.parse_args(argv)


def refuse_separate_numbers(parser, argv):
    """End the program in one line if the numbers of an `int_list` are separated by spaces."""
    for i, word in enumerate(argv):
        action = parser._option_string_actions.get(word)
        if action is None or action.type is not int_list:
            continue
        numbers = list(itertools.takewhile(str.isdigit, argv[i + 1 :]))
        if len(numbers) > 1:
            parser.error(f"the numbers of {word} are comma-separated: {','.join(numbers)}")


def config_arguments(path, parser):
    """The arguments in another run's args.json, as a command line for `parser`."""
    try:
        stored = json.loads(Path(path).read_text())
        words = []
        for action in parser._actions:
            value = stored.get(action.dest)
            if value is None or action.dest in NOT_FROM_CONFIG:
                continue
            if not action.option_strings:
                # a positional argument: a second one on the command line would not parse
                parser.set_defaults(**{action.dest: value})
            elif action.nargs == "*":
                # first, because it takes all words up to the next flag
                words = [action.option_strings[-1], *map(str, value), *words]
            else:
                words += config_words(action, value)
        return words
    except (OSError, ValueError, AttributeError, TypeError) as error:
        fail(f"{path} is not the args.json of a run ({type(error).__name__})")


def config_words(action, value):
    """The words that give a flag `value` on a command line."""
    if isinstance(value, bool):
        if value:
            return [action.option_strings[0]]
        if isinstance(action, argparse.BooleanOptionalAction):
            return [action.option_strings[-1]]  # --no-...
        return []  # a flag that can only be left out
    if isinstance(value, list):
        value = ",".join(map(str, value))
    return [f"{action.option_strings[-1]}={value}"]


# -- progress --------------------------------------------------------------------------------------
class Progress(tqdm):
    """A progress bar on a terminal. Elsewhere, a line per minute for loops that take longer."""

    def __init__(self, *args, **kwargs):
        if not sys.stderr.isatty():
            kwargs |= {"delay": 60, "mininterval": 60, "maxinterval": 60}
        super().__init__(*args, leave=False, dynamic_ncols=True, **kwargs)

    def say(self, text, ratio):
        """Show `text` and the remaining time, which is `ratio` times this bar's elapsed time."""
        left = self.format_interval(self.format_dict["elapsed"] * ratio)
        self.set_postfix_str(f"{text}, the run ends in {left}", refresh=False)

    def display(self, msg=None, pos=None):
        if sys.stderr.isatty():
            super().display(msg, pos)
        elif msg is None:
            print(self, file=sys.stderr, flush=True)


# -- errors ----------------------------------------------------------------------------------------
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


@contextlib.contextmanager
def errors_in_one_line(data_error):
    """Context in which foreseeable errors end the program in one line.

    Errors in the data, of type `data_error`, exit with status 2; a full disk and a dead peer with
    status 1. Other errors are bugs and keep their traceback.
    """
    try:
        yield
    except data_error as error:
        fail(format_error(error))
    except OSError as error:
        if error.errno not in DISK_IS_FULL:
            raise
        text = format_error(error)
        fail(f"{text}; earlier checkpoints are whole: make room, and continue with --resume", 1)
    except RuntimeError as error:
        text = str(error).lower()
        if not dist.is_initialized() or not any(sign in text for sign in PEER_IS_GONE):
            raise
        text = format_error(error)
        fail(f"another process of this run has ended; continue with --resume ({text})", 1)
    if dist.is_initialized():  # only after success: nccl's shutdown can hang after a rank's error
        dist.destroy_process_group()


def format_error(error):
    """The message of an error in one line, without control characters.

    An error from a loader worker carries a traceback; its last line is the message.
    """
    text = str(error).strip()
    if "Original Traceback" in text:
        text = text.splitlines()[-1].partition(": ")[2]
    characters = []
    for character in text:
        if not character.isprintable():
            character = repr(character)[1:-1]
        characters.append(character)
    return "".join(characters)


def fail(message, status=2):
    """Say in one line what is wrong, and exit with `status`."""
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    raise SystemExit(status)
