"""What lies where in a tar, and what is wrong with it. Reads headers; trusts none of them.

Our own reader in place of tarfile's, because a tar may come from anywhere: headers that announce gigabytes of names are refused
before they are read, a tar that ends early says where, and the same code reads a file and a stream. Members are never
extracted, so links and devices do no harm; they are named all the same, as are names that would lead out of a folder:
a name becomes part of a clip's key, and keys become names of files.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

BLOCK = 512
MAX_HEADER_BYTES = 2**20  # of a long name or PAX header; a path may have 4096
MAX_NAME = 1024
_PACKED = {
    b"\x1f\x8b": "gzip (gunzip it)",
    b"BZh": "bzip2 (bunzip2 it)",
    b"\xfd7zXZ": "xz (unxz it)",
    b"\x28\xb5\x2f\xfd": "zstd (unzstd it)",
}
_ODD = {
    b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a pipe",
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A member: its name, where its data begin and how long they are, in bytes; ``fault`` says why it cannot be used.

    ``last``: with this fault the tar ends; whatever may come after it is out of reach.
    """

    name: str
    offset: int
    size: int
    fault: str = ""
    last: bool = False


class Bytes:
    """A tar's bytes from front to back, of a file or a stream. ``size``: how many there are, where that is known."""

    def __init__(self, file: BinaryIO, size: int | None, seekable: bool = True, hashed: bool = False):
        self._file, self.size, self._seekable = file, size, seekable and not hashed
        self._hash = hashlib.sha256() if hashed else None
        self.at = 0

    def read(self, num: int) -> bytes:
        """The next bytes; fewer only at the end."""
        parts = []
        while num and (part := self._file.read(num)):
            parts.append(part)
            num -= len(part)
            self.at += len(part)
            if self._hash is not None:
                self._hash.update(part)
        return b"".join(parts)

    def goto(self, offset: int) -> bool:
        """Move forward; false where the bytes end before."""
        if self.size is not None and offset > self.size:
            return False
        if self._seekable:
            self._file.seek(offset)
            self.at = offset
        while self.at < offset and self.read(min(2**20, offset - self.at)):
            pass
        return self.at == offset

    def sha256(self) -> str:
        """Of everything, to the end; only if ``hashed``."""
        while self.read(2**20):
            pass
        return self._hash.hexdigest()


def walk(tar: Bytes) -> Iterator[Entry]:
    """Every member but folders, in order. Between two of them the caller may read the first one's data from ``tar``."""
    start, long_name, pax = 0, None, {}
    while True:
        header = tar.read(BLOCK) if tar.goto(start) else b""
        if len(header) < BLOCK:
            reason = "the shard ends early, without a tar's end mark" if start else "empty file"
            yield _end(start, _no_tar(header) if header and not start else reason)
            return
        if not header.strip(b"\0"):
            return
        kind, size, data = header[156:157], _number(header[124:136]), start + BLOCK
        if not _sound(header) or size is None:
            where = f"damaged: no tar header at byte {start}, where one should be"
            yield _end(start, where if start else _no_tar(header))
            return
        if kind in b"LKxgX":
            if size > MAX_HEADER_BYTES:
                yield _end(start, f"a header of {size} bytes, more than the {MAX_HEADER_BYTES} that a name can need")
                return
            if len(extra := tar.read(size)) < size:
                yield _end(start, f"the shard ends early, in the header at byte {start}")
                return
            long_name = extra.rstrip(b"\0") if kind == b"L" else long_name
            pax = _records(extra) if kind in b"xX" else pax
            start = data + _padded(size)
            continue
        name, size, more = _name(header, long_name, pax), _pax_size(pax, size), header[482]
        while kind == b"S" and more and len(block := tar.read(BLOCK)) == BLOCK:  # a sparse file's map goes on
            data, more = data + BLOCK, block[504]
        entry = _entry(name, kind, data, size, pax, tar)
        if entry is not None:
            yield entry
            if entry.last:
                return
        start = data + (0 if kind in b"123456" else _padded(size))
        long_name, pax = None, {}


