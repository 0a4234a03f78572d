"""A comparison as tables: for the terminal, in Markdown, in LaTeX (booktabs) and as CSV.

Tables are made once, as cells with what stands in them; each kind only lays them out. The best run of a column is marked, and
with it those whose difference from it may be chance. Papers' figures have a table of their own.
"""

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from experiments.compare_notes import COMPRESSION, protocol_line, speed_notes
from experiments.comparison import RUN, Column, Comparison, Row, Score, Speed, clips_of_films
from experiments.measured import markdown
from experiments.show import table as aligned

KINDS = ("txt", "md", "tex", "csv")
UNKNOWN = "not measured"
NOT_FINITE = "not finite"
STEPS = "sampler steps"
WORST = 3  # clips of each run that are named


@dataclass
class Cell:
    """What stands in a table: a text, perhaps marked as best."""

    text: str
    best: bool = False


@dataclass
class Table:
    """A heading and cells; the first line is the head. Notes stand below."""

    title: str
    lines: list[list[Cell]]
    notes: list[str]


def render(comparison: Comparison, kind: str, worst: bool = True) -> str:
    """The whole comparison as txt, md, tex or csv; ``worst``: with each run's worst clips."""
    if kind == "csv":
        return _csv(comparison)
    layout = {"txt": _text, "md": _markdown, "tex": _latex}[kind]
    return layout(comparison, tables(comparison, worst))


def tables(comparison: Comparison, worst: bool = True) -> list[Table]:
    """Per stream the scores and the differences; then speed, cost, the runs' worst clips, and what papers print."""
    found = []
    for stream in comparison.streams:
        found += [_quality(comparison, stream.name)]
        found += [_deltas(comparison, stream.name)] if _has_deltas(comparison, stream.name) else []
    found.append(_speed_and_size(comparison))
    found.append(_training(comparison))
    scored = {column.stream for column in comparison.columns if column.per_clip}
    found += [_worst(comparison, stream.name) for stream in comparison.streams if worst and stream.name in scored]
    return found + ([_papers(comparison)] if comparison.papers else [])


# --- what stands in them ------------------------------------------------------------------------------------------------


def number(value: float | None, digits: int) -> str:
    """With so many digits; a value that is not there is not measured."""
    return UNKNOWN if value is None else f"{value:.{digits}f}"


def with_interval(score: Score | None, digits: int) -> str:
    """``25.31 [24.80, 25.77]``, without brackets where there is no interval; empty for a score that is not there."""
    if score is None:
        return ""
    if score.mean is None:
        return NOT_FINITE
    bounds = "" if score.low is None else f" [{score.low:.{digits}f}, {score.high:.{digits}f}]"
    return f"{score.mean:.{digits}f}{bounds}"


def head_of(column: Column) -> str:
    """``psnr (dB) ↑``; no arrow where neither way is better."""
    arrow = "" if column.of_truth else " ↑" if column.higher_is_better else " ↓"
    return f"{column.label}{f' ({column.unit})' if column.unit else ''}{arrow}"


def _quality(comparison: Comparison, stream: str) -> Table:
    columns = comparison.columns_of(stream)
    rows = [row for row in comparison.rows if any(column.id in row.scores for column in columns)]
    shares, sampled = any(stream in row.share for row in rows), any(row.sampler_steps for row in rows)
    head = ["", *map(head_of, columns), *(["of teacher's PSNR"] if shares else []), "clips"]
    head += [*([STEPS] if sampled else []), "pixels made by"]
    lines = [[Cell(text) for text in head]]
    for row in rows:
        scores = [row.scores.get(column.id) for column in columns]
        cells = [Cell(with_interval(s, c.digits), bool(s and s.best)) for s, c in zip(scores, columns, strict=True)]
        share = [Cell(f"{row.share[stream]:.1%}" if stream in row.share else "")] if shares else []
        most = max((score for score in scores if score), key=lambda score: score.clips)
        steps = [Cell(_steps(row))] if sampled else []
        clips = Cell(clips_of_films(most.clips, most.films))
        lines.append([Cell(row.label), *cells, *share, clips, *steps, Cell(_made(row))])
    return Table(f"Quality: {stream}", lines, [protocol_line(comparison, stream)])


