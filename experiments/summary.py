"""What an evaluation found: means of every method on every stream with their protocols, and the files that say so.

``clips.csv`` has every clip by every method, ``frames.csv`` every frame, ``by_frame.csv`` the mean over clips of every frame
index, ``result.json`` the means, ``table.md`` the same to read. A score that a clip does not have is an empty cell.
"""

import itertools
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning import Trainer

from decoders.base import DECODER, PER_FRAME, Row, VideoDecoder
from decoders.scoring import BROKEN, FEATURES, SCORED, mean_score, number, set_score
from experiments import categories, distance
from experiments.checkpoints import write_atomically, write_table
from experiments.comparison import films
from experiments.measured import markdown
from metrics.base import SetMetric
from metrics.protocol import Protocol, clip_list_hash

TABLE, RESULT, CLIPS, FRAMES, DISTANCE = "table.md", "result.json", "clips.csv", "frames.csv", "distance.md"
BY_FRAME = "by_frame.csv"


def summarise(rows: list[Row], trainer: Trainer, decoder: VideoDecoder, data) -> dict[str, Any]:
    """Means of every method on every stream, each with its protocol. ``rows`` name their streams."""
    return {
        "means": means(rows, decoder, data.val_names),
        "categories": categories.by_category(rows, lambda clips: scores_of(clips, decoder)[0]),
        "compression": decoder.latent_space.compression,
        "files": {name: _files(data.streams("val")[name].describe()) for name in data.val_names},
        "protocols": protocols(rows, trainer, decoder, data),
        "seconds": {what: round(spent, 3) for what, spent in decoder.validation_seconds.items()},
        "device": torch.cuda.get_device_name() if trainer.strategy.root_device.type == "cuda" else "cpu",
        "versions": {"torch": torch.__version__, "lightning": lightning.__version__},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def means(rows: Sequence[Row], decoder: VideoDecoder, streams: Sequence[str]) -> list[dict[str, Any]]:
    """One entry per stream and method, the decoder's own first: {stream, method, clips, films, scores, spread}.

    ``films``: how many the clips are of, where their keys tell (``film#beginning``).
    """
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["stream"], row["method"]), []).append(row)
    order = {name: i for i, name in enumerate(streams)}
    found = []
    for (stream, method), clips in sorted(groups.items(), key=lambda g: (order[g[0][0]], g[0][1] != DECODER)):
        scores, spread = scores_of(clips, decoder)
        keys = [row["key"] for row in clips]
        told = {"films": films(keys)} if all("#" in key for key in keys) else {}
        about = {"stream": stream, "method": method, "clips": len(clips)} | told
        found.append(about | {"scores": scores, "spread": spread})
    return found


def scores_of(clips: Sequence[Row], decoder: VideoDecoder) -> tuple[dict[str, float | None], dict[str, float]]:
    """Of the rows of one method: column -> mean, and column -> standard deviation over clips.

    A distance between sets has the number of its windows in its column's name, and no deviation. None: a prediction is not
    finite. A column without any score is absent.
    """
    scores: dict[str, float | None] = {}
    spread = {}
    for column, (metric, _) in score_columns(clips[0], decoder).items():
        mean = mean_score(column, metric, clips)
        if mean is not None:
            scores[column] = number(mean)
        if mean is not None and not math.isnan(mean):
            spread[column] = statistics.pstdev([row[column] for row in clips if row[column] is not None])
    for metric in set_metrics(decoder):
        score, windows = set_score(metric, clips)
        scores[set_column(metric, windows)] = number(score)
    return scores, spread


def set_metrics(decoder: VideoDecoder) -> list[SetMetric]:
    """Those of the metrics that score a set of clips."""
    return [metric for metric in decoder.scorer().metrics if isinstance(metric, SetMetric)]


def set_column(metric: SetMetric, windows: int) -> str:
    """A distance between sets depends on their size, so its column names it."""
    return f"{metric.name}_n{windows}"


