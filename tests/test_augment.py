"""The batched augmentation against torchvision's on PIL images."""

import itertools
import math
from collections import Counter

import pytest
import torch
import torchvision.transforms.functional as TF
from conftest import assert_same_distribution, picture
from PIL import ImageFilter
from torchvision import transforms as T

import augment
from augment import RandomView, random_boxes, resized_crop

EIGHT_BIT = 1.2 / 255  # PIL rounds every result, and every factor's product, to 8 bits


def tensor(image):
    return TF.pil_to_tensor(image).float() / 255


def uniforms(n, seed=0):
    return RandomView.draw(n, seed)[0]


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_colour_operations_are_those_of_pil(name):
    image, factors = picture(), [0.6, 0.93, 1.4]
    ours = getattr(augment, name)(tensor(image).expand(3, -1, -1, -1), torch.tensor(factors)[:, None, None, None])
    for x, factor in zip(ours, factors, strict=True):
        theirs = tensor(getattr(TF, f"adjust_{name}")(image, factor))
        torch.testing.assert_close(x, theirs, atol=EIGHT_BIT, rtol=0)


def test_hue_turns_as_in_torchvision():
    """PIL's own hue has 8 bits; torchvision's on tensors has not."""
    image, turns = tensor(picture()), [-0.4, -0.1, 0.0, 0.07, 0.5]
    ours = augment.hue(image.expand(5, -1, -1, -1), torch.tensor(turns)[:, None, None, None])
    for x, turn in zip(ours, turns, strict=True):
        torch.testing.assert_close(x, TF.adjust_hue(image, turn), atol=1e-4, rtol=0)
    grey = torch.full((1, 3, 2, 2), 0.4)
    torch.testing.assert_close(augment.hue(grey, torch.full((1, 1, 1, 1), 0.3)), grey)


@pytest.mark.parametrize("size", [8, 32, 64])
@pytest.mark.parametrize("box", [(0, 0, 40, 48), (3, 5, 20, 31), (7, 2, 9, 8), (39, 47, 1, 1)])
def test_a_crop_is_resized_as_by_pil(box, size):
    image = picture()
    ours = resized_crop(tensor(image)[None], torch.tensor([box]), size)[0]
    torch.testing.assert_close(ours, tensor(TF.resized_crop(image, *box, [size, size])), atol=EIGHT_BIT, rtol=0)


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0])
def test_blur_is_pils_which_approximates_a_gaussian_by_boxes(sigma):
    image = picture(64, 64)
    ours = augment.gaussian_blur(tensor(image)[None], torch.tensor([sigma]))[0]
    theirs = tensor(image.filter(ImageFilter.GaussianBlur(sigma)))
    torch.testing.assert_close(ours, theirs, atol=3 / 255, rtol=0)


@pytest.mark.parametrize(
    "height, width, area_min", [(32, 32, 0.2), (8, 8, 0.5), (40, 60, 0.2), (10, 50, 0.2), (9, 9, 1.0)]
)
def test_boxes_are_distributed_as_torchvisions(height, width, area_min):
    n = 6000
    u = torch.rand(n, 2 * RandomView.TRIES + 2, generator=torch.Generator().manual_seed(1))
    ours = random_boxes(u, height, width, area_min)
    torch.manual_seed(2)
    image = torch.zeros(3, height, width)
    ratio = (3 / 4, 4 / 3)
    theirs = torch.tensor([T.RandomResizedCrop.get_params(image, (area_min, 1.0), ratio) for _ in range(n)]).float()
    assert (ours == ours.round()).all() and (ours >= 0).all() and (ours[:, 2:] >= 1).all()
    assert (ours[:, 0] + ours[:, 2] <= height).all() and (ours[:, 1] + ours[:, 3] <= width).all()
    for tail in (0.002, 0.998):
        assert ((ours.quantile(tail, 0) - theirs.quantile(tail, 0)).abs() <= 1).all()
    for a, b in zip(ours.T, theirs.T, strict=True):  # all four numbers, and below the crop's area
        assert abs(a.mean() - b.mean()) < 5 * b.std() * math.sqrt(2 / n) + 1e-6
        assert abs(a.std() - b.std()) < 0.05 * b.std() + 1e-6
    areas = [(x[:, 2] * x[:, 3]).sort().values for x in (ours, theirs)]
    below = [torch.searchsorted(x, areas[1].unique()) / n for x in areas]
    largest_gap = (below[0] - below[1]).abs().max()
    assert largest_gap < 1.95 * math.sqrt(2 / n)  # Kolmogorov-Smirnov, at 0.1 %


SETTINGS = {
    "aug-plus": {},
    "crop and flip": {"blur": False, "color_jitter": False, "grayscale": False},
    "jitter": {"crop_min": 1.0, "blur": False, "flip": False, "grayscale": False},
    "MoCo v1": {"aug_plus": False},
}


