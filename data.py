"""Data sets, and the order in which a run sees them.

One argument names the data: nothing for the handwritten digits in `assets/`, the path of a folder
of images (in ImageFolder layout or without classes), or a torchvision name such as "cifar10".

    datasets = build_datasets()  # or build_datasets("path/to/folder"), build_datasets("cifar10")
    sampler = EpochSampler(len(datasets.train), batch_size=256)  # set_epoch(epoch) for each epoch
    loader = DataLoader(datasets.train, 256, sampler=sampler, collate_fn=identity_collate)
"""

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, Sampler, default_collate
from torchvision import datasets as tv_datasets
from torchvision import transforms as T
from torchvision.transforms import functional as TF
from tqdm import tqdm

SMALL = 64  # up to this many pixels: no blur, and the plain view keeps the border
DIGITS = Path(__file__).parent / "assets" / "digits.npz"
MEMORY = 4 << 30  # bytes that images in memory may take
DOWNLOADS = {
    "cifar10": tv_datasets.CIFAR10,
    "cifar100": tv_datasets.CIFAR100,
    "stl10": tv_datasets.STL10,
}


class DataError(ValueError):
    """A problem with the user's data. The message is one line: what is wrong and what to do."""


def derive_seed(*numbers):
    """A seed from whole numbers such as (seed, epoch, step), the same in every process."""
    return hash(numbers) & 0xFFFFFFFF


class Images(Dataset):
    """The images of `source` under `view`: item i is `(view(image i), i)`.

    source: data set of (PIL image, label) that also has the labels in `.targets` or `.labels`.
    view: maps a PIL image to a uint8 tensor (..., 3, H, W).
    seed: a random view depends on (seed, epoch, i) alone, not on the workers or the order.
    pixels: (n, 3, H, W) uint8 on any device. If given, batches are taken from it, without `view`.
    `labels`: (n,) int64, -1 for an image without a label.

    An image is read when its item is taken, so a broken file raises DataError only then. A
    DataLoader takes whole batches (`__getitems__`) and therefore needs identity_collate.
    """

    def __init__(self, source, view, seed=0, pixels=None):
        self.source = source
        self.view = view
        self.seed = seed
        self.pixels = pixels
        labels = source.targets if hasattr(source, "targets") else source.labels
        self.labels = torch.as_tensor(labels).long()
        # Shared memory: set_epoch must reach loader workers that are already running.
        self.epoch = torch.zeros((), dtype=torch.long).share_memory_()

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
        """Image `index` as stored, converted to RGB. Raises DataError if it cannot be read."""
        try:
            image = self.source[index][0]
            if image.mode.startswith("I;16"):  # convert() would clip all values above 255
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            return image.convert("RGB")
        except Exception as error:  # broken files can raise anything
            if hasattr(self.source, "samples"):
                name = repr(self.source.samples[index][0])
            else:
                name = f"image {index}"
            raise DataError(
                f"cannot read {name}: {type(error).__name__}; repair or remove the file"
            ) from error


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

    def describe(self):
        """A summary such as "300 training images, 60 held out, 10 classes, 32 pixels"."""
        parts = [f"{len(self.train)} training images"]
        if self.val is not None:
            parts.append(f"{len(self.val)} held out")
        if not self.classes:
            parts.append("no classes")
        elif len(self.classes) == 1:
            parts.append("1 class")
        else:
            parts.append(f"{len(self.classes)} classes")
        parts.append(f"{self.image_size} pixels")
        return ", ".join(parts)

    @property
    def labelled(self):
        """Whether some training images and some held-out images have labels."""
        if self.val is None:
            return False
        return all((images.labels >= 0).any() for images in (self.plain, self.val))


class Digits(list):
    """Some of the 1,797 handwritten digits of 8x8 pixels (UCI Optical Recognition, CC BY 4.0).

    part: a slice of the 1,797.
    """

    def __init__(self, part):
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


def load_into_memory(datasets, device="cpu"):
    """`datasets` with all images in the memory of `device`.

    Training images are stored whole, because random crops are taken from them later. The plain and
    the held-out images are stored under their view.
    Returns `datasets` unchanged if the training images differ in size, or if all images together
        take more than MEMORY bytes.
    Raises DataError if an image cannot be read.
    """
    whole = Images(datasets.train.source, T.PILToTensor())
    shape = whole[0][0].shape
    side = datasets.image_size

    # Leave a large data set on the disk.
    num_views = len(datasets.plain)
    if datasets.val is not None:
        num_views += len(datasets.val)
    if len(whole) * shape.numel() + num_views * 3 * side**2 > MEMORY:
        return datasets

    # Read the training images.
    whole_images = []
    for image in _read_all(whole, "reading training images"):
        if image.shape != shape:
            return datasets
        whole_images.append(image)
    train_pixels = torch.stack(whole_images).to(device)

    # Read them again under the plain view, unless it shows all of the image.
    plain_pixels = train_pixels
    if side > SMALL or shape[1:] != (side, side):
        plain_images = list(_read_all(datasets.plain, "cropping training images"))
        plain_pixels = torch.stack(plain_images).to(device)

    # Read the held-out images.
    val = datasets.val
    if val is not None:
        val_images = list(_read_all(val, "reading held-out images"))
        val = Images(val.source, val.view, pixels=torch.stack(val_images).to(device))

    train = Images(datasets.train.source, datasets.train.view, pixels=train_pixels)
    plain = Images(datasets.plain.source, datasets.plain.view, pixels=plain_pixels)
    return datasets._replace(train=train, plain=plain, val=val)


