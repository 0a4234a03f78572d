"""A page that compares runs: ``python -m experiments.report RUN [RUN ...] [key=value ...]``.

    sets       named evaluation sets in place of the validation clips: sets=[davis]
    out        folder of the page, empty or an earlier report's; default: report-<runs, sets, overrides> under RUNS_ROOT/comparisons
    baseline   the run that the others are held against; default: the first
    metric     by which clips are chosen, psnr by default: the baseline's worst, median and best of every stream
    clips      how many of each stream are shown; default 3 (more: evenly between worst and best)
    frames     of each clip at most; default: all
    max_mb     size of frames and videos together, 100 by default; what does not fit is left out, which the page says
    fps        of the films at speed 1; default 16
    speed      false: decoders are not timed
    methods    which there are besides the runs: all (default: teachers, numbers of steps, latent extension, controls), some, none

What has a dot in its key, and pad, is an override of every run's evaluation, as for `make compare`.

The folder opens from a disk, ``index.html`` first, without a server and without a network. All numbers are those of ``make
compare``. Frames are lossless: what is drawn is what was scored, rounded to bytes. The videos beside them are H.264.
"""

import base64
import html
import io
import json
import math
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from PIL import Image, ImageDraw, ImageFont

from experiments import decoded, report_folder
from experiments.compare import gather, portable
from experiments.compare_plots import draw
from experiments.comparison import FLOOR, Column, Comparison
from experiments.compose import ConfigError, run_cli
from experiments.decode import write_video
from experiments.decoded import TRUTH, Frames

PAGE = Path(__file__).parent / "page"
SHARED = ("page.css", "view.js", "tables.js", "report.js")
FEWEST = 2  # frames; a clip of which fewer fit is left out
NAMED = ("psnr", "ssim", "lpips_alex")  # scores of a clip that stand beside its film
TILE = 192  # pixels that a film in a video is wide at least
ERROR_GAIN = 4  # error maps show |method - truth| so many times brighter
MIB = 2**20
VIDEOS = {"films": "all methods side by side", "errors": f"|method - truth| x {ERROR_GAIN}"}
FORMATS = {
    "WEBP": {"lossless": True, "quality": 30, "method": 2},  # more effort takes five times as long for as many bytes
    "PNG": {"optimize": True},
    "JPEG": {"quality": 80},
}


@dataclass
class ReportConfig:
    """The command's own options."""

    runs: list[str] = field(default_factory=list)
    sets: list[str] | None = None
    out: str | None = None
    baseline: str | None = None
    metric: str = "psnr"
    clips: int = 3
    frames: int | None = None
    max_mb: float = 100.0
    fps: float = 16.0
    speed: bool = True
    methods: str = "all"
    overrides: list[str] = field(default_factory=list)  # of the evaluations

    def __post_init__(self) -> None:
        self.runs = list(dict.fromkeys(self.runs))
        if not self.runs:
            raise ValueError('which runs? make report exps="a b c"')
        if self.clips < 1 or self.max_mb <= 0 or not 0 < self.fps <= 240 or (self.frames or FEWEST) < FEWEST:
            raise ValueError(f"clips, max_mb and fps must be positive, fps at most 240, frames {FEWEST} or more")


@dataclass
class Chosen:
    """A clip that is shown, and why."""

    stream: str
    key: str
    why: str


def is_override(key: str) -> bool:
    """Whether an option is one of the experiments', and none of the command's own."""
    return "." in key or key == "pad"


def options(arguments: Sequence[str], schema: type) -> Any:
    """Runs' names and ``key=value`` as checked options of a command. Raises ConfigError."""
    runs = [name for text in arguments if "=" not in text or "+" in text.partition("=")[0] for name in text.split()]
    typed = [text.partition("=") for text in arguments if "=" in text and "+" not in text.partition("=")[0]]
    values: dict[str, Any] = {key: value for key, _, value in typed if not is_override(key)}
    values["overrides"] = [f"{key}={value}" for key, _, value in typed if is_override(key)]
    for key in ("sets",):
        if key in values:
            values[key] = [part.strip() for part in values[key].strip("[]").split(",") if part.strip()]
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), {**values, "runs": runs}))
    except (OmegaConfBaseException, ValueError) as error:
        key, message = getattr(error, "full_key", None), str(error).splitlines()[0]
        raise ConfigError(f"{key}: {message}" if key else message) from None


