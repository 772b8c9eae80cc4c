"""Data sets, and the order in which a run sees them.

One argument names the data: nothing for the handwritten digits in `assets/`, the path of a folder
of images (`read_root` lists the layouts), or a torchvision name such as "cifar10". Whatever a file
holds, an image becomes 8-bit RGB.

    datasets = build_datasets()  # or build_datasets("path/to/folder"), build_datasets("cifar10")
    sampler = EpochSampler(len(datasets.train), batch_size=256)  # set_epoch(epoch) for each epoch
    loader = DataLoader(datasets.train, 256, sampler=sampler, collate_fn=identity_collate)
"""

import contextlib
import functools
import hashlib
import math
import os
import random
import re
import signal
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageCms, ImageStat
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from torchvision import datasets as tv_datasets
from torchvision import transforms as T
from torchvision.transforms import functional as TF
from tqdm import tqdm

with contextlib.suppress(ImportError):  # a plug-in of Pillow for .heic, if it is installed
    import pillow_heif

    pillow_heif.register_heif_opener()

SMALL = 64  # up to this many pixels: no blur, and the plain view keeps the border
DIGITS = Path(__file__).parent / "assets" / "digits.npz"
MEMORY = 4 << 30  # bytes that images in memory may take
CHUNK = 1 << 20  # bytes of images that a process hands over at a time
MANY = 8 << 20  # bytes of images; below it, one process reads them all in about a second
ENOUGH = 4  # large JPEG files are decoded smaller, but not below this many times the view's side
SHOWN = 5  # broken images that an error names
HEADERS = 1024  # images whose headers are read, to find those of more than 8 bits
SAMPLED = 100  # of those, images of each kind whose pixels are read
DOWNLOADS = {
    "cifar10": tv_datasets.CIFAR10,
    "cifar100": tv_datasets.CIFAR100,
    "stl10": tv_datasets.STL10,
}


# -- suffixes, and names of folders ----------------------------------------------------------------
SUFFIXES = {*tv_datasets.folder.IMG_EXTENSIONS, ".gif", ".jfif", ".jp2", ".pbm", ".pfm", ".pnm"}
SUFFIXES |= {".avif", ".heic", ".heif"}  # only if Pillow has the plug-in
PLUG_INS = {
    ".avif": " (a newer Pillow reads them)",
    ".heic": " (pip install pillow-heif to read them)",
    ".heif": " (pip install pillow-heif to read them)",
}
TRAIN_PARTS = ("train", "training")
HELD_OUT_PARTS = (  # the best name first
    "val",
    "valid",
    "validation",
    "dev",
    "eval",
    "evaluation",
    "test",
    "testing",
    "heldout",
)
SYSTEM_FOLDERS = (  # hidden ones that do not start with a dot, in lower case
    "@eadir",
    "@recycle",
    "@recently-snapshot",
    "@tmp",
    "#recycle",
    "#snapshot",
    "$recycle.bin",
    "__macosx",
    "__pycache__",
    "lost+found",
    "system volume information",
)
THUMBNAILS = ("thumb", "thumbs", "thumbnail", "thumbnails")  # if there are images beside them

