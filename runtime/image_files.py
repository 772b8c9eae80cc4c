"""The files of a run's images: broken.txt, images.txt, and what changed since an earlier start.

`datasets` is data.Datasets, or anything with its `sources`, `num_broken()` and `train.source`.
"""

import contextlib

from runtime.cli import warn_if_unwritable
from runtime.directory import write_atomically
from runtime.distributed import get_rank_and_world, print_main, set_where_any_rank_has

SHOWN = 3  # names in a message


# -- broken images ---------------------------------------------------------------------------------
@contextlib.contextmanager
def broken_images_listed(directory, datasets, data_error, known=0, is_held=True):
    """Context that reads images. The broken ones among them are listed in broken.txt.

    data_error: the type of the error for images that cannot be read; it then names the list.
    known: how many broken images have been announced already.
    is_held: whether the run has locked its directory. Before that, another run's list is left as it
        is, and without an error this run's is left to `renew_list`.
    """
    try:
        yield
        share_broken_images(directory, datasets, is_held)
    except data_error as error:
        is_ours = is_held or not (directory / "checkpoint.pth.tar").exists()
        if datasets.num_broken() == 0 or not is_ours:
            raise
        list_broken_images(directory, datasets)
        text = str(error).rstrip()
        raise data_error(f"{text}; {directory}/broken.txt lists all that were found") from error
    found = datasets.num_broken()
    if found > known:
        print_main(f"images left out because they are broken: {found}, see {directory}/broken.txt")


def share_broken_images(directory, datasets, is_held=True):
    """Let every rank know which images any rank has found broken. List them if `is_held`."""
    for source in datasets.sources:
        set_where_any_rank_has(source.broken)
    if is_held:
        renew_list(directory, datasets)


def renew_list(directory, datasets, is_new=False):
    """List the images that were found to be broken, on the first rank, if there are any.

    A run calls this when it holds its directory, because it has read its images before that.
    is_new: whether the run begins here. If so, a list that is there already is of a start that
        failed. It is removed if no image is broken.
    """
    if get_rank_and_world()[0] > 0:
        return
    if datasets.num_broken() > 0:
        list_broken_images(directory, datasets)
    elif is_new:
        (directory / "broken.txt").unlink(missing_ok=True)


def list_broken_images(directory, datasets):
    """Write the names of the broken images to broken.txt."""
    names = []
    for source in datasets.sources:
        names += source.broken_names()
    with warn_if_unwritable(directory / "broken.txt"):
        directory.mkdir(parents=True, exist_ok=True)
        write_atomically(directory / "broken.txt", lines_of(names))


# -- images that came or went ----------------------------------------------------------------------
def write_images_txt(directory, datasets):
    """List the files of the training images in images.txt, on the first rank."""
    names = datasets.train.source.names()
    if names and get_rank_and_world()[0] == 0:
        write_atomically(directory / "images.txt", lines_of(names))


def describe_changes(directory, datasets):
    """Text that says which training images are not those in `directory`/images.txt."""
    try:
        before = set((directory / "images.txt").read_bytes().split(b"\n"))
    except OSError:
        return ""
    now = set(lines_of(datasets.train.source.names()).split(b"\n"))
    parts = []
    for names, what in ((now - before, "new"), (before - now, "missing")):
        if names:
            shown = [repr(name.decode(errors="replace")) for name in sorted(names)[:SHOWN]]
            more = ", ..." if len(names) > SHOWN else ""
            parts.append(f"{len(names)} {what} ({', '.join(shown)}{more})")
    if not parts:
        return ": the same files, with other classes"
    return ": " + ", ".join(parts)


def lines_of(names):
    """File names as a text file's bytes, one per line."""
    text = "".join(name.replace("\n", "\\n") + "\n" for name in names)
    return text.encode(errors="surrogateescape")
