"""README.md and results/*.md: snippets, commands, flags and links.

Every snippet runs as it stands, every command of the README in a shortened form.
"""

import importlib
import operator
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from conftest import TINY

import eval_lincls
import main_pcl
from model import build_encoder
from runtime.weights import export

ROOT = Path(main_pcl.__file__).parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import experiments  # noqa: E402

README = ROOT / "README.md"
FINE_TUNING = ROOT / "results" / "fine-tuning.md"
RESULTS = ROOT / "results" / "README.md"
PAGES = [README, *sorted((ROOT / "results").glob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]

TORCHRUN_FLAGS = {"--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint"}
TORCHRUN_FLAGS |= {"--max-restarts"}


def blocks(page, language):
    """The code blocks of a page in this language."""
    found = re.findall(r"```(\w*)\n(.*?)```", page.read_text(), re.DOTALL)
    return [text for name, text in found if name == language]


# -- snippets --------------------------------------------------------------------------------------
PYTHON = blocks(README, "python") + blocks(FINE_TUNING, "python")
WITH_PANDAS = [snippet for snippet in PYTHON if "pandas" in snippet]
SNIPPETS = [snippet for snippet in PYTHON if snippet not in WITH_PANDAS]


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_a_snippet_runs_as_it_stands(snippet, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if "small_images" in snippet:
        small = build_encoder("resnet18", small_images=True)
        export("resnet.pth", small, "resnet18", True)
    elif "resnet.pth" in snippet:
        export("resnet.pth", build_encoder("resnet50"), "resnet50", False)
    exec(compile(snippet, "snippet", "exec"), {})
    if "resnet" in snippet:
        assert capsys.readouterr().out == "['fc.weight', 'fc.bias']\n"


@pytest.mark.parametrize("snippet", WITH_PANDAS)
def test_pandas_finds_what_the_comments_say(snippet, tmp_path, monkeypatch):
    pytest.importorskip("pandas")
    monkeypatch.chdir(tmp_path)
    rows = ["file,label,cluster_40,cosine_40,cluster_20,cosine_20"]
    rows += [f"{i}.jpg,,{i % 3},0.{90 - i},{i % 2},0.{80 - i}" for i in range(10)]
    rows.append("copy of 4.jpg,,1,0.86,0,0.76")
    rows.append("like 5.jpg.jpg,,2,0.85,1,0.7")  # equal in one granularity alone
    Path("assigned.csv").write_text("\n".join(rows))
    export("resnet.safetensors", build_encoder("resnet50"), "resnet50", False)

    names = {}
    found = []
    for line in snippet.splitlines():
        if re.match(r"table[.\[]", line):
            found.append(eval(line, names))
        else:
            exec(line, names)
    largest, furthest, copies = found
    assert largest.to_dict() == {0: 4, 1: 4, 2: 4}
    assert list(furthest) == [f"{i}.jpg" for i in (9, 8, 7, 6, 5)]
    assert list(copies) == ["copy of 4.jpg"]
    assert Path("hub/model.safetensors").exists()


def test_the_snippets_of_fine_tuning_load_exported_weights():
    assert sum("load_state_dict" in snippet for snippet in SNIPPETS) >= 3


def test_the_places_to_change_exist():
    """As in: `model.py`: `MoCo.__init__`, `MoCo.forward`."""
    places = re.findall(r"`(\w+)\.py`: ((?:`[\w.]+`(?:, )?)+)", README.read_text())
    assert places
    for module, names in places:
        for name in re.findall(r"`([\w.]+)`", names):
            operator.attrgetter(name)(importlib.import_module(module))


# -- commands --------------------------------------------------------------------------------------
def read_commands(page):
    """The commands in a page's bash blocks, each as a list of words."""
    text = "\n".join(blocks(page, "bash"))
    lines = text.replace("\\\n", " ").replace("&&", "\n").splitlines()
    commands = [shlex.split(line, comments=True) for line in lines]
    return [command for command in commands if command]


# commands that write to the same directory need --overwrite
SHORT_RUN = [*TINY, "--epochs", "2", "--warmup", "1", "--image-size", "8", "--overwrite"]
SHORT_EVALUATION = ["--workers", "0", "--num-cluster", "4"]
ON_ONE_MACHINE = {
    "--nproc_per_node=8": "--nproc_per_node=2",
    "main_pcl.py": str(ROOT / "main_pcl.py"),
    "eval_lincls.py": str(ROOT / "eval_lincls.py"),
}


def train(arguments):
    assert len(main_pcl.main([*arguments, *SHORT_RUN])) == 2
    if "runs/folder0" in arguments:  # the README says: then --seed 1 and 2
        for seed in ("1", "2"):
            options = ["--seed", seed, "--exp-dir", f"runs/folder{seed}"]
            main_pcl.main([*arguments, *SHORT_RUN, *options])


def evaluate(arguments):
    table = eval_lincls.main([*arguments, *SHORT_EVALUATION])
    assert "linear" in table["trained"]


def launch(arguments):
    """torchrun, with as few processes as will do."""
    short = [*SHORT_EVALUATION, "-b", "16"]
    if "main_pcl.py" in arguments:
        short = SHORT_RUN
    arguments = [ON_ONE_MACHINE.get(argument, argument) for argument in arguments]
    command = [sys.executable, "-m", "torch.distributed.run", *arguments, *short]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_commands_run_in_the_readmes_order(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(eval_lincls, "EPOCHS", 2)

    # the files of others that the commands name
    resnet = torchvision.models.resnet18().state_dict()
    state = {f"module.encoder_q.{name}": value for name, value in resnet.items()}
    torch.save({"arch": "resnet18", "state_dict": state}, "moco_v2_200ep_pretrain.pth.tar")

    programs = set()
    for program, *arguments in read_commands(README):
        programs.add(program)
        for i, argument in enumerate(arguments):
            if "path/to" in argument or argument == "cifar10":
                arguments[i] = str(folder)
        if program == "torchrun":
            launch(arguments)
        elif program == "python" and arguments[0] == "main_pcl.py":
            train(arguments[1:])
        elif program == "python" and arguments[0] == "eval_lincls.py":
            evaluate(arguments[1:])
        else:
            assert program in ("pip", "pytest")
    assert programs == {"pip", "pytest", "python", "torchrun"}


COMMANDS = re.findall(r"^.*benchmarks/experiments\.py .*$", RESULTS.read_text(), re.MULTILINE)


@pytest.mark.parametrize("line", [line for line in COMMANDS if not line.startswith("[")])
def test_a_command_of_the_results_names_experiments_and_arms_that_exist(line):
    """check_names ends the program otherwise."""
    words = shlex.split(line.partition("experiments.py ")[2], comments=True)
    args = experiments.get_parser().parse_args(words)
    assert args.experiments or args.make_data
    experiments.check_names(args)


# -- flags and links -------------------------------------------------------------------------------
def known_flags(page):
    """The flags that a page may name; only results/ speaks of those of the benchmarks."""
    known = set(TORCHRUN_FLAGS)
    for script in (main_pcl, eval_lincls):
        known |= set(script.get_parser()._option_string_actions)
    if page != README:
        for path in (ROOT / "benchmarks").glob("*.py"):
            known |= set(re.findall(r'\badd(?:_argument)?\(\s*"(--[a-z-]+)"', path.read_text()))
    return known


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_only_flags_that_exist_are_named(page):
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z_-]*", page.read_text()))
    assert named <= known_flags(page)


def anchors(page):
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_to_files_and_headings_that_exist(page):
    for link in re.findall(r"\]\((?!http)([^)]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link
