"""Numbers at the edge: copies, rows that are not finite, empty batches, narrow layers."""

import copy
import functools
import io
import math
import os
import resource

import numpy as np
import pytest
import torch
from conftest import TINY, run
from torch.utils.data import DataLoader, TensorDataset

import cluster
import eval_lincls
import main_pcl
from augment import normalize
from cluster import Clusters, concentration, run_kmeans
from features import extract_features
from loss import info_nce, proto_nce
from metrics import knn_accuracy, logistic_regression
from model import MoCo, backbone, build_encoder


def unit_rows(n, dim=32, seed=0):
    x = np.random.default_rng(seed).normal(size=(n, dim)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.fixture(params=["faiss", "torch"])
def engine(request, monkeypatch):
    """Let run_kmeans use this engine, on the CPU."""
    if request.param == "torch":
        on_cpu = functools.partial(cluster._torch_kmeans, device="cpu")
        monkeypatch.setattr(cluster, "_faiss_kmeans", on_cpu)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


# -- copies ----------------------------------------------------------------------------------------
def expected_phi(distances, im2cluster, points, temperature=0.2):
    """The concentration by its definition, where the clusters in `points` have no extent."""
    phi = {}
    for k in set(im2cluster):
        d = [x for x, number in zip(distances, im2cluster, strict=True) if number == k]
        if k not in points:
            phi[k] = sum(d) / (len(d) * math.log(len(d) + 10))
    values = np.array([phi.get(k, max(phi.values())) for k in sorted(set(im2cluster))])
    values = values.clip(*np.percentile(values, [10, 90]))
    return temperature * values / values.mean()


@pytest.mark.parametrize("scale", [1e-6, 1, 1e6])
@pytest.mark.parametrize("noise", [0, 1e-7, 1e-4, 1e-2])
def test_a_cluster_without_extent_is_a_point_at_any_scale(noise, scale):
    """Clusters 3 and 4 hold copies, up to noise."""
    rng = np.random.default_rng(0)
    im2cluster = np.repeat(np.arange(5), 6)
    distances = rng.uniform(0.3, 0.6, 30)
    distances[18:] = noise * rng.uniform(0, 1, 12)
    found = concentration(scale * distances, im2cluster, 5, 0.2)
    np.testing.assert_allclose(found, expected_phi(distances, im2cluster, {3, 4}), rtol=1e-5)
    assert found.min() > 0.1


def test_a_tight_cluster_keeps_its_low_phi():
    """A tenth of the usual extent is no copy."""
    im2cluster = np.repeat(np.arange(5), 6)
    distances = np.repeat([0.5, 0.4, 0.6, 0.5, 0.05], 6)
    found = concentration(distances, im2cluster, 5, 0.2)
    np.testing.assert_allclose(found, expected_phi(distances, im2cluster, {}), rtol=1e-5)
    assert found[4] < 0.5 * found[:4].min()


def test_an_outlier_makes_no_points_of_the_others():
    im2cluster = np.repeat(np.arange(20), 6)
    distances = np.repeat(np.linspace(0.4, 0.6, 20), 6)
    distances[-6:] = 1000.0
    found = concentration(distances, im2cluster, 20, 0.2)
    np.testing.assert_allclose(found, expected_phi(distances, im2cluster, {}), rtol=1e-5)


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("scale", [1e-3, 1, 1e3])
@pytest.mark.parametrize("dim", [8, 128, 2048])
def test_copies_of_all_images_leave_every_phi_usable(dim, scale):
    """Each image is there four times, so many clusters or all are copies of one image."""
    images = unit_rows(100, dim) * np.float32(scale)
    copies = np.repeat(images, 4, axis=0)
    some, all_points = run_kmeans(copies, [66, 100], 0.2, init=[None, images])
    assert some.density.min() > 0.05
    assert some.density.max() < 0.5
    torch.testing.assert_close(all_points.density, torch.full((100,), 0.2))


@pytest.mark.usefixtures("engine")
def test_clusters_of_different_images_are_no_points():
    """Not even for features that are all alike, as an untrained network's are."""
    x = unit_rows(1, 128) + 0.02 * unit_rows(400, 128, seed=1)
    (clusters,) = run_kmeans(x, [40], 0.2)
    centroids = np.stack([x[clusters.im2cluster.numpy() == k].mean(0) for k in range(40)])
    distances = np.linalg.norm(x - centroids[clusters.im2cluster], axis=1)
    singles = {k for k in range(40) if (clusters.im2cluster == k).sum() == 1}
    expected = expected_phi(distances, clusters.im2cluster.tolist(), singles)
    np.testing.assert_allclose(clusters.density, expected, rtol=0.1)


# -- rows that cannot be clustered -----------------------------------------------------------------
@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e19, -1e20, 3e38])
def test_a_row_that_cannot_be_clustered_is_named(value):
    x = unit_rows(300)
    x[137, 5] = value
    x[200, 0] = np.nan
    with pytest.raises(ValueError, match=r"row 137 of features is .* \(2 of 300 rows are\)"):
        run_kmeans(x, [9], 0.2)
    start = unit_rows(9)
    start[3, 2] = value
    with pytest.raises(ValueError, match="row 3 of the centroids to start from"):
        run_kmeans(unit_rows(300), [9], 0.2, init=[start])