def report(config: ReportConfig, arguments: Sequence[str] = ()) -> Path:
    """Compare the runs and write the page. Returns the path of its ``index.html``. ``arguments``: as typed, for the page.

    Raises:
        ConfigError: a run is not there, cannot be evaluated or decoded; a metric that was not measured; a folder that is not ours.
    """
    out = Path(config.out) if config.out else report_folder.default(config.runs, config.sets, config.overrides)
    report_folder.earlier(out)  # told before any work
    how = {"speed": config.speed, "methods": config.methods, "overrides": config.overrides}
    comparison = gather(config.runs, config.sets, config.baseline, **how)
    comparison.command = " ".join(["python -m experiments.report", *map(shlex.quote, arguments)])
    comparison.title = "Comparison of " + ", ".join(run.name for run in comparison.runs)
    return write(comparison, config, out)


def write(comparison: Comparison, config: ReportConfig, out: Path) -> Path:
    """The page of ``comparison`` in the folder ``out``. An earlier report in it is replaced; nothing else in it is touched."""
    with report_folder.replaced(out) as made:
        for folder in ("clips", "videos", "plots"):
            (made / folder).mkdir()
        data = page_data(comparison, config, made)
        (made / "data.js").write_text(f"window.REPORT = {script_json(data)};\n", encoding="utf-8")
        for name in SHARED:
            shutil.copyfile(PAGE / name, made / name)
        template = (PAGE / "report.html").read_text(encoding="utf-8")
        page = template.replace("{{title}}", html.escape(comparison.title))
        (made / "index.html").write_text(page, encoding="utf-8")
    return out / "index.html"


def page_data(comparison: Comparison, config: ReportConfig, out: Path) -> dict[str, Any]:
    """All that the page tells. Writes the frames, videos and plots that it names."""
    plots = [path for path in draw(comparison, out / "plots") if path.suffix == ".png"]
    chosen = choose(comparison, config.metric, config.clips)
    films = decode_all(comparison, chosen, config.overrides)
    shown, left_out, spent = [], [], 0
    for number, clip in enumerate(chosen):
        share = (config.max_mb * MIB - spent) / (len(chosen) - number)
        methods = methods_of(comparison, clip, films)
        about, said, size = write_clip(clip, methods, out, len(shown), share, config)
        left_out += said
        spent += size
        if about is not None:
            shown.append({"index": len(shown), "stream": clip.stream, "key": clip.key, "why": clip.why} | about)
    which = {1: "the median", 2: "the worst and the best", 3: "the worst, the median and the best"}
    which = which.get(config.clips, f"{config.clips} from the worst to the best")
    return portable(comparison.to_dict()) | {
        "shown": shown,
        "left_out": left_out,
        "choice": f"Of every stream {which} of the baseline, {comparison.baseline}, by {config.metric}.",
        "named": [name for name in NAMED if any(column.name == name for column in comparison.columns)],
        "fps": config.fps,
        "megabytes": round(spent / MIB, 1),
        "plots": [{"file": f"plots/{path.name}", "text": path.stem.replace("_", " ")} for path in plots],
    }


def script_json(data: Any) -> str:
    """JSON that may stand in a script, whatever its texts hold: no tag can begin in it."""
    text = json.dumps(data, allow_nan=False, ensure_ascii=True)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


# --- which clips, which methods ---------------------------------------------------------------------------------------


def choose(comparison: Comparison, metric: str, number: int) -> list[Chosen]:
    """Clips of every stream from the baseline's worst to its best, evenly by rank; the worst of all streams come first.

    Raises ConfigError for a metric that no stream has by clip.
    """
    found: list[list[Chosen]] = []
    for stream in comparison.streams:
        column = next((c for c in comparison.columns_of(stream.name) if c.name == metric and c.per_clip), None)
        scores = comparison.row(comparison.baseline).clips.get(column.id) if column else None
        if scores:
            found.append(_ranked(stream.name, column, scores, number))
    if not found:
        there = ", ".join(dict.fromkeys(c.name for c in comparison.columns if c.per_clip))
        raise ConfigError(f"metric={metric} was not measured by clip; there are {there}")
    turns = max(len(clips) for clips in found)
    return [clips[turn] for turn in range(turns) for clips in found if turn < len(clips)]


