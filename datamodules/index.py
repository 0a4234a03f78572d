"""What is known about every file of a source, in arrays, so that millions of files stay affordable."""

import hashlib
import json
import logging
import os
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path

import numpy as np

from datamodules.config import SourceConfig
from datamodules.latents import LatentHeader, find_reference, inspect_latent, load_latent
from datamodules.masks import check_mask, inspect_mask
from datamodules.names import Chain, Names
from datamodules.probe import BadFile, Info, file_stamp, inspect_image, inspect_video
from datamodules.shards_index import Look, Tar, index_shards
from datamodules.sources import SUFFIXES, File, excluded, find
from datamodules.triples import is_image, triple_info

log = logging.getLogger(__name__)
PROBE_VERSION = 1  # part of the cache's name: raise it when inspect_* learn something
NUM_LOOKED_AT = 8  # latents of a source whose values are checked before training


class NotNormalised(ValueError):
    """A source's latents are not what a diffusion model emits."""


@dataclass(frozen=True)
class SourceIndex:
    """The usable files of a source. Arrays have one entry per file; ``bad`` lists (path, reason) of the others.

    ``num_lost``: clips of shards that end early, beyond those that ``bad`` lists, where it is known what the shards had.
    """

    name: str
    config: SourceConfig
    paths: Names | Chain
    names: Names | Chain
    width: np.ndarray
    height: np.ndarray
    num_frames: np.ndarray
    fps: np.ndarray
    checked: np.ndarray
    bad: list[tuple[str, str]]
    references: Names | None = None  # latents, triples, edits with latents; of a triple ``paths`` are the targets
    inputs: Names | None = None  # triples
    channels: np.ndarray | None = None  # latents
    masks: Names | None = None  # edits
    latents: Names | None = None  # edits that have some; then also
    latent_sizes: np.ndarray | None = None  # (frames, height, width) in pixels, of each
    categories: Names | None = None  # of lists with a column of that name
    num_lost: int = 0
    spaces: Counter = field(default_factory=Counter)  # latents: how many files name which space; "" names none

    def __len__(self) -> int:
        return len(self.width)

    @property
    def num_bad(self) -> int:
        """Files and clips of shards that cannot be read."""
        return len(self.bad) + self.num_lost

    @property
    def num_found(self) -> int:
        """Files that were found, the unreadable ones included."""
        return len(self) + self.num_bad


def cache_folder(configured: str | None) -> Path:
    """The config's folder, else $CACHE_ROOT, else ~/.cache/video_decoders."""
    folder = configured or os.environ.get("CACHE_ROOT") or "~/.cache/video_decoders"
    return Path(os.path.expandvars(folder)).expanduser() / "clip_index"


def build_index(name: str, source: SourceConfig, cache_dir: str | None = None, num_threads: int = 8) -> SourceIndex:
    """Find the files of a source and learn their sizes, from the cache where it knows them.

    Opens every other file once, with PyAV or PIL, never with decord. Raises SourceError where nothing is found, and
    NotNormalised for latents.
    """
    if source.kind == "procedural":
        n = source.num_videos
        labels = Names([f"{name}/{i}" for i in range(n)])
        height, width = (np.full(n, side, np.int32) for side in source.size)
        length, rate = np.full(n, source.num_frames, np.int32), np.full(n, source.fps, np.float32)
        return SourceIndex(name, source, labels, labels, width, height, length, rate, np.ones(n, bool), [])
    found = find(name, source)
    files = found.files
    look = _Look(name, source, cache_folder(cache_dir), num_threads)
    results = {"latent": _latents, "triple": _triples, "edit": _edits}.get(source.kind, _films)(look, files)
    good, infos, bad = [], [], []
    for file, result in zip(files, results, strict=True):
        if isinstance(result, Info):
            good.append(file)
            infos.append(result)
        else:
            bad.append(result)
    extra = {}  # only where there is something to say: lists of films may be long
    if source.kind == "latent":
        extra["references"] = Names([info.reference for info in infos])
        extra["channels"] = np.array([info.channels for info in infos], np.int32)
        extra["spaces"] = Counter(info.space for info in infos)
    if source.kind == "triple":
        extra["references"] = Names([file.reference for file in good])
        extra["inputs"] = Names([file.input for file in good])
    if source.kind == "edit":
        extra["masks"] = Names([file.mask for file in good])
        if good and good[0].latent:
            extra["references"] = Names([file.reference for file in good])
            extra["latents"] = Names([file.latent for file in good])
            extra["latent_sizes"] = np.array([info.latent_size for info in infos], np.int32)
            extra["spaces"] = Counter(info.space for info in infos)
    if any(file.category for file in good):
        extra["categories"] = Names([file.category for file in good])
    index = SourceIndex(
        name,
        source,
        Names([file.path for file in good]),
        Names([file.name for file in good]),
        np.array([info.width for info in infos], np.int32),
        np.array([info.height for info in infos], np.int32),
        np.array([info.num_frames for info in infos], np.int32),
        np.array([info.fps for info in infos], np.float32),
        np.array([file.info is None for file in good], bool),
        bad,
        **extra,
    )
    if source.kind == "latent":
        _check_normalised(index)
    return _with_shards(index, found.tars, cache_folder(cache_dir), num_threads) if found.tars else index


