"""The experiments: patches take effect, a run becomes a row once, table and data are what they should be."""

import functools
import gzip
import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, run, state

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import experiments

import eval_lincls
import loss
import main_pcl
from cluster import Clusters

TRAINED = {"linear": 90, "kNN 200": 80, "NMI 10": 70, "AMI 10": 60, "acc 10": 50, "acc 10 held out": 1}


@pytest.fixture
def patch(monkeypatch):
    return lambda name: monkeypatch.setattr(*experiments.PATCHES[name], raising=False)


@pytest.mark.parametrize("name", experiments.EXPERIMENTS)
def test_every_arm_is_a_command_of_its_own_that_the_program_takes(name):
    data, arms = experiments.EXPERIMENTS[name]["data"], experiments.EXPERIMENTS[name]["arms"]
    found = [experiments.command_of(x, flags, 0) for x in data for flags in arms.values()]
    assert len(set(found)) == len(found)
    for command in found:
        patched, _, flags = command.removeprefix("python main_pcl.py ").rpartition(" -- ")
        main_pcl.get_parser().parse_args(flags.split())
        names = set(patched.split()[-1].split(",")) if patched else set()
        assert all(name in experiments.PATCHES or name.startswith(("lightly-", "published")) for name in names)
        assert len(experiments.directory_of(command, Path()).name) < 255
    command = experiments.command_of("D", "--lr 1 --symmetric @topk --lr 2 --no-symmetric --epochs x2", 3)
    flags = "--amp --cos --epochs 400 --warmup 20 --lr 2 --no-symmetric --seed 3"
    assert command == f"python benchmarks/experiments.py --patched topk -- {flags}"


@pytest.mark.parametrize("name", ["predictor", "twin", "fork"])
def test_a_head_of_ours_trains_and_is_where_it_should_be(name, folder, tmp_path, patch, monkeypatch):
    patch(name)
    monkeypatch.setattr(main_pcl, "proto_nce", main_pcl.proto_nce)  # which the head replaces
    run(folder, *TINY, "--cluster-head", "none", "--warmup", "1", "--epochs", "2", "--exp-dir", tmp_path)
    assert state(tmp_path)["log"][1]["loss_proto"] > 0
    moco = main_pcl.MoCo(lambda **kw: main_pcl.build_encoder("resnet18_w4", small_images=True, **kw), 16, 8)
    images, fork = torch.randn(8, 3, 8, 8), name == "fork"
    q, k, to_cluster = moco(images, images, clustering=True, features=True)
    c = moco.c
    pooled = main_pcl.backbone(moco.encoder_q)(images)
    z, b = moco.encoder_q.fc(pooled)
    torch.testing.assert_close((q, c), (F.normalize(z), F.normalize(b)))
    clustered = k if name == "predictor" else c.detach()  # at the start the key encoder is the query's
    torch.testing.assert_close(to_cluster, clustered)
    torch.testing.assert_close(b, moco.encoder_q.fc[0].b(pooled if fork else z))
    clusters = [Clusters(torch.arange(8), F.normalize(torch.randn(8, 16)), torch.ones(8))]
    expected = loss.proto_nce(c, torch.arange(8), clusters, 8)
    assert main_pcl.proto_nce(q, torch.arange(8), clusters, 8) == expected
    before = moco.encoder_k.fc[0].b[0].weight.clone()
    (q + c).sum().backward()
    torch.optim.SGD(moco.parameters(), 1.0).step()
    moco.momentum_update_key_encoder()
    assert not torch.equal(moco.encoder_k.fc[0].b[0].weight, before) and len(moco(images, images)) == 2


@pytest.mark.parametrize("name", ["MoCo", "SimCLR", "BYOL", "SwAV", "NNCLR"])
def test_a_peer_trains(name, folder, tmp_path, monkeypatch):
    peer = pytest.importorskip("lightly") and importlib.import_module("peers").PATCHES[f"lightly-{name}"]
    monkeypatch.setattr(*peer)
    monkeypatch.setattr(main_pcl, "info_nce", main_pcl.info_nce)  # which the peer replaces
    symmetric = ["--symmetric"] * (name in ("MoCo", "BYOL"))
    run(folder, *TINY, "--warmup", "3", "--epochs", "3", "--bn-splits", "1", *symmetric, "--exp-dir", tmp_path)
    weights = torch.load(tmp_path / "checkpoint.pth.tar", weights_only=True)["state_dict"]
    moved = [weights[f"module.encoder_{x}.bn1.running_mean"].any() for x in "qk"]
    assert moved == [True, bool(symmetric)] and all(x.isfinite().all() for x in weights.values())
    assert all(np.isfinite(row["loss_inst"]) and row["grad_norm"] > 0 for row in state(tmp_path)["log"])
    eval_lincls.main(["--exp-dir", str(tmp_path), "--no-baselines"])
    if not symmetric:  # both views get the same
        moco = main_pcl.MoCo(lambda **kw: main_pcl.build_encoder("resnet18_w4", **kw), 16, 8)
        images = torch.randn(8, 3, 8, 8)
        q, k, _ = moco(images, images)
        torch.testing.assert_close(q, k)


