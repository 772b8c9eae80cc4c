"""The two random views of every image in a batch, computed on any device.

The augmentation is "aug-plus" of MoCo v2 (Chen et al. 2020, arXiv 2003.04297), which follows SimCLR
(Chen et al. 2020, arXiv 2002.05709, appendix A). Every image has its own random parameters. Only
the order of the colour operations is shared by the whole batch. A crop with its resize is two
matrix products, one for the rows and one for the columns. So is a blur.

    images = torch.randint(256, (16, 3, 32, 32), dtype=torch.uint8)
    random_view = RandomView(32, blur=False)
    im_q, im_k = random_view.two_views(images, RandomView.draw(len(images), seed=0))
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

# ImageNet's mean and standard deviation, used for every data set, as in MoCo
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

# how often each operation is applied (MoCo v2); to add an operation, add a line here and one in
# RandomView.__call__
CHANCES = {
    "jitter": 0.8,
    "grayscale": 0.2,
    "blur": 0.5,
    "flip": 0.5,
}


class Draws(NamedTuple):
    """The random numbers of N views by name, each uniform in 0 to 1."""

    box_area: torch.Tensor  # (N, TRIES) areas of the boxes to try
    box_ratio: torch.Tensor  # (N, TRIES) aspect ratios of the boxes to try
    box_corner: torch.Tensor  # (N, 2) top and left of the box that is used
    jitter: torch.Tensor  # (N, 4) change of brightness, contrast, saturation and hue
    chances: torch.Tensor  # (N, len(CHANCES)) one per operation, applied if below its chance
    blur_sigma: torch.Tensor  # (N, 1) standard deviation of the blur
    # (N, 4) order of the four changes, from the smallest number to the largest; row 0 decides for
    # all views of a call
    jitter_order: torch.Tensor

    @classmethod
    def split(cls, draws):
        """Name the columns of `draws` (..., DRAWS). The fields share its memory."""
        return cls(*draws.split(RandomView.WIDTHS, dim=-1))


@dataclass
class RandomView:
    """A random view of every image in a batch.

    Views have the distribution of torchvision's RandomResizedCrop, ColorJitter, RandomGrayscale and
    RandomHorizontalFlip on PIL images, and of SimCLR's blur. Nothing is rounded to 8 bits between
    the operations.

    To change the strength of the jitter, set `jitter` in a subclass, and let main_pcl.py use that:

        class HalfJitter(RandomView):
            def __post_init__(self):
                super().__post_init__()
                self.jitter = self.jitter / 2
    """

    size: int  # S, side of a view in pixels
    crop: bool = True  # off if the images are cropped already, for instance by the loader's workers
    aug_plus: bool = True  # the augmentation of MoCo v2; off: that of MoCo v1
    crop_min: float = 0.2  # smallest area of a crop, as a fraction of the image's area
    color_jitter: bool = True
    grayscale: bool = True
    blur: bool = True  # MoCo v1 has no blur
    flip: bool = True

    TRIES = 10  # boxes to try for each crop
    WIDTHS = (TRIES, TRIES, 2, 4, len(CHANCES), 1, 4)  # random numbers per view, by field of Draws
    DRAWS = sum(WIDTHS)  # random numbers per view

    def __post_init__(self):
        """Set the strength of the jitter and the chance of each operation.

        jitter: (4,) largest change of brightness, contrast, saturation and hue (in whole turns).
        chances: {operation: probability}.
        """
        self.jitter = torch.tensor([0.4, 0.4, 0.4, 0.1])
        self.chances = dict(CHANCES)
        if not self.aug_plus:
            self.jitter = torch.tensor([0.4, 0.4, 0.4, 0.4])
            self.chances["jitter"] = 1.0
            self.chances["blur"] = 0.0
        if not self.color_jitter:
            self.chances["jitter"] = 0.0
        if not self.grayscale:
            self.chances["grayscale"] = 0.0
        if not self.blur:
            self.chances["blur"] = 0.0
        if not self.flip:
            self.chances["flip"] = 0.0

    @classmethod
    def draw(cls, n, seed):
        """Draw the random numbers of two views of n images, uniform in 0 to 1.

        Returns (2, n, DRAWS), on the CPU.
        """
        draws = torch.rand(2, n, cls.DRAWS, generator=torch.Generator().manual_seed(seed))
        jitter_order = Draws.split(draws).jitter_order
        jitter_order[:] = jitter_order[0, 0]  # all views of a step share one order
        return draws

    def two_views(self, images, draws):
        """Two views of every image: im_q and im_k, each (N, 3, S, S) float32, normalised.

        images: (N, 3, H, W) uint8. With `crop` off (N, 2, 3, S, S), the query's and the key's crop.
        draws: (2, N, DRAWS) from `draw`, on the CPU.
        """
        pair = (images, images) if self.crop else images.unbind(1)
        return self(torch.cat(pair), draws.flatten(0, 1)).chunk(2)

    def __call__(self, images, draws):
        """One view of every image: (N, 3, S, S) float32, normalised, channels last.

        images: (N, 3, H, W) uint8.
        draws: (N, DRAWS) on the CPU.
        """
        draws = Draws.split(draws)
        x = images / 255
        if self.crop:
            height, width = x.shape[2:]
            boxes = random_boxes(draws, height, width, self.crop_min)
            x = resized_crop(x, boxes, self.size)

        # brightness, contrast and saturation are factors around 1; hue is a turn around 0
        changes = (2 * draws.jitter - 1) * self.jitter
        factors = (changes + torch.tensor([1, 1, 1, 0]))[..., None, None, None]
        order = draws.jitter_order[0].argsort().tolist()
        sigma = 0.1 + 1.9 * draws.blur_sigma[:, 0]  # 0.1 to 2 pixels

        operations = [
            ("jitter", functools.partial(color_jitter, order=order), factors),
            ("grayscale", grayscale),
        ]
        if not self.aug_plus:  # MoCo v1 converts to grayscale before the jitter
            operations.reverse()
        operations += [("blur", gaussian_blur, sigma), ("flip", mirror)]

        # the images that each operation changes, {operation: (N,) bool}
        masks = (draws.chances < torch.tensor(list(self.chances.values()))).T
        masks = masks.to(x.device, non_blocking=True)
        chosen = dict(zip(self.chances, masks, strict=True))

        apply = apply_to_rows if x.device.type == "cpu" else apply_to_all
        for name, operation, *parameters in operations:
            if self.chances[name] > 0:
                x = apply(x, chosen[name], operation, *parameters)
        return normalize(x)


def apply_to_rows(x, mask, operation, *parameters):
    """Replace x[mask] by `operation` of it, in place. On a CPU, fewer images take less time.

    x: (N, 3, S, S) images.
    mask: (N,) bool.
    operation: a function of the selected images and of their parameters.
    parameters: (N, ...) each.
    """
    rows = mask.nonzero()[:, 0]
    if len(rows) > 0:
        x[rows] = operation(x[rows], *(parameter[rows] for parameter in parameters))
    return x


def apply_to_all(x, mask, operation, *parameters):
    """The same as `apply_to_rows`, not in place. On a GPU, fewer calls take less time.

    Counting the selected images would also make the host wait for the GPU.
    """
    parameters = [parameter.to(x.device, non_blocking=True) for parameter in parameters]
    return torch.where(mask[:, None, None, None], operation(x, *parameters), x)


def random_boxes(draws, height, width, area_min):
    """Random boxes to crop, with the distribution of RandomResizedCrop's.

    draws: Draws of N views, on the CPU.
    height, width: size of the images.
    area_min: smallest area of a box, as a fraction of the image's area.
    Returns (N, 4): top, left, height and width in whole pixels.

    NumPy does this on one thread. PyTorch would wake all threads for a few thousand numbers, which
    takes milliseconds on a machine with many cores.
    """
    # the sizes to try: the area is uniform, the aspect ratio log-uniform in 3/4 to 4/3
    area = height * width * (area_min + (1 - area_min) * draws.box_area.numpy())
    ratio = (4 / 3) ** (2 * draws.box_ratio.numpy() - 1)
    heights = np.sqrt(area / ratio).round()
    widths = np.sqrt(area * ratio).round()
    sizes = np.stack([heights, widths], 2)  # (N, TRIES, 2)

    # take the first size that fits in the image, and a random position
    image_size = np.array([height, width], np.float32)
    fits = ((sizes >= 1) & (sizes <= image_size)).all(2)  # (N, TRIES)
    first = fits.argmax(1)
    size = sizes[np.arange(len(sizes)), first]  # (N, 2)
    start = np.floor(draws.box_corner.numpy() * (image_size - size + 1))

    # if none fits, take a central box, as large as the allowed ratios permit
    central_height = min(height, round(width * 4 / 3))
    central_width = min(width, round(height * 4 / 3))
    central_size = np.array([central_height, central_width], np.float32)
    central_start = (image_size - central_size) // 2

    found = fits.any(1, keepdims=True)
    start = np.where(found, start, central_start)
    size = np.where(found, size, central_size)
    return torch.from_numpy(np.concatenate([start, size], 1))


def resized_crop(x, boxes, size):
    """Cut a box out of each image and resize it as PIL's bilinear filter does.

    x: (N, 3, H, W) images.
    boxes: (N, 4) top, left, height and width in pixels.
    Returns (N, 3, size, size).
    """
    boxes = boxes.to(x.device, non_blocking=True)
    start, length = boxes.T[..., None, None].split(2)  # (2, N, 1, 1) each: vertical, horizontal
    height, width = x.shape[2:]
    # one call makes the matrices of both axes, for the longer side; then each is cut to its axis
    rows, columns = _resize_matrices(start, length, max(height, width), size)
    rows = rows[:, None, :, :height]
    columns = columns[:, None, :, :width]
    return along_both_axes(rows, x, columns)


def _resize_matrices(start, length, n, size):
    """Matrices (2, N, size, n) that resize a part of n pixels to `size` pixels.

    A row holds the weights of one new pixel: a triangle around its centre. The triangle reaches one
    new pixel to either side, and at least one old pixel.

    start, length: (2, N, 1, 1) first pixel and number of pixels of the part.
    """
    pixel = torch.arange(0.5, n, device=start.device)  # the pixels' centres
    new_pixel = torch.arange(0.5, size, device=start.device)[:, None]
    step = length / size  # old pixels per new pixel
    distance = (pixel - (start + new_pixel * step)).abs_()
    weight = (1 - distance.div_(step.clamp(min=1))).clamp_(min=0)
    weight *= (pixel > start) & (pixel < start + length)
    return weight.div_(weight.sum(3, keepdim=True))


def luminance(x):
    """The luminance (N, 1, S, S) of images x (N, 3, S, S), weighted as in PIL (ITU-R 601)."""
    red, green, blue = x.split(1, 1)
    return (0.299 * red).add_(green, alpha=0.587).add_(blue, alpha=0.114)


def grayscale(x):
    """Remove the colour of the images x (N, 3, S, S)."""
    return luminance(x).expand_as(x)


def color_jitter(x, factors, order):
    """Change brightness, contrast, saturation and hue of the images x (N, 3, S, S).

    factors: (N, 4, 1, 1, 1) one for each of these four operations.
    order: the numbers 0 to 3 of the operations, in the order in which to apply them.
    """
    operations = (brightness, contrast, saturation, hue)
    for number in order:
        x = operations[number](x, factors[:, number])
    return x


def brightness(x, factor):
    """Scale the images x (N, 3, S, S) by `factor` (N, 1, 1, 1)."""
    return (x * factor).clamp_(0, 1)


def contrast(x, factor):
    """Scale the distance of x (N, 3, S, S) from its mean luminance by `factor` (N, 1, 1, 1)."""
    return torch.lerp(luminance(x).mean((2, 3), keepdim=True), x, factor).clamp_(0, 1)


def saturation(x, factor):
    """Scale the distance of x (N, 3, S, S) from its grey image by `factor` (N, 1, 1, 1)."""
    return torch.lerp(luminance(x), x, factor).clamp_(0, 1)


def hue(x, turn):
    """Turn the hue of the images x (N, 3, S, S) by `turn` (N, 1, 1, 1), in whole turns.

    HSV's value and the chroma stay the same.
    """
    value, largest = x.max(1, keepdim=True)
    chroma = value - x.amin(1, keepdim=True)

    # the difference between the other two channels; red is followed by green, green by blue
    twice = x.repeat(1, 2, 1, 1)
    difference = (twice[:, 1:4] - twice[:, 2:5]).gather(1, largest)

    # the new hue in sixths of a turn: 0 is red, 2 green, 4 blue
    sixths = (difference / chroma.clamp(min=1e-8)).add_(largest, alpha=2).add_(6 * turn)

    # back to RGB: a channel is lower than `value` by up to `chroma`, depending on the hue
    distance = (sixths + per_channel((5.0, 3.0, 1.0), x.device)).remainder_(6)
    return value - chroma * torch.minimum(distance, 4 - distance).clamp_(0, 1)


def gaussian_blur(x, sigma):
    """Blur the images x (N, 3, S, S) with standard deviations `sigma` (N,), in pixels.

    At the border, only pixels inside the image count; their weights are scaled to sum to 1.
    """
    pixel = torch.arange(x.shape[-1], device=x.device)
    weight = (-0.5 * ((pixel[:, None] - pixel) / sigma[:, None, None]) ** 2).exp()
    weight = (weight / weight.sum(2, keepdim=True))[:, None]
    return along_both_axes(weight, x, weight)


def along_both_axes(rows, x, columns):
    """Matrix products for a crop or a blur of the images x, in float32 even under autocast."""
    with torch.autocast(x.device.type, enabled=False):
        return rows @ x @ columns.mT


def mirror(x):
    """Swap left and right of the images x (N, 3, S, S)."""
    return x.flip(-1)


def normalize(x):
    """Prepare images for the network: float32, normalised by MEAN and STD, channels last.

    x: (N, 3, H, W) uint8, or float in 0 to 1.
    """
    if not x.is_floating_point():
        x = x / 255
    x = (x - per_channel(MEAN, x.device)) / per_channel(STD, x.device)
    return x.contiguous(memory_format=torch.channels_last)


@functools.cache
def per_channel(values, device):
    """One value per channel: (3, 1, 1) on the device, which receives them once."""
    return torch.tensor(values)[:, None, None].to(device, non_blocking=True)