def pil_view(size, aug_plus=True, crop_min=0.2, color_jitter=True, grayscale=True, blur=True, flip=True):
    """The published augmentation, written with torchvision's transforms of PIL images."""
    jitter = T.ColorJitter(0.4, 0.4, 0.4, 0.1 if aug_plus else 0.4)
    blurred = T.Lambda(lambda x: x.filter(ImageFilter.GaussianBlur(0.1 + 1.9 * torch.rand(()).item())))
    colour = [
        *color_jitter * [T.RandomApply([jitter], 0.8 if aug_plus else 1.0)],
        *grayscale * [T.RandomGrayscale(0.2)],
    ]
    colour = colour if aug_plus else colour[::-1]  # MoCo v1 drops the colour first
    return T.Compose(
        [T.RandomResizedCrop(size, scale=(crop_min, 1.0))]
        + colour
        + (blur and aug_plus) * [T.RandomApply([blurred], p=0.5)]
        + flip * [T.RandomHorizontalFlip()]
        + [T.ToTensor(), T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    )


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_views_have_the_moments_of_torchvisions(settings):
    n, size, image = 3000, 12, picture(16, 16)
    pixels = TF.pil_to_tensor(image).expand(n, -1, -1, -1)
    ours = RandomView(size, **settings)(pixels, uniforms(n))
    torch.manual_seed(3)
    transform = pil_view(size, **settings)
    assert_same_distribution(ours, torch.stack([transform(image) for _ in range(n)]))
    assert ours.is_contiguous(memory_format=torch.channels_last)


def test_a_batch_has_one_order_of_colour_operations_and_every_order_is_as_likely(monkeypatch):
    """An operation appends its number to each pixel, so that a view tells the order in which they came."""
    for number, name in enumerate(("brightness", "contrast", "saturation", "hue"), 1):
        monkeypatch.setattr(augment, name, lambda x, _, number=number: 10 * x + number)
    monkeypatch.setattr(augment, "normalize", lambda x: x)
    view = RandomView(1, aug_plus=False, grayscale=False, blur=False, crop=False)  # with jitter every time
    counts, black = Counter(), torch.zeros(3, 2, 3, 1, 1, dtype=torch.uint8)
    for seed in range(2400):
        (order,) = torch.cat(view.two_views(black, RandomView.draw(3, seed))).unique().tolist()
        counts[f"{order:.0f}"] += 1
    assert counts.keys() == set(map("".join, itertools.permutations("1234")))
    assert max(abs(count - 100) for count in counts.values()) < 5 * math.sqrt(100)


@pytest.mark.parametrize("aug_plus", [True, False])
def test_moco_v1_drops_the_colour_before_the_jitter(monkeypatch, aug_plus):
    colours = []
    monkeypatch.setattr(augment, "saturation", lambda x, _: colours.append(x.std(1).max().item()) or x)
    view = RandomView(16, aug_plus=aug_plus, blur=False)
    view.chances[1] = 1  # of grey
    view(TF.pil_to_tensor(picture(16, 16)).expand(50, -1, -1, -1), uniforms(50))
    assert (max(colours) > 0.1) == aug_plus


def test_every_view_has_parameters_of_its_own():
    view = RandomView(8, aug_plus=False)
    pixels = TF.pil_to_tensor(picture(8, 8)).expand(2000, -1, -1, -1)
    assert len(view(pixels, uniforms(2000)).flatten(1).unique(dim=0)) == 2000


@pytest.mark.parametrize("aug_plus, p, hue", [(True, 0.8, 0.1), (False, 1.0, 0.4)])
def test_factors_are_uniform_in_the_published_ranges(monkeypatch, aug_plus, p, hue):
    n, seen = 4000, {}
    for name in ("brightness", "contrast", "saturation", "hue", "gaussian_blur"):
        monkeypatch.setattr(augment, name, lambda x, f, name=name: seen.setdefault(name, []).append(f.flatten()) or x)
    RandomView(8, aug_plus=aug_plus)(torch.zeros(n, 3, 8, 8, dtype=torch.uint8), uniforms(n))
    ranges = dict.fromkeys(("brightness", "contrast", "saturation"), (0.6, 1.4)) | {"hue": (-hue, hue)}
    ranges |= {"gaussian_blur": (0.1, 2.0)} if aug_plus else {}
    assert seen.keys() == ranges.keys()
    for name, (low, high) in ranges.items():
        factors = (torch.cat(seen[name]).sort().values - low) / (high - low)
        expected = n * (0.5 if name == "gaussian_blur" else p)
        assert abs(len(factors) - expected) < 5 * math.sqrt(n / 4) and factors[0] >= -1e-6 and factors[-1] <= 1 + 1e-6
        gap = (factors - torch.linspace(0, 1, len(factors))).abs().max()
        assert gap < 1.95 / math.sqrt(len(factors))  # Kolmogorov-Smirnov, at 0.1 %


def test_a_view_depends_on_its_own_numbers_alone():
    """So that views are the same whatever the batch they are in, and however many ranks share it."""
    view, u = RandomView(8), uniforms(12)
    pixels = torch.randint(256, (12, 3, 9, 9), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    whole = view(pixels, u)
    for part in (slice(0, 12, 2), slice(1, 12, 2), slice(3, 4)):
        torch.testing.assert_close(view(pixels[part], u[part]), whole[part], atol=1e-5, rtol=1e-5)


def test_two_views_are_one_of_each_draw():
    """Of whole images; of images that come cropped, the first crop is the query's and the second the key's."""
    draws = RandomView.draw(6, seed=1)
    assert torch.equal(draws, RandomView.draw(6, 1)) and not torch.equal(draws, RandomView.draw(6, 2))
    whole = torch.randint(256, (6, 3, 9, 9), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    crops = torch.stack([whole, whole.flip(0)], 1)
    for images, pair, crop in ((whole, (whole, whole), True), (crops, (whole, whole.flip(0)), False)):
        view = RandomView(9, crop=crop)
        for ours, x, u in zip(view.two_views(images, draws), pair, draws, strict=True):
            torch.testing.assert_close(ours, view(x, u), atol=1e-5, rtol=1e-5)
