"""Independence-aware channel pruning: which channels of a layer say the most about all of them, and how to get the rest.

A channel that is a linear combination of others is redundant, however large it is (Flash-VAED, arXiv 2602.19161, fig. 1).
All of it works on :class:`ChannelStatistics`, on the CPU in float64; the same statistics give the same channels.
Variables follow the formulas: A is the centred Gram matrix (C x C), S the kept channels, k their number.
"""

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from decoders.flash_vaed.statistics import ChannelStatistics

METHODS = ("greedy", "qr", "magnitude", "chip", "random")
_ZERO = 1e-12  # a channel whose share of variance that others do not explain is below this is a combination of them


@dataclass(frozen=True, eq=False)
class Selection:
    """Channels that were kept, and how much of all channels they explain.

    ``r2`` is the share of the total variance of all channels that a linear map (with a bias) of the kept ones
    reproduces; ``order`` has the kept channels as they were chosen and ``r2_curve[m]`` is R^2 of the first m + 1.
    """

    kept: Int64[Tensor, " k"]
    total: int
    method: str
    r2: float
    order: list[int]
    r2_curve: list[float]


def kept_count(channels: int, ratio: float | int) -> int:
    """Channels that a ratio in (0, 1] leaves, rounded down. Raises ValueError if it is out of range or leaves none."""
    if not 0 < ratio <= 1:
        raise ValueError(f"a share of channels to keep is in (0, 1], got {ratio}")
    count = math.floor(channels * ratio + 1e-9)
    if not count:
        smallest = math.ceil(1e4 / channels) / 1e4
        raise ValueError(
            f"ratio {ratio:g} leaves no channel of {channels}; the smallest that leaves one is 1/{channels} ({smallest:g})"
        )
    return count


def select(
    statistics: ChannelStatistics,
    count: int,
    method: str = "greedy",
    *,
    scores: Float[Tensor, " c"] | None = None,
    swaps: int = 0,
    seed: int = 0,
) -> Selection:
    """Choose ``count`` channels.

    greedy: one by one, the channel that raises R^2 the most. qr: the one with the largest residual, which is QR with
    column pivoting. magnitude: the largest variances, or the largest ``scores`` (:func:`filter_l1`). chip: the largest
    loss of nuclear norm without the channel (:func:`chip_scores`). random: by ``seed``. Ties go to the lower index, and
    once the chosen ones explain everything, greedy and qr go on by variance.

    No choice made one by one is the best set. ``swaps`` passes exchange each kept channel for the one that raises R^2
    the most, if any does, starting from what greedy, qr and magnitude chose; the best of the three is taken. The method
    as published has none.

    Raises ValueError for an unknown method, a count that is not in 1..C, options that the method does not read, and for
    fewer positions than ``count`` + 1 unless all channels are kept.
    """
    channels = statistics.channels
    if method not in METHODS:
        nearest = difflib.get_close_matches(method, METHODS, n=1, cutoff=0.0)[0]
        raise ValueError(f"no selection method {method!r}; nearest is {nearest!r}, all are {list(METHODS)}")
    if not 1 <= count <= channels:
        raise ValueError(f"{count} channels cannot be kept of {channels}")
    if scores is not None and (method != "magnitude" or len(scores) != channels):
        raise ValueError(f"scores are for method 'magnitude', one for each of {channels} channels")
    if swaps and method != "greedy":
        raise ValueError(f"swaps are for method 'greedy', not {method!r}")
    if count < channels:
        statistics.require(count)
    gram = statistics.gram.cpu()
    if method in ("greedy", "qr"):
        order, curve = _eliminate(gram, count, _greedy_gain if method == "greedy" else _pivot_gain)
    else:
        order, curve = _eliminate(gram, count, _ranking(gram, method, scores, seed)[:count].tolist())
    if swaps and curve[-1] < 1 - _ZERO:
        starts = [order, _eliminate(gram, count, _pivot_gain)[0], _ranking(gram, method, None, 0)[:count].tolist()]
        found = [_eliminate(gram, count, _exchange(gram, start, swaps)) for start in starts]
        order, curve = max(found, key=lambda chosen: chosen[1][-1])
    kept = torch.tensor(sorted(order))
    return Selection(kept, channels, method, r_squared(statistics, kept), order, curve)


def _ranking(gram: Tensor, method: str, scores: Tensor | None, seed: int) -> Tensor:
    """All channels, the best first, by a score that each has on its own."""
    if method == "random":
        return torch.randperm(len(gram), generator=torch.Generator().manual_seed(seed))
    if method == "chip":
        scores = chip_scores(gram)
    elif scores is None:
        scores = gram.diagonal()
    return scores.detach().cpu().double().argsort(descending=True, stable=True)


def _greedy_gain(residual: Tensor) -> Tensor:
    """By how much the total residual falls when each channel becomes known: ||R[:, j]||^2 / R[j, j]."""
    return residual.square().sum(0) / residual.diagonal()


def _pivot_gain(residual: Tensor) -> Tensor:
    return residual.diagonal()


