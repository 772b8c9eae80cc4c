"""CUDA graphs and compiled encoders, as far as a CPU shows them.

`fake_graph` stands for torch.cuda.make_graphed_callables. Like a graph, it always reads and writes
the same memory, takes batches of one shape only, and needs the weights to stay where they are.
"""

import functools

import pytest
import torch
from conftest import TINY, assert_same, fails, run, weights

import main_pcl
import model
from model import MoCo, backbone, build_encoder
from runtime import distributed


class Replay(torch.autograd.Function):
    """A module's pass, with input, output and gradients in memory that never changes."""

    @staticmethod
    def forward(ctx, record, images, *parameters):
        assert images.shape == record.input.shape
        addresses = [parameter.data_ptr() for parameter in parameters]
        assert addresses == record.addresses, "a weight has moved"
        record.input.copy_(images)
        with torch.set_grad_enabled(record.has_gradient), record.precision():
            record.result = record.plain(record.input)
        record.output.copy_(record.result.detach())
        record.keep_moments()
        record.replays += 1
        return record.output.detach()

    @staticmethod
    def backward(ctx, gradient):
        record = Replay.latest
        found = torch.autograd.grad(record.result, record.parameters, gradient)
        for kept, new in zip(record.gradients, found, strict=True):
            kept.copy_(new)
        return (None, None, *(kept.detach() for kept in record.gradients))


class Record:
    """What a graph of `encoder` holds."""

    def __init__(self, encoder, images):
        self.plain = encoder.forward
        self.has_gradient = torch.is_grad_enabled()
        dtype = torch.get_autocast_dtype("cpu")
        enabled = torch.is_autocast_enabled("cpu")
        assert not enabled or not torch.is_autocast_cache_enabled()
        options = {"dtype": dtype, "enabled": enabled, "cache_enabled": False}
        self.precision = functools.partial(torch.autocast, "cpu", **options)
        self.parameters = list(encoder.parameters())
        self.addresses = [parameter.data_ptr() for parameter in self.parameters]
        self.gradients = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.input = images
        self.output = self.plain(images).detach()
        self.norms = [m for m in encoder.modules() if isinstance(m, model.SplitBatchNorm2d)]
        self.moments = [norm.moments for norm in self.norms]
        self.replays = 0
        if self.has_gradient:
            Replay.latest = self

    def keep_moments(self):
        """Write the statistics of the pass where those of the recorded pass are."""
        for norm, kept in zip(self.norms, self.moments, strict=True):
            for old, new in zip(kept, norm.moments, strict=True):
                old.copy_(new)
            norm.moments = kept


@pytest.fixture
def records(monkeypatch):
    """Graphs are faked in this test. Returns the list of their Records."""
    made = []

    def fake_graph(encoder, samples, num_warmup_iters):
        assert encoder.training
        (images,) = samples
        record = Record(encoder, images)
        made.append(record)

        def forward(x):
            if not encoder.training:
                return record.plain(x)
            return Replay.apply(record, x, *record.parameters)

        encoder.forward = forward
        return encoder

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", fake_graph)
    return made


def test_the_keys_do_not_overwrite_what_the_backward_pass_reads(records):
    """In float32 a convolution keeps its input for the backward pass."""
    encoder = functools.partial(build_encoder, "resnet18_w16", small_images=True)
    network = MoCo(encoder, 8, 16)
    images = torch.randn(4, 3, 8, 8)
    model.capture_encoders(network, images, torch.autocast("cpu", enabled=False))
    q, *_ = network(images, torch.randn(4, 3, 8, 8))
    q[:, 0].sum().backward()  # autograd raises if the images have changed


@pytest.fixture
def allowed_on_a_cpu(monkeypatch):
    """--cuda-graphs and --compile are not refused."""
    monkeypatch.setattr(main_pcl, "check", lambda *_: None)


@pytest.mark.parametrize(
    "options",
    [
        ["--amp"],
        ["--symmetric"],
        ["--cluster-head", "report", "--bn-splits", "1"],
        ["--optim", "lamb", "--clip-grad", "1", "--features", "pass"],
    ],
)
def test_a_run_with_graphs_equals_one_without(folder, tmp_path, records, allowed_on_a_cpu, options):
    """In two parts: the second begins with a checkpoint."""
    common = [folder, *TINY, *options, "--epochs", 4, "--warmup", 1, "--exp-dir"]
    log = run(*common, tmp_path / "eager")
    graphs = [*common, tmp_path / "graphs", "--cuda-graphs", "--resume"]
    with pytest.MonkeyPatch.context() as patch:
        begin_epoch = main_pcl.checkpoint.Run.begin_epoch

        def stop_after_two(self, epoch, clusters):
            begin_epoch(self, epoch, clusters)
            if epoch == 2:
                main_pcl.checkpoint.save(tmp_path / "graphs", self)
                raise SystemExit

        patch.setattr(main_pcl.checkpoint.Run, "begin_epoch", stop_after_two)
        with pytest.raises(SystemExit):
            run(*graphs)
    assert run(*graphs)[-1]["knn"] == log[-1]["knn"]
    assert_same(weights(tmp_path / "eager"), weights(tmp_path / "graphs"))
    assert [record.replays for record in records] == [6, 6, 6, 6]  # 2 encoders, 2 parts


