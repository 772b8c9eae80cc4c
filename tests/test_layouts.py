"""Folders as people have them: what is read, what is left out, and that both are said."""

import io
import re
import shutil

import pytest
import torch
from conftest import TINY, fails, run
from PIL import Image

import data
import eval_lincls
import main_pcl
from data import DataError, build_datasets, load_into_memory

CLASSES = ("ant", "bee", "cat")


def png(seed=0, size=(8, 8)):
    """The bytes of a small image."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (*size, 3), dtype=torch.uint8, generator=generator)
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, "PNG")
    return file.getvalue()


def write(folder, n, suffix=".png", start=0):
    """Write `n` images into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(start, start + n):
        (folder / f"{i}{suffix}").write_bytes(png(i))


def write_classes(folder, n=4, classes=CLASSES):
    """Write `n` images of each class into `folder`."""
    for i, name in enumerate(classes):
        write(folder / name, n, start=100 * i)


# -- parts and classes -----------------------------------------------------------------------------
TRAIN_NAMES = ("train", "Train", "TRAIN", "training", "Training", "train_set", "training-set")
TRAIN_NAMES += ("trainset", "train2017", "train_images")
HELD_OUT_NAMES = ("val", "Val", "VALID", "valid", "validation", "Validation", "val_images", "test")
HELD_OUT_NAMES += ("Test", "testing", "test_set", "val2017", "held-out", "dev")


@pytest.mark.parametrize("name", TRAIN_NAMES)
def test_the_training_part_has_many_names(tmp_path, name):
    write_classes(tmp_path / name)
    write_classes(tmp_path / "val", 2)
    datasets = build_datasets(str(tmp_path))
    assert datasets.describe() == "12 training images, 6 held out, 3 classes, 8 pixels"
    assert datasets.labelled


@pytest.mark.parametrize("name", HELD_OUT_NAMES)
def test_the_held_out_part_has_many_names(tmp_path, name):
    write_classes(tmp_path / "train")
    write_classes(tmp_path / name, 2)
    datasets = build_datasets(str(tmp_path))
    assert datasets.describe() == "12 training images, 6 held out, 3 classes, 8 pixels"


def test_names_of_parts_do_not_change_a_fingerprint(tmp_path):
    write_classes(tmp_path / "a" / "train")
    write_classes(tmp_path / "b" / "Training")
    a = build_datasets(str(tmp_path / "a"))
    b = build_datasets(str(tmp_path / "b"))
    assert a.fingerprint == b.fingerprint
    assert build_datasets(str(tmp_path / "a" / "train")).fingerprint == a.fingerprint


def test_the_current_folder_may_be_a_part(tmp_path, monkeypatch):
    write_classes(tmp_path / "train", classes=["ant"])
    monkeypatch.chdir(tmp_path / "train")
    assert build_datasets(".").classes == ["ant"]


def test_of_several_parts_the_usual_one_is_read_and_the_others_are_named(tmp_path):
    for name in ("train", "Training", "val", "test"):
        write_classes(tmp_path / name)
    datasets = build_datasets(str(tmp_path))
    assert datasets.train.source.files.root == str(tmp_path / "train")
    assert datasets.val.source.files.root == str(tmp_path / "val")
    assert "the folder 'test' (12 images)" in datasets.left_out
    assert "the folder 'Training' (12 images)" in datasets.left_out


def test_a_test_folder_without_labels_does_not_hide_the_labelled_one(tmp_path):
    write_classes(tmp_path / "train")
    write(tmp_path / "val", 5)
    write_classes(tmp_path / "test", 2)
    datasets = build_datasets(str(tmp_path))
    assert len(datasets.val) == 6
    assert datasets.left_out == "the folder 'val' (5 images)"


def test_a_folder_per_class_needs_no_parts(tmp_path):
    write_classes(tmp_path)
    datasets = build_datasets(str(tmp_path))
    assert datasets.describe() == "12 training images, 3 classes, 8 pixels"
    assert datasets.classes == list(CLASSES)
    assert datasets.plain.labels.bincount().tolist() == [4, 4, 4]
    assert datasets.has_labels
    assert not datasets.labelled
    assert "its folders are the classes ('ant', 'bee', 'cat')" in datasets.notes[0]


