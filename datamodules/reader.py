"""From a request to pixels. Runs in the workers.

A request says everything: file, frames, crop. So workers hold no state that matters, and a sample depends neither on
which of them reads it nor on what was read before.
"""

import os
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
from torch import Tensor

from datamodules.cached import CachedClip, cached_latent
from datamodules.films import Film, Reader, open_film
from datamodules.latents import read_clip
from datamodules.masks import counted_pixels, read_edit, still_frames
from datamodules.probe import BadFile, check_readable, inspect_video
from datamodules.procedural import draw_frames
from datamodules.stills import load_image, load_reference
from datamodules.transforms import TooSmall, cover, crop_frames, plan_geometry, resize_frames, to_video
from datamodules.triples import check_shapes, is_image
from datamodules.watch import Watch, shortened

TIE_S = 1e-3  # of two frames as near as that the earlier is taken: libraries round times differently


@dataclass(frozen=True)
class ClipRequest:
    """One clip to read. ``start`` and ``stop`` bound the frames that may be touched; the clip begins at ``start``."""

    path: str
    name: str  # stable, machine-independent: "<source>/<path below it>"
    kind: str  # SourceConfig.kind
    start: int
    stop: int
    num_frames: int  # of the delivered clip
    size: tuple[int, int]
    fps: float | None = None  # target; None: native
    resize: str = "crop"
    crop: str = "center"
    position: tuple[float, float] = (0.5, 0.5)
    multiple: int = 16
    via: tuple[int, int] | None = None
    checked: bool = True  # the container was inspected when the index was made
    film: tuple = ()  # procedural: (seed, number, height, width, fps)
    latent: tuple = ()  # latent: (c, n, y, x) to be delivered; edit: (n, y, x)
    reference: str = ""  # latent, triple, edit: path of the image
    input: str = ""  # triple: path; ``path`` is the target's
    mask: str = ""  # edit: path of what was edited
    mask_form: str = "box"  # SourceConfig.mask
    edited: str = ""  # edit: path of its latent, if it has one; ``latent`` is then (n, y, x)
    still: bool = False  # one frame is read, and repeated
    cached: CachedClip | None = None  # where the clip's latent lies
    alternates: tuple["ClipRequest", ...] = field(default=(), repr=False)  # tried in order when this one fails

    @property
    def files(self) -> str:
        """The files that are opened for it, a line for each; of one without files its name."""
        named = (self.path, self.input, self.mask, self.edited, self.reference)
        return "\n".join(path for path in named if path) or self.name


@dataclass
class Sample:
    """A clip's tensors by their names in VideoBatch, its key, and what had to be passed over to get it: (path, reason)."""

    tensors: dict[str, Tensor]
    key: str
    failures: list[tuple[str, str]]
    request: ClipRequest


class NoneReadable(RuntimeError):
    """A clip and all that could have taken its place failed."""


