"""What the rows of ``make bench-all`` come to: rates, ceilings, ratios, and the page that says them."""

import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.bench_meters import Operations, Rates
from experiments.bench_rows import GROUPS, PLAIN, options_of
from experiments.bench_table import GIB, percentile, waits_s
from experiments.measured import markdown

ANCHORS = {group.name: group.entries[0].label for group in GROUPS}


def path_of(folder: str | Path, device: str, profile: str, dtype: str) -> Path:
    """One file per device, profile and dtype."""
    name = "-".join(["bench-all", device, profile, dtype])
    return Path(folder) / (re.sub(r"[^\w.+-]+", "-", name).lower() + ".json")


def complete(result: dict[str, Any]) -> dict[str, Any]:
    """``result`` with a summary in each row that was measured, and all ratios."""
    rows = result["rows"]
    # The best product rate of the run: also each round measures it, and at the start the machine may have been busy.
    beside = [each.get("matmul_flops_per_s", 0.0) for row in rows.values() for each in row["repetitions"]]
    result["rates"]["products"] = max([result["rates"]["products"], *beside])
    rates = Rates(**result["rates"])
    for row in rows.values():
        row["summary"] = _summary(row, _plain_of(row, rows), rates) if row["status"] == "measured" else None
    result["ratios"] = [
        found for row in rows.values() for over in _others(row, rows) if (found := ratio(row, over)) is not None
    ]
    return result


def _cell(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row["asked"]), row["mode"], tuple(sorted(row["arguments"].items()))


def _plain_of(row: dict[str, Any], rows: dict[str, Any]) -> dict[str, Any] | None:
    return next(
        (r for r in rows.values() if r["label"] == row["label"] and r["way"] == PLAIN and _cell(r) == _cell(row)), None
    )


def _others(row: dict[str, Any], rows: dict[str, Any]) -> list[dict[str, Any]]:
    """What its speed is compared with: the group's anchor at this size, and its own plain form."""
    anchors = [r for r in rows.values() if r["label"] == ANCHORS.get(row["group"]) and r["way"] == PLAIN]
    anchors = [r for r in anchors if _cell(r)[:1] == _cell(row)[:1]]
    same_mode = [r for r in anchors if r["mode"] == row["mode"]] or anchors  # RefDecoder's clip over a peer's stream
    found = [*same_mode[:1], _plain_of(row, rows)]
    return [other for other in found if other is not None and other is not row]


def ratio(row: dict[str, Any], over: dict[str, Any]) -> dict[str, Any] | None:
    """Frames/s over those of ``over``, and of the later steps alone; None where either was not measured.

    Rounds are paired where both have as many; the spread of unpaired ones is the widest that their values allow.
    """
    if not (row["status"] == over["status"] == "measured"):
        return None
    ours, theirs = (_rates(each) for each in (row, over))
    if len(ours) == len(theirs):
        values = [a / b for a, b in zip(ours, theirs, strict=True)]
        low, high = min(values), max(values)
    else:
        values = [statistics.median(ours) / statistics.median(theirs)]
        low, high = min(ours) / max(theirs), max(ours) / min(theirs)
    steady = [each["summary"]["frame_ms_later"] for each in (over, row)]
    return {
        "row": row["id"],
        "over": over["id"],
        "fps": statistics.median(values),
        "low": low,
        "high": high,
        "later_steps": steady[0] / steady[1] if None not in steady else None,
        "memory": _memory_ratio(row["summary"], over["summary"]),
    }


def _memory_ratio(ours: dict[str, Any], theirs: dict[str, Any]) -> float | None:
    a, b = ours["peak_gib"], theirs["peak_gib"]
    return None if a is None or not b else a / b


def _rates(row: dict[str, Any]) -> list[float]:
    return [row["frames"] / sum(each["step_s"]) for each in row["repetitions"]]


def _summary(row: dict[str, Any], plain: dict[str, Any] | None, rates: Rates) -> dict[str, Any]:
    repetitions, about, fps = row["repetitions"], row["about"], _rates(row)
    waits = [waits_s(each["step_s"], each["step_frames"]) for each in repetitions]
    later = [1e3 * seconds for each in waits for seconds in each[1:]]
    shown = [frames for frames in repetitions[0]["step_frames"] if frames][1:]
    beyond = [each["beyond_weights_bytes"] for each in repetitions]
    known = None not in beyond
    held = max(about["weights_bytes"], about["held_bytes"])
    joules = [each["joules"] for each in repetitions]
    operations = operations_of(plain, repetitions[0]["step_frames"])
    options = options_of(row["way"])
    least = rates.least_seconds(operations, options.bits8 if options else "none") if operations else None
    ceiling = row["frames"] / least if least else None
    return {
        "fps": statistics.median(fps),
        "fps_min_max": [min(fps), max(fps)],
        "first_frame_ms": 1e3 * statistics.median(each[0] for each in waits),
        "step_ms": statistics.median(later) if later else None,
        "step_ms_p95": percentile(later, 95) if later else None,
        "frame_ms_later": statistics.median(later) / statistics.median(shown) if later and shown else None,
        "weights_gib": about["weights_bytes"] / GIB,
        "beyond_weights_gib": max(beyond) / GIB if known else None,
        "peak_gib": (held + max(beyond)) / GIB if known else None,
        "reserved_gib": _or_none(max, [each["reserved_bytes"] for each in repetitions], GIB),
        "joules_per_frame": _or_none(statistics.median, joules, row["frames"]),
        "gflop_per_frame": operations.total / row["frames"] / 1e9 if operations else None,
        "attention_share": operations.attention / operations.total if operations and operations.total else None,
        "ceiling_fps": ceiling,
        "of_ceiling": statistics.median(fps) / ceiling if ceiling else None,
        "others_cpu_share": max((each["others_cpu_share"] or 0.0) for each in repetitions),
    }


