"""A run's directory: never overwritten unasked; what may change in a run that goes on; args.json."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import TINY, assert_same, fails, run, weights

import eval_lincls
import main_pcl

SHORT = [*TINY, "--epochs", 2, "--warmup", 1]


def snapshot(directory):
    return {path.name: (path.stat().st_mtime_ns, path.stat().st_size) for path in directory.iterdir()}


def test_the_same_command_again_takes_the_next_free_directory(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("experiment_pcl", "experiment_pcl_2", "experiment_pcl_3"):
        before = {path: snapshot(path) for path in tmp_path.iterdir()}
        run(folder, *SHORT, "--seed", len(before))
        assert f"in {name}\n" in capsys.readouterr().out and (tmp_path / name / "checkpoint.pth.tar").exists()
        assert all(snapshot(path) == files for path, files in before.items())
    run(folder, *SHORT, "--epochs", 3, "--seed", 2, "--resume")  # the newest
    assert len((tmp_path / "experiment_pcl_3" / "log.csv").read_text().splitlines()) == 4
    assert len((tmp_path / "experiment_pcl" / "log.csv").read_text().splitlines()) == 3
    newest = eval_lincls.main(["--no-baselines"])
    assert newest == eval_lincls.main(["--exp-dir", "experiment_pcl_3", "--no-baselines"])


def test_a_named_directory_that_holds_a_run_is_refused(folder, tmp_path, capsys):
    run(folder, *SHORT, "--exp-dir", tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "checkpoint_best.pth").write_text("mine, too")
    before = snapshot(tmp_path)
    message = fails(capsys, main_pcl.main, folder, *SHORT, "--exp-dir", tmp_path)
    assert "holds a run at epoch 2 of 2" in message and "--resume" in message and "--overwrite" in message
    assert snapshot(tmp_path) == before
    run(folder, *TINY, "--epochs", 1, "--seed", 1, "--exp-dir", tmp_path, "--overwrite")
    assert (tmp_path / "notes.txt").read_text() == "mine" and (tmp_path / "checkpoint_best.pth").exists()
    names = {path.name for path in tmp_path.glob("checkpoint*.pth.tar")}
    assert names == {"checkpoint.pth.tar", "checkpoint_0000.pth.tar"}
    assert len([*tmp_path.glob("events*")]) == 1 and not (tmp_path / "prototypes.png").exists()


def test_a_finished_run_that_is_resumed_writes_nothing(folder, tmp_path, capsys):
    log = run(folder, *SHORT, "--exp-dir", tmp_path)
    before = snapshot(tmp_path)
    assert run(folder, *SHORT, "--exp-dir", tmp_path, "--resume") == log
    assert "holds a finished run of 2 epochs" in capsys.readouterr().out and snapshot(tmp_path) == before


def test_what_differs_on_resuming_is_named_and_what_cannot_change_refused(folder, tmp_path, capsys):
    run(folder, *SHORT, "--exp-dir", tmp_path)
    before = snapshot(tmp_path)
    again = [folder, *SHORT, "--exp-dir", tmp_path, "--resume", "--epochs", 3]
    for flag, change in (
        (["-a", "resnet18_w8"], "arch resnet18_w4 -> resnet18_w8"),
        (["--cluster-head", "report"], "cluster_head none -> report"),
        (["--optim", "adamw"], "optim sgd -> adamw"),
        (["--pcl-r", 16], "pcl_r 8 -> 16"),
        (["--low-dim", 64], "low_dim 128 -> 64"),
    ):
        assert change in fails(capsys, main_pcl.main, *again, *flag)
        assert snapshot(tmp_path) == before
    run(*again, "--lr", 0.5, "--num-cluster", "3,5")
    out = capsys.readouterr().out
    assert "lr 0.001875 -> 0.5" in out and "num_cluster [4, 8] -> [3, 5]" in out and "seed" not in out
    stored = json.loads((tmp_path / "args.json").read_text())
    assert stored["lr"] == 0.5 and [part["epoch"] for part in stored["parts"]] == [0, 2]
    assert stored["parts"][0]["changed"] == {} and stored["parts"][1]["changed"]["lr"] == [0.001875, 0.5]
    assert stored["parts"][1]["torch"] == torch.__version__ and stored["parts"][1]["threads"] == torch.get_num_threads()


@pytest.mark.parametrize("clusters", [..., 1, [1], [(1, 2, 3)], [(torch.zeros(1), torch.zeros(1))]])
def test_a_malformed_state_of_a_run_gets_one_line(folder, tmp_path, capsys, clusters):
    run(folder, *TINY, "--epochs", 1, "--exp-dir", tmp_path)
    checkpoint = torch.load(tmp_path / "checkpoint.pth.tar", weights_only=True)
    checkpoint["run"]["clusters"] = clusters
    if clusters is ...:
        del checkpoint["run"]["clusters"]
    torch.save(checkpoint, tmp_path / "bad.pth.tar")
    again = [folder, *TINY, "--epochs", 2, "--exp-dir", tmp_path / "new", "--resume", tmp_path / "bad.pth.tar"]
    assert "is not one that this run can go on from" in fails(capsys, main_pcl.main, *again)


def test_within_an_epoch_the_number_of_clusters_has_to_stay(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(main_pcl.distributed.StopSignals, "received_by_any", lambda self: True)
    with pytest.raises(SystemExit):
        run(folder, *SHORT, "--exp-dir", tmp_path)
    capsys.readouterr()
    for flag, change in ((["--num-cluster", "3"], "num_cluster [4, 8] -> [3]"), (["-b", 8], "batch_size 16 -> 8")):
        assert change in fails(capsys, main_pcl.main, folder, *SHORT, *flag, "--exp-dir", tmp_path, "--resume")


def test_a_config_gives_the_same_run_and_flags_win(folder, tmp_path):
    options = [folder, *SHORT, "--lr", 0.1, "--no-blur", "--amp", "--schedule", 1, "--wd", 0, "--crop-min", 0.4]
    run(*options, "--exp-dir", tmp_path / "a")
    config = ["--config", tmp_path / "a" / "args.json"]
    run(*config, "--exp-dir", tmp_path / "b")
    assert_same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    one, other = (json.loads((tmp_path / name / "args.json").read_text()) for name in "ab")
    own = ("exp_dir", "config", "parts")
    assert {k: v for k, v in one.items() if k not in own} == {k: v for k, v in other.items() if k not in own}
    run(*config, "--exp-dir", tmp_path / "c", "--seed", 5, "--epochs", 1)
    third = json.loads((tmp_path / "c" / "args.json").read_text())
    assert (third["seed"], third["epochs"], third["lr"]) == (5, 1, 0.1)


@pytest.mark.parametrize("text", ["", "[1]", '{"epochs": "many"}', '{"schedule": 3}', '{"optim": "adam"}'])
def test_a_bad_config_gets_one_line(tmp_path, capsys, text):
    (tmp_path / "args.json").write_text(text)
    fails(capsys, main_pcl.main, "--config", tmp_path / "args.json", "--exp-dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_both_losses_are_in_the_log(folder, tmp_path, capsys):
    log = run(folder, *SHORT, "--exp-dir", tmp_path)
    assert log[0]["loss_proto"] == 0 < log[1]["loss_proto"] and log[0]["loss_inst"] > 0
    header = (tmp_path / "log.csv").read_text().splitlines()[0].split(",")
    assert {"loss_inst", "loss_proto", "acc_inst", "acc_proto"} <= set(header)
    assert f"loss_inst {log[1]['loss_inst']:.3f}  loss_proto {log[1]['loss_proto']:.3f}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "loss_inst, flags, first",
    [
        (4.17, [], "a lower --lr, or a --moco-m"),
        (4.17, ["--cluster-head", "report"], "a longer --warmup"),
        (0.1, ["--no-color-jitter"], "a stronger augmentation"),
        (0.1, [], "more --bn-splits"),
        (0.1, ["--cluster-head", "report"], "more --bn-splits"),
    ],
)
def test_the_warning_names_first_what_the_figures_point_to(loss_inst, flags, first):
    args = main_pcl.get_parser().parse_args(["--pcl-r", "64", "--bn-splits", "1", "--crop-min", "0.2", *flags])
    remedies = main_pcl.checkpoint.remedies({"loss_inst": loss_inst}, args)
    assert remedies[0].startswith(first) and len(remedies) == 3 + (args.cluster_head == "report")


def test_errors_of_our_own_are_shown_as_they_are(folder, tmp_path, monkeypatch):
    run(folder, *TINY, "--epochs", 1, "--exp-dir", tmp_path)

    def broken(*_, **__):
        raise ValueError("a mistake of ours")

    monkeypatch.setattr(eval_lincls, "knn_accuracy", broken)
    with pytest.raises(ValueError, match="a mistake of ours"):
        eval_lincls.main(["--exp-dir", str(tmp_path)])

    def vanished(*_, **__):
        raise FileNotFoundError("no file of ours")

    monkeypatch.setattr(main_pcl, "held_out_knn", vanished)
    with pytest.raises(FileNotFoundError, match="no file of ours"):
        run(folder, *TINY, "--exp-dir", tmp_path / "new")


WITHOUT = """
import signal, sys
del signal.SIGUSR1
sys.modules["fcntl"] = None
sys.path.insert(0, sys.argv.pop(1))
import main_pcl
main_pcl.main()
"""


def test_a_machine_without_fcntl_and_sigusr1_trains(folder, tmp_path):
    command = [
        sys.executable,
        "-c",
        WITHOUT,
        main_pcl.__file__.rpartition("/")[0],
        folder,
        *SHORT,
        "--exp-dir",
        tmp_path,
    ]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert all(torch.isfinite(value).all() for value in weights(tmp_path).values())


def test_a_stored_number_of_clusters_above_the_evaluated_images(folder, tmp_path, capsys, monkeypatch):
    run(*TINY, "--num-cluster", "40,60", "--epochs", 1, "--exp-dir", tmp_path)  # on the digits
    table = eval_lincls.main([str(folder), "--exp-dir", str(tmp_path), "--no-baselines"])
    assert np.isfinite(list(table["trained"].values())).all() and "NMI 60" not in table["trained"]
    monkeypatch.setattr(eval_lincls, "extract_all", lambda *_: pytest.fail("the probe has started"))
    few = [folder, "--exp-dir", tmp_path, "--num-cluster", "49"]
    assert "49 clusters are more than the 48" in fails(capsys, eval_lincls.main, *few)
