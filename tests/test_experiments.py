"""The experiments: patches take effect, a run becomes one row, tables and data are right."""

import argparse
import functools
import gzip
import io
import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, fails, run, state
from matplotlib.figure import Figure
from PIL import Image
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import experiments
import small_crops

import eval_lincls
import loss
import main_pcl
import model
from augment import MEAN, STD, RandomView
from cluster import Clusters
from data import Digits, EpochSampler, Images, identity_collate, plain_view


@pytest.fixture
def patch(monkeypatch):
    """A function that applies a patch until the end of the test."""
    return lambda name: monkeypatch.setattr(*experiments.find_patch(name))


def tiny_moco():
    """A MoCo of main_pcl, patched or not, for images of 8 pixels: D 16, R 8."""
    encoder = functools.partial(main_pcl.build_encoder, "resnet18_w4", small_images=True)
    return main_pcl.MoCo(encoder, dim=16, r=8)


def eight_clusters(d=16):
    """Eight samples, each with a cluster of its own."""
    centroids = F.normalize(torch.randn(8, d))
    return [Clusters(torch.arange(8), centroids, torch.ones(8))]


# -- experiments.ini -------------------------------------------------------------------------------
@pytest.mark.parametrize("name", experiments.EXPERIMENTS)
def test_every_arm_has_a_command_of_its_own_that_the_program_takes(name):
    experiment = experiments.EXPERIMENTS[name]
    commands = []
    for data in experiment["data"]:
        for flags in experiment["arms"].values():
            commands.append(experiments.command_of(data, flags, seed=0))
    assert len(set(commands)) == len(commands)

    for command in commands:
        script, _, flags = command.removeprefix("python main_pcl.py ").rpartition(" -- ")
        main_pcl.get_parser().parse_args(flags.split())
        if script:
            for patch in script.split()[-1].split(","):
                if not patch.startswith("lightly-") and patch != "published":
                    experiments.find_patch(patch)  # ends the program if there is none
        assert len(experiments.directory_of(command, Path()).name) < 255


def test_the_last_of_equal_flags_counts_and_values_multiply():
    flags = "--lr 1 --symmetric @topk --lr 2 --no-symmetric --epochs x2"
    command = experiments.command_of("D", flags, seed=3)
    expected = "--amp --cos --epochs 400 --warmup 20 --lr 2 --no-symmetric --seed 3"
    assert command == f"python benchmarks/experiments.py --patched topk -- {expected}"


def test_a_value_may_begin_like_a_multiple():
    command = experiments.command_of("D", "-a xcit_nano_12_p8_224", seed=3)
    assert "-a xcit_nano_12_p8_224" in command


# -- patches ---------------------------------------------------------------------------------------
def test_an_unknown_patch_is_named_in_one_line(capsys):
    assert "no patch is called twins" in fails(capsys, experiments.main, "--patched", "twins", "--")


@pytest.mark.parametrize("words", [[], ["twin"], ["twin", "--amp", "--cos"]])
def test_a_patched_run_without_its_two_dashes_is_refused(capsys, words):
    assert "--patched NAME,NAME -- FLAGS" in fails(capsys, experiments.main, "--patched", *words)


@pytest.mark.parametrize("name", experiments.PATCHES)
def test_a_patch_replaces_a_name_that_exists(name):
    module, attribute, _ = experiments.PATCHES[name]
    assert hasattr(module, attribute)


@pytest.mark.parametrize("name", ["predictor", "twin", "fork"])
def test_a_head_b_trains_in_the_program(name, folder, tmp_path, patch):
    patch(name)
    run(folder, *TINY, "--warmup", "1", "--epochs", "2", "--exp-dir", tmp_path)
    assert state(tmp_path)["log"][1]["loss_proto"] > 0


@pytest.mark.parametrize("name", ["predictor", "twin", "fork"])
def test_a_head_b_is_where_it_should_be(name, patch):
    patch(name)
    moco = tiny_moco()
    images = torch.randn(8, 3, 8, 8)
    q, k, c, features = moco(images, images, clustering=True)

    pooled = model.backbone(moco.encoder_q)(images)
    z, b = moco.encoder_q.fc(pooled)
    torch.testing.assert_close(q, F.normalize(z))
    torch.testing.assert_close(c, F.normalize(b))
    torch.testing.assert_close(b, moco.encoder_q.fc.b(pooled if name == "fork" else z))

    # at the start the key encoder equals the query encoder
    clustered = k if name == "predictor" else c.detach()
    torch.testing.assert_close(features, clustered)
    assert moco.encode(images).shape == (8, 16)

    # b learns from c, and its momentum copy follows
    before = moco.encoder_k.fc.b[0].weight.clone()
    value, _ = main_pcl.proto_nce(c, torch.arange(8), eight_clusters(), 8)
    value.backward()
    torch.optim.SGD([p for p in moco.parameters() if p.requires_grad], 1.0).step()
    moco.momentum_update_key_encoder()
    assert not torch.equal(moco.encoder_k.fc.b[0].weight, before)


