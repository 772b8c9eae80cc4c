"""What several processes compute together, against what one process computes alone."""

import argparse
import functools
from types import SimpleNamespace

import processes
import torch
import torch.distributed as dist
import torch.nn.functional as F

import main_pcl
from augment import normalize
from data import Images
from features import compute_features, load_features
from model import MoCo, build_encoder, concat_all_gather
from runtime.checkpoint import Run

N = 23  # images; a multiple of neither 2 nor 3
WORLD = 3  # processes
BATCH = 6  # images per step and process


class Labels(list):
    """The source of a data set whose images are in memory."""

    targets = property(list)


def make_images(seed=1):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (N, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return Images(Labels(i % 3 for i in range(N)), None, pixels=pixels)


def make_model(bn_splits=1):
    torch.manual_seed(0)
    encoder = functools.partial(build_encoder, "resnet18_w4", small_images=True)
    return MoCo(encoder, dim=8, r=16, bn_splits=bn_splits)


def make_args(directory):
    return argparse.Namespace(
        exp_dir=directory,
        num_cluster=[3, 5, 3],
        temperature=0.2,
        seed=0,
        batch_size=6,
        device="cpu",
        amp=False,
        amp_dtype="bf16",
        epochs=100,
        workers=0,
    )


def shared_results(directory):
    """What every rank has after two E-steps and a kNN accuracy."""
    args = make_args(directory)
    run = Run(args, make_model(), optimizer=None, scaler=None, data="")
    images = make_images()
    clusters = main_pcl.e_step(run, images, epoch=0)
    run.clusters = clusters
    again = main_pcl.e_step(run, images, epoch=1)
    datasets = SimpleNamespace(plain=images, val=make_images(seed=2))
    knn = main_pcl.held_out_knn(run.model, datasets, args)
    return {"clusters": clusters, "again": again, "knn": knn}


def one_rank(rank, world, directory):
    """Compute everything on one of several ranks, and write it to rank_{rank}.pt."""
    init_method = f"file://{directory}/init"
    dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=world)
    pixels = make_images().pixels

    # keys and queue
    model = make_model(bn_splits=2)
    model.encoder_k.eval()  # so that a key does not depend on the others in its batch
    own = slice(BATCH * rank, BATCH * (rank + 1))
    im_q = normalize(pixels[own])
    im_k = normalize(pixels.flip(0)[own])
    _, k, _, _ = model(im_q, im_k)
    alone = F.normalize(model.encoder_k(im_k)).detach()
    result = {"k": k, "alone": alone, "gathered": concat_all_gather(k)}
    model.dequeue_and_enqueue(k)
    result["queue"] = model.queue

    # features
    loader = main_pcl.plain_loader(make_images(), torch.arange(N), make_args(directory))
    compute_features(loader, lambda x: normalize(x).flatten(1), f"{directory}/pixels")
    result["pixels"] = load_features(f"{directory}/pixels", N)

    result |= shared_results(f"{directory}/shared")
    torch.save(result, f"{directory}/rank_{rank}.pt")
    dist.destroy_process_group()


def test_ranks_share_keys_queue_features_clusters_and_knn(tmp_path):
    alone = shared_results(tmp_path / "alone")
    processes.start_server()
    arguments = (WORLD, str(tmp_path))
    torch.multiprocessing.start_processes(one_rank, arguments, WORLD, start_method="forkserver")
    ranks = [torch.load(tmp_path / f"rank_{rank}.pt", weights_only=False) for rank in range(WORLD)]
    first = ranks[0]
    keys = torch.cat([rank["k"] for rank in ranks])
    pixels = normalize(make_images().pixels).flatten(1)

    for rank in ranks:
        torch.testing.assert_close(rank["k"], rank["alone"])  # the keys of its own images
        assert torch.equal(rank["gathered"], keys)
        assert torch.equal(rank["queue"], first["queue"])
        for name in ("clusters", "again"):
            levels = zip(rank[name], first[name], alone[name], strict=True)
            for found, others, expected in levels:
                assert all(map(torch.equal, found, others))
                assert torch.equal(found.im2cluster, expected.im2cluster)
                torch.testing.assert_close(
                    found.centroids, expected.centroids, atol=1e-4, rtol=1e-4
                )
        assert rank["knn"] == alone["knn"]
        torch.testing.assert_close(torch.from_numpy(rank["pixels"]), pixels)

    # the queue holds the latest keys of all ranks
    queue = {tuple(key) for key in first["queue"].T.tolist()}
    assert all(tuple(key) in queue for key in keys[-16:].tolist())

    # every image was computed once
    files = tmp_path.glob("pixels/batch*")
    saved = [torch.load(path, weights_only=True)["index"] for path in files]
    assert torch.cat(saved).sort().values.tolist() == list(range(N))
