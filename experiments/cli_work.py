"""The work of ``experiments/cli.py`` on one file: encode, decode, reconstruct. Frames and latents go through a few at a time."""

import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from datamodules.faults import BadFile
from datamodules.latent_stream import LatentReader, LatentWriter
from datamodules.latents import find_reference
from datamodules.stills import load_reference, tell_fit
from datamodules.transforms import to_video
from decoders.exported import Exported, ExportError, load
from experiments import cli_coding as coding
from experiments.cli_checks import (
    NONE,
    check_audio,
    check_numbers,
    check_sampling,
    device_of,
    has_sound,
    metrics_of,
)
from experiments.cli_files import Job, UsageError
from experiments.video_in import Film, frames_at, open_film
from experiments.video_out import Sink, png_folder, raw_pipe, video_file

SCORED = 8  # frames that are compared at a time
RECONSTRUCTED = (
    17  # frames of a chunk where encoder or decoder has no stream, as RefDecoder's released inference has it
)
One = Callable[[Job], dict[str, Any]]


def prepare(options: Namespace) -> tuple[One, Exported]:
    """What does one job, and the model. Raises UsageError for what cannot work for any file."""
    device = device_of(options)
    metrics = metrics_of(options) if options.command == "reconstruct" else []
    check_numbers(options)
    if options.command == "decode":
        check_audio(options.audio)
    model = load_model(options)
    sampling = check_sampling(model, options) if options.command != "encode" else {}
    wanted = getattr(options, "reference", None)
    if wanted not in (None, NONE) and not model.uses_reference:
        raise UsageError(f"--reference {wanted}: {model.family} looks at no reference; leave it out")
    if options.command == "decode":
        return (lambda job: decode(job, model, options, sampling)), model
    try:
        if options.chunk is not None:
            model.space.latent_frames(options.chunk)  # names the nearest that are
        whole = (
            model.family == "backbones" and not model.can_encode
        )  # an autoencoder's folder, of which load takes the decoder
        source = options.encoder or (options.model if whole else None)
        encoder = coding.find_encoder(model, source, device, options.any_space)
        if options.command == "encode" and options.raw and model.space.mean is None:
            raise ExportError(
                f"--raw: the {model.space.name} space states no mean and std: its latents are as they are"
            )
    except (ExportError, ValueError) as error:
        raise UsageError(str(error)) from None
    if options.command == "encode":
        return (lambda job: encode(job, encoder, model, options)), model
    return (lambda job: reconstruct(job, encoder, model, options, metrics, sampling)), model


def load_model(options: Namespace) -> Exported:
    """Raises UsageError."""
    name = getattr(options, "model", None) or options.what
    try:
        dtype = getattr(torch, options.dtype)
        return load(name, dtype=dtype, device=device_of(options), revision=options.revision)
    except (ExportError, FileNotFoundError) as error:
        raise UsageError(f"{name}: {error}".replace(f"{name}: {name}", name)) from None


# ---- one file


def encode(job: Job, encoder: coding.Encoder, model: Exported, options: Namespace) -> dict[str, Any]:
    """A video's latents. Raises BadFile, ExportError, OSError."""
    film = open_film(job.source, options.fps)
    space = model.space
    _tell_padding(film, model, options)
    chunk = _chunk(encoder, film, options)
    about = {"space": space.fingerprint, "normalised": str(not options.raw).lower(), "fps": f"{film.fps:.6g}"}
    about |= {"height": str(film.height), "width": str(film.width), "frames": str(film.num_frames)}
    if options.raw:
        about |= {"mean": str(list(space.mean)), "std": str(list(space.std))}
    if film.seconds is not None:
        about["seconds"] = str([round(second, 6) for second in film.seconds])
    if chunk is not None and chunk < film.num_frames:
        about["piece"] = str(space.latent_frames(chunk))
    with _progress(job, film.num_frames, options) as bar, LatentWriter(job.target, about) as writer:
        frames = _counted(film.frames(), bar)
        for part in coding.encoded(encoder, frames, film.num_frames, model.size_multiple, chunk):
            latent = space.denormalise(part.latent) if options.raw else part.latent
            writer.write(latent[0])
        _use_up(frames)
    return {"frames": film.num_frames, "latent_frames": writer.num_latent_frames}


