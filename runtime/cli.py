"""The command line: types of arguments, errors in one line, progress."""

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


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the default of every flag whose help does not say it."""

    def _get_help_string(self, action):
        return action.help if action.default is None or "default" in action.help else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An argument parser that takes no abbreviations, and whose errors are one line that says what may be meant."""

    def __init__(self, description, epilog=None):
        super().__init__(description=description, epilog=epilog, formatter_class=HelpFormatter, allow_abbrev=False)

    def error(self, message):
        unknown = message.removeprefix("unrecognized arguments: ").split()[0].split("=")[0]
        close = difflib.get_close_matches(unknown, self._option_string_actions, 1) if unknown[:1] == "-" else ()
        fail(message + (f"; did you mean {close[0]}?" if close else ""))


def bounded(kind, low, below=math.inf, above_low=False):
    """An argparse type: finite numbers of `kind` from `low`, or with `above_low` beyond it, to less than `below`."""

    def parse(text):
        value = kind(text)
        if not low <= value < below or (above_low and value == low):
            least = f"{'above' if above_low else 'at least'} {low}"
            raise argparse.ArgumentTypeError(f"must be {least} and below {below}, not {text}")
        return value

    parse.__name__ = kind.__name__  # for argparse's own message
    return parse


positive_int, nonnegative_int = bounded(int, 1), bounded(int, 0)
positive_float, nonnegative_float = bounded(float, 0, above_low=True), bounded(float, 0)


def int_list(text):
    """An argparse type: positive whole numbers with commas between them."""
    return [positive_int(number) for number in text.split(",")]


def parse_args(parser, argv=None):
    """The arguments of the command line or, where it names a --config, of that run, the command line's own winning."""
    argv = sys.argv[1:] if argv is None else argv
    for i, word in enumerate(argv):
        action, numbers = parser._option_string_actions.get(word), [*itertools.takewhile(str.isdigit, argv[i + 1 :])]
        if action and action.type is int_list and len(numbers) > 1:
            parser.error(f"the numbers of {word} are comma-separated: {','.join(numbers)}")
    config = getattr(parser.parse_args(argv), "config", None)
    return parser.parse_args([*(_config_arguments(config, parser) if config else ()), *argv])


def _config_arguments(path, parser):
    """The arguments in another run's args.json, as a command line for `parser`."""
    try:
        stored = json.loads(Path(path).read_text())
        words = []
        for action in parser._actions:
            value = stored.get(action.dest)
            off = value is False and not isinstance(action, argparse.BooleanOptionalAction)  # has no flag to say so
            if value is None or off or action.dest in ("exp_dir", "resume", "overwrite", "config"):
                continue
            if not action.option_strings:
                parser.set_defaults(**{action.dest: value})  # data: a second one on the command line would not parse
            elif isinstance(value, bool):
                words.append(action.option_strings[0 if value else -1])
            elif action.nargs == "*":
                words[:0] = [action.option_strings[-1], *map(str, value)]  # first, as it takes all words up to a flag
            else:
                text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
                words.append(f"{action.option_strings[-1]}={text}")
        return words
    except (OSError, ValueError, AttributeError, TypeError) as error:
        fail(f"{path} is not the args.json of a run ({type(error).__name__})")


class Progress(tqdm):
    """A progress bar on a terminal; elsewhere a line a minute, of what takes longer than that."""

    def __init__(self, *args, **kwargs):
        kwargs |= {} if sys.stderr.isatty() else {"delay": 60, "mininterval": 60, "maxinterval": 60}
        super().__init__(*args, leave=False, dynamic_ncols=True, **kwargs)

    def say(self, text, ratio):
        """Show `text` and when the run ends, where what is left of it is `ratio` times what this bar has behind it."""
        left = self.format_interval(self.format_dict["elapsed"] * ratio)
        self.set_postfix_str(f"{text}, the run ends in {left}", refresh=False)

    def display(self, msg=None, pos=None):
        if sys.stderr.isatty():
            super().display(msg, pos)
        elif msg is None:
            print(self, file=sys.stderr, flush=True)


DISK_IS_FULL = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))
PEER_IS_GONE = ("by peer", "remote process", "remoteerror", "broken pipe", "timeout", "timed out", "connection refused")


@contextlib.contextmanager
def errors_in_one_line(data_error):
    """As a context: errors of the data (`data_error`, status 2), a full disk or a dead peer (1) end the program."""
    try:
        yield
    except data_error as error:
        fail(format_error(error))
    except OSError as error:
        if error.errno not in DISK_IS_FULL:
            raise
        fail(f"{format_error(error)}; what was saved before is whole: make room, and go on with --resume", 1)
    except RuntimeError as error:
        if not dist.is_initialized() or not any(sign in str(error).lower() for sign in PEER_IS_GONE):
            raise
        fail(f"another process of this run has ended; go on with --resume ({format_error(error)})", 1)
    if dist.is_initialized():  # at a good end only: after an error of one rank, nccl's shutdown can hang
        dist.destroy_process_group()


def format_error(error):
    """The message of an error in one line; of one that a loader worker passed on, the original's message."""
    text = str(error).strip()
    if "Original Traceback" in text:
        text = text.splitlines()[-1].partition(": ")[2]
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def fail(message, status=2):
    """Say in one line what is wrong and end the program with `status`."""
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    raise SystemExit(status)
