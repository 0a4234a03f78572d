"""Decoders that are named on a command line: ``decoders=[own,runs/a,mine=exports/b]``.

``own`` is the decoder of the pipeline's autoencoder. Everything else is what ``decoders.load`` takes (an exported folder, a hub
id, a run's folder, ``wan_mini``), or the name of a run of ours. ``LABEL=SOURCE`` gives a label, else it is the last part of
the source. ``SOURCE+optimised`` is its optimised form (decoders/inference.py), with the words of ``make bench-all`` after further plus
signs: ``exports/mine+optimised+compiled``.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

import decoders
from decoders.baseline.model import DiffusersDecoder
from decoders.exported import Exported, ExportError
from decoders.latent_spaces.base import hash_parts
from decoders.latent_spaces.diffusers import DiffusersVAE
from experiments.bench_rows import OPTIMISED, PLAIN, options_of
from experiments.compose import ConfigError
from experiments.runs import run_dir

OWN = "own"
_LABEL = re.compile(r"[\w][\w.+-]*")


@dataclass(frozen=True)
class Named:
    """A decoder's label, where it is, and the way that it is run (experiments/bench_rows.py)."""

    label: str
    source: str
    way: str = PLAIN


@dataclass
class Chosen:
    """A decoder with its weights, ready to decode. ``model`` is an Exported, or the pipeline's own decoder."""

    label: str
    source: str
    model: nn.Module
    space: Any  # LatentSpace or SpaceInfo: name, fingerprint, channels, strides, frame rule
    size_multiple: int
    uses_reference: bool
    family: str
    digest: str  # of its weights

    @torch.no_grad()
    def decode(
        self,
        latent: Float[Tensor, "b c n y x"],
        size: tuple[int, int, int],
        reference: Float[Tensor, "b 3 1 h w"] | None,
        generator: torch.Generator,
    ) -> Float[Tensor, "b 3 t h w"]:
        """Normalised latents to RGB in about [-1, 1], float32, cropped to ``size``, (t, h, w)."""
        if self.label == OWN:
            t, h, w = size
            return self.model.decode(latent)[:, :, :t, :h, :w].float()
        given = {"reference": reference} if self.uses_reference else {}
        video = self.model.decode(latent, size=size, generator=generator, **given)
        return video.float() if video.dtype != torch.uint8 else video.movedim(-1, 1).float() / 127.5 - 1

    def about(self) -> dict[str, Any]:
        """For a result's file."""
        return {"source": self.source, "family": self.family, "weights": self.digest, "space": self.space.fingerprint}


def parse(listed: Sequence[str]) -> list[Named]:
    """The decoders of an option, in order. Raises ConfigError: none, or two of one label."""
    found: list[Named] = []
    for text in listed:
        label, equals, source = str(text).partition("=")
        if not equals:
            label, source = Path(str(text).rstrip("/")).name if text != OWN else OWN, str(text)
        if not source or not _LABEL.fullmatch(label) or (label == OWN) != (source == OWN):
            raise ConfigError(f"decoders: {text!r} is not own, SOURCE or LABEL=SOURCE with a plain label")
        source, way = _split(source)
        if label in [other.label for other in found]:
            raise ConfigError(f"decoders: two are called {label}; write LABEL=SOURCE to tell them apart")
        found.append(Named(label, source, way))
    if not found:
        raise ConfigError("decoders=[...] names none; such as decoders=[own,exports/mine]")
    return found


def _split(source: str) -> tuple[str, str]:
    """A source and its way. Raises ConfigError: no such way, or none of ``own``."""
    plain, mark, rest = source.partition(f"+{OPTIMISED}")
    if not mark or Path(source).expanduser().exists():
        return source, PLAIN
    way = OPTIMISED + rest
    try:
        options_of(way)
    except ValueError as error:
        raise ConfigError(f"decoders: {source}: {error}") from None
    if plain == OWN:
        raise ConfigError(
            f"decoders: own is decoded as diffusers does it; our optimised form of it: fast=FOLDER+{way}, the pipeline's folder"
        )
    return plain, way


def find(source: str) -> str:
    """``source`` as ``decoders.load`` takes it: a run of ours by name becomes its folder."""
    if not Path(source).expanduser().exists() and re.fullmatch(r"[\w.,=+-]+", source) and run_dir(source).is_dir():
        return str(run_dir(source))
    return source


def load_export(named: Named, dtype: torch.dtype, device: str) -> Exported:
    """What ``decoders.load`` gives. Raises ConfigError."""
    try:
        return decoders.load(find(named.source), dtype=dtype, device=device)
    except (ExportError, OSError) as error:
        raise ConfigError(f"decoders: {named.label}: {str(error).splitlines()[0]}") from None


def optimised(named: Named, model: Exported, calibration: Sequence[Tensor] = ()) -> Exported:
    """``model``, on its device, in the way that it is asked for. Raises ConfigError: it cannot be run so.

    Args:
        calibration: normalised latents "b c n y x", for ways with products of eight bits.
    """
    options = options_of(named.way)
    if options is None:
        return model
    if options.bits8 != "none" and not calibration:
        raise ConfigError(
            f"decoders: {named.label}: eight bits need latents to calibrate on, and are measured by make quantise; here take "
            f"{OPTIMISED} without them"
        )
    try:
        return model.optimised(options, calibration if options.bits8 != "none" else ())
    except ValueError as error:
        raise ConfigError(f"decoders: {named.label}: {str(error).splitlines()[0]}") from None


def open_decoder(named: Named, pipeline: str | None, dtype: torch.dtype, device: str) -> Chosen:
    """The decoder with its weights. ``pipeline``: the folder whose autoencoder ``own`` is. Raises ConfigError."""
    if named.source == OWN:
        return _open_own(pipeline, dtype, device)
    model = load_export(named, dtype, device)
    way = "" if named.way == PLAIN else f"+{named.way}"
    digest = _digest(model) + way  # before: the optimised form packs its weights anew
    model = optimised(named, model)
    return Chosen(
        named.label,
        named.source + way,
        model,
        model.space,
        model.size_multiple,
        model.uses_reference,
        model.family,
        digest,
    )


def _open_own(pipeline: str | None, dtype: torch.dtype, device: str) -> Chosen:
    if pipeline is None:
        raise ConfigError("decoders: own is the pipeline's decoder: give pipeline=FOLDER, or leave own out")
    from decoders.latent_spaces.diffusers import DiffusersVAEConfig

    try:
        space = DiffusersVAE(DiffusersVAEConfig(path=pipeline))
        space.require()
        model = DiffusersDecoder.from_folder(pipeline)
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(f"pipeline={pipeline}: {str(error).splitlines()[0]}") from None
    digest = _digest(model)
    model = model.to(device=device, dtype=dtype)
    return Chosen(OWN, pipeline, model, space, space.stride_hw, False, type(model.vae).__name__, digest)


def _digest(model: nn.Module) -> str:
    return hash_parts(tensors=dict(model.state_dict()))