def decode(job: Job, model: Exported, options: Namespace, sampling: Mapping[str, Any]) -> dict[str, Any]:
    """A file of latents as video. Raises BadFile, ExportError, OutputError, OSError."""
    space = model.space
    statistics = None if space.mean is None else (space.mean, space.std)
    reader = LatentReader(job.source, options.assume, statistics)
    _check_latents(reader, model, options)
    h = reader.header
    size = h.height or h.rows * space.stride_hw, h.width or h.columns * space.stride_hw
    lengths = _pieces(h.frames, reader.piece)
    total = reader.num_frames or sum(space.pixel_frames(n) for n in lengths)
    fps = options.fps or h.fps
    if not fps and job.form == "video":
        raise BadFile("its metadata have no frame rate: give one, such as --fps 16")
    reference = _image(model, options, find_reference(job.source, h.image), size)
    seed = options.seed if options.seed is not None else h.seed or 0
    whole = tuple(side * space.stride_hw for side in (h.rows, h.columns))
    if "times" in sampling:
        if len(lengths) > 1:
            raise BadFile("is coded in pieces, whose times are not those of one clip: encode it without --chunk")
        latent, total = reader.read(0, h.frames)[None], len(sampling["times"])
        frames = coding.at_once(model, latent, reference, seed, sampling)
    elif model.streams(sampling):
        starts = {sum(lengths[:i]) for i in range(len(lengths))}
        parts = (coding.Part(latent[None], number in starts) for number, latent in enumerate(reader))
        frames = coding.streamed(model, parts, whole, reference, seed, sampling)
    else:
        frames = _windows(model, reader, lengths, whole, reference, seed, options, sampling)
    seconds = None if options.fps or "times" in sampling else reader.seconds
    written = 0
    with _progress(job, total, options) as bar, _sink(job, fps or 1, options, _sound(options.audio, options)) as sink:
        for piece in coding.limited(frames, total):
            piece = piece[:, : size[0], : size[1]]
            if written == 0 and job.form == "raw":
                _tell(
                    options,
                    f"raw RGB: {total} frames, -pixel_format rgb24 -video_size {size[1]}x{size[0]} -framerate {fps or '?'}",
                )
            sink.write(piece, None if seconds is None else seconds[written : written + len(piece)])
            written += len(piece)
            bar.update(len(piece))
    return {"frames": written}


