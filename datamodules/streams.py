"""A stream: all clips of one size, numbered. What does not fit is left out here, and counted."""

import logging
import math
import zlib
from dataclasses import InitVar, dataclass, field, replace
from functools import cached_property

import numpy as np

from datamodules.buckets import expand, longest_only, nearest_size
from datamodules.config import StreamConfig
from datamodules.index import SourceIndex
from datamodules.latent_cache import digest_of
from datamodules.reader import ClipRequest
from datamodules.transforms import fits
from datamodules.triples import ANY_LENGTH

log = logging.getLogger(__name__)
RATE_TOLERANCE = 1e-3  # 29.97 counts as 30
NOWHERE, ELSEWHERE, HERE = range(3)  # what a bucket says of a file: it fits none of the stream's, another, or this one


class StreamError(ValueError):
    """Sources and settings that make no stream together."""


class EmptyStream(StreamError):
    """No file of a stream's sources fits its size, length and frame rate."""


def _name_seed(name: str) -> int:
    return zlib.crc32(name.encode())


def build_streams(name: str, config: StreamConfig, sources: list[SourceIndex], where: str) -> dict[str, "Stream"]:
    """The stream of that config; of one with buckets a stream for each that has films, their shares summing to the config's.

    Raises StreamError, and EmptyStream where no file fits anything.
    """
    parts = expand(config)
    if config.buckets is None:
        return {name: Stream(name, config, sources, where)}
    places = [_buckets_of(index, list(parts.values()), config) for index in sources]
    streams, empty = {}, []
    for i, (part, one) in enumerate(parts.items()):
        if any((place[i] == HERE).any() for place in places):
            streams[name + part] = Stream(name + part, one, sources, where + part, [place[i] for place in places])
        else:
            empty.append(part[1:])
    if not streams:
        smallest = min(parts, key=lambda part: math.prod(parts[part].size) * parts[part].total_frames)
        Stream(name + smallest, parts[smallest], sources, where + smallest)  # says why: nothing fits
        raise AssertionError("a film that fits a bucket was put into none")
    if empty:
        log.warning("%s: no film for its buckets %s: they get no steps", where, ", ".join(empty))
    weights = {part: len(stream) / stream.config.batch_size for part, stream in streams.items()}
    for part, stream in streams.items():
        stream.config = replace(stream.config, share=config.share * weights[part] / sum(weights.values()))
    return streams


def _buckets_of(index: SourceIndex, parts: list[StreamConfig], config: StreamConfig) -> np.ndarray:
    """NOWHERE, ELSEWHERE or HERE for every bucket and file [buckets, files]."""
    sizes, lengths = (
        list(dict.fromkeys(values)) for values in zip(*((p.size, p.num_frames) for p in parts), strict=True)
    )
    filled = [fits(index.height, index.width, size, config.resize) for size in sizes]
    size_of = nearest_size(index.height, index.width, sizes, filled, config.buckets.tolerance)
    long = []
    for length in lengths:
        first, last, slow = usable(index, next(part for part in parts if part.num_frames == length))
        long.append((last >= first) & ~slow)
    if config.buckets.lengths == "longest":
        long = longest_only(long, lengths)
    here = np.stack([(size_of == sizes.index(p.size)) & long[lengths.index(p.num_frames)] for p in parts])
    places = np.full(here.shape, ELSEWHERE, np.int8)
    places[:, ~here.any(0)] = NOWHERE
    places[here] = HERE
    return places


def native_frames(config: StreamConfig, fps: np.ndarray) -> np.ndarray:
    """Native frames that a clip spans in films of these rates."""
    if config.still:
        return np.ones(len(fps), np.int64)
    if config.fps is None:
        return np.full(len(fps), config.total_frames)
    return np.ceil((config.total_frames - 1) * fps / config.fps - 1e-6).astype(np.int64) + 1


