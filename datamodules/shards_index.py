"""The clips in tar shards: where each lies and how large it is, in arrays: 40 bytes a clip, and its name.

Of every shard there is a file in the cache, written when the shard has been gone through, so that an index that takes hours
can be stopped and goes on. It holds for a shard of that size and time (on servers: size and mark of the version). What is
not in the cache comes from ``index.json`` beside the shards, which ``experiments.pack`` writes, where it says the same size
and time (on servers: the same size); other shards are gone through, and each film or image in them is looked at as those of
a folder are. Of a shard on a server that is one pass over all of its bytes, once per machine.

A shard of webdataset's form has KEY.mp4, KEY.json, KEY.txt and so on of a sample one after the other. A clip is any member
with a film's (an image's) suffix; nothing else is read: sizes in KEY.json are those of somebody's own measuring.
"""

import io
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from datamodules import remote
from datamodules.faults import OUR_FAULT, BadFile
from datamodules.names import Names
from datamodules.probe import Info, file_stamp, inspect_image, inspect_video
from datamodules.shards import Member
from datamodules.shards_cache import (
    COLUMNS,
    Clips,
    digest,
    load_clips,
    load_stamps,
    no_clips,
    save_clips,
    shown,
    with_lost,
    write,
)
from datamodules.shards_json import FILE, Packed, read_index
from datamodules.shards_tar import Bytes, Entry, opened, unsafe, walk

log = logging.getLogger(__name__)
VERSION = 2  # of what is kept: raise it when other things are found in the same shard
NUM_DOWNLOADS = 4  # shards of servers that are gone through at once


@dataclass(frozen=True)
class Tar:
    """A shard: its path or URL, and its name, which is the same on every machine."""

    path: str
    name: str


class MemberList(Sequence):
    """A string per clip, made when it is asked for: its shard's, and its own."""

    def __init__(
        self, heads: list[str], ends: np.ndarray, names: Names, place: tuple[np.ndarray, np.ndarray] | None = None
    ):
        self._heads, self._ends, self._names, self._place = Names(heads), ends, names, place

    @property
    def content(self) -> bytes:
        """All that decides its strings."""
        place = b"" if self._place is None else b"".join(column.tobytes() for column in self._place)
        return b"\0".join((self._heads.content, self._ends.tobytes(), self._names.content, place))

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, i: int) -> str:
        name = self._names[i]  # IndexError where there is none
        i = int(i) % len(self)
        head = self._heads[int(np.searchsorted(self._ends, i, side="right"))]
        if self._place is None:
            return f"{head}/{name}"
        return str(Member(head, int(self._place[0][i]), int(self._place[1][i]), name))


@dataclass(frozen=True)
class ShardClips:
    """All clips of a source's shards: their paths, their names, ``columns`` (COLUMNS without the place), what is bad.

    ``num_lost``: clips of shards that end early or cannot be read, beyond those that ``bad`` lists.
    """

    paths: MemberList
    names: MemberList
    columns: dict[str, np.ndarray]
    bad: list[tuple[str, str]]
    num_lost: int


def index_shards(source: str, tars: list[Tar], look: "Look", keep: Callable[[str], bool] | None = None) -> ShardClips:
    """Every clip of these shards, in their order. ``keep``: whether one is wanted, by its name below the source.

    Raises Unreachable where a server does not answer.
    """
    parts = look.at(tars)
    if keep is None:
        num_lost = sum(part.num_lost() for part in parts)
    else:
        named = zip(tars, parts, strict=True)
        num_lost = sum(part.num_lost(lambda name, tar=tar: keep(f"{tar.name}/{name}")) for tar, part in named)
        wanted = [
            [i for i in range(len(p)) if keep(f"{t.name}/{p.names[i]}")] for t, p in zip(tars, parts, strict=True)
        ]
        parts = [part.at(some) for part, some in zip(parts, wanted, strict=True)]
    ends, members = np.cumsum([len(part) for part in parts]), Names.joined([part.names for part in parts])
    columns = {name: np.concatenate([part.columns[name] for part in parts]) for name in COLUMNS}
    place = columns.pop("offset"), columns.pop("size")
    return ShardClips(
        MemberList([tar.path for tar in tars], ends, members, place),
        MemberList([f"{source}/{tar.name}" for tar in tars], ends, members),
        columns,
        [fault for part in parts for fault in part.bad],
        num_lost,
    )


