"""Linear layers and MLPs in our bf16 kernels: against float64, at every edge of their tiles, whatever runs beside them."""

import copy
import io
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decoders.flashdecoder import bits8
from decoders.flashdecoder.model import FlashDecoderConfig, FlashDecoderModel
from decoders.inference import InferenceOptions, optimise
from decoders.layers import products
from decoders.refdecoder.fast_attention import FastBlock
from decoders.refdecoder.transformer import Block

ROOT = Path(__file__).parent.parent
REASON = products.refused(torch.zeros(2, 2, dtype=torch.bfloat16))
needs_kernels = pytest.mark.skipif(bool(REASON), reason=f"products in our kernels: {REASON}")
# tokens, features in, features out: single ones; parts of a vector, of a tile, of a task; more tokens than one task takes, more
# features than are summed at once, more rows than a task has.
SHAPES = [
    (1, 2, 2),
    (5, 10, 6),
    (17, 34, 40),
    (64, 48, 96),
    (65, 130, 194),
    (321, 96, 100),
    (700, 64, 390),
    (33, 1700, 14),
]


def normed(x: Tensor, gain: Tensor | None) -> Tensor:
    return x if gain is None else x * (x.square().mean(-1, keepdim=True) + products.EPS).rsqrt() * gain


def exact_mlp(up, down, x: Tensor, gain: Tensor | None, activation: str) -> Tensor:
    hidden = F.linear(normed(x, gain), *up)
    if activation == "swiglu":
        gate, hidden = hidden.chunk(2, -1)
        return F.linear(F.silu(gate) * hidden, *down)
    return F.linear(F.silu(hidden) if activation == "silu" else F.gelu(hidden, approximate="tanh"), *down)


def layer(inputs: int, outputs: int, bias: bool = True) -> nn.Linear:
    made = nn.Linear(inputs, outputs, bias=bias).bfloat16().requires_grad_(False)
    products.prefer(made)
    return made


def decoder(depth: int = 1, refinement_depth: int = 1) -> FlashDecoderModel:
    torch.manual_seed(3)
    sizes = dict(depth=depth, dim=256, num_heads=4, num_kv_heads=2, refinement_depth=refinement_depth)
    return FlashDecoderModel(FlashDecoderConfig(**sizes), 6, 4, 8).bfloat16()


def wide(part: nn.Linear) -> tuple[Tensor, Tensor | None]:
    return part.weight.double(), None if part.bias is None else part.bias.double()


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def by_torch(function, *layers: nn.Linear):
    """What the same function gives layer by layer in bf16."""
    marks = [part.kernels for part in layers]
    try:
        for part in layers:
            part.kernels = False
        return function()
    finally:
        for part, mark in zip(layers, marks, strict=True):
            part.kernels = mark


@needs_kernels
@pytest.mark.parametrize("tokens,inputs,outputs", SHAPES)
@pytest.mark.parametrize(
    "bias,norm,residual", [(False, False, False), (True, True, True), (True, False, True), (False, True, False)]
)
def test_a_linear_layer_against_float64(tokens, inputs, outputs, bias, norm, residual) -> None:
    own, x = layer(inputs, outputs, bias), torch.randn(tokens, inputs).bfloat16()
    gain = (torch.rand(inputs) + 0.5).bfloat16() if norm else None
    added = torch.randn(tokens, outputs).bfloat16() if residual else None
    assert own.kernels
    expected = F.linear(normed(x.double(), None if gain is None else gain.double()), *wide(own))
    expected = expected if added is None else expected + added.double()
    found = products.linear(own, x, gain, added)
    torchs = by_torch(lambda: products.linear(own, x, gain, added), own)
    assert found.shape == torchs.shape == expected.shape and found.dtype == torch.bfloat16
    # One rounding at the end, and one before where there is a norm; nothing may be worse than torch's two or three.
    assert rms(found - expected) <= 1.02 * rms(torchs - expected) + 1e-5 * rms(expected)
    assert (found - expected).abs().max() <= 0.02 * expected.abs().max() + 1e-3


