"""The tests of test_cuda.py, in a process that sees the GPU. All others do not see it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch


def environment_with_gpus():
    """The environment variables as they were before conftest.py hid the GPUs."""
    environment = {**os.environ, "TESTS_SEE_THE_GPUS": "1"}
    del environment["CUDA_VISIBLE_DEVICES"]
    if environment["GPUS_BEFORE_TESTS"] != "all":
        environment["CUDA_VISIBLE_DEVICES"] = environment["GPUS_BEFORE_TESTS"]
    return environment


def has_gpu(environment):
    """Whether torch sees a GPU in a process with this environment."""
    if not shutil.which("nvidia-smi") or not torch.version.cuda:
        return False
    question = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", question], env=environment).returncode == 0


def test_the_tests_of_a_gpu_pass():
    environment = environment_with_gpus()
    if not has_gpu(environment):
        pytest.skip("there is no GPU")
    path = Path(__file__).parent / "test_cuda.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path)]
    done = subprocess.run(
        command, env=environment, cwd=path.parent.parent, capture_output=True, text=True
    )
    print(done.stdout[-3000:])
    assert done.returncode == 0
    assert " passed" in done.stdout


def test_other_tests_see_no_gpu():
    assert not torch.cuda.is_available()


def test_a_choice_of_gpus_is_kept_for_the_tests_that_need_one(monkeypatch):
    monkeypatch.setenv("GPUS_BEFORE_TESTS", "1,2")
    assert environment_with_gpus()["CUDA_VISIBLE_DEVICES"] == "1,2"
    monkeypatch.setenv("GPUS_BEFORE_TESTS", "all")
    assert "CUDA_VISIBLE_DEVICES" not in environment_with_gpus()
