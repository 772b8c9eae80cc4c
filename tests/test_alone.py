"""What a single file promises to those who copy it, where our own scripts never go."""

from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch

import metrics
from metrics import linear_probe


class Rates:
    """A store that keeps nothing but the learning rate of each epoch."""

    def __init__(self):
        self.rates = []

    def load(self):
        return None

    def save(self, state):
        self.rates.append(state["optimizer"]["param_groups"][0]["lr"])


@pytest.mark.parametrize("epochs", [1, 2, 4, 9, 10])
def test_the_probes_rate_drops_after_60_and_80_percent_of_any_number_of_epochs(epochs):
    x = torch.randn(6, 3)
    store = Rates()
    linear_probe(lambda epoch: [(x, torch.arange(6) % 2)], x, 2, 30.0, epochs, store)
    done = [Fraction(epoch, epochs) for epoch in range(epochs)]
    drops = [sum(part >= drop for drop in (Fraction(3, 5), Fraction(4, 5))) for part in done]
    assert store.rates == pytest.approx([30.0 * 0.1**number for number in drops])


def test_the_probe_runs_where_torch_was_built_without_distributed(monkeypatch):
    """There, torch.distributed has is_available, but not is_initialized."""
    monkeypatch.setattr(metrics, "dist", SimpleNamespace(is_available=lambda: False))
    x = torch.randn(6, 3)
    scores = linear_probe(lambda epoch: [(x, torch.arange(6) % 2)], x, 2, epochs=1)
    assert scores.shape == (6, 2)