def test_the_weight_is_the_gradients(patch):
    q, clusters = torch.randn(4, 8), [Clusters(torch.arange(4), F.normalize(torch.randn(4, 8)), torch.ones(4))]
    patch("weight-0.3")
    x, y = q.clone().requires_grad_(), q.clone().requires_grad_()
    for function, inputs in ((loss.proto_nce, x), (main_pcl.proto_nce, y)):
        function(inputs, torch.arange(4), clusters, 8)[0].backward()
    torch.testing.assert_close(0.3 * x.grad, y.grad)


def test_jitter_accuracy_and_clipping(patch):
    queries, keys, queue = torch.ones(4, 8), torch.ones(4, 8), torch.ones(8, 64)
    assert main_pcl.RandomView(8).jitter[3] == 0.1 and loss.info_nce(queries, keys, queue, 0.2)[1] == 0
    for name in ("half-jitter", "topk", "clip-scaled"):
        patch(name)
    assert main_pcl.RandomView(8).jitter[3] == 0.05 and loss.info_nce(queries, keys, queue, 0.2)[1] == 100
    p = torch.nn.Parameter(torch.zeros(4))
    optimizer, scaler = torch.optim.SGD([p], 1.0), torch.amp.GradScaler("cpu", enabled=False)
    scaler.scale(p.sum() * 3).backward()
    scaler.unscale_(optimizer)
    assert p.grad.norm().item() == pytest.approx(1 / scaler.get_scale(), rel=1e-4) and scaler.get_scale() > 1000


def test_accuracy_within_a_step_sees_what_the_queue_hides(patch):
    drift = torch.zeros(16)
    drift[0] = 5
    keys, queue = torch.randn(8, 16) + drift, torch.randn(16, 64) - drift[:, None]  # all keys have moved one way
    queries, keys, queue = F.normalize(torch.randn(8, 16) + drift), F.normalize(keys), F.normalize(queue, dim=0)
    value, acc = main_pcl.info_nce(queries, keys, queue, 0.2)
    patch("one-step")
    patched, within = main_pcl.info_nce(queries, keys, queue, 0.2)
    assert acc == 100 and within < 80 and value == patched
    assert main_pcl.info_nce(keys, keys, queue, 0.2)[1] == 100


def test_overflow_as_in_float16_and_no_stop_at_it(patch, folder, tmp_path):
    patch("fp16-range")
    encoder = functools.partial(main_pcl.build_encoder, "resnet18_w4", small_images=True)
    moco = main_pcl.MoCo(encoder, 16, 8)
    assert moco(torch.randn(8, 3, 8, 8), torch.randn(8, 3, 8, 8))[0].isfinite().all()
    with torch.no_grad():
        moco.encoder_q.fc[2].weight.fill_(1e6)
    assert not moco(torch.randn(8, 3, 8, 8), torch.randn(8, 3, 8, 8))[0].isfinite().all()
    flags = [*TINY, "--warmup", "2", "--epochs", "2", "--lr", "1e20", "--exp-dir", tmp_path / "run"]
    with pytest.raises(SystemExit, match="stopped at epoch"):
        run(folder, *flags)
    patch("go-on")
    run(folder, *flags, "--overwrite")
    assert len(state(tmp_path / "run")["log"]) == 2
    with pytest.raises(SystemExit) as stop:
        eval_lincls.main(["--exp-dir", str(tmp_path / "run"), "--no-baselines"])
    assert stop.value.code == 2


