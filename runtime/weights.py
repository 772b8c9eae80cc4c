"""Weights: find a run's backbone in a checkpoint, or any project's ResNet; load it, export one."""

import re
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch

from runtime.checkpoint import save_tensors
from runtime.cli import fail
from runtime.directory import write_atomically

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64)
DEEPEST = 8  # levels of nested dicts that are searched
# prefixes of a momentum branch, which is used only if there is no other
KEY_SIDE = re.compile(r"(?<![a-z])(k|key|momentum|teacher|ema|target)(?![a-z])", re.I)
FIRST_BLOCK = re.compile(r"((?:.*[. ])?)(layer1|[0-9]+)\.0\.conv1\.weight", re.DOTALL)
OWN_PREFIX = "module.encoder_q."
TIMM_PREFIX = "network."  # of timm's weights in an encoder; in files they have timm's names
# torchvision's children that have weights, in order
TORCHVISION = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")


class Found(NamedTuple):
    """A backbone in a checkpoint."""

    arch: str  # name for build_encoder
    small_images: bool  # whether the stem is the small one
    state: dict  # {torchvision's or timm's name: tensor}, without fc
    where: str  # its place, for example "state_dict, under module.encoder_q."


# -- finding ---------------------------------------------------------------------------------------
def find(checkpoint, path):
    """The backbone in a checkpoint, as Found: that of a run of this project, or any ResNet.

    path: the checkpoint's file, for messages. Ends the program in one line if there is none.
    """
    return find_own(checkpoint) or find_resnet(checkpoint, path)


def find_own(checkpoint):
    """The query backbone of a run of this project, as its arguments describe it, or None.

    The arguments are not to be trusted: `refuse_misfits` compares them with the weights.
    """
    args = checkpoint.get("args")
    tensors = checkpoint.get("state_dict")
    if "run" not in checkpoint or not isinstance(args, dict) or not isinstance(tensors, dict):
        return None
    arch = args.get("arch")
    stem = args.get("stem")
    if not isinstance(arch, str) or stem not in ("small", "imagenet"):
        return None
    state = {}
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not is_dense(tensor):
            return None
        name_in_encoder = name.removeprefix(OWN_PREFIX)
        if name.startswith(OWN_PREFIX) and not name_in_encoder.startswith("fc."):
            state[name_in_encoder.removeprefix(TIMM_PREFIX)] = tensor
    return Found(arch, stem == "small", state, f"state_dict, under {OWN_PREFIX}")


def find_resnet(checkpoint, path):
    """The ResNet in nested dicts, under any prefix, as Found.

    path: the checkpoint's file, for messages. Ends the program in one line if there is none.
    """
    tensors = flatten(checkpoint)
    prefix = find_prefix(tensors)
    names = {}
    for name, tensor in tensors.items():
        if name.startswith(prefix):
            names[name.removeprefix(prefix)] = tensor
    state = rename_as_in_torchvision(names)
    where = prefix.removesuffix(", under ") or "top level"

    # the first and the last convolution give the width, and must agree on it
    shapes = {name: list(tensor.shape) for name, tensor in state.items()}
    first = shapes.get("conv1.weight", "missing")
    last = shapes.get("layer4.0.conv2.weight", "missing")
    fits = len(first) == 4 and first[1] == 3 and last == [8 * first[0], 8 * first[0], 3, 3]
    if not fits:
        keys = list(names)
        if isinstance(checkpoint, dict):
            keys += checkpoint
        shown = [key[:80] for key in keys if isinstance(key, str)][:3]
        fail(
            f"{path} holds no ResNet that can be read: {where} has {shown}; conv1.weight is "
            f"{first}, layer4.0.conv2.weight {last}, not [W, 3, k, k] and [8W, 8W, 3, 3]"
        )

    # the number of blocks and of convolutions in each gives the depth
    blocks = {tuple(name.split(".")[:2]) for name in state if name.startswith("layer")}
    convolutions = 3 if "layer1.0.conv3.weight" in state else 2
    depth = 2 + convolutions * len(blocks)
    width = "" if first[0] == 64 else f"_w{first[0]}"
    return Found(f"resnet{depth}{width}", first[3] == 3, state, where)


def flatten(checkpoint):
    """The dense tensors in nested dicts, as {"key of a dict, under key in that dict": tensor}."""
    tensors = {}
    level = [("", checkpoint)]  # (place, value)
    for _ in range(DEEPEST):
        # a dict that occurs many times is read once per level, because it may contain itself
        dicts = {}
        for place, value in level:
            if isinstance(value, dict):
                prefix = f"{place[:200]}, under " if place else ""
                dicts[id(value)] = (prefix, value)
        level = []
        for prefix, value in dicts.values():
            level += [(prefix + key, value[key]) for key in value if isinstance(key, str)]
        for place, value in level:
            if is_dense(value):
                tensors[place] = value
    return tensors


