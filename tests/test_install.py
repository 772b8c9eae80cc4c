"""requirements-cpu.txt is requirements.txt without what only a GPU needs."""

from pathlib import Path

ROOT = Path(__file__).parent.parent


def requirements(name):
    """The requirements in a file, without markers, and its options."""
    lines = [line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    packages = {line.partition(";")[0].strip() for line in lines if line and line[0] != "-"}
    options = [line for line in lines if line.startswith("-")]
    return packages, options


def test_the_two_lists_of_requirements_are_in_step():
    with_gpu, _ = requirements("requirements.txt")
    without_gpu, options = requirements("requirements-cpu.txt")
    assert any(line.startswith("faiss-gpu") for line in with_gpu)
    assert {line.replace("faiss-gpu", "faiss-cpu") for line in with_gpu} == without_gpu
    assert options == ["--extra-index-url https://download.pytorch.org/whl/cpu"]
