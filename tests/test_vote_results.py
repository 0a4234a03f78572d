"""What a vote found: intervals, whose answers count, and what is printed."""

import math

import numpy as np
import pytest

from experiments import vote_results
from experiments.vote_results import IMPROBABLE, Rule, at_least, clustered, quoted, wilson
from experiments.vote_store import DEGRADED, TRUTH, Store, Study


def test_wilson_interval_has_known_answers():
    assert wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)  # Newcombe 1998, and any table
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998, table I
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert all(map(math.isnan, wilson(0, 0)))


def test_clustered_interval_widens_with_the_clusters():
    """Ten people of one mind each say less than a hundred answers would."""
    minds = np.repeat([[10.0], [0.0]], 5, axis=0) * np.ones((1, 5))
    agreed = clustered(minds, np.full((10, 5), 10.0))
    low, high = wilson(250, 500)
    assert agreed[1] - agreed[0] > 2 * (high - low)
    assert quoted(minds, np.full((10, 5), 10.0)) == agreed, "the wider one"


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_an_interval_has_a_width_where_all_agree(share):
    """The bootstrap of equal cells has none: then Wilson's is quoted, never a point."""
    numbers = np.full((6, 7), 4.0)
    assert clustered(share * numbers, numbers) == (share, share)
    low, high = quoted(share * numbers, numbers)
    assert (low, high) == pytest.approx(wilson(round(share * 168), 168)) and high - low > 0.02 and low <= share <= high


@pytest.mark.parametrize("shape", [(2, 2), (4, 8), (8, 4), (1, 40)])
def test_few_people_or_clips_have_no_interval(shape):
    assert all(map(math.isnan, quoted(np.ones(shape), np.ones(shape))))
    empty = np.zeros((9, 9))
    empty[: shape[0], : shape[1]] = 1  # others are there and preferred nothing
    assert all(map(math.isnan, quoted(empty, empty)))


def test_quoted_intervals_hold_the_truth():
    """People and clips that differ: of 200 votes the interval misses the true share in about 5 %, not in 30 % as Wilson's."""
    draw = np.random.default_rng(0)
    missed = {"quoted": 0, "wilson": 0}
    for _ in range(200):
        logit = 1.2 * draw.standard_normal((8, 1)) + 1.2 * draw.standard_normal((1, 8))
        wins = draw.binomial(3, 1 / (1 + np.exp(-logit))).astype(float)
        for name, (low, high) in (
            ("quoted", quoted(wins, np.full((8, 8), 3.0))),
            ("wilson", wilson(int(wins.sum()), 192)),
        ):
            missed[name] += not low <= 0.5 <= high
    assert missed["quoted"] <= 24 and missed["wilson"] >= 50, missed


def answers(kind: str, choice: str, left: int, right: int, number: int = 1, seconds: float = 3.0) -> list[dict]:
    return [{"kind": kind, "choice": choice, "left": left, "right": right, "clip": 0, "seconds": seconds}] * number


def same(sided: int, number: int) -> list[dict]:
    return answers("identical", "right", 0, 0, sided) + answers("identical", "none", 0, 0, number - sided)


def spoilt(wrong: int, number: int) -> list[dict]:
    return answers("degraded", "none", TRUTH, DEGRADED, wrong) + answers(
        "degraded", "left", TRUTH, DEGRADED, number - wrong
    )


@pytest.mark.parametrize(
    ("votes", "reason"),
    [
        ([], None),
        (answers("pair", "right", 0, 1, 3), None),
        (same(1, 1), None),  # 2 runs of 8 clips have one such pair: one answer is no evidence
        (same(2, 2), None),
        (same(2, 4), None),
        (same(3, 3), "side of 3 of 3 identical pairs"),
        (same(4, 4), "side of 4 of 4 identical pairs"),
        (spoilt(1, 1), None),  # a slip
        (spoilt(1, 4), None),
        (spoilt(2, 2), "in 2 of 2 checks"),
        (spoilt(3, 4), "in 3 of 4 checks"),
        (answers("degraded", "right", TRUTH, DEGRADED, 2), "in 2 of 2 checks"),
        (answers("pair", "left", 0, 1, 2, seconds=0.1), "median answer in 100 ms"),
        (answers("pair", "left", 0, 1, 7), None),
        (answers("pair", "left", 0, 1, 8), "chose left all 8 times"),
    ],
)
def test_exclusion_rule(votes, reason):
    found = Rule().reasons(votes)
    assert (not found) if reason is None else (len(found) == 1 and reason in found[0])


def test_the_rule_seldom_excludes_somebody_honest():
    """Who errs as often as the rule allows an honest person: below one in twenty by each check, whatever their number."""
    for share in (Rule().spoilt, Rule().identical):
        for number in range(1, 12):
            fails = [k for k in range(number + 1) if at_least(k, number, share) < IMPROBABLE]
            assert at_least(min(fails, default=number + 1), number, share) < IMPROBABLE
    assert (
        at_least(1, 2, 0.5) == 0.75
        and at_least(0, 3, 0.2) == pytest.approx(1)
        and at_least(2, 2, 0.1) == pytest.approx(0.01)
    )


def test_results_count_whom_the_rule_leaves(tmp_path):
    """Six people: five prefer the first method, one clicks through and is left out."""
    clips = [["unseen", str(i)] for i in range(30)]
    store = Store(tmp_path / "votes.db")
    store.begin_study(Study(["zebra", "okapi"], clips, [["0", "1"]] * 30, trials=30))
    for person in range(6):
        token = store.begin(f"person {person}")
        while (trial := store.next_trial(token)[0]) is not None:
            store.shown(token, trial.id, [trial.left_film, trial.right_film])
            honest = "none" if trial.left == trial.right else "left" if trial.left in (0, TRUTH) else "right"
            store.vote(token, trial.id, honest if person < 5 else "left")
    with store._writing() as db:
        db.execute("UPDATE vote SET seconds = 4")
    found = vote_results.results(store)
    assert [one["participant"] for one in found["excluded"]] == [6] and found["participants"] == 5
    (pair,) = found["pairs"]
    assert (pair["first_preferred"], pair["second_preferred"], pair["share"]) == (150, 0, 1.0)
    assert pair["interval"] == pair["wilson"] == wilson(150, 150) and pair["interval"][0] < 1
    said = vote_results.text(found)
    assert "100.0%" in said and "100.0% to 100.0%" not in said
    assert "excluded: participant 6 (person 5): " in said and "identical" in said
    with store._writing() as db:
        db.execute("DELETE FROM vote WHERE participant < 4")
    few = vote_results.text(vote_results.results(store))
    assert "not to be had" in few and "an interval takes 5 participants and 5 clips" in few
