"""FlashDecoder: latent frames in, pixel frames out, one at a time (arXiv 2607.14898, sections 3.1 to 3.4).

    latent frame -> linear -> backbone (rolling cache) -> linear D to r_t D, read as r_t new times
                 -> refinement (rolling cache) -> MLP -> pixel shuffle -> r_t frames (one, for the first latent frame)

What the paper leaves open, and what we chose, is listed in README.md beside this file.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from decoders.flashdecoder.blocks import HEAD_DIM, RMSNorm
from decoders.flashdecoder.stack import Cache, Grid, RollingStack
from decoders.inference import InferenceOptions

MODES = ("streaming", "masked", "parallel")
TOKEN_GAIN = 5.0  # see _initialise


@dataclass
class FlashDecoderConfig:
    """The architecture. The latent space gives channels and strides."""

    depth: int = 12
    dim: int = 512
    num_heads: int = 8  # dim / 64
    num_kv_heads: int = 2  # num_heads for plain multi-head attention
    mlp_ratio: float = 4.0
    refinement_depth: int = 2  # 0: no temporal refinement (Table 1)
    head_ratio: float = 4.0  # hidden width of the spatial MLP; 0: a single linear layer (Table 1, and XL on Wan 2.1)
    window: int | None = 2  # latent frames that are seen, the current one included; null: all of them (Table 1)
    unshuffle: int = 1  # 2 folds 2x2 latent pixels into one token (Wan 2.1)
    q_norm: bool = False
    rope_split: tuple[int, int, int] = (16, 24, 24)  # of the 64 dimensions of a head: time, height, width
    rope_theta: float = 10_000.0
    # How a clip runs through the model in training and decode. streaming: the stream's own loop (the paper's);
    # masked: at once under a mask (the paper's ablation); parallel: at once, frames folded into the batch. All equal.
    mode: Literal["streaming", "masked", "parallel"] = "streaming"
    checkpointing: bool = False  # recompute blocks in the backward pass: 720p and 1080p need it
    detach_cache: bool = False  # no gradient into earlier frames; streaming mode only

    def __post_init__(self) -> None:
        if self.dim != self.num_heads * HEAD_DIM:
            raise ValueError(f"decoder.dim={self.dim} must be {HEAD_DIM} x num_heads = {HEAD_DIM * self.num_heads}")
        if self.num_heads < 1 or self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise ValueError(f"decoder.num_kv_heads={self.num_kv_heads} must divide num_heads={self.num_heads}")
        if self.window is not None and self.window < 1:
            raise ValueError(f"decoder.window={self.window} must be 1 or more, or null for all frames")
        if sum(self.rope_split) != HEAD_DIM or any(dims % 2 or dims < 0 for dims in self.rope_split):
            raise ValueError(f"decoder.rope_split={tuple(self.rope_split)} must be three even numbers that sum to 64")
        if not 0 < self.rope_theta < math.inf:  # NaN is neither
            raise ValueError(f"decoder.rope_theta={self.rope_theta} must be a number above 0, such as 10000")
        if self.detach_cache and self.mode != "streaming":
            raise ValueError("decoder.detach_cache=true needs decoder.mode=streaming: other modes have no cache")
        if self.depth < 1 or self.refinement_depth < 0 or self.unshuffle < 1:
            raise ValueError("decoder.depth and unshuffle must be 1 or more, refinement_depth 0 or more")


#        Table 3: depth  dim   heads  groups
SIZES = {
    "s":  dict(depth=12, dim=512,  num_heads=8,  num_kv_heads=2),
    "b":  dict(depth=16, dim=768,  num_heads=12, num_kv_heads=3),
    "l":  dict(depth=20, dim=1024, num_heads=16, num_kv_heads=4),
    "xl": dict(depth=20, dim=1536, num_heads=24, num_kv_heads=3),
}  # fmt: skip


@dataclass
class FlashStream:
    """Everything that a stream remembers. The caller owns it; two states never touch. Its size does not grow."""

    batch_size: int
    height: int  # pixels, of the frames that come out
    width: int
    grid: Grid
    backbone: Cache
    refinement: Cache
    started: bool = False
    ended: bool = field(default=False, repr=False)

    def num_bytes(self) -> int:
        """Bytes held by the caches."""
        layers = (*self.backbone, *self.refinement)
        return sum(part.nbytes for frames in layers for pair in frames for part in pair)


class Head(nn.Module):
    """Tokens to pixels: norm, MLP D -> ratio D -> D, linear D -> 3 p p, pixel shuffle (section 3.4)."""

    def __init__(self, dim: int, ratio: float, patch: int) -> None:
        super().__init__()
        self.patch = patch
        self.norm = RMSNorm(dim)
        hidden = int(dim * ratio)
        self.up = nn.Linear(dim, hidden, bias=False) if hidden else None
        self.down = nn.Linear(hidden, dim, bias=False) if hidden else None
        self.pixels = nn.Linear(dim, 3 * patch * patch, bias=False)

    def forward(self, x: Float[Tensor, "b s d"], grid: Grid) -> Float[Tensor, "b 3 t h w"]:
        x = self.norm(x)
        if self.up is not None:
            x = self.down(F.silu(self.up(x)))
        p = self.patch
        return rearrange(
            self.pixels(x), "b (t y x) (c p q) -> b c t (y p) (x q)", y=grid.rows, x=grid.columns, p=p, q=p
        )


class FlashDecoderModel(nn.Module):
    """Normalised latents "b c n y x" to RGB "b 3 1+(n-1)*stride_t h w", about [-1, 1], not clamped.

    Args:
        config: the architecture.
        channels, stride_t, stride_hw: of the latent space.
    """

    def __init__(self, config: FlashDecoderConfig, channels: int, stride_t: int, stride_hw: int) -> None:
        super().__init__()
        self.config = config
        self.channels, self.stride_t, self.stride_hw = channels, stride_t, stride_hw
        dim = config.dim
        shared = dict(
            window=config.window,
            split=config.rope_split,
            theta=config.rope_theta,
            checkpointing=config.checkpointing,
            detach_cache=config.detach_cache,
            block=dict(
                num_heads=config.num_heads,
                num_kv_heads=config.num_kv_heads,
                mlp_ratio=config.mlp_ratio,
                q_norm=config.q_norm,
            ),
        )
        self.embed = nn.Linear(channels * config.unshuffle**2, dim, bias=False)
        self.backbone = RollingStack(config.depth, times_per_frame=1, **shared)
        self.backbone_norm = RMSNorm(dim)
        self.expand = nn.Linear(dim, stride_t * dim, bias=False)
        self.refinement = RollingStack(config.refinement_depth, times_per_frame=stride_t, **shared)
        self.head = Head(dim, config.head_ratio, self.patch)
        self._initialise()

    @property
    def patch(self) -> int:
        """Pixels per token and side; sizes must be multiples of it."""
        return self.stride_hw * self.config.unshuffle

    def _initialise(self) -> None:
        """Variance 1 / fan-in; branches that write to the residual scaled down by their number; tokens five times larger.

        The paper states no initialisation. Every layer reads the residual through a norm, and there are no biases, so a
        latent's amplitude reaches the pixels only as its size against what the branches add: a large token and quiet
        branches keep it legible. At width 128, 250 steps: 20.1 dB with quiet branches alone, 21.0 to 21.3 with both (LOG.md).
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=module.in_features**-0.5)
        blocks = [*self.backbone.blocks, *self.refinement.blocks]
        with torch.no_grad():
            self.embed.weight.mul_(TOKEN_GAIN)
            for block in blocks:
                block.attention.out.weight.mul_((2 * len(blocks)) ** -0.5)
                block.down.weight.mul_((2 * len(blocks)) ** -0.5)

    # ---- whole clips

    def forward(
        self, latent: Float[Tensor, "b c n y x"], mode: str | None = None
    ) -> Float[Tensor, "b 3 1+(n-1)*{self.stride_t} h w"]:
        """Decode a whole clip in ``mode`` (default: the config's). All modes are the same function."""
        mode = mode or self.config.mode
        if mode not in MODES:
            raise ValueError(f"mode={mode!r} is none of {', '.join(MODES)}")
        tokens, grid = self._tokens(latent)
        frames = tokens.shape[1]
        if mode == "streaming":
            backbone, refinement = self.backbone.empty_cache(), self.refinement.empty_cache()
            outputs = []
            for frame in range(frames):
                output, backbone, refinement = self._step(tokens[:, frame], backbone, refinement, grid, frame == 0)
                outputs.append(output)
            return torch.cat(outputs, dim=2)
        run = "forward_masked" if mode == "masked" else "forward_parallel"
        x = getattr(self.backbone, run)(tokens.flatten(1, 2), frames, grid)
        x = self._expand(x.unflatten(1, (frames, -1))).flatten(1, 2)
        x = getattr(self.refinement, run)(x, frames, grid)
        dropped = (self.stride_t - 1) * grid.rows * grid.columns
        return self._pixels(x[:, dropped:], grid)

    @torch.no_grad()
    def decode(self, latent: Float[Tensor, "b c n y x"]) -> Float[Tensor, "b 3 t h w"]:
        """Frame by frame through the rolling cache, without gradients, whatever the config's mode."""
        return self(latent, mode="streaming")

    # ---- streams

    def start_stream(self, batch_size: int, height: int, width: int) -> FlashStream:
        """A new stream of ``batch_size`` clips of ``height`` x ``width`` pixels.

        A size that ``patch`` does not divide is rounded up: the latent must cover it, the frames are cropped to it.
        """
        if batch_size < 1 or height < 1 or width < 1:
            raise ValueError(f"a stream of {batch_size} clips of {height}x{width} pixels is empty")
        grid = Grid(-(-height // self.patch), -(-width // self.patch))
        return FlashStream(batch_size, height, width, grid, self.backbone.empty_cache(), self.refinement.empty_cache())

    def step_stream(self, latent_frame: Float[Tensor, "b c y x"], state: FlashStream) -> Float[Tensor, "b 3 k h w"]:
        """Decode the next latent frame: one pixel frame for the first, then ``stride_t`` for each."""
        if state.ended:
            raise ValueError("this stream has ended; start another with start_stream")
        u = self.config.unshuffle
        expected = (state.batch_size, self.channels, state.grid.rows * u, state.grid.columns * u)
        if tuple(latent_frame.shape) != expected:
            raise ValueError(
                f"latent frame of shape {tuple(latent_frame.shape)}, but this stream of {state.batch_size} x "
                f"{state.height}x{state.width} pixels takes {expected} (b c y x)"
            )
        tokens, grid = self._tokens(latent_frame.unsqueeze(2))
        output, state.backbone, state.refinement = self._step(
            tokens[:, 0], state.backbone, state.refinement, grid, first=not state.started
        )
        state.started = True
        return output[..., : state.height, : state.width]

    def end_stream(self, state: FlashStream) -> Float[Tensor, "b 3 0 h w"]:
        """Close the stream. Nothing is ever pending: every step returns all of its frames."""
        state.ended = True
        state.backbone, state.refinement = [], []
        weight = self.embed.weight
        return weight.new_zeros(state.batch_size, 3, 0, state.height, state.width)

    def optimised(self, options: InferenceOptions, calibration: Sequence[Tensor] | Any = ()) -> nn.Module:
        """The same function for inference, fast (fast.py): see decoders/inference.py. ValueError if ``window`` is null."""
        from decoders.flashdecoder import fast  # which reads this module

        return fast.build(self, options, calibration)

    # ---- pieces

    def _tokens(self, latent: Float[Tensor, "b c n y x"]) -> tuple[Float[Tensor, "b n s d"], Grid]:
        u = self.config.unshuffle
        if latent.shape[1] != self.channels:
            raise ValueError(f"latent of {latent.shape[1]} channels, but this decoder reads {self.channels}")
        if latent.shape[-2] % u or latent.shape[-1] % u:
            raise ValueError(
                f"latent of {latent.shape[-2]}x{latent.shape[-1]} is not divisible by decoder.unshuffle={u}: "
                f"pixels must come in multiples of {self.patch} (pad=replicate pads and crops back)"
            )
        grid = Grid(latent.shape[-2] // u, latent.shape[-1] // u)
        return self.embed(rearrange(latent, "b c n (y p) (x q) -> b n (y x) (c p q)", p=u, q=u)), grid

    def _expand(self, x: Float[Tensor, "... s d"]) -> Float[Tensor, "... tokens d"]:
        """Temporal-first upsampling: channels (k, d) become k times, each with its own s tokens (section 3.4)."""
        return rearrange(self.expand(self.backbone_norm(x)), "... s (k d) -> ... (k s) d", k=self.stride_t)

    def _pixels(self, x: Tensor, grid: Grid) -> Tensor:
        if self.config.checkpointing and torch.is_grad_enabled():
            return checkpoint(self.head, x, grid, use_reentrant=False)
        return self.head(x, grid)

    def _step(self, x: Tensor, backbone: Cache, refinement: Cache, grid: Grid, first: bool):
        """One latent frame's tokens "b s D" to its frames, and both caches after it."""
        x, backbone = self.backbone.step(x, backbone, grid)
        # The first latent frame stands for one pixel frame, the last of its stride_t times.
        last = grid.rows * grid.columns if first else None
        x, refinement = self.refinement.step(self._expand(x), refinement, grid, last)
        if first and not self.config.refinement_depth:
            x = x[:, -last:]
        return self._pixels(x, grid), backbone, refinement
