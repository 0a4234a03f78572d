"""Saved latents of a diffusion model: their file formats, what is refused, and the clip that training gets of one.

NAME.safetensors holds one tensor ``latent`` (c n y x, or 1 c n y x) and strings as metadata (``save_latent`` writes it):

    space          fingerprint or name of the latent space; who uses the latents compares it with its own
    normalised     true: (z - mean) / std, as a diffusion model emits latents. false: not yet; then ``mean`` and ``std``
                   (JSON lists, one number per channel) must be there, and are applied on reading
    height, width  of the video in pixels
    prompt, seed, fps   what it was generated from and with, and the video's frame rate; optional

NAME.pt is what ``torch.save`` wrote, read with ``weights_only=True``: the tensor, or a dictionary that holds it as
``latents`` or ``latent`` and may hold the entries above and ``image_name``, a file's name (RefDecoder's scripts save height,
width, image_name, prompt and seed). It counts as normalised unless it says otherwise, since that is what diffusers'
pipelines return for ``output_type="latent"``.

The reference image, usually the one that the video was generated from, lies beside it: NAME.png, .jpg, .jpeg or .webp,
or what ``image_name`` says; or a CSV list names it (columns path, reference; prompt and seed are optional).

Refused as not normalised are files with |mean| > 1 or a standard deviation outside 0.2 to 1.9 over all their values.
Measured: of 28 films, normalised (wan_mini, dct), |mean| is at most 0.3 and the standard deviation 0.24 to 1.74, both
ends by films with hardly anything or very much in them; generated Wan 2.1 latents have 0.94, and would have 2.15 before
normalisation. So a single raw file may pass, and a set does not (``index.py`` looks at eight before training). A space whose
own statistics are near unit (Wan 2.2: stds of about 0.4 to 1.2) cannot be told apart: there only ``normalised`` speaks.
"""

import json
import os
import pickle
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from datamodules.probe import OUR_FAULT, BadFile, check_readable
from datamodules.stills import load_reference

LARGEST_MEAN = 1.0
SMALLEST_STD, LARGEST_STD = 0.2, 1.9
BOUNDS = {  # of numbers in metadata; 0 frames or pixels: not said
    "height": (0, 1 << 20),
    "width": (0, 1 << 20),
    "frames": (0, 1 << 40),
    "fps": (1e-3, 1000),
    "seed": (-(1 << 63), (1 << 63) - 1),
}
REFERENCE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
ADVICE = (
    "subtract the latent space's mean and divide by its std (latents_mean and latents_std of a diffusers VAE), or add "
    "both to the file's metadata: normalised=false, mean and std as JSON lists with one number per channel"
)


@dataclass(frozen=True)
class LatentHeader:
    """What a file says about itself: the tensor's shape, and its metadata. Zero, empty and None: not said."""

    channels: int
    frames: int  # latent frames
    rows: int
    columns: int
    space: str = ""
    height: int = 0  # pixels
    width: int = 0
    mean: Sequence[float] | None = None  # to be applied; None: the file is normalised
    std: Sequence[float] | None = None
    image: str = ""
    prompt: str = ""
    seed: int | None = None
    fps: float | None = None
    num_frames: int = 0  # of the video; the latent may stand for more, where its last frame was repeated to fill it


def inspect_latent(path: str) -> LatentHeader:
    """Shape and metadata; the values are not read. Raises BadFile, also for latents that cannot be normalised."""
    return _read(path, load=False)[0]


def read_header(
    path: str, assume: str | None = None, statistics: tuple[Sequence[float], Sequence[float]] | None = None
) -> tuple[LatentHeader, dict, str]:
    """Header, all metadata, and what the file says of being normalised: "true", "false", or "" for nothing.

    ``assume``: normalised or raw, whatever the file says. ``statistics``: mean and std of raw latents that state none
    themselves. A file that says nothing counts as normalised. The values are not read. Raises BadFile.
    """
    shape, entries, _ = _contents(path, load=False)
    said = str(entries.get("normalised", "")).lower()
    if said not in ("true", "false", "") and assume is None:
        raise BadFile(f"its metadata's normalised is {said[:40]!r}, and must be true or false")
    raw = said == "false" if assume is None else assume == "raw"
    entries = entries | {"normalised": str(not raw).lower()}
    if raw and statistics is not None and (entries.get("mean") is None or entries.get("std") is None):
        entries = entries | {"mean": list(statistics[0]), "std": list(statistics[1])}
    return _header(shape, entries), entries, said


