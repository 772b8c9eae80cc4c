"""Networks of timm: trained, resumed, evaluated, exported and loaded into timm; what is refused."""

import argparse
import functools

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from conftest import TINY, assert_same, fails, run, stop_in_step, weights
from processes import finish_ranks

import eval_lincls
import main_pcl
import model
from model import MoCo, backbone, build_encoder
from runtime.weights import find, find_resnet

SIDE = 32  # pixels
NETWORKS = {"test_vit": "", "test_byobnet": "has batch norm of its own"}  # name: its note
SHORT = [*TINY, "--bn-splits", 1, "--image-size", SIDE, "--warmup", 1, "--optim", "adamw"]


def evaluate(*args):
    return eval_lincls.main([str(arg) for arg in args])


def make_encoder(arch="test_vit"):
    torch.manual_seed(0)
    return build_encoder(arch, 8, image_size=SIDE)


@pytest.fixture(scope="module", params=NETWORKS)
def finished(request, folder, tmp_path_factory):
    """The name of a network, and the directory of a run of two epochs that has trained it."""
    directory = tmp_path_factory.mktemp("run")
    run(folder, *SHORT, "-a", request.param, "--epochs", 2, "--exp-dir", directory)
    return request.param, directory


# -- training --------------------------------------------------------------------------------------
@pytest.mark.parametrize("arch", NETWORKS)
def test_a_run_in_two_parts_equals_an_undisturbed_one(folder, tmp_path, monkeypatch, capsys, arch):
    options = [folder, *SHORT, "-a", arch, "--epochs", 3, "--amp", "--exp-dir"]
    log = run(*options, tmp_path / "whole")
    assert all(np.isfinite(row["loss"]) for row in log)
    output = capsys.readouterr().out
    assert output.count("has batch norm of its own") == bool(NETWORKS[arch])
    stop_in_step(4, monkeypatch, run, *options, tmp_path / "parts")
    run("--exp-dir", tmp_path / "parts", "--resume")
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


@pytest.mark.parametrize("arch", NETWORKS)
def test_two_processes_share_a_run_with_a_pass_over_the_images(folder, tmp_path, arch):
    options = [folder, *SHORT, "-a", arch, "--epochs", 2, "--features", "pass"]
    options = [str(option) for option in [*options, "--exp-dir", tmp_path]]
    ended = finish_ranks(2, main_pcl.main, options)
    assert [status for status, _ in ended] == [0, 0], ended
    assert "on 2 x cpu" in ended[0][1]
    assert all(value.isfinite().all() for value in weights(tmp_path).values())


@pytest.mark.parametrize("optim", ["adamw", "lamb", "lars"])
def test_weights_decay_as_timm_wants_it(optim):
    """A step along gradients of zero shrinks exactly the weights that decay."""
    moco = MoCo(functools.partial(build_encoder, "test_vit", image_size=SIDE), 8, 16)
    args = argparse.Namespace(optim=optim, lr=0.1, wd=0.1, momentum=0.9)
    optimizer = main_pcl.build_optimizer(moco, args)
    trained = {name: p for name, p in moco.named_parameters() if p.requires_grad}
    for p in trained.values():
        p.data.fill_(1)
        p.grad = torch.zeros_like(p)
    optimizer.step()
    shrunk = {name for name, p in trained.items() if (p < 1).all()}
    matrices = {name for name, p in trained.items() if p.dim() > 1}
    places = {f"encoder_q.network.{name}" for name in ("pos_embed", "cls_token", "reg_token")}
    assert shrunk == matrices - places


def test_networks_run_channels_first_on_a_cpu():
    """Some are so narrow that oneDNN writes past the end of a buffer otherwise."""
    network = make_encoder("test_byobnet").to(memory_format=torch.channels_last)
    formats = []

    def look(layer, inputs, _):
        formats.extend([inputs[0].is_contiguous(), layer.weight.is_contiguous()])

    for layer in network.modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.register_forward_hook(look)
    network(torch.randn(2, 3, SIDE, SIDE).to(memory_format=torch.channels_last))
    assert formats
    assert all(formats)


