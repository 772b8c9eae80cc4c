"""Which GPU a process takes."""

import pytest
import torch

from runtime import distributed


@pytest.mark.parametrize("value", ["", "3", "x"])
def test_local_rank_means_nothing_without_rank(monkeypatch, value):
    """Containers and jobs may set it, too."""
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setenv("RANK", "")
    monkeypatch.setenv("LOCAL_RANK", value)
    assert distributed.init_distributed() == "cuda"
    assert taken == [0]