def test_a_run_on_a_folder_per_class_is_evaluated_by_its_clusters(tmp_path, capsys):
    write_classes(tmp_path / "data", 8)
    exp_dir = tmp_path / "run"
    run(tmp_path / "data", *TINY, "--epochs", 1, "--exp-dir", exp_dir)
    printed = capsys.readouterr().out
    assert "24 training images, 3 classes" in printed
    assert "The evaluation compares clusters with the labels" in printed
    assert f"next: python eval_lincls.py --exp-dir {exp_dir}" in printed
    table = eval_lincls.main(["--exp-dir", str(exp_dir), "--no-baselines"])
    assert {"NMI 3", "AMI 3", "ARI 3", "acc 3"} <= set(table["trained"])
    assert not [name for name in table["trained"] if name.startswith(("linear", "kNN"))]


def test_a_folder_around_everything_makes_no_difference(tmp_path):
    write_classes(tmp_path / "download" / "images" / "Train")
    write_classes(tmp_path / "download" / "images" / "Test", 2)
    datasets = build_datasets(str(tmp_path))
    assert datasets.describe() == "12 training images, 6 held out, 3 classes, 8 pixels"
    assert "download/images" in datasets.notes[0]


def test_held_out_images_may_lack_a_class_but_have_no_other(tmp_path):
    write_classes(tmp_path / "train")
    write_classes(tmp_path / "val", 2, CLASSES[1:])
    datasets = build_datasets(str(tmp_path))
    assert datasets.val.labels.tolist() == [1, 1, 2, 2]
    assert datasets.notes == ("1 class without held-out images",)
    write(tmp_path / "val" / "dog", 1)
    with pytest.raises(DataError, match=r"different class folders \('dog'\)"):
        build_datasets(str(tmp_path))


def test_parts_within_classes_are_refused(tmp_path, capsys):
    for name in CLASSES:
        write(tmp_path / name / "train", 4)
        write(tmp_path / name / "test", 2)
    assert "move them to train/CLASS and val/CLASS" in fails(capsys, main_pcl.main, tmp_path)


def test_held_out_parts_alone_are_training_images(tmp_path):
    write_classes(tmp_path / "val")
    write_classes(tmp_path / "test")
    datasets = build_datasets(str(tmp_path))
    assert datasets.describe() == "24 training images, no classes, 8 pixels"
    assert datasets.notes == ("there is no folder train/: all images are training images",)


# -- images beside folders -------------------------------------------------------------------------
@pytest.mark.parametrize("part", ["train", "."])
def test_many_images_beside_a_folder_are_read(tmp_path, part):
    write(tmp_path / part, 30)
    write(tmp_path / part / "more", 5)
    datasets = build_datasets(str(tmp_path))
    assert datasets.describe() == "35 training images, no classes, 8 pixels"
    assert "has images beside its folders: all are read, without classes" in datasets.notes[0]


@pytest.mark.parametrize("part", ["train", "."])
def test_a_few_images_beside_class_folders_are_left_out(tmp_path, part):
    write_classes(tmp_path / part, 8)
    write(tmp_path / part, 2)
    datasets = build_datasets(str(tmp_path))
    assert datasets.describe() == (
        "24 training images, 3 classes, 8 pixels; left out: 2 images beside the class folders"
    )


@pytest.mark.parametrize("name", ["thumbnails", "Thumbs", "@eaDir", ".thumbnails"])
def test_thumbnails_are_left_out(tmp_path, name):
    write(tmp_path / "train", 10)
    write(tmp_path / "train" / name, 10)
    datasets = build_datasets(str(tmp_path))
    assert len(datasets.train) == 10
    what = "folder of thumbnails" if name.lower().startswith("thumb") else "hidden folder"
    assert datasets.left_out == f"1 {what}"


def test_a_class_may_be_called_thumb(tmp_path):
    write_classes(tmp_path / "train", 4, ("finger", "thumb"))
    assert build_datasets(str(tmp_path)).classes == ["finger", "thumb"]


def test_what_is_beside_the_parts_is_named(tmp_path):
    write_classes(tmp_path / "train")
    write(tmp_path, 3)
    write(tmp_path / "masks", 7)
    datasets = build_datasets(str(tmp_path))
    assert datasets.left_out == "3 images beside the folders, the folder 'masks' (7 images)"


# -- hidden files, other files ---------------------------------------------------------------------
HIDDEN = (".thumbnails", ".git", ".ipynb_checkpoints", "@eaDir", "__MACOSX", "#recycle")
HIDDEN += ("$RECYCLE.BIN", "System Volume Information", "lost+found", "@Recycle", "__pycache__")


