"""The command line: defaults, help, values that are refused; and what the arguments make of schedule and optimizer."""

import argparse
import functools
import re

import pytest
import torch
from conftest import fails

import eval_lincls
import main_pcl
from runtime import cli

# -- schedule and optimizer


def rate(progress, **options):
    args = {"lr": 0.4, "lr_warmup": 0, "cos": False, "epochs": 8, "schedule": []}
    return main_pcl.learning_rate(progress, argparse.Namespace(**(args | options)))


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, {0: 0.4, 7.9: 0.4}),
        ({"schedule": [3, 5]}, {0: 0.4, 2.99: 0.4, 3: 0.04, 4.5: 0.04, 5: 0.004, 7.9: 0.004}),
        ({"cos": True}, {0: 0.4, 2: 0.3414214, 4: 0.2, 6: 0.0585786, 8: 0}),
        ({"cos": True, "schedule": [3, 5]}, {4: 0.2, 6: 0.0585786}),  # in place of the schedule
        ({"lr_warmup": 4}, {0: 0.0001, 1: 0.1001, 2: 0.2001, 3.999: 0.4, 4: 0.4, 7: 0.4}),
        ({"lr_warmup": 2, "cos": True}, {0: 0.0002, 1: 0.2002, 2: 0.3414214, 4: 0.2}),
        ({"lr_warmup": 4, "schedule": [3, 5]}, {3: 0.3001, 4: 0.04, 5: 0.004}),
    ],
    ids=["constant", "schedule", "cos", "cos, schedule", "warmup", "warmup, cos", "warmup, schedule"],
)
def test_learning_rate(options, expected):
    assert {progress: rate(progress, **options) for progress in expected} == pytest.approx(expected, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("optim", main_pcl.OPTIMIZERS)
def test_which_weights_decay(optim):
    """A step along gradients of zero shrinks exactly those: sgd's all, the others' but for biases and batch norm."""
    encoder = functools.partial(main_pcl.build_encoder, "resnet18_w4", small_images=True)
    model = main_pcl.MoCo(encoder, 8, 16, cluster_head="report")
    args = argparse.Namespace(optim=optim, lr=0.1, wd=0.1, momentum=0.9)
    optimizer = main_pcl.build_optimizer(model, args)
    for p in model.parameters():
        p.data.fill_(1)
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    optimizer.step()
    shrunk = {name for name, p in model.named_parameters() if (p < 1).all()}
    assert all((p == 1).all() for name, p in model.named_parameters() if name not in shrunk)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[0] for name in trained} == {"encoder_q", "v"}
    spared = {name for name in trained if re.search(r"\.bias$|bn\d|downsample\.1", name)}
    assert len(spared) > 40 and shrunk == (trained if optim == "sgd" else trained - spared)


# -- defaults


FITTING = {"crop_min": 0.25, "blur": False, "flip": True}  # augmentation that fits the data


def defaults(n, image_size, *flags, world=1):
    datasets = argparse.Namespace(train=range(n), image_size=image_size, augmentation=FITTING)
    args = main_pcl.get_parser().parse_args(flags)
    before = dict(vars(args))
    final = main_pcl.fill_in_defaults(args, datasets, world, "cpu")
    assert vars(args) == before  # a new one comes back
    left_open = ["data", "init", "clip_grad", "exp_dir", "config", "resume"]
    assert [name for name, value in vars(final).items() if value is None] == left_open
    return vars(final)


IMAGENET = {
    "arch": "resnet50",
    "stem": "imagenet",
    "image_size": 224,
    "epochs": 200,
    "batch_size": 256,
    "optim": "sgd",
    "lr": 0.03,
    "lr_warmup": 0,
    "schedule": [120, 160],
    "momentum": 0.9,
    "wd": 1e-4,
    "low_dim": 128,
    "temperature": 0.2,
    "pcl_r": 16384,
    "moco_m": 0.999,
    "num_cluster": [25_000, 50_000, 100_000],
    "warmup": 20,
    "bn_splits": 8,
    "knn_every": 10,
    "amp_dtype": "bf16",
}
CIFAR = IMAGENET | {"arch": "resnet18", "stem": "small", "image_size": 32, "pcl_r": 4096, "moco_m": 0.99}
CIFAR |= {
    "num_cluster": [976, 1951, 3903],
    "batch_size": 128,
    "lr": 0.06,
    "wd": 5e-4,
    "temperature": 0.1,
    "bn_splits": 2,
}
DIGITS = IMAGENET | {"arch": "resnet18_w16", "stem": "small", "image_size": 8, "pcl_r": 64, "moco_m": 0.99}
DIGITS |= {"num_cluster": [28, 56, 112], "batch_size": 128, "lr": 0.015}


@pytest.mark.parametrize(
    "n, image_size, expected",
    [(1_281_167, 224, IMAGENET), (50_000, 32, CIFAR), (1437, 8, DIGITS)],
    ids=["ImageNet", "CIFAR-10", "digits"],
)
def test_defaults_follow_the_data(n, image_size, expected):
    """ImageNet's are those that are published."""
    found = defaults(n, image_size)
    assert {name: found[name] for name in expected} == expected
    assert {name: found[name] for name in FITTING} == FITTING
    assert 1 <= found["workers"] <= 8