def _eliminate(
    gram: Float64[Tensor, "c c"], count: int, choice: Callable[[Tensor], Tensor] | list[int]
) -> tuple[list[int], list[float]]:
    """Take ``count`` channels, by gain or in a given order, out of the residual Gram matrix: pivoted Cholesky, one rank
    at a time. Returns the order and R^2 after each."""
    residual, variance = gram.clone(), gram.diagonal().clone()
    total = float(variance.sum())
    free = torch.ones(len(gram), dtype=torch.bool)
    order, curve = [], []
    for step in range(count):
        usable = free & (residual.diagonal() > _ZERO * variance)
        if isinstance(choice, list):
            j = choice[step]
        elif usable.any():
            j = int(choice(residual).masked_fill(~usable, -1).argmax())
        else:  # nothing is left to explain
            j = int(variance.masked_fill(~free, -1).argmax())
        if usable[j]:
            column = residual[:, j].clone()
            residual -= torch.outer(column, column / column[j])
            residual[:, j] = residual[j] = 0
        free[j] = False
        order.append(j)
        r2 = 1 - float(residual.diagonal().clamp(min=0).sum()) / total if total > 0 else 1.0
        curve.append(max(r2, curve[-1] if curve else 0.0))
    return order, curve


def _exchange(gram: Float64[Tensor, "c c"], order: list[int], passes: int) -> list[int]:
    """Put each chosen channel back, in turn, and take the best of all instead, until a pass changes nothing."""
    order, variance = list(order), gram.diagonal()
    for _ in range(passes):
        before = list(order)
        for place, s in enumerate(before):
            rest = [kept for kept in order if kept != s]
            residual = _residual(gram, rest)
            usable = residual.diagonal() > _ZERO * variance
            usable[rest] = False
            gain = _greedy_gain(residual).masked_fill(~usable, 0)
            best = int(gain.argmax())
            if gain[best] > gain[s] + 1e-9 * variance.sum():
                order[place] = best
        if order == before:
            break
    return order


def _residual(gram: Float64[Tensor, "c c"], kept: list[int]) -> Float64[Tensor, "c c"]:
    """The Gram matrix of what these channels leave unexplained; the jitter is there for those that depend on others."""
    scale = gram.diagonal()[kept].clamp(min=1e-300).rsqrt()
    target = scale[:, None] * gram[kept]
    factor = torch.linalg.cholesky(target[:, kept] * scale + _ZERO * torch.eye(len(kept), dtype=torch.float64))
    half = torch.linalg.solve_triangular(factor, target, upper=False)
    return gram - half.T @ half


def filter_l1(weight: Float[Tensor, "o i *kernel"]) -> Float[Tensor, " o"]:
    """Sum of absolute weights of the filter that produces each channel: the usual score for magnitude pruning."""
    return weight.detach().abs().flatten(1).sum(1)


def chip_scores(gram: Float64[Tensor, "c c"]) -> Float64[Tensor, " c"]:
    """Channel independence of CHIP (Sui et al., NeurIPS 2021): by how much the nuclear norm of the feature matrix falls
    when a channel is taken out. The norm is the sum of the roots of the Gram matrix's eigenvalues.

    CHIP averages over single feature maps; here there is one matrix, of all positions, and it is centred.
    """

    def nuclear_norm(matrix: Tensor) -> Tensor:
        return torch.linalg.eigvalsh(matrix).clamp(min=0).sqrt().sum()

    others = ~torch.eye(len(gram), dtype=torch.bool)
    return nuclear_norm(gram) - torch.stack([nuclear_norm(gram[rest][:, rest]) for rest in others])


def reconstruction(
    statistics: ChannelStatistics, kept: Int64[Tensor, " k"], ridge: float = 1e-6, bias: bool = True
) -> tuple[Float64[Tensor, "k c"], Float64[Tensor, " c"]]:
    """W and b with features ~ features[kept] @ W + b, in least squares over the calibration positions.

    Kept channels are reproduced as they are; with all of them kept, W is the identity and b zero, exactly. ``ridge`` is
    relative to each kept channel's variance. Without ``bias`` b is zero and W the best map through the origin: for a
    consumer that pads with zeros, which a constant would not survive. Raises ValueError for channels that are repeated
    or do not exist, and for too few positions.
    """
    kept = _checked(statistics, kept)
    if len(kept) < statistics.channels:
        statistics.require(len(kept))
    mean, gram = statistics.mean.cpu(), statistics.gram.cpu()
    if not bias:
        gram = gram + statistics.count * torch.outer(mean, mean)
    weight = _regress(gram, kept, ridge)[0]
    weight[:, kept] = torch.eye(len(kept), dtype=torch.float64)
    offset = mean - mean[kept] @ weight
    offset[kept] = 0
    return weight, offset if bias else torch.zeros_like(offset)


