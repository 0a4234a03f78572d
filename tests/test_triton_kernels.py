"""Triton kernels without a GPU: their results by Triton's interpreter, and their compilation for sm_90 by its own assembler.
On a GPU: test_triton_kernels_gpu.py."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from torch.nn import functional as F

from decoders.backbones.ltx import LTXConfig
from decoders.flash_vaed.fast import DepthwiseCausal3d, DepthwiseEdge3d, use_depthwise_kernels, with_depthwise_kernels
from decoders.flash_vaed.ltx_student import LTXStudent
from decoders.flash_vaed.model import FlashVaedConfig, build_student
from decoders.flashdecoder import attention_fp8
from decoders.inference import InferenceOptions, optimise
from decoders.layers import depthwise_triton
from decoders.layers.causal_conv import CausalConv3d

ROOT = Path(__file__).parent.parent
triton = pytest.importorskip("triton", reason="comes with torch for CUDA")
TINY = FlashVaedConfig(layout="wan21", dim=8)


# ---- by the interpreter


@pytest.fixture(scope="module")
def errors() -> dict[str, float]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests" / "triton_checks.py")]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    if "only 0-dimensional arrays can be converted" in run.stderr:
        pytest.skip(f"the interpreter of triton {triton.__version__} does not run with numpy {numpy.__version__}")
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def beyond(errors: dict[str, float], pattern: str, bound: float) -> dict[str, float]:
    chosen = {name: value for name, value in errors.items() if re.search(pattern, name)}
    assert chosen, f"no check is called {pattern}"
    return {name: value for name, value in chosen.items() if not value <= bound}


def test_convolution_and_its_weight_gradient_are_torchs(errors: dict[str, float]) -> None:
    assert not beyond(errors, "^[135]x.*float32", 1e-6)
    assert not beyond(errors, "^[135]x.*bfloat16", 5e-3)  # the output's rounding, 2^-9


def test_gradients_of_all_arguments(errors: dict[str, float]) -> None:
    assert not beyond(errors, "^gradcheck", 0)
    assert not beyond(errors, "^gradient", 1e-6)


def test_frame_by_frame_is_the_whole_clip(errors: dict[str, float]) -> None:
    assert not beyond(errors, "^stream", 0)


def test_attention_is_plain_attention(errors: dict[str, float]) -> None:
    assert not beyond(errors, "^attention torch.float16", 1e-3)
    assert not beyond(errors, "^attention torch.bfloat16", 1e-2)


def test_fp8_attention_is_its_emulation_whatever_the_tiles(errors: dict[str, float]) -> None:
    assert not beyond(errors, "^rounded", 0)
    assert not beyond(errors, "^fp8 torch.float16", 1e-3)  # the output's rounding, 2^-11
    assert not beyond(errors, "^fp8 torch.bfloat16", 1e-2)


# ---- compiled


def compiled(kernel, types: dict[str, str], constants: dict, sixteens: str, **options) -> tuple[dict[str, int], str]:
    """What a kernel takes of an H100 (REG, STACK, ...), and its machine code."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names, wide = kernel.arg_names, sixteens.split()
    divisible = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if types.get(name, "")[:1] == "*" or name in wide
    }
    fixed = {(names.index(name),): value for name, value in constants.items()}
    signature = {name: types.get(name, "constexpr") for name in names}
    source = ASTSource(kernel, signature, constexprs=fixed, attrs=divisible)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.is_file():
        pytest.skip("this triton has no cuobjdump")
    cubin = Path(os.environ["TRITON_CACHE_DIR"]) / "kernel.cubin"
    cubin.write_bytes(made.asm["cubin"])
    usage, code = (subprocess.check_output([tool, option, cubin], text=True) for option in ("-res-usage", "-sass"))
    return {name: int(number) for name, number in re.findall(r"([A-Z]+):(\d+)", usage)}, code


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not (Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas").is_file():
        pytest.skip("this triton has no ptxas")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


SLOW = pytest.mark.slow
CONVOLUTIONS = [
    pytest.param(torch.bfloat16, (3, 3, 3), id="bf16"),
    pytest.param(torch.bfloat16, (5, 5, 5), id="bf16-5", marks=SLOW),
    pytest.param(torch.float32, (3, 3, 3), id="fp32", marks=SLOW),
    pytest.param(torch.float16, (1, 1, 1), id="fp16-1", marks=SLOW),
]
STRIDES = "x_b x_t x_h x_w past_b past_t past_h past_w"


@pytest.mark.parametrize(("dtype", "size"), CONVOLUTIONS)
def test_convolution_compiles_without_spills_and_loads_16_bytes(cache: None, dtype: torch.dtype, size: tuple) -> None:
    from decoders.layers import depthwise_kernels

    kind = "*" + {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
    cut = depthwise_triton.plan((1, 384, 2, 120, 208), size[1], dtype.itemsize)
    types = dict.fromkeys(["x", "past", "weight", "bias", "out"], kind)
    types |= dict.fromkeys(f"frames_in frames_out height width channels shift rows row_blocks {STRIDES}".split(), "i32")
    fixed = dict(KT=size[0], KH=size[1], KW=size[2], HAS_PAST=True, HAS_BIAS=True, DOUBLE=False)
    fixed |= dict(LANES=cut.lanes, PIXELS=cut.pixels, BLOCK_C=cut.block_c)
    used, code = compiled(depthwise_kernels.convolve, types, fixed, f"channels {STRIDES}", num_warps=cut.warps)
    assert used["REG"] <= 255 and used["STACK"] == 0, used
    assert "LDG.E.128" in code and "BAR.SYNC" not in code, "weights go through shared memory again"


@SLOW
@pytest.mark.parametrize("size", [(3, 3, 3), (5, 5, 5)])
def test_weight_gradient_compiles_without_spills(cache: None, size: tuple) -> None:
    from decoders.layers import depthwise_kernels

    cut = depthwise_triton.plan((1, 384, 2, 120, 208), size[2], 2)
    strides = f"{STRIDES} g_b g_t g_h g_w"
    types = dict.fromkeys(["x", "past", "gradient"], "*bf16") | {"partial": "*fp32"}
    types |= dict.fromkeys(f"frames_in height width channels rows row_blocks {strides}".split(), "i32")
    fixed = dict(
        KT=size[0], KH=size[1], KW=size[2], HAS_PAST=True, DOUBLE=False, BLOCK_W=cut.columns, BLOCK_C=cut.block_c
    )
    used, _ = compiled(depthwise_kernels.weight_gradient, types, fixed, f"channels {strides}", num_warps=cut.warps)
    assert used["STACK"] == 0, used


TILES = [(fp8, tile) for fp8 in (False, True) for tile in attention_fp8.TILES[fp8]]
QUICK = (True, attention_fp8.TILES[True][0])


@pytest.mark.parametrize(("fp8", "tile"), [pytest.param(*one, marks=[] if one == QUICK else SLOW) for one in TILES])
def test_attention_compiles_for_the_matrix_units_without_spills(cache: None, fp8: bool, tile: tuple) -> None:
    from decoders.flashdecoder import attention_kernels

    strides = "q_b q_s q_h k_b k_s k_h v_b v_h out_b out_s out_h"
    types = dict.fromkeys("kv", "*fp8e4nv" if fp8 else "*bf16") | {
        "q": "*bf16",
        "out": "*bf16",
        "softmax_scale": "fp32",
    }
    types |= dict.fromkeys(("q_scale", "k_scale", "v_scale"), "*fp32")
    types |= dict.fromkeys(f"queries keys group {strides} {'v_d' if fp8 else 'v_s'}".split(), "i32")
    fixed = dict(FP8=fp8, BLOCK_M=tile[0], BLOCK_N=tile[1], D=64, INTERPRETED=False) | {"v_s" if fp8 else "v_d": 1}
    sixteens = f"{strides} {'v_d' if fp8 else 'v_s'}"
    used, code = compiled(attention_kernels.attend, types, fixed, sixteens, num_warps=tile[2], num_stages=tile[3])
    assert used["STACK"] == 0, used
    assert ("QGMMA" if fp8 else "HGMMA") in code and "MUFU.EX2" in code


# ---- emulation, dispatch and students, on a CPU


def random_tokens(rms: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    shape = torch.randn(1, 256, 4, 64) * rms, torch.randn(1, 512, 2, 64), torch.randn(1, 512, 2, 64)
    return tuple(part.bfloat16() for part in shape)


@pytest.mark.parametrize(("rms", "low", "high"), [(0.3, 0.03, 0.05), (1.0, 0.04, 0.07), (3.0, 0.06, 0.12)])
def test_what_fp8_attention_costs(rms: float, low: float, high: float) -> None:
    """The numbers in its docstring: lossy, and by so much."""
    q, k, v = random_tokens(rms)
    exact = F.scaled_dot_product_attention(*(p.double().transpose(1, 2) for p in (q, k, v)), enable_gqa=True).transpose(
        1, 2
    )
    error = attention_fp8.emulate_fp8(q.float(), k.float(), v.float()).double() - exact
    assert low < float(error.norm() / exact.norm()) < high


def test_scales_cover_and_saturate() -> None:
    q, k, v = random_tokens(1.0)
    scales = attention_fp8.Scales.of(q, k, v)
    assert torch.allclose(scales.q * 448, q.float().abs().amax((0, 1, 3)))
    larger = attention_fp8.Scales.of(2 * q, k / 2, v)
    merged = scales.merge(larger)
    assert torch.equal(merged.q, larger.q) and torch.equal(merged.k, scales.k)
    small = replace(scales, v=scales.v / 4)  # a quarter of the range: values are cut off
    cut = attention_fp8.emulate_fp8(q, k, v, small).float()
    assert cut.isfinite().all() and cut.abs().max() <= float((small.v * 448).max()) * 1.01


def test_kernels_say_why_not() -> None:
    q, k, v = random_tokens(1.0)
    with pytest.raises(ValueError, match="needs a CUDA device"):
        attention_fp8.attend_triton(q, k, v)
    with pytest.raises(ValueError, match="do not share"):
        attention_fp8.emulate_fp8(q[:, :, :3], k, v)
    x, weight = torch.randn(1, 4, 2, 3, 3), torch.randn(4, 1, 3, 3, 3)
    with pytest.raises(ValueError, match="needs a CUDA tensor"):
        depthwise_triton.causal_depthwise3d(x, None, weight, kernel="triton")
    with pytest.raises(ValueError, match="no depthwise kernel of 4 channels"):
        depthwise_triton.causal_depthwise3d(x, None, weight[:3])
    with pytest.raises(ValueError, match="needs \\(1, 4, 2, 3, 3\\)"):
        depthwise_triton.causal_depthwise3d(x, x[:, :, :1], weight)
    with pytest.raises(ValueError, match="bfloat16"):
        depthwise_triton.causal_depthwise3d(x, None, weight.bfloat16())


@pytest.mark.parametrize("shape", [(1, 384, 1, 32, 32), (2, 7, 3, 5, 9), (1, 640, 25, 270, 480), (1, 16, 1, 1, 1)])
@pytest.mark.parametrize("kh", [1, 3, 5])
def test_plans_cover_and_keep_to_the_registers(shape: tuple, kh: int) -> None:
    for itemsize in (2, 4, 8):
        cut = depthwise_triton.plan(shape, kh, itemsize)
        assert cut.lanes * cut.block_c * itemsize // 16 == cut.warps * 32 or cut.lanes == 1
        assert (16 // itemsize) * cut.pixels * kh <= 96
        assert 1 <= cut.rows <= shape[3] and cut.programs(shape) >= min(1, 1600 // 32)


def test_the_operation_on_a_cpu_is_the_plain_convolution() -> None:
    plain = CausalConv3d(6, 6, 3, groups=6)
    x = torch.randn(2, 6, 3, 5, 4)
    fast = torch.nn.ModuleList([plain])
    y, past = plain(x)
    assert use_depthwise_kernels(fast) == 1 and type(plain) is DepthwiseCausal3d
    z, new = plain(x)
    torch.testing.assert_close(z, y)
    assert torch.equal(new, past)
    frame = x[:, :, :1]
    assert torch.equal(plain(frame, new)[1], torch.cat([past[:, :, 1:], frame], 2))
    dreamt = torch.ops.video_decoders.depthwise3d(
        *(p.to("meta") for p in (x, new, torch.randn(3, 3, 3, 6))), None, 3, -2, "auto"
    )
    assert dreamt.shape == z.shape and dreamt.stride() == z.stride()


@SLOW
def test_the_operation_is_registered_as_torch_wants_it() -> None:
    x, past, packed = torch.randn(1, 6, 2, 3, 4), torch.randn(1, 6, 2, 3, 4), torch.randn(3, 3, 3, 6)
    torch.library.opcheck(
        torch.ops.video_decoders.depthwise3d,
        [part.requires_grad_() for part in (x, past, packed)] + [torch.randn(6, requires_grad=True), 2, -2, "auto"],
    )
    tokens = [torch.randn(1, 5, 2, 64), torch.randn(1, 7, 1, 64), torch.randn(1, 7, 1, 64)]
    for operation, extra in (("attend_bf16", 0), ("attend_fp8", 3)):
        given = [part.to("meta") for part in tokens] + [torch.empty(1, device="meta")] * extra
        assert getattr(torch.ops.video_decoders, operation)(*given).shape == tokens[0].shape


SMALL_LTX = LTXConfig(channels=4, widths=(32, 32, 32, 16, 8), blocks=(2, 1, 1, 2, 1))


@pytest.mark.parametrize("layout", ["wan21", "ltx"])
def test_students_with_kernels_are_the_students(layout: str) -> None:
    deep = {"mid": "depthwise", "up0": "depthwise"}
    student = LTXStudent(SMALL_LTX, deep, {}) if layout == "ltx" else build_student(TINY, 16, 4, 8)
    student, kinds = student.eval(), DepthwiseCausal3d | DepthwiseEdge3d
    fast = with_depthwise_kernels(student)
    assert any(isinstance(module, kinds) for module in fast.modules())
    assert not any(isinstance(module, kinds) for module in student.modules())
    assert all(a is b for a, b in zip(student.parameters(), fast.parameters(), strict=True)), "weights are shared"
    latent = torch.randn(1, student.channels, 3, 2, 3)
    expected = student.decode(latent)
    torch.testing.assert_close(fast.decode(latent), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(optimise(student, InferenceOptions()).decode(latent), expected, atol=1e-5, rtol=1e-4)


def test_training_with_the_operation_on_a_cpu_has_the_same_gradients() -> None:
    gradients = []
    for kernel in ("torch", "auto"):
        torch.manual_seed(0)
        student = build_student(replace(TINY, depthwise_kernel=kernel), 16, 4, 8)
        student(torch.randn(1, 16, 2, 2, 2)).square().mean().backward()
        gradients.append({name: part.grad for name, part in student.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4)