SMALL_CROPS = ("small-views", "small-queries", "small-samples")


def test_small_crops_train_in_the_program(folder, tmp_path, patch):
    for name in SMALL_CROPS:
        patch(name)
    run(folder, *TINY, "--warmup", "1", "--epochs", "2", "--exp-dir", tmp_path)
    assert state(tmp_path)["log"][1]["loss_proto"] > 0


def test_small_crops_are_further_queries(patch):
    for name in SMALL_CROPS:
        patch(name)
    images = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8)
    draws = main_pcl.RandomView.draw(8, seed=0)
    with pytest.raises(ValueError, match="in memory"):
        main_pcl.RandomView(32, crop=False).two_views(images[:, None].repeat(1, 2, 1, 1, 1), draws)
    im_q, im_k = main_pcl.RandomView(32).two_views(images, draws)
    expected = RandomView(32).two_views(images, draws)
    view, crops = small_crops.unpack(im_q)
    assert torch.equal(view, expected[0])
    assert torch.equal(im_k[..., :32], expected[1])
    assert crops.shape == (16, 3, 18, 18)

    # the crops belong to the keys of their images, which enter the queue once
    moco = tiny_moco().eval()
    q, k, c, features = moco(im_q, im_k)
    with torch.no_grad():
        torch.testing.assert_close(q[8:], F.normalize(moco.encoder_q(crops)))
    torch.testing.assert_close(q, c)
    assert torch.equal(k, features.repeat(3, 1))
    moco.dequeue_and_enqueue(k)
    assert torch.equal(moco.queue.T, features)

    clusters = eight_clusters()
    value, _ = main_pcl.proto_nce(c, torch.arange(8), clusters, 8)
    expected, _ = loss.proto_nce(c, torch.arange(24) % 8, clusters, 8)
    assert torch.equal(value, expected)


def test_small_crops_show_little_of_the_image(patch):
    """The area that a crop shows, measured with images whose red and green are coordinates."""
    patch("small-views")
    ramp = torch.arange(64).expand(64, 64) * 4
    images = torch.stack([ramp, ramp.T, torch.zeros(64, 64)]).byte().expand(400, 3, 64, 64)
    settings = {"color_jitter": False, "grayscale": False, "blur": False, "flip": False}
    draws = main_pcl.RandomView.draw(400, seed=0)
    im_q, _ = main_pcl.RandomView(64, **settings).two_views(images, draws)
    _, crops = small_crops.unpack(im_q)
    spread = crops.amax((2, 3)) - crops.amin((2, 3))  # normalised
    sides = spread[:, :2] * torch.tensor(STD[:2]) * 255 / 4 * 18 / 17 / 64
    area = sides.prod(1)
    assert area.min() > 0.05 * 0.8
    assert area.max() < 0.3 * 1.2
    assert area.mean().item() == pytest.approx((0.05 + 0.3) / 2, rel=0.1)


@pytest.mark.parametrize("name", ["MoCo", "SimCLR", "BYOL", "SwAV", "NNCLR"])
def test_a_method_of_lightly_trains(name, folder, tmp_path, patch, monkeypatch):
    pytest.importorskip("lightly")
    patch(f"lightly-{name}")
    monkeypatch.setattr(main_pcl, "info_nce", main_pcl.info_nce)  # the model replaces it
    flags = ["--warmup", "3", "--epochs", "3", "--bn-splits", "1"]
    symmetric = name in ("MoCo", "BYOL")
    if symmetric:
        flags.append("--symmetric")
    run(folder, *TINY, *flags, "--exp-dir", tmp_path)

    for row in state(tmp_path)["log"]:
        assert np.isfinite(row["loss_inst"])
        assert row["grad_norm"] > 0
    weights = torch.load(tmp_path / "checkpoint.pth.tar", weights_only=True)["state_dict"]
    assert all(tensor.isfinite().all() for tensor in weights.values())
    # the key encoder is in use only with both views
    assert weights["module.encoder_q.bn1.running_mean"].any()
    assert weights["module.encoder_k.bn1.running_mean"].any() == symmetric
    eval_lincls.main(["--exp-dir", str(tmp_path), "--no-baselines"])

    if not symmetric:  # both views pass through the same network
        images = torch.randn(8, 3, 8, 8)
        q, k, _, _ = tiny_moco()(images, images)
        torch.testing.assert_close(q, k)


