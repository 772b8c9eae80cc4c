"""The effective rank and the spread of features, and the warning of a collapse."""

import csv
import math
import shutil
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, fails, position, run

import diagnose
import main_pcl
import runtime.checkpoint
from metrics import effective_rank, moments, spread
from runtime import distributed

OPTIONS = [*TINY, "--epochs", 2, "--warmup", 1, "--knn-every", 1]
SETTINGS = {
    "pcl_r": 64,
    "color_jitter": True,
    "grayscale": True,
    "crop_min": 0.2,
    "cluster_head": "none",
    "bn_splits": 2,
    "low_dim": 128,
}


def rank_by_svd(features):
    """RankMe as in the paper, from the features themselves."""
    sigma = np.linalg.svd(features, compute_uv=False)
    p = sigma / np.abs(sigma).sum() + 1e-7
    return np.exp(-(p * np.log(p)).sum())


def spread_by_std(features):
    return features.std(0).mean() * math.sqrt(features.shape[1])


# -- the figures
@pytest.mark.parametrize("n, dim", [(300, 12), (40, 40), (500, 128)])
def test_rank_and_spread_match_their_formulas(n, dim):
    g = torch.Generator().manual_seed(0)
    scales = torch.logspace(0, -2, dim)
    features = F.normalize(torch.randn(n, dim, generator=g) * scales + 0.1, dim=1)
    found = moments(features[: n // 3]) + moments(features[n // 3 :])  # of parts: they add up
    features = features.double().numpy()
    assert effective_rank(found) == pytest.approx(rank_by_svd(features), rel=1e-5)
    assert spread(found) == pytest.approx(spread_by_std(features), rel=1e-5)


def test_rank_and_spread_of_known_features():
    point = F.normalize(torch.ones(50, 16), dim=1)
    assert effective_rank(moments(point)) == pytest.approx(1, abs=1e-3)
    assert spread(moments(point)) == pytest.approx(0, abs=1e-3)

    line = torch.cat([point, -point])
    assert effective_rank(moments(line)) == pytest.approx(1, abs=1e-3)
    assert spread(moments(line)) == pytest.approx(1, abs=1e-3)

    sphere = torch.cat([torch.eye(16), -torch.eye(16)])
    assert effective_rank(moments(sphere)) == pytest.approx(16, abs=1e-3)
    assert spread(moments(sphere)) == pytest.approx(1, abs=1e-3)

    assert effective_rank(moments(torch.zeros(9, 4))) == pytest.approx(1, abs=1e-3)
    assert spread(moments(torch.zeros(9, 4))) == 0


# -- a run
def remember_features(monkeypatch):
    """A list that gets the features (n, D) of each group of steps, with its epoch."""
    features = []
    collect = main_pcl.collect_results

    def spy(run, pending, keys):
        features.extend((run.epoch, step_features) for _, step_features, _ in pending)
        collect(run, pending, keys)

    monkeypatch.setattr(main_pcl, "collect_results", spy)
    return features


def figures_of(log):
    return [(row["rank"], row["spread"]) for row in log]


def test_a_run_logs_rank_and_spread_of_its_keys(folder, tmp_path, monkeypatch, capsys):
    """In the warm-up too, and the same after an interruption within an epoch."""
    monkeypatch.setattr(main_pcl, "SYNC_EVERY", 2)
    with monkeypatch.context() as patch:
        features = remember_features(patch)
        log = run(folder, *OPTIONS, "--exp-dir", tmp_path / "whole")
    for epoch, row in enumerate(log):
        keys = torch.cat([step for number, step in features if number == epoch])
        assert keys.shape == (48, 128)
        keys = keys.double().numpy()
        assert row["rank"] == pytest.approx(rank_by_svd(keys), rel=1e-3)
        assert row["spread"] == pytest.approx(spread_by_std(keys), rel=1e-4)
    assert f"  rank {log[-1]['rank']:3.0f}  " in capsys.readouterr().out
    with open(tmp_path / "whole" / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["spread"]) for row in rows] == pytest.approx(
        [row["spread"] for row in log], rel=1e-5
    )

    # interrupted after the second step
    steps = []

    def stop_at_second_step(self):
        steps.append(self)
        if len(steps) == 2:
            self.received = signal.SIGTERM
        return self.received > 0

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(distributed.StopSignals, "received_by_any", stop_at_second_step)
        run(folder, *OPTIONS, "--exp-dir", tmp_path / "parts")
    assert position(tmp_path / "parts") == (0, 2)
    again = run(folder, *OPTIONS, "--exp-dir", tmp_path / "parts", "--resume")
    np.testing.assert_allclose(figures_of(again), figures_of(log), rtol=1e-6)


def test_the_ranks_share_their_moments(monkeypatch):
    """The figures are those of the features of all ranks, and so they are once resumed."""
    features = F.normalize(torch.randn(90, 8), dim=1)
    own, other, later = features[:30], features[30:60], features[60:]
    totals = {"moments": moments(own)}
    run = runtime.checkpoint.Run(None, torch.nn.Module(), None, None, "", totals=totals)
    monkeypatch.setattr(
        distributed, "all_gather_objects", lambda value: [value, {"moments": moments(other)}]
    )
    main_pcl.share_results(run)
    assert effective_rank(run.totals["moments"]) == pytest.approx(
        rank_by_svd(features[:60].numpy()), rel=1e-4
    )

    # both ranks go on from the shared totals
    shared = run.totals["moments"]
    run.totals = {"moments": shared + moments(later[:15])}
    theirs = {"moments": shared + moments(later[15:])}
    monkeypatch.setattr(distributed, "all_gather_objects", lambda value: [value, theirs])
    main_pcl.share_results(run)
    assert spread(run.totals["moments"]) == pytest.approx(spread_by_std(features.numpy()), rel=1e-4)


# -- older checkpoints
def test_a_run_of_an_older_version_goes_on(folder, tmp_path):
    """Its first epochs have no rank; a checkpoint within an epoch is refused in one line."""
    log = run(folder, *OPTIONS, "--exp-dir", tmp_path)
    path = tmp_path / "checkpoint.pth.tar"
    checkpoint = torch.load(path, weights_only=True)
    for row in checkpoint["run"]["log"]:
        del row["rank"], row["spread"]
    torch.save(checkpoint, path)
    log = run(folder, *OPTIONS, "--epochs", 4, "--exp-dir", tmp_path, "--resume")
    assert "rank" not in log[1]
    assert log[2]["rank"] >= 1
    with open(tmp_path / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["rank"] == "" for row in rows] == [True, True, False, False]
    assert [float(row["lr"]) for row in rows] == pytest.approx([row["lr"] for row in log])


@pytest.mark.parametrize("value", [None, 1.0, torch.zeros(3), torch.zeros(3, 2)])
def test_an_unfinished_epoch_without_moments_gets_one_line(
    folder, tmp_path, capsys, monkeypatch, value
):
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(distributed.StopSignals, "received_by_any", lambda self: True)
        run(folder, *OPTIONS, "--exp-dir", tmp_path)
    path = tmp_path / "checkpoint.pth.tar"
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["run"]["step"] == 1
    checkpoint["run"]["totals"]["moments"] = value
    if value is None:
        del checkpoint["run"]["totals"]["moments"]
    torch.save(checkpoint, path)
    capsys.readouterr()
    error = fails(capsys, main_pcl.main, "--exp-dir", tmp_path, "--resume")
    assert "cannot continue from the checkpoint (ValueError: totals)" in error


# -- the warning
def log_of(*figures):
    return [{"rank": rank, "spread": spread, "loss_inst": 4.1} for rank, spread in figures]


@pytest.mark.parametrize(
    "figures, expected",
    [
        ([(70, 0.7), (60, 0.5)], ""),  # what the digits reach
        ([(1.2, 0.01)], ""),  # one epoch says nothing
        ([(1.2, 0.01), (40, 0.3)], ""),
        ([(50, 0.4), (1.2, 0.01)], ""),
        ([(50, 0.4), (5, 0.09), (3, 0.04)], "rank 3.0, spread 0.040"),
        ([(1.1, 0.9), (1.1, 0.9)], "rank 1.1, spread 0.900"),  # on a line
        ([(17, 0.6), (2.16, 0.26), (2.58, 0.44)], "rank 2.6"),  # batches of 512, no --lr-warmup
        ([(18, 0.9), (9.6, 0.9), (9.8, 0.9)], ""),  # batches of 128
        ([(3, 0.04), (2, 0.03), (1, 0.02)], ""),  # the epoch before has said it
    ],
)
def test_a_collapse_is_warned_of_once(figures, expected):
    warning = diagnose.warn_of_collapse(log_of(*figures), SETTINGS)
    assert bool(warning) == bool(expected)
    assert expected in warning
    if warning:
        assert warning.endswith("; ".join(diagnose.remedies(4.1, SETTINGS)))


@pytest.mark.parametrize("low_dim, rank", [(2, 1.99), (3, 2.9), (8, 2.8)])
def test_few_dimensions_cannot_have_a_high_rank(low_dim, rank):
    log = log_of((rank, 0.9), (rank, 0.9))
    assert not diagnose.warn_of_collapse(log, {**SETTINGS, "low_dim": low_dim})
    assert diagnose.warn_of_collapse(log, SETTINGS)


def test_epochs_of_an_older_version_are_no_collapse():
    assert not diagnose.warn_of_collapse([{}, *log_of((1, 0.01))], SETTINGS)


def test_an_unlabelled_run_that_collapses_is_warned(folder, tmp_path, capsys):
    (tmp_path / "flat").mkdir()
    for path in (folder / "train").rglob("*.png"):
        shutil.copy(path, tmp_path / "flat" / f"{path.parent.name} {path.name}")
    options = [*TINY, "-b", 4, "--bn-splits", 1, "--epochs", 6, "--moco-m", 0, "--lr", 1]
    log = run(tmp_path / "flat", *options, "--exp-dir", tmp_path / "run")
    assert log[-1]["spread"] < 0.1
    assert capsys.readouterr().out.count("warning: the features have collapsed") == 1


def test_the_rank_of_features_that_are_not_finite_is_nan():
    features = torch.randn(20, 4)
    features[3, 2] = torch.nan
    assert math.isnan(effective_rank(moments(features)))