def test_a_run_becomes_a_row_once_and_rows_a_table(folder, tmp_path, monkeypatch, capsys):
    arms, launched, original = {"a": "--lr 0.1", "b": "--lr 0.2", "nan": "--lr 9"}, [], subprocess.run
    for name in ("one", "two"):
        monkeypatch.setitem(experiments.EXPERIMENTS, name, {"data": "P", "question": "?", "arms": arms})
    monkeypatch.setitem(experiments.SIZES, "P", "-b 16 --symmetric")

    def fake(words, **keywords):
        if words[0] == "git":
            return original(words, **keywords)
        launched.append(words)
        if "7" in words and len(launched) == 13:  # another call at the same time
            experiments.main(["one", *options, "7", "--arms", "a"])
        directory, text = Path(words[words.index("--exp-dir") + 1]), "10,20,3,100,\n1,40,50,2,100,30\n"
        (directory / "log.csv").write_text(f"epoch,acc_inst,acc_proto,loss_inst,images_per_second,knn\n0,{text}")
        args = {"data": str(folder), "image_size": 8, "batch_size": 16, "symmetric": True}
        (directory / "args.json").write_text(json.dumps(args))
        found = TRAINED | ({"linear": 91 + 2 * int(directory.name[-1])} if "lr-0.2" in directory.name else {})
        (directory / "eval.json").write_text(json.dumps({"figures": {"trained": found}}))
        print("stopped at epoch 2" if "9" in words else "", file=keywords["stdout"], flush=True)
        return subprocess.CompletedProcess(words, int("9" in words))

    monkeypatch.setattr(subprocess, "run", fake)
    options = ["--data", f"P={folder}", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path), "--seeds"]
    for more, launches in ((["0", "1"], 10), (["0", "1", "2", "--arms", "a"], 12)):
        experiments.main(["one", *options, *more])
        assert len(launched) == launches  # each of training and evaluation, but for what was stopped
    experiments.main(["two", *options, "0", "--arms", "a"])
    assert len(launched) == 12 and (tmp_path / "one.png").exists()
    rows = experiments.read(tmp_path / "experiments.csv")
    assert len(rows) == 8 and list(rows[0]) == experiments.COLUMNS and int(rows[0]["images_seen"]) == 2 * 3 * 16 * 4
    assert {row["command"] for row in rows} >= {"python main_pcl.py P -b 16 --symmetric --lr 0.1 --seed 2"}
    lines = experiments.table("one", rows).splitlines()
    cells = [f"{x:.1f} ± 0.0" for x in (90, 80, 50, 40)]
    assert lines[2] == f"| P | a | 3 | 0.000384 | {' | '.join(cells)} |  |  |  |"
    cells[0] = "92.0 ± 1.4"  # of 91 and 93, where the first arm has 90
    assert lines[3] == f"| P | b | 2 | 0.000384 | {' | '.join(cells)} | +2.0 ± 1.0 | +0.0 ± 0.0 | +0.0 ± 0.0 |"
    assert lines[4].startswith("| P | nan | 2, 2 stopped | 0.000384 |  |") and "40.0 ± 0.0" in lines[4]
    experiments.main(["one", *options, "7", "--arms", "a"])
    assert len(launched) == 16 and len(experiments.read(tmp_path / "experiments.csv")) == 9
    shutil.rmtree(tmp_path / "runs")
    picture = (tmp_path / "one.png").stat()
    experiments.main(["one", *options, "0"])
    assert len(launched) == 16 and (tmp_path / "one.png").stat() == picture
    arms["a"] = "--lr 0.3"  # a row of another command is not the arm's
    assert "| a |" not in experiments.table("one", rows)


def test_data_is_the_first_of_each_class(tmp_path):
    for stem, n in (("train", 30), ("t10k", 10)):
        for kind, array in (
            ("images-idx3", np.zeros(n * 784 + 16)),
            ("labels-idx1", np.r_[[0] * 8, np.arange(n) % 10]),
        ):
            (tmp_path / f"{stem}-{kind}-ubyte.gz").write_bytes(gzip.compress(array.astype(np.uint8).tobytes()))
    experiments.main(["--make-data", str(tmp_path), str(tmp_path / "F")])
    assert [x.name for x in sorted((tmp_path / "F/train/3").iterdir())] == [f"{i:05}.png" for i in (3, 13, 23)]
    experiments.main(["--make-data", str(tmp_path / "F"), str(tmp_path / "P")])
    f, p = (main_pcl.build_datasets(str(tmp_path / x)) for x in "FP")
    assert len(f.train) == 30 and len(f.val) == 10 and f.fingerprint == p.fingerprint


def test_the_readmes_tables_are_those_of_the_stored_rows():
    root = Path(main_pcl.__file__).parent
    rows, readme = experiments.read(root / "results" / "experiments.csv"), (root / "README.md").read_text()
    assert len({(row["experiment"], row["command"]) for row in rows}) == len(rows)  # no run counts twice
    names = {row["experiment"] for row in rows}
    assert names and all(experiments.table(name, rows) in readme for name in names)
    shown = [line for line in readme.splitlines() if line.startswith(("| P |", "| F |", "| D |"))]
    assert len(shown) == sum(len(list(experiments.rows_of(name, rows))) for name in names)
