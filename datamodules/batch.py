"""The contract between data and decoders: one axis legend, one batch.

Axis legend, used by every shape in the project:

| letter | axis            | letter | axis            |
|--------|-----------------|--------|-----------------|
| b      | clip            | c      | latent channel  |
| t      | pixel frame     | n      | latent frame    |
| h, w   | pixel           | y, x   | latent pixel    |
| r      | reference frame |        |                 |

RGB is float in [-1, 1]; uint8 exists only at the file's edge. Latents are normalised, ``(z - mean) / std`` with the
space's own statistics, as a latent diffusion model emits them. In a causal space of temporal stride ``s`` a clip of
``n`` latent frames has ``t = 1 + (n - 1) * s`` pixel frames, so an image is a clip of one frame; in one that is not
causal (``LatentSpace.causal``) ``t = n * s``.
"""

from typing import NotRequired, TypedDict

from jaxtyping import Bool, Float
from torch import Tensor


class VideoBatch(TypedDict):
    """What a datamodule yields and every decoder reads. At least one of ``video`` and ``latent`` is present.

    There is no mode flag: what is in the batch says what it is. A family that has no use for a key ignores it. Clips of
    films and images have a video alone; saved latents of a diffusion model have ``latent`` and ``reference`` and no target;
    triples have ``video``, ``source`` and ``reference``; edited films have ``video`` and ``mask``, and perhaps the edit's
    ``latent`` and ``reference``: the video is then what was not edited, which the mask leaves to count.
    """

    video: NotRequired[Float[Tensor, "b 3 t h w"]]  # the target
    source: NotRequired[Float[Tensor, "b 3 t h w"]]  # what is encoded; absent: video
    latent: NotRequired[Float[Tensor, "b c n y x"]]  # absent: encode(source)
    reference: NotRequired[Float[Tensor, "b 3 r h w"]]  # images to look at, in [-1, 1], at the clip's size
    mask: NotRequired[Float[Tensor, "b 1 t h w"]]  # pixels that count, 0 or 1
    supervised: NotRequired[Bool[Tensor, "b t"]]  # frames that have a target
    key: list[str]  # where each clip came from: tables, seeds, quarantine


def counted(batch: VideoBatch) -> Float[Tensor, "b 1 t h w"] | None:
    """The pixels that have a target: ``mask`` within the ``supervised`` frames. None: all of them."""
    mask, supervised = batch.get("mask"), batch.get("supervised")
    if supervised is None:
        return mask
    frames = supervised[:, None, :, None, None].to(batch["video"].dtype)
    return frames.expand(-1, -1, -1, *batch["video"].shape[-2:]) if mask is None else mask * frames


def batch_size(batch: VideoBatch) -> int:
    """Number of clips in ``batch``."""
    return len(batch["key"])
