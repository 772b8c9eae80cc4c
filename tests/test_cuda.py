"""What differs on a GPU. Skipped without one; with one: pytest tests/test_cuda.py"""

import numpy as np
import pytest
import torch
from conftest import TINY, assert_same, run, weights

import cluster
import main_pcl
from augment import RandomView

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("head", ["none", "report"])
@pytest.mark.parametrize("optim", ["sgd", "adamw", "lamb", "lars"])
def test_every_combination_trains(folder, tmp_path, optim, head, dtype):
    options = ["--optim", optim, "--cluster-head", head, "--amp", "--amp-dtype", dtype]
    options += ["--epochs", 2, "--warmup", 1, "--clip-grad", 1, "--exp-dir", tmp_path]
    log = run(folder, *TINY, *options)
    assert log[0]["acc_proto"] == 0
    assert log[1]["loss_proto"] > 0
    assert all(torch.isfinite(value).all() for value in weights(tmp_path).values())


def test_views_are_those_of_the_cpu():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (64, 3, 40, 40), dtype=torch.uint8, generator=generator)
    random_view = RandomView(32)
    draws = RandomView.draw(64, seed=1)
    on_gpu = random_view.two_views(images.cuda(), draws)
    on_cpu = random_view.two_views(images, draws)
    for ours, theirs in zip(on_gpu, on_cpu, strict=True):
        assert ours.is_cuda
        torch.testing.assert_close(ours.cpu(), theirs, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["_faiss_kmeans", "_torch_kmeans"])
def test_kmeans_is_as_good_as_on_the_cpu(monkeypatch, name):
    if name == "_faiss_kmeans" and not cluster.faiss.get_num_gpus():
        pytest.skip("faiss sees no GPU")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20_000, 32)).astype(np.float32)
    start = x[:200].copy()
    kmeans = getattr(cluster, name)
    centroids, squared, assignment = kmeans(x, 200, 20, 0, start)
    with monkeypatch.context() as patch:
        patch.setattr(cluster.faiss, "get_num_gpus", lambda: 0)
        _, squared_on_cpu, _ = cluster._faiss_kmeans(x, 200, 20, 0, start)
    assert squared.sum() == pytest.approx(squared_on_cpu.sum(), rel=0.01)

    # every sample has its nearest centroid
    distances = torch.cdist(torch.from_numpy(x), torch.from_numpy(centroids))
    number = torch.from_numpy(assignment).long()[:, None]
    own = distances.gather(1, number)[:, 0]
    assert (own <= distances.amin(1) + 1e-2).all()


def test_a_stopped_run_resumes(folder, tmp_path, monkeypatch):
    options = [folder, *TINY, "--epochs", 3, "--warmup", 1, "--amp"]
    options += ["--exp-dir", tmp_path, "--resume"]
    signals = main_pcl.distributed.StopSignals
    received_by_any = signals.received_by_any
    calls = 0

    def stop_at_the_fifth_look(self):
        nonlocal calls
        calls += 1
        self.received = 15 if calls == 5 else 0
        return received_by_any(self)

    monkeypatch.setattr(signals, "received_by_any", stop_at_the_fifth_look)
    with pytest.raises(SystemExit):
        run(*options)
    assert len(run(*options)) == 3
    before = weights(tmp_path)
    run(*options)  # the run is finished: nothing changes
    assert_same(weights(tmp_path), before)


def test_the_host_waits_for_the_device_only_to_collect_results(folder, tmp_path, monkeypatch):
    collect_results = main_pcl.collect_results
    two_views = RandomView.two_views

    def allowed_to_wait(*args):
        torch.cuda.set_sync_debug_mode("default")
        return collect_results(*args)

    def beginning_of_a_step(self, *args):
        torch.cuda.set_sync_debug_mode("error")
        return two_views(self, *args)

    monkeypatch.setattr(main_pcl, "collect_results", allowed_to_wait)
    monkeypatch.setattr(RandomView, "two_views", beginning_of_a_step)
    options = ["-b", 4, "--bn-splits", 2, "--epochs", 2, "--warmup", 0]
    options += ["--amp", "--amp-dtype", "bf16", "--exp-dir", tmp_path]
    log = run(folder, *TINY, *options)  # 12 steps per epoch, with prototypes
    assert len(log) == 2
