"""The number of device calls in a training step: on a GPU, calls cost as much as arithmetic."""

import argparse
import functools
import os
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

import augment
import main_pcl
import model
from augment import Draws, RandomView
from data import EpochSampler, Images, identity_collate
from model import SplitBatchNorm2d

ROOT = str(Path(main_pcl.__file__).parent)


class Calls(TorchDispatchMode):
    """Counts the operators that a device would be called for.

    A new group of steps begins with the views of its images, which are made in one go.

    Views, memory allocations and what is paused do not count. Transfers do not, either, because a
    CPU needs none.
    """

    def __init__(self):
        super().__init__()
        self.groups = [Counter()]  # {function: number of its calls} in each group of steps
        self.paused = False

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator._schema.name
        allocates = "empty" in name
        is_view = operator.is_view or "_unsafe_view" in name
        is_profiler = name.startswith("profiler::")
        if not (allocates or is_view or is_profiler or self.paused):
            self.groups[-1][calling_function()] += 1
        return operator(*args, **kwargs or {})

    def not_counted(self, function):
        """`function`, whose operators do not count."""

        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            self.paused = True
            try:
                return function(*args, **kwargs)
            finally:
                self.paused = False

        return wrapper

    def begins_a_group(self, function):
        """`function`, whose call is the first of a group of steps."""

        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            self.groups.append(Counter())
            return function(*args, **kwargs)

        return wrapper

    def without_encoder(self, forward):
        """An encoder's `forward`, neither of whose passes counts. See `ends_backward`."""
        forward = self.not_counted(forward)

        def pause(_):
            self.paused = True

        @functools.wraps(forward)
        def wrapper(*args):
            z = forward(*args)
            if z.requires_grad:
                z.register_hook(pause)  # from its gradient on, the backward pass is the encoder's
            return z

        return wrapper

    def ends_backward(self, backward):
        """`backward`, after which operators count again."""

        @functools.wraps(backward)
        def wrapper(*args, **kwargs):
            backward(*args, **kwargs)
            self.paused = False

        return wrapper


def calling_function():
    """The innermost function of the project that is running, by name."""
    frame = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        if frame.f_code.co_name == "backward" and "torch" in path:
            return "backward"
        if os.path.dirname(path) == ROOT:
            return f"{os.path.basename(path)}: {frame.f_code.co_name}"
        frame = frame.f_back
    return "other"


@pytest.mark.parametrize("splits, most", [(8, 119), (1, 117)])
def test_a_step_on_cifar10_makes_few_calls_to_the_device(tmp_path, monkeypatch, splits, most):
    """Counted outside the encoders, in mixed precision, with three granularities.

    A narrow ResNet-18 makes as many calls as a wide one.
    """
    at_once = 32  # steps, as with CIFAR-10's batches of 128
    rng = np.random.default_rng(0)
    for i in range(3 * at_once * 16):
        path = tmp_path / "images" / "train" / str(i % 2) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)

    calls = Calls()
    encoder = model.WidthResNet
    monkeypatch.setattr(main_pcl, "steps_at_once", lambda args, images: at_once)  # as on a GPU
    monkeypatch.setattr(augment, "apply_to_rows", augment.apply_to_all)  # as on a GPU
    monkeypatch.setattr(augment, "random_boxes", calls.not_counted(augment.random_boxes))
    monkeypatch.setattr(model, "deal_out", calls.not_counted(model.deal_out))
    monkeypatch.setattr(RandomView, "draw", calls.not_counted(RandomView.draw))
    monkeypatch.setattr(RandomView, "two_views", calls.begins_a_group(RandomView.two_views))
    monkeypatch.setattr(encoder, "forward", calls.without_encoder(encoder.forward))
    monkeypatch.setattr(torch.Tensor, "backward", calls.ends_backward(torch.Tensor.backward))

    # as many keys as on CIFAR-10, so that no negatives are drawn
    options = ["-a", "resnet18_w4", "-b", 16, "--bn-splits", splits, "--num-cluster", "4,8,16"]
    options += ["--pcl-r", 4096, "--amp", "--epochs", 1, "--warmup", 0]
    with calls:
        run(tmp_path / "images", *options, "--exp-dir", tmp_path / "run")
    assert len(calls.groups) == 4
    # the first steps also set up the optimizer's momentum, the last end the epoch
    group = calls.groups[2]
    assert group.total() / at_once <= most, group.most_common()


