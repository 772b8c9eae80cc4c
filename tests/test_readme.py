"""The README: every snippet as it stands, every command in a shortened form, only flags that exist."""

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
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.S)
SNIPPETS = [text for language, text in BLOCKS if language == "python"]
BASH = "\n".join(text for language, text in BLOCKS if language == "bash").replace("\\\n", " ")
LINES = BASH.replace("&&", "\n").splitlines()
COMMANDS = [shlex.split(line, comments=True) for line in LINES if line.strip()]
SHORT = [*TINY, "--epochs", "2", "--warmup", "1", "--image-size", "8", "--overwrite"]  # alternatives share a directory


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_a_snippet_runs_as_it_stands(snippet, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, arch, small in (("resnet.pth", "resnet50", False), ("resnet_small.pth", "resnet18", True)):
        if name in snippet:
            export(name, build_encoder(arch, small_images=small), arch, small)
    exec(compile(snippet, "README.md", "exec"), {})
    missing = capsys.readouterr().out
    assert "resnet" not in snippet or missing == "['fc.weight', 'fc.bias']\n" or "MoCo" in snippet


def test_the_commands_run_in_the_readmes_order(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = {f"module.encoder_q.{k}": v for k, v in torchvision.models.resnet18().state_dict().items()}
    torch.save({"arch": "resnet18", "state_dict": state}, "moco_v2_200ep_pretrain.pth.tar")
    torch.save(build_encoder("resnet18_w4", small_images=True).state_dict(), "resnet50.pth")
    monkeypatch.setattr(eval_lincls, "EPOCHS", 2)
    ran = set()
    for program, *arguments in COMMANDS:
        arguments = [str(folder) if "path/to" in a or a == "cifar10" else a for a in arguments]
        if program == "torchrun":
            one_node = {"--nproc_per_node=8": "--nproc_per_node=2", "--nnodes=2": "--nnodes=1"}
            one_node |= {"--rdzv_endpoint=HOST:29500": "--rdzv_endpoint=localhost:0"}
            few = SHORT if "main_pcl.py" in arguments else ["--num-cluster", "4", "-b", "16", "--workers", "0"]
            arguments = [str(ROOT / a) if a.endswith(".py") else one_node.get(a, a) for a in arguments]
            command = [sys.executable, "-m", "torch.distributed.run", *arguments, *few]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120)
            assert done.returncode == 0, done.stderr[-2000:]
        elif program == "python" and arguments[0] == "main_pcl.py":
            assert len(main_pcl.main([*arguments[1:], *SHORT])) == 2
            for seed in (1, 2) if "runs/folder0" in arguments else ():  # "again with --seed 1 and 2"
                main_pcl.main([*arguments[1:], *SHORT, "--seed", str(seed), "--exp-dir", f"runs/folder{seed}"])
        elif program == "python":
            assert arguments[0] in ("eval_lincls.py", "benchmarks/bench.py")
            if arguments[0] == "eval_lincls.py":
                assert "linear" in eval_lincls.main([*arguments[1:], "--workers", "0", "--num-cluster", "4"])["trained"]
        else:
            assert program in ("pip", "pytest")
        ran.add(program)
    assert ran == {"pip", "pytest", "python", "torchrun"}


def test_only_flags_that_exist_are_named():
    known = set(main_pcl.get_parser()._option_string_actions) | set(eval_lincls.get_parser()._option_string_actions)
    known |= {"--data", "--out"}  # of benchmarks/experiments.py
    torchrun = {"--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint", "--max-restarts"}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z_-]*", README)) <= known | torchrun


def test_files_that_are_named_are_there():
    for path in re.findall(r"\]\((?!http|#)([^)]+)\)", README):
        assert (ROOT / path).exists(), path
