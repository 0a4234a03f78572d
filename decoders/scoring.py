"""What validation keeps of every clip by every method: scores of frames, features for distances between sets, and times."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

import metrics
from datamodules.batch import VideoBatch
from decoders.training import ValidationConfig
from metrics.base import Metric, SetMetric

Method = Callable[[VideoBatch], Tensor | None]
Row = dict[str, Any]  # one clip by one method: stream, key, frames, height, width and the clip's score by every metric
TRUTH = "truth"  # the clips themselves as a method: scored by what has a value of its own for them, by nothing else
DECODER = "decoder"  # the method's name in rows that are the decoder's own
DECODE = "decode"  # in the seconds: the decoder's own decoding, beside what each metric took
PER_FRAME = "per_frame"  # in a row: metric -> the score of every frame; in_<group> -> 1 for every frame in it, else 0
FEATURES = "features"  # in a row: metric of sets -> {"real": "windows d", "fake": "windows d"}
CATEGORY = "category"  # in a row, where clips have categories: the clip's
SCORED = "scored"  # in a row: places in the delivered clip of the frames that are scored, where it is not all of them
BROKEN = "broken"  # in a row whose prediction is not finite everywhere: the metrics that have no number therefore


def selected(batch: VideoBatch, keep: Sequence[int]) -> VideoBatch:
    """The clips of ``batch`` at the places ``keep``; the batch itself where that is all of them."""
    if len(keep) == len(batch["key"]):
        return batch
    places = torch.tensor(keep, dtype=torch.long)
    parts = {name: part[places.to(part.device)] for name, part in batch.items() if isinstance(part, Tensor)}
    return {**batch, **parts, "key": [batch["key"][i] for i in keep]}


def named_groups(batch: VideoBatch, ranges: Mapping[str, Sequence[int]]) -> dict[str, Bool[Tensor, "b t"]]:
    """Frames [from, to) of every clip, by name; those of which these clips have none, or all, are left out."""
    b, t = len(batch["key"]), batch["video"].shape[2]
    parts = {name: range(first, min(last, t)) for name, (first, last) in ranges.items()}
    frames = torch.arange(t)
    return {
        name: ((frames >= part.start) & (frames < part.stop)).expand(b, t)
        for name, part in parts.items()
        if 0 < len(part) < t
    }


@dataclass
class Clips:
    """The scored part of a batch, cut out once, so that metrics know their target again from method to method.

    ``scored``: frames that have a target, the same in all clips of a stream; None: all of them.
    """

    stream: int
    keys: list[str]
    video: Float[Tensor, "b 3 t h w"]
    mask: Float[Tensor, "b 1 t h w"] | None
    groups: dict[str, Bool[Tensor, "b t"]]
    scored: Bool[Tensor, " t2"] | None
    categories: list[str] | None = None
    truths: dict[str, Tensor] = field(
        default_factory=dict
    )  # set metric -> features of ``video``, made once for all methods

    @classmethod
    def of(cls, batch: VideoBatch, groups: dict[str, Tensor], stream: int) -> "Clips":
        """``groups``: frames of ``batch`` that are also scored by themselves, name -> bool "b t"."""
        video, mask, scored = batch["video"], batch.get("mask"), None
        groups = {name: group.cpu() for name, group in groups.items()}
        if "supervised" in batch:
            scored = batch["supervised"][0]
            video = video[:, :, scored]
            mask = mask if mask is None else mask[:, :, scored]
            groups = {name: group[:, scored.cpu()] for name, group in groups.items()}
        return cls(stream, batch["key"], video, mask, groups, scored)

    def cut(self, prediction: Float[Tensor, "b 3 t2 h w"]) -> Float[Tensor, "b 3 t h w"]:
        """Of a decoded batch what is scored."""
        return prediction if self.scored is None else prediction[:, :, self.scored]


class Scorer:
    """The metrics of a validation, and the rows and seconds that it has gathered so far.

    Made before any work: raises ValueError for an unknown metric, WeightsNotFound for one whose weights are missing.
    """

    def __init__(self, config: ValidationConfig) -> None:
        self.metrics: list[Metric | SetMetric] = metrics.build(config.metrics, weights=config.weights or None)
        self.rows: list[Row] = []
        self.seconds: dict[str, float] = {}

    def begin(self) -> None:
        """A new validation."""
        self.rows, self.seconds = [], {}

    @contextmanager
    def timed(self, what: str, device: torch.device) -> Iterator[None]:
        """Add the seconds spent inside to ``seconds[what]``; a GPU's work is waited for."""
        begun = _now(device)
        yield
        self.seconds[what] = self.seconds.get(what, 0.0) + _now(device) - begun

    def score(self, method: str, prediction: Float[Tensor, "b 3 t2 h w"], clips: Clips) -> None:
        """Keep a row for every clip. Only the decoder's own scoring is timed."""
        shown = clips.cut(prediction)
        scores: dict[str, Tensor] = {}
        features: dict[str, dict[str, Tensor]] = {}
        before = dict(self.seconds)
        for metric in self.metrics:
            if method == TRUTH and not metrics.truth_has_value(metric.name):
                continue
            with self.timed(metric.name, shown.device):
                if isinstance(metric, SetMetric):
                    kept = shown if clips.mask is None else torch.where(clips.mask > 0, shown, clips.video)
                    if metric.name not in clips.truths:
                        clips.truths[metric.name] = metric.features(clips.video)
                    features[metric.name] = {"real": clips.truths[metric.name], "fake": _features(metric, kept, clips)}
                else:
                    scores[metric.name] = metric(shown, clips.video, clips.mask).cpu()
        if method != DECODER:
            self.seconds = before
        for index in range(len(clips.keys) if scores or features else 0):
            self.rows.append(self._row(method, clips, index, scores, features))

    def _row(self, method: str, clips: Clips, index: int, scores: dict[str, Tensor], features: dict) -> Row:
        video, by_name = clips.video, {m.name: m for m in self.metrics}
        row: Row = {"method": method, "stream": clips.stream, "key": clips.keys[index], "frames": video.shape[2]}
        row |= {"height": video.shape[3], "width": video.shape[4]}
        if clips.scored is not None:
            row[SCORED] = clips.scored.nonzero().flatten().tolist()
        if clips.categories is not None:
            row[CATEGORY] = clips.categories[index]
        own = {name: score[index] for name, score in scores.items()}
        if broken := [name for name, score in own.items() if _is_broken(by_name[name], score)]:
            row[BROKEN] = broken
        row |= {name: number(by_name[name].clip_score(score)) for name, score in own.items()}
        for group, members in clips.groups.items():
            frames = members[index]
            row |= {f"{name}_{group}": number(by_name[name].clip_score(score[frames])) for name, score in own.items()}
        per_frame = {name: [number(value) for value in score.tolist()] for name, score in own.items()}
        per_frame |= {f"in_{group}": members[index].int().tolist() for group, members in clips.groups.items()}
        kept = {name: {side: part[index] for side, part in sides.items()} for name, sides in features.items()}
        return row | {PER_FRAME: per_frame} | ({FEATURES: kept} if kept else {})

    def forget(self) -> None:
        """The batch is done: what metrics keep of its target goes."""
        for metric in self.metrics:
            metric.forget()

    def gather(self, world_size: int) -> None:
        """Rows of all ranks in a stable order, and their seconds together. Ranks may have had different numbers of clips."""
        if world_size == 1:
            return
        everywhere: list[Any] = [None] * world_size
        torch.distributed.all_gather_object(everywhere, (self.rows, self.seconds))
        rows = (row for some, _ in everywhere for row in some)
        self.rows = sorted(rows, key=lambda row: (row["stream"], row["key"], row["method"]))
        self.seconds = added(seconds for _, seconds in everywhere)

    def means(self, rows: Sequence[Row]) -> dict[str, float]:
        """Every metric's score on these rows of one method: frame metrics' mean over clips, set metrics' one distance.

        What no clip has a score for is absent; NaN where a prediction is not finite.
        """
        found = {}
        for metric in self.metrics:
            if isinstance(metric, SetMetric):
                found[metric.name] = set_score(metric, rows)[0]
            else:
                found[metric.name] = mean_score(metric.name, metric.name, rows)
        return {name: score for name, score in found.items() if score is not None}


