"""A comparison as figures, each as PNG and SVG: speed against quality, learning curves, clips against the baseline's, frames.

Colours are Okabe and Ito's, which colour-blind readers tell apart; markers differ too. Titles say what was measured.
"""

import math
import re
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no window: this must work on a machine without a screen

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from decoders.base import DECODER
from experiments.compare_curves import by_frame, learning_curves
from experiments.comparison import RUN, Column, Comparison, Row, clips_of_films

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
MARKERS = "osD^vP*X"
WIDTH = 6.5  # inches: a page's text
LINE = 90  # characters that are about as wide
AGAINST_SPEED = ("psnr", "lpips_alex", "lpips_vgg")
CURVES = ("val/psnr", "val/ssim", "val/lpips_alex")
SCATTERED = ("psnr", "lpips_alex")
STYLE = {"font.size": 9, "axes.grid": True, "grid.alpha": 0.3, "svg.hashsalt": "comparison", "legend.fontsize": 8}


def draw(comparison: Comparison, folder: Path) -> list[Path]:
    """All figures for which there is something to show; returns the PNG files, beside each of which is an SVG."""
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        figures = {**_against_speed(comparison), **_curves(comparison), **_scatters(comparison), **_frames(comparison)}
        return [_save(figure, folder / name) for name, figure in figures.items()]


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    figure.savefig(path.with_suffix(".png"), dpi=160)
    return path.with_suffix(".png")


def _figure(title: str, height: float = 4.0, columns: int = 1) -> tuple[Figure, Any]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots(1, columns)
    figure.suptitle(title, fontsize=9)
    return figure, axes


def _look(index: int) -> dict[str, Any]:
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}


def _named(text: str) -> str:
    """For file names."""
    return re.sub(r"[^\w.+=-]+", "-", text)


def _on(comparison: Comparison, column: Column) -> str:
    stream = comparison.stream(column.stream)
    clips = clips_of_films(stream.clips, stream.films)
    return f"{stream.name}: {clips}, {stream.frames} frames each, {stream.size[0]}x{stream.size[1]}"


def _axis(column: Column) -> str:
    better = "nearer the truth's" if column.of_truth else "higher" if column.higher_is_better else "lower"
    return f"{column.label}{f', {column.unit}' if column.unit else ''} ({better} is better)"


# --- speed against quality ----------------------------------------------------------------------------------------------


def _against_speed(comparison: Comparison) -> dict[str, Figure]:
    """On the clips of the length and size whose speed was measured."""
    rows = [row for row in comparison.rows if row.speed and row.speed.fps]
    found = {}
    for column in comparison.columns:
        shown = [row for row in rows if column.id in row.scores and row.speed.stream == column.stream]
        shown = [row for row in shown if row.scores[column.id].mean is not None]
        if column.name not in AGAINST_SPEED or not shown:
            continue
        machine = comparison.machine
        threads = f", threads: {machine['threads']}" if machine["threads"] else ""
        figure, axes = _figure(
            f"{_on(comparison, column)}; bars: 95 % interval over clips, range over rounds\n"
            f"frames/s: {machine['device']}{threads}, {machine['dtype']}"
        )
        for index, row in enumerate(shown):
            _point(axes, row, column, index)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(LogFormatter())
        axes.xaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
        axes.margins(0.25, 0.15)
        axes.set_xlabel("frames/s, decoding alone")
        axes.set_ylabel(_axis(column))
        _label(axes, [(row.speed.fps, row.scores[column.id].mean, row.label) for row in shown])
        found[f"fps_{column.name}"] = figure
    return found


def _point(axes: Axes, row: Row, column: Column, index: int) -> None:
    score, speed = row.scores[column.id], row.speed
    across = [[speed.fps - speed.fps_low], [speed.fps_high - speed.fps]]
    up = None if score.low is None else [[score.mean - score.low], [score.high - score.mean]]
    filled = {} if row.kind == RUN else {"markerfacecolor": "white"}
    axes.errorbar(speed.fps, score.mean, xerr=across, yerr=up, capsize=2, linestyle="", **_look(index), **filled)


def _label(axes: Axes, points: Sequence[tuple[float, float, str]]) -> None:
    """Each label at the first of some places beside its point where it covers no other label or point."""
    canvas = FigureCanvasAgg(axes.figure)
    canvas.draw()
    to_pixels, renderer = axes.transData.transform, canvas.get_renderer()
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in (to_pixels(point[:2]) for point in points)]
    frame = axes.get_window_extent(renderer)
    for index, (x, y, text) in enumerate(points):
        look = {"textcoords": "offset points", "fontsize": 7, "color": _look(index)["color"]}
        for dx, dy, aligned in _places():
            label = axes.annotate(text, (x, y), (dx, dy), ha=aligned, va="center", **look)
            box = label.get_window_extent(renderer).extents
            inside = frame.x0 <= box[0] and box[2] <= frame.x1 and frame.y0 <= box[1] and box[3] <= frame.y1
            if inside and not any(_overlap(box, other) for other in taken):
                break
            label.remove()
        else:  # nowhere is free: beside its point all the same
            label = axes.annotate(text, (x, y), (6, 6), **look)
            box = label.get_window_extent(renderer).extents
        taken.append(tuple(box))


