"""What a blind vote found: shares with intervals, and whose answers do not count and why.

Share: of the answers that preferred a side, those for the first method. Two 95 % intervals: Wilson's, which takes all answers
for independent, and a bootstrap that draws participants and clips anew, because answers of one person, and answers on one clip,
resemble each other (Owen, "The pigeonhole bootstrap", 2007). Neither is enough alone: Wilson's is too narrow where people or
clips differ, and the bootstrap's where they happen not to, down to no width at all where all agree. To be quoted is what
holds both; from fewer than five people or clips nothing is to be had.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from experiments.show import table
from experiments.vote_store import TRUTH, Store

Z95 = 1.959963984540054
DRAWS = 5000
FEWEST = 5  # people, and clips: fewer do not tell how much people, or clips, differ
IMPROBABLE = 0.05  # for somebody honest


@dataclass(frozen=True)
class Rule:
    """Whose answers do not count: whose failures are improbable (p < 0.05) for somebody honest, who fails now and then too.

    One failure of one check never excludes. It is kept with the study, before the first vote.
    """

    min_ms: float = 700.0  # a participant whose median answer took less, from when the films were shown, did not look
    same_side: int = 8  # so many sided answers or more, all for one side: by chance in 1 of 128
    spoilt: float = 0.1  # how often somebody honest errs about the truth and a spoilt copy: a slip of the hand
    identical: float = 0.3  # how often somebody honest prefers a side of two identical films

    def __post_init__(self) -> None:
        if self.min_ms < 0 or self.same_side < 2 or not 0 < self.spoilt < 1 or not 0 < self.identical < 1:
            raise ValueError("min_ms must be 0 or more, same_side 2 or more, spoilt and identical between 0 and 1")

    def __str__(self) -> str:
        return (
            f"excluded are participants who fail so many checks that somebody honest would in fewer than {IMPROBABLE:.0%} of cases, "
            f"erring about a spoilt copy in {self.spoilt:.0%} and preferring a side of identical films in {self.identical:.0%}; "
            f"whose median answer takes less than {self.min_ms:g} ms; who choose the same side {self.same_side} times or more and "
            "never the other"
        )

    def reasons(self, votes: Sequence[Mapping[str, Any]]) -> list[str]:
        """Why one participant's answers do not count; empty if they do."""
        checks = [vote for vote in votes if vote["kind"] == "degraded"]
        wrong = [vote for vote in checks if chosen(vote) != TRUTH]
        same = [vote for vote in votes if vote["kind"] == "identical"]
        sided = [vote for vote in same if vote["choice"] != "none"]
        found = []
        if at_least(len(wrong), len(checks), self.spoilt) < IMPROBABLE:
            found.append(f"preferred a spoilt copy, or saw no difference, in {len(wrong)} of {len(checks)} checks")
        if at_least(len(sided), len(same), self.identical) < IMPROBABLE:
            found.append(f"preferred a side of {len(sided)} of {len(same)} identical pairs")
        median = 1000 * statistics.median(vote["seconds"] for vote in votes) if votes else math.inf
        if median < self.min_ms:
            found.append(f"median answer in {median:.0f} ms")
        sides = [vote["choice"] for vote in votes if vote["choice"] != "none"]
        if len(sides) >= self.same_side and len(set(sides)) == 1:
            found.append(f"chose {sides[0]} all {len(sides)} times")
        return found


def at_least(failures: int, number: int, share: float) -> float:
    """Probability of so many failures or more of ``number``, where each has the probability ``share``."""
    return sum(math.comb(number, k) * share**k * (1 - share) ** (number - k) for k in range(failures, number + 1))


def chosen(vote: Mapping[str, Any]) -> int | None:
    """The method (or TRUTH, DEGRADED) that was preferred; None for no difference."""
    return None if vote["choice"] == "none" else vote[vote["choice"]]


