"""What ranks, loader workers and a run's own files must not take from each other."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, fails, picture, position, run, stop_in_step
from torch.utils.data import get_worker_info

import eval_lincls
import main_pcl
import runtime.directory
from data import Images, build_datasets
from runtime import checkpoint, distributed
from runtime.directory import write_atomically


@pytest.mark.parametrize("rank, expected", [(0, ["read", "wait"]), (1, ["wait", "read"])])
def test_the_first_rank_of_an_evaluation_downloads_alone(folder, monkeypatch, rank, expected):
    events = []

    def read(*args, **options):
        events.append("read")
        return build_datasets(*args, **options)

    monkeypatch.setattr(distributed, "get_rank_and_world", lambda: (rank, 2))
    monkeypatch.setattr(distributed, "barrier", lambda: events.append("wait"))
    monkeypatch.setattr(eval_lincls, "build_datasets", read)
    built = {}
    datasets = eval_lincls.find_data(str(folder), None, {}, built)
    assert events == expected
    assert eval_lincls.find_data(str(folder), None, {}, built) is datasets
    assert events == expected


@pytest.mark.parametrize(
    "data, directory",
    [
        ("photos", "./photos/"),
        ("photos", "{root}/photos"),
        ("photos", "link"),
        ("link", "photos"),
        ("photos", "photos/a/../"),
        ("photos", "photos/a"),
        ("cifar10", "cifar10"),
        ("cifar10", "cifar10/run1"),
    ],
)
def test_a_run_is_not_written_among_its_images(tmp_path, monkeypatch, capsys, data, directory):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(main_pcl, "build_datasets", None)  # it must not come to that
    (tmp_path / "photos" / "a").mkdir(parents=True)
    (tmp_path / "link").symlink_to("photos")
    picture().save(tmp_path / "photos" / "a" / "1.png")
    error = fails(capsys, main_pcl.main, data, "--exp-dir", directory.format(root=tmp_path))
    assert "choose another --exp-dir" in error


@pytest.mark.parametrize("left", [[], ["broken.txt"], ["args.json", ".lock"], ["x", "checkpoint"]])
def test_a_run_may_have_a_folder_of_its_own_beside_its_images(tmp_path, left):
    directory = tmp_path / "photos" / "experiment_pcl"
    main_pcl.refuse_folder_of_data(str(tmp_path / "photos"), directory)
    directory.mkdir(parents=True)
    for name in left:
        (directory / name.replace("checkpoint", "checkpoint.pth.tar")).write_text("")
    main_pcl.refuse_folder_of_data(str(tmp_path / "photos"), directory)
    main_pcl.refuse_folder_of_data("a\0b", directory)


def test_the_digits_may_be_trained_on_in_a_folder_of_that_name():
    main_pcl.refuse_folder_of_data("digits", Path("digits"))


def fail_in_the_worker(self, index):
    assert get_worker_info() is not None
    raise RuntimeError("a bug")


def test_a_bug_in_a_loader_worker_keeps_its_traceback(mixed, tmp_path, monkeypatch):
    monkeypatch.setattr(Images, "__getitem__", fail_in_the_worker)
    monkeypatch.setattr(main_pcl, "load_into_memory", lambda datasets, *_: datasets)
    monkeypatch.setattr(main_pcl, "evaluate_untrained", lambda *_: None)
    with pytest.raises(RuntimeError, match="a bug"):
        run(mixed, *TINY, "-j", 1, "--exp-dir", tmp_path / "run")


def test_a_checkpoint_is_replaced_only_after_all_ranks_have_read_it(folder, tmp_path, monkeypatch):
    run(folder, *TINY, "--epochs", 1, "--exp-dir", tmp_path / "run")
    events = []

    def note(module, name):
        function = getattr(module, name)

        def noted(*args, **options):
            events.append(name)
            return function(*args, **options)

        monkeypatch.setattr(module, name, noted)

    note(checkpoint, "read")
    note(checkpoint, "barrier")
    note(checkpoint, "save")
    run("--epochs", 2, "--exp-dir", tmp_path / "run", "--resume")
    assert events[:3] == ["read", "barrier", "save"]


def test_a_rank_alone_in_the_environment_gets_one_line(monkeypatch, capsys):
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "lo")  # so that monkeypatch restores them
    monkeypatch.setenv("RANK", "0")
    error = fails(capsys, lambda _: distributed.init_distributed())
    assert "RANK is set, but WORLD_SIZE and MASTER_ADDR and MASTER_PORT not;" in error


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("WORLD_SIZE", "", "RANK is set, but WORLD_SIZE not"),
        ("WORLD_SIZE", "two", "WORLD_SIZE is 'two', not a number"),
        ("MASTER_PORT", "abc", "MASTER_PORT is 'abc', not a number"),
        ("LOCAL_RANK", "x", "LOCAL_RANK is 'x', not a number"),
        ("LOCAL_WORLD_SIZE", "-1", "LOCAL_WORLD_SIZE is '-1', not a number"),
        ("RANK", "x", "RANK is 'x', not a number"),
        ("RANK", "1", "RANK is 1, but WORLD_SIZE is 1"),
    ],
)
def test_malformed_variables_of_a_launcher_are_named_at_once(
    monkeypatch, capsys, name, value, message
):
    good = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29501"}
    for variable, text in {**good, name: value}.items():
        monkeypatch.setenv(variable, text)
    assert message in fails(capsys, lambda _: distributed.init_distributed())


@pytest.mark.parametrize("value", ["", "0", "4", "x"])
def test_variables_of_a_launcher_mean_nothing_without_rank(monkeypatch, folder, tmp_path, value):
    """Containers and jobs may set them, too."""
    run(folder, *TINY, "--epochs", 1, "--exp-dir", tmp_path)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RANK", "")
    splits = json.loads((tmp_path / "args.json").read_text())["bn_splits"]
    run("--exp-dir", tmp_path, "--resume", "--epochs", 2)
    args = json.loads((tmp_path / "args.json").read_text())
    assert args["bn_splits"] == splits
    assert args["parts"][1]["changed"] == {"epochs": [1, 2]}


@pytest.mark.parametrize("value", ["", "3", "x"])
def test_local_rank_means_nothing_without_rank(monkeypatch, value):
    """Containers and jobs may set it, too."""
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setenv("RANK", "")
    monkeypatch.setenv("LOCAL_RANK", value)
    assert distributed.init_distributed() == "cuda"
    assert taken == [0]


def test_features_reach_the_disk_before_other_nodes_read_them(folder, tmp_path, monkeypatch):
    events = []
    flush = np.memmap.flush

    def note_flush(self):
        events.append("flush")
        flush(self)

    def all_images(images, index, args):
        return main_pcl.make_loader(images, index.tolist(), args.batch_size, args)

    def identity(pixels):
        return pixels.flatten(1)

    images = build_datasets(str(folder), 8).plain
    args = SimpleNamespace(
        exp_dir=tmp_path, batch_size=8, device="cpu", amp=False, amp_dtype="bf16", workers=0
    )
    fake_run = SimpleNamespace(args=args, model=SimpleNamespace(encode=identity))
    monkeypatch.setattr(main_pcl, "plain_loader", all_images)
    monkeypatch.setattr(main_pcl, "get_rank_and_world", lambda: (0, 2))
    monkeypatch.setattr(distributed, "barrier", lambda: events.append("barrier"))
    monkeypatch.setattr(np.memmap, "flush", note_flush)
    main_pcl.gather_features(fake_run, images, keys=None)
    assert events == ["flush", "barrier"]


def test_an_older_checkpoint_does_not_go_on_with_the_keys_of_later_steps(
    folder, tmp_path, monkeypatch
):
    older = tmp_path / "older.pth.tar"
    options = [folder, *TINY, "-b", 8, "--epochs", 3, "--warmup", 1, "--exp-dir", tmp_path]
    stop_in_step(11, monkeypatch, run, *options)
    assert position(tmp_path) == (1, 2)
    shutil.copy(tmp_path / "checkpoint.pth.tar", older)
    keys = list((tmp_path / "features" / "keys").iterdir())
    assert keys
    for file in keys:  # as if a later epoch had written them
        saved = torch.load(file, weights_only=True)
        torch.save({**saved, "features": saved["features"] * float("nan")}, file)
    log = run(*options, "--resume", older)  # with those keys, it would stop at the E-step
    assert len(log) == 3


def test_a_run_that_goes_on_from_its_latest_checkpoint_keeps_its_keys(
    folder, tmp_path, monkeypatch
):
    """However the checkpoint is spelt."""
    options = [folder, *TINY, "-b", 8, "--epochs", 3, "--warmup", 1, "--exp-dir", tmp_path / "run"]
    stop_in_step(11, monkeypatch, run, *options)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runtime.directory, "remove_features", None)
    run(*options, "--resume", "run/../run/checkpoint.pth.tar")


def test_two_processes_may_write_the_same_file_at_once(tmp_path, monkeypatch):
    path = tmp_path / "broken.txt"
    fsync = os.fsync

    def other_process_writes(_):
        monkeypatch.setattr(os, "fsync", fsync)
        write_atomically(path, b"theirs")

    monkeypatch.setattr(os, "fsync", other_process_writes)
    write_atomically(path, b"ours")
    assert path.read_bytes() == b"ours"
    assert list(tmp_path.iterdir()) == [path]
