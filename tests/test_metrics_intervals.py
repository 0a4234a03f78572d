"""Bootstrap intervals: known answers, coverage, and what is refused."""

import math

import pytest
import torch

from metrics.intervals import bootstrap, paired


def test_known_answers():
    same = bootstrap([2.0, 2.0, 2.0])
    assert same == (2.0, 2.0, 2.0)
    two = bootstrap([0.0, 1.0])  # replicates are 0, 1/2 and 1 with 1/4, 1/2, 1/4
    assert two == (0.5, 0.0, 1.0)
    one = bootstrap([3.0])
    assert one.mean == 3.0 and math.isnan(one.low) and math.isnan(one.high)
    with pytest.raises(ValueError, match="no clip"):
        bootstrap([])


def test_agrees_with_the_normal_interval_for_many_values():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = bootstrap(values.tolist())
    half = 1.96 * values.std().item() / 20
    assert found.mean == pytest.approx(values.mean().item())
    assert found.low == pytest.approx(found.mean - half, abs=0.1 * half)
    assert found.high == pytest.approx(found.mean + half, abs=0.1 * half)
    assert bootstrap(values.tolist()) == found


def test_covers_the_true_mean_about_as_often_as_it_says():
    generator = torch.Generator().manual_seed(1)
    hits = 0
    for _ in range(60):
        low, high = bootstrap((torch.rand(40, generator=generator) * 2).tolist())[1:]
        hits += low <= 1.0 <= high
    assert 52 <= hits <= 60


def test_many_clips_are_drawn_in_parts_and_give_the_same(monkeypatch):
    values = torch.rand(50, generator=torch.Generator().manual_seed(2)).tolist()
    whole = bootstrap(values)
    monkeypatch.setattr("metrics.intervals._CHUNK", 50 * 64)
    assert bootstrap(values) == whole


def test_pairs_are_of_the_same_clips():
    ours, theirs = {"a": 3.0, "b": 5.0, "only ours": 99.0, "c": math.nan}, {"b": 1.0, "a": 1.0, "c": 2.0}
    assert paired(ours, theirs) == bootstrap([2.0, 4.0])
    assert paired(ours, ours) == (0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="no clip"):
        paired({"a": 1.0}, {"b": 1.0})
