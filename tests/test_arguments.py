"""The command line: defaults, help, refused values; the schedule and the optimizer it asks for."""

import argparse
import functools
import json
import re

import pytest
import torch
from conftest import fails

import eval_lincls
import main_pcl
import recipes
from runtime import cli


# -- schedule and optimizer ------------------------------------------------------------------------
def rate(progress, **options):
    """The learning rate after `progress` of 8 epochs, whose peak is 0.4."""
    args = {"lr": 0.4, "lr_warmup": 0, "cos": False, "epochs": 8, "schedule": []}
    return main_pcl.learning_rate(progress, argparse.Namespace(**(args | options)))


SCHEDULES = {  # name: (options, {progress: learning rate})
    "constant": (
        {},
        {0: 0.4, 7.9: 0.4},
    ),
    "schedule": (
        {"schedule": [3, 5]},
        {0: 0.4, 2.99: 0.4, 3: 0.04, 4.5: 0.04, 5: 0.004, 7.9: 0.004},
    ),
    "cos": (
        {"cos": True},
        {0: 0.4, 2: 0.3414214, 4: 0.2, 6: 0.0585786, 8: 0},
    ),
    "cos instead of schedule": (
        {"cos": True, "schedule": [3, 5]},
        {4: 0.2, 6: 0.0585786},
    ),
    "warmup": (
        {"lr_warmup": 4},
        {0: 0.0001, 1: 0.1001, 2: 0.2001, 3.999: 0.4, 4: 0.4, 7: 0.4},
    ),
    "warmup, cos": (
        {"lr_warmup": 2, "cos": True},
        {0: 0.0002, 1: 0.2002, 2: 0.3414214, 4: 0.2},
    ),
    "warmup, schedule": (
        {"lr_warmup": 4, "schedule": [3, 5]},
        {3: 0.3001, 4: 0.04, 5: 0.004},
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_learning_rate(name):
    options, expected = SCHEDULES[name]
    found = {progress: rate(progress, **options) for progress in expected}
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("optim", recipes.OPTIMIZERS)
def test_which_weights_decay(optim):
    """SGD decays all weights, the other optimizers all but biases and batch norm.

    A step along gradients of zero shrinks exactly the weights that decay.
    """
    encoder = functools.partial(main_pcl.build_encoder, "resnet18_w4", small_images=True)
    model = main_pcl.MoCo(encoder, 8, 16, cluster_head="report")
    args = argparse.Namespace(optim=optim, lr=0.1, wd=0.1, momentum=0.9)
    optimizer = main_pcl.build_optimizer(model, args)
    for p in model.parameters():
        p.data.fill_(1)
        if p.requires_grad:
            p.grad = torch.zeros_like(p)
    optimizer.step()

    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    shrunk = {name for name, p in model.named_parameters() if (p < 1).all()}
    same = {name for name, p in model.named_parameters() if (p == 1).all()}
    assert {name.split(".")[0] for name in trained} == {"encoder_q", "v"}
    assert shrunk | same == {name for name, _ in model.named_parameters()}
    if optim == "sgd":
        assert shrunk == trained
    else:
        spared = {name for name in trained if re.search(r"\.bias$|bn\d|downsample\.1", name)}
        assert len(spared) > 40
        assert shrunk == trained - spared


# -- defaults --------------------------------------------------------------------------------------
FITTING = {"crop_min": 0.25, "blur": False, "flip": True}  # augmentation that fits the data
LEFT_OPEN = ["data", "init", "clip_grad", "exp_dir", "config", "resume"]


def defaults(n, image_size, *flags, world=1):
    """The arguments of a run with these flags, on `n` images of `image_size` pixels, as a dict."""
    datasets = argparse.Namespace(train=range(n), image_size=image_size, augmentation=FITTING)
    args = main_pcl.get_parser().parse_args(flags)
    before = dict(vars(args))
    final = main_pcl.fill_in_defaults(args, datasets, world, "cpu")
    assert vars(args) == before  # the result is a new object
    assert [name for name, value in vars(final).items() if value is None] == LEFT_OPEN
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
CIFAR = {
    **IMAGENET,
    "arch": "resnet18",
    "stem": "small",
    "image_size": 32,
    "batch_size": 128,
    "lr": 0.06,
    "lr_warmup": 10,
    "wd": 5e-4,
    "temperature": 0.1,
    "pcl_r": 4096,
    "moco_m": 0.99,
    "num_cluster": [976, 1951, 3903],
    "bn_splits": 2,
}
DIGITS = {
    **IMAGENET,
    "arch": "resnet18_w16",
    "stem": "small",
    "image_size": 8,
    "batch_size": 128,
    "lr": 0.015,
    "pcl_r": 64,
    "moco_m": 0.99,
    "num_cluster": [28, 56, 112],
}


@pytest.mark.parametrize(
    "n, image_size, expected",
    [(1_281_167, 224, IMAGENET), (50_000, 32, CIFAR), (1437, 8, DIGITS)],
    ids=["ImageNet", "CIFAR-10", "digits"],
)
def test_defaults_follow_the_data(n, image_size, expected):
    """Those of ImageNet are the published ones."""
    found = defaults(n, image_size)
    assert {name: found[name] for name in expected} == expected
    assert {name: found[name] for name in FITTING} == FITTING
    assert 1 <= found["workers"] <= 8


def test_defaults_follow_the_optimizer():
    lamb = defaults(50_000, 32, "--optim", "lamb", "-b", "512")
    assert (lamb["lr"], lamb["wd"], lamb["temperature"]) == pytest.approx((0.04, 0.02, 0.1))
    decays = {"sgd": 5e-4, "adamw": 0.01, "lamb": 0.02, "lars": 1e-6}
    found = {optim: defaults(50_000, 32, "--optim", optim)["wd"] for optim in decays}
    assert found == decays


@pytest.mark.parametrize(
    "optim, n, image_size, epochs",
    [
        ("sgd", 5_000, 64, 10),
        ("sgd", 4_999, 64, 0),
        ("sgd", 5_000, 65, 0),
        ("adamw", 4_999, 64, 10),
        ("lars", 5_000, 65, 10),
    ],
)
def test_the_rate_warms_up_except_for_sgd_with_large_images_or_few(optim, n, image_size, epochs):
    assert defaults(n, image_size, "--optim", optim)["lr_warmup"] == epochs


@pytest.mark.parametrize(
    "epochs, schedule, knn_every", [(1, [1, 1], 1), (3, [1, 2], 1), (19, [11, 15], 1)]
)
def test_defaults_follow_the_epochs(epochs, schedule, knn_every):
    found = defaults(1437, 8, "--epochs", str(epochs))
    assert (found["schedule"], found["knn_every"]) == (schedule, knn_every)


@pytest.mark.parametrize(
    "n, image_size, rates",
    [
        (1_281_167, 224, {"sgd": 0.03, "adamw": 1e-3, "lamb": 5e-3, "lars": 0.3}),
        (1437, 8, {"sgd": 0.015, "adamw": 5e-4, "lamb": 2.5e-3, "lars": 0.15}),
        (50_000, 32, {"sgd": 0.06, "adamw": 1.5e-3, "lamb": 1e-2, "lars": 1.5}),
    ],
    ids=["ImageNet, batch 256", "digits, batch 128", "CIFAR-10, batch 128"],
)
def test_the_rates_of_all_optimizers_follow_recipe_and_batch(n, image_size, rates):
    found = {optim: defaults(n, image_size, "--optim", optim)["lr"] for optim in rates}
    assert found == pytest.approx(rates)
    smaller = {
        optim: defaults(n, image_size, "--optim", optim, "-b", "64")["lr"] for optim in rates
    }
    batch = defaults(n, image_size)["batch_size"]
    expected = {optim: rate * 64 / batch for optim, rate in rates.items()}
    assert smaller == pytest.approx(expected)


@pytest.mark.parametrize(
    "batch_size, splits", [(256, 8), (250, 5), (255, 5), (100, 5), (14, 7), (6, 3), (4, 2), (7, 1)]
)
def test_any_batch_that_divides_has_groups(batch_size, splits):
    """At most the recipe's eight groups, equal ones of two images or more."""
    assert defaults(1_281_167, 224, "-b", str(batch_size))["bn_splits"] == splits


def test_defaults_follow_the_number_of_processes():
    eight = defaults(1_281_167, 224, world=8)
    assert eight["batch_size"] == 256
    assert eight["bn_splits"] == 1  # 8 processes are 8 groups
    two = defaults(1_281_167, 224, world=2)
    assert two["bn_splits"] == 4  # groups in each
    three = defaults(1_281_167, 224, world=3)
    assert three["batch_size"] == 255
    assert three["bn_splits"] == 1
    assert three["lr"] == pytest.approx(0.03 * 255 / 256)


def test_defaults_for_four_images():
    few = defaults(4, 8)
    assert few["pcl_r"] == 1
    assert few["num_cluster"] == [2, 2, 2]


def test_a_flag_always_wins():
    flags = ["--arch", "resnet34", "--stem", "imagenet", "-b", "12", "--lr", "3"]
    flags += ["--lr-warmup", "7", "--schedule", "4", "--pcl-r", "9", "--num-cluster", "5,6"]
    flags += ["--moco-m", "0", "--bn-splits", "3", "--knn-every", "2", "-j", "0"]
    flags += ["--crop-min", "0.3", "--blur", "--no-flip", "--amp-dtype", "fp16"]
    expected = {
        "arch": "resnet34",
        "stem": "imagenet",
        "batch_size": 12,
        "lr": 3,
        "lr_warmup": 7,
        "schedule": [4],
        "pcl_r": 9,
        "num_cluster": [5, 6],
        "moco_m": 0,
        "bn_splits": 3,
        "knn_every": 2,
        "workers": 0,
        "crop_min": 0.3,
        "blur": True,
        "flip": False,
        "amp_dtype": "fp16",
    }
    found = defaults(1437, 8, *flags)
    assert {name: found[name] for name in expected} == expected


def test_a_schedule_without_epochs_is_a_constant_rate():
    assert defaults(1437, 8, "--schedule")["schedule"] == []


# -- help ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("script", [main_pcl, eval_lincls])
def test_help_states_the_default_of_every_flag(script):
    parser = script.get_parser()
    parts = re.split(r"\n(?=  -)", parser.format_help())  # one part per flag
    checked = 0
    for action in parser._actions:
        if not action.option_strings or action.dest == "help":
            continue
        beginning = rf" *{action.option_strings[0]}(?![\w-])"
        (part,) = (part for part in parts if re.match(beginning, part))
        shown = re.search(r"default:\s*(\S+)", " ".join(part.split()))
        assert shown, part
        if action.default is not None and shown[1].endswith(")"):
            assert shown[1][:-1] == str(action.default)
        checked += 1
    assert checked > 8


def test_help_lists_the_recipes():
    words = main_pcl.get_parser().format_help().split()
    for recipe in (recipes.IMAGENET, recipes.SMALL_IMAGES, recipes.FEW_SMALL_IMAGES):
        settings = [recipe[name] for name in recipe if name != "lr"]
        for numbers in (settings, recipe["lr"].values()):
            values = [str(value) for value in numbers]
            starts = range(len(words) - len(values))
            assert any(words[i : i + len(values)] == values for i in starts), values


def test_progress_without_a_terminal_is_a_line_a_minute(capsys, monkeypatch):
    clock = iter(range(0, 10_000, 25))  # 25 seconds pass between two looks at it
    monkeypatch.setattr("tqdm.std.time", lambda: next(clock))
    bar = cli.Progress(range(20), desc="epoch 3")
    for _ in bar:
        bar.say("loss 1.5", 2.0)
    lines = capsys.readouterr().err.strip().splitlines()
    assert 3 <= len(lines) <= 20
    for line in lines:
        assert line.startswith("epoch 3"), lines
        assert "loss 1.5, the run ends in" in line, lines


def test_a_short_loop_without_a_terminal_shows_no_progress(capsys):
    assert list(cli.Progress(range(20), desc="short")) == list(range(20))
    assert capsys.readouterr().err == ""


# -- what is refused -------------------------------------------------------------------------------
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
        (["--resume", "no-such-file"], "no file"),
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
    numeric = [a for a in script.get_parser()._actions if a.type not in (None, cli.path)]
    flags = [action.option_strings[-1] for action in numeric]
    assert len(flags) >= 5
    for flag in flags:
        assert flag in fails(capsys, script.main, f"{flag}={value}")


# -- args.json -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "text, named",
    [
        ("[1]", "it holds a list"),
        ("", "JSONDecodeError"),
        ("{", "JSONDecodeError"),
        ('{"lr": true}', "its lr is 'True'"),
        ('{"lr": [1, 2]}', "its lr is '[1, 2]'"),
        ('{"amp": "yes"}', "its amp is 'yes'"),
        ('{"amp": 1}', "its amp is '1'"),
        ('{"schedule": 5}', "its schedule is '5'"),
        ('{"schedule": ["a"]}', "its schedule is \"['a']\""),
        ('{"optim": "adam"}', "its optim is 'adam'"),
        ('{"crop_min": 2}', "its crop_min is '2', but must be above 0 and at most 1"),
        ('{"num_cluster": [5, 0]}', "its num_cluster is '[5, 0]'"),
        ('{"epochs": 2.5}', "its epochs is '2.5'"),
        ('{"epochs": "many"}', "its epochs is 'many'"),
        ('{"arch": "' + 10_000 * "x\\n" + '", "batch_size": -1}', "its batch_size is '-1'"),
    ],
)
def test_a_malformed_config_names_what_is_wrong(tmp_path, capsys, text, named):
    path = tmp_path / "args.json"
    path.write_text(text)
    error = fails(capsys, main_pcl.main, "--config", path, "--exp-dir", tmp_path / "run")
    assert f"{path} is not the args.json of a run" in error
    assert named in error
    assert not (tmp_path / "run").exists()


def test_a_config_gives_every_argument_back_and_flags_win(tmp_path):
    given = ["photos", "--amp", "--no-flip", "--schedule", "3", "4", "--num-cluster", "5,6"]
    given += ["--lr", "1e-3", "--optim", "lamb", "--init", "1.pth", "-b", "12", "--skip-broken"]
    path = tmp_path / "args.json"
    path.write_text(json.dumps(vars(main_pcl.get_parser().parse_args(given))))
    args = cli.parse_args(main_pcl.get_parser(), ["--config", str(path)])
    expected = vars(main_pcl.get_parser().parse_args(given)) | {"config": str(path)}
    assert vars(args) == expected

    flags = ["pictures", "--no-amp", "--schedule", "--num-cluster", "7", "--config", str(path)]
    args = cli.parse_args(main_pcl.get_parser(), flags)
    changed = {"data": "pictures", "amp": False, "schedule": [], "num_cluster": [7]}
    assert vars(args) == expected | changed
