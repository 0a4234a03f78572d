"""The Transformer block of FlashDecoder, functional in its cache (paper section 3.2).

Shapes: b clip, s token of the queries, m token of the keys, N query heads, G key/value groups, d = 64 head dimension,
D = N * d model width.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from decoders.flashdecoder import rope

HEAD_DIM = 64  # in all four sizes (Table 3)
KeyValue = tuple[Tensor, Tensor]  # each "b s G d"; keys normalised but not rotated


class RMSNorm(nn.Module):
    """x / rms(x) * gain over the last axis, in the dtype of ``x`` (autocast would answer in float32)."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.rms_norm(x, self.gain.shape, self.gain.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Grouped-query attention with normalised keys and values, over the cached frames and the current one."""

    def __init__(self, num_heads: int, num_kv_heads: int, q_norm: bool) -> None:
        super().__init__()
        dim = num_heads * HEAD_DIM
        self.splits = (num_heads * HEAD_DIM, num_kv_heads * HEAD_DIM, num_kv_heads * HEAD_DIM)
        self.qkv = nn.Linear(dim, sum(self.splits), bias=False)
        self.q_norm = RMSNorm(HEAD_DIM) if q_norm else nn.Identity()
        self.k_norm = RMSNorm(HEAD_DIM)
        self.v_norm = RMSNorm(HEAD_DIM)
        self.out = nn.Linear(dim, dim, bias=False)

    def project(self, x: Tensor) -> tuple[Tensor, KeyValue]:
        """Queries "b s N d" and this frame's keys and values "b s G d", none of them rotated."""
        q, k, v = (part.unflatten(-1, (-1, HEAD_DIM)) for part in self.qkv(x).split(self.splits, dim=-1))
        return self.q_norm(q), (self.k_norm(k), self.v_norm(v))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Softmax attention of rotated "b s N d" over rotated "b m G d"; every group serves N / G query heads."""
        if mask is None and q.device.type == "cpu":  # a group's heads as more rows: faster there, and nothing is copied
            folded = rearrange(q, "b s (G r) d -> b G (r s) d", G=k.shape[2])
            mixed = F.scaled_dot_product_attention(folded, k.transpose(1, 2), v.transpose(1, 2))
            return self.out(rearrange(mixed, "b G (r s) d -> b s (G r d)", s=q.shape[1]))
        grouped = q.shape[2] != k.shape[2]
        if grouped and (mask is not None or q.dtype == torch.float32):
            # Only flash and cuDNN kernels know groups; a mask or fp32 rules them out, and torch would fall back to one
            # that writes the whole score matrix.
            k, v = (part.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for part in (k, v))
            grouped = False
        heads_first = (part.transpose(1, 2) for part in (q, k, v))
        mixed = F.scaled_dot_product_attention(*heads_first, attn_mask=mask, enable_gqa=grouped)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm attention and SwiGLU, no biases."""

    def __init__(self, num_heads: int, num_kv_heads: int, mlp_ratio: float, q_norm: bool) -> None:
        super().__init__()
        dim = num_heads * HEAD_DIM
        hidden = int(dim * mlp_ratio)
        self.attention_norm = RMSNorm(dim)
        self.attention = Attention(num_heads, num_kv_heads, q_norm)
        self.mlp_norm = RMSNorm(dim)
        self.gate_up = nn.Linear(dim, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def mlp(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)

    def forward(
        self,
        x: Tensor,
        past: tuple[KeyValue, ...],
        query_table: rope.Table,
        key_table: rope.Table,
        last: int | None = None,
    ) -> tuple[Tensor, KeyValue]:
        """One step of the stream: the tokens of the current frame see the frames in ``past`` and one another.

        Args:
            x: "b s D", the current frame's tokens.
            past: keys and values of at most window - 1 earlier frames, oldest first.
            query_table, key_table: rotations of the current frame and of the whole window.
            last: how many of the tokens, from the end, are asked for; None for all. Keys and values are always made.

        Returns:
            The new tokens (the last ``last`` of them), and this frame's own keys and values for later steps. Nothing is changed in place, so a
            checkpointed block can be run again.
        """
        q, new = self.attention.project(self.attention_norm(x))
        keys, values = (torch.cat(parts, dim=1) if past else parts[0] for parts in zip(*past, new, strict=True))
        keys = rope.rotate(keys, rope.last_frames(key_table, keys.shape[1]))
        if last is not None:
            x, q, query_table = x[:, -last:], q[:, -last:], rope.last_frames(query_table, last)
        x = x + self.attention.attend(rope.rotate(q, query_table), keys, values)
        return x + self.mlp(x), new

    def forward_masked(self, x: Tensor, table: rope.Table, mask: Tensor) -> Tensor:
        """All frames at once under ``mask`` "s s" (the paper's ablation; needs memory quadratic in the clip)."""
        q, (k, v) = self.attention.project(self.attention_norm(x))
        x = x + self.attention.attend(rope.rotate(q, table), rope.rotate(k, table), v, mask)
        return x + self.mlp(x)

    def forward_parallel(self, x: Tensor, frames: int, window: int, query_table: rope.Table, key_table: rope.Table):
        """All frames at once without a mask: frames with a full window are folded into the batch.

        The same function as ``frames`` calls of ``forward``: layer by layer instead of frame by frame. It launches
        far fewer kernels on small frames and keeps the activations of the whole clip, so it suits low resolutions.
        """
        q, (k, v) = self.attention.project(self.attention_norm(x))
        q, k, v = (part.unflatten(1, (frames, -1)) for part in (q, k, v))  # "b n s heads d"
        outputs = []
        for last in range(min(window - 1, frames)):  # frames whose window is not yet full
            keys = rope.rotate(k[:, : last + 1].flatten(1, 2), rope.last_frames(key_table, (last + 1) * k.shape[2]))
            out = self.attention.attend(rope.rotate(q[:, last], query_table), keys, v[:, : last + 1].flatten(1, 2))
            outputs.append(out.unsqueeze(1))
        if full := max(0, frames - window + 1):
            folded_q = rope.rotate(q[:, window - 1 :].flatten(0, 1), query_table)
            keys, values = (
                torch.cat([part[:, shift : shift + full] for shift in range(window)], dim=2).flatten(0, 1)
                for part in (k, v)
            )
            out = self.attention.attend(folded_q, rope.rotate(keys, key_table), values)
            outputs.append(out.unflatten(0, (-1, full)))
        x = x + torch.cat(outputs, dim=1).flatten(1, 2)
        return x + self.mlp(x)
