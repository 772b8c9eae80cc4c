"""What differs on a GPU. Skipped where there is none; on one: pytest tests/test_cuda.py"""

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
    options = ["--optim", optim, "--cluster-head", head, "--epochs", 2, "--warmup", 1, "--clip-grad", 1]
    log = run(folder, *TINY, *options, "--amp", "--amp-dtype", dtype, "--exp-dir", tmp_path)
    assert log[0]["acc_proto"] == 0 < log[1]["loss_proto"]
    assert all(torch.isfinite(value).all() for value in weights(tmp_path).values())


def test_views_are_those_of_the_cpu():
    images = torch.randint(256, (64, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    view, draws = RandomView(32), RandomView.draw(64, seed=1)
    for ours, cpus in zip(view.two_views(images.cuda(), draws), view.two_views(images, draws), strict=True):
        assert ours.is_cuda
        torch.testing.assert_close(ours.cpu(), cpus, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["_faiss_kmeans", "_torch_kmeans"])
def test_kmeans_is_as_good_as_the_cpus(monkeypatch, name):
    if name == "_faiss_kmeans" and not cluster.faiss.get_num_gpus():
        pytest.skip("faiss sees no GPU")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20_000, 32)).astype(np.float32)
    start = x[:200].copy()
    centroids, squared, assignment = getattr(cluster, name)(x, 200, 20, 0, start)
    with monkeypatch.context() as patch:
        patch.setattr(cluster.faiss, "get_num_gpus", lambda: 0)
        _, theirs, _ = cluster._faiss_kmeans(x, 200, 20, 0, start)
    assert squared.sum() == pytest.approx(theirs.sum(), rel=0.01)
    distances = torch.cdist(torch.from_numpy(x), torch.from_numpy(centroids))
    chosen = distances.gather(1, torch.from_numpy(assignment).long()[:, None])[:, 0]
    assert (chosen <= distances.amin(1) + 1e-2).all()


def test_a_run_that_was_stopped_goes_on(folder, tmp_path, monkeypatch):
    options = [folder, *TINY, "--epochs", 3, "--warmup", 1, "--amp", "--exp-dir", tmp_path, "--resume"]
    received, calls = main_pcl.distributed.StopSignals.received_by_any, []

    def stop_once(self):
        calls.append(0)
        self.received = 15 if len(calls) == 5 else 0
        return received(self)

    monkeypatch.setattr(main_pcl.distributed.StopSignals, "received_by_any", stop_once)
    with pytest.raises(SystemExit):
        run(*options)
    assert len(run(*options)) == 3
    before = weights(tmp_path)
    run(*options)  # finished: nothing changes
    assert_same(weights(tmp_path), before)


def test_only_the_look_at_their_end_waits_for_the_device(folder, tmp_path, monkeypatch):
    sync, two_views = main_pcl.sync, RandomView.two_views

    def waiting(*args):
        torch.cuda.set_sync_debug_mode("default")
        return sync(*args)

    def first_of_a_step(self, *args):
        torch.cuda.set_sync_debug_mode("error")
        return two_views(self, *args)

    monkeypatch.setattr(main_pcl, "sync", waiting)
    monkeypatch.setattr(RandomView, "two_views", first_of_a_step)
    options = ["-b", 4, "--bn-splits", 2, "--epochs", 2, "--warmup", 0, "--amp", "--amp-dtype", "bf16"]
    log = run(folder, *TINY, *options, "--exp-dir", tmp_path)  # 12 steps an epoch, with prototypes
    assert len(log) == 2
