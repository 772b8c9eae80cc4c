"""The published PCL in one process on the CPU, with the flags of ours, for benchmarks/experiments.py.

    git clone https://github.com/salesforce/PCL && export PCL=$PWD/PCL      # commit 964da1f
    python benchmarks/experiments.py published --data P=P -n 2

Its code runs as it stands, in float32; what it calls is changed: no GPU, `random.sample` of a set as before Python
3.11, images of --image-size. It takes nothing up after an interruption: it begins anew.
"""

import importlib.util
import json
import os
import random
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import faiss
import numpy as np
import torch
import torchvision
from torchvision import transforms

import main_pcl
from data import build_datasets

TAKEN = ("lr", "wd", "epochs", "batch_size", "temperature", "pcl_r", "moco_m", "seed", "exp_dir")


def main(argv):
    """In place of main_pcl.main: train with the published code, and leave a log, arguments and a checkpoint as ours."""
    args = main_pcl.get_parser().parse_args(argv)
    args = main_pcl.fill_in_defaults(args, build_datasets(args.data, args.image_size), 1, "cpu")
    directory, size, seen = Path(args.exp_dir), args.image_size, {}
    if (directory / "checkpoint.pth.tar").exists():
        return

    DDP, Crop = torch.nn.parallel.DistributedDataParallel, transforms.RandomResizedCrop
    Resize, CenterCrop, sample = transforms.Resize, transforms.CenterCrop, random.sample
    torch.Tensor.cuda = torch.nn.Module.cuda = lambda self, *args, **options: self
    torch.cuda.set_device = lambda device: None
    torch.nn.parallel.DistributedDataParallel = lambda module, device_ids: DDP(module)
    faiss.StandardGpuResources = faiss.GpuIndexFlatConfig = SimpleNamespace
    faiss.GpuIndexFlatL2 = lambda resources, d, config: faiss.IndexFlatL2(d)
    random.sample = lambda population, k: sample(list(population), k)
    transforms.RandomResizedCrop = lambda _, scale: Crop(size, scale)
    transforms.Resize, transforms.CenterCrop = lambda _: Resize(size), lambda _: CenterCrop(size)
    torchvision.models.ours = partial(main_pcl.build_encoder, args.arch, small_images=args.stem == "small")

    sys.path.insert(0, os.environ["PCL"])
    spec = importlib.util.spec_from_file_location("published_pcl", Path(os.environ["PCL"], "main_pcl.py"))
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)

    class Meter(theirs.AverageMeter):
        def __init__(self, name, fmt):
            super().__init__(name, fmt)
            seen[name] = self

    def train(loader, *rest, original=theirs.train):
        start = time.time()
        original(loader, *rest)
        rate = len(loader) * args.batch_size / (time.time() - start)
        figures = float(seen["Acc@Inst"].avg), float(seen["Acc@Proto"].avg), rate
        log.append(f"{len(log) - 1},{','.join(map(str, figures))},,")

    log = ["epoch,acc_inst,acc_proto,images_per_second,loss_inst,knn"]  # its loss, the sum of both, is left out
    theirs.AverageMeter, theirs.train = Meter, train
    words = [word for name in TAKEN for word in (f"--{name.replace('_', '-')}", str(getattr(args, name)))]
    words += ["--warmup-epoch", str(args.warmup), "--num-cluster", ",".join(map(str, args.num_cluster))]
    words += ["--mlp", "--aug-plus", "--cos", "--arch", "ours", "-j", "0", "--dist-backend", "gloo", "--rank", "0"]
    (directory / "store").unlink(missing_ok=True)
    words += ["--world-size", "1", "--dist-url", f"file://{directory.resolve() / 'store'}"]
    chosen = theirs.parser.parse_args([args.data, *words])
    chosen.distributed, chosen.num_cluster = True, chosen.num_cluster.split(",")

    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    theirs.main_worker(0, 1, chosen)
    (directory / "log.csv").write_text("\n".join(log))
    (directory / "args.json").write_text(json.dumps(vars(args)))
    path = directory / f"checkpoint_{args.epochs - 1:04d}.pth.tar"
    kept = {"args": {"data": args.data, "image_size": size}, "run": None}  # for the evaluation
    torch.save(torch.load(path, weights_only=False) | kept, directory / "checkpoint.pth.tar")


PATCHES = {"published": (main_pcl, "main", main)}