def _with_shards(index: SourceIndex, tars: list[Tar], folder: Path, num_threads: int) -> SourceIndex:
    """The clips of shards after those of files."""
    source = index.config
    look = Look(source.kind, SUFFIXES[source.kind], source.max_member_mb, folder, num_threads)
    keep = (lambda name: not excluded(source, name)) if source.exclude else None
    clips = index_shards(index.name, tars, look, keep)
    more = {name: np.concatenate([getattr(index, name), column]) for name, column in clips.columns.items()}
    return replace(
        index,
        paths=Chain(index.paths, clips.paths),
        names=Chain(index.names, clips.names),
        checked=np.concatenate([index.checked, np.ones(len(clips.paths), bool)]),
        bad=[*index.bad, *clips.bad],
        num_lost=clips.num_lost,
        **more,
    )


@dataclass(frozen=True)
class _LatentInfo(Info):
    """A latent's file, its size in pixels."""

    reference: str
    channels: int
    space: str


@dataclass(frozen=True)
class _EditInfo(Info):
    """A source film, and of its latent, if it has one, what it stands for."""

    latent_size: tuple[int, int, int] = (0, 0, 0)
    space: str = ""


@dataclass(frozen=True)
class _Look:
    """Looks at files, or remembers what it saw."""

    name: str
    source: SourceConfig
    folder: Path
    num_threads: int

    def at(self, paths: list[str], kind: str) -> list[Info | LatentHeader | str]:
        """For every path what it says about itself, or the reason why it is unreadable."""
        if not paths:
            return []
        source = self.source
        digest = hashlib.sha256(f"{PROBE_VERSION}:{kind}:{source.path}:{os.getcwd()}".encode()).hexdigest()[:16]
        store = self.folder / f"{self.name}-{digest}.json"
        known = _load(store)
        fresh: dict[str, list] = {}

        def look(path: str) -> Info | LatentHeader | str:
            try:
                stamp = list(file_stamp(path))
            except OSError as error:
                return f"cannot be opened: {error.strerror}"
            entry = known.get(path)
            if entry is None or entry[:2] != stamp:
                entry = fresh[path] = [*stamp, _probe(path, kind)]
            if isinstance(entry[2], str):
                return entry[2]
            return LatentHeader(*entry[2]) if kind == "latent" else Info(*entry[2])

        with ThreadPoolExecutor(self.num_threads) as pool:  # closed before any worker is forked
            looked = list(pool.map(look, paths))
        if fresh:
            known.update(fresh)
            _save(store, {path: known[path] for path in paths if path in known})
        return looked


def _probe(path: str, kind: str) -> list | str:
    inspect = {"image": inspect_image, "latent": inspect_latent, "mask": inspect_mask}.get(kind, inspect_video)
    try:
        info = inspect(path)
    except BadFile as error:
        return str(error)
    return list(astuple(info))


Result = Info | tuple[str, str]  # what is known of a file, or (path, reason) of what is wrong with it


def _films(look: _Look, files: list[File]) -> list[Result]:
    looked = iter(look.at([file.path for file in files if file.info is None], look.source.kind))
    results = [file.info or next(looked) for file in files]
    return [r if isinstance(r, Info) else (f.path, r) for f, r in zip(files, results, strict=True)]