def _entry(name: str, kind: bytes, data: int, size: int | None, pax: dict, tar: Bytes) -> Entry | None:
    """The member with what is wrong with it; None for a folder."""
    if size is None or size < 0:
        return Entry(name, data, 0, "its header has no usable size, so what follows cannot be found", last=True)
    if kind == b"5" or (kind == b"\0" and name.endswith("/")):
        return None
    if kind in _ODD:
        return Entry(name, data, 0, f"{_ODD[kind]}, not a file")
    if kind == b"S" or any(key.startswith("GNU.sparse") for key in pax):
        return Entry(name, data, size, "a sparse file, which only an unpacked tar has whole")
    if tar.size is not None and data + size > tar.size:
        reason = f"the shard ends early: this member needs {data + size} bytes of it, {tar.size} are there"
        return Entry(name, data, size, reason, last=True)
    return Entry(name, data, size, unsafe(name))


def _end(offset: int, reason: str) -> Entry:
    return Entry("", offset, 0, reason, last=True)


def _no_tar(header: bytes) -> str:
    for magic, how in _PACKED.items():
        if header.startswith(magic):
            return f"a tar compressed with {how}: members of it can only be reached one after the other"
    return "no tar file"


def _sound(header: bytes) -> bool:
    """Whether the checksum holds; some old writers summed signed bytes."""
    told, body = _number(header[148:156]), header[:148] + b" " * 8 + header[156:]
    return told in (sum(body), sum(byte - 256 if byte > 127 else byte for byte in body))


def _number(field: bytes) -> int | None:
    """Octal digits, or binary where the first bit is set; None for neither."""
    if field[0] & 0x80:
        value = int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
        return value if field[0] == 0x80 else None
    digits = field.split(b"\0")[0].strip()
    if not digits:
        return 0
    return int(digits, 8) if all(48 <= digit < 56 for digit in digits) else None


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _records(data: bytes) -> dict[str, bytes]:
    """A PAX header: ``LENGTH KEY=VALUE``, line by line; what is malformed ends it."""
    found, at = {}, 0
    while at < len(data):
        digits = data[at : at + 12].split(b" ")[0]
        if not digits.isdigit() or not int(digits):
            break
        line = data[at + len(digits) + 1 : at + int(digits) - 1]
        key, equals, value = line.partition(b"=")
        if equals:
            found[key.decode("utf-8", "replace")] = value
        at += int(digits)
    return found


def _pax_size(pax: dict[str, bytes], size: int) -> int | None:
    if "size" not in pax:
        return size
    text = pax["size"]
    return int(text) if text.isdigit() and len(text) < 20 else None


def _name(header: bytes, long_name: bytes | None, pax: dict[str, bytes]) -> str:
    name, prefix = header[:100].split(b"\0")[0], header[345:500].split(b"\0")[0]
    if header[257:262] == b"ustar" and header[262:263] == b"\0" and prefix:
        name = prefix + b"/" + name
    name = pax.get("path") or long_name or name
    text = name.split(b"\0")[0].decode("utf-8", "surrogateescape")
    while text.startswith("./"):
        text = text[2:]
    return text


def unsafe(name: str) -> str:
    """Why a name cannot be used, or nothing."""
    if not name or len(name) > MAX_NAME:
        return "a name that is empty" if not name else f"a name of {len(name)} characters"
    if name[0] in "/\\" or name[1:2] == ":":
        return "an absolute path as name"
    if ".." in name.replace("\\", "/").split("/"):
        return "a name that leads out of its folder"
    if not name.isprintable() and any(ord(char) < 32 or ord(char) == 127 for char in name):
        return "a name with control characters"
    return ""


@contextmanager
def opened(path: str, hashed: bool = False) -> Iterator[Bytes]:
    """A local tar's bytes. Raises OSError."""
    with open(path, "rb") as file:
        yield Bytes(file, os.fstat(file.fileno()).st_size, hashed=hashed)