@pytest.mark.filterwarnings("error")
def test_numbers_beyond_float32_are_named():
    x = unit_rows(20).astype(np.float64)
    x[7] *= 1e300
    with pytest.raises(ValueError, match="row 7 of features"):
        run_kmeans(x, [3], 0.2)


@pytest.mark.usefixtures("engine")
def test_long_rows_that_can_be_squared_are_clustered():
    (clusters,) = run_kmeans(1e17 * unit_rows(300), [9], 0.2)
    assert torch.isfinite(clusters.centroids).all()
    torch.testing.assert_close(clusters.centroids.norm(dim=1), torch.ones(9))


def test_every_row_of_a_large_array_is_checked(monkeypatch):
    monkeypatch.setattr(cluster, "ROWS", 64)
    for row in (0, 63, 64, 199):
        x = unit_rows(200)
        x[row] = np.nan
        with pytest.raises(ValueError, match=f"row {row} of features"):
            run_kmeans(x, [3], 0.2)


def test_features_that_are_not_finite_end_a_run_in_one_line(folder, tmp_path, monkeypatch):
    encode = main_pcl.MoCo.encode

    def failing(self, images):
        features = encode(self, images)
        features[-1] = torch.nan
        return features

    monkeypatch.setattr(main_pcl.MoCo, "encode", failing)
    options = ["--epochs", 2, "--warmup", 1, "--features", "pass", "--exp-dir", tmp_path]
    message = f"^stopped at epoch 0, clustering: row 47 of features is not finite.*{tmp_path}"
    with pytest.raises(SystemExit, match=message) as stop:
        run(folder, *TINY, *options)
    assert "\n" not in str(stop.value)


@pytest.mark.parametrize("value", [np.nan, 1e30])
def test_features_that_are_not_finite_end_an_evaluation_in_one_line(
    folder, tmp_path, monkeypatch, value
):
    run(folder, *TINY, "--epochs", 1, "--exp-dir", tmp_path)

    def failing(*args):
        features, index = extract_features(*args)
        features[5, 0] = value
        return features, index

    monkeypatch.setattr(eval_lincls, "extract_features", failing)
    with pytest.raises(SystemExit):
        eval_lincls.main(["--exp-dir", str(tmp_path), "--no-baselines"])


# -- empty batches, batches of one -----------------------------------------------------------------
def make_model(**options):
    encoder = functools.partial(build_encoder, "resnet18_w4", small_images=True)
    return MoCo(encoder, **({"dim": 8, "r": 16} | options))


def test_the_losses_of_an_empty_batch_are_an_error():
    empty = torch.empty(0, 8)
    index = torch.empty(0, dtype=torch.long)
    clusters = Clusters(torch.randint(5, (10,)), torch.randn(5, 8), torch.rand(5))
    with pytest.raises(ValueError, match="empty"):
        info_nce(empty, empty, torch.randn(8, 16), 0.2)
    for num_negatives in (1, 100):
        with pytest.raises(ValueError, match="empty"):
            proto_nce(empty, index, [clusters], num_negatives)
    with pytest.raises(ValueError, match="at least one granularity"):
        proto_nce(torch.randn(1, 8), torch.tensor([3]), [], 4)


def test_the_losses_of_one_sample_are_finite():
    one = torch.nn.functional.normalize(torch.randn(1, 8), dim=1)
    clusters = Clusters(torch.randint(5, (10,)), torch.randn(5, 8), torch.ones(5))
    assert torch.isfinite(info_nce(one, one, torch.randn(8, 16), 0.2)[0])
    for num_negatives in (1, 100):
        assert torch.isfinite(proto_nce(one, torch.tensor([3]), [clusters], num_negatives)[0])


