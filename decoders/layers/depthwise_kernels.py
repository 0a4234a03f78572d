"""Triton kernels of :mod:`decoders.layers.depthwise_triton`; importing this needs triton, launching it a GPU or its interpreter.

Videos lie channels last, "b t h w c" in memory. A program has ``LANES`` x ``PIXELS`` pixels of a row and ``BLOCK_C`` channels
and walks down ``rows`` rows. A thread has 16 bytes of channels of ``PIXELS`` neighbours: what it loads serves all columns and
all rows of taps, so a 3x3x3 kernel with 4 pixels loads 4.5 values an output, not 27. Sums are float32 (float64 of float64).
"""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def convolve(
    x, past, weight, bias, out,
    frames_in, frames_out, height, width, channels, shift, rows, row_blocks,
    x_b, x_t, x_h, x_w, past_b, past_t, past_h, past_w,
    KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    HAS_PAST: tl.constexpr, HAS_BIAS: tl.constexpr, DOUBLE: tl.constexpr,
    LANES: tl.constexpr, PIXELS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out[t, h, w, c] = bias[c] + sum over taps of in[t + a + shift, h + i - KH//2, w + j - KW//2, c] * weight[a, i, j, c].

    ``in`` is ``x`` at 0 <= t < frames_in, ``past`` (KT - 1 frames) before it, zero elsewhere.
    """
    accumulator: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    channel_blocks, column_blocks = tl.cdiv(channels, BLOCK_C), tl.cdiv(width, LANES * PIXELS)
    index = tl.program_id(0)
    c = (index % channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    index = index // channel_blocks
    w = ((index % column_blocks) * LANES + tl.arange(0, LANES)[:, None]) * PIXELS
    index = index // column_blocks
    top = (index % row_blocks) * rows
    index = index // row_blocks
    t = index % frames_out
    b = (index // frames_out).to(tl.int64)
    inside = c < channels
    # A tile of weights has a row for each lane, all the same: loaded as one row it would go through shared memory.
    tap_at, tap_mask = weight + c + tl.zeros((LANES, 1), tl.int32), inside & (w >= 0)
    start = tl.zeros((LANES, BLOCK_C), accumulator)
    if HAS_BIAS:
        start += tl.load(bias + c + tl.zeros((LANES, 1), tl.int32), mask=tap_mask, other=0).to(accumulator)
    # sums[i * PIXELS + p]: pixel p of the output row that meets the current input row at the kernel's row i.
    sums = (start,) * (KH * PIXELS)
    bottom = tl.minimum(top + rows, height)
    for row in range(top - KH // 2, bottom + KH // 2):
        for a in range(KT):  # not unrolled: three frames of addresses and weights at once do not fit the registers
            at = t + a + shift
            source = x + b * x_b + at.to(tl.int64) * x_t + row * x_h
            known = (row >= 0) & (row < height) & (at < frames_in)
            step = x_w
            if HAS_PAST:
                if at < 0:
                    source = past + b * past_b + (at + KT - 1).to(tl.int64) * past_t + row * past_h
                    step = past_w
            else:
                known = known & (at >= 0)
            if known:
                values = ()
                for j in tl.static_range(PIXELS + KW - 1):
                    column = w + j - KW // 2
                    mask = (column >= 0) & (column < width) & inside
                    values = values + (tl.load(source + column * step + c, mask=mask, other=0).to(accumulator),)
                added = ()
                for i in tl.static_range(KH):
                    row_sums = ()
                    for p in tl.static_range(PIXELS):
                        row_sums = row_sums + (sums[i * PIXELS + p],)
                    for j in tl.static_range(KW):
                        tap = tl.load(tap_at + ((a * KH + i) * KW + j) * channels, mask=tap_mask, other=0)
                        tap = tap.to(accumulator)
                        products = ()
                        for p in tl.static_range(PIXELS):
                            products = products + (row_sums[p] + values[p + j] * tap,)
                        row_sums = products
                    added = added + row_sums
                sums = added
        done = row - KH // 2
        if done >= top:
            place = out + ((b * frames_out + t) * height + done) * width * channels + c
            for p in tl.static_range(PIXELS):
                value = sums[(KH - 1) * PIXELS + p].to(out.dtype.element_ty)
                tl.store(place + (w + p) * channels, value, mask=(w + p < width) & inside)
        moved = (start,) * PIXELS
        for i in tl.static_range((KH - 1) * PIXELS):
            moved = moved + (sums[i],)
        sums = moved


@triton.jit
@no_type_check
def weight_gradient(
    x, past, gradient, partial,
    frames_in, height, width, channels, rows, row_blocks,
    x_b, x_t, x_h, x_w, past_b, past_t, past_h, past_w, g_b, g_t, g_h, g_w,
    KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, HAS_PAST: tl.constexpr, DOUBLE: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """partial[chunk, a, i, j, c]: the sum over one clip's frame and ``rows`` of its rows of gradient x input. A program has one
    row (a, i) of taps; chunks are added up afterwards, in a fixed order."""
    accumulator: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    chunk, group = tl.program_id(0), tl.program_id(1)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < channels
    a, i = group // KH, group % KH
    top = (chunk % row_blocks) * rows
    t = (chunk // row_blocks) % frames_in
    b = (chunk // row_blocks // frames_in).to(tl.int64)
    at = t + a - (KT - 1)
    source, step_h, step_w = x + b * x_b + at.to(tl.int64) * x_t, x_h, x_w
    known = at >= 0
    if HAS_PAST:  # noqa: SIM102 (known when the kernel is compiled; what is below is not)
        if at < 0:
            source, step_h, step_w = past + b * past_b + (at + KT - 1).to(tl.int64) * past_t, past_h, past_w
            known = True
    sums = (tl.zeros((BLOCK_W, BLOCK_C), accumulator),) * KW
    if known:
        for row in range(top, tl.minimum(top + rows, height)):
            above = row + i - KH // 2
            if (above >= 0) & (above < height):
                for left in range(0, width, BLOCK_W):
                    w = left + tl.arange(0, BLOCK_W)
                    mask = (w < width)[:, None] & inside[None, :]
                    place = gradient + b * g_b + t.to(tl.int64) * g_t + row * g_h + w[:, None] * g_w + c[None, :]
                    of = tl.load(place, mask=mask, other=0).to(accumulator)
                    added = ()
                    for j in tl.static_range(KW):
                        column = w + j - KW // 2
                        mask = ((column >= 0) & (column < width))[:, None] & inside[None, :]
                        place = source + above * step_h + column[:, None] * step_w + c[None, :]
                        added = added + (sums[j] + of * tl.load(place, mask=mask, other=0).to(accumulator),)
                    sums = added
    for j in tl.static_range(KW):
        place = partial + ((chunk.to(tl.int64) * KT * KH + group) * KW + j) * channels + c
        tl.store(place, tl.sum(sums[j], 0), mask=inside)
