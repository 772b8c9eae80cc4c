"""The batched augmentation against torchvision's augmentation of PIL images."""

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
from augment import Draws, RandomView, random_boxes, resized_crop

EIGHT_BIT = 1.2 / 255  # PIL rounds every result, and every product with a factor, to 8 bits


def tensor(image):
    """A PIL image as a float tensor (3, H, W) in 0 to 1."""
    return TF.pil_to_tensor(image).float() / 255


def copies_of(image, n):
    """A batch (n, 3, H, W) uint8 of one PIL image."""
    return TF.pil_to_tensor(image).expand(n, -1, -1, -1)


def random_pixels(n, size):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (n, 3, size, size), dtype=torch.uint8, generator=generator)


def draws_of_one_view(n, seed=0):
    return RandomView.draw(n, seed)[0]


# -- single operations


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_colour_operations_match_pil(name):
    image = picture()
    factors = [0.6, 0.93, 1.4]
    our_operation = getattr(augment, name)
    their_operation = getattr(TF, f"adjust_{name}")
    batch = tensor(image).expand(3, -1, -1, -1)
    ours = our_operation(batch, torch.tensor(factors)[:, None, None, None])
    for x, factor in zip(ours, factors, strict=True):
        theirs = tensor(their_operation(image, factor))
        torch.testing.assert_close(x, theirs, atol=EIGHT_BIT, rtol=0)


def test_hue_matches_torchvision():
    """Compare on tensors: PIL stores hue in 8 bits, torchvision's tensors do not."""
    image = tensor(picture())
    turns = [-0.4, -0.1, 0.0, 0.07, 0.5]
    batch = image.expand(5, -1, -1, -1)
    ours = augment.hue(batch, torch.tensor(turns)[:, None, None, None])
    for x, turn in zip(ours, turns, strict=True):
        torch.testing.assert_close(x, TF.adjust_hue(image, turn), atol=1e-4, rtol=0)


def test_hue_leaves_grey_unchanged():
    grey = torch.full((1, 3, 2, 2), 0.4)
    turn = torch.full((1, 1, 1, 1), 0.3)
    torch.testing.assert_close(augment.hue(grey, turn), grey)


@pytest.mark.parametrize("size", [8, 32, 64])
@pytest.mark.parametrize("box", [(0, 0, 40, 48), (3, 5, 20, 31), (7, 2, 9, 8), (39, 47, 1, 1)])
def test_resized_crop_matches_pil(box, size):
    image = picture()
    ours = resized_crop(tensor(image)[None], torch.tensor([box]), size)[0]
    theirs = tensor(TF.resized_crop(image, *box, [size, size]))
    torch.testing.assert_close(ours, theirs, atol=EIGHT_BIT, rtol=0)


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0])
def test_blur_is_close_to_pils_approximation_by_boxes(sigma):
    image = picture(64, 64)
    ours = augment.gaussian_blur(tensor(image)[None], torch.tensor([sigma]))[0]
    theirs = tensor(image.filter(ImageFilter.GaussianBlur(sigma)))
    torch.testing.assert_close(ours, theirs, atol=3 / 255, rtol=0)


@pytest.mark.parametrize(
    "height, width, area_min",
    [(32, 32, 0.2), (8, 8, 0.5), (40, 60, 0.2), (10, 50, 0.2), (9, 9, 1.0)],
)
def test_boxes_have_the_distribution_of_torchvisions(height, width, area_min):
    n = 6000
    draws = Draws.split(draws_of_one_view(n, seed=1))
    ours = random_boxes(draws, height, width, area_min)

    torch.manual_seed(2)
    image = torch.zeros(3, height, width)
    scale = (area_min, 1.0)
    ratio = (3 / 4, 4 / 3)
    boxes = [T.RandomResizedCrop.get_params(image, scale, ratio) for _ in range(n)]
    theirs = torch.tensor(boxes).float()

    # our boxes are whole pixels inside the image
    assert (ours == ours.round()).all()
    assert (ours >= 0).all()
    assert (ours[:, 2:] >= 1).all()
    assert (ours[:, 0] + ours[:, 2] <= height).all()
    assert (ours[:, 1] + ours[:, 3] <= width).all()

    # top, left, height and width: the same tails, mean and deviation
    for tail in (0.002, 0.998):
        assert ((ours.quantile(tail, 0) - theirs.quantile(tail, 0)).abs() <= 1).all()
    for a, b in zip(ours.T, theirs.T, strict=True):
        assert abs(a.mean() - b.mean()) < 5 * b.std() * math.sqrt(2 / n) + 1e-6
        assert abs(a.std() - b.std()) < 0.05 * b.std() + 1e-6

    # areas: Kolmogorov-Smirnov test at 0.1 %
    our_areas = (ours[:, 2] * ours[:, 3]).sort().values
    their_areas = (theirs[:, 2] * theirs[:, 3]).sort().values
    thresholds = their_areas.unique()
    our_share = torch.searchsorted(our_areas, thresholds) / n
    their_share = torch.searchsorted(their_areas, thresholds) / n
    assert (our_share - their_share).abs().max() < 1.95 * math.sqrt(2 / n)


