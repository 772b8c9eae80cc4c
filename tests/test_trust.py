"""Untrusted input: broken images, odd folders, hostile checkpoints; what a run opens and writes."""

import contextlib
import io
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import TINY, fails, run, wait_for_line
from PIL import Image

import eval_lincls
import main_pcl
import metrics
from data import DataError, build_datasets
from runtime import distributed


# -- making images ---------------------------------------------------------------------------------
def file_bytes(image, kind, **options):
    """The bytes of an image's file of this kind."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(kind, mode="RGB", size=(9, 9), **options):
    """A file of noise, the same on each call."""
    channels = {"L": 1, "RGB": 3, "CMYK": 4}[mode]
    pixels = np.random.default_rng(0).integers(0, 256, (*size, channels), dtype=np.uint8)
    if channels == 1:
        pixels = pixels.squeeze(-1)
    return file_bytes(Image.fromarray(pixels, mode), kind, **options)


def palette(**options):
    image = Image.open(io.BytesIO(noise("PNG")))
    return file_bytes(image.quantize(16), "PNG", **options)


def sixteen_bit(value, kind="PNG"):
    pixels = np.full((9, 9), value, dtype=np.uint16)
    return file_bytes(Image.fromarray(pixels), kind)


def make_folder(root, images, copies=4):
    """A data set of one class with `copies` of the images {name: bytes}. Returns `root`."""
    directory = root / "train" / "class"
    directory.mkdir(parents=True)
    for name, data in images.items():
        stem, suffix = os.path.splitext(name)
        for i in range(copies):
            (directory / f"{stem}{i}{suffix}").write_bytes(data)
    return root


# -- images ----------------------------------------------------------------------------------------
ODD = {
    "one pixel.png": noise("PNG", size=(1, 1)),
    "one row.png": noise("PNG", size=(1, 40)),
    "cmyk.jpg": noise("JPEG", "CMYK"),
    "grey.jpg": noise("JPEG", "L"),
    "progressive.jpg": noise("JPEG", progressive=True),
    "palette.png": palette(),
    "transparent palette.png": palette(transparency=3),
    "16 bit.png": sixteen_bit(300),
    "16 bit.tif": sixteen_bit(300, "TIFF"),
    "two\nlines.png": noise("PNG"),
    "Größe 猫.png": noise("PNG"),
    "animated.webp": noise("WEBP"),
}


@pytest.mark.no_shortcuts
def test_odd_images_train(tmp_path):
    make_folder(tmp_path, ODD)
    options = ["--image-size", 8, "--epochs", 2, "--warmup", 1, "--exp-dir", tmp_path / "run"]
    log = run(tmp_path, *TINY, *options)
    assert np.isfinite(log[-1]["loss"])


@pytest.mark.parametrize("kind, suffix", [("PNG", "png"), ("TIFF", "tif")])
def test_sixteen_bit_images_keep_their_shades(tmp_path, kind, suffix):
    expected = {0: 0, 300: 1, 30_000: 117, 65_535: 255}
    images = {f"{value}.{suffix}": sixteen_bit(value, kind) for value in expected}
    make_folder(tmp_path, images, copies=1)
    plain = build_datasets(str(tmp_path), 8).plain
    shades = {}
    for i, path in enumerate(plain.source.paths):
        shades[Path(path).name] = plain.image(i).getpixel((0, 0))
    for value, shade in expected.items():
        assert shades[f"{value}0.{suffix}"] == (shade, shade, shade)


FORMATS = {"png": "PNG", "jpg": "JPEG", "bmp": "BMP", "tif": "TIFF", "webp": "WEBP"}
BROKEN = {"empty.png": b"", "text.jpg": b"not an image\n" * 9, "zeros.png": bytes(500)}
for suffix, kind in FORMATS.items():
    whole = noise(kind)
    for percent in (2, 10, 30, 60):
        length = max(1, len(whole) * percent // 100)
        BROKEN[f"{percent} percent.{suffix}"] = whole[:length]


@pytest.mark.filterwarnings("ignore::UserWarning")  # PIL warns of the same
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_image_is_named(tmp_path, name):
    make_folder(tmp_path, {name: BROKEN[name]}, copies=1)
    with pytest.raises(DataError) as error:
        build_datasets(str(tmp_path), 8).plain[0]
    stem, _ = os.path.splitext(name)
    assert stem in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", FORMATS)
def test_an_image_with_a_wrong_suffix_is_read(tmp_path, suffix):
    wrong_suffix = "jpg" if suffix == "png" else "png"
    data = noise(FORMATS[suffix])
    make_folder(tmp_path, {f"right.{suffix}": data, f"wrong.{wrong_suffix}": data}, copies=1)
    plain = build_datasets(str(tmp_path), 8).plain
    right, _ = plain[0]
    wrong, _ = plain[1]
    assert right.shape == (3, 8, 8)
    assert torch.equal(right, wrong)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("suffix", FORMATS)
def test_an_image_with_noise_in_its_file_is_read_or_named(tmp_path, suffix):
    """Which of the two depends on where the noise is. There is never another error."""
    rng = np.random.default_rng(0)
    images = {}
    for i in range(8):
        data = bytearray(noise(FORMATS[suffix]))
        for position in rng.integers(0, len(data), 1 + 12 * i):
            data[position] = rng.integers(0, 256)
        images[f"noise{i}.{suffix}"] = bytes(data)
    make_folder(tmp_path, images, copies=1)
    plain = build_datasets(str(tmp_path), 8).plain
    for i in range(8):
        try:
            view, _ = plain[i]
            assert view.shape == (3, 8, 8)
        except DataError as error:
            assert f"noise{i}" in str(error)
            assert "\n" not in str(error)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_name_with_a_line_break_stays_in_one_line(tmp_path, capsys, workers):
    images = {
        "a.png": noise("PNG"),
        "another size.png": noise("PNG", size=(8, 8)),
        "b\nad é.png": b"no",
    }
    make_folder(tmp_path, images, copies=16)
    options = [*TINY, "-j", workers, "--image-size", 8, "--exp-dir", tmp_path / "run"]
    assert r"b\nad é" in fails(capsys, main_pcl.main, tmp_path, *options)


# -- folders ---------------------------------------------------------------------------------------
def test_links_in_a_circle_are_named(tmp_path, capsys):
    make_folder(tmp_path, {"a.png": noise("PNG")})
    train = tmp_path / "train"

    # a link to a folder that contains it
    up = train / "class" / "up"
    up.symlink_to(train)
    error = fails(capsys, main_pcl.main, tmp_path)
    assert "'up' leads back" in error.replace(f"{tmp_path}/train/class/", "")
    up.unlink()

    # two folders with links to each other
    for here, there in (("x", "y"), ("y", "x")):
        (train / here).mkdir()
        (train / here / "other").symlink_to(train / there)
    assert "leads back" in fails(capsys, main_pcl.main, tmp_path)
    shutil.rmtree(train / "x")
    shutil.rmtree(train / "y")

    # an image that is a link to itself
    link = train / "class" / "self.png"
    link.symlink_to(link)
    with pytest.raises(DataError, match=r"self\.png"):
        build_datasets(str(tmp_path), 8).plain[4]


def test_linked_folders_are_followed(tmp_path):
    make_folder(tmp_path / "real", {"a.png": noise("PNG")})
    (tmp_path / "linked" / "train").mkdir(parents=True)
    (tmp_path / "linked" / "train" / "class").symlink_to(tmp_path / "real" / "train" / "class")
    assert len(build_datasets(str(tmp_path / "linked"), 8).train) == 4


def test_an_empty_class_is_named(tmp_path, capsys):
    make_folder(tmp_path, {"a.png": noise("PNG")})
    (tmp_path / "train" / "hollow\nclass").mkdir()
    assert r"hollow\nclass" in fails(capsys, main_pcl.main, tmp_path)


def test_ten_thousand_classes(tmp_path):
    image = noise("PNG")
    for label in range(10_000):
        directory = tmp_path / "train" / f"{label:05d}"
        directory.mkdir(parents=True)
        (directory / "a.png").write_bytes(image)
    (tmp_path / "val").symlink_to(tmp_path / "train")
    datasets = build_datasets(str(tmp_path), 8)
    assert len(datasets.classes) == 10_000
    assert datasets.plain[9_999][1] == 9_999

    labels = datasets.plain.labels
    features = torch.eye(10_000)[:, :64] + torch.randn(10_000, 64)
    accuracy = metrics.knn_accuracy(features, labels, features[-50:], labels[-50:], k=1)
    assert accuracy == 100


def test_data_that_has_changed_is_noticed(tmp_path, capsys):
    data = make_folder(tmp_path / "data", {"a.png": noise("PNG"), "b.png": noise("PNG")}, copies=16)
    options = [data, *TINY, "--epochs", 1, "--exp-dir", tmp_path / "run"]
    run(*options)
    old_name = data / "train" / "class" / "a0.png"
    new_name = data / "train" / "class" / "c.png"
    old_name.rename(new_name)
    assert "the training images are not those" in fails(capsys, main_pcl.main, *options, "--resume")
    new_name.rename(old_name)
    run(*options, "--resume")


# -- checkpoints -----------------------------------------------------------------------------------
class Hostile:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_runs_no_code(folder, tmp_path, capsys, zipped):
    bad = tmp_path / "bad.pth.tar"
    sign = tmp_path / "code has run"
    checkpoint = {"arch": "resnet18", "state_dict": Hostile(sign)}
    torch.save(checkpoint, bad, _use_new_zipfile_serialization=zipped)
    for command in (
        (eval_lincls.main, folder, "--pretrained", bad),
        (main_pcl.main, folder, *TINY, "--init", bad),
        (main_pcl.main, folder, *TINY, "--resume", bad, "--exp-dir", tmp_path / "run"),
    ):
        assert "holds more than tensors" in fails(capsys, *command)
    assert not sign.exists()


def published(**changes):
    """A checkpoint as MoCo and PCL publish them, with these entries changed."""
    resnet = torchvision.models.resnet18().state_dict()
    state = {f"module.encoder_q.{name}": value for name, value in resnet.items()}
    return {"epoch": 200, "arch": "resnet18", "state_dict": state, **changes}


def saved(checkpoint):
    """The bytes of the checkpoint's file."""
    file = io.BytesIO()
    torch.save(checkpoint, file)
    return file.getvalue()


