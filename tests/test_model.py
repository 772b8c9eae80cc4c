"""The model: key branch, batch-norm groups, queue and heads."""

import functools

import pytest
import torch
import torchvision

from cluster import run_kmeans
from loss import info_nce, proto_nce
from model import MoCo, SplitBatchNorm2d, build_encoder, move_running_statistics


def make(**kwargs):
    torch.manual_seed(0)
    encoder = functools.partial(build_encoder, "resnet18_w4", small_images=True)
    return MoCo(encoder, **({"dim": 8, "r": 16} | kwargs))


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_full_width_is_torchvision(arch):
    theirs = getattr(torchvision.models, arch)().state_dict()
    ours = build_encoder(arch, num_classes=1000).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


@pytest.mark.parametrize("arch", ["resnet19", "resnet18_w", "resnet18_w0", "vgg16"])
def test_unknown_arch(arch):
    with pytest.raises(ValueError, match="unknown arch"):
        build_encoder(arch)


def test_split_batch_norm_normalises_each_group_alone():
    x, norm = torch.randn(12, 3, 4, 4) + torch.arange(12.0)[:, None, None, None], SplitBatchNorm2d(3, 4)
    for group in norm(x).view(4, -1, 3, 16).permute(0, 2, 1, 3).flatten(2):
        torch.testing.assert_close(group.mean(1), torch.zeros(3), atol=1e-5, rtol=0)
        torch.testing.assert_close(group.std(1, unbiased=False), torch.ones(3), atol=1e-3, rtol=0)


def test_the_running_statistics_of_split_batch_norm_are_those_of_a_group():
    """Where all groups are alike; in eval mode these statistics normalise, whatever the batch."""
    group, norm = 3 * torch.randn(4, 3, 5, 5) + torch.arange(3.0)[:, None, None], SplitBatchNorm2d(3, 4)
    for _ in range(200):
        norm(group.repeat(4, 1, 1, 1))
        move_running_statistics([norm])
    mean, variance = group.mean((0, 2, 3)), group.var((0, 2, 3))
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_var, variance)
    x, norm = torch.randn(1, 3, 2, 2), norm.eval()
    expected = (x - mean[:, None, None]) / (variance + 1e-5).sqrt()[:, None, None]
    torch.testing.assert_close(norm(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("fold", [False, True])
def test_the_running_statistics_move_once_a_step_by_the_groups_mean(monkeypatch, fold, splits):
    monkeypatch.setattr(SplitBatchNorm2d, "fold", fold)
    x, norm = 2 * torch.randn(12, 3, 5, 5) + torch.arange(12.0)[:, None, None, None], SplitBatchNorm2d(3, splits)
    other = SplitBatchNorm2d(3, splits)
    norm(x), other(x[..., :2])
    move_running_statistics([other, norm])
    groups = x.view(splits, -1, 3, 5, 5)
    torch.testing.assert_close(norm.running_mean, 0.1 * groups.mean((1, 3, 4)).mean(0))
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * groups.var((1, 3, 4)).mean(0))
    assert norm.num_batches_tracked == 1


def test_groups_folded_into_channels_are_groups_one_by_one(monkeypatch):
    torch.manual_seed(0)
    x, results = torch.randn(12, 5, 4, 3).to(memory_format=torch.channels_last), []
    weight = torch.randn_like(x)
    for fold in (False, True):
        monkeypatch.setattr(SplitBatchNorm2d, "fold", fold)
        norm, inputs = SplitBatchNorm2d(5, 3), x.clone().requires_grad_()
        torch.nn.init.uniform_(norm.weight, generator=torch.Generator().manual_seed(1))
        y = norm(inputs)
        (y * weight).sum().backward()
        move_running_statistics([norm])
        assert y.is_contiguous(memory_format=torch.channels_last)
        results.append((y, inputs.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var))
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-4)