def is_clip(name: str, suffixes: tuple[str, ...]) -> bool:
    """Whether a member of this name is a film, or an image; hidden ones are none, as in folders."""
    base = name.rpartition("/")[2]
    return base.lower().endswith(suffixes) and not base.startswith(".")


def probe(path: str, kind: str, data: io.BytesIO | None = None) -> Info | str:
    """What a film or image says about itself, or why it cannot be used."""
    try:
        return (inspect_image if kind == "image" else inspect_video)(path, data)
    except BadFile as error:
        return str(error)


def first_members(path: str, suffixes: tuple[str, ...], number: int) -> list[str]:
    """Paths of a shard's first clips, by reading no further than to those. Raises BadFile where it has none, and Unreachable."""

    def take(tar: Bytes) -> list[Entry]:
        usable = []
        for entry in walk(tar):
            if entry.last and not usable:
                raise BadFile(entry.fault)
            if is_clip(entry.name, suffixes) and not entry.fault and entry.size:
                usable.append(entry)
            if len(usable) == number:
                break
        return usable

    try:
        if remote.is_remote(path):
            entries = remote.read_through(path, take)
        else:
            with opened(path) as tar:
                entries = take(tar)
    except OSError as error:
        if error.errno in OUR_FAULT:
            raise
        raise BadFile(f"cannot be opened: {error.strerror or error}") from None
    if not entries:
        raise BadFile("a shard without any film or image of the kind that is asked for")
    return [str(Member(path, entry.offset, entry.size, entry.name)) for entry in entries]


