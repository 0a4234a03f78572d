"""The same latents, several decoders: ``python -m experiments.fixed_seed in=LATENTS decoders=[own,A,B] out=FOLDER``.

    make fixed-seed in=latents/latents.csv decoders=[own,refdecoder_wan21_clip17] pipeline=FOLDER out=decoded
    make fixed-seed in=latents decoders=[plain=exports/plain,ours=exports/ours] out=decoded

RefDecoder's protocol (arXiv 2605.15196, appendix B.7): a diffusion model makes latents once, with known seeds, and every
decoder decodes those, so that what differs is the decoder. ``make generate`` makes them; ``make vbench`` lays the videos out
for VBench's scorers, runs those and compares.

    in         saved latents, normalised or with their statistics: a folder, a file, a glob or a list (latents.csv of make generate)
    decoders   own (the pipeline's), what decoders.load takes, or runs of ours by name; LABEL=SOURCE gives a label
    pipeline   the folder that own's autoencoder is in; only with own
    dtype      fp32 (as the protocol has it) or bf16; device; overwrite
    crf, fps   of the videos (H.264, yuv420p); defaults 10, as VBench-I2V's script has it, and what the latents' metadata say

OUT/LABEL/NAME.mp4 is a video. OUT/fixed_seed.csv has a line per latent: prompt, index, seed, image, and of every decoder the PSNR (dB)
of its first frame against the image, where there is one, and of all frames against the first decoder, both measured before the video
is coded. OUT/fixed_seed.json says which weights decoded, and the means with 95 % intervals. A decoder that
looks at a reference gets the image; one that draws noise gets the clip's seed. What is there is not decoded again.
"""

import csv
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from datamodules.config import SourceConfig
from datamodules.latents import LatentHeader, find_reference, load_latent
from datamodules.probe import BadFile
from datamodules.sources import SourceError, find_files
from datamodules.stills import load_reference
from decoders.seeds import key_seed
from experiments.bench import device_name, find_device
from experiments.bench_all import read_options
from experiments.callbacks import to_uint8
from experiments.checkpoints import DiskFull, write_atomically, write_table
from experiments.compose import ConfigError, run_cli
from experiments.decoder_choice import Chosen, open_decoder, parse
from experiments.measured import markdown, require_folder
from experiments.pipeline_folder import DTYPES
from experiments.video_out import write_video
from metrics.intervals import interval_of_mean, paired

TABLE, ABOUT = "fixed_seed.csv", "fixed_seed.json"
FIRST_FRAME, AGAINST = "first_frame_psnr", "psnr_to_first_decoder"
LARGEST_PSNR = 100.0  # of equal frames: infinity has no mean


@dataclass
class FixedSeedConfig:
    """The command's options; ``source`` is what is typed as ``in``."""

    source: str = ""
    decoders: list[str] = field(default_factory=list)
    out: str = ""
    pipeline: str | None = None
    dtype: Literal["fp32", "bf16"] = "fp32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    crf: int = 10
    fps: float | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        if not (self.source and self.out and self.decoders):
            raise ValueError(
                "in, decoders and out are needed: make fixed-seed in=LATENTS decoders=[own,...] out=FOLDER"
            )
        if not 0 <= self.crf <= 51:
            raise ValueError(f"crf={self.crf} must lie in 0 (lossless) to 51")
        if self.fps is not None and not 0 < self.fps <= 1000:
            raise ValueError(f"fps={self.fps} must lie in 0 to 1000")


@dataclass
class Latent:
    """A file of latents and what its list says of it."""

    name: str  # of its videos, without suffix
    path: str
    reference: str
    row: Mapping[str, str]  # of a list: prompt, index, seed


def find_latents(source: str) -> list[Latent]:
    """Raises ConfigError: none, or two whose videos would have one name."""
    try:
        files = find_files("in", SourceConfig(source, kind="latent"))
    except SourceError as error:
        raise ConfigError(str(error).replace("data.sources.in.path", "in").replace("data.sources.in", "in")) from None
    listed = _rows(source)
    found: dict[str, Latent] = {}
    for file in files:
        name = os.path.splitext(os.path.basename(file.path))[0]
        if name in found:
            raise ConfigError(
                f"in: {found[name].path} and {file.path} would both become {name}.mp4; rename one of them"
            )
        row = listed.get(os.path.abspath(file.path), {"prompt": file.prompt, "seed": file.seed})
        found[name] = Latent(name, file.path, file.reference, row)
    return list(found.values())


