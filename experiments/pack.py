"""Folders into tar shards, and shards checked: ``python -m experiments.pack in=FOLDER out=DIR [key=value ...]``.

    in             a folder, a glob or a .csv list of films or images
    out            a folder: 00000.tar, 00001.tar, ... of webdataset's form (KEY.mp4, KEY.txt, KEY.json), and index.json
    kind           video (default) or image
    shard_mb       a shard ends before it would be larger than so many MiB; default 1000
    check          a folder of shards, packed here or elsewhere, instead of in and out: every shard is read to its end, and every
                   film or image looked at. Faults are printed as a table, and the exit code is 1 where there are any
    accept         check only. true: index.json is written anew, with what can be used in the shards that are whole; so also for
                   shards that were packed elsewhere, which then need not be gone through again
    max_member_mb  check only: larger members are faults; default 2048

KEY is a file's path below ``in`` without its suffix, its dots turned into ``_`` (what follows the first dot is a suffix to
webdataset). NAME.txt and NAME.json beside NAME.mp4 go with it; other columns of a list do not. Nothing is encoded anew.
The same files give the same bytes: members come in the order of their names, with no times or owners. A file that cannot be read is
left out, and named in skipped.csv. Each file is read once to be looked at and once to be copied; memory does not grow with their sizes.

A shard is there when it is whole. The same command goes on after the last one; once index.json is there, nothing is left to do.
Shards need no unpacking: ``data.sources.NAME.path=DIR``, or a pattern, ``https://host/DIR/{00000..01234}.tar``.
"""

import csv
import hashlib
import json
import os
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import BinaryIO, Literal, TextIO

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from tqdm import tqdm

from datamodules.config import SourceConfig
from datamodules.probe import Info
from datamodules.shards_index import probe
from datamodules.shards_json import COLUMNS, FILE, Packed, write_index
from datamodules.shards_tar import BLOCK
from datamodules.sources import File, SourceError, find
from experiments.compose import ConfigError, run_cli

PROGRESS = ".pack.jsonl"  # in ``out``, while it is not finished
SKIPPED = "skipped.csv"
BESIDE = (".txt", ".json")
MAX_BESIDE = 16 * 2**20
MAX_KEY = 960  # characters; with a number and a suffix it must stay below shards_tar.MAX_NAME
CHUNK = 64  # files that are looked at together


@dataclass
class PackConfig:
    """The command's options; see the module's docstring."""

    source: str = ""
    out: str = ""
    kind: Literal["video", "image"] = "video"
    shard_mb: float = 1000.0
    check: str = ""
    accept: bool = False
    max_member_mb: int = 2048

    def __post_init__(self) -> None:
        if self.check and (self.source or self.out):
            raise ValueError("check=DIR stands alone: leave out in and out")
        if not self.check and not (self.source and self.out):
            raise ValueError("what is to be done? in=FOLDER out=DIR packs, check=DIR checks")
        if self.accept and not self.check:
            raise ValueError("accept=true goes with check=DIR")
        if self.shard_mb <= 0 or self.max_member_mb < 1:
            raise ValueError("shard_mb and max_member_mb must be positive")


def read_options(arguments: Sequence[str]) -> PackConfig:
    """Options as typed. Raises ConfigError."""
    known = {"in" if f.name == "source" else f.name for f in fields(PackConfig)}
    values = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals or key not in known:
            raise ConfigError(f"'{argument}': options are {', '.join(f'{name}=' for name in sorted(known))}")
        values["source" if key == "in" else key] = text
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(PackConfig), values))
    except (OmegaConfBaseException, ValueError) as error:
        key = getattr(error, "full_key", None)
        raise ConfigError(f"{key}: {str(error).splitlines()[0]}" if key else str(error).splitlines()[0]) from None


@dataclass(frozen=True)
class Sample:
    """A film or image, and where it goes."""

    file: File
    key: str

    def members(self) -> tuple[list[tuple[str, str]], list[list[str]]]:
        """(path, name in the tar) of what is packed, the film or image first; [path, reason] of what lies beside it and is not."""
        bare, suffix = os.path.splitext(self.file.path)
        members, left = [(self.file.path, self.key + suffix.lower())], []
        for end in BESIDE:
            if os.path.isfile(bare + end):
                reason = _unfit(bare + end)
                (left.append([bare + end, reason]) if reason else members.append((bare + end, self.key + end)))
        return members, left


def _unfit(path: str) -> str:
    """Why a text or JSON file is not packed, or nothing."""
    if (size := os.path.getsize(path)) > MAX_BESIDE:
        return f"{size / 2**20:.0f} MiB of text beside a clip"
    if path.endswith(".json"):
        try:
            json.loads(Path(path).read_bytes())
        except (ValueError, RecursionError) as error:
            return f"no JSON: {error}"
    return ""


