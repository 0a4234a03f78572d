"""A blind vote between runs, in the browser: ``python -m experiments.vote RUN RUN [key=value ...]``.

    sets       named evaluation sets in place of the validation clips: sets=[davis]
    clips      of each stream, drawn by the seed; default 8
    trials     pairs that a participant is asked at most, without checks; default 40
    truth      true: the truth is one of the methods
    db         file of the votes (SQLite); default: vote-<runs>.db under RUNS_ROOT/comparisons (with sets and overrides in its name).
               The same command goes on with it
    port, host where it is served; default 8000 on 127.0.0.1: this machine alone. host=0.0.0.0 lets others in: there is no password
    seed       by which clips are drawn; order and sides are drawn for everyone anew and cannot be foretold
    fps        of the films; default 16

    min_ms, same_side, spoilt, identical   whose answers will not count (experiments/vote_results.py); kept with the vote when it begins

    results=true db=FILE   prints shares with intervals instead, and who was excluded and why. Another rule than that of the
                           beginning may be tried, and the results say so

The page is given two addresses and learns nothing else: addresses are random for every participant and side, films of a clip
have equal sizes in bytes, sides are drawn for every participant and remembered. Checks of attention are among the pairs: two
identical films, and the truth against a spoilt copy. An answer is taken once both films were fetched and have had the time to be
played to their end. The server sends nothing but its four own files and films that it has
just told somebody to look at; no part of a request is ever used as a path.
"""

import errno
import hashlib
import json
import random
import re
import socket
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from experiments import decoded, vote_results
from experiments.compose import ConfigError, run_cli
from experiments.decoded import Frames
from experiments.report import PAGE, options, picture
from experiments.report_folder import folder_name, sets_named
from experiments.runs import runs_root
from experiments.vote_store import DEGRADED, TRUTH, Refused, Store, Study