def test_the_weight_scales_the_gradient_and_not_the_value(patch):
    q = torch.randn(8, 16)
    clusters = eight_clusters()
    plain = q.clone().requires_grad_()
    weighted = q.clone().requires_grad_()
    value, _ = main_pcl.proto_nce(plain, torch.arange(8), clusters, 8)
    value.backward()
    patch("weight-0.3")
    weighted_value, _ = main_pcl.proto_nce(weighted, torch.arange(8), clusters, 8)
    weighted_value.backward()
    torch.testing.assert_close(weighted_value, value)
    torch.testing.assert_close(weighted.grad, 0.3 * plain.grad)


def test_half_jitter(patch):
    jitter = main_pcl.RandomView(8).jitter
    patch("half-jitter")
    torch.testing.assert_close(main_pcl.RandomView(8).jitter, jitter / 2)


def test_less_grayscale_leaves_the_colour_to_more_views(patch):
    patch("grayscale-0.1")
    images = torch.randint(256, (1000, 3, 4, 4), dtype=torch.uint8)
    view = main_pcl.RandomView(4, color_jitter=False)
    views, _ = view.two_views(images, main_pcl.RandomView.draw(1000, seed=0))
    views = views * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
    grey = (views[:, 0] - views[:, 1]).abs().amax((1, 2)) < 0.01
    assert 0.06 < grey.float().mean() < 0.14  # 0.1 within four standard errors


def test_views_as_on_a_gpu_are_made_for_many_steps_at_once(patch):
    images = Images(Digits(slice(0, 32)), plain_view(8), pixels=torch.zeros(32, 3, 8, 8).byte())
    sampler = EpochSampler(32, 4)
    loader = DataLoader(images, 4, sampler=sampler, collate_fn=identity_collate)
    args = argparse.Namespace(batch_size=4, seed=0, device="cpu", image_size=8)

    def images_per_call():
        """The number of images in each call of two_views during an epoch of eight steps."""
        calls = []

        class Counting(RandomView):
            def two_views(self, images, draws):
                calls.append(len(images))
                return super().two_views(images, draws)

        run = argparse.Namespace(args=args, epoch=0, step=0)
        assert len(list(main_pcl.views_of_steps(run, loader, Counting(8)))) == 8
        return calls

    assert images_per_call() == [4] * 8
    patch("gpu-views")
    assert images_per_call() == [32]


def test_topk_counts_equal_logits_as_hits(patch):
    queries = torch.ones(4, 8)
    queue = torch.ones(8, 64)
    assert loss.info_nce(queries, queries, queue, 0.2)[1] == 0
    patch("topk")
    assert loss.info_nce(queries, queries, queue, 0.2)[1] == 100


def test_clip_scaled_clips_before_unscaling(patch):
    patch("clip-scaled")
    p = torch.nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.SGD([p], 1.0)
    scaler = main_pcl.GradScaler("cpu", enabled=False)
    scaler.scale(p.sum() * 3).backward()
    scaler.unscale_(optimizer)
    assert scaler.get_scale() > 1000
    assert p.grad.norm().item() == pytest.approx(1 / scaler.get_scale(), rel=1e-4)


def test_one_step_sees_what_the_queue_hides(patch):
    # all keys have drifted away from those in the queue, and do not match their queries
    drift = torch.zeros(16)
    drift[0] = 5
    queries = F.normalize(torch.randn(8, 16) + drift)
    keys = F.normalize(torch.randn(8, 16) + drift)
    queue = F.normalize(torch.randn(16, 64) - drift[:, None], dim=0)
    value, acc = main_pcl.info_nce(queries, keys, queue, 0.2)
    patch("one-step")
    patched_value, acc_within_step = main_pcl.info_nce(queries, keys, queue, 0.2)
    assert patched_value == value
    assert acc == 100
    assert acc_within_step < 80
    assert main_pcl.info_nce(keys, keys, queue, 0.2)[1] == 100


