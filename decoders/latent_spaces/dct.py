"""A closed-form causal latent space: the lowest spatio-temporal DCT coefficients of each cell of pixels.

Nothing is learnt and nothing is downloaded, every property can be tested exactly, and the space decodes itself
linearly, which gives a floor: what a decoder gets for knowing no more than the basis. The recipe, per clip:

1. The first frame is repeated until it fills ``stride_t`` frames (group 0); each later ``stride_t`` frames are a group.
2. Colour is rotated to the orthonormal opponent axes (R+G+B)/sqrt 3, (R-B)/sqrt 2, (R-2G+B)/sqrt 6 (the principal axes
   of natural colour: Ohta, Kanade and Sakai, 1980). Grey has no chroma.
3. Each cell of ``stride_t x stride_hw x stride_hw`` pixels gets an orthonormal 3D DCT-II.
4. The ``channels`` coefficients of highest expected size are kept and divided by that size.

The expected size (standard deviation) of a coefficient is a model of natural video, a power law in spatial frequency
``r`` (cycles per pixel) and temporal frequency ``f`` (cycles per frame), for each colour axis:

    the cell's mean        MEAN * sqrt(stride_t * stride_hw^2)
    f = 0                  STILL * sqrt(stride_t) * r^-1.5
    f > 0                  MOVING * f^-0.7 * (r^2 + 1/32^2)^-0.75

It decides order as well as scale, so low comes before high, and luma before chroma of the same frequency: chroma's
constants are 4 to 9 times smaller. Ties (transposed frequencies) are broken by the index. The constants were fitted
by least squares on 46 clips of 17 frames from 23 live and animated films with the shorter side at 256, over cells from
1x8x8 to 8x32x32; there the kept coefficients' standard deviations are within 0.6 and 1.7 of the model's at the default
cell. The map is linear: there is no mean to subtract, so a space's latents of a black clip are those of white, negated.
"""

import math
from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor

from decoders.latent_spaces.base import LatentSpace, hash_parts

OPPONENT = ((1.0, 1.0, 1.0), (1.0, 0.0, -1.0), (1.0, -2.0, 1.0))  # rows, normalised where used
# Standard deviations by opponent axis, for RGB in [-1, 1].
MEAN = (0.87, 0.30, 0.14)
STILL = (1.6e-2, 3.3e-3, 2.0e-3)
MOVING = (2.9e-3, 5.6e-4, 3.4e-4)


@dataclass
class DCTConfig:
    """Shape of the space; any combination works."""

    channels: int = 48
    """Coefficients kept per cell, at most ``3 * stride_t * stride_hw**2`` (then the space is lossless)."""
    stride_t: int = 4
    """Pixel frames per cell."""
    stride_hw: int = 16
    """Pixels per cell, in height and in width."""

    def __post_init__(self) -> None:
        for name in ("channels", "stride_t", "stride_hw"):
            if getattr(self, name) < 1:
                raise ValueError(f"dct space: {name} is {getattr(self, name)}; it must be at least 1")
        most = 3 * self.stride_t * self.stride_hw**2
        if self.channels > most:
            raise ValueError(
                f"dct space: {self.channels} channels, but a cell of {self.stride_t}x{self.stride_hw}x{self.stride_hw} "
                f"RGB pixels has only {most} coefficients; set channels to at most {most}"
            )


class DCT(LatentSpace):
    """The closed-form space. Encoding and decoding are one matrix product per cell, in float32, also under autocast."""

    Config = DCTConfig
    name = "dct"
    causal = True

    def __init__(self, config: DCTConfig | None = None):
        self.config = config or DCTConfig()
        self.channels = self.config.channels
        self.stride_t = self.config.stride_t
        self.stride_hw = self.config.stride_hw
        self.index, self.std = kept_coefficients(self.channels, self.stride_t, self.stride_hw)
        self._basis = opponent_dct_basis(self.index, self.stride_t, self.stride_hw)

    @property
    def fingerprint(self) -> str:
        """Hash of the shape and of the constants of the model of natural video."""
        shape = {"channels": self.channels, "stride_t": self.stride_t, "stride_hw": self.stride_hw}
        return hash_parts("dct", shape, tensors={"index": self.index, "std": self.std})

    def _encode(
        self, video: Float[Tensor, "b 3 t h w"], sample: bool, generator: torch.Generator | None
    ) -> Float[Tensor, "b c n y x"]:
        basis, std = self._on(video.device)
        coefficients = _to_cells(video.float(), self.stride_t, self.stride_hw) @ basis
        return rearrange(coefficients / std, "b n y x c -> b c n y x")

    @torch.no_grad()
    def decode(self, latent: Float[Tensor, "b c n y x"]) -> Float[Tensor, "b 3 t h w"]:
        """The linear floor: RGB in [-1, 1] up to overshoot (not clamped), float32, from normalised latents.

        The inverse transform with the coefficients that were not kept at zero. Of group 0 only the last frame is kept.
        ``decode(encode(video))`` is the orthogonal projection of the clip onto what the space can hold.
        """
        if latent.ndim != 5 or latent.shape[1] != self.channels:
            raise ValueError(f"latent is {tuple(latent.shape)}; the dct space has (b, {self.channels}, n, y, x)")
        with torch.autocast(latent.device.type, enabled=False):
            basis, std = self._on(latent.device)
            cells = (rearrange(latent.float(), "b c n y x -> b n y x c") * std) @ basis.T
        return _from_cells(cells, self.stride_t, self.stride_hw)

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if self._basis.device != device:
            self._basis, self.std = self._basis.to(device), self.std.to(device)
        return self._basis, self.std


