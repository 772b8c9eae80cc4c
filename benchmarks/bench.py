"""What every phase of the method costs beside the encoder, and beside the same phase as the published PCL code has it.

    pip install matplotlib
    python benchmarks/bench.py            # prints the table, writes results/bench.csv and results/bench_growth.png
    python benchmarks/bench.py --quick    # tiny sizes, to see that it runs

The published procedures (github.com/salesforce/PCL) are written out below in their plainest form. Each comparison runs
both sides alternately and gives the median of the paired ratios with the lowest and the highest. Images and features
are made up; their sizes are what matters.
"""

import argparse
import contextlib
import csv
import ctypes
import functools
import io
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import faiss  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from PIL import Image, ImageFilter  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from torchvision import transforms as T  # noqa: E402

import cluster  # noqa: E402
import data  # noqa: E402
import features  # noqa: E402
import loss  # noqa: E402
import main_pcl  # noqa: E402
import model  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
IMAGENET = {"m": 1_281_167, "d": 128, "k": (25_000, 50_000, 100_000), "r": 16_384}
COLUMNS = ("what", "size", "ours", "unit", "share", "peak_mb", "published", "ratio", "low", "high")


# -- measuring ----------------------------------------------------------------------------------------------------


def clock():
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(function):
    start = clock()
    function()
    return clock() - start


def peak_mb(function):
    """What `function` returns, and the megabytes (a GPU's, or resident) it takes at its peak beyond those taken now."""
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return function(), (torch.cuda.max_memory_allocated() - before) / 1e6
    ctypes.CDLL(None).malloc_trim(0)  # what was freed is not taken
    seen, done = [resident_kb()], threading.Event()

    def watch():
        while not done.wait(0.002):
            seen.append(resident_kb())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    result = function()
    done.set()
    watcher.join()
    return result, (max(seen) - seen[0]) / 1e3


def resident_kb(line="VmRSS"):
    """A line of /proc/self/status; VmHWM is the peak since the process began, RssAnon is without mapped files."""
    return int(Path("/proc/self/status").read_text().split(f"{line}:")[1].split()[0])


def compare(ours, published, repeats):
    """{ours, published: median seconds; ratio, low, high: of the paired published / ours; peak_mb of ours}."""
    _, peak = peak_mb(ours)  # and warm up
    published()
    pairs = []
    for i in range(repeats):
        first, second = (ours, published) if i % 2 else (published, ours)
        pair = timed(first), timed(second)
        pairs.append(pair if i % 2 else pair[::-1])
    a, b = zip(*pairs, strict=True)
    ratios = [y / x for x, y in pairs]
    spread = {"ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}
    return {"ours": statistics.median(a), "published": statistics.median(b), "peak_mb": peak} | spread


class Phases:
    """As a context: notes the seconds of every call of the functions `places`, {phase: (object, name)}.

    `own`: {phase: [seconds of each call without those of other phases within it]}; `whole`: with them.
    """

    def __init__(self, places):
        self.places, self.inside = places, []
        self.own, self.whole = {phase: [] for phase in places}, {phase: [] for phase in places}

    def __enter__(self):
        self.patches = contextlib.ExitStack()
        for phase, (owner, name) in self.places.items():
            self.patches.enter_context(mock.patch.object(owner, name, self.wrap(phase, getattr(owner, name))))
        return self

    def __exit__(self, *_):
        self.patches.close()

    def wrap(self, phase, function):
        @functools.wraps(function)
        def timing(*args, **kwargs):
            self.inside.append(0.0)
            start = clock()
            result = function(*args, **kwargs)
            seconds = clock() - start
            self.whole[phase].append(seconds)
            self.own[phase].append(seconds - self.inside.pop())
            if self.inside:
                self.inside[-1] += seconds
            return result

        return timing


# -- the published procedures --------------------------------------------------------------------------------------


class PublishedBlur:
    def __call__(self, image):
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))


