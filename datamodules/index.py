"""What is known about every file of a source, in arrays, so that millions of files stay affordable."""

import hashlib
import json
import logging
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datamodules.config import SourceConfig
from datamodules.probe import BadFile, Info, file_stamp, inspect_image, inspect_video
from datamodules.sources import File, find_files

log = logging.getLogger(__name__)
PROBE_VERSION = 1  # part of the cache's name: raise it when inspect_* learn something


class Names:
    """A list of strings in one block of bytes: 12.8 million Python strings would cost gigabytes in every process."""

    def __init__(self, strings: list[str]):
        encoded = [os.fsencode(string) for string in strings]
        self._ends = np.cumsum([len(part) for part in encoded], dtype=np.int64)
        self._blob = b"".join(encoded)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, i: int) -> str:
        return os.fsdecode(self._blob[self._ends[i - 1] if i else 0 : self._ends[i]])


@dataclass(frozen=True)
class SourceIndex:
    """The usable files of a source. Arrays have one entry per file; ``bad`` lists (path, reason) of the others."""

    name: str
    config: SourceConfig
    paths: Names
    names: Names
    width: np.ndarray
    height: np.ndarray
    num_frames: np.ndarray
    fps: np.ndarray
    checked: np.ndarray
    bad: list[tuple[str, str]]

    def __len__(self) -> int:
        return len(self.width)

    @property
    def num_found(self) -> int:
        """Files that were found, the unreadable ones included."""
        return len(self) + len(self.bad)


def cache_folder(configured: str | None) -> Path:
    """The config's folder, else $CACHE_ROOT, else ~/.cache/video_decoders."""
    folder = configured or os.environ.get("CACHE_ROOT") or "~/.cache/video_decoders"
    return Path(os.path.expandvars(folder)).expanduser() / "clip_index"


def build_index(name: str, source: SourceConfig, cache_dir: str | None = None, num_threads: int = 8) -> SourceIndex:
    """Find the files of a source and learn their sizes, from the cache where it knows them.

    Opens every other file once, with PyAV or PIL, never with decord. Raises SourceError where nothing is found.
    """
    if source.kind == "procedural":
        n = source.num_videos
        labels = Names([f"{name}/{i}" for i in range(n)])
        height, width = (np.full(n, side, np.int32) for side in source.size)
        length, rate = np.full(n, source.num_frames, np.int32), np.full(n, source.fps, np.float32)
        return SourceIndex(name, source, labels, labels, width, height, length, rate, np.ones(n, bool), [])
    files = find_files(name, source)
    results = _probe_all(name, source, files, cache_folder(cache_dir), num_threads)
    good, infos, bad = [], [], []
    for file, result in zip(files, results, strict=True):
        if isinstance(result, Info):
            good.append(file)
            infos.append(result)
        else:
            bad.append((file.path, result))
    return SourceIndex(
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
    )


def _probe_all(name: str, source: SourceConfig, files: list[File], folder: Path, num_threads: int) -> list[Info | str]:
    """For every file its Info, or the reason why it is unreadable."""
    unknown = [file.path for file in files if file.info is None]
    if not unknown:
        return [file.info for file in files]
    digest = hashlib.sha256(f"{PROBE_VERSION}:{source.kind}:{source.path}:{os.getcwd()}".encode()).hexdigest()[:16]
    store = folder / f"{name}-{digest}.json"
    known = _load(store)
    fresh: dict[str, list] = {}

    def look(path: str) -> Info | str:
        try:
            stamp = list(file_stamp(path))
        except OSError as error:
            return f"cannot be opened: {error.strerror}"
        entry = known.get(path)
        if entry is None or entry[:2] != stamp:
            entry = fresh[path] = [*stamp, _probe(path, source.kind)]
        return entry[2] if isinstance(entry[2], str) else Info(*entry[2])

    with ThreadPoolExecutor(num_threads) as pool:  # closed before any worker is forked
        looked = iter(list(pool.map(look, unknown)))
    if fresh:
        known.update(fresh)
        _save(store, {path: known[path] for path in unknown if path in known})
    return [file.info or next(looked) for file in files]


def _probe(path: str, kind: str) -> list | str:
    try:
        info = inspect_image(path) if kind == "image" else inspect_video(path)
    except BadFile as error:
        return str(error)
    return [info.width, info.height, info.num_frames, info.fps]


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
