"""Messages: what a user is told is true, and the advice in it is the right one."""

import argparse
import errno
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY, fails, picture, run
from torch.utils.data import get_worker_info

import eval_lincls
import main_pcl
from data import DataError, Images
from model import build_encoder
from runtime import cli, image_files
from runtime.directory import choose_directory, end_after_loss


# -- broken images ---------------------------------------------------------------------------------
def test_a_skipped_image_whose_header_is_broken_is_announced(tmp_path, capsys):
    for i in range(20):
        picture(12, 12, seed=i).save(tmp_path / f"{i:02d}.png")
    (tmp_path / "07.png").write_bytes(b"")
    options = [*TINY, "--epochs", 1, "--exp-dir", tmp_path / "run"]
    run(tmp_path, *options, "--skip-broken")
    assert capsys.readouterr().out.count("left out because they are broken: 1,") == 1


def test_the_list_of_broken_images_is_that_of_the_run(tmp_path, capsys, monkeypatch):
    """Neither that of a start that failed, nor missing because --overwrite has cleared it."""
    for i in range(20):
        picture(12, 12, seed=i).save(tmp_path / f"{i:02d}.png")
    broken = tmp_path / "07.png"
    whole = broken.read_bytes()
    broken.write_bytes(b"")
    options = [tmp_path, *TINY, "--epochs", 1, "--exp-dir", tmp_path / "run"]
    fails(capsys, main_pcl.main, *options)
    assert (tmp_path / "run" / "broken.txt").read_text() == f"{broken}\n"
    broken.write_bytes(whole)
    run(*options)
    assert not (tmp_path / "run" / "broken.txt").exists()

    broken.write_bytes(b"")
    monkeypatch.setattr(main_pcl, "train", lambda *_: exit(7))
    with pytest.raises(SystemExit, match="7"):
        run(*options, "--skip-broken", "--overwrite")
    assert (tmp_path / "run" / "broken.txt").read_text() == f"{broken}\n"


def test_a_start_that_is_refused_leaves_another_runs_list(tmp_path, capsys):
    """Whether its broken images end it, or only the run that is there."""
    for part in ("a", "b"):
        (tmp_path / part).mkdir()
        for i in range(20):
            picture(12, 12, seed=i).save(tmp_path / part / f"{i:02d}.png")
        (tmp_path / part / "07.png").write_bytes(b"")
    options = [*TINY, "--epochs", 1, "--exp-dir", tmp_path / "run"]
    run(tmp_path / "a", *options, "--skip-broken")
    for flags in ([], ["--skip-broken"]):
        fails(capsys, main_pcl.main, tmp_path / "b", *options, *flags)
        assert (tmp_path / "run" / "broken.txt").read_text() == f"{tmp_path}/a/07.png\n"


def test_a_run_that_goes_on_keeps_its_list_until_it_meets_a_broken_image(tmp_path):
    """Images that are read as needed are found to be broken only in training."""
    (tmp_path / "broken.txt").write_text("a.png\n")
    datasets = argparse.Namespace(num_broken=lambda: 0)
    image_files.renew_list(tmp_path, datasets, is_new=False)
    assert (tmp_path / "broken.txt").read_text() == "a.png\n"
    image_files.renew_list(tmp_path, datasets, is_new=True)
    assert not (tmp_path / "broken.txt").exists()


def test_of_many_images_left_out_the_first_are_named(tmp_path, capsys):
    source = argparse.Namespace(broken_names=lambda: [f"{i}.png" for i in range(14)])
    eval_lincls.print_broken_images(argparse.Namespace(sources=[source]))
    line = capsys.readouterr().out
    assert line.endswith("'8.png', '9.png', and 4 more\n")


def test_a_folder_that_cannot_be_listed_is_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiment_pcl").mkdir()

    def listdir(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", lambda _: [Path("experiment_pcl")])
    monkeypatch.setattr(os, "listdir", listdir)
    assert choose_directory(None, resume=None) == Path("experiment_pcl_2")


def test_a_start_that_broken_images_ended_is_not_the_latest_run(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(folder, *TINY, "--epochs", 1)
    for i in range(20):
        (tmp_path / f"{i}.png").write_bytes(b"")
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path, *TINY, "--image-size", 12)
    assert (tmp_path / "experiment_pcl_2" / "broken.txt").exists()
    assert choose_directory(None, resume="") == Path("experiment_pcl")  # as the evaluation asks
    assert choose_directory(None, resume=None) == Path("experiment_pcl_2")


# -- flags -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "script, flag",
    [
        (main_pcl, "--init"),  # random weights, if it is ignored
        (main_pcl, "--config"),
        (main_pcl, "--exp-dir"),  # the current folder
        (eval_lincls, "--pretrained"),  # the latest run
        (eval_lincls, "--exp-dir"),
    ],
)
def test_an_empty_name_is_refused(folder, tmp_path, capsys, monkeypatch, script, flag):
    """A command with a variable that the shell does not know must not do something else."""
    monkeypatch.chdir(tmp_path)
    error = fails(capsys, script.main, folder, flag, "")
    assert f"argument {flag}: is empty" in error


