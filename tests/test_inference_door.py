"""What a caller may do to `optimise` and to what it gives, in every family: whatever he is in, and whatever he hands over."""

import copy
import io
from collections.abc import Iterator

import jaxtyping
import pytest
import torch
from refdecoder_small import clip, small
from regen_small import latents as regen_latents
from regen_small import tiny as regen
from test_backbones_optimised import latents as backbone_latents
from test_backbones_optimised import make as backbone
from test_flashdecoder_fast import latents as flash_latents
from test_flashdecoder_fast import tiny as flash
from torch import Tensor, nn

from decoders.flashdecoder import attention, bits8
from decoders.inference import InferenceOptions, optimise
from decoders.layers.deployed import to_uint8

KERNEL = InferenceOptions(attention="folded")  # "auto" may choose another the second time
WINOGRAD = InferenceOptions(fast_convolutions=True)


class Case:
    """A decoder, latents of two clips, what else it decodes with, and options."""

    def __init__(self, model: nn.Module, latent: Tensor, options=None, **more: Tensor) -> None:
        self.model, self.latent, self.more = model, latent, more
        self.options = options or InferenceOptions()

    def optimise(self) -> nn.Module:
        return optimise(self.model, self.options)

    def decode(self, network: nn.Module, latent: Tensor | None = None) -> Tensor:
        return network.decode(self.latent if latent is None else latent, **self.more)


def refdecoder(dtype: torch.dtype, **changes) -> Case:
    model = small(**changes).to(dtype)
    latent, reference = (part.to(dtype) for part in clip(model))
    return Case(model, latent, reference=reference)


def staged(name: str, dtype: torch.dtype, options=None) -> Case:
    model = backbone(name, dtype)
    return Case(model, backbone_latents(model).to(dtype), options)


CASES = {
    "flashdecoder": lambda dtype: Case(flash(dtype), flash_latents(3).to(dtype), KERNEL),
    "wan21": lambda dtype: staged("wan21", dtype),
    "wan21_winograd": lambda dtype: staged("wan21", dtype, WINOGRAD),
    "magvit2": lambda dtype: staged("magvit2", dtype),
    "ltx": lambda dtype: staged("ltx", dtype),
    "refdecoder": lambda dtype: refdecoder(dtype),
    "refdecoder_windowed": lambda dtype: refdecoder(dtype, attention="windowed", window=2),
    "regen": lambda dtype: Case(regen().to(dtype), regen_latents().to(dtype)),
    "regen_in_context": lambda dtype: Case(regen(conditioning="in_context").to(dtype), regen_latents().to(dtype)),
}
STREAMS = [name for name in CASES if name not in ("ltx", "refdecoder")]
DTYPES = [torch.float32, torch.bfloat16]
BOTH = [
    *((name, torch.float32) for name in CASES),
    *((name, torch.bfloat16) for name in ("wan21", "refdecoder_windowed")),
]


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Without the shape checks that tests put around every function: what is refused, the code itself refuses."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize(("name", "dtype"), BOTH)
def test_the_callers_modes_change_nothing(name: str, dtype: torch.dtype) -> None:
    """Built and used in autocast and in inference mode it is what it is without."""
    case = CASES[name](dtype)
    case.model.train()
    modes, random = [module.training for module in case.model.modules()], torch.get_rng_state()
    fast = case.optimise()
    assert torch.equal(random, torch.get_rng_state())
    assert modes == [module.training for module in case.model.modules()]
    expected = case.decode(fast)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(case.decode(fast), expected)
        built = case.optimise()
    torch.testing.assert_close(case.decode(built), expected)
    with torch.inference_mode():
        built = case.optimise()
        torch.testing.assert_close(case.decode(built), expected)
    torch.testing.assert_close(case.decode(built), expected)
    assert not any(parameter.is_inference() for parameter in built.parameters())
    assert not case.decode(fast, case.latent.clone().requires_grad_()).requires_grad


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_goes_from_mode_to_mode_and_its_copies_with_it(name: str) -> None:
    case = CASES[name](torch.float32)
    fast, latent = case.optimise(), case.latent
    height, width = (side * case.model.stride_hw for side in latent.shape[3:])
    state = fast.start_stream(len(latent), height, width, **case.more)
    with torch.inference_mode():
        fast.step_stream(latent[:, :, 0], state)
    copied, written = copy.deepcopy(state), io.BytesIO()
    torch.save(state, written)
    written.seek(0)
    pickled = torch.load(written, weights_only=False)
    for wrong in (latent[:1, :, 1], latent[:, :-1, 1], latent[:, :, 1, :, :-1], latent[:, :, :2]):
        with pytest.raises(ValueError, match="latent"):
            fast.step_stream(wrong, state)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = fast.step_stream(latent[:, :, 1], state)  # what was refused left no trace
    for other in (copied, pickled):
        found = fast.step_stream(latent[:, :, 1].clone().requires_grad_(), other)
        assert not found.requires_grad
        torch.testing.assert_close(found, expected)
    fast.end_stream(state)
    with pytest.raises(ValueError, match="ended"):
        fast.step_stream(latent[:, :, 1], state)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", CASES)