def usable(index: SourceIndex, config: StreamConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of films and images: first start, last start (before the first where one is too short), and whether it is too slow."""
    low_high, fps = index.config.span, config.fps
    slow = (index.fps < fps * (1 - RATE_TOLERANCE)) & (index.fps > 0) if fps else np.zeros(len(index), bool)
    first = np.ceil(index.num_frames * low_high[0] - 1e-6).astype(np.int64)
    stop = np.floor(index.num_frames * low_high[1] + 1e-6).astype(np.int64)
    if index.config.kind == "image":
        first, stop = np.zeros_like(first), np.ones_like(stop)
    return first, stop - native_frames(config, index.fps), slow


@dataclass
class Stream:
    """The clips of one StreamConfig. Clip i is a stretch of a film; where in it the window lies is drawn anew each time.

    A film of ``clips_per_video`` k has k clips, one per stretch of possible starts, so that clips of one epoch never
    begin at the same frame.
    """

    name: str
    config: StreamConfig
    sources: list[SourceIndex]
    where: str  # for messages: data.train.NAME
    bucket: InitVar[list[np.ndarray] | None] = (
        None  # one of several of a stream: for each source whether its files are HERE
    )
    dropped: dict[str, int] = field(default_factory=dict)

    def __post_init__(self, bucket: list[np.ndarray] | None) -> None:
        self._check_edits()
        places = bucket or [None] * len(self.sources)
        parts = [self._select(number, *pair) for number, pair in enumerate(zip(self.sources, places, strict=True))]
        self._source, self._file, self._first, self._last, counts = (
            np.concatenate([part[i] for part in parts]) for i in range(5)
        )
        if not len(counts):
            raise EmptyStream(self._explain_empty())
        self._check_channels()
        self.seed = _name_seed(self.name)
        self.num_files = len(counts)
        self._ends = np.cumsum(counts)
        total = int(self._ends[-1])
        limit = self.config.num_clips
        self._chosen = np.linspace(0, total - 1, limit).round().astype(np.int64) if limit and limit < total else None
        self._num = total if self._chosen is None else len(self._chosen)

    def __len__(self) -> int:
        return self._num

    def _check_channels(self) -> None:
        """Latents of different spaces make no batch."""
        found = {}
        for number, index in enumerate(self.sources):
            if index.channels is not None:
                used = self._file[self._source == number]
                for channels, place in zip(*np.unique(index.channels[used], return_index=True), strict=True):
                    found[int(channels)] = index.paths[int(used[place])]
        if len(found) > 1:
            listed = ", ".join(f"{channels} ({path})" for channels, path in sorted(found.items()))
            raise StreamError(f"{self.where}: its latents are of different spaces, with channels {listed}: split them")

    def _check_edits(self) -> None:
        """Latents of edits stand for the film's first frames as they are; and a batch has them in every clip or in none."""
        c, given = self.config, [index.latents is not None for index in self.sources]
        if any(given) and not all(given):
            raise StreamError(
                f"{self.where}: edits with latents and edits without make no batch: give each a stream of its own"
            )
        if not any(given):
            return
        if c.fps is not None or c.still or any(c.extend) or c.crop.random or c.crop.resize or c.resize == "keep":
            raise StreamError(
                f"{self.where}: its edits have latents, so no fps, still, extend, random crop or resize: keep"
            )
        for index in self.sources:
            if index.config.span[0] > 0:
                raise StreamError(
                    f"{self.where}: latents of edits stand for films from their beginning, so no span of {index.name}"
                )
            try:
                index.config.latent_frames(c.num_frames)
            except ValueError as error:
                raise StreamError(f"{self.where}: with strides {list(index.config.strides)}, {error}") from None

    @cached_property
    def categories(self) -> dict[str, str]:
        """Name of a file (the part of a clip's key before ``#``) -> its category, of the files whose lists say one."""
        told = [(index, number) for index in self.sources if index.categories for number in range(len(index))]
        return {index.names[i]: index.categories[i] for index, i in told if index.categories[i]}

    @property
    def mask(self) -> str | None:
        """Which form of masks its clips come with (SourceConfig.mask); None: without."""
        return next((index.config.mask for index in self.sources if index.masks is not None), None)

    def _select(self, number: int, index: SourceIndex, place: np.ndarray | None) -> tuple[np.ndarray, ...]:
        """(source, file, first start, last start, clips) of the files that fit, counting the others by reason."""
        c, kind = self.config, index.config.kind
        if kind == "latent":
            big = (index.height == c.size[0]) & (index.width == c.size[1])
        else:
            big = fits(index.height, index.width, c.via or c.size, c.resize)
        first, last, slow = usable(index, c)
        fitting = big & ~slow
        if kind == "latent":
            first, last = np.zeros_like(first), np.minimum(index.num_frames - c.total_frames, 0).astype(np.int64)
        if kind == "triple":  # of images: repeated, so there is one clip of any length
            still = index.fps == 0
            first, last = np.where(still, 0, first), np.where(still, 0, last)
        if index.latent_sizes is not None:  # a latent stands for the film's first frames
            other = big & (index.latent_sizes[:, 1:] != c.size).any(1)
            self._count("with a latent of another size", int(other.sum()))
            fitting = fitting & ~other
            longest = np.minimum(index.latent_sizes[:, 0], index.num_frames)
            first, last = np.zeros_like(first), np.minimum(longest - c.total_frames, 0).astype(np.int64)
        long = last >= first
        if place is None:
            place = np.where(fitting & long, HERE, NOWHERE)
        else:
            self._count("in another bucket", int((place == ELSEWHERE).sum()))
        lost = place == NOWHERE
        self._count("unreadable", index.num_bad)
        self._count("of another size" if kind == "latent" else "too small", int((lost & ~big).sum()))
        self._count("below the target frame rate", int((lost & big & slow).sum()))
        self._count("too short", int((lost & fitting & ~long).sum()))
        keep = np.flatnonzero(place == HERE)
        first, last = first[keep], last[keep]
        clips = np.minimum(index.config.clips_per_video, last - first + 1)
        return np.full(len(keep), number, np.int32), keep.astype(np.int64), first, last, clips

    def _count(self, reason: str, num: int) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + num

    def _explain_empty(self) -> str:
        c = self.config
        lines = []
        for index in self.sources:
            sizes = sorted({(int(h), int(w)) for h, w in zip(index.height, index.width, strict=True)})
            shown = ", ".join(f"{h}x{w}" for h, w in sizes[-5:]) or "none readable"
            longest = index.num_frames.max(initial=0)
            most = "any number of" if longest == ANY_LENGTH else longest
            frames = f"{index.num_frames.min()} to {most} frames" if len(index) else "no frames"
            rates = f"{index.fps.min():g} to {index.fps.max():g} fps" if len(index) else "no rate"
            span = index.config.span
            used = "" if span == (0.0, 1.0) else f", of which the share {span[0]:g} to {span[1]:g} is used"
            lines.append(
                f"  {index.name}: {len(index)} readable of {index.num_found} files; {shown}; {frames}{used}; {rates}"
            )
        rate = f" at {c.fps:g} fps" if c.fps else ""
        latent = self.sources[0].config.kind == "latent"
        height, width = c.via or c.size
        size = f"{'exactly' if latent else 'at least'} {height}x{width}{'' if latent else ' (nothing is enlarged)'}"
        reasons = ", ".join(f"{num} {reason}" for reason, num in self.dropped.items() if num)
        return (
            f"{self.where}: no clip survives. It needs {c.total_frames} frames{rate} of {size}; left out: {reasons}. Found:\n"
            + "\n".join(lines)
        )

    def _place(self, clip: int) -> tuple[int, int, int]:
        """(position of the file in the tables, first start, number of starts) of a clip's stretch."""
        if self._chosen is not None:
            clip = int(self._chosen[clip])
        row = int(np.searchsorted(self._ends, clip, side="right"))
        begin = int(self._ends[row - 1]) if row else 0
        part, parts = clip - begin, int(self._ends[row]) - begin
        first, starts = int(self._first[row]), int(self._last[row] - self._first[row]) + 1
        low, high = part * starts // parts, (part + 1) * starts // parts
        return row, first + low, high - low

    def request(
        self, clip: int, rng: np.random.Generator | None, alternates: tuple[ClipRequest, ...] = ()
    ) -> ClipRequest:
        """Clip number ``clip``. ``rng`` draws its start and crop; without one it is the fixed, centred validation clip."""
        c = self.config
        row, first, num_starts = self._place(clip)
        start, crop, position = first + (num_starts // 2 if c.window == "middle" else 0), "center", (0.5, 0.5)
        if rng is not None:
            u, v, y, x = rng.random(4)
            start, position = first + int(u * num_starts), (float(y), float(x))
            crop = self._draw_crop(v)
        index, number = self.sources[self._source[row]], int(self._file[row])
        film = ()
        if index.config.kind == "procedural":
            film = (index.config.seed, number, *index.config.size, index.config.fps)
        source = index.config
        stop = math.floor(int(index.num_frames[number]) * source.span[1] + 1e-6)
        latent = ()
        if source.kind == "latent":
            y, x = (side // source.strides[1] for side in c.size)
            latent = (int(index.channels[number]), source.latent_frames(c.num_frames), y, x)
        if index.latents is not None:
            latent = (source.latent_frames(c.num_frames), *(side // source.strides[1] for side in c.size))
        return ClipRequest(
            path=index.paths[number],
            name=index.names[number],
            kind=source.kind,
            start=start,
            stop=max(stop, 1),
            num_frames=c.total_frames,
            still=c.still,
            size=c.size,
            fps=c.fps,
            resize=c.resize,
            crop=crop,
            position=position,
            multiple=c.multiple,
            via=c.via,
            checked=bool(index.checked[number]),
            film=film,
            latent=latent,
            reference="" if index.references is None else index.references[number],
            input="" if index.inputs is None else index.inputs[number],
            mask="" if index.masks is None else index.masks[number],
            mask_form=source.mask,
            edited="" if index.latents is None else index.latents[number],
            alternates=alternates,
        )

    def _draw_crop(self, v: float) -> str:
        crop = self.config.crop
        if v < crop.random:
            return "random"
        return "resize" if v < crop.random + crop.resize else "center"

    def digest(self) -> str:
        """Short hash of what its clips are: films by name, size, length and rate, and where in them windows may lie."""
        films = [a for i in self.sources for a in (i.width, i.height, i.num_frames, i.fps)]
        clips = [self._source, self._file, self._first, self._last, self._ends]
        chosen = [] if self._chosen is None else [self._chosen]
        return digest_of(*films, *clips, *chosen, texts=b"".join(index.names.content for index in self.sources))

    def describe(self) -> dict:
        """Counts for ``make show``."""
        c = self.config
        return {
            "sources": list(c.sources),
            "size": tuple(c.size),
            "num_frames": c.total_frames,
            "fps": c.fps,
            "share": c.share,
            "batch_size": c.batch_size,
            "files_found": sum(index.num_found for index in self.sources),
            "files_used": self.num_files,
            "clips": len(self),
            "dropped": {reason: num for reason, num in self.dropped.items() if num},
        }
