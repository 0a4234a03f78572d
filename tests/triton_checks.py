"""Our Triton kernels by Triton's interpreter, in a process of its own: the switch must be set before triton is imported.
Prints {check: relative error} as JSON; tests/test_triton_kernels.py says what they may be."""

import json
import os

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor
from torch.nn import functional as F

from decoders.flashdecoder import attention_fp8
from decoders.layers import depthwise_triton as depthwise

CASES = {  # b, c, t, h, w; kernel; with past and bias
    "3x3x3": ((1, 20, 2, 5, 7), (3, 3, 3), True),
    "3x3x3 at a start, two clips, blocks of channels and columns": ((2, 70, 1, 1, 17), (3, 3, 3), False),
    "5x5x5": ((1, 18, 1, 3, 5), (5, 5, 5), True),
    "1x1x1": ((1, 16, 2, 3, 5), (1, 1, 1), False),
}


def error(found: Tensor, exact: Tensor) -> float:
    assert found.shape == exact.shape and not found.isnan().any()
    return float((found.double() - exact.double()).norm() / exact.double().norm())


def video(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    b, c, t, h, w = shape
    return torch.randn(b, t, h, w, c).to(dtype).movedim(-1, 1)


def convolutions() -> dict[str, float]:
    found = {}
    for dtype, cases in ((torch.float32, CASES), (torch.bfloat16, {"3x3x3": CASES["3x3x3"]})):
        for name, (shape, size, with_past) in cases.items():
            b, c, t, h, w = shape
            x, packed, gradient = video(shape, dtype), torch.randn(*size, c).to(dtype), video(shape, dtype)
            past = torch.randn(b, c, size[0] - 1, h, w).to(dtype) if with_past else None  # channels not last: copied
            bias = torch.randn(c).to(dtype) if with_past else None
            exact = [None if part is None else part.double() for part in (x, past, packed, bias)]
            reach = (t, 1 - size[0])
            y = depthwise.convolve_triton(x, past, packed, bias, *reach)
            found[f"{name} {dtype}"] = error(y, depthwise.convolve_torch(*exact, *reach))
            y = depthwise.weight_gradient_triton(x, past, gradient, size)
            exact_gradient = depthwise.weight_gradient_torch(*exact[:2], gradient.double(), size)
            found[f"{name} {dtype} weight"] = error(y, exact_gradient)
    return found


def gradients() -> dict[str, float]:
    """Of all four arguments by finite differences in float64, then against torch's on a larger video."""
    torch.manual_seed(1)
    parts = [video((1, 2, 1, 2, 2)), torch.randn(1, 2, 2, 2, 2), torch.randn(2, 1, 3, 3, 3), torch.randn(2)]
    parts = [part.double().requires_grad_() for part in parts]
    passed = torch.autograd.gradcheck(
        lambda *a: depthwise.causal_depthwise3d(*a, kernel="triton"), parts, fast_mode=True
    )
    found = {"gradcheck failed": 0.0 if passed else 1.0}
    parts = [video((1, 17, 2, 2, 4)), video((1, 17, 2, 2, 4)), torch.randn(17, 1, 3, 3, 3), torch.randn(17)]
    for name, given in (("with past", parts), ("at a start", [parts[0], None, *parts[2:]])):
        results = []
        for kernel in ("triton", "torch"):
            leaves = [None if part is None else part.clone().requires_grad_() for part in given]
            depthwise.causal_depthwise3d(*leaves, kernel=kernel).square().sum().backward()
            results.append([part.grad for part in leaves if part is not None])
        pairs = enumerate(zip(*results, strict=True))
        found |= {f"gradient {index} {name}": error(ours, theirs) for index, (ours, theirs) in pairs}
    return found


def streams() -> dict[str, float]:
    """Frames one at a time, with the past of each, are the whole clip."""
    x, weight, bias = video((1, 16, 4, 2, 5)), torch.randn(16, 1, 3, 3, 3), torch.randn(16)
    whole = depthwise.causal_depthwise3d(x, None, weight, bias, "triton")
    padded = F.pad(x, (0, 0, 0, 0, 2, 0))
    parts = [
        depthwise.causal_depthwise3d(x[:, :, t : t + 1], padded[:, :, t : t + 2], weight, bias, "triton")
        for t in range(4)
    ]
    return {"stream": error(torch.cat(parts, 2), whole)}


def attention() -> dict[str, float]:
    found = {}
    b, s, m, heads, groups = 2, 40, 200, 2, 1
    for dtype in (torch.float16, torch.bfloat16):
        q, both = torch.randn(b, s, heads, 64).to(dtype), torch.randn(b, m, 2 * groups, 64).to(dtype)
        k, v = both.split(groups, 2)  # views
        exact = plain_attention(q, k, v)
        found[f"attention {dtype}"] = error(
            attention_fp8.launch(q, k, v, None, (32, 64, 4, 2), interpreted=True), exact
        )
        scales = attention_fp8.Scales.of(q, k, v)
        rounded = attention_fp8.round_keys_values(k, v, scales, interpreted=True)
        expected = [attention_fp8.to_e4m3(p / scale[:, None]) for p, scale in ((k, scales.k), (v, scales.v))]
        found[f"rounded {dtype}"] = max(
            error(part[:, :m].float(), right) for part, right in zip(rounded, expected, strict=True)
        )
        emulated = attention_fp8.emulate_fp8(q.float(), k.float(), v.float(), scales)
        for tile in ((32, 64, 4, 2), (16, 128, 4, 2)):
            y = attention_fp8.launch(q, *rounded, scales, tile, keys=m, interpreted=True)
            found[f"fp8 {dtype} {tile[1]}"] = error(y, emulated)
    return found


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (part.double().transpose(1, 2) for part in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print(json.dumps(convolutions() | gradients() | streams() | attention()))
