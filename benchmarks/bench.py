"""Measure what each phase of the method costs, beside the encoder and beside the published code.

    pip install matplotlib
    python benchmarks/bench.py                      # writes bench.md, bench.csv, bench_growth.png
    python benchmarks/bench.py --quick --out DIR    # tiny sizes, to see that it runs
    python benchmarks/bench.py --draw               # draws bench_growth.png from bench.csv again

The published procedures (github.com/salesforce/PCL) are written out below in their plainest form. A
comparison runs both sides in turn and gives the median of the paired ratios, with the lowest and
the highest. Images and features are made up, because only their sizes matter. Linux only.
"""

import argparse
import contextlib
import csv
import ctypes
import functools
import io
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import faiss  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from PIL import Image, ImageFilter  # noqa: E402
from torchvision import transforms as T  # noqa: E402

import augment  # noqa: E402
import cluster  # noqa: E402
import data  # noqa: E402
import features  # noqa: E402
import loss  # noqa: E402
import main_pcl  # noqa: E402
import model  # noqa: E402
from runtime import cli  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PLACE = {"device": DEVICE, "memory_format": torch.channels_last}
COLUMNS = ("what", "size", "ours", "unit", "share", "peak_mb", "published", "ratio", "low", "high")
GROWTH = {  # {rows of `growth`: what grows}
    "k-means: M": "k-means: samples",
    "k-means: K": "k-means: clusters",
    "k-means: D": "k-means: dimensions",
    "ProtoNCE: batch": "ProtoNCE: images per batch",
    "ProtoNCE: K": "ProtoNCE: clusters",
}


# -- measuring -------------------------------------------------------------------------------------
def timed(function, *args, **kwargs):
    """The seconds that `function` takes, and its result."""
    synchronize()
    start = time.perf_counter()
    result = function(*args, **kwargs)
    synchronize()
    return time.perf_counter() - start, result


def synchronize():
    """Wait for the device."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def resident_mb(line):
    """The memory of this process in megabytes, from a line of /proc/self/status.

    line: "VmRSS", the memory in use; "VmHWM", its peak; "RssAnon", without mapped files.
    """
    status = Path("/proc/self/status").read_text()
    kilobytes = status.split(f"{line}:")[1].split()[0]
    return int(kilobytes) / 1e3


def peak_mb(function, *args):
    """The result of `function`, and the megabytes that it takes at its peak.

    The memory is the GPU's if there is one, otherwise the process's. Memory that is in use before
    does not count.
    """
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = function(*args)
        return result, (torch.cuda.max_memory_allocated() - before) / 1e6
    ctypes.CDLL(None).malloc_trim(0)  # give freed memory back to the system
    Path("/proc/self/clear_refs").write_text("5")  # reset VmHWM
    before = resident_mb("VmRSS")
    result = function(*args)
    return result, resident_mb("VmHWM") - before


def row(what, size, ours=None, ratios=(), **others):
    """A row of the table: {column: value}.

    ratios: measured ratios, of which the row has the median, the lowest and the highest.
    others: further columns.
    """
    cells = {"what": what, "size": size, "ours": ours, **others}
    if len(ratios):
        cells["ratio"] = np.median(ratios)
        cells["low"] = min(ratios)
        cells["high"] = max(ratios)
    return cells


def compare(size, repeats, what, ours, published):
    """A row that compares two functions without arguments.

    It has the median seconds of both, the ratios published / ours of `repeats` pairs, and the
    memory of `ours`.
    """
    _, peak = peak_mb(ours)  # this also warms up
    published()

    our_seconds = []
    published_seconds = []
    for i in range(repeats):
        sides = [(ours, our_seconds), (published, published_seconds)]
        if i % 2:
            sides.reverse()
        for function, seconds in sides:
            seconds.append(timed(function)[0])

    ratios = np.array(published_seconds) / np.array(our_seconds)
    middle = np.median(published_seconds)
    return row(what, size, np.median(our_seconds), ratios, published=middle, peak_mb=peak)


class Phases(contextlib.ExitStack):
    """A context that measures every call of some functions.

    places: {phase: (owner, name, ...)}. A call of owner.name counts for the phase.
    whole: {phase: [seconds of each call]}.
    own: the same, without the time that a call spends in other phases.
    """

    def __init__(self, places):
        super().__init__()
        self.whole = {phase: [] for phase in places}
        self.own = {phase: [] for phase in places}
        self.nested = 0.0  # seconds of the phases within the current call
        for phase, (owner, *names) in places.items():
            for name in names:
                measured = self.measure(phase, getattr(owner, name))
                self.enter_context(mock.patch.object(owner, name, measured))

    def measure(self, phase, function):
        """`function`, whose calls are measured as `phase`."""

        @functools.wraps(function)
        def measured(*args, **kwargs):
            nested_before = self.nested
            self.nested = 0.0
            seconds, result = timed(function, *args, **kwargs)
            self.whole[phase].append(seconds)
            self.own[phase].append(seconds - self.nested)
            self.nested = nested_before + seconds  # for the call around this one
            return result

        return measured


def run_command(command, **options):
    """Run a command in the project's directory. Returns what subprocess.run returns."""
    options = {"cwd": ROOT, **options}
    return subprocess.run(command, check=True, capture_output=True, **options)


