"""What every phase of the method costs beside the encoder, and beside the same phase as the published PCL code has it.

    pip install matplotlib
    python benchmarks/bench.py            # prints the table; writes bench.md, bench.csv, bench_growth.png to results/
    python benchmarks/bench.py --quick --out DIR    # tiny sizes, to see that it runs; on Linux, as all of it

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
import random
import subprocess
import sys
import tempfile
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
from torchvision import transforms as T  # noqa: E402

import augment  # noqa: E402
import cluster  # noqa: E402
import data  # noqa: E402
import features  # noqa: E402
import loss  # noqa: E402
import main_pcl  # noqa: E402
import model  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
COLUMNS = ("what", "size", "ours", "unit", "share", "peak_mb", "published", "ratio", "low", "high")
SYNCHRONIZE = torch.cuda.synchronize if DEVICE.type == "cuda" else lambda: None  # wait for the device
PLACE = {"device": DEVICE, "memory_format": torch.channels_last}
run = functools.partial(subprocess.run, cwd=ROOT, check=True, capture_output=True)


# -- measuring ----------------------------------------------------------------------------------------------------
def timed(function, *args, **kwargs):
    """The seconds that `function` takes, and what it returns."""
    SYNCHRONIZE()
    start = time.perf_counter()
    result = function(*args, **kwargs)
    SYNCHRONIZE()
    return time.perf_counter() - start, result


def resident_mb(line):
    """A line of /proc/self/status: VmRSS; VmHWM, the highest VmRSS so far; RssAnon, VmRSS without mapped files."""
    return int(Path("/proc/self/status").read_text().split(f"{line}:")[1].split()[0]) / 1e3


def peak_mb(function, *args):
    """What `function` returns, and the megabytes (a GPU's, or resident) it takes at its peak beyond those taken now."""
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return function(*args), (torch.cuda.max_memory_allocated() - before) / 1e6
    ctypes.CDLL(None).malloc_trim(0)  # what was freed is not taken
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    before = resident_mb("VmRSS")
    return function(*args), resident_mb("VmHWM") - before


def row(what, size, ours=None, ratios=(), **more):
    """A row of the table, {name among COLUMNS: value}; of the ratios their median, the lowest and the highest."""
    more |= {"ratio": np.median(ratios), "low": min(ratios), "high": max(ratios)} if len(ratios) else {}
    return {"what": what, "size": size, "ours": ours} | more


def compare(size, repeats, what, ours, published):
    """A row: the median seconds of both functions, the paired ratios published / ours, the peak of ours."""
    (_, peak), _ = peak_mb(ours), published()  # and warm up
    seconds = {ours: [], published: []}
    for i in range(repeats):
        for side in (ours, published)[:: (-1) ** i]:
            seconds[side].append(timed(side)[0])
    mine, theirs = map(np.array, seconds.values())
    return row(what, size, np.median(mine), theirs / mine, published=np.median(theirs), peak_mb=peak)


class Phases(contextlib.ExitStack):
    """As a context: `whole`, {phase: [seconds of each call]}, and `own`, without those of other phases within it."""

    def __init__(self, places):
        super().__init__()
        self.inside, self.own, self.whole = 0.0, {phase: [] for phase in places}, {phase: [] for phase in places}
        for phase, (owner, *names) in places.items():
            for name in names:
                self.enter_context(mock.patch.object(owner, name, self.wrap(phase, getattr(owner, name))))

    def wrap(self, phase, function):
        @functools.wraps(function)
        def timing(*args, **kwargs):
            before, self.inside = self.inside, 0.0
            seconds, result = timed(function, *args, **kwargs)
            self.whole[phase].append(seconds)
            self.own[phase].append(seconds - self.inside)
            self.inside = before + seconds
            return result

        return timing


# -- the published procedures -------------------------------------------------------------------------------------
def published_view(size, blur=True):
    """The transform behind one view: everything image by image, in the loader worker."""
    blurred = T.Lambda(lambda image: image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0))))
    parts = T.RandomResizedCrop(size, scale=(0.2, 1.0)), T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8)
    parts += T.RandomGrayscale(p=0.2), T.RandomApply([blurred], p=0.5 * blur), T.RandomHorizontalFlip(), T.ToTensor()
    return T.Compose([*parts, T.Normalize(augment.MEAN, augment.STD)])


