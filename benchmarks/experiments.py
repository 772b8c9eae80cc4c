"""Run the experiments behind results/: arms that differ in one thing, each with several seeds.

    # make the data: C is downloaded; P and F are 1,000 training and 200 held-out images per class
    python benchmarks/experiments.py --make-data cifar10 C
    python benchmarks/experiments.py --make-data C P                       # from train/ and test/
    python benchmarks/experiments.py --make-data path/to/fashion-mnist F   # from its *-ubyte.gz

    # train and evaluate what has no row in results/experiments.csv yet, two runs at a time;
    # then draw the curves and print the tables
    python benchmarks/experiments.py recipe R14 --data P=P F=F -n 2

    # print a table, run nothing
    python benchmarks/experiments.py --table recipe

Each data set has a letter: C is all of CIFAR-10; P is photographs, a part of it; F is clothes
(Fashion-MNIST); D is the digits in assets/. L and M are long-tailed: 10,000 images of CIFAR-10 and
of Fashion-MNIST, whose largest class has a hundred times as many as the smallest. experiments.ini
lists the arms of each experiment, and the data sets it runs on.

A run is identified by its command and has one row in experiments.csv. The row belongs to the arms
with its command, in all experiments. If a run stops early because its loss is not finite, its row
has only the training accuracies of its last whole epoch. The column `minutes` is the time spent on
training steps.

The exit status is 2 if the command line or the data is wrong, which is checked before the first
run, and 1 if runs have failed.

A patch is a change for which main_pcl.py has no flag. Some patches are deliberate mistakes. To try
one by hand, give its name, then any flags of main_pcl.py:

    python benchmarks/experiments.py --patched twin -- --amp --cos
"""

import configparser
import copy
import csv
import difflib
import gzip
import importlib
import json
import math
import os
import subprocess
import sys
import tempfile
import textwrap
import zlib
from collections import Counter
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from PIL import Image  # noqa: E402
from torch.nn import BatchNorm1d, Conv2d, Linear, Module, ReLU, Sequential  # noqa: E402
from torchvision.datasets import CIFAR10  # noqa: E402

import data as data_sets  # noqa: E402
import loss  # noqa: E402
import main_pcl  # noqa: E402
import model  # noqa: E402
from runtime import cli  # noqa: E402

# the flags that all runs on a data set have
SMALL_PHOTOGRAPHS = "--image-size 16 --amp --cos --epochs 40 --warmup 10 -j 0"
DATA_FLAGS = {
    "C": "--amp --cos -j 0",
    "P": SMALL_PHOTOGRAPHS,
    "F": SMALL_PHOTOGRAPHS,
    "L": SMALL_PHOTOGRAPHS,
    "M": SMALL_PHOTOGRAPHS,
    "D": "--amp --cos --epochs 200 --warmup 20",
}
CLASSES = 10  # every data set has ten

# probes with few labels: a fraction of them, or a number per class (--labels of eval_lincls.py)
FEW_LABELS = {
    "C": ["0.01"],
    "P": ["1", "5", "20"],
    "F": ["1", "5", "20"],
    "L": ["20"],
    "M": ["20"],
}

# images of each class
BALANCED = [1000] * CLASSES  # training images of P and F
LONG_TAILED = [round(4030 / 100 ** (i / 9)) for i in range(CLASSES)]  # of L and M, also 10,000
HELD_OUT = [200] * CLASSES

# experiments.csv
FIGURES = ("linear", "knn", "nmi", "ami", "acc", "acc_inst", "acc_proto")
COLUMNS = ["data", "seed", *FIGURES, "other_linear", "images_seen", "minutes", "command", "commit"]

# the tables, {column: figure}
MEANS = {"linear": "linear", "kNN": "knn", "acc": "acc", "acc_inst": "acc_inst"}
DIFFERENCES = {"Δ linear": "linear", "Δ kNN": "knn", "Δ acc": "acc"}

# the curves, {figure: title}
CURVES = {"knn": "kNN accuracy (%)", "acc_inst": "acc_inst (%)", "loss_inst": "loss_inst"}
COLUMNS_PER_BLOCK = 3  # panels of one figure side by side
PANEL_WIDTH = 1.85  # inches
PANEL_HEIGHT = 1.5
TITLE_WIDTH = 36  # characters per line of a panel's title

# what main_pcl.py and eval_lincls.py print last if the loss or the features are not finite
DIVERGED = ("stopped at epoch", "are not finite")


def read_experiments(path):
    """The experiments in the file `path`, whose first lines explain its format.

    Returns {name: {"question": text, "data": letters, "arms": {arm: flags}}}.
    """
    parser = configparser.ConfigParser()
    parser.read(path)
    experiments = {}
    for name in parser.sections():
        section = parser[name]
        arms = {}
        for line in section["arms"].strip().splitlines():
            arm, bar, flags = line.partition("|")
            if not bar:
                flags = arm
            arms[arm.strip()] = f"{section['base']} {flags}"
        experiments[name] = {"question": section["question"], "data": section["data"], "arms": arms}
    return experiments


