"""Are shards whole, readable and safe? ``python -m experiments.pack check=DIR``; see ``experiments/pack.py``."""

import hashlib
import json
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from datamodules.probe import Info
from datamodules.remote import is_remote
from datamodules.shards import Member
from datamodules.shards_index import is_clip, probe
from datamodules.shards_json import COLUMNS, FILE, Packed, parse_index, write_index
from datamodules.shards_tar import Bytes, Entry, opened, walk
from datamodules.sources import SUFFIXES, TARS
from experiments.compose import ConfigError
from experiments.pack import MAX_BESIDE, write_whole

MARK = "checked"  # in place of what was packed, in an index of shards that were made elsewhere


@dataclass
class Fault:
    """What is wrong with a member, or with a shard as a whole (no member)."""

    tar: str
    member: str
    reason: str


@dataclass
class _Known:
    """What index.json says: the kind, its mark, its shards."""

    kind: str
    source: str = MARK
    shards: dict[str, Packed] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)


def check(
    folder: str, kind: str, max_member_mb: int, accept: bool = False, say: Callable[[str], None] = print
) -> list[Fault]:
    """Read every shard of a folder; print and return what is wrong. ``accept``: write index.json anew, of what
    can be used in shards that are whole.

    ``kind`` is asked for where there is no index.json to say it. Raises ConfigError where there is nothing to check.
    """
    names = _shards(folder)
    known = _read_known(folder, kind)
    checker = _Checker(folder, known, max_member_mb, accept)
    bar = tqdm(total=len(names), unit="shard", disable=not sys.stderr.isatty())
    with bar, ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for name in names:
            checker.look(name, pool)
            bar.update()
    faults = [*known.faults, *checker.faults, *checker.keys_twice()]
    faults += [Fault(name, "", "is in index.json, but not in the folder") for name in known.shards if name not in names]
    sound = [name for name in names if name in checker.seen and name not in checker.broken]
    if accept:
        lines = (checker.seen[name].line() for name in sound)
        write_whole(Path(folder) / FILE, lambda file: write_index(file, known.kind, known.source, lines))
    _print(faults, say)
    noted = f"; {FILE} now describes what can be used of {len(sound)} shards" if accept else ""
    say(f"{len(names)} shards, {checker.num_clips} clips that can be read, {len(faults)} faults{noted}")
    return faults


def _shards(folder: str) -> list[str]:
    if is_remote(folder):
        raise ConfigError(f"check: {folder} is on a server; check shards where they lie on a disk")
    if not os.path.isdir(folder):
        raise ConfigError(f"check: {folder} is no folder")
    names = sorted(name for name in os.listdir(folder) if name.lower().endswith(TARS) and not name.startswith("."))
    if not names:
        raise ConfigError(f"check: {folder} has no shards (.tar) in it")
    return names


def _read_known(folder: str, kind: str) -> _Known:
    known = _Known(kind)
    try:
        with open(os.path.join(folder, FILE), encoding="utf-8", errors="replace") as file:
            header, shards = parse_index(file)
            known = _Known(header["kind"], header["source"])
            for packed in shards:
                known.shards[packed.tar] = packed
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        known.faults.append(Fault(FILE, "", f"cannot be used: {error}"))
    return known