def is_dense(value):
    """Whether `value` is an ordinary tensor with data."""
    if not isinstance(value, torch.Tensor) or value.is_nested or value.is_meta:
        return False
    return value.layout == torch.strided and value.dtype in DTYPES


def find_prefix(tensors):
    """The prefix of the best ResNet in {name: tensor}; "" if there is none.

    Torchvision's names come before lightly's numbers, the query side before the key side.
    """

    def rank(match):
        prefix, first_layer = match.groups()
        return first_layer != "layer1", bool(KEY_SIDE.search(prefix))

    matches = filter(None, map(FIRST_BLOCK.fullmatch, tensors))
    best = min(matches, key=rank, default=None)
    return "" if best is None else best[1]


def rename_as_in_torchvision(names):
    """{name: tensor} of a backbone under torchvision's names, without other tensors.

    lightly's names are the numbers of a Sequential's children, and "shortcut" for "downsample".
    """
    numbers = {name.split(".")[0] for name in names if name.split(".")[0].isdigit()}
    ascending = sorted(numbers, key=lambda number: (len(number), number))
    new_names = dict(zip(ascending, TORCHVISION, strict=False))
    new_names["shortcut"] = "downsample"

    def replace(match):
        return new_names.get(match[0], match[0])

    renamed = {}
    for name, tensor in names.items():
        name = re.sub(r"^[0-9]+(?=\.)|shortcut", replace, name)
        if re.match(r"(conv1|bn1|layer[0-9]+)\.", name):
            renamed[name] = tensor
    return renamed


# -- loading and exporting -------------------------------------------------------------------------
@torch.no_grad()
def load_backbone(encoder, found, path, advice=""):
    """Copy the weights of a Found into `encoder`, except its `.fc`.

    path: the checkpoint's file, for messages. Ends the program in one line, which ends in `advice`,
    if a weight is missing, unexpected or of another shape; the same, with other advice, if one is
    not finite.
    """
    refuse_misfits(encoder, found, path, advice)
    for name, tensor in found.state.items():
        if not tensor.isfinite().all():
            fail(
                f"{path}: {name} is not finite, so its training had diverged; name an earlier "
                "checkpoint"
            )
    for name, tensor in state_without_fc(encoder).items():
        tensor.copy_(found.state.get(name, tensor))


def refuse_misfits(encoder, found, path, advice=""):
    """End the program in one line, which ends in `advice`, if a Found does not fit `encoder`."""
    own = state_without_fc(encoder)
    wrong = []
    for name in {**own, **found.state}:
        shown = name[:80]
        if name not in own:
            wrong.append(f"{shown} is not expected")
        elif name not in found.state:
            if "num_batches" not in name:  # batch norm works without it
                wrong.append(f"{shown} is missing")
        elif found.state[name].shape != own[name].shape:
            shapes = [list(tensor.shape) for tensor in (found.state[name], own[name])]
            wrong.append(f"{shown} is {shapes[0]}, not {shapes[1]}")
    if wrong:
        problems = ", ".join(wrong[:3])
        fail(f"{path} does not hold the weights of a {found.arch}: {problems}{advice}")


def state_without_fc(encoder):
    """The weights and buffers of `encoder` outside its `.fc`, under torchvision's or timm's names.

    Returns {name: tensor}.
    """
    state = {}
    for name, tensor in encoder.state_dict().items():
        if not name.startswith("fc."):
            state[name.removeprefix(TIMM_PREFIX)] = tensor
    return state


def export(path, encoder, arch, small_images, metadata=None):
    """Write the backbone as {name: float32 tensor}, under torchvision's or timm's names.

    metadata: {name: text}, which a file whose name ends in .safetensors holds besides.
    Returns a line of Python that loads it. Raises OSError if `path` cannot be written.
    """
    state = {}
    for name, tensor in state_without_fc(encoder).items():
        state[name] = tensor.cpu().float().contiguous().clone()
    if Path(path).suffix == ".safetensors":
        # transformers refuses a file that does not name its format
        data = safetensors.torch.save(state, {"format": "pt", **(metadata or {})})
        write_atomically(Path(path), data)
        read = f"safetensors.torch.load_file({str(path)!r})"
    else:
        save_tensors(Path(path), state)
        read = f"torch.load({str(path)!r})"

    # how to load it
    if hasattr(encoder, "timm_options"):
        options = "".join(f", {name}={value}" for name, value in encoder.timm_options.items())
        return f'timm.create_model("{arch}"{options}).load_state_dict({read})'
    if not arch.startswith("resnet") or "_w" in arch or small_images:
        call = f'build_encoder("{arch}", small_images={small_images})'
        return f"{call}.load_state_dict({read}, strict=False)  # build_encoder: model.py"
    if Path(path).suffix == ".safetensors":
        return f'timm.create_model("{arch}", num_classes=0, checkpoint_path={str(path)!r})'
    return f"torchvision.models.{arch}().load_state_dict({read}, strict=False)"
