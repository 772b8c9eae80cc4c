"""Untrusted input: broken images, odd folders, hostile checkpoints; and what a run opens and writes."""

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
from conftest import TINY, fails, run
from PIL import Image

import eval_lincls
import main_pcl
import metrics
from data import DataError, build_datasets
from runtime import distributed


def encoded(kind, mode="RGB", size=(9, 9), **options):
    """A file with the same noise each time."""
    file, channels = io.BytesIO(), {"L": 1, "RGB": 3, "CMYK": 4}[mode]
    pixels = np.random.default_rng(0).integers(0, 256, (*size, channels), dtype=np.uint8)
    Image.fromarray(pixels.squeeze(-1 if channels == 1 else ()), mode).save(file, kind, **options)
    return file.getvalue()


def make_folder(root, images, copies=4):
    """A data set of one class with the images {name: bytes}, each `copies` times."""
    directory = root / "train" / "class"
    directory.mkdir(parents=True)
    for name, data in images.items():
        for i in range(copies):
            stem, suffix = os.path.splitext(name)
            (directory / f"{stem}{i}{suffix}").write_bytes(data)
    return root


def palette(**options):
    file, image = io.BytesIO(), Image.open(io.BytesIO(encoded("PNG")))
    image.quantize(16).save(file, "PNG", **options)
    return file.getvalue()


def sixteen_bit(value, kind="PNG"):
    file = io.BytesIO()
    Image.fromarray(np.full((9, 9), value, dtype=np.uint16)).save(file, kind)
    return file.getvalue()


# -- data

ODD = {
    "one pixel.png": encoded("PNG", size=(1, 1)),
    "one row.png": encoded("PNG", size=(1, 40)),
    "cmyk.jpg": encoded("JPEG", "CMYK"),
    "grey.jpg": encoded("JPEG", "L"),
    "progressive.jpg": encoded("JPEG", progressive=True),
    "palette.png": palette(),
    "transparent palette.png": palette(transparency=3),
    "16 bit.png": sixteen_bit(300),
    "16 bit.tif": sixteen_bit(300, "TIFF"),
    "two\nlines.png": encoded("PNG"),
    "Größe 猫.png": encoded("PNG"),
    "animated.webp": encoded("WEBP"),
}


def test_odd_images_train(tmp_path):
    make_folder(tmp_path, ODD)
    log = run(tmp_path, *TINY, "--image-size", 8, "--epochs", 2, "--warmup", 1, "--exp-dir", tmp_path / "run")
    assert np.isfinite(log[-1]["loss"])


@pytest.mark.parametrize("kind, suffix", [("PNG", "png"), ("TIFF", "tif")])
def test_sixteen_bit_images_keep_their_shades(tmp_path, kind, suffix):
    make_folder(tmp_path, {f"{value}.{suffix}": sixteen_bit(value, kind) for value in (0, 300, 30_000, 65_535)}, 1)
    plain = build_datasets(str(tmp_path), 8).plain
    shades = {Path(path).name: plain.image(i).getpixel((0, 0)) for i, (path, _) in enumerate(plain.source.samples)}
    assert [shades[f"{value}0.{suffix}"] for value in (0, 300, 30_000, 65_535)] == [(x,) * 3 for x in (0, 1, 117, 255)]


