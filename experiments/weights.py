"""Which weights a command measures or decodes with: a run's (EMA, last, best), or those that its training starts from."""

import hashlib
from pathlib import Path
from typing import Any

import torch

from decoders.base import VideoDecoder
from experiments.checkpoints import load_weights
from experiments.compose import ConfigError
from experiments.config import Experiment
from experiments.runs import WEIGHTS, find_parent

START = "start"
KINDS = (*WEIGHTS, START)


def check_kind(weights: str | None) -> None:
    """Raise ConfigError for a kind of weights that there is not."""
    if weights is not None and weights not in KINDS:
        raise ConfigError(f"weights={weights} is none of {', '.join(KINDS)}")


def find(experiment: Experiment, run: str, weights: str | None) -> str | None:
    """The file of ``run``'s weights, EMA if it kept one and none is named, else last; for ``start`` that of ``init_from``.

    None: the decoder itself knows where they are. Called before anything is built. Raises ConfigError.
    """
    check_kind(weights)
    if weights != START:
        try:
            return str(find_parent(run + (f":{weights}" if weights else ""), allow_unfinished=True))
        except ConfigError as error:
            raise ConfigError(f"{error}; weights=start takes those that its training starts from") from None
    if experiment.init_from:
        return str(find_parent(experiment.init_from, allow_unfinished=experiment.allow_unfinished_parent))
    return None


def sha256(file: Path) -> str:
    """Of a file's bytes, as ``sha256sum`` prints it."""
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def digest(decoder: VideoDecoder) -> str:
    """Of what a decoder infers with: names and bytes of its weights. For those that are in no file of ours."""
    found = hashlib.sha256()
    for name, tensor in sorted({**decoder.inference_parameters(), **decoder.inference_buffers()}.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def fill(decoder: VideoDecoder, experiment: Experiment, file: str | None, weights: str | None) -> dict[str, Any]:
    """Give ``decoder`` the weights that :func:`find` found, and say which they are: kind, step, file.

    Raises ConfigError: they do not fit, are not there, or none are named.
    """
    if file is not None:
        step = int(load_weights(decoder, Path(file)).get("step", -1))
        kind = START if weights == START else Path(file).stem.removeprefix("weights-")
        return {"kind": kind, "step": step, "file": file if weights == START else Path(file).name}
    try:
        source = decoder.take_start()
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(f"weights=start: {error}") from None
    if source is None:
        raise ConfigError(
            f"weights=start: nothing in this configuration names weights of {type(decoder).__name__} that can be had without "
            "training (init_from, and in some families objective.start): they would be random"
        )
    return {"kind": START, "step": 0, "file": source}
