"""The benchmark compares like with like: the published procedures it times give our results."""

import functools
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch.autograd import DeviceType

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import bench
import gpu

import cluster
import loss


def test_the_published_concentration_is_ours():
    rng = np.random.default_rng(0)
    im2cluster = rng.integers(0, 38, 1000)  # of 40 clusters, so two are empty
    distances = rng.random(1000)
    ours = cluster.concentration(distances, im2cluster, 40, 0.2)
    published = bench.published_concentration(distances, im2cluster, 40, 0.2)
    np.testing.assert_allclose(published, ours, rtol=1e-5)


def test_the_published_loss_is_ours_if_no_prototype_is_shared_or_left_out():
    torch.manual_seed(0)
    [level] = bench.made_up_clusters(12, [12], 8)
    clusters = [level._replace(im2cluster=torch.arange(12))]
    q = F.normalize(torch.randn(4, 8), dim=1)
    index = torch.tensor([3, 1, 7, 11])
    ours, _ = loss.proto_nce(q, index, clusters, 8)
    published = bench.published_proto_nce(q, index, clusters, 8)
    assert ours.item() == pytest.approx(published.item(), rel=1e-5)


def test_the_published_momentum_update_is_ours():
    encoder = functools.partial(bench.model.build_encoder, "resnet18_w4", small_images=True)
    network = bench.model.MoCo(encoder, dim=8, r=8, m=0.999)
    online = list(network.encoder_q.parameters())
    ours = list(network.encoder_k.parameters())
    with torch.no_grad():
        for p in online:
            p.copy_(torch.randn_like(p))
        published = [p.clone() for p in ours]
        bench.published_momentum_update(published, online)
    network.momentum_update_key_encoder()
    torch.testing.assert_close(ours, published)
    assert not torch.equal(ours[0], online[0])


def test_phases_count_nested_time_once(monkeypatch):
    now = 0  # the time, which passes only in the functions below

    class Work:
        def outer(self):
            nonlocal now
            now += 2
            self.inner()

        def inner(self):
            nonlocal now
            now += 5

    monkeypatch.setattr(bench.time, "perf_counter", lambda: now)
    with bench.Phases({"outer": (Work, "outer"), "inner": (Work, "inner")}) as phases:
        Work().outer()
        Work().inner()
    Work().outer()  # not measured
    assert phases.own == {"outer": [2], "inner": [5, 5]}
    assert phases.whole == {"outer": [7], "inner": [5, 5]}


def test_a_phase_may_have_several_functions():
    class Work:
        def first(self):
            return 1

        def second(self):
            return 2

    with bench.Phases({"both": (Work, "first", "second")}) as phases:
        assert Work().first() + Work().second() == 3
    assert len(phases.whole["both"]) == 2


@pytest.mark.parametrize("phase", bench.STEP | bench.EPOCH)
def test_what_a_phase_measures_exists(phase):
    owner, *names = (bench.STEP | bench.EPOCH)[phase]
    assert all(hasattr(owner, name) for name in names)


def test_sections_fill_the_columns_of_the_table():
    rows = list(bench.losses(2000, (50, 100), 16, 32, 8, repeats=2))
    rows += bench.clustering(2000, 50, repeats=2)
    assert len(rows) == 4
    for row in rows:
        assert row.keys() <= set(bench.COLUMNS)
        assert row["ours"] > 0
        assert row["low"] <= row["ratio"] <= row["high"]


