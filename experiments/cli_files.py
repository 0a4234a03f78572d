"""Which files the command line reads, and what they become: decided, and refused, before any work."""

import os
import sys
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from experiments.video_kinds import (
    CODECS,
    IMAGE_SUFFIXES,
    LATENT_SUFFIXES,
    SUFFIXES,
    VIDEO_SUFFIXES,
    OutputError,
    check_codec,
)

RAW_SUFFIXES = (".rgb", ".raw")
STDOUT = "-"


class UsageError(ValueError):
    """A mistake in what was asked; one line."""


@dataclass(frozen=True)
class Job:
    """An input, and what it becomes."""

    source: str
    target: str
    form: str  # latents, video, png or raw


def plan(options: Namespace) -> list[Job]:
    """What is to be done, in order. Raises UsageError, and OutputError for codecs."""
    form = "latents" if options.command == "encode" else _form(options)
    sources = find(options.inputs, LATENT_SUFFIXES if options.command == "decode" else VIDEO_SUFFIXES)
    suffix = {"latents": ".safetensors", "raw": ".rgb", "png": ""}.get(form) or _suffix(options, form)
    several = len(sources) > 1 or Path(options.inputs[0]).is_dir() and not _is_images(Path(options.inputs[0]))
    if several and options.out != STDOUT and not _is_folder(options.out):
        raise UsageError(
            f"{options.out} names one file, and a folder or several inputs go into a folder: -o {_stem(options.out)}/"
        )
    jobs: dict[str, Job] = {}
    for source, name in sources:
        target = (
            options.out if not several and _is_file(options.out, form) else os.path.join(options.out, name + suffix)
        )
        if target in jobs:
            if os.path.samefile(jobs[target].source, source):
                raise UsageError(f"{source} is given twice")
            raise UsageError(f"{jobs[target].source} and {source} would both become {target}; rename one of them")
        jobs[target] = Job(str(source), target, form)
    if options.out == STDOUT and several:
        raise UsageError(f"{len(sources)} inputs cannot all go to standard output; give one, or a folder with -o")
    if options.out == STDOUT and form != "latents" and sys.stdout.isatty():
        raise UsageError("raw RGB is not for a terminal: pipe it into another program, or name a file with -o")
    for job in jobs.values():
        _check_target(job, options)
    if (scores := getattr(options, "json", None)) is not None:
        if scores.is_dir():
            raise UsageError(f"--json {scores} is a folder; name a file")
        if scores.exists() and not options.overwrite:
            raise UsageError(f"--json {scores} is there already; --overwrite replaces it")
        if str(scores) in jobs:
            raise UsageError(f"--json {scores}: a video goes there; name another file")
        _check_writable(scores)
    _spare_inputs([*jobs, *([] if scores is None else [str(scores)])], [job.source for job in jobs.values()])
    return list(jobs.values())


def find(inputs: list[str], suffixes: tuple[str, ...]) -> list[tuple[Path, str]]:
    """Files of these kinds, folders searched through, each with the name that its result gets. Raises UsageError."""
    found: list[tuple[Path, str]] = []
    for text in inputs:
        path = Path(text)
        if path.is_dir() and suffixes == VIDEO_SUFFIXES and _is_images(path):
            found.append((path, path.resolve().name))
        elif path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in suffixes and not p.name.startswith("."))
            if not inside:
                raise UsageError(f"{path} has no {', '.join(suffixes)} in it")
            found += [(p, str(p.relative_to(path).with_suffix(""))) for p in inside]
        elif path.exists():
            _refuse_swapped(path, suffixes)
            found.append((path, path.stem))
        else:
            raise UsageError(f"{path} is not there")
    return found


def _refuse_swapped(path: Path, suffixes: tuple[str, ...]) -> None:
    """Raise UsageError for a video where latents are read, and the other way round."""
    suffix = path.suffix.lower()
    if suffixes == LATENT_SUFFIXES and suffix in VIDEO_SUFFIXES:
        raise UsageError(
            f"{path} looks like a video, and decode reads latents ({', '.join(LATENT_SUFFIXES)}): encode it first"
        )
    if suffixes == VIDEO_SUFFIXES and suffix in LATENT_SUFFIXES:
        raise UsageError(f"{path} looks like latents, and a video is read here: decode them with latent2pixel decode")