@torch.no_grad()
def dc_decode(
    video: Float[Tensor, "b 3 t h w"], stride_t: int, stride_hw: int, causal: bool = True
) -> Float[Tensor, "b 3 t h w"]:
    """One colour per cell of ``stride_t x stride_hw x stride_hw`` pixels; with ``causal`` the first frame has its own.

    The row that shows whether a decoder learnt more than the cells' means. The size must be a multiple of
    ``stride_hw`` and the length ``1 + k * stride_t``, or ``k * stride_t`` without ``causal``.
    """
    cells = _to_cells(video.float(), stride_t, stride_hw, causal)
    cells = rearrange(cells, "b n y x (k p) -> b n y x k p", k=3)
    return _from_cells(cells.mean(-1, keepdim=True).expand_as(cells).flatten(-2), stride_t, stride_hw, causal)


def kept_coefficients(channels: int, stride_t: int, stride_hw: int) -> tuple[Tensor, Tensor]:
    """The coefficients that are kept, in order, and their expected standard deviations.

    Returns:
        index: int64 (channels, 4): colour axis, temporal, vertical and horizontal index of each.
        std: float32 (channels,), for RGB in [-1, 1].
    """
    f = torch.arange(stride_t, dtype=torch.float64)[:, None, None] / (2 * stride_t)
    side = torch.arange(stride_hw, dtype=torch.float64) / (2 * stride_hw)
    r2 = (side[:, None] ** 2 + side[None, :] ** 2)[None]
    mean, still, moving = (torch.tensor(c, dtype=torch.float64)[:, None, None, None] for c in (MEAN, STILL, MOVING))
    # Zero frequencies are replaced below; clamped here so that the powers stay finite.
    std = moving * f.clamp(min=1e-9) ** -0.7 * (r2 + 1 / 32**2) ** -0.75
    std[:, 0] = (still * math.sqrt(stride_t) * r2.clamp(min=1e-18) ** -0.75)[:, 0]
    std[:, 0, 0, 0] = mean[:, 0, 0, 0] * math.sqrt(stride_t * stride_hw**2)
    # Rounded, so that equal frequencies tie on every platform and the index decides.
    order = std.log().mul(1e8).round().flatten().argsort(descending=True, stable=True)[:channels]
    index = torch.stack(torch.unravel_index(order, std.shape), dim=1)
    return index, std.flatten()[order].float()


def opponent_dct_basis(index: Tensor, stride_t: int, stride_hw: int) -> Float[Tensor, "p c"]:
    """Orthonormal columns: for each row of ``index``, that coefficient's pattern over a cell (colour, t, h, w)."""
    colour = torch.tensor(OPPONENT, dtype=torch.float64)
    colour = colour / colour.norm(dim=1, keepdim=True)
    time, side = dct_matrix(stride_t), dct_matrix(stride_hw)
    axis, u, v, w = index.unbind(1)
    basis = torch.einsum("ck,ct,ch,cw->kthwc", colour[axis], time[u], side[v], side[w])
    return basis.flatten(0, 3).float()


def dct_matrix(n: int) -> Float[Tensor, "n n"]:
    """Orthonormal DCT-II of length ``n``, float64: row k is the k-th cosine."""
    k = torch.arange(n, dtype=torch.float64)
    rows = torch.cos(math.pi * k[:, None] * (2 * k[None, :] + 1) / (2 * n)) * math.sqrt(2 / n)
    rows[0] /= math.sqrt(2)
    return rows


def _to_cells(video: Tensor, stride_t: int, stride_hw: int, causal: bool = True) -> Float[Tensor, "b n y x p"]:
    """Groups of frames cut into cells, each flattened as (colour, t, h, w); ``causal``: the first, repeated, is group 0."""
    if causal:
        first = repeat(video[:, :, :1], "b k 1 h w -> b k u h w", u=stride_t - 1)
        video = torch.cat([first, video], dim=2)
    return rearrange(video, "b k (n u) (y i) (x j) -> b n y x (k u i j)", u=stride_t, i=stride_hw, j=stride_hw)


def _from_cells(
    cells: Float[Tensor, "b n y x p"], stride_t: int, stride_hw: int, causal: bool = True
) -> Float[Tensor, "b 3 t h w"]:
    """The inverse of :func:`_to_cells`: of a causal group 0 the last frame stays, as the others were its copies."""
    pattern = "b n y x (k u i j) -> b k (n u) (y i) (x j)"
    video = rearrange(cells, pattern, k=3, u=stride_t, i=stride_hw, j=stride_hw)
    return video[:, :, stride_t - 1 if causal else 0 :].contiguous()
