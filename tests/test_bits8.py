"""Eight-bit products: rounding against known answers, calibration and its file, FlashDecoder's rounded form."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from decoders.flashdecoder import bits8
from decoders.flashdecoder.model import FlashDecoderConfig, FlashDecoderModel
from decoders.inference import InferenceOptions, optimise
from decoders.layers import linear8
from decoders.layers.linear8 import Fp8Linear, Int8Linear

ROOT = Path(__file__).parent.parent
needs_int8 = pytest.mark.skipif(not linear8.has_int8(), reason="needs a CPU with AVX512-VNNI")
HERE = "int8" if linear8.has_int8() else "int8 emulated"


def e4m3_values() -> Tensor:
    """Every finite value of E4M3 from its definition (arXiv 2209.05433, table 1): bias 7, three bits, no infinity."""
    positive = [m * 2.0**-9 for m in range(8)]  # subnormal
    positive += [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)]
    return torch.tensor(sorted({-v for v in positive} | set(positive)), dtype=torch.float64)


def nearest_e4m3(x: Tensor) -> Tensor:
    """The nearest value for each; of two equally near, the one whose last bit of mantissa is 0."""
    values = e4m3_values()
    distances = (x.double()[:, None] - values).abs()
    ties = distances == distances.min(dim=1, keepdim=True).values
    even = (values.abs().float().to(torch.float8_e4m3fn).view(torch.uint8) % 2 == 0).double()
    return values[(ties * (1 + even)).argmax(dim=1)]


def test_e4m3_rounds_to_the_nearest_value_and_saturates() -> None:
    values = e4m3_values()
    assert len(values) == 253 and values.max() == 448
    middles = (values[1:] + values[:-1]) / 2
    x = torch.cat([values, middles, torch.randn(2000).double() * 10, torch.tensor([449.0, 1e9, -500.0, -1e30])]).float()
    found = linear8.to_e4m3(x, 1.0).double()
    assert torch.equal(found, nearest_e4m3(x.clamp(-448, 448)))
    assert found[-4:].tolist() == [448, 448, -448, -448]
    assert linear8.to_e4m3(torch.tensor([1.0]), 448.0).item() == 448


def test_uint8_rounds_saturates_and_has_128_for_zero() -> None:
    x = torch.tensor([0.0, 0.49, 0.51, -1.2, 126.6, 127.4, 1e9, -1e9])
    assert linear8.to_offset_bytes(x, 1.0).tolist() == [128, 128, 129, 127, 255, 255, 255, 1]
    assert linear8.to_offset_bytes(x, 2.0).tolist()[1:3] == [129, 129]


@needs_int8
def test_int8_product_is_exact_in_integers() -> None:
    weight = torch.randint(-127, 128, (48, 512)).float()
    weight[:, 0] = 127  # every row's scale is 1
    weight[0], weight[1] = 127, -127
    x = torch.randint(-127, 128, (3, 5, 512)).float()
    x[0, 0], x[0, 1] = 127, -127  # the largest sums there are: without VNNI pairs would saturate at 16 bits
    found = Int8Linear(weight, scale=1.0)(x)
    assert found.dtype == torch.float32
    assert torch.equal(found.double(), x.double() @ weight.double().t())


@needs_int8
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_equals_its_emulation(dtype: torch.dtype) -> None:
    weight, x = torch.randn(96, 64, dtype=dtype), torch.randn(2, 7, 64, dtype=dtype)
    real, emulated = Int8Linear(weight, 0.03)(x), Int8Linear(weight, 0.03, emulated=True)(x)
    assert real.dtype == dtype and real.shape == (2, 7, 96)
    torch.testing.assert_close(real, emulated, rtol=2**-8 if dtype == torch.bfloat16 else 1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_through_the_library_equals_its_emulation(dtype: torch.dtype) -> None:
    weight, x = torch.randn(96, 64, dtype=dtype), torch.randn(2, 7, 64, dtype=dtype)
    real, emulated = Fp8Linear(weight, 0.01)(x), Fp8Linear(weight, 0.01, emulated=True)(x)
    assert real.dtype == dtype and real.shape == (2, 7, 96)
    torch.testing.assert_close(real, emulated, rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", [Fp8Linear, Int8Linear])
def test_error_is_that_of_the_rounding(kind: type) -> None:
    """Relative error of a product: of E4M3 about 2**-4 / sqrt(12) for each side, of int8 a step over sqrt(12) for each."""
    weight, x = torch.randn(128, 256) * 0.05, torch.randn(64, 256)
    largest = x.abs().max().item()
    layer = kind(weight, largest / (448 if kind is Fp8Linear else 127), emulated=True)
    exact = F.linear(x, weight)
    error = ((layer(x) - exact).norm() / exact.norm()).item()
    steps = (largest / 127, weight.abs().amax(1).mean().item() / 127 / 0.05)
    expected = {Fp8Linear: 0.0375, Int8Linear: (sum(step**2 for step in steps) / 12) ** 0.5}[kind]
    assert 0.85 * expected < error < 1.15 * expected


def test_fp8_has_no_use_for_scales_of_output_channels() -> None:
    weight, x = torch.randn(64, 256) * torch.exp2(-torch.arange(64) / 10)[:, None], torch.randn(32, 256)
    exact = F.linear(x, weight)

    def error(found: Tensor) -> Tensor:
        return (found - exact).norm(dim=0) / exact.norm(dim=0)

    one = error(Fp8Linear(weight, 0.01, emulated=True)(x))
    each = error(torch.cat([Fp8Linear(row.repeat(16, 1), 0.01, emulated=True)(x)[:, :1] for row in weight], dim=1))
    assert one.max() < 1.3 * each.max() and one.mean() < 1.05 * each.mean()


@pytest.mark.parametrize("kind", [Fp8Linear, Int8Linear])
def test_zeros_give_zeros(kind: type) -> None:
    layer = kind(torch.zeros(32, 64), 0.1, emulated=True)
    assert layer(torch.randn(3, 64)).abs().max() == 0
    assert kind(torch.randn(32, 64), 0.1, emulated=True)(torch.zeros(3, 64)).abs().max() == 0


@pytest.mark.parametrize("scale", [0.0, float("nan"), float("inf"), -1.0])
def test_bad_scales_and_weights_are_refused(scale: float) -> None:
    with pytest.raises(ValueError, match="calibrate again"):
        Int8Linear(torch.randn(16, 16), scale, emulated=True)
    with pytest.raises(ValueError, match="weights are not finite"):
        Fp8Linear(torch.full((16, 16), torch.nan), 1.0)
    with pytest.raises(ValueError, match="multiples of 16"):
        Fp8Linear(torch.randn(16, 20), 1.0)


# ---- FlashDecoder


def network(seed: int = 0, **changes) -> FlashDecoderModel:
    torch.manual_seed(seed)
    config = FlashDecoderConfig(**{"depth": 2, "dim": 128, "num_heads": 2, "num_kv_heads": 1, **changes})
    model = FlashDecoderModel(config, channels=8, stride_t=4, stride_hw=8).eval().requires_grad_(False)
    with torch.no_grad():  # gains as training makes them, and channels that stand out
        for name, parameter in model.named_parameters():
            if name.endswith("gain"):
                parameter.copy_(torch.exp(0.3 * torch.randn_like(parameter)))
                parameter[..., 0] *= 8
    return model


def latents(count: int = 2) -> list[Tensor]:
    return [torch.randn(1, 8, 3, 4, 4, generator=torch.Generator().manual_seed(i)) for i in range(count)]


def rounded(model: FlashDecoderModel, kind: str, calibration, arithmetic: str, emulated: bool = True):
    return bits8.quantise(optimise(model), kind, calibration, arithmetic, emulated)


def relative(found: Tensor, exact: Tensor) -> float:
    return ((found - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("arithmetic", ["fp8", "int8"])
@pytest.mark.parametrize(("kind", "count"), [("mlp", 2), ("linear", 4)])
def test_rounded_form_is_near_the_reference(arithmetic: str, kind: str, count: int) -> None:
    model, latent = network(), latents(3)[2]
    exact, before = model.decode(latent), {k: v.clone() for k, v in model.state_dict().items()}
    fast = rounded(model, kind, latents(), arithmetic)
    assert len(list(bits8.rounded_layers(fast))) == count * len(fast.blocks)
    assert 1e-4 < relative(fast.decode(latent), exact) < {"fp8": 0.08, "int8": 0.05}[arithmetic]
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items()), "the weights are shared, not changed"
    assert torch.equal(model.decode(latent), exact)


@needs_int8
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_one_door_gives_int8_on_a_cpu(dtype: torch.dtype) -> None:
    model = network().to(dtype)
    fast = optimise(model, InferenceOptions(bits8="linear"), latents())
    assert all(isinstance(layer, Int8Linear) and not layer.emulated for _, layer in bits8.rounded_layers(fast))
    latent = latents(3)[2].to(dtype)
    whole = fast.decode(latent)
    state = fast.start_stream(1, 32, 32)
    frames = torch.cat([fast.step_stream(frame, state) for frame in latent.unbind(2)], dim=2)
    assert torch.equal(frames, whole) and relative(whole.float(), network().decode(latents(3)[2])) < 0.06


def test_smoothing_changes_nothing_but_the_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """With layers that do not round, the network with its folded powers of two is the network itself, to the last bit."""
    monkeypatch.setattr(bits8, "STRENGTHS", (0.5,))

    class Exact(torch.nn.Linear):
        def __init__(self, weight: Tensor, scale: float, emulated: bool) -> None:
            super().__init__(*reversed(weight.shape), bias=False, device="meta")
            self.weight = torch.nn.Parameter(weight, requires_grad=False)

    monkeypatch.setitem(bits8.LAYERS, "int8", Exact)
    model, latent = network(), latents(3)[2]
    plain, calibration = optimise(model), bits8.calibrate(optimise(model), "linear", latents(), "int8")
    assert any(one.exponents is not None and one.exponents.abs().max() > 0 for one in calibration.scales.values())
    fast = bits8.quantise(optimise(model), "linear", calibration, "int8")
    assert not torch.equal(fast.blocks[0].mlp_gain, plain.blocks[0].mlp_gain)
    torch.testing.assert_close(fast.decode(latent), plain.decode(latent), atol=1e-6, rtol=1e-5)


def test_smoothing_pays_whatever_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """On latents that calibration did not see; each draw by itself may be lucky."""
    latent, smoothed, plain = latents(3)[2], [], []
    for seed in range(6):
        model = network(seed=seed)
        exact = model.decode(latent)
        for strengths, found in ((bits8.STRENGTHS, smoothed), ((0.0,), plain)):
            with monkeypatch.context() as patch:
                patch.setattr(bits8, "STRENGTHS", strengths)
                found.append(relative(rounded(model, "linear", latents(), "int8").decode(latent), exact))
    assert max(smoothed) < 0.05
    assert sorted(smoothed)[3] < 0.7 * sorted(plain)[3]


def test_calibration_keeps_the_largest_of_all_calls() -> None:
    seen, calls = bits8.Seen(), [torch.randn(2, 40, 6) for _ in range(100)]
    for call in calls:
        seen.add(call)
    assert torch.equal(seen.largest, torch.cat([c.flatten(0, 1) for c in calls]).abs().amax(0))
    assert len(seen.sample()) <= bits8.ROWS and sum(map(len, seen.rows)) <= 2 * bits8.ROWS


def test_bad_calibration_is_told() -> None:
    model = network()
    with pytest.raises(ValueError, match="give normalised latents"):
        optimise(model, InferenceOptions(bits8="mlp"))
    with pytest.raises(ValueError, match="latent 1 is not finite"):
        rounded(model, "mlp", [latents()[0], torch.full((1, 8, 1, 4, 4), torch.nan)], "int8")
    with torch.no_grad():
        model.backbone.blocks[1].gate_up.weight[3, 3] = torch.inf
    with pytest.raises(ValueError, match="what enters blocks.1.down is not finite"):
        rounded(model, "mlp", latents(), "int8")
    with pytest.raises(ValueError, match="neither mlp nor linear"):
        bits8.sites(optimise(network()), "head")


@pytest.mark.parametrize("arithmetic", ["fp8", "int8"])
def test_saved_scales_give_the_same_network(tmp_path, arithmetic: str) -> None:
    model, latent, file = network(), latents(3)[2], tmp_path / "sub" / "scales.safetensors"
    calibration = bits8.calibrate(optimise(model), "linear", latents(), arithmetic)
    calibration.save(file)
    found = bits8.Calibration.load(file)
    assert dataclasses.replace(found, scales={}) == dataclasses.replace(calibration, scales={})
    one, other = (rounded(model, "linear", given, arithmetic) for given in (found, latents()))
    assert torch.equal(one.decode(latent), other.decode(latent))


def test_scales_of_other_weights_are_refused(tmp_path) -> None:
    model = network()
    calibration = bits8.calibrate(optimise(model), "mlp", latents(), "int8")
    for kind, arithmetic in (("linear", "int8"), ("mlp", "fp8")):
        with pytest.raises(ValueError, match=f"bits8={kind} in {arithmetic} was asked for"):
            rounded(model, kind, calibration, arithmetic)
    with torch.no_grad():
        model.refinement.blocks[0].down.weight[0, 0] += 1e-3
    with pytest.raises(ValueError, match="of other weights"):
        rounded(model, "mlp", calibration, "int8")
    with pytest.raises(ValueError, match="of other weights"):
        rounded(network(depth=3), "mlp", calibration, "int8")
    broken = tmp_path / "scales.safetensors"
    broken.write_text(json.dumps({"scales": []}))
    with pytest.raises(ValueError, match="cannot be read"):
        bits8.Calibration.load(broken)


COMPILED = """
import torch
from tests.test_bits8 import latents, network, relative
from decoders.inference import InferenceOptions, optimise

torch.manual_seed(0)
torch.set_num_threads(1)
model, latent = network(depth=10).bfloat16(), latents(3)[2].bfloat16()
eager = optimise(model, InferenceOptions(bits8="linear"), latents()).decode(latent)
compiled = optimise(model, InferenceOptions(bits8="linear", compile=True), latents()).decode(latent)
assert relative(compiled.float(), eager.float()) < 0.02
counters = torch._dynamo.utils.counters
assert counters["graph_break"] == {} and counters["stats"]["unique_graphs"] <= 11, counters
print("equal")
"""


@pytest.mark.slow
@needs_int8
def test_compiled_equals_eager() -> None:
    """One compiled block serves all blocks: what differs between their layers is in tensors.

    In a process without the shape checks that tests put around every function: those cannot be traced.
    """
    run = subprocess.run([sys.executable, "-c", COMPILED], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.stdout.split()[-1:] == ["equal"], run.stderr[-3000:]