class _Checker:
    """Goes through shards; ``seen`` is what it found in each."""

    def __init__(self, folder: str, known: _Known, max_member_mb: int, accept: bool):
        self.folder, self.known, self.accept = folder, known, accept
        self.max_bytes = max_member_mb * 2**20
        self.seen: dict[str, Packed] = {}
        self.faults: list[Fault] = []
        self.broken: set[str] = set()  # not whole, or not what they were
        self.num_clips = 0
        self._keys: dict[str, np.ndarray] = {}  # hashes: names would take gigabytes

    def look(self, tar: str, pool: ThreadPoolExecutor) -> None:
        """One shard."""
        path = os.path.join(self.folder, tar)
        try:
            with opened(path, hashed=True) as data:
                entries, digest = self._walk(tar, data), data.sha256()
            stat = os.stat(path)
        except OSError as error:
            self._fault(tar, "", f"cannot be read: {error.strerror or error}")
            self.broken.add(tar)
            return
        suffixes = SUFFIXES[self.known.kind]
        clips = [e for e in entries if not e.fault and e.size and is_clip(e.name, suffixes)]
        infos = pool.map(lambda e: probe(str(Member(path, e.offset, e.size, e.name)), self.known.kind), clips)
        sizes = {}
        for entry, info in zip(clips, infos, strict=True):
            if isinstance(info, Info):
                sizes[entry.offset] = info
            else:
                self._fault(tar, entry.name, info)
        if not clips:
            self._fault(tar, "", f"holds no {self.known.kind}")
        self.num_clips += len(sizes)
        kept = [e for e in entries if not e.fault and (e.offset in sizes or not is_clip(e.name, suffixes))]
        rows = [(e.name, e.offset, e.size, sizes.get(e.offset, Info(0, 0, 0, 0.0))) for e in kept]
        self.seen[tar] = Packed(
            tar, stat.st_size, stat.st_mtime_ns, digest,
            *([row[i] for row in rows] for i in range(3)),
            *([getattr(row[3], name) for row in rows] for name in ("width", "height", "num_frames", "fps")),
        )  # fmt: skip
        if tar in self.known.shards:
            self._compare(self.known.shards[tar], self.seen[tar])
        elif self.known.shards and not self.accept:
            self._fault(tar, "", "is not in index.json (accept=true adds it)")

    def _walk(self, tar: str, data: Bytes) -> list[Entry]:
        """All members; faults of names, sizes, order and JSON are noted."""
        entries, keys, names, last = [], set(), set(), None
        for entry in walk(data):
            entries.append(entry)
            if entry.fault:
                self._fault(tar, entry.name, entry.fault)
                self.broken |= {tar} if entry.last else set()
                continue
            if entry.name in names:
                self._fault(tar, entry.name, "a second member of the same name")
            names.add(entry.name)
            key = key_of(entry.name)
            if key != last:
                if key in keys:
                    self._fault(
                        tar, entry.name, f"the members of {key} do not lie together, so to webdataset they are two"
                    )
                keys.add(key)
            last = key
            if not entry.size and is_clip(entry.name, SUFFIXES[self.known.kind]):
                self._fault(tar, entry.name, "empty file")
            if entry.size > self.max_bytes:
                self._fault(tar, entry.name, f"is {entry.size / 2**20:.0f} MiB, more than max_member_mb")
            elif entry.name.lower().endswith(".json"):
                self._json(tar, entry, data)
        self._keys[tar] = np.array([_hash(key) for key in keys], np.uint64)
        return entries

    def _json(self, tar: str, entry: Entry, data: Bytes) -> None:
        if entry.size > MAX_BESIDE:
            self._fault(tar, entry.name, f"{entry.size / 2**20:.0f} MiB of JSON")
            return
        try:
            json.loads(data.read(entry.size))
        except (ValueError, RecursionError) as error:
            self._fault(tar, entry.name, f"no JSON: {error}")

    def _compare(self, told: Packed, seen: Packed) -> None:
        """A shard with its entry in index.json."""
        if told.sha256 != seen.sha256:
            self._fault(told.tar, "", "is not the file that index.json describes: its sha256 is another")
            self.broken.add(told.tar)
        elif self.accept:
            return
        elif differing := [name for name in COLUMNS if getattr(told, name) != getattr(seen, name)]:
            self._fault(
                told.tar, "", f"index.json says other {', '.join(differing)} of its members; accept=true notes these"
            )
        elif told.mtime_ns != seen.mtime_ns:
            self._fault(
                told.tar, "", "has another time than in index.json; its bytes are the same, so accept=true notes it"
            )

    def _fault(self, tar: str, member: str, reason: str) -> None:
        self.faults.append(Fault(tar, member, reason))

    def keys_twice(self) -> list[Fault]:
        """Samples that have their key from another shard."""
        every = np.concatenate([np.unique(keys) for keys in self._keys.values()] or [np.zeros(0, np.uint64)])
        values, counts = np.unique(every, return_counts=True)
        twice = set(values[counts > 1].tolist())
        first: dict[str, str] = {}
        faults = []
        for tar in [tar for tar, keys in self._keys.items() if twice & set(keys.tolist())] if twice else []:
            with opened(os.path.join(self.folder, tar)) as data:
                keys = dict.fromkeys(key_of(entry.name) for entry in walk(data) if not entry.fault)
            for key in keys:
                if _hash(key) in twice and first.setdefault(key, tar) != tar:
                    faults.append(Fault(tar, key, f"a key that {first[key]} has too"))
        return faults


def key_of(name: str) -> str:
    """Of a member of webdataset's form: everything before the first dot of its file name."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "big")


def _print(faults: list[Fault], say: Callable[[str], None]) -> None:
    """A table."""
    rows = [("shard", "member", "fault"), *((f.tar, _shown(f.member), f.reason) for f in faults)]
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    for row in rows if faults else []:
        say(f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]}")


def _shown(name: str) -> str:
    short = "".join(char if char.isprintable() else "?" for char in name)
    return short if len(short) <= 60 else f"{short[:28]}...{short[-29:]}"
