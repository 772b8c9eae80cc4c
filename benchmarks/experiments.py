"""The report's questions as experiments that anyone can run again: arms that differ in one thing, several seeds each.

    python benchmarks/experiments.py --make-data path/to/cifar10 P       # 1,000 + 200 images a class, of train/, test/
    python benchmarks/experiments.py --make-data path/to/fashion-mnist F     # of its *-ubyte.gz; D is the digits
    python benchmarks/experiments.py recipe R14 --data P=P F=F D -n 2    # what is missing, two at a time
    python benchmarks/experiments.py --table recipe                      # mean ± standard deviation over the seeds

The experiments are in experiments.ini. What they share is run once, in a directory called after the command; a row
belongs to the arm that has its command. Of a run that stopped, its loss not finite, the row has the accuracies of the
last whole epoch alone. Minutes are the training steps'. `--patched NAME,NAME -- FLAGS` is `main_pcl.py FLAGS` with
changes that the product does not have, some of them wrong.
"""

import argparse
import configparser
import copy
import csv
import gzip
import importlib
import json
import math
import os
import subprocess
import sys
from functools import partial
from itertools import product
from multiprocessing.pool import ThreadPool
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from PIL import Image  # noqa: E402
from torch.nn import BatchNorm1d, Conv2d, Linear, ReLU, Sequential  # noqa: E402

import loss  # noqa: E402
import main_pcl  # noqa: E402
import model  # noqa: E402

PHOTOGRAPHS = "--image-size 16 --amp --cos --epochs 40 --warmup 10 -j 0"
SIZES = {"P": PHOTOGRAPHS, "F": PHOTOGRAPHS, "D": "--amp --cos --epochs 200 --warmup 20"}
CLASSES = 10
FIGURES = ["linear", "knn", "nmi", "ami", "acc", "acc_inst", "acc_proto"]
COLUMNS = ["experiment", "data", "arm", "seed", *FIGURES, "images_seen", "minutes", "command", "commit"]


def read_experiments(path):
    """{name: {"question": text, "data": letters, "arms": {name: flags}}} of the file, which says how it is read."""
    parser, experiments = configparser.ConfigParser(), {}
    parser.read(path)
    for name in parser.sections():
        arms = [line.partition("|") for line in parser[name]["arms"].strip().splitlines()]
        arms = {arm.strip(): f"{parser[name]['base']} {flags if bar else arm}" for arm, bar, flags in arms}
        experiments[name] = {**parser[name], "arms": arms}
    return experiments


EXPERIMENTS = read_experiments(Path(__file__).with_suffix(".ini"))


# -- ways that are wrong, or not in the product -------------------------------------------------------------------
class HeadB(main_pcl.MoCo):
    """ProtoNCE compares c = normalize(b(z_q)) with the prototypes, not q. predictor: b has no momentum twin; the plain
    keys are clustered. twin: it has one, whose outputs are clustered. fork: so too, but b is of the pooled features,
    beside the head a. In one process."""

    def __init__(self, encoder, d, r, *args, kind):
        super().__init__(encoder, d, 0 if kind == "twin" else r, *args)
        self.kind, a = kind, self.encoder_q.fc
        b = {
            "predictor": lambda: Sequential(Linear(d, d), BatchNorm1d(d), ReLU(), Linear(d, d)),
            "twin": lambda: Sequential(Linear(d, d), ReLU(), Linear(d, d)),
            "fork": lambda: copy.deepcopy(a).apply(lambda x: getattr(x, "reset_parameters", lambda: None)()),
        }
        a[0].b = b[kind]()  # no part of a[0](x)
        if kind == "twin":  # drawn after b, as when its rows were made
            self.queue = F.normalize(torch.randn(d, r), dim=0)
        a.register_forward_hook(lambda a, x, z: (z, a[0].b(x[0] if kind == "fork" else z)))
        self.encoder_k.fc = copy.deepcopy(a).requires_grad_(False)  # nothing takes a predictor's b
        main_pcl.proto_nce = lambda q, *others: loss.proto_nce(self.c, *others)

    def forward(self, im_q, im_k, clustering=False, features=False):
        z_q, c = self.encoder_q(im_q)
        with torch.no_grad():
            im_k, own_rows = self.batch_shuffle(im_k)
            z_k = [z[own_rows] for z in self.encoder_k(im_k)]
            model.move_running_statistics(self.norms)
        self.c = model._unit(c)
        return (model._unit(z_q), model._unit(z_k[0]), self._to_cluster(z_k))[: 3 if features else 2]

    def _to_cluster(self, z_k):
        return model._unit(z_k[self.kind != "predictor"])


