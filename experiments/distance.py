"""How a score falls with the distance from the reference: frames counted from the nearest one.

For runs whose rows say which frames were references (``in_reference``, see ``VideoDecoder.frame_groups``). Distance 0 is the
references themselves; of several the nearest counts, so with first and last of 17 frames no distance exceeds 8.
"""

from collections.abc import Collection, Sequence
from typing import Any

from decoders.base import DECODER, PER_FRAME, Row
from experiments.measured import markdown
from metrics.intervals import Interval, interval_of_mean

METRIC = "psnr"
MEMBER = "in_reference"
# (stream, key) -> distance -> mean score of the frames at it; None: one of them is not finite
Clips = dict[tuple[str, str], dict[int, float | None]]


def distances(references: Sequence[int]) -> list[int]:
    """For every frame its distance to the nearest of those that are marked 1, at least one of which there must be."""
    marked = [t for t, member in enumerate(references) if member]
    if not marked:
        raise ValueError("no frame is a reference, so none has a distance from one")
    return [min(abs(t - reference) for reference in marked) for t in range(len(references))]


def by_distance(rows: Sequence[Row], methods: Collection[str]) -> list[dict[str, Any]]:
    """Mean over clips with its interval, of every stream, method and distance; below the decoder's own, its paired differences.

    An entry is {stream, method, minus, distance, clips, mean, low, high}; ``minus`` is the method that was subtracted on the
    same clips, or None. Bounds are None where there is one clip only. A prediction that is not finite leaves its method without
    a mean at that distance (None), as in the means over clips. Empty where no row says which frames were references.
    """
    found: dict[str, Clips] = {}
    for row in rows:
        frames = row[PER_FRAME]
        if row["method"] in methods and MEMBER in frames and METRIC in frames:
            found.setdefault(row["method"], {})[row["stream"], row["key"]] = _per_distance(frames)
    entries = []
    for stream in dict.fromkeys(stream for clips in found.values() for stream, _ in clips):
        for method, minus in [(m, None) for m in found] + [(DECODER, m) for m in found if m != DECODER]:
            if DECODER in found or minus is None:
                entries += _entries(stream, method, found[method], minus, found.get(minus))
    return entries


def _per_distance(frames: dict[str, list]) -> dict[int, float | None]:
    scores: dict[int, list[float | None]] = {}
    for distance, score in zip(distances(frames[MEMBER]), frames[METRIC], strict=True):
        scores.setdefault(distance, []).append(score)
    return {d: None if None in some else sum(some) / len(some) for d, some in sorted(scores.items())}


def _entries(stream: str, method: str, own: Clips, minus: str | None, other: Clips | None) -> list[dict[str, Any]]:
    values: dict[int, list[float | None]] = {}
    for clip, scores in own.items():
        if clip[0] != stream or (other is not None and clip not in other):
            continue
        for distance, score in scores.items():
            beside = 0.0 if other is None else other[clip][distance]
            values.setdefault(distance, []).append(None if None in (score, beside) else score - beside)
    about = {"stream": stream, "method": method, "minus": minus}
    return [about | {"distance": d, "clips": len(v)} | _interval(v) for d, v in sorted(values.items())]


def _interval(values: Sequence[float | None]) -> dict[str, float | None]:
    """Numbers that JSON has: it knows no NaN. All None where a value is."""
    if None in values:
        return dict.fromkeys(Interval._fields)
    interval = interval_of_mean(values)
    return {name: value if value == value else None for name, value in interval._asdict().items()}


def text(entries: Sequence[dict[str, Any]]) -> str:
    """The entries as Markdown: for every stream a table of scores and one of differences; a distance a row."""
    parts = [
        "PSNR in dB by distance in frames from the nearest reference (0: the references themselves), mean over clips with its "
        "95 % interval."
    ]
    for stream in dict.fromkeys(entry["stream"] for entry in entries):
        for paired in (False, True):
            some = [e for e in entries if e["stream"] == stream and (e["minus"] is not None) == paired]
            if some:
                parts += [f"## {stream}" + (": the decoder minus its controls, on the same clips" if paired else "")]
                parts += [_table(some, "minus" if paired else "method", sign="+" if paired else "")]
    return "\n\n".join(parts)


def _table(entries: Sequence[dict[str, Any]], column: str, sign: str) -> str:
    methods = list(dict.fromkeys(entry[column] for entry in entries))
    cells = {(entry["distance"], entry[column]): entry for entry in entries}
    lines = [["distance", "clips", *methods]]
    for distance in sorted({entry["distance"] for entry in entries}):
        row = [cells.get((distance, method)) for method in methods]
        number = max(entry["clips"] for entry in row if entry)
        lines.append([str(distance), str(number), *("" if entry is None else _cell(entry, sign) for entry in row)])
    return markdown(lines)


def _cell(entry: dict[str, Any], sign: str) -> str:
    if entry["mean"] is None:
        return "not finite"
    shown = f"{entry['mean']:{sign}.2f}"
    return shown if entry["low"] is None else f"{shown} ({entry['low']:{sign}.2f} to {entry['high']:{sign}.2f})"