def published_view(size, blur=True):
    """The transform behind one view: everything image by image, in the loader worker."""
    return T.Compose(
        [
            T.RandomResizedCrop(size, scale=(0.2, 1.0)),
            T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            T.RandomGrayscale(p=0.2),
            *[T.RandomApply([PublishedBlur()], p=0.5)] * blur,
            T.RandomHorizontalFlip(),
            T.ToTensor(),
            T.Normalize(data.MEAN, data.STD),
        ]
    )


def published_negatives(target, im2cluster, num_negatives):
    everything = list(range(int(im2cluster.max()) + 1))
    return random.sample(list(set(everything) - set(target.tolist())), num_negatives)


def published_proto_nce(q, index, clusters, num_negatives):
    losses = []
    for im2cluster, centroids, density in clusters:
        target = im2cluster[index]
        negatives = torch.tensor(published_negatives(target, im2cluster, num_negatives), device=q.device)
        chosen = torch.cat([centroids[target], centroids[negatives]])
        logits = torch.mm(q, chosen.t()) / density[torch.cat([target, negatives])]
        losses.append(F.cross_entropy(logits, torch.arange(len(q), device=q.device)))
    return sum(losses) / len(losses)


def published_concentration(distances, im2cluster, num_cluster, temperature):
    members = [[] for _ in range(num_cluster)]
    for sample, number in enumerate(im2cluster):
        members[number].append(distances[sample])
    phi = np.zeros(num_cluster)
    for number, mine in enumerate(members):
        if len(mine) > 1:
            phi[number] = np.asarray(mine).mean() / np.log(len(mine) + 10)
    phi[[len(mine) <= 1 for mine in members]] = phi.max()
    phi = phi.clip(np.percentile(phi, 10), np.percentile(phi, 90))
    return temperature * phi / phi.mean()


def published_kmeans(x, k, seed=0):
    """The best of five runs of 20 iterations from scratch; returns the objective."""
    sizes = {"min_points_per_centroid": 10, "max_points_per_centroid": 1000}
    kmeans = faiss.Kmeans(x.shape[1], k, niter=20, nredo=5, seed=seed, gpu=faiss.get_num_gpus() > 0, **sizes)
    kmeans.train(x)
    return float(kmeans.assign(x)[0].sum())


def published_momentum_update(average, online, m=0.999):
    for k, q in zip(average, online, strict=True):
        k.data = k.data * m + q.data * (1.0 - m)


# -- made-up data --------------------------------------------------------------------------------------------------


def made_up_clusters(m, ks, d):
    unit = functools.partial(F.normalize, dim=1)
    return [
        cluster.Clusters(
            torch.randint(k, (m,), device=DEVICE),
            unit(torch.randn(k, d, device=DEVICE)),
            torch.rand(k, device=DEVICE) * 0.1 + 0.15,
        )
        for k in ks
    ]


def made_up_features(m, d, seed=0):
    """(M, D) unit rows around M / 20 centres, and what an epoch of training might make of them."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((max(1, m // 20), d), dtype=np.float32)[rng.integers(0, max(1, m // 20), m)]
    x = [
        x := x + rng.standard_normal((m, d), dtype=np.float32),
        x + 0.3 * rng.standard_normal((m, d), dtype=np.float32),
    ]
    return [y / np.linalg.norm(y, axis=1, keepdims=True) for y in x]


def made_up_folder(root, n, size):
    """`n` training and 64 held-out images of `size` pixels in two classes."""
    rng = np.random.default_rng(0)
    for part, count in (("train", n), ("val", 64)):
        for i in range(count):
            directory = root / part / str(i % 2)
            directory.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 256, (size // 4, size // 4, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((size, size), Image.BICUBIC).save(directory / f"{i}.png")
    return root


def photograph():
    """The bytes of a JPEG of 500 x 375, with edges and some texture, about as large as ImageNet's."""
    rng, file = np.random.default_rng(0), io.BytesIO()
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((500, 375), Image.BICUBIC)
    pixels = np.asarray(coarse, dtype=np.int16) + rng.integers(-25, 26, (375, 500, 1))
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=85)
    return file.getvalue()


