"""Decode saved latents with a run's weights: ``python -m experiments.decode NAME in=FOLDER out=FOLDER [key=value ...]``.

    in         a folder, a file, a glob or a .csv list of latents; datamodules/latents.py says how they are saved
    out        a folder: IN/a/b.safetensors becomes OUT/a/b.mp4 (H.264, yuv420p), and OUT/decode.csv lists every file, also
               those of earlier commands
    weights    ema, last or best; default: EMA if the run kept one, else last; start: those that its training starts from
    overwrite  true: also what is in OUT already; default: it is skipped, so the same command goes on where it stopped
    crf        quality of the H.264 stream, 0 (lossless) to 51; default 15
    fps        frames per second; default: what the latent's metadata say
    times      of a family that decodes at any time (REGEN): the frames that are wanted, in frames of the clip, in any order.
               times=[0,0.5,1,1.5,2] has frames between frames; numbers before 0 and after the last frame extrapolate
    device     cpu or cuda; default: cuda where there is one

Everything else is an override of the experiment, and part of the run's name as in training; objective.steps and
objective.extension (REGEN's sampler) that no run was trained with say how the run without them decodes. A decoder that draws noise gets
a generator of its own for each file, seeded from its metadata, and a decoder that looks at a reference the image
that lies beside the latent. A file that cannot be decoded is told with the reason, and the next one is taken.
"""

import csv
import inspect
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from math import isfinite
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from datamodules.config import SourceConfig
from datamodules.latents import LatentHeader, find_reference, load_latent
from datamodules.probe import BadFile
from datamodules.sources import SourceError, find_files
from datamodules.stills import load_reference, tell_fit
from decoders.base import VideoDecoder, key_seed
from experiments import weights as weights_of
from experiments.callbacks import to_uint8
from experiments.checkpoints import DiskFull, write_atomically, write_table
from experiments.compose import ConfigError, parse_overrides, run_cli
from experiments.config import check_own, load, require_paths
from experiments.runs import run_dir, run_name
from experiments.train import build, choose_precision, quiet
from experiments.video_out import write_video

REPORT = "decode.csv"
HOW = ("objective.steps=", "objective.extension=")  # a run decodes so, and learns nothing by it


@dataclass
class DecodeConfig:
    """The command's own options; ``source`` is what is typed as ``in``."""

    source: str = ""
    out: str = ""
    weights: str | None = None
    overwrite: bool = False
    crf: int = 15
    fps: float | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    times: list[float] | None = None
    command: ClassVar[str] = "decode"

    def __post_init__(self) -> None:
        if not self.source or not self.out:
            raise ValueError(
                f"{'out' if self.source else 'in'}=FOLDER is needed: make {self.command} exp=NAME in=... out=..."
            )
        weights_of.check_kind(self.weights)
        if not 0 <= self.crf <= 51:
            raise ValueError(f"crf={self.crf} must lie in 0 (lossless) to 51")
        if self.fps is not None and not 0 < self.fps <= 1000:
            raise ValueError(f"fps={self.fps} must be positive")
        if self.times is not None and self.command != "decode":
            raise ValueError(
                f"times: {self.command} gives the frames that it encodes; make decode takes times, of saved latents"
            )
        if self.times is not None and not (self.times and all(map(isfinite, self.times))):
            raise ValueError("times must be one or more finite numbers, in frames of the clip, such as [0,0.5,1]")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device=cuda, but there is no CUDA device")


@dataclass(frozen=True)
class Job:
    """A latent's file and the video that is to be made of it. ``seed`` and ``reference`` are those of a CSV list."""

    name: str
    path: str
    video: Path
    reference: str = ""
    seed: str = ""


@dataclass
class Outcome:
    """What became of a file: decoded, exists or failed; a row of the report."""

    latent: str
    video: str
    outcome: str
    detail: str = ""
    seed: int | None = None
    reference: str = ""


