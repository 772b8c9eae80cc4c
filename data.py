"""Data sets and the two-view augmentation.

Three kinds of data, told apart by one argument: nothing (the handwritten digits in `assets/`), a folder in
ImageFolder layout (`train/` and, where there is one, `val/` or `test/`), or a torchvision name (`cifar10`, ...).
The augmentation is "aug-plus" of MoCo v2 (Chen et al. 2020, arXiv 2003.04297, after SimCLR).

    datasets = build_datasets("path/to/folder", image_size=224)
    (im_q, im_k), index = datasets.train[0]      # two random views, for training
    image, index = datasets.plain[0]             # the centre crop, for the features; labels: datasets.plain.labels
"""

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch.utils.data import Dataset
from torchvision import datasets as tv_datasets
from torchvision import transforms as T

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as in MoCo, for every data set
SMALL = 64  # up to this many pixels: no blur, and no border cut off in the plain view
DIGITS = Path(__file__).parent / "assets" / "digits.npz"
NAMES = ("digits", "cifar10", "cifar100", "stl10")


class DataError(ValueError):
    """What is wrong with the user's data and what to do about it, in one line."""


class Images(Dataset):
    """Images of `source` under `transform`: item i is `(transform(image i), i)`.

    source: a data set of (PIL image, label) with the labels also in `.targets` or `.labels`.
    seed: makes each random view a function of (seed, epoch, i) alone, whatever the number of workers or the order;
        `set_epoch` reaches loader workers that are already running. None: the global random state.
    `labels`: (n,) int64, -1 where there is none.
    """

    def __init__(self, source, transform, seed=None):
        self.source, self.transform, self.seed = source, transform, seed
        self.labels = torch.as_tensor(source.targets if hasattr(source, "targets") else source.labels).long()
        self.epoch = torch.zeros((), dtype=torch.long).share_memory_()

    def set_epoch(self, epoch):
        self.epoch.fill_(epoch)

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        image = self.image(index)
        if self.seed is None:
            return self.transform(image), index
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(hash((self.seed, int(self.epoch), index)) & 0xFFFFFFFF)
            return self.transform(image), index

    def image(self, index):
        """Image `index` as it is stored, in RGB. Raises DataError, naming the file, where it cannot be read."""
        try:
            image = self.source[index][0]
            if image.mode.startswith("I;16"):  # convert() would cut off all above 255
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            return image.convert("RGB")
        except Exception as error:  # there is no end to what broken files make the reader raise
            path = repr(self.source.samples[index][0]) if hasattr(self.source, "samples") else f"image {index}"
            raise DataError(f"cannot read {path}: {type(error).__name__}; repair or remove the file") from error


class Datasets(NamedTuple):
    train: Images  # two random views of each training image
    plain: Images  # its centre crop
    val: Images | None  # centre crops of the held-out images; None where there are none
    classes: list  # class names
    image_size: int  # side of a view, in pixels
    augmentation: dict  # the keywords of random_view behind `train`
    fingerprint: str  # changes where training images are added, removed, renamed or labelled anew


class Digits(Dataset):
    """1,797 handwritten digits of 8x8 (UCI Optical Recognition, CC BY 4.0); the last 360 are held out."""

    def __init__(self, train):
        self.classes = [str(digit) for digit in range(10)]
        with np.load(DIGITS) as file:
            part = slice(None, -360) if train else slice(-360, None)
            self.images, self.targets = file["images"][part], file["labels"][part]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return Image.fromarray(self.images[index]), int(self.targets[index])


class TwoCrops:
    """Two independent random views of one image, the query's and the key's."""

    def __init__(self, transform):
        self.transform = transform

    def __call__(self, image):
        return self.transform(image), self.transform(image)


class GaussianBlur:
    """Gaussian blur of random standard deviation, uniform in `sigma` pixels (SimCLR, appendix A)."""

    def __init__(self, sigma=(0.1, 2.0)):
        self.sigma = sigma

    def __call__(self, image):
        low, high = self.sigma
        return image.filter(ImageFilter.GaussianBlur(low + (high - low) * torch.rand(()).item()))


def random_view(image_size, aug_plus=True, crop_min=0.2, color_jitter=True, grayscale=True, blur=True, flip=True):
    """The transform behind one random view: aug-plus of MoCo v2, or MoCo v1's where `aug_plus` is off."""
    jitter = T.ColorJitter(0.4, 0.4, 0.4, 0.1 if aug_plus else 0.4)
    return T.Compose(
        [T.RandomResizedCrop(image_size, scale=(crop_min, 1.0))]
        + color_jitter * [T.RandomApply([jitter], p=0.8 if aug_plus else 1.0)]
        + grayscale * [T.RandomGrayscale(p=0.2)]
        + (blur and aug_plus) * [T.RandomApply([GaussianBlur()], p=0.5)]
        + flip * [T.RandomHorizontalFlip()]
        + [T.ToTensor(), T.Normalize(MEAN, STD)]
    )


