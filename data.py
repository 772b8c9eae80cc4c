"""Data sets and the two-view augmentation.

Three kinds of data, told apart by one argument: nothing (the handwritten digits in `assets/`), a folder in
ImageFolder layout (`train/` and, where there is one, `val/` or `test/`), or a torchvision name (`cifar10`, ...).
The augmentation is "aug-plus" of MoCo v2 (Chen et al. 2020, arXiv 2003.04297, after SimCLR). Loader workers decode and
crop; all else is done in batches on the device, and the cropping too where the images are kept there.

    datasets = build_datasets("path/to/folder", image_size=224)
    loader = DataLoader(datasets.train, 256, collate_fn=as_it_is, num_workers=8)     # none after datasets.keep("cuda")
    for images, index in loader:                                                      # uint8
        im_q, im_k = datasets.two_views(images, torch.rand(2, 256, RandomView.DRAWS), "cuda")
"""

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, default_collate
from torchvision import datasets as tv_datasets
from torchvision import transforms as T

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as in MoCo, for every data set
SMALL = 64  # up to this many pixels: no blur, and no border cut off in the plain view
DIGITS = Path(__file__).parent / "assets" / "digits.npz"
MEMORY = 4 << 30  # bytes that images kept in memory may take
NAMES = ("digits", "cifar10", "cifar100", "stl10")


class DataError(ValueError):
    """What is wrong with the user's data and what to do about it, in one line."""


class Images(Dataset):
    """Images of `source` under `view`: item i is `(view(image i), i)`; batches come as batches (`__getitems__`).

    source: a data set of (PIL image, label) with the labels also in `.targets` or `.labels`.
    view: PIL image -> uint8 tensor (3, H, W), or two of them.
    seed: makes each random view a function of (seed, epoch, i) alone, whatever the number of workers or the order;
        `set_epoch` reaches loader workers that are already running. None: the global random state.
    pixels: (n, 3, H, W) uint8 on any device, to take in place of `view(image i)`.
    `labels`: (n,) int64, -1 where there is none.
    """

    def __init__(self, source, view, seed=None, pixels=None):
        self.source, self.view, self.seed, self.pixels = source, view, seed, pixels
        self.labels = torch.as_tensor(source.targets if hasattr(source, "targets") else source.labels).long()
        self.epoch = torch.zeros((), dtype=torch.long).share_memory_()

    def set_epoch(self, epoch):
        self.epoch.fill_(epoch)

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        image = self.image(index)
        if self.seed is None:
            return self.view(image), index
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(hash((self.seed, int(self.epoch), index)) & 0xFFFFFFFF)
            return self.view(image), index

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


class Datasets(NamedTuple):
    train: Images  # two random crops of each training image or, where they are kept in memory, the whole image
    plain: Images  # its centre crop
    val: Images | None  # centre crops of the held-out images; None where there are none
    classes: list  # class names
    image_size: int  # side of a view, in pixels
    augmentation: dict  # the keywords behind `random_view`
    random_view: "RandomView"
    fingerprint: str  # changes where training images are added, removed, renamed or labelled anew

    def keep(self, device):
        """Keep all images in the memory of `device` where they are of one size and take at most MEMORY in all.

        Returns whether it does. Raises DataError where an image cannot be read.
        """
        whole = Images(self.train.source, T.PILToTensor())
        shape = whole[0][0].shape
        views = [part for part in (self.plain, self.val) if part is not None]
        if sum(map(len, views)) * 3 * self.image_size**2 + len(whole) * shape.numel() > MEMORY:
            return False
        images = []
        for i in range(len(whole)):
            images.append(whole[i][0])
            if images[-1].shape != shape:
                return False
        self.train.pixels = torch.stack(images).to(device)
        if shape == (3, self.image_size, self.image_size):  # the centre crop is all of the image
            self.plain.pixels = self.train.pixels
        for part in views:
            if part.pixels is None:
                part.pixels = torch.stack([part[i][0] for i in range(len(part))]).to(device)
        return True

    def two_views(self, images, draws, device="cpu"):
        """A batch of `train`, draws (2, N, DRAWS) as for RandomView -> im_q, im_k (N, 3, S, S) on `device`."""
        kept = self.train.pixels is not None
        pair = [half.to(device, non_blocking=True) for half in ([images, images] if kept else images)]
        return self.random_view(torch.cat(pair), draws.flatten(0, 1), kept).chunk(2)


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
    """Two independent random crops of one image, the query's and the key's."""

    def __init__(self, transform):
        self.transform = transform

    def __call__(self, image):
        return self.transform(image), self.transform(image)