def _read_all(images, title):
    """Yield the view of each of `images`, with a progress bar titled `title`."""
    for i in tqdm(range(len(images)), title, leave=False, disable=None):
        yield images[i][0]


def build_datasets(data=None, image_size=None, seed=0, download_dir="datasets", **augmentation):
    """The training, plain and held-out images of `data`.

    data: None or "digits", a folder, or a name in DOWNLOADS.
    image_size: side of a view in pixels. None: the images' median shorter side, at most 224.
    download_dir: where torchvision keeps the data sets it downloads.
    augmentation: keyword arguments of augment.RandomView. If blur, flip or crop_min is None or not
        given, it follows from the data: no blur up to 64 pixels, and for digits no flip and only
        large crops.
    Returns Datasets.
    Raises DataError if the data is missing, empty or invalid.
    """
    # Find the images.
    digits = data in (None, "digits")
    if digits:
        train = Digits(slice(None, -360))
        val = Digits(slice(-360, None))  # by other writers than the training digits
    elif Path(data).is_dir():
        train, val = _read_root(Path(data))
    elif data in DOWNLOADS:
        train, val = _download(data, download_dir)
    else:
        names = ", ".join(["digits", *DOWNLOADS])
        raise DataError(f"{data} is neither a folder nor a known data set ({names})")

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

    # Attach the views.
    two_crops = TwoCrops(image_size, scale=(settings["crop_min"], 1.0))
    crops = Images(train, two_crops, seed)
    plain = Images(train, plain_view(image_size))
    classes = train.classes
    if val is not None:
        val = Images(val, plain_view(image_size))
        if not classes:
            classes = val.source.classes
    fingerprint = _fingerprint(train, plain.labels)
    return Datasets(crops, plain, val, classes, image_size, settings, fingerprint)


def _median_size(source):
    """The median shorter side of up to 64 images of `source`, at most 224."""
    images = Images(source, None)
    probe = np.linspace(0, len(source) - 1, min(len(source), 64)).astype(int)
    sides = [min(images.image(int(i)).size) for i in probe]
    return min(224, int(np.median(sides)))


def _fingerprint(source, labels):
    """A hash of the classes, file names and labels of `source`."""
    names = []
    if hasattr(source, "samples"):
        names = [path.removeprefix(source.root) for path, _ in source.samples]
    content = repr([source.classes, names, labels.tolist()])
    return hashlib.sha256(content.encode()).hexdigest()


class UnlabelledFolder(tv_datasets.ImageFolder):
    """All images below a folder, at any depth, with the label -1."""

    def find_classes(self, directory):
        return [], {}

    def make_dataset(self, directory, *args, **kwargs):
        paths = []
        for folder, _, names in os.walk(directory, followlinks=True):
            paths += [os.path.join(folder, name) for name in names]
        return [(path, -1) for path in sorted(paths) if tv_datasets.folder.is_image_file(path)]


def _read_root(root):
    """The training images and the held-out images (None if there are none) of the folder `root`.

    Training images are in `root`/train, held-out images in `root`/val or `root`/test. If there is
    no `root`/train, all images below `root` are training images.
    """
    if not (root / "train").is_dir():
        return _read_folder(root), None
    train = _read_folder(root / "train")
    held_out = [path for path in (root / "val", root / "test") if path.is_dir()]
    if not held_out:
        return train, None
    val = _read_folder(held_out[0])
    if train.classes and val.classes != train.classes:
        raise DataError(
            f"{val.root} and {train.root} have different class folders; make them the same"
        )
    return train, val


def _read_folder(directory):
    """The images below `directory`.

    Returns an ImageFolder if `directory` is a train/, val/ or test/ with a folder per class, else
    an UnlabelledFolder.
    """
    _check_links(directory)
    has_classes = directory.name in ("train", "val", "test") and any(
        path.is_dir() for path in directory.iterdir()
    )
    folder_type = tv_datasets.ImageFolder if has_classes else UnlabelledFolder
    try:
        images = folder_type(str(directory), loader=Image.open)
    except FileNotFoundError as error:
        raise DataError(f"{directory} has folders without images; remove them ({error})") from error
    if len(images) == 0:
        raise DataError(
            f"{directory} has no images; give a folder of images or one with train/CLASS/*.jpg"
        )
    return images


def _check_links(directory):
    """Raise DataError if a link below `directory` leads back to a folder that contains it."""
    for path, folders, _ in os.walk(directory, followlinks=True):
        for name in folders:
            link = Path(path, name)
            if not os.path.islink(link):
                continue
            if link.resolve() in [parent.resolve() for parent in link.parents]:
                raise DataError(
                    f"the link {str(link)!r} leads back to a folder that contains it; remove it"
                )


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