# -- the published procedures ----------------------------------------------------------------------
def published_view(size, blur=True):
    """The transform behind one view. It works image by image, in a loader worker."""
    jitter = T.ColorJitter(0.4, 0.4, 0.4, 0.1)
    blurred = T.Lambda(published_blur)
    blur_chance = 0.5 if blur else 0.0
    return T.Compose(
        [
            T.RandomResizedCrop(size, scale=(0.2, 1.0)),
            T.RandomApply([jitter], p=0.8),
            T.RandomGrayscale(p=0.2),
            T.RandomApply([blurred], p=blur_chance),
            T.RandomHorizontalFlip(),
            T.ToTensor(),
            T.Normalize(augment.MEAN, augment.STD),
        ]
    )


def published_blur(image):
    """Gaussian blur of a PIL image, with a random standard deviation."""
    return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))


def published_negatives(target, im2cluster, num_negatives):
    """Numbers of random prototypes that no sample of the batch has."""
    everything = list(range(int(im2cluster.max()) + 1))
    others = list(set(everything) - set(target.tolist()))
    return random.sample(others, min(num_negatives, len(others)))


def published_proto_nce(q, index, clusters, num_negatives):
    """ProtoNCE, whose negatives are drawn in Python."""
    losses = []
    for im2cluster, centroids, density in clusters:
        target = im2cluster[index]
        negatives = published_negatives(target, im2cluster, num_negatives)
        negatives = torch.tensor(negatives, device=q.device)
        chosen = torch.cat([centroids[target], centroids[negatives]])
        logits = torch.mm(q, chosen.t()) / density[torch.cat([target, negatives])]
        losses.append(F.cross_entropy(logits, torch.arange(len(q), device=q.device)))
    return sum(losses) / len(losses)


def published_concentration(distances, im2cluster, num_cluster, temperature):
    """The concentration of each cluster, computed sample by sample."""
    members = [[] for _ in range(num_cluster)]  # distances of each cluster's samples
    for sample, number in enumerate(im2cluster):
        members[number].append(distances[sample])

    phi = np.zeros(num_cluster)
    for number, mine in enumerate(members):
        if len(mine) > 1:
            phi[number] = np.mean(mine) / np.log(len(mine) + 10)
    largest = phi.max()
    for number, mine in enumerate(members):
        if len(mine) <= 1:
            phi[number] = largest
    phi = phi.clip(np.percentile(phi, 10), np.percentile(phi, 90))
    return temperature * phi / phi.mean()


