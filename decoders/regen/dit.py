"""The diffusion Transformer (section 3.2): plain pre-norm blocks with full attention over space and time.

Peebles and Xie's DiT without its per-block modulation: latents and noise level are added to the tokens, as the paper says.
Shapes: b clip, s token, m token beside the video's, H head, d its dimension, D = H * d.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

EPS = 1e-6
FREQUENCIES = 256  # numbers that stand for a noise level before its MLP


class RMSNorm(nn.Module):
    """x / rms(x) * gain over the last axis, summed in float32, in the dtype of ``x`` (autocast would answer in float32)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.rms_norm(x, self.gain.shape, self.gain.to(x.dtype), EPS)


def normalise(x: Tensor) -> Tensor:
    """Mean 0 and variance 1 over the last axis, without gain."""
    return F.layer_norm(x, x.shape[-1:], eps=EPS)


def sinusoids(x: Float[Tensor, "..."], dim: int, base: float = 10_000.0) -> Float[Tensor, "... dim"]:
    """Cosines and sines of ``x`` at dim / 2 frequencies from 1 down to about 1 / base."""
    frequencies = base ** (-torch.arange(dim // 2, device=x.device, dtype=torch.float32) / (dim // 2))
    angles = x.float().unsqueeze(-1) * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1)


class Level(nn.Module):
    """The noise level, 0 (clean) to 1 (noise), as a token's worth of numbers."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(FREQUENCIES, dim), nn.Linear(dim, dim)

    def forward(self, level: Float[Tensor, " b"]) -> Float[Tensor, "b D"]:
        return self.down(F.silu(self.up(sinusoids(1000 * level, FREQUENCIES).to(self.up.weight.dtype))))


class Attention(nn.Module):
    """Full attention; queries and keys normalised per head, which keeps bfloat16 training stable."""

    def __init__(self, dim: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.q_norm, self.k_norm = (RMSNorm(dim // heads) if qk_norm else nn.Identity() for _ in range(2))

    def forward(self, x: Float[Tensor, "b s D"]) -> Float[Tensor, "b s D"]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        q, k, v = (part.transpose(1, 2) for part in (self.q_norm(q), self.k_norm(k), v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    With ``modulated`` (adaLN-single of PixArt) each has a shift, a scale and a gate, made of the noise level for all blocks
    at once, to which the block adds numbers of its own; all zero at first, and the gate is counted from one, so that the
    block begins as the plain one.
    """

    def __init__(self, dim: int, heads: int, mlp_ratio: float, qk_norm: bool, modulated: bool) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.attention = Attention(dim, heads, qk_norm)
        self.up, self.down = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.modulation = nn.Parameter(torch.zeros(6, dim)) if modulated else None

    def forward(self, x: Float[Tensor, "b s D"], shared: Float[Tensor, "b 6 D"] | None) -> Float[Tensor, "b s D"]:
        if self.modulation is None:
            x = x + self.attention(normalise(x))
            return x + self.mlp(normalise(x))
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (shared + self.modulation).unsqueeze(2).unbind(1)
        x = torch.addcmul(x, 1 + gate_a, self.attention(modulate(x, shift_a, scale_a)))
        return torch.addcmul(x, 1 + gate_m, self.mlp(modulate(x, shift_m, scale_m)))

    def mlp(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


def modulate(x: Float[Tensor, "b s D"], shift: Float[Tensor, "b 1 D"], scale: Float[Tensor, "b 1 D"]) -> Tensor:
    """The normalised ``x``, scaled from one and shifted."""
    return torch.addcmul(shift, normalise(x), 1 + scale)


class DiT(nn.Module):
    """Noisy patches to a prediction of the same shape.

    Args:
        numbers: in a patch.
        modulated: adaLN-single in every block and before the last layer.
        checkpointing: run blocks again in the backward pass.
    """

    def __init__(
        self,
        numbers: int,
        dim: int,
        blocks: int,
        heads: int,
        mlp_ratio: float,
        qk_norm: bool,
        modulated: bool,
        checkpointing: bool,
    ) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.embed = nn.Linear(numbers, dim)
        self.level = Level(dim)
        self.blocks = nn.ModuleList(Block(dim, heads, mlp_ratio, qk_norm, modulated) for _ in range(blocks))
        self.final = nn.Linear(dim, numbers)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.final.weight)
        self.shared = self.final_modulation = None
        if modulated:
            self.shared = nn.Linear(dim, 6 * dim)
            nn.init.zeros_(self.shared.weight)
            nn.init.zeros_(self.shared.bias)
            self.final_modulation = nn.Parameter(torch.zeros(2, dim))

    def forward(
        self,
        patches: Float[Tensor, "b s p"],
        level: Float[Tensor, " b"],
        added: Float[Tensor, "b s D"],
        beside: Float[Tensor, "b m D"] | None = None,
    ) -> Float[Tensor, "b s p"]:
        """Args: patches: noisy. level: of the noise. added: to their tokens. beside: tokens that they see too."""
        own = self.embed.weight.dtype  # float32 under autocast: what many blocks add up keeps its digits
        noise_level = self.level(level).to(own)
        x = self.embed(patches.to(own)).to(own) + added.to(own)
        if beside is not None:
            x = torch.cat([x, beside.to(own)], 1)
        x = x + noise_level.unsqueeze(1)
        shared = None if self.shared is None else self.shared(F.silu(noise_level)).unflatten(-1, (6, -1)).to(own)
        for block in self.blocks:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, shared, use_reentrant=False)
            else:
                x = block(x, shared)
        x = x[:, : patches.shape[1]]
        if shared is None:
            return self.final(normalise(x))
        shift, scale = (shared[:, :2] + self.final_modulation).unsqueeze(2).unbind(1)
        return self.final(modulate(x, shift, scale))