def _is_images(folder: Path) -> bool:
    """Whether a folder is a video's frames: images, and no videos."""
    kinds = {path.suffix.lower() for path in folder.iterdir() if path.is_file()}
    return bool(kinds & set(IMAGE_SUFFIXES)) and not kinds & set(VIDEO_SUFFIXES)


def _form(options: Namespace) -> str:
    if options.format is not None:
        if options.format != "raw" and options.out == STDOUT:
            raise UsageError(
                f"--format {options.format} cannot go to standard output, which takes raw RGB; name a file"
            )
        form = options.format
    else:
        form = "raw" if options.out == STDOUT or options.out.lower().endswith(RAW_SUFFIXES) else "video"
    if form != "video" and options.audio:
        raise UsageError(f"--audio: {form} output has no place for audio; write a video")
    return form


def _suffix(options: Namespace, form: str) -> str:
    return CODECS[options.codec].suffixes[0] if form == "video" else ""


def _is_file(out: str, form: str) -> bool:
    """Whether ``-o`` names the result itself, not the folder that it goes into."""
    if out == STDOUT or form == "png":
        return True
    if out.endswith(os.sep) or os.path.isdir(out):
        return False
    return bool(os.path.splitext(out)[1])


def _is_folder(out: str) -> bool:
    """Whether ``-o`` can be the folder that several results go into: nothing that is called like a video or latents."""
    named = Path(out).suffix.lower() in (*SUFFIXES, *LATENT_SUFFIXES, *RAW_SUFFIXES)
    return out.endswith(os.sep) or os.path.isdir(out) or not named


def _stem(out: str) -> str:
    return os.path.splitext(out)[0]


def _check_target(job: Job, options: Namespace) -> None:
    """Raise UsageError or OutputError for a result that cannot be written."""
    if job.target == STDOUT:
        if job.form == "latents":
            raise UsageError("-o -: latents go into a file or a folder, not to standard output; name one with -o")
        return
    target = Path(job.target)
    if job.form in ("png", "raw") and target.suffix.lower() in SUFFIXES:
        said = (
            "png writes a folder of images; name a folder"
            if job.form == "png"
            else "raw RGB is no video; name a .rgb file"
        )
        raise UsageError(f"{target}: --format {said}")
    if job.form == "latents" and target.suffix != ".safetensors":
        raise UsageError(f"{target}: latents are written as .safetensors")
    if job.form == "video":
        if target.suffix.lower() not in SUFFIXES:
            raise OutputError(f"{target}: videos are written as {', '.join(SUFFIXES)}")
        check_codec(target, options.codec, options.crf)
    empty_folder = job.form == "png" and target.is_dir() and not any(target.iterdir())
    if target.exists() and not empty_folder:
        if job.form == "png":
            raise UsageError(f"{target} has something in it already; name a new folder")
        if target.is_dir():
            raise UsageError(f"{target} is a folder; name a file")
        if not options.overwrite:
            raise UsageError(f"{target} is there already; --overwrite replaces it")
    _check_writable(target)


def _spare_inputs(targets: list[str], sources: list[str]) -> None:
    """Raise UsageError where a result would replace a file that is read: its own input, or one that comes later."""
    read = {(found.st_dev, found.st_ino) for found in map(os.stat, sources)}
    for target in targets:
        if target != STDOUT and os.path.exists(target):
            found = os.stat(target)
            if (found.st_dev, found.st_ino) in read:
                raise UsageError(f"{target} is an input itself; name another output")


def _check_writable(target: Path) -> None:
    folder = next(parent for parent in target.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise UsageError(f"{target} cannot be written: {folder} is a file, not a folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"{target} cannot be written: no permission to write into {folder}")