# -- whole views


SETTINGS = {
    "aug-plus": {},
    "crop and flip": {"blur": False, "color_jitter": False, "grayscale": False},
    "jitter": {"crop_min": 1.0, "blur": False, "flip": False, "grayscale": False},
    "MoCo v1": {"aug_plus": False},
}


def random_pil_blur(image):
    sigma = 0.1 + 1.9 * torch.rand(()).item()
    return image.filter(ImageFilter.GaussianBlur(sigma))


def pil_view(
    size, aug_plus=True, crop_min=0.2, color_jitter=True, grayscale=True, blur=True, flip=True
):
    """The published augmentation, written with torchvision's transforms of PIL images."""
    colour = []
    if color_jitter and aug_plus:
        colour.append(T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8))
    elif color_jitter:
        colour.append(T.ColorJitter(0.4, 0.4, 0.4, 0.4))
    if grayscale:
        colour.append(T.RandomGrayscale(0.2))
    if not aug_plus:
        colour.reverse()  # MoCo v1 converts to grayscale first

    transforms = [T.RandomResizedCrop(size, scale=(crop_min, 1.0)), *colour]
    if blur and aug_plus:
        transforms.append(T.RandomApply([T.Lambda(random_pil_blur)], p=0.5))
    if flip:
        transforms.append(T.RandomHorizontalFlip())
    transforms.append(T.ToTensor())
    transforms.append(T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return T.Compose(transforms)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_views_have_the_distribution_of_torchvisions(settings):
    n = 3000
    size = 12
    image = picture(16, 16)
    ours = RandomView(size, **settings)(copies_of(image, n), draws_of_one_view(n))
    torch.manual_seed(3)
    transform = pil_view(size, **settings)
    theirs = torch.stack([transform(image) for _ in range(n)])
    assert_same_distribution(ours, theirs)
    assert ours.is_contiguous(memory_format=torch.channels_last)


def test_a_batch_has_one_order_of_colour_operations_and_all_orders_are_equally_likely(monkeypatch):
    """Each operation appends its number to the pixels, so that a view tells the order."""

    def append(number):
        return lambda x, factor: 10 * x + number

    for number, name in enumerate(("brightness", "contrast", "saturation", "hue"), 1):
        monkeypatch.setattr(augment, name, append(number))
    monkeypatch.setattr(augment, "normalize", lambda x: x)
    # MoCo v1 jitters every image
    view = RandomView(1, aug_plus=False, grayscale=False, blur=False, crop=False)
    black = torch.zeros(3, 2, 3, 1, 1, dtype=torch.uint8)

    counts = Counter()
    for seed in range(2400):
        views = torch.cat(view.two_views(black, RandomView.draw(3, seed)))
        (order,) = views.unique().tolist()  # one value for all pixels of all views
        counts[f"{order:.0f}"] += 1
    assert counts.keys() == {"".join(order) for order in itertools.permutations("1234")}
    assert max(abs(count - 100) for count in counts.values()) < 5 * math.sqrt(100)


@pytest.mark.parametrize("aug_plus", [True, False])
def test_moco_v1_converts_to_grayscale_before_the_jitter(monkeypatch, aug_plus):
    colourfulness = []

    def saturation(x, factor):
        colourfulness.append(x.std(1).max().item())
        return x

    monkeypatch.setattr(augment, "saturation", saturation)
    view = RandomView(16, aug_plus=aug_plus, blur=False)
    view.chances["grayscale"] = 1.0  # convert every image to grayscale
    view(copies_of(picture(16, 16), 50), draws_of_one_view(50))
    assert (max(colourfulness) > 0.1) == aug_plus


def test_every_view_has_its_own_parameters():
    view = RandomView(8, aug_plus=False)
    views = view(copies_of(picture(8, 8), 2000), draws_of_one_view(2000))
    assert len(views.flatten(1).unique(dim=0)) == 2000


@pytest.mark.parametrize("aug_plus, p, hue", [(True, 0.8, 0.1), (False, 1.0, 0.4)])
def test_factors_are_uniform_in_the_published_ranges(monkeypatch, aug_plus, p, hue):
    n = 4000
    ranges = {
        "brightness": (0.6, 1.4),
        "contrast": (0.6, 1.4),
        "saturation": (0.6, 1.4),
        "hue": (-hue, hue),
    }
    if aug_plus:
        ranges["gaussian_blur"] = (0.1, 2.0)

    # replace each operation by one that records its factors
    recorded = {}

    def recorder(name):
        def operation(x, factor):
            recorded.setdefault(name, []).append(factor.flatten())
            return x

        return operation

    for name in ("brightness", "contrast", "saturation", "hue", "gaussian_blur"):
        monkeypatch.setattr(augment, name, recorder(name))
    black = torch.zeros(n, 3, 8, 8, dtype=torch.uint8)
    RandomView(8, aug_plus=aug_plus)(black, draws_of_one_view(n))

    assert recorded.keys() == ranges.keys()
    for name, (low, high) in ranges.items():
        factors = torch.cat(recorded[name]).sort().values
        uniform = (factors - low) / (high - low)
        expected = 0.5 * n if name == "gaussian_blur" else p * n
        assert abs(len(uniform) - expected) < 5 * math.sqrt(n / 4)
        assert uniform[0] >= -1e-6
        assert uniform[-1] <= 1 + 1e-6
        # Kolmogorov-Smirnov test at 0.1 %
        gap = (uniform - torch.linspace(0, 1, len(uniform))).abs().max()
        assert gap < 1.95 / math.sqrt(len(uniform))


def test_a_subclass_can_change_the_strength_of_the_jitter():
    class NoJitter(RandomView):
        def __post_init__(self):
            super().__post_init__()
            self.jitter = 0 * self.jitter

    pixels = random_pixels(12, 9)
    draws = draws_of_one_view(12)
    ours = NoJitter(8)(pixels, draws)
    without = RandomView(8, color_jitter=False)(pixels, draws)
    torch.testing.assert_close(ours, without, atol=1e-5, rtol=1e-5)


def test_a_view_depends_only_on_its_own_draws():
    """Views are the same in any batch, and with any number of ranks that share a batch."""
    view = RandomView(8)
    draws = draws_of_one_view(12)
    pixels = random_pixels(12, 9)
    whole = view(pixels, draws)
    for part in (slice(0, 12, 2), slice(1, 12, 2), slice(3, 4)):
        views = view(pixels[part], draws[part])
        torch.testing.assert_close(views, whole[part], atol=1e-5, rtol=1e-5)


def test_draws_follow_from_the_seed():
    draws = RandomView.draw(6, seed=1)
    assert torch.equal(draws, RandomView.draw(6, seed=1))
    assert not torch.equal(draws, RandomView.draw(6, seed=2))


def assert_two_views_are(view, images, query_images, key_images):
    """Check that two_views(images) are the views of these two batches, each with its own draws."""
    draws = RandomView.draw(6, seed=1)
    im_q, im_k = view.two_views(images, draws)
    torch.testing.assert_close(im_q, view(query_images, draws[0]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(im_k, view(key_images, draws[1]), atol=1e-5, rtol=1e-5)


def test_two_views_of_whole_images():
    pixels = random_pixels(6, 9)
    assert_two_views_are(RandomView(9), pixels, pixels, pixels)


def test_two_views_of_cropped_images_take_the_first_crop_as_query_and_the_second_as_key():
    query_crops = random_pixels(6, 9)
    key_crops = query_crops.flip(0)
    crops = torch.stack([query_crops, key_crops], 1)
    assert_two_views_are(RandomView(9, crop=False), crops, query_crops, key_crops)