class Unfit(ValueError):
    """A sound file that this decoder cannot decode."""


def split_options(arguments: Sequence[str], kind: type[DecodeConfig] = DecodeConfig) -> tuple[DecodeConfig, list[str]]:
    """The command's own options, and the overrides of the experiment. Raises ConfigError."""
    own = {field.name for field in fields(kind)} - {"source"} | {"in"}
    check_own(arguments, own)
    typed = [argument.partition("=") for argument in arguments]
    values = {"source" if key == "in" else key: text for key, equals, text in typed if equals and key in own}
    if "times" in values:
        values |= parse_overrides([f"times={values['times']}"])
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), values))
    except (OmegaConfBaseException, ValueError) as error:
        key = getattr(error, "full_key", None)
        raise ConfigError(f"{key}: {str(error).splitlines()[0]}" if key else str(error).splitlines()[0]) from None
    return config, [text for text in arguments if text.partition("=")[0] not in own]


def find_jobs(config: DecodeConfig, kind: str = "latent") -> list[Job]:
    """Every file of this kind (SourceConfig.kind) of ``in``, and its video's place in ``out``. Raises ConfigError."""
    try:
        files = find_files("in", SourceConfig(config.source, kind=kind))
    except SourceError as error:
        raise ConfigError(str(error).replace("data.sources.in.path", "in").replace("data.sources.in", "in")) from None
    jobs: dict[Path, Job] = {}
    for file in files:
        name = os.path.normpath(file.name.removeprefix("in/"))
        if os.path.isabs(name) or name.startswith(".."):  # a list may name files anywhere
            name = os.path.basename(name)
        video = Path(config.out) / (os.path.splitext(name)[0] + ".mp4")
        if video in jobs:
            raise ConfigError(f"in: {jobs[video].path} and {file.path} would both become {video}; rename one of them")
        jobs[video] = Job(name, file.path, video, file.reference, file.seed)
    return list(jobs.values())


def load_decoder(name: str, overrides: Sequence[str], weights: str | None, device: str) -> tuple[VideoDecoder, str]:
    """The run's decoder with its trained weights, and where they are from. The run's data need not be there."""
    experiment = load(name, overrides)
    experiment.data.train, experiment.data.val = {}, {}
    require_paths(experiment)
    file = weights_of.find(experiment, _run(name, overrides), weights)
    experiment.ema = None  # the file holds one set of weights
    decoder = build(experiment)
    about = weights_of.fill(decoder, experiment, file, weights)
    return decoder.eval().to(device), f"{file or about['file']} (step {about['step']})"


def _run(name: str, overrides: Sequence[str]) -> str:
    """The run of these overrides, else the one that was trained without those that only say how it decodes."""
    if run_dir(name, overrides).is_dir():
        return run_name(name, overrides)
    return run_name(name, [text for text in overrides if not text.startswith(HOW)])


def check_fit(decoder: VideoDecoder, header: LatentHeader) -> tuple[int, int, int]:
    """(t, h, w) of the video that a latent becomes, less what was padded to encode it. Raises Unfit."""
    space = decoder.latent_space
    if header.channels != space.channels:
        raise Unfit(f"has {header.channels} channels, and latents of this run's space, {space.name}, {space.channels}")
    if header.space and header.space not in (space.fingerprint, space.name):
        raise Unfit(f"was saved in the space {header.space}; this run's is {space.name} ({space.fingerprint})")
    full = header.rows * space.stride_hw, header.columns * space.stride_hw
    height, width = header.height or full[0], header.width or full[1]
    if any(not 0 <= whole - said < space.stride_hw for said, whole in zip((height, width), full, strict=True)):
        raise Unfit(
            f"says it is {header.height}x{header.width} pixels, but {header.rows}x{header.columns} latent pixels of this "
            f"run's space, {space.name}, are {full[0]}x{full[1]}"
        )
    multiple = decoder.size_multiple
    if full[0] % multiple or full[1] % multiple:
        raise Unfit(f"is {full[0]}x{full[1]} pixels, and this decoder takes multiples of {multiple}")
    if height % 2 or width % 2:
        raise Unfit(f"is {height}x{width} pixels, and H.264 in yuv420p needs even sides")
    frames = space.pixel_frames(header.frames)
    if header.num_frames > frames:
        raise Unfit(f"says it has {header.num_frames} frames, but {header.frames} latent frames are {frames}")
    return header.num_frames or frames, height, width