def mean_score(column: str, metric: str, rows: Iterable[Row]) -> float | None:
    """Mean of ``column``, which is of ``metric``, over the clips that have a score; None if none has.

    NaN if a prediction among them is not finite: leaving that clip out would praise the method for it.
    """
    scores = []
    for row in rows:
        if metric in row.get(BROKEN, ()):
            return math.nan
        if row.get(column) is not None:
            scores.append(row[column])
    return fmean(scores) if scores else None


def _features(metric: SetMetric, shown: Tensor, clips: Clips) -> Tensor:
    """As ``metric.features``; NaN for clips that are not finite, which no network should see."""
    features = torch.full_like(clips.truths[metric.name], math.nan)
    fine = shown.isfinite().flatten(1).all(dim=1)
    if fine.any():
        features[fine.cpu()] = metric.features(shown if fine.all() else shown[fine])
    return features


def set_score(metric: SetMetric, rows: Iterable[Row]) -> tuple[float, int]:
    """The distance between all windows of these rows' clips and those of their truths, and how many windows there are.

    In the order of the clips' names, whatever batches and ranks they came in. NaN where a prediction is not finite.
    """
    parts = [row[FEATURES][metric.name] for row in sorted(rows, key=lambda row: (row["stream"], row["key"]))]
    real, fake = (torch.cat([part[side] for part in parts]) for side in ("real", "fake"))
    return (metric.score(real, fake) if fake.isfinite().all() else math.nan), len(real)


def number(value: Any) -> float | None:
    """A plain number, None for what is none: neither CSV nor JSON has NaN and infinity."""
    value = float(value)
    return value if math.isfinite(value) else None


def _is_broken(metric: Metric, frames: Float[Tensor, " t"]) -> bool:
    """Whether some frame's score is no number although it should be: of ``pairs`` NaN means that there is none."""
    return bool((~(frames.isfinite() | frames.isnan()) if metric.pairs else ~frames.isfinite()).any())


def added(several: Iterable[dict[str, float]]) -> dict[str, float]:
    """Seconds by what they were spent on, summed."""
    total: dict[str, float] = {}
    for seconds in several:
        for what, spent in seconds.items():
            total[what] = total.get(what, 0.0) + spent
    return total


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