def _steps(row: Row) -> str:
    return "" if row.sampler_steps is None else str(row.sampler_steps)


def _made(row: Row) -> str:
    """dtype, latent space and choices of decoding, in short; a sampler's steps have a column of their own."""
    parts = [str(row.made[key]) for key in ("dtype", "latent_space") if key in row.made]
    rest = {
        key: value for key, value in row.made.items() if key not in ("dtype", "latent_space", "steps", "sampler_steps")
    }
    return "; ".join(parts + [f"{key}={value}" for key, value in rest.items()])


def _has_deltas(comparison: Comparison, stream: str) -> bool:
    ids = {column.id for column in comparison.columns_of(stream)}
    return any(score.delta for row in comparison.rows for column, score in row.scores.items() if column in ids)


def _deltas(comparison: Comparison, stream: str) -> Table:
    columns = comparison.columns_of(stream)
    columns = [column for column in columns if column.against]
    heads = (f"{head_of(c)}{f' minus {c.against}' if c.of_truth else ''}" for c in columns)
    lines = [[Cell(text) for text in ("", *heads, "clips")]]
    for row in comparison.rows:
        scores = [row.scores.get(column.id) for column in columns]
        if any(score and score.delta for score in scores):
            cells = [Cell(_delta(s.delta, c.digits) if s else "") for s, c in zip(scores, columns, strict=True)]
            lines.append([Cell(row.label), *cells, Cell(str(max(score.clips for score in scores if score)))])
    notes = ["What the truth has a value of its own for is told from the truth."] * any(c.of_truth for c in columns)
    return Table(f"Differences on {stream}: each row minus {comparison.baseline}, on the same clips", lines, notes)


def _delta(delta: list[float | None] | None, digits: int) -> str:
    if delta is None:
        return ""
    mean, low, high = delta
    return f"{mean:+.{digits}f}" + ("" if low is None else f" [{low:+.{digits}f}, {high:+.{digits}f}]")


def _speed_and_size(comparison: Comparison) -> Table:
    rows = [row for row in comparison.rows if row.kind == RUN or row.speed]
    timed = any(row.speed for row in rows)
    taught, sampled = any(row.teacher_ratio for row in rows), any(row.sampler_steps for row in rows)
    head = ["", "decoder M", "compression", *([STEPS] if sampled else [])]
    head += ["frames/s", f"x {comparison.baseline}", "peak GiB", "beyond weights GiB"] if timed else []
    head += ["x teacher's speed"] if taught else []
    lines = [[Cell(text) for text in head]]
    for row in rows:
        unknown = UNKNOWN if row.kind == RUN else ""
        millions = unknown if row.parameters is None else f"{row.parameters / 1e6:.3f}"
        compression = "" if row.compression is None else f"{row.compression:.4g}"
        steps = [_steps(row)] if sampled else []
        speed = _speed_cells(row.speed) if timed else []
        ratio = [_range(row.teacher_ratio)] if taught else []
        lines.append([Cell(text) for text in (row.label, millions, compression, *steps, *speed, *ratio)])
    return Table("Speed and size", lines, [*speed_notes(comparison), COMPRESSION])


def _speed_cells(speed: Speed | None) -> list[str]:
    if speed is None or speed.fps is None:
        return [speed.failed if speed and speed.failed else UNKNOWN, "", "", ""]
    fps = f"{speed.fps:.4g} ({speed.fps_low:.4g} to {speed.fps_high:.4g})"
    return [fps, _range(speed.ratio), *(number(gib, 3) for gib in (speed.peak_gib, speed.beyond_gib))]


def _range(values: list[float] | None) -> str:
    return "" if values is None else "{:.2f} ({:.2f} to {:.2f})".format(*values)