def test_a_keys_group_shares_as_few_images_as_can_be_with_its_querys():
    """Its own and so many others that each group has its equal share: n / groups."""
    model, n, splits = make(bn_splits=4), 32, 4
    share, own_rows = model.batch_shuffle(torch.arange(n))
    assert torch.equal(share[own_rows], torch.arange(n))
    for i in range(n):
        query_group = set(range(i // 8 * 8, i // 8 * 8 + 8))
        key_group = set(share.view(splits, -1)[own_rows[i] // 8].tolist())
        assert i in key_group and len(query_group & key_group) == 8 // splits


def test_each_query_gets_the_key_of_its_own_image_back():
    """Of weights that are the same, and of batch norm that does not look at the batch."""
    model, x = make(bn_splits=4).eval(), torch.randn(32, 3, 8, 8)
    q, k = model(x, x)
    torch.testing.assert_close(q, k)


def test_momentum_update_is_its_formula():
    model = make(m=0.9)
    with torch.no_grad():
        for p in model.encoder_q.parameters():
            p.add_(torch.randn_like(p))
    pairs = zip(model.encoder_k.parameters(), model.encoder_q.parameters(), strict=True)
    expected = [0.9 * k + 0.1 * q for k, q in pairs]
    queue = model.queue.clone()
    model.momentum_update_key_encoder()
    for e, g in zip(expected, model.encoder_k.parameters(), strict=True):
        torch.testing.assert_close(e, g)
    assert torch.equal(queue, model.queue)


@pytest.mark.parametrize("n", [1, 5, 16, 23])
def test_queue_takes_any_batch_and_keeps_the_latest(n):
    model, seen = make(r=16), []
    for _ in range(7):
        k = torch.randn(n, 8)
        model.dequeue_and_enqueue(k)
        seen += k.tolist()
    kept = {tuple(row) for row in torch.tensor(seen[-16:]).tolist()}
    assert len({tuple(c) for c in model.queue.T.tolist()} & kept) == min(16, len(seen))


def test_heads_and_their_gradients():
    x = torch.randn(8, 3, 8, 8)
    for head in ("none", "report"):
        model = make(cluster_head=head)
        q, k = model(x, x, clustering=True)
        for y in (q, k):
            assert y.dtype == torch.float32
            torch.testing.assert_close(y.norm(dim=1), torch.ones(8))
        assert k.requires_grad == (head == "report")
        (q * k).sum().backward()
        trained = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
        assert trained == {"none": {"encoder_q"}, "report": {"encoder_q", "v"}}[head]


def test_a_dead_cluster_head_gives_no_nan():
    model, x = make(cluster_head="report"), torch.randn(4, 3, 8, 8)
    torch.nn.init.constant_(model.v[0].weight, 0)
    torch.nn.init.constant_(model.v[0].bias, -1)  # below the ReLU; all outputs are zero
    assert (model.encode(x) == 0).all()
    clusters = run_kmeans(model.encode(x).numpy(), [2], 0.2)
    q, k = model(x, x, clustering=True)
    loss = info_nce(q, k, model.queue, 0.2)[0] + proto_nce(q, torch.arange(4), clusters, 8)[0]
    loss.backward()
    assert torch.isfinite(loss) and all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("head", ["none", "report"])
@pytest.mark.parametrize("clustering", [False, True])
def test_the_features_of_a_step_are_those_of_encode(head, clustering):
    """But for batch norm, which is that of training; here it is not."""
    model, x = make(cluster_head=head), torch.randn(6, 3, 8, 8)
    model.encoder_k.eval()
    *_, features = model(torch.randn(6, 3, 8, 8), x, clustering, features=True)
    torch.testing.assert_close(features, model.encode(x))
    assert not features.requires_grad


def test_encode_is_the_momentum_branch_in_eval_mode():
    model, x = make(bn_splits=2).train(), torch.randn(6, 3, 8, 8)
    assert torch.allclose(model.encode(x)[:1], model.encode(x[:1]), atol=1e-5) and model.training