LOGS = ROOT / "results" / "logs"  # logs of runs that take too long to repeat for a picture
EXPERIMENTS = read_experiments(Path(__file__).with_suffix(".ini"))


# -- patches: a head on the query side -------------------------------------------------------------
class TwoHeads(Module):
    """Head a and head b: pooled features (N, dim_mlp) -> their outputs, (N, dim) each."""

    def __init__(self, a, b, b_takes_pooled):
        super().__init__()
        self.a = a
        self.b = b
        self.b_takes_pooled = b_takes_pooled

    def forward(self, pooled):
        z = self.a(pooled)
        if self.b_takes_pooled:
            return z, self.b(pooled)
        return z, self.b(z)


class HeadB(main_pcl.MoCo):
    """MoCo with a head b on the query side, whose output c ProtoNCE compares with the prototypes.

    kind:
        predictor: b takes a's output. The keys are clustered; the momentum copy of b is not used.
        twin: b takes a's output. The output of b's momentum copy is clustered.
        fork: b takes the pooled features, like a. The output of b's momentum copy is clustered.
    For one process, and heads with a hidden layer (--mlp, the default).
    """

    def __init__(self, base_encoder, dim, r, kind, **options):
        # the twin's queue is drawn after b, to match the stored runs
        early_r = 0 if kind == "twin" else r
        super().__init__(base_encoder, dim, early_r, **options)
        self.kind = kind

        # head b, and the key encoder's copies of both heads
        a = self.encoder_q.fc
        if kind == "predictor":
            b = Sequential(Linear(dim, dim), BatchNorm1d(dim), ReLU(), Linear(dim, dim))
        elif kind == "twin":
            b = Sequential(Linear(dim, dim), ReLU(), Linear(dim, dim))
            self.queue = F.normalize(torch.randn(dim, r), dim=0)
        else:
            b = copy.deepcopy(a)
            for layer in b:
                if isinstance(layer, Linear):
                    layer.reset_parameters()
        self.encoder_q.fc = TwoHeads(a, b, b_takes_pooled=kind == "fork")
        self.encoder_k.fc = copy.deepcopy(self.encoder_q.fc).requires_grad_(False)

    def forward(self, im_q, im_k, clustering=False):
        z_q, b_q = self.encoder_q(im_q)
        with torch.no_grad():
            im_k, own_rows = self.batch_shuffle(im_k)
            z_k, b_k = self.encoder_k(im_k)
            z_k = z_k[own_rows]
            b_k = b_k[own_rows]
            model.move_running_statistics(self.norms)
        return unit(z_q), unit(z_k), unit(b_q), self._features_to_cluster((z_k, b_k))

    @torch.no_grad()
    def encode(self, images):
        self.eval()
        features = self._features_to_cluster(self.encoder_k(images))
        self.train()
        return features

    def _features_to_cluster(self, outputs):
        """outputs: of the key encoder's two heads."""
        z_k, b_k = outputs
        if self.kind == "predictor":
            return unit(z_k)
        return unit(b_k)


def unit(x):
    """Rows of unit length in float32."""
    return F.normalize(x.float(), dim=1)


# -- patches: augmentation, losses, precision ------------------------------------------------------
class HalfJitter(main_pcl.RandomView):
    """The random view with half the colour jitter."""

    def __post_init__(self):
        super().__post_init__()
        self.jitter = self.jitter / 2


class LessGrayscale(main_pcl.RandomView):
    """The random view with half the chance of losing its colour."""

    def __post_init__(self):
        super().__post_init__()
        self.chances["grayscale"] /= 2


def weighted_proto_nce(weight, *args):
    """ProtoNCE with a weight on its gradient. The loss in the log has no weight."""
    value, acc = loss.proto_nce(*args)
    return weight * value + (1 - weight) * value.detach(), acc


