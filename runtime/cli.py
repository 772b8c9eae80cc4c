"""The command line: types of arguments, and errors in one line."""

import argparse
import contextlib
import errno
import json
import math
import sys
from pathlib import Path

import torch.distributed as dist


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the default of every flag whose help does not say it."""

    def _get_help_string(self, action):
        return action.help if action.default is None or "default" in action.help else super()._get_help_string(action)


def make_parser(description):
    """An argument parser that takes no abbreviations and whose errors are one line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=HelpFormatter, allow_abbrev=False)
    parser.error = fail
    return parser


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
    config = parser.parse_args(argv).config
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