def weighted_proto_nce(weight, *args, original=main_pcl.proto_nce):
    value, acc = original(*args)
    return weight * value + (1 - weight) * value.detach(), acc  # the gradient is weighted, what is logged is not


def cross_entropy_topk(logits, target, original=loss._cross_entropy):
    hits = logits.detach().topk(1)[1][:, 0] == target  # of more than 64 equal or NaN it names the first, on the CPU
    return original(logits, target)[0], 100 * hits.float().mean()


def info_nce_accuracy_of_one_step(q, k, queue, temperature, original=main_pcl.info_nce):
    """The loss as it is; the accuracy against keys of the same step, as many as the queue has or half the batch."""
    n = min(len(q) // 2, queue.shape[1])
    halves = [(q[:n], k[:n], k[-n:]), (q[-n:], k[-n:], k[:n])]
    acc = [original(queries, keys, negatives.T, temperature)[1] for queries, keys, negatives in halves]
    return original(q, k, queue, temperature)[0], sum(acc) / 2


def moco_in_the_range_of_fp16(*args, original=main_pcl.MoCo):
    """A layer's value above 65,504 is infinite, as in float16, which a CPU is ten times as slow in as in bfloat16."""
    moco = original(*args)
    for layer in moco.modules():
        if isinstance(layer, (Conv2d, Linear)):
            layer.register_forward_hook(lambda layer, x, y: y.half().to(y.dtype))
    return moco


class ClipScaled(torch.amp.GradScaler):
    """A scaler in bf16 as in fp16, which a CPU is slow in, and clip_grad_norm_(max_norm=1.0) before it unscales."""

    def __init__(self, device, enabled):
        super().__init__(device)

    def unscale_(self, optimizer):
        torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
        super().unscale_(optimizer)


PATCHES = {  # owner, name, and what takes its place
    **{kind: (main_pcl, "MoCo", partial(HeadB, kind=kind)) for kind in ("predictor", "twin", "fork")},
    "half-jitter": (main_pcl.RandomView, "jitter", property(lambda x: x.all / 2, lambda x, y: setattr(x, "all", y))),
    "weight-0.1": (main_pcl, "proto_nce", lambda *args: weighted_proto_nce(0.1, *args)),
    "weight-0.3": (main_pcl, "proto_nce", lambda *args: weighted_proto_nce(0.3, *args)),
    "one-step": (main_pcl, "info_nce", info_nce_accuracy_of_one_step),
    "fp16-range": (main_pcl, "MoCo", moco_in_the_range_of_fp16),
    "go-on": (main_pcl, "math", SimpleNamespace(**vars(math) | {"isfinite": lambda x: True})),
    "topk": (loss, "_cross_entropy", cross_entropy_topk),
    "clip-scaled": (torch.amp, "GradScaler", ClipScaled),
}


def command_of(data, flags, seed):
    """The run as a reader can type it. Of a flag given twice the last counts: equal runs have equal commands."""
    chosen = {}
    for word in f"{SIZES[data]} {flags} --seed {seed}".split():
        if word[0] in "-@":
            name = word.replace("--no-", "--")
            before, chosen[name] = chosen.get(name), [word]
        else:
            chosen[name].append(str(int(word[1:]) * int(before[1])) if word[0] == "x" else word)
    patches = ",".join(name[1:] for name in chosen if name[0] == "@")
    script = f"benchmarks/experiments.py --patched {patches} --" if patches else "main_pcl.py"
    words = [word for name in chosen if name[0] != "@" for word in chosen[name]]
    return " ".join(["python", script, *([] if data == "D" else [data]), *words])


def directory_of(command, runs):
    return runs.resolve() / command.removeprefix("python ").replace("/", "-").replace(" --", "_").replace(" ", "-")


def read(path):
    return list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []


def run(row, places, runs):
    """Begin or take up the run row["command"] and evaluate it. Returns the row with its figures, or None on failure."""
    directory, git = directory_of(row["command"], runs), ["git", "-C", str(ROOT)]
    directory.mkdir(parents=True, exist_ok=True)
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    commit += "-dirty" * (subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "*.py", ":!tests"]).returncode == 1)
    train = [places.get(word, word) for word in row["command"].split()[1:]]
    with open(directory / "output.txt", "a") as file:
        options = {"cwd": ROOT, "env": os.environ | {"OMP_NUM_THREADS": "1"}, "stdout": file, "stderr": file}
        status = subprocess.run([sys.executable, *train, "--exp-dir", directory, "--resume"], **options).returncode
        probe = [sys.executable, "eval_lincls.py", "--exp-dir", directory, "--no-baselines"]
        status = status or subprocess.run(probe, **options).returncode
        stopped = any(x in Path(file.name).read_text()[-500:] for x in ("stopped at epoch", "are not finite"))
        if status and not stopped:
            return print(f"failed, see {file.name}", file=sys.stderr)
    log, args = read(directory / "log.csv"), json.loads((directory / "args.json").read_text())
    row = row | {x: log[-1][x] for x in ("acc_inst", "acc_proto") if log and "lightly" not in row["command"]}
    if not status:
        found = json.loads((directory / "eval.json").read_text())["figures"]["trained"]
        row |= {"linear": found["linear"], "knn": next(found[x] for x in found if x.startswith("kNN"))}
        row |= {x.lower(): found[f"{x} {CLASSES}"] for x in ("NMI", "AMI", "acc")}
    row |= {x: f"{float(row[x]):.2f}" for x in FIGURES if x in row}
    n = len(main_pcl.build_datasets(args["data"], args["image_size"]).train) // args["batch_size"] * args["batch_size"]
    minutes = sum(n / 60 / float(line["images_per_second"]) for line in log)
    row["images_seen"] = len(log) * n * (4 if args["symmetric"] else 2)
    return row | {"minutes": f"{minutes:.1f}", "commit": commit}