# -- how files store pixels ------------------------------------------------------------------------
TURNS = {  # what brings an image upright, by EXIF's number of its orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
OTHER_ENDIAN = "B" if sys.byteorder == "little" else "L"
LOW_BYTES = {  # {Pillow's raw mode of 16-bit colours: the mode that reads the low bytes instead}
    "RGB;16L": "RGB;16B",
    "RGB;16B": "RGB;16L",
    "RGB;16N": f"RGB;16{OTHER_ENDIAN}",
    "RGBA;16L": "RGBA;16B",
    "RGBA;16B": "RGBA;16L",
    "RGBA;16N": f"RGBA;16{OTHER_ENDIAN}",
    "LA;16B": "RGBA",
}


class DataError(ValueError):
    """A problem with the user's data. The message is one line: what is wrong and what to do."""


def derive_seed(*numbers):
    """A seed from whole numbers such as (seed, epoch, step), the same in every process."""
    return hash(numbers) & 0xFFFFFFFF


class Images(Dataset):
    """The images of `source` under `view`: item i is `(view(image i), i)`.

    source: a Source, or what a Source reads.
    view: maps a PIL image to a uint8 tensor (..., 3, H, W).
    seed: a random view depends on (seed, epoch, i) alone, not on the workers or the order.
    pixels: (n, 3, H, W) uint8 on any device. If given, batches are taken from it, without `view`.

    An image is read when its item is taken, so a broken file raises DataError only then. A
    DataLoader takes whole batches (`__getitems__`) and therefore needs identity_collate.
    """

    def __init__(self, source, view, seed=0, pixels=None):
        if not isinstance(source, Source):
            source = Source(source)
        self.source = source
        self.view = view
        self.seed = seed
        self.pixels = pixels
        # Shared memory: set_epoch must reach loader workers that are already running.
        self.epoch = torch.zeros((), dtype=torch.long).share_memory_()

    @property
    def labels(self):
        """(n,) int64. It is -1 for an image without a label, and for one found to be broken."""
        return self.source.labels.masked_fill(self.source.broken, -1)

    def set_epoch(self, epoch):
        """Give the random views of `epoch` from now on, also in workers that are running."""
        self.epoch.fill_(epoch)

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        # Seed torchvision's random transforms, and leave the caller's random numbers untouched.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive_seed(self.seed, int(self.epoch), index))
            return self.view(self.image(index)), index

    def __getitems__(self, indices):
        if self.pixels is None:
            return default_collate([self[index] for index in indices])
        index = torch.tensor(indices)
        return self.pixels[index.to(self.pixels.device, non_blocking=True)], index

    def image(self, index):
        """Image `index` as 8-bit RGB. Raises DataError if it cannot be read."""
        return self.source.image(index)


def identity_collate(batch):
    """The collate_fn for Images, whose batches are collated already."""
    return batch


class EpochSampler(Sampler):
    """This process's share of `n` samples, in random order and whole batches.

    Unlike PyTorch's DistributedSampler it can start in the middle of an epoch, and a step has the
    same samples for any number of processes. Call `set_epoch` before each epoch.

    batch_size: of all processes together, a multiple of their number.
    """

    def __init__(self, n, batch_size, seed=0, rank=0, world=1):
        self.n = n
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world = world
        self.set_epoch(0)

    def set_epoch(self, epoch, step=0):
        """Let the next iteration be that of `epoch`, starting at `step`."""
        self.epoch = epoch
        self.step = step

    def __iter__(self):
        generator = torch.Generator().manual_seed(derive_seed(self.seed, self.epoch))
        order = torch.randperm(self.n, generator=generator)
        first = self.step * self.batch_size
        last = self.n // self.batch_size * self.batch_size  # an incomplete batch is left out
        return iter(order[first:last][self.rank :: self.world].tolist())

    def __len__(self):
        return (self.n // self.batch_size - self.step) * self.batch_size // self.world


class Datasets(NamedTuple):
    """The images of one data set, and how to view them."""

    train: Images  # two random crops of each training image; in memory, the whole image
    plain: Images  # the centre crop of each training image
    val: Images | None  # the centre crop of each held-out image; None if there are none
    classes: list  # class names; [] if no image has a label
    image_size: int  # side of a view, in pixels
    augmentation: dict  # keyword arguments of augment.RandomView that suit the data
    fingerprint: str  # changes if training images are added, removed, renamed or relabelled
    left_out: str = ""  # what a folder holds besides, such as "20 .gif, 1 hidden folder"
    notes: tuple = ()  # what else to know about the data, a line each

    def describe(self):
        """A summary such as "300 training images, 60 held out, 10 classes, 32 pixels"."""
        parts = [f"{len(self.train)} training images"]
        if self.val is not None:
            parts.append(f"{len(self.val)} held out")
        if not self.classes:
            parts.append("no classes")
        else:
            parts.append(_count(len(self.classes), "class", "classes"))
        parts.append(f"{self.image_size} pixels")
        summary = ", ".join(parts)
        if self.left_out:
            summary += f"; left out: {self.left_out}"
        return summary

    @property
    def labelled(self):
        """Whether some training images and some held-out images have labels."""
        if self.val is None:
            return False
        return all((images.labels >= 0).any() for images in (self.plain, self.val))

    @property
    def has_labels(self):
        """Whether any image has a label."""
        parts = [images for images in (self.plain, self.val) if images is not None]
        return any((images.labels >= 0).any() for images in parts)

    @property
    def sources(self):
        """The Source of the training images and, if there are any, of the held-out images."""
        return [images.source for images in (self.train, self.val) if images is not None]

    def num_broken(self):
        """How many images were found to be broken."""
        return sum(int(source.broken.sum()) for source in self.sources)


class Digits(list):
    """Some of the 1,797 handwritten digits of 8x8 pixels (UCI Optical Recognition, CC BY 4.0).

    part: a slice of the 1,797. Raises DataError if their file is not there.
    """

    def __init__(self, part):
        if not DIGITS.exists():
            raise DataError(f"the digits are not in {DIGITS}; name a folder of images")
        with np.load(DIGITS) as file:
            images = file["images"][part]
            self.targets = file["labels"][part]
        super().__init__(
            (Image.fromarray(image), label)
            for image, label in zip(images, self.targets, strict=True)
        )
        self.classes = [str(digit) for digit in range(10)]


class TwoCrops(T.RandomResizedCrop):
    """Two independent random crops of one image, for the query and the key: (2, 3, S, S)."""

    def forward(self, image):
        crop_q = super().forward(image)
        crop_k = super().forward(image)
        return torch.stack([TF.pil_to_tensor(crop_q), TF.pil_to_tensor(crop_k)])


def plain_view(image_size):
    """Resize and centre crop: (3, S, S).

    Above 64 pixels this cuts off the outer eighth, like ImageNet's resize to 256 and crop to 224.
    """
    resized = image_size if image_size <= SMALL else image_size * 256 // 224
    return T.Compose([T.Resize(resized), T.CenterCrop(image_size), T.PILToTensor()])


def linear_view(image_size, flip=True):
    """Random crop and flip: (3, S, S). This is the augmentation of the published linear probe."""
    transforms = [T.RandomResizedCrop(image_size), T.PILToTensor()]
    if flip:
        transforms.insert(0, T.RandomHorizontalFlip())
    return T.Compose(transforms)


def load_into_memory(datasets, device="cpu", workers=0):
    """`datasets` with all images in the memory of `device`, read by `workers` processes if many.

    Training images are stored whole, because random crops are taken from them later. The plain and
    the held-out images are stored under their view.
    Returns `datasets` unchanged if the training images differ in size, if they are large (above 64
        pixels, and above twice the view), or if all images together take more than MEMORY bytes.
    Raises DataError if images cannot be read. It names the first few of them, and the `broken` of
        each source marks all.
    """
    source = datasets.train.source
    whole = Images(source, T.PILToTensor())
    side = datasets.image_size

    # Leave a large data set, and large images, on the disk.
    shape = _first_shape(whole)
    is_cropped = side > SMALL or shape[1:] != (side, side)  # by the plain view
    num_views = len(datasets.plain) if is_cropped else 0
    if datasets.val is not None:
        num_views += len(datasets.val)
    too_many = len(whole) * shape.numel() + num_views * 3 * side**2 > MEMORY
    too_large = max(shape) > max(SMALL, 2 * side)
    train_pixels = None
    if not (too_many or too_large):
        train_pixels = _read_all(whole, shape, "reading training images", workers)
    if train_pixels is None:
        refuse_broken([source])
        return datasets

    # Read the held-out images, and name all broken ones at once.
    val = datasets.val
    if val is not None:
        pixels = _read_all(val, (3, side, side), "reading held-out images", workers)
        val = Images(val.source, val.view, pixels=pixels.to(device))
    refuse_broken(datasets.sources)

    # Read the training images again under the plain view, unless it shows all of the image.
    train_pixels = train_pixels.to(device)
    plain_pixels = train_pixels
    if is_cropped:
        title = "cropping training images"
        plain_pixels = _read_all(datasets.plain, (3, side, side), title, workers).to(device)

    train = Images(source, datasets.train.view, pixels=train_pixels)
    plain = Images(source, datasets.plain.view, pixels=plain_pixels)
    return datasets._replace(train=train, plain=plain, val=val)


def _first_shape(images):
    """The shape of the first view that can be read."""
    for i in range(len(images)):
        with contextlib.suppress(DataError):
            return images[i][0].shape
    refuse_broken([images.source])


def _read_all(images, shape, title, workers):
    """The views of all `images`, (n, *shape) uint8, or None if one has another shape.

    The views of broken images are left at 0; the source marks them.
    title: of the progress bar. workers: number of processes, unless there are few images.
    """
    n = len(images)
    size = math.prod(shape)
    loader = DataLoader(
        _Views(images, shape),
        batch_size=max(1, CHUNK // size),
        collate_fn=identity_collate,
        num_workers=workers if n * size > MANY else 0,
        worker_init_fn=_ignore_ctrl_c,
    )
    pixels = torch.zeros(n, *shape, dtype=torch.uint8)
    start = 0
    with tqdm(total=n, desc=title, leave=False, disable=None) as bar:
        for views in loader:
            if views is None:
                return None
            pixels[start : start + len(views)] = views
            start += len(views)
            bar.update(len(views))
    return pixels


class _Views(Dataset):
    """The views of `images`: a batch is (N, *shape) uint8, or None if a view has another shape.

    The view of an image that cannot be read is 0.
    """

    def __init__(self, images, shape):
        self.images = images
        self.shape = shape

    def __len__(self):
        return len(self.images)

    def __getitems__(self, indices):
        views = torch.zeros(len(indices), *self.shape, dtype=torch.uint8)
        for row, index in enumerate(indices):
            with contextlib.suppress(DataError):
                view, _ = self.images[index]
                if view.shape != views.shape[1:]:
                    return None
                views[row] = view
        return views


def _ignore_ctrl_c(_):
    """Let a worker ignore Ctrl-C. It reaches all processes, and the main one ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def build_datasets(
    data=None, image_size=None, seed=0, download_dir="datasets", skip_broken=False, **augmentation
):
    """The training, plain and held-out images of `data`.

    data: None or "digits", a folder, or a name in DOWNLOADS.
    image_size: side of a view in pixels. None: the images' median shorter side, at most 224.
    download_dir: where torchvision keeps the data sets it downloads.
    skip_broken: let another image take the place of one that cannot be read.
    augmentation: keyword arguments of augment.RandomView. If blur, flip or crop_min is None or not
        given, it follows from the data: no blur up to 64 pixels, and for digits no flip and only
        large crops.
    Returns Datasets.
    Raises DataError if the data is missing, empty or invalid.
    """
    # Find the images.
    digits = data in (None, "digits")
    record = Record()
    if digits:
        train = Digits(slice(None, -360))
        val = Digits(slice(-360, None))  # by other writers than the training digits
    elif data and Path(data).is_dir():  # "" would be the current folder
        train, val = read_root(Path(data), record)
    elif data in DOWNLOADS:
        train, val = _download(data, download_dir)
    else:
        names = ", ".join(["digits", *DOWNLOADS])
        raise DataError(f"{data!r} is neither a folder nor a known data set ({names})")

    # Fill in what was not given.
    if image_size is None:
        image_size = _median_size(train)
    settings = {
        "blur": image_size > SMALL,
        "flip": not digits,
        "crop_min": 0.5 if digits else 0.2,
    }
    for name, value in augmentation.items():
        if value is not None:
            settings[name] = value

    # Decide how to read the images.
    headers = {i: read_header(train, i) for i in evenly_spaced(len(train), HEADERS)}
    ranges, more_notes = find_ranges(train, headers)
    reading = {
        "ranges": ranges,
        "enough": ENOUGH * image_size,
        "skip_broken": skip_broken,
        "seed": seed,
    }
    train = Source(train, **reading)
    train.broken[[i for i, header in headers.items() if header is None]] = True
    notes = [*record.notes, *more_notes, *_warn_of_blank_images(train)]

    # Attach the views.
    two_crops = TwoCrops(image_size, scale=(settings["crop_min"], 1.0))
    crops = Images(train, two_crops, seed)
    plain = Images(train, plain_view(image_size))
    classes = train.classes
    if val is not None:
        val = Images(Source(val, **reading), plain_view(image_size))
        if not classes:
            classes = val.source.classes
    return Datasets(
        train=crops,
        plain=plain,
        val=val,
        classes=classes,
        image_size=image_size,
        augmentation=settings,
        fingerprint=_fingerprint(train),
        left_out=record.left_out(),
        notes=tuple(notes),
    )


def _median_size(files):
    """The median shorter side of up to 64 images of `files`, at most 224."""
    probe = evenly_spaced(len(files), 64)
    headers = [read_header(files, i) for i in probe]
    sides = [min(header[0]) for header in headers if header is not None]
    if not sides:
        Source(files).read(probe[0])  # raises the error
    return min(224, int(np.median(sides)))


def _warn_of_blank_images(source):
    """A note in a list if nearly all images of `source` are of one colour, else an empty list."""
    looked_at = 0
    blank = 0
    for i in evenly_spaced(len(source), 16):
        with contextlib.suppress(DataError):
            extrema = source.read(i).getextrema()
            looked_at += 1
            blank += all(low == high for low, high in extrema)
    if blank < 2 or blank < 0.9 * looked_at:
        return []
    return [f"{blank} of {looked_at} images looked at are of one colour: check how they are stored"]


def _fingerprint(source):
    """A hash of the classes, file names and labels of `source`."""
    # names start with a slash, as they always have: checkpoints hold their hash
    names = [f"{os.sep}{name}" for name in source.names()]
    content = repr([source.classes, names, source.labels.tolist()])
    return hashlib.sha256(content.encode()).hexdigest()


def evenly_spaced(n, count):
    """Up to `count` of the numbers 0 to n - 1, evenly spaced."""
    return np.linspace(0, n - 1, min(n, count)).astype(int).tolist()


def _count(n, one, many=None):
    """Text such as "1 file" or "2 files"."""
    if n == 1:
        return f"1 {one}"
    return f"{n} {many or one + 's'}"


# -- reading images --------------------------------------------------------------------------------
class Source:
    """Some images of a data set, read as 8-bit RGB, and their labels.

    files: data set of (PIL image, label) that has `.targets` or `.labels`; each item is opened
        anew, so that its pixels are still to be read.
    ranges: {kind: (low, high)} from find_ranges.
    enough: a JPEG file is read at a half, a quarter or an eighth of its size if both sides still
        have this many pixels. None: never.
    skip_broken: let another image take the place of one that cannot be read.
    seed: which image that is depends on (seed, index) alone.
    `labels`: (n,) int64, -1 for an image without a label.
    `broken`: (n,) bool, whether an image was found to be broken, also by loader workers.
    """

    def __init__(self, files, ranges=None, enough=None, skip_broken=False, seed=0):
        self.files = files
        self.ranges = ranges or {}
        self.enough = enough
        self.skip_broken = skip_broken
        self.seed = seed
        self.classes = getattr(files, "classes", [])
        self.paths = getattr(files, "paths", None)  # of the images in a folder
        labels = files.targets if hasattr(files, "targets") else files.labels
        self.labels = torch.as_tensor(labels).long()
        self.broken = torch.zeros(len(files), dtype=torch.bool).share_memory_()
        self.reasons = {}  # why images are broken, as far as this process has read them

    def __len__(self):
        return len(self.files)

    def image(self, index):
        """Image `index`, or the one that takes its place.

        Raises DataError if it cannot be read or, with skip_broken, if over 1 % of all cannot.
        """
        if not self.skip_broken:
            return self.read(index)
        chooser = random.Random(derive_seed(self.seed, index))
        while True:
            if not self.broken[index]:
                with contextlib.suppress(DataError):
                    return self.read(index)
            refuse_broken([self])
            index = chooser.randrange(len(self))

    def read(self, index):
        """Image `index`. Raises DataError if it cannot be read."""
        try:
            open_image = functools.partial(_open, self.files, index)
            return to_rgb(open_image, self.ranges, self.enough)
        except Exception as error:  # broken files can raise anything
            self.broken[index] = True
            self.reasons[index] = getattr(error, "strerror", None) or type(error).__name__
            raise DataError(
                f"cannot read {self.name(index)}: {self.reasons[index]}; repair or remove the "
                "file, or leave it out with --skip-broken"
            ) from error

    def name(self, index):
        """What to call image `index` in a message."""
        if self.paths is None:
            return f"image {index}"
        return repr(self.paths[index])

    def names(self):
        """The files' names, relative to their folder; [] if the images are not in a folder."""
        if self.paths is None:
            return []
        return [path.removeprefix(self.files.root).lstrip(os.sep) for path in self.paths]

    def broken_names(self):
        """The paths of the broken images, or what else to call them."""
        names = []
        for index in self.broken.nonzero()[:, 0].tolist():
            names.append(self.name(index) if self.paths is None else self.paths[index])
        return names

    def too_many_broken(self):
        """Whether more images are broken than may be left out: 1 %, or a single one of few."""
        allowed = 0
        if self.skip_broken and len(self) > 1:
            allowed = max(1, len(self) // 100)
        return int(self.broken.sum()) > allowed


def refuse_broken(sources):
    """Raise DataError, naming the first few, if too many images of `sources` are broken."""
    refused = [source for source in sources if source.too_many_broken()]
    if not refused:
        return
    named = []
    total = 0
    for source in refused:
        total += len(source)
        for index in source.broken.nonzero()[:, 0].tolist():
            reason = source.reasons.get(index)
            named.append(source.name(index) + (f" ({reason})" if reason else ""))
    text = ", ".join(named[:SHOWN])
    if len(named) > SHOWN:
        text += f" and {len(named) - SHOWN} more"
    advice = "repair or remove them, or leave them out with --skip-broken"
    if refused[0].skip_broken:
        advice = "more than 1 % are too many to leave out; repair or remove them"
    raise DataError(f"{len(named)} of {total} images cannot be read: {text}; {advice}")


def _open(files, index):
    return files[index][0]


def read_header(files, index):
    """(width, height) and kind of image `index`, without its pixels; None if it cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with _open(files, index) as image:
                return image.size, kind_of(image)
    except Exception:  # broken files can raise anything
        return None


def to_rgb(open_image, ranges, enough=None):
    """The image that `open_image()` opens, in 8-bit RGB, as a viewer would show it.

    Values of more than 8 bits are scaled, transparent parts are filled, and the orientation that a
    camera has noted is applied. See Source for `ranges` and `enough`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, for instance of odd metadata
        image = open_image()
        if enough is not None:
            image.draft(image.mode, (enough, enough))
        kind = kind_of(image)
        image.load()
        shown = image
        if kind is not None:
            shown = _to_8_bits(image, open_image, ranges.get(kind))
        shown = _without_transparency(shown)
        turn = TURNS.get(_orientation(image))
        if turn is not None:
            shown = shown.transpose(turn)
        return shown


def _orientation(image):
    """How the camera was held: 1 to 8, by EXIF. 1 if the image does not say."""
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:  # broken metadata can raise anything
        return 1


def _without_transparency(image):
    """`image` in RGB. Its transparent parts become white or, if the rest is light, black."""
    if image.mode == "LAB":
        lab = ImageCms.createProfile("LAB")
        rgb = ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, lab, rgb, outputMode="RGB")
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    if image.mode == "La":  # grey, multiplied by alpha: converts to LA only
        image = image.convert("LA")
    image = image.convert("RGBA")
    alpha = image.getchannel("A")
    image = image.convert("RGB")
    least, most = alpha.getextrema()
    if least == 255 or most == 0:  # if nothing is visible, show what is below
        return image
    light = ImageStat.Stat(image.convert("L"), alpha).mean[0] > 127
    background = Image.new("RGB", image.size, "black" if light else "white")
    background.paste(image, mask=alpha)
    return background


# -- images of more than 8 bits --------------------------------------------------------------------
def kind_of(image):
    """What an image of more than 8 bits holds, in words; None for other images."""
    if image.mode.startswith("I;16"):
        return "16-bit"
    if _raw_mode(image) in LOW_BYTES:
        return "16-bit colour"
    return {"I": "32-bit", "F": "float"}.get(image.mode)


def _raw_mode(image):
    """How the file of an image that was just opened stores its pixels; "" if unknown."""
    for tile in getattr(image, "tile", ()):
        arguments = tile[3]
        if isinstance(arguments, tuple) and arguments:
            arguments = arguments[0]
        if isinstance(arguments, str):
            return arguments
    return ""


def find_ranges(files, headers):
    """The values to show as 0 and 255 in the images of more than 8 bits, by kind of image.

    They are the smallest and the largest value, without outliers. They depend on the training
    images alone, so that training and evaluation see the same.
    files: what a Source reads. headers: {index: what read_header returns} of some images. Of each
        kind among them, the pixels of up to SAMPLED images are read.
    Returns {kind: (low, high)}, and a list of notes.
    """
    indices = {}  # {kind: indices of the images}
    for i, header in headers.items():
        if header is not None and header[1] is not None:
            indices.setdefault(header[1], []).append(i)
    ranges = {}
    notes = []
    for kind, found in indices.items():
        samples = []
        for i in [found[j] for j in evenly_spaced(len(found), SAMPLED)]:
            with contextlib.suppress(Exception), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                open_image = functools.partial(_open, files, i)
                values, _ = _read_values(open_image(), open_image)
                samples.append(_some_of(values))
        if not samples:
            continue
        ranges[kind] = _find_range(np.concatenate(samples))
        low, high = ranges[kind]
        note = f"{kind} images: values from {low:g} to {high:g} are shown as 0 to 255"
        if len(headers) < len(files) or len(samples) < len(found):
            note += f", by a sample of {_count(len(samples), 'image')}"
        notes.append(note)
    return ranges, notes


def _some_of(values):
    """Up to 20,000 of the finite `values`, the smallest and the largest among them: (m,)."""
    values = values.ravel()
    if values.dtype.kind == "f":
        values = values[np.isfinite(values)]
    if not values.size:
        return values
    some = values[:: 1 + values.size // 20_000]
    return np.concatenate([some, [values.min(), values.max()]])


def _find_range(values):
    """(smallest, largest) of `values` (m,), without outliers if they take most of the range."""
    if not values.size:
        return 0.0, 1.0
    low, inner_low, inner_high, high = np.percentile(values.astype(float), (0, 0.1, 99.9, 100))
    if 0 < inner_high - inner_low < (high - low) / 8:
        return float(inner_low), float(inner_high)
    return float(low), float(high)


def _to_8_bits(image, open_image, range_of_kind):
    """An image of more than 8 bits in mode L, RGB or RGBA. Without a range, its own is used."""
    values, alpha = _read_values(image, open_image)
    if range_of_kind is None:
        range_of_kind = _find_range(_some_of(values))
    low, high = range_of_kind
    scale = 255 / (high - low) if high > low else 0.0
    shades = np.empty(values.shape, np.uint8)
    rows = 1 + 100_000 // max(1, values[0].size)
    for first in range(0, len(values), rows):  # some rows at a time, which saves memory
        part = values[first : first + rows].astype(float)
        part = np.nan_to_num(part, nan=low, posinf=high, neginf=low).clip(low, high)
        shades[first : first + rows] = np.rint((part - low) * scale)
    shown = Image.fromarray(shades)
    if alpha is not None:
        shown.putalpha(Image.fromarray(alpha))
    return shown


def _read_values(image, open_image):
    """The values of an image of more than 8 bits, and its alpha channel in 8 bits or None.

    image: the image that `open_image()` opens.
    Returns arrays (H, W) or, for colours, (H, W, 3); and (H, W).
    """
    image.load()
    if image.mode not in ("RGB", "RGBA"):
        return np.asarray(image), None

    # Pillow keeps the high byte of 16-bit colours. In the other byte order that is the low byte.
    second = open_image()
    raw_mode = _raw_mode(second)
    tiles = []
    for tile in second.tile:
        arguments = tile[3]
        if isinstance(arguments, tuple):
            arguments = (LOW_BYTES[raw_mode], *arguments[1:])
        else:
            arguments = LOW_BYTES[raw_mode]
        make = getattr(tile, "_make", tuple)  # plain tuples before Pillow 11
        tiles.append(make((*tile[:3], arguments)))
    second.tile = tiles
    second.load()
    high = np.asarray(image)
    low = np.asarray(second)
    alpha = None
    if raw_mode == "LA;16B":  # read as four bytes: grey, then alpha, two bytes each
        return low[..., 0].astype(np.uint16) << 8 | low[..., 1], low[..., 2]
    if high.shape[2] == 4:
        alpha = high[..., 3]
    return high[..., :3].astype(np.uint16) << 8 | low[..., :3], alpha


# -- folders ---------------------------------------------------------------------------------------
RUN = "folder of a run"  # left out, because its pictures are no data


class Folder:
    """Images in files: item i is (PIL image whose pixels are still to be read, label).

    paths: the images' files.
    labels: (n,) the position of each image's class in `classes`, or -1.
    """

    def __init__(self, root, classes, paths, labels):
        self.root = str(root)
        self.classes = classes
        self.paths = Paths(paths)
        self.labels = np.array(labels, dtype=np.int64)

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return Image.open(self.paths[index]), int(self.labels[index])


class Paths:
    """Paths, each read by its number, packed into one text for the loader workers to share.

    Each worker would end up with a copy of an ordinary list, because reading an object writes its
    reference count, and that copies the memory it lies in (pytorch/pytorch#13246).
    """

    def __init__(self, paths):
        encoded = [os.fsencode(path) for path in paths]
        self.text = b"".join(encoded)
        self.ends = np.cumsum([0, *map(len, encoded)])

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, index):
        index = range(len(self))[index]  # raises IndexError after the last one
        start, end = self.ends[index : index + 2]
        return os.fsdecode(self.text[start:end])


def read_root(root, record):
    """The images of the folder `root`, by the first of these layouts that fits.

    - parts: train/ and perhaps val/ or test/ (TRAIN_PARTS and HELD_OUT_PARTS have the other names),
      each with a folder per class, or with images and no classes;
    - a folder per class: all images are training images;
    - images at any depth, without classes.

    Folders around all that, alone in their parent, make no difference.
    record: a Record, which is told what is left out or not certain.
    Returns the training images and the held-out images or None, each a Folder.
    Raises DataError if there are no images, or if the layout is unclear.
    """
    branch = _scan(root, record)
    top = _unwrap(branch)
    root_name = os.path.basename(os.path.abspath(root))  # also if it was given as "."
    train_names = sorted(filter(_is_train, top.children), key=_part_key)
    train_names.sort(key=lambda name: top.children[name].count == 0)  # empty ones last
    if train_names:
        train, val = _read_parts(top, train_names[0], record)
    elif _is_train(root_name) or _is_held_out(root_name):  # one part of a larger folder
        top = branch
        train = _read_branch(top, 1, record)
        val = None
    else:
        train = _read_without_parts(branch, top, record)
        val = None
    if not train.paths:
        left_out = record.left_out()
        if left_out:
            left_out = f" (left out: {left_out})"
        raise DataError(
            f"{train.root} has no images{left_out}; give a folder of images or one with "
            "train/CLASS/*.jpg"
        )
    if top is not branch and train.root != branch.path:
        record.notes.append(f"the images are in {top.path!r}")
    return train, val


class Record:
    """What was left out when a folder was read, and notes on what is not certain."""

    def __init__(self):
        self.suffixes = Counter()  # {suffix: number of files that are no images}
        self.skipped = Counter()  # {what else was left out: number}
        self.folders = []  # in words
        self.notes = []

    def left_out(self):
        """What was left out, such as "20 .gif, 1 hidden folder"; "" if nothing was."""
        parts = []
        most_common = self.suffixes.most_common(SHOWN)
        for suffix, number in most_common:
            name = suffix if suffix.isprintable() else repr(suffix)
            parts.append(f"{number} {name}{PLUG_INS.get(suffix, '')}")
        others = self.suffixes.total() - sum(number for _, number in most_common)
        if others:
            parts.append(_count(others, "other file"))
        for what, number in self.skipped.items():
            if number:
                plural = re.sub(r"\b(file|folder|image)\b", r"\1s", what, count=1)
                parts.append(_count(number, what, plural))
        return ", ".join(parts + self.folders)


class Branch:
    """A folder and what is in it.

    path: text. `images`: names of the images in it, sorted. `children`: {name: Branch} of the
    folders in it. `is_readable`: whether it could be listed itself. `holds_run`: whether it was a
    run's folder, or had one directly in it, that was left out.
    """

    def __init__(self, path):
        self.path = path
        self.images = []
        self.children = {}
        self.is_readable = True
        self.holds_run = False

    def with_folders(self):
        """This Branch, and the Branches of all folders in it, at any depth."""
        branches = [self]
        for branch in branches:  # which grows on the way
            branches += branch.children.values()
        return branches

    @functools.cached_property
    def count(self):
        """The number of images in it and below."""
        return sum(len(branch.images) for branch in self.with_folders())

    def full(self):
        """The folders in it with images in or below them, {name: Branch}, sorted by name."""
        return {
            name: self.children[name] for name in sorted(self.children) if self.children[name].count
        }

    def paths(self):
        """The paths of the images in it and below, folder by folder."""
        found = []
        for branch in self.with_folders():
            found += [(branch.path, name) for name in branch.images]
        return [os.path.join(*pair) for pair in sorted(found)]


def _scan(root, record):
    """The Branch of the folder `root`. Hidden files and other odd ones go to the `record`."""
    suffixes = SUFFIXES & Image.registered_extensions().keys()  # those that this Pillow reads
    top = Branch(str(root))
    branches = {top.path: top}

    def note_unreadable(error):
        record.skipped["unreadable folder"] += 1
        if error.filename in branches:
            branches[error.filename].is_readable = False

    for path, folders, names in os.walk(top.path, onerror=note_unreadable, followlinks=True):
        branch = branches[path]
        if names == ["broken.txt"] and not folders:  # of a run that broken images have ended
            record.skipped[RUN] += 1
            branch.holds_run = True
            continue
        for name in names:
            suffix = os.path.splitext(name)[1].lower()
            if name.startswith("."):
                record.skipped["hidden file"] += 1
            elif suffix in suffixes:
                branch.images.append(name)
            elif suffix:
                record.suffixes[suffix] += 1
            else:
                record.skipped["file without suffix"] += 1
        branch.images.sort()

        for name in list(folders):
            folder = os.path.join(path, name)
            what = _why_to_skip(folder, name, branch.images)
            if what == RUN:
                branch.holds_run = True
            if what is not None:
                record.skipped[what] += 1
                folders.remove(name)
                continue
            _check_link(Path(folder))
            branches[folder] = branch.children[name] = Branch(folder)
    return top


def _why_to_skip(folder, name, images):
    """What kind of folder this is, if its images are not to be read; else None.

    images: those beside it.
    """
    if name.startswith(".") or name.lower() in SYSTEM_FOLDERS:
        return "hidden folder"
    if images and name.lower() in THUMBNAILS:
        return "folder of thumbnails"
    if os.path.exists(os.path.join(folder, "checkpoint.pth.tar")):
        return RUN
    return None


def _check_link(link):
    """Raise DataError if the folder is a link that leads back to a folder that contains it."""
    if link.is_symlink() and link.resolve() in [parent.resolve() for parent in link.parents]:
        raise DataError(
            f"the link {str(link)!r} leads back to a folder that contains it; remove it"
        )


def _unwrap(branch):
    """The folder that holds everything: `branch`, or one below that is alone in its parent."""
    while not branch.images and len(branch.full()) == 1:
        if any(map(_is_train, branch.children)):
            break
        [branch] = branch.full().values()
    return branch


def _is_train(name):
    """Whether a folder of this name is the part of the training images."""
    return _part(name) in TRAIN_PARTS


def _is_held_out(name):
    """Whether a folder of this name is a part of held-out images."""
    return _part(name) in HELD_OUT_PARTS


def _part(name):
    """The name of a part as TRAIN_PARTS spells it: "Train_Set" and "train2017" are "train"."""
    words = re.split(r"[\W_]+", name.lower())
    word = "".join(word for word in words if word not in ("set", "data", "images", "split"))
    return re.sub(r"(set|\d+)$", "", word)


def _part_key(name):
    """The order of preference among folders that are parts."""
    parts = (*TRAIN_PARTS, *HELD_OUT_PARTS)
    return parts.index(_part(name)), name != _part(name), name


def _read_parts(top, train_name, record):
    """The training images, in the folder `train_name` of `top`, and the held-out images or None."""
    train = _read_branch(top.children[train_name], 1, record)

    # the first part of held-out images that suits them
    others = top.full()
    others.pop(train_name, None)
    val = None
    for name in sorted(filter(_is_held_out, others), key=_part_key):
        found = _read_branch(others[name], 1, record)
        if found.classes or not train.classes:
            val = _with_classes_of(train, found, record)
            del others[name]
            break

    # what is beside them
    for name, branch in others.items():
        record.folders.append(f"the folder {name!r} ({_count(branch.count, 'image')})")
    record.skipped["image beside the folders"] += len(top.images)
    return train, val


def _with_classes_of(train, val, record):
    """The held-out images `val`, with labels by the classes of `train` if that has any."""
    if not train.classes:
        return val
    unknown = [name for name in val.classes if name not in train.classes]
    if unknown:
        raise DataError(
            f"{val.root} and {train.root} have different class folders "
            f"({', '.join(map(repr, unknown[:SHOWN]))}); make them the same"
        )
    missing = len(train.classes) - len(val.classes)
    if missing:
        record.notes.append(f"{_count(missing, 'class', 'classes')} without held-out images")
    new_label = [train.classes.index(name) for name in val.classes]
    labels = [new_label[label] for label in val.labels]
    return Folder(val.root, train.classes, val.paths, labels)


def _read_without_parts(branch, top, record):
    """All images of `branch`, as training images. `top` is what _unwrap makes of it."""
    names = list(top.full())
    if len(names) > 1 and all(any(map(_is_train, top.children[name].full())) for name in names):
        raise DataError(
            f"each folder in {top.path} has a part of training images; name one of the folders or, "
            "if they are classes, move them to train/CLASS and val/CLASS"
        )
    if names and all(map(_is_held_out, names)):
        record.notes.append("there is no folder train/: all images are training images")
        return _unlabelled(branch)
    found = _read_branch(top, 2, record)
    if not found.classes:
        return _unlabelled(branch)
    shown = ", ".join(map(repr, names[:SHOWN]))
    if len(names) > SHOWN:
        shown += ", ..."
    record.notes.append(f"there is no folder train/: its folders are the classes ({shown})")
    return found


def _read_branch(branch, fewest, record):
    """The images of `branch`, with a class for each of its folders.

    There are no classes if it has less than `fewest` folders, or many images beside them.
    """
    full = branch.full()
    beside = len(branch.images)
    few_beside = 10 * beside < branch.count
    if len(full) < fewest or not few_beside:
        if beside and full:
            record.notes.append(
                f"{branch.path!r} has images beside its folders: all are read, without classes"
            )
        return _unlabelled(branch)

    for _, child in sorted(branch.children.items()):
        if fewest > 1 or child.count:
            continue
        folders = child.with_folders()
        if not any(folder.holds_run for folder in folders):
            advice = "remove it"
            if not all(folder.is_readable for folder in folders):
                advice = "it, or a folder in it, cannot be read: look at their permissions"
            raise DataError(f"the class folder {child.path!r} has no images; {advice}")
    record.skipped["image beside the class folders"] += beside
    paths = []
    labels = []
    for label, child in enumerate(full.values()):
        paths += child.paths()
        labels += [label] * (len(paths) - len(labels))
    return Folder(branch.path, list(full), paths, labels)


def _unlabelled(branch):
    """All images of `branch`, without classes."""
    paths = sorted(branch.paths())
    return Folder(branch.path, [], paths, [-1] * len(paths))


def _download(name, directory):
    """The training and the held-out part of a torchvision data set."""
    if name == "stl10":  # its unlabelled images are training images as well
        parts = [{"split": "train+unlabeled"}, {"split": "test"}]
    else:
        parts = [{"train": True}, {"train": False}]
    try:
        return [DOWNLOADS[name](directory, download=True, **part) for part in parts]
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"cannot download {name} to {directory}: {error}; give a folder of images instead"
        ) from error
