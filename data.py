"""Data sets, and the order in which a run sees them.

Three kinds of data, told apart by one argument: nothing (the handwritten digits in `assets/`), a folder of images (in
ImageFolder layout or without classes), or a torchvision name (`cifar10`, ...).

    datasets = build_datasets("path/to/folder", image_size=224)
    sampler = EpochSampler(len(datasets.train), batch_size=256)     # sampler.set_epoch(epoch) before each epoch
    loader = DataLoader(datasets.train, 256, sampler=sampler, collate_fn=identity_collate, num_workers=8)
"""

import functools
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

SMALL = 64  # up to this many pixels: no blur, and no border cut off in the plain view
DIGITS = Path(__file__).parent / "assets" / "digits.npz"
MEMORY = 4 << 30  # bytes that images kept in memory may take
DOWNLOADS = {"cifar10": tv_datasets.CIFAR10, "cifar100": tv_datasets.CIFAR100, "stl10": tv_datasets.STL10}


class DataError(ValueError):
    """What is wrong with the user's data and what to do about it, in one line."""


def derive_seed(*numbers):
    """A seed that follows from whole numbers, such as (seed, epoch, step): the same in every process."""
    return hash(numbers) & 0xFFFFFFFF


class Images(Dataset):
    """Images of `source` under `view`: item i is `(view(image i), i)`; batches come as batches (`__getitems__`).
    source: a data set of (PIL image, label) with the labels also in `.targets` or `.labels`.
    view: PIL image -> uint8 tensor (..., 3, H, W).
    seed: a random view follows from (seed, epoch, i) alone, whatever the number of workers or the order; `set_epoch`
        reaches loader workers that are already running.
    pixels: (n, 3, H, W) uint8 on any device, to take in place of `view(image i)`.
    `labels`: (n,) int64, -1 where there is none."""

    def __init__(self, source, view, seed=0, pixels=None):
        self.source, self.view, self.seed, self.pixels = source, view, seed, pixels
        self.labels = torch.as_tensor(source.targets if hasattr(source, "targets") else source.labels).long()
        self.epoch = torch.zeros((), dtype=torch.long).share_memory_()

    def set_epoch(self, epoch):
        self.epoch.fill_(epoch)

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive_seed(self.seed, int(self.epoch), index))
            return self.view(self.image(index)), index

    def __getitems__(self, indices):
        if self.pixels is None:
            return default_collate([self[index] for index in indices])
        index = torch.tensor(indices)
        return self.pixels[index.to(self.pixels.device, non_blocking=True)], index

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


def identity_collate(batch):
    """The collate_fn for Images, which make batches themselves."""
    return batch


