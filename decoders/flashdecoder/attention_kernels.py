"""Triton kernels of :mod:`decoders.flashdecoder.attention_fp8`; importing this needs triton, launching it a GPU or its
interpreter. Online softmax as in FlashAttention (arXiv 2205.14135, 2307.08691): one pass over the keys, no score matrix."""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def _to_e4m3(x):
    """Float32 rounded to the nearest E4M3 number (ties to even), at most 448, still as float32: for the interpreter, whose own
    conversion loses the carry into the exponent (124 becomes 64)."""
    x = tl.minimum(tl.maximum(x, -448.0), 448.0)
    bits = x.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & ~0xFFFFF).to(tl.float32, bitcast=True)
    coarse = (x + 24576.0) - 24576.0  # 1.5 * 2^14: a float32's last bit there is 2^-9, E4M3's smallest step
    return tl.where(tl.abs(x) < 0.015625, coarse, normal)


@triton.jit
@no_type_check
def _cast(x, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """Float32 to an operand's type; E4M3 saturates at 448, as the hardware's conversion does."""
    if dtype == tl.float8e4nv:
        x = _to_e4m3(x) if INTERPRETED else x
    return x.to(dtype)


@triton.jit
@no_type_check
def _dot(a, b, sums, IMPRECISE: tl.constexpr, INTERPRETED: tl.constexpr):
    if INTERPRETED:  # it multiplies bfloat16's bits as integers
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sums, input_precision="ieee")
    return tl.dot(a, b, sums, max_num_imprecise_acc=IMPRECISE)


@triton.jit
@no_type_check
def attend(
    q, k, v, out, q_scale, k_scale, v_scale, softmax_scale,
    queries, keys, group,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, v_d, out_b, out_s, out_h,
    FP8: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """``BLOCK_M`` queries of one head against all keys of its group. FP8: ``k`` and ``v`` are E4M3 (``v`` with keys side by side,
    zeros up to a multiple of BLOCK_N), ``q`` is rounded here; probabilities are rounded to E4M3 as 2^8 of themselves, relative to
    a power of two that no score exceeds: then every rescaling is exact, whatever the order of the keys."""
    kind: tl.constexpr = tl.float8e4nv if FP8 else v.dtype.element_ty
    imprecise: tl.constexpr = BLOCK_N if FP8 else None  # Hopper's FP8 sums have 14 bits: into float32 after each tile
    head, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns, d = tl.arange(0, BLOCK_N), tl.arange(0, D)
    here = (rows < queries)[:, None]
    tile_q = tl.load(q + b * q_b + head * q_h + rows[:, None].to(tl.int64) * q_s + d[None, :], mask=here, other=0.0)
    factor = softmax_scale * 1.4426950408889634  # powers of two from here on
    if FP8:
        scale = tl.load(q_scale + head)
        tile_q = _cast(tile_q.to(tl.float32) / scale, kind, INTERPRETED)
        factor = factor * scale * tl.load(k_scale + head // group)
    at_k = k + b * k_b + (head // group) * k_h + columns[None, :] * k_s + d[:, None]
    at_v = v + b * v_b + (head // group) * v_h + columns[:, None] * v_s + d[None, :] * v_d
    highest = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    mixed = tl.zeros((BLOCK_M, D), tl.float32)
    whole = keys // BLOCK_N * BLOCK_N
    for _ in range(0, whole, BLOCK_N):
        scores = _dot(tile_q, tl.load(at_k), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), None, INTERPRETED)
        found = tl.max(scores, 1) * factor
        above = tl.maximum(highest, tl.ceil(found) if FP8 else found)
        shift = above - 8.0 if FP8 else above
        p = tl.exp2(tl.fma(scores, factor, -shift[:, None]))
        back = tl.exp2(highest - above)
        total = total * back + tl.sum(p, 1)
        mixed = _dot(_cast(p, kind, INTERPRETED), tl.load(at_v), mixed * back[:, None], imprecise, INTERPRETED)
        highest = above
        at_k += BLOCK_N * k_s
        at_v += BLOCK_N * v_s
    if whole < keys:
        known = whole + columns < keys
        tile_k = tl.load(at_k, mask=known[None, :], other=0.0)
        scores = _dot(tile_q, tile_k, tl.zeros((BLOCK_M, BLOCK_N), tl.float32), None, INTERPRETED) * factor
        scores = tl.where(known[None, :], scores, -float("inf"))
        found = tl.max(scores, 1)
        above = tl.maximum(highest, tl.ceil(found) if FP8 else found)
        shift = above - 8.0 if FP8 else above
        p = tl.exp2(scores - shift[:, None])
        back = tl.exp2(highest - above)
        total = total * back + tl.sum(p, 1)
        tile_v = tl.load(at_v) if FP8 else tl.load(at_v, mask=known[:, None], other=0.0)
        mixed = _dot(_cast(p, kind, INTERPRETED), tile_v, mixed * back[:, None], imprecise, INTERPRETED)
    mixed = mixed / total[:, None]
    if FP8:
        mixed = mixed * tl.load(v_scale + head // group)
    place = out + b * out_b + head * out_h + rows[:, None].to(tl.int64) * out_s + d[None, :]
    tl.store(place, mixed.to(out.dtype.element_ty), mask=here)


@triton.jit
@no_type_check
def round_keys_values(
    k, v, rounded_k, rounded_v, k_scale, v_scale,
    keys, padded, groups, k_b, k_s, k_h, v_b, v_s, v_h,
    BLOCK_N: tl.constexpr, D: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Keys to E4M3 "b G m d" and values to E4M3 "b G d padded", zeros from ``keys`` on: products of 8 bits want the axis
    that they sum over side by side in memory."""
    g, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    m, d = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, D)
    known = (m < keys)[:, None]
    tile = tl.load(k + b * k_b + g * k_h + m[:, None] * k_s + d[None, :], mask=known, other=0.0).to(tl.float32)
    tile = _cast(tile / tl.load(k_scale + g), tl.float8e4nv, INTERPRETED)
    tl.store(rounded_k + ((b * groups + g) * keys + m[:, None]) * D + d[None, :], tile, mask=known)
    tile = tl.load(v + b * v_b + g * v_h + m[:, None] * v_s + d[None, :], mask=known, other=0.0).to(tl.float32)
    tile = tl.trans(_cast(tile / tl.load(v_scale + g), tl.float8e4nv, INTERPRETED))
    tl.store(rounded_v + ((b * groups + g) * D + d[:, None]) * padded + m[None, :], tile, mask=(m < padded)[None, :])