def rows_of(name, rows):
    of_name = [row for row in rows if row["experiment"] == name]
    for data, (arm, flags) in product(EXPERIMENTS[name]["data"], EXPERIMENTS[name]["arms"].items()):
        if fits := [row for row in of_name if row["command"] == command_of(data, flags, row["seed"])]:
            yield data, arm, fits


def table(name, rows):
    """In Markdown, mean ± standard deviation over the seeds; nothing where a run stopped before its evaluation. Δ is
    the difference from the data set's first arm, seed by seed: mean ± standard error."""
    columns = ["data", "arm", "seeds", "million images", "linear", "kNN", "acc", "acc_inst"]
    columns += ["Δ linear", "Δ kNN", "Δ acc"]
    lines, first = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"], {}
    for data, arm, fits in rows_of(name, rows):
        stopped, millions = sum(not row["linear"] for row in fits), [int(row["images_seen"]) / 1e6 for row in fits]
        cells = [data, arm, f"{len(fits)}" + f", {stopped} stopped" * (stopped > 0), f"{np.mean(millions):.3g}"]
        for x in ("linear", "knn", "acc", "acc_inst"):
            cells.append(mean_and_spread([float(row[x]) for row in fits if row[x]]))
        pairs = [(row, first[data][row["seed"]]) for row in fits if row["seed"] in first.get(data, ())]
        for x in ("linear", "knn", "acc"):
            values = [float(row[x]) - float(other[x]) for row, other in pairs if row[x] and other[x]]
            cells.append(mean_and_spread(values, "+.1f", len(values) ** 0.5))
        first.setdefault(data, {row["seed"]: row for row in fits})
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def mean_and_spread(values, form=".1f", divisor=1):
    """As text, the mean of `values` ± their standard deviation over `divisor`; one value as it is, of none nothing."""
    if len(values) < 2:
        return "".join(f"{x:{form}}" for x in values)
    return f"{np.mean(values):{form}} ± {np.std(values, ddof=1) / divisor:.1f}"