@needs_kernels
@pytest.mark.parametrize("tokens,inputs,hidden", SHAPES)
@pytest.mark.parametrize("activation", products.ACTIVATIONS)
@pytest.mark.parametrize("plain", [True, False])
def test_an_mlp_against_float64(tokens, inputs, hidden, activation, plain) -> None:
    up, down = layer(inputs, hidden * (1 + (activation == "swiglu")), not plain), layer(hidden, inputs, not plain)
    x, gain = torch.randn(tokens, inputs).bfloat16(), None if plain else (torch.rand(inputs) + 0.5).bfloat16()
    expected = exact_mlp(wide(up), wide(down), x.double(), None if plain else gain.double(), activation)
    found = products.mlp(up, down, x, gain, activation)
    torchs = by_torch(lambda: products.mlp(up, down, x, gain, activation), up, down)
    assert found.shape == torchs.shape == expected.shape
    assert rms(found - expected) <= 1.05 * rms(torchs - expected) + 2e-3 * rms(expected)


@needs_kernels
def test_tokens_that_lie_apart_and_axes_before_them() -> None:
    own = layer(64, 32)
    x, added = torch.randn(2, 3, 9, 128).bfloat16(), torch.randn(2, 3, 9, 64).bfloat16()
    cases = [
        x[..., 64:],
        x[:, 1, 2:, :64],
        x[..., ::2],
        x[:, :, ::2, 3:67],
        x[0, 0, 0, :64],
        x.transpose(0, 2)[..., :64],
    ]
    for view in cases:
        torch.testing.assert_close(products.linear(own, view), products.linear(own, view.contiguous()), atol=0, rtol=0)
    residual = added[..., ::2]
    found = products.linear(own, cases[0], residual=residual)
    torch.testing.assert_close(found, products.linear(own, cases[0], residual=residual.contiguous()), atol=0, rtol=0)
    assert products.linear(own, x[:0, 0, :, :64]).shape == (0, 9, 32)
    assert products.mlp(own, layer(32, 64), x[:, :0, 0, :64], activation="gelu").shape == (2, 0, 64)


@needs_kernels
def test_threads_change_no_bit_and_callers_may_be_several() -> None:
    up, down, x = layer(200, 600), layer(300, 200), torch.randn(700, 200).bfloat16()
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            found.append(products.mlp(up, down, x))
        assert all(torch.equal(found[0], other) for other in found[1:])
        torch.set_num_threads(2)
        parts = [torch.randn(tokens, 200).bfloat16() for tokens in (1, 65, 400, 130)] * 4
        alone = [products.mlp(up, down, part) for part in parts]
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(lambda part: products.mlp(up, down, part), parts))
        assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    finally:
        torch.set_num_threads(before)


@needs_kernels
@pytest.mark.parametrize("activation", products.ACTIVATIONS)
def test_what_is_not_finite_stays_with_its_token_and_large_values_are_no_trouble(activation: str) -> None:
    up, down = layer(32, 16 * (1 + (activation == "swiglu")), False), layer(16, 32, False)
    x = torch.randn(70, 32).bfloat16()
    clean = products.mlp(up, down, x, activation=activation)
    for value in (float("nan"), float("inf")):
        broken = x.clone()
        broken[19, 3] = value
        found = products.mlp(up, down, broken, activation=activation)
        assert not found[19].isfinite().any()
        assert torch.equal(found[:19], clean[:19]) and torch.equal(found[20:], clean[20:])
    one = nn.Linear(2, 2, bias=False).bfloat16().requires_grad_(False)
    one.weight.copy_(torch.eye(2))
    products.prefer(one)
    if activation != "swiglu":  # far below nothing is left, far above everything
        x = torch.tensor([[-1e38, 1e38], [-200.0, 200.0], [-0.0, 0.0]]).bfloat16()
        found = products.mlp(one, one, x, activation=activation)
        torch.testing.assert_close(found, x.clamp(min=0) + 0.0)