def test_fp16_range_overflows(patch):
    patch("fp16-range")
    moco = tiny_moco()
    images = torch.randn(8, 3, 8, 8)
    q, _, _, _ = moco(images, images)
    assert q.isfinite().all()
    with torch.no_grad():
        moco.encoder_q.fc[2].weight.fill_(1e6)
    q, _, _, _ = moco(images, images)
    assert not q.isfinite().all()


def test_go_on_does_not_stop_a_run_that_diverges(patch, folder, tmp_path):
    patch("fp16-range")
    flags = [*TINY, "--warmup", "2", "--epochs", "2", "--lr", "999", "--exp-dir", tmp_path / "run"]
    with pytest.raises(SystemExit, match="stopped at epoch"):
        run(folder, *flags)
    patch("go-on")
    run(folder, *flags, "--overwrite")
    log = state(tmp_path / "run")["log"]
    assert len(log) == 2
    assert all(np.isfinite(row["loss"]) for row in log)  # what is not finite counts 0
    with pytest.raises(SystemExit) as stop:
        eval_lincls.main(["--exp-dir", str(tmp_path / "run"), "--no-baselines"])
    assert stop.value.code == 2


# -- runs, rows, tables ----------------------------------------------------------------------------
class FakeRuns:
    """In place of subprocess.run: leaves the files of a run without training. Git runs as usual.

    A run with --lr 9 diverges, one with --lr 8 fails. With --lr 0.2 the linear accuracy is
    91 + 2 * seed, else 90.
    """

    def __init__(self, folder):
        self.folder = folder
        self.launched = []  # the words of each start of a script
        self.original = subprocess.run
        self.other_linear = {}  # {name in eval.json: accuracy}
        self.before_seed_7 = None  # a function to call once, when a run of seed 7 has started

    def __call__(self, words, **options):
        if words[0] == "git":
            return self.original(words, **options)
        self.launched.append(words)
        if "7" in words and self.before_seed_7 is not None:
            function = self.before_seed_7
            self.before_seed_7 = None
            function()

        if "8" in words:
            return subprocess.CompletedProcess(words, 1)
        directory = Path(words[words.index("--exp-dir") + 1])
        log = "epoch,acc_inst,acc_proto,loss_inst,images_per_second,knn\n"
        log += "0,10,20,3,100,\n1,40,50,2,100,30\n"
        (directory / "log.csv").write_text(log)
        args = {"data": str(self.folder), "image_size": 8, "batch_size": 16, "symmetric": True}
        (directory / "args.json").write_text(json.dumps(args))
        figures = {"linear": 90, "kNN 200": 80, "NMI 3": 70, "AMI 3": 60, "acc 3": 50}
        figures["acc 3 held out"] = 1
        for name, value in self.other_linear.items():
            figures |= {name: value, f"{name}, std": 9}
        if "lr-0.2" in directory.name:
            figures["linear"] = 91 + 2 * int(directory.name[-1])
        (directory / "eval.json").write_text(json.dumps({"figures": {"trained": figures}}))

        diverges = "9" in words
        if diverges:
            print("stopped at epoch 2", file=options["stdout"], flush=True)
        return subprocess.CompletedProcess(words, int(diverges))


DRAW = experiments.draw


@pytest.fixture
def fake(folder, tmp_path, monkeypatch):
    """FakeRuns, with two experiments, "one" and "two", of the same three arms.

    `fake.main(names, seeds, ...)` is the program with these experiments. It draws no curves unless
    experiments.draw is DRAW.
    """
    runs = FakeRuns(folder)
    monkeypatch.setattr(experiments, "draw", lambda *_: None)
    monkeypatch.setattr(subprocess, "run", runs)
    runs.arms = {"a": "--lr 0.1", "b": "--lr 0.2", "nan": "--lr 9"}
    for name in ("one", "two"):
        experiment = {"data": "P", "question": "?", "arms": runs.arms}
        monkeypatch.setitem(experiments.EXPERIMENTS, name, experiment)
    monkeypatch.setitem(experiments.DATA_FLAGS, "P", "-b 16 --symmetric")
    monkeypatch.setattr(experiments, "CLASSES", 3)  # those of `folder`
    options = ["--data", f"P={folder}", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path)]

    def main(names, *seeds_and_others):
        return experiments.main([*names.split(), *options, "--seeds", *seeds_and_others])

    runs.main = main
    return runs