class ClipReader:
    """Reads requests. ``verify``, ``film_cache_gib`` and ``reader`` are those of ClipDataConfig.

    ``watch`` is told what is read. ``barred``: files (ClipRequest.files, shortened) that are not opened, and why.
    """

    def __init__(
        self,
        verify: str = "window",
        film_cache_gib: float = 0.0,
        reader: Reader = "pyav",
        watch: Watch | None = None,
        barred: dict[bytes, str] | None = None,
    ):
        self.verify, self.reader, self.watch, self.barred = verify, reader, watch, barred or {}
        self.cache_bytes = int(film_cache_gib * 2**30)
        self._films: OrderedDict[tuple, _KeptFilm] = OrderedDict()
        self._unkept: set[tuple] = set()
        self._checked: OrderedDict[str, str | None] = OrderedDict()

    def read(self, request: ClipRequest) -> Sample:
        """The clip, or the first of its alternates that can be read. Raises NoneReadable when there is none.

        Only BadFile sends it on to an alternate: a programming error or a lack of memory is not a bad file.
        """
        failures = []
        for candidate in (request, *request.alternates):
            try:
                with self._watched(candidate):
                    tensors, key = self._tensors(candidate)
                    if candidate.cached is not None:
                        encoded = tensors.get("source", tensors["video"])
                        tensors["latent"] = cached_latent(candidate.cached, key, encoded)
                return Sample(tensors, key, failures, candidate)
            except BadFile as error:
                failures.append((error.path or candidate.path, str(error)))
        reasons = [f"{path}: {reason}" for path, reason in dict(failures).items()]
        if not request.alternates:
            raise NoneReadable(f"cannot be read: {reasons[0]}")
        raise NoneReadable(
            f"{len(failures)} clips in a row cannot be read; is the disk still mounted?\n  " + "\n  ".join(reasons)
        )

    @contextmanager
    def _watched(self, request: ClipRequest) -> Iterator[None]:
        """Raises BadFile for what made a worker hang or die before."""
        if self.barred and shortened(request.files) in self.barred:
            raise BadFile(self.barred[shortened(request.files)])
        if self.watch is None:
            yield
        else:
            with self.watch.reading(request.files, request.start):
                yield

    def _tensors(self, request: ClipRequest) -> tuple[dict[str, Tensor], str]:
        if request.kind == "latent":
            key = f"{request.name}#0@{request.size[0]}x{request.size[1]}x{request.num_frames}"
            return read_clip(request.path, request.reference, request.latent, request.size), key
        if request.kind == "triple":
            return self._read_triple(request)
        if request.kind == "edit":
            return self._read_edit(request)
        if request.still:
            video, key = self.read_one(replace(request, num_frames=1, still=False))
            return {"video": video.expand(-1, request.num_frames, -1, -1).contiguous()}, f"{key}x{request.num_frames}"
        video, key = self.read_one(request)
        return {"video": video}, key

    def read_one(self, request: ClipRequest) -> tuple[Tensor, str]:
        """The clip and its key. Raises BadFile."""
        try:
            if request.kind == "image":
                frames, indices = load_image(request.path), np.zeros(1, int)
                geometry = _geometry(request, frames.shape[1:3])
                frames = resize_frames(frames, geometry.resized)
            elif request.kind == "procedural":
                seed, number, height, width, fps = request.film
                indices = window_indices(request, np.arange(request.stop) / fps)
                geometry = _geometry(request, (height, width))
                frames = resize_frames(draw_frames(seed, number, indices.tolist(), (height, width)), geometry.resized)
            else:
                frames, indices, geometry = self._read_video(request)
        except TooSmall as error:
            raise BadFile(f"smaller than the index says: {error}") from None
        return to_video(crop_frames(frames, geometry)), _key(request, indices[0], geometry)

    def _read_triple(self, request: ClipRequest) -> tuple[dict[str, Tensor], str]:
        """Target and input, cut by one box, and the style image. ``triples.py`` has the rules."""
        target, first = self._native_frames(request, request.path)
        given, start = self._native_frames(request, request.input)
        check_shapes(given.shape[1:3], target.shape[1:3])
        try:
            geometry = _geometry(request, target.shape[1:3])
            if request.resize != "enlarge":
                cover(given.shape[1:3], geometry.resized if request.resize == "none" else geometry.size)
        except TooSmall as error:
            raise BadFile(f"its input is too small: {error}", request.input) from None
        clips = (to_video(crop_frames(resize_frames(f, geometry.resized), geometry)) for f in (target, given))
        video, source = (clip.expand(-1, request.num_frames, -1, -1) for clip in clips)  # an image is repeated
        reference = load_reference(request.reference, geometry.size, "crop")
        return {"video": video, "source": source, "reference": reference}, _key(request, max(first, start), geometry)

    def _read_edit(self, request: ClipRequest) -> tuple[dict[str, Tensor], str]:
        """A film and which of its pixels count, cut by one box; and the edit's latent. ``masks.py`` has the rules."""
        one = replace(request, num_frames=1) if request.still else request
        try:
            frames, indices, geometry = self._read_video(one)
        except TooSmall as error:
            raise BadFile(f"smaller than the index says: {error}") from None
        marked = self._mask_frames(request.mask, indices)
        if _geometry(request, marked.shape[1:3]) != geometry:
            raise BadFile(f"is {marked.shape[1]}x{marked.shape[2]} pixels, which is not its film's size", request.mask)
        clip = (-1, request.num_frames, -1, -1)
        mask = counted_pixels(marked, geometry, request.mask_form, request.mask).expand(clip)
        tensors = {"video": to_video(crop_frames(frames, geometry)).expand(clip), "mask": mask}
        if request.edited:
            tensors |= read_edit(request.edited, request.reference, request.latent, request.size)
        return tensors, _key(request, indices[0], geometry)

    def _mask_frames(self, path: str, indices: np.ndarray) -> np.ndarray:
        """The frames of these numbers of a mask, uint8 [t, h, w, 3]."""
        if os.path.isdir(path) or is_image(path):
            return still_frames(path, indices)
        try:
            check_readable(path)
            with open_film(path, self.reader) as film:
                if indices.max() >= len(film):
                    raise BadFile(f"has {len(film)} frames, and its film's number {indices.max()} is asked for")
                return film.frames(indices, self.verify)
        except BadFile as error:
            raise BadFile(str(error), path) from None

    def _native_frames(self, request: ClipRequest, path: str) -> tuple[np.ndarray, int]:
        """Frames of one of a triple's files at their own size, uint8 [t, h, w, 3], and the number of the first."""
        try:
            if is_image(path):
                return load_image(path), 0
            self._check_container(replace(request, path=path))
            with open_film(path, self.reader) as film:
                indices = window_indices(request, film.seconds(request.stop))
                return film.frames(indices, self.verify), int(indices[0])
        except BadFile as error:
            raise BadFile(str(error), path) from None

    def _read_video(self, request: ClipRequest):
        self._check_container(request)
        kept = self._films.get((request.path, request.size, request.resize, request.crop == "resize"))
        if kept is not None:
            return self._from_memory(kept, request)
        with open_film(request.path, self.reader) as film:
            kept = self._keep_film(film, request) if self.cache_bytes else None
            if kept is not None:
                return self._from_memory(kept, request)
            indices = window_indices(request, film.seconds(request.stop))
            frames = film.frames(indices, self.verify)
        geometry = _geometry(request, frames.shape[1:3])
        return resize_frames(frames, geometry.resized), indices, geometry

    def _check_container(self, request: ClipRequest) -> None:
        """Files that were never inspected (a CSV list with sizes) are inspected now, once per worker."""
        if request.checked:
            check_readable(request.path)
            return
        if request.path not in self._checked:
            try:
                inspect_video(request.path)
                reason = None
            except BadFile as error:
                reason = str(error)
            self._checked[request.path] = reason
            if len(self._checked) > 4096:
                self._checked.popitem(last=False)
        if self._checked[request.path] is not None:
            raise BadFile(self._checked[request.path])

    def _from_memory(self, kept: "_KeptFilm", request: ClipRequest):
        self._films.move_to_end(kept.key)
        indices = window_indices(request, kept.seconds[: request.stop])
        return kept.frames[indices], indices, _geometry(request, kept.native)

    def _keep_film(self, film: Film, request: ClipRequest) -> "_KeptFilm | None":
        """Decode and resize the whole film into memory; None where it does not fit or cannot be read as a whole."""
        key = (request.path, request.via or request.size, request.resize, request.crop == "resize")
        if key in self._unkept:
            return None
        try:
            native = film.decode(np.arange(1)).shape[1:3]
            size = _geometry(request, native).resized
            if len(film) * size[0] * size[1] * 3 > self.cache_bytes:
                self._unkept.add(key)
                return None
            whole = film.all_frames(self.verify, lambda frames: resize_frames(frames, size))
        except BadFile:  # some window of it may be sound: decided window by window, as without a cache
            self._unkept.add(key)
            return None
        self._films[key] = _KeptFilm(key, whole, native, film.seconds(len(film)))
        while sum(kept.frames.nbytes for kept in self._films.values()) > self.cache_bytes:
            self._films.popitem(last=False)
        return self._films[key]


