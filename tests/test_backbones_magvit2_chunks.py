"""MAGVIT-v2's autoencoder in chunks that are coded by themselves, as REGEN's paper has it: lengths, clips, streams, memory."""

import pytest
import torch

from decoders.backbones.magvit2 import Magvit2Decoder, Magvit2Encoder, layout
from decoders.backbones.magvit2_layers import CausalConv3d
from decoders.baseline import Baseline
from decoders.baseline.model import BaselineConfig
from decoders.baseline.module import BaselineObjective
from decoders.latent_spaces.learned import Learned, LearnedConfig
from decoders.training import TrainingConfig
from experiments.compose import ConfigError
from experiments.config import load
from experiments.train import build

SMALL = {"channels": 8, "res_blocks": 1, "latent_channels": 4}
SLOW = [pytest.param(k, rest, marks=pytest.mark.slow) for k, rest in ((4, "image"), (8, "part"), (8, "whole"))]
CHUNKS = {4: 17, 8: 17, 16: 17, 32: 33}  # the paper's


def film(t: int) -> torch.Tensor:
    return torch.rand(1, 3, t, 16, 24) * 2 - 1


def magvit2(chunk: int | None = None) -> BaselineConfig:
    return BaselineConfig(backbone="magvit2", magvit2=layout(4, **SMALL, chunk=chunk), train_encoder=True)


@pytest.mark.parametrize(("k", "rest"), [(4, "whole"), (4, "part"), (16, "image"), (32, "whole"), *SLOW])
def test_chunks_are_coded_as_if_each_were_the_whole(k: int, rest: str):
    chunk = CHUNKS[k]
    lengths = [chunk, chunk, *{"whole": [], "image": [1], "part": [1 + k] if 1 + k < chunk else [1]}[rest]]
    config = layout(k, **SMALL, chunk=chunk)
    encoder, decoder = Magvit2Encoder(config, variational=True), Magvit2Decoder(config)
    video = film(sum(lengths))
    space = Learned(LearnedConfig(channels=4, stride_t=k, stride_hw=8, chunk=chunk))
    for encode in (encoder, encoder.encode_in_chunks):
        parts = [encode(part) for part in video.split(lengths, dim=2)]
        for whole, each in zip(encode(video), zip(*parts, strict=True), strict=True):
            assert torch.equal(whole, torch.cat(each, 2))
    latent, _ = encoder(video)
    assert latent.shape[2] == space.latent_frames(video.shape[2]) == sum(part[0].shape[2] for part in parts)
    sizes = [part[0].shape[2] for part in parts]
    apart = torch.cat([decoder(part) for part in latent.split(sizes, dim=2)], 2)
    assert torch.equal(decoder(latent), apart) and apart.shape == video.shape
    assert space.pixel_frames(latent.shape[2]) == video.shape[2]
    torch.testing.assert_close(decoder.decode(latent), apart.clamp(-1, 1), atol=1e-5, rtol=0)
    causal = Magvit2Decoder(layout(k, **SMALL))
    causal.load_state_dict(decoder.state_dict())
    torch.testing.assert_close(causal(latent)[:, :, :chunk], apart[:, :, :chunk], atol=1e-5, rtol=0)
    assert (causal(latent)[:, :, chunk : chunk + 1] - apart[:, :, chunk : chunk + 1]).abs().max() > 1e-3


@pytest.mark.parametrize("k", [4, 16])
def test_a_stream_in_chunks_starts_anew_and_remembers_no_more(k: int):
    decoder = Magvit2Decoder(layout(k, **SMALL, chunk=17))
    latent, whole = torch.randn(1, 4, 2 * (1 + 16 // k) + 1, 2, 3), decoder.config.chunk_latents
    state, frames, held = decoder.start_stream(1, 16, 24), [], []
    for frame in latent.unbind(2):
        frames.append(decoder.step_stream(frame, state))
        held.append(state.num_bytes())
    assert [part.shape[2] for part in frames] == [1 if i % whole == 0 else k for i in range(latent.shape[2])]
    torch.testing.assert_close(torch.cat(frames, 2), decoder(latent).clamp(-1, 1), atol=1e-5, rtol=0)
    assert len(set(held)) == 1


def test_memory_does_not_grow_with_the_number_of_chunks(monkeypatch):
    config = layout(4, **SMALL, chunk=17)
    encoder, decoder, seen = Magvit2Encoder(config), Magvit2Decoder(config), []
    for half in (encoder, decoder):
        for module in half.modules():
            if isinstance(module, CausalConv3d):
                module.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[2]))
    latent, _ = encoder.encode_in_chunks(film(3 * 17))
    decoder.decode(latent)
    assert max(seen) <= 4  # frames in a layer at once


