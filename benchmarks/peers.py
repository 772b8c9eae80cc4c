"""Other methods in place of PCL: heads and losses of lightly, with its recipe for CIFAR-10.

Encoder, views, schedule, training loop and evaluation stay those of main_pcl.py.

    pip install lightly
    python benchmarks/experiments.py peers --data P=path/to/P
    python benchmarks/experiments.py --patched lightly-SimCLR -- --amp --cos --warmup 200
"""

import copy

import torch
import torch.nn.functional as F
from lightly.loss import NegativeCosineSimilarity, NTXentLoss, SwaVLoss
from lightly.models.modules import NNMemoryBankModule, heads
from torch.nn import BatchNorm1d, ReLU

import main_pcl
from model import move_running_statistics


class Peer(main_pcl.MoCo):
    """An encoder with another head, and another loss on the projections of the two views.

    Unless a subclass says otherwise, both views pass through the query encoder, and both
    projections have a gradient. For one process, and a --warmup of all epochs: there is no
    ProtoNCE.
    """

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.build(self.encoder_q.fc[0].in_features)
        self.encoder_k.fc = copy.deepcopy(self.encoder_q.fc).requires_grad_(False)
        # the loss can have weights and a queue, so it is a method of this model
        main_pcl.info_nce = self.loss_in_place_of_info_nce

    def build(self, d):
        """Set the head `encoder_q.fc` and the loss `criterion`. d: dimension of the features."""
        raise NotImplementedError

    def forward(self, im_q, im_k, clustering=False):
        q = self.project(im_q).float()
        k = self.project_key(im_k).float()
        # an encoder that is not in use has no moments
        move_running_statistics([norm for norm in self.norms if hasattr(norm, "moments")])
        return q, k, q, k.detach()

    def project(self, images):
        """Images (N, 3, H, W) -> projections (N, D) of the first view."""
        return self.encoder_q(images)

    def project_key(self, images):
        """Images (N, 3, H, W) -> projections (N, D) of the second view."""
        return self.project(images)

    def loss(self, q, k):
        return self.criterion(q, k)

    def loss_in_place_of_info_nce(self, q, k, queue, temperature):
        return self.loss(q, k).squeeze(), torch.zeros(())  # there is no accuracy

    def dequeue_and_enqueue(self, k):
        """Do nothing: these methods have no queue, or their own."""


class MoCo(Peer):
    """MoCo (arXiv 2003.04297) with both views as queries. Needs --symmetric.

    Half of a batch are first views, half are second views. Each half passes through an encoder by
    itself, with its own batch-norm statistics.
    """

    def build(self, d):
        self.encoder_q.fc = heads.MoCoProjectionHead(d, 512, 128)
        self.criterion = NTXentLoss(temperature=0.1, memory_bank_size=(4096, 128))

    def project(self, images):
        return torch.cat([self.encoder_q(half) for half in images.chunk(2)])

    @torch.no_grad()
    def project_key(self, images):
        projections = []
        for half in images.chunk(2):
            shuffled, own_rows = self.batch_shuffle(half)
            projections.append(self.encoder_k(shuffled)[own_rows])
        return torch.cat(projections)

    def loss(self, q, k):
        q_first, q_second = q.chunk(2)
        k_first, k_second = k.chunk(2)
        return (self.criterion(q_first, k_first) + self.criterion(q_second, k_second)) / 2


class BYOL(MoCo):
    """BYOL (arXiv 2006.07733). Needs --symmetric, like MoCo."""

    def build(self, d):
        self.encoder_q.fc = heads.BYOLProjectionHead(d, 1024, 256)
        self.predictor = heads.BYOLPredictionHead(256, 1024, 256)
        self.criterion = NegativeCosineSimilarity()

    def project(self, images):
        return torch.cat([self.predictor(self.encoder_q(half)) for half in images.chunk(2)])


class SimCLR(Peer):
    """SimCLR (arXiv 2002.05709)."""

    def build(self, d):
        self.encoder_q.fc = heads.SimCLRProjectionHead(d, 512, 128)
        self.criterion = NTXentLoss()


class SwAV(Peer):
    """SwAV (arXiv 2006.09882)."""

    def build(self, d):
        self.encoder_q.fc = heads.SwaVProjectionHead(d, 512, 128)
        self.prototypes = heads.SwaVPrototypes(128, 512)
        self.criterion = SwaVLoss()

    def project(self, images):
        self.prototypes.normalize()
        return F.normalize(self.encoder_q(images).float(), dim=1)

    def loss(self, q, k):
        return self.criterion([self.prototypes(q), self.prototypes(k)], [])


class NNCLR(Peer):
    """NNCLR (arXiv 2104.14548)."""

    def build(self, d):
        hidden_layer = (d, 2048, BatchNorm1d(2048), ReLU())
        last_layer = (2048, 256, BatchNorm1d(256), None)
        self.encoder_q.fc = heads.ProjectionHead([hidden_layer, last_layer])
        self.predictor = heads.NNCLRPredictionHead(256, 4096, 256)
        self.bank = NNMemoryBankModule(size=(4096, 256))
        self.criterion = NTXentLoss()

    def loss(self, q, k):
        nearest_q = self.bank(q.detach(), update=False)
        nearest_k = self.bank(k.detach(), update=True)
        loss_q = self.criterion(nearest_q, self.predictor(k))
        loss_k = self.criterion(nearest_k, self.predictor(q))
        return (loss_q + loss_k) / 2


# {patch: (module, name, what takes its place)}
PATCHES = {
    f"lightly-{peer.__name__}": (main_pcl, "MoCo", peer)
    for peer in (MoCo, SimCLR, BYOL, SwAV, NNCLR)
}
