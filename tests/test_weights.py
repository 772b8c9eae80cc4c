"""Weights of other projects: found under every family's names, loaded strictly, written for others to load."""

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
MORE = {"epoch": 3, "arch": "x", 7: {8: torch.zeros(1)}, "optimizer": {"state": {0: {"m": torch.zeros(1)}}, "g": [{}]}}
FAMILIES = {  # the query side's dict and prefix, then the key side's, which comes first in the file
    "torchvision": (None, ""),
    "swav": (None, "module."),
    "moco": ("state_dict", "module.encoder_q.", "state_dict", "module.encoder_k."),
    "moco v3": ("state_dict", "module.base_encoder.", "state_dict", "module.momentum_encoder."),
    "dino": ("student", "module.backbone.", "teacher", "backbone."),
    "solo-learn": ("state_dict", "backbone.", "state_dict", "momentum_backbone."),
    "timm's average": ("state_dict", "", "state_dict_ema", ""),
    "a key side alone": ("teacher", "module.backbone."),
}


def under(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def without_fc(module):
    return {name: tensor for name, tensor in module.state_dict().items() if not name.startswith("fc.")}


@pytest.fixture(scope="module")
def sides():
    torch.manual_seed(0)
    return torchvision.models.resnet18(), torchvision.models.resnet18()


@pytest.mark.parametrize("family", FAMILIES)
def test_families(sides, family):
    query, key, file = FAMILIES[family][:2], FAMILIES[family][2:], {"head.0.0.conv1.weight": torch.zeros(2, 2)}
    for (place, prefix), side in ((key, sides[1]), (query, sides[0])) if key else ((query, sides[0]),):
        (file.setdefault(place, {}) if place else file).update(under(prefix, side.state_dict()))
    found = find_resnet(file | MORE, "file")
    where = ", under ".join(filter(None, query)) or "top level"
    assert (found.arch, found.small_images, found.where) == ("resnet18", False, where)
    assert_same(found.state, without_fc(sides[0]))


@pytest.mark.parametrize("left_out", [(), ("relu", "maxpool")])
def test_lightly(sides, left_out):
    query, key = (nn.Sequential(*(getattr(m, c) for c in CHILDREN if c not in left_out)).state_dict() for m in sides)
    query = dict(sorted(under("backbone.", query).items(), reverse=True))  # it is the number that counts
    query = {name.replace(*(("downsample", "shortcut") if left_out else "..")): query[name] for name in query}
    rest = dict.fromkeys(["projection_head.0.weight", "backbone.9.weight", "backbone.+.weight"], torch.zeros(2, 2))
    found = find_resnet({"state_dict": under("backbone_momentum.", key) | rest | query}, "file")
    assert (found.arch, found.small_images, found.where) == ("resnet18", False, "state_dict, under backbone.")
    assert_same(found.state, without_fc(sides[0]))


@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "resnet18_w16"])
def test_load(arch):
    small = arch == "resnet18_w16"
    source = build_encoder(arch, small_images=True) if small else timm.create_model(arch)
    old = {name: t.half() for name, t in source.state_dict().items() if not name.endswith("num_batches_tracked")}
    found = find_resnet(old, "file")
    assert (found.arch, found.small_images) == (arch, small)
    fc = (encoder := build_encoder(arch, small_images=small)).fc.weight.clone()
    load_backbone(encoder, found, "file")
    assert_same(without_fc(encoder), {n: t.half().to(t.dtype) for n, t in without_fc(source).items()})
    assert torch.equal(encoder.fc.weight, fc) and {p.dtype for p in encoder.parameters()} == {torch.float32}


def test_no_resnet_in_one_line(capsys, sides):
    def refusal(checkpoint):
        return fails(capsys, lambda _: find_resnet(checkpoint, "fi\nle"))

    own, deep = sides[0].state_dict(), timm.create_model("resnet50d").state_dict()
    cyclic = {"a\nb": 1, 5: own, "list": [own], "sparse": {"layer1.0.conv1.weight": torch.zeros(2, 2).to_sparse()}}
    cyclic |= {f"self{i}": cyclic for i in range(100)}
    assert "fi\\nle holds no ResNet that can be read: top level has ['a\\nb', 'list', 'sparse'];" in refusal(cyclic)
    assert "has ['model, under cls_token', 'model']" in refusal({"model": {"cls_token": torch.zeros(1), "x": "y"}})
    assert "module. has ['conv1.0.weight', 'conv1.1.weight'," in refusal(under("module.", deep))
    first = own["conv1.weight"]
    assert "conv1.weight is [64, 1, 7, 7]," in refusal(own | {"conv1.weight": first[:, :1]})
    assert all("is missing" in refusal(own | {"conv1.weight": odd}) for odd in (first.to("meta"), first.cfloat()))
    assert "layer4.0.conv2.weight missing" in refusal({n: t for n, t in own.items() if "layer4" not in n})
    assert "layer4.0.conv2.weight [512, 512, 3, 3], not" in refusal(own | {"conv1.weight": torch.zeros(10**5, 3, 3, 3)})
    assert all("no ResNet" in refusal(other) for other in (None, 5, [own], torch.zeros(2), {}))


def test_weights_that_do_not_fit(capsys, sides):
    own, encoder = sides[0].state_dict(), build_encoder("resnet18")
    before = copy.deepcopy(encoder.state_dict())
    del own["bn1.bias"]
    own |= {"layer3.1.conv2.weight": torch.zeros(2, 2)} | dict.fromkeys(["layer1.0.se", "layer1.0.x"], torch.zeros(9))
    line = fails(capsys, lambda _: load_backbone(encoder, find_resnet(own, "file.pth"), "file.pth"))
    assert "file.pth does not hold the weights of a resnet18: bn1.bias is missing, not [64]" in line
    assert "layer3.1.conv2.weight is [2, 2], not [256, 256, 3, 3], layer1.0.se is [9], not expected\n" in line
    assert_same(encoder.state_dict(), before)


@pytest.mark.parametrize(("arch", "small"), [("resnet18", False), ("resnet18_w16", True)])
def test_export(tmp_path, capsys, arch, small):
    encoder, path = build_encoder(arch, small_images=small).eval(), tmp_path / "it's.pth"
    line = export(path, copy.deepcopy(encoder).to(memory_format=torch.channels_last).double(), arch, small)
    names = {"torch": torch, "torchvision": torchvision, "build_encoder": build_encoder}
    exec(line, names)
    exec("model = " + line.replace(".load_state_dict", "\nkeys = model.load_state_dict"), names)
    assert (names["keys"].missing_keys, names["keys"].unexpected_keys) == (["fc.weight", "fc.bias"], [])
    images = torch.randn(2, 3, 40, 40)
    assert torch.equal(backbone(names["model"].eval())(images), backbone(encoder)(images))
    stored = torch.load(path, weights_only=True)
    assert all(tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in stored.values())
    assert find_resnet(stored, path)[:2] == (arch, small) and small == ("torchvision" not in line)
    assert "cannot write" in fails(capsys, lambda _: export(tmp_path / "none" / "f.pth", encoder, arch, small))
