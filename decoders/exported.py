"""A trained decoder for somebody else's program: a plain ``nn.Module`` with what it needs, saved to and loaded from a folder.

    decoder = decoders.load("folder or user/name", dtype=torch.bfloat16, device="cuda")
    video = decoder.decode(latent)                      # normalised "b c n y x" to RGB "b 3 t h w" in about [-1, 1]

The folder has ``config.json`` and ``model.safetensors``: the architecture, the latent space it expects, and the weights of all
that was trained and inference needs, a trained encoder included. How each family does it is in ``decoders/<family>/exported.py``;
nothing here, and nothing that those import, needs the trainer.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from decoders.exported_files import CONFIG, FORMAT, WEIGHTS, Contents, assign, weightless, write
from decoders.exported_module import Exported
from decoders.exported_space import ExportError, SpaceInfo, space_of

__all__ = [
    "CARD",
    "CONFIG",
    "FORMAT",
    "WEIGHTS",
    "ExportError",
    "Exported",
    "SpaceInfo",
    "describe",
    "families",
    "load",
    "save",
]

CARD = "README.md"
FOLDER = Path(__file__).parent

# --- families --------------------------------------------------------------------------------------------------------


def families() -> dict[str, str]:
    """Family -> import path of how it is exported. Found, not registered: a folder of ``decoders/`` with ``exported.py``."""
    return {path.parent.name: f"decoders.{path.parent.name}.exported" for path in sorted(FOLDER.glob("*/exported.py"))}


def hooks(family: str) -> Any:
    """The module of ``family``: ``describe(decoder) -> (network, sampling)`` and ``build(network, sampling, space) -> Exported``.

    Raises ExportError: there is no such family.
    """
    known = families()
    if family not in known:
        raise ExportError(f"family {family[:60]!r} is none of {', '.join(known)}; update, or export the decoder again")
    return import_module(known[family])


def build(contents: Contents, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> Exported:
    """The decoder that ``contents`` describe, with their weights: as they lie in memory where ``dtype`` and ``device`` fit.

    Raises:
        ExportError: what they describe cannot be built, or the weights do not fit it.
    """
    family = hooks(contents.family)
    try:
        with weightless(len(contents.tensors)):
            decoder = family.build(contents.network, contents.sampling, contents.space)
    except ExportError as error:
        raise ExportError(f"{contents.where}: {error}") from None
    except (ArithmeticError, AssertionError, LookupError, TypeError, ValueError, RuntimeError, MemoryError) as error:
        raise ExportError(
            f"{contents.where}: {CONFIG} describes no {contents.family} ({error}); export it again"
        ) from error
    assign(decoder, contents.tensors, dtype, torch.device(device), contents.where)
    decoder.architecture, decoder.about = contents.network, dict(contents.about)
    return decoder.requires_grad_(False).eval()


def contents_of(decoder: Any, about: Mapping[str, Any] | None = None) -> Contents:
    """All that an export of ``decoder`` (a family's LightningModule, or an :class:`Exported`) holds; no weight is copied."""
    if isinstance(decoder, Exported):
        if decoder.is_optimised:
            raise ExportError(
                "an optimised form has weights of its own and is not exported: save the decoder that it was made from"
            )
        tensors = dict(decoder.named_parameters()) | dict(decoder.named_buffers())
        about = {**decoder.about, **(about or {})}
        return Contents(decoder.family, decoder.space, decoder.architecture, decoder.sampling, about, tensors)
    family = type(decoder).__module__.split(".")[1]
    network, sampling = hooks(family).describe(decoder)
    sampling = {**sampling, "pad": "replicate" if decoder.training_config.pad == "replicate" else None}
    encoder = getattr(decoder, "encoder", None)
    tensors = {}
    for name, part in (("network", decoder.model), ("encoder", encoder)):
        if part is not None:  # buffers that no checkpoint holds too: the statistics of latents
            both = {**dict(part.named_parameters()), **dict(part.named_buffers())}
            tensors |= {f"{name}.{key}": tensor for key, tensor in both.items()}
    space = space_of(decoder.latent_space, decoder.model, encoder)
    return Contents(family, space, network, sampling, dict(about or {}), tensors)


def describe(decoder: Any) -> dict[str, Any]:
    """What an export of ``decoder`` would say: ``family``, ``space`` (SpaceInfo), ``network`` and ``sampling`` (plain values), and
    ``num_parameters`` of what would be stored. Raises ExportError: it has no export; says why."""
    found = contents_of(decoder)
    count = sum(tensor.numel() for tensor in found.tensors.values() if isinstance(tensor, nn.Parameter))
    return {
        "family": found.family,
        "space": found.space,
        "network": found.network,
        "sampling": found.sampling,
        "num_parameters": count,
    }


# --- to and from folders ---------------------------------------------------------------------------------------------


def save(
    folder: str | Path,
    decoder: Any,
    about: Mapping[str, Any],
    *,
    overwrite: bool = False,
    dtype: torch.dtype | None = None,
    files: Mapping[str, str] | None = None,
) -> Path:
    """Export ``decoder``, a family's LightningModule or an :class:`Exported`, to ``folder``: all of it, or nothing.

    What was trained and inference needs is stored, the averaged weights (EMA) in place of the last ones where the decoder has
    an average; never a frozen encoder, a teacher or a discriminator.

    Args:
        about: plain values that come back in ``Exported.about``: experiment, step, weights, versions, date, scores.
        overwrite: replace an export that is there.
        dtype: what floating parameters are stored in; None: as they are (float32 for a run). Statistics stay as they are.
        files: name -> text, written beside (the model card).

    Raises:
        ExportError: the folder is not empty or cannot be written, or the decoder has no export; says why.
    """
    with _averaged(decoder):
        return write(Path(folder), contents_of(decoder, about), overwrite=overwrite, dtype=dtype, files=files)


@contextmanager
def _averaged(decoder: Any) -> Iterator[None]:
    weights = getattr(decoder, "ema_weights", None)
    context: AbstractContextManager = nullcontext() if weights is None else weights()
    with context:
        yield


def load(
    source: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    revision: str | None = None,
    token: str | None = None,
) -> Exported:
    """A decoder for inference, from wherever it is.

    Args:
        source: an exported folder; a hub id ``user/name`` of one; ``wan_mini``; a diffusers folder of Wan 2.1, Wan 2.2 or LTX
            (the autoencoder's, or a pipeline's); a run's folder (its averaged weights if it kept them, else its last) or one
            of its files, ``weights-*.safetensors`` or ``last.ckpt``; Wan's original ``.pth``; VideoVAE+'s checkpoint.
        dtype: of the weights; None: as they are stored.
        device: where they go. On the CPU they stay in the file, which is mapped into memory, until they are used.
        revision, token: of the hub.

    Raises:
        ExportError: there is nothing, or something else, or it is damaged; says what to do.
    """
    from decoders.exported_sources import open_source

    if dtype is not None and not dtype.is_floating_point:
        raise ExportError(f"dtype {dtype} is not floating; take float32, bfloat16 or float16")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # or the weights' file would be blamed
        raise ExportError(
            f"device {device} is not to be had here ({str(error).splitlines()[0]}): load with device='cpu'"
        ) from None
    return open_source(source, dtype, device, revision, token)
