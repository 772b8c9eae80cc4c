"""The number of device calls in a training step: on a GPU, calls cost as much as arithmetic."""

import numpy as np
import pytest
from conftest import run
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import augment
import main_pcl
import model


class Calls(TorchDispatchMode):
    """Counts the operators that a device would be called for, step by step.

    Views, memory allocations and work on the host do not count.
    """

    def __init__(self):
        super().__init__()
        self.steps = [0]  # number of calls in each step
        self.on_host = False

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator._schema.name
        allocates = "empty" in name
        is_view = operator.is_view or "_unsafe_view" in name
        is_profiler = name.startswith("profiler::")
        if not (allocates or is_view or is_profiler or self.on_host):
            self.steps[-1] += 1
        return operator(*args, **kwargs or {})

    def not_counted(self, function):
        """`function`, whose operators run on the host."""

        def wrapper(*args, **kwargs):
            self.on_host = True
            try:
                return function(*args, **kwargs)
            finally:
                self.on_host = False

        return wrapper

    def begins_a_step(self, function):
        """`function`, whose call is the first of a step."""

        def wrapper(*args, **kwargs):
            self.steps.append(0)
            return function(*args, **kwargs)

        return wrapper


@pytest.mark.parametrize("splits, most", [(8, 900), (1, 600)])
def test_a_step_on_cifar10_makes_few_calls_to_the_device(tmp_path, monkeypatch, splits, most):
    """Counted from loss to loss, in mixed precision, with three granularities.

    A narrow ResNet-18 makes as many calls as a wide one.
    """
    rng = np.random.default_rng(0)
    for i in range(128):
        path = tmp_path / "images" / "train" / str(i % 2) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)

    monkeypatch.setattr(model.SplitBatchNorm2d, "fold", True)  # as on a GPU
    calls = Calls()
    view = augment.RandomView
    monkeypatch.setattr(main_pcl, "info_nce", calls.begins_a_step(main_pcl.info_nce))
    monkeypatch.setattr(augment, "random_boxes", calls.not_counted(augment.random_boxes))
    monkeypatch.setattr(view, "draw", calls.not_counted(view.draw))

    options = ["-a", "resnet18_w4", "-b", 32, "--bn-splits", splits, "--num-cluster", "4,8,16"]
    options += ["--amp", "--epochs", 1, "--warmup", 0, "--exp-dir", tmp_path / "run"]
    with calls:
        run(tmp_path / "images", *options)
    assert len(calls.steps) == 5
    assert max(calls.steps[2:-1]) <= most  # the first step also sets up the optimizer's momentum