def load_latent(path: str) -> tuple[Float[Tensor, "c n y x"], LatentHeader]:
    """The normalised latent, float32, and its header. Raises BadFile: damaged, not finite, not normalised."""
    header, latent = _read(path, load=True)
    latent = latent.reshape(header.channels, header.frames, header.rows, header.columns).float()
    if header.mean is not None:
        mean, std = (torch.tensor(values).view(-1, 1, 1, 1) for values in (header.mean, header.std))
        latent = (latent - mean) / std
    if not latent.isfinite().all():
        raise BadFile("holds values that are not finite")
    mean, std = latent.mean().item(), latent.std(correction=0).item()
    if abs(mean) > LARGEST_MEAN or not SMALLEST_STD <= std <= LARGEST_STD:
        raise BadFile(
            f"not normalised: its mean is {mean:.2f} and its standard deviation {std:.2f}, outside of +-{LARGEST_MEAN:g} "
            f"and {SMALLEST_STD:g} to {LARGEST_STD:g}; {ADVICE}"
        )
    return latent, header


def read_clip(path: str, reference: str, shape: tuple[int, int, int, int], size: tuple[int, int]) -> dict[str, Tensor]:
    """{latent "c n y x", reference "3 1 h w"}: the first ``n`` latent frames of ``shape`` (c, n, y, x), and the image,
    stretched to (height, width) ``size``. In a causal space the first latent frames are the first frames.

    Raises BadFile.
    """
    latent, _ = load_latent(path)
    channels, frames, rows, columns = shape
    if latent.shape[1] < frames or (latent.shape[0], *latent.shape[2:]) != (channels, rows, columns):
        raise BadFile(f"is {tuple(latent.shape)} now, where the index had {channels} channels at {rows}x{columns}")
    return {"latent": latent[:, :frames], "reference": load_reference(reference, size)}


def find_reference(path: str, image: str = "") -> str:
    """The reference image beside a latent's file: of the same name, else ``image`` (LatentHeader.image). Empty: none."""
    stem = os.path.splitext(path)[0]
    named = [os.path.join(os.path.dirname(path), image)] if image else []
    beside = (candidate for candidate in [*(stem + suffix for suffix in REFERENCE_SUFFIXES), *named])
    return next((candidate for candidate in beside if os.path.isfile(candidate)), "")


def save_latent(
    path: str | Path,
    latent: Float[Tensor, "c n y x"],
    *,
    space: str,
    height: int,
    width: int,
    prompt: str = "",
    seed: int | None = None,
    fps: float | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> None:
    """Write a ``.safetensors`` file whole or not at all. ``mean`` and ``std``: ``latent`` is still to be normalised."""
    metadata = {"space": space, "normalised": str(mean is None).lower(), "height": str(height), "width": str(width)}
    optional = {"prompt": prompt or None, "seed": seed, "fps": fps}
    metadata |= {key: str(value) for key, value in optional.items() if value is not None}
    if mean is not None:
        metadata |= {"mean": json.dumps(list(mean)), "std": json.dumps(list(std))}
    path = Path(path)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".saving-") as folder:
        save_file({"latent": latent.detach().cpu().contiguous()}, Path(folder) / path.name, metadata)
        os.replace(Path(folder) / path.name, path)


# ---- reading


def _read(path: str, load: bool) -> tuple[LatentHeader, Tensor | None]:
    shape, entries, latent = _contents(path, load)
    if entries.get("piece"):
        raise BadFile(
            f"holds pieces of {entries['piece']} latent frames, each coded by itself: the command that wrote it decodes them "
            "(python -m experiments.cli decode); encode the video as shorter clips"
        )
    return _header(shape, entries), latent


