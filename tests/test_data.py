"""Images in memory and read on demand, what a view depends on, the order of an epoch."""

import os
import shutil
from argparse import Namespace

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from conftest import TINY, assert_same_distribution, picture, run
from torch.utils.data import DataLoader

import data
import eval_lincls
import main_pcl
from augment import RandomView
from data import (
    DataError,
    EpochSampler,
    build_datasets,
    derive_seed,
    identity_collate,
    load_into_memory,
)
from runtime.distributed import ignore_stop_signals


def all_of(images):
    """(images (n, ...), index (n,)) of a data set."""
    return next(iter(DataLoader(images, len(images), collate_fn=identity_collate)))


# -- images


def test_a_folder_finds_files_of_any_name(tmp_path):
    names = ["a.png", "ä and 漢.png", os.fsdecode(b"not \xff utf-8.png"), "z" * 200 + ".png"]
    paths = [str(tmp_path / name) for name in names]
    for i, path in enumerate(paths):
        picture(seed=i).save(path)
    files = data.Folder(tmp_path, ["x", "y"], paths, [0, 1, -1, 1])
    assert list(files.paths) == paths
    assert files.paths[-1] == paths[3]
    with pytest.raises(IndexError):
        files.paths[4]
    for i, (image, label) in enumerate(files):
        assert image.tobytes() == picture(seed=i).tobytes()
        assert label == [0, 1, -1, 1][i]


def test_loaders_start_no_more_workers_than_they_have_batches(folder):
    args = Namespace(workers=2, device="cpu")
    images = build_datasets(str(folder)).plain
    expected = {0: 0, 1: 1, 4: 1, 5: 2, 24: 2}  # {images: workers}
    for n, workers in expected.items():
        assert main_pcl.make_loader(images, range(n), 4, args).num_workers == workers
        assert eval_lincls.make_loader(images, 4, range(n), 2).num_workers == workers


def test_reading_an_image_leaves_the_random_numbers_of_the_caller(folder):
    images = build_datasets(str(folder)).train
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    images[0]
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("image_size", [None, 6])
def test_images_in_memory_equal_images_read_on_demand(folder, image_size):
    on_demand = build_datasets(str(folder), image_size)
    in_memory = load_into_memory(on_demand)
    side = in_memory.image_size
    assert on_demand.train.pixels is None
    assert in_memory[3:] == on_demand[3:]

    for part in ("plain", "val"):
        ours = getattr(in_memory, part)
        theirs = getattr(on_demand, part)
        pixels, index = all_of(ours)
        expected_pixels, expected_index = all_of(theirs)
        assert pixels.shape[1:] == (3, side, side)
        assert torch.equal(pixels, expected_pixels)
        assert torch.equal(index, expected_index)
        assert torch.equal(ours.labels, theirs.labels)

    pixels, index = all_of(in_memory.train)
    whole = torch.stack([TF.pil_to_tensor(on_demand.train.image(i)) for i in range(48)])
    assert torch.equal(pixels, whole)
    assert index.tolist() == list(range(48))


@pytest.mark.parametrize("image_size", [None, 6])
def test_worker_processes_read_the_same_images(folder, tmp_path, monkeypatch, image_size):
    monkeypatch.setattr(data, "MANY", 0)
    monkeypatch.setattr(data, "CHUNK", 5 * 3 * 10 * 12)  # 48 images do not fill the last chunk
    datasets = build_datasets(str(folder), image_size)
    ours = load_into_memory(datasets, workers=2)
    theirs = load_into_memory(datasets)
    for part in ("train", "plain", "val"):
        assert torch.equal(getattr(ours, part).pixels, getattr(theirs, part).pixels)


def test_images_that_are_their_own_plain_view_take_memory_once(tmp_path, monkeypatch):
    for i in range(4):
        picture(8, 8, i).save(tmp_path / f"{i}.png")
    whole = 4 * 3 * 8 * 8
    monkeypatch.setattr(data, "MEMORY", whole)
    datasets = build_datasets(str(tmp_path))
    assert load_into_memory(datasets).train.pixels is not None
    monkeypatch.setattr(data, "MEMORY", whole - 1)
    assert load_into_memory(datasets).train.pixels is None

    cropped = build_datasets(str(tmp_path), image_size=6)  # a plain view of its own
    monkeypatch.setattr(data, "MEMORY", whole + 4 * 3 * 6 * 6)
    assert load_into_memory(cropped).plain.pixels is not None
    monkeypatch.setattr(data, "MEMORY", whole + 4 * 3 * 6 * 6 - 1)
    assert load_into_memory(cropped).plain.pixels is None