FORMATS = {"png": "PNG", "jpg": "JPEG", "bmp": "BMP", "tif": "TIFF", "webp": "WEBP"}
BROKEN = {"empty.png": b"", "text.jpg": b"not an image\n" * 9, "zeros.png": bytes(500)}
for suffix, kind in FORMATS.items():
    for percent in (2, 10, 30, 60):
        BROKEN[f"{percent} percent.{suffix}"] = encoded(kind)[: max(1, len(encoded(kind)) * percent // 100)]


@pytest.mark.filterwarnings("ignore::UserWarning")  # PIL's, of the same
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_image_is_named(tmp_path, name):
    make_folder(tmp_path, {name: BROKEN[name]}, 1)
    with pytest.raises(DataError) as error:
        build_datasets(str(tmp_path), 8).plain[0]
    assert os.path.splitext(name)[0] in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", FORMATS)
def test_an_image_with_another_ones_suffix_is_read(tmp_path, suffix):
    wrong = "jpg" if suffix == "png" else "png"
    make_folder(tmp_path, {f"right.{suffix}": encoded(FORMATS[suffix]), f"wrong.{wrong}": encoded(FORMATS[suffix])}, 1)
    right, wrong = (build_datasets(str(tmp_path), 8).plain[i][0] for i in (0, 1))
    assert right.shape == (3, 8, 8) and torch.equal(right, wrong)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("suffix", FORMATS)
def test_an_image_with_noise_in_it_is_read_or_named(tmp_path, suffix):
    """Which of the two depends on what the noise hits; it is never another error."""
    rng, images = np.random.default_rng(0), {}
    for i in range(8):
        data = bytearray(encoded(FORMATS[suffix]))
        for position in rng.integers(0, len(data), 1 + 12 * i):
            data[position] = rng.integers(0, 256)
        images[f"noise{i}.{suffix}"] = bytes(data)
    plain = build_datasets(str(make_folder(tmp_path, images, 1)), 8).plain
    outcomes = []
    for i in range(8):
        try:
            outcomes.append(plain[i][0].shape == (3, 8, 8))
        except DataError as error:
            outcomes.append(f"noise{i}" in str(error) and "\n" not in str(error))
    assert all(outcomes), outcomes


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_name_with_a_line_break_stays_in_one_line(tmp_path, capsys, workers):
    images = {"a.png": encoded("PNG"), "another size.png": encoded("PNG", size=(8, 8)), "b\nad é.png": b"no"}
    make_folder(tmp_path, images, 16)
    options = [*TINY, "-j", workers, "--image-size", 8, "--exp-dir", tmp_path / "run"]
    assert r"b\nad é" in fails(capsys, main_pcl.main, tmp_path, *options)


def test_links_in_a_circle_are_named(tmp_path, capsys):
    make_folder(tmp_path, {"a.png": encoded("PNG")})
    (tmp_path / "train" / "class" / "up").symlink_to(tmp_path / "train")
    assert "'up' leads back" in fails(capsys, main_pcl.main, tmp_path).replace(f"{tmp_path}/train/class/", "")
    (tmp_path / "train" / "class" / "up").unlink()
    for here, there in (("x", "y"), ("y", "x")):
        (tmp_path / "train" / here).mkdir()
        (tmp_path / "train" / here / "other").symlink_to(tmp_path / "train" / there)
    assert "leads back" in fails(capsys, main_pcl.main, tmp_path)
    shutil.rmtree(tmp_path / "train" / "x")
    shutil.rmtree(tmp_path / "train" / "y")
    (tmp_path / "train" / "class" / "self.png").symlink_to(tmp_path / "train" / "class" / "self.png")
    with pytest.raises(DataError, match=r"self\.png"):
        build_datasets(str(tmp_path), 8).plain[4]


def test_linked_folders_are_followed(tmp_path):
    make_folder(tmp_path / "real", {"a.png": encoded("PNG")})
    (tmp_path / "linked" / "train").mkdir(parents=True)
    (tmp_path / "linked" / "train" / "class").symlink_to(tmp_path / "real" / "train" / "class")
    assert len(build_datasets(str(tmp_path / "linked"), 8).train) == 4


def test_an_empty_class_is_named(tmp_path, capsys):
    make_folder(tmp_path, {"a.png": encoded("PNG")})
    (tmp_path / "train" / "hollow\nclass").mkdir()
    assert r"hollow\nclass" in fails(capsys, main_pcl.main, tmp_path)


def test_ten_thousand_classes(tmp_path):
    image = encoded("PNG")
    for part in ("train", "val"):
        for label in range(10_000):
            directory = tmp_path / part / f"{label:05d}"
            directory.mkdir(parents=True)
            (directory / "a.png").write_bytes(image)
    datasets = build_datasets(str(tmp_path), 8)
    assert len(datasets.classes) == 10_000 and datasets.plain[9_999][1] == 9_999
    features, labels = torch.eye(10_000)[:, :64] + torch.randn(10_000, 64), datasets.plain.labels
    assert metrics.knn_accuracy(features, labels, features[-50:], labels[-50:], k=1) == 100


def test_data_that_changed_is_noticed(tmp_path, capsys):
    data, images = tmp_path / "data", {"a.png": encoded("PNG"), "b.png": encoded("PNG")}
    make_folder(data, images, 16)
    options = [data, *TINY, "--epochs", 1, "--exp-dir", tmp_path / "run"]
    run(*options)
    (data / "train" / "class" / "a0.png").rename(data / "train" / "class" / "c.png")
    assert "the training images are not those" in fails(capsys, main_pcl.main, *options, "--resume")
    (data / "train" / "class" / "c.png").rename(data / "train" / "class" / "a0.png")
    run(*options, "--resume")


# -- untrusted checkpoints


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_checkpoint_runs_no_code(folder, tmp_path, capsys):
    bad, sign = tmp_path / "bad.pth.tar", tmp_path / "code has run"
    for zipped in (True, False):
        torch.save({"arch": "resnet18", "state_dict": Hostile(sign)}, bad, _use_new_zipfile_serialization=zipped)
        for command in (
            (eval_lincls.main, folder, "--pretrained", bad),
            (main_pcl.main, folder, *TINY, "--init", bad),
            (main_pcl.main, folder, *TINY, "--resume", bad, "--exp-dir", tmp_path / "run"),
        ):
            assert "holds more than tensors" in fails(capsys, *command)
        assert not sign.exists()


def published(**changes):
    from torchvision.models import resnet18

    state = {f"module.encoder_q.{key}": value for key, value in resnet18().state_dict().items()}
    return {"epoch": 200, "arch": "resnet18", "state_dict": state} | changes


def packed(checkpoint):
    """The checkpoint's file with its parts compressed, as a zip bomb is."""
    plain, file = io.BytesIO(), io.BytesIO()
    torch.save(checkpoint, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    return file.getvalue()


def saved(checkpoint):
    file = io.BytesIO()
    torch.save(checkpoint, file)
    return file.getvalue()


def with_tensor(tensor):
    checkpoint = published()
    checkpoint["state_dict"]["module.encoder_q.layer1.0.conv1.weight"] = tensor
    return saved(checkpoint)


HOSTILE = {
    "packed": packed(published()),
    "a tensor of which one number is there": with_tensor(torch.zeros(1).expand(10**13)),
    "the right shape, one number there": with_tensor(torch.zeros(1).expand(64, 64, 3, 3)),
    "another shape": with_tensor(torch.zeros(64, 64, 3, 4)),
    "whole numbers": with_tensor(torch.zeros(64, 64, 3, 3, dtype=torch.int32)),
    "no tensor": with_tensor("text"),
    "an arch of terabytes": saved(published(arch="resnet18_w9000000")),
    "an arch that is none": saved(published(arch=["resnet18"])),
    "a list": saved([1, 2]),
    "no weights": saved(published(state_dict={})),
    "keys that are no text": saved(published(state_dict={3: torch.zeros(1)})),
    "a tensor": saved(torch.zeros(3)),
    "cut off": saved(published())[:90_000],
    "no zip": b"PK\x03\x04" + bytes(300),
    "empty": b"",
    "text": b"hello\n",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_malformed_checkpoint_gets_one_line(folder, tmp_path, capsys, name):
    bad = tmp_path / "bad.pth.tar"
    bad.write_bytes(HOSTILE[name])
    if "arch" in name:  # which is worked out from the shapes
        assert "linear" in eval_lincls.main([str(folder), "--pretrained", str(bad), "--no-baselines"])["trained"]
    else:
        fails(capsys, eval_lincls.main, folder, "--pretrained", bad)
        fails(capsys, main_pcl.main, folder, *TINY[2:], "--init", bad, "--exp-dir", tmp_path / "run")
    options = ["--resume", bad, "--exp-dir", tmp_path / "run"]
    fails(capsys, main_pcl.main, folder, *TINY, *options)


def test_an_untrusted_file_names_no_folder_to_read(folder, tmp_path, capsys):
    checkpoint = tmp_path / "moco.pth.tar"
    checkpoint.write_bytes(saved(published(args={"data": str(folder), "image_size": 8})))
    assert "name the data" in fails(capsys, eval_lincls.main, "--pretrained", checkpoint)


def test_nothing_listens_for_others(folder, tmp_path):
    """Of two ranks, every socket that accepts connections is bound to this machine alone."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", main_pcl.__file__]
    options = [folder, *TINY, "--epochs", 500, "--exp-dir", tmp_path]
    process = subprocess.Popen(map(str, [*command, *options]), stdout=subprocess.PIPE, text=True)
    while not process.stdout.readline().startswith("epoch   0"):
        pass
    ranks = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    addresses = []
    for pid in ranks:
        inodes = set()
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed since it was listed
                inodes.add(os.readlink(link).removeprefix("socket:[").removesuffix("]"))
        for table in ("tcp", "tcp6"):
            for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and fields[9] in inodes:  # listening
                    addresses.append(fields[1].split(":")[0])
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert len(ranks) == 2 and addresses
    assert set(addresses) <= {"0100007F", "00000000000000000000000001000000"}


@pytest.mark.parametrize("machines", [1, 2])
def test_ranks_of_one_machine_keep_to_the_loopback_device(monkeypatch, machines):
    """Wherever the machine's own name leads to, which gloo would follow."""
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    monkeypatch.setattr(os, "environ", {"RANK": "0", "WORLD_SIZE": str(2 * machines), "LOCAL_WORLD_SIZE": "2"})
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda *_, **__: iter([(torch.distributed.HashStore(), 0, 2)]))
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: None)
    distributed.init_distributed()
    assert [os.environ.get(name) for name in names] == ([None, None] if machines == 2 else ["lo", "lo"])


def test_only_the_named_directories_are_written(folder, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    before = time.time()
    run(folder, *TINY, "--epochs", 2, "--warmup", 1, "--exp-dir", tmp_path / "run")
    eval_lincls.main(["--exp-dir", str(tmp_path / "run")])
    assert not list((tmp_path / "here").iterdir())
    root = Path(main_pcl.__file__).parent
    touched = [path for path in root.glob("*") if path.stat().st_mtime > before and "cache" not in path.name]
    assert not [path for path in touched if path.is_file()]
