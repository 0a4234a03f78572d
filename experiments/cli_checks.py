"""What ``experiments/cli.py`` is asked for that no file can change: devices, numbers, metrics, sampling, sound. Refused before any work."""

import json
from argparse import Namespace
from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import av
import torch

from decoders.exported import Exported, ExportError
from experiments.cli_files import UsageError

NONE = "none"


def device_of(options: Namespace) -> str:
    """The device that is asked for, or the fastest. Raises UsageError."""
    if options.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=options.device).item()  # is it there, and can it hold numbers (meta cannot)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        known = options.device.partition(":")[0] in ("cpu", "cuda")
        reason = "there is no such device here" if known else str(error).splitlines()[0][:80]
        raise UsageError(f"--device {options.device}: {reason}; cpu, cuda or cuda:1") from None
    return options.device


def metrics_of(options: Namespace) -> list[Any]:
    """The metrics of ``--metrics``. Raises UsageError."""
    from metrics.image import Psnr, PsnrVideo, Ssim

    known = {metric.name: metric for metric in (Psnr, PsnrVideo, Ssim)}
    names = [] if options.metrics == NONE else [name.strip() for name in options.metrics.split(",")]
    if odd := [name for name in names if name not in known]:
        raise UsageError(f"--metrics {odd[0]}: {', '.join(known)} or none; make evaluate has the others")
    return [known[name]() for name in names]


def check_numbers(options: Namespace) -> None:
    """Raise UsageError for numbers that nothing can be done with."""
    fps, chunk, window = (getattr(options, name, None) for name in ("fps", "chunk", "window"))
    if fps is not None and not 0 < fps <= 1000:
        raise UsageError(f"--fps {fps:g} must lie above 0, and up to 1000")
    if chunk is not None and chunk < 1:
        raise UsageError(f"--chunk {chunk} must be 1 or more")
    if window is not None and window < 0:
        raise UsageError(f"--window {window} must be 1 or more, or 0 for all latent frames at once")
    seed = getattr(options, "seed", None)
    if seed is not None and not 0 <= seed < 2**63:
        raise UsageError(f"--seed {seed} must lie in 0 to 2^63 - 1")


# ---- sampling


def sampling_of(texts: Sequence[str]) -> dict[str, Any]:
    """``["steps=4", "times=0,0.5,1"]`` as values: numbers, true, false, lists of numbers. Raises UsageError."""
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise UsageError(f"--sampling {text}: write --sampling NAME=VALUE, such as steps=4")
        if name == "seed":
            raise UsageError(f"--sampling {text}: the seed is an option by itself, --seed {value or 3}")
        if name in found:
            raise UsageError(f"--sampling {name} is given twice")
        found[name] = _value(text, value)
    return found


def _value(text: str, value: str) -> Any:
    """JSON, where a list needs no brackets, which some shells would take for a pattern."""
    for form in (value, f"[{value}]"):
        try:
            read = json.loads(form.lower())
            parts = read if isinstance(read, list) else [read]
            if all(isinstance(part, int | float) and isfinite(part) for part in parts):  # bool is an int
                return read
        except (ValueError, OverflowError, RecursionError):
            continue
    raise UsageError(f"--sampling {text[:60]}: no number, true, false or list of numbers (0,0.5,1)")


def check_sampling(model: Exported, options: Namespace) -> dict[str, Any]:
    """What ``model`` is to be asked for besides latents. Raises UsageError for what it does not have, and names what it has."""
    found = sampling_of(options.sampling)
    if odd := [name for name in found if name not in model.sampling_options]:
        has = f"it has {', '.join(model.sampling_options)}" if model.sampling_options else "it has none; leave it out"
        raise UsageError(f"--sampling {odd[0]}: no option of {model.family}; {has}")
    if "times" in found and options.command != "decode":
        raise UsageError(
            f"--sampling times: {options.command} gives the frames that it encodes; latent2pixel decode takes times, of latents"
        )
    if "times" in found and options.audio:
        raise UsageError("--audio: frames at other times do not go with the film's sound; leave --audio or times out")
    if "times" in found and not isinstance(found["times"], list):
        found["times"] = [found["times"]]
    try:
        model.check_sampling(found)
    except ExportError as error:
        raise UsageError(f"--sampling {error}") from None
    return found


# ---- sound


def has_sound(path: str) -> bool:
    """Whether a film has audio that could be copied; a folder of images has none. Raises av.error.FFmpegError, OSError."""
    if Path(path).is_dir():
        return False
    with av.open(path) as container:
        return container.streams.best("audio") is not None


def check_audio(path: str | None) -> None:
    """Raise UsageError where ``decode --audio`` names what is no film and no sound."""
    if path is None:
        return
    if not Path(path).is_file():
        raise UsageError(f"--audio {path}: {'a folder; name a file' if Path(path).is_dir() else 'it is not there'}")
    try:
        has_sound(path)
    except (av.error.FFmpegError, ValueError):
        raise UsageError(f"--audio {path}: it is no readable film or sound") from None