def test_worker_processes_find_broken_images_and_other_sizes(folder, mixed, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MANY", 0)
    mixed_sizes = build_datasets(str(mixed))
    assert load_into_memory(mixed_sizes, workers=2) is mixed_sizes
    root = tmp_path / "images"
    shutil.copytree(folder, root)
    broken = [root / "train" / "class 0" / "3.png", root / "val" / "class 2" / "1.png"]
    for path in broken:
        path.write_bytes(path.read_bytes()[:90])
    datasets = build_datasets(str(root))
    with pytest.raises(DataError, match="2 of 66 images cannot be read"):
        load_into_memory(datasets, workers=2)
    assert [len(source.broken_names()) for source in datasets.sources] == [1, 1]


def test_views_of_both_kinds_of_images_have_the_same_distribution(tmp_path):
    n = 1500
    path = tmp_path / "train" / "class"
    path.mkdir(parents=True)
    picture(16, 16).save(path / "0.png")
    for i in range(1, n):
        (path / f"{i}.png").hardlink_to(path / "0.png")
    on_demand = build_datasets(str(tmp_path), 12)
    in_memory = load_into_memory(on_demand)

    def two_views(datasets, crop, seed):
        random_view = RandomView(12, crop=crop, **datasets.augmentation)
        images, _ = all_of(datasets.train)
        return random_view.two_views(images, RandomView.draw(n, seed))

    ours = two_views(in_memory, crop=True, seed=0)
    theirs = two_views(on_demand, crop=False, seed=1)
    for a, b in zip(ours, theirs, strict=True):
        assert_same_distribution(a, b)


def test_large_square_images_lose_their_border_in_memory_too(tmp_path):
    """The plain view cuts off the outer eighth, as it does when the evaluation reads the images."""
    for part in ("train", "val"):
        (tmp_path / part / "class").mkdir(parents=True)
        for i in range(2):
            picture(96, 96, seed=i).save(tmp_path / part / "class" / f"{i}.png")
    on_demand = build_datasets(str(tmp_path))
    in_memory = load_into_memory(on_demand)
    whole = in_memory.train.pixels
    assert in_memory.image_size == 96
    assert whole.shape == (2, 3, 96, 96)
    for part in ("plain", "val"):
        pixels, _ = all_of(getattr(in_memory, part))
        expected, _ = all_of(getattr(on_demand, part))
        assert torch.equal(pixels, expected)
        assert not torch.equal(pixels, whole)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_workers_give_the_same_views_under_every_start_method(mixed, method):
    train = build_datasets(str(mixed)).train
    train.set_epoch(3)
    loader = DataLoader(
        train,
        batch_size=6,
        sampler=range(6),
        collate_fn=identity_collate,
        worker_init_fn=ignore_stop_signals,
        num_workers=1,
        multiprocessing_context=method,
    )
    ((views, index),) = loader
    assert index.tolist() == list(range(6))
    assert torch.equal(views, torch.stack([train[i][0] for i in range(6)]))


def test_mixed_sizes_and_too_many_images_are_read_on_demand(folder, mixed, monkeypatch):
    mixed_sizes = build_datasets(str(mixed))
    assert load_into_memory(mixed_sizes) is mixed_sizes
    too_many = build_datasets(str(folder))
    monkeypatch.setattr(data, "MEMORY", 48 * 3 * 10 * 12)  # enough for the training images alone
    assert load_into_memory(too_many) is too_many
    assert too_many.plain.pixels is None


def test_a_run_trains_on_images_read_on_demand(mixed, tmp_path, capsys):
    log = run(mixed, *TINY, "--epochs", 2, "--warmup", 1, "--exp-dir", tmp_path)
    assert "read as needed" in capsys.readouterr().out
    assert np.isfinite(log[-1]["loss"])


def test_views_depend_on_seed_epoch_and_index_alone():
    train = build_datasets(seed=3).train
    other_seed = build_datasets(seed=4).train
    first = train[5][0]
    assert first.shape == (2, 3, 8, 8)
    assert not torch.equal(first[0], first[1])

    torch.rand(9)
    assert torch.equal(first, train[5][0])
    assert not torch.equal(first, other_seed[5][0])
    train.set_epoch(1)
    assert not torch.equal(first, train[5][0])


# -- folders without classes


def flat_copy(folder, directory):
    """Copy the training images of `folder` into `directory`, without class folders."""
    directory.mkdir(parents=True, exist_ok=True)
    for path in (folder / "train").rglob("*.png"):
        shutil.copy(path, directory / f"{path.parent.name}-{path.name}")


@pytest.mark.parametrize("depth", ["x", "train", "a/b", "val"])
def test_images_without_classes_are_found_at_any_depth(folder, tmp_path, depth):
    root = tmp_path / "flat"
    flat_copy(folder, root / depth)
    (root / "notes.txt").write_text("no image")
    datasets = build_datasets(str(root))
    assert len(datasets.train) == 48
    assert len(datasets.plain) == 48
    assert datasets.val is None
    assert datasets.classes == []
    assert (datasets.plain.labels == -1).all()
    assert not datasets.labelled
    assert datasets.image_size == 10
    assert datasets.describe() == "48 training images, no classes, 10 pixels; left out: 1 .txt"
    assert datasets.fingerprint != build_datasets(str(folder)).fingerprint


def test_held_out_images_may_have_labels_when_training_images_have_none(folder, tmp_path):
    flat_copy(folder, tmp_path / "train")
    shutil.copytree(folder / "val", tmp_path / "val")
    datasets = build_datasets(str(tmp_path))
    assert not datasets.labelled
    assert datasets.classes == [f"class {i}" for i in range(3)]
    assert (datasets.plain.labels == -1).all()
    assert datasets.val.labels.bincount().tolist() == [6, 6, 6]


def test_the_description_counts_images_and_classes(folder):
    datasets = build_datasets(str(folder))
    expected = "48 training images, 18 held out, 3 classes, 10 pixels"
    assert datasets.describe() == expected
    assert datasets.labelled


# -- the order of an epoch


def indices(sampler, epoch, step=0):
    sampler.set_epoch(epoch, step)
    order = list(sampler)
    assert len(order) == len(sampler)
    return order


def test_an_epoch_has_each_sample_at_most_once_in_its_own_order():
    first = indices(EpochSampler(23, 6, seed=0), epoch=0)
    next_epoch = indices(EpochSampler(23, 6, seed=0), epoch=1)
    other_seed = indices(EpochSampler(23, 6, seed=1), epoch=0)
    for order in (first, next_epoch, other_seed):
        assert len(order) == 18  # whole batches
        assert len(set(order)) == 18
        assert set(order) < set(range(23))
    assert first != next_epoch
    assert first != other_seed
    assert next_epoch != other_seed
    assert first == indices(EpochSampler(23, 6), epoch=0)
    assert first == list(EpochSampler(23, 6))  # a sampler starts with epoch 0


def test_an_epoch_does_not_always_leave_out_the_same_samples():
    left_out = set()
    for epoch in range(20):
        left_out |= set(range(23)) - set(indices(EpochSampler(23, 6), epoch))
    assert len(left_out) > 15


def test_an_epoch_can_start_at_any_step():
    sampler = EpochSampler(23, 6, seed=5)
    whole = indices(sampler, epoch=2)
    for step in range(4):
        assert indices(sampler, epoch=2, step=step) == whole[6 * step :]
    assert indices(sampler, epoch=2) == whole


@pytest.mark.parametrize("world", [2, 3])
def test_all_ranks_together_see_the_samples_of_one_process(world):
    """Each step has the same samples, each on one rank, for any number of ranks."""
    for step in (0, 1):
        alone = indices(EpochSampler(23, 6, seed=5), 2, step)
        ranks = [indices(EpochSampler(23, 6, 5, rank, world), 2, step) for rank in range(world)]
        share = 6 // world
        for first in range(0, len(ranks[0]), share):
            together = [i for rank in ranks for i in rank[first : first + share]]
            assert sorted(together) == sorted(alone[first * world : (first + share) * world])


def test_a_seed_depends_on_all_numbers_and_their_order():
    numbers = [(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 1, 0), (0, 0, 1)]
    seeds = [derive_seed(*x) for x in numbers]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert seeds == [derive_seed(*x) for x in numbers]
