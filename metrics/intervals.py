"""How sure a mean over clips is: bootstrap intervals, of one method or of the difference between two on the same clips."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

DRAWS = 10_000
LEVEL = 0.95


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
    drawn = torch.randint(len(values), (DRAWS, len(values)), generator=generator)
    means = scores[drawn].mean(dim=1)
    tail = (1 - LEVEL) / 2
    low, high = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Interval(scores.mean().item(), low, high)