def pack(config: PackConfig, say: Callable[[str], None] = print) -> None:
    """Make the shards, or those that are missing. Raises ConfigError."""
    files = _files(config)
    out = Path(config.out)
    mark = _mark(config, files)
    if (out / FILE).exists():
        return _finished(out, mark, say)
    try:
        out.mkdir(parents=True, exist_ok=True)
        packer = _Packer(config, files, out, mark)
        packer.resume()
    except OSError as error:
        raise ConfigError(f"out: {out} cannot be written to: {error.strerror or error}") from None
    try:
        packer.run()
        packer.finish()
    except OSError as error:
        raise ConfigError(
            f"{error.filename or out}: {error.strerror or error}; the shards that are whole stay, and the same command goes on after them"
        ) from None
    say(packer.summary())


def _files(config: PackConfig) -> list[File]:
    try:
        found = find("in", SourceConfig(config.source, config.kind))
    except SourceError as error:
        raise ConfigError(str(error).replace("data.sources.in.path", "in").replace("data.sources.in", "in")) from None
    if found.tars:
        raise ConfigError(
            f"in: there are shards already, such as {found.tars[0].path}; check={config.source} checks them"
        )
    out, folder = (os.path.join(os.path.abspath(path), "") for path in (config.out, config.source))
    if out.startswith(folder):
        raise ConfigError(f"out: {config.out} lies in the folder that is packed; name one outside it")
    return found.files


def _mark(config: PackConfig, files: list[File]) -> str:
    """Of all that decides what the shards are: the options, and names, sizes and times of the files and of what lies beside them."""
    mark = hashlib.sha256(f"{config.kind} {config.shard_mb}".encode())
    for file in files:
        bare = os.path.splitext(file.path)[0]
        told = " ".join(map(_state, (file.path, *(bare + end for end in BESIDE))))
        mark.update(f"\n{file.name} {told}".encode("utf-8", "surrogateescape"))
    return mark.hexdigest()


def _state(path: str) -> str:
    try:
        stat = os.stat(path)
    except OSError as error:
        return f"{error.errno}"
    return f"{stat.st_size} {stat.st_mtime_ns}"


def _finished(out: Path, mark: str, say: Callable[[str], None]) -> None:
    with open(out / FILE, encoding="utf-8") as file:
        first = file.readline()
    if f'"source": "{mark}"' not in first:
        raise ConfigError(f"out: {out} holds shards of other files, or made with other options; name another folder")
    say(f"{out} is finished; check={out} checks it")


def samples_of(files: list[File]) -> Iterator[Sample]:
    """Each file with its key, which is safe to use; one whose key is taken gets a number."""
    taken: Counter[str] = Counter()
    for file in files:
        stem = os.path.splitext(file.name.removeprefix("in/"))[0]
        parts = ["_" if part == ".." else part.replace(".", "_") for part in stem.split("/") if part not in ("", ".")]
        base = "".join("_" if ord(char) < 32 or char in "\\\x7f" else char for char in "/".join(parts)) or "_"
        base = base[0] + "_" + base[2:] if base[1:2] == ":" else base  # C:film would be refused as an absolute path
        if len(base) > MAX_KEY:
            digest = hashlib.sha256(base.encode("utf-8", "surrogateescape")).hexdigest()[:16]
            base = f"{base[:MAX_KEY]}-{digest}"
        key = base
        while taken[key]:
            taken[base] += 1
            key = f"{base}-{taken[base]}"
        taken[key] += 1
        yield Sample(file, key)


