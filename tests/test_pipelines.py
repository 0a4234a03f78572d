"""Every family in the place of the autoencoder of diffusers' own pipelines, small and random: equal to decoding by hand."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pipeline_small import (
    SUITABLE,
    by_hand,
    call,
    exported,
    folder_of,
    frames_of,
    latents_of,
    pipeline,
    reference_of,
    same,
    trained,
)
from tiny_pipelines import IMAGE_KINDS, NUM_FRAMES, SIZES, call_arguments, space_of, tiny_image
from tiny_pipelines import tiny_pipeline as new_pipeline
from torch import nn

import decoders
from decoders.exported import ExportError, save
from decoders.pipelines import for_pipeline, swap
from decoders.pipelines.swapping import _require_module
from experiments.config import load
from experiments.train import build

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(("kind", "name"), SUITABLE)
def test_a_pipeline_gives_what_decoding_its_latents_by_hand_gives(kind, name):
    decoder, pipe = exported(space_of(kind), name), pipeline(kind)
    own = pipe.vae
    with swap(pipe, decoder) as adapter:
        assert pipe.vae is adapter
        frames = call(pipe, kind)
    assert pipe.vae is own
    height, width = SIZES[space_of(kind)]
    assert frames.shape == (1, NUM_FRAMES[space_of(kind)], height, width, 3)
    same(frames, by_hand(decoder, kind))


@pytest.mark.parametrize("kind", ["wan_t2v", "wan22_t2v", "ltx_t2v"])
def test_the_own_decoder_through_the_adapter_is_the_pipeline(kind):
    expected = call(pipeline(kind), kind)
    with swap(pipeline(kind), exported(space_of(kind), "own")):
        same(call(pipeline(kind), kind), expected)
    with swap(pipeline(kind), exported(space_of(kind), "flashdecoder")):
        assert np.abs(call(pipeline(kind), kind) - expected).max() > 0.05


def test_output_types():
    with swap(pipeline("wan_t2v"), exported("wan", "flash_vaed")):
        frames = call(pipeline("wan_t2v"), "wan_t2v")
        tensor = call(pipeline("wan_t2v"), "wan_t2v", "pt")
        pictures = call(pipeline("wan_t2v"), "wan_t2v", "pil")
        latent = call(pipeline("wan_t2v"), "wan_t2v", "latent")
        (as_tuple,) = pipeline("wan_t2v")(**call_arguments("wan_t2v"), output_type="np", return_dict=False)
    assert tensor.dtype == torch.float32
    np.testing.assert_array_equal(tensor.permute(0, 1, 3, 4, 2).numpy(), frames)
    assert [picture.size for picture in pictures[0]] == [(48, 32)] * 5
    np.testing.assert_array_equal(np.stack([np.asarray(p) for p in pictures[0]]), (frames[0] * 255).round())
    assert torch.equal(latent, latents_of("wan_t2v"))
    np.testing.assert_array_equal(as_tuple, frames)


@pytest.mark.parametrize("kind", IMAGE_KINDS)
def test_images_are_encoded_by_the_pipelines_own_autoencoder(kind):
    with swap(pipeline(kind), exported(space_of(kind), "flashdecoder")):
        latent = call(pipeline(kind), kind, "latent")
    assert torch.equal(latent, call(pipeline(kind), kind, "latent"))


def test_video_to_video_counts_its_frames_by_the_adapter():
    from diffusers import WanVideoToVideoPipeline

    film = [tiny_image(32, 48, seed) for seed in range(5)]
    given = {name: call_arguments("wan_t2v")[name] for name in ("prompt", "height", "width", "max_sequence_length")}
    with swap(pipeline("wan_t2v"), exported("wan", "flash_vaed")) as adapter:
        assert adapter.temperal_downsample == adapter.own.vae.temperal_downsample
        pipe = WanVideoToVideoPipeline.from_pipe(pipeline("wan_t2v"), vae=adapter)
        pipe.set_progress_bar_config(disable=True)
        frames = pipe(video=film, strength=0.5, num_inference_steps=2, output_type="np", **given).frames
    assert frames.shape == (1, 5, 32, 48, 3) and np.isfinite(frames).all()


# --- references ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["wan_i2v", "wan22_i2v"])
def test_the_input_image_is_the_reference_of_one_call(kind):
    decoder, pipe = exported(space_of(kind), "refdecoder"), pipeline(kind)
    latent = latents_of(kind)
    without = frames_of(decoder.decode(latent))
    assert np.abs(by_hand(decoder, kind) - without).max() > 1e-3
    with swap(pipe, decoder) as adapter:
        same(call(pipe, kind), by_hand(decoder, kind))
        raw = adapter.denormalise(latent)
        same(frames_of(adapter.decode(raw).sample), without)  # the image belonged to the call before
        adapter.reference = -reference_of(kind)
        given = frames_of(decoder.decode(latent, reference=-reference_of(kind)))
        same(call(pipe, kind), given)  # what the caller sets stands above the image
        same(frames_of(adapter.decode(raw).sample), given)


def test_a_last_image_is_a_second_reference():
    decoder, kind = exported("wan", "refdecoder"), "wan_i2v"
    last = tiny_image(32, 48, seed=1)
    with swap(pipeline(kind), decoder):
        frames = call(pipeline(kind), kind, last_image=last)
        latent = call(pipeline(kind), kind, "latent", last_image=last)
    both = torch.cat([reference_of(kind), reference_of(kind, last)], dim=2)
    same(frames, frames_of(decoder.decode(latent, reference=both)))


def test_one_image_serves_all_videos_of_its_call():
    decoder, kind = exported("wan", "refdecoder"), "wan_i2v"
    with swap(pipeline(kind), decoder) as adapter:
        frames = call(pipeline(kind), kind, num_videos_per_prompt=2)
        latent = call(pipeline(kind), kind, "latent", num_videos_per_prompt=2)
        expected = frames_of(decoder.decode(latent, reference=reference_of(kind).repeat(2, 1, 1, 1, 1)))
        same(frames, expected)
        adapter.enable_slicing()
        same(call(pipeline(kind), kind, num_videos_per_prompt=2), expected)
        adapter.reference = reference_of(kind).repeat(3, 1, 1, 1, 1)
        with pytest.raises(ExportError, match="3 references for 2 clips"):
            call(pipeline(kind), kind, num_videos_per_prompt=2)


# --- building, saving, swapping --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["wan_t2v", "wan_i2v", "wan22_i2v", "ltx_i2v"])
def test_from_pretrained_takes_it_and_reads_the_autoencoder_only_to_encode(kind):
    space = space_of(kind)
    decoder = exported(space, "flashdecoder")
    adapter = for_pipeline(decoder, folder_of(space))
    given = {"vae": adapter, "transformer": pipeline(kind).transformer}  # to read Wan's, diffusers needs accelerate
    pipe = type(pipeline(kind)).from_pretrained(folder_of(space), **given)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.vae is adapter and not adapter.own.is_loaded
    same(call(pipe, kind), by_hand(decoder, kind))
    assert adapter.own.is_loaded == (kind in IMAGE_KINDS)


def test_without_the_own_autoencoder_text_to_video_works_and_encoding_says_what_is_missing():
    decoder = exported("wan", "flashdecoder")
    parts = dict(pipeline("wan_t2v").components) | {"vae": for_pipeline(decoder)}
    pipe = type(pipeline("wan_t2v"))(**parts)
    pipe.set_progress_bar_config(disable=True)
    same(call(pipe, "wan_t2v"), by_hand(decoder, "wan_t2v"))
    with pytest.raises(ExportError, match=r"vae=pipe\.vae"):
        pipe.vae.encode(torch.zeros(1, 3, 1, 16, 16))


def test_an_autoencoder_that_is_whole_encodes_too():
    """A pipeline whose decoder brings its encoder needs no other."""
    decoder, pipe = decoders.load(folder_of("wan")), pipeline("wan_i2v")
    assert decoder.can_encode
    adapter = for_pipeline(decoder)
    image = reference_of("wan_i2v")
    torch.testing.assert_close(
        adapter.encode(image).latent_dist.mode(), pipe.vae.encode(image).latent_dist.mode(), atol=1e-4, rtol=0
    )
    assert torch.equal(adapter.encode(image, False)[0].sample(), adapter.encode(image).latent_dist.mode())


def test_a_bare_network_needs_the_autoencoders_statistics():
    network = exported("wan", "flash_vaed").network
    with pytest.raises(ExportError, match="as vae"):
        for_pipeline(network)
    with swap(pipeline("wan_t2v"), network) as adapter:
        assert adapter.can_stream
        same(call(pipeline("wan_t2v"), "wan_t2v"), by_hand(exported("wan", "flash_vaed"), "wan_t2v"))


def test_a_trained_module_is_taken_as_it_is():
    decoder = trained("wan", "windowed")
    with swap(pipeline("wan_i2v"), decoder) as adapter:
        assert adapter.can_stream and adapter.uses_reference
        same(call(pipeline("wan_i2v"), "wan_i2v"), by_hand(decoder, "wan_i2v"))


def test_uint8_of_an_optimised_form_reaches_the_pipeline():
    from decoders.inference import InferenceOptions

    decoder = exported("wan", "flash_vaed").optimised(InferenceOptions(uint8=True))
    with swap(pipeline("wan_t2v"), decoder) as adapter:
        frames = call(pipeline("wan_t2v"), "wan_t2v")
        adapter.enable_tiling()
        np.testing.assert_array_equal(call(pipeline("wan_t2v"), "wan_t2v"), frames)
    expected = by_hand(exported("wan", "flash_vaed"), "wan_t2v")
    assert np.abs(frames - expected).max() < 0.51 / 255 + 1e-3


def test_a_pipeline_is_not_saved_with_a_decoder_in_it(tmp_path):
    pipe = new_pipeline("wan_t2v")
    swapped = swap(pipe, exported("wan", "flashdecoder"))
    with pytest.raises(ExportError, match="take it out first"):
        pipe.save_pretrained(tmp_path / "no")
    swapped.undo()
    pipe.save_pretrained(tmp_path / "yes")
    again = type(pipe).from_pretrained(tmp_path / "yes", transformer=pipe.transformer)
    assert type(again.vae).__name__ == "AutoencoderKLWan"


def test_swaps_nest_and_are_undone_when_a_call_fails():
    pipe = pipeline("wan_i2v")
    own = pipe.vae
    with swap(pipe, exported("wan", "flashdecoder")) as first:
        with swap(pipe, exported("wan", "flash_vaed")) as second:
            assert pipe.vae is second and second.own.vae is own
        assert pipe.vae is first
        with pytest.raises(ZeroDivisionError), swap(pipe, exported("wan", "flash_vaed")):
            raise ZeroDivisionError
        assert pipe.vae is first
    assert pipe.vae is own
    assert pipe.config.vae == ("diffusers", "AutoencoderKLWan")


# --- what does not fit -----------------------------------------------------------------------------------------------


def test_other_latents_are_refused():
    flash = exported("wan", "flashdecoder")
    with pytest.raises(ExportError, match="channels=16, the pipeline's latents have channels=48"):
        for_pipeline(flash, pipeline("wan22_t2v").vae)
    from diffusers import AutoencoderKLWan

    other = AutoencoderKLWan(base_dim=4, num_res_blocks=1, latents_mean=[0.0] * 16, latents_std=[1.0] * 16)
    with pytest.raises(ExportError, match="another mean"):
        for_pipeline(flash, other)
    with pytest.raises(ExportError, match="AutoencoderKLWan and AutoencoderKLLTXVideo"):
        from diffusers import AutoencoderKLMochi

        for_pipeline(flash, AutoencoderKLMochi(**MOCHI))
    with pytest.raises(ExportError, match="no video autoencoder"):
        swap(SimpleNamespace(vae=nn.Linear(1, 1)), flash)
    with pytest.raises(ExportError, match="has no vae"):
        swap(SimpleNamespace(), flash)
    with pytest.raises(FileNotFoundError, match="looked for"):
        for_pipeline(flash, folder_of("wan") / "nowhere")
    for no_module in ("exports/flashdecoder", None):
        with pytest.raises(ExportError, match=r"give decoders\.load"):
            _require_module(no_module)  # what both doors ask first; in tests their annotations are asked even before
    adapter = for_pipeline(flash)
    with pytest.raises(ExportError, match=r"takes \(b, 16, n, y, x\)"):
        adapter.decode(torch.zeros(1, 48, 1, 2, 2))
    with pytest.raises(ExportError, match="stands in"):
        for_pipeline(adapter)
    with pytest.raises(ExportError, match="stands in"):
        for_pipeline(flash, adapter)
    with pytest.raises(ExportError, match="leave kind out"):
        for_pipeline(flash, pipeline("wan_t2v").vae, kind="ltx")


MOCHI = {
    "encoder_block_out_channels": (32, 32, 32, 32),
    "decoder_block_out_channels": (32, 32, 32, 32),
    "layers_per_block": (1, 1, 1, 1, 1),
}


def test_a_space_without_statistics_needs_the_autoencoder(tmp_path):
    decoder = decoders.load(save(tmp_path / "dct", build(load("flashdecoder_debug")), {}))
    with pytest.raises(ExportError, match="states no statistics"):
        for_pipeline(decoder)


def test_importing_the_room_imports_nothing():
    code = "import sys, decoders.pipelines; print([m for m in ('torch', 'diffusers', 'lightning') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.slow
def test_inference_in_a_pipeline_imports_no_training_code():
    code = (
        "import sys, decoders.pipelines as p; p.swap; "
        "print([m for m in ('lightning', 'omegaconf', 'losses', 'metrics', 'datamodules') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert run.stdout.strip() == "[]"