class RandomView:
    """aug-plus of MoCo v2, or MoCo v1's where `aug_plus` is off, of a batch; each image has its own parameters.

    The distribution is that of torchvision's RandomResizedCrop, ColorJitter, RandomGrayscale and RandomHorizontalFlip
    on PIL images, and SimCLR's blur (appendix A: standard deviation uniform in 0.1 to 2 pixels), without their
    rounding to 8 bits between the operations.
    """

    TRIES = 10  # boxes that are tried for one that fits
    DRAWS = 2 * TRIES + 15  # random numbers per image

    def __init__(
        self, image_size, aug_plus=True, crop_min=0.2, color_jitter=True, grayscale=True, blur=True, flip=True
    ):
        self.image_size, self.crop_min = image_size, crop_min
        self.jitter = torch.tensor([0.4, 0.4, 0.4, 0.1 if aug_plus else 0.4])
        self.p_jitter = color_jitter * (0.8 if aug_plus else 1.0)
        self.p_gray, self.p_blur, self.p_flip = grayscale * 0.2, blur * aug_plus * 0.5, flip * 0.5

    def __call__(self, images, u, crop):
        """images (N, 3, H, W) uint8, u (N, DRAWS) uniform in 0 to 1, on the CPU -> (N, 3, S, S) float32, normalised.

        crop: whether to crop, which loader workers may have done.
        """
        where, factors, order, chance, sigma = u.split([2 * self.TRIES + 2, 4, 4, 4, 1], 1)
        jitter, gray, blur, flip = (chance < torch.tensor([self.p_jitter, self.p_gray, self.p_blur, self.p_flip])).T
        x = images.float() / 255
        if crop:
            x = resized_crop(x, random_boxes(where, *x.shape[2:], self.crop_min), self.image_size)
        factors = ((2 * factors - 1) * self.jitter + torch.tensor([1, 1, 1, 0])).T[..., None, None, None]
        for turn in order.argsort(1).T:  # each image has its own order
            for number, adjust in enumerate((brightness, contrast, saturation, hue)):
                on_some(x, jitter & (turn == number), adjust, factors[number])
        on_some(x, gray, lambda x: luminance(x).expand_as(x))
        on_some(x, blur, gaussian_blur, 0.1 + 1.9 * sigma[:, 0])
        on_some(x, flip, lambda x: x.flip(-1))
        return normalize(x)


def on_some(x, mask, operation, *parameters):
    """Replace the images x[mask] by operation(x[mask], ...); mask and parameters on the CPU, so that nothing waits."""
    if mask.any():
        parameters = [parameter[mask].to(x.device, non_blocking=True) for parameter in parameters]
        rows = mask.nonzero()[:, 0].to(x.device, non_blocking=True)
        x[rows] = operation(x[rows], *parameters)