@torch.no_grad()
def decode_file(decoder: VideoDecoder, job: Job, config: DecodeConfig, autocast: bool) -> Outcome:
    """Decode one latent and write its video. Raises BadFile, Unfit, DiskFull."""
    latent, header = load_latent(job.path)
    t, height, width = check_fit(decoder, header)
    fps = config.fps or header.fps
    if not fps:
        raise Unfit("its metadata have no frame rate: give one, such as fps=16")
    path = job.reference or find_reference(job.path, header.image)
    device = decoder.device
    reference = load_reference(path, (height, width))[None].to(device) if path else None
    seed = _seed(job, header, decoder.training_config.seed)
    generator = torch.Generator(device)
    generator.manual_seed(seed)
    given: dict[str, Any] = {"reference": reference, "generator": generator}
    if config.times is not None:
        t, given["times"] = len(config.times), config.times
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        video = decoder.decode(latent[None].to(device), size=(t, height, width), **given)
    frames = to_uint8(video[0].cpu())
    write_atomically(job.video, lambda temporary: write_video(temporary, [frames], fps, config.crf))
    when = f" at times {min(config.times):g} to {max(config.times):g}" if config.times else ""
    shown = f"{t} frames of {height}x{width}{when}, {fps:g} fps, seed {seed}, " + (
        f"reference {path}{tell_fit(path, (height, width))}" if path else "no reference"
    )
    return Outcome(job.path, str(job.video), "decoded", shown, seed, path)


def _seed(job: Job, header: LatentHeader, run_seed: int) -> int:
    """The list's, else the file's own, else one that depends on the file's name alone."""
    try:
        seed = int(job.seed) if job.seed else header.seed
    except ValueError:
        raise Unfit(f"the list's seed is {job.seed!r}, which is no whole number") from None
    if seed is not None and not 0 <= seed < 2**64:
        raise Unfit(f"its seed {seed} is outside of 0 to 2^64 - 1")
    return key_seed(job.name, run_seed) if seed is None else seed


def decode(name: str, config: DecodeConfig, overrides: Sequence[str] = ()) -> list[Outcome]:
    """Decode every latent of ``config.source`` and list what became of it, on the screen and in ``decode.csv``.

    Raises:
        ConfigError: nothing can be decoded: no such run, no latents, no room.
    """
    jobs = find_jobs(config)
    decoder, autocast = open_decoder(name, overrides, config, f"{len(jobs)} latents")
    check_times(decoder, config)
    return run_jobs(jobs, config, lambda job: decode_file(decoder, job, config, autocast), REPORT)


def open_decoder(name: str, overrides: Sequence[str], config: DecodeConfig, what: str) -> tuple[VideoDecoder, bool]:
    """The decoder on its device, and whether it runs under bf16 autocast; says so. ``what``: is to be decoded."""
    device = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    decoder, about = load_decoder(name, overrides, config.weights, device)
    autocast = choose_precision(load(name, overrides).trainer.precision, device) == "bf16-mixed"
    print(f"{about}\n{what}, {device}, {'bf16-mixed' if autocast else '32-true'}, to {config.out}", flush=True)
    return decoder, autocast


