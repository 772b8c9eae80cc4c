"""The model: encoders, key branch, batch-norm groups, queue and heads."""

import functools

import pytest
import torch
import torch.nn.functional as F
import torchvision

from cluster import run_kmeans
from loss import info_nce, proto_nce
from model import MoCo, SplitBatchNorm2d, build_encoder, move_running_statistics


def make_model(**options):
    """A small MoCo, the same on each call."""
    torch.manual_seed(0)
    encoder = functools.partial(build_encoder, "resnet18_w4", small_images=True)
    return MoCo(encoder, **({"dim": 8, "r": 16} | options))


def drifting_images(n):
    """Random images (n, 3, 5, 5) whose mean rises by 1 from image to image."""
    return 2 * torch.randn(n, 3, 5, 5) + torch.arange(float(n))[:, None, None, None]


# -- encoders --------------------------------------------------------------------------------------
@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_full_width_is_torchvision(arch):
    theirs = getattr(torchvision.models, arch)().state_dict()
    ours = build_encoder(arch, num_classes=1000).state_dict()
    shapes = {name: value.shape for name, value in ours.items()}
    assert shapes == {name: value.shape for name, value in theirs.items()}


@pytest.mark.parametrize("arch", ["resnet19", "resnet18_w", "resnet18_w0", "vgg15"])
def test_unknown_arch(arch):
    with pytest.raises(ValueError, match="unknown arch"):
        build_encoder(arch)


# -- batch norm in groups --------------------------------------------------------------------------
def test_split_batch_norm_normalises_each_group_alone():
    norm = SplitBatchNorm2d(3, num_splits=4)
    x = torch.randn(12, 3, 4, 4) + torch.arange(12.0)[:, None, None, None]
    groups = norm(x).view(4, -1, 3, 16)
    for group in groups.permute(0, 2, 1, 3).flatten(2):  # (3, values) each
        mean = group.mean(1)
        deviation = group.std(1, unbiased=False)
        torch.testing.assert_close(mean, torch.zeros(3), atol=1e-5, rtol=0)
        torch.testing.assert_close(deviation, torch.ones(3), atol=1e-3, rtol=0)


def test_running_statistics_become_those_of_the_groups():
    """All groups are alike here. In eval mode the running statistics normalise any batch."""
    norm = SplitBatchNorm2d(3, num_splits=4)
    group = 3 * torch.randn(4, 3, 5, 5) + torch.arange(3.0)[:, None, None]
    for _ in range(200):
        norm(group.repeat(4, 1, 1, 1))
        move_running_statistics([norm])
    mean = group.mean((0, 2, 3))
    variance = group.var((0, 2, 3))
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_var, variance)

    norm.eval()
    x = torch.randn(1, 3, 2, 2)
    expected = (x - mean[:, None, None]) / (variance + 1e-5).sqrt()[:, None, None]
    torch.testing.assert_close(norm(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("splits", [1, 4])
def test_running_statistics_move_once_a_step_by_the_mean_of_the_groups(splits):
    x = drifting_images(12)
    norm = SplitBatchNorm2d(3, splits)
    other = SplitBatchNorm2d(3, splits)  # with another number of values behind each mean
    norm(x)
    other(x[..., :2])
    move_running_statistics([other, norm])

    groups = x.view(splits, -1, 3, 5, 5)
    mean = groups.mean((1, 3, 4)).mean(0)
    variance = groups.var((1, 3, 4)).mean(0)
    torch.testing.assert_close(norm.running_mean, 0.1 * mean)
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * variance)
    assert norm.num_batches_tracked == 1


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_groups_and_their_gradients_are_those_of_one_batch_norm_per_group(splits, dtype):
    torch.manual_seed(0)
    x = torch.randn(12, 5, 4, 3).to(dtype, memory_format=torch.channels_last)
    loss_weight = torch.randn_like(x)
    norm = SplitBatchNorm2d(5, num_splits=splits)
    torch.nn.init.uniform_(norm.weight)

    def by_torch(x):
        groups = x.chunk(splits)
        return torch.cat(
            [F.batch_norm(group, None, None, norm.weight, norm.bias, True) for group in groups]
        )

    results = []
    for function in (by_torch, norm):
        norm.zero_grad()
        inputs = x.clone().requires_grad_()
        y = function(inputs)
        (y * loss_weight).sum().backward()
        assert y.is_contiguous(memory_format=torch.channels_last)
        results.append((y, inputs.grad, norm.weight.grad, norm.bias.grad))
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-4)