@pytest.mark.parametrize("parts", [True, False])
@pytest.mark.parametrize("name", HIDDEN)
def test_hidden_folders_are_no_classes(tmp_path, name, parts):
    root = tmp_path / "train" if parts else tmp_path
    write_classes(root)
    expected = build_datasets(str(tmp_path)).fingerprint
    write(root / name, 4)
    write(root / "ant" / name / "deep", 4)
    if parts:
        write_classes(tmp_path / "val")
        write(tmp_path / "val" / name, 4)
    datasets = build_datasets(str(tmp_path))
    assert datasets.classes == list(CLASSES)
    assert datasets.fingerprint == expected
    assert datasets.left_out == f"{3 if parts else 2} hidden folders"


def test_files_that_are_not_read_are_counted(tmp_path, capsys):
    write_classes(tmp_path / "train", 8)
    for name, n in ((".xyz", 20), (".txt", 2), (".CSV", 1)):
        for i in range(n):
            (tmp_path / "train" / "ant" / f"{i}{name}").write_bytes(b"?")
    (tmp_path / "train" / "ant" / "._0.png").write_bytes(b"?")
    (tmp_path / "train" / "ant" / "README").write_bytes(b"?")
    write(tmp_path / "train" / ".hidden", 3)
    run(tmp_path, *TINY, "--epochs", 1, "--exp-dir", tmp_path / "run")
    first_line = capsys.readouterr().out.splitlines()[0]
    assert (
        "24 training images, 3 classes, 8 pixels; left out: 20 .xyz, 2 .txt, 1 .csv" in first_line
    )
    for part in ("1 hidden file", "1 hidden folder", "1 file without suffix"):
        assert re.search(rf", {part}\b", first_line)


def test_many_kinds_of_files_and_odd_suffixes_stay_in_one_line(tmp_path):
    write(tmp_path, 3)
    for i in range(9):
        (tmp_path / f"a.k{i}").write_bytes(b"?")
    for i in range(2):
        (tmp_path / f"{i}.odd\nsuffix").write_bytes(b"?")
    datasets = build_datasets(str(tmp_path))
    assert "\n" not in datasets.describe()
    assert r"2 '.odd\nsuffix', " in datasets.left_out
    assert datasets.left_out.endswith("5 other files")


def test_a_folder_of_other_files_says_what_it_holds(tmp_path, capsys):
    (tmp_path / "images.zip").write_bytes(b"?")
    error = fails(capsys, main_pcl.main, tmp_path)
    assert "has no images (left out: 1 .zip)" in error


@pytest.mark.parametrize("suffix, plug_in", [(".heic", "pillow-heif"), (".avif", "newer Pillow")])
def test_formats_without_a_plug_in_are_counted_and_named(tmp_path, monkeypatch, suffix, plug_in):
    write(tmp_path, 3)
    for i in range(20):
        (tmp_path / f"{i}{suffix}").write_bytes(b"?")
    monkeypatch.setattr(data.Image, "registered_extensions", lambda: {".png": "PNG"})
    datasets = build_datasets(str(tmp_path))
    assert len(datasets.train) == 3
    assert datasets.left_out.startswith(f"20 {suffix} (")
    assert plug_in in datasets.left_out


@pytest.mark.parametrize("suffix", [".avif", ".gif", ".jfif", ".jp2", ".JPG", ".heic"])
def test_formats_that_pillow_reads_are_read(tmp_path, suffix):
    if suffix.lower() not in Image.registered_extensions():
        pytest.skip(f"this Pillow has no plug-in for {suffix}")
    for i in range(3):
        image = Image.open(io.BytesIO(png(i, (32, 32))))
        image.save(tmp_path / f"{i}{suffix}")
    datasets = build_datasets(str(tmp_path))
    assert len(datasets.train) == 3
    assert datasets.plain[0][0].shape == (3, 32, 32)


def test_the_folder_of_a_run_is_left_out(tmp_path, monkeypatch):
    write(tmp_path, 32)
    monkeypatch.chdir(tmp_path)
    run(".", *TINY, "--epochs", 1)
    datasets = build_datasets(".")
    assert len(datasets.train) == 32
    assert datasets.left_out == "1 folder of a run"
    run(".", *TINY, "--epochs", 2, "--resume")


