"""How often a training step calls the device: on a GPU, calls cost as much as the arithmetic."""

import numpy as np
import pytest
from conftest import run
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import augment
import main_pcl
import model


class Calls(TorchDispatchMode):
    """Counts the operators that a device would be called for: not views, not memory, not what is drawn on the host."""

    def __init__(self):
        super().__init__()
        self.steps, self.on_host = [0], False

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator._schema.name
        free = operator.is_view or "empty" in name or "_unsafe_view" in name or name.startswith("profiler::")
        self.steps[-1] += not free and not self.on_host
        return operator(*args, **kwargs or {})

    def host(self, function):
        def wrapper(*args):
            self.on_host = True
            try:
                return function(*args)
            finally:
                self.on_host = False

        return wrapper

    def first_of_a_step(self, function):
        def wrapper(*args):
            self.steps.append(0)
            return function(*args)

        return wrapper


@pytest.mark.parametrize("splits, most", [(8, 900), (1, 600)])
def test_a_step_of_cifar10s_setting_calls_the_device_seldom(tmp_path, monkeypatch, splits, most):
    """From one loss to the next, in mixed precision, with three granularities."""
    rng = np.random.default_rng(0)
    for i in range(128):
        path = tmp_path / "images" / "train" / str(i % 2) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    monkeypatch.setattr(model.SplitBatchNorm2d, "fold", True)  # as on a GPU
    calls = Calls()
    monkeypatch.setattr(main_pcl, "info_nce", calls.first_of_a_step(main_pcl.info_nce))
    monkeypatch.setattr(augment, "random_boxes", calls.host(augment.random_boxes))
    monkeypatch.setattr(augment.RandomView, "draw", calls.host(augment.RandomView.draw))
    options = ["-a", "resnet18", "-b", 32, "--bn-splits", splits, "--num-cluster", "4,8,16"]
    with calls:
        run(tmp_path / "images", *options, "--amp", "--epochs", 1, "--warmup", 0, "--exp-dir", tmp_path / "run")
    assert len(calls.steps) == 5 and max(calls.steps[2:-1]) <= most  # the first step sets up the momentum, too
