"""Reference images: brought to the clip's size, and taken into the decoder's features."""

import logging
from functools import cache

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from decoders.backbones.wan_layers import ChannelNorm
from decoders.refdecoder.layouts import Layout

log = logging.getLogger(__name__)
LARGEST = 1.5  # room for a resize filter's overshoot; [0, 255] and [0, 2] are told
ASPECT_TOLERANCE = 0.02  # a clip's own rounding to multiples of 8 or 16 pixels stays below


class ReferenceEncoder(nn.Module):
    """RGB "b 3 r h w" in [-1, 1] to features "b c r y x" at a point where they meet the video, the first by default.

    Pixels folded into channels, a 3x3 convolution, a norm over channels. The paper's text has one strided convolution
    with a patch of 8 for both backbones (App. B.1); the released code folds, then convolves, and folds by 2 for VideoVAE+,
    whose first point has half the video's resolution.
    """

    def __init__(self, layout: Layout, number: int = 0) -> None:
        super().__init__()
        point = layout.points[number]
        self.fold = point.cell
        self.conv = nn.Conv2d(3 * self.fold**2, point.channels, 3, padding=1)
        self.norm = ChannelNorm(point.channels) if layout.encoder_norm else nn.Identity()
        nn.init.xavier_uniform_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)

    def forward(self, reference: Float[Tensor, "b 3 r h w"]) -> Float[Tensor, "b c r y x"]:
        frames = rearrange(
            reference.to(self.conv.weight.dtype),
            "b c r (y p) (x q) -> (b r) (c p q) y x",
            p=self.fold,
            q=self.fold,
        )
        return rearrange(self.norm(self.conv(frames)), "(b r) c y x -> b c r y x", b=len(reference))


def fit(reference: Tensor, clips: int, size: tuple[int, int], grid: tuple[int, int]) -> Float[Tensor, "b 3 r h w"]:
    """References at the size that the decoder works at.

    A reference of another size than the clip is resized to it (bicubic with antialiasing, clamped to [-1, 1]). Where the
    decoder works at whole latent pixels beyond the clip's edge, the reference goes on there as a padded clip does: its
    last row and column are repeated.

    Args:
        reference: "b 3 r h w", RGB in [-1, 1].
        clips: how many clips are decoded.
        size: height and width of the clip in pixels.
        grid: height and width in pixels that the latents cover, ``size`` rounded up.

    Raises:
        ValueError: another shape than "b 3 r h w", no float, or an aspect ratio that differs by more than 2 %.
    """
    if reference.ndim != 5 or reference.shape[1] != 3 or reference.shape[2] < 1:
        raise ValueError(f"reference is {tuple(reference.shape)}; it must be (b, 3, r, h, w) with r of 1 or more")
    if len(reference) != clips:
        raise ValueError(f"{len(reference)} references for {clips} clips; give each clip its own, (b, 3, r, h, w)")
    if not reference.is_floating_point():
        raise ValueError(f"reference is {reference.dtype}; it must be RGB as floats in [-1, 1]")
    if not torch.is_grad_enabled() and reference.abs().amax() > LARGEST:
        raise ValueError(f"reference has values up to {reference.abs().amax():.4g}; it must be RGB in [-1, 1]")
    if tuple(reference.shape[-2:]) == grid:
        return reference
    frames = rearrange(reference, "b c r h w -> (b r) c h w")
    if tuple(frames.shape[-2:]) != size:
        _check_aspect(tuple(frames.shape[-2:]), size)
        _tell(tuple(frames.shape[-2:]), size)
        dtype = frames.dtype
        frames = F.interpolate(frames.float(), size, mode="bicubic", antialias=True, align_corners=False)
        frames = frames.clamp(-1, 1).to(dtype)
    frames = F.pad(frames, (0, grid[1] - size[1], 0, grid[0] - size[0]), mode="replicate")
    return rearrange(frames, "(b r) c h w -> b c r h w", b=clips)


def _check_aspect(found: tuple[int, int], wanted: tuple[int, int]) -> None:
    (h, w), (height, width) = found, wanted
    off = abs(w * height / (h * width) - 1)
    if off > ASPECT_TOLERANCE:
        cropped = (h, round(h * width / height)) if w * height > h * width else (round(w * height / width), w)
        raise ValueError(
            f"a reference of {h}x{w} pixels for a clip of {height}x{width}: their aspect ratios differ by {100 * off:.0f} %, "
            f"and at most {100 * ASPECT_TOLERANCE:.0f} % is made up by resizing; crop it first, to {cropped[0]}x{cropped[1]}"
        )


@cache
def _tell(found: tuple[int, int], wanted: tuple[int, int]) -> None:
    """Once for each pair of sizes."""
    log.info("references of %dx%d pixels are resized to the clip's %dx%d (bicubic, antialiased)", *found, *wanted)


def clip_size(reference: Tensor | None, grid: tuple[int, int], cell: int) -> tuple[int, int]:
    """The clip's size where nobody says it: the references' own, if rounded up it is that of the latents; else theirs."""
    if reference is not None and reference.ndim == 5:
        h, w = reference.shape[-2:]
        if (-(-h // cell) * cell, -(-w // cell) * cell) == grid:
            return h, w
    return grid


def fold_frames(reference: Float[Tensor, "b c r y x"]) -> Float[Tensor, "b*r c 1 y x"]:
    """Every reference as a video of one frame."""
    return rearrange(reference, "b c r y x -> (b r) c 1 y x")


def unfold_frames(frames: Float[Tensor, "br c 1 y x"], clips: int) -> Float[Tensor, "b c r y x"]:
    """Undo :func:`fold_frames`."""
    return rearrange(frames, "(b r) c 1 y x -> b c r y x", b=clips)


def cut_to(image: Float[Tensor, "b 3 r h w"], size: tuple[int, int]) -> Float[Tensor, "b 3 r h2 w2"]:
    """The centre of an image of any aspect ratio at ``size`` (height, width): cut to that ratio, then resized as :func:`fit`."""
    (h, w), (height, width) = image.shape[-2:], size
    rows, columns = min(h, round(w * height / width)), min(w, round(h * width / height))
    top, left = (h - rows) // 2, (w - columns) // 2
    return fit(image[..., top : top + rows, left : left + columns], len(image), size, size)