def score_columns(row: Row, decoder: VideoDecoder) -> dict[str, tuple[str, str | None]]:
    """Column -> (metric, group of frames or None), in the order of a row: ``psnr``, ``psnr_others``, ..."""
    columns = {}
    for name in row:
        fitting = [m for m in decoder.metric_protocols if name == m or name.startswith(f"{m}_")]
        if fitting:  # psnr_video is a metric, and psnr_video_others a column of it
            metric = max(fitting, key=len)
            columns[name] = (metric, name[len(metric) + 1 :] or None)
    return dict(sorted(columns.items(), key=lambda item: (item[1][1] or "", list(row).index(item[0]))))


def protocols(rows: list[Row], trainer: Trainer, decoder: VideoDecoder, data) -> dict[str, dict[str, Any]]:
    """``<stream>/<column>`` -> everything that decides the number."""
    found = {}
    for stream in data.val_names:
        clips = [row for row in rows if row["stream"] == stream and row["method"] == DECODER]
        if not clips:
            continue
        config, first = data.config.val[stream], clips[0]
        columns = score_columns(first, decoder)
        frames, stride, apart = scored_frames(first, resampled=config.fps is not None or config.still)
        for metric in set_metrics(decoder):
            columns[set_column(metric, set_score_windows(metric, clips))] = (metric.name, None)
        for name, (metric, group) in columns.items():
            definition = decoder.metric_protocols[metric] | (only_frames(group, clips) if group else {})
            definition |= {"scored_frames": apart} if apart else {}
            definition |= {"decoding": chosen} if (chosen := decoder.decoding(stream)) else {}
            if mask := data.streams("val")[stream].mask:
                definition |= {"pixels": f"outside the edit, {mask} masks; inside, the prediction is the target"}
            found[f"{stream}/{name}"] = Protocol(
                metric=name,
                frames=frames,
                frame_stride=stride,
                size=(first["height"], first["width"]),
                resize=f"PIL bicubic, {config.how_resized}, centre"
                + (f", {config.fps:g} fps" if config.fps else "")
                + (", one frame repeated" if config.still else ""),
                clips=clip_list_hash(row["key"] for row in clips),
                num_clips=len(clips),
                dtype=str(trainer.precision),
                latent_space=decoder.latent_space.fingerprint,
                definition=definition,
            ).to_dict()
    return found


def scored_frames(row: Row, resampled: bool) -> tuple[tuple[int, int], int | None, str]:
    """Which frames of a delivered clip are scored: [from, to); their stride in frames of the file, None where clips are
    ``resampled`` or there is no one stride; and which they are, where that does not say it."""
    frames = row.get(SCORED) or range(row["frames"])
    steps = {later - earlier for earlier, later in itertools.pairwise(frames)} or {1}
    stride = steps.pop() if len(steps) == 1 and (not resampled or steps == {1}) else None
    return (frames[0], frames[-1] + 1), None if resampled else stride, "" if stride else _ranges(frames)


def only_frames(group: str, clips: Iterable[Row]) -> dict[str, Any]:
    """Which frames a group of them has: groups of one name and other frames are other columns."""
    members = {row["key"]: [t for t, inside in enumerate(row[PER_FRAME][f"in_{group}"]) if inside] for row in clips}
    several = {_ranges(frames) for frames in members.values()}
    if len(several) == 1:
        return {"only_frames": {"group": group, "frames": several.pop()}}
    digest = clip_list_hash(f"{key}: {_ranges(frames)}" for key, frames in members.items())
    return {"only_frames": {"group": group, "frames": "differ by clip", "hash": digest}}


def _ranges(frames: Sequence[int]) -> str:
    """0, 3, 4, 5 -> "0, 3-5"."""
    parts: list[list[int]] = []
    for frame in frames:
        if parts and frame == parts[-1][1] + 1:
            parts[-1][1] = frame
        else:
            parts.append([frame, frame])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)


def set_score_windows(metric: SetMetric, clips: Iterable[Row]) -> int:
    """How many windows these clips have together."""
    return sum(len(row[FEATURES][metric.name]["real"]) for row in clips)


def _files(about: dict[str, Any]) -> dict[str, Any]:
    """How many files of a stream were used, and why the others were not."""
    return {"used": about["files_used"], "found": about["files_found"], "left_out": about["dropped"]}


