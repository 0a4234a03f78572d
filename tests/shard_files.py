"""Shards for tests: tars of films as img2dataset and video2dataset write them, hostile ones, and a server that sends parts."""

import io
import json
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from video_files import make_film

from datamodules.config import SourceConfig
from datamodules.index import SourceIndex, build_index


def index(path: Path | str, cache: Path, **options) -> SourceIndex:
    """Of a source "k", remembered in ``cache``."""
    return build_index("k", SourceConfig(str(path), **options), str(cache))


def everything(built: SourceIndex) -> list[tuple]:
    """(name, width, height, frames, rate) of all that is in it."""
    arrays = zip(built.width, built.height, built.num_frames, built.fps, strict=True)
    return [(built.names[i], *map(float, row)) for i, row in enumerate(arrays)]


def add(tar: tarfile.TarFile, name: str, data: bytes = b"", **fields) -> None:
    """A member with whatever fields of its header."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(data))


def make_shard(path: Path, films: dict[str, Path], beside: bool = True) -> Path:
    """A tar of KEY.mp4, KEY.json and KEY.txt for each key; the JSON lies about sizes, as foreign ones may."""
    with tarfile.open(path, "w") as tar:
        for key, film in films.items():
            add(tar, key + film.suffix, film.read_bytes())
            if beside:
                add(tar, f"{key}.json", json.dumps({"width": 4096, "height": 2160, "caption": key}).encode())
                add(tar, f"{key}.txt", key.encode())
    return path


class Served:
    """A folder on a server on this machine. ``log`` has (path, Range header) of every request.

    Ways to fail: ``parts`` false sends whole files only; the next ``broken`` answers end in the middle; the next ``busy``
    are "503"; ``statuses`` gives paths another status.
    """

    def __init__(self, root: Path):
        self.root, self.log, self.url = root, [], ""
        self.parts, self.broken, self.busy, self.statuses = True, 0, 0, {}

    def requests(self, name: str) -> list[str | None]:
        """Range headers of the requests for a file."""
        return [given for path, given in self.log if path == f"/{name}"]

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        given = handler.headers.get("Range")
        self.log.append((handler.path, given))
        status, path = self.statuses.get(handler.path), self.root / handler.path.strip("/")
        if self.busy:
            self.busy, status = self.busy - 1, 503
        elif not path.is_file():
            status = 404
        if status:
            handler.send_error(status)
            return
        data, size = path.read_bytes(), path.stat().st_size
        if given and self.parts:
            first, last = (int(text) for text in given.removeprefix("bytes=").split("-"))
            if first >= size:
                handler.send_error(416)
                return
            data = data[first : last + 1]
            handler.send_response(206)
            handler.send_header("Content-Range", f"bytes {first}-{first + len(data) - 1}/{size}")
        else:
            handler.send_response(200)
        handler.send_header("Content-Length", str(len(data)))
        handler.send_header("ETag", f'"{path.stat().st_mtime_ns}-{size}"')
        handler.end_headers()
        if self.broken:
            self.broken, data = self.broken - 1, data[: len(data) // 2]
        handler.wfile.write(data)


@contextmanager
def served(root: Path) -> Iterator[Served]:
    """A running server."""
    folder = Served(root)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            folder.answer(self)

        def log_message(self, *_) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    folder.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield folder
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def make_films(folder: Path) -> list[Path]:
    """Six different films, one of them in another container."""
    return [make_film(folder / f"{i}.{'mkv' if i == 5 else 'mp4'}", 20 + i, film=i) for i in range(6)]


def make_shards(folder: Path, films: list[Path]) -> Path:
    """000.tar, 001.tar and 002.tar, of two films each: 00000000.mp4 is the first of the first."""
    folder.mkdir()
    for i in range(3):
        make_shard(folder / f"{i:03d}.tar", {f"{i:03d}{k:05d}": films[2 * i + k] for k in range(2)})
    return folder