# -- the sections of the table -------------------------------------------------------------------------------------


def run_main(*arguments):
    with contextlib.redirect_stdout(io.StringIO()):
        return main_pcl.main([str(argument) for argument in arguments])


ENCODERS = ("encoders and heads, forward", "backward")
STEP = {
    "reading the batch": (data.Images, "__getitems__"),
    "two views": (data.Datasets, "two_views"),
    ENCODERS[0]: (model.MoCo, "forward"),
    "InfoNCE": (main_pcl, "info_nce"),
    "ProtoNCE": (main_pcl, "proto_nce"),
    ENCODERS[1]: (torch.Tensor, "backward"),
    "clipping": (torch.nn.utils, "clip_grad_norm_"),
    "optimizer": (torch.optim.SGD, "step"),
    "momentum update and queue": (model.MoCo, "update"),
    "figures and keys": (main_pcl, "look_at"),
}
EPOCH = {"clustering": (main_pcl, "e_step"), "checkpoint": (main_pcl, "save")}


def steps(name, arch, size, batch, n, repeats, *options):
    """The phases of a training step, and of the epoch around it, in real runs of main_pcl.py beside the floor."""
    encoders = [model.build_encoder(arch, 128, small_images=True) for _ in "qk"]
    encoders = [encoder.to(DEVICE, memory_format=torch.channels_last) for encoder in encoders]
    x = torch.randn(batch, 3, size, size, device=DEVICE).to(memory_format=torch.channels_last)
    epochs, count = 4, n // batch
    figures = {"ratio": [], "step": [], "floor": [], "keys": [], "pass": [], "peak": []}
    figures |= {phase: [] for phase in (*STEP, *EPOCH)}

    def floor():
        with torch.autocast(DEVICE.type, torch.bfloat16):
            z = encoders[0](x)
            with torch.no_grad():
                encoders[1](x)
        z.float().square().mean().backward()

    def floor_seconds():
        return statistics.median(timed(floor) for _ in range(5))

    with tempfile.TemporaryDirectory() as root:
        folder = made_up_folder(Path(root) / "data", n, size)
        options = [
            folder,
            "-a",
            arch,
            "-b",
            batch,
            "--amp",
            "--warmup",
            0,
            "--epochs",
            epochs,
            "--clip-grad",
            1,
            *options,
        ]
        floor()
        for i in range(2 * repeats):
            how = ("keys", "pass")[i % 2]
            before = floor_seconds()
            more = ["--features", how, "--knn-every", epochs, "--exp-dir", f"{root}/{i}"]
            with Phases(STEP | EPOCH) as phases:
                log, peak = peak_mb(functools.partial(run_main, *options, *more))
            figures["peak"].append(peak)
            step = statistics.median(batch / row["images_per_second"] for row in log[1:])
            figures[how].append(count * step + statistics.median(phases.whole["clustering"][1:]))
            if how == "pass":
                continue
            figures["step"].append(step)
            figures["floor"].append((before + floor_seconds()) / 2)
            figures["ratio"].append(step / figures["floor"][-1])
            for phase, seconds in phases.own.items():
                figures[phase].append(statistics.median(seconds))
            figures["figures and keys"][-1] = sum(phases.own["figures and keys"]) / epochs / count
    pairs = [slow / fast for slow, fast in zip(figures["pass"], figures["keys"], strict=True)]
    spread = {name: (statistics.median(x), min(x), max(x)) for name, x in (*figures.items(), ("pairs", pairs))}
    middle = {name: x[0] for name, x in spread.items()}
    size = f"{name}: {arch}, {size} px, batch {batch}"

    def row(what, seconds, **more):
        return {"what": what, "size": size, "ours": seconds} | more

    step = middle["step"]
    yield row("step (memory: of the whole run)", step, share=1.0, peak_mb=middle["peak"])
    compared = dict(zip(("ratio", "low", "high"), spread["ratio"], strict=True))
    yield row(
        "floor, the encoder alone (ratio: step / floor)", middle["floor"], share=middle["floor"] / step, **compared
    )
    for phase in STEP:
        yield row(phase, middle[phase], share=middle[phase] / step)
    rest = step - sum(middle[phase] for phase in STEP)
    yield row("the rest of the loop", rest, share=rest / step)
    beside = step - sum(middle[phase] for phase in ENCODERS)
    yield row("step without the encoders' forward and backward", beside, share=beside / step)
    for phase in EPOCH:
        yield row(f"{phase}, once an epoch of {count} steps", middle[phase])
    compared = dict(zip(("ratio", "low", "high"), spread["pairs"], strict=True))
    yield row("epoch with --features keys, with pass", middle["keys"], published=middle["pass"], **compared)


