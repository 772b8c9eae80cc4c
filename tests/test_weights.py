"""Other projects' weights: found under each project's names, loaded strictly, exported for them."""

import copy

import pytest
import timm
import torch
import torch.nn as nn
import torchvision
from conftest import assert_same, fails

from model import backbone, build_encoder
from runtime.weights import export, find_resnet, load_backbone

CHILDREN = ["conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4", "avgpool"]

# what else a checkpoint may hold
MORE = {
    "epoch": 3,
    "arch": "x",
    7: {8: torch.zeros(1)},
    "optimizer": {"state": {0: {"m": torch.zeros(1)}}, "g": [{}]},
}

# The query side, the key side (or None), and where the query side is reported to be.
# A side is (name of its dict in the file, or None for the file itself; prefix of its tensors).
FAMILIES = {
    "torchvision": ((None, ""), None, "top level"),
    "swav": ((None, "module."), None, "module."),
    "moco": (
        ("state_dict", "module.encoder_q."),
        ("state_dict", "module.encoder_k."),
        "state_dict, under module.encoder_q.",
    ),
    "moco v3": (
        ("state_dict", "module.base_encoder."),
        ("state_dict", "module.momentum_encoder."),
        "state_dict, under module.base_encoder.",
    ),
    "dino": (
        ("student", "module.backbone."),
        ("teacher", "backbone."),
        "student, under module.backbone.",
    ),
    "solo-learn": (
        ("state_dict", "backbone."),
        ("state_dict", "momentum_backbone."),
        "state_dict, under backbone.",
    ),
    "timm's average": (("state_dict", ""), ("state_dict_ema", ""), "state_dict"),
    "a key side alone": (("teacher", "module.backbone."), None, "teacher, under module.backbone."),
}


def under(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def without_fc(module):
    state = module.state_dict()
    return {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}


@pytest.fixture(scope="module")
def sides():
    """A query encoder and a key encoder."""
    torch.manual_seed(0)
    return torchvision.models.resnet18(), torchvision.models.resnet18()


# -- finding and loading


@pytest.mark.parametrize("family", FAMILIES)
def test_the_query_side_of_each_family_is_found(sides, family):
    query, key, where = FAMILIES[family]
    query_encoder, key_encoder = sides
    file = {"head.0.0.conv1.weight": torch.zeros(2, 2)}

    def add(side, encoder):
        name, prefix = side
        part = file if name is None else file.setdefault(name, {})
        part.update(under(prefix, encoder.state_dict()))

    if key is not None:
        add(key, key_encoder)  # first in the file, so that the order does not help
    add(query, query_encoder)
    found = find_resnet(file | MORE, "file")
    assert found.arch == "resnet18"
    assert not found.small_images
    assert found.where == where
    assert_same(found.state, without_fc(query_encoder))


@pytest.mark.parametrize("own_resnet", [False, True])
def test_the_query_side_of_lightly_is_found(sides, own_resnet):
    """lightly puts torchvision's ResNet, or its own, into a Sequential with numbered children."""
    children = CHILDREN
    if own_resnet:
        children = [name for name in CHILDREN if name not in ("relu", "maxpool")]

    def numbered(encoder):
        return nn.Sequential(*(getattr(encoder, name) for name in children)).state_dict()

    # The numbers tell the children apart, not the order in the file.
    query = under("backbone.", numbered(sides[0]))
    query = dict(sorted(query.items(), reverse=True))
    if own_resnet:
        query = {name.replace("downsample", "shortcut"): query[name] for name in query}

    key = under("backbone_momentum.", numbered(sides[1]))
    rest = dict.fromkeys(
        ["projection_head.0.weight", "backbone.9.weight", "backbone.+.weight"], torch.zeros(2, 2)
    )
    found = find_resnet({"state_dict": key | rest | query}, "file")
    assert found.arch == "resnet18"
    assert not found.small_images
    assert found.where == "state_dict, under backbone."
    assert_same(found.state, without_fc(sides[0]))


@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "resnet18_w16"])
def test_weights_in_half_precision_without_counters_load(arch):
    small = arch == "resnet18_w16"
    source = build_encoder(arch, small_images=True) if small else timm.create_model(arch)
    half = {name: tensor.half() for name, tensor in source.state_dict().items()}
    old = {name: half[name] for name in half if not name.endswith("num_batches_tracked")}
    found = find_resnet(old, "file")
    assert found.arch == arch
    assert found.small_images == small

    encoder = build_encoder(arch, small_images=small)
    fc = encoder.fc.weight.clone()
    load_backbone(encoder, found, "file")
    rounded = {name: t.half().to(t.dtype) for name, t in without_fc(source).items()}
    assert_same(without_fc(encoder), rounded)
    assert torch.equal(encoder.fc.weight, fc)
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}


# -- refusals


def refusal(capsys, checkpoint):
    """The line with which find_resnet ends the program."""
    return fails(capsys, lambda _: find_resnet(checkpoint, "fi\nle"))


