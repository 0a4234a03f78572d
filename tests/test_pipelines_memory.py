"""Decoders in pipelines: bounded memory, precision, devices, offloading, noise."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pipeline_small import by_hand, call, exported, latents_of, pipeline, reference_of, same
from tiny_pipelines import tiny_pipeline as new_pipeline
from torch import Tensor

from decoders.exported import ExportError
from decoders.pipelines import for_pipeline, swap
from decoders.pipelines.tiles import decode_in_tiles

# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["flashdecoder", "flash_vaed", "windowed", "regen"])
def test_tiling_is_streaming_where_the_decoder_streams(name):
    decoder, latent = exported("wan", name), latents_of("wan_i2v")
    adapter = for_pipeline(decoder, pipeline("wan_i2v").vae)
    adapter.reference = reference_of("wan_i2v")
    whole = adapter.decode(adapter.denormalise(latent)).sample
    adapter.enable_tiling(tile_sample_min_height=16, tile_sample_stride_height=8)
    steps = []
    step = decoder.network.step_stream
    decoder.network.step_stream = lambda *given: steps.append(given[0].shape) or step(*given)
    try:
        streamed = adapter.decode(adapter.denormalise(latent)).sample
    finally:
        del decoder.network.step_stream
    torch.testing.assert_close(streamed, whole, atol=1e-4, rtol=0)
    if name != "flashdecoder":  # the families' own decode may stream too; this one counts the adapter's alone
        assert steps
    adapter.disable_tiling()
    assert torch.equal(adapter.decode(adapter.denormalise(latent)).sample, whole)


def test_ltx_is_decoded_in_tiles():
    """As near to the whole picture as diffusers' own tiles are; of this random network that is not very near."""
    own = copy.deepcopy(pipeline("ltx_t2v").vae)
    adapter = for_pipeline(exported("ltx", "own"), own)
    raw = adapter.denormalise(torch.randn(1, 8, 2, 5, 7))
    whole = own.decode(raw).sample.clamp(-1, 1)  # as ours does
    adapter.enable_tiling()
    torch.testing.assert_close(adapter.decode(raw).sample, whole, atol=1e-4, rtol=0)  # fits one tile
    for apart in (96, 64):
        ours, theirs = (
            (part.enable_tiling(128, 128, 16, apart, apart, 8), part.decode(raw).sample.clamp(-1, 1))[1]
            for part in (adapter, own)
        )
        assert ours.shape == whole.shape
        assert 0 < (ours - whole).square().mean() < 1.1 * (theirs - whole).square().mean() < whole.square().mean()
    adapter.enable_tiling(tile_sample_stride_height=48)
    with pytest.raises(ValueError, match="multiples of 32"):
        adapter.decode(raw)


def test_tiles_of_what_is_local_are_the_whole():
    def enlarged(latent: Tensor) -> Tensor:
        return latent[:, :3].repeat_interleave(8, 3).repeat_interleave(8, 4)

    latent = torch.randn(2, 4, 3, 9, 13)
    for tile, step in (((32, 32), (16, 24)), ((40, 64), (40, 64)), ((8, 8), (8, 8)), ((800, 16), (800, 8))):
        torch.testing.assert_close(decode_in_tiles(enlarged, latent, 8, tile, step), enlarged(latent))


def test_tiling_is_refused_where_attention_sees_everything():
    adapter = for_pipeline(exported("wan", "refdecoder"))
    with pytest.raises(ExportError, match="leave enable_tiling out"):
        adapter.enable_tiling()


# --- precision, devices, noise ---------------------------------------------------------------------------------------


def test_a_bfloat16_decoder_gets_latents_that_were_denormalised_in_float32():
    pipe, low = new_pipeline("wan_t2v"), copy.deepcopy(exported("wan", "flashdecoder")).to(torch.bfloat16)
    with swap(pipe, low) as adapter:
        assert (adapter.dtype, adapter.compute_dtype) == (torch.float32, torch.bfloat16)
        frames = call(pipe, "wan_t2v")
    exact = by_hand(low, "wan_t2v")
    assert np.abs(frames - exact).max() < 0.02  # a latent that is rounded to its neighbour
    assert np.abs(frames - exact).mean() < 1e-3


@pytest.mark.parametrize("name", ["flashdecoder", "own"])
def test_an_ltx_pipeline_in_bfloat16_has_rounded_statistics(name):
    """They are buffers of LTX's autoencoder, and are cast with it: the same latents nevertheless, by the decoder's own numbers."""
    pipe, decoder = new_pipeline("ltx_t2v"), exported("ltx", name)
    pipe.vae.to(torch.bfloat16)
    with swap(pipe, decoder) as adapter:
        assert adapter.mean.tolist() == pytest.approx(decoder.space.mean, rel=1e-7)
        assert adapter.latents_std.tolist() != pipe.vae.own.vae.latents_std.tolist()
        same(call(pipe, "ltx_t2v"), by_hand(decoder, "ltx_t2v"))
    pipe.vae.latents_mean += 0.05
    with pytest.raises(ExportError, match="another mean"):
        swap(pipe, decoder)