class EpochSampler(Sampler):
    """This process's share of `n` samples in random order, in whole batches; `set_epoch` before each epoch.
    As PyTorch's DistributedSampler, but an epoch can be taken up in its middle, and the samples of a step are the
    same whatever the number of processes. batch_size: of all processes together, a multiple of their number."""

    def __init__(self, n, batch_size, seed=0, rank=0, world=1):
        self.n, self.batch_size, self.seed, self.rank, self.world = n, batch_size, seed, rank, world
        self.set_epoch(0)

    def set_epoch(self, epoch, step=0):
        """The next iteration is that of `epoch`, from `step` on."""
        self.epoch, self.step = epoch, step

    def __iter__(self):
        generator = torch.Generator().manual_seed(derive_seed(self.seed, self.epoch))
        order = torch.randperm(self.n, generator=generator)[: self.n // self.batch_size * self.batch_size]
        return iter(order[self.step * self.batch_size :][self.rank :: self.world].tolist())

    def __len__(self):
        return (self.n // self.batch_size - self.step) * self.batch_size // self.world


class Datasets(NamedTuple):
    train: Images  # two random crops of each training image or, once in memory, the whole image
    plain: Images  # its centre crop
    val: Images | None  # centre crops of the held-out images; None where there are none
    classes: list  # class names; [] where no image has one
    image_size: int  # side of a view, in pixels
    augmentation: dict  # keywords of augment.RandomView that fit the data
    fingerprint: str  # changes where training images are added, removed, renamed or labelled anew

    def describe(self):
        """What was found, as "300 training images, 60 held out, 10 classes, 32 pixels"."""
        held_out = f", {len(self.val)} held out" if self.val is not None else ""
        classes = f"{len(self.classes) or 'no'} class{'es' * (len(self.classes) != 1)}"
        return f"{len(self.train)} training images{held_out}, {classes}, {self.image_size} pixels"

    @property
    def labelled(self):
        """Whether a probe can be trained and judged: some images of both parts have labels."""
        return self.val is not None and all((images.labels >= 0).any() for images in (self.plain, self.val))


class Digits(list):
    """A part of 1,797 handwritten digits of 8x8 (UCI Optical Recognition, CC BY 4.0)."""

    def __init__(self, part):
        with np.load(DIGITS) as file:
            images, self.targets = file["images"][part], file["labels"][part]
        super().__init__(zip(map(Image.fromarray, images), self.targets, strict=True))
        self.classes = [str(digit) for digit in range(10)]


class TwoCrops(T.RandomResizedCrop):
    """Two independent random crops of one image, the query's and the key's: (2, 3, S, S)."""

    def forward(self, image):
        return torch.stack([TF.pil_to_tensor(super(TwoCrops, self).forward(image)) for _ in "qk"])


def plain_view(image_size):
    """Resize and centre crop; above 64 pixels the outer eighth is cut off, as in ImageNet's 256 -> 224."""
    resize = image_size if image_size <= SMALL else image_size * 256 // 224
    return T.Compose([T.Resize(resize), T.CenterCrop(image_size), T.PILToTensor()])


def linear_view(image_size, flip=True):
    """Random crop and flip, the augmentation of the published linear probe."""
    return T.Compose(flip * [T.RandomHorizontalFlip()] + [T.RandomResizedCrop(image_size), T.PILToTensor()])


def load_into_memory(datasets, device="cpu"):
    """`datasets` with all images in the memory of `device`: the training images whole, the others as they are seen.
    Returned as it is where the training images differ in size or all together take more than MEMORY. Raises
    DataError where an image cannot be read."""
    whole = Images(datasets.train.source, T.PILToTensor())
    shape, others = whole[0][0].shape, {"plain": datasets.plain, "val": datasets.val or []}
    if len(whole) * shape.numel() + sum(map(len, others.values())) * 3 * datasets.image_size**2 > MEMORY:
        return datasets
    pixels, bar = [], functools.partial(tqdm, leave=False, disable=None)
    for i in bar(range(len(whole)), "reading training images"):
        pixels.append(whole[i][0])
        if pixels[-1].shape != shape:
            return datasets
    kept = {"train": torch.stack(pixels).to(device)}
    for name, images in others.items():
        if name == "plain" and shape[1:] == (datasets.image_size, datasets.image_size) and shape[1] <= SMALL:
            kept[name] = kept["train"]  # the plain view is all of the image
        elif images:
            some = bar(range(len(images)), f"reading {name} images")
            kept[name] = torch.stack([images[i][0] for i in some]).to(device)
    images = {name: getattr(datasets, name) for name in kept}
    return datasets._replace(**{name: Images(x.source, x.view, pixels=kept[name]) for name, x in images.items()})


def build_datasets(data=None, image_size=None, seed=0, download_dir="datasets", **augmentation):
    """The training, plain and held-out images of `data`.
    data: None or "digits", a folder, or a name in DOWNLOADS, which torchvision downloads to `download_dir`.
    image_size: side of a view in pixels; None: the images' own (median shorter side), at most 224.
    augmentation: keywords of augment.RandomView; blur, flip and crop_min, where None or not given, fit the data: no
        blur up to 64 pixels, no mirror images and only large crops of digits.
    Returns Datasets. Raises DataError, in one line, where the data is missing, empty or not what it should be."""
    digits = data in (None, "digits")
    if digits:
        train, val = Digits(slice(None, -360)), Digits(slice(-360, None))  # written by other people
    elif Path(data).is_dir():
        train, val = _folders(Path(data))
    elif data in DOWNLOADS:
        train, val = _download(data, download_dir)
    else:
        raise DataError(f"{data} is neither a folder nor a known data set (digits, {', '.join(DOWNLOADS)})")
    if image_size is None:
        probe = np.linspace(0, len(train) - 1, min(len(train), 64)).astype(int)
        image_size = min(224, int(np.median([min(Images(train, None).image(int(i)).size) for i in probe])))
    fitting = {"blur": image_size > SMALL, "flip": not digits, "crop_min": 0.5 if digits else 0.2}
    augmentation = fitting | {name: value for name, value in augmentation.items() if value is not None}
    crops = Images(train, TwoCrops(image_size, scale=(augmentation["crop_min"], 1.0)), seed)
    plain = Images(train, plain_view(image_size))
    val = Images(val, plain_view(image_size)) if val is not None else None
    names = [path.removeprefix(train.root) for path, _ in getattr(train, "samples", ())]
    fingerprint = hashlib.sha256(repr([train.classes, names, plain.labels.tolist()]).encode()).hexdigest()
    classes = train.classes or (val.source.classes if val is not None else [])
    return Datasets(crops, plain, val, classes, image_size, augmentation, fingerprint)


class UnlabelledFolder(tv_datasets.ImageFolder):
    """All images below a folder, at any depth, each with the label -1."""

    def find_classes(self, _):
        return [], {}

    def make_dataset(self, directory, *_, **__):
        paths = (os.path.join(path, name) for path, _, names in os.walk(directory, followlinks=True) for name in names)
        return [(path, -1) for path in sorted(filter(tv_datasets.folder.is_image_file, paths))]


def _folders(root):
    """The training images in `root`/train, or anywhere in `root` where there is no such folder, and the held-out ones
    in `root`/val or `root`/test (None where there is neither)."""
    directory = root / "train" if (root / "train").is_dir() else root
    held_out = [path for path in (root / "val", root / "test") if directory != root and path.is_dir()]
    train, *held_out = [_read_folder(path) for path in [directory, *held_out[:1]]]
    val = held_out[0] if held_out else None
    if train.classes and val is not None and val.classes != train.classes:
        raise DataError(f"{val.root} and {train.root} have different class folders; make them the same")
    return train, val


def _read_folder(directory):
    """An ImageFolder or, where `directory` is no train/, val/ or test/ with a folder per class, an UnlabelledFolder."""
    for path, folders, _ in os.walk(directory, followlinks=True):
        for link in (Path(path, name) for name in folders if os.path.islink(os.path.join(path, name))):
            if link.resolve() in {parent.resolve() for parent in link.parents}:
                raise DataError(f"the link {str(link)!r} leads back to a folder it lies in; remove it")
    classes = directory.name in ("train", "val", "test") and any(path.is_dir() for path in directory.iterdir())
    try:
        images = (tv_datasets.ImageFolder if classes else UnlabelledFolder)(str(directory), loader=Image.open)
    except FileNotFoundError as error:
        raise DataError(f"{directory} has folders without images; remove them ({error})") from error
    if not len(images):
        raise DataError(f"{directory} has no images; give a folder with train/CLASS/*.jpg, or one of images alone")
    return images


def _download(name, directory):
    """The training and held-out part of a torchvision data set; STL-10's unlabelled images are trained on too."""
    parts = (
        [{"split": "train+unlabeled"}, {"split": "test"}] if name == "stl10" else [{"train": True}, {"train": False}]
    )
    try:
        return [DOWNLOADS[name](directory, download=True, **part) for part in parts]
    except (OSError, RuntimeError) as error:
        raise DataError(f"cannot download {name} to {directory}: {error}; give a folder of images instead") from error