def published_kmeans(x, k):
    """The cluster of each sample, from the best of five runs of 20 iterations."""
    kmeans = faiss.Kmeans(
        x.shape[1],
        k,
        niter=20,
        nredo=5,
        seed=0,
        gpu=faiss.get_num_gpus() > 0,
        min_points_per_centroid=10,
        max_points_per_centroid=1000,
    )
    kmeans.train(x)
    return torch.from_numpy(kmeans.assign(x)[1])


def published_momentum_update(average, online, m=0.999):
    """The momentum update, one call per parameter."""
    for k, q in zip(average, online, strict=True):
        k.data = k.data * m + q.data * (1.0 - m)


# -- made-up data ----------------------------------------------------------------------------------
def made_up_clusters(m, ks, d):
    """Random Clusters of `m` samples, one for each number in `ks`."""
    levels = []
    for k in ks:
        im2cluster = torch.randint(k, (m,))
        centroids = F.normalize(torch.randn(k, d), dim=1)
        density = 0.15 + 0.1 * torch.rand(k)
        levels.append(cluster.Clusters(im2cluster, centroids, density).to(DEVICE))
    return levels


def made_up_features(m, d):
    """Two arrays (M, D) of unit rows: one around M / 20 centres, and the same an epoch later."""
    num_centres = max(1, m // 20)
    centres = torch.randn(num_centres, d)
    before = centres[torch.randint(num_centres, (m,))] + torch.randn(m, d)
    after = before + 0.3 * torch.randn(m, d)
    return F.normalize(before, dim=1).numpy(), F.normalize(after, dim=1).numpy()


def made_up_folder(root, n, size):
    """The path of a folder with `n` training and 64 held-out images of two classes.

    size: side of the images in pixels.
    """
    for part, count in (("train", n), ("val", 64)):
        for i in range(count):
            path = Path(root, "data", part, str(i % 2), f"{i}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            T.ToPILImage()(torch.rand(3, size, size)).save(path)
    return f"{root}/data"


def made_up_loader(n, batch_size, *shape):
    """A loader of `n` equal samples of a shape, none of which is stored."""

    def collate(index):
        return torch.full((len(index), *shape), 0.5), torch.tensor(index)

    return torch.utils.data.DataLoader(range(n), batch_size, collate_fn=collate)


class Setting(NamedTuple):
    """A network and its data."""

    arch: str
    size: int  # side of the images in pixels
    batch: int  # images per step
    n: int  # training images

    def __str__(self):
        return f"{self.arch}, {self.size} px, batch {self.batch}"


# -- the table, section by section: generators of rows ---------------------------------------------
# a program that ends after the first step of main_pcl.py
FIRST_STEP = """
import os
import main_pcl

enqueue = main_pcl.MoCo.dequeue_and_enqueue

def enqueue_and_exit(model, k):
    enqueue(model, k)
    os._exit(0)

main_pcl.MoCo.dequeue_and_enqueue = enqueue_and_exit
main_pcl.main()
"""


def start(repeats):
    """The default run, from the command to the end of its first step."""
    flags = ["--amp", "--optim", "sgd", "--cos", "--warmup", "20", "--exp-dir"]
    seconds = []
    with tempfile.TemporaryDirectory() as root:
        for i in range(repeats + 1):
            command = [sys.executable, "-c", FIRST_STEP, *flags, f"{root}/{i}"]
            seconds.append(timed(run_command, command)[0])
    seconds = seconds[1:]  # the first run fills the disk's cache
    yield row("first step of the default run", "from the command on", np.median(seconds))


# rows of the steps, and what Phases measures for them
WHOLE = "step (memory: of the whole run)"
FLOOR = "floor, the encoder alone (ratio: step / floor)"
STEP = {
    "reading the batch": (data.Images, "__getitems__"),
    "two views": (augment.RandomView, "two_views"),
    "encoders and heads, forward": (model.MoCo, "forward"),
    "InfoNCE": (main_pcl, "info_nce"),
    "ProtoNCE": (main_pcl, "proto_nce"),
    "backward": (torch.Tensor, "backward"),
    "clipping": (main_pcl, "clip_gradients"),
    "optimizer": (torch.optim.SGD, "step"),
    "momentum update and queue": (model.MoCo, "momentum_update_key_encoder", "dequeue_and_enqueue"),
    "figures and keys": (main_pcl, "collect_results"),
}
EPOCH = {"clustering": (main_pcl, "e_step"), "checkpoint": (main_pcl.checkpoint, "save")}
EPOCHS = 4  # of each run


def steps(name, setting, options, repeats):
    """The phases of a training step and of an epoch, in real runs of main_pcl.py.

    Beside them stands the floor: a step of the encoders alone, without heads and losses.
    name: of these runs, for the table. options: flags besides those of `setting`.
    """
    flags = f"-a {setting.arch} -b {setting.batch} --amp --warmup 0 --epochs {EPOCHS}"
    flags += f" --knn-every {EPOCHS} --clip-grad 1 {options}"
    steps_per_epoch = setting.n // setting.batch
    floor = make_floor(setting)
    floor()  # warm up

    # runs that cluster the keys, and runs that cluster a pass over the images, in turn
    runs = {"keys": [], "pass": []}
    with tempfile.TemporaryDirectory() as root:
        folder = made_up_folder(root, setting.n, setting.size)
        for i in range(repeats):
            for how, measured in runs.items():
                exp_dir = f"{root}/{how}_{i}"
                argv = [folder, *flags.split(), "--exp-dir", exp_dir, "--features", how]
                measured.append(measure_run(argv, floor, setting.batch, steps_per_epoch))
    keys = {phase: np.array([run[phase] for run in runs["keys"]]) for phase in runs["keys"][0]}
    passes = {phase: np.array([run[phase] for run in runs["pass"]]) for phase in runs["pass"][0]}

    # the step
    middle = {phase: np.median(seconds) for phase, seconds in keys.items()}
    forward_and_backward = middle["encoders and heads, forward"] + middle["backward"]
    middle["the rest of the loop"] = middle[WHOLE] - sum(middle[phase] for phase in STEP)
    without_encoders = "step without the encoders' forward and backward"
    middle[without_encoders] = middle[WHOLE] - forward_and_backward
    size = f"{name}: {setting}"
    others = {
        WHOLE: {"peak_mb": middle["peak"]},
        FLOOR: {"ratios": keys[WHOLE] / keys[FLOOR]},
    }
    for what in (WHOLE, FLOOR, *STEP, "the rest of the loop", without_encoders):
        share = middle[what] / middle[WHOLE]
        yield row(what, size, middle[what], share=share, **others.get(what, {}))

    # the epoch
    for phase in EPOCH:
        yield row(f"{phase}, once an epoch of {steps_per_epoch} steps", size, middle[phase])
    with_keys = steps_per_epoch * keys[WHOLE] + keys["clustering"]
    with_pass = steps_per_epoch * passes[WHOLE] + passes["clustering"]
    yield row(
        "epoch with --features keys, with pass",
        size,
        np.median(with_keys),
        with_pass / with_keys,
        published=np.median(with_pass),
    )


def make_floor(setting):
    """A function without arguments: the encoders' forward and backward on one batch."""
    encoder_q = model.build_encoder(setting.arch, small_images=True).to(**PLACE)
    encoder_k = model.build_encoder(setting.arch, small_images=True).to(**PLACE)
    x = torch.randn(setting.batch, 3, setting.size, setting.size).to(**PLACE)

    def floor():
        with torch.autocast(DEVICE.type, torch.bfloat16):
            z = encoder_q(x)
            with torch.no_grad():
                encoder_k(x)
        z.float().square().mean().backward()

    return floor


def measure_run(argv, floor, batch, steps_per_epoch):
    """Run main_pcl.py once. Returns {phase: median seconds}, and "peak": megabytes.

    argv: its command line. floor: a function to measure before and after the run.
    """
    floors = [timed(floor)[0] for _ in range(4)]
    with Phases(STEP | EPOCH) as phases, contextlib.redirect_stdout(io.StringIO()):
        log, peak = peak_mb(main_pcl.main, argv)
    floors += [timed(floor)[0] for _ in range(4)]

    measured = {FLOOR: np.median(floors), "peak": peak}
    measured[WHOLE] = np.median([batch / epoch["images_per_second"] for epoch in log[1:]])
    for phase, (_, *names) in STEP.items():
        calls = np.reshape(phases.own[phase], (-1, len(names)))  # each step calls all names once
        measured[phase] = np.median(calls.sum(1))
    # these are not called in every step
    calls = phases.own["figures and keys"]
    measured["figures and keys"] = sum(calls) / EPOCHS / steps_per_epoch
    for phase in EPOCH:
        # the first call has nothing to start from
        measured[phase] = np.median(phases.whole[phase][1:])
    return measured


def losses(m, ks, d, r, batch, repeats):
    """ProtoNCE, its floor, and the drawing of its negatives.

    m: samples. ks: numbers of clusters. d: dimension. r: negatives.
    """
    q = F.normalize(torch.randn(batch, d, device=DEVICE), dim=1).requires_grad_()
    index = torch.randint(m, (batch,), device=DEVICE)
    clusters = made_up_clusters(m, ks, d)
    targets = [level.im2cluster[index] for level in clusters]
    size = f"M {m}, K {'+'.join(map(str, ks))}, R {r}, batch {batch}"

    def ours():
        loss.proto_nce(q, index, clusters, r)[0].backward()

    def published():
        published_proto_nce(q, index, clusters, r).backward()

    yield compare(size, repeats, "ProtoNCE, forward and backward", ours, published)

    def draw():
        return [
            loss._choose_prototypes(target, k, r) for target, k in zip(targets, ks, strict=True)
        ]

    def published_draw():
        for target, level in zip(targets, clusters, strict=True):
            published_negatives(target, level.im2cluster, r)

    drawn = draw()

    def floor():
        """The gather, the matrix products and the cross-entropy alone."""
        parts = []
        for level, (chosen, _, target) in zip(clusters, drawn, strict=True):
            logits = q @ level.centroids[chosen].T
            parts.append(F.cross_entropy(logits, target))
        torch.stack(parts).mean().backward()

    what = "its floor: gather, products, loss (ratio: whole / floor)"
    cells = compare(size, repeats, what, floor, ours)
    cells["published"] = None  # the other side is ours
    yield cells
    yield compare(size, repeats, "drawing its negatives", draw, published_draw)


def clustering(m, k, repeats):
    """The concentration of `k` clusters of `m` samples."""
    distances = torch.rand(m).numpy()
    im2cluster = torch.randint(k, (m,)).numpy()
    ours = functools.partial(cluster.concentration, distances, im2cluster, k, 0.2)
    published = functools.partial(published_concentration, distances, im2cluster, k, 0.2)
    yield compare(f"M {m}, K {k}", repeats, "concentration", ours, published)


def kmeans(m, ks, d, repeats):
    """k-means from the prototypes of the epoch before, and how good its clusters are."""
    before, now = made_up_features(m, d)
    init = [level.centroids.numpy() for level in cluster.run_kmeans(before, ks, 0.2)]
    found = {}  # the cluster of each sample at each granularity

    def ours():
        levels = cluster.run_kmeans(now, ks, 0.2, niter=10, init=init)
        found["ours"] = [level.im2cluster for level in levels]

    def published():
        found["published"] = [published_kmeans(now, k) for k in ks]

    size = f"M {m}, D {d}, K {'+'.join(map(str, ks))}"
    yield compare(size, repeats, "k-means, from the second clustering on", ours, published)

    x = torch.from_numpy(now)
    mine = sum(objective(x, im2cluster) for im2cluster in found["ours"])
    theirs = sum(objective(x, im2cluster) for im2cluster in found["published"])
    what = "its objective (ratio: published / ours)"
    yield row(what, size, mine, unit="", published=theirs, ratio=theirs / mine)


def objective(x, im2cluster):
    """The sum of the squared distances of unit rows x (M, D) to the means of their clusters."""
    sums = torch.zeros(im2cluster.max() + 1, x.shape[1]).index_add(0, im2cluster, x)
    explained = sums.square().sum(1) / im2cluster.bincount()
    return len(x) - explained.nansum().item()


def views(n, repeats):
    """The two views of images in memory, and of photographs in a loader worker. On one core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pixels = torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8)
    random_view = augment.RandomView(32, blur=False)
    draws = random_view.draw(n, seed=0)
    images = [T.ToPILImage()(image) for image in pixels]
    transform = published_view(32, blur=False)

    def ours():
        random_view.two_views(pixels, draws)

    def published():
        for image in images * 2:
            transform(image)

    yield compare(f"{n} images of 32 px", repeats, "two views, in memory", ours, published)

    # a photograph about as large as ImageNet's: smooth, with some noise
    few = max(2, n // 8)
    smooth = F.interpolate(torch.rand(1, 3, 12, 16), (375, 500), mode="bicubic")[0]
    photograph = (smooth + 0.2 * torch.rand(375, 500) - 0.1).clamp(0, 1)
    file = io.BytesIO()
    T.ToPILImage()(photograph).save(file, "JPEG", quality=85)
    two_crops = data.TwoCrops(224, scale=(0.2, 1.0))
    view = published_view(224)

    def decode_and_crop():
        for _ in range(few):
            two_crops(Image.open(file).convert("RGB"))

    def published_decode_and_view():
        for _ in range(few):
            image = Image.open(file).convert("RGB")
            view(image)
            view(image)

    size = f"{few} JPEG of 500x375 to 224 px"
    what = "two views, decoding in a worker"
    yield compare(size, repeats, what, decode_and_crop, published_decode_and_view)
    torch.set_num_threads(threads)


def networks(momentum_arch, n, arch, size, repeats):
    """The momentum update; then a feature pass that saves its results, and one that does not.

    momentum_arch: the network of the momentum update. n, arch, size: images of the pass, its
    network, and the side of the images in pixels.
    """
    build_encoder = functools.partial(model.build_encoder, momentum_arch)
    network = model.MoCo(build_encoder, r=256).to(DEVICE)
    average = list(network.encoder_k.parameters())
    online = list(network.encoder_q.parameters())
    ours = network.momentum_update_key_encoder
    published = functools.partial(published_momentum_update, average, online)
    yield compare(momentum_arch, repeats, "momentum update", ours, published)

    loader = made_up_loader(n, 512, 3, size, size)
    encoder = model.build_encoder(arch, small_images=True).to(**PLACE).eval()
    with tempfile.TemporaryDirectory() as directory, torch.autocast(DEVICE.type, torch.bfloat16):
        save = functools.partial(features.compute_features, loader, encoder, directory, DEVICE)
        keep = functools.partial(features.extract_features, loader, encoder, DEVICE)
        yield compare(f"{arch}, {size} px, M {n}", repeats, "feature pass", save, keep)


def memory(ms):
    """The memory of a feature pass and of k-means over its files, for each number of samples."""
    for m in ms:
        size = f"stub encoder, M {m}, D 128"
        program = f"import bench; print(*bench.stub_pass({m}))"
        command = [sys.executable, "-c", program]
        seconds, done = timed(run_command, command, cwd=ROOT / "benchmarks")
        at_peak, held = map(float, done.stdout.split())
        yield row("feature pass, memory of the process at its peak", size, unit="", peak_mb=at_peak)
        yield row("and, reading and k-means from the disk done, held", size, seconds, peak_mb=held)


def stub_pass(n):
    """A feature pass and k-means over `n` samples. To be called in a process of its own.

    Returns the megabytes at the peak of the pass, and those held after k-means.
    """
    with tempfile.TemporaryDirectory() as directory:
        features.compute_features(made_up_loader(n, 1024, 128), lambda x: x, directory)
        at_peak = resident_mb("VmHWM")
        x = features.load_features(directory, n, f"{directory}/features.npy")
        cluster.run_kmeans(x, [64], 0.2, niter=2)
        return at_peak, resident_mb("RssAnon")


def ranks(setting, repeats):
    """The speed of one process and of two, each with one thread."""
    flags = f"-a {setting.arch} -b {setting.batch} --amp --warmup 0 --epochs 3".split()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    speeds = {1: [], 2: []}  # images per second
    with tempfile.TemporaryDirectory() as root:
        folder = made_up_folder(root, setting.n, setting.size)
        for i in range(repeats):
            for world, measured in speeds.items():
                exp_dir = f"{root}/{world}_{i}"
                script = ["main_pcl.py", folder, *flags, "--exp-dir", exp_dir]
                run_command([*launcher, f"--nproc_per_node={world}", *script], env=environment)
                log = np.genfromtxt(f"{exp_dir}/log.csv", delimiter=",", names=True)
                measured.append(np.median(log["images_per_second"]))

    one = np.array(speeds[1])
    two = np.array(speeds[2])
    size = str(setting)
    unit = "images/s"
    yield row("one process, one thread", size, np.median(one), unit=unit)
    yield row("two processes, one thread each", size, np.median(two), two / one, unit=unit)


def growth(m, k, doublings):
    """How the cost grows with a size: each size doubled a few times."""

    def kmeans_seconds(m, k, d):
        """The faster of two tries."""
        tries = []
        for _ in range(2):
            x, _ = made_up_features(m, d)
            tries.append(timed(cluster.run_kmeans, x, [k], 0.2, niter=5)[0])
        return min(tries)

    def proto_nce_seconds(m, k, batch):
        first_row = next(losses(m, [k], 128, 16_384, batch, repeats=5))
        return first_row["ours"]

    curves = {  # {what grows: (first size, function of the size -> seconds)}
        "k-means: M": (m, lambda size: kmeans_seconds(size, k, 128)),
        "k-means: K": (k, lambda size: kmeans_seconds(4 * m, size, 128)),
        "k-means: D": (32, lambda size: kmeans_seconds(2 * m, 2 * k, size)),
        "ProtoNCE: batch": (64, lambda size: proto_nce_seconds(1000 * k, 100 * k, size)),
        "ProtoNCE: K": (50 * k, lambda size: proto_nce_seconds(10 * size, size, 256)),
    }
    for what, (first, measure) in curves.items():
        for i in range(doublings):
            size = first * 2**i
            yield row(what, size, measure(size))


def draw_growth(rows, path):
    """Draw the rows of `growth`: time against size, both relative to the smallest size.

    rows: of bench.csv, as {column: text or number}; other rows are left out.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axes = figure.add_subplot()
    in_seconds = EngFormatter("s", places=0)
    longest = 1
    for what, name in GROWTH.items():
        chosen = [row for row in rows if row["what"] == what]
        if not chosen:
            continue
        sizes = np.array([float(row["size"]) for row in chosen])
        seconds = np.array([float(row["ours"]) for row in chosen])
        longest = max(longest, sizes[-1] / sizes[0])
        times = f"{in_seconds(seconds[0])} to {in_seconds(seconds[-1])}"
        label = f"{name}, {sizes[0]:,.0f} to {sizes[-1]:,.0f} ({times})"
        axes.loglog(sizes / sizes[0], seconds / seconds[0], "o-", label=label)
    axes.loglog([1, longest], [1, longest], "k:", label="in proportion to the size")

    # ticks at the doublings, for both axes
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(2))
        axis.set_major_formatter("{x:g}x")
        axis.set_minor_locator(NullLocator())
    axes.set(title="How the time grows with each size")
    axes.set(xlabel="size, against the smallest", ylabel="time, against that of the smallest size")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=100)