def r_squared(statistics: ChannelStatistics, kept: Int64[Tensor, " k"]) -> float:
    """Share, in [0, 1], of the total variance of all channels that the kept ones explain linearly; 1 if there is none.
    Raises ValueError for channels that are repeated or do not exist."""
    kept = _checked(statistics, kept)
    gram = statistics.gram.cpu()
    if len(kept) == statistics.channels:
        return 1.0
    total, explained = float(gram.trace()), _regress(gram, kept, 0.0)[1].clone()
    explained[kept] = gram.diagonal()[kept]
    return min(max(float(explained.sum()) / total, 0.0), 1.0) if total > 0 else 1.0


def _regress(gram: Tensor, kept: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """(A_SS + ridge)^-1 A_S: and the explained sum of squares of every channel, by eigenvalues of the correlations; what
    is numerically zero is left out."""
    scale = gram.diagonal()[kept].clamp(min=0).sqrt()
    scale = torch.where(scale > 0, 1 / scale, 0)
    target = scale[:, None] * gram[kept]
    values, vectors = torch.linalg.eigh(target[:, kept] * scale)
    inverse = torch.where(values > _ZERO * len(kept), 1 / (values + ridge), 0)
    weight = vectors @ (inverse[:, None] * (vectors.T @ target))
    return scale[:, None] * weight, (weight * target).sum(0)


def _checked(statistics: ChannelStatistics, kept: Tensor) -> Tensor:
    kept = kept.cpu()
    if not len(kept) or len(kept.unique()) < len(kept) or kept.min() < 0 or kept.max() >= statistics.channels:
        raise ValueError(f"kept channels must be different ones of 0..{statistics.channels - 1}, got {kept.tolist()}")
    return kept


def rms_gain(statistics: ChannelStatistics, kept: Int64[Tensor, " k"]) -> float:
    """RMS of the kept channels over RMS of all: an RMS norm of the kept ones, its gain sliced and multiplied by this,
    gives them the size that they had when all were normalised together. 1 if all features are zero."""
    square = statistics.mean_square.cpu()
    subset, full = float(square[_checked(statistics, kept)].mean()), float(square.mean())
    return math.sqrt(subset / full) if full > 0 else 1.0


@dataclass(frozen=True)
class LayerRow:
    """One layer of the pruning report. FLOPs are of any one clip; milliseconds, where measured, of the same."""

    layer: str
    kept: int
    total: int
    r2: float
    parameters_before: int
    parameters_after: int
    flops_before: float
    flops_after: float
    ms_before: float | None = None
    ms_after: float | None = None


def latency_shares(rows: Sequence[LayerRow]) -> list[tuple[float, float]]:
    """Of each layer, the predicted time before and after pruning, both as shares of the whole time before.

    Time before is measured, or goes by FLOPs where nothing is; time after is measured, or scales with the layer's FLOPs.
    Raises ValueError if some layers are measured before pruning and some are not, or if there is no time to share.
    """
    measured = [row.ms_before is not None for row in rows]
    if any(measured) and not all(measured):
        missing = [row.layer for row, known in zip(rows, measured, strict=True) if not known]
        raise ValueError(f"layers without a measured time beside layers with one: {missing}")
    if not any(measured) and any(row.ms_after is not None for row in rows):
        raise ValueError("a measured time after pruning needs the measured time before")
    before = [float(row.flops_before if row.ms_before is None else row.ms_before) for row in rows]
    if not sum(before) > 0:
        raise ValueError("no FLOPs and no times: there is no latency to share")
    shares = []
    for row, time in zip(rows, before, strict=True):
        scale = row.flops_after / row.flops_before if row.flops_before else row.kept / row.total
        after = time * scale if row.ms_after is None else row.ms_after
        shares.append((time / sum(before), after / sum(before)))
    return shares


def report(rows: Sequence[LayerRow]) -> str:
    """A table for people: one line a layer, the sums, and the speed-up that the shares predict."""
    shares = latency_shares(rows)
    by = "measured times" if rows[0].ms_before is not None else "FLOPs"
    lines = [["layer", "kept", "R^2", "parameters", "after", "GFLOPs", "after", "share", "after"]]
    for row, (before, after) in zip(rows, shares, strict=True):
        numbers = [f"{row.parameters_before:,}", f"{row.parameters_after:,}"]
        numbers += [f"{row.flops_before / 1e9:.3f}", f"{row.flops_after / 1e9:.3f}", f"{before:.1%}", f"{after:.1%}"]
        lines.append([row.layer, f"{row.kept}/{row.total}", f"{row.r2:.4f}", *numbers])
    parameters = [f"{sum(row.parameters_before for row in rows):,}", f"{sum(row.parameters_after for row in rows):,}"]
    flops = [f"{sum(row.flops_before for row in rows) / 1e9:.3f}", f"{sum(row.flops_after for row in rows) / 1e9:.3f}"]
    left = sum(after for _, after in shares)
    lines.append(["all", "", "", *parameters, *flops, "100.0%", f"{left:.1%}"])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    ]
    speed_up = f"{1 / left:.2f} times" if left > 0 else "not bounded"
    return "\n".join([*text, f"predicted speed-up by {by}: {speed_up}"])