def losses(m, ks, d, r, batch, repeats):
    clusters = made_up_clusters(m, ks, d)
    q = F.normalize(torch.randn(batch, d, device=DEVICE), dim=1).requires_grad_()
    index = torch.randint(m, (batch,), device=DEVICE)
    size = f"M {m}, K {'+'.join(map(str, ks))}, R {r}, batch {batch}"
    targets = [level.im2cluster[index] for level in clusters]
    chosen = [
        loss._choose_prototypes(target, len(level.centroids), r)
        for target, level in zip(targets, clusters, strict=True)
    ]

    def bare():
        """The gather, the matrix products and the cross-entropy alone."""
        parts = []
        for (rows, _, own), level in zip(chosen, clusters, strict=True):
            parts.append(F.cross_entropy(q @ level.centroids[rows].T, own))
        torch.stack(parts).mean().backward()

    def ours():
        loss.proto_nce(q, index, clusters, r)[0].backward()

    yield {"what": "ProtoNCE, forward and backward", "size": size} | compare(
        ours, lambda: published_proto_nce(q, index, clusters, r).backward(), repeats
    )
    against = compare(bare, ours, repeats)
    yield (
        {"what": "its floor: gather, products, loss (ratio: whole / floor)", "size": size}
        | against
        | {"published": None}
    )
    yield {"what": "drawing its negatives", "size": size} | compare(
        lambda: [loss._choose_prototypes(t, len(c.centroids), r) for t, c in zip(targets, clusters, strict=True)],
        lambda: [published_negatives(t, c.im2cluster, r) for t, c in zip(targets, clusters, strict=True)],
        repeats,
    )


def clustering(m, ks, d, repeats):
    rng = np.random.default_rng(0)
    im2cluster, distances = rng.integers(0, ks[0], m), rng.random(m)
    size = f"M {m}, K {ks[0]}"
    yield {"what": "concentration", "size": size} | compare(
        lambda: cluster.concentration(distances, im2cluster, ks[0], 0.2),
        lambda: published_concentration(distances, im2cluster, ks[0], 0.2),
        repeats,
    )


def kmeans(m, ks, d, repeats):
    before, now = made_up_features(m, d)
    previous = [clusters.centroids.numpy() for clusters in cluster.run_kmeans(before, ks, 0.2)]

    def objective(found):
        """Squared distances to the means of the clusters as assigned; for both sides alike."""
        return sum(within_clusters(now, clusters.im2cluster.numpy(), k) for clusters, k in zip(found, ks, strict=True))

    found, theirs = [], []
    warm = functools.partial(cluster.run_kmeans, now, ks, 0.2, niter=10, init=previous)
    row = compare(
        lambda: found.append(warm()), lambda: theirs.append(sum(published_kmeans(now, k) for k in ks)), repeats
    )
    size = f"M {m}, D {d}, K {'+'.join(map(str, ks))}"
    yield {"what": "k-means, from the second clustering on", "size": size} | row
    yield {"what": "its objective (ratio: published / ours)", "size": size, "unit": ""} | {
        "ours": (mine := objective(found[-1])),
        "published": theirs[-1],
        "ratio": theirs[-1] / mine,
    }


