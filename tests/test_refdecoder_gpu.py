"""RefDecoder where only a GPU can run it: full size, bf16 autocast, 28,080 tokens in the last stage. Skipped without one."""

import pytest
import torch

from decoders.refdecoder.model import RefDecoderConfig, RefDecoderModel, build_model

pytestmark = pytest.mark.gpu
ROWS, COLUMNS = 480 // 8, 832 // 8


def full_size(**changes) -> RefDecoderModel:
    return build_model(RefDecoderConfig(**changes), channels=16, stride_t=4, stride_hw=8).cuda()


def clip(frames: int) -> tuple[torch.Tensor, torch.Tensor]:
    latent = torch.randn(1, 16, frames, ROWS, COLUMNS, device="cuda")
    return latent, torch.rand(1, 3, 1, 480, 832, device="cuda") * 2 - 1


@pytest.mark.parametrize("changes", [{}, {"attention": "windowed", "residual": "both"}])
def test_a_training_step_of_17_frames_at_480p_fits(changes: dict) -> None:
    """80 GB, with Adam's two moments, an EMA and room for the encoder and LPIPS."""
    model = full_size(checkpointing=True, **changes)
    latent, reference = clip(5)
    torch.cuda.reset_peak_memory_stats()
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(latent, reference).float().clamp(-1, 1).abs().mean()
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    peak = torch.cuda.max_memory_allocated()
    print(f"{changes or 'full'}: {peak / 2**30:.1f} GiB")
    assert peak + 12 * sum(p.numel() for p in model.parameters()) < 65e9


def test_decoding_in_bf16_is_within_bf16_of_fp32() -> None:
    model = full_size(blocks=2)
    latent, reference = clip(2)
    exact = model.decode(latent, reference)
    with torch.autocast("cuda", torch.bfloat16):
        rounded = model.decode(latent, reference).float()
    assert (rounded - exact).norm() / exact.norm() < 5e-2


def test_time_beside_the_plain_decoder() -> None:
    """Prints both; what attention costs is no promise, but it must not be another order of magnitude."""
    model = full_size(residual="both").bfloat16()
    latent, reference = (x.bfloat16() for x in clip(5))
    seconds = {}
    for name, skip in (("attention", False), ("plain", True)):
        times = []
        for _ in range(4):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            model.decode(latent, None if skip else reference, skip=skip)
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end))
        seconds[name] = sorted(times[1:])[1]
    print(f"17 frames at 480x832, bf16: {seconds} ms")
    assert seconds["attention"] < 10 * seconds["plain"]
