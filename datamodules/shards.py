"""Members of tar shards as paths: ``TAR::OFFSET+SIZE::MEMBER``, where TAR is a file or a URL. Nothing is ever extracted.

Of a local shard FFmpeg reads the member in place, by its protocol ``subfile``, so that a window of a long film costs the
bytes of that window. Of a remote one the member is fetched whole, by one range request, and kept while it is the last
one asked for: whoever opens it three times in a row, to check, decode and compare, has fetched it once.
"""

import io
import os
import re
import threading
from dataclasses import dataclass
from typing import BinaryIO

from datamodules.faults import OUR_FAULT, BadFile
from datamodules.remote import fetch, is_remote

MAX_MEMBER_MB = 4096  # of a member that is read into memory, whatever a source allows
_MEMBER = re.compile(r"(?P<tar>.+?)::(?P<offset>\d{1,19})\+(?P<size>\d{1,19})::(?P<name>.+)", re.DOTALL)
_last = threading.local()  # .path, .data: the remote member that this thread asked for last


@dataclass(frozen=True)
class Member:
    """Where a member's bytes lie: ``size`` bytes of ``tar`` from ``offset`` on. ``name`` is its name in the tar."""

    tar: str
    offset: int
    size: int
    name: str

    def __str__(self) -> str:
        return f"{self.tar}::{self.offset}+{self.size}::{self.name}"


def is_member(path: str) -> bool:
    """Whether this is the path of a member of a shard."""
    return "::" in path and _MEMBER.fullmatch(path) is not None


def parse(path: str) -> Member:
    """A member's path, taken apart. Raises ValueError for a path that is none."""
    match = _MEMBER.fullmatch(path)
    if match is None:
        raise ValueError(f"{path} is no member of a shard (TAR::OFFSET+SIZE::MEMBER)")
    return Member(match["tar"], int(match["offset"]), int(match["size"]), match["name"])


def openable(path: str) -> str | io.BytesIO:
    """What ``av.open`` and ``decord.VideoReader`` can open: a path as it is; a member of a local shard in place; a remote one's bytes.

    Bytes stand at their beginning; a reader that has read them must call this again, or rewind them. Raises BadFile, and
    Unreachable for a server that does not answer.
    """
    if not is_member(path):
        return path
    member = parse(path)
    if is_remote(member.tar):
        return open_bytes(path)
    check_member(member)
    # file: or a relative path with a colon in it would be taken for a URL
    return f"subfile,,start,{member.offset},end,{member.offset + member.size},,:file:{member.tar}"


def open_bytes(path: str) -> io.BytesIO:
    """A file or member, read whole. Sizes are checked before anything is read. Raises BadFile and Unreachable."""
    if not is_member(path):
        return io.BytesIO(_read(path, 0, None))
    member = parse(path)
    _check_size(member.size)
    if not is_remote(member.tar):
        check_member(member)
        return io.BytesIO(_read(member.tar, member.offset, member.size))
    if getattr(_last, "path", None) != path:
        _last.path = None
        _last.data = fetch(member.tar, member.offset, member.size)
        _last.path = path
    return io.BytesIO(_last.data)  # shares the bytes until somebody writes


def open_part(path: str) -> BinaryIO:
    """A file or member for whoever reads only its head: of what lies on a disk no more than that is read. Raises BadFile."""
    if not is_member(path):
        return open(path, "rb")
    member = parse(path)
    if is_remote(member.tar):
        return open_bytes(path)
    check_member(member)
    return io.BufferedReader(_Part(member))


class _Part(io.RawIOBase):
    """A stretch of a file, read only."""

    def __init__(self, member: Member):
        self._file, self._member, self._at = io.FileIO(member.tar), member, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._member.size}[whence]
        self._at = max(start + offset, 0)
        return self._at

    def readinto(self, buffer) -> int:
        wanted = min(len(buffer), max(self._member.size - self._at, 0))
        self._file.seek(self._member.offset + self._at)
        num = self._file.readinto(memoryview(buffer)[:wanted])
        self._at += num
        return num

    def close(self) -> None:
        self._file.close()
        super().close()


def check_member(member: Member) -> None:
    """Raise BadFile where a local member is empty, or its shard is missing or ends before it. Disk full and the like: OSError."""
    if not member.size:
        raise BadFile("empty file")
    if is_remote(member.tar):
        return
    try:
        size = os.stat(member.tar).st_size
    except OSError as error:
        if error.errno in OUR_FAULT:
            raise
        raise BadFile(f"its shard cannot be opened: {error.strerror or error}") from None
    if member.offset + member.size > size:
        raise BadFile(f"its shard ends early: {member.offset + member.size} bytes are needed, {size} are there")


def _check_size(size: int) -> None:
    if size > MAX_MEMBER_MB * 2**20:
        raise BadFile(f"is {size / 2**20:.0f} MiB, more than the {MAX_MEMBER_MB} that are read into memory")


def _read(path: str, offset: int, size: int | None) -> bytes:
    try:
        with open(path, "rb") as file:
            if size is None:
                size = os.fstat(file.fileno()).st_size
                _check_size(size)
            file.seek(offset)
            data = file.read(size)
    except OSError as error:
        if error.errno in OUR_FAULT:
            raise
        raise BadFile(f"cannot be opened: {error.strerror or error}") from None
    if len(data) < size:
        raise BadFile(f"ends early: {size} bytes are announced, {len(data)} are there")
    return data
