"""The batched augmentation against torchvision's on PIL images; images in memory against images read as needed."""

import math

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from conftest import TINY, run
from PIL import Image, ImageFilter
from torch.utils.data import DataLoader
from torchvision import transforms as T

import data
from data import MEAN, STD, RandomView, as_it_is, build_datasets, random_boxes, resized_crop

EIGHT_BIT = 1.2 / 255  # PIL rounds every result, and every factor's product, to 8 bits


def picture(width=48, height=40, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.BICUBIC)


def tensor(image):
    return TF.pil_to_tensor(image).float() / 255


def uniforms(n, seed=0):
    return torch.rand(n, RandomView.DRAWS, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_colour_operations_are_those_of_pil(name):
    image, factors = picture(), [0.6, 0.93, 1.4]
    ours = getattr(data, name)(tensor(image).expand(3, -1, -1, -1), torch.tensor(factors)[:, None, None, None])
    for x, factor in zip(ours, factors, strict=True):
        theirs = tensor(getattr(TF, f"adjust_{name}")(image, factor))
        torch.testing.assert_close(x, theirs, atol=EIGHT_BIT, rtol=0)


def test_hue_turns_as_in_torchvision():
    """PIL's own hue has 8 bits; torchvision's on tensors has not."""
    image, turns = tensor(picture()), [-0.4, -0.1, 0.0, 0.07, 0.5]
    ours = data.hue(image.expand(5, -1, -1, -1), torch.tensor(turns)[:, None, None, None])
    for x, turn in zip(ours, turns, strict=True):
        torch.testing.assert_close(x, TF.adjust_hue(image, turn), atol=1e-4, rtol=0)
    grey = torch.full((1, 3, 2, 2), 0.4)
    torch.testing.assert_close(data.hue(grey, torch.full((1, 1, 1, 1), 0.3)), grey)


@pytest.mark.parametrize("size", [8, 32, 64])
@pytest.mark.parametrize("box", [(0, 0, 40, 48), (3, 5, 20, 31), (7, 2, 9, 8), (39, 47, 1, 1)])
def test_a_crop_is_resized_as_by_pil(box, size):
    image = picture()
    ours = resized_crop(tensor(image)[None], torch.tensor([box]), size)[0]
    torch.testing.assert_close(ours, tensor(TF.resized_crop(image, *box, [size, size])), atol=EIGHT_BIT, rtol=0)


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0])
def test_blur_is_pils_which_approximates_a_gaussian_by_boxes(sigma):
    image = picture(64, 64)
    ours = data.gaussian_blur(tensor(image)[None], torch.tensor([sigma]))[0]
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
    "aug-plus": {"crop_min": 0.2, "blur": True, "flip": True},
    "crop and flip": {"crop_min": 0.2, "blur": False, "flip": True, "color_jitter": False, "grayscale": False},
    "jitter": {"crop_min": 1.0, "blur": False, "flip": False, "grayscale": False},
    "MoCo v1": {"crop_min": 0.2, "blur": True, "flip": True, "aug_plus": False},
}


def pil_view(size, aug_plus=True, *, crop_min, color_jitter=True, grayscale=True, blur, flip):
    """The same augmentation written with torchvision's transforms of PIL images."""
    jitter = T.ColorJitter(0.4, 0.4, 0.4, 0.1 if aug_plus else 0.4)
    blurred = T.Lambda(lambda x: x.filter(ImageFilter.GaussianBlur(0.1 + 1.9 * torch.rand(()).item())))
    return T.Compose(
        [T.RandomResizedCrop(size, scale=(crop_min, 1.0))]
        + color_jitter * [T.RandomApply([jitter], p=0.8 if aug_plus else 1.0)]
        + grayscale * [T.RandomGrayscale(p=0.2)]
        + (blur and aug_plus) * [T.RandomApply([blurred], p=0.5)]
        + flip * [T.RandomHorizontalFlip()]
        + [T.ToTensor(), T.Normalize(MEAN, STD)]
    )


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_views_have_the_moments_of_torchvisions(settings):
    n, size, image = 3000, 12, picture(16, 16)
    pixels = TF.pil_to_tensor(image).expand(n, -1, -1, -1)
    ours = RandomView(size, **settings)(pixels, uniforms(n), crop=True)
    torch.manual_seed(3)
    transform = pil_view(size, **settings)
    theirs = torch.stack([transform(image) for _ in range(n)])
    assert ours.shape == theirs.shape and ours.is_contiguous(memory_format=torch.channels_last)
    for a, b in zip(statistics_of(ours), statistics_of(theirs), strict=True):
        error = ((a.var(0) + b.var(0)) / n).sqrt()
        assert ((a.mean(0) - b.mean(0)).abs() < 5 * error + 0.02).all()
        assert ((a.std(0) - b.std(0)).abs() < 0.1 * b.std(0) + 0.02).all()
        for tail in (0.05, 0.95) if a.shape[1] == 3 else ():  # a pixel's distribution has gaps
            assert ((a.quantile(tail, 0) - b.quantile(tail, 0)).abs() < 0.25).all()  # of a scale that spans 4.4