# -- images in memory ------------------------------------------------------------------------------
def test_a_run_within_a_part_is_no_class(tmp_path):
    """Nor is a start that broken images have ended, which leaves their list alone."""
    write_classes(tmp_path / "train")
    before = build_datasets(str(tmp_path))
    (tmp_path / "train" / "runs" / "a").mkdir(parents=True)
    (tmp_path / "train" / "runs" / "a" / "checkpoint.pth.tar").write_text("")
    (tmp_path / "train" / "failed").mkdir()
    (tmp_path / "train" / "failed" / "broken.txt").write_text("1.png")
    after = build_datasets(str(tmp_path))
    assert after.classes == list(CLASSES)
    assert after.fingerprint == before.fingerprint
    assert after.left_out == "2 folders of a run"


def test_large_images_are_not_kept_whole(tmp_path):
    for i in range(3):
        Image.new("RGB", (300, 200), (i, 0, 0)).save(tmp_path / f"{i}.png")
    large = build_datasets(str(tmp_path), 100)
    assert load_into_memory(large) is large
    half = load_into_memory(build_datasets(str(tmp_path), 150))
    assert half.train.pixels.shape == (3, 3, 200, 300)


# -- broken images ---------------------------------------------------------------------------------
@pytest.fixture
def broken(tmp_path):
    """300 images in three classes, of which two are broken, and 30 held-out ones, one broken."""
    root = tmp_path / "data"
    write_classes(root / "train", 100)
    write_classes(root / "val", 10)
    names = [root / "train" / "ant" / "7.png", root / "train" / "bee" / "150.png"]
    names.append(root / "val" / "cat" / "203.png")
    for name in names:
        name.write_bytes(png()[:60])
    return root, [str(name) for name in names]


def with_two_sizes(root):
    """Change the size of an image, so that images are read by the loader's workers."""
    (root / "train" / "cat" / "210.png").write_bytes(png(size=(8, 9)))


def test_all_broken_images_are_listed_at_once(broken, tmp_path, capsys):
    root, names = broken
    error = fails(capsys, main_pcl.main, root, *TINY, "--exp-dir", tmp_path / "run")
    assert "3 of 330 images cannot be read" in error
    assert "--skip-broken" in error
    for name in names:
        assert name in error
    assert f"{tmp_path / 'run' / 'broken.txt'}" in error
    assert (tmp_path / "run" / "broken.txt").read_text().splitlines() == names


def test_of_many_broken_images_the_first_are_named(tmp_path):
    write(tmp_path, 20)
    for i in range(10, 18):
        (tmp_path / f"{i}.png").write_bytes(b"")
    datasets = build_datasets(str(tmp_path), 8)
    with pytest.raises(DataError, match=r"8 of 20 images cannot be read: .*10\.png.* and 3 more;"):
        load_into_memory(datasets)
    assert len(datasets.sources[0].broken_names()) == 8


@pytest.mark.parametrize("in_memory, workers", [(True, 0), (False, 0), (False, 2)])
def test_broken_images_can_be_skipped(broken, tmp_path, capsys, in_memory, workers):
    root, names = broken
    if not in_memory:
        with_two_sizes(root)
    options = [*TINY, "--epochs", 2, "--warmup", 1, "-j", workers, "--exp-dir", tmp_path / "run"]
    log = run(root, *options, "--features", "pass", "--skip-broken")
    printed = capsys.readouterr().out
    assert log[-1]["knn"] is not None
    assert ("images in memory" in printed) == in_memory
    assert "left out because they are broken: 3" in printed
    assert (tmp_path / "run" / "broken.txt").read_text().splitlines() == names

    # the evaluation leaves them out, too
    options = ["--exp-dir", str(tmp_path / "run"), "--no-baselines", "-j", str(workers)]
    eval_lincls.main(options)
    printed = capsys.readouterr().out
    assert "left out, because they are broken:" in printed
    assert all(name in printed for name in names)


def test_a_broken_image_has_no_label_and_the_same_substitute_in_any_mode(broken):
    root, _ = broken
    on_demand = build_datasets(str(root), skip_broken=True, seed=3)
    in_memory = load_into_memory(build_datasets(str(root), skip_broken=True, seed=3))
    index = on_demand.sources[0].names().index("ant/7.png")
    view, _ = on_demand.plain[index]
    assert torch.equal(view, in_memory.plain.pixels[index])
    assert on_demand.plain.labels[index] == -1
    assert in_memory.plain.labels[index] == -1
    copies = (in_memory.plain.pixels == view).flatten(1).all(1)
    assert copies.sum() == 2
    assert on_demand.fingerprint == build_datasets(str(root)).fingerprint