def _places() -> Iterable[tuple[float, float, str]]:
    for far in (0, 8, 16, 26, 38, 52):
        for up in (far, -far) if far else (6,):
            yield from ((7, up, "left"), (-7, up, "right"), (0, up + (9 if up >= 0 else -9), "center"))


def _overlap(a: Sequence[float], b: Sequence[float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


# --- learning curves ----------------------------------------------------------------------------------------------------


def _curves(comparison: Comparison) -> dict[str, Figure]:
    """Validation scores while training, by steps and by hours. They are of each run's own validation clips."""
    runs = [(run, learning_curves(Path(run.run_folder), run.devices or 1)) for run in comparison.runs]
    found = {}
    for tag in CURVES:
        if not any(tag in curves for _, curves in runs):
            continue
        kinds = "/".join(dict.fromkeys(run.device_kind or "devices not known" for run in comparison.runs))
        title = f"{tag} while training, on each run's own validation clips\ntime on {kinds}: pauses left out, validations included"
        figure, (by_step, by_hour) = _figure(title, 3.2, 2)
        short = max(max(curves[tag].hours) for _, curves in runs if tag in curves) < 1
        for index, (run, curves) in enumerate(runs):
            if tag in curves:
                curve = curves[tag]
                look = {**_look(index), "label": run.name, "markersize": 3, "linewidth": 1.2}
                by_step.plot(curve.steps, curve.values, **look)
                by_hour.plot([60 * h if short else h for h in curve.hours], curve.values, **look)
        by_step.set_xlabel("optimiser steps")
        by_hour.set_xlabel(f"{'minutes' if short else 'hours'} of all devices")
        by_step.set_ylabel(tag)
        _legend(figure, by_step)
        found[f"curve_{_named(tag.removeprefix('val/'))}"] = figure
    return found


# --- clips and frames ---------------------------------------------------------------------------------------------------


def _scatters(comparison: Comparison) -> dict[str, Figure]:
    """Every clip of a run against the same clip of the baseline."""
    base, found = comparison.row(comparison.baseline), {}
    for column in comparison.columns:
        for index, row in enumerate(comparison.own_rows()):
            ours, theirs = row.clips.get(column.id, {}), base.clips.get(column.id, {})
            keys = sorted(ours.keys() & theirs.keys())
            if row is base or column.name not in SCATTERED or not keys:
                continue
            figure, axes = _figure(
                f"{_on(comparison, column)}\neach point is a clip; above the diagonal is higher", 4.2
            )
            axes.plot([theirs[k] for k in keys], [ours[k] for k in keys], linestyle="", alpha=0.7, **_look(index))
            low = min(*(theirs[k] for k in keys), *(ours[k] for k in keys))
            axes.axline((low, low), slope=1, color="0.4", linewidth=1)
            axes.margins(0.08)
            axes.set_aspect("equal", "datalim")
            axes.set_xlabel(f"{base.label}: {_axis(column)}")
            axes.set_ylabel(row.label)
            found[f"scatter_{_named(row.id)}_{_named(column.id)}"] = figure
    return found


def _frames(comparison: Comparison) -> dict[str, Figure]:
    """PSNR by frame index, mean over clips: seams and drift show here."""
    frames = [(row.run, by_frame(Path(comparison.run(row.run).folder))) for row in comparison.own_rows()]
    found = {}
    for column in comparison.columns:
        scores = [(run, scored.get((column.stream, DECODER), {}).get(column.name, [])) for run, scored in frames]
        left_out = [run for run, values in scores if not any(map(math.isfinite, values))]
        if column.name != "psnr" or comparison.stream(column.stream).frames < 2 or len(left_out) == len(scores):
            continue
        without = "\n" + textwrap.fill(f"no such means: {', '.join(left_out)}", LINE) if left_out else ""
        figure, axes = _figure(f"{_on(comparison, column)}; mean over clips of every frame{without}", 3.2)
        for index, (run, values) in enumerate(scores):
            if run not in left_out:
                look = _look(index) if len(values) <= 64 else {"color": _look(index)["color"]}
                axes.plot(values, label=run, markersize=3, linewidth=1.2, **look)
        axes.set_xlabel("frame")
        axes.set_ylabel(_axis(column))
        _legend(figure, axes)
        found[f"frames_{_named(column.stream)}_psnr"] = figure
    return found


def _legend(figure: Figure, axes: Axes) -> None:
    """Below everything, where it covers no curve."""
    handles, labels = axes.get_legend_handles_labels()
    columns = max(1, min(3, len(labels), LINE // (max(map(len, labels)) + 12)))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)