def test_what_is_no_batch_of_latents_is_refused(name: str) -> None:
    case = CASES[name](torch.float32)
    fast = case.optimise()
    for wrong in (case.latent[:, :-1], case.latent[0], case.latent[:0], case.latent[:, :, :0]):
        with pytest.raises(ValueError, match="latent of shape .* this decoder reads"):
            case.decode(fast, wrong)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", CASES)
def test_what_is_not_finite_is_seen_in_its_own_clip_alone(name: str) -> None:
    case = CASES[name](torch.float32)
    fast = case.optimise()
    expected, latent = case.decode(fast), case.latent.clone()
    latent[0, 0, 0, 0, 0] = torch.nan
    found = case.decode(fast, latent)
    assert found[0].isnan().any() and not found[1].isnan().any()
    torch.testing.assert_close(case.decode(fast), expected)  # nothing of it stays


@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_of_any_number(dtype: torch.dtype) -> None:
    values = torch.tensor([torch.nan, torch.inf, -torch.inf, 9.0, -9.0, 0.0, 1.0, -1.0] * 9, dtype=dtype)
    assert to_uint8(values).tolist() == [0, 255, 0, 255, 0, 128, 255, 0] * 9


# ---- attention


def test_noise_does_not_choose_the_attention_of_a_cpu() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    alike = {"math": 0.9, "flash": 0.95, "folded": 1.0, "cpu_bf16": 1.2}
    assert attention._best(alike, cpu) == "folded"  # the one before it takes a third more
    assert attention._best(alike | {"cpu_bf16": 1.0}, cpu) == "cpu_bf16"
    assert attention._best(alike | {"cpu_bf16": 5.0, "folded": 5.0}, cpu) == "flash"
    assert attention._best(alike, cuda) == "math"


def test_no_kernel_writes_scores_that_would_fill_the_memory() -> None:
    q, k = torch.empty(1, 14_400, 24, 64, device="meta"), torch.empty(1, 28_800, 3, 64, device="meta")
    assert "whole score matrix" in attention.refused("math", q, k, k)


def test_fp8_attention_cannot_take_its_scales_from_a_file(tmp_path) -> None:
    model, clips = flash(), [flash_latents(3)]
    both = InferenceOptions(attention="triton_fp8", bits8="mlp")
    bits8.calibrate(optimise(model, KERNEL), "mlp", clips).save(tmp_path / "scales.safetensors")
    saved = bits8.Calibration.load(tmp_path / "scales.safetensors")
    with pytest.raises(ValueError, match="attention=triton_fp8 takes its scales from latents.*Calibration"):
        optimise(model, both, saved)
    clips[0][0, 0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="calibration latent 0 is not finite"):
        optimise(model, InferenceOptions(attention="triton_fp8"), clips)
