"""What images show is what the network sees, whatever their files hold."""

import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, fails, picture, run
from PIL import Image, ImageCms, ImageOps

import data
import eval_lincls
import main_pcl
from data import build_datasets, load_into_memory

RAMP = np.linspace(0, 1, 256).reshape(16, 16)


def save(path, values, **options):
    """Write an array as an image file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = values if isinstance(values, Image.Image) else Image.fromarray(values)
    image.save(path, **options)


def png_of_16_bits(values):
    """The bytes of a PNG file of 16 bits per channel. values: (H, W, channels) uint16."""
    height, width, channels = values.shape
    colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = [b"\0" + row.astype(">u2").tobytes() for row in values]

    def chunk(name, content):
        checksum = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"".join(rows)))
    return b"\x89PNG\r\n\x1a\n" + content + chunk(b"IEND", b"")


def tiff_of_16_bits(values, order="<", compress=False):
    """The bytes of a TIFF file in colour. values: (H, W, 3) uint16. order: "<" or ">"."""
    height, width, channels = values.shape
    content = values.astype(f"{order}u2").tobytes()
    if compress:
        content = zlib.compress(content)
    tags = [(256, width), (257, height), (258, None), (259, 8 if compress else 1), (262, 2)]
    tags += [(273, None), (277, channels), (278, height), (279, len(content))]
    bits_at = 8 + 2 + 12 * len(tags) + 4
    file = {"<": b"II", ">": b"MM"}[order] + struct.pack(f"{order}HI", 42, 8)
    file += struct.pack(f"{order}H", len(tags))
    for tag, value in tags:
        if tag == 258:
            file += struct.pack(f"{order}HHII", tag, 3, channels, bits_at)
        else:
            value = bits_at + 2 * channels if tag == 273 else value
            file += struct.pack(f"{order}HHII", tag, 4, 1, value)
    file += struct.pack(f"{order}I", 0) + struct.pack(f"{order}{channels}H", *[16] * channels)
    return file + content


def shades(images, index=0):
    """The grey values of an image, (H, W) int. Its three channels must be equal."""
    pixels = np.asarray(images.image(index)).astype(int)
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


# -- more than 8 bits ------------------------------------------------------------------------------
WIDE = {
    "float 0 to 1": RAMP.astype(np.float32),
    "float 0 to 255": (255 * RAMP).astype(np.float32),
    "float -1 to 1": (2 * RAMP - 1).astype(np.float32),
    "tiny floats": (1e-20 * RAMP).astype(np.float32),
    "huge floats": (6e38 * (RAMP - 0.5)).astype(np.float32),
    "int32": (65_535 * RAMP).astype(np.int32),
    "large int32": (2**31 - 1 - 4_095 * RAMP[::-1, ::-1]).astype(np.int32),
    "negative int32": (4_095 * RAMP - 2_000).astype(np.int32),
    "10 bits": (1_023 * RAMP).astype(np.uint16),
    "12 bits": (4_095 * RAMP).astype(np.uint16),
    "16 bits": (65_535 * RAMP).astype(np.uint16),
    "16 bits with an offset": (1_000 * RAMP + 60_000).astype(np.uint16),
}


@pytest.mark.parametrize("name", WIDE)
def test_images_of_more_than_8_bits_keep_their_shades(tmp_path, name):
    save(tmp_path / "a.tif", WIDE[name])
    datasets = build_datasets(str(tmp_path))
    found = shades(datasets.plain)
    assert np.abs(found - 255 * RAMP).max() < 1.1
    assert len(np.unique(found)) > 250
    kind = {"f": "float", "i": "32-bit", "u": "16-bit"}[WIDE[name].dtype.kind]
    assert datasets.notes[0].startswith(f"{kind} images: values from ")


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_twelve_bits_in_sixteen_keep_more_than_sixteen_greys(tmp_path, suffix):
    save(tmp_path / f"a.{suffix}", WIDE["12 bits"])
    assert len(np.unique(shades(build_datasets(str(tmp_path)).plain))) > 250


def test_each_kind_of_image_has_a_range_of_its_own(tmp_path):
    for name in ("float 0 to 1", "int32", "12 bits"):
        save(tmp_path / f"{name}.tif", WIDE[name])
    save(tmp_path / "8 bits.png", (100 * RAMP).astype(np.uint8))
    datasets = build_datasets(str(tmp_path))
    names = datasets.sources[0].names()
    for i, name in enumerate(names):
        largest = 100 if name == "8 bits.png" else 255
        assert np.abs(shades(datasets.plain, i) - largest * RAMP).max() < 1.1
    assert sorted(note.split(" images")[0] for note in datasets.notes) == [
        "16-bit",
        "32-bit",
        "float",
    ]


def test_one_range_serves_all_images_and_parts(tmp_path):
    """A dark image stays dark, also among the held-out ones, in memory and in the evaluation."""
    for part, n in (("train", 40), ("val", 4)):
        for label in ("a", "b"):
            for i in range(n):
                values = (1_000 * RAMP * (i + 1) / n).astype(np.uint16)
                save(tmp_path / "data" / part / label / f"{i:02}.png", values)
    datasets = build_datasets(str(tmp_path / "data"))
    note = "16-bit images: values from 0 to 1000 are shown as 0 to 255"
    assert datasets.notes == (note,)
    in_memory = load_into_memory(datasets)
    for images in (datasets.plain, datasets.val):
        n = len(images) // 2
        for i in range(n):
            assert abs(shades(images, i).max() - 255 * (i + 1) / n) <= 1.1
            view, _ = images[i]
            kept = in_memory.plain if images is datasets.plain else in_memory.val
            assert torch.equal(view, kept.pixels[i])


def test_the_range_is_said_in_training_and_in_the_evaluation(tmp_path, capsys):
    for label in ("a", "b"):
        for i in range(20):
            values = np.random.default_rng(i).integers(0, 4_096, (8, 8)).astype(np.uint16)
            values[0, :2] = 0, 4_095
            save(tmp_path / "data" / "train" / label / f"{i}.png", values)
            save(tmp_path / "data" / "val" / label / f"{i}.png", values // 2)
    run(tmp_path / "data", *TINY, "--epochs", 1, "--exp-dir", tmp_path / "run")
    note = "16-bit images: values from 0 to 4095 are shown as 0 to 255"
    assert note in capsys.readouterr().out
    eval_lincls.main(["--exp-dir", str(tmp_path / "run"), "--no-baselines"])
    assert note in capsys.readouterr().out


def test_a_few_outliers_do_not_decide_the_range(tmp_path):
    values = (1_000 * np.linspace(0, 1, 10_000)).reshape(100, 100).astype(np.float32)
    values[3, 3] = 1e9
    values[4, 4] = np.inf
    values[5, 5] = -np.inf
    values[6, 6] = np.nan
    save(tmp_path / "a.tif", values)
    found = shades(build_datasets(str(tmp_path)).plain)
    assert len(np.unique(found)) > 250
    assert found[3, 3] == 255
    assert found[4, 4] == 255
    assert found[5, 5] == 0
    assert found[6, 6] == 0


def test_the_range_of_large_data_sets_is_that_of_a_sample(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "HEADERS", 20)
    monkeypatch.setattr(data, "SAMPLED", 5)
    for i in range(40):
        save(tmp_path / f"{i:02}.png", (4_095 * RAMP).astype(np.uint16))
    read = []
    open_file = data._open

    def note_and_open(files, index):
        read.append(index)
        return open_file(files, index)

    monkeypatch.setattr(data, "_open", note_and_open)
    monkeypatch.setattr(data, "read_header", lambda *_: ((16, 16), "16-bit"))
    monkeypatch.setattr(data, "_warn_of_blank_images", lambda _: [])
    datasets = build_datasets(str(tmp_path))
    assert len(set(read)) == 5
    assert max(read) - min(read) > 30  # spread over the data set
    assert datasets.notes[0].endswith("by a sample of 5 images")


def test_a_kind_of_image_that_no_training_image_has_uses_its_own_range(tmp_path):
    save(tmp_path / "train" / "a" / "0.png", (255 * RAMP).astype(np.uint8))
    save(tmp_path / "val" / "a" / "0.tif", WIDE["float 0 to 1"])
    datasets = build_datasets(str(tmp_path))
    assert np.abs(shades(datasets.val) - 255 * RAMP).max() < 1.1


def test_broken_images_do_not_disturb_the_range(tmp_path):
    save(tmp_path / "a.png", WIDE["12 bits"])
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "b.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "c.png").write_bytes(b"")
    (tmp_path / "0.png").write_bytes(b"")
    datasets = build_datasets(str(tmp_path))
    assert "values from 0 to 4095" in datasets.notes[0]


# -- 16 bits in colour -----------------------------------------------------------------------------
COLOUR = {
    "png": png_of_16_bits,
    "little-endian.tif": tiff_of_16_bits,
    "big-endian.tif": lambda values: tiff_of_16_bits(values, ">"),
    "compressed.tif": lambda values: tiff_of_16_bits(values, compress=True),
    "compressed big-endian.tif": lambda values: tiff_of_16_bits(values, ">", True),
}


@pytest.mark.parametrize("kind", COLOUR)
@pytest.mark.parametrize("largest", [4_095, 65_535])
def test_colours_of_16_bits_keep_their_shades(tmp_path, kind, largest):
    values = (largest * np.stack([RAMP, RAMP[::-1], RAMP.T], axis=2)).astype(np.uint16)
    (tmp_path / f"a.{kind}").write_bytes(COLOUR[kind](values))
    datasets = build_datasets(str(tmp_path))
    found = np.asarray(datasets.plain.image(0)).astype(int)
    assert np.abs(found - 255.0 * values / largest).max() < 1
    assert f"16-bit colour images: values from 0 to {largest}" in datasets.notes[0]


@pytest.mark.parametrize("channels", [2, 4])
def test_transparent_images_of_16_bits_keep_their_shades(tmp_path, channels):
    values = np.empty((16, 16, channels), np.uint16)
    values[..., :-1] = (4_095 * RAMP[..., None]).astype(np.uint16)
    values[..., -1] = 65_535
    values[:2, :, -1] = 0
    (tmp_path / "a.png").write_bytes(png_of_16_bits(values))
    found = shades(build_datasets(str(tmp_path)).plain)
    assert np.abs(found - 255 * RAMP)[2:].max() < 1
    assert len(np.unique(found[:2])) == 1


# -- 8 bits ----------------------------------------------------------------------------------------
def as_mode(image, mode):
    """`image` in any mode of Pillow."""
    if mode == "LAB":
        rgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        return ImageCms.profileToProfile(image, rgb, lab, outputMode="LAB")
    through = {"PA": "P", "La": "LA", "RGBa": "RGBA"}.get(mode)
    if through is not None:
        image = image.convert(through)
    return image.convert(mode)


GREY = ("1", "L", "LA", "La", "I", "F", "I;16", "I;16L", "I;16B")
COLOURED = ("P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "HSV", "LAB")


@pytest.mark.parametrize("mode", GREY + COLOURED)
def test_every_mode_is_read(mode):
    image = picture(20, 20)
    if mode in GREY:
        image = image.convert("L")
        image.putpixel((0, 0), 0)
        image.putpixel((1, 0), 255)
    if mode.startswith("I;16"):
        image = image.convert("I").convert("I;16")
    other_mode = image.convert(mode) if mode.startswith("I;16") else as_mode(image, mode)
    found = data.to_rgb(other_mode.copy, {})
    assert found.mode == "RGB"
    expected = image.convert("L").convert("RGB") if mode in GREY else image
    if mode in ("1", "P", "PA"):
        expected = other_mode.convert("RGB")
    difference = np.asarray(found).astype(int) - np.asarray(expected).astype(int)
    assert np.abs(difference).mean() < (3 if mode in ("YCbCr", "HSV", "LAB") else 0.01)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK"])
def test_images_of_8_bits_stay_as_they_are(tmp_path, mode):
    image = picture(20, 20).convert(mode)
    save(tmp_path / "a.tif", image)
    datasets = build_datasets(str(tmp_path))
    found = np.asarray(datasets.plain.image(0))
    assert np.array_equal(found, np.asarray(Image.open(tmp_path / "a.tif").convert("RGB")))
    assert datasets.notes == ()


# -- transparency ----------------------------------------------------------------------------------
def drawing(mode, colour):
    """A square of one colour on a transparent background whose hidden colour is the same."""
    image = Image.new("RGBA", (20, 20), (*colour, 0))
    image.paste((*colour, 255), (5, 5, 15, 15))
    if mode == "P":
        image = image.convert("RGB").quantize(4)
        image.paste(image.getpixel((0, 0)) + 1, (0, 0, 20, 20))
        image.paste(image.getpixel((0, 0)) - 1, (5, 5, 15, 15))
        image.info["transparency"] = image.getpixel((0, 0))
        image.putpalette([*colour, *colour, 0, 0, 0])
    elif mode == "RGB":
        image = Image.new("RGB", (20, 20), (1, 2, 3))
        image.paste(colour, (5, 5, 15, 15))
        image.info["transparency"] = (1, 2, 3)
    elif mode == "LA":
        image = image.convert("LA")
    return image


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
@pytest.mark.parametrize("grey, background", [(0, 255), (60, 255), (200, 0), (255, 0)])
def test_transparent_images_get_a_background_that_shows_them(tmp_path, mode, grey, background):
    image = drawing(mode, (grey,) * 3)
    options = {"transparency": image.info["transparency"]} if mode in ("P", "RGB") else {}
    save(tmp_path / "a.png", image, **options)
    assert Image.open(tmp_path / "a.png").has_transparency_data
    found = shades(build_datasets(str(tmp_path)).plain)
    assert (found[5:15, 5:15] == grey).all()
    found[5:15, 5:15] = background
    assert (found == background).all()


def test_an_image_without_any_opaque_part_shows_its_colours(tmp_path):
    image = picture(20, 20).convert("RGBA")
    image.putalpha(0)
    save(tmp_path / "a.png", image)
    found = np.asarray(build_datasets(str(tmp_path)).plain.image(0))
    assert np.array_equal(found, np.asarray(picture(20, 20)))


def test_partly_transparent_pixels_are_mixed(tmp_path):
    save(tmp_path / "a.png", Image.new("RGBA", (20, 20), (0, 0, 0, 128)))
    assert (shades(build_datasets(str(tmp_path)).plain) == 127).all()


# -- orientation -----------------------------------------------------------------------------------
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_of_the_camera_is_heeded(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95} if suffix == "jpg" else {}
    if suffix == "webp":
        options["lossless"] = True
    save(tmp_path / f"a.{suffix}", picture(48, 32), exif=exif, **options)
    upright = ImageOps.exif_transpose(Image.open(tmp_path / f"a.{suffix}"))
    found = build_datasets(str(tmp_path)).plain.image(0)
    assert found.size == ((48, 32) if orientation < 5 else (32, 48))
    assert np.array_equal(np.asarray(found), np.asarray(upright.convert("RGB")))


def test_the_orientation_of_images_of_16_bits_is_heeded(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    save(tmp_path / "a.png", (4_095 * RAMP[:8]).astype(np.uint16), exif=exif)
    found = shades(build_datasets(str(tmp_path)).plain)
    expected = 255 * RAMP[:8] / RAMP[:8].max()
    assert found.shape == (16, 8)
    assert np.abs(found - np.rot90(expected, -1)).max() < 1.1


def test_broken_metadata_does_not_break_an_image(tmp_path):
    save(tmp_path / "a.jpg", picture(), exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + bytes(9))
    save(tmp_path / "b.jpg", picture(), exif=b"Exif\0\0nonsense")
    save(tmp_path / "c.jpg", picture())
    plain = build_datasets(str(tmp_path)).plain
    for i in range(2):
        assert np.array_equal(np.asarray(plain.image(i)), np.asarray(plain.image(2)))


# -- blank images ----------------------------------------------------------------------------------
@pytest.mark.parametrize("blank, warns", [(0, False), (20, False), (37, True), (40, True)])
def test_blank_images_are_warned_of_once(tmp_path, blank, warns):
    for i in range(40):
        image = Image.new("RGB", (8, 8), (i, i, i)) if i < blank else picture(8, 8, seed=i)
        save(tmp_path / f"{i:02}.png", image)
    notes = build_datasets(str(tmp_path)).notes
    assert len(notes) == warns
    if warns:
        assert "are of one colour: check how they are stored" in notes[0]


# -- large images ----------------------------------------------------------------------------------
def test_large_jpeg_files_are_read_at_a_part_of_their_size(tmp_path):
    save(tmp_path / "a.jpg", picture(1600, 1200), quality=95)
    save(tmp_path / "b.jpg", picture(400, 300), quality=95)
    plain = build_datasets(str(tmp_path), 32).plain
    assert plain.image(0).size == (200, 150)  # each side has four times the view's pixels or more
    assert plain.image(1).size == (200, 150)
    large = build_datasets(str(tmp_path), 224).plain
    assert large.image(0).size == (1600, 1200)
    whole = Image.open(tmp_path / "a.jpg").resize((200, 150), Image.BOX)
    assert np.abs(np.asarray(plain.image(0)).astype(int) - np.asarray(whole)).mean() < 2


LARGE_IMAGES = {  # {file: (mode, bytes per pixel as RGB or as stored)}
    "rgb.png": ("RGB", 3),
    "rgba.png": ("RGBA", 4),
    "grey.png": ("L", 3),
    "palette.png": ("P", 3),
    "16 bit.png": ("I;16", 3),
    "float.tif": ("F", 4),
    "int.tif": ("I", 4),
    "photo.jpg": ("RGB", 3),
}
PRINT_MEMORY = """
import os, resource, sys
import data

