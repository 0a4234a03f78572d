"""Attention of head dimension 64 by Triton: grouped heads, no mask, as many keys as one likes; bf16 or fp16, and FP8.

In FP8 both products of attention are of E4M3 numbers: queries, keys and values rounded with one scale a head, probabilities
with 2^8. Softmax and sums are float32. It is lossy, and only taken by name. On random tokens (1,024 queries of rms 0.3, 1 and 3,
2,048 keys and values of rms 1) its error is 4.1, 5.6 and 9.5 % of the output's rms, where bf16 has 0.2 %: 2.6 of it from the
values, 2.9 from the probabilities, 1.2, 4.1 and 8.7 from queries and keys. What a trained model loses :func:`emulate_fp8`
says, the same arithmetic on any device.

A score costs 256 operations (two products of width 64) and one exponential. Hopper's multiprocessors do 4,096 bf16
operations a clock and 16 exponentials: both take equally long in bf16, and in FP8 exponentials take twice the products' time. So
FP8 can at most halve the products' share; it cannot make attention of head dimension 64 twice as fast.
"""

from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from decoders.layers.depthwise_triton import has_triton
from decoders.layers.measured import fastest, kind

HEAD_DIM = 64
LARGEST = 448.0  # of E4M3
PADDING = 128  # values are stored up to a multiple of it, with zeros
SHIFT = 8  # probabilities are rounded as 2^8 of themselves
# (queries, keys, warps, stages) of a program, the likelier first; the faster is measured once a shape. By the compiler for
# sm_90: 183, 235, 244 and 128 to 255 registers, nothing spilled, 82, 66, 41 and 21 KB of shared memory.
TILES = {False: ((128, 128, 8, 2), (128, 64, 4, 3)), True: ((128, 128, 8, 3), (64, 64, 4, 3))}

Queries = Float[Tensor, "b s heads 64"]
Keys = Float[Tensor, "b m groups 64"]


@dataclass(frozen=True)
class Scales:
    """What E4M3 numbers are multiplied with, one float32 a head or group: static ones come from calibration."""

    q: Float[Tensor, " heads"]
    k: Float[Tensor, " groups"]
    v: Float[Tensor, " groups"]

    @classmethod
    def of(cls, q: Queries, k: Keys, v: Keys) -> "Scales":
        """Those with which the largest number of each head becomes 448. No synchronisation with the device."""
        return cls(*(part.detach().abs().amax((0, 1, 3)).float().clamp_min(1e-12) / LARGEST for part in (q, k, v)))

    def merge(self, other: "Scales") -> "Scales":
        """Those that both are covered by: of several calibration clips."""
        pairs = ((self.q, other.q), (self.k, other.k), (self.v, other.v))
        return Scales(*(torch.maximum(mine, theirs) for mine, theirs in pairs))


def refused(q: Tensor, k: Tensor, v: Tensor, fp8: bool = False) -> str:
    """Why the kernels cannot run on these; empty if they can."""
    if not q.is_cuda or not has_triton():
        return "needs a CUDA device" if not q.is_cuda else "needs the package triton"
    if q.dtype not in (torch.bfloat16, torch.float16) or k.dtype != q.dtype or v.dtype != q.dtype:
        return f"takes bfloat16 or float16, all the same, and not {q.dtype}, {k.dtype} and {v.dtype}"
    if fp8 and torch.cuda.get_device_capability(q.device) < (8, 9):
        return "FP8 products need a GPU of compute capability 8.9 or more"
    return _misfit(q, k, v)


def _misfit(q: Tensor, k: Tensor, v: Tensor) -> str:
    if q.shape[-1] != HEAD_DIM or k.shape != v.shape or q.shape[0] != k.shape[0] or k.shape[-1] != HEAD_DIM:
        return f"takes (b, s, heads, 64) and twice (b, m, groups, 64), not {[tuple(p.shape) for p in (q, k, v)]}"
    if not k.shape[1] or q.shape[2] % k.shape[2]:
        return f"{q.shape[2]} heads do not share {k.shape[2]} groups of {k.shape[1]} keys evenly"
    return "" if all(p.stride(-1) == 1 for p in (q, k, v)) else "needs numbers of a head side by side in memory"


def attend_triton(q: Queries, k: Keys, v: Keys) -> Queries:
    """softmax(q k^T / 8) v in the type of ``q``. Raises ValueError where :func:`refused` says why not."""
    if reason := refused(q, k, v):
        raise ValueError(f"attention 'triton' {reason}")
    return torch.ops.video_decoders.attend_bf16(q, k, v)


def attend_triton_fp8(q: Queries, k: Keys, v: Keys, scales: Scales | None = None) -> Queries:
    """The same with products in E4M3. ``scales``: None for those of these very tensors, one more pass over them.

    Numbers beyond 448 times their scale are cut off there. Raises ValueError where :func:`refused` says why not.
    """
    if reason := refused(q, k, v, fp8=True):
        raise ValueError(f"attention 'triton_fp8' {reason}")
    scales = scales or Scales.of(q, k, v)
    return torch.ops.video_decoders.attend_fp8(q, k, v, scales.q, scales.k, scales.v)


