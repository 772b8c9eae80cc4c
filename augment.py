"""The two views of an image: MoCo v2's "aug-plus" in batches, on any device.

MoCo v2 (Chen et al. 2020, arXiv 2003.04297), after SimCLR (arXiv 2002.05709, appendix A). Each image has parameters
of its own, but a batch one order of its colour operations. Cropping, resizing and blurring are products with a matrix
for the rows and one for the columns.

    random_view = RandomView(32, blur=False)
    im_q, im_k = random_view.two_views(images, RandomView.draw(len(images), seed=0))   # from (N, 3, H, W) uint8
"""

import torch

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as in MoCo, for every data set


class RandomView:
    """A random view of every image of a batch: "aug-plus" of MoCo v2 or, where `aug_plus` is off, that of MoCo v1.
    The distribution is that of torchvision's RandomResizedCrop, ColorJitter, RandomGrayscale and RandomHorizontalFlip
    on PIL images, and of SimCLR's blur (sigma uniform in 0.1 to 2 pixels), without rounding to 8 bits in between.
    size: S, side of a view in pixels. crop: off where the images come cropped, as from a loader worker.
    crop_min: smallest area of a crop, as a part of the image's."""

    TRIES = 10  # boxes that are tried for one that fits
    DRAWS = 2 * TRIES + 15  # random numbers per view; the last four are the order of the colour operations

    def __init__(
        self, size, aug_plus=True, crop_min=0.2, color_jitter=True, grayscale=True, blur=True, flip=True, crop=True
    ):
        self.size, self.crop_min, self.crop, self.aug_plus = size, crop_min, crop, aug_plus
        self.jitter = torch.tensor([0.4, 0.4, 0.4, 0.1 if aug_plus else 0.4])
        p_jitter = color_jitter * (0.8 if aug_plus else 1.0)
        self.chances = torch.tensor([p_jitter, grayscale * 0.2, blur * aug_plus * 0.5, flip * 0.5])

    @classmethod
    def draw(cls, n, seed):
        """The random numbers (2, n, DRAWS), uniform in 0 to 1, that two views of `n` images take."""
        draws = torch.rand(2, n, cls.DRAWS, generator=torch.Generator().manual_seed(seed))
        draws[..., -4:] = draws[0, 0, -4:]  # one order for all
        return draws

    def two_views(self, images, draws):
        """im_q, im_k, each (N, 3, S, S) float32, of images uint8 and draws (2, N, DRAWS).
        images: (N, 3, H, W), or where they come cropped (N, 2, 3, S, S)."""
        pair = (images, images) if self.crop else images.unbind(1)
        return self(torch.cat(pair), draws.flatten(0, 1)).chunk(2)

    def __call__(self, images, draws):
        """images (N, 3, H, W) uint8, draws (N, DRAWS) on the CPU -> (N, 3, S, S) float32, normalised."""
        box, factors, chance, sigma, order = draws.split([2 * self.TRIES + 2, 4, 4, 1, 4], 1)
        jitter, gray, blur, flip = (chance < self.chances).T
        factors = ((2 * factors - 1) * self.jitter + torch.tensor([1, 1, 1, 0]))[..., None, None, None]
        x = images.float() / 255
        if self.crop:
            x = resized_crop(x, random_boxes(box, *x.shape[2:], self.crop_min), self.size)
        if not self.aug_plus:  # MoCo v1 drops the colour first
            apply_where(x, gray, grayscale)
        apply_where(x, jitter, color_jitter, factors, order=order[0].argsort().tolist())
        if self.aug_plus:
            apply_where(x, gray, grayscale)
        apply_where(x, blur, gaussian_blur, 0.1 + 1.9 * sigma[:, 0])
        apply_where(x, flip, lambda x: x.flip(-1))
        return normalize(x)


def apply_where(x, mask, operation, *parameters, **options):
    """Replace the images x[mask] by operation(x[mask], ...); mask and parameters on the CPU, so that nothing waits."""
    rows = mask.nonzero()[:, 0]
    if len(rows):
        parameters = [parameter[rows].to(x.device, non_blocking=True) for parameter in parameters]
        rows = rows.to(x.device, non_blocking=True)
        x[rows] = operation(x[rows], *parameters, **options)


def random_boxes(u, height, width, area_min):
    """Boxes (N, 4) of top, left, height, width in whole pixels, as by RandomResizedCrop; u (N, 2 TRIES + 2)."""
    tries = RandomView.TRIES
    area, ratio, corner = u.split([tries, tries, 2], 1)
    area, ratio = height * width * (area_min + (1 - area_min) * area), (4 / 3) ** (2 * ratio - 1)
    size = torch.stack([(area / ratio).sqrt().round(), (area * ratio).sqrt().round()])  # (2, N, TRIES)
    whole = torch.tensor([height, width])
    fits = ((size >= 1) & (size <= whole[:, None, None])).all(0)
    size = size.gather(2, fits.int().argmax(1)[None, :, None].expand(2, -1, 1))[..., 0].T
    start = (corner * (whole - size + 1)).floor()
    central = torch.tensor([min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))])
    found = fits.any(1, keepdim=True)
    return torch.cat([start.where(found, (whole - central) // 2), size.where(found, central)], 1)


def resized_crop(x, boxes, size):
    """The boxes (N, 4) of the images x (N, 3, H, W), resized to (N, 3, size, size) as PIL's bilinear filter does it.
    Rows and columns are resized by a matrix product each: a triangle as wide as a pixel of the finer grid is coarse."""
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
    return (0.299 * red).add_(green, alpha=0.587).add_(blue, alpha=0.114)


def grayscale(x):
    return luminance(x).expand_as(x)


def color_jitter(x, factors, order):
    """x (N, 3, S, S) with brightness, contrast, saturation and hue changed by factors (N, 4, 1, 1, 1), in `order`."""
    for number in order:
        x = (brightness, contrast, saturation, hue)[number](x, factors[:, number])
    return x


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