def views_from(step, at_once, monkeypatch, **settings):
    """What a run of 7 steps an epoch yields from `step` on: [(index, im_q, im_k)]."""
    monkeypatch.setattr(main_pcl, "steps_at_once", lambda args, images: at_once)
    args = argparse.Namespace(seed=0, batch_size=4, device="cpu")
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (30, 3, 8, 8), dtype=torch.uint8, generator=generator)
    files = TensorDataset(pixels)
    files.labels = torch.zeros(len(pixels))
    images = Images(files, view=None, pixels=pixels)
    sampler = EpochSampler(len(images), args.batch_size)
    loader = DataLoader(images, args.batch_size, sampler=sampler, collate_fn=identity_collate)
    run = argparse.Namespace(args=args, epoch=3, step=step)
    return list(main_pcl.views_of_steps(run, loader, RandomView(8, **settings)))


def test_views_made_in_one_go_are_those_made_step_by_step(monkeypatch):
    """But for the order of the jitter's operations, which the steps of a group share."""
    one_by_one = views_from(0, 1, monkeypatch, color_jitter=False)
    in_one_go = views_from(0, 4, monkeypatch, color_jitter=False)
    assert len(in_one_go) == len(one_by_one) == 7
    for expected, found in zip(one_by_one, in_one_go, strict=True):
        assert torch.equal(expected[0], found[0])
        torch.testing.assert_close(expected[1:], found[1:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("step", range(8))
def test_a_run_resumed_within_a_group_continues_with_its_views(step, monkeypatch):
    whole = views_from(0, 4, monkeypatch)
    rest = views_from(step, 4, monkeypatch)
    assert len(rest) == 7 - step
    for expected, found in zip(whole[step:], rest, strict=True):
        assert all(map(torch.equal, expected, found))


def test_a_gpu_makes_the_views_of_more_steps_at_once_if_they_have_fewer_pixels():
    in_memory = argparse.Namespace(pixels=torch.empty(1, 3, 8, 8))
    from_workers = argparse.Namespace(pixels=None)
    for device, images, batch, size, expected in [
        ("cuda", in_memory, 128, 32, 32),
        ("cuda", in_memory, 512, 32, 8),
        ("cuda", in_memory, 64, 8, 32),
        ("cuda", in_memory, 256, 224, 1),
        ("cuda", from_workers, 128, 32, 1),
        ("cpu", in_memory, 128, 32, 1),
    ]:
        args = argparse.Namespace(device=device, batch_size=batch, image_size=size)
        assert main_pcl.steps_at_once(args, images) == expected


def test_all_images_or_selected_rows_change_in_the_same_way(monkeypatch):
    """A GPU changes all images and then selects, a CPU selects first."""
    images = torch.randint(256, (48, 3, 16, 16), dtype=torch.uint8)
    draws = RandomView.draw(48, seed=0)
    for settings in ({}, {"aug_plus": False}, {"crop": False}):
        view = RandomView(16, **settings)
        batch = images if view.crop else images.view(24, 2, 3, 16, 16)
        selected = view.two_views(batch, draws[:, : len(batch)])
        with monkeypatch.context() as patch:
            patch.setattr(augment, "apply_to_rows", augment.apply_to_all)
            everything = view.two_views(batch, draws[:, : len(batch)])
        torch.testing.assert_close(selected, everything, atol=1e-5, rtol=1e-5)


class Copies(TorchDispatchMode):
    """Lists the sizes of all tensors that are copied."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **kwargs or {})
        name = operator._schema.name.removeprefix("aten::")
        if name in ("cat", "stack", "clone", "copy_", "_to_copy", "repeat", "contiguous"):
            self.sizes.append(result.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_groups_of_batch_norm_copy_the_activations_once_in_each_pass(dtype):
    x = torch.randn(16, 8, 6, 6).to(dtype, memory_format=torch.channels_last).requires_grad_()
    gradient = torch.randn_like(x)
    norm = SplitBatchNorm2d(8, num_splits=4)
    with Copies() as forward:
        y = norm(x)
    with Copies() as backward:
        y.backward(gradient)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert x.grad.is_contiguous(memory_format=torch.channels_last)
    for copies in (forward, backward):
        assert [size for size in copies.sizes if size >= x.numel()] == [x.numel()]


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads in /proc")
def test_random_boxes_wake_no_threads():
    """PyTorch starts its threads when it first needs them, and more if it may use more."""
    threads = torch.get_num_threads()
    before = len(os.listdir("/proc/self/task"))
    torch.set_num_threads(before + 16)
    try:
        draws = RandomView.draw(512, seed=0).flatten(0, 1)
        augment.random_boxes(Draws.split(draws), 32, 32, 0.2)
        after = len(os.listdir("/proc/self/task"))
        torch.rand(2**20).sqrt()
        assert len(os.listdir("/proc/self/task")) > before  # otherwise the count shows nothing
    finally:
        torch.set_num_threads(threads)
    assert after == before