def plain_view(image_size):
    """Resize and centre crop; above 64 pixels the outer eighth is cut off, as in ImageNet's 256 -> 224."""
    resize = image_size if image_size <= SMALL else image_size * 256 // 224
    return T.Compose([T.Resize(resize), T.CenterCrop(image_size), T.ToTensor(), T.Normalize(MEAN, STD)])


def linear_view(image_size, flip=True):
    """Random crop and flip, the augmentation of the published linear probe."""
    return T.Compose(
        [T.RandomResizedCrop(image_size)] + flip * [T.RandomHorizontalFlip()] + [T.ToTensor(), T.Normalize(MEAN, STD)]
    )


def build_datasets(data=None, image_size=None, seed=0, download_dir="datasets", **augmentation):
    """The training, plain and held-out images of `data`.

    data: None or "digits", a folder, or a name in NAMES, which torchvision downloads to `download_dir`.
    image_size: side of a view in pixels; None: the images' own (median shorter side), at most 224.
    augmentation: keywords of `random_view`; blur, flip and crop_min, where None or not given, fit the data: no blur
        up to 64 pixels, no mirror images and only large crops of digits.
    Returns Datasets. Raises DataError, in one line, where the data is missing, empty or not what it should be.
    """
    digits = data in (None, "digits")
    if digits:
        train, val = Digits(train=True), Digits(train=False)
    elif Path(data).is_dir():
        train, val = _folders(Path(data))
    elif data in NAMES:
        train, val = _download(data, download_dir)
    else:
        raise DataError(f"{data} is neither a folder nor a known data set ({', '.join(NAMES)})")
    if image_size is None:
        probe = np.linspace(0, len(train) - 1, min(len(train), 64)).astype(int)
        unaltered = Images(train, None)
        image_size = min(224, int(np.median([min(unaltered.image(int(i)).size) for i in probe])))
    fitting = {"blur": image_size > SMALL, "flip": not digits, "crop_min": 0.5 if digits else 0.2}
    augmentation = fitting | {name: value for name, value in augmentation.items() if value is not None}
    plain = plain_view(image_size)
    return Datasets(
        train=Images(train, TwoCrops(random_view(image_size, **augmentation)), seed),
        plain=Images(train, plain),
        val=Images(val, plain) if val is not None else None,
        classes=train.classes,
        image_size=image_size,
        augmentation=augmentation,
        fingerprint=_fingerprint(train),
    )


def _fingerprint(source):
    names = [path.removeprefix(source.root) for path, _ in getattr(source, "samples", ())]
    labels = [*map(int, source.targets if hasattr(source, "targets") else source.labels)]
    return hashlib.sha256(repr([source.classes, names, labels]).encode()).hexdigest()


def _folders(root):
    """The ImageFolders `root`/train and `root`/val or `root`/test (None where there is neither)."""

    def read(directory):
        for path, folders, _ in os.walk(directory, followlinks=True):
            for link in (Path(path, name) for name in folders if os.path.islink(os.path.join(path, name))):
                if link.resolve() in {parent.resolve() for parent in link.parents}:
                    raise DataError(f"the link {str(link)!r} leads back to a folder it lies in; remove it")
        try:
            return tv_datasets.ImageFolder(str(directory), loader=Image.open)
        except FileNotFoundError as error:
            raise DataError(f"{directory} needs a folder per class, each with images ({error})") from error

    if not (root / "train").is_dir():
        raise DataError(f"{root} has no folder train/; put the images in {root}/train/CLASS/")
    train = read(root / "train")
    for held_out in (root / "val", root / "test"):
        if held_out.is_dir():
            val = read(held_out)
            if val.classes != train.classes:
                raise DataError(f"{held_out} and {root / 'train'} have different class folders; make them the same")
            return train, val
    return train, None


def _download(name, directory):
    """The training and held-out part of a torchvision data set; STL-10's unlabelled images are trained on too."""
    kind = {"cifar10": tv_datasets.CIFAR10, "cifar100": tv_datasets.CIFAR100, "stl10": tv_datasets.STL10}[name]
    train, held_out = {"train": True}, {"train": False}
    if name == "stl10":
        train, held_out = {"split": "train+unlabeled"}, {"split": "test"}
    try:
        return [kind(directory, download=True, **part) for part in (train, held_out)]
    except (OSError, RuntimeError) as error:
        raise DataError(f"cannot download {name} to {directory}: {error}; give a folder of images instead") from error