def statistics_of(x):
    """Of each view: its pixels; the mean of each channel; contrast, colourfulness and sharpness."""
    yield x.flatten(1)[:, ::7]
    yield x.mean((2, 3))
    differences = [x.flatten(1).std(1), (x[:, 0] - x[:, 1]).abs().mean((1, 2)), x.diff(dim=3).abs().mean((1, 2, 3))]
    yield torch.stack(differences, 1)


def test_every_view_has_parameters_of_its_own_and_every_order_occurs():
    names, seen = ("brightness", "contrast", "saturation", "hue"), []
    view = RandomView(8, aug_plus=False, crop_min=0.2, blur=False, flip=True)  # with jitter every time
    u = uniforms(2000)
    pixels = TF.pil_to_tensor(picture(8, 8)).expand(2000, -1, -1, -1)
    assert len({tuple(x.flatten().tolist()) for x in view(pixels, u, crop=True)}) == 2000
    turns = u[:, 2 * RandomView.TRIES + 6 : 2 * RandomView.TRIES + 10].argsort(1)
    for order in turns.tolist():
        seen.append(tuple(names[i] for i in order))
    counts = np.unique(seen, axis=0, return_counts=True)[1]
    assert len(counts) == 24 and counts.min() > 2000 / 24 / 2


@pytest.mark.parametrize("aug_plus, p, hue", [(True, 0.8, 0.1), (False, 1.0, 0.4)])
def test_factors_are_uniform_in_the_published_ranges(monkeypatch, aug_plus, p, hue):
    n, seen = 4000, {}
    for name in ("brightness", "contrast", "saturation", "hue", "gaussian_blur"):
        monkeypatch.setattr(data, name, lambda x, f, name=name: seen.setdefault(name, []).append(f.flatten()) or x)
    view = RandomView(8, aug_plus=aug_plus, crop_min=0.2, blur=True, flip=True)
    view(torch.zeros(n, 3, 8, 8, dtype=torch.uint8), uniforms(n), crop=True)
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
    view, u = RandomView(8, crop_min=0.2, blur=True, flip=True), uniforms(12)
    pixels = torch.randint(256, (12, 3, 9, 9), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    whole = view(pixels, u, crop=True)
    for part in (slice(0, 12, 2), slice(1, 12, 2), slice(3, 4)):
        torch.testing.assert_close(view(pixels[part], u[part], crop=True), whole[part], atol=1e-5, rtol=1e-5)


def batch_of(datasets, images, n=8):
    return next(iter(DataLoader(images, n, collate_fn=as_it_is)))


def test_kept_in_memory_and_read_as_needed_are_the_same_images(folder):
    for image_size in (None, 6):
        kept, read = build_datasets(str(folder), image_size), build_datasets(str(folder), image_size)
        assert kept.keep("cpu") and kept.train.pixels.shape == (48, 3, 10, 12)
        for a, b in ((kept.plain, read.plain), (kept.val, read.val)):
            (x, i), (y, j) = batch_of(kept, a), batch_of(read, b)
            assert torch.equal(x, y) and torch.equal(i, j)
        whole, _ = batch_of(kept, kept.train)
        crops, _ = batch_of(read, read.train)
        draws = torch.rand(2, 8, RandomView.DRAWS)
        for a, b in zip(kept.two_views(whole, draws), read.two_views(crops, draws), strict=True):
            assert a.shape == b.shape == (8, 3, kept.image_size, kept.image_size)


def test_images_that_differ_in_size_or_are_too_many_are_not_kept(folder, mixed, monkeypatch):
    assert not build_datasets(str(mixed)).keep("cpu")
    monkeypatch.setattr(data, "MEMORY", 48 * 3 * 10 * 12)
    datasets = build_datasets(str(folder))
    assert not datasets.keep("cpu") and datasets.train.pixels is None and datasets.plain.pixels is None


def test_a_folder_read_as_needed_trains(mixed, tmp_path, capsys):
    log = run(mixed, *TINY, "--epochs", 2, "--warmup", 1, "--exp-dir", tmp_path)
    assert "read as needed" in capsys.readouterr().out and np.isfinite(log[-1]["loss"])