# -- the whole table -------------------------------------------------------------------------------
def sections(repeats):
    """All sections. The sizes of ProtoNCE and of the clustering are ImageNet's."""
    few = max(2, repeats // 2)
    m = 1_281_167
    ks = (25_000, 50_000, 100_000)
    digits = Setting("resnet18_w16", size=8, batch=128, n=1408)
    cifar10 = Setting("resnet18", size=32, batch=256, n=1024)
    return [
        start(few),
        steps("default run", digits, "--crop-min 0.5 --no-flip", few),
        steps("CIFAR-10", cifar10, "", few),
        losses(m, ks, d=128, r=16_384, batch=256, repeats=4 * repeats),
        clustering(m, ks[0], repeats),
        kmeans(m // 20, [k // 20 for k in ks], d=128, repeats=2),
        views(256, repeats),
        networks("resnet50", 10_000, "resnet18", 16, repeats),
        memory([10**5, 10**6, 10**7]),
        ranks(Setting("resnet18", size=32, batch=256, n=512), few),
        growth(8000, 200, doublings=4),
    ]


def quick_sections(repeats):
    """The same at tiny sizes."""
    few = max(2, repeats // 2)
    digits = Setting("resnet18_w16", size=8, batch=128, n=256)
    return [
        start(1),
        steps("default run", digits, "--crop-min 0.5 --no-flip", few),
        losses(2000, (50, 100), d=16, r=32, batch=8, repeats=4 * repeats),
        clustering(2000, 50, repeats),
        kmeans(2000, (20, 40), d=16, repeats=2),
        views(16, repeats),
        networks("resnet18", 600, "resnet18_w4", 8, repeats),
        memory([1000, 2000]),
        ranks(Setting("resnet18_w4", size=8, batch=16, n=64), 1),
        growth(400, 10, doublings=2),
    ]


def markdown(row):
    """A row as a line of the table in Markdown."""
    from matplotlib.ticker import EngFormatter  # here, because the tests do without matplotlib

    number = EngFormatter(row["unit"], places=2)
    formats = {
        "what": str,
        "size": str,
        "ours": number,
        "share": "{:.1%}".format,
        "peak_mb": "{:.0f}".format,
        "published": number,
    }
    cells = []
    for column, form in formats.items():
        value = row.get(column)
        cells.append("" if value is None else form(value))
    ratio = ""
    if "low" in row:
        ratio = "{ratio:.3g} ({low:.3g} to {high:.3g})".format(**row)
    elif "ratio" in row:
        ratio = "{ratio:.4g}".format(**row)
    return f"| {' | '.join([*cells, ratio])} |"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument(
        "--draw", action="store_true", help="draw bench_growth.png from bench.csv, measure nothing"
    )
    parser.add_argument(
        "--repeats", type=cli.positive_int, default=5, help="pairs in a comparison; default: 5"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "results",
        metavar="DIR",
        help="directory for the three files; default: results",
    )
    args = parser.parse_args()
    if args.draw and not (args.out / "bench.csv").exists():
        parser.error(f"there is no bench.csv in {args.out}")
    if not args.draw:
        args.out.mkdir(parents=True, exist_ok=True)
        measure_all(quick_sections if args.quick else sections, args.repeats, args.out)
    with open(args.out / "bench.csv", newline="") as file:
        draw_growth(list(csv.DictReader(file)), args.out / "bench_growth.png")


def measure_all(make_sections, repeats, out):
    """Print the table, and write it to bench.csv and bench.md in the directory `out`."""
    torch.manual_seed(0)
    random.seed(0)
    machine = f"{os.cpu_count()} cores ({os.uname().machine})"
    lines = [
        f"{machine}, {DEVICE.type}, torch {torch.__version__}\n",
        "| what | size | ours | of the step | memory, MB | published way | published / ours |",
        "|---" * 7 + "|",
    ]
    print(*lines, sep="\n")
    with open(out / "bench.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for section in make_sections(repeats):
            for cells in section:
                cells = {"unit": "s", **cells}
                lines.append(markdown(cells))
                print(lines[-1], flush=True)
                for column, value in cells.items():
                    if isinstance(value, float):
                        cells[column] = f"{value:.4g}"
                writer.writerow(cells)
    (out / "bench.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