def test_a_refusal_names_what_the_file_holds(capsys, sides):
    own = sides[0].state_dict()
    sparse = {"layer1.0.conv1.weight": torch.zeros(2, 2).to_sparse()}
    cyclic = {"a\nb": 1, 5: own, "list": [own], "sparse": sparse}
    cyclic |= {f"self{i}": cyclic for i in range(100)}
    expected = "holds no ResNet that can be read: top level has ['a\\nb', 'list', 'sparse'];"
    assert f"fi\\nle {expected}" in refusal(capsys, cyclic)

    vit = {"model": {"cls_token": torch.zeros(1), "x": "y"}}
    assert "has ['model, under cls_token', 'model']" in refusal(capsys, vit)

    deep_stem = under("module.", timm.create_model("resnet50d").state_dict())
    assert "module. has ['conv1.0.weight', 'conv1.1.weight'," in refusal(capsys, deep_stem)


def test_a_refusal_names_the_wrong_weight(capsys, sides):
    own = sides[0].state_dict()
    first = own["conv1.weight"]
    grey = own | {"conv1.weight": first[:, :1]}
    assert "conv1.weight is [64, 1, 7, 7]," in refusal(capsys, grey)

    for odd in (first.to("meta"), first.cfloat()):
        assert "is missing" in refusal(capsys, own | {"conv1.weight": odd})

    short = {name: tensor for name, tensor in own.items() if "layer4" not in name}
    assert "layer4.0.conv2.weight missing" in refusal(capsys, short)

    huge = own | {"conv1.weight": torch.zeros(10**5, 3, 3, 3)}
    assert "layer4.0.conv2.weight [512, 512, 3, 3], not" in refusal(capsys, huge)


def test_files_without_weights_are_refused(capsys, sides):
    for other in (None, 5, [sides[0].state_dict()], torch.zeros(2), {}):
        assert "no ResNet" in refusal(capsys, other)


def test_weights_that_do_not_fit_change_nothing(capsys, sides):
    encoder = build_encoder("resnet18")
    before = copy.deepcopy(encoder.state_dict())
    state = sides[0].state_dict()
    del state["bn1.bias"]
    state["layer3.1.conv2.weight"] = torch.zeros(2, 2)
    state["layer1.0.se"] = torch.zeros(9)
    state["layer1.0.x"] = torch.zeros(9)
    found = find_resnet(state, "file.pth")
    line = fails(capsys, lambda _: load_backbone(encoder, found, "file.pth"))
    assert "file.pth does not hold the weights of a resnet18: bn1.bias is missing" in line
    wrong_shape = "layer3.1.conv2.weight is [2, 2], not [256, 256, 3, 3]"
    assert f"{wrong_shape}, layer1.0.se is not expected\n" in line
    assert_same(encoder.state_dict(), before)


def test_weights_that_are_not_finite_are_refused(capsys, sides):
    state = dict(sides[0].state_dict())
    state["layer2.0.conv1.weight"] = torch.full_like(state["layer2.0.conv1.weight"], torch.nan)
    found = find_resnet(state, "file.pth")
    line = fails(capsys, lambda _: load_backbone(build_encoder("resnet18"), found, "file.pth"))
    assert "file.pth: layer2.0.conv1.weight is not finite, so its training had diverged" in line


# -- export

ARCHS = [("resnet18", False), ("resnet18_w16", True)]


@pytest.mark.parametrize(("arch", "small"), ARCHS)
def test_exported_weights_load_with_the_line_given(tmp_path, arch, small):
    path = tmp_path / "it's.pth"
    encoder = build_encoder(arch, small_images=small).eval()
    other_format = copy.deepcopy(encoder).to(memory_format=torch.channels_last).double()
    line = export(path, other_format, arch, small)
    assert small == ("torchvision" not in line)

    # The line runs. Only the classifier's weights are missing.
    names = {"torch": torch, "torchvision": torchvision, "build_encoder": build_encoder}
    exec(line, names)
    exec("model = " + line.replace(".load_state_dict", "\nkeys = model.load_state_dict"), names)
    assert names["keys"].missing_keys == ["fc.weight", "fc.bias"]
    assert names["keys"].unexpected_keys == []
    images = torch.randn(2, 3, 40, 40)
    assert torch.equal(backbone(names["model"].eval())(images), backbone(encoder)(images))

    # The file holds plain float32 tensors, and find_resnet reads it.
    stored = torch.load(path, weights_only=True)
    assert all(tensor.dtype == torch.float32 for tensor in stored.values())
    assert all(tensor.is_contiguous() for tensor in stored.values())
    found = find_resnet(stored, path)
    assert found.arch == arch
    assert found.small_images == small


@pytest.mark.parametrize(("arch", "small"), ARCHS)
def test_an_export_to_no_directory_raises_an_error(tmp_path, arch, small):
    encoder = build_encoder(arch, small_images=small)
    path = tmp_path / "none" / "f.pth"
    with pytest.raises(OSError, match="none"):
        export(path, encoder, arch, small)