@pytest.mark.parametrize(
    "flag, values", [("--exp-dir", "ab"), ("--labels", [1, 5]), ("--knn-k", [1, 5])]
)
def test_a_list_may_be_given_in_parts(flag, values):
    """Were the first part forgotten, a mean would be of fewer runs than were named."""
    parser = eval_lincls.get_parser()
    together = parser.parse_args([flag, *map(str, values)])
    apart = parser.parse_args([f"{flag}={value}" for value in values])
    assert apart == together
    assert parser.parse_args([]).labels == []


def test_weights_that_are_no_run_are_for_init(folder, tmp_path, capsys):
    file = tmp_path / "resnet.pth"
    torch.save(build_encoder("resnet18_w4", small_images=True).state_dict(), file)
    options = [folder, *TINY, "--epochs", 1, "--exp-dir", tmp_path / "run"]
    assert "if it holds weights, name it with --init" in fails(
        capsys, main_pcl.main, *options, "--resume", file
    )
    run(*options, "--init", file)


# -- memory ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("script", [main_pcl, eval_lincls])
def test_a_killed_loader_worker_gets_one_line(mixed, tmp_path, capsys, monkeypatch, script):
    """As by the kernel, if the machine is short of memory."""
    options = [*TINY, "--epochs", 1, "--exp-dir", tmp_path]
    if script is eval_lincls:
        run(mixed, *options)
        options = ["--exp-dir", tmp_path]
    read = Images.image

    def image(self, index):
        if get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, index)

    monkeypatch.setattr(Images, "image", image)
    capsys.readouterr()
    error = fails(capsys, script.main, mixed, *options, "-j", 1, status=1)
    assert "DataLoader worker" in error
    assert "fewer --workers" in error


def test_workers_without_shared_memory_are_told_of_it(capsys):
    """The message is torch's, in a container whose /dev/shm is too small."""

    def load(_):
        with cli.errors_in_one_line(DataError):
            raise RuntimeError(
                "unable to allocate shared memory(shm) for file </torch_7_6>: No space left (28)"
            )

    assert "--shm-size" in fails(capsys, load, status=1)


# -- folders ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("closed", ["class 1", "class 1/inner"])
def test_nobody_is_told_to_remove_a_class_that_may_not_be_read(
    folder, tmp_path, capsys, monkeypatch, closed
):
    root = tmp_path / "images"
    shutil.copytree(folder, root)
    (root / "train/class 1").rename(root / "inner")
    (root / "train/class 1").mkdir()
    (root / "inner").rename(root / "train/class 1/inner")
    scandir = os.scandir

    def scan(path):
        if str(path) == str(root / "train" / closed):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scan)
    error = fails(capsys, main_pcl.main, root)
    assert "class 1' has no images; it, or a folder in it, cannot be read" in error
    assert "remove it" not in error


@pytest.mark.parametrize(
    "script, flag", [(main_pcl, "--init"), (main_pcl, "--resume"), (eval_lincls, "--pretrained")]
)
def test_a_folder_in_place_of_a_checkpoint_is_called_a_folder(
    folder, tmp_path, capsys, monkeypatch, script, flag
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    error = fails(capsys, script.main, folder, flag, "run")
    assert "run is a folder; name a file in it, for example run/checkpoint.pth.tar" in error


def test_one_of_several_data_sets_can_be_named(folder, tmp_path, capsys):
    """Such as the folds of a cross-validation."""
    for fold in ("fold1", "fold2"):
        (tmp_path / fold).symlink_to(folder)
    error = fails(capsys, main_pcl.main, tmp_path)
    assert f"each folder in {tmp_path} has a part of training images; name one of the" in error


def test_without_the_digits_a_folder_is_asked_for(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("data.DIGITS", tmp_path / "digits.npz")
    assert "name a folder of images" in fails(capsys, main_pcl.main, *TINY)


def closed_pipe():
    """A text stream whose reader has gone, as after `| head`."""
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_run_and_its_evaluation_go_on_if_nobody_reads_their_output(
    folder, tmp_path, monkeypatch, stream
):
    with closed_pipe() as output, monkeypatch.context() as patch:
        patch.setattr(sys, stream, output)
        log = run(folder, *TINY, "--epochs", 2, "--exp-dir", tmp_path)
        for advice in ("first", "second"):  # warnings go to stderr
            with cli.warn_if_unwritable(tmp_path / advice):
                raise OSError("no room")
        eval_lincls.main(["--exp-dir", str(tmp_path), "--no-baselines", "--num-cluster", "4"])
    assert len(log) == 2
    assert (tmp_path / "eval.json").is_file()


def test_a_mistake_has_its_exit_status_if_nobody_reads_the_message(monkeypatch):
    with closed_pipe() as output, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", output)
        with pytest.raises(SystemExit) as stop:
            main_pcl.main(["--epochs", "none"])
    assert stop.value.code == 2


def test_a_run_that_loses_its_directory_ends_even_if_nobody_reads_why(monkeypatch):
    statuses = []
    with closed_pipe() as output, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", output)
        patch.setattr(os, "_exit", statuses.append)
        end_after_loss(None)
    assert statuses == [1]
