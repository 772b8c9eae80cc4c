"""Published numbers and layers, where a change would leave the other tests green."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import picture
from torchvision.transforms.functional import pil_to_tensor

from augment import RandomView
from loss import info_nce, proto_nce
from model import MoCo, build_encoder, deal_out


def make_model(**options):
    encoder = functools.partial(build_encoder, "resnet18_w4", small_images=True)
    return MoCo(encoder, dim=8, r=16, **options)


@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
def test_every_depth_has_torchvisions_layers(depth):
    with torch.device("meta"):
        theirs = getattr(torchvision.models, f"resnet{depth}")().state_dict()
        ours = build_encoder(f"resnet{depth}", num_classes=1000).state_dict()
    shapes = {name: value.shape for name, value in ours.items()}
    assert shapes == {name: value.shape for name, value in theirs.items()}


@pytest.mark.parametrize("small_images, kernel", [(True, 3), (False, 7)])
def test_the_first_convolution_starts_like_torchvisions(small_images, kernel):
    weight = build_encoder("resnet18", small_images=small_images).conv1.weight
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (64 * kernel**2)), rel=0.1)


def test_heads_are_mlps_with_a_relu_or_one_layer():
    pooled = torch.randn(5, 32)
    for encoder in (make_model().encoder_q, make_model().encoder_k):
        first, last = encoder.fc[0], encoder.fc[-1]
        assert first.weight.shape == (32, 32)
        hidden = (pooled @ first.weight.T + first.bias).clamp(min=0)
        torch.testing.assert_close(encoder.fc(pooled), hidden @ last.weight.T + last.bias)
    assert isinstance(make_model(mlp=False).encoder_q.fc, torch.nn.Linear)


def test_keys_are_dealt_out_in_another_order_in_each_step():
    orders = [tuple(deal_out(groups=4, size=8)[0].tolist()) for _ in range(5)]
    assert len(set(orders)) == 5


@pytest.mark.parametrize("name, chance", [("flip", 0.5), ("grayscale", 0.2)])
def test_views_are_flipped_and_grey_as_often_as_published(name, chance):
    n = 4000
    operations = {"color_jitter", "grayscale", "flip", "blur"}
    off = dict.fromkeys(operations - {name}, False)
    images = pil_to_tensor(picture(8, 8)).expand(n, -1, -1, -1)
    view = RandomView(8, crop=False, **off)
    plain = view(images[:1], torch.ones(1, RandomView.DRAWS))  # no draw is below its chance
    views = view(images, RandomView.draw(n, seed=0)[0])
    changed = (views != plain).flatten(1).any(1).sum().item()
    assert abs(changed - chance * n) < 5 * math.sqrt(chance * (1 - chance) * n)


def test_info_nce_has_a_gradient_for_the_keys():
    """The lab report's cluster head is trained by it alone."""
    q, k, queue = (F.normalize(torch.randn(n, 8), dim=1) for n in (5, 5, 9))
    k.requires_grad_()
    info_nce(q, k, queue.T, 0.2)[0].backward()
    assert (k.grad != 0).any(1).all()


@pytest.mark.parametrize("num_negatives", [1, 9])
def test_proto_nce_takes_16_bit_queries(num_negatives):
    q = F.normalize(torch.randn(5, 8), dim=1).bfloat16()
    prototypes = F.normalize(torch.randn(6, 8), dim=1)
    level = (torch.tensor([0, 1, 1, 4, 5]), prototypes, torch.full((6,), 0.2))
    losses = []
    for x in (q, q.float()):
        torch.manual_seed(0)
        losses.append(proto_nce(x, torch.arange(5), [level], num_negatives)[0])
    assert losses[0].dtype == torch.float32
    assert losses[0] == losses[1]