def test_capturing_graphs_leaves_running_statistics_alone(monkeypatch):
    def passes(encoder, images, num_warmup_iters):
        for _ in range(num_warmup_iters):
            encoder(*images)

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", passes)
    moco = MoCo(functools.partial(build_encoder, "test_byobnet", image_size=SIDE), 8, 16)
    before = {name: value.clone() for name, value in moco.state_dict().items()}
    images = torch.randn(4, 3, SIDE, SIDE)
    model.capture_encoders(moco, images, torch.autocast("cpu", enabled=False))
    assert_same(before, moco.state_dict())


def test_a_run_can_start_from_another_one(folder, tmp_path, finished, capsys):
    """With a rate of almost nothing, its parameters stay those of the other run."""
    arch, directory = finished
    options = [folder, *SHORT[2:], "--init", directory / "checkpoint.pth.tar", "--epochs", 1]
    run(*options, "--lr", 1e-30, "--wd", 0, "--exp-dir", tmp_path)
    assert f"under module.encoder_q.: {arch}" in capsys.readouterr().out
    names = [name for name, _ in make_encoder(arch).named_parameters() if name[:3] != "fc."]
    assert names
    old, new = weights(directory), weights(tmp_path)
    for name in names:
        name = f"module.encoder_q.{name}"
        torch.testing.assert_close(new[name], old[name], rtol=0, atol=1e-20)
    assert "initial" in evaluate("--exp-dir", tmp_path, "--num-cluster", 3)


# -- evaluation and export -------------------------------------------------------------------------
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_timm_loads_what_is_exported(finished, tmp_path, capsys, suffix):
    arch, directory = finished
    path = tmp_path / f"backbone.{suffix}"
    table = evaluate("--exp-dir", directory, "--num-cluster", 3, "--export", path)
    assert table.keys() == {"trained", "untrained", "raw pixels"}
    assert table["trained"] != table["untrained"]
    line = capsys.readouterr().out.split(f"to load {path}: ")[1].splitlines()[0]

    # strictly, into the network that the printed line makes
    names = {"timm": timm, "torch": torch, "safetensors": safetensors}
    exec("network = " + line.replace(".load_state_dict", "\nnetwork.load_state_dict"), names)
    network = names["network"].eval()
    assert type(network) is type(timm.create_model(arch))
    encoder = make_encoder(arch).eval()
    own = {}
    for name, value in weights(directory).items():
        if name.startswith("module.encoder_q.network."):
            own[name.removeprefix("module.encoder_q.")] = value
    missing = encoder.load_state_dict(own, strict=False)
    assert missing.unexpected_keys == []
    assert {name.split(".")[0] for name in missing.missing_keys} == {"fc"}
    images = torch.randn(2, 3, SIDE, SIDE)
    assert torch.equal(network(images), backbone(encoder)(images))


def test_another_image_size_works_or_is_named(finished, capsys):
    """Only a ViT's weights depend on it."""
    arch, directory = finished
    options = ["--exp-dir", directory, "--num-cluster", 3, "--no-baselines", "--image-size", 48]
    if arch == "test_vit":
        error = fails(capsys, eval_lincls.main, *options)
        assert "trained on 32 pixels: leave out --image-size" in error
    else:
        assert "linear" in evaluate(*options)["trained"]


def test_a_run_s_network_follows_from_its_arguments(folder, tmp_path, monkeypatch):
    """Also a ResNet's, whose weights could tell."""
    run(folder, *TINY, "--epochs", 1, "--exp-dir", tmp_path)
    monkeypatch.setattr("runtime.weights.find_resnet", lambda *_: pytest.fail("it is guessed"))
    assert "linear" in evaluate("--exp-dir", tmp_path, "--num-cluster", 3)["trained"]


@pytest.mark.parametrize(
    "arch", ["resnet18_w99999", "resnet18_w" + "9" * 40, "vit_giant_patch14_224", "nothing", ""]
)
def test_a_checkpoint_that_names_another_network_gets_one_line(
    folder, finished, tmp_path, capsys, monkeypatch, arch
):
    """Before any memory is taken for it."""

    def without_memory(*args, **options):
        assert torch.empty(0).is_meta
        return build_encoder(*args, **options)

    monkeypatch.setattr(eval_lincls, "build_encoder", without_memory)
    _, directory = finished
    stored = torch.load(directory / "checkpoint.pth.tar", weights_only=True)
    stored["args"]["arch"] = arch
    torch.save(stored, tmp_path / "odd.pth.tar")
    fails(capsys, eval_lincls.main, folder, "--pretrained", tmp_path / "odd.pth.tar")


