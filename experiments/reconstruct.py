"""Videos encoded and decoded with a run's weights: ``python -m experiments.reconstruct NAME in=VIDEOS out=FOLDER [key=value ...]``.

    in         a folder, a file, a glob or a .csv list of videos
    out        a folder: IN/a/b.mkv becomes OUT/a/b.mp4 (H.264, yuv420p), and OUT/reconstruct.csv lists every file, also those of
               earlier commands
    chunk      frames that are encoded and decoded at a time, each chunk by itself; default 17, or the nearest that the latent
               space encodes
    reference  of a decoder that looks at one: a number of a frame of the video, several (0,16), an image's path (the same
               for all videos), or none; default 0. All chunks see the same
    pad        replicate: sizes that the latent space cannot encode are padded by their last row and column, and the output
               cut back; default error
    weights, overwrite, crf, fps, device   as for decode; fps by default is the video's own

Everything else is an override of the experiment, as for decode. Memory does not grow with a
video's length: it is that of one chunk. A decoder that draws noise gets a generator of its own for each file, seeded from its
name. A file that cannot be decoded is told with the reason, and the next one is taken.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor

from datamodules.probe import inspect_video
from datamodules.replay import read_film
from datamodules.stills import load_reference, tell_fit
from decoders.base import VideoDecoder, key_seed
from decoders.chunks import default_chunk, reconstruct
from experiments.callbacks import to_uint8
from experiments.checkpoints import write_atomically
from experiments.compose import ConfigError, run_cli
from experiments.decode import (
    DecodeConfig,
    Job,
    Outcome,
    Unfit,
    find_jobs,
    open_decoder,
    run_jobs,
    split_options,
)
from experiments.train import quiet
from experiments.video_in import frames_at, pieces
from experiments.video_out import write_video
from metrics.image import Psnr

REPORT = "reconstruct.csv"
NONE = "none"


@dataclass
class ReconstructConfig(DecodeConfig):
    """The command's own options."""

    chunk: int | None = None
    reference: str | None = None
    pad: Literal["error", "replicate"] = "error"
    command: ClassVar[str] = "reconstruct"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"chunk={self.chunk} must be 1 or more")
        if self.frames is None and self.reference != NONE and not Path(self.reference).is_file():
            raise ValueError(f"reference={self.reference} is no image, no frame's number (several: 0,16) and not none")

    @property
    def frames(self) -> list[int] | None:
        """Numbers of the frames that are references; None: an image is, or nothing."""
        parts = "0" if self.reference is None else self.reference.strip("[]")
        numbers = [part.strip() for part in parts.split(",")]
        return [int(number) for number in numbers] if all(number.isdecimal() for number in numbers) else None


def run(name: str, config: ReconstructConfig, overrides: Sequence[str] = ()) -> list[Outcome]:
    """Reconstruct every video of ``config.source``, and list what became of it on the screen and in ``reconstruct.csv``.

    Raises:
        ConfigError: nothing can be decoded: no such run, no videos, a chunk that cannot be encoded, no room.
    """
    jobs = find_jobs(config, "video")
    decoder, autocast = open_decoder(name, overrides, config, f"{len(jobs)} videos")
    chunk = default_chunk(decoder.latent_space) if config.chunk is None else config.chunk
    try:
        decoder.latent_space.latent_frames(chunk)
    except ValueError as error:
        raise ConfigError(f"chunk={chunk}: {error}") from None
    if config.reference not in (None, NONE) and not looks(decoder):
        raise ConfigError(f"reference={config.reference}: {type(decoder).__name__} looks at no reference; leave it out")
    decoder.training_config.pad = config.pad
    return run_jobs(jobs, config, lambda job: reconstruct_file(decoder, job, config, chunk, autocast), REPORT, "source")


def looks(decoder: VideoDecoder) -> bool:
    """Whether references change what this decoder gives."""
    return bool(getattr(decoder.model, "uses_reference", False))


def reconstruct_file(decoder: VideoDecoder, job: Job, config: ReconstructConfig, chunk: int, autocast: bool) -> Outcome:
    """Reconstruct one video and write it. Raises BadFile, Unfit, DiskFull, and ValueError for a size that does not fit."""
    info, device = inspect_video(job.path), decoder.device
    size = info.height, info.width
    if info.height % 2 or info.width % 2:
        raise Unfit(f"is {info.height}x{info.width} pixels, and H.264 in yuv420p needs even sides")
    decoder.fitted(torch.empty(1, 3, chunk, *size, device="meta"))
    reference, shown = None, "no reference"
    if looks(decoder) and config.reference != NONE:
        reference, shown = _reference(job.path, info.num_frames, size, config)
        reference = reference.to(device)
    seed = key_seed(job.name, decoder.training_config.seed)
    generator = torch.Generator(device)
    generator.manual_seed(seed)
    scores: list[float] = []

    def decoded() -> Iterator[Tensor]:
        for piece in pieces(read_film(job.path), chunk):
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                video = reconstruct(decoder, piece.to(device), reference, chunk=chunk, generator=generator)
            scores.extend(Psnr()(video.float().cpu(), piece)[0].tolist())
            yield to_uint8(video[0].cpu())

    def write(path: Path) -> None:
        try:
            write_video(path, decoded(), config.fps or info.fps, config.crf)
        except BaseException:  # a film found damaged half way leaves nothing behind
            path.unlink(missing_ok=True)
            raise

    write_atomically(job.video, write)
    detail = (
        f"{len(scores)} frames of {info.height}x{info.width} in chunks of {chunk}, {config.fps or info.fps:g} fps, {shown}, "
        f"PSNR {sum(scores) / len(scores):.2f} dB"
    )
    return Outcome(job.path, str(job.video), "decoded", detail, seed, shown if reference is not None else "")


def _reference(path: str, num_frames: int, size: tuple[int, int], config: ReconstructConfig) -> tuple[Tensor, str]:
    """References "1 3 r h w", and what they are. Raises BadFile, Unfit."""
    numbers = config.frames
    if numbers is None:
        image = load_reference(config.reference, size)[None]
        return image, f"reference {config.reference}{tell_fit(config.reference, size)}"
    if max(numbers) >= num_frames:
        raise Unfit(
            f"has {num_frames} frames, 0 to {num_frames - 1}, and reference={config.reference} is outside of them"
        )
    video = frames_at(read_film(path), numbers)
    if isinstance(video, int):
        raise Unfit(
            f"says it has {num_frames} frames, but frame {video}, which is to be the reference, cannot be decoded"
        )
    return video, f"reference frame {', '.join(map(str, numbers))}"


def main(arguments: list[str]) -> int:
    if not arguments or "=" in arguments[0]:
        raise ConfigError("name an experiment: make reconstruct exp=NAME in=VIDEOS out=FOLDER (make list shows them)")
    name, *rest = arguments
    quiet()
    config, overrides = split_options(rest, ReconstructConfig)
    return int(any(outcome.outcome == "failed" for outcome in run(name, config, overrides)))


if __name__ == "__main__":
    run_cli(main)