@dataclass(frozen=True)
class _KeptFilm:
    key: tuple
    frames: np.ndarray  # uint8 [t, h, w, 3], resized
    native: tuple[int, int]
    seconds: np.ndarray


def window_indices(request: ClipRequest, seconds: np.ndarray) -> np.ndarray:
    """Frames to take: consecutive ones, or at ``fps`` the ones nearest in time. ``seconds`` are the frames' times.

    Raises BadFile where the window does not lie within [start, stop).
    """
    start, stop = request.start, min(request.stop, len(seconds))
    if request.fps is None:
        indices = start + np.arange(request.num_frames)
    else:
        wanted = seconds[min(start, len(seconds) - 1)] + np.arange(request.num_frames) / request.fps
        if wanted[-1] > seconds[-1] + 0.5 / request.fps + TIE_S:
            raise BadFile(f"ends at {seconds[-1]:.2f} s, but the clip needs a frame at {wanted[-1]:.2f} s")
        right = np.clip(np.searchsorted(seconds, wanted), 1, len(seconds) - 1)
        indices = np.where(wanted - seconds[right - 1] <= seconds[right] - wanted + TIE_S, right - 1, right)
        if (np.diff(indices) < 1).any():
            raise BadFile(f"frames are too far apart for {request.fps:g} per second from frame {start} on")
    if indices[-1] >= stop:
        raise BadFile(f"has {stop} usable frames, but the clip needs number {indices[-1] + 1}")
    return indices


def _key(request: ClipRequest, start: int, geometry) -> str:
    rate = f"~{request.fps:g}fps" if request.fps else ""
    return f"{request.name}#{start}{rate}@{geometry}"


def _geometry(request: ClipRequest, frame: tuple[int, int]):
    r = request
    return plan_geometry(frame, r.size, r.resize, r.crop, r.position, r.multiple, r.via)
