"""What every metric here shares: checked and clamped inputs, exact float32, frames in chunks, scores "b t"."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from losses.pixel import check_pair

_PIXELS_PER_CHUNK = 1 << 21  # one 1080p frame, eight of 480 x 480: bounds memory, changes no value
_KEPT_BYTES = 1 << 30  # of one metric, on the device of its inputs
_LOOKS_LIKE_BYTES = 32.0  # no decoder that means [-1, 1] gives nothing below 0 and this much
_OVERSHOT, _SHIFT, _CLOSER = 0.05, 0.15, 4.0  # of :func:`_looks_halved`


class Metric(ABC):
    """Scores frames: ``metric(prediction, target) -> "b t"``. Each clip is scored alone, so batch size changes no bit.

    ``name`` is the column's and TensorBoard's (``val/<name>``); ``higher_is_better`` says which way is up;
    ``protocol`` is the metric's part of :class:`metrics.protocol.Protocol`. ``pairs``: what is scored lies between a
    frame and the one before it; the score stands at the later frame, and a clip's first frame has none (NaN).
    """

    name: str
    higher_is_better: bool
    pairs: bool = False
    _kept: "TargetCache | None" = None  # of metrics that work on the target alone before they compare

    @property
    @abstractmethod
    def protocol(self) -> dict[str, Any]:
        """Range, constants and weights that define the number; plain values."""

    @abstractmethod
    def _frames(self, prediction: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
        """(frames, 3, h, w) twice and (frames, 1, h, w) or None, float32 in [-1, 1] -> (frames,).

        With ``pairs`` -> (frames - 1,): one score for each frame but the first; NaN where a pair has none.
        """

    @torch.no_grad()
    def __call__(
        self,
        prediction: Float[Tensor, "b 3 t h w"],
        target: Float[Tensor, "b 3 t h w"],
        mask: Float[Tensor, "b 1 t h w"] | None = None,
    ) -> Float[Tensor, "b t"]:
        """Score of each frame in float32, without gradient; the prediction is clamped to [-1, 1] first.

        NaN where a frame has no score: the first one of a metric of ``pairs``. What ``mask`` does not count (0) cannot
        touch the score: there the prediction is replaced by the target, and averages run over what counts. Raises
        ValueError for shapes that differ, a target outside [-1, 1], a prediction of [0, 255] (uint8?), a clip of which
        one side is [0, 1] and the other [-1, 1], and a frame in which nothing counts.
        """
        check_pair(prediction, target, mask)
        _check_range(target if mask is None else torch.where(mask > 0, target, 0.0))
        _check_prediction(prediction)
        _check_counts(mask)
        _check_one_range(prediction, target, mask)
        if self._kept is not None:
            self._kept.rewind()
        clips = zip(prediction, target, [None] * len(target) if mask is None else mask, strict=True)
        with exact_fp32(prediction.device):
            return torch.stack([self._clip(*clip) for clip in clips])

    def clip_score(self, frames: Float[Tensor, " t"]) -> float:
        """A clip's score from its frames' (or from some of them): the mean.

        Of ``pairs``, over the frames that have a score; NaN if there is none. Otherwise every frame has one, and a NaN
        (a prediction that is not finite) stays visible.
        """
        if self.pairs:
            frames = frames[~frames.isnan()]
        return frames.double().mean().item()

    def forget(self) -> None:
        """Drop what is kept of the last target for the next method; call it after each batch. Changes no number."""
        if self._kept is not None:
            self._kept.forget()

    def _clip(self, prediction: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
        """(3, t, h, w) twice and (1, t, h, w) or None -> (t,)."""
        t, h, w = prediction.shape[1:]
        size, before = max(1, _PIXELS_PER_CHUNK // (h * w)), int(self.pairs)
        scores = [torch.full((before,), torch.nan, device=prediction.device)]
        for start in range(0, t - before, size):
            cut = slice(start, start + size + before)
            chunk = _prepared(
                *(x if x is None else x[:, cut].transpose(0, 1).float() for x in (prediction, target, mask))
            )
            found = self._frames(*chunk)
            scores.append(self._worst_if_broken(found, chunk[0]) if self.pairs else found)
        return torch.cat(scores)

    def _worst_if_broken(self, scores: Tensor, prediction: Tensor) -> Tensor:
        """Infinitely bad where a frame of the pair is not finite: NaN would read as "has no score" and be left out."""
        fine = prediction.isfinite().flatten(1).all(dim=1)
        worst = -torch.inf if self.higher_is_better else torch.inf
        return torch.where(fine[1:] & fine[:-1], scores, worst)


class SetMetric(ABC):
    """Scores a set of predictions against a set of truths: one number for all clips, no score of a frame.

    ``name`` is the column's; ``higher_is_better`` and ``protocol`` as in :class:`Metric`.
    """

    name: str
    higher_is_better: bool
    protocol: dict[str, Any]

    @abstractmethod
    def features(self, video: Float[Tensor, "b 3 t h w"]) -> Float[Tensor, "b windows d"]:
        """What is kept of each clip: float32 on the CPU, without gradient. RGB in [-1, 1], clamped here."""

    @abstractmethod
    def score(self, real: Float[Tensor, "n d"], fake: Float[Tensor, "n d"]) -> float:
        """The number, from the features of all windows of all clips."""

    def forget(self) -> None:  # noqa: B027  one that keeps nothing has nothing to write
        """As in :class:`Metric`. Nothing to drop by default."""


class TargetCache:
    """What was computed of the last target's frames, for the next method that is scored on the same batch.

    Calls ask in the same order for every method. The first frames that are not those kept, bit by bit, drop all from
    there on, so no more than one batch is held; and no more than ``limit`` bytes: beyond it values are computed anew.
    """

    def __init__(self, limit: int = _KEPT_BYTES):
        self._limit, self._entries, self._next, self._bytes = limit, [], 0, 0

    def rewind(self) -> None:
        """The next call is a batch's first."""
        self._next = 0

    def forget(self) -> None:
        """Drop everything."""
        self._entries, self._next, self._bytes = [], 0, 0

    def get(self, frames: Tensor, compute: Callable[[Tensor], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """``compute(frames)``, or what it gave for the same frames. Nobody may change ``frames`` afterwards."""
        place, self._next = self._next, self._next + 1
        if place < len(self._entries):
            known, value = self._entries[place]
            if known is not None and _same(known, frames):
                return value
            self._drop_from(place)
        value = compute(frames)
        size = _bytes_of(frames, *value)
        if self._bytes + size <= self._limit:
            self._entries.append((frames, value))
            self._bytes += size
        else:
            self._entries.append((None, ()))
        return value

    def _drop_from(self, place: int) -> None:
        for known, value in self._entries[place:]:
            self._bytes -= 0 if known is None else _bytes_of(known, *value)
        del self._entries[place:]


@contextlib.contextmanager
def exact_fp32(device: torch.device) -> Iterator[None]:
    """Float32 that is float32: no autocast, no TF32 in convolutions (SSIM's variances would lose most digits)."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.autocast(device.type, enabled=False))
        if device.type == "cuda":
            cudnn = torch.backends.cudnn
            stack.enter_context(cudnn.flags(cudnn.enabled, deterministic=cudnn.deterministic, allow_tf32=False))
        yield


def masked_mean(values: Float[Tensor, "frames c h w"], mask: Tensor | None) -> Float[Tensor, " frames"]:
    """Mean over channels and the pixels that count; NaN where none does."""
    values = values.mean(dim=1)
    if mask is None:
        return values.mean(dim=(1, 2))
    return (values * mask[:, 0]).sum(dim=(1, 2)) / mask.sum(dim=(1, 2, 3))


def counted_in_both(mask: Tensor | None) -> Tensor | None:
    """(frames, 1, h, w) -> (frames - 1, 1, h, w): what counts in a frame and in the one before it."""
    return None if mask is None else torch.minimum(mask[1:], mask[:-1])


def _prepared(prediction: Tensor, target: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    prediction, target = prediction.clamp(-1, 1), target.clamp(-1, 1)
    if mask is not None:
        target = torch.where(mask > 0, target, target.nan_to_num())
        prediction = torch.where(mask > 0, prediction, target)
    return prediction, target, mask


def _check_range(target: Tensor) -> None:
    low, high = (value.item() for value in target.aminmax())
    if not (low >= -1.01 and high <= 1.01):  # room for a resize filter's overshoot before rounding; `not` catches NaN
        raise ValueError(f"the target must be RGB in [-1, 1], got values from {low:.4g} to {high:.4g}")


def _check_prediction(prediction: Tensor) -> None:
    """Clamping would hide a range that is mixed up; what a decoder overshoots stays allowed."""
    if not prediction.is_floating_point():
        raise ValueError(
            f"the prediction must be float RGB in [-1, 1], got {prediction.dtype}: divide by 127.5, less 1"
        )
    low, high = (value.item() for value in prediction.aminmax())
    if low >= 0 and high > _LOOKS_LIKE_BYTES:
        raise ValueError(
            f"the prediction has values from {low:.4g} to {high:.4g}: not RGB in [-1, 1], as the target is"
        )


def _check_one_range(prediction: Tensor, target: Tensor, mask: Tensor | None) -> None:
    sides = {"prediction": prediction, "target": target}
    for clip in range(len(target)):
        counted = slice(None) if mask is None else mask[clip, 0] > 0
        for one, other in (("prediction", "target"), ("target", "prediction")):
            if _looks_halved(sides[one][clip][:, counted], sides[other][clip][:, counted]):
                raise ValueError(
                    f"the {one} of clip {clip} looks like RGB in [0, 1] and the {other} like RGB in [-1, 1] (2 v - 1 of the "
                    f"{one} is far closer to the {other} than v): metrics take [-1, 1] of both"
                )


def _looks_halved(one: Tensor, other: Tensor) -> bool:
    """Whether ``one`` is about ``(other + 1) / 2``: pixels (3, ...) of one clip.

    It is nowhere below 0, on the whole brighter, and becomes at least four times as close by ``2 v - 1``, which then explains
    three quarters of the other's variance. A decoder that means [-1, 1] would have to halve all contrasts about white.
    A film that is nearly white throughout, and two sides in [0, 1], cannot be told from what is right.
    """
    low, high = (value.item() for value in one.aminmax())
    if not (low >= -_OVERSHOT and high <= 1 + _OVERSHOT):  # so it is with most clips, and with NaN
        return False
    one, other = one.float(), other.float()
    if not one.mean() - other.mean() > _SHIFT:
        return False
    apart, stretched = (one - other).square().mean(), (2 * one - 1 - other).square().mean()
    return bool(_CLOSER * stretched < torch.minimum(apart, other.var(correction=0)))


def _check_counts(mask: Tensor | None) -> None:
    if mask is None:
        return
    empty = (mask.sum(dim=(1, 3, 4)) <= 0).nonzero()
    if len(empty):
        clip, frame = empty[0].tolist()
        raise ValueError(
            f"the mask counts nothing in frame {frame} of clip {clip} ({len(empty)} such frames): leave them out"
        )


def _same(one: Tensor, other: Tensor) -> bool:
    return one.device == other.device and torch.equal(one, other)


def _bytes_of(*tensors: Tensor) -> int:
    return sum(tensor.nbytes for tensor in tensors)
