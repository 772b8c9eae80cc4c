"""Messages: what a user is told is true, and the advice in it is the right one."""

import pytest
from conftest import TINY, fails, picture, run

import eval_lincls
import main_pcl


# -- broken images ---------------------------------------------------------------------------------
def test_a_skipped_image_whose_header_is_broken_is_announced(tmp_path, capsys):
    for i in range(20):
        picture(12, 12, seed=i).save(tmp_path / f"{i:02d}.png")
    (tmp_path / "07.png").write_bytes(b"")
    options = [*TINY, "--epochs", 1, "--exp-dir", tmp_path / "run"]
    run(tmp_path, *options, "--skip-broken")
    assert capsys.readouterr().out.count("left out because they are broken: 1,") == 1


# -- flags -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "script, flag",
    [
        (main_pcl, "--init"),  # random weights, if it is ignored
        (main_pcl, "--config"),
        (main_pcl, "--exp-dir"),  # the current folder
        (eval_lincls, "--pretrained"),  # the latest run
        (eval_lincls, "--exp-dir"),
    ],
)
def test_an_empty_name_is_refused(folder, tmp_path, capsys, monkeypatch, script, flag):
    """A command with a variable that the shell does not know must not do something else."""
    monkeypatch.chdir(tmp_path)
    error = fails(capsys, script.main, folder, flag, "")
    assert f"argument {flag}: is empty" in error
