"""The published PCL code in place of main_pcl.py, with the same flags, in one process on the CPU.

    git clone https://github.com/salesforce/PCL ../PCL    # commit 964da1f
    PCL=../PCL python benchmarks/experiments.py published --data P=path/to/P

The published code is not edited, and computes in float32. Some functions that it calls are
replaced: it needs a GPU, samples from a set, which Python 3.11 no longer does, and knows only
images of 224 pixels. It saves every fifth epoch, so --epochs must be a multiple of 5. An
interrupted run starts again from the beginning.
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

# arguments that both programs have
SHARED = ("lr", "wd", "epochs", "batch_size", "temperature", "pcl_r", "moco_m", "seed", "exp_dir")
COLUMNS = "epoch,acc_inst,acc_proto,images_per_second,loss_inst,knn"  # of log.csv


def main(argv):
    """Train with the published code, in place of main_pcl.main.

    Leaves log.csv, args.json and a checkpoint, like main_pcl.py. A finished run is left alone.
    """
    if "PCL" not in os.environ:
        sys.exit("set PCL to the folder of the published code; see benchmarks/published.py")
    args = main_pcl.get_parser().parse_args(argv)
    args = main_pcl.fill_in_defaults(args, build_datasets(args.data, args.image_size), 1, "cpu")
    directory = Path(args.exp_dir)
    if (directory / "checkpoint.pth.tar").exists():
        return

    # train
    replace_what_it_calls(args)
    published = import_published_code(Path(os.environ["PCL"]).resolve())
    log = [COLUMNS]
    keep_log(published, args.batch_size, log)
    published_args = translate(args, published.parser)
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    published.main_worker(0, 1, published_args)

    # leave what benchmarks/experiments.py and eval_lincls.py read
    (directory / "log.csv").write_text("\n".join(log))
    (directory / "args.json").write_text(json.dumps(vars(args)))
    path = directory / f"checkpoint_{args.epochs - 1:04d}.pth.tar"
    checkpoint = torch.load(path, weights_only=False)
    checkpoint["arch"] = args.arch
    checkpoint["args"] = {"data": args.data, "image_size": args.image_size}
    checkpoint["run"] = None
    torch.save(checkpoint, directory / "checkpoint.pth.tar")


def replace_what_it_calls(args):
    """Make the published code run without a GPU, on Python 3.11, and on images of any size."""
    data_parallel = torch.nn.parallel.DistributedDataParallel
    random_crop = transforms.RandomResizedCrop
    resize = transforms.Resize
    center_crop = transforms.CenterCrop
    sample = random.sample

    # no GPU
    torch.Tensor.cuda = stay_in_place
    torch.nn.Module.cuda = stay_in_place
    torch.cuda.set_device = lambda device: None
    torch.nn.parallel.DistributedDataParallel = lambda module, device_ids: data_parallel(module)
    faiss.StandardGpuResources = SimpleNamespace
    faiss.GpuIndexFlatConfig = SimpleNamespace
    faiss.GpuIndexFlatL2 = lambda resources, d, config: faiss.IndexFlatL2(d)

    # sampling from a set
    random.sample = lambda population, k: sample(list(population), k)

    # the image size, and an encoder that suits it
    size = args.image_size
    transforms.RandomResizedCrop = lambda _, scale: random_crop(size, scale)
    transforms.Resize = lambda _: resize(size)
    transforms.CenterCrop = lambda _: center_crop(size)
    small_images = args.stem == "small"
    encoder = partial(main_pcl.build_encoder, args.arch, small_images=small_images)
    torchvision.models.ours = encoder


def stay_in_place(self, *args, **options):
    """In place of .cuda()."""
    return self


def import_published_code(folder):
    """The module main_pcl.py in `folder`, which imports others from there."""
    sys.path.insert(0, str(folder))
    spec = importlib.util.spec_from_file_location("published_pcl", folder / "main_pcl.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def keep_log(published, batch_size, log):
    """Make the published code append a line of log.csv to `log` after each epoch.

    `loss_inst` stays empty, because the published loss is the sum of InfoNCE and ProtoNCE. So does
    `knn`.
    """
    meters = {}  # {name: the latest meter}
    original_train = published.train

    class Meter(published.AverageMeter):
        def __init__(self, name, fmt):
            super().__init__(name, fmt)
            meters[name] = self

    def train(loader, *others):
        start = time.time()
        original_train(loader, *others)
        images_per_second = len(loader) * batch_size / (time.time() - start)
        epoch = len(log) - 1
        acc_inst = float(meters["Acc@Inst"].avg)
        acc_proto = float(meters["Acc@Proto"].avg)
        log.append(f"{epoch},{acc_inst},{acc_proto},{images_per_second},,")

    published.AverageMeter = Meter
    published.train = train


def translate(args, parser):
    """The published code's arguments for a run with `args`."""
    store = Path(args.exp_dir).resolve() / "store"  # where the one process would meet others
    store.unlink(missing_ok=True)

    words = [args.data, "--mlp", "--aug-plus", "--cos", "--arch", "ours", "-j", "0"]
    for name in SHARED:
        words += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    words += ["--warmup-epoch", str(args.warmup)]
    words += ["--num-cluster", ",".join(map(str, args.num_cluster))]
    words += ["--dist-backend", "gloo", "--dist-url", f"file://{store}"]
    words += ["--rank", "0", "--world-size", "1"]

    # what its own main does before it calls main_worker
    translated = parser.parse_args(words)
    translated.distributed = True
    translated.num_cluster = translated.num_cluster.split(",")
    return translated


# {patch: (module, name, what takes its place)}
PATCHES = {"published": (main_pcl, "main", main)}