@pytest.mark.parametrize(
    "n, splits, side, works",
    [
        (1, 1, 16, True),  # the last layer has 2 x 2 pixels
        (1, 1, 8, False),  # the last layer has one pixel
        (4, 4, 8, False),
        (4, 2, 8, True),
        (0, 1, 16, False),
        (0, 2, 16, False),
    ],
)
def test_batch_norm_needs_two_values(n, splits, side, works):
    model = make_model(bn_splits=splits)
    x = torch.randn(n, 3, side, side)
    if works:
        assert torch.isfinite(model(x, x)[0]).all()
    else:
        with pytest.raises(ValueError, match="batch norm needs two values per channel and group"):
            model(x, x)

    # without training it needs none
    assert model.encode(x).shape == (n, 8)
    q, k, _, _ = model.eval()(x, x)
    assert q.shape == k.shape == (n, 8)
    model.dequeue_and_enqueue(k)


def test_no_features_are_an_error_of_the_figures():
    none, labels = torch.empty(0, 4), torch.empty(0, dtype=torch.long)
    some, some_labels = torch.randn(3, 4), torch.arange(3)
    with pytest.raises(ValueError, match="no features"):
        logistic_regression(none, labels, some, 3)
    for arguments in ((none, labels, some, some_labels), (some, some_labels, none, labels)):
        with pytest.raises(ValueError, match="needs features"):
            knn_accuracy(*arguments)


# -- a model as a whole ----------------------------------------------------------------------------
@pytest.mark.parametrize("head", ["none", "report"])
def test_a_model_is_saved_whole_and_goes_on_from_there(head):
    model = make_model(cluster_head=head, bn_splits=2)
    x = torch.randn(8, 3, 8, 8)
    q, k, _, _ = model(x, x, clustering=True)
    (q * k).sum().backward()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for other in (loaded, copy.deepcopy(model)):
        other.momentum_update_key_encoder()
        assert torch.equal(other.eval()(x, x)[0], copy.deepcopy(model).eval()(x, x)[0])


# -- narrow layers ---------------------------------------------------------------------------------
def channels_last_layers(network, x):
    """The names of the convolutions of `network`(x) with an input or a weight channels last."""
    found = set()

    def look(name, layer, inputs, output):
        for tensor in (*inputs, layer.weight, output):
            channels_first = torch.empty(tensor.shape).stride()
            if tensor.shape[1] > 1 and tensor.stride() != channels_first:
                found.add(name)

    for name, layer in network.named_modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.register_forward_hook(functools.partial(look, name))
    network(x).sum().backward()
    return found


@pytest.mark.parametrize("width, narrow", [(1, True), (8, True), (15, True), (16, False)])
@pytest.mark.parametrize("small_images", [True, False])
def test_narrow_networks_run_channels_first_on_a_cpu(width, narrow, small_images):
    """Whichever way they get there: as a module of another one, or as a backbone."""
    make = functools.partial(build_encoder, f"resnet18_w{width}", small_images=small_images)
    x = normalize(torch.randint(256, (4, 3, 64, 64), dtype=torch.uint8))
    assert x.is_contiguous(memory_format=torch.channels_last)
    model = MoCo(make, dim=8, r=16).to("cpu", memory_format=torch.channels_last)
    later = make().to(memory_format=torch.channels_last)
    later.load_state_dict(make().to(memory_format=torch.channels_last).state_dict())
    for network in (model.encoder_q, model.encoder_k.requires_grad_(), backbone(make()), later):
        assert bool(channels_last_layers(network, x)) == (not narrow)


@pytest.mark.parametrize("arch", ["resnet18_w8", "resnet50_w4"])
def test_a_narrow_network_trains(folder, tmp_path, arch):
    """At 64 pixels and channels last, the first one may crash."""
    options = ["-a", arch, "--image-size", 64, "--epochs", 1, "--exp-dir", tmp_path]
    assert np.isfinite(run(folder, *TINY, *options)[0]["loss"])


# -- open files ------------------------------------------------------------------------------------
@pytest.fixture
def few_open_files():
    """Forty files more than are open now may be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 40, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("few_open_files")
def test_batches_of_a_worker_leave_no_file_open():
    """Not even if the features are the images themselves."""
    data = TensorDataset(torch.arange(300.0)[:, None], torch.arange(300))
    loader = DataLoader(data, 2, num_workers=1)
    features, index = extract_features(loader, lambda x: x)
    assert torch.equal(features[:, 0], torch.arange(300.0))
    assert torch.equal(index, torch.arange(300))


def test_steps_whose_results_are_pending_leave_no_file_open(mixed, tmp_path, monkeypatch):
    """A tensor from a worker is in shared memory, which is a file."""
    kept = []
    collect_results = main_pcl.collect_results

    def spy(run, pending, keys):
        kept.extend(index.is_shared() for index, _, _ in pending)
        collect_results(run, pending, keys)

    monkeypatch.setattr(main_pcl, "collect_results", spy)
    run(mixed, *TINY, "-j", 1, "--epochs", 1, "--exp-dir", tmp_path)
    assert kept == [False] * 3