def wilson(wins: int, number: int) -> tuple[float, float]:
    """95 % score interval of a share (Wilson, 1927). NaN for no answers."""
    if number == 0:
        return math.nan, math.nan
    share, z2 = wins / number, Z95**2
    centre = (share + z2 / (2 * number)) / (1 + z2 / number)
    half = Z95 / (1 + z2 / number) * math.sqrt(share * (1 - share) / number + z2 / (4 * number**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def clustered(wins: np.ndarray, numbers: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % interval of ``wins.sum() / numbers.sum()``, both "participant clip", when rows and columns are drawn anew.

    NaN where there are fewer than five participants or clips: that few say little of how much others differ.
    """
    keep = numbers.sum(1) > 0, numbers.sum(0) > 0
    wins, numbers = (array[keep[0]][:, keep[1]].astype(np.float64) for array in (wins, numbers))
    people, clips = wins.shape
    if min(people, clips) < FEWEST:
        return math.nan, math.nan
    draw = np.random.default_rng(seed)
    rows = draw.multinomial(people, np.full(people, 1 / people), DRAWS).astype(np.float64)
    columns = draw.multinomial(clips, np.full(clips, 1 / clips), DRAWS).astype(np.float64)
    won, all_ = (np.einsum("dp,pc,dc->d", rows, array, columns, optimize=True) for array in (wins, numbers))
    shares = won[all_ > 0] / all_[all_ > 0]  # a draw may miss every answer
    low, high = np.quantile(shares, [0.025, 0.975])
    return float(low), float(high)


def quoted(wins: np.ndarray, numbers: np.ndarray) -> tuple[float, float]:
    """The 95 % interval to quote: what holds Wilson's and the clustered one. NaN where the latter is not to be had."""
    one, other = clustered(wins, numbers), wilson(int(wins.sum()), int(numbers.sum()))
    return (min(one[0], other[0]), max(one[1], other[1])) if not math.isnan(one[0]) else one


def results(store: Store, changed: Mapping[str, float] | None = None) -> dict[str, Any]:
    """Shares of every pair of methods, excluded participants with the reasons, and the rule.

    The rule is the study's own; ``changed`` of it is told in the results.
    """
    study, votes = store.study(), store.votes()
    rule = Rule(**{**asdict(Rule(**study.rule)), **(changed or {})})
    by_person: dict[int, list[dict[str, Any]]] = {}
    for vote in votes:
        by_person.setdefault(vote["participant"], []).append(vote)
    excluded = {number: reasons for number, own in by_person.items() if (reasons := rule.reasons(own))}
    counted = [number for number in by_person if number not in excluded]
    place = {number: i for i, number in enumerate(counted)}
    pairs = []
    for a, first in enumerate(study.methods):
        for b, second in enumerate(study.methods[a + 1 :], a + 1):
            wins = np.zeros((len(counted), len(study.clips)))
            sided, ties = np.zeros_like(wins), 0
            for vote in votes:
                if vote["participant"] not in place or {vote["left"], vote["right"]} != {a, b}:
                    continue
                cell = place[vote["participant"]], vote["clip"]
                ties += chosen(vote) is None
                sided[cell] += chosen(vote) is not None
                wins[cell] += chosen(vote) == a
            won, number = int(wins.sum()), int(sided.sum())
            pairs.append(
                {
                    "first": first,
                    "second": second,
                    "first_preferred": won,
                    "second_preferred": number - won,
                    "no_difference": ties,
                    "share": won / number if number else math.nan,
                    "wilson": wilson(won, number),
                    "clustered": clustered(wins, sided),
                    "interval": quoted(wins, sided),
                }
            )
    names = {person["number"]: person["name"] for person in store.participants()}
    return {
        "pairs": pairs,
        "participants": len(counted),
        "clips": len(study.clips),
        "began": len(names),
        "excluded": [{"participant": n, "name": names[n], "reasons": excluded[n]} for n in sorted(excluded)],
        "unchecked": sum(all(vote["kind"] == "pair" for vote in by_person[number]) for number in counted),
        "rule": str(rule),
        "changed": rule != Rule(**study.rule),
    }


def text(found: Mapping[str, Any]) -> str:
    """The results as printed."""

    def interval(bounds: tuple[float, float]) -> str:
        return "not to be had" if math.isnan(bounds[0]) else f"{bounds[0]:.1%} to {bounds[1]:.1%}"

    head = ["first", "second", "share of first", "95 %", "if independent", "first", "second", "no difference"]
    rows: list[list[Any]] = [head]
    for pair in found["pairs"]:
        share = "no votes" if math.isnan(pair["share"]) else f"{pair['share']:.1%}"
        counts = (pair["first_preferred"], pair["second_preferred"], pair["no_difference"])
        rows.append(
            [pair["first"], pair["second"], share, interval(pair["interval"]), interval(pair["wilson"]), *counts]
        )
    lines = [
        table(rows),
        "",
        f"{found['participants']} participants count, {found['began']} began; {found['clips']} clips",
        "95 %: what holds the interval that draws people and clips anew and the one that takes all answers for independent",
    ]
    if any(math.isnan(pair["interval"][0]) for pair in found["pairs"]):
        lines.append(f"an interval takes {FEWEST} participants and {FEWEST} clips with a preference")
    if found["unchecked"]:
        lines.append(f"{found['unchecked']} of them answered no check")
    lines.append(
        f"rule{' (another than the one that the vote began with)' if found['changed'] else ''}: {found['rule']}"
    )
    for one in found["excluded"]:
        name = f" ({one['name']})" if one["name"] else ""
        lines.append(f"excluded: participant {one['participant']}{name}: {'; '.join(one['reasons'])}")
    return "\n".join(lines) + "\n"
