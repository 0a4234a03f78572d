"""Bytes of files on servers: http and https by Python's own client, s3, gs and others by fsspec and its plugins.

Every read says which bytes it wants. A server that sends whole files instead is refused before they are read: a shard of
a gigabyte for every clip of a megabyte would be a training run that nobody understands. A server that does not answer is
asked again, with growing pauses; then it is Unreachable, which ends the run with that reason: it is no fault of any clip.
"""

import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import TypeVar

from datamodules.faults import OUR_FAULT, BadFile, Unreachable
from datamodules.shards_tar import Bytes


class Denied(Unreachable):
    """A server that wants credentials, or says so of what is not there."""


T = TypeVar("T")
PAUSES_S = (1.0, 4.0, 16.0)  # before the second, third and fourth attempt
TIMEOUT_S = 20.0  # without a byte; with the pauses less than data.clip_timeout_s, which blames the clip
_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://")
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)")
_BUGS = (MemoryError, LookupError, TypeError, AttributeError, NameError, AssertionError)
_GONE = {404, 410}  # that one file is not there; anything else may be the server's trouble
_DENIED = {401, 403}


def is_remote(path: str) -> bool:
    """Whether this is a URL (``https://...``, ``s3://...``) and no path."""
    return _URL.match(path) is not None


def fetch(url: str, offset: int, size: int) -> bytes:
    """``size`` bytes from ``offset`` on, by one request.

    Raises BadFile where the file is gone or ends before, Unreachable where the server does not answer or cannot send parts.
    """
    data = _patiently(url, lambda: _ranged(url, offset, size))
    if len(data) != size:
        raise BadFile(f"its shard ends early: {size} bytes from {offset} on were asked for, {len(data)} came")
    return data


def stamp(url: str) -> tuple[int, str]:
    """(size in bytes, the server's mark of this version) of a file, by a request for its first byte. Raises as ``fetch``."""
    return _patiently(url, lambda: _stamp(url))


def read_through(url: str, use: Callable[[Bytes], T]) -> T:
    """``use`` with a file's bytes from front to back, by one request; called again from the start where the connection breaks.

    Raises BadFile where the file is not there, and Unreachable.
    """

    def attempt() -> T:
        if _by_http(url):
            try:
                with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response:
                    size = int(response.headers["Content-Length"]) if "Content-Length" in response.headers else None
                    return use(Bytes(_Steady(response, size), size, seekable=False))
            except urllib.error.HTTPError as error:
                _judge(url, error)
                raise
        filesystem, path = _filesystem(url)
        try:
            with filesystem.open(path, "rb") as file:
                return use(Bytes(file, filesystem.size(path), seekable=False))
        except FileNotFoundError:
            raise BadFile("is not there") from None

    return _patiently(url, attempt)


class _Steady:
    """A response that does not pass a broken connection off as the end of the file."""

    def __init__(self, response, size: int | None):
        self._response, self._left = response, size

    def read(self, num: int) -> bytes:
        data = self._response.read(num)
        if self._left is not None:
            self._left -= len(data)
            if num and not data and self._left > 0:
                raise ConnectionError(f"the connection ended {self._left} bytes before the file does")
        return data


def _by_http(url: str) -> bool:
    return url.lower().startswith(("http://", "https://"))


def _stamp(url: str) -> tuple[int, str]:
    if not _by_http(url):
        filesystem, path = _filesystem(url)
        try:
            told = filesystem.info(path)
        except FileNotFoundError:
            raise BadFile("is not there") from None
        marks = (
            str(told[key]) for key in ("ETag", "etag", "mtime", "LastModified", "updated", "created") if key in told
        )
        return int(told["size"]), next(marks, "")
    try:
        with _part_of(url, 0, 1) as response:
            size = response.headers["Content-Range"].rpartition("/")[2]
            mark = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
            if not size.isdigit():
                raise Unreachable(f"{url}: the server does not say how long the file is")
            return int(size), mark
    except urllib.error.HTTPError as error:
        if error.code == 416:
            return 0, ""
        _judge(url, error)
        raise


def _patiently(url: str, attempt: Callable[[], T]) -> T:
    """Attempt, and again after a pause where the server is in trouble. Raises Unreachable."""
    for pause in (*PAUSES_S, None):
        try:
            return attempt()
        except (BadFile, Unreachable, *_BUGS):
            raise
        except Exception as error:  # plugins have exceptions of their own
            if isinstance(error, OSError) and error.errno in OUR_FAULT:
                raise
            if pause is None:
                raise Unreachable(
                    f"{url} cannot be read after {len(PAUSES_S) + 1} attempts in {sum(PAUSES_S):g} s "
                    f"({_tell(error)}): is the server up, and the network? The same command goes on where this run stopped"
                ) from None
        time.sleep(pause)
    raise AssertionError


def _tell(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _ranged(url: str, offset: int, size: int) -> bytes:
    if not _by_http(url):
        filesystem, path = _filesystem(url)
        try:
            return filesystem.cat_file(path, start=offset, end=offset + size)
        except FileNotFoundError:
            raise BadFile("is not there") from None
    try:
        with _part_of(url, offset, size) as response:
            promised = int(_CONTENT_RANGE.match(response.headers["Content-Range"])[2]) - offset + 1
            data = response.read(size)
    except urllib.error.HTTPError as error:
        _judge(url, error)
        raise
    if len(data) < min(promised, size):
        raise ConnectionError(f"the connection ended after {len(data)} of {size} bytes")
    return data


def _part_of(url: str, offset: int, size: int):
    """The response to a request for a part, whose body is that part. Raises Unreachable where it is something else."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={offset}-{offset + size - 1}"})
    response = urllib.request.urlopen(request, timeout=TIMEOUT_S)
    given = _CONTENT_RANGE.match(response.headers.get("Content-Range", ""))
    if response.status != 206 or not given or int(given[1]) != offset:
        response.close()
        raise Unreachable(
            f"{url}: the server sends whole files only (it ignores Range), so clips cannot be read from it; serve the shards "
            "with another one, or copy them to a disk"
        )
    return response


def _judge(url: str, error: urllib.error.HTTPError) -> None:
    """Raise what a server's refusal means; returns where it may be better next time."""
    if error.code in _GONE:
        raise BadFile(f"is not there: the server says {error.code} {error.reason}") from None
    if error.code == 416:
        raise BadFile("its shard ends early: the server has no such bytes") from None
    if error.code in _DENIED:
        raise Unreachable(
            f"{url}: the server refuses it: {error.code} {error.reason}; are its credentials set?"
        ) from None


def _filesystem(url: str):
    """(fsspec's filesystem, path in it). Raises Unreachable where its plugin is not installed."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise Unreachable(f"{url} cannot be opened: {error}") from None