def test_defaults_follow_optimizer_batch_and_processes():
    lamb = defaults(50_000, 32, "--optim", "lamb", "-b", "512")
    assert (lamb["lr"], lamb["wd"], lamb["temperature"]) == pytest.approx((0.04, 0.02, 0.1))
    rates = {"sgd": 0.03, "adamw": 1e-3, "lamb": 5e-3, "lars": 0.3}  # four times as high for many small images
    for (n, size), factor in {(1_281_167, 224): 1, (1437, 8): 0.5, (50_000, 32): 2}.items():  # batches of 256, 128, 128
        found = {optim: defaults(n, size, "--optim", optim)["lr"] for optim in rates}
        assert found == pytest.approx({optim: rate * factor for optim, rate in rates.items()})
    assert defaults(50_000, 32, "--optim", "lars")["lr_warmup"] == 10
    eight, three = defaults(1_281_167, 224, world=8), defaults(1_281_167, 224, world=3)
    assert (eight["batch_size"], eight["bn_splits"]) == (256, 1)  # 8 processes are 8 groups
    assert (three["batch_size"], three["bn_splits"]) == (255, 1) and three["lr"] == pytest.approx(0.03 * 255 / 256)
    few = defaults(4, 8)
    assert few["pcl_r"] == 1 and few["num_cluster"] == [2, 2, 2]


def test_a_flag_always_wins():
    flags = ["--arch", "resnet34", "--stem", "imagenet", "-b", "12", "--lr", "3", "--lr-warmup", "7", "--schedule", "4"]
    flags += [
        "--pcl-r",
        "9",
        "--num-cluster",
        "5,6",
        "--moco-m",
        "0",
        "--bn-splits",
        "3",
        "--knn-every",
        "2",
        "-j",
        "0",
    ]
    flags += ["--crop-min", "0.3", "--blur", "--no-flip", "--amp-dtype", "fp16"]
    expected = {"arch": "resnet34", "stem": "imagenet", "batch_size": 12, "lr": 3, "lr_warmup": 7, "schedule": [4]}
    expected |= {"pcl_r": 9, "num_cluster": [5, 6], "moco_m": 0, "bn_splits": 3, "knn_every": 2, "workers": 0}
    expected |= {"crop_min": 0.3, "blur": True, "flip": False, "amp_dtype": "fp16"}
    found = defaults(1437, 8, *flags)
    assert {name: found[name] for name in expected} == expected
    assert defaults(1437, 8, "--schedule")["schedule"] == []  # named, but without an epoch: a constant rate


# -- help


@pytest.mark.parametrize("script", [main_pcl, eval_lincls])
def test_help_says_the_default_of_every_flag(script):
    parser, checked = script.get_parser(), 0
    parts = re.split(r"\n(?=  -)", parser.format_help())
    for action in parser._actions:
        if not action.option_strings or action.dest == "help":
            continue
        (part,) = (part for part in parts if re.match(rf" *{action.option_strings[0]}(?![\w-])", part))
        shown = re.search(r"default:\s*(\S+)", " ".join(part.split()))
        assert shown, part
        if action.default is not None and shown[1].endswith(")"):
            assert shown[1][:-1] == str(action.default)
        checked += 1
    assert checked > 8


def test_progress_is_a_line_a_minute_where_there_is_no_terminal(capsys, monkeypatch):
    now = iter(range(0, 10_000, 25))  # each look at the clock is 25 seconds later
    monkeypatch.setattr("tqdm.std.time", lambda: next(now))
    bar = cli.Progress(range(20), desc="epoch 3")
    for _ in bar:
        bar.say("loss 1.5", 2.0)
    lines = capsys.readouterr().err.strip().splitlines()
    assert 3 <= len(lines) <= 20
    assert all(line.startswith("epoch 3") and "loss 1.5, the run ends in" in line for line in lines), lines
    monkeypatch.undo()
    assert list(cli.Progress(range(20), desc="short")) == [*range(20)]
    assert capsys.readouterr().err == ""


# -- what is refused


@pytest.mark.filterwarnings("ignore:Scale and ratio")
@pytest.mark.parametrize(
    "args, message",
    [
        (["no-such-data"], "neither a folder nor"),
        (["--epochs", "0"], "at least 1"),
        (["--lr", "-1"], "above 0"),
        (["--optim", "adam"], "invalid choice"),
        (["-a", "resnet19"], "unknown arch"),
        (["--num-cluster", "2000"], "more than the 1437"),
        (["--num-cluster", "a"], "num-cluster"),
        (["-b", "4000"], "fewer than one batch"),
        (["-b", "12", "--bn-splits", "8"], "equal groups"),
        (["--crop-min", "1.1"], "at most 1"),
        (["--moco-m", "1.5"], "below 1"),
        (["--resume", "no-such-file"], "no checkpoint"),
        (["--wd", "nan"], "at least 0"),
        (["--wamup", "3"], "did you mean --warmup?"),
        (["--warmup-epochs=3"], "did you mean --warmup-epoch?"),
        (["--num-cluster", "10", "20", "30"], "comma-separated: 10,20,30"),
        (["--init", "no-such-file"], "no file"),
    ],
)
def test_bad_arguments_get_one_line(tmp_path, capsys, args, message):
    assert message in fails(capsys, main_pcl.main, *args, "--exp-dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("script", [main_pcl, eval_lincls])
@pytest.mark.parametrize("value", ["x", "", "-1", "nan", "inf", "1e999", "1,,2", "٣x"])
def test_no_numeric_flag_takes_a_bad_value(capsys, script, value):
    flags = [action.option_strings[-1] for action in script.get_parser()._actions if action.type]
    assert len(flags) >= 5
    for flag in flags:
        assert flag in fails(capsys, script.main, f"{flag}={value}")
