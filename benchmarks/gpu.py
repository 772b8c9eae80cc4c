"""How fast a GPU trains: one table, in a few minutes.

    python benchmarks/gpu.py                       # CIFAR-10, which is downloaded
    python benchmarks/gpu.py --data path/to/images
    python benchmarks/gpu.py --quick               # tiny runs on any machine, to see that it works

Each row is a run of two epochs, the first of them InfoNCE alone. Its speed is that of the second
epoch. There are three ways of running the encoders:

    eager       every kernel is launched by itself
    graphs      the encoders are CUDA graphs, the default
    compiled    torch.compile first, then CUDA graphs

Below the table are the kernels and the device time of 32 steps, for the first batch size only.

E-step: clustering for the second epoch. kNN: one kNN accuracy. Both include their passes.
"""

import contextlib
import gc
import io
import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from bench import Phases, synchronize  # noqa: E402
from torch.autograd import DeviceType  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

import main_pcl  # noqa: E402
from runtime import cli  # noqa: E402

FLAGS = {  # {way of running the encoders: its flags}
    "eager": ["--no-cuda-graphs"],
    "graphs": [],
    "compiled": ["--compile"],
}
BATCHES = (128, 256, 512, 1024)
PROFILED = range(32, 64)  # steps of the second epoch; their views are made in one go
COLUMNS = ("batch", "encoders", "ms a step", "images/s", "E-step (s)", "kNN (s)", "memory (GB)")


def keep_in_memory(datasets):
    """Let all runs train on `datasets`, which has been read before."""
    main_pcl.build_datasets = lambda *_, **__: datasets
    main_pcl.load_into_memory = lambda datasets, *_: datasets


def train(batch, *flags):
    """Train two epochs, without output. Returns the log."""
    words = ["--amp", "--cos", "-j", "0", "-b", str(batch), "--epochs", "2", "--warmup", "1"]
    with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stdout(io.StringIO()):
        return main_pcl.main([*words, *flags, "--exp-dir", f"{directory}/run"])


def measure(batch, encoders):
    """A row of the table, one text per column. encoders: a key of FLAGS."""
    torch._dynamo.reset()
    gc.collect()  # captured encoders are in reference cycles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with Phases({"E-step": (main_pcl, "e_step"), "kNN": (main_pcl, "held_out_knn")}) as phases:
        speed = train(batch, *FLAGS[encoders])[-1]["images_per_second"]
    cells = [str(batch), encoders, f"{1000 * batch / speed:.1f}", f"{speed:,.0f}"]
    for seconds in phases.whole.values():
        cells.append(f"{seconds[-1]:.2f}" if seconds else "")
    memory = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0
    cells.append(f"{memory:.2f}")
    return cells


def profile_steps(batch, encoders):
    """The kernels of a step, and the milliseconds that the device works on them.

    Returns None if an epoch has too few steps, or if there is no GPU.
    """
    steps = len(main_pcl.build_datasets().train) // batch
    if steps < PROFILED.stop or not torch.cuda.is_available():
        return None
    torch._dynamo.reset()
    profiler = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])
    info_nce = main_pcl.info_nce
    done = 0  # steps of both epochs

    def count_steps(*args):
        nonlocal done
        if done == steps + PROFILED.start:
            synchronize()
            profiler.start()
        if done == steps + PROFILED.stop:
            synchronize()
            profiler.stop()
        done += 1
        return info_nce(*args)

    main_pcl.info_nce = count_steps
    try:
        train(batch, *FLAGS[encoders])
    finally:
        main_pcl.info_nce = info_nce
    kernels = []
    for event in profiler.events():
        # annotations, such as "Optimizer.step", span kernels that are events themselves
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            kernels.append(event)
    milliseconds = sum(event.self_device_time_total for event in kernels) / 1000
    return len(kernels) / len(PROFILED), milliseconds / len(PROFILED)


def describe_machine():
    """The card and the versions that the figures belong to."""
    card = "no GPU"
    if torch.cuda.is_available():
        card = torch.cuda.get_device_name()
    return f"{card}, torch {torch.__version__}, CUDA {torch.version.cuda}"


def print_row(cells):
    """Print a row of a Markdown table at once."""
    print(f"| {' | '.join(cells)} |", flush=True)


def main(argv=None):
    parser = cli.Parser(__doc__)
    parser.add_argument(
        "--data", default="cifar10", help="a folder of small images, or a name; default: cifar10"
    )
    parser.add_argument("--quick", action="store_true", help="the digits, in tiny runs")
    args = parser.parse_args(argv)
    if not args.quick and not torch.cuda.is_available():
        cli.fail("there is no GPU; --quick shows on any machine that this program works")

    batches = BATCHES
    ways = list(FLAGS)
    data = args.data
    if args.quick:
        batches = (128,)
        data = None
    if not torch.cuda.is_available():
        ways = ["eager"]

    # read the images
    device = "cuda" if torch.cuda.is_available() else "cpu"
    workers = len(os.sched_getaffinity(0))
    start = time.perf_counter()
    datasets = main_pcl.load_into_memory(main_pcl.build_datasets(data), device, workers)
    seconds = time.perf_counter() - start
    if datasets.train.pixels is None:
        cli.fail(f"{data}: choose images that fit in memory, all of one size")
    keep_in_memory(datasets)
    print(describe_machine())
    print(f"{datasets.describe()}; read in {seconds:.1f} s by {workers} processes\n")

    # the table
    print_row(COLUMNS)
    print_row(["---"] * len(COLUMNS))
    for batch in batches:
        for encoders in ways:
            print_row(measure(batch, encoders))

    # the profile
    print()
    for encoders in ways:
        found = profile_steps(batches[0], encoders)
        if found is not None:
            print(
                f"{encoders}, batch {batches[0]}: {found[0]:.0f} kernels a step, on which the "
                f"device works {found[1]:.1f} ms"
            )


if __name__ == "__main__":
    main()
