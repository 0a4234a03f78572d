"""``latent2pixel encode | decode | reconstruct | info``, also ``python -m experiments.cli``: exported decoders on files.

``latent2pixel COMMAND --help`` has the options with examples. Any length in bounded memory; nothing is left half written. Exit
status 0: all done; 1: some file failed, with a line that says why, and the others are done; 2: a mistake in what was asked, and
nothing was done. Nothing here imports the trainer.

Latents are those of ``datamodules/latents.py`` and ``latent_stream.py``. Videos are read upright, at the times that they state;
sizes that the decoder cannot take are padded by their last row and column, and cut back in what comes out.
"""

import json
import os
import signal
import sys
import threading
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from datamodules.faults import OUR_FAULT, BadFile
from datamodules.whole import whole
from experiments.cli_files import STDOUT, UsageError, plan
from experiments.cli_options import parse
from experiments.video_kinds import LATENT_SUFFIXES, VIDEO_SUFFIXES, OutputError

INTERRUPTED = 130  # what a shell gives a command that Ctrl-C ended
NEEDED = ("PIL", "av", "tqdm")  # by commands on videos, and not by a decoder in somebody's program


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line (default: the process's) and return its exit status."""
    options = parse(arguments)
    try:
        with _stoppable():
            return {"info": info}.get(options.command, convert)(options)
    except (UsageError, OutputError) as error:
        return _say(f"error: {error}", 2)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in NEEDED:
            raise
        return _say(f"error: {error.name} is not installed; pip install 'latent-to-pixel[cli]'", 2)
    except BrokenPipeError:
        # Who read standard output has gone; Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _say("error: what read the output has closed it before its end", 1)
    except KeyboardInterrupt as error:
        status = error.status if isinstance(error, Stopped) else INTERRUPTED
        return _say("interrupted; nothing half written is left", status)


class Stopped(KeyboardInterrupt):
    """Another signal than Ctrl-C's asked for the end; ``status`` is what a shell gives a command that it ended."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.status = 128 + number


@contextmanager
def _stoppable() -> Iterator[None]:
    """SIGTERM (schedulers, `timeout`) and SIGHUP (a closed terminal) tidy up as Ctrl-C does; those that the caller handles, or
    ignores, stay his."""

    def stop(number: int, _: Any) -> None:
        raise Stopped(number)

    ours = []
    if threading.current_thread() is threading.main_thread():
        ours = [s for s in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def convert(options: Namespace) -> int:
    """encode, decode or reconstruct: every input, one after the other; 1 if some failed. Raises UsageError before any work."""
    from experiments import cli_work

    jobs = plan(options)
    one, model = cli_work.prepare(options)
    rows, failed = [], 0
    for job in jobs:
        try:
            rows.append({"input": job.source, "output": job.target} | one(job))
            if options.command != "reconstruct" and job.target != STDOUT and not options.quiet:
                print(f"{job.source} -> {job.target}  {_counts(rows[-1])}", flush=True)
        except (BrokenPipeError, UsageError):
            raise
        except Exception as error:  # told by `_reason`, which raises what is no fault of the file
            failed += 1
            _say(f"failed: {job.source}: {_reason(error)}")
    if options.command == "reconstruct":
        try:
            _tell_scores(options, rows, model.about)
        except BrokenPipeError:
            raise
        except OSError as error:
            failed += 1
            _say(f"failed: --json {options.json} cannot be written ({error.strerror}); the videos are")
    return int(failed > 0)


def _reason(error: Exception) -> str:
    """Why a file could not be done. Raises ``error`` where that is a fault of this program."""
    if isinstance(error, torch.OutOfMemoryError):
        return "not enough memory on the device: try --dtype bfloat16, a smaller --window or --chunk, or smaller frames"
    if isinstance(error, OSError) and error.errno in OUR_FAULT | {28}:
        return f"{error.strerror}: free some space or files, then run the same command with --overwrite"
    if isinstance(error, BadFile | ValueError | OSError) or type(error).__module__ == "av.error":
        return str(error)
    raise error


def _counts(row: dict[str, Any]) -> str:
    latent = f", {row['latent_frames']} latent frames" if "latent_frames" in row else ""
    return f"{row['frames']} frames{latent}"


def _tell_scores(options: Namespace, rows: list[dict[str, Any]], about: dict[str, Any]) -> None:
    names = sorted({name for row in rows for name in row.get("scores", {})})
    stream = sys.stderr if options.out == STDOUT else sys.stdout
    if names and not options.quiet:
        for row in rows:
            scores = "  ".join(f"{name} {row['scores'][name]:.4g}" for name in names)
            print(f"{scores}  {row['frames']} frames  {row['input']}", file=stream, flush=True)
        if len(rows) > 1:
            means = "  ".join(f"{name} {sum(row['scores'][name] for row in rows) / len(rows):.4g}" for name in names)
            print(f"{means}  mean of {len(rows)} files", file=stream, flush=True)
    if options.json is not None:
        found = {"model": options.model, "about": about, "files": rows}
        with whole(options.json) as temporary:
            temporary.write_text(json.dumps(found, indent=2, default=str) + "\n")


def info(options: Namespace) -> int:
    """Print what a decoder, a latents' file or a video is. Raises UsageError."""
    from experiments.video_in import open_film

    path = Path(options.what)
    if not path.exists() and path.suffix.lower() in (*LATENT_SUFFIXES, *VIDEO_SUFFIXES):
        raise UsageError(f"{path} is not there")
    try:
        if path.is_file() and path.suffix.lower() in LATENT_SUFFIXES and _holds_latents(path):
            _tell_latents(path)
        elif path.is_file() and path.suffix.lower() not in (*LATENT_SUFFIXES, ".ckpt"):
            film = open_film(path)
            rate = "varying frame rate" if film.seconds else f"{film.fps:g} fps"
            print(f"video: {film.num_frames} frames of {film.height}x{film.width}, {rate}")
        else:
            _tell_model(options)
    except (BadFile, OSError) as error:
        return _say(f"error: {path}: {error}", 1)
    return 0


def _holds_latents(path: Path) -> bool:
    """Whether a file is one of latents, not of weights."""
    if path.suffix.lower() == ".pt":
        return True
    with suppress(Exception), safe_open(str(path), framework="pt") as file:
        return "latent" in file.keys()  # noqa: SIM118  not a dictionary
    return not path.name.startswith("weights-")


def _tell_latents(path: Path) -> None:
    from datamodules.latent_stream import LatentReader

    reader = LatentReader(path)
    h = reader.header
    said = {"true": "normalised", "false": "raw, with mean and std"}.get(
        reader.said, "does not say if it is normalised"
    )
    print(f"latents: {h.frames} latent frames of {h.rows}x{h.columns}, {h.channels} channels; {said}")
    print(f"space: {_shown(h.space or None)}")
    if h.height:
        rate = "varying frame rate" if reader.seconds else f"{h.fps:g} fps" if h.fps else "frame rate not said"
        print(f"video: {reader.num_frames or 'unknown number of'} frames of {h.height}x{h.width}, {rate}")
    if reader.piece:
        print(f"coded anew every {reader.piece} latent frames")
    if h.prompt or h.seed is not None:
        print(f"prompt: {_shown(h.prompt)}; seed: {_shown(h.seed)}")


def _tell_model(options: Namespace) -> None:
    from experiments.cli_work import load_model

    model = load_model(options)
    space, num = model.space, sum(p.numel() for p in model.parameters())
    lengths = [t for t in range(1, 8 * space.stride_t + 2) if space.padded_frames(t) == t][:5]
    print(f"{model.family}: {num / 1e6:.1f} M parameters, {str(model.dtype).removeprefix('torch.')}")
    print(
        f"space: {space.name} ({space.fingerprint}), {space.channels} channels, {space.stride_t}x{space.stride_hw}x{space.stride_hw}"
    )
    print(f"videos: {', '.join(map(str, lengths))}, ... frames, sizes in multiples of {model.size_multiple}")
    able = {"stream": model.can_stream, "encode": model.can_encode, "looks at a reference": model.uses_reference}
    print("; ".join(f"{what}: {'yes' if yes else 'no'}" for what, yes in able.items()))
    if model.sampling_options:
        how = {key: value for key, value in model.sampling.items() if key in model.sampling_options}
        own = f"; its own: {_shown(how)}" if how else ""
        print(f"--sampling: {', '.join(model.sampling_options)}{own}")
    for key, value in model.about.items():
        print(f"{_shown(key)}: {_shown(value)}")


def _shown(value: Any) -> str:
    """Plain values for people; what a file says may come from anybody, and does not reach the terminal's control codes."""
    if isinstance(value, dict):
        return ", ".join(f"{_shown(key)} {_shown(part)}" for key, part in value.items())
    if isinstance(value, list) and any(isinstance(part, dict) for part in value):
        return "".join(f"\n  {_shown(part)}" for part in value)
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    if value is None or isinstance(value, bool):
        return {None: "not said", True: "yes", False: "no"}[value]
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _say(line: str, status: int = 1) -> int:
    print(line, file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