def random_boxes(u, height, width, area_min):
    """torchvision's RandomResizedCrop: boxes (N, 4) of top, left, height, width in whole pixels; u (N, 2 TRIES + 2)."""
    tries = RandomView.TRIES
    area, ratio, place = u.split([tries, tries, 2], 1)
    area, ratio = height * width * (area_min + (1 - area_min) * area), (4 / 3) ** (2 * ratio - 1)
    size = torch.stack([(area / ratio).sqrt().round(), (area * ratio).sqrt().round()])  # height and width of each try
    whole = torch.tensor([height, width])
    fits = ((size >= 1) & (size <= whole[:, None, None])).all(0)
    size = size.gather(2, fits.int().argmax(1)[None, :, None].expand(2, -1, 1))[..., 0].T
    start = (place * (whole - size + 1)).floor()
    central = torch.tensor([min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))])
    found = fits.any(1, keepdim=True)
    return torch.cat([start.where(found, (whole - central) // 2), size.where(found, central)], 1)


def resized_crop(x, boxes, size):
    """The boxes (N, 4) of the images x (N, 3, H, W), resized to (N, 3, size, size) as PIL's bilinear filter does it.

    Rows and columns are resized by a matrix product each: a triangle as wide as a pixel of the finer grid is coarse.
    """
    top, left, height, width = boxes.to(x.device, non_blocking=True).T[..., None, None]
    rows, columns = _resizing(top, height, x.shape[2], size), _resizing(left, width, x.shape[3], size)
    return rows[:, None] @ x @ columns[:, None].mT


def _resizing(start, length, n, size):
    """The weights (N, size, n) with which `length` of `n` pixels, from `start` on, make up `size` pixels."""
    step = length / size
    centre = start + (torch.arange(size, device=start.device)[:, None] + 0.5) * step
    pixel = torch.arange(n, device=start.device) + 0.5
    weight = (1 - (pixel - centre).abs() / step.clamp(min=1)).clamp(min=0)
    weight = weight * ((pixel > start) & (pixel < start + length))
    return weight / weight.sum(2, keepdim=True)


def luminance(x):
    red, green, blue = x.split(1, 1)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def brightness(x, factor):
    return (x * factor).clamp_(0, 1)


def contrast(x, factor):
    return torch.lerp(luminance(x).mean((2, 3), keepdim=True), x, factor).clamp_(0, 1)


def saturation(x, factor):
    return torch.lerp(luminance(x), x, factor).clamp_(0, 1)


def hue(x, turn):
    """x with its hue turned by `turn`, in whole turns; value and chroma of HSV stay."""
    value, largest = x.max(1, keepdim=True)
    chroma = value - x.amin(1, keepdim=True)
    red, green, blue = x.split(1, 1)
    sixth = torch.where(largest == 0, green - blue, torch.where(largest == 1, blue - red, red - green))
    sixth = sixth / chroma.clamp(min=1e-8) + 2 * largest + 6 * turn
    distance = (sixth + per_channel((5.0, 3.0, 1.0), x)).remainder_(6)
    return value - chroma * torch.minimum(distance, 4 - distance).clamp_(0, 1)


def gaussian_blur(x, sigma):
    """x (N, 3, S, S) blurred with standard deviations sigma (N,) in pixels; at the border over what there is."""
    pixel = torch.arange(x.shape[-1], device=x.device)
    weight = (-0.5 * ((pixel[:, None] - pixel) / sigma[:, None, None]) ** 2).exp()
    weight = (weight / weight.sum(2, keepdim=True))[:, None]
    return weight @ x @ weight.mT


def normalize(x):
    """Images (N, 3, H, W), uint8 or float in 0 to 1 -> what the network takes: float32, channels last."""
    x = x if x.is_floating_point() else x.float() / 255
    return ((x - per_channel(MEAN, x)) / per_channel(STD, x)).contiguous(memory_format=torch.channels_last)


def per_channel(values, x):
    return torch.tensor(values)[:, None, None].to(x.device, non_blocking=True)


def random_crop(image_size, area_min=0.08):
    return T.Compose([T.RandomResizedCrop(image_size, scale=(area_min, 1.0)), T.PILToTensor()])


def plain_view(image_size):
    """Resize and centre crop; above 64 pixels the outer eighth is cut off, as in ImageNet's 256 -> 224."""
    resize = image_size if image_size <= SMALL else image_size * 256 // 224
    return T.Compose([T.Resize(resize), T.CenterCrop(image_size), T.PILToTensor()])


def linear_view(image_size, flip=True):
    """Random crop and flip, the augmentation of the published linear probe."""
    return T.Compose(flip * [T.RandomHorizontalFlip()] + [random_crop(image_size)])


def as_it_is(batch):
    """The collate_fn for Images, which make batches themselves."""
    return batch


def build_datasets(data=None, image_size=None, seed=0, download_dir="datasets", **augmentation):
    """The training, plain and held-out images of `data`.

    data: None or "digits", a folder, or a name in NAMES, which torchvision downloads to `download_dir`.
    image_size: side of a view in pixels; None: the images' own (median shorter side), at most 224.
    augmentation: keywords of RandomView; blur, flip and crop_min, where None or not given, fit the data: no blur
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
        train=Images(train, TwoCrops(random_crop(image_size, augmentation["crop_min"])), seed),
        plain=Images(train, plain),
        val=Images(val, plain) if val is not None else None,
        classes=train.classes,
        image_size=image_size,
        augmentation=augmentation,
        random_view=RandomView(image_size, **augmentation),
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