@pytest.mark.parametrize(("k", "chunk"), [(4, 17), (8, 17), (16, 17), (32, 33), (4, 5), (4, 1), (1, 3)])
def test_lengths_of_a_space_in_chunks_go_there_and_back(k: int, chunk: int):
    space = Learned(LearnedConfig(channels=4, stride_t=k, stride_hw=8, chunk=chunk))
    valid = [space.pixel_frames(n) for n in range(1, 40)]
    assert valid == sorted(set(valid)) and valid[0] == 1
    for n, t in enumerate(valid, 1):
        assert space.latent_frames(t) == n and space.padded_frames(t) == t
    for t in range(1, valid[-1]):
        assert space.padded_frames(t) == min(length for length in valid if length >= t)
        if t not in valid:
            below = max(length for length in valid if length < t)
            with pytest.raises(
                ValueError, match=rf"{t} frames: .* the nearest are {below} and {space.padded_frames(t)}"
            ):
                space.latent_frames(t)
            with pytest.raises(ValueError, match=f"{t} frames: .* the nearest are {below} and"):
                Magvit2Encoder(layout(4, **SMALL, chunk=chunk)).forward(film(t)) if k == 4 and t < 40 else space.check(
                    t, 8, 8
                )


def test_chunks_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="such as 13 or 17"):
        LearnedConfig(stride_t=4, chunk=16)
    with pytest.raises(ValueError, match="magvit2: a chunk of 16 frames"):
        layout(4, chunk=16)
    plain = Learned(LearnedConfig(channels=4, stride_t=4, stride_hw=8))
    anew = Learned(LearnedConfig(channels=4, stride_t=4, stride_hw=8, chunk=17))
    assert plain.fingerprint != anew.fingerprint and not hasattr(plain, "chunk")
    for space, config in ((plain, magvit2(chunk=17)), (anew, magvit2())):
        with pytest.raises(ValueError, match="both say after how many frames coding starts anew"):
            Baseline(config, BaselineObjective(), space, TrainingConfig())
    with pytest.raises(ConfigError, match="a setting of the baseline"):
        build(load("regen_debug", ["decoder.encoder.chunk=17"]))


def test_the_baseline_in_chunks_codes_decodes_and_streams_alike():
    space = Learned(LearnedConfig(channels=4, stride_t=4, stride_hw=8, chunk=17))
    training = TrainingConfig(loss_weights={"l1": 1.0, "mse": 0.0, "lpips": 0.0, "kl": 1e-6}, pad="replicate")
    decoder = Baseline(magvit2(chunk=17), BaselineObjective(), space, training)
    video = film(33)
    latent = decoder.encode(video)
    assert latent.shape[2] == 10
    filled = torch.cat([video, video[:, :, -1:]], 2)
    parts = torch.cat([decoder.encode(part) for part in filled.split(17, dim=2)], 2)
    torch.testing.assert_close(latent, parts, atol=1e-6, rtol=0)
    shown = decoder.decode(latent, size=(33, 16, 24))
    state = decoder.start_stream(1, 16, 24)
    streamed = torch.cat([decoder.step_stream(frame, state) for frame in latent.unbind(2)], 2)
    torch.testing.assert_close(streamed[:, :, :33], shown, atol=1e-5, rtol=0)
    groups = decoder.frame_groups({"video": video, "key": ["a"]})
    assert groups["seam"].nonzero().tolist() == [[0, 17]] and groups["inside"][0].sum() == 31
    assert decoder.frame_groups({"video": video[:, :, :17], "key": ["a"]}) == {}
    assert decoder.losses({"video": filled, "key": ["a"]}).keys() == {"l1", "kl"}
