"""What several processes share, against what one process alone would have."""

import argparse
import contextlib
import functools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import main_pcl
from data import normalize
from features import load_features
from model import MoCo, build_encoder

N = 23  # of images; neither 2 nor 3 divides it


def make_model(bn_splits=1):
    torch.manual_seed(0)
    return MoCo(functools.partial(build_encoder, "resnet18_w4", small_images=True), 8, 16, bn_splits=bn_splits)


def images():
    return torch.randint(256, (N, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def feature_pass(model, directory):
    """The images' loader, and what main_pcl.py passes over them with."""
    data = TensorDataset(images(), torch.arange(N))
    data.view = None
    features = Path(directory) / "features"
    extract = functools.partial(main_pcl.extract_features, model, features, "cpu", contextlib.nullcontext)
    return DataLoader(data, 4, sampler=[]), extract


def clusters_of(model, directory):
    """The E-step of one rank."""
    args = argparse.Namespace(exp_dir=directory, num_cluster=[3, 5], temperature=0.2, seed=0)
    return main_pcl.e_step(model, *feature_pass(model, directory), args, 0, None, "cpu", False)


def one_rank(rank, world, directory):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/init", rank=rank, world_size=world)
    model = make_model(bn_splits=2)
    model.encoder_k.eval()  # so that a key does not depend on whom it is computed with
    im_q, im_k = (normalize(x[6 * rank : 6 * rank + 6]) for x in (images(), images().flip(0)))
    _, k, _ = model(im_q, im_k)
    alone = F.normalize(model.encoder_k(im_k))
    model.update(k)
    loader, extract = feature_pass(model, directory)
    place = extract(lambda x: x.flatten(1), loader, "pixels")
    pixels = load_features(place, N)
    dist.barrier()  # the next pass removes this one's files
    extract(lambda x: x.flatten(1), loader, "pixels", Path(directory) / "kept")
    result = {"k": k, "alone": alone, "queue": model.queue, "clusters": clusters_of(model, directory)}
    result["pixels"] = pixels
    torch.save(result, f"{directory}/rank_{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_queue_clusters_and_features(tmp_path, world):
    torch.multiprocessing.spawn(one_rank, (world, str(tmp_path)), world)
    ranks = [torch.load(tmp_path / f"rank_{rank}.pt", weights_only=False) for rank in range(world)]
    keys = torch.cat([rank["k"] for rank in ranks])
    for rank in ranks:
        torch.testing.assert_close(rank["k"], rank["alone"].detach())  # each got the keys of its own images back
        assert torch.equal(rank["queue"], ranks[0]["queue"])
        for ours, first in zip(rank["clusters"], ranks[0]["clusters"], strict=True):
            assert all(map(torch.equal, ours, first))
    kept = {tuple(column) for column in ranks[0]["queue"].T.tolist()}
    assert all(tuple(key) in kept for key in keys[-16:].tolist())

    saved = [torch.load(path, weights_only=True)["index"] for path in tmp_path.glob("kept/batch*")]
    assert torch.cat(saved).sort().values.tolist() == list(range(N))  # each once, none twice
    for rank in ranks:
        torch.testing.assert_close(torch.from_numpy(rank["pixels"]), normalize(images()).flatten(1))


def test_ranks_do_not_overwrite_each_others_keys(tmp_path, monkeypatch):
    args = argparse.Namespace(batch_size=8, exp_dir=tmp_path)
    for world, steps in ((2, range(0, 2)), (3, range(2, 4))):  # another number of ranks from step 2 on
        for rank in range(world):
            monkeypatch.setattr(main_pcl, "ranks", lambda rank=rank, world=world: (rank, world))
            run = {"skipped": 0, "skipped_in_a_row": 0, "totals": torch.zeros(4), "epoch": 0}
            index = [torch.tensor([12 * step + rank]) for step in steps]
            recent = [(*x, torch.zeros(1, 2), torch.ones(4)) for x in zip(steps, index, strict=True)]
            main_pcl.look_at(recent, run, tmp_path, args, False)
            assert run["totals"].tolist() == [2] * 4 and not recent
    assert len(list(tmp_path.glob("batch_*"))) == 2 * 2 + 2 * 3


@pytest.mark.parametrize("world, shares", [(1, [[4, 2, 1]]), (2, [[4], [2, 1]]), (4, [[4], [2], [1], []])])
def test_granularities_are_spread_over_the_ranks(monkeypatch, world, shares):
    for rank in range(world):
        monkeypatch.setattr(main_pcl, "ranks", lambda rank=rank: (rank, world))
        assert main_pcl.fair_share([1, 2, 4]) == shares[rank]


@pytest.mark.parametrize("world", [2, 3])
def test_clusters_are_those_of_one_process(tmp_path, world):
    model = make_model()
    alone = clusters_of(model, tmp_path / "alone")
    torch.multiprocessing.spawn(one_rank_clusters, (world, str(tmp_path)), world)
    for ours, theirs in zip(torch.load(tmp_path / "clusters.pt", weights_only=False), alone, strict=True):
        assert torch.equal(ours.im2cluster, theirs.im2cluster)
        torch.testing.assert_close(ours.centroids, theirs.centroids, atol=1e-4, rtol=1e-4)


def one_rank_clusters(rank, world, directory):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/init", rank=rank, world_size=world)
    clusters = clusters_of(make_model(), directory)
    if rank == world - 1:
        torch.save(clusters, f"{directory}/clusters.pt")
    dist.destroy_process_group()