def check_times(decoder: VideoDecoder, config: DecodeConfig) -> None:
    """Raise ConfigError where times are asked of a decoder that has none."""
    if config.times is not None and "times" not in inspect.signature(decoder.decode).parameters:
        raise ConfigError(
            f"times: {type(decoder).__name__} decodes the frames that were encoded and no others; leave times out, or take "
            "a run of decoders.regen.Regen"
        )


def run_jobs(
    jobs: Sequence[Job], config: DecodeConfig, one: Callable[[Job], Outcome], report: str, column: str = "latent"
) -> list[Outcome]:
    """Do ``one`` for every job, and write ``report``, in which ``column`` is what was read. Raises ConfigError: no room.

    What an earlier report says of videos that are left as they are is kept.
    """
    place = Path(config.out) / report
    before = _read_report(place, column)
    outcomes: list[Outcome] = []
    try:
        for job in jobs:
            found = _attempt(job, config, one)
            print(f"{found.outcome:8}{job.name}  {found.detail}", flush=True)
            if found.outcome == "exists" and (made := before.get(os.path.abspath(job.video))):
                found = replace(made, latent=found.latent, video=found.video, outcome="exists")
                print(f"        it is: {found.detail}", flush=True)
            outcomes.append(found)
    except BaseException:  # interrupted, no room: what was done is listed even so
        with suppress(DiskFull, OSError):
            _write_report(place, outcomes, before, column)
        raise
    _write_report(place, outcomes, before, column)
    counts = {kind: sum(o.outcome == kind for o in outcomes) for kind in ("decoded", "exists", "failed")}
    print(", ".join(f"{count} {kind}" for kind, count in counts.items()) + f"; {Path(config.out) / report}")
    return outcomes


def _attempt(job: Job, config: DecodeConfig, one: Callable[[Job], Outcome]) -> Outcome:
    if job.video.exists() and not config.overwrite:
        return Outcome(job.path, str(job.video), "exists", "overwrite=true decodes it again")
    try:
        return one(job)
    except DiskFull:
        raise ConfigError(
            f"no room to write {job.video}; what is in {config.out} is whole: free some space, then run the same command"
        ) from None
    except torch.OutOfMemoryError as error:
        return Outcome(job.path, str(job.video), "failed", str(error).splitlines()[0])
    except (BadFile, ValueError, OSError) as error:
        where = f"{error.path}: " if isinstance(error, BadFile) and error.path not in ("", job.path) else ""
        return Outcome(job.path, str(job.video), "failed", where + str(error))


def _read_report(path: Path, column: str) -> dict[str, Outcome]:
    """What an earlier report says of videos that it made and that are still there, by their absolute paths."""
    if not path.is_file():
        return {}
    found = {}
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row.get("outcome") in ("decoded", "exists") and os.path.exists(row.get("video") or ""):
                seed = int(row["seed"]) if row.get("seed") else None
                about = (row["video"], row["outcome"], row.get("detail") or "", seed, row.get("reference") or "")
                found[os.path.abspath(row["video"])] = Outcome(row.get(column) or "", *about)
    return found


def _write_report(path: Path, outcomes: list[Outcome], before: dict[str, Outcome], column: str) -> None:
    """This command's outcomes, then those of other videos ``before``."""
    now = {os.path.abspath(outcome.video): outcome for outcome in outcomes}
    names = {"latent": column}
    columns = [names.get(field.name, field.name) for field in fields(Outcome)]
    every = (now | {path: made for path, made in before.items() if path not in now}).values()
    write_table(path, columns, [{names.get(key, key): value for key, value in asdict(one).items()} for one in every])


def main(arguments: list[str]) -> int:
    if not arguments or "=" in arguments[0]:
        raise ConfigError("name an experiment: make decode exp=NAME in=FOLDER out=FOLDER (make list shows them)")
    name, *rest = arguments
    quiet()
    config, overrides = split_options(rest)
    return int(any(outcome.outcome == "failed" for outcome in decode(name, config, overrides)))


if __name__ == "__main__":
    run_cli(main)