def test_moving_a_pipeline_moves_decoder_and_encoder_and_keeps_the_statistics():
    pipe = new_pipeline("wan_i2v")
    mean = torch.tensor(pipe.vae.config.latents_mean)
    swapped = swap(pipe, copy.deepcopy(exported("wan", "flashdecoder")))
    pipe.to(torch.bfloat16)
    assert swapped.adapter.compute_dtype == torch.bfloat16
    assert next(pipe.vae.encoder.parameters()).dtype == torch.bfloat16
    assert torch.equal(swapped.adapter.mean, mean)
    assert np.isfinite(call(pipe, "wan_i2v")).all()
    swapped.undo()
    swapped.undo()
    assert type(pipe.vae).__name__ == "AutoencoderKLWan"


def test_offloading_hooks_run_before_encoding_and_decoding():
    adapter = for_pipeline(exported("wan", "flashdecoder"), pipeline("wan_t2v").vae)
    seen = []
    adapter._hf_hook = SimpleNamespace(pre_forward=seen.append)
    adapter.encode(torch.zeros(1, 3, 1, 16, 16))
    assert seen == [adapter]
    adapter.decode(torch.zeros(1, 16, 1, 2, 2))
    assert seen == [adapter] * 2
    with pytest.raises(ValueError, match="does not support group offloading"):
        adapter.enable_group_offload(onload_device=torch.device("cpu"))


@pytest.mark.parametrize("kind", ["wan_i2v", "ltx_t2v"])
def test_offloading_by_accelerate_outlasts_the_swap(kind):
    """The hooks are those of a GPU; only the device that they bring parts to is the CPU."""
    pipe, decoder = new_pipeline(kind), exported(kind.partition("_")[0], "flash_vaed")
    own, expected = pipe.vae, call(pipe, kind)
    swapped = swap(pipe, decoder)
    pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):  # diffusers lays its hooks anew after every call
        assert hasattr(swapped.adapter, "_hf_hook")
        same(call(pipe, kind), by_hand(decoder, kind))
    swapped.undo()
    assert pipe.vae is own and hasattr(own, "_hf_hook") and not hasattr(swapped.adapter, "_hf_hook")
    np.testing.assert_array_equal(call(pipe, kind), expected)


def test_sequential_offloading_leaves_the_decoder_whole():
    pipe = new_pipeline("wan_t2v")
    swapped = swap(pipe, copy.deepcopy(exported("wan", "flashdecoder")))
    pipe.enable_sequential_cpu_offload(device="cpu")
    assert not any(hasattr(module, "_hf_hook") for module in swapped.adapter.modules())
    assert any(hasattr(module, "_hf_hook") for module in pipe.transformer.modules())
    pipe.remove_all_hooks()
    swapped.undo()
    assert pipe._exclude_from_cpu_offload == type(pipe)._exclude_from_cpu_offload


def test_swapping_into_an_offloaded_pipeline_is_refused():
    pipe = new_pipeline("wan_t2v")
    pipe.vae._hf_hook = SimpleNamespace(pre_forward=lambda module: None)
    with pytest.raises(ExportError, match="swap first"):
        swap(pipe, exported("wan", "flashdecoder"))


def test_noise_of_a_sampled_decoder_is_that_of_the_seed():
    decoder = exported("wan", "regen")
    own, latent = pipeline("wan_t2v").vae, latents_of("wan_t2v")
    videos = []
    for seed in (None, None, 3, 3, 4):
        adapter = for_pipeline(decoder, own, seed=seed)
        videos.append(adapter.decode(adapter.denormalise(latent)).sample)
    by_default, again, three, three_again, four = videos
    assert torch.equal(by_default, again) and torch.equal(three, three_again)
    assert not torch.equal(three, four) and not torch.equal(three, by_default)
    expected = decoder.decode(latent, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(three, expected, atol=1e-4, rtol=0)
    adapter = for_pipeline(decoder, own, sampling={"steps": 2})
    expected = decoder.decode(latent, steps=2)
    torch.testing.assert_close(adapter.decode(adapter.denormalise(latent)).sample, expected, atol=1e-4, rtol=0)


def test_ltx_conditioned_on_a_time_step_adds_no_noise():
    from diffusers import AutoencoderKLLTXVideo

    pipe = new_pipeline("ltx_t2v")
    config = {**pipe.vae.config, "timestep_conditioning": True}
    vae = AutoencoderKLLTXVideo(**{k: v for k, v in config.items() if not k.startswith("_")}).eval()
    vae.latents_mean, vae.latents_std = pipe.vae.latents_mean, pipe.vae.latents_std
    pipe.register_modules(vae=vae)
    decoder = exported("ltx", "flashdecoder")
    with swap(pipe, decoder) as adapter:
        same(call(pipe, "ltx_t2v", decode_timestep=0.05, decode_noise_scale=0.5), by_hand(decoder, "ltx_t2v"))
        raw = adapter.denormalise(latents_of("ltx_t2v"))
        assert torch.equal(adapter.decode(raw, torch.zeros(1)).sample, adapter.decode(raw, None, return_dict=False)[0])
        with pytest.raises(ExportError, match="free of noise"):
            adapter.decode(raw, torch.tensor([0.05]))