@torch.library.custom_op("video_decoders::attend_bf16", mutates_args=())
def attend_bf16(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Opaque to torch.compile: no graph break, and can be captured."""
    ways = [partial(launch, q, k, v, None, tile) for tile in TILES[False]]
    return fastest(("attend", *kind(q, k, v)), ways)()


@torch.library.custom_op("video_decoders::attend_fp8", mutates_args=())
def attend_fp8(q: Tensor, k: Tensor, v: Tensor, q_scale: Tensor, k_scale: Tensor, v_scale: Tensor) -> Tensor:
    scales = Scales(q_scale, k_scale, v_scale)
    rounded = round_keys_values(k, v, scales)
    ways = [partial(launch, q, *rounded, scales, tile, keys=k.shape[1]) for tile in TILES[True]]
    return fastest(("attend", *kind(q, *rounded)), ways)()


@attend_bf16.register_fake
def _(q, k, v):
    return q.new_empty(q.shape)


@attend_fp8.register_fake
def _(q, k, v, q_scale, k_scale, v_scale):
    return q.new_empty(q.shape)


def round_keys_values(k: Tensor, v: Tensor, scales: Scales, interpreted: bool = False) -> tuple[Tensor, Tensor]:
    """Keys "b m G d" and values "b m G d" (a view of "b G d m", padded with zeros behind what is seen) in E4M3."""
    from decoders.flashdecoder import attention_kernels

    (b, m, groups, d), padded = k.shape, -(-k.shape[1] // PADDING) * PADDING
    rounded_k = k.new_empty(b, groups, m, d, dtype=torch.float8_e4m3fn)
    rounded_v = k.new_empty(b, groups, d, padded, dtype=torch.float8_e4m3fn)
    attention_kernels.round_keys_values[(padded // PADDING, groups, b)](
        k, v, rounded_k, rounded_v, scales.k, scales.v, m, padded, groups, *k.stride()[:3], *v.stride()[:3],
        BLOCK_N=PADDING, D=d, INTERPRETED=interpreted, num_warps=4,
    )  # fmt: skip
    return rounded_k.transpose(1, 2), rounded_v.permute(0, 3, 1, 2)


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scales: Scales | None,
    tile: tuple[int, int, int, int],
    keys: int | None = None,
    interpreted: bool = False,
) -> Tensor:
    """One launch of :func:`decoders.flashdecoder.attention_kernels.attend`; with ``scales``, ``k`` and ``v`` as from
    :func:`round_keys_values`, of ``keys`` keys. ``interpreted``: by Triton's interpreter, on a CPU."""
    from decoders.flashdecoder import attention_kernels

    (b, s, heads, d), out = q.shape, torch.empty_like(q, memory_format=torch.contiguous_format)
    block_m, block_n, warps, stages = tile
    q_scale, k_scale, v_scale = (q, q, q) if scales is None else (scales.q, scales.k, scales.v)  # not read without
    attention_kernels.attend[(-(-s // block_m), heads, b)](
        q, k, v, out, q_scale, k_scale, v_scale, HEAD_DIM**-0.5,
        s, k.shape[1] if keys is None else keys, heads // k.shape[2],
        *q.stride()[:3], *k.stride()[:3], *v.stride(), *out.stride()[:3],
        FP8=scales is not None, BLOCK_M=block_m, BLOCK_N=block_n, D=d, INTERPRETED=interpreted,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


# ---- the same arithmetic in torch


def to_e4m3(x: Tensor) -> Tensor:
    """Rounded to E4M3, at most 448, as float32 again."""
    return x.float().clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).float()


def emulate_fp8(q: Queries, k: Keys, v: Keys, scales: Scales | None = None) -> Queries:
    """What :func:`attend_triton_fp8` computes, up to the order of float32 sums, on any device. Writes the whole score matrix."""
    if reason := _misfit(q, k, v):
        raise ValueError(f"attention 'triton_fp8' {reason}")
    scales = scales or Scales.of(q, k, v)
    repeat = q.shape[2] // k.shape[2]
    q8, k8, v8 = (
        to_e4m3(part.float() / scale[:, None])
        for part, scale in ((q, scales.q), (k, scales.k), (v, scales.v))
    )  # fmt: skip
    k8, v8 = (part.repeat_interleave(repeat, 2) for part in (k8, v8))
    factor = scales.q * scales.k.repeat_interleave(repeat) * (HEAD_DIM**-0.5 / torch.log(torch.tensor(2.0)).item())
    scores = torch.einsum("bshd,bmhd->bhsm", q8, k8) * factor[:, None, None]
    p = torch.exp2(scores - scores.amax(-1, keepdim=True).ceil() + SHIFT)
    mixed = torch.einsum("bhsm,bmhd->bshd", to_e4m3(p), v8) / p.sum(-1).transpose(1, 2).unsqueeze(-1)
    return (mixed * scales.v.repeat_interleave(repeat)[:, None]).to(q.dtype)