def info_nce_within_step(q, k, queue, temperature):
    """InfoNCE whose accuracy is measured against keys of the same step, not of earlier steps.

    There are as many negatives as keys in the queue, or half a batch if that is less.
    """
    n = min(len(q) // 2, queue.shape[1])
    _, first_acc = loss.info_nce(q[:n], k[:n], k[-n:].T, temperature)
    _, last_acc = loss.info_nce(q[-n:], k[-n:], k[:n].T, temperature)
    value, _ = loss.info_nce(q, k, queue, temperature)
    return value, (first_acc + last_acc) / 2


class Float16Range(main_pcl.MoCo):
    """MoCo whose layers overflow above 65,504, as in float16.

    Shows float16's overflows on a CPU, where float16 itself is ten times slower than bfloat16.
    """

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        for layer in self.modules():
            if isinstance(layer, (Conv2d, Linear)):
                layer.register_forward_hook(overflow)


def overflow(layer, inputs, output):
    """A forward hook: make values infinite that float16 cannot hold."""
    return output.half().to(output.dtype)


def go_on(run, step, figures):
    """In place of stop_if_diverged: continue, whatever the figures are."""


def as_on_a_gpu(args, images):
    """In place of steps_at_once: make the views of as many steps in one go as a GPU does."""
    return main_pcl.STEPS_AT_ONCE


class ClipScaled(torch.amp.GradScaler):
    """A known mistake: clip the gradients to norm 1 while they are still scaled.

    The scaler is always on, in bfloat16 too, because float16 is slow on a CPU.
    """

    def __init__(self, device, enabled):
        super().__init__(device)

    def unscale_(self, optimizer):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        super().unscale_(optimizer)


def cross_entropy_with_topk(logits, target, original=loss._cross_entropy):
    """A known mistake: the accuracy by topk, as in the published code.

    If more than 64 logits are all equal, or all nan, topk on a CPU takes the first as the largest.
    In InfoNCE the first is the target, so a collapsed network has an accuracy of 100 %.
    """
    hits = logits.detach().topk(1)[1][:, 0] == target  # first, because `original` overwrites logits
    value, _ = original(logits, target)
    return value, hits


# {patch: (module, name, what takes its place)}
PATCHES = {
    "predictor": (main_pcl, "MoCo", partial(HeadB, kind="predictor")),
    "twin": (main_pcl, "MoCo", partial(HeadB, kind="twin")),
    "fork": (main_pcl, "MoCo", partial(HeadB, kind="fork")),
    "half-jitter": (main_pcl, "RandomView", HalfJitter),
    "grayscale-0.1": (main_pcl, "RandomView", LessGrayscale),
    "weight-0.1": (main_pcl, "proto_nce", partial(weighted_proto_nce, 0.1)),
    "weight-0.3": (main_pcl, "proto_nce", partial(weighted_proto_nce, 0.3)),
    "one-step": (main_pcl, "info_nce", info_nce_within_step),
    "fp16-range": (main_pcl, "MoCo", Float16Range),
    "go-on": (main_pcl, "stop_if_diverged", go_on),
    "clip-scaled": (main_pcl, "GradScaler", ClipScaled),
    "gpu-views": (main_pcl, "steps_at_once", as_on_a_gpu),
    # a mistake of the published code inside both losses: no name of main_pcl reaches there
    "topk": (loss, "_cross_entropy", cross_entropy_with_topk),
}
# {beginning of a patch's name: the module that has it in its PATCHES}. A module is imported only if
# needed, because peers needs lightly, and published the published code.
PATCHES_ELSEWHERE = {"lightly-": "peers", "small-": "small_crops", "published": "published"}


def run_patched(words):
    """Apply some patches, then run main_pcl.py.

    words: the names of the patches, separated by commas; "--"; the command line of main_pcl.py.
    """
    if len(words) < 2 or words[1] != "--":
        cli.fail("a patched run is written --patched NAME,NAME -- FLAGS")
    for name in words[0].split(","):
        module, attribute, replacement = find_patch(name)
        setattr(module, attribute, replacement)
    return main_pcl.main(words[2:])


def find_patch(name):
    """(module, name, what takes its place) of a patch."""
    patches = PATCHES
    for beginning, module in PATCHES_ELSEWHERE.items():
        if name.startswith(beginning):
            patches = importlib.import_module(module).PATCHES
    if name not in patches:
        cli.fail(f"no patch is called {name}; choose one of {', '.join(patches)}")
    return patches[name]


# -- commands and rows -----------------------------------------------------------------------------
def command_of(data, flags, seed):
    """The command of a run, as one would type it.

    If a flag is given several times, the last one counts, so equal runs have equal commands.
    data: the letter of the data set. In the command it stands for the path.
    flags: as in experiments.ini.
    """
    chosen = {}  # {flag or patch: its words}
    for word in f"{DATA_FLAGS[data]} {flags} --seed {seed}".split():
        if word[0] in "-@":
            name = word.replace("--no-", "--")
            earlier = chosen.get(name)
            chosen[name] = [word]
        elif word[0] == "x" and word[1:].isdigit():  # a multiple of the flag's earlier value
            chosen[name].append(str(int(word[1:]) * int(earlier[1])))
        else:
            chosen[name].append(word)

    patches = []
    words = []
    for name, its_words in chosen.items():
        if name[0] == "@":
            patches.append(name[1:])
        else:
            words += its_words
    command = ["python", "main_pcl.py"]
    if patches:
        command = ["python", "benchmarks/experiments.py", "--patched", ",".join(patches), "--"]
    if data != "D":
        command.append(data)
    return " ".join([*command, *words])


def directory_of(command, runs):
    """The run's directory in the directory `runs`, named after its command."""
    name = command.removeprefix("python ").replace("/", "-").replace(" --", "_").replace(" ", "-")
    return runs.resolve() / name


def read(path):
    """The rows of a CSV file as dicts of text. A file that is not there has none."""
    if not path.exists():
        return []
    return list(csv.DictReader(path.read_text().splitlines()))


def rows_of(name, rows):
    """The rows of an experiment, arm by arm: yields (data, arm, rows of all seeds in order).

    Arms without rows are left out.
    """
    stored = {row["command"]: row for row in rows}
    seeds = sorted({int(row["seed"]) for row in rows})
    for data in EXPERIMENTS[name]["data"]:
        for arm, flags in EXPERIMENTS[name]["arms"].items():
            commands = [command_of(data, flags, seed) for seed in seeds]
            found = [stored[command] for command in commands if command in stored]
            if found:
                yield data, arm, found


# -- running ---------------------------------------------------------------------------------------
def run_missing(args, places, path):
    """Run each command without a row in the file `path`, and append its row.

    places: {letter: path} of the data sets to run on.
    Returns the number of runs that failed.
    """
    jobs = list_jobs(args, places, {row["command"] for row in read(path)})
    check_patches(job["command"] for job in jobs)
    failed = 0

    # Ctrl-C ends the runs and leaves this block, which drops the jobs that are left
    with ThreadPool(args.n) as pool:
        for row in pool.imap_unordered(partial(run, places=places, runs=args.runs), jobs):
            if row is None:
                failed += 1
            else:
                append(row, path)
    return failed


def list_jobs(args, places, stored):
    """The runs to do, each once: a list of {"data": letter, "seed": seed, "command": command}.

    places: {letter: path} of the data sets to run on. stored: the commands that have a row.
    """
    jobs = {}  # {command: job}
    for name in args.experiments:
        arms = EXPERIMENTS[name]["arms"]
        chosen = [arm for arm in args.arms or arms if arm in arms]
        for data in EXPERIMENTS[name]["data"]:
            if data not in places:
                continue
            for arm in chosen:
                for seed in args.seeds:
                    command = command_of(data, arms[arm], seed)
                    if command not in stored:
                        jobs[command] = {"data": data, "seed": seed, "command": command}
    return list(jobs.values())


def append(row, path):
    """Append a row to the file `path`, unless another process has written it meanwhile."""
    if row["command"] in {stored["command"] for stored in read(path)}:
        return
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow(row)


def run(job, places, runs):
    """Train and evaluate with job["command"]. A run that was interrupted continues.

    job: one of list_jobs. places: {letter: path} of the data sets. runs: the directory of all runs.
    Returns the row of experiments.csv, or None if the run failed.
    """
    directory = directory_of(job["command"], runs)
    directory.mkdir(parents=True, exist_ok=True)
    output = directory / "output.txt"
    commits = commits_of(directory)

    words = [places.get(word, word) for word in job["command"].split()[1:]]
    status = launch([*words, "--exp-dir", directory, "--resume"], output)
    if status == 0:
        evaluation = ["eval_lincls.py", "--exp-dir", directory, "--no-baselines"]
        if job["data"] in FEW_LABELS:
            evaluation += ["--labels", *FEW_LABELS[job["data"]]]
        status = launch(evaluation, output)
    last_words = output.read_text()[-2000:]
    if status != 0 and not any(message in last_words for message in DIVERGED):
        print(f"failed, see {output}", file=sys.stderr)
        return None

    figures = training_figures(directory)
    if "lightly" in job["command"]:  # these methods have no such accuracies
        figures = {}
    if status == 0:
        figures |= evaluation_figures(directory)
    images_seen, minutes = training_cost(directory)
    costs = {"images_seen": images_seen, "minutes": f"{minutes:.1f}", "commit": commits}
    return job | figures | costs


def commits_of(directory):
    """The commits that have worked on a run, in order. Adds the current one."""
    path = directory / "commits.txt"
    found = path.read_text().split() if path.exists() else []
    found = list(dict.fromkeys([*found, current_commit()]))
    path.write_text("\n".join(found))
    return " ".join(found)


def current_commit():
    """The short hash of the commit; it ends in -dirty if a source file has changed since."""
    git = ["git", "-C", str(ROOT)]
    command = [*git, "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "*.py", ":!tests"])
    if changed.returncode == 1:
        commit += "-dirty"
    return commit


def launch(words, output):
    """Run a script of the project, with one thread. Appends what it prints to the file `output`.

    words: the script and its arguments. Returns the exit status.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(output, "a") as file:
        done = subprocess.run(
            [sys.executable, *words], cwd=ROOT, env=environment, stdout=file, stderr=file
        )
    return done.returncode


def training_figures(directory):
    """The training accuracies of the last epoch in a run's log, as text; {} if it has no epoch."""
    log = read(directory / "log.csv")
    if not log:
        return {}
    return {name: f"{float(log[-1][name]):.2f}" for name in ("acc_inst", "acc_proto")}


def evaluation_figures(directory):
    """The figures that eval_lincls.py has found, as text, {column of experiments.csv: text}."""
    table = json.loads((directory / "eval.json").read_text())["figures"]["trained"]
    figures = {"linear": table["linear"]}
    figures["knn"] = next(table[name] for name in table if name.startswith("kNN"))
    for name in ("NMI", "AMI", "acc"):
        figures[name.lower()] = table[f"{name} {CLASSES}"]
    figures = {name: f"{value:.2f}" for name, value in figures.items()}
    others = []
    for name, value in table.items():
        if name.startswith("linear, ") and not name.endswith(", std"):
            which = name.removeprefix("linear, ").replace("0.01 of", "1 % of")
            others.append(f"{which}: {value:.2f}")
    figures["other_linear"] = "; ".join(others)
    return figures


def other_linear_of(row):
    """The other linear accuracies of a row, {name: percent}.

    They are those with few labels, or on frequent, middle and rare classes.
    """
    found = {}
    for pair in filter(None, row["other_linear"].split("; ")):
        which, percent = pair.split(": ")
        found[which] = float(percent)
    return found


def training_cost(directory):
    """The number of large views that a run's encoders have processed, and the minutes of its steps.

    Small crops are not counted.
    """
    log = read(directory / "log.csv")
    args = json.loads((directory / "args.json").read_text())
    images = main_pcl.build_datasets(args["data"], args["image_size"]).train
    steps = len(images) // args["batch_size"]
    n = steps * args["batch_size"]  # images per epoch
    passes = 4 if args["symmetric"] else 2  # of an image through an encoder, per epoch
    seconds = [n / float(epoch["images_per_second"]) for epoch in log]
    return len(log) * n * passes, sum(seconds) / 60


# -- tables ----------------------------------------------------------------------------------------
def table(name, rows):
    """The table of an experiment in Markdown: mean ± standard deviation over the seeds.

    Δ is the difference from the data set's first arm, seed by seed: mean ± standard error. Runs
    that stopped before their evaluation are counted, but have no accuracies.
    """
    arms = list(rows_of(name, rows))
    others = dict.fromkeys(
        which for *_, found in arms for row in found for which in other_linear_of(row)
    )
    columns = ["data", "arm", "seeds", "million images", *MEANS]
    columns += [f"linear, {which}" for which in others]
    columns += DIFFERENCES
    lines = [markdown_line(columns), "|---" * len(columns) + "|"]
    first_arms = {}  # {data: {seed: row of the first arm}}
    for data, arm, found in arms:
        seeds = str(len(found))
        stopped = sum(not row["linear"] for row in found)
        if stopped:
            seeds += f", {stopped} stopped"
        millions = np.mean([int(row["images_seen"]) / 1e6 for row in found])
        cells = [data, arm, seeds, f"{millions:.3g}"]

        for figure in MEANS.values():
            values = [float(row[figure]) for row in found if row[figure]]
            cells.append(mean_and_spread(values))
        for which in others:
            probes = [other_linear_of(row) for row in found]
            values = [probe[which] for probe in probes if which in probe]
            cells.append(mean_and_spread(values))

        first_arm = first_arms.get(data, {})
        for figure in DIFFERENCES.values():
            values = differences(found, first_arm, figure)
            cells.append(mean_and_spread(values, form="+.1f", divisor=len(values) ** 0.5))
        first_arms.setdefault(data, {row["seed"]: row for row in found})
        lines.append(markdown_line(cells))
    return "\n".join(lines)


def differences(rows, first_arm, figure):
    """How much `figure` of each row exceeds that of the first arm's row with the same seed."""
    values = []
    for row in rows:
        other = first_arm.get(row["seed"])
        if other is not None and row[figure] and other[figure]:
            values.append(float(row[figure]) - float(other[figure]))
    return values


def mean_and_spread(values, form=".1f", divisor=1):
    """The mean of `values` ± their standard deviation over `divisor`, as text.

    form: format of the mean. One value stands alone; no value gives "".
    """
    if len(values) == 0:
        return ""
    if len(values) == 1:
        return f"{values[0]:{form}}"
    return f"{np.mean(values):{form}} ± {np.std(values, ddof=1) / divisor:.1f}"


def markdown_line(cells):
    """A line of a table in Markdown."""
    return f"| {' | '.join(cells)} |"


# -- curves ----------------------------------------------------------------------------------------
def draw(name, rows, runs, path):
    """Draw the curves of an experiment.

    runs: the directory of the runs. If the log of a run is missing, the picture at `path` stays as
        it is, and a line says so.
    """
    logs = {}  # {data: {arm: rows of the log.csv of all seeds}}
    first_rows = {}  # {arm: row of its first seed}
    missing = 0
    for data, arm, found in rows_of(name, rows):
        epochs = []
        for row in found:
            directory = directory_of(row["command"], runs)
            log = read(directory / "log.csv") or read(LOGS / f"{directory.name}.csv")
            missing += not log
            epochs += log
        logs.setdefault(data, {})[arm] = epochs
        first_rows[arm] = found[0]
    if not logs:
        return
    if missing:
        print(f"no new {path.name}: {runs} lacks the logs of {missing} runs\n")
        return
    figure = draw_worth(logs["C"], first_rows) if name == "C" else draw_blocks(logs)
    figure.suptitle(EXPERIMENTS[name]["question"])
    figure.savefig(path, dpi=100)


def draw_blocks(logs):
    """A figure with a block of small panels for each data set and figure.

    A block has a panel per arm, with the data set's first arm in grey in each.
    logs: {data: {arm: rows of the log.csv of all seeds}}.
    """
    from matplotlib.figure import Figure

    # a block is as high as its panels and its title
    heights = [max(2, grid_of(logs_of_arms)[0]) + 0.4 for logs_of_arms in logs.values()]
    width = PANEL_WIDTH * COLUMNS_PER_BLOCK * len(CURVES)
    height = PANEL_HEIGHT * (sum(heights) + 0.3)
    figure = Figure(figsize=(width, height), layout="constrained")
    blocks = figure.subfigures(len(logs), len(CURVES), squeeze=False, height_ratios=heights)
    for row, (data, logs_of_arms) in zip(blocks, logs.items(), strict=True):
        for block, (curve, title) in zip(row, CURVES.items(), strict=True):
            draw_block(block, logs_of_arms, curve, f"{data}: {title}")
    return figure


def grid_of(logs):
    """The rows and columns of panels in a block. The first arm has no panel of its own."""
    panels = max(1, len(logs) - 1)
    return math.ceil(panels / COLUMNS_PER_BLOCK), min(panels, COLUMNS_PER_BLOCK)


def draw_block(block, logs, curve, title):
    """Draw one figure of all arms, with the same axes in every panel.

    block: a subfigure of matplotlib. logs: {arm: rows of the log.csv of all seeds}; the first arm
    is the one in grey. curve: name of the figure.
    """
    base, *others = logs
    block.suptitle(f"{title}; grey: {base}", fontsize=9)
    rows, columns = grid_of(logs)
    panels = block.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for ax in panels:
        draw_curve(ax, logs[base], curve, "0.55")
        ax.tick_params(labelsize=6)
        ax.grid(alpha=0.3)
    for ax, arm in zip(panels, others, strict=False):
        draw_curve(ax, logs[arm], curve, "C0")
        ax.set_title(textwrap.fill(arm, TITLE_WIDTH, break_on_hyphens=False), fontsize=6.5)

    # the lowest panel of each column has the epochs, and the cells below it are empty
    used = max(1, len(others))
    for ax in panels[used - columns : used]:
        ax.tick_params(labelbottom=True)
        ax.set_xlabel("epoch", fontsize=7)
    for ax in panels[used:]:
        ax.remove()


def draw_worth(logs, rows):
    """A figure of kNN accuracy over the epochs, and of what the last features are worth.

    logs: {arm: rows of the log.csv of all seeds}. rows: {arm: row of its first seed}.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    curves, bars = figure.subplots(1, 2, width_ratios=(1, 1.3))
    width = 0.8 / len(logs)
    for i, (arm, log) in enumerate(logs.items()):
        draw_curve(curves, log, "knn", f"C{i}")
        heights = accuracies_by_name(rows[arm])
        left = np.arange(len(heights)) + (i - len(logs) / 2) * width
        drawn = bars.bar(left, heights.values(), width, color=f"C{i}", label=arm, align="edge")
        bars.bar_label(drawn, fmt="%.1f", fontsize=7)
    names = [textwrap.fill(name, 14) for name in heights]  # the same for all arms
    bars.set_xticks(np.arange(len(names)), names, fontsize=8)
    curves.set(xlabel="epoch", ylabel="kNN accuracy (%)")
    curves.grid(alpha=0.3)
    bars.set(ylabel="after the last epoch (%)")
    bars.legend(loc="upper right", fontsize=8)
    return figure


def accuracies_by_name(row):
    """What the features of a run are worth, {name: percent}."""
    found = {"kNN": row["knn"], "linear probe": row["linear"]}
    for which, percent in other_linear_of(row).items():
        found[f"linear probe, {which}"] = percent
    found["clusters: accuracy"] = row["acc"]
    found["clusters: NMI"] = row["nmi"]
    return {name: float(percent) for name, percent in found.items()}


def draw_curve(ax, log, curve, color):
    """Draw the mean of a figure over the seeds, and a band from its lowest to its highest value.

    log: rows of the log.csv of all seeds. curve: name of the figure.
    """
    values = {}  # {epoch: values of the seeds}
    for row in log:
        if row[curve]:
            values.setdefault(int(row["epoch"]), []).append(float(row[curve]))
    epochs = sorted(values)
    means = [np.mean(values[epoch]) for epoch in epochs]
    lowest = [min(values[epoch]) for epoch in epochs]
    highest = [max(values[epoch]) for epoch in epochs]
    ax.plot(epochs, means, color=color, linewidth=1.2)
    ax.fill_between(epochs, lowest, highest, color=color, alpha=0.25, linewidth=0)


# -- data ------------------------------------------------------------------------------------------
def make_data(source, out, sizes):
    """Write the first training images and 200 held-out images of each class to the folder `out`.

    source: a folder with train/CLASS/ and test/CLASS/, or with Fashion-MNIST's *-ubyte.gz. Or
        cifar10, which is downloaded and written whole.
    sizes: the number of training images of each class.
    """
    try:
        if source == Path("cifar10") and not source.exists():
            if sizes != BALANCED:
                cli.fail("cifar10 is written whole; make L from it: --make-data C L --long-tailed")
            write_cifar10(out)
            return
        copy_images(source / "train", out / "train", sizes)
        copy_images(source / "test", out / "test", HELD_OUT)
        if not (source / "train").exists():
            unpack_fashion_mnist(source, "train", out / "train", sizes)
        if not (source / "test").exists():
            unpack_fashion_mnist(source, "t10k", out / "test", HELD_OUT)
    except (OSError, EOFError, RuntimeError, ValueError, zlib.error) as error:
        cli.fail(f"cannot make data from {source}: {cli.format_error(error)}")


def write_cifar10(out):
    """Write all of CIFAR-10 to the folder `out`, as JPEG files of quality 75."""
    for part, is_train in (("train", True), ("test", False)):
        images = CIFAR10("datasets", train=is_train, download=True)
        written = Counter()  # {class: images}
        for image, label in images:
            name = images.classes[label]
            path = out / part / name / f"{written[name]:04}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path, quality=75)
            written[name] += 1


def copy_images(source, out, sizes):
    """Copy the first files of each folder in `source`, if there is one, as they are.

    sizes: the number of files from each folder, in the order of their names.
    """
    folders = sorted(source.glob("*/"))
    if len(folders) > len(sizes):
        raise ValueError(f"{source} has {len(folders)} folders, not {len(sizes)}, one per class")
    for folder, n in zip(folders, sizes, strict=False):
        for path in sorted(folder.iterdir())[:n]:
            copied = out / folder.name / path.name
            copied.parent.mkdir(parents=True, exist_ok=True)
            copied.write_bytes(path.read_bytes())


def unpack_fashion_mnist(source, stem, out, sizes):
    """Write the first images of each class as PNG files.

    stem: how the names of the two files in `source` begin. sizes: the number from each class.
    """
    images = gzip.decompress((source / f"{stem}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((source / f"{stem}-labels-idx1-ubyte.gz").read_bytes())
    images = np.frombuffer(images, np.uint8)[16:].reshape(-1, 28, 28)  # after a header
    labels = np.frombuffer(labels, np.uint8)[8:]
    for label, n in enumerate(sizes):
        for i in np.flatnonzero(labels == label)[:n]:
            path = out / str(label) / f"{i:05}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[i]).save(path)


# -- the command line ------------------------------------------------------------------------------
def check_names(args):
    """End the program in one line if an experiment or an arm does not exist."""
    for name in args.experiments:
        if name not in EXPERIMENTS:
            cli.fail(f"no experiment is called {name}{suggest(name, EXPERIMENTS)}")
    if args.arms is None:
        return
    known = [arm for name in args.experiments for arm in EXPERIMENTS[name]["arms"]]
    for arm in args.arms:
        if arm not in known:
            cli.fail(f"no arm of {' or '.join(args.experiments)} is {arm!r}{suggest(arm, known)}")
    for name in args.experiments:
        if not set(args.arms) & EXPERIMENTS[name]["arms"].keys():
            cli.fail(f"{name} would run nothing: it has none of these arms")


def suggest(word, known):
    """The end of a message: the most similar of the `known` words, or all of them."""
    close = difflib.get_close_matches(word, known, 1)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; choose from {', '.join(known)}"


def read_places(words):
    """The data sets to run on, {letter: path}, from the words of --data.

    Ends the program in one line if a word is not a letter of DATA_FLAGS with its folder.
    """
    places = {}
    for word in words:
        letter, _, place = word.partition("=")
        if letter not in DATA_FLAGS:
            cli.fail(f"--data {word}: no data set is called {letter!r}; write LETTER=DIR, or D")
        if letter in places:
            cli.fail(f"--data names {letter} twice")
        if letter == "D" and word != "D":
            cli.fail(f"--data {word}: D is the digits in assets/ and takes no folder")
        if letter != "D" and not place:
            cli.fail(f"--data {word}: {letter} needs its folder, {letter}=DIR")
        places[letter] = str(Path(place).resolve())
    return places


def check_before_running(args, places, path):
    """End the program in one line if an experiment would run nothing, or its runs would fail.

    This takes seconds, and a run takes minutes.
    places: {letter: path} of the data sets. path: experiments.csv.
    """
    for name in args.experiments:
        letters = EXPERIMENTS[name]["data"]
        if not set(letters) & places.keys():
            needed = ["D" if letter == "D" else f"{letter}=DIR" for letter in letters]
            cli.fail(f"{name} would run nothing: it needs --data {' '.join(needed)}")
    for letter, place in places.items():
        if letter != "D":
            check_data(letter, place)

    check_directory(args.runs)
    check_directory(args.out)
    try:
        path.open("a").close()
    except OSError as error:
        cli.fail(f"cannot write {path}: {error.strerror}")
    rows = read(path)
    if rows and list(rows[0]) != COLUMNS:
        cli.fail(f"{path} has other columns; name another --out")


def check_data(letter, place):
    """End the program in one line unless a run on the folder `place` can be evaluated."""
    try:
        if not Path(place).is_dir():
            raise data_sets.DataError("there is no such folder")
        datasets = data_sets.build_datasets(place)
        if not datasets.labelled or len(datasets.classes) != CLASSES:
            raise data_sets.DataError(
                f"{datasets.describe()}; the evaluation needs held-out images in {CLASSES} classes"
            )
    except data_sets.DataError as error:
        message = cli.format_error(error)
        cli.fail(f"--data {letter}={place}: {message}; make it with --make-data")


def check_directory(directory):
    """Create `directory`. End the program in one line if no file can be written there."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()
    except OSError as error:
        cli.fail(f"cannot write to {directory}: {error.strerror}")


def check_patches(commands):
    """End the program in one line if a patch needs something that is not installed."""
    names = set()
    for command in commands:
        words = command.split()
        if "--patched" in words:
            names.update(words[words.index("--patched") + 1].split(","))
    for name in sorted(names):
        try:
            find_patch(name)
        except ImportError as error:
            package = error.name.partition(".")[0]
            cli.fail(f"the patch {name} needs {package}: pip install {package}")
    if "published" in names and "PCL" not in os.environ:
        cli.fail("set PCL to the folder of the published code; see benchmarks/published.py")


def get_parser():
    """The parser of all flags but --patched, which stands alone."""
    epilog = ["experiments:"]
    epilog += [f"  {name:<11} {x['question']}" for name, x in EXPERIMENTS.items()]
    epilog += ["", "patches, besides those in peers.py, published.py and small_crops.py:"]
    epilog.append(textwrap.indent(textwrap.fill(", ".join(PATCHES), 78), "  "))
    parser = cli.Parser(__doc__, epilog="\n".join(epilog))
    add = parser.add_argument
    add("experiments", nargs="*", metavar="NAME", help="experiments to run, from the list below")
    add(
        "--data",
        nargs="+",
        default=["D"],
        metavar="P=DIR",
        help="data sets to run on, and their folders: C=DIR, P=DIR, F=DIR, L=DIR, M=DIR, or D, "
        "which needs no folder; an experiment skips those it does not use; default: D",
    )
    add(
        "--arms",
        nargs="+",
        metavar="ARM",
        help="arms to run; --arms=ARM if its name is a single flag; default: all",
    )
    add(
        "--seeds",
        nargs="+",
        type=cli.nonnegative_int,
        default=[0, 1, 2],
        metavar="SEED",
        help="seeds to run; default: 0 1 2",
    )
    add(
        "-n",
        type=cli.positive_int,
        default=1,
        help="runs at a time, with one thread each; default: 1",
    )
    add(
        "--runs",
        type=Path,
        default=Path("runs"),
        metavar="DIR",
        help="directory of the runs, from which the curves are drawn; default: runs",
    )
    add(
        "--out",
        type=Path,
        default=ROOT / "results",
        metavar="DIR",
        help="directory of experiments.csv and of the pictures; to run everything again, name an "
        "empty one here and for --runs; default: results",
    )
    add("--table", action="store_true", help="print the tables and run nothing")
    add(
        "--make-data",
        nargs=2,
        type=Path,
        metavar=("SOURCE", "DIR"),
        help="make P or F in DIR and do nothing else; SOURCE is a folder with train/CLASS/ and "
        "test/CLASS/, or with Fashion-MNIST's four *-ubyte.gz; or make C: SOURCE is cifar10, "
        "which is downloaded",
    )
    add("--long-tailed", action="store_true", help="with --make-data: make L or M instead")
    return parser


def main(argv=None):
    """Run what is missing, draw the curves and print the tables. Returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--patched"]:  # --patched NAME,NAME -- FLAGS
        run_patched(argv[1:])
        return 0

    parser = get_parser()
    args = parser.parse_args(argv)
    if args.make_data:
        make_data(*args.make_data, LONG_TAILED if args.long_tailed else BALANCED)
        return 0
    if args.long_tailed:
        cli.fail("--long-tailed says what --make-data makes; give it with --make-data SOURCE DIR")
    if not args.experiments:
        parser.print_help()
        return 0

    check_names(args)
    places = read_places(args.data)
    path = args.out / "experiments.csv"
    failed = 0
    if not args.table:
        check_before_running(args, places, path)
        try:
            failed = run_missing(args, places, path)
        except KeyboardInterrupt:
            cli.fail("stopped; the same command continues the runs", 130)
    elif not path.exists():
        cli.fail(f"there are no results yet: {path} does not exist")
    for name in args.experiments:
        rows = read(path)
        if not args.table:
            draw(name, rows, args.runs, args.out / f"{name}.png")
        print(table(name, rows))
    if failed:
        message = f"failed runs, without a row: {failed}; the same command tries them again"
        print(message, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
