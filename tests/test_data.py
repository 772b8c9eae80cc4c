"""Images in memory against images read as needed; what a view depends on; the order of an epoch."""

import shutil

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from conftest import TINY, assert_same_distribution, picture, run
from torch.utils.data import DataLoader

import data
from augment import RandomView
from data import EpochSampler, build_datasets, derive_seed, identity_collate, load_into_memory
from runtime.distributed import ignore_stop_signals


def all_of(images):
    """(images (n, ...), index (n,)) of a data set."""
    return next(iter(DataLoader(images, len(images), collate_fn=identity_collate)))


# -- images


@pytest.mark.parametrize("image_size", [None, 6])
def test_images_in_memory_are_those_read_as_needed(folder, image_size):
    read = build_datasets(str(folder), image_size)
    kept = load_into_memory(read)
    assert read.train.pixels is None and kept[3:] == read[3:]
    for a, b in ((kept.plain, read.plain), (kept.val, read.val)):
        (x, i), (y, j) = all_of(a), all_of(b)
        assert x.shape[1:] == (3, kept.image_size, kept.image_size) and torch.equal(a.labels, b.labels)
        assert torch.equal(x, y) and torch.equal(i, j)
    pixels, index = all_of(kept.train)
    assert index.tolist() == list(range(48))
    assert torch.equal(pixels, torch.stack([TF.pil_to_tensor(read.train.image(i)) for i in range(48)]))


def test_views_of_images_in_memory_are_distributed_as_those_of_images_read_as_needed(tmp_path):
    n, path = 1500, tmp_path / "train" / "class"
    path.mkdir(parents=True)
    picture(16, 16).save(path / "0.png")
    for i in range(1, n):
        (path / f"{i}.png").hardlink_to(path / "0.png")
    read = build_datasets(str(tmp_path), 12)
    kept = load_into_memory(read)
    ours, theirs = (
        RandomView(12, crop=datasets is kept, **datasets.augmentation).two_views(
            all_of(datasets.train)[0], RandomView.draw(n, seed)
        )
        for seed, datasets in enumerate((kept, read))
    )
    for a, b in zip(ours, theirs, strict=True):
        assert_same_distribution(a, b)


def test_large_square_images_in_memory_are_framed_as_those_read_as_needed(tmp_path):
    """As by the evaluation, which reads them: the outer eighth is cut off, of training and held-out images alike."""
    for part in ("train", "val"):
        (tmp_path / part / "class").mkdir(parents=True)
        for i in range(2):
            picture(96, 96, seed=i).save(tmp_path / part / "class" / f"{i}.png")
    read = build_datasets(str(tmp_path))
    kept = load_into_memory(read)
    assert kept.image_size == 96 and kept.train.pixels.shape == (2, 3, 96, 96)
    for a, b in ((kept.plain, read.plain), (kept.val, read.val)):
        assert torch.equal(all_of(a)[0], all_of(b)[0]) and not torch.equal(all_of(a)[0], kept.train.pixels)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_workers_of_every_start_method_give_the_same_views(mixed, method):
    train, options = build_datasets(str(mixed)).train, {"sampler": range(6), "collate_fn": identity_collate}
    options |= {"worker_init_fn": ignore_stop_signals, "num_workers": 1, "multiprocessing_context": method}
    train.set_epoch(3)
    ((views, index),) = DataLoader(train, 6, **options)
    assert index.tolist() == [*range(6)] and torch.equal(views, torch.stack([train[i][0] for i in range(6)]))


def test_images_that_differ_in_size_or_are_too_many_are_read_as_needed(folder, mixed, monkeypatch):
    datasets = build_datasets(str(mixed))
    assert load_into_memory(datasets) is datasets
    datasets = build_datasets(str(folder))
    monkeypatch.setattr(data, "MEMORY", 48 * 3 * 10 * 12)
    assert load_into_memory(datasets) is datasets and datasets.plain.pixels is None


def test_a_folder_read_as_needed_trains(mixed, tmp_path, capsys):
    log = run(mixed, *TINY, "--epochs", 2, "--warmup", 1, "--exp-dir", tmp_path)
    assert "read as needed" in capsys.readouterr().out and np.isfinite(log[-1]["loss"])