def test_the_picture_of_the_growth_names_sizes_and_times(tmp_path, monkeypatch):
    rows = list(bench.growth(200, 4, doublings=2))
    assert {row["what"] for row in rows} == set(bench.GROWTH)

    # drawn from bench.csv, where numbers are text
    rows = []
    for what in bench.GROWTH:
        for size, seconds in ((1000, "0.002"), (2000, "0.003"), (4000, "0.008")):
            rows.append({"what": what, "size": str(size), "ours": seconds})
    rows.append({"what": "another row", "size": "resnet50", "ours": ""})
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
    bench.draw_growth(rows, tmp_path / "growth.png")
    (axes,) = figures[0].axes
    *curves, proportional = axes.lines
    assert len(curves) == len(bench.GROWTH)
    for curve in curves:
        assert list(curve.get_xdata()) == [1, 2, 4]
        assert list(curve.get_ydata()) == pytest.approx([1, 1.5, 4])
    assert list(proportional.get_xdata()) == [1, 4]
    names = [text.get_text() for text in axes.get_legend().texts]
    assert names[0] == "k-means: samples, 1,000 to 4,000 (2 ms to 8 ms)"
    assert axes.get_xlabel()
    assert axes.get_ylabel()
    assert axes.xaxis.get_major_formatter()(4, 0) == "4x"


# -- benchmarks/gpu.py -----------------------------------------------------------------------------
def test_the_benchmark_of_a_gpu_prints_a_table(capsys, monkeypatch):
    """On a machine without one, with the digits."""
    for name in ("build_datasets", "load_into_memory"):  # which it replaces
        monkeypatch.setattr(gpu.main_pcl, name, getattr(gpu.main_pcl, name))
    e_step = gpu.main_pcl.e_step
    gpu.main(["--quick"])
    title, *rows = [line for line in capsys.readouterr().out.splitlines() if line[:1] == "|"]
    columns = [name.strip() for name in title.strip("|").split("|")]
    assert columns == list(gpu.COLUMNS)
    _, row = [line.strip("|").split("|") for line in rows]
    cells = dict(zip(columns, [cell.strip() for cell in row], strict=True))
    assert cells["batch"] == "128"
    assert cells["encoders"] == "eager"
    speed = float(cells["images/s"].replace(",", ""))
    assert float(cells["ms a step"]) == pytest.approx(1000 * 128 / speed, rel=0.01)
    assert float(cells["E-step (s)"]) > 0
    assert float(cells["kNN (s)"]) > 0
    assert gpu.main_pcl.e_step is e_step


def test_without_a_gpu_the_benchmark_says_so_in_one_line(capsys):
    with pytest.raises(SystemExit) as ended:
        gpu.main([])
    assert ended.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_profile_counts_whole_groups_of_steps_of_the_second_epoch(monkeypatch):
    """With a profiler that notes how many steps were done when it is started and stopped."""

    def event_on(device, microseconds, is_user_annotation=False):
        return SimpleNamespace(
            device_type=device,
            self_device_time_total=microseconds,
            is_user_annotation=is_user_annotation,
        )

    event = event_on(DeviceType.CUDA, 500.0)
    on_host = event_on(DeviceType.CPU, 9.0)
    annotation = event_on(DeviceType.CUDA, 9.0, is_user_annotation=True)  # spans kernels
    calls = []
    losses = []

    class Profiler:
        def __init__(self, activities):
            self.start = lambda: calls.append(("start", len(losses)))
            self.stop = lambda: calls.append(("stop", len(losses)))
            self.events = lambda: [event, on_host, annotation] * 128

    def two_epochs(batch, *flags):
        for _ in range(2 * 70):
            losses.append(gpu.main_pcl.info_nce(1, 2))

    datasets = SimpleNamespace(train=range(70 * 16))
    monkeypatch.setattr(gpu, "profile", Profiler)
    monkeypatch.setattr(gpu, "train", two_epochs)
    monkeypatch.setattr(gpu, "synchronize", lambda: None)
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu.main_pcl, "build_datasets", lambda: datasets)
    monkeypatch.setattr(gpu.main_pcl, "info_nce", lambda *args: sum(args))
    assert gpu.profile_steps(16, "graphs") == (4, 2.0)
    assert calls == [("start", 102), ("stop", 134)]
    assert losses == [3] * 140
    assert gpu.profile_steps(32, "graphs") is None  # 35 steps are too few