# -- keys and queue --------------------------------------------------------------------------------
def test_a_keys_group_shares_as_few_images_as_possible_with_its_querys():
    """They share n / groups images, the key's own among them."""
    n = 32
    splits = 4
    size = n // splits
    model = make_model(bn_splits=splits)
    share, own_rows = model.batch_shuffle(torch.arange(n))
    assert torch.equal(share[own_rows], torch.arange(n))

    key_groups = share.view(splits, size).tolist()
    for i in range(n):
        first = i // size * size
        query_group = set(range(first, first + size))
        key_group = set(key_groups[own_rows[i] // size])
        assert i in key_group
        assert len(query_group & key_group) == size // splits


def test_each_query_gets_the_key_of_its_own_image():
    """With equal encoders, and with batch norm that ignores the batch, the two are the same."""
    model = make_model(bn_splits=4).eval()
    x = torch.randn(32, 3, 8, 8)
    q, k, _, _ = model(x, x)
    torch.testing.assert_close(q, k)


def test_momentum_update_follows_its_formula():
    model = make_model(m=0.9)
    with torch.no_grad():
        for p in model.encoder_q.parameters():
            p.add_(torch.randn_like(p))
    pairs = zip(model.encoder_k.parameters(), model.encoder_q.parameters(), strict=True)
    expected = [0.9 * k + 0.1 * q for k, q in pairs]
    queue = model.queue.clone()
    model.momentum_update_key_encoder()
    for wanted, found in zip(expected, model.encoder_k.parameters(), strict=True):
        torch.testing.assert_close(wanted, found)
    assert torch.equal(queue, model.queue)


@pytest.mark.parametrize("sizes", [[1] * 7, [5] * 7, [16] * 7, [23] * 7, [23, 5, 7, 20, 3]])
def test_queue_takes_any_batch_and_keeps_the_latest_keys(sizes):
    model = make_model(r=16)
    seen = []
    for n in sizes:
        k = torch.randn(n, 8)
        model.dequeue_and_enqueue(k)
        seen += k.tolist()
    latest = {tuple(key) for key in seen[-16:]}
    queue = {tuple(key) for key in model.queue.T.tolist()}
    assert len(queue & latest) == min(16, len(seen))


# -- heads -----------------------------------------------------------------------------------------
def test_heads_and_their_gradients():
    x = torch.randn(8, 3, 8, 8)
    expected = {"none": {"encoder_q"}, "report": {"encoder_q", "v"}}
    for head, trained in expected.items():
        model = make_model(cluster_head=head)
        q, k, c, features = model(x, x, clustering=True)
        for y in (q, k, c, features):
            assert y.dtype == torch.float32
            torch.testing.assert_close(y.norm(dim=1), torch.ones(8))
        assert c is q  # there is no head on the query side
        assert k.requires_grad == (head == "report")
        assert not features.requires_grad

        (q * k).sum().backward()
        has_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
        assert {name.split(".")[0] for name in has_gradient} == trained


def test_the_reports_head_replaces_the_keys_after_the_warmup_only():
    model = make_model(cluster_head="report")
    model.encoder_k.eval()
    x = torch.randn(6, 3, 8, 8)
    with torch.no_grad():
        plain = torch.nn.functional.normalize(model.encoder_k(x))
        replaced = torch.nn.functional.normalize(model.v(plain))
    torch.testing.assert_close(model(x, x)[1], plain)
    torch.testing.assert_close(model(x, x, clustering=True)[1], replaced)


def test_a_dead_cluster_head_gives_no_nan():
    model = make_model(cluster_head="report")
    x = torch.randn(4, 3, 8, 8)
    torch.nn.init.constant_(model.v[0].weight, 0)
    torch.nn.init.constant_(model.v[0].bias, -1)  # below the ReLU: all outputs are zero
    assert (model.encode(x) == 0).all()

    clusters = run_kmeans(model.encode(x).numpy(), [2], 0.2)
    q, k, c, _ = model(x, x, clustering=True)
    loss_inst, _ = info_nce(q, k, model.queue, 0.2)
    loss_proto, _ = proto_nce(c, torch.arange(4), clusters, 8)
    loss = loss_inst + loss_proto
    loss.backward()
    assert torch.isfinite(loss)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("head", ["none", "report"])
@pytest.mark.parametrize("clustering", [False, True])
def test_the_features_of_a_step_are_those_of_encode(head, clustering):
    """They differ by batch norm in training mode alone, which is off here."""
    model = make_model(cluster_head=head)
    model.encoder_k.eval()
    im_q = torch.randn(6, 3, 8, 8)
    im_k = torch.randn(6, 3, 8, 8)
    _, _, _, features = model(im_q, im_k, clustering)
    torch.testing.assert_close(features, model.encode(im_k))
    assert not features.requires_grad


def test_encode_is_the_momentum_branch_in_eval_mode():
    model = make_model(bn_splits=2).train()
    x = torch.randn(6, 3, 8, 8)
    assert torch.allclose(model.encode(x)[:1], model.encode(x[:1]), atol=1e-5)
    assert model.training
    model.eval().encode(x)
    assert not model.training