def test_the_weights_of_strangers_decide_about_their_network():
    """Whatever a file of another project says besides."""
    resnet = build_encoder("resnet18_w4", small_images=True).state_dict()
    state = {f"module.encoder_q.{name}": value for name, value in resnet.items()}
    args = {"arch": "test_vit", "stem": "imagenet"}
    for more in ({"args": args}, {"args": args, "run": None, "arch": "vit"}, {"run": {}}):
        stranger = {"state_dict": state, **more}
        if more.keys() >= {"args", "run"}:
            stranger["args"] = {"data": "", "image_size": 8}  # as benchmarks/published.py leaves it
        found = find(stranger, "file")
        assert found[:2] == ("resnet18_w4", True)
        assert_same(found.state, find_resnet(stranger, "file").state)


def test_a_backbone_of_the_reader_s_own_trains_as_before(folder, tmp_path, monkeypatch, capsys):
    """The README's example, which has our batch norm, and cannot be built without memory."""

    def build(arch, num_classes=128, norm_layer=None, **others):
        if arch == "regnet":
            return torchvision.models.regnet_y_400mf(num_classes=num_classes, norm_layer=norm_layer)
        return build_encoder(arch, num_classes, norm_layer=norm_layer, **others)

    for script in (main_pcl, eval_lincls):
        monkeypatch.setattr(script, "build_encoder", build)
    options = ["-a", "regnet", "--image-size", SIDE, "--epochs", 1, "--exp-dir", tmp_path]
    run(folder, *TINY, *options)
    assert "own, which" not in capsys.readouterr().out
    path = tmp_path / "regnet.pth"
    options = ["--exp-dir", tmp_path, "--num-cluster", 3, "--no-baselines", "--export", path]
    assert "linear" in evaluate(*options)["trained"]
    state = torch.load(path, weights_only=True)
    assert state.keys() > {"stem.0.weight", "stem.1.running_mean"}


# -- what is refused -------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "flags, message",
    [
        (["-a", "convnext_nanno"], "choose one of resnet18, resnet34, "),
        (["-a", "convnext_nanno"], "any network of timm's, such as convnext_nano,"),
        (["-a", "hf-hub:timm/test_vit"], "unknown arch"),
        (["-a", "resnet19", "--stem", "small"], "unknown arch"),
        (["-a", "resnet18_w99999"], "--arch would need"),
        (["-a", "test_vit.no_tag"], "such as test_vit: without a tag"),
        (["-a", "test_vit", "--image-size", 8], "images of 8 pixels; choose another --arch or"),
        (["-a", "inception_v3"], "no pooled features of images of 32 pixels"),
        (["-a", "test_vit", "--stem", "small"], "give --stem imagenet, or leave it out"),
        (["-a", "test_vit", "--bn-splits", 2], "give --bn-splits 1, or leave it out"),
    ],
)
def test_what_cannot_work_gets_one_line(folder, tmp_path, capsys, flags, message):
    options = [folder, "--image-size", SIDE, "-b", 16, *flags, "--exp-dir", tmp_path / "run"]
    assert message in fails(capsys, main_pcl.main, *options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arch, stem, bn_splits",
    [("resnet18", "small", 2), ("resnet10t", "imagenet", 1), ("a_network_of_a_reader", "small", 2)],
)
def test_only_networks_of_timm_have_no_groups_by_default(arch, stem, bn_splits):
    datasets = argparse.Namespace(train=range(50_000), image_size=32, augmentation={})
    args = main_pcl.get_parser().parse_args(["-a", arch])
    final = main_pcl.fill_in_defaults(args, datasets, 1, "cpu")
    assert (final.arch, final.stem, final.bn_splits) == (arch, stem, bn_splits)


def test_the_pooled_features_decide_not_what_a_network_says_of_itself():
    """This one has another number of features after its pooling than before."""
    encoder = make_encoder("mobilenetv3_small_050")
    assert encoder.network.num_features != encoder.fc.in_features
    assert encoder(torch.randn(2, 3, SIDE, SIDE)).shape == (2, 8)