def _training(comparison: Comparison) -> Table:
    head = ["", "steps", "clips seen", "minutes", "device-hours", "device", "space", "weights at the start", "measured"]
    lines = [[Cell(text) for text in head]]
    for run in comparison.runs:
        whole = [run.total_steps, run.total_clips_seen]
        hours = UNKNOWN if run.device_hours is None else f"{run.device_hours:.3g}"
        devices = f"{run.devices or '?'} x {run.device_kind}" if run.device_kind else UNKNOWN
        start = " < ".join([run.start, *run.parents[1:]])
        texts = [run.name, *(UNKNOWN if v is None else str(v) for v in whole), number(run.total_minutes, 1), hours]
        measured = f"{run.weights['kind']}, step {run.weights['step']}"
        if run.weights["kind"] == "start":
            measured = f"start: {run.weights['file']}"
        lines.append([Cell(text) for text in (*texts, devices, run.latent_space, start, measured)])
    told = [
        "Minutes are of training alone, what precedes the first step (calibration, pruning) included, validations not."
    ]
    if begun := [run.name for run in comparison.runs if run.pretrained]:
        verb = "starts" if len(begun) == 1 else "start"
        told.append(f"{', '.join(begun)} {verb} from pretrained weights whose training is not counted.")
    return Table("Training, the stages before (init_from) included", lines, told)


def _worst(comparison: Comparison, stream: str) -> Table:
    """By the stream's first score that clips have."""
    column = next(
        column for column in comparison.columns_of(stream) if column.per_clip
    )  # a quality, by the metrics' order
    lines = [[Cell(text) for text in ("", "clip", head_of(column), f"minus {comparison.baseline}")]]
    for row in comparison.own_rows():
        for clip in worst_clips(comparison, column.id, row.id, WORST):
            delta = "" if clip["delta"] is None else f"{clip['delta']:+.{column.digits}f}"
            lines.append([Cell(t) for t in (row.label, clip["key"], f"{clip['score']:.{column.digits}f}", delta)])
    return Table(f"Worst clips of {stream}", lines, [])


def worst_clips(comparison: Comparison, column: str, row: str, number: int = 5) -> list[dict[str, Any]]:
    """The clips on which a row scores worst (farthest from the truth's, where that has a value): key, score, and the
    difference to the column's ``against`` (None for that row itself)."""
    about = next(c for c in comparison.columns if c.id == column)
    own = comparison.row(row).clips.get(column, {})
    base = comparison.row(about.against).clips.get(column, {}) if about.against not in ("", row) else {}
    if about.of_truth:
        order = sorted(own, key=lambda key: abs(own[key] - base.get(key, own[key])), reverse=True)[:number]
    else:
        order = sorted(own, key=own.get, reverse=not about.higher_is_better)[:number]
    return [{"key": k, "score": own[k], "delta": own[k] - base[k] if k in base else None} for k in order]


def _papers(comparison: Comparison) -> Table:
    metrics = list(dict.fromkeys(key for figure in comparison.papers for key in figure["values"]))
    lines = [[Cell(text) for text in ("THEIRS", "beside", *metrics, "setting", "where")]]
    for figure in comparison.papers:
        values = [str(figure["values"].get(metric, "")) for metric in metrics]
        lines.append([Cell(t) for t in (figure["paper"], figure["run"], *values, figure["setting"], figure["where"])])
    note = "Printed by the papers, on their clips, protocols and machines: not comparable with ours number by number."
    return Table("Papers' figures (theirs, not ours)", lines, [note])


# --- layouts ------------------------------------------------------------------------------------------------------------


def _text(comparison: Comparison, tables: list[Table]) -> str:
    parts = []
    for table in tables:
        lines = [[cell.text + ("*" if cell.best else "") for cell in line] for line in table.lines]
        parts.append("\n".join([table.title, aligned(lines), *table.notes]))
    return "\n\n".join([*parts, "\n".join(_closing(comparison, "*"))]) + "\n"


def _closing(comparison: Comparison, mark: str) -> list[str]:
    return [note.replace("is marked", f"is marked {mark}", 1) for note in comparison.notes] + [
        f"{comparison.command}; {comparison.date}"
    ]


