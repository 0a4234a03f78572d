"""Latents of a diffusers video pipeline, kept with their seeds: ``python -m experiments.generate pipeline= prompts= out=``.

    make generate pipeline=FOLDER prompts=prompts.txt out=latents
    make generate pipeline=Wan2.1-I2V-14B-480P-Diffusers prompts=vbench2_i2v_full_info.json images=data/crop/16-9 \
        dimensions=[i2v_subject] num_frames=17 out=latents          # RefDecoder's fixed-seed protocol, first half
    make fixed-seed in=latents/latents.csv decoders=[own,runs/refdecoder_wan21_clip17] pipeline=FOLDER out=decoded

    pipeline     a folder that save_pretrained wrote, over the autoencoder of Wan or LTX (experiments/pipeline_folder.py)
    prompts      .txt, .csv or a benchmark's .json (experiments/prompts.py); images= and dimensions= belong to it
    samples      videos of each prompt; default: what the benchmark's scorer reads, else 1
    seed         what the seeds are drawn from; a clip's seed depends on it, the prompt, the image's name and the index alone
    height, width, num_frames, steps, guidance, guidance_2, negative_prompt    of the pipeline's call; default: its own
    area         of pipelines that start from an image, unless height and width are given: pixels of a frame, with the image's
                 aspect ratio and sides floored (default 480 * 832, as RefDecoder's protocol)
    fps          of the video, as metadata; default: what the model makes (Wan 16, Wan 2.2 TI2V 24, LTX 25)
    dtype        bf16 or fp32, of transformer and text encoder; the autoencoder and the image encoder are in float32
    device, offload, overwrite

OUT gets a file per clip in the project's format (datamodules/latents.py): latents as the pipeline returns them for
``output_type="latent"``, normalised, with prompt, seed, size, frame rate and the latent space's fingerprint; the image that
the pipeline saw beside it, as the decoder's reference; ``latents.csv``, a list that ``decode``, ``fixed_seed`` and training
take as ``in``; and ``generate.json``. What is there is skipped, so that the same command goes on where it stopped; a command
with other settings is refused.
"""

import csv
import hashlib
import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

from datamodules.latents import inspect_latent, save_latent
from datamodules.probe import BadFile
from experiments import pipeline_folder
from experiments.bench import device_name, find_device
from experiments.bench_all import read_options
from experiments.checkpoints import DiskFull, write_atomically, write_table
from experiments.compose import ConfigError, run_cli
from experiments.measured import require_folder
from experiments.pipeline_folder import PipelineFolder
from experiments.prompts import Prompt, read_prompts

SETTINGS, LIST = "generate.json", "latents.csv"
COLUMNS = ("path", "reference", "prompt", "index", "seed", "negative_prompt")
ASPECT_STEP = 16  # sides of a size that is taken from an image are multiples of this at least
LONGEST_SLUG = 60


@dataclass
class GenerateConfig:
    """The command's options; the module says what they are."""

    pipeline: str = ""
    prompts: str = ""
    out: str = ""
    images: str | None = None
    dimensions: list[str] | None = None
    samples: int | None = None
    seed: int = 0
    height: int | None = None
    width: int | None = None
    area: int = 480 * 832
    num_frames: int | None = None
    steps: int | None = None
    guidance: float | None = None
    guidance_2: float | None = None  # of pipelines with two transformers
    negative_prompt: str | None = None
    fps: float | None = None
    dtype: Literal["bf16", "fp32"] = "bf16"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    offload: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        for key in ("pipeline", "prompts", "out"):
            if not getattr(self, key):
                raise ValueError(f"{key} is needed: make generate pipeline=FOLDER prompts=FILE out=FOLDER")
        if (self.height is None) != (self.width is None):
            raise ValueError("height and width are given together")
        for key in ("height", "width", "area", "num_frames", "steps", "samples"):
            if (value := getattr(self, key)) is not None and value < 1:
                raise ValueError(f"{key}={value} must be at least 1")
        if self.fps is not None and not 0 < self.fps <= 1000:
            raise ValueError(f"fps={self.fps} must lie in 0 to 1000")


@dataclass(frozen=True)
class Clip:
    """One latent that is to be made, and its file."""

    prompt: Prompt
    index: int
    seed: int
    path: Path

    @property
    def reference(self) -> Path:
        return self.path.with_suffix(".png")