def test_views_follow_seed_epoch_and_index_alone():
    train, other = build_datasets(seed=3).train, build_datasets(seed=4).train
    first = train[5][0]
    torch.rand(9)
    assert first.shape == (2, 3, 8, 8) and not torch.equal(first[0], first[1])
    assert torch.equal(first, train[5][0]) and not torch.equal(first, other[5][0])
    train.set_epoch(1)
    assert not torch.equal(first, train[5][0])


# -- folders without classes


def flat_copy(folder, root, depth=""):
    """The training images of `folder` in one directory, without classes."""
    (root / depth).mkdir(parents=True)
    for path in (folder / "train").rglob("*.png"):
        shutil.copy(path, root / depth / f"{path.parent.name}-{path.name}")
    return root


@pytest.mark.parametrize("depth", ["", "train", "a/b", "val"])
def test_images_without_classes_are_read_wherever_they_lie(folder, tmp_path, depth):
    (tmp_path / "flat").mkdir()
    flat_copy(folder, tmp_path / "flat", depth) if depth else flat_copy(folder, tmp_path / "flat" / "x")
    (tmp_path / "flat" / "notes.txt").write_text("no image")
    datasets = build_datasets(str(tmp_path / "flat"))
    assert len(datasets.train) == len(datasets.plain) == 48 and datasets.val is None and not datasets.labelled
    assert datasets.classes == [] and (datasets.plain.labels == -1).all() and datasets.image_size == 10
    assert datasets.describe() == "48 training images, no classes, 10 pixels"
    assert datasets.fingerprint != build_datasets(str(folder)).fingerprint


def test_unlabelled_training_images_go_with_labelled_held_out_ones(folder, tmp_path):
    flat_copy(folder, tmp_path, "train")
    shutil.copytree(folder / "val", tmp_path / "val")
    datasets = build_datasets(str(tmp_path))
    assert not datasets.labelled and datasets.classes == [f"class {i}" for i in range(3)]
    assert (datasets.plain.labels == -1).all() and datasets.val.labels.bincount().tolist() == [6] * 3


def test_what_was_found_is_said(folder):
    assert build_datasets(str(folder)).describe() == "48 training images, 18 held out, 3 classes, 10 pixels"
    assert build_datasets(str(folder)).labelled


# -- the order of an epoch


def indices(sampler, epoch, step=0):
    sampler.set_epoch(epoch, step)
    order = list(sampler)
    assert len(order) == len(sampler)
    return order


def test_an_epoch_has_every_sample_at_most_once_in_an_order_of_its_own():
    orders = [indices(EpochSampler(23, 6, seed), epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    for order in orders:
        assert len(order) == len(set(order)) == 18 and set(order) < set(range(23))  # whole batches
    assert len(set(map(tuple, orders))) == 3
    assert orders[0] == indices(EpochSampler(23, 6), 0) == list(EpochSampler(23, 6))  # epoch 0 where none is set
    left_out = [set(range(23)) - set(indices(EpochSampler(23, 6), epoch)) for epoch in range(20)]
    assert len(set.union(*left_out)) > 15  # not the same few


def test_an_epoch_is_taken_up_at_any_step():
    sampler = EpochSampler(23, 6, seed=5)
    whole = indices(sampler, 2)
    for step in range(4):
        assert indices(sampler, 2, step) == whole[6 * step :]
    assert indices(sampler, 2) == whole


@pytest.mark.parametrize("world", [2, 3])
def test_the_ranks_together_see_what_one_process_sees(world):
    """In every step the same samples, each of them on one rank, whatever the number of ranks before."""
    for step in (0, 1):
        alone = indices(EpochSampler(23, 6, seed=5), 2, step)
        ranks = [indices(EpochSampler(23, 6, 5, rank, world), 2, step) for rank in range(world)]
        share = 6 // world
        for first in range(0, len(ranks[0]), share):
            together = [i for rank in ranks for i in rank[first : first + share]]
            assert sorted(together) == sorted(alone[first * world : (first + share) * world])


def test_seeds_follow_from_all_numbers_and_their_order():
    numbers = [(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 1, 0), (0, 0, 1)]
    seeds = [derive_seed(*x) for x in numbers]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**32 for seed in seeds)
    assert seeds == [derive_seed(*x) for x in numbers]
