"""Scores by category: people, animals, ... as a list's column ``category`` says, or as CLIP tells by prompts."""

from collections.abc import Callable, Sequence
from typing import Any

from decoders.base import DECODER, Row
from decoders.scoring import CATEGORY
from experiments.measured import markdown

FILE = "categories.md"
NONE = "(none)"  # clips of a stream in which others have a category


def take_listed(rows: Sequence[Row], data) -> None:
    """Give ``rows``, which name their streams, the categories that lists say. A list's word counts before CLIP's."""
    for row in rows:
        listed = data.category(row["stream"], row["key"])
        if listed:
            row[CATEGORY] = listed


def by_category(rows: Sequence[Row], scores_of: Callable[[list[Row]], dict[str, float | None]]) -> list[dict[str, Any]]:
    """Entries {stream, method, category, clips, scores} of streams whose clips have categories, else none.

    ``scores_of``: rows of one method -> column -> mean.
    """
    streams = {row["stream"] for row in rows if row.get(CATEGORY)}
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row["stream"] in streams:
            groups.setdefault((row["stream"], row["method"], row.get(CATEGORY) or NONE), []).append(row)
    order = list(dict.fromkeys(row["stream"] for row in rows))
    ordered = sorted(groups.items(), key=lambda item: (order.index(item[0][0]), item[0][1] != DECODER, item[0][1:]))
    return [
        {"stream": stream, "method": method, "category": category, "clips": len(clips), "scores": scores_of(clips)}
        for (stream, method, category), clips in ordered
    ]


def text(entries: Sequence[dict[str, Any]]) -> str:
    """The entries as Markdown: a table per stream, a row per method and category."""
    parts = []
    for stream in dict.fromkeys(entry["stream"] for entry in entries):
        some = [entry for entry in entries if entry["stream"] == stream]
        names = list(dict.fromkeys(name for entry in some for name in entry["scores"]))
        lines = [["category", "method", "clips", *names]]
        for entry in some:
            cells = (entry["scores"].get(name) for name in names)
            shown = ("" if score is None else f"{score:.3f}" for score in cells)
            lines.append([entry["category"], entry["method"], str(entry["clips"]), *shown])
        parts += [f"## {stream}", markdown(lines)]
    return "\n\n".join(parts)