def published_negatives(target, im2cluster, num_negatives):
    everything = list(range(int(im2cluster.max()) + 1))
    others = list(set(everything) - set(target.tolist()))
    return random.sample(others, min(num_negatives, len(others)))


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
    phi = np.array([np.mean(mine) / np.log(len(mine) + 10) if len(mine) > 1 else 0 for mine in members])
    phi[[len(mine) <= 1 for mine in members]] = phi.max()
    phi = phi.clip(np.percentile(phi, 10), np.percentile(phi, 90))
    return temperature * phi / phi.mean()


def published_kmeans(x, k):
    """The best of five runs of 20 iterations from scratch; returns the cluster of each sample."""
    sizes = {"min_points_per_centroid": 10, "max_points_per_centroid": 1000}
    kmeans = faiss.Kmeans(x.shape[1], k, niter=20, nredo=5, seed=0, gpu=faiss.get_num_gpus() > 0, **sizes)
    kmeans.train(x)
    return torch.from_numpy(kmeans.assign(x)[1])


def published_momentum_update(average, online, m=0.999):
    for k, q in zip(average, online, strict=True):
        k.data = k.data * m + q.data * (1.0 - m)


# -- made-up data -------------------------------------------------------------------------------------------------
def made_up_clusters(m, ks, d):
    levels = [(torch.randint(k, (m,)), F.normalize(torch.randn(k, d), dim=1), 0.15 + 0.1 * torch.rand(k)) for k in ks]
    return [cluster.Clusters(*level).to(DEVICE) for level in levels]


