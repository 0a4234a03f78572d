"""FP8 on a CUDA device: the tensor cores against the exact emulation, alone and in FlashDecoder, eager, compiled and in graphs."""

import pytest
import torch
from torch import Tensor

from decoders.flashdecoder import bits8
from decoders.flashdecoder.model import SIZES, FlashDecoderConfig, FlashDecoderModel
from decoders.inference import InferenceOptions, optimise
from decoders.layers.linear8 import Fp8Linear

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def needs_fp8() -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no FP8 products (compute capability 8.9 or more has)")


def relative(found: Tensor, exact: Tensor) -> float:
    return ((found.float() - exact.float()).norm() / exact.float().norm()).item()


@pytest.mark.parametrize(
    ("tokens", "features", "out"), [(1, 64, 16), (77, 512, 4096), (3600, 1536, 12288), (3600, 6144, 1536)]
)
def test_tensor_cores_equal_the_emulation(tokens: int, features: int, out: int) -> None:
    weight = torch.randn(out, features, device="cuda", dtype=torch.bfloat16) * features**-0.5
    x = torch.randn(2, tokens, features, device="cuda", dtype=torch.bfloat16)
    real, emulated = (Fp8Linear(weight, 0.012, one)(x) for one in (False, True))
    assert real.dtype == torch.bfloat16 and real.shape == (2, tokens, out)
    assert relative(real, emulated) < 4e-3  # bf16 of the result, and sums of about 14 bits
    exact = torch.nn.functional.linear(x.float(), weight.float())
    assert 0.02 < relative(real, exact) < 0.045


def network() -> FlashDecoderModel:
    config = FlashDecoderConfig(**{**SIZES["s"], "depth": 3})
    return FlashDecoderModel(config, 48, 4, 16).cuda().bfloat16().eval().requires_grad_(False)


@pytest.mark.parametrize("kind", ["mlp", "linear"])
@pytest.mark.parametrize("compiled", [False, True])
def test_every_way_to_run_equals_the_emulation(kind: str, compiled: bool) -> None:
    model = network()
    latents = [torch.randn(1, 48, 3, 8, 8) for _ in range(2)]
    latent = torch.randn(2, 48, 6, 10, 12, device="cuda", dtype=torch.bfloat16)
    eager = optimise(model, InferenceOptions(graphs=False))
    calibration = bits8.calibrate(eager, kind, latents)
    assert calibration.arithmetic == "fp8"
    emulated = bits8.quantise(eager, kind, calibration, emulated=True).decode(latent)
    fast = optimise(model, InferenceOptions(bits8=kind, compile=compiled), calibration)
    assert all(isinstance(layer, Fp8Linear) and not layer.emulated for _, layer in bits8.rounded_layers(fast))
    assert relative(fast.decode(latent), emulated) < 0.02
    assert relative(fast.decode(latent), model.decode(latent)) < 0.1
    assert torch.equal(fast.decode(latent), fast.decode(latent))


def test_weights_in_fp8_take_half_the_memory() -> None:
    model = network()
    before = torch.cuda.memory_allocated()
    layers = [Fp8Linear(block.down.weight, 1.0) for block in model.backbone.blocks]
    added = torch.cuda.memory_allocated() - before
    assert added <= sum(block.down.weight.nbytes for block in model.backbone.blocks) // 2 + 4096 * len(layers)