def by_frame(rows: Sequence[Row], metrics: Iterable[str]) -> list[dict[str, Any]]:
    """Mean over clips of every frame index: lines {stream, method, frame, clips, <metric>: mean or None}.

    A prediction that is not finite leaves its method without a mean, as in the means over clips.
    """
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["stream"], row["method"]), []).append(row)
    names = [name for name in metrics if any(name in row[PER_FRAME] for row in rows)]
    lines = []
    for (stream, method), clips in groups.items():
        broken = {name for row in clips for name in row.get(BROKEN, ())}
        for frame in range(max(row["frames"] for row in clips)):
            there = [row for row in clips if frame < row["frames"]]
            line: dict[str, Any] = {"stream": stream, "method": method, "frame": frame, "clips": len(there)}
            for name in names:
                frames = [row[PER_FRAME][name][frame] for row in there if name in row[PER_FRAME] and name not in broken]
                scores = [score for score in frames if score is not None]
                line[name] = statistics.fmean(scores) if scores else None
            lines.append(line)
    return lines


def write(folder: Path, rows: list[Row], result: dict[str, Any], metrics: Iterable[str]) -> None:
    """All files of an evaluation."""

    def listed(name: str, lines: list[dict[str, Any]]) -> None:
        write_table(folder / name, list(dict.fromkeys(column for line in lines for column in line)), lines)

    inner = (PER_FRAME, FEATURES, BROKEN, SCORED)
    listed(CLIPS, [{k: v for k, v in row.items() if k not in inner} for row in rows])
    frames = [
        {k: row[k] for k in ("stream", "key", "method")} | {"frame": t} | {k: v[t] for k, v in row[PER_FRAME].items()}
        for row in rows
        for t in range(row["frames"])
    ]
    listed(FRAMES, frames)
    listed(BY_FRAME, by_frame(rows, metrics))
    text = json.dumps(result, indent=2, allow_nan=False)
    write_atomically(folder / RESULT, lambda path: path.write_text(text))
    write_atomically(folder / TABLE, lambda path: path.write_text(table(result)))
    for name, part, shown in (
        (DISTANCE, result["distance"], distance.text),
        (categories.FILE, result["categories"], categories.text),
    ):
        if part:
            text = shown(part)
            write_atomically(folder / name, lambda path, text=text: path.write_text(text))
        else:
            (folder / name).unlink(missing_ok=True)


def table(result: dict[str, Any]) -> str:
    """Means over clips and their standard deviation, as Markdown; below it what files were left out and what took time."""
    names = list(dict.fromkeys(name for mean in result["means"] for name in mean["scores"]))
    lines = [["clips", "method", *names]]
    for mean in result["means"]:
        size = next(p["size"] for key, p in result["protocols"].items() if key.startswith(f"{mean['stream']}/"))
        of = f", from {few} film{'s' * (few > 1)}" if (few := mean.get("films", mean["clips"])) < mean["clips"] else ""
        label = f"{mean['stream']} ({mean['clips']} of {size[0]}x{size[1]}{of})"
        lines.append([label, mean["method"], *(_cell(mean, name) for name in names)])
    below = ""
    for stream, files in result["files"].items():
        if files["left_out"]:
            reasons = ", ".join(f"{number} {reason}" for reason, number in files["left_out"].items())
            below += f"{stream}: {files['used']} of {files['found']} files; left out: {reasons}\n"
    below += f"compression: {result['compression']:.4g} numbers of video for one of the latent\n"
    return f"{markdown(lines)}\n{below}{shares(result['seconds'])}"


def _cell(mean: dict[str, Any], name: str) -> str:
    if name not in mean["scores"]:
        return ""
    score = mean["scores"][name]
    if score is None:
        return "not finite"
    return f"{score:.3f}" + (f" ± {mean['spread'][name]:.3f}" if name in mean["spread"] else "")


def shares(seconds: dict[str, float]) -> str:
    """A line on where the time of decoding and scoring the decoder's clips went; "" where nothing was timed."""
    total = sum(seconds.values())
    if not total:
        return ""
    parts = [f"{'decoding' if what == 'decode' else what} {spent / total:.0%}" for what, spent in seconds.items()]
    return f"time: {', '.join(parts)} (of {total:.1f} s)\n".replace("%", " %")
