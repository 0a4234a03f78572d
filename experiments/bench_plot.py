"""The benchmark as a figure: frames/s of every row as a bar with its spread, and its measured ceiling as a mark."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no window: this must work on a machine without a screen

from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = {"plain": "#56B4E9", "optimised": "#0072B2", "8 bits": "#D55E00"}
WIDTH, ROW_HEIGHT = 7.5, 0.19  # inches
STYLE = {"font.size": 7, "axes.grid": True, "grid.alpha": 0.3, "svg.hashsalt": "bench", "axes.axisbelow": True}


def draw(result: dict[str, Any], path: Path) -> Path | None:
    """An SVG with a panel per group and size, on one logarithmic axis; None where no row was measured."""
    panels: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in result["rows"].values():
        if row["status"] == "measured":
            panels.setdefault((row["group"], *row["asked"]), []).append(row)
    if not panels:
        return None
    with matplotlib.rc_context(STYLE):
        heights = [len(rows) + 2 for rows in panels.values()]
        figure = Figure(figsize=(WIDTH, ROW_HEIGHT * sum(heights) + 0.8), layout="constrained")
        axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        for panel, ((group, frames, height, width), rows) in zip(axes, panels.items(), strict=True):
            _panel(panel, rows)
            panel.set_title(f"{group}: {frames} frames of {height}x{width}", fontsize=8, loc="left")
        axes[-1].set_xlabel("frames/s; line: range of rounds; black mark: measured ceiling")
        figure.suptitle(f"{result['device']}, {result['dtype']}, {result['date'][:10]}, random weights", fontsize=8)
        figure.savefig(path, metadata={"Date": None})
    return path


def _panel(axes: Axes, rows: list[dict[str, Any]]) -> None:
    for place, row in enumerate(rows):
        found = row["summary"]
        low, high = found["fps_min_max"]
        axes.barh(place, found["fps"], height=0.7, color=COLOURS[_kind(row["way"])])
        axes.plot([low, high], [place, place], color="#444444", linewidth=1.2)
        if found["ceiling_fps"]:
            axes.plot([found["ceiling_fps"]] * 2, [place - 0.4, place + 0.4], color="black", linewidth=1.5)
    names = [
        " ".join([row["label"], row["way"], row["mode"], *map(_argument, row["arguments"].items())]) for row in rows
    ]
    axes.set_yticks(range(len(rows)), names)
    axes.set_xscale("log")
    axes.invert_yaxis()


def _kind(way: str) -> str:
    return "8 bits" if "8" in way.replace("uint8", "") else "plain" if way == "plain" else "optimised"


def _argument(item: tuple[str, Any]) -> str:
    return f"{item[0]}={item[1]}"