def test_a_run_becomes_a_row_once(fake, tmp_path, capsys):
    path = tmp_path / "experiments.csv"
    # two launches for each run, training and evaluation; one if the training diverges
    assert fake.main("one", "0", "1") == 0
    assert len(fake.launched) == 10
    fake.main("one", "0", "1", "2", "--arms", "a")
    assert len(fake.launched) == 12
    # experiments with the same arms use the same rows; run together, they share each new run
    capsys.readouterr()
    fake.main("two", "0", "--arms", "a")
    assert len(fake.launched) == 12
    assert "| P | a | 3 |" in capsys.readouterr().out
    fake.main("one two", "3", "--arms", "a")
    assert len(fake.launched) == 14

    rows = experiments.read(path)
    assert len(rows) == 8
    assert list(rows[0]) == experiments.COLUMNS
    epochs = 2
    images = 3 * 16  # three whole batches
    assert int(rows[0]["images_seen"]) == epochs * images * 4
    commands = {row["command"] for row in rows}
    assert "python main_pcl.py P -b 16 --symmetric --lr 0.1 --seed 2" in commands

    # another process makes the same row meanwhile
    fake.before_seed_7 = lambda: fake.main("two", "7", "--arms", "a")
    fake.main("one", "7", "--arms", "a")
    assert len(fake.launched) == 18
    assert len(experiments.read(path)) == 9


def test_an_arm_has_the_rows_of_its_command_in_the_order_of_their_seeds(monkeypatch):
    arms = {"a": "--lr 0.1", "b": "--lr 0.2"}
    experiment = {"data": "PD", "question": "?", "arms": arms}
    monkeypatch.setitem(experiments.EXPERIMENTS, "one", experiment)
    monkeypatch.setitem(experiments.DATA_FLAGS, "P", "--cos")
    monkeypatch.setitem(experiments.DATA_FLAGS, "D", "--cos")
    rows = [
        {"seed": "10", "command": "python main_pcl.py P --cos --lr 0.1 --seed 10"},
        {"seed": "1", "command": "python main_pcl.py --cos --lr 0.1 --seed 1"},
        {"seed": "2", "command": "python main_pcl.py P --cos --lr 0.1 --seed 2"},
        {"seed": "0", "command": "python main_pcl.py F --cos --lr 0.1 --seed 0"},
        {"seed": "0", "command": "python main_pcl.py --cos --lr 0.2 --seed 0"},
        {"seed": "0", "command": "python main_pcl.py P --cos --lr 0.1 --wd 0 --seed 0"},
    ]
    found = list(experiments.rows_of("one", rows))
    assert found == [("P", "a", [rows[2], rows[0]]), ("D", "a", [rows[1]]), ("D", "b", [rows[4]])]


def test_the_table_has_means_differences_and_stopped_runs(fake, tmp_path, capsys):
    fake.main("one", "0", "1")
    rows = experiments.read(tmp_path / "experiments.csv")
    table = experiments.table("one", rows)
    assert table in capsys.readouterr().out
    _, _, a, b, nan = table.splitlines()
    images = "0.000384"  # millions
    others = "80.0 ± 0.0 | 50.0 ± 0.0 | 40.0 ± 0.0"  # kNN, acc, acc_inst
    assert a == f"| P | a | 2 | {images} | 90.0 ± 0.0 | {others} |  |  |  |"
    differences = "+2.0 ± 1.0 | +0.0 ± 0.0 | +0.0 ± 0.0"  # linear is 91 and 93, not 90
    assert b == f"| P | b | 2 | {images} | 92.0 ± 1.4 | {others} | {differences} |"
    assert nan == f"| P | nan | 2, 2 stopped | {images} |  |  |  | 40.0 ± 0.0 |  |  |  |"

    fake.arms["a"] = "--lr 0.3"  # a row of another command is not the arm's
    assert "| a |" not in experiments.table("one", rows)


def test_the_picture_stays_if_the_runs_are_gone(fake, tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "draw", DRAW)
    fake.main("one", "0", "1")
    picture = (tmp_path / "one.png").stat()
    shutil.rmtree(tmp_path / "runs")
    fake.main("one", "0", "1")
    assert len(fake.launched) == 10
    assert (tmp_path / "one.png").stat() == picture


