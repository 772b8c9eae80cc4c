"""What ranks, loader workers and a run's own files must not take from each other."""

import pytest

import eval_lincls
from data import build_datasets
from runtime import distributed


@pytest.mark.parametrize("rank, expected", [(0, ["read", "wait"]), (1, ["wait", "read"])])
def test_the_first_rank_of_an_evaluation_downloads_alone(folder, monkeypatch, rank, expected):
    events = []

    def read(*args, **options):
        events.append("read")
        return build_datasets(*args, **options)

    monkeypatch.setattr(distributed, "get_rank_and_world", lambda: (rank, 2))
    monkeypatch.setattr(distributed, "barrier", lambda: events.append("wait"))
    monkeypatch.setattr(eval_lincls, "build_datasets", read)
    built = {}
    datasets = eval_lincls.find_data(str(folder), None, {}, built)
    assert events == expected
    assert eval_lincls.find_data(str(folder), None, {}, built) is datasets
    assert events == expected
