"""What only a GPU can show: bf16 kernels, autocast training, memory that stays put. Skipped, with a reason, without one."""

import pytest
import torch

from decoders.flashdecoder.model import MODES, SIZES, FlashDecoderConfig, FlashDecoderModel

pytestmark = pytest.mark.gpu


def decoder(size: str = "s", **changes) -> FlashDecoderModel:
    return FlashDecoderModel(FlashDecoderConfig(**SIZES[size], **changes), 48, 4, 16).cuda()


def test_bf16_streaming_is_within_bf16_of_fp32() -> None:
    model = decoder()
    latent = torch.randn(1, 48, 4, 14, 14, device="cuda")
    with torch.no_grad():
        exact = model(latent)
        rounded = model.bfloat16()(latent.bfloat16()).float()
    error = (rounded - exact).norm() / exact.norm()
    assert error < 2e-2


def test_modes_agree_on_the_gpu_in_values_and_gradients() -> None:
    model = decoder()
    latent = torch.randn(1, 48, 3, 8, 8, device="cuda")
    torch.backends.cuda.matmul.allow_tf32 = False
    outputs, gradients = {}, {}
    for mode in MODES:
        model.zero_grad()
        outputs[mode] = model(latent, mode=mode)
        outputs[mode].square().mean().backward()
        gradients[mode] = model.embed.weight.grad.clone()
    for mode in MODES:
        torch.testing.assert_close(outputs[mode], outputs["streaming"], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(gradients[mode], gradients["streaming"], atol=1e-5, rtol=1e-2)


def test_peak_memory_of_a_stream_does_not_grow() -> None:
    model = decoder().bfloat16()
    state = model.start_stream(1, 480, 832)
    latent = torch.randn(1, 48, 30, 52, device="cuda", dtype=torch.bfloat16)
    peaks = []
    with torch.no_grad():
        for _ in range(4):
            torch.cuda.reset_peak_memory_stats()
            for _ in range(50):
                model.step_stream(latent, state)
            peaks.append(torch.cuda.max_memory_allocated())
    assert max(peaks[1:]) == min(peaks[1:]), peaks


@pytest.mark.parametrize("size", [(480, 832), (1080, 1920)])
def test_a_training_step_with_checkpointing_fits(size: tuple[int, int]) -> None:
    """XL, streaming, 17 frames, bf16 autocast; 80 GB is what the paper's GPUs have."""
    model = decoder("xl", checkpointing=True)
    rows, columns = (-(-side // 16) for side in size)
    latent = torch.randn(1, 48, 5, rows, columns, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(latent).float().square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    # Adam's two moments are still to come: 8 bytes a parameter.
    assert torch.cuda.max_memory_allocated() + 8 * sum(p.numel() for p in model.parameters()) < 75e9