def fixed_seed(config: FixedSeedConfig, arguments: Sequence[str] = ()) -> tuple[dict[str, Any], int]:
    """Decode what is missing. What ``fixed_seed.json`` holds, and how many latents failed.

    Raises:
        ConfigError: nothing can be decoded, or OUT holds videos of other weights under these labels.
    """
    latents = find_latents(config.source)
    named = parse(config.decoders)
    device = find_device(config.device, "fixed_seed")
    out = Path(config.out).expanduser()
    require_folder(out)
    chosen = [open_decoder(name, config.pipeline, DTYPES[config.dtype], device) for name in named]
    how = {
        "dtype": config.dtype,
        "crf": config.crf,
        "fps": config.fps,
        "decoders": {c.label: c.about() for c in chosen},
    }
    before, labels = _earlier(out, how, config.overwrite), [c.label for c in chosen]
    rows = {one.name: row for one in latents if (row := before.get(one.name)) and _is_done(one, row, out, labels)}
    done, failed = set(rows), 0
    print(f"{len(latents)} latents, {', '.join(c.label for c in chosen)}; {device}, to {out}", flush=True)
    _write_table(
        out, rows, labels
    )  # first: lines of videos that are decoded anew must not be found after an interruption
    write_atomically(out / ABOUT, lambda path: path.write_text(json.dumps({"how": how}, indent=1) + "\n"))
    try:
        for number, latent in enumerate(latents, start=1):
            if latent.name in done:
                continue
            try:
                rows[latent.name] = _decode_all(latent, chosen, config, out)
                told = _told(rows[latent.name], chosen)
                _write_table(out, rows, labels)
            except DiskFull:
                raise ConfigError(f"no room in {out}: free some space, then run the same command") from None
            except (BadFile, ValueError, OSError, torch.OutOfMemoryError) as error:
                failed, told = failed + 1, f"failed: {str(error).splitlines()[0]}"
            print(f"{number}/{len(latents)} {latent.name}  {told}", flush=True)
    finally:
        rows = {latent.name: rows[latent.name] for latent in latents if latent.name in rows}  # in the latents' order
        _write_table(out, rows, labels)
    result = {
        "command": " ".join(["python -m experiments.fixed_seed", *arguments]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device_name(device),
        "versions": {name: version(name) for name in ("torch", "diffusers")},
        "how": how,
        "clips": len(rows),
        "failed": failed,
        "scores": _summary(rows, labels),
    }
    write_atomically(out / ABOUT, lambda path: path.write_text(json.dumps(result, indent=1) + "\n"))
    return result, failed


def report(result: dict[str, Any]) -> str:
    """The means as a Markdown table."""
    labels = list(result["how"]["decoders"])
    lines = [
        [
            "decoder",
            "first frame against the image, dB",
            f"difference to {labels[0]}, dB",
            f"frames against {labels[0]}, dB",
        ]
    ]
    for label in labels:
        scores = result["scores"][label]
        lines.append([label, *(_shown(scores.get(key)) for key in (FIRST_FRAME, f"{FIRST_FRAME}_difference", AGAINST))])
    return f"{result['clips']} clips, the same latents; mean (95 % interval)\n\n" + markdown(lines)


# ---- one latent


def _decode_all(latent: Latent, chosen: Sequence[Chosen], config: FixedSeedConfig, out: Path) -> dict[str, Any]:
    """Decode a latent with every decoder and write the videos. Raises BadFile, ValueError (it does not fit), DiskFull."""
    values, header = load_latent(latent.path)
    sizes = [_size(choice, header) for choice in chosen]
    fps = config.fps or header.fps
    if not fps:
        raise ValueError("its metadata have no frame rate: give one, such as fps=16")
    image = latent.reference or find_reference(latent.path, header.image)
    row = _row(latent, header, image) | {"frames": sizes[0][0], "height": sizes[0][1], "width": sizes[0][2], "fps": fps}
    reference = load_reference(image, sizes[0][1:])[None] if image else None
    first = None
    for choice, size in zip(chosen, sizes, strict=True):
        if choice.uses_reference and reference is None:
            raise ValueError(f"{choice.label} looks at a reference, and there is no image beside the latent")
        device = next(choice.model.parameters()).device
        generator = torch.Generator(device).manual_seed(int(row["seed"]))
        given = None if reference is None else reference.to(device)
        video = choice.decode(values[None].to(device), size, given, generator)[0].cpu()
        frames = to_uint8(video)
        path = _video(out, choice.label, latent.name)
        write_atomically(path, lambda temporary, frames=frames: write_video(temporary, [frames], fps, config.crf))
        if reference is not None:
            row[f"{FIRST_FRAME}:{choice.label}"] = psnr(frames[:1], to_uint8(reference[0]))
        first = frames if first is None else first
        row[f"{AGAINST}:{choice.label}"] = psnr(frames, first)
    return row


def psnr(frames: Tensor, target: Tensor) -> float:
    """Mean over frames of the PSNR in dB of bytes "t h w 3"; 100 for equal frames."""
    errors = (frames.double() - target.double()).square().flatten(1).mean(1)
    each = [10 * math.log10(255**2 / error) if error else LARGEST_PSNR for error in errors.tolist()]
    return sum(each) / len(each)


def _size(choice: Chosen, header: LatentHeader) -> tuple[int, int, int]:
    """(t, h, w) of the video. Raises ValueError: these latents are not of the decoder's space, or of another size."""
    space = choice.space
    if header.channels != space.channels:
        raise ValueError(f"has {header.channels} channels, and latents of {choice.label}'s space {space.channels}")
    if header.space and header.space not in (space.fingerprint, space.name):
        raise ValueError(
            f"was saved in the space {header.space}; {choice.label}'s is {space.name} ({space.fingerprint})"
        )
    full = header.rows * space.stride_hw, header.columns * space.stride_hw
    height, width = header.height or full[0], header.width or full[1]
    if any(not 0 <= whole - said < space.stride_hw for said, whole in zip((height, width), full, strict=True)):
        raise ValueError(
            f"says {header.height}x{header.width} pixels, and {choice.label} would make {full[0]}x{full[1]}"
        )
    if any(side % choice.size_multiple for side in full) or height % 2 or width % 2:
        raise ValueError(
            f"is {height}x{width} pixels; {choice.label} takes multiples of {choice.size_multiple}, and H.264 even sides"
        )
    return header.num_frames or space.pixel_frames(header.frames), height, width


def _row(latent: Latent, header: LatentHeader, image: str) -> dict[str, Any]:
    seed = latent.row.get("seed") or header.seed
    try:
        seed = key_seed(latent.name, 0) if seed is None else int(seed)
    except ValueError:
        raise ValueError(f"the list's seed is {seed!r}, which is no whole number") from None
    return {
        "name": latent.name,
        "prompt": latent.row.get("prompt") or header.prompt,
        "index": latent.row.get("index") or "",
        "seed": seed % 2**64,
        "latent": os.path.abspath(latent.path),
        "reference": os.path.abspath(image) if image else "",
    }


# ---- files


def _video(out: Path, label: str, name: str) -> Path:
    return out / label / f"{name}.mp4"


def _is_done(latent: Latent, row: Mapping[str, Any], out: Path, labels: Sequence[str]) -> bool:
    """Whether all videos are there and younger than this latent, which may have been generated anew since."""
    videos = [_video(out, label, latent.name) for label in labels]
    if os.path.abspath(latent.path) != row["latent"] or not all(video.is_file() for video in videos):
        return False
    return min(video.stat().st_mtime_ns for video in videos) >= os.stat(latent.path).st_mtime_ns


def _rows(source: str) -> dict[str, Mapping[str, str]]:
    """Lines of a list of latents by absolute path; a folder's own list, where ``make generate`` wrote one."""
    path = Path(source).expanduser()
    path = path / "latents.csv" if path.is_dir() else path
    if path.suffix != ".csv" or not path.is_file():
        return {}
    with open(path, newline="", encoding="utf-8") as file:
        return {os.path.abspath(path.parent / row["path"]): row for row in csv.DictReader(file, skipinitialspace=True)}


def _earlier(out: Path, how: dict[str, Any], overwrite: bool) -> dict[str, dict[str, Any]]:
    """Lines of an earlier command by name, if it was run with the same weights. Raises ConfigError if not."""
    if overwrite or not (out / ABOUT).is_file():
        return {}
    try:
        then = json.loads((out / ABOUT).read_text())["how"]
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{out / ABOUT} is damaged: choose another out, or overwrite=true decodes all anew") from None
    for key in ("dtype", "crf", "fps"):
        if then.get(key) != how[key]:
            raise ConfigError(
                f"{out} holds videos of {key}={then.get(key)}: choose another out, or overwrite=true decodes all anew"
            )
    for label, about in how["decoders"].items():
        if then["decoders"].get(label, about)["weights"] != about["weights"]:
            raise ConfigError(
                f"{out} holds videos of other weights under {label}: choose another out or label, or overwrite=true decodes all anew"
            )
    if list(then["decoders"]) != list(how["decoders"]) or not (out / TABLE).is_file():
        return {}  # the table has other columns: decoded again
    with open(out / TABLE, newline="", encoding="utf-8") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def read_table(out: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Labels and lines of a finished ``fixed_seed``. Raises ConfigError: there is none."""
    try:
        about = json.loads((out / ABOUT).read_text())
        with open(out / TABLE, newline="", encoding="utf-8") as file:
            return list(about["how"]["decoders"]), list(csv.DictReader(file))
    except OSError:
        raise ConfigError(
            f"{out} holds no decoded pairs ({TABLE} is not there); make fixed-seed decodes them"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{out / ABOUT} is damaged ({error}); make fixed-seed overwrite=true writes it anew"
        ) from None


def _write_table(out: Path, rows: Mapping[str, dict[str, Any]], labels: Sequence[str]) -> None:
    columns = ["name", "prompt", "index", "seed", "frames", "height", "width", "fps", "latent", "reference"]
    columns += [f"{kind}:{label}" for kind in (FIRST_FRAME, AGAINST) for label in labels]
    write_table(out / TABLE, columns, rows.values())


# ---- what it comes to


def _summary(rows: Mapping[str, Mapping[str, Any]], labels: Sequence[str]) -> dict[str, dict[str, list[float | None]]]:
    """Label -> score -> [mean, low, high]; of the first frames also the paired difference to the first label."""
    found: dict[str, dict[str, list[float | None]]] = {}
    of = {label: _column(rows, f"{FIRST_FRAME}:{label}") for label in labels}
    for label in labels:
        scores = {FIRST_FRAME: of[label], AGAINST: _column(rows, f"{AGAINST}:{label}")}
        found[label] = {key: _finite(interval_of_mean(list(v.values()))) for key, v in scores.items() if v}
        if label != labels[0] and of[label]:
            found[label][f"{FIRST_FRAME}_difference"] = _finite(paired(of[label], of[labels[0]]))
    return found


def _column(rows: Mapping[str, Mapping[str, Any]], column: str) -> dict[str, float]:
    return {name: float(row[column]) for name, row in rows.items() if row.get(column) not in (None, "")}


def _finite(values: Sequence[float]) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values]


def _shown(values: Sequence[float | None] | None) -> str:
    if values is None:
        return ""
    mean, low, high = values
    return f"{mean:.2f}" + (f" ({low:.2f} to {high:.2f})" if low is not None else "")


def _told(row: Mapping[str, Any], chosen: Sequence[Chosen]) -> str:
    scores = [f"{c.label} {row[key]:.2f} dB" for c in chosen if (key := f"{FIRST_FRAME}:{c.label}") in row]
    return f"{row['frames']} frames of {row['height']}x{row['width']}" + (
        f"; first frame against the image: {', '.join(scores)}" if scores else ""
    )


def main(arguments: list[str]) -> int:
    renamed = [f"source={text[3:]}" if text.startswith("in=") else text for text in arguments]
    result, failed = fixed_seed(read_options(renamed, FixedSeedConfig), arguments)
    print(report(result))
    return int(failed > 0)


if __name__ == "__main__":
    run_cli(main)