def made_up_features(m, d):
    """(M, D) unit rows around M / 20 centres, and what an epoch of training might make of them."""
    x = torch.randn(max(1, m // 20), d)[torch.randint(max(1, m // 20), (m,))] + torch.randn(m, d)
    return [F.normalize(y, dim=1).numpy() for y in (x, x + 0.3 * torch.randn(m, d))]


def made_up_folder(root, n, size):
    """The path of a folder with `n` training and 64 held-out images of `size` pixels in two classes."""
    for path in [f"train/{i % 2}/{i}.png" for i in range(n)] + [f"val/{i % 2}/{i}.png" for i in range(64)]:
        Path(root, "data", path).parent.mkdir(parents=True, exist_ok=True)
        T.ToPILImage()(torch.rand(3, size, size)).save(f"{root}/data/{path}")
    return f"{root}/data"


def made_up_loader(n, batch_size, *shape):
    """A loader of `n` samples of which nothing is stored."""
    options = {"collate_fn": lambda index: (torch.full((len(index), *shape), 0.5), torch.tensor(index))}
    return torch.utils.data.DataLoader(range(n), batch_size, **options)


# -- the sections of the table, each a generator of rows ----------------------------------------------------------
def start(repeats):
    """The default run, from the command to the end of its first step."""
    end, options = "main_pcl.MoCo.dequeue_and_enqueue", ["--amp", "--optim", "sgd", "--cos", "--warmup", "20"]
    code = f"import main_pcl, os; f = {end}; {end} = lambda *_: f(*_) or os._exit(0); main_pcl.main()"
    with tempfile.TemporaryDirectory() as root:
        commands = [[sys.executable, "-c", code, *options, "--exp-dir", f"{root}/{i}"] for i in range(repeats + 1)]
        seconds = [timed(run, command)[0] for command in commands]
    yield row("first step of the default run", "from the command on", np.median(seconds[1:]))


WHOLE, FLOOR = "step (memory: of the whole run)", "floor, the encoder alone (ratio: step / floor)"
STEP = {
    "reading the batch": (data.Images, "__getitems__"),
    "two views": (augment.RandomView, "two_views"),
    "encoders and heads, forward": (model.MoCo, "forward"),
    "InfoNCE": (main_pcl, "info_nce"),
    "ProtoNCE": (main_pcl, "proto_nce"),
    "backward": (torch.Tensor, "backward"),
    "clipping": (main_pcl, "clip_grad_norm_"),
    "optimizer": (torch.optim.SGD, "step"),
    "momentum update and queue": (model.MoCo, "momentum_update_key_encoder", "dequeue_and_enqueue"),
    "figures and keys": (main_pcl, "sync"),
}
EPOCH = {"clustering": (main_pcl, "e_step"), "checkpoint": (main_pcl.checkpoint, "save")}


def steps(name, arch, size, batch, n, options, repeats):
    """The phases of a training step, and of the epoch around it, in real runs of main_pcl.py beside the floor."""
    encoder_q, encoder_k = (model.build_encoder(arch, small_images=True).to(**PLACE) for _ in "qk")
    x = torch.randn(batch, 3, size, size).to(**PLACE)

    def floor():
        with torch.autocast(DEVICE.type, torch.bfloat16):
            z = encoder_q(x)
            with torch.no_grad():
                encoder_k(x)
        z.float().square().mean().backward()

    epochs, count, runs = 4, n // batch, {"keys": [], "pass": []}
    options = f"-a {arch} -b {batch} --amp --warmup 0 --epochs {epochs} --knn-every {epochs} --clip-grad 1 {options}"
    with tempfile.TemporaryDirectory() as root:
        command = [made_up_folder(root, n, size), *options.split(), "--exp-dir"]
        floor()
        for i, how in enumerate([*runs] * repeats):
            floors = [timed(floor)[0] for _ in range(4)]
            with Phases(STEP | EPOCH) as phases, contextlib.redirect_stdout(io.StringIO()):
                log, peak = peak_mb(main_pcl.main, [*command, f"{root}/{i}", "--features", how])
            seen = {FLOOR: np.median(floors + [timed(floor)[0] for _ in range(4)]), "peak": peak}
            seen[WHOLE] = np.median([batch / epoch["images_per_second"] for epoch in log[1:]])
            for phase, (_, *names) in STEP.items():
                seen[phase] = np.median(np.reshape(phases.own[phase], (-1, len(names))).sum(1))
            seen["figures and keys"] = sum(phases.own["figures and keys"]) / epochs / count  # not in every step
            seen |= {phase: np.median(phases.whole[phase][1:]) for phase in EPOCH}  # the first begins with nothing
            runs[how].append(seen)

    keys, with_pass = ({name: np.array([seen[name] for seen in some]) for name in seen} for some in runs.values())
    middle, size = {name: np.median(x) for name, x in keys.items()}, f"{name}: {arch}, {size} px, batch {batch}"
    rest = {"the rest of the loop": STEP}
    rest["step without the encoders' forward and backward"] = ("encoders and heads, forward", "backward")
    middle |= {what: middle[WHOLE] - sum(middle[phase] for phase in phases) for what, phases in rest.items()}
    more = {WHOLE: {"peak_mb": middle["peak"]}, FLOOR: {"ratios": keys[WHOLE] / keys[FLOOR]}}
    for what in (WHOLE, FLOOR, *STEP, *rest):
        yield row(what, size, middle[what], share=middle[what] / middle[WHOLE], **more.get(what, {}))
    yield from (row(f"{phase}, once an epoch of {count} steps", size, middle[phase]) for phase in EPOCH)
    short, long = (count * x[WHOLE] + x["clustering"] for x in (keys, with_pass))
    yield row("epoch with --features keys, with pass", size, np.median(short), long / short, published=np.median(long))


def losses(m, ks, d, r, batch, repeats):
    q = F.normalize(torch.randn(batch, d, device=DEVICE), dim=1).requires_grad_()
    index, clusters = torch.randint(m, (batch,), device=DEVICE), made_up_clusters(m, ks, d)
    measure = functools.partial(compare, f"M {m}, K {'+'.join(map(str, ks))}, R {r}, batch {batch}", repeats)
    numbers = [level.im2cluster for level in clusters]
    targets = [number[index] for number in numbers]
    draw, theirs = (functools.partial(f, num_negatives=r) for f in (loss._choose_prototypes, published_negatives))
    chosen = [*zip(clusters, map(draw, targets, ks), strict=True)]

    def ours():
        loss.proto_nce(q, index, clusters, r)[0].backward()

    def floor():
        """The gather, the matrix products and the cross-entropy alone."""
        parts = [F.cross_entropy(q @ level.centroids[rows].T, own) for level, (rows, _, own) in chosen]
        torch.stack(parts).mean().backward()

    yield measure("ProtoNCE, forward and backward", ours, lambda: published_proto_nce(q, index, clusters, r).backward())
    yield measure("its floor: gather, products, loss (ratio: whole / floor)", floor, ours) | {"published": None}
    yield measure("drawing its negatives", lambda: [*map(draw, targets, ks)], lambda: [*map(theirs, targets, numbers)])


def clustering(m, ks, d, repeats):
    given = torch.rand(m).numpy(), torch.randint(ks[0], (m,)).numpy(), ks[0], 0.2
    ours, published = (functools.partial(f, *given) for f in (cluster.concentration, published_concentration))
    yield compare(f"M {m}, K {ks[0]}", repeats, "concentration", ours, published)


def kmeans(m, ks, d, repeats):
    before, now = made_up_features(m, d)
    size, kept, x = f"M {m}, D {d}, K {'+'.join(map(str, ks))}", {}, torch.from_numpy(now)
    init = [level.centroids.numpy() for level in cluster.run_kmeans(before, ks, 0.2)]

    both = (
        lambda: kept.update(ours=[x.im2cluster for x in cluster.run_kmeans(now, ks, 0.2, niter=10, init=init)]),
        lambda: kept.update(published=[published_kmeans(now, k) for k in ks]),
    )
    yield compare(size, repeats, "k-means, from the second clustering on", *both)
    for side, numbers in kept.items():  # squared distances of the rows, which are unit, to the mean of their cluster
        squares = [torch.zeros(i.max() + 1, d).index_add(0, i, x).square().sum(1) for i in numbers]
        kept[side] = sum(m - (y / i.bincount()).nansum().item() for y, i in zip(squares, numbers, strict=True))
    yield row("its objective (ratio: published / ours)", size, unit="", ratio=kept["published"] / kept["ours"], **kept)


def views(n, repeats):
    """The two views of small images kept in memory, and of photographs in a loader worker; on one core."""
    threads, few, file = torch.get_num_threads(), max(2, n // 8), io.BytesIO()
    torch.set_num_threads(1)
    pixels, random_view = torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8), augment.RandomView(32, blur=False)
    images, transform = [*map(T.ToPILImage(), pixels)] * 2, published_view(32, blur=False)
    ours = functools.partial(random_view.two_views, pixels, random_view.draw(n, seed=0))
    yield compare(f"{n} images of 32 px", repeats, "two views, in memory", ours, lambda: [*map(transform, images)])
    photograph = F.interpolate(torch.rand(1, 3, 12, 16), (375, 500), mode="bicubic")[0] + 0.2 * torch.rand(375, 500)
    T.ToPILImage()((photograph - 0.1).clamp(0, 1)).save(file, "JPEG", quality=85)  # about as large as ImageNet's

    def decode(two_views):
        for _ in range(few):
            two_views(Image.open(file).convert("RGB"))

    crops, view = data.TwoCrops(224, scale=(0.2, 1.0)), published_view(224)
    both = functools.partial(decode, crops), functools.partial(decode, lambda image: (view(image), view(image)))
    yield compare(f"{few} JPEG of 500x375 to 224 px", repeats, "two views, decoding in a worker", *both)
    torch.set_num_threads(threads)


def networks(momentum_arch, n, arch, size, repeats):
    """The momentum update; then what saving costs: a pass with each batch saved, and with all kept in memory."""
    network = model.MoCo(functools.partial(model.build_encoder, momentum_arch), r=256).to(DEVICE)
    weights = [*network.encoder_k.parameters()], [*network.encoder_q.parameters()]
    published = functools.partial(published_momentum_update, *weights)
    yield compare(momentum_arch, repeats, "momentum update", network.momentum_update_key_encoder, published)
    given = made_up_loader(n, 512, 3, size, size), model.build_encoder(arch, small_images=True).to(**PLACE).eval()
    with tempfile.TemporaryDirectory() as directory, torch.autocast(DEVICE.type, torch.bfloat16):
        save = functools.partial(features.compute_features, *given, directory, DEVICE)
        keep = functools.partial(features.extract_features, *given, DEVICE)
        yield compare(f"{arch}, {size} px, M {n}", repeats, "feature pass", save, keep)


def stub_pass(n):
    """In a process of its own: the megabytes at the peak of a pass, and those held after k-means from the disk."""
    with tempfile.TemporaryDirectory() as directory:
        features.compute_features(made_up_loader(n, 1024, 128), lambda x: x, directory)
        at_peak = resident_mb("VmHWM")
        cluster.run_kmeans(features.load_features(directory, n, f"{directory}/features.npy"), [64], 0.2, niter=2)
        return at_peak, resident_mb("RssAnon")


def memory(ms):
    for m in ms:
        size, code = f"stub encoder, M {m}, D 128", f"import bench; print(*bench.stub_pass({m}))"
        seconds, done = timed(run, [sys.executable, "-c", code], cwd=ROOT / "benchmarks")
        at_peak, held = map(float, done.stdout.split())
        yield row("feature pass, memory of the process at its peak", size, unit="", peak_mb=at_peak)
        yield row("and, reading and k-means from the disk done, held", size, seconds, peak_mb=held)


def ranks(arch, size, batch, n, repeats):
    """One process against two, each with one thread."""
    speeds, launch = {1: [], 2: []}, [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    with tempfile.TemporaryDirectory() as root:
        options = [made_up_folder(root, n, size), *f"-a {arch} -b {batch} --amp --warmup 0 --epochs 3".split()]
        for i, world in enumerate([*speeds] * repeats):
            script = [f"--nproc_per_node={world}", "main_pcl.py", *options, "--exp-dir", f"{root}/{i}"]
            run([*launch, *script], env=os.environ | {"OMP_NUM_THREADS": "1"})
            log = np.genfromtxt(f"{root}/{i}/log.csv", delimiter=",", names=True)
            speeds[world].append(np.median(log["images_per_second"]))
    size, (one, two) = f"{arch}, {size} px, batch {batch}", map(np.array, speeds.values())
    yield row("one process, one thread", size, np.median(one), unit="images/s")
    yield row("two processes, one thread each", size, np.median(two), two / one, unit="images/s")


def growth(m, k, doublings, axes):
    """How cost grows: each size doubled a few times; in rows, and as curves on `axes`."""

    def of_kmeans(m, k, d):
        return min(timed(cluster.run_kmeans, made_up_features(m, d)[0], [k], 0.2, niter=5)[0] for _ in range(2))

    curves = {
        "k-means: M": (m, lambda m: of_kmeans(m, k, 128)),
        "k-means: K": (k, lambda k: of_kmeans(4 * m, k, 128)),
        "k-means: D": (32, lambda d: of_kmeans(2 * m, 2 * k, d)),
        "ProtoNCE: batch": (64, lambda batch: next(losses(1000 * k, [100 * k], 128, 16_384, batch, 5))["ours"]),
        "ProtoNCE: K": (50 * k, lambda k: next(losses(10 * k, [k], 128, 16_384, 256, 5))["ours"]),
    }
    for what, (first, measure) in curves.items():
        sizes, seconds = [first * 2**i for i in range(doublings)], []
        for size in sizes:
            seconds.append(measure(size))
            yield row(what, size, seconds[-1])
        axes.loglog(np.divide(sizes, first), np.divide(seconds, seconds[0]), "o-", label=f"{what}, {first} on")
    axes.loglog([1, 8], [1, 8], "k:", label="in proportion")
    axes.set(xlabel="size, relative", ylabel="time, relative")
    axes.legend(fontsize=8)


def markdown(row):
    from matplotlib.ticker import EngFormatter  # not above: the tests of this file do without

    number = EngFormatter(row["unit"], places=2)
    forms = {"what": str, "size": str, "ours": number, "share": "{:.1%}".format, "peak_mb": "{:.0f}".format}
    forms |= {"published": number}
    ratio = "{ratio:.3g} ({low:.3g} to {high:.3g})" if "low" in row else "{ratio:.4g}" if "ratio" in row else ""
    cells = [form(row[name]) if row.get(name) is not None else "" for name, form in forms.items()]
    return f"| {' | '.join(cells)} | {ratio.format(**row)} |"


def main():
    from matplotlib.figure import Figure

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--repeats", type=int, default=5, help="pairs of a comparison")
    parser.add_argument("--out", type=Path, default=ROOT / "results", help="where the three files go")
    args = parser.parse_args()
    torch.manual_seed(0)
    random.seed(0)
    q, repeats, few = args.quick, args.repeats, max(2, args.repeats // 2)
    m, ks, figure = 1_281_167, (25_000, 50_000, 100_000), Figure(figsize=(6, 4))  # ImageNet's sizes
    sections = [
        start(1 if q else few),
        steps("default run", "resnet18_w16", 8, 128, 256 if q else 1408, "--crop-min 0.5 --no-flip", few),
        *([] if q else [steps("CIFAR-10", "resnet18", 32, 256, 1024, "", few)]),
        losses(*((2000, (50, 100), 16, 32, 8) if q else (m, ks, 128, 16_384, 256)), 4 * repeats),
        clustering(*((2000, (50, 100), 16) if q else (m, ks, 128)), repeats),
        kmeans(*((2000, (20, 40), 16) if q else (m // 20, [k // 20 for k in ks], 128)), 2),
        views(16 if q else 256, repeats),
        networks(*(("resnet18", 600, "resnet18_w4", 8) if q else ("resnet50", 10_000, "resnet18", 16)), repeats),
        memory([1000, 2000] if q else [10**5, 10**6, 10**7]),
        ranks(*(("resnet18_w4", 8, 16, 64, 1) if q else ("resnet18", 32, 256, 512, few))),
        growth(*((400, 10, 2) if q else (8000, 200, 4)), figure.subplots()),
    ]
    lines = [f"{os.cpu_count()} cores ({os.uname().machine}), {DEVICE.type}, torch {torch.__version__}\n"]
    lines += ["| what | size | ours | of the step | memory, MB | published way | published / ours |", "|---" * 7 + "|"]
    print(*lines, sep="\n")
    args.out.mkdir(parents=True, exist_ok=True)
    with open(args.out / "bench.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for line in ({"unit": "s"} | line for section in sections for line in section):
            writer.writerow({name: f"{x:.4g}" if isinstance(x, float) else x for name, x in line.items()})
            lines.append(markdown(line))
            print(lines[-1], flush=True)
    (args.out / "bench.md").write_text("\n".join(lines) + "\n")
    figure.savefig(args.out / "bench_growth.png", dpi=100, bbox_inches="tight")


if __name__ == "__main__":
    main()