BLOCK = 8  # pixels: the spoilt copy has one colour for so many by so many
MOST_BYTES = 2048  # of a request
LONGEST_NAME = 60
STATIC = {
    "/": ("vote.html", "text/html; charset=utf-8"),
    "/vote.js": ("vote.js", "text/javascript; charset=utf-8"),
    "/view.js": ("view.js", "text/javascript; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
}
FILM = re.compile(r"/film/([A-Za-z0-9_-]{22})")
POLICY = "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; connect-src 'self'; img-src 'self' data: blob:"


@dataclass
class VoteConfig:
    """The command's own options; the last four are the rule of exclusion, where it is not the usual one."""

    runs: list[str] = field(default_factory=list)
    sets: list[str] | None = None
    clips: int = 8
    trials: int = 40
    truth: bool = False
    db: str | None = None
    port: int = 8000
    host: str = "127.0.0.1"
    seed: int = 0
    fps: float = 16.0
    overrides: list[str] = field(default_factory=list)  # of the evaluations
    results: bool = False
    min_ms: float | None = None
    same_side: int | None = None
    spoilt: float | None = None
    identical: float | None = None

    def __post_init__(self) -> None:
        if self.results and not self.db and not self.runs:
            raise ValueError("results of which vote? make vote results=true db=FILE")
        if twice := [run for i, run in enumerate(self.runs) if run in self.runs[:i]]:
            raise ValueError(f"{twice[0]} is named twice: a run cannot be voted on against itself")
        if not self.results and len(self.runs) + self.truth < 2:
            raise ValueError('which two runs? make vote exps="a b"')
        vote_results.Rule(**self.rule())
        if min(self.clips, self.trials) < 1 or not 0 < self.fps <= 240 or not 0 <= self.port <= 65535:
            raise ValueError("clips and trials must be 1 or more, fps in 0 to 240, port in 0 to 65535")

    def rule(self) -> dict[str, float]:
        """What was typed of the rule of exclusion."""
        typed = {name: getattr(self, name) for name in asdict(vote_results.Rule())}
        return {name: value for name, value in typed.items() if value is not None}

    def file(self) -> Path:
        """Where the votes are."""
        name = folder_name([*self.runs, *sets_named(self.sets), *self.overrides])
        return Path(self.db) if self.db else runs_root() / "comparisons" / f"vote-{name}.db"


# --- films ------------------------------------------------------------------------------------------------------------


def draw_clips(config: VoteConfig) -> list[list[str]]:
    """[stream, key] of the clips that are voted on: drawn, the same for the same seed, from those that all runs were scored on."""
    common: dict[tuple[str, str], None] | None = None
    for run in config.runs:
        there = decoded.scored_clips(decoded.plan(run, config.sets, config.overrides).folder, run)
        common = {clip: None for clip in there if common is None or clip in common}
    streams: dict[str, list[str]] = {}
    for stream, key in common or {}:
        streams.setdefault(stream, []).append(key)
    if not streams:
        raise ConfigError(f"{', '.join(config.runs)} were scored on no clip in common")
    draw = random.Random(f"clips/{config.seed}")
    return [[s, key] for s, keys in streams.items() for key in sorted(draw.sample(keys, min(config.clips, len(keys))))]


def films_of(config: VoteConfig, clips: Sequence[Sequence[str]]) -> tuple[list[str], list[dict[int, Frames]]]:
    """Names of the methods, and for every clip the films by number: methods', TRUTH, DEGRADED.

    Raises ConfigError where runs were measured on different pixels.
    """
    methods = [*config.runs, *([decoded.TRUTH] if config.truth else [])]
    films: list[dict[int, Frames]] = [{} for _ in clips]
    for number, run in enumerate(config.runs):
        for stream in dict.fromkeys(stream for stream, _ in clips):
            own = [(i, key) for i, (where, key) in enumerate(clips) if where == stream]
            found = decoded.decode(run, stream, [key for _, key in own], config.sets, config.overrides)
            for i, key in own:
                films[i][number] = found[key][decoded.DECODER]
                truth = films[i].setdefault(TRUTH, found[key][decoded.TRUTH])
                if not np.array_equal(truth, found[key][decoded.TRUTH]):
                    raise ConfigError(f"{run} was not measured on the same pixels of {key} as {config.runs[0]}")
    for film in films:
        film[DEGRADED] = degraded(film[TRUTH])
        if config.truth:
            film[len(config.runs)] = film[TRUTH]
    return methods, films


def degraded(frames: Frames) -> Frames:
    """The film in blocks of one colour: nobody who looks prefers it."""
    t, h, w = frames.shape[:3]
    padded = np.pad(frames, ((0, 0), (0, -h % BLOCK), (0, -w % BLOCK), (0, 0)), mode="edge")
    cells = padded.reshape(t, padded.shape[1] // BLOCK, BLOCK, padded.shape[2] // BLOCK, BLOCK, 3).mean((2, 4))
    return cells.round().astype(np.uint8).repeat(BLOCK, 1).repeat(BLOCK, 2)[:, :h, :w]


def pack(frames: Frames) -> bytes:
    """A film as the page reads it: number of frames, then each one's length and its lossless WebP."""
    parts = [picture(frame, "WEBP") for frame in frames]
    return struct.pack(">I", len(parts)) + b"".join(struct.pack(">I", len(part)) + part for part in parts)


def write_packs(folder: Path, films: Sequence[Mapping[int, Frames]]) -> None:
    """Files of all films; those of a clip are filled up to the size of the largest, so that sizes say nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    for clip, methods in enumerate(films):
        paths = {number: folder / pack_name(clip, number) for number in methods}
        if all(path.is_file() for path in paths.values()) and len({p.stat().st_size for p in paths.values()}) == 1:
            continue
        packs = {number: pack(frames) for number, frames in methods.items()}
        size = max(map(len, packs.values()))
        for number, content in packs.items():
            paths[number].write_bytes(content.ljust(size, b"\0"))


def pack_name(clip: int, number: int) -> str:
    """A film's file."""
    return f"{clip}-{'truth' if number == TRUTH else 'spoilt' if number == DEGRADED else number}.film"


def prepare(config: VoteConfig) -> tuple[Store, Path]:
    """The file of the votes and the folder of the films, for a vote that begins or goes on."""
    clips = draw_clips(config)
    methods, films = films_of(config, clips)
    digests = [
        [hashlib.sha256(np.ascontiguousarray(film[n])).hexdigest() for n in range(len(methods))] for film in films
    ]
    same = [(a, b) for b in range(len(methods)) for a in range(b) if all(found[a] == found[b] for found in digests)]
    if same:
        a, b = (methods[number] for number in same[0])
        raise ConfigError(f"{a} and {b} have the same films of all clips: there is nothing to vote on between them")
    rule = asdict(vote_results.Rule(**config.rule()))
    lengths = [len(film[TRUTH]) for film in films]
    study = Study(methods, clips, digests, config.trials, fps=config.fps, lengths=lengths, rule=rule)
    store = Store(config.file())
    store.begin_study(study)
    folder = (
        config.file().with_name(config.file().name + ".films") / hashlib.sha256(str(digests).encode()).hexdigest()[:12]
    )
    write_packs(folder, films)
    return store, folder


# --- serving ----------------------------------------------------------------------------------------------------------


class Server(ThreadingHTTPServer):
    """Serves the page, films by their addresses, and four questions: begin, next, shown, vote."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], store: Store, folder: Path) -> None:
        self.store, self.folder = store, folder.resolve()
        self.sent: set[str] = set()  # addresses of films that somebody fetched
        self.static = {path: ((PAGE / name).read_bytes(), kind) for path, (name, kind) in STATIC.items()}
        super().__init__(address, Handler)

    def film(self, address: str) -> bytes | None:
        """A film's bytes; None where there is no such address, or its file is not in the folder."""
        found = self.store.film(address)
        if found is None:
            return None
        path = (self.folder / pack_name(*found)).resolve()
        if not path.is_relative_to(self.folder) or not path.is_file():
            return None
        self.sent.add(address)
        return path.read_bytes()

    def host_is_ours(self, host: str) -> bool:
        """Whether a request names this server: pages elsewhere must not reach it under a name of theirs."""
        where, port = self.server_address[:2]
        return where not in ("127.0.0.1", "::1") or host in (f"127.0.0.1:{port}", f"localhost:{port}", f"[::1]:{port}")


class Handler(BaseHTTPRequestHandler):
    """One connection. Paths are compared with a fixed list, never joined to a folder."""

    server: Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "vote", ""
    timeout = 30  # seconds that a silent connection is kept

    def do_GET(self) -> None:
        if not self.server.host_is_ours(self.headers.get("Host", "")):
            return self._send(403, {"error": "this server goes by another name"})
        path = self.path.partition("?")[0]  # links are passed on with all sorts of things behind them
        if (static := self.server.static.get(path)) is not None:
            return self._send(200, *static)
        match = FILM.fullmatch(path)
        content = self.server.film(match[1]) if match else None
        if content is None:
            return self._send(404, {"error": "there is nothing here"})
        return self._send(200, content, "application/octet-stream")

    def do_POST(self) -> None:
        try:
            body = self._body()
            questions = {
                "/api/begin": self._begin,
                "/api/next": self._next,
                "/api/shown": self._shown,
                "/api/vote": self._vote,
            }
            if self.path not in questions:
                raise Refused("there is nothing here", 404)
            self._send(200, questions[self.path](body))
        except Refused as refused:
            self.close_connection = True  # its body may be unread
            self._send(refused.status, {"error": str(refused)})

    def _body(self) -> dict[str, Any]:
        origin, host = self.headers.get("Origin"), self.headers.get("Host", "")
        if not self.server.host_is_ours(host) or (origin is not None and urlsplit(origin).netloc != host):
            raise Refused("asked from another page", 403)
        if self.headers.get_content_type() != "application/json" or "Transfer-Encoding" in self.headers:
            raise Refused("send JSON", 415)
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch(r"\d{1,9}", length):
            raise Refused("say how long the request is", 411)
        if int(length) > MOST_BYTES:
            raise Refused(f"requests have {MOST_BYTES} bytes at most", 413)
        try:
            body = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            raise Refused("this is no JSON") from None
        if not isinstance(body, dict) or not all(isinstance(value, str) for value in body.values()):
            raise Refused("send an object of texts")
        if any("\ud800" <= c <= "\udfff" for value in body.values() for c in value):
            raise Refused("this is no text: half a character stands in it")
        return body

    def _begin(self, body: dict[str, str]) -> dict[str, Any]:
        name = "".join(c for c in body.get("name", "") if c.isprintable()).strip()[:LONGEST_NAME]
        return {"participant": self.server.store.begin(name)}

    def _next(self, body: dict[str, str]) -> dict[str, Any]:
        trial, done, total = self.server.store.next_trial(body.get("participant", ""))
        study = self.server.store.study()
        found = {"done": done, "total": total, "fps": study.fps}
        if trial is None:
            return found
        about = {"trial": trial.id, "left": trial.left_film, "right": trial.right_film}
        return found | about | {"seconds": study.seconds(trial.clip)}

    def _shown(self, body: dict[str, str]) -> dict[str, Any]:
        self.server.store.shown(body.get("participant", ""), body.get("trial", ""), self.server.sent)
        return {"kept": True}

    def _vote(self, body: dict[str, str]) -> dict[str, Any]:
        self.server.store.vote(body.get("participant", ""), body.get("trial", ""), body.get("choice", ""))
        return {"kept": True}

    def _send(self, status: int, content: bytes | dict[str, Any], kind: str = "application/json") -> None:
        sent = json.dumps(content).encode() if isinstance(content, dict) else content
        self.send_response(status)
        headers = {"Content-Type": kind, "Content-Length": str(len(sent)), "Cache-Control": "no-store"}
        headers |= {
            "Content-Security-Policy": POLICY,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
        }
        for name, value in headers.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(sent)

    def log_message(self, format: str, *args: Any) -> None:
        """Addresses and participants' tokens go into no log."""


def _cannot_serve(config: VoteConfig, error: OSError) -> str:
    """Why, and which option is to be changed."""
    if isinstance(error, socket.gaierror) or error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
        return f"host={config.host}: {error.strerror}; 127.0.0.1 is this machine alone, 0.0.0.0 all that reach it"
    return f"port={config.port}: {error.strerror}; give another port="


def main(arguments: list[str]) -> None:
    config = options(arguments, VoteConfig)
    try:
        if config.results:
            if not config.file().is_file():
                raise ConfigError(f"there is no file of votes {config.file()}")
            print(vote_results.text(vote_results.results(Store(config.file()), config.rule())), end="")
            return
        store, folder = prepare(config)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    try:
        server = Server((config.host, config.port), store, folder)
    except OSError as error:
        store.close()
        raise ConfigError(_cannot_serve(config, error)) from None
    print(
        f"votes go to {config.file()}\n{vote_results.Rule(**store.study().rule)}\n"
        f"http://{config.host}:{server.server_address[1]}/  (Ctrl-C ends it)",
        flush=True,
    )
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print(f"\nmake vote results=true db={config.file()}")
    finally:
        server.server_close()
        store.close()


if __name__ == "__main__":
    run_cli(main)
