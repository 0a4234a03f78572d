"""What a benchmark's repetitions come to: medians, spreads and ratios, and the table that is printed."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from experiments.measured import heading
from experiments.show import table

GIB = 2**30
BUSY = 0.05  # share of the cores, taken by other processes, above which the report says so
WARM_UP = {"cpu": "two latent frames in each layout", "cuda": "two clips in each layout"}


def waits_s(step_s: Sequence[float], step_frames: Sequence[int]) -> list[float]:
    """Seconds from frames to frames: a step that gives none (half a chunk) is a part of the wait for the next."""
    waits, since = [], 0.0
    for seconds, frames in zip(step_s, step_frames, strict=True):
        since += seconds
        if frames:
            waits.append(since)
            since = 0.0
    return waits


def summarise(row: dict[str, Any], about: dict[str, Any], config: Any) -> dict[str, Any] | None:
    """Median and spread over the repetitions of one decoder at one size; None where there are none."""
    repetitions = row["repetitions"]
    if not repetitions:
        return None
    frames = config.batch_size * config.num_frames
    fps = [frames / sum(r["step_s"]) for r in repetitions]
    waits = [waits_s(r["step_s"], r["step_frames"]) for r in repetitions]
    first_ms = [1e3 * seconds[0] for seconds in waits]
    later_ms = [1e3 * s for seconds in waits for s in seconds[1:]]
    beyond = [r["beyond_weights_bytes"] for r in repetitions]
    known = None not in beyond
    held = max(about["weights_bytes"], about.get("held_bytes", 0))
    return {
        "fps": statistics.median(fps),
        "fps_min_max": [min(fps), max(fps)],
        "first_frame_ms": statistics.median(first_ms),
        "step_ms": statistics.median(later_ms) if later_ms else None,
        "step_ms_p95": percentile(later_ms, 95) if later_ms else None,
        "weights_gib": about["weights_bytes"] / GIB,
        "beyond_weights_gib": max(beyond) / GIB if known else None,
        "peak_gib": (held + max(beyond)) / GIB if known else None,
        "others_cpu_share": max((r["others_cpu_share"] or 0.0) for r in repetitions),
        "matmul_share": statistics.median(_matmul_share(row, about, r) for r in repetitions),
    }


def _matmul_share(row: dict[str, Any], about: dict[str, Any], repetition: dict[str, Any]) -> float:
    """Operations per second as a share of the matrix product's, over the part of the clip that was counted."""
    counted_s = sum(repetition["step_s"][:2] if about["streams"] else repetition["step_s"])
    return row["trial_flops"] / counted_s / repetition["matmul_flops_per_s"]


def ratio(ours: dict[str, Any], peer: dict[str, Any]) -> dict[str, Any] | None:
    """Ours over the peer's: frames/s round by round, and memory beyond the weights."""
    if not (ours["repetitions"] and peer["repetitions"]):
        return None
    pairs = zip(ours["repetitions"], peer["repetitions"], strict=False)
    speed = [sum(theirs["step_s"]) / sum(own["step_s"]) for own, theirs in pairs]
    own, theirs = (side["summary"]["beyond_weights_gib"] for side in (ours, peer))
    return {
        "fps": statistics.median(speed),
        "fps_min_max": [min(speed), max(speed)],
        "beyond_weights": None if own is None or not theirs else own / theirs,
    }


def percentile(values: Sequence[float], percent: float) -> float:
    """By the nearest rank: a value that was measured."""
    return sorted(values)[max(0, math.ceil(percent / 100 * len(values)) - 1)]


# --- telling ----------------------------------------------------------------------------------------------------------


def report(result: dict[str, Any]) -> str:
    """The table of every size and its ratios, as printed."""
    options = result["options"]
    machine, compute = heading(result)
    lines = [
        machine,
        f"{compute}; compile {'on' if options['compile'] else 'off'}; random weights; batch {options['batch_size']}; "
        f"{options['num_frames']} frames; warm-up: {WARM_UP['cuda' if result['threads'] is None else 'cpu']}",
    ]
    for size in result["sizes"]:
        decoded = "" if size["size"] == size["decoded_size"] else " (decoded as {}x{})".format(*size["decoded_size"])
        lines += ["", f"{size['size'][0]}x{size['size'][1]}{decoded}", table(_rows(size, result["decoders"]))]
        if (others := busy_with_others(size)) > BUSY and result["threads"]:
            lines.append(
                f"other processes took up to {others:.0%} of the cores meanwhile: measure again on a quiet machine"
            )
        for peer, values in size["ratios"].items():
            if values:
                low, high = values["fps_min_max"]
                ours = next(iter(size["rows"]))
                line = f"{ours} / {peer}: {values['fps']:.2f}x the frames/s ({low:.2f} to {high:.2f})"
                if values["beyond_weights"] is not None:
                    line += f", {values['beyond_weights']:.3f}x the memory beyond weights"
                lines.append(line)
    return "\n".join(lines) + "\n"


def busy_with_others(size: dict[str, Any]) -> float:
    """The largest share of the cores that other processes had while a decoder was measured."""
    summaries = [row["summary"] for row in size["rows"].values() if row["summary"]]
    return max((summary["others_cpu_share"] for summary in summaries), default=0.0)


def _rows(size: dict[str, Any], decoders: dict[str, Any]) -> list[list[Any]]:
    head = ["decoder", "M", "mode", "layout", "frames/s", "min to max", "first ms", "step ms", "p95 ms"]
    rows: list[list[Any]] = [[*head, "weights GiB", "beyond GiB", "of matmul", "rounds"]]
    for label, row in size["rows"].items():
        summary, about = row["summary"], decoders[label]
        millions = f"{about['parameters'] / 1e6:.1f}"
        mode = "stream" if about["streams"] else "whole clip"
        if summary is None:
            rows.append([label, millions, mode, "", row["failed"], *[""] * 8])
            continue
        low, high = summary["fps_min_max"]
        rows.append(
            [
                *(label, millions, mode, row["layout"], f"{summary['fps']:.3g}", f"{low:.3g} to {high:.3g}"),
                *(_number(summary[key], ".1f") for key in ("first_frame_ms", "step_ms", "step_ms_p95")),
                *(_number(summary[key], ".3f") for key in ("weights_gib", "beyond_weights_gib")),
                *(f"{summary['matmul_share']:.0%}", str(len(row["repetitions"]))),
            ]
        )
    return rows


def _number(value: float | None, form: str) -> str:
    return "not measured" if value is None else f"{value:{form}}"
