"""What a blind vote found: shares with intervals, and whose answers do not count and why.

Share: of the answers that preferred a side, those for the first method. Two 95 % intervals: Wilson's, which takes all answers
for independent, and a bootstrap that draws participants and clips anew, because answers of one person, and answers on one clip,
resemble each other (Owen, "The pigeonhole bootstrap", 2007). The second is the one to quote.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.show import table
from experiments.vote_store import TRUTH, Store

Z95 = 1.959963984540054
DRAWS = 5000


@dataclass(frozen=True)
class Rule:
    """Whose answers do not count. Decided before a vote, not after looking at it: results name the rule."""

    min_ms: float = 700.0  # a participant whose median answer took less did not look
    same_side: int = 8  # so many sided answers or more, all for one side: by chance in 1 of 128
    spoilt: int = 1  # so many wrong answers to "the truth or a spoilt copy", or more
    identical: float = 0.5  # a larger share of identical pairs on which a side was preferred

    def __post_init__(self) -> None:
        if self.min_ms < 0 or self.same_side < 2 or self.spoilt < 1 or not 0 <= self.identical <= 1:
            raise ValueError("min_ms must be 0 or more, same_side 2 or more, spoilt 1 or more, identical in 0 to 1")

    def __str__(self) -> str:
        return (
            f"excluded are participants with {self.spoilt} or more wrong answers to the truth against a spoilt copy; who prefer a "
            f"side of more than {self.identical:.0%} of their identical pairs; whose median answer takes less than "
            f"{self.min_ms:g} ms; who choose the same side {self.same_side} times or more and never the other; who answered no "
            "check"
        )

    def reasons(self, votes: Sequence[Mapping[str, Any]]) -> list[str]:
        """Why one participant's answers do not count; empty if they do."""
        checks = [vote for vote in votes if vote["kind"] == "degraded"]
        wrong = [vote for vote in checks if chosen(vote) != TRUTH]
        same = [vote for vote in votes if vote["kind"] == "identical"]
        sided = [vote for vote in same if vote["choice"] != "none"]
        found = []
        if not checks and not same:
            found.append("answered no check")
        if len(wrong) >= self.spoilt:
            found.append(f"preferred a spoilt copy, or saw no difference, in {len(wrong)} of {len(checks)} checks")
        if same and len(sided) / len(same) > self.identical:
            found.append(f"preferred a side of {len(sided)} of {len(same)} identical pairs")
        median = 1000 * statistics.median(vote["seconds"] for vote in votes) if votes else math.inf
        if median < self.min_ms:
            found.append(f"median answer in {median:.0f} ms")
        sides = [vote["choice"] for vote in votes if vote["choice"] != "none"]
        if len(sides) >= self.same_side and len(set(sides)) == 1:
            found.append(f"chose {sides[0]} all {len(sides)} times")
        return found


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

    NaN where there are fewer than two participants or fewer than two clips: then nothing says how much they differ.
    """
    keep = numbers.sum(1) > 0, numbers.sum(0) > 0
    wins, numbers = (array[keep[0]][:, keep[1]].astype(np.float64) for array in (wins, numbers))
    people, clips = wins.shape
    if people < 2 or clips < 2:
        return math.nan, math.nan
    draw = np.random.default_rng(seed)
    rows = draw.multinomial(people, np.full(people, 1 / people), DRAWS).astype(np.float64)
    columns = draw.multinomial(clips, np.full(clips, 1 / clips), DRAWS).astype(np.float64)
    won, all_ = (np.einsum("dp,pc,dc->d", rows, array, columns, optimize=True) for array in (wins, numbers))
    shares = won[all_ > 0] / all_[all_ > 0]  # a draw may miss every answer
    low, high = np.quantile(shares, [0.025, 0.975])
    return float(low), float(high)


def results(store: Store, rule: Rule) -> dict[str, Any]:
    """Shares of every pair of methods, excluded participants with the reasons, and the rule."""
    study, votes = store.study(), store.votes()
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
                }
            )
    names = {person["number"]: person["name"] for person in store.participants()}
    return {
        "pairs": pairs,
        "participants": len(counted),
        "clips": len(study.clips),
        "began": len(names),
        "excluded": [{"participant": n, "name": names[n], "reasons": excluded[n]} for n in sorted(excluded)],
        "rule": str(rule),
    }


def text(found: Mapping[str, Any]) -> str:
    """The results as printed."""

    def interval(bounds: tuple[float, float]) -> str:
        return "not to be had" if math.isnan(bounds[0]) else f"{bounds[0]:.1%} to {bounds[1]:.1%}"

    head = ["first", "second", "share of first", "clustered 95 %", "Wilson 95 %", "first", "second", "no difference"]
    rows: list[list[Any]] = [head]
    for pair in found["pairs"]:
        share = "no votes" if math.isnan(pair["share"]) else f"{pair['share']:.1%}"
        counts = (pair["first_preferred"], pair["second_preferred"], pair["no_difference"])
        rows.append(
            [pair["first"], pair["second"], share, interval(pair["clustered"]), interval(pair["wilson"]), *counts]
        )
    lines = [
        table(rows),
        "",
        f"{found['participants']} participants count, {found['began']} began; {found['clips']} clips",
    ]
    lines += [f"rule: {found['rule']}"]
    for one in found["excluded"]:
        name = f" ({one['name']})" if one["name"] else ""
        lines.append(f"excluded: participant {one['participant']}{name}: {'; '.join(one['reasons'])}")
    return "\n".join(lines) + "\n"