@dataclass(frozen=True)
class Look:
    """Looks into shards, or remembers what it saw. ``kind``: video or image; ``suffixes``: of the members that are such."""

    kind: str
    suffixes: tuple[str, ...]
    max_member_mb: int
    folder: Path
    num_threads: int = 8

    def at(self, tars: list[Tar]) -> list[Clips]:
        """What is in each shard; of one that cannot be read that is nothing but the reason."""
        stamps = self._stamps(tars)
        done: list[Clips | None] = [
            no_clips(tar.path, stamp) if isinstance(stamp, str) else load_clips(self._store(tar), stamp)
            for tar, stamp in zip(tars, stamps, strict=True)
        ]
        packed: dict[int, Names] = {}  # what index.json says of shards that are not as it describes them

        def found(i: int, clips: Clips) -> None:
            done[i] = self._with_lost(tars[i], clips, packed.get(i))
            if not isinstance(stamps[i], str):
                save_clips(self._store(tars[i]), stamps[i], done[i])

        gone = [i for i, stamp in enumerate(stamps) if isinstance(stamp, str)]
        todo = [i for i, clips in enumerate(done) if clips is None]
        self._ask_packed(tars, stamps, [*gone, *todo], found, packed)
        for i in gone:
            found(i, done[i])
        todo = [i for i in todo if done[i] is None]
        if todo:
            self._go_through(tars, todo, found)
        return done

    def _with_lost(self, tar: Tar, clips: Clips, packed: Names | None) -> Clips:
        """What is lost of a shard that ends early: by index.json, else by what was in it when it was whole."""
        if clips.end is None or packed is not None:
            return with_lost(clips, packed, FILE)
        before = load_clips(self._store(tar), None)
        return with_lost(clips, None if before is None else before.all_names(), "an earlier look at it")

    def _store(self, tar: Tar) -> Path:
        path = tar.path if remote.is_remote(tar.path) else os.path.abspath(tar.path)
        mark = digest(str(VERSION), self.kind, str(self.max_member_mb), path)
        return self.folder / "shards" / mark[:2] / f"{mark}.safetensors"

    def _stamps(self, tars: list[Tar]) -> list[list | str]:
        """Size and time of each shard, or why there is none. Servers are asked for the first byte of each."""
        urls = [tar.path for tar in tars if remote.is_remote(tar.path)]
        known: dict[str, list | str] = {}
        if urls:
            store = self.folder / "shards" / f"stamps-{digest(*urls)}.json"
            known = load_stamps(store)
            if missing := [url for url in urls if url not in known]:
                with ThreadPoolExecutor(2 * self.num_threads) as pool:
                    known |= dict(zip(missing, pool.map(_stamp, missing), strict=True))
                write(store, lambda path: Path(path).write_text(json.dumps(known)))
        return [known[tar.path] if tar.path in known else _stamp(tar.path) for tar in tars]

    def _ask_packed(
        self,
        tars: list[Tar],
        stamps: list,
        todo: list[int],
        found: Callable[[int, Clips], None],
        others: dict[int, Names],
    ) -> None:
        """Take the shards that an index.json beside them describes as they are. Of others ``others`` gets the names of the
        clips that it says they have."""
        folders: dict[str, dict[str, int]] = {}
        for i in todo:
            folder, _, base = tars[i].path.partition("?")[0].rpartition("/")
            folders.setdefault(folder or ".", {})[base] = i
        for folder, wanted in folders.items():
            changed = []

            def use(packed: Packed, folder=folder, wanted=wanted, changed=changed) -> None:
                i = wanted.get(packed.tar)
                if i is None:
                    return
                size, mtime_ns = (None, None) if isinstance(stamps[i], str) else stamps[i]
                if packed.size != size or not (remote.is_remote(folder) or packed.mtime_ns == mtime_ns):
                    others[i] = Names(name for name in packed.names if is_clip(name, self.suffixes))
                    changed += [] if isinstance(stamps[i], str) else [packed.tar]
                elif (clips := self._of_packed(tars[i], packed)) is not None:
                    found(i, clips)

            read_index(folder, self.kind, use)
            if changed:
                log.warning(
                    "%s/index.json describes %d shards (%s, ...) that have another size or time now, so every clip in them is "
                    "looked at. If they were only copied: python -m experiments.pack check=%s accept=true compares their "
                    "hashes and notes the new times", folder, len(changed), changed[0], folder,
                )  # fmt: skip

    def _of_packed(self, tar: Tar, packed: Packed) -> Clips | None:
        entries = [Entry(*place) for place in zip(packed.names, packed.offsets, packed.sizes, strict=True)]
        sizes = zip(packed.width, packed.height, packed.num_frames, packed.fps, strict=True)
        infos = dict(zip(packed.offsets, (Info(*some) for some in sizes), strict=True))
        clips = self._table(tar.path, entries, lambda wanted: [infos[entry.offset] for entry in wanted])
        if len(clips) and min(clips.columns["width"].min(), clips.columns["height"].min()) < 1:
            log.warning("%s: index.json does not say how large its clips are: they are looked at", tar.path)
            return None
        return clips

    def _go_through(self, tars: list[Tar], todo: list[int], found: Callable[[int, Clips], None]) -> None:
        """Those on disks one by one, their members side by side; those on servers side by side, each from front to back."""
        far = [i for i in todo if remote.is_remote(tars[i].path)]
        bar = tqdm(total=len(todo), desc="looking into shards", unit="shard", disable=not sys.stderr.isatty())
        with bar, ThreadPoolExecutor(self.num_threads) as pool, ThreadPoolExecutor(NUM_DOWNLOADS) as downloads:
            try:
                results = downloads.map(lambda i: found(i, self._remote(tars[i].path)), far)
                for i in sorted(set(todo) - set(far)):
                    found(i, self._local(tars[i].path, pool))
                    bar.update()
                for _ in results:
                    bar.update()
            finally:
                downloads.shutdown(cancel_futures=True)

    def _local(self, path: str, pool: ThreadPoolExecutor) -> Clips:
        try:
            with opened(path) as tar:
                entries = list(walk(tar))
        except OSError as error:
            if error.errno in OUR_FAULT:
                raise
            return no_clips(path, f"cannot be opened: {error.strerror or error}")

        def look(entry: Entry) -> Info | str:
            return probe(str(Member(path, entry.offset, entry.size, entry.name)), self.kind)

        return self._table(path, entries, lambda wanted: list(pool.map(look, wanted)))

    def _remote(self, path: str) -> Clips:
        try:
            entries, seen = remote.read_through(path, self._stream)
        except BadFile as error:
            return no_clips(path, str(error))
        return self._table(path, entries, lambda wanted: [seen[entry.offset] for entry in wanted])

    def _stream(self, tar: Bytes) -> tuple[list[Entry], dict[int, Info | str]]:
        """All members of a tar, and what the clips among them say, each read into memory as it comes by."""
        entries, seen = [], {}
        for entry in walk(tar):
            entries.append(entry)
            if is_clip(entry.name, self.suffixes) and not self._fault(entry):
                seen[entry.offset] = probe(entry.name, self.kind, io.BytesIO(tar.read(entry.size)))
        return entries, seen

    def _fault(self, entry: Entry) -> str:
        if entry.fault or unsafe(entry.name):
            return entry.fault or unsafe(entry.name)
        if not entry.size:
            return "empty file"
        if entry.size > self.max_member_mb * 2**20:
            return f"is {entry.size / 2**20:.0f} MiB, more than max_member_mb of its source, {self.max_member_mb}"
        return ""

    def _table(self, path: str, entries: list[Entry], look: Callable[[list[Entry]], list[Info | str]]) -> Clips:
        """The clips among a shard's members, and what is wrong with the others. ``look``: what some say about themselves."""
        bad: list[tuple[Entry, str]] = []
        wanted: dict[str, Entry] = {}
        end = None
        for entry in entries:
            if entry.last and entry.fault:
                reason = f"{entry.fault}; what comes before it is used" if wanted else entry.fault
                if entry.name and not is_clip(entry.name, self.suffixes):
                    end = path, f"{shown(entry.name)}: {reason}"
                else:
                    end = _where(path, entry), reason
            elif is_clip(entry.name, self.suffixes):
                reason = self._fault(entry) or ("a second member of the same name" if entry.name in wanted else "")
                if reason:
                    bad.append((entry, reason))
                else:
                    wanted[entry.name] = entry
        infos = look(list(wanted.values()))
        good = []
        for entry, info in zip(wanted.values(), infos, strict=True):
            if isinstance(info, Info):
                good.append((entry.offset, entry.size, info.width, info.height, info.num_frames, info.fps, entry.name))
            else:
                bad.append((entry, info))
        columns = {name: np.array([row[i] for row in good], kind) for i, (name, kind) in enumerate(COLUMNS.items())}
        names = Names(row[-1] for row in good)
        return Clips(names, columns, [(_where(path, entry), reason) for entry, reason in bad], end=end)


def _where(path: str, entry: Entry) -> str:
    """For messages; without control characters."""
    name = shown(entry.name)
    return str(Member(path, entry.offset, entry.size, name)) if name else path


def _stamp(path: str) -> list | str:
    try:
        return list(remote.stamp(path) if remote.is_remote(path) else file_stamp(path))
    except BadFile as error:
        return str(error)
    except OSError as error:
        if error.errno in OUR_FAULT:
            raise
        return f"cannot be opened: {error.strerror or error}"