def _or_none(of: Any, values: Sequence[float | None], unit: float) -> float | None:
    return None if None in values else of(values) / unit


def operations_of(plain: dict[str, Any] | None, step_frames: Sequence[int]) -> Operations | None:
    """Of the whole clip, by what the plain form's first two steps had: every later one that gives frames costs what the
    second does. None where there was no plain form to count."""
    counted = [Operations(*numbers) for numbers in (plain or {}).get("operations", [])]
    if not counted:
        return None
    if len(counted) == 1:
        return counted[0]
    return counted[0] + counted[1].times(sum(1 for frames in step_frames[1:] if frames))


# --- telling ----------------------------------------------------------------------------------------------------------

HEAD = ("decoder", "way", "M", "mode", "frames/s", "min to max", "x anchor", "x plain", "first ms", "p50 ms", "p95 ms")
HEAD += ("peak GiB", "GFLOP/frame", "ceiling", "of it", "J/frame", "error", "max error", "of bf16's")


def report(result: dict[str, Any]) -> str:
    """The page, as Markdown."""
    versions = ", ".join(f"{package} {number}" for package, number in result["versions"].items())
    threads = f", {result['threads']} threads" if result["threads"] else ""
    rates = result["rates"]
    eight = f"{rates['eight_bits'] / 1e12:.4g}" if rates["eight_bits"] else "none"
    lines = [
        "# Decoders, plain and optimised, beside their peers",
        "",
        f"{result['device']}{threads}; {versions}; {result['date']}; random weights, batch 1, {result['dtype']}, products in "
        f"{result['arithmetic']}; `{result['command']}`",
        "",
        f"Measured rates, TFLOP/s: matrix products {rates['products'] / 1e12:.4g} ({rates['how']['products']}), attention with heads of 64 "
        f"{rates['attention'] / 1e12:.4g} ({rates['how']['attention']}), 8-bit products {eight} ({rates['how']['eight_bits']}). "
        "The ceiling of a row is its products at their rate plus its attention at its rate. x anchor: frames/s over those of "
        "the group's first row. Error: root mean square against float32 on the same weights and latents at a small size, in "
        "units of [-1, 1]; of bf16's: over the plain form's. Random weights say nothing about quality. p50 and p95: of the "
        f"waits for later frames. Energy: {result['energy']}.",
    ]
    rows = result["rows"].values()
    for group in dict.fromkeys(row["group"] for row in rows):
        own = [row for row in rows if row["group"] == group]
        for place in sorted({tuple(row["asked"]) for row in own}):
            here = [row for row in own if tuple(row["asked"]) == place]
            lines += ["", f"## {group}: {place[0]} frames of {place[1]}x{place[2]}", ""]
            lines.append(markdown([HEAD, *(_line(row, result["ratios"]) for row in here)]).rstrip())
            notes = [f"{row['label']} {row['way']}: {row['status']}: {row['reason']}" for row in here if row["reason"]]
            lines += ["", *(f"- {note}" for note in notes)] if notes else []
    return "\n".join(lines) + "\n"


def _line(row: dict[str, Any], ratios: Sequence[dict[str, Any]]) -> list[str]:
    about, found = row["about"], row["summary"]
    mode = " ".join([row["mode"], *(f"{key}={value}" for key, value in row["arguments"].items())])
    head = [row["label"], row["way"], f"{about['parameters'] / 1e6:.1f}" if about else "", mode]
    if found is None:
        return head + [row["status"]] + [""] * (len(HEAD) - len(head) - 1)
    over = {each["over"].split(" | ")[0]: each for each in ratios if each["row"] == row["id"]}
    anchor, plain = over.get(ANCHORS.get(row["group"], "")), over.get(row["label"])
    low, high = found["fps_min_max"]
    return [
        *head,
        f"{found['fps']:.3g}",
        f"{low:.3g} to {high:.3g}",
        "" if anchor is None or row["label"] == ANCHORS.get(row["group"]) else f"{anchor['fps']:.2f}",
        "" if plain is None else f"{plain['fps']:.2f}",
        *(_number(found[key], ".4g") for key in ("first_frame_ms", "step_ms", "step_ms_p95")),
        _number(found["peak_gib"], ".3g"),
        _number(found["gflop_per_frame"], ".4g"),
        _number(found["ceiling_fps"], ".3g"),
        _number(found["of_ceiling"], ".0%"),
        "not readable" if found["joules_per_frame"] is None else f"{found['joules_per_frame']:.3g}",
        *_errors(row["check"]),
    ]


def _errors(check: dict[str, Any]) -> list[str]:
    if not check:
        return ["not measured"] * 3
    own, plain = check["float32"], check["plain_float32"]
    times = own["rms"] / plain["rms"] if plain["rms"] else None
    return [f"{own['rms']:.2g}", f"{own['largest']:.2g}", _number(times, ".2f")]


def _number(value: float | None, form: str) -> str:
    return "not measured" if value is None else f"{value:{form}}"
