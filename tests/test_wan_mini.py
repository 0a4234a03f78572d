"""The linear start that wan_mini's training begins with, and the trained space that is in the repository."""

import json

import pytest
import torch
from safetensors.torch import load_file

from datamodules.clips import ClipData
from datamodules.config import ClipDataConfig, StreamConfig
from datamodules.procedural import draw_frames
from datamodules.samples import sample_sources
from datamodules.transforms import to_video
from decoders.backbones.wan import WanConfig, WanDecoder, WanEncoder
from decoders.baseline.linear_start import Band, linear_start, plan, skeleton
from decoders.latent_spaces import wan_mini
from decoders.latent_spaces.dct import DCT, DCTConfig, dc_decode
from decoders.latent_spaces.wan_mini import FOLDER, WanMini

TINY = WanConfig(dim=16, num_res_blocks=1)


@pytest.fixture(scope="module")
def tiny() -> tuple[WanEncoder, WanDecoder]:
    """A tiny autoencoder after the linear start, few iterations of its fit."""
    torch.manual_seed(0)
    pair = WanEncoder(TINY), WanDecoder(TINY)
    linear_start(*pair, iterations=40)
    return pair


def clip(frames: int = 9, size: tuple[int, int] = (64, 64)) -> torch.Tensor:
    """A drawn film "1 3 t h w"."""
    return to_video(draw_frames(3, 0, list(range(frames)), size))[None]


def psnr(prediction: torch.Tensor, target: torch.Tensor) -> float:
    return (10 * torch.log10(4 / (prediction.clamp(-1, 1) - target).square().mean())).item()


# ---- the linear start


def test_variance_of_packets_known_answer():
    """Two pixels of correlation r: the sum of an orthonormal pair has variance 1 + r, the difference 1 - r."""
    flat = Band(0).variance
    assert Band(0).finer("w", 1).variance == pytest.approx(flat * 1.95)
    assert Band(0).finer("w", -1).variance == pytest.approx(flat * 0.05)
    assert Band(0).finer("t", 1).variance == pytest.approx(flat * 0.95)


def test_latents_are_the_strongest_packets_for_images_and_for_clips():
    last = plan(WanConfig(dim=24))[-1]
    first, later = ([pair[side].variance for pair in last.bands[:16]] for side in (0, 1))
    assert first == sorted(first, reverse=True)
    assert min(first) >= max(pair[0].variance for pair in last.bands[16:])
    assert min(later) >= max(pair[1].variance for pair in last.bands[16:])
    assert all(len({pair[side] for pair in last.bands[:16]}) == 16 for side in (0, 1))


def test_start_is_linear(tiny):
    encoder, decoder = tiny
    video = clip()
    with torch.no_grad():
        grey = encoder(torch.zeros_like(video))[0]
        full, half = encoder(video)[0] - grey, encoder(video / 2)[0] - grey
        assert (full - 2 * half).abs().max() < 0.03 * full.abs().max()
        black = decoder(torch.zeros_like(grey))
        full, half = decoder(grey) - black, decoder(grey / 2) - black
        assert (full - 2 * half).abs().max() < 0.03 * (full.abs().max() + 1)


def test_start_is_silent_beside_its_shortcuts(tiny):
    encoder, decoder = tiny
    video = clip()
    with torch.no_grad():
        latent = encoder(video)[0]
        whole = decoder(latent)
        with skeleton(encoder, decoder):
            assert torch.equal(encoder(video)[0], latent)
            assert torch.equal(decoder(latent), whole)
        assert torch.equal(decoder(latent), whole)  # and the branches are back


def test_start_is_a_codec(tiny):
    """Better than one colour per cell, for an image and for a clip, before any training."""
    encoder, decoder = tiny
    video = clip()
    with torch.no_grad():
        for part in (video, video[:, :, :1]):
            assert psnr(decoder(encoder(part)[0]), part) > psnr(dc_decode(part, 4, 8), part) + 0.5