def compressed(checkpoint):
    """The bytes of the checkpoint's file with its entries compressed, as in a zip bomb."""
    file = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(saved(checkpoint))) as source,
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name))
    return file.getvalue()


def with_weight(value):
    """The bytes of a published checkpoint with `value` in place of one of its weights."""
    checkpoint = published()
    checkpoint["state_dict"]["module.encoder_q.layer1.0.conv1.weight"] = value
    return saved(checkpoint)


# {what is wrong: a function that returns the bytes of the file}
HOSTILE = {
    "compressed": lambda: compressed(published()),
    "a huge tensor that holds one number": lambda: with_weight(torch.zeros(1).expand(10**13)),
    "the right shape, holds one number": lambda: with_weight(torch.zeros(1).expand(64, 64, 3, 3)),
    "another shape": lambda: with_weight(torch.zeros(64, 64, 3, 4)),
    "whole numbers": lambda: with_weight(torch.zeros(64, 64, 3, 3, dtype=torch.int32)),
    "no tensor": lambda: with_weight("text"),
    "a list": lambda: saved([1, 2]),
    "no weights": lambda: saved(published(state_dict={})),
    "keys that are not text": lambda: saved(published(state_dict={3: torch.zeros(1)})),
    "a tensor": lambda: saved(torch.zeros(3)),
    "cut off": lambda: saved(published())[:90_000],
    "no zip": lambda: b"PK\x03\x04" + bytes(300),
    "empty": lambda: b"",
    "text": lambda: b"hello\n",
}
ODD_ARCH = {
    "terabytes": lambda: saved(published(arch="resnet18_w9000000")),
    "no text": lambda: saved(published(arch=["resnet18"])),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_malformed_checkpoint_gets_one_line(folder, tmp_path, capsys, name):
    bad = tmp_path / "bad.pth.tar"
    bad.write_bytes(HOSTILE[name]())
    directory = ["--exp-dir", tmp_path / "run"]
    without_arch = TINY[2:]
    fails(capsys, eval_lincls.main, folder, "--pretrained", bad)
    fails(capsys, main_pcl.main, folder, *without_arch, "--init", bad, *directory)
    fails(capsys, main_pcl.main, folder, *TINY, "--resume", bad, *directory)


@pytest.mark.parametrize("name", ODD_ARCH)
def test_the_arch_follows_from_the_weights_whatever_the_checkpoint_names(
    folder, tmp_path, capsys, name
):
    odd = tmp_path / "odd.pth.tar"
    odd.write_bytes(ODD_ARCH[name]())
    table = eval_lincls.main([str(folder), "--pretrained", str(odd), "--no-baselines"])
    assert "linear" in table["trained"]
    options = ["--resume", odd, "--exp-dir", tmp_path / "run"]
    fails(capsys, main_pcl.main, folder, *TINY, *options)


def test_an_untrusted_file_names_no_folder_to_read(folder, tmp_path, capsys):
    checkpoint = tmp_path / "moco.pth.tar"
    checkpoint.write_bytes(saved(published(args={"data": str(folder), "image_size": 8})))
    assert "name the data" in fails(capsys, eval_lincls.main, "--pretrained", checkpoint)


# -- what a run opens and writes -------------------------------------------------------------------
LOOPBACK = {"0100007F", "00000000000000000000000001000000"}  # 127.0.0.1 and ::1 in /proc/net
LISTENING = "0A"  # a state in /proc/net/tcp


def child_processes(pid):
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def listening_addresses(pid):
    """The addresses at which a process accepts connections, as /proc/net writes them."""
    sockets = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed since it was listed
            sockets.add(os.readlink(link).removeprefix("socket:[").removesuffix("]"))
    addresses = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTENING and fields[9] in sockets:
                address, _ = fields[1].split(":")
                addresses.append(address)
    return addresses


def test_ranks_listen_on_the_loopback_device_only(folder, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node=2", main_pcl.__file__]
    command += [folder, *TINY, "--epochs", 500, "--exp-dir", tmp_path]
    command = [str(part) for part in command]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    wait_for_line(process, "epoch   0")
    ranks = child_processes(process.pid)
    addresses = []
    for pid in ranks:
        addresses += listening_addresses(pid)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert len(ranks) == 2
    assert addresses
    assert set(addresses) <= LOOPBACK


@pytest.mark.parametrize("machines, device", [(1, "lo"), (2, None)])
def test_ranks_of_one_machine_are_told_to_use_the_loopback_device(monkeypatch, machines, device):
    """Otherwise gloo would follow the machine's own name, wherever that leads."""
    environment = {"RANK": "0", "WORLD_SIZE": str(2 * machines), "LOCAL_WORLD_SIZE": "2"}
    environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    store = torch.distributed.HashStore()

    def rendezvous(*_, **__):
        return iter([(store, 0, 2)])

    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(torch.distributed, "rendezvous", rendezvous)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: None)
    distributed.init_distributed()
    assert os.environ.get("GLOO_SOCKET_IFNAME") == device
    assert os.environ.get("NCCL_SOCKET_IFNAME") == device


def test_only_the_named_directories_are_written(folder, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    before = time.time()
    run(folder, *TINY, "--epochs", 2, "--warmup", 1, "--exp-dir", tmp_path / "run")
    eval_lincls.main(["--exp-dir", str(tmp_path / "run")])
    assert not list((tmp_path / "here").iterdir())

    written = []
    for path in Path(main_pcl.__file__).parent.glob("*"):
        is_new = path.stat().st_mtime > before
        if is_new and path.is_file() and "cache" not in path.name:
            written.append(path)
    assert not written
