"""The Transformer that lets a video look at its references (section 2(b) and App. B.1 of arXiv 2605.15196).

Shapes: b clip, t frame, Y X token grid of a frame, s token of the queries, m token of the keys, H head, d its dimension,
D = H * d. A token is a patch of one frame. Values and what is left open follow the released code: no modulation, biases
everywhere, q and k normalised over all of D before they are split into heads.
"""

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from decoders.layers.tables import kept
from decoders.refdecoder.layouts import Norms, Point

EPS = 1e-6
THETA = 10_000.0
Table = tuple[Tensor, Tensor]  # cos and sin, each "s 1 d/2": one row for each token
KeyValue = tuple[Tensor, Tensor]  # each "b m H d"


def wide(x: Tensor) -> Tensor:
    """``x`` in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def normalise(x: Tensor) -> Tensor:
    """Mean 0 and variance 1 over the last axis, without gain; computed in float32, returned in the dtype of ``x``."""
    return F.layer_norm(wide(x), x.shape[-1:], eps=EPS).to(x.dtype)


class RMSNorm(nn.Module):
    """x / rms(x) * gain over the last axis; computed in float32, returned in the dtype of ``x``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        x32 = wide(x)
        return F.rms_norm(x32, self.gain.shape, self.gain.to(x32.dtype), EPS).to(x.dtype)


# ---- positions


def default_split(head_dim: int) -> tuple[int, int, int]:
    """How many of a head's dimensions turn with time, height and width: a third each, even, time with the rest.

    128 gives 44, 42, 42, as in Wan's diffusion Transformer.
    """
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


@kept(64)
def rope_table(
    times: tuple[int, ...], rows: int, columns: int, split: tuple[int, int, int], device: torch.device
) -> Table:
    """Rotations of tokens in (time, row, column) order: cosines and sines, float32.

    Args:
        times: position in time of each frame: a reference's is 0 or below, the video's first frame has 1.
        rows, columns: the token grid; positions are plain integers from 0.
        split: dimensions that turn with time, height and width.
    """
    axes = (torch.tensor(times), torch.arange(rows), torch.arange(columns))
    angles = [
        torch.outer(axis.double(), THETA ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim))
        for axis, dim in zip(axes, split, strict=True)
    ]
    shape = (len(times), rows, columns)
    time, row, column = angles
    grid = torch.cat(
        [
            time[:, None, None].expand(*shape, -1),
            row[None, :, None].expand(*shape, -1),
            column[None, None, :].expand(*shape, -1),
        ],
        dim=-1,
    ).reshape(-1, 1, sum(split) // 2)
    return grid.cos().float().to(device), grid.sin().float().to(device)


def rotate(x: Float[Tensor, "b s H d"], table: Table) -> Float[Tensor, "b s H d"]:
    """Turn neighbouring pairs of dimensions (2j, 2j + 1); in float32, returned in the dtype of ``x``."""
    cos, sin = table
    even, odd = wide(x).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)


# ---- tokens


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); functional in what earlier calls left behind."""

    def __init__(self, heads: int, head_dim: int, ffn: int) -> None:
        super().__init__()
        dim, self.head_dim = heads * head_dim, head_dim
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.q_norm, self.k_norm = RMSNorm(dim), RMSNorm(dim)
        self.up, self.down = nn.Linear(dim, ffn), nn.Linear(ffn, dim)

    def keys_values(self, normed: Float[Tensor, "b s D"]) -> KeyValue:
        """Keys, not rotated, and values of normalised tokens."""
        return self._heads(self.k_norm(self.k(normed))), self._heads(self.v(normed))

    def forward(
        self,
        x: Float[Tensor, "b s D"],
        query_table: Table,
        key_table: Table,
        past: tuple[KeyValue, ...] = (),
        fixed: KeyValue | None = None,
    ) -> tuple[Float[Tensor, "b s D"], KeyValue]:
        """Tokens see ``fixed``, ``past`` and one another.

        Args:
            query_table: rotations of ``x``.
            key_table: rotations of ``past`` and ``x``, in this order.
            past: earlier tokens' keys, not rotated, and values.
            fixed: keys, already rotated, and values.

        Returns:
            The new tokens, and the keys, not rotated, and values of ``x`` for later calls.
        """
        normed = normalise(x)
        new = self.keys_values(normed)
        q = rotate(self._heads(self.q_norm(self.q(normed))), query_table)
        k, v = (torch.cat(parts, 1) if past else parts[0] for parts in zip(*past, new, strict=True))
        k = rotate(k, key_table)
        if fixed is not None:
            k, v = torch.cat([fixed[0], k], 1), torch.cat([fixed[1], v], 1)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = (wide(x) + self.out(mixed)).to(x.dtype)
        return (wide(x) + self.down(F.gelu(self.up(normalise(x)), approximate="tanh"))).to(x.dtype), new

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))


class Gate(nn.Module):
    """The way into tokens and out of them at one point of the backbone.

    In: a linear map of every patch. Out: a norm, a linear map to a patch, and the patches side by side. A height or width
    that is no multiple of the patch is padded with zeros to the right and below, and cropped again.

    Args:
        norms: give video and reference each a GroupNorm on the way in, of up to 32 groups or one for every channel.
        zero_init: begin with nothing coming out, instead of Xavier's uniform numbers.
    """

    def __init__(self, point: Point, dim: int, norms: Norms, zero_init: bool) -> None:
        super().__init__()
        self.patch = point.patch
        numbers = point.channels * point.patch**2
        self.embed, self.project = nn.Linear(numbers, dim), nn.Linear(dim, numbers)
        nn.init.zeros_(self.project.bias)
        (nn.init.zeros_ if zero_init else nn.init.xavier_uniform_)(self.project.weight)
        self.norm_video = self.norm_reference = None
        if norms != "none":
            most = 32 if norms == "group" else point.channels
            groups = next(g for g in range(min(most, point.channels), 0, -1) if point.channels % g == 0)
            self.norm_video, self.norm_reference = (nn.GroupNorm(groups, point.channels, EPS) for _ in range(2))

    def video_tokens(self, video: Float[Tensor, "b c t y x"]) -> Float[Tensor, "b t Y X D"]:
        """Tokens of the video's features."""
        return self._tokens(video if self.norm_video is None else self.norm_video(video))

    def reference_tokens(self, reference: Float[Tensor, "b c r y x"]) -> Float[Tensor, "b r Y X D"]:
        """Tokens of the references' features; a norm takes its statistics of each reference by itself."""
        if self.norm_reference is not None:
            frames = rearrange(reference, "b c r y x -> (b r) c y x")
            reference = rearrange(self.norm_reference(frames), "(b r) c y x -> b c r y x", b=len(reference))
        return self._tokens(reference)

    def features(self, tokens: Float[Tensor, "b t Y X D"], height: int, width: int) -> Float[Tensor, "b c t y x"]:
        """Features of ``height`` x ``width`` cells, channels last in memory."""
        p = self.patch
        patches = self.project(normalise(tokens))
        x = rearrange(patches, "b t y x (p q c) -> b t (y p) (x q) c", p=p, q=p)
        return x[:, :, :height, :width].movedim(-1, 1)

    def _tokens(self, x: Tensor) -> Tensor:
        p = self.patch
        below, right = -x.shape[-2] % p, -x.shape[-1] % p
        if below or right:
            x = F.pad(x, (0, right, 0, below))
        return self.embed(rearrange(x.movedim(1, -1), "b t (y p) (x q) c -> b t y x (p q c)", p=p, q=p))
