"""--export FILE.safetensors: what is in the file, and that timm and this project load it."""

import json
import os

import pytest
import safetensors
import safetensors.torch
import timm
import torch
from conftest import TINY, run, weights

import eval_lincls
from model import backbone, build_encoder
from runtime.weights import export

IMAGES = torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(0))


def evaluate(*args):
    return eval_lincls.main([str(arg) for arg in args])


def metadata_of(path):
    with safetensors.safe_open(path, "pt") as file:
        return file.metadata()


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_timm_loads_an_exported_resnet(tmp_path, arch):
    """By its path, by the line that is printed, and from a folder as on the Hugging Face hub."""
    encoder = build_encoder(arch).eval()
    expected = backbone(encoder)(IMAGES)
    path = tmp_path / "it's.safetensors"
    line = export(path, encoder, arch, False, {"epoch": "3"})
    assert metadata_of(path) == {"epoch": "3", "format": "pt"}
    network = eval(line, {"timm": timm}).eval()
    torch.testing.assert_close(network(IMAGES), expected)

    hub = tmp_path / "hub"
    timm.models.save_for_hf(network, hub, safe_serialization=True)
    network = timm.create_model(f"local-dir:{hub}", pretrained=True).eval()
    torch.testing.assert_close(network(IMAGES), expected)
    os.replace(path, hub / "model.safetensors")  # the exported file in place of timm's
    network = timm.create_model(f"local-dir:{hub}", pretrained=True).eval()
    torch.testing.assert_close(network(IMAGES), expected)


def test_training_and_evaluation_start_from_such_a_file(folder, tmp_path, capsys):
    encoder = build_encoder("resnet18_w4", small_images=True)
    path = tmp_path / "a.safetensors"
    export(path, encoder, "resnet18_w4", True)
    run(folder, *TINY, "--init", path, "--epochs", 1, "--lr", 1e-9, "--exp-dir", tmp_path / "run")
    trained = weights(tmp_path / "run")
    torch.testing.assert_close(trained["module.encoder_q.conv1.weight"], encoder.conv1.weight)

    evaluate(folder, "--pretrained", path, "--no-baselines", "--num-cluster", 4)
    assert f"{path}" in capsys.readouterr().out
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(SystemExit) as stop:
        evaluate(folder, "--pretrained", path)
    assert stop.value.code == 2
    assert "is truncated or not a checkpoint" in capsys.readouterr().err


def test_a_small_stem_loads_into_this_project_and_into_timm(tmp_path):
    encoder = build_encoder("resnet18", small_images=True).eval()
    expected = backbone(encoder)(IMAGES)
    path = tmp_path / "a.safetensors"
    line = export(path, encoder, "resnet18", True)
    names = {"build_encoder": build_encoder, "safetensors": safetensors}
    exec("model = " + line.replace(".load_state_dict", "\nkeys = model.load_state_dict"), names)
    assert names["keys"].missing_keys == ["fc.weight", "fc.bias"]
    assert torch.equal(backbone(names["model"].eval())(IMAGES), expected)

    network = timm.create_model("resnet18", num_classes=0).eval()
    network.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)
    network.maxpool = torch.nn.Identity()
    network.load_state_dict(safetensors.torch.load_file(path))  # strictly
    torch.testing.assert_close(network(IMAGES), expected)


def test_the_keys_are_those_of_an_ordinary_export(tmp_path):
    encoder = build_encoder("resnet18_w4", small_images=True)
    export(tmp_path / "a.pth", encoder, "resnet18_w4", True)
    export(tmp_path / "a.safetensors", encoder, "resnet18_w4", True)
    ordinary = torch.load(tmp_path / "a.pth", weights_only=True)
    state = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert state.keys() == ordinary.keys()
    assert all(torch.equal(state[name], ordinary[name]) for name in ordinary)


def test_an_exported_run_says_how_it_was_trained(folder, tmp_path, capsys):
    """But not where its data lie."""
    directory = tmp_path / "run"
    run(folder, *TINY, "--epochs", 1, "--lr", 0.0625, "--exp-dir", directory)
    path = tmp_path / "a.safetensors"
    evaluate("--exp-dir", directory, "--no-baselines", "--export", path)
    assert f"to load {path}: build_encoder" in capsys.readouterr().out

    metadata = metadata_of(path)
    assert metadata["arch"] == "resnet18_w4"
    assert metadata["epoch"] == "1"
    assert metadata["data"] == folder.name
    recipe = json.loads(metadata["recipe"])
    assert recipe["lr"] == 0.0625
    assert recipe["num_cluster"] == [4, 8]
    assert str(folder.parent) not in str(metadata)
    assert str(tmp_path) not in str(metadata)

    trained = weights(directory)
    for name, tensor in safetensors.torch.load_file(path).items():
        assert torch.equal(tensor, trained[f"module.encoder_q.{name}"].float())


def test_weights_of_another_project_say_what_is_known(folder, tmp_path):
    encoder = build_encoder("resnet18_w4", small_images=True)
    torch.save({"state_dict": encoder.state_dict(), "epoch": 7}, tmp_path / "a.pth")
    options = ["--no-baselines", "--num-cluster", 3, "--export", tmp_path / "a.safetensors"]
    evaluate(folder, "--pretrained", tmp_path / "a.pth", *options)
    expected = {"arch": "resnet18_w4", "epoch": "7", "format": "pt"}
    assert metadata_of(tmp_path / "a.safetensors") == expected


def test_an_export_to_no_directory_raises_an_error(tmp_path):
    encoder = build_encoder("resnet18_w4", small_images=True)
    with pytest.raises(OSError, match="none"):
        export(tmp_path / "none" / "a.safetensors", encoder, "resnet18_w4", True)


@pytest.mark.parametrize("data", [b"na\xffme", b"a/b\nc", b""])
def test_any_name_of_a_folder_is_metadata(tmp_path, data):
    stored = {"data": os.fsdecode(data), "odd": torch.ones(1), ("a",): 1}
    metadata = eval_lincls.describe_training("resnet18_w4", None, stored)
    encoder = build_encoder("resnet18_w4", small_images=True)
    export(tmp_path / "a.safetensors", encoder, "resnet18_w4", True, metadata)
    names = {b"": "digits", b"na\xffme": r"na\udcffme"}
    assert metadata_of(tmp_path / "a.safetensors")["data"] == names.get(data, "b\nc")
