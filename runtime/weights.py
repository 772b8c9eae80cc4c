"""Weights of other projects: find a ResNet's backbone in what a checkpoint holds, load it, write one for others."""

import re
from pathlib import Path
from typing import NamedTuple

import torch

from runtime.checkpoint import save_tensors
from runtime.cli import fail, format_error

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64)
KEY_SIDE = re.compile(r"(?<![a-z])(k|key|momentum|teacher|ema|target)(?![a-z])", re.I)  # not taken if there is another
FIRST_BLOCK = re.compile(r"((?:.*[. ])?)(layer1|[0-9]+)\.0\.conv1\.weight", re.DOTALL)
TORCHVISION = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")  # the children that have weights, in order


class Found(NamedTuple):
    arch: str  # as for build_encoder, like small_images
    small_images: bool
    state: dict  # torchvision's names -> tensors, without fc
    where: str  # as "state_dict, under module.encoder_q."


def find_resnet(checkpoint, path):
    """The ResNet in nested dicts, under any prefix, as Found. Ends the program in one line where none can be read."""
    tensors = _flatten(checkpoint)
    blocks = filter(None, map(FIRST_BLOCK.fullmatch, tensors))
    best = min(blocks, key=lambda block: (block[2] != "layer1", bool(KEY_SIDE.search(block[1]))), default=("", ""))
    prefix = best[1]
    names = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    state = _as_in_torchvision(names)
    where = format_error(prefix.removesuffix(", under ") or "top level")
    first, last = (list(state[n].shape) if n in state else "missing" for n in ("conv1.weight", "layer4.0.conv2.weight"))
    if len(first) != 4 or first[1] != 3 or last != [8 * first[0], 8 * first[0], 3, 3]:  # else as large as claimed
        held = [key[:80] for key in [*names, *getattr(checkpoint, "keys", dict)()] if isinstance(key, str)]
        what = f"{where} has {held[:3]}; conv1.weight is {first}, layer4.0.conv2.weight {last}"
        fail(format_error(f"{path} holds no ResNet that can be read: {what}, not [W, 3, k, k] and [8W, 8W, 3, 3]"))
    blocks = {tuple(name.split(".")[:2]) for name in state if name.startswith("layer")}
    depth = 2 + (3 if "layer1.0.conv3.weight" in state else 2) * len(blocks)
    width = "" if first[0] == 64 else f"_w{first[0]}"
    return Found(f"resnet{depth}{width}", first[3] == 3, state, where)


def _flatten(checkpoint):
    """The dense tensors in nested dicts, as {"key of a dict, under key in it": tensor}."""
    tensors, level = {}, [("", checkpoint)]
    for _ in range(8):  # deep; a dict that is there many times is read once at each depth, as it may hold itself
        dicts = {id(part): (f"{at[:200]}, under " if at else "", part) for at, part in level if isinstance(part, dict)}
        level = [(at + key, part[key]) for at, part in dicts.values() for key in part if isinstance(key, str)]
        dense = ((n, t) for n, t in level if isinstance(t, torch.Tensor) and not t.is_nested and not t.is_meta)
        tensors |= {n: t for n, t in dense if t.layout == torch.strided and t.dtype in DTYPES}
    return tensors


def _as_in_torchvision(names):
    """{name: tensor} of a backbone under torchvision's names; lightly's are the numbers of a Sequential's children."""
    numbers = {name.split(".")[0] for name in names if name.split(".")[0].isdigit()}
    new = dict(zip(sorted(numbers, key=lambda n: (len(n), n)), TORCHVISION, strict=False)) | {"shortcut": "downsample"}
    renamed = {re.sub(r"^[0-9]+(?=\.)|shortcut", lambda old: new.get(old[0], old[0]), n): t for n, t in names.items()}
    return {name: tensor for name, tensor in renamed.items() if re.match(r"(conv1|bn1|layer[0-9]+)\.", name)}


@torch.no_grad()
def load_backbone(encoder, found, path):
    """Copy a Found's weights into `encoder`, all but its `.fc`; ends the program in one line where they do not fit."""
    own = {name: tensor for name, tensor in encoder.state_dict().items() if not name.startswith("fc.")}
    wanted, given = ({n: list(t.shape) for n, t in tensors.items()} for tensors in (own, found.state))
    wrong = [n for n in wanted | given if given.get(n) != wanted.get(n) and (n in given or "num_batches" not in n)]
    if wrong:
        what = ", ".join(f"{n[:80]} is {given.get(n, 'missing')}, not {wanted.get(n, 'expected')}" for n in wrong[:3])
        fail(format_error(f"{path} does not hold the weights of a {found.arch}: {what}"))
    torch._foreach_copy_([*own.values()], [found.state.get(name, tensor) for name, tensor in own.items()])


def export(path, encoder, arch, small_images):
    """Write the backbone as {torchvision's name: float32 tensor} for others; returns a line of Python that loads it."""
    state = {n: t.cpu().float().contiguous().clone() for n, t in encoder.state_dict().items() if n[:3] != "fc."}
    try:
        save_tensors(Path(path), state)
    except (OSError, ValueError) as error:
        fail(format_error(f"cannot write {path} ({error})"))
    load = f"load_state_dict(torch.load({str(path)!r}), strict=False)"
    if small_images or "_w" in arch:
        return f'build_encoder("{arch}", small_images={small_images}).{load}  # build_encoder: model.py'
    return f"torchvision.models.{arch}().{load}"