def _markdown(comparison: Comparison, tables: list[Table]) -> str:
    def cell(content: Cell) -> str:
        text = content.text.replace("|", "\\|")
        return f"**{text}**" if content.best else text

    parts = [f"# {comparison.title}\n"]
    for table in tables:
        parts.append(f"## {table.title}\n\n" + markdown([[cell(c) for c in line] for line in table.lines]))
        parts += [f"{note}\n" for note in table.notes]
    return "\n".join([*parts, *(f"{note}\n" for note in _closing(comparison, "in bold"))])


def _latex(comparison: Comparison, tables: list[Table]) -> str:
    parts = ["% needs \\usepackage{booktabs}"]
    for table in tables:
        width = len(table.lines[0])
        head, *body = [" & ".join(_tex_cell(cell) for cell in line) + r" \\" for line in table.lines]
        parts.append(
            "\n".join(
                [
                    r"\begin{table}",
                    r"\centering\footnotesize\setlength{\tabcolsep}{3pt}",
                    rf"\begin{{tabular}}{{l{'r' * (width - 1)}}}",
                    *(r"\toprule", head, r"\midrule", *body, r"\bottomrule"),
                    r"\end{tabular}",
                    rf"\caption{{{escape(' '.join([table.title.rstrip('.') + '.', *table.notes]))}}}",
                    r"\end{table}",
                ]
            )
        )
    return "\n\n".join([*parts, *(f"% {note}" for note in _closing(comparison, "in bold"))]) + "\n"


def _tex_cell(cell: Cell) -> str:
    text = escape(cell.text)
    return rf"\textbf{{{text}}}" if cell.best else text


_ESCAPES = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "↑": r"$\uparrow$", "↓": r"$\downarrow$", "±": r"$\pm$", "[": "{[}", "]": "{]}",
}  # fmt: skip


def escape(text: str) -> str:
    """``text`` as LaTeX prints it. Brackets are wrapped: after ``\\\\`` one would be an argument."""
    return "".join(_ESCAPES.get(character, character) for character in text)


def _csv(comparison: Comparison) -> str:
    """One line per row and column: score, interval, difference; and the row's speed, size and cost beside them."""
    runs = {run.name: run for run in comparison.runs}
    fields: dict[str, Callable[[Row, Column, Score], Any]] = {
        "row": lambda row, column, score: row.id,
        "run": lambda row, column, score: row.run,
        "method": lambda row, column, score: row.method,
        "kind": lambda row, column, score: row.kind,
        "stream": lambda row, column, score: column.stream,
        "metric": lambda row, column, score: column.label,
        "mean": lambda row, column, score: score.mean,
        "low": lambda row, column, score: score.low,
        "high": lambda row, column, score: score.high,
        "clips": lambda row, column, score: score.clips,
        "films": lambda row, column, score: score.films,
        "best": lambda row, column, score: int(score.best),
        "delta": lambda row, column, score: (score.delta or [None] * 3)[0],
        "delta_low": lambda row, column, score: (score.delta or [None] * 3)[1],
        "delta_high": lambda row, column, score: (score.delta or [None] * 3)[2],
        "against": lambda row, column, score: column.against,
        "parameters": lambda row, column, score: row.parameters,
        "compression": lambda row, column, score: row.compression,
        "sampler_steps": lambda row, column, score: row.sampler_steps,
        **{key: lambda row, c, s, key=key: getattr(row.speed, key, None) for key in ("fps", "fps_low", "fps_high")},
        **{key: lambda row, c, s, key=key: getattr(row.speed, key, None) for key in ("peak_gib", "beyond_gib")},
        **{
            key: lambda row, c, s, key=key: getattr(runs[row.run], key) if row.kind == RUN else None
            for key in ("total_minutes", "device_hours", "total_steps", "total_clips_seen", "latent_space", "start")
        },
    }
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(fields)
    for column in comparison.columns:
        for row in comparison.rows:
            if (score := row.scores.get(column.id)) is not None:
                cells = (of(row, column, score) for of in fields.values())
                writer.writerow("" if cell is None else cell for cell in cells)
    return buffer.getvalue()
