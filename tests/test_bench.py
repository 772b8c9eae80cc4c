"""The benchmark compares like with like: the published procedures it times give what ours give."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import bench

import cluster
import loss


def test_the_published_concentration_has_our_values():
    rng = np.random.default_rng(0)
    im2cluster, distances = rng.integers(0, 38, 1000), rng.random(1000)  # of 40 clusters, two empty
    ours = cluster.concentration(distances, im2cluster, 40, 0.2)
    np.testing.assert_allclose(bench.published_concentration(distances, im2cluster, 40, 0.2), ours, rtol=1e-5)


def test_the_published_loss_is_ours_where_no_prototype_is_shared_and_none_left_out():
    torch.manual_seed(0)
    clusters = [bench.made_up_clusters(12, [12], 8)[0]._replace(im2cluster=torch.arange(12))]
    q, index = F.normalize(torch.randn(4, 8), dim=1), torch.tensor([3, 1, 7, 11])
    theirs = bench.published_proto_nce(q, index, clusters, 8)
    assert loss.proto_nce(q, index, clusters, 8)[0].item() == pytest.approx(theirs.item(), rel=1e-5)


def test_the_published_momentum_update_is_ours():
    torch.manual_seed(0)
    online, ours = [torch.randn(3, 4), torch.randn(5)], [torch.randn(3, 4), torch.randn(5)]
    theirs = [p.clone() for p in ours]
    bench.published_momentum_update(theirs, online)
    bench.model.get_ema_multi_avg_fn(0.999)(ours, online, None)
    torch.testing.assert_close(ours, theirs)


def test_phases_count_nested_time_once(monkeypatch):
    now = [0]
    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])

    class Work:
        def outer(self):
            now[0] += 2
            self.inner()

        def inner(self):
            now[0] += 5

    with bench.Phases({"outer": (Work, "outer"), "inner": (Work, "inner")}) as phases:
        Work().outer()
        Work().inner()
    Work().outer()  # not seen
    assert phases.own == {"outer": [2], "inner": [5, 5]} and phases.whole == {"outer": [7], "inner": [5, 5]}


def test_sections_fill_the_columns_of_the_table():
    rows = [*bench.losses(2000, (50, 100), 16, 32, 8, repeats=2), *bench.clustering(2000, (50, 100), 16, repeats=2)]
    assert len(rows) == 4
    for row in rows:
        assert row.keys() <= set(bench.COLUMNS) and row["ours"] > 0 and row["low"] <= row["ratio"] <= row["high"]
