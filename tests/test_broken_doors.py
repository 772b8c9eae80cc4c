"""Odd checkpoints, names and flags: each works or gets one line that says what is wrong."""

import csv
import sys
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from conftest import TINY, assert_same, fails, run, stop_in_step, weights

import eval_lincls
import main_pcl
from model import build_encoder, is_timm

sys.path.append(str(Path(main_pcl.__file__).parent / "benchmarks"))
import experiments

VIT = [*TINY, "--bn-splits", 1, "--image-size", 32, "-a", "test_vit", "--epochs", 1]
CHECKPOINT = "checkpoint.pth.tar"


def columns(directory):
    """log.csv as {column: values}, without the speed."""
    with open(directory / "log.csv") as file:
        rows = list(csv.DictReader(file))
    return {name: [row[name] for row in rows] for name in rows[0] if name != "images_per_second"}


@pytest.fixture(scope="module")
def vit(folder, tmp_path_factory):
    """The directory of a run that has trained a ViT on images of 32 pixels."""
    directory = tmp_path_factory.mktemp("vit")
    run(folder, *VIT, "--exp-dir", directory)
    return directory


# -- checkpoints -----------------------------------------------------------------------------------
def test_a_run_that_an_older_version_stopped_within_an_epoch_continues(
    folder, tmp_path, monkeypatch
):
    """Its totals lack the loss, which was computed from its two parts."""
    options = [folder, *TINY, "--warmup", 1, "--epochs", 3, "--exp-dir"]
    run(*options, tmp_path / "whole")
    stop_in_step(5, monkeypatch, run, *options, tmp_path / "parts")
    path = tmp_path / "parts" / CHECKPOINT
    stored = torch.load(path, weights_only=True)
    assert stored["run"]["step"] > 0
    stored["run"]["totals"].pop("loss")
    torch.save(stored, path)

    run("--exp-dir", tmp_path / "parts", "--resume")
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    whole, parts = columns(tmp_path / "whole"), columns(tmp_path / "parts")
    assert list(parts) == list(whole)
    assert parts == whole


@pytest.mark.parametrize(
    "name, value, problem",
    [
        ("data", 5, "was trained on 5, which is not there"),
        ("image_size", "x", "its image_size is 'x'"),
        ("image_size", 0, "its image_size is 0 (must be at least 1"),
        ("image_size", True, "its image_size is True"),
        ("num_cluster", "x", "its num_cluster is 'x'"),
        ("num_cluster", [4, 0], "its num_cluster is [4, 0] (must be at least 1"),
        ("num_cluster", ["a"], "its num_cluster is ['a']"),
        ("num_cluster", [[2]], "its num_cluster is [[2]]"),
        ("num_cluster", [], "its num_cluster is []"),
    ],
)
def test_settings_that_no_run_has_get_one_line(vit, tmp_path, capsys, name, value, problem):
    stored = torch.load(vit / CHECKPOINT, weights_only=True)
    stored["args"][name] = value
    torch.save(stored, tmp_path / CHECKPOINT)
    error = fails(capsys, eval_lincls.main, "--exp-dir", tmp_path)
    assert problem in error


def test_tensors_called_like_a_run_cannot_be_resumed(folder, tmp_path, capsys):
    path = tmp_path / "odd.safetensors"
    safetensors.torch.save_file({"run": torch.zeros(1), "args": torch.zeros(1)}, path)
    options = [folder, *TINY, "--exp-dir", tmp_path / "run", "--resume", path]
    assert "cannot continue" in fails(capsys, main_pcl.main, *options)


@pytest.mark.parametrize(
    "flags, wanted",
    [
        (["-a", "resnet18_w4"], "of a resnet18_w4: conv1.weight is missing"),
        (["-a", "test_vit2"], "of a test_vit2: reg_token is missing"),
        (["-a", "test_vit", "--image-size", 48], "of a test_vit: pos_embed is [1, 5, 64]"),
    ],
)
def test_the_line_about_other_weights_names_the_network_that_was_asked_for(
    folder, tmp_path, capsys, vit, flags, wanted
):
    options = [*VIT, "--init", vit / CHECKPOINT, *flags, "--exp-dir", tmp_path]
    error = fails(capsys, main_pcl.main, folder, *options)
    assert wanted in error
    assert "give --arch, --stem and --image-size as they were in training" in error


def test_a_stem_that_nobody_has_asked_for_is_not_refused(folder, tmp_path, capsys):
    """It is that of the ResNet in --init."""
    encoder = build_encoder("resnet18_w4", small_images=True)
    torch.save(encoder.state_dict(), tmp_path / "a.pth")
    options = [*VIT, "--init", tmp_path / "a.pth", "--exp-dir", tmp_path / "run"]
    error = fails(capsys, main_pcl.main, folder, *options)
    assert "does not hold the weights of a test_vit" in error


# -- names -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "arch, message",
    [
        ("test_vit.r160_in1k", "such as test_vit: without a tag"),
        ("resnet18.a1_in1k", "such as resnet18: without a tag"),
        ("convnext_tiny_in22ft1k", "such as convnext_tiny"),  # a name that timm has given up
        ("test_vit.r160_in1k:x", "unknown arch"),
        ("local-dir:/", "unknown arch"),
        ("x" * 10_000, "choose one of resnet18"),
    ],
)
def test_only_plain_names_of_timm_are_networks(arch, message):
    """A tag names trained weights, but training starts from random ones."""
    assert not is_timm(arch)
    with pytest.raises(ValueError, match="unknown arch") as found:
        build_encoder(arch, image_size=32)
    assert message in str(found.value)
    assert len(str(found.value)) < 400


def test_a_network_that_a_reader_has_registered_needs_no_configuration(monkeypatch):
    def network_of_a_reader(pretrained=False, **options):
        return timm.create_model("test_byobnet", **options)

    registry = timm.models._registry
    monkeypatch.setitem(registry._model_entrypoints, "network_of_a_reader", network_of_a_reader)
    assert is_timm("network_of_a_reader")
    assert build_encoder("network_of_a_reader", 8, image_size=32).fc.out_features == 8


def test_a_batch_of_one_image_can_be_made_larger(folder, tmp_path, capsys):
    """A network of timm has one group, whatever the batch."""
    options = [folder, *VIT, "-b", 1, "--exp-dir", tmp_path]
    assert "change --batch-size or" in fails(capsys, main_pcl.main, *options)


# -- experiments.py --------------------------------------------------------------------------------
def test_data_of_other_classes_is_not_made(tmp_path, capsys):
    for i in range(11):
        (tmp_path / "source" / "train" / str(i)).mkdir(parents=True)
    options = ["--make-data", tmp_path / "source", tmp_path / "out"]
    assert "has 11 folders, not 10" in fails(capsys, experiments.main, *options)


def test_long_tails_are_those_of_data_to_make(capsys):
    assert "--make-data SOURCE DIR" in fails(capsys, experiments.main, "--long-tailed")
