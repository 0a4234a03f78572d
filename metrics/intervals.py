"""How sure a mean over clips is: bootstrap intervals, of one method or of the difference between two on the same clips."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

DRAWS = 10_000
LEVEL = 0.95
_CHUNK = 1 << 22  # numbers drawn at once: bounds memory, changes no value


class Interval(NamedTuple):
    """A mean, and the bounds between which 95 % of its bootstrap replicates lie; both NaN for fewer than two clips."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.3f} ({self.low:+.3f} to {self.high:+.3f})"


def bootstrap(values: Sequence[float], seed: int = 0) -> Interval:
    """Percentile bootstrap of the mean (Efron and Tibshirani, 1993, chapter 13): clips are drawn anew with replacement.

    For a paired comparison ``values`` are the differences on the same clips. Seeded, so the same values give the same bounds.
    """
    if not values:
        raise ValueError("there is no clip to take a mean of")
    scores = torch.tensor(values, dtype=torch.float64)
    if len(values) < 2:
        return Interval(scores.item(), float("nan"), float("nan"))
    generator = torch.Generator().manual_seed(seed)
    rows = max(1, _CHUNK // len(values))
    means = torch.cat(
        [
            scores[torch.randint(len(values), (min(rows, DRAWS - done), len(values)), generator=generator)].mean(dim=1)
            for done in range(0, DRAWS, rows)
        ]
    )
    tail = (1 - LEVEL) / 2
    low, high = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Interval(scores.mean().item(), low, high)


def paired(ours: Mapping[str, float], theirs: Mapping[str, float], seed: int = 0) -> Interval:
    """Ours minus theirs on the clips that both have scores of (clip -> score; NaN is no score), with its interval.

    Raises ValueError where they have no clip in common.
    """
    differences = [ours[key] - theirs[key] for key in sorted(ours.keys() & theirs.keys())]
    return bootstrap([value for value in differences if not math.isnan(value)], seed)
