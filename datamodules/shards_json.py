"""``index.json`` beside shards: what ``experiments.pack`` knows of every member, so that nobody needs to look again.

One JSON object, written with one shard a line, so that it can be read line by line: ten million members at once would
take gigabytes as Python's lists. It is believed for shards whose size and time it knows (``shards_index.py``), and
within them for nothing that a shard cannot hold.
"""

import json
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from typing import TextIO

from datamodules import remote
from datamodules.faults import OUR_FAULT, BadFile
from datamodules.shards_tar import Bytes

log = logging.getLogger(__name__)
FORMAT = 1
FILE = "index.json"
COLUMNS = ("names", "offsets", "sizes", "width", "height", "num_frames", "fps")


@dataclass(frozen=True)
class Packed:
    """A shard in an index. Lists have one entry per member, in order; sizes in pixels are 0 of what is no film or image.

    ``tar`` is its file's name, ``size`` in bytes, ``mtime_ns`` and ``sha256`` the file's.
    """

    tar: str
    size: int
    mtime_ns: int
    sha256: str
    names: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    width: list[int] = field(default_factory=list)
    height: list[int] = field(default_factory=list)
    num_frames: list[int] = field(default_factory=list)
    fps: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        if {type(self.tar), type(self.sha256)} != {str} or {type(self.size), type(self.mtime_ns)} != {int}:
            raise ValueError("tar and sha256 must be text, size and mtime_ns numbers")
        columns = [getattr(self, name) for name in COLUMNS]
        if {type(column) for column in columns} != {list} or len({len(column) for column in columns}) != 1:
            raise ValueError(f"{self.tar}: {', '.join(COLUMNS)} must be lists of one length")
        if not all(type(name) is str for name in self.names):
            raise ValueError(f"{self.tar}: a name that is no text")
        if not all(type(value) is int and value >= 0 for column in columns[1:6] for value in column):
            raise ValueError(f"{self.tar}: a number that is none, or negative")
        if not all(type(value) in (int, float) and 0 <= value < 1e6 for value in self.fps):
            raise ValueError(f"{self.tar}: a frame rate that is none")
        if any(offset + size > self.size for offset, size in zip(self.offsets, self.sizes, strict=True)):
            raise ValueError(f"{self.tar}: a member beyond the shard's end")

    def line(self) -> str:
        """Itself as one line of JSON."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def parse(cls, line: str) -> "Packed":
        """From ``line``. Raises ValueError."""
        content = json.loads(line)
        known = {f.name for f in fields(cls)}
        if not isinstance(content, dict) or not known >= set(content):
            raise ValueError("no shard's description")
        try:
            return cls(**content)
        except TypeError as error:
            raise ValueError(str(error)) from None


def write_index(file: TextIO, kind: str, source: str, shards: Iterator[str]) -> None:
    """An index out of shards' lines. ``kind``: video or image; ``source``: a mark of what was packed."""
    file.write(json.dumps({"format": FORMAT, "kind": kind, "source": source, "shards": []})[:-2] + "\n")
    for number, line in enumerate(shards):
        file.write((",\n" if number else "") + line)
    file.write("\n]}\n")


def parse_index(lines: Iterable[str]) -> tuple[dict, Iterator[Packed]]:
    """An index's first line (``kind``, ``source``) and its shards. Raises ValueError where it is none, also while iterated."""
    lines = iter(lines)
    try:
        header = json.loads(next(lines, "").rstrip() + "]}")
    except ValueError:
        header = None
    if not isinstance(header, dict) or header.get("format") != FORMAT or header.get("shards") != []:
        raise ValueError(f"its first line is not that of format {FORMAT}")
    if header.get("kind") not in ("video", "image") or not isinstance(header.get("source"), str):
        raise ValueError("its first line does not say what kind it is of")

    def shards() -> Iterator[Packed]:
        for line in lines:
            if line.strip() == "]}":
                return
            yield Packed.parse(line.rstrip().removesuffix(","))
        raise ValueError("it ends early")

    return header, shards()


def read_index(folder: str, kind: str, use: Callable[[Packed], None]) -> None:
    """Call ``use`` with every shard of the folder's index, if it has one of that kind. ``folder`` may be a URL.

    One that is broken is told in the log and not used from there on. Raises Unreachable.
    """
    path = f"{folder}/{FILE}"
    try:
        if remote.is_remote(path):
            remote.read_through(path, lambda data: _use(path, _lines(data), kind, use))
        else:
            with open(path, encoding="utf-8") as file:
                _use(path, file, kind, use)
    except (BadFile, remote.Denied, FileNotFoundError):
        return  # most folders have none; some servers say "denied" of what is not there
    except OSError as error:
        if error.errno in OUR_FAULT:
            raise
        log.warning("%s cannot be read (%s), so its shards are gone through", path, error.strerror or error)


def _use(path: str, lines: Iterable[str], kind: str, use: Callable[[Packed], None]) -> None:
    try:
        header, shards = parse_index(lines)
        if header["kind"] == kind:
            for packed in shards:
                use(packed)
    except (ValueError, RecursionError) as error:
        log.warning(
            "%s was not written by experiments.pack, or changed since (%s): its shards are gone through", path, error
        )


def _lines(data: Bytes) -> Iterator[str]:
    rest = b""
    while part := data.read(2**20):
        *whole, rest = (rest + part).split(b"\n")
        yield from (line.decode("utf-8", "replace") for line in whole)
    if rest:
        yield rest.decode("utf-8", "replace")