def peak():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

for path in sys.argv[1:]:
    if os.fork() == 0:  # a process of its own for each image, because a peak only rises
        before = peak()
        images = data.Images(data.Folder("", [], [path], [-1]), data.plain_view(224))
        assert images[0][0].shape == (3, 224, 224)
        print(peak() - before, flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""


def test_reading_an_image_takes_a_small_multiple_of_its_size(tmp_path):
    side = 2_500
    gradient = Image.linear_gradient("L").resize((side, side))
    for name, (mode, _) in LARGE_IMAGES.items():
        if mode == "RGBA":
            image = Image.merge("RGBA", [gradient] * 4)
        elif mode == "I;16":
            image = Image.fromarray(np.asarray(gradient).astype(np.uint16) * 200)
        else:
            image = gradient.convert(mode)
        options = {"compress_level": 1} if name.endswith("png") else {}
        save(tmp_path / name, image, **options)
    command = [sys.executable, "-c", PRINT_MEMORY, *(tmp_path / name for name in LARGE_IMAGES)]
    root = Path(data.__file__).parent
    done = subprocess.run(list(map(str, command)), cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    used = done.stdout.split()
    assert len(used) == len(LARGE_IMAGES)
    for (name, (_, bytes_per_pixel)), number in zip(LARGE_IMAGES.items(), used, strict=True):
        assert int(number) < 6 * bytes_per_pixel * side**2, name


def test_training_on_large_images_takes_little_memory(tmp_path):
    """Forty images of one size, 170 MB in all, of which no batch is held whole."""
    image = Image.effect_noise((1200, 1200), 60).convert("RGB")
    (tmp_path / "train").mkdir()
    for i in range(40):
        image.rotate(6 * i).save(tmp_path / "train" / f"{i}.jpg")
    options = ["-a", "resnet18_w4", "-b", 32, "--bn-splits", 2, "--num-cluster", 4, "--pcl-r", 8]
    options += ["-j", 0, "--epochs", 1, "--image-size", 64, "--exp-dir", tmp_path / "run"]
    # not getrusage, which counts the memory of the process that starts this one
    code = (
        "import sys, main_pcl; main_pcl.main(sys.argv[1:]); "
        "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    )
    command = [sys.executable, "-c", code, tmp_path, *options]
    root = Path(main_pcl.__file__).parent
    done = subprocess.run(
        [str(word) for word in command], check=True, capture_output=True, text=True, cwd=root
    )
    assert int(done.stdout.split()[-1]) < 1.5 * 2**20  # kilobytes


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_claims_too_many_pixels_gets_one_line(tmp_path, capsys, workers):
    for i in range(32):
        save(tmp_path / "train" / f"{i}.png", picture(8, 8 + i % 2, seed=i))
    bomb = bytearray((tmp_path / "train" / "3.png").read_bytes())
    bomb[16:24] = struct.pack(">II", 60_000, 60_000)
    bomb[29:33] = struct.pack(">I", zlib.crc32(bomb[12:29]))
    (tmp_path / "train" / "3.png").write_bytes(bomb)
    options = [*TINY, "-j", workers, "--exp-dir", tmp_path / "run"]
    error = fails(capsys, main_pcl.main, tmp_path, *options)
    assert "3.png" in error
    assert "DecompressionBombError" in error or "cannot be read" in error


def test_images_from_the_web_are_read_without_warnings(tmp_path, recwarn):
    """Pillow warns, for instance, of large images and of odd palettes."""
    image = picture(20, 20).quantize(8)
    save(tmp_path / "a.png", image, transparency=bytes([0, 100, 255]))
    data.build_datasets(str(tmp_path)).plain.image(0)
    assert not recwarn.list