def test_only_training_passes_are_replayed(records):
    network = MoCo(functools.partial(build_encoder, "resnet18_w4", small_images=True), 8, 16)
    model.capture_encoders(network, torch.randn(4, 3, 8, 8), torch.autocast("cpu", enabled=False))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    images = torch.randn(3, 3, 10, 10)  # another shape
    assert network.encode(images).shape == (3, 8)
    features = backbone(network.encoder_q).eval()(images)
    assert features.shape == (3, 32)  # pooled, not the head's output
    assert [record.replays for record in records] == [0, 0]
    assert_same(before, network.state_dict())


# -- compiled encoders -----------------------------------------------------------------------------
def test_a_compiled_run_compiles_the_training_passes_alone(
    folder, tmp_path, monkeypatch, allowed_on_a_cpu, records
):
    calls = []

    def compile(function):
        def compiled(images):
            calls.append(len(images))
            return function(images)

        return compiled

    monkeypatch.setattr(torch, "compile", compile)
    options = [folder, *TINY, "--epochs", 2, "--warmup", 1, "--features", "pass", "--exp-dir"]
    log = run(*options, tmp_path / "eager")
    assert run(*options, tmp_path / "compiled", "--compile")[-1]["knn"] == log[-1]["knn"]
    assert calls == [16] * 2 * 6  # both encoders, 2 epochs of 3 steps
    assert_same(weights(tmp_path / "eager"), weights(tmp_path / "compiled"))

    # compiled, then captured
    calls.clear()
    run(*options, tmp_path / "both", "--compile", "--cuda-graphs")
    assert calls == [16] * 2 * (1 + 6)
    assert_same(weights(tmp_path / "eager"), weights(tmp_path / "both"))


# -- arguments -------------------------------------------------------------------------------------
@pytest.mark.parametrize("flag", ["--cuda-graphs", "--compile"])
def test_without_a_gpu_they_are_refused(folder, tmp_path, capsys, flag):
    options = [folder, *TINY, flag, "--exp-dir", tmp_path]
    assert f"{flag} is for one process on a GPU" in fails(capsys, main_pcl.main, *options)


@pytest.mark.parametrize(
    "device, world, on", [("cpu", 1, False), ("cuda", 1, True), ("cuda", 2, False)]
)
def test_graphs_are_on_for_one_process_on_a_gpu(monkeypatch, device, world, on):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    args = main_pcl.get_parser().parse_args([])
    datasets = main_pcl.build_datasets(None, None, 0)
    assert main_pcl.fill_in_defaults(args, datasets, world, device).cuda_graphs == on


@pytest.mark.parametrize(
    "error, options, expected",
    [
        (
            RuntimeError("operation not permitted when stream is capturing\nand more"),
            [],
            "resnet18_w4 cannot run as CUDA graphs (operation not permitted when stream is "
            "capturing); add --no-cuda-graphs",
        ),
        (
            RuntimeError("Cannot find a working triton installation"),
            ["--compile"],
            "(Cannot find a working triton installation); leave out --compile, or add "
            "--no-cuda-graphs",
        ),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
            [],
            "lower --batch-size or --image-size, or add --no-cuda-graphs",
        ),
    ],
)
def test_a_network_that_cannot_be_recorded_gets_one_line(
    folder, tmp_path, monkeypatch, capsys, allowed_on_a_cpu, error, options, expected
):
    def fail_to_record(*_, **__):
        raise error

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", fail_to_record)
    command = [folder, *TINY, *options, "--epochs", 1, "--cuda-graphs", "--exp-dir", tmp_path]
    message = fails(capsys, main_pcl.main, *command, status=1)
    assert message.strip().endswith(expected)


def test_more_processes_than_gpus_get_one_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    launch = {"RANK": "2", "WORLD_SIZE": "3", "MASTER_ADDR": "localhost", "MASTER_PORT": "29501"}
    for name, value in {**launch, "LOCAL_RANK": "2"}.items():
        monkeypatch.setenv(name, value)
    message = fails(capsys, lambda _: distributed.init_distributed())
    assert "process 2 of this machine sees 2 GPUs; start one process per GPU" in message