def clips_of(prompts: Sequence[Prompt], config: GenerateConfig) -> list[Clip]:
    """Every sample of every prompt; sample 0 of all prompts first, so that what is there early covers all prompts."""
    clips = []
    for index in range(max(prompt.samples for prompt in prompts)):
        for prompt in prompts:
            if index < prompt.samples:
                path = Path(config.out).expanduser() / f"{_slug(prompt)}-{index}.safetensors"
                clips.append(Clip(prompt, index, prompt.seed_of(index, config.seed), path))
    return clips


def arguments_of(folder: PipelineFolder, config: GenerateConfig) -> dict[str, Any]:
    """What every call of the pipeline is given. Raises ConfigError for what this pipeline does not take."""
    wanted = {
        "height": config.height,
        "width": config.width,
        "num_frames": config.num_frames,
        "num_inference_steps": config.steps,
        "guidance_scale": config.guidance,
        "guidance_scale_2": config.guidance_2,
        "negative_prompt": config.negative_prompt,
        "frame_rate": config.fps if "frame_rate" in folder.defaults else None,  # LTX generates for a rate
    }
    given = {name: value for name, value in wanted.items() if value is not None}
    pipeline_folder.check_arguments(folder, given)
    return given


def generate(config: GenerateConfig) -> dict[str, int]:
    """Make the latents that are missing; how many were made, were there and failed.

    Raises:
        ConfigError: nothing can be made, or OUT holds latents of other settings.
    """
    device = find_device(config.device, "generate")
    folder = pipeline_folder.read_folder(config.pipeline)
    prompts = read_prompts(config.prompts, images=config.images, dimensions=config.dimensions, samples=config.samples)
    _check_images(folder, prompts)
    given = arguments_of(folder, config)
    clips = clips_of(prompts, config)
    if not (folder.takes_image and config.height is None):
        pipeline_folder.clip_size(folder, given)
    out = Path(config.out).expanduser()
    require_folder(out)
    settings = _settings(folder, config, given)
    _check_settings(out, settings, config.overwrite)
    there = [] if config.overwrite else [clip for clip in clips if clip.path.is_file()]
    _check_clips(out, there)
    todo = [clip for clip in clips if config.overwrite or not clip.path.is_file()]
    counts = {"made": 0, "there": len(there), "failed": 0}
    print(f"{len(clips)} clips of {len(prompts)} prompts, {counts['there']} are there; {device}, to {out}", flush=True)
    pipe = pipeline_folder.load_pipeline(folder, config.dtype, device, offload=config.offload) if todo else None
    if config.overwrite:  # what an interruption left would be taken for clips of these settings
        _remove(out, clips)
    about = settings | {
        "device": device_name(device),
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_atomically(out / SETTINGS, lambda path: path.write_text(json.dumps(about, indent=1) + "\n"))
    try:
        for number, clip in enumerate(todo, start=1):
            try:
                told = _make(pipe, folder, given, clip, config)
                counts["made"] += 1
                _write_list(out, clips)
            except DiskFull:
                raise ConfigError(f"no room in {out}: free some space, then run the same command") from None
            except (BadFile, torch.OutOfMemoryError, ValueError) as error:
                told = f"failed: {str(error).splitlines()[0]}"
                counts["failed"] += 1
            print(f"{number}/{len(todo)} {clip.path.name}  seed {clip.seed}  {told}", flush=True)
    finally:
        _write_list(out, clips)
    print(", ".join(f"{count} {kind}" for kind, count in counts.items()) + f"; {out / LIST}")
    return counts


def _make(pipe: Any, folder: PipelineFolder, given: dict[str, Any], clip: Clip, config: GenerateConfig) -> str:
    call = given | {"prompt": clip.prompt.text}
    if clip.prompt.negative:
        call["negative_prompt"] = clip.prompt.negative
    image = None
    if folder.takes_image:
        multiple = math.lcm(ASPECT_STEP, folder.size_multiple)
        size = (config.height, config.width)
        if config.height is None:
            size = pipeline_folder.size_of_image(clip.prompt.image, config.area, multiple)
        image = pipeline_folder.resized(clip.prompt.image, size)
        call |= {"image": image, "height": size[0], "width": size[1]}
    latent = pipeline_folder.call_latents(pipe, folder, call, clip.seed)
    height, width = (side * folder.space.stride_hw for side in latent.shape[2:])
    if image is not None:  # before the latent: a latent that is there has its reference
        write_atomically(clip.reference, lambda path: image.save(path, format="PNG"))
    fps = config.fps or folder.fps
    save_latent(
        clip.path,
        latent,
        space=folder.space.fingerprint,
        height=height,
        width=width,
        prompt=clip.prompt.text,
        seed=clip.seed,
        fps=fps,
    )
    return f"{folder.space.pixel_frames(latent.shape[1])} frames of {height}x{width}"


def _slug(prompt: Prompt) -> str:
    """A file's name for a prompt, whatever it holds."""
    plain = re.sub(r"[^A-Za-z0-9]+", "-", prompt.text)[:LONGEST_SLUG].strip("-")
    digest = hashlib.sha256(f"{prompt.text}\n{Path(prompt.image).name}".encode()).hexdigest()[:8]
    return f"{plain}-{digest}".lstrip("-")


def _check_images(folder: PipelineFolder, prompts: Sequence[Prompt]) -> None:
    without = sum(not prompt.image for prompt in prompts)
    if folder.takes_image and without:
        raise ConfigError(
            f"{folder.class_name} starts from images, and {without} of {len(prompts)} prompts have none: a .csv with a column "
            "image, or VBench-I2V's list"
        )
    if not folder.takes_image and without < len(prompts):
        raise ConfigError(
            f"{folder.class_name} takes no image, but the prompts name images; use an image-to-video pipeline"
        )


def _settings(folder: PipelineFolder, config: GenerateConfig, given: dict[str, Any]) -> dict[str, Any]:
    """What decides the values of the latents, besides the prompts."""
    area = config.area if folder.takes_image and config.height is None else None
    return {
        "pipeline": folder.identity(),
        "call": given,
        "area": area,
        "seed": config.seed,
        "dtype": config.dtype,
        "fps": config.fps or folder.fps,
    }


def _check_settings(out: Path, settings: dict[str, Any], overwrite: bool) -> None:
    file = out / SETTINGS
    if overwrite or not file.is_file():
        return
    try:
        before = json.loads(file.read_text())
    except ValueError:
        raise ConfigError(f"{file} is damaged: choose another out, or overwrite=true makes all anew") from None
    wanted = json.loads(json.dumps(settings))
    changed = [f"{key}: {before.get(key)} -> {value}" for key, value in wanted.items() if before.get(key) != value]
    if changed:
        raise ConfigError(
            f"{out} holds latents of other settings ({'; '.join(changed)}): choose another out, or overwrite=true makes all anew"
        )


def _check_clips(out: Path, there: Sequence[Clip]) -> None:
    """Raise ConfigError for latents that are there, but of another seed or negative prompt than the prompts file has now."""
    rows = _listed(out)
    for clip in there:
        try:
            seed = inspect_latent(str(clip.path)).seed
        except BadFile as error:
            raise ConfigError(f"{clip.path}: {error}; delete it, then run the same command") from None
        negative = rows.get(clip.path.name, {}).get("negative_prompt", clip.prompt.negative)
        for name, before, now in (("seed", seed, clip.seed), ("negative_prompt", negative, clip.prompt.negative)):
            if before != now:
                raise ConfigError(
                    f"{clip.path} is there with {name} {before!r}, not {now!r}: choose another out, or overwrite=true makes all anew"
                )


def _remove(out: Path, clips: Sequence[Clip]) -> None:
    """Clips that are to be made anew, and the list: latents of other prompts stay, but are of other settings."""
    for path in (out / LIST, *(path for clip in clips for path in (clip.path, clip.reference))):
        path.unlink(missing_ok=True)


def _listed(out: Path) -> dict[str, dict[str, Any]]:
    """Lines of ``latents.csv`` by file name, of latents that are there."""
    if not (out / LIST).is_file():
        return {}
    with open(out / LIST, newline="", encoding="utf-8") as file:
        return {row["path"]: row for row in csv.DictReader(file) if os.path.isfile(out / row["path"])}


def _write_list(out: Path, clips: Sequence[Clip]) -> None:
    """``latents.csv``: the clips that are there, of this command and of earlier ones."""
    rows = _listed(out)
    for clip in clips:
        if clip.path.is_file():
            rows[clip.path.name] = {
                "path": clip.path.name,
                "reference": clip.reference.name if clip.reference.is_file() else "",
                "prompt": clip.prompt.text,
                "index": clip.index,
                "seed": clip.seed,
                "negative_prompt": clip.prompt.negative,
            }
    write_table(out / LIST, COLUMNS, rows.values())


def main(arguments: list[str]) -> int:
    return int(generate(read_options(arguments, GenerateConfig))["failed"] > 0)


if __name__ == "__main__":
    run_cli(main)