def within_clusters(x, im2cluster, k):
    sums = np.zeros((k, x.shape[1]))
    np.add.at(sums, im2cluster, x)
    return float((x**2).sum() - ((sums**2).sum(1) / np.bincount(im2cluster, minlength=k).clip(1)).sum())


def views(repeats, n):
    """The two views of small images kept in memory, and of photographs in a loader worker; on one core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    random_view = data.RandomView(32, crop_min=0.2, blur=False, flip=True)
    pixels = torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8)
    images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pixels]
    draws = torch.rand(2 * n, random_view.DRAWS)
    transform = published_view(32, blur=False)
    yield {"what": "two views, in memory", "size": f"{n} images of 32 px"} | compare(
        lambda: random_view(pixels.repeat(2, 1, 1, 1), draws, crop=True),
        lambda: [transform(image) for image in images for _ in "qk"],
        repeats,
    )
    encoded, n = photograph(), max(2, n // 8)
    crops, transform = data.TwoCrops(data.random_crop(224, 0.2)), published_view(224)

    def decode(transform):
        for _ in range(n):
            transform(Image.open(io.BytesIO(encoded)).convert("RGB"))

    yield {"what": "two views, decoding in a worker", "size": f"{n} JPEG of 500x375 to 224 px"} | compare(
        lambda: decode(crops), lambda: decode(lambda image: [transform(image) for _ in "qk"]), repeats
    )
    torch.set_num_threads(threads)


def momentum(arch, repeats):
    network = model.MoCo(functools.partial(model.build_encoder, arch), r=256).to(DEVICE)
    average, online = [*network.encoder_k.parameters()], [*network.encoder_q.parameters()]
    yield {"what": "momentum update", "size": arch} | compare(
        lambda: network.momentum_update(average, online, None),
        lambda: published_momentum_update(average, online),
        repeats,
    )


class Stub(torch.utils.data.Dataset):
    """Samples of which nothing is stored."""

    def __init__(self, n, shape):
        self.n, self.shape = n, shape

    def __len__(self):
        return self.n

    def __getitems__(self, indices):
        return torch.full((len(indices), *self.shape), 0.5), torch.tensor(indices)


def feature_pass(n, arch, size, repeats):
    """What saving costs: the pass of a real encoder with each batch saved, and with all features kept in memory."""
    encoder = model.build_encoder(arch, 128, small_images=True).eval().to(DEVICE, memory_format=torch.channels_last)
    loader = DataLoader(Stub(n, (3, size, size)), 512, collate_fn=data.as_it_is)

    def keep_all():
        everything = torch.zeros(n, 128)
        with torch.no_grad(), torch.autocast(DEVICE.type, torch.bfloat16):
            for images, index in loader:
                everything[index] = encoder(images.to(DEVICE)).float().cpu()

    def save_each():
        with tempfile.TemporaryDirectory() as directory, torch.autocast(DEVICE.type, torch.bfloat16):
            features.compute_features(loader, encoder, directory, DEVICE)

    yield {"what": "feature pass", "size": f"{arch}, {size} px, M {n}"} | compare(save_each, keep_all, repeats)


STUB_PASS = """
import sys
sys.path[:0] = sys.argv[1:3]
import bench
n, directory = int(sys.argv[3]), sys.argv[4]
loader = bench.DataLoader(bench.Stub(n, (128,)), 1024, collate_fn=bench.data.as_it_is)
bench.features.compute_features(loader, lambda x: x, directory)
print(bench.resident_kb("VmHWM"))
x = bench.features.load_features(directory, n, directory + "/features.npy")
bench.cluster.run_kmeans(x, [64], 0.2, niter=2)
print(bench.resident_kb("RssAnon"))
"""


def memory(ms):
    for m in ms:
        with tempfile.TemporaryDirectory() as directory:
            arguments = [str(Path(__file__).parent), str(ROOT), str(m), directory]
            start = clock()
            done = subprocess.run(
                [sys.executable, "-c", STUB_PASS, *arguments], check=True, capture_output=True, text=True
            )
            seconds, size = clock() - start, f"stub encoder, M {m}, D 128"
            at_peak, after = (int(line) / 1e3 for line in done.stdout.splitlines()[-2:])
        yield {"what": "feature pass, memory of the process at its peak", "size": size, "unit": "", "peak_mb": at_peak}
        yield {
            "what": "and, reading and k-means from the disk done, held",
            "size": size,
            "ours": seconds,
            "peak_mb": after,
        }


def ranks(arch, size, batch, n, repeats):
    """One process against two, each with one thread."""
    speeds = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as root:
        folder = made_up_folder(Path(root) / "data", n, size)
        for i in range(repeats):
            for world in speeds:
                place = f"{root}/{world}.{i}"
                command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
                options = ["-a", arch, "-b", batch, "--amp", "--warmup", 0, "--epochs", 3, "--exp-dir", place]
                command = [*map(str, [*command, ROOT / "main_pcl.py", folder, *options])]
                environment = {**os.environ, "OMP_NUM_THREADS": "1"}
                subprocess.run(command, env=environment, check=True, capture_output=True)
                with open(f"{place}/log.csv") as file:
                    rows = [*csv.DictReader(file)]
                speeds[world].append(statistics.median(float(row["images_per_second"]) for row in rows))
    ratios = [two / one for one, two in zip(speeds[1], speeds[2], strict=True)]
    size = f"{arch}, {size} px, batch {batch}"
    yield {"what": "one process, one thread", "size": size, "ours": statistics.median(speeds[1]), "unit": "images/s"}
    yield {"what": "two processes, one thread each", "size": size, "unit": "images/s"} | {
        "ours": statistics.median(speeds[2]),
        "ratio": statistics.median(ratios),
        "low": min(ratios),
        "high": max(ratios),
    }


FIRST_STEP = """
import os, sys
sys.path.insert(0, sys.argv.pop(1))
import main_pcl
update = main_pcl.MoCo.update
main_pcl.MoCo.update = lambda *_: update(*_) or os._exit(0)
main_pcl.main()
"""


def start(repeats):
    """The default run, from the command to the end of its first step."""
    seconds = []
    for _ in range(repeats + 1):
        with tempfile.TemporaryDirectory() as directory:
            options = ["--amp", "--optim", "sgd", "--cos", "--warmup", "20", "--exp-dir", directory]
            command = [sys.executable, "-c", FIRST_STEP, str(ROOT), *options]
            seconds.append(timed(lambda command=command: subprocess.run(command, check=True, capture_output=True)))
    yield {
        "what": "first step of the default run",
        "size": "from the command on",
        "ours": statistics.median(seconds[1:]),
    }


def growth(quick, repeats):
    """How cost grows: each size doubled a few times. {axis: ([sizes], [seconds])}."""
    doublings, m, k = (2, 400, 10) if quick else (4, 8_000, 200)
    niter = {"niter": 5}

    def cluster_seconds(m, k, d):
        x = made_up_features(m, d)[0]
        return min(timed(lambda: cluster.run_kmeans(x, [k], 0.2, **niter)) for _ in range(repeats))

    def loss_seconds(batch, k):
        clusters, q = made_up_clusters(10 * k, [k], 128), F.normalize(torch.randn(batch, 128, device=DEVICE), dim=1)
        q, index = q.requires_grad_(), torch.arange(batch, device=DEVICE)
        call = lambda: loss.proto_nce(q, index, clusters, 16_384)[0].backward()  # noqa: E731
        call()
        return min(timed(call) for _ in range(3 * repeats))

    factors = [2**i for i in range(doublings)]
    yield "k-means: M", [(m * f, cluster_seconds(m * f, k, 128)) for f in factors]
    yield "k-means: K", [(k * f, cluster_seconds(4 * m, k * f, 128)) for f in factors]
    yield "k-means: D", [(32 * f, cluster_seconds(2 * m, 2 * k, 32 * f)) for f in factors]
    yield "ProtoNCE: batch", [(64 * f, loss_seconds(64 * f, 100 * k)) for f in factors]
    yield "ProtoNCE: K", [(50 * k * f, loss_seconds(256, 50 * k * f)) for f in factors]


def plot(curves, path):
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for name, points in curves.items():
        sizes, seconds = zip(*points, strict=True)
        axes.plot(
            [s / sizes[0] for s in sizes], [s / seconds[0] for s in seconds], "o-", label=f"{name}, {sizes[0]} on"
        )
    axes.plot([1, 8], [1, 8], "k:", label="in proportion")
    axes.set(xscale="log", yscale="log", xlabel="size, relative", ylabel="time, relative")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=100, bbox_inches="tight")


HEADER = """\
| what | size | ours | of the step | memory, MB | published way | published / ours |
|---|---|---|---|---|---|---|"""


def markdown(row):
    """A row of the table, from the texts of the CSV's columns."""

    def quantity(text):
        if not text or row["unit"] != "s":
            return f"{text} {row['unit']}".strip() if text else ""
        value = float(text)
        scale, unit = (1, "s") if abs(value) >= 1 else (1e3, "ms") if abs(value) >= 1e-3 else (1e6, "µs")
        return f"{scale * value:.3g} {unit}"

    ratio = row.get("ratio") or ""
    if row.get("low"):
        ratio = "{:.3g} ({:.3g} to {:.3g})".format(*(float(row[name]) for name in ("ratio", "low", "high")))
    share = f"{100 * float(row['share']):.1f} %" if row.get("share") else ""
    memory = f"{float(row['peak_mb']):.0f}" if row.get("peak_mb") else ""
    cells = row["what"], row["size"], quantity(row.get("ours")), share, memory, quantity(row.get("published")), ratio
    return f"| {' | '.join(cells)} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--repeats", type=int, default=5, help="pairs of a comparison")
    parser.add_argument("--out", type=Path, default=ROOT / "results", help="where bench.csv and bench_growth.png go")
    args = parser.parse_args()
    torch.manual_seed(0)
    random.seed(0)
    q, few = args.quick, max(2, args.repeats // 2)
    m, d, ks, r = IMAGENET.values()
    sections = [
        start(1 if q else few),
        steps("default run", "resnet18_w16", 8, 128, 256 if q else 1408, few, "--crop-min", 0.5, "--no-flip"),
        *([] if q else [steps("CIFAR-10", "resnet18", 32, 256, 1024, few)]),
        losses(*((2000, (50, 100), 16, 32, 8) if q else (m, ks, d, r, 256)), repeats=4 * args.repeats),
        clustering(*((2000, (50, 100), 16) if q else (m, ks, d)), repeats=args.repeats),
        kmeans(*((2000, (20, 40), 16) if q else (m // 20, [k // 20 for k in ks], d)), repeats=2),
        views(args.repeats, 16 if q else 256),
        momentum("resnet18" if q else "resnet50", args.repeats),
        feature_pass(*((600, "resnet18_w4", 8) if q else (10_000, "resnet18", 16)), repeats=args.repeats),
        memory([1000, 2000] if q else [10**5, 10**6, 10**7]),
        ranks(*(("resnet18_w4", 8, 16, 64, 1) if q else ("resnet18", 32, 256, 512, few))),
    ]
    machine = f"{os.cpu_count()} cores ({platform.machine()}), {DEVICE.type}, torch {torch.__version__}"
    print(f"{machine}\n\n{HEADER}")
    args.out.mkdir(exist_ok=True)
    curves = {}
    with open(args.out / "bench.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in (row for section in sections for row in section):
            row = {"unit": "s"} | {name: f"{x:.4g}" if isinstance(x, float) else x for name, x in row.items()}
            print(markdown(row), flush=True)
            writer.writerow(row)
        for name, points in growth(q, 2):
            curves[name] = points
            for size, seconds in points:
                print(f"{name} {size}: {seconds:.4g} s", flush=True)
                writer.writerow({"what": name, "size": size, "ours": f"{seconds:.4g}", "unit": "s"})
    plot(curves, args.out / "bench_growth.png")


if __name__ == "__main__":
    main()