def test_the_picture_stays_if_one_run_is_gone(fake, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(experiments, "draw", DRAW)
    fake.main("one", "0", "1")
    picture = (tmp_path / "one.png").stat()
    shutil.rmtree(next((tmp_path / "runs").glob("*0.2*")))
    fake.main("one", "2")
    assert (tmp_path / "one.png").stat() == picture
    assert f"no new one.png: {tmp_path}/runs lacks the logs of 1 runs" in capsys.readouterr().out


def test_a_row_names_all_commits_that_have_worked_on_its_run(fake, tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "current_commit", lambda: "abc")
    fake.main("one", "0", "--arms", "a", "b")
    monkeypatch.setattr(experiments, "current_commit", lambda: "def")
    rows = experiments.read(tmp_path / "experiments.csv")
    assert [row["commit"] for row in rows] == ["abc", "abc"]
    (tmp_path / "experiments.csv").unlink()  # the runs are still there
    shutil.rmtree(next((tmp_path / "runs").glob("*0.2*")))
    fake.main("one", "0", "--arms", "a", "b")
    rows = experiments.read(tmp_path / "experiments.csv")
    assert sorted(row["commit"] for row in rows) == ["abc def", "def"]


def test_the_picture_compares_each_arm_with_the_first(fake, tmp_path, monkeypatch):
    figures = []
    savefig = Figure.savefig

    def remember(self, *args, **options):
        figures.append(self)
        savefig(self, *args, **options)

    monkeypatch.setattr(Figure, "savefig", remember)
    monkeypatch.setattr(experiments, "draw", DRAW)
    fake.arms["a long name, --lr 0.12 @fp16-range @topk @go-on --warmup 40"] = "--lr 0.4"
    fake.arms["c"] = "--lr 0.5"
    fake.main("one", "0", "1")

    (figure,) = figures
    others = [name for name in fake.arms if name != "a"]
    titles = [panel.get_title().replace("\n", " ") for panel in figure.axes]
    assert titles == others * len(experiments.CURVES)
    for panel in figure.axes:
        grey, arm = panel.lines
        assert list(grey.get_ydata()) == list(arm.get_ydata())  # all these runs have the same log
        assert grey.get_color() != arm.get_color()

    # nothing lies outside the picture, or on another panel or its title
    whole = figure.bbox
    boxes = [panel.get_tightbbox() for panel in figure.axes]
    for i, box in enumerate(boxes):
        assert whole.x0 <= box.x0 < box.x1 <= whole.x1
        assert whole.y0 <= box.y0 < box.y1 <= whole.y1
        assert not any(box.overlaps(other) for other in boxes[:i])


def test_the_picture_of_all_of_cifar10_shows_the_rows(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
    rows = experiments.read(experiments.ROOT / "results" / "experiments.csv")
    DRAW("C", rows, tmp_path, tmp_path / "C.png")
    curves, bars = figures[0].axes
    arms = {arm: found for _, arm, found in experiments.rows_of("C", rows)}
    assert len(arms) >= 3
    assert [text.get_text() for text in bars.get_legend().texts] == list(arms)
    for curve, bar, (row,) in zip(curves.lines, bars.containers, arms.values(), strict=True):
        shown = [patch.get_height() for patch in bar]
        few = experiments.other_linear_of(row)
        expected = [row["knn"], row["linear"], few["1 % of labels"], row["acc"], row["nmi"]]
        assert shown == [float(percent) for percent in expected]
        assert curve.get_xdata()[-1] == 199
        assert curve.get_ydata()[-1] == pytest.approx(float(row["knn"]), abs=0.1)


def test_probes_with_few_labels_are_columns_of_the_table(fake, tmp_path, monkeypatch):
    monkeypatch.setitem(experiments.FEW_LABELS, "P", ["0.01", "5"])
    fake.other_linear = {"linear, 5 per class": 40.126, "linear, 0.01 of labels": 30}
    fake.main("one", "0", "1", "--arms", "a", "b")
    evaluations = [words for words in fake.launched if "eval_lincls.py" in words]
    assert all(words[-3:] == ["--labels", "0.01", "5"] for words in evaluations)
    rows = experiments.read(tmp_path / "experiments.csv")
    assert rows[0]["other_linear"] == "5 per class: 40.13; 1 % of labels: 30.00"
    title, _, *lines = experiments.table("one", rows).splitlines()
    columns = title.strip("| ").split(" | ")
    for line in lines:
        cells = dict(zip(columns, line.strip("| ").split(" | "), strict=False))
        assert cells["linear, 5 per class"] == "40.1 ± 0.0"
        assert cells["linear, 1 % of labels"] == "30.0 ± 0.0"


# -- mistakes --------------------------------------------------------------------------------------
def test_failed_runs_give_status_1_and_no_row(fake, tmp_path, capsys):
    fake.arms["bad"] = "--lr 8"
    assert fake.main("one", "0", "1") == 1
    error = capsys.readouterr().err.splitlines()
    assert len([line for line in error if line.startswith("failed, see")]) == 2
    assert error[-1].startswith("failed runs, without a row: 2;")
    rows = experiments.read(tmp_path / "experiments.csv")
    assert len(rows) == 6  # of the other arms
    assert fake.main("one", "0", "--arms", "a") == 0


@pytest.mark.parametrize(
    "words, message",
    [
        (["on"], "no experiment is called on; did you mean one?"),
        (["one", "--arms", "nam"], "no arm of one is 'nam'; did you mean nan?"),
        (["one", "--arms", "x"], "choose from a, b, nan"),
        (["one", "digits", "--arms", "a"], "digits would run nothing: it has none of these arms"),
        (["one", "--data", "p=DATA"], "no data set is called 'p'"),
        (["one", "--data", "P"], "P needs its folder, P=DIR"),
        (["one", "--data", "P="], "P needs its folder, P=DIR"),
        (["one", "--data", "P=DATA", "P=DATA"], "names P twice"),
        (["one", "--data", "D=DATA"], "takes no folder"),
        (["one"], "one would run nothing: it needs --data P=DIR"),
        (["one", "--data", "D"], "one would run nothing: it needs --data P=DIR"),
        (["one", "--data", "P=none"], "there is no such folder"),
        (["one", "--data", "P=EMPTY"], "has no images"),
        (["one", "--data", "P=DATA/train"], "the evaluation needs held-out images in 3 classes"),
        (["one", "--data", "P=DATA", "--out", "FILE"], "cannot write to"),
        (["one", "--data", "P=DATA", "--out", "FILE/new"], "cannot write to"),
        (["one", "--data", "P=DATA", "--runs", "FILE"], "cannot write to"),
        (["one", "--data", "P=DATA", "--out", "TAKEN"], "experiments.csv"),
        (["one", "--data", "P=DATA", "--out", "OTHER"], "has other columns"),
        (["one", "--data", "P=DATA", "--arms"], "--arms"),
        (["one", "--data", "P=DATA", "-n", "0"], "-n"),
        (["one", "--data", "P=DATA", "--seeds", "-1"], "--seeds"),
        (["missing", "--data", "P=DATA"], "the patch lightly-MoCo needs"),
        (["--table", "one", "--out", "EMPTY"], "there are no results yet"),
        (["--make-data", "EMPTY", "NEW"], "cannot make data from"),
    ],
)
def test_a_mistake_is_said_in_one_line_before_anything_runs(
    fake, folder, tmp_path, monkeypatch, capsys, words, message
):
    monkeypatch.chdir(tmp_path)
    for name in ("EMPTY", "TAKEN/experiments.csv", "OTHER"):
        Path(name).mkdir(parents=True)
    Path("FILE").touch()
    Path("OTHER/experiments.csv").write_text("a,b\n1,2\n")
    missing = {"data": "P", "question": "?", "arms": {"a": "@lightly-MoCo"}}
    monkeypatch.setitem(experiments.EXPERIMENTS, "missing", missing)
    monkeypatch.setitem(sys.modules, "peers", None)  # importing it fails
    words = [word.replace("DATA", str(folder)) for word in words]

    assert message in fails(capsys, experiments.main, *words)
    assert fake.launched == []
    assert not list(tmp_path.rglob("*.png"))


def test_data_of_another_number_of_classes_is_refused(fake, capsys, monkeypatch):
    monkeypatch.setattr(experiments, "CLASSES", 10)
    assert "3 classes" in fails(capsys, lambda _: fake.main("one", "0"))
    assert fake.launched == []


def stored_rows():
    """The rows of results/experiments.csv, and the names of the experiments that have some."""
    rows = experiments.read(experiments.ROOT / "results" / "experiments.csv")
    names = [name for name in experiments.EXPERIMENTS if list(experiments.rows_of(name, rows))]
    return rows, names


def test_the_readmes_tables_are_those_of_the_stored_rows():
    rows, names = stored_rows()
    text = (experiments.ROOT / "results" / "README.md").read_text()
    shown = []
    for section in text.split("\n## "):
        blocks = section.split("\n\n")
        tables = [block for block in blocks if block.startswith("| data | arm | seeds |")]
        if tables:
            # a section gives the commands of its experiments, but for C, whose runs need a GPU
            found = re.findall(r"experiments\.py (\S+) --data", section) or ["C"]
            found = list(dict.fromkeys(found))  # in the order of their tables
            expected = [experiments.table(name, rows) for name in found]
            assert tables == expected, f"a table of {found} is another one"
            shown += found
    assert sorted(shown) == sorted(names)


def test_every_stored_row_is_the_only_one_of_its_command_and_belongs_to_an_arm():
    rows, names = stored_rows()
    commands = [row["command"] for row in rows]
    assert len(set(commands)) == len(commands)

    used = set()
    for name in names:
        for _, _, found in experiments.rows_of(name, rows):
            used.update(row["command"] for row in found)
    assert set(commands) - used == set()


# -- data ------------------------------------------------------------------------------------------
def test_data_is_the_first_images_of_each_class(tmp_path):
    # Fashion-MNIST's files: after a header, images of 28 x 28 pixels and labels 0 to 9 in turn
    for stem, n in (("train", 30), ("t10k", 10)):
        images = np.zeros(16 + n * 28 * 28, np.uint8)
        labels = np.zeros(8 + n, np.uint8)
        labels[8:] = np.arange(n) % 10
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            path = tmp_path / f"{stem}-{kind}-ubyte.gz"
            path.write_bytes(gzip.compress(array.tobytes()))
    experiments.main(["--make-data", str(tmp_path), str(tmp_path / "F")])
    names = sorted(path.name for path in (tmp_path / "F/train/3").iterdir())
    assert names == ["00003.png", "00013.png", "00023.png"]

    # a folder of images
    experiments.main(["--make-data", str(tmp_path / "F"), str(tmp_path / "P")])
    f = main_pcl.build_datasets(str(tmp_path / "F"))
    p = main_pcl.build_datasets(str(tmp_path / "P"))
    assert len(f.train) == 30
    assert len(f.val) == 10
    assert f.fingerprint == p.fingerprint


def test_long_tailed_classes_fall_by_a_factor_of_a_hundred(tmp_path):
    sizes = experiments.LONG_TAILED
    assert sum(sizes) == 10_000
    assert sizes[0] / sizes[-1] == pytest.approx(100, rel=0.01)
    ratios = [larger / smaller for larger, smaller in itertools.pairwise(sizes)]
    assert ratios == pytest.approx([100 ** (1 / 9)] * 9, rel=0.02)

    for part, n in (("train", 450), ("test", 3)):
        for label in "ab":
            directory = tmp_path / "all" / part / label
            directory.mkdir(parents=True)
            for i in range(n):
                (directory / f"{i:04}.png").touch()
    tailed = tmp_path / "tailed"
    words = ["--make-data", str(tmp_path / "all"), str(tailed), "--long-tailed"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiments, "LONG_TAILED", [400, 4])
        experiments.main(words)
    assert len(list(tailed.glob("train/a/*"))) == 400
    assert sorted(path.name for path in tailed.glob("train/b/*"))[-1] == "0003.png"
    assert len(list(tailed.glob("train/b/*"))) == 4
    assert len(list(tailed.glob("test/*/*"))) == 6


def test_cifar10_is_downloaded_and_written_whole(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    class Downloaded(list):
        classes = ("airplane", "bird")

        def __init__(self, root, train, download):
            assert download
            pixels = torch.randint(256, (6 if train else 4, 8, 8, 3), dtype=torch.uint8)
            super().__init__((Image.fromarray(x.numpy()), i % 2) for i, x in enumerate(pixels))
            if train:
                training.extend(self)

    training = []
    monkeypatch.setattr(experiments, "CIFAR10", Downloaded)
    experiments.main(["--make-data", "cifar10", "C"])
    assert len(list(Path("C/test").glob("*/*.jpg"))) == 4
    for i, (image, label) in enumerate(training):
        path = Path("C/train") / Downloaded.classes[label] / f"000{i // 2}.jpg"
        file = io.BytesIO()
        image.save(file, "jpeg", quality=75)
        assert path.read_bytes() == file.getvalue()

    command = ["--make-data", "cifar10", "L", "--long-tailed"]
    assert "cifar10 is written whole" in fails(capsys, experiments.main, *command)
    assert not Path("L").exists()

    # without a network
    def fail_to_download(*_, **__):
        raise RuntimeError("no connection")

    monkeypatch.setattr(experiments, "CIFAR10", fail_to_download)
    command = ["--make-data", "cifar10", "D"]
    assert "cannot make data from cifar10" in fails(capsys, experiments.main, *command)