class _Packer:
    """The work from one shard to the next, with a line in PROGRESS for each that is whole."""

    def __init__(self, config: PackConfig, files: list[File], out: Path, mark: str):
        self.config, self.files, self.out, self.mark = config, files, out, mark
        self.num_done = self.num_shards = self.num_clips = 0
        self.skipped: list[list[str]] = []  # [path, reason]

    def resume(self) -> None:
        """Take up what an earlier command left. Raises ConfigError where that was other work."""
        if (self.out / PROGRESS).exists():
            for told in self._told():
                self.num_done, self.num_shards = told["done"], self.num_shards + 1
                self.num_clips += told["clips"]
                self.skipped += told["skipped"]
            return
        if others := sorted(path.name for path in self.out.glob("*.tar")):
            raise ConfigError(
                f"out: {self.out} holds {others[0]} already, which this did not make; name another folder"
            )
        write_whole(self.out / PROGRESS, lambda file: file.write(self.mark + "\n"))

    def _told(self) -> Iterator[dict]:
        """The lines of PROGRESS, one per shard. A kill may have left half of one, which is cut off."""
        whole = 0
        with open(self.out / PROGRESS, "rb") as file:
            for number, line in enumerate(file):
                if number == 0 and line.decode().strip() != self.mark:
                    raise ConfigError(
                        f"out: {self.out} is being filled from other files, or with other options; name another folder"
                    )
                if not line.endswith(b"\n"):
                    break
                whole += len(line)
                if number:
                    yield json.loads(line)
        os.truncate(self.out / PROGRESS, whole)

    def run(self) -> None:
        """Pack what is not packed yet."""
        shard, skipped = None, []
        bar = tqdm(total=len(self.files), initial=self.num_done, unit="file", disable=not sys.stderr.isatty())
        with bar, ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            for done, sample, info in self._looked_at(pool):
                bar.update()
                if isinstance(info, str):
                    skipped.append([sample.file.path, info])
                    continue
                members, left = sample.members()
                sizes = [os.path.getsize(path) for path, _ in members]
                needed = sum(BLOCK + -(-size // BLOCK) * BLOCK for size in sizes)
                if shard is not None and shard.size + needed > self.config.shard_mb * 2**20:
                    self._close(shard, done, skipped)
                    shard, skipped = None, []
                if shard is None:
                    shard = _Shard(self.out / f"{self.num_shards:05d}.tar")
                for (path, name), size in zip(members, sizes, strict=True):
                    shard.add(path, name, size, info if path == sample.file.path else None)
                skipped += left
        if shard is not None:
            self._close(shard, len(self.files), skipped)
        else:
            self.skipped += skipped

    def _looked_at(self, pool: ThreadPoolExecutor) -> Iterator[tuple[int, Sample, Info | str]]:
        """(its number, a file, what it says about itself) from where this stands."""
        todo = islice(enumerate(samples_of(self.files)), self.num_done, None)
        while chunk := list(islice(todo, CHUNK)):
            infos = pool.map(lambda pair: probe(pair[1].file.path, self.config.kind), chunk)
            yield from ((number, sample, info) for (number, sample), info in zip(chunk, infos, strict=True))

    def _close(self, shard: "_Shard", done: int, skipped: list[list[str]]) -> None:
        packed = shard.close()
        told = {
            "done": done,
            "clips": sum(width > 0 for width in packed.width),
            "skipped": skipped,
            "shard": packed.line(),
        }
        with open(self.out / PROGRESS, "a", encoding="utf-8") as file:
            file.write(json.dumps(told) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.num_shards, self.num_done, self.skipped = self.num_shards + 1, done, self.skipped + skipped
        self.num_clips += told["clips"]

    def finish(self) -> None:
        """Write the index, and what was left out. Raises ConfigError where nothing could be packed."""
        if self.skipped:
            write_whole(
                self.out / SKIPPED, lambda file: csv.writer(file).writerows([["path", "reason"], *self.skipped])
            )
        if not self.num_clips:
            path, reason = self.skipped[0]
            raise ConfigError(f"in: none of {len(self.files)} files can be read, such as {path}: {reason}")
        lines = (told["shard"] for told in self._told())
        write_whole(self.out / FILE, lambda file: write_index(file, self.config.kind, self.mark, lines))
        (self.out / PROGRESS).unlink()

    def summary(self) -> str:
        """One line."""
        left = f"; {len(self.skipped)} files left out, see {self.out / SKIPPED}" if self.skipped else ""
        return f"{self.num_clips} clips in {self.num_shards} shards in {self.out}{left}"


class _Shard:
    """A tar that is being written, beside where it will be."""

    def __init__(self, path: Path):
        self.path, self._part = path, path.with_name(f".{path.name}.part")
        self._file = open(self._part, "wb")  # noqa: SIM115 - closed with the shard
        self._hashed = _Hashed(self._file)
        self._tar = tarfile.open(fileobj=self._hashed, mode="w", format=tarfile.PAX_FORMAT)  # noqa: SIM115
        self._columns: dict[str, list] = {name: [] for name in COLUMNS}

    @property
    def size(self) -> int:
        """Bytes so far."""
        return self._tar.offset

    def add(self, path: str, name: str, size: int, info: Info | None) -> None:
        """A file of ``size`` bytes. Raises OSError."""
        header = tarfile.TarInfo(name)  # no time, no owner: the same files make the same shard
        header.size = size
        with open(path, "rb") as file:
            self._tar.addfile(header, file)
        offset = self._tar.offset - -(-size // BLOCK) * BLOCK
        info = info or Info(0, 0, 0, 0.0)
        row = (name, offset, size, info.width, info.height, info.num_frames, info.fps)
        for column, value in zip(self._columns.values(), row, strict=True):
            column.append(value)

    def close(self) -> Packed:
        """Put it in its place."""
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._part, self.path)
        stat = os.stat(self.path)
        return Packed(self.path.name, stat.st_size, stat.st_mtime_ns, self._hashed.sha256.hexdigest(), **self._columns)


class _Hashed:
    """A file that is written front to back, and the hash of what was written."""

    def __init__(self, file: BinaryIO):
        self._file, self.sha256 = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        return self._file.write(data)

    def tell(self) -> int:
        return self._file.tell()


def write_whole(path: Path, write: Callable[[TextIO], object]) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f".{path.name}.part")
    with open(temporary, "w", encoding="utf-8", newline="") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def main(arguments: list[str]) -> int:
    """Pack or check; 1 where a check finds faults."""
    config = read_options(arguments)
    if not config.check:
        pack(config)
        return 0
    from experiments.pack_check import check

    return 1 if check(config.check, config.kind, config.max_member_mb, config.accept) else 0


if __name__ == "__main__":
    run_cli(main)