@pytest.mark.parametrize("change", [{"residual": True}, {"patch": 2}, {"dim_mult": (1, 2, 4, 8)}, {"channels": 64}])
def test_start_refuses_other_layouts(change):
    with pytest.raises(ValueError):
        plan(WanConfig(**({"dim": 8, "channels": 6} | change)))


# ---- the weights in the repository


@pytest.fixture(scope="module")
def space() -> WanMini:
    return WanMini()


def test_files_are_small_and_complete(space):
    space.require()
    size = sum((FOLDER / name).stat().st_size for name in (wan_mini.ENCODER, wan_mini.DECODER))
    assert size <= 17e6
    assert all(t.dtype == torch.bfloat16 for t in load_file(FOLDER / wan_mini.ENCODER).values())
    assert (space.channels, space.stride_t, space.stride_hw) == (16, 4, 8)
    config = json.loads((FOLDER / wan_mini.CONFIG).read_text())
    assert len(config["latents_mean"]) == 16 and min(config["latents_std"]) > 0


@pytest.mark.parametrize("frames", [1, 9])
def test_encodes_and_decodes(space, frames):
    video = clip(frames)
    latent = space.encode(video)
    assert latent.shape == (1, 16, 1 + frames // 4, 8, 8)
    assert psnr(space.decode(latent), video) > psnr(dc_decode(video, 4, 8), video)
    drawn = [space.encode(video, sample=True, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(*drawn) and not torch.equal(drawn[0], latent)


def test_bfloat16_is_nearly_the_same(space):
    video, half = clip(9), WanMini(wan_mini.WanMiniConfig("bfloat16"))
    exact, rounded = space.encode(video), half.encode(video)
    assert rounded.dtype == torch.float32 and not torch.equal(exact, rounded)
    assert (exact - rounded).std() < 0.02 * exact.std()
    assert abs(psnr(half.decode(rounded), video) - psnr(space.decode(exact), video)) < 0.1
    assert half.fingerprint == space.fingerprint


def test_fingerprint_is_of_the_weights(space, monkeypatch):
    assert space.fingerprint == WanMini().fingerprint
    changed = load_file(FOLDER / wan_mini.ENCODER)
    changed["encoder.conv_in.bias"] = changed["encoder.conv_in.bias"] + 1
    monkeypatch.setattr(wan_mini, "load_file", lambda path: changed)
    assert wan_mini._fingerprint.__wrapped__() != space.fingerprint


def test_diffusers_reads_it_and_agrees(space, tmp_path):
    AutoencoderKLWan = pytest.importorskip("diffusers").AutoencoderKLWan
    theirs = AutoencoderKLWan.from_pretrained(wan_mini.save_diffusers(tmp_path), torch_dtype=torch.float32).eval()
    video = clip(9)
    with torch.no_grad():
        latent = theirs.encode(video).latent_dist.mean
        mean, std = (torch.tensor(getattr(theirs.config, f"latents_{k}")).view(1, -1, 1, 1, 1) for k in ("mean", "std"))
        ours = space.encode(video)
        torch.testing.assert_close(ours, (latent - mean) / std, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(space.decode(ours), theirs.decode(latent).sample, atol=1e-3, rtol=1e-3)


def test_missing_files_are_named(monkeypatch, tmp_path, space):
    monkeypatch.setattr(wan_mini, "FOLDER", tmp_path)
    with pytest.raises(FileNotFoundError, match="encoder.safetensors"):
        space.require()


@pytest.mark.slow
def test_beats_the_closed_form_space_on_an_unseen_film(space):
    """carphone, 17 frames from each of five places: what entitles it to be a teacher."""
    carphone = {"carphone": StreamConfig(["carphone"], (144, 176), 17, batch_size=1)}
    data = ClipData(ClipDataConfig(sources=sample_sources(late_clips=5), val=carphone, num_workers=0))
    data.setup("validate")
    floor = DCT(DCTConfig(channels=16, stride_t=4, stride_hw=8))
    margins = []
    for batch in data.val_dataloader()[0]:
        scores = [psnr(s.decode(s.encode(batch["video"])), batch["video"]) for s in (space, floor)]
        margins.append(scores[0] - scores[1])
    assert len(margins) == 5 and sum(margins) / 5 > 0