def _contents(path: str, load: bool) -> tuple[list[int], dict, Tensor | None]:
    """Shape, metadata, and the values if they are asked for. Raises BadFile."""
    check_readable(path)
    try:
        if path.lower().endswith(".pt"):
            return _read_torch(path)
        return _read_safetensors(path, load)
    except (SafetensorError, RuntimeError, EOFError, OSError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        if getattr(error, "errno", None) in OUR_FAULT or "allocate" in str(error):  # our memory, not the file
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if isinstance(error, pickle.UnpicklingError):  # torch's own words advise to run it
            reason = "it is damaged, or holds other things than tensors, text and numbers; those are not loaded, since they may run code"
        raise BadFile(f"not a readable latent: {reason}".replace(path, "file")) from None


def _read_safetensors(path: str, load: bool) -> tuple[list[int], dict, Tensor | None]:
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        if "latent" not in names:
            raise BadFile(f"holds no tensor 'latent', only {', '.join(names[:5]) or 'nothing'}")
        shape = file.get_slice("latent").get_shape()
        return shape, file.metadata() or {}, file.get_tensor("latent") if load else None


def _read_torch(path: str) -> tuple[list[int], dict, Tensor]:
    # By memory map where the format allows it, so that a look at the header reads no values.
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    entries = content if isinstance(content, dict) else {"latent": content}
    latent = entries.get("latents", entries.get("latent"))
    if not isinstance(latent, Tensor):
        raise BadFile(
            f"holds no tensor 'latents' or 'latent', but {type(content).__name__}({', '.join(map(str, entries))})"
        )
    entries = {"image": entries.get("image_name", ""), "normalised": True} | entries
    return list(latent.shape), {k: v for k, v in entries.items() if k not in ("latents", "latent")}, latent


def _header(shape: list[int], entries: dict) -> LatentHeader:
    clip = shape[1:] if len(shape) == 5 and shape[0] == 1 else shape
    if len(clip) != 4 or min(clip) < 1:
        raise BadFile(f"its tensor is {tuple(shape)}; a file holds one clip, (c, n, y, x) or (1, c, n, y, x)")
    said = str(entries.get("normalised", "")).lower()
    if said not in ("true", "false"):
        raise BadFile("its metadata do not say whether it is normalised; write normalised=true, or: " + ADVICE)
    mean = std = None
    if said == "false":
        mean, std = (_per_channel(entries, key, clip[0]) for key in ("mean", "std"))
        if min(std) <= 0:
            raise BadFile("its metadata's std must be positive")
    return LatentHeader(
        *clip,
        space=str(entries.get("space", "")),
        height=_number(entries, "height", int) or 0,
        width=_number(entries, "width", int) or 0,
        mean=mean,
        std=std,
        image=os.path.basename(str(entries.get("image", ""))),
        prompt=str(entries.get("prompt", "")),
        seed=_number(entries, "seed", int),
        fps=_number(entries, "fps", float),
        num_frames=_number(entries, "frames", int) or 0,
    )


def _per_channel(entries: dict, key: str, channels: int) -> list[float]:
    value = entries.get(key)
    if value is None:
        raise BadFile("not normalised, and its metadata lack mean or std: " + ADVICE)
    try:
        numbers = [float(number) for number in (json.loads(value) if isinstance(value, str) else value)]
    except (TypeError, ValueError):
        raise BadFile(f"its metadata's {key} is no list of numbers: {str(value)[:40]}") from None
    if len(numbers) != channels:
        raise BadFile(f"its metadata's {key} has {len(numbers)} numbers for {channels} channels")
    return numbers


def _number(entries: dict, key: str, kind: type):
    value = entries.get(key)
    if value is None or value == "":
        return None
    try:
        number = kind(value)
    except (TypeError, ValueError, OverflowError):
        raise BadFile(f"its metadata's {key} is {str(value)[:40]!r}, which is no {kind.__name__}") from None
    low, high = BOUNDS[key]
    if not low <= number <= high:
        raise BadFile(f"its metadata's {key} is {str(value)[:40]}, outside of {low} to {high}")
    return number
