"""Further queries from small crops, as in SwAV (arXiv 2006.09882), for experiments.py.

Besides its large view, each query gets two crops, 18 pixels wide, that show 5 to 30 % of the
image's area. All three are compared with the key of the image's other large view. Three patches
belong together:

    python benchmarks/experiments.py --patched small-views,small-queries,small-samples -- FLAGS

main_pcl.py passes one tensor per view, so a view's small crops are appended to it as further
columns. Those of the key's view are made too; only `--symmetric` uses them.
"""

import dataclasses

import torch
import torch.nn.functional as F

import main_pcl
from augment import Draws, RandomView
from loss import proto_nce
from model import MoCo

SIDE = 18  # of a small crop, in pixels
SMALLEST = 0.05  # area of a small crop, as a fraction of the image's
LARGEST = 0.3
CROPS = 2  # small crops per view


class SmallViews(RandomView):
    """The two views of every image, with two small crops behind the columns of each."""

    def two_views(self, images, draws):
        if not self.crop:
            raise ValueError("small crops are cut from whole images, which are those in memory")
        views = super().two_views(images, draws)
        small_view = dataclasses.replace(self, size=SIDE, crop_min=SMALLEST)
        seed = int(draws[0, 0, 0] * 2**31)  # another one in every step
        small = []
        for i in range(CROPS):
            small_draws = RandomView.draw(len(images), seed + i)
            # areas are uniform from SMALLEST to 1: rescale them to SMALLEST to LARGEST
            Draws.split(small_draws).box_area.mul_((LARGEST - SMALLEST) / (1 - SMALLEST))
            small.append(RandomView.two_views(small_view, images, small_draws))  # of the base class
        return [pack(view, crops) for view, *crops in zip(views, *small, strict=True)]


def pack(view, crops):
    """The view (N, 3, S, S) and its small crops (N, 3, SIDE, SIDE) as one (N, 3, S, S + more)."""
    size = view.shape[-1]
    pixels = torch.cat([crop.flatten(2) for crop in crops], 2)
    pixels = F.pad(pixels, (0, -pixels.shape[2] % size))  # whole columns
    return torch.cat([view, pixels.unflatten(2, (size, -1))], 3)


def unpack(packed):
    """Undo `pack`. Returns the view, and all first crops followed by all second ones."""
    size = packed.shape[2]
    pixels = packed[..., size:].flatten(2)[..., : CROPS * SIDE**2]
    crops = pixels.unflatten(2, (CROPS, SIDE, SIDE)).movedim(2, 0).flatten(0, 1)
    view = packed[..., :size]
    return tuple(x.contiguous(memory_format=torch.channels_last) for x in (view, crops))


class SmallQueries(MoCo):
    """MoCo that also queries with the small crops. For one process without CUDA graphs."""

    def forward(self, im_q, im_k, clustering=False):
        """1 + CROPS times as many rows of q, k and c: of the views, then of each crop."""
        view_q, crops = unpack(im_q)
        view_k, _ = unpack(im_k)
        q, k, c, features = super().forward(view_q, view_k, clustering)
        q_small = F.normalize(self.encoder_q(crops).float(), dim=1)
        k = k.repeat(1 + CROPS, 1)
        return torch.cat([q, q_small]), k, torch.cat([c, q_small]), features

    def dequeue_and_enqueue(self, k):
        super().dequeue_and_enqueue(k[: len(k) // (1 + CROPS)])


def proto_nce_with_crops(c, index, *args):
    """ProtoNCE of the views and of their small crops."""
    return proto_nce(c, index.repeat(1 + CROPS), *args)


# {patch: (module, name, what takes its place)}
PATCHES = {
    "small-views": (main_pcl, "RandomView", SmallViews),
    "small-queries": (main_pcl, "MoCo", SmallQueries),
    "small-samples": (main_pcl, "proto_nce", proto_nce_with_crops),
}
