"""What several processes share, against what one process alone would have."""

import argparse
import functools
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F

import main_pcl
from augment import normalize
from data import Images
from features import compute_features, load_features
from model import MoCo, build_encoder, concat_all_gather

N = 23  # of images; neither 2 nor 3 divides it


class Labels(list):
    """The source of a data set of which the images are in memory."""

    targets = property(list)


def images(seed=1):
    pixels = torch.randint(256, (N, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Images(Labels(i % 3 for i in range(N)), None, pixels=pixels)


def make_model(bn_splits=1):
    torch.manual_seed(0)
    return MoCo(functools.partial(build_encoder, "resnet18_w4", small_images=True), 8, 16, bn_splits=bn_splits)


def arguments(directory):
    args = argparse.Namespace(exp_dir=directory, num_cluster=[3, 5, 3], temperature=0.2, seed=0, batch_size=6)
    vars(args).update(device="cpu", amp=False, amp_dtype="bf16", epochs=100, workers=0)
    return args


def shared_results(directory):
    """What every rank has after an E-step and a kNN accuracy."""
    model, args = make_model(), arguments(directory)
    clusters = main_pcl.e_step(model, images(), None, 0, args)
    again = main_pcl.e_step(model, images(), clusters, 1, args)
    knn = main_pcl.held_out_knn(model, SimpleNamespace(plain=images(), val=images(2)), args)
    return {"clusters": clusters, "again": again, "knn": knn}


def one_rank(rank, world, directory):
    dist.init_process_group("gloo", init_method=f"file://{directory}/init", rank=rank, world_size=world)
    model = make_model(bn_splits=2)
    model.encoder_k.eval()  # so that a key does not depend on whom it is computed with
    im_q, im_k = (normalize(x[6 * rank : 6 * rank + 6]) for x in (images().pixels, images().pixels.flip(0)))
    _, k = model(im_q, im_k)
    result = {"k": k, "alone": F.normalize(model.encoder_k(im_k)).detach(), "gathered": concat_all_gather(k)}
    model.dequeue_and_enqueue(k)
    result["queue"] = model.queue

    args = arguments(directory)
    loader = main_pcl.plain_loader(images(), torch.arange(N), args)
    compute_features(loader, lambda x: normalize(x).flatten(1), f"{directory}/pixels")
    result["pixels"] = load_features(f"{directory}/pixels", N)
    result |= shared_results(f"{directory}/shared")
    torch.save(result, f"{directory}/rank_{rank}.pt")
    dist.destroy_process_group()


def test_three_ranks_share_keys_queue_features_clusters_and_knn(tmp_path):
    alone, world = shared_results(tmp_path / "alone"), 3
    torch.multiprocessing.spawn(one_rank, (world, str(tmp_path)), world)
    ranks = [torch.load(tmp_path / f"rank_{rank}.pt", weights_only=False) for rank in range(world)]
    keys = torch.cat([rank["k"] for rank in ranks])
    for rank in ranks:
        torch.testing.assert_close(rank["k"], rank["alone"])  # each got the keys of its own images back
        assert torch.equal(rank["gathered"], keys) and torch.equal(rank["queue"], ranks[0]["queue"])
        for name in ("clusters", "again"):
            for ours, first, one in zip(rank[name], ranks[0][name], alone[name], strict=True):
                assert all(map(torch.equal, ours, first)) and torch.equal(ours.im2cluster, one.im2cluster)
                torch.testing.assert_close(ours.centroids, one.centroids, atol=1e-4, rtol=1e-4)
        assert rank["knn"] == alone["knn"]
        torch.testing.assert_close(torch.from_numpy(rank["pixels"]), normalize(images().pixels).flatten(1))
    kept = {tuple(column) for column in ranks[0]["queue"].T.tolist()}
    assert all(tuple(key) in kept for key in keys[-16:].tolist())
    saved = [torch.load(path, weights_only=True)["index"] for path in tmp_path.glob("pixels/batch*")]
    assert torch.cat(saved).sort().values.tolist() == list(range(N))  # each once, none twice
