"""Triton kernels where they belong: against torch in float64, streams, graphs, compile, and how fast they are. Skipped without CUDA."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from decoders.flash_vaed.model import FlashVaedConfig, build_student
from decoders.flashdecoder import attention_fp8
from decoders.inference import InferenceOptions, optimise
from decoders.layers import depthwise_triton as depthwise

pytestmark = pytest.mark.gpu
# b, c, t, h, w: the student of Wan 2.1 at 480p, stage by stage in a stream, a clip, and sizes that no block divides
SHAPES = [(1, 384, 1, 60, 104), (1, 384, 2, 120, 208), (2, 192, 5, 33, 47), (1, 70, 3, 7, 9)]
# queries, keys: a step of the backbone and of refinement at 256 x 256, and lengths that no tile divides
LENGTHS = [(256, 512), (1024, 2048), (77, 301)]


def error(found: Tensor, exact: Tensor) -> float:
    assert found.shape == exact.shape and found.isfinite().all()
    return float((found.double() - exact).norm() / exact.norm())


def video(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    b, c, t, h, w = shape
    return torch.randn(b, t, h, w, c, device="cuda").to(dtype).movedim(-1, 1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [3, 5])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 5e-3), (torch.float16, 1e-3), (torch.float32, 2e-6)])
def test_convolution_and_gradients(shape: tuple, size: int, dtype: torch.dtype, bound: float) -> None:
    b, c, _, h, w = shape
    parts = [
        video(shape, dtype),
        video((b, c, size - 1, h, w), dtype),
        torch.randn(c, 1, size, size, size).cuda().to(dtype),
    ]
    parts.append(torch.randn(c, device="cuda").to(dtype))
    results = []
    for kernel, precise in (("triton", dtype), ("torch", torch.float64)):
        leaves = [part.to(precise).requires_grad_() for part in parts]
        y = depthwise.causal_depthwise3d(*leaves, kernel=kernel)
        (y * torch.linspace(-1, 1, y.numel(), device="cuda").view(y.shape).to(precise)).sum().backward()
        results.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for ours, exact in zip(*results, strict=True):
        assert error(ours, exact) < bound


@pytest.mark.parametrize("kernel", ["triton", "auto"])
def test_convolution_compiles_and_is_captured(kernel: str) -> None:
    x, past, weight = (
        video(SHAPES[0], torch.bfloat16),
        video((1, 384, 2, 60, 104), torch.bfloat16),
        torch.randn(384, 1, 3, 3, 3),
    )
    weight = weight.cuda().bfloat16()
    run = partial(depthwise.causal_depthwise3d, kernel=kernel)
    expected = run(x, past, weight)
    compiled = torch.compile(run, fullgraph=True)
    torch.testing.assert_close(compiled(x, past, weight), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(x, past, weight)
    x.copy_(video(SHAPES[0], torch.bfloat16))
    graph.replay()
    torch.testing.assert_close(y, run(x, past, weight))


def tokens(s: int, m: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    both = torch.randn(2, m, 6, 64, device="cuda").to(dtype)
    return torch.randn(2, s, 24, 64, device="cuda").to(dtype), both[:, :, :3], both[:, :, 3:]


def exact_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (part.repeat_interleave(q.shape[2] // k.shape[2], 2) for part in (k, v))
    return F.scaled_dot_product_attention(*(p.double().transpose(1, 2) for p in (q, k, v))).transpose(1, 2)


@pytest.mark.parametrize(("s", "m"), LENGTHS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_attention(s: int, m: int, dtype: torch.dtype, bound: float) -> None:
    q, k, v = tokens(s, m, dtype)
    exact = exact_attention(q, k, v)
    assert error(attention_fp8.attend_triton(q, k, v), exact) < bound
    for tile in attention_fp8.TILES[False]:
        assert error(attention_fp8.launch(q, k, v, None, tile), exact) < bound


@pytest.mark.parametrize(("s", "m"), LENGTHS)
def test_fp8_attention_is_its_emulation(s: int, m: int) -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no FP8 products on this GPU")
    q, k, v = tokens(s, m)
    scales = attention_fp8.Scales.of(q, k, v)
    emulated = attention_fp8.emulate_fp8(q.float(), k.float(), v.float(), scales)
    rounded = attention_fp8.round_keys_values(k, v, scales)
    found = [attention_fp8.launch(q, *rounded, scales, tile, keys=m) for tile in attention_fp8.TILES[True]]
    for y in (*found, attention_fp8.attend_triton_fp8(q, k, v), attention_fp8.attend_triton_fp8(q, k, v, scales)):
        assert error(y, emulated.double()) < 1e-2  # bf16 outputs, sums of 14 bits within a tile
    assert 0.03 < error(found[0], exact_attention(q, k, v)) < 0.08


def test_a_student_in_a_stream() -> None:
    student = build_student(FlashVaedConfig(), 16, 4, 8).cuda().eval()
    latent = torch.randn(1, 16, 6, 20, 30, device="cuda")
    exact = student.double().decode(latent)
    plain, fast = student.bfloat16().decode(latent), optimise(student.bfloat16(), InferenceOptions()).decode(latent)
    assert error(fast, exact) < 1.2 * error(plain, exact)


def test_times() -> None:
    """Printed (-s): the kernel beside torch's, and bytes a second at one read and one write."""
    from triton.testing import do_bench

    for shape in SHAPES[:3]:
        b, c, t, h, w = shape
        x, past, weight = (
            video(shape, torch.bfloat16),
            video((b, c, 2, h, w), torch.bfloat16),
            torch.randn(c, 1, 3, 3, 3),
        )
        weight = weight.cuda().bfloat16()
        times = {
            kernel: do_bench(
                partial(depthwise.causal_depthwise3d, x, past, weight, kernel=kernel), return_mode="median"
            )
            for kernel in ("triton", "torch")
        }
        rate = (2 * x.numel() + past.numel()) * 2 / times["triton"] / 1e9
        print(f"depthwise {shape}: {times['triton']:.3f} ms, torch {times['torch']:.3f} ms, {rate:.2f} TB/s")
    for s, m in ((3600, 7200), (14400, 28800)):  # 720p, backbone and refinement
        q, k, v = (part[:1] for part in tokens(s, m))
        scales = attention_fp8.Scales.of(q, k, v)
        ways = {"triton": attention_fp8.attend_triton, "fp8": partial(attention_fp8.attend_triton_fp8, scales=scales)}
        for name, way in ways.items():
            time = do_bench(partial(way, q, k, v), return_mode="median")
            assert time > 0
            print(f"attention {name} {s} x {m}: {time:.3f} ms, {4 * s * m * 24 * 64 / time / 1e9:.0f} TFLOP/s")