@pytest.mark.parametrize("in_memory", [True, False])
def test_too_many_broken_images_end_the_run(broken, tmp_path, capsys, in_memory):
    root, _ = broken
    if not in_memory:
        with_two_sizes(root)
    for i in range(50, 53):
        (root / "train" / "ant" / f"{i}.png").write_bytes(b"no image")
    options = [*TINY, "--features", "pass", "-j", 1, "--exp-dir", tmp_path / "run"]
    error = fails(capsys, main_pcl.main, root, *options, "--epochs", 50, "--skip-broken")
    assert re.search(r"[45] of 300 images cannot be read", error)
    assert "more than 1 %" in error
    listed = (tmp_path / "run" / "broken.txt").read_text().splitlines()
    assert len(listed) >= 4


def test_a_single_image_of_few_may_be_broken(tmp_path):
    write(tmp_path, 20)
    (tmp_path / "3.png").write_bytes(b"")
    source = build_datasets(str(tmp_path), 8, skip_broken=True).sources[0]
    for i in range(20):
        source.image(i)
    assert source.broken_names() == [str(tmp_path / "3.png")]
    (tmp_path / "4.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"2 of 20 images .* more than 1 %"):
        source.image(source.names().index("4.png"))


def test_one_image_alone_has_no_substitute(tmp_path):
    (tmp_path / "0.png").write_bytes(b"")
    with pytest.raises(DataError):
        build_datasets(str(tmp_path), 8, skip_broken=True).plain[0]


def test_a_run_that_met_a_broken_image_goes_on_without_it(broken, tmp_path, capsys):
    root, _ = broken
    with_two_sizes(root)
    options = [root, *TINY, "--epochs", 1, "-j", 0, "--exp-dir", tmp_path / "run"]
    assert "--skip-broken" in fails(capsys, main_pcl.main, *options)
    log = run(*options, "--resume", "--skip-broken")
    assert len(log) == 1


def test_broken_images_are_shared_by_pickled_copies(broken):
    """As loader workers do under the start method spawn."""
    root, names = broken
    datasets = build_datasets(str(root), skip_broken=True)
    loader = torch.utils.data.DataLoader(
        datasets.plain,
        batch_size=300,
        collate_fn=data.identity_collate,
        num_workers=1,
        multiprocessing_context="spawn",
    )
    for _ in loader:
        pass
    assert datasets.sources[0].broken_names() == names[:2]


# -- files that come and go ------------------------------------------------------------------------
def test_a_resumed_run_says_which_images_came_and_went(tmp_path, capsys):
    root = tmp_path / "data"
    write_classes(root / "train", 16)
    options = [root, *TINY, "--epochs", 2, "--exp-dir", tmp_path / "run"]
    run(*options)
    images = (tmp_path / "run" / "images.txt").read_text().splitlines()
    assert len(images) == 48
    assert images[0] == "ant/0.png"

    (root / "train" / "ant" / "3.png").unlink()
    (root / "train" / "bee" / "new\nname.png").write_bytes(png())
    (root / "train" / "bee" / "new.png").write_bytes(png())
    error = fails(capsys, main_pcl.main, *options, "--resume")
    assert "the training images are not those of the checkpoint: " in error
    assert r"2 new ('bee/new.png', 'bee/new\\nname.png'), 1 missing ('ant/3.png')" in error

    # a run of before, without the list
    (tmp_path / "run" / "images.txt").unlink()
    error = fails(capsys, main_pcl.main, *options, "--resume")
    assert "the training images are not those of the checkpoint; restore them" in error


def test_an_image_less_changes_no_other_default_first(tmp_path, capsys):
    """The queue and the clusters follow from the number of images, and cannot change either."""
    root = tmp_path / "data"
    write(root, 64)
    options = [root, "-a", "resnet18_w4", "-b", 16, "--bn-splits", 2, "--epochs", 1]
    options += ["--exp-dir", tmp_path / "run"]
    run(*options)
    for i in range(24):
        (root / f"{i}.png").unlink()
    error = fails(capsys, main_pcl.main, *options, "--resume")
    assert "24 missing ('0.png', '1.png', '10.png', ...)" in error


def test_a_new_run_in_the_same_directory_lists_its_own_images(tmp_path):
    write(tmp_path / "data", 32)
    options = [tmp_path / "data", *TINY, "--epochs", 1, "--exp-dir", tmp_path / "run"]
    run(*options)
    shutil.copy(tmp_path / "data" / "0.png", tmp_path / "data" / "a.png")
    run(*options, "--overwrite")
    assert "a.png" in (tmp_path / "run" / "images.txt").read_text().splitlines()