def _latents(look: _Look, files: list[File]) -> list[Result]:
    headers = look.at([file.path for file in files], "latent")
    return [_latent(look.source, file, header) for file, header in zip(files, headers, strict=True)]


def _latent(source: SourceConfig, file: File, header: LatentHeader | str) -> Result:
    if isinstance(header, str):
        return file.path, header
    height, width = header.rows * source.strides[1], header.columns * source.strides[1]
    if (header.height or height, header.width or width) != (height, width):
        return file.path, (
            f"says it is {header.height}x{header.width} pixels, but {header.rows}x{header.columns} latent pixels are "
            f"{height}x{width} with strides {list(source.strides)}: set strides of data.sources to those of its space"
        )
    reference = file.reference or find_reference(file.path, header.image)
    if not reference:
        return file.path, "has no reference image: put NAME.png or NAME.jpg beside NAME, or list both in a .csv"
    frames = source.pixel_frames(header.frames)
    return _LatentInfo(width, height, frames, 0.0, reference, header.channels, header.space)


def _check_normalised(index: SourceIndex) -> None:
    """Read a few files, evenly spaced, now: raw latents are a mistake of the whole set, better told before any step."""
    some = np.unique(np.linspace(0, max(len(index) - 1, 0), NUM_LOOKED_AT).round().astype(int)) if len(index) else []
    wrong = []
    for i in some:
        try:
            load_latent(index.paths[i])
        except BadFile as error:
            wrong += [f"{index.paths[i]}: {error}"] if "not normalised" in str(error) else []
    if len(wrong) > len(some) / 2:
        raise NotNormalised(
            f"data.sources.{index.name}: {len(wrong)} of {len(some)} latents looked at are not normalised, such as {wrong[0]}"
        )


def _triples(look: _Look, files: list[File]) -> list[Result]:
    paths = list(dict.fromkeys(path for file in files for path in (file.input, file.reference, file.path)))
    by_kind = {"image": [p for p in paths if is_image(p)], "video": [p for p in paths if not is_image(p)]}
    seen = {path: info for kind, some in by_kind.items() for path, info in zip(some, look.at(some, kind), strict=True)}
    results = []
    for file in files:
        try:
            results.append(triple_info(*(_found(seen, path) for path in (file.input, file.reference, file.path))))
        except BadFile as error:
            results.append((error.path or file.path, str(error)))
    return results


def _edits(look: _Look, files: list[File]) -> list[Result]:
    kinds = (("mask", "mask"), ("latent", "latent"))
    masks, latents = (look.at([path for f in files if (path := getattr(f, name))], kind) for name, kind in kinds)
    results: list[Result] = []
    for number, (file, film) in enumerate(zip(files, _films(look, files), strict=True)):
        if not isinstance(film, Info):
            results.append(film)
        elif isinstance(masks[number], str):
            results.append((file.mask, masks[number]))
        else:
            results.append(_edit(look.source, file, film, masks[number], latents[number] if latents else None))
    return results


def _edit(source: SourceConfig, file: File, film: Info, mask: Info, header: LatentHeader | str | None) -> Result:
    try:
        check_mask(film, mask)
    except BadFile as error:
        return file.path, str(error)
    if header is None:
        return _EditInfo(*astuple(film))
    latent = _latent(source, File(file.latent, file.name, reference=file.reference), header)
    if not isinstance(latent, Info):
        return latent
    return _EditInfo(*astuple(film), (latent.num_frames, latent.height, latent.width), latent.space)


def _found(seen: dict[str, Info | str], path: str) -> Info:
    if isinstance(seen[path], str):
        raise BadFile(seen[path], path)
    return seen[path]


def _load(store: Path) -> dict[str, list]:
    try:
        return json.loads(store.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        log.warning("the clip index %s cannot be read (%s); its files are looked at again", store, error)
        return {}


def _save(store: Path, entries: dict[str, list]) -> None:
    """Written whole or not at all; several ranks may do so at once, with the same content."""
    try:
        store.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=store.parent, delete=False) as file:
            json.dump(entries, file)
        os.replace(file.name, store)
    except OSError as error:
        log.warning(
            "the clip index cannot be kept in %s (%s): files will be looked at again next time", store.parent, error
        )