@needs_kernels
def test_nothing_is_read_or_written_beyond_its_end() -> None:
    """Operands that end where a page ends that may not be touched, and outputs between guards."""
    script = """
        import ctypes, mmap, torch
        from decoders.layers import products
        libc, page = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE
        held = []
        def at_the_end(part):
            size = part.numel() * 2
            pages = -(-size // page) + 1
            memory = mmap.mmap(-1, pages * page)
            held.append(memory)
            start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
            end = start + (pages - 1) * page
            ctypes.memmove(end - size, part.data_ptr(), size)
            assert not libc.mprotect(ctypes.c_void_p(end), ctypes.c_size_t(page), 0)
            return end - size
        for m, k, n in [(1, 2, 2), (5, 10, 6), (17, 34, 40), (65, 130, 194), (321, 96, 100), (33, 1700, 14)]:
            x, gain, weight, bias, residual = (torch.randn(*s).bfloat16() for s in ((m, k), (k,), (n, k), (n,), (m, n)))
            expected = products.linear_bf16(x, weight, bias, gain, residual)
            out = torch.full((m * n + 128,), 7.0).bfloat16()
            address = [at_the_end(part) for part in (x, gain, weight, bias, residual)]
            at = out[64:].data_ptr()
            end = at_the_end(torch.zeros(m, n).bfloat16())
            for place in (at, end):
                products._library().linear_bf16(
                    address[0], address[1], products.EPS, *address[2:], place, m, k, k, n, torch.get_num_threads()
                )
            assert torch.equal(out[64:-64].view(m, n), expected)
            assert (out[:64] == 7).all() and (out[-64:] == 7).all()
        print("whole")
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.strip() == "whole", run.stderr[-2000:]


def test_what_the_kernels_refuse() -> None:
    half = torch.zeros(4, 6, dtype=torch.bfloat16)
    assert "bf16, not torch.float32" in products.refused(half.float())
    assert "bf16, not torch.float64" in products.refused(half, torch.zeros(4).double())
    assert "pairs of features" in products.refused(half[:, :5]) and "pairs of features" in products.refused(half[:3])
    assert "row after row" in products.refused(torch.zeros(6, 4, dtype=torch.bfloat16).t())
    assert "on a CPU" in products.refused(half.to("meta"))
    plain = nn.Linear(6, 4)
    products.prefer(plain)
    assert not plain.kernels
    x = torch.randn(3, 6)
    torch.testing.assert_close(products.linear(plain, x), plain(x))


def test_a_cpu_with_amx_keeps_torchs_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert "AMX" in products.refused(torch.zeros(4, 6, dtype=torch.bfloat16))


@needs_kernels
def test_operands_that_do_not_fit_are_errors_and_no_crash() -> None:
    x, weight = torch.zeros(3, 6).bfloat16(), torch.zeros(4, 6).bfloat16()
    for arguments in [
        (x[:, :4], weight),
        (x.float(), weight),
        (x, weight.float()),
        (x, weight, torch.zeros(3).bfloat16()),
        (x, weight, None, torch.zeros(4).bfloat16()),
        (x, weight, None, None, torch.zeros(4, 4).bfloat16()),
        (x, weight, torch.zeros(4)),
    ]:
        with pytest.raises(ValueError, match="no product of"):
            products.linear_bf16(*arguments)
    with pytest.raises(ValueError, match="no product of"):
        products.mlp_bf16(x, weight, None, torch.zeros(6, 4).bfloat16(), None)  # swiglu wants 8 rows
    with pytest.raises(ValueError):
        products.mlp_bf16(x, weight, None, torch.zeros(6, 4).bfloat16(), None, None, "relu")
    mlp = (weight, None, torch.zeros(6, 4).bfloat16())
    with pytest.raises(ValueError, match="no product of"):
        products.mlp_bf16(x, *mlp, torch.zeros(6, 2).bfloat16(), None, "silu")
    with pytest.raises(ValueError, match="no product of"):  # no hidden layer: nothing would be summed
        products.mlp_bf16(x, weight[:0], None, mlp[2][:, :0], None, None, "silu")


@needs_kernels
def test_operands_that_lie_otherwise_are_errors_or_laid_out() -> None:
    x, weight, odd = torch.randn(3, 6).bfloat16(), torch.randn(4, 6).bfloat16(), torch.randn(3, 5).bfloat16()
    one = torch.ones(1).bfloat16()
    for arguments in [
        (x, torch.randn(6, 4).bfloat16().t()),
        (x, torch.randn(4, 12).bfloat16()[:, ::2]),
        (x, weight, one.expand(4)),
        (x, weight[:3]),
        (odd, odd),
        (x[:, :0], weight[:, :0]),
    ]:
        with pytest.raises(ValueError, match="no product of"):
            products.linear_bf16(*arguments)
    own, down = layer(6, 4), layer(4, 6)
    for gain in (one.expand(6), torch.rand(12).bfloat16()[::2]):
        found = products.linear(own, x, gain), products.mlp(own, down, x, gain, "silu")
        whole = products.linear(own, x, gain.contiguous()), products.mlp(own, down, x, gain.contiguous(), "silu")
        assert all(torch.equal(a, b) for a, b in zip(found, whole, strict=True))


@needs_kernels
def test_layers_that_somebody_watches_run_by_themselves() -> None:
    up, down, x = layer(6, 8), layer(4, 6), torch.randn(3, 6).bfloat16()
    gain, seen = (torch.rand(6) + 0.5).bfloat16(), []
    kernels, torchs = (
        products.mlp(up, down, x, gain), by_torch(lambda: products.mlp(up, down, x, gain), up, down)
    )  # fmt: skip
    before = up.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    assert torch.equal(products.mlp(up, down, x, gain), torchs)
    before.remove()
    after = down.register_forward_hook(lambda _, inputs, output: seen.append(output))
    assert torch.equal(products.mlp(up, down, x, gain), torchs)
    after.remove()
    assert torch.equal(products.mlp(up, down, x, gain), kernels) and len(seen) == 2
    assert torch.equal(seen[0], F.rms_norm(x, (6,), gain, products.EPS)) and torch.equal(seen[1], torchs)


@needs_kernels
def test_eight_bits_are_calibrated_on_a_form_whose_products_run_in_them() -> None:
    fast, latent = optimise(decoder()), torch.randn(1, 6, 2, 4, 4).bfloat16()
    assert all(part.kernels for part in fast.modules() if isinstance(part, nn.Linear))
    sites = [site.name for site in bits8.sites(fast, "linear")]
    assert list(bits8.calibrate(fast, "linear", [latent], "int8").scales) == sites
    bits8.quantise(fast, "mlp", [latent], "int8", emulated=True)
    assert fast.blocks[0].qkv.kernels and fast.decode(latent).isfinite().all()


@needs_kernels
def test_forms_that_are_copied_pickled_or_converted_go_on() -> None:
    model, latent = decoder(), torch.randn(1, 6, 2, 4, 4).bfloat16()
    folded, held = InferenceOptions(attention="folded"), io.BytesIO()
    fast = optimise(model, folded)
    torch.save(fast, held)
    held.seek(0)
    for other in (copy.deepcopy(fast), torch.load(held, weights_only=False)):
        assert torch.equal(other.decode(latent), fast.decode(latent))
    exact = optimise(copy.deepcopy(model).float(), folded)
    torch.testing.assert_close(copy.deepcopy(fast).float().decode(latent), exact.decode(latent.float()))
    assert not any(hasattr(part, "kernels") for part in model.modules())
    block = FastBlock(Block(64, 4, 2).bfloat16())
    assert block.weights().kernels and not block.to("meta").weights().kernels


@needs_kernels
def test_a_linear_layer_that_does_more_keeps_its_own_way() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    own, x = Doubled(6, 4).bfloat16().requires_grad_(False), torch.randn(3, 6).bfloat16()
    products.prefer(own)
    assert not own.kernels and torch.equal(products.linear(own, x), own(x))


@needs_kernels
def test_the_decoder_runs_in_them_and_is_nearer_to_float32_than_the_plain_one() -> None:
    model, latent = decoder(depth=3, refinement_depth=2), torch.randn(2, 6, 4, 5, 6)
    exact = model.float().decode(latent.bfloat16().float())
    model, latent = model.bfloat16(), latent.bfloat16()
    plain, fast = model.decode(latent), optimise(model, InferenceOptions(attention="folded"))
    layers = [part for part in fast.modules() if isinstance(part, nn.Linear)]
    assert all(part.kernels for part in layers) and len(layers) == 4 * 5 + 2 + 3
    assert rms(fast.decode(latent) - exact) <= rms(plain - exact)


@needs_kernels
def test_a_compiler_that_cannot_compile_them_is_told_once(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    def fail() -> None:
        tried.append(1)
        raise RuntimeError("g++: unrecognized option -mavx512bf16")

    tried: list[int] = []
    monkeypatch.setattr(products, "_library", fail)
    products._not_compiled.cache_clear()
    try:
        up, down, x = layer(6, 8), layer(4, 6), torch.randn(3, 6).bfloat16()
        assert not (up.kernels or down.kernels) and len(tried) == len(caplog.records) == 1
        assert "unrecognized option" in caplog.text and "torch's kernels" in caplog.text
        assert products.mlp(up, down, x).shape == (3, 6)
    finally:
        products._not_compiled.cache_clear()


@needs_kernels
def test_memory_that_cannot_be_had_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    full = type("Full", (), {name: staticmethod(lambda *_: 1) for name in ("linear_bf16", "mlp_bf16")})
    monkeypatch.setattr(products, "_library", lambda: full)
    x, weight = torch.zeros(3, 6).bfloat16(), torch.zeros(4, 6).bfloat16()
    with pytest.raises(MemoryError, match="lay out tokens"):
        products.linear_bf16(x, weight)
    with pytest.raises(MemoryError, match="hidden features"):
        products.mlp_bf16(x, weight, None, torch.zeros(6, 4).bfloat16(), None, None, "silu")
