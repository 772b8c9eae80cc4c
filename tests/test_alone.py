"""What a single file promises to those who copy it, where our own scripts never go."""

from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import processes
import pytest
import torch
import torch.distributed as dist

import diagnose
import metrics
from augment import RandomView
from cluster import run_kmeans
from metrics import linear_probe
from model import SplitBatchNorm2d


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


def probe_on_share(rank, world, directory):
    """Save the scores of a probe that this process trains on its share, from a seed of its own."""
    if world > 1:
        init_method = f"file://{directory}/init"
        dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=world)
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    batch = (x[rank::world], torch.arange(8)[rank::world] % 3)
    torch.manual_seed(rank)
    scores = linear_probe(lambda epoch: [batch], x, 3, lr=0.1, epochs=2)
    torch.save(scores, f"{directory}/{rank}_of_{world}.pt")
    if world > 1:
        dist.destroy_process_group()


def test_processes_with_seeds_of_their_own_train_one_probe(tmp_path):
    probe_on_share(0, 1, tmp_path)
    processes.start_server()
    torch.multiprocessing.start_processes(
        probe_on_share, (2, tmp_path), 2, start_method="forkserver"
    )
    alone = torch.load(tmp_path / "0_of_1.pt", weights_only=True)
    for rank in range(2):
        scores = torch.load(tmp_path / f"{rank}_of_2.pt", weights_only=True)
        torch.testing.assert_close(scores, alone)


@pytest.mark.parametrize("rows, columns", [(8, 4), (30, 4), (9, 3)])
def test_centroids_to_start_from_of_another_shape_are_refused(rows, columns):
    """For example in the order of other granularities. In faiss they may end the process."""
    x = np.random.default_rng(0).normal(size=(100, 4))
    init = [np.ones((5, 4)), np.ones((rows, columns))]
    with pytest.raises(ValueError, match=rf"start from are \({rows}, {columns}\), not \(9, 4\)"):
        run_kmeans(x, [5, 9], 0.2, init=init)


@pytest.mark.parametrize("n", [3, 6, 9, 10])
def test_batch_norm_in_groups_refuses_a_batch_that_does_not_split(n):
    norm = SplitBatchNorm2d(3, num_splits=4)
    x = torch.randn(n, 3, 2, 2)
    with pytest.raises(ValueError, match=f"a batch of {n} does not split into 4 equal groups"):
        norm(x)
    assert norm.eval()(x).shape == x.shape


@pytest.mark.parametrize("earlier, expected", [([], False), ([80.0], True), ([60.5], False)])
def test_a_leak_shows_without_an_untrained_accuracy_if_knn_accuracy_falls(earlier, expected):
    log = [{"acc_inst": 99.9, "knn": knn} for knn in [*earlier, 60.0]]
    assert diagnose.is_leaking(log, knn_untrained=None) == expected


@pytest.mark.parametrize("color_jitter", [True, False])
def test_views_are_the_same_under_autocast(color_jitter):
    images = torch.randint(256, (8, 3, 20, 20), dtype=torch.uint8)
    draws = RandomView.draw(8, seed=0)
    random_view = RandomView(16, color_jitter=color_jitter)
    expected = random_view.two_views(images, draws)
    with torch.autocast("cpu", torch.bfloat16):
        views = random_view.two_views(images, draws)
    torch.testing.assert_close(views, expected)