def _ranked(stream: str, column: Column, scores: Mapping[str, float], number: int) -> list[Chosen]:
    worst_first = sorted(scores, key=lambda key: (scores[key] if column.higher_is_better else -scores[key], key))
    last = len(worst_first) - 1
    count = min(number, len(worst_first))
    ranks = {round(i * last / max(1, count - 1)): None for i in range(count)} if count > 1 else {last // 2: None}
    clips = [Chosen(stream, worst_first[rank], _rank_name(rank, last) if count > 1 else "median") for rank in ranks]
    middle = [clip for clip in clips if clip.why == "median"]
    ends = [clip for clip in clips if clip.why in ("worst", "best")]
    return [*ends[:1], *middle, *ends[1:], *(clip for clip in clips if clip not in middle + ends)]


def _rank_name(rank: int, last: int) -> str:
    if rank in (0, last) and last:
        return "best" if rank else "worst"
    return "median" if rank in (last // 2, -(-last // 2)) else f"rank {rank + 1} of {last + 1}"


def decode_all(
    comparison: Comparison, chosen: Sequence[Chosen], overrides: Sequence[str] = ()
) -> dict[tuple[str, str], decoded.Clips]:
    """(run, stream) -> its chosen clips: each run is built once per stream; frames stay on disk."""
    found = {}
    for run in comparison.runs:
        scored = comparison.row(run.name).clips
        for stream in dict.fromkeys(clip.stream for clip in chosen):
            there = {key for column in comparison.columns_of(stream) for key in scored.get(column.id, ())}
            if wanted := [clip.key for clip in chosen if clip.stream == stream and clip.key in there]:
                found[run.name, stream] = decoded.decode(run.name, stream, wanted, comparison.sets, overrides)
    return found


def methods_of(
    comparison: Comparison, clip: Chosen, films: Mapping[tuple[str, str], decoded.Clips]
) -> dict[str, tuple[str, Frames]]:
    """Row's id -> label and frames of a clip: the truth, every run's decoder, its other methods; floors are not shown.

    Raises ConfigError where runs were measured on different pixels.
    """
    found: dict[str, tuple[str, Frames]] = {}
    for run in comparison.runs:
        frames = films.get((run.name, clip.stream), {}).get(clip.key)
        if frames is None:  # the run was not measured on this clip
            continue
        truth = found.setdefault(TRUTH, (TRUTH, frames[TRUTH]))[1]
        if not np.array_equal(truth, frames[TRUTH]):
            raise ConfigError(
                f"{run.name} and {comparison.runs[0].name} were not measured on the same pixels of {clip.key}; evaluate both "
                "with the same data"
            )
        for row in comparison.rows:
            if row.run == run.name and row.kind != FLOOR and row.method in frames:
                found[row.id] = (row.label, frames[row.method])
    order = list(dict.fromkeys([TRUTH, *(row.id for row in comparison.rows)]))
    return {id: found[id] for id in sorted(found, key=order.index)}


# --- files of a clip --------------------------------------------------------------------------------------------------


def write_clip(
    clip: Chosen, methods: Mapping[str, tuple[str, Frames]], out: Path, index: int, share: float, config: ReportConfig
) -> tuple[dict[str, Any] | None, list[str], int]:
    """A clip's frames as a script, and its videos, in at most ``share`` bytes, of which videos take half at most.

    Returns:
        what the page knows of it (None: it does not fit), what was left out, bytes written.
    """
    where, total = f"{clip.stream}, {clip.key}", len(methods[TRUTH][1])
    wanted = min(total, config.frames or total)
    said = [] if wanted == total else [f"{where}: {wanted} of {total} frames (frames={config.frames})"]
    slices = {id: data_url(picture(slice_over_time(frames), "PNG"), "png") for id, (_, frames) in methods.items()}
    size = sum(map(len, slices.values()))
    videos, posters = [], {}
    for name, text in VIDEOS.items():
        file = out / "videos" / f"{index}-{name}.mp4"
        write_video(file, grids(methods, errors=name == "errors"), config.fps, crf=18)
        poster = data_url(picture(next(grids(methods, errors=name == "errors"))[0].numpy(), "JPEG"), "jpeg")
        if size + (cost := file.stat().st_size + len(poster)) > share / 2:
            said.append(f"{where}: no video of {text} (max_mb={config.max_mb:g})")
            file.unlink()
            continue
        size += cost
        posters[f"videos/{file.name}"] = poster
        videos.append({"file": f"videos/{file.name}", "text": text})
    films, used = encode({id: frames for id, (_, frames) in methods.items()}, wanted, share - size)
    kept = len(films[TRUTH])
    if kept < min(FEWEST, wanted):
        for video in videos:
            (out / video["file"]).unlink()
        need = f"its {len(methods)} films are larger than its share of max_mb={config.max_mb:g}"
        return None, [f"{where} ({clip.why}) is not shown: {need}"], 0
    if kept < wanted:
        said.append(f"{where}: {kept} of {wanted} frames are shown (max_mb={config.max_mb:g})")
    encoded = {id: [base64.b64encode(frame).decode() for frame in film] for id, film in films.items()}
    content = {"posters": posters, "methods": encoded, "slices": slices}
    path = out / "clips" / f"{index}.js"
    path.write_text(f"window.arrived({index}, {script_json(content)});\n", encoding="utf-8")
    about = {"methods": [{"id": id, "label": label} for id, (label, _) in methods.items()], "videos": videos}
    return about | {"frames": kept}, said, size + used


def encode(methods: Mapping[str, Frames], number: int, share: float) -> tuple[dict[str, list[bytes]], int]:
    """The first ``number`` frames of every method as lossless WebP, or as many as fit into ``share`` bytes of base64."""
    films: dict[str, list[bytes]] = {id: [] for id in methods}
    used = 0
    for t in range(number):
        frames = {id: picture(frames[t], "WEBP") for id, frames in methods.items()}
        cost = sum(4 * -(-len(frame) // 3) for frame in frames.values())
        if used + cost > share:
            break
        used += cost
        for id, frame in frames.items():
            films[id].append(frame)
    return films, used


def picture(frame: np.ndarray, kind: str) -> bytes:
    """RGB bytes "h w 3" as the file of a picture: lossless, but for JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(frame)).save(buffer, kind, **FORMATS[kind])
    return buffer.getvalue()


def data_url(content: bytes, kind: str) -> str:
    """A picture as an address that holds it."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def slice_over_time(frames: Frames, rows: int = 6) -> np.ndarray:
    """The middle row of every frame, one below the other and ``rows`` pixels high each: "t*rows w 3" bytes."""
    return np.repeat(frames[:, frames.shape[1] // 2], rows, axis=0)


def grids(methods: Mapping[str, tuple[str, Frames]], errors: bool) -> Iterator[torch.Tensor]:
    """Frames of all methods with their names above, "1 h w 3" bytes with even sides; or what they differ from the truth by."""
    truth = methods[TRUTH][1]
    shown = {id: method for id, method in methods.items() if not errors or id != TRUTH} or methods
    length, height, width = truth.shape[:3]
    enlarged = max(1, -(-TILE // width))
    across = math.ceil(math.sqrt(len(shown) * height / width)) if len(shown) > 4 else len(shown)
    font = ImageFont.load_default(size=14)
    captions = [_caption(label, width * enlarged, font) for label, _ in shown.values()]
    for t in range(length):
        tiles = []
        for caption, (_, frames) in zip(captions, shown.values(), strict=True):
            frame = np.asarray(frames[t])
            if errors:
                apart = np.abs(frame.astype(np.int16) - np.asarray(truth[t]).astype(np.int16))
                frame = np.minimum(apart * ERROR_GAIN, 255).astype(np.uint8)
            tiles.append(np.concatenate([caption, frame.repeat(enlarged, 0).repeat(enlarged, 1)]))
        tiles += [np.zeros_like(tiles[0])] * (-len(tiles) % across)
        rows = [np.concatenate(tiles[i : i + across], axis=1) for i in range(0, len(tiles), across)]
        whole = np.concatenate(rows)
        whole = np.pad(whole, ((0, whole.shape[0] % 2), (0, whole.shape[1] % 2), (0, 0)))
        yield torch.from_numpy(whole)[None]


def _caption(label: str, width: int, font: Any) -> np.ndarray:
    strip = Image.new("RGB", (width, 22), "black")
    pen = ImageDraw.Draw(strip)
    while len(label) > 4 and pen.textlength(label, font) > width - 8:
        label = label.rstrip("…")[:-1] + "…"
    pen.text((4, 3), label, fill="white", font=font)
    return np.asarray(strip)


def main(arguments: list[str]) -> None:
    page = report(options(arguments, ReportConfig), arguments)
    data = json.loads((page.parent / "data.js").read_text().removeprefix("window.REPORT = ").rstrip(";\n"))
    for text in data["left_out"]:
        print(text)
    print(f"{data['megabytes']} MB of frames and videos of {len(data['shown'])} clips\n{page}")


if __name__ == "__main__":
    run_cli(main)
