"""What differs on a GPU.

The other tests do not see the GPU, and test_on_gpu.py runs this file in a process that sees it.
"""

import numpy as np
import pytest
import torch
from conftest import TINY, assert_same, run, stop_in_step, weights

import cluster
import main_pcl
from augment import RandomView

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="sees no GPU; run test_on_gpu.py"
)


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
    stop_in_step(5, monkeypatch, run, *options)
    assert len(run(*options)) == 3
    before = weights(tmp_path)
    run(*options)  # the run is finished: nothing changes
    assert_same(weights(tmp_path), before)


def test_the_host_waits_for_the_device_only_to_collect_results(folder, tmp_path, monkeypatch):
    """From the seed of a step, or of the views of several steps, to the next collection."""
    collect_results = main_pcl.collect_results
    derive_seed = main_pcl.derive_seed

    def allowed_to_wait(*args):
        torch.cuda.set_sync_debug_mode("default")
        return collect_results(*args)

    def not_allowed_to_wait(*args):
        torch.cuda.set_sync_debug_mode("error")
        return derive_seed(*args)

    monkeypatch.setattr(main_pcl, "collect_results", allowed_to_wait)
    monkeypatch.setattr(main_pcl, "derive_seed", not_allowed_to_wait)
    # 12 steps per epoch, and fewer negatives than prototypes, so that some are drawn
    options = ["-b", 4, "--bn-splits", 2, "--pcl-r", 2, "--epochs", 2, "--warmup", 0]
    options += ["--amp", "--amp-dtype", "bf16", "--exp-dir", tmp_path]
    try:
        assert len(run(folder, *TINY, *options)) == 2
    finally:
        torch.cuda.set_sync_debug_mode("default")


# -- CUDA graphs and compiled encoders -------------------------------------------------------------
@pytest.fixture
def exact(monkeypatch):
    """Convolutions in float32 without TF32, by algorithms that repeat their results."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


PRECISIONS = [(["--no-amp"], 1e-5), (["--amp", "--amp-dtype", "bf16"], 1e-2)]


def losses_of(monkeypatch, *options):
    """The loss of each step of a run."""
    losses = []
    stop_if_diverged = main_pcl.stop_if_diverged

    def note(run, step, figures):
        losses.append(figures["loss_inst"] + figures["loss_proto"])
        stop_if_diverged(run, step, figures)

    with monkeypatch.context() as patch:
        patch.setattr(main_pcl, "stop_if_diverged", note)
        run(*options)
    return losses


@pytest.mark.parametrize("precision, tolerance", PRECISIONS)
@pytest.mark.parametrize("symmetric", [[], ["--symmetric"]])
def test_graphs_have_the_losses_of_eager_steps(
    folder, tmp_path, monkeypatch, exact, precision, tolerance, symmetric
):
    """Over 21 steps, the last 18 of them with prototypes."""
    options = [folder, *TINY, "--epochs", 7, "--warmup", 1, *precision, *symmetric, "--exp-dir"]
    graphs = losses_of(monkeypatch, *options, tmp_path / "graphs")
    eager = losses_of(monkeypatch, *options, tmp_path / "eager", "--no-cuda-graphs")
    assert len(graphs) == 21
    assert graphs == pytest.approx(eager, rel=tolerance)


@pytest.mark.parametrize("precision, tolerance", PRECISIONS)
def test_a_resumed_run_with_graphs_equals_an_undisturbed_one(
    folder, tmp_path, monkeypatch, exact, precision, tolerance
):
    options = [folder, *TINY, "--warmup", 1, "--epochs", 6, *precision, "--resume", "--exp-dir"]
    whole = losses_of(monkeypatch, *options, tmp_path / "whole")
    stop_in_step(5, monkeypatch, run, *options, tmp_path / "parts")
    rest = losses_of(monkeypatch, *options, tmp_path / "parts")
    assert 9 < len(rest) < 18
    assert rest == pytest.approx(whole[-len(rest) :], rel=tolerance)


def test_compiled_encoders_train(folder, tmp_path, monkeypatch):
    options = [folder, *TINY, "--epochs", 3, "--warmup", 1, "--amp", "--exp-dir"]
    compiled = losses_of(monkeypatch, *options, tmp_path / "compiled", "--compile")
    eager = losses_of(monkeypatch, *options, tmp_path / "eager", "--no-cuda-graphs")
    assert compiled == pytest.approx(eager, rel=0.1)
    assert weights(tmp_path / "compiled").keys() == weights(tmp_path / "eager").keys()