def reconstruct(
    job: Job,
    encoder: coding.Encoder,
    model: Exported,
    options: Namespace,
    metrics: list[Any],
    sampling: Mapping[str, Any],
) -> dict[str, Any]:
    """A video encoded, decoded, written and scored. Raises BadFile, ExportError, OutputError, OSError."""
    film = open_film(job.source, options.fps)
    _tell_padding(film, model, options)
    chunk = _chunk(encoder, film, options, alone=not model.streams(sampling))
    reference = _reference(film, model, options)
    size = film.height, film.width
    multiple = model.size_multiple
    whole = tuple(-(-side // multiple) * multiple for side in size)
    scores: dict[str, list[float]] = {metric.name: [] for metric in metrics}
    truth = _Kept(film.frames(), keep=bool(metrics))
    parts = coding.encoded(encoder, truth, film.num_frames, multiple, chunk)
    seed = options.seed or 0
    frames = (
        coding.streamed(model, parts, whole, reference, seed, sampling)
        if model.streams(sampling)
        else _alone(model, parts, whole, reference, seed, sampling)
    )
    written = 0
    audio = _sound(job.source if options.audio else None, options)
    with _progress(job, film.num_frames, options) as bar, _sink(job, film.fps, options, audio) as sink:
        for piece in coding.limited(frames, film.num_frames):
            piece = piece[:, : size[0], : size[1]]
            seconds = None if film.seconds is None else film.seconds[written : written + len(piece)]
            sink.write(piece, seconds)
            if metrics:
                _score(metrics, piece, truth.take(len(piece)), scores)
            written += len(piece)
            bar.update(len(piece))
        _use_up(truth)
    found = {metric.name: metric.clip_score(torch.tensor(scores[metric.name])) for metric in metrics}
    return {"frames": written, "scores": found}


def _alone(
    model: Exported,
    parts: Iterable[coding.Part],
    size: tuple[int, int],
    reference: Tensor | None,
    seed: int,
    sampling: Mapping[str, Any],
) -> Iterator[np.ndarray]:
    """Every part decoded by itself: chunks of a video through a decoder without a stream."""
    for number, part in enumerate(parts):
        n = part.latent.shape[2]
        yield from coding.windowed(
            model, lambda a, b, part=part: part.latent[:, :, a:b], n, size, reference, seed + number, 0, sampling
        )


def _windows(
    model: Exported,
    reader: LatentReader,
    lengths: list[int],
    size: tuple[int, int],
    reference: Tensor | None,
    seed: int,
    options: Namespace,
    sampling: Mapping[str, Any],
) -> Iterator[np.ndarray]:
    if options.window and max(lengths) > options.window:
        _tell(
            options,
            f"{model.family} does not stream: {options.window} latent frames are decoded at a time with {coding.CONTEXT} around them, "
            "close to the whole clip; --window 0 decodes all at once, in as much memory as that takes",
        )
    start = 0
    for n in lengths:
        read = lambda a, b, start=start: reader.read(start + a, start + b)[None]  # noqa: E731
        yield from coding.windowed(model, read, n, size, reference, seed + start, options.window, sampling)
        start += n


def _pieces(n: int, piece: int) -> list[int]:
    """Latent frames of every piece of a file."""
    return [min(piece, n - start) for start in range(0, n, piece)] if piece else [n]


class _Kept:
    """A film's frames, of which those that were taken to be encoded are kept until their decoded ones can be compared."""

    def __init__(self, frames: Iterator[np.ndarray], keep: bool) -> None:
        self._frames, self._keep = frames, keep
        self._waiting: list[np.ndarray] = []

    def __iter__(self) -> "_Kept":
        return self

    def __next__(self) -> np.ndarray:
        frame = next(self._frames)
        if self._keep:
            self._waiting.append(frame)
        return frame

    def take(self, num: int) -> np.ndarray:
        taken, self._waiting = self._waiting[:num], self._waiting[num:]
        return np.stack(taken)


def _score(metrics: list[Any], piece: np.ndarray, truth: np.ndarray, scores: dict[str, list[float]]) -> None:
    for start in range(0, len(piece), SCORED):
        pair = [to_video(frames[start : start + SCORED])[None] for frames in (piece, truth)]
        for metric in metrics:
            scores[metric.name] += metric(*pair)[0].tolist()


# ---- what is checked, and told


def _check_latents(reader: LatentReader, model: Exported, options: Namespace) -> None:
    """Raise BadFile for latents that this model does not read."""
    h, space = reader.header, model.space
    if h.channels != space.channels:
        raise BadFile(f"has {h.channels} channels, and latents of this decoder's space, {space.name}, {space.channels}")
    if h.space and not options.any_space and h.space not in (space.fingerprint, space.name):
        raise BadFile(
            f"was made in the space {h.space}, and this decoder reads {space.name} ({space.fingerprint}): take the decoder of its "
            "space, or say --any-space if the two are the same after all"
        )
    whole = h.rows * space.stride_hw, h.columns * space.stride_hw
    said = h.height or whole[0], h.width or whole[1]
    if any(real > full for real, full in zip(said, whole, strict=True)):
        raise BadFile(
            f"says it is {said[0]}x{said[1]} pixels, and {h.rows}x{h.columns} latent pixels are {whole[0]}x{whole[1]}"
        )
    if any(side % model.size_multiple for side in whole):
        raise BadFile(
            f"is {whole[0]}x{whole[1]} pixels, and this decoder takes multiples of {model.size_multiple}: encode the video with this "
            "decoder named as the model, which pads it"
        )
    lengths = _pieces(h.frames, reader.piece)
    most = sum(space.pixel_frames(n) for n in lengths)
    if reader.num_frames > most:
        raise BadFile(f"says it has {reader.num_frames} frames, and {h.frames} latent frames are {most}")
    if options.assume is None:
        try:
            space.check_latent(reader.sample()[None])
        except ExportError as error:
            raise BadFile(f"{error} (--assume raw, or --assume normalised)") from None


def _chunk(encoder: coding.Encoder, film: Film, options: Namespace, alone: bool = False) -> int | None:
    """Frames that are coded as clips by themselves; None: the video is one clip. Raises UsageError, ExportError."""
    if options.chunk is not None:
        return options.chunk
    if coding.streams_encoding(encoder) and not alone:
        return None
    longest = RECONSTRUCTED if options.command == "reconstruct" else coding.LONGEST_CLIP
    chunk = coding.valid_length(encoder.space, longest)
    if chunk < film.num_frames:
        _tell(options, f"{film.path}: coded in chunks of {chunk} frames, each a clip by itself (--chunk)")
    return chunk


def _reference(film: Film, model: Exported, options: Namespace) -> Tensor | None:
    """What a decoder looks at while a video is reconstructed: by default its first frame."""
    wanted = "0" if options.reference is None else options.reference.strip("[]")
    numbers = [text.strip() for text in wanted.split(",")]
    if not model.uses_reference or wanted == NONE or not all(text.isdecimal() for text in numbers):
        return _image(model, options, "", (film.height, film.width))
    found = frames_at(film.frames(), [int(text) for text in numbers])
    if isinstance(found, int):
        raise BadFile(
            f"has {film.num_frames} frames, 0 to {film.num_frames - 1}, and --reference asks for number {found}"
        )
    return coding.padded(found, model.size_multiple).to(model.device)


def _image(model: Exported, options: Namespace, beside: str, size: tuple[int, int]) -> Tensor | None:
    """The reference image "1 3 1 h w" that is named, or lies beside the latents. Raises BadFile, ExportError."""
    path = beside if options.reference is None else options.reference
    if path == NONE or not path or not model.uses_reference:
        return None
    if (fit := tell_fit(path, size)) != "":
        _tell(options, f"reference {path}{fit}")
    return coding.padded(load_reference(path, size)[None], model.size_multiple).to(model.device)


def _tell_padding(film: Film, model: Exported, options: Namespace) -> None:
    multiple = model.size_multiple
    if film.height % multiple or film.width % multiple:
        up = tuple(-(-side // multiple) * multiple for side in (film.height, film.width))
        _tell(
            options,
            f"{film.path}: {film.height}x{film.width} is padded to {up[0]}x{up[1]}, multiples of {multiple}, and cut back when decoded",
        )
    if film.pixel != 1:
        _tell(options, f"{film.path}: its pixels are {film.pixel} as wide as high; those that are decoded are square")
    if film.seconds is not None:
        _tell(options, f"{film.path}: its frame rate varies; the time of every frame is kept (--fps makes it even)")


def _sink(job: Job, fps: float, options: Namespace, audio: str | None) -> AbstractContextManager[Sink]:
    if job.form == "raw":
        return raw_pipe(job.target)
    if job.form == "png":
        return png_folder(Path(job.target))
    return video_file(Path(job.target), fps, options.codec, options.crf, audio)


def _sound(path: str | None, options: Namespace) -> str | None:
    """Whose audio is copied; None: nobody's, which is told where it was asked for."""
    if path is None or has_sound(path):
        return path
    _tell(options, f"{path}: it has no sound; the video is written without")
    return None


def _progress(job: Job, total: int, options: Namespace) -> tqdm:
    quiet = options.quiet or not sys.stderr.isatty()
    return tqdm(
        total=total, desc=Path(job.source).name, unit="frame", file=sys.stderr, disable=quiet, dynamic_ncols=True
    )


def _counted(frames: Iterable[np.ndarray], bar: tqdm) -> Iterator[np.ndarray]:
    for frame in frames:
        yield frame
        bar.update()


def _use_up(frames: Iterable[np.ndarray]) -> None:
    """Let a film's reader come to its end, where it finds out whether there was too much or too little."""
    for _ in frames:
        pass


def _tell(options: Namespace, line: str) -> None:
    if not options.quiet:
        print(line, file=sys.stderr, flush=True)
