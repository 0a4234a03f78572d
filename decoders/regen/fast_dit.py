"""The diffusion Transformer of ``dit.py`` at inference, as functions of tensors: one compiled function serves all blocks.

Shapes are those of ``dit.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from decoders.layers import products
from decoders.regen.dit import EPS, Block, RMSNorm, modulate, normalise


def embed(x: Tensor, weight: Tensor, bias: Tensor, added: Tensor, beside: Tensor | None, level: Tensor) -> Tensor:
    """Tokens of the noisy patches ``x``, told of latents and noise level."""
    tokens = F.linear(x.to(weight.dtype), weight, bias) + added.to(weight.dtype)
    if beside is not None:
        tokens = torch.cat([tokens, beside.to(weight.dtype)], 1)
    return tokens + level


def block(x: Tensor, weights: Block, shared: Tensor | None) -> Tensor:
    """``Block.forward``."""
    if weights.modulation is None:
        x = attention(normalise(x), weights, residual=x)
        return x + mlp(normalise(x), weights)
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (shared + weights.modulation).unsqueeze(2).unbind(1)
    x = torch.addcmul(x, 1 + gate_a, attention(modulate(x, shift_a, scale_a), weights))
    return torch.addcmul(x, 1 + gate_m, mlp(modulate(x, shift_m, scale_m), weights))


def mlp(x: Tensor, weights: Block) -> Tensor:
    """``Block.mlp``."""
    return products.mlp(weights.up, weights.down, x, activation="gelu")


def attention(x: Tensor, weights: Block, residual: Tensor | None = None) -> Tensor:
    """``Attention.forward``, with norms of two passes less, and the residual."""
    own = weights.attention
    q, k, v = products.linear(own.qkv, x).unflatten(-1, (3, own.heads, -1)).unbind(2)
    q, k, v = (part.transpose(1, 2) for part in (_normed(q, own.q_norm), _normed(k, own.k_norm), v))
    mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    return products.linear(own.out, mixed, residual=residual)


def _normed(x: Tensor, norm: torch.nn.Module) -> Tensor:
    """RMSNorm over a head, in float32 at least, rounded once."""
    if not isinstance(norm, RMSNorm):
        return x
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square().div(x.shape[-1]).add(EPS).rsqrt()
    return (wide * scale).mul(norm.gain.to(wide.dtype)).to(x.dtype)


def last(
    tokens: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    modulation: Tensor | None,
    shared: Tensor | None,
    of_noisy: float,
    of_network: float,
) -> Tensor:
    """The network's answer in patches, mixed with the noisy patches ``x``; float32."""
    tokens = tokens[:, : x.shape[1]]
    if shared is None or modulation is None:
        normed = normalise(tokens)
    else:
        shift, scale = (shared[:, :2] + modulation).unsqueeze(2).unbind(1)
        normed = modulate(tokens, shift, scale)
    answer = F.linear(normed, weight, bias).to(x.dtype)
    if of_noisy == 0:
        return answer if of_network == 1 else answer * of_network
    return torch.add(answer * of_network, x, alpha=of_noisy)
