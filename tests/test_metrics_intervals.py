"""Intervals of means: known answers, coverage, and what is refused."""

import math

import pytest
import torch

from metrics.intervals import interval_of_mean, paired


def test_known_answers():
    same = interval_of_mean([2.0, 2.0, 2.0])
    assert same == (2.0, 2.0, 2.0)
    five = interval_of_mean([1.0, 2.0, 3.0, 4.0, 5.0])  # deviation sqrt(2.5), t(4) = 2.776
    assert five == pytest.approx((3.0, 3 - 2.776 * 2.5**0.5 / 5**0.5, 3 + 2.776 * 2.5**0.5 / 5**0.5), abs=1e-3)
    halves = interval_of_mean(
        [0.0, 1.0] * 10
    )  # replicates are binomial: 95 % of them lie within 0.3 to 0.7 or a step beside it
    assert halves.mean == 0.5 and 0.25 <= halves.low <= 0.3 and 0.7 <= halves.high <= 0.75
    one = interval_of_mean([3.0])
    assert one.mean == 3.0 and math.isnan(one.low) and math.isnan(one.high)
    with pytest.raises(ValueError, match="no clip"):
        interval_of_mean([])


def test_agrees_with_the_normal_interval_for_many_values():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = interval_of_mean(values.tolist())
    half = 1.96 * values.std().item() / 20
    assert found.mean == pytest.approx(values.mean().item())
    assert found.low == pytest.approx(found.mean - half, abs=0.1 * half)
    assert found.high == pytest.approx(found.mean + half, abs=0.1 * half)
    assert interval_of_mean(values.tolist()) == found


def test_covers_the_true_mean_about_as_often_as_it_says():
    generator = torch.Generator().manual_seed(1)
    hits = 0
    for _ in range(60):
        low, high = interval_of_mean((torch.rand(40, generator=generator) * 2).tolist())[1:]
        hits += low <= 1.0 <= high
    assert 52 <= hits <= 60


@pytest.mark.parametrize("number", [2, 3, 5, 9, 19, 20])
def test_few_clips_are_no_surer_than_they_are(number: int):
    """Of normal values the interval misses the true mean in about 5 % of cases, however few there are."""
    generator = torch.Generator().manual_seed(number)
    cases = 400
    found = [interval_of_mean(torch.randn(number, generator=generator).tolist()) for _ in range(cases)]
    missed = sum(not low <= 0 <= high for _, low, high in found) / cases
    assert 0.015 < missed < 0.095


def test_many_clips_are_drawn_in_parts_and_give_the_same(monkeypatch):
    values = torch.rand(50, generator=torch.Generator().manual_seed(2)).tolist()
    whole = interval_of_mean(values)
    monkeypatch.setattr("metrics.intervals._CHUNK", 50 * 64)
    assert interval_of_mean(values) == whole


def test_pairs_are_of_the_same_clips():
    ours, theirs = {"a": 3.0, "b": 5.0, "only ours": 99.0, "c": math.nan}, {"b": 1.0, "a": 1.0, "c": 2.0}
    assert paired(ours, theirs) == interval_of_mean([2.0, 4.0])
    assert paired(ours, ours) == (0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="no clip"):
        paired({"a": 1.0}, {"b": 1.0})
