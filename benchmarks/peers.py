"""Other methods in place of MoCo and PCL in main_pcl.py: losses and heads of lightly (`pip install lightly`), with its
recipe for CIFAR-10. Encoder, views, schedule, training loop and evaluation stay. For benchmarks/experiments.py."""

import copy

import torch
import torch.nn.functional as F
from lightly.loss import NegativeCosineSimilarity, NTXentLoss, SwaVLoss
from lightly.models.modules import NNMemoryBankModule, heads
from torch.nn import BatchNorm1d, ReLU

import main_pcl
from model import move_running_statistics


class Peer(main_pcl.MoCo):
    """The query encoder with another head, and in place of info_nce a loss of the two views' projections, which have a
    gradient both. Without a momentum encoder; for one process and a --warmup of all epochs."""

    def __init__(self, *args):
        super().__init__(*args)
        self.build(self.encoder_q.fc[0].in_features)
        self.encoder_k.fc = copy.deepcopy(self.encoder_q.fc).requires_grad_(False)
        main_pcl.info_nce = lambda q, k, queue, temperature: (self.loss(q, k).squeeze(), torch.zeros(()))

    def forward(self, im_q, im_k, clustering=False, features=False):
        q, k = self.project(im_q).float(), self.project_key(im_k).float()
        move_running_statistics([norm for norm in self.norms if hasattr(norm, "moments")])  # the encoders in use
        return q, k, k

    def project(self, images):
        return self.encoder_q(images)

    def project_key(self, images):
        return self.project(images)

    def dequeue_and_enqueue(self, k):
        """Peers have no queue, or one of their own."""


class MoCo(Peer):
    """For --symmetric: both views pass through both encoders."""

    def build(self, d):
        self.encoder_q.fc = heads.MoCoProjectionHead(d, 512, 128)
        self.criterion = NTXentLoss(temperature=0.1, memory_bank_size=(4096, 128))

    def project(self, images):
        return torch.cat([*map(self.encoder_q, images.chunk(2))])  # of each view for itself: batch norm

    @torch.no_grad()
    def project_key(self, images):
        shuffled = map(self.batch_shuffle, images.chunk(2))
        return torch.cat([self.encoder_k(x)[own_rows] for x, own_rows in shuffled])

    def loss(self, q, k):
        return sum(map(self.criterion, q.chunk(2), k.chunk(2))) / 2


class BYOL(MoCo):
    def build(self, d):
        self.encoder_q.fc = heads.BYOLProjectionHead(d, 1024, 256)
        self.predictor = heads.BYOLPredictionHead(256, 1024, 256)
        self.criterion = NegativeCosineSimilarity()

    def project(self, images):
        return torch.cat([self.predictor(self.encoder_q(x)) for x in images.chunk(2)])


class SimCLR(Peer):
    def build(self, d):
        self.encoder_q.fc = heads.SimCLRProjectionHead(d, 512, 128)
        self.loss = NTXentLoss()


class SwAV(Peer):
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
    def build(self, d):
        layers = [(d, 2048, BatchNorm1d(2048), ReLU()), (2048, 256, BatchNorm1d(256), None)]
        self.encoder_q.fc = heads.ProjectionHead(layers)
        self.predictor = heads.NNCLRPredictionHead(256, 4096, 256)
        self.bank = NNMemoryBankModule(size=(4096, 256))
        self.criterion = NTXentLoss()

    def loss(self, q, k):
        nearest = self.bank(q.detach(), update=False), self.bank(k.detach(), update=True)
        return (self.criterion(nearest[0], self.predictor(k)) + self.criterion(nearest[1], self.predictor(q))) / 2


PATCHES = {f"lightly-{peer.__name__}": (main_pcl, "MoCo", peer) for peer in (MoCo, SimCLR, BYOL, SwAV, NNCLR)}