def draw(name, rows, runs, path):
    """The curves of those runs that are in the directory `runs`. If there is none, the picture stays as it is."""
    from matplotlib.figure import Figure

    curves = []
    for data, arm, fits in rows_of(name, rows):
        logs = [line for row in fits for line in read(directory_of(row["command"], runs) / "log.csv")]
        curves += [(data, arm, logs)] * bool(logs)
    if not curves:
        return
    data = list(dict.fromkeys(where for where, _, _ in curves))
    figure = Figure(figsize=(16, 4 * len(data)), layout="tight")
    figure.suptitle(EXPERIMENTS[name]["question"])
    axes = dict(zip(data, figure.subplots(len(data), 3, squeeze=False), strict=True))
    for where, arm, logs in curves:
        i = list(EXPERIMENTS[name]["arms"]).index(arm)
        for ax, curve in zip(axes[where], ("knn", "acc_inst", "loss_inst"), strict=True):
            epochs = sorted({int(x["epoch"]) for x in logs if x[curve]})
            seen = [[float(x[curve]) for x in logs if int(x["epoch"]) == epoch] for epoch in epochs]
            ax.plot(epochs, [*map(np.mean, seen)], ("-", "--", ":")[i // 10 % 3], color=f"C{i % 10}", label=arm)
            ax.fill_between(epochs, [*map(min, seen)], [*map(max, seen)], color=f"C{i % 10}", alpha=0.15)
            ax.set(title=f"{where}: {curve}", xlabel="epoch")
        ax.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=100)


def run_missing(args, path):
    """Runs each command that lacks a row, once, and adds its rows: one for each of the experiments that it is of."""
    places = {data: str(Path(place).resolve()) for data, _, place in (word.partition("=") for word in args.data)}
    rows, jobs, key = read(path), {}, itemgetter("experiment", "command")
    for name, experiment in ((x, EXPERIMENTS[x]) for x in args.experiments):
        chosen = [x for x in args.arms or experiment["arms"] if x in experiment["arms"]]
        for data, arm, seed in product([x for x in experiment["data"] if x in places], chosen, args.seeds):
            command = command_of(data, experiment["arms"][arm], seed)
            row = {"experiment": name, "data": data, "arm": arm, "seed": seed, "command": command}
            if key(row) not in map(key, rows):
                jobs.setdefault(command, []).append(row)
    done = {row["command"]: row for row in rows}  # of other experiments, too

    def figures(job):
        command, (row, *_) = job
        return command, done[command] if command in done else run(row, places, args.runs)

    with ThreadPool(args.n) as pool:  # its end, as at a Ctrl-C, which reaches the runs too, is that of the queue
        for command, found in pool.imap_unordered(figures, jobs.items()):
            stored = set(map(key, read(path)))  # another call may have written the same meanwhile
            with open(path, "a", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
                writer.writerows([dict(zip(COLUMNS, COLUMNS, strict=True))] * (not file.tell()))
                writer.writerows(found | row for row in jobs[command] if found and key(row) not in stored)


def make_data(source, out):
    """The first 1,000 training and 200 held-out images a class, of an ImageFolder or of Fashion-MNIST's files."""
    for part, stem, n in (("train", "train", 1000), ("test", "t10k", 200)):
        for path in [x for folder in (source / part).glob("*/") for x in sorted(folder.iterdir())[:n]]:
            (out / part / path.parent.name).mkdir(parents=True, exist_ok=True)
            (out / part / path.parent.name / path.name).write_bytes(path.read_bytes())
        if not (source / part).exists():
            files = [source / f"{stem}-{x}-ubyte.gz" for x in ("images-idx3", "labels-idx1")]
            pixels, labels = (np.frombuffer(gzip.decompress(x.read_bytes()), np.uint8) for x in files)
            for i in [i for label in range(CLASSES) for i in np.flatnonzero(labels[8:] == label)[:n]]:
                (folder := out / part / str(labels[8 + i])).mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels[16:].reshape(-1, 28, 28)[i]).save(folder / f"{i:05}.png")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--patched"]:
        for name in argv[1].split(","):
            elsewhere = {"lightly": "peers", "published": "published"}.get(name.partition("-")[0])
            setattr(*(importlib.import_module(elsewhere).PATCHES if elsewhere else PATCHES)[name])
        return main_pcl.main(argv[3:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("experiments", nargs="*", metavar="NAME", help=f"of {', '.join(EXPERIMENTS)}")
    add("-n", type=int, default=1, help="runs at a time, of one thread each")
    add("--data", nargs="*", default=["D"], metavar="P=DIR", help="the data sets to run on, and where they are")
    add("--arms", nargs="*", help="default: all")
    add("--seeds", nargs="*", type=int, default=[0, 1, 2])
    add("--runs", type=Path, default=Path("runs"), help="directory of the runs")
    add("--out", type=Path, default=ROOT / "results", help="of rows and pictures; where there are none, all runs anew")
    add("--table", action="store_true", help="print the table only")
    add("--make-data", nargs=2, type=Path, metavar=("SOURCE", "OUT"))
    args = parser.parse_args(argv)
    if args.make_data:
        return make_data(*args.make_data)
    if unknown := set(args.experiments) - EXPERIMENTS.keys():
        parser.error(f"no experiment is called {' or '.join(unknown)}")
    path = args.out / "experiments.csv"
    if not args.table:
        run_missing(args, path)
    for name in args.experiments:
        if not args.table:
            draw(name, read(path), args.runs, args.out / f"{name}.png")
        print(table(name, read(path)))


if __name__ == "__main__":
    main()
