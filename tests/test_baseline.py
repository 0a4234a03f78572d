"""The trainable baseline: which space fits which layout, encoder and decoder together, frozen statistics."""

import pytest
import torch

from decoders.baseline import Baseline
from decoders.baseline.model import BaselineConfig, build_decoder, build_encoder
from decoders.baseline.module import BaselineObjective
from decoders.latent_spaces.dct import DCT, DCTConfig
from decoders.latent_spaces.learned import Learned, LearnedConfig, draw, measure_statistics
from decoders.training import TrainingConfig
from experiments.config import load
from experiments.train import build
from losses.adversarial import DiscriminatorConfig

LAYOUT = {"dim": 4, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1}
SHAPE = {"channels": 4, "stride_t": 4, "stride_hw": 8}
WEIGHTS = {"l1": 1.0, "mse": 1.0, "lpips": 0.0, "kl": 1e-3}


def autoencoder(weights: dict | None = None, objective: BaselineObjective | None = None, **changes) -> Baseline:
    torch.manual_seed(0)
    config = BaselineConfig(**LAYOUT | {"train_encoder": True} | changes)
    training = TrainingConfig(loss_weights=weights or WEIGHTS)
    decoder = Baseline(config, objective or BaselineObjective(), Learned(LearnedConfig(**SHAPE)), training)
    decoder.setup("fit")
    return decoder


def batch(frames: int = 5) -> dict:
    return {"video": torch.rand(1, 3, frames, 16, 24) * 2 - 1, "key": ["clip"]}


# --- the learned space ------------------------------------------------------------------------------------------------


def test_the_learned_space_knows_sizes_and_cannot_encode():
    space = Learned(LearnedConfig(**SHAPE))
    assert space.latent_frames(9) == 3 and space.fingerprint.startswith("learned-")
    assert space.fingerprint == Learned(LearnedConfig(**SHAPE)).fingerprint
    assert space.fingerprint != Learned(LearnedConfig(channels=5, stride_t=4, stride_hw=8)).fingerprint
    with pytest.raises(ValueError, match="needs a family that trains one"):
        space.encode(torch.zeros(1, 3, 5, 16, 16))
    with pytest.raises(ValueError, match="nearest to 17x16 is 16x16 or 24x16"):
        space.encode(torch.zeros(1, 3, 5, 17, 16))
    with pytest.raises(ValueError, match="stride_t is 0"):
        LearnedConfig(stride_t=0)


def test_statistics_are_those_of_all_latents_together():
    clips = [torch.randn(1, 3, t, 8, 8) * 2 + 5 for t in (1, 5, 9)]
    offset = torch.tensor([1e4, 0.0, -3.0]).view(3, 1, 1, 1)
    mean, std = measure_statistics(lambda clip: clip + offset, clips)
    everything = torch.cat([(clip + offset).double() for clip in clips], dim=2)
    torch.testing.assert_close(mean, everything.mean(dim=(0, 2, 3, 4)))
    torch.testing.assert_close(std, everything.std(dim=(0, 2, 3, 4), correction=0))
    with pytest.raises(ValueError, match="no clips"):
        measure_statistics(lambda clip: clip, [])
    with pytest.raises(ValueError, match="channels 0, 1, 2 are constant"):
        measure_statistics(lambda clip: clip, [torch.ones(1, 3, 1, 8, 8)])


def test_draws_have_the_posteriors_moments_and_gradients():
    mean, log_variance = torch.full((1, 1, 1, 200, 200), 3.0), torch.full((1, 1, 1, 200, 200), 2.0).log() * 2
    mean.requires_grad_(), log_variance.requires_grad_()
    sample = draw(mean, log_variance, torch.Generator().manual_seed(1))
    assert sample.mean().item() == pytest.approx(3, abs=0.05) and sample.std().item() == pytest.approx(2, abs=0.05)
    assert torch.equal(sample, draw(mean, log_variance, torch.Generator().manual_seed(1)))
    sample.sum().backward()
    assert (mean.grad == 1).all()
    torch.testing.assert_close(log_variance.grad, 0.5 * (sample - mean).detach())


# --- layouts ----------------------------------------------------------------------------------------------------------


def test_defaults_are_wan21_and_its_sizes():
    with torch.device("meta"):
        decoder = build_decoder(BaselineConfig(), 16, 4, 8)
    assert sum(p.numel() for p in decoder.parameters()) == pytest.approx(73.3e6, rel=1e-3)
    assert decoder.config.temporal == (False, True, True)


@pytest.mark.parametrize("changes", [{}, {"residual": True}, {"dim_mult": [2, 2, 2], "patch": 2}])
def test_layouts_encode_to_the_spaces_shape_and_back(changes):
    config = BaselineConfig(**LAYOUT | changes)
    encoder, decoder = build_encoder(config, 4, 4, 8), build_decoder(config, 4, 4, 8)
    mean, log_variance = encoder(torch.rand(1, 3, 9, 16, 24) * 2 - 1)
    assert mean.shape == log_variance.shape == (1, 4, 3, 2, 3)
    assert log_variance.mean().item() == pytest.approx(-6, abs=0.5)  # narrow at the start
    assert decoder(mean).shape == (1, 3, 9, 16, 24)


def test_layouts_that_do_not_fit_the_space_are_refused():
    with pytest.raises(ValueError, match="a stride of 8 pixels, but the latent space has 16"):
        build_decoder(BaselineConfig(), 16, 4, 16)
    with pytest.raises(ValueError, match="powers of two up to 8"):
        build_decoder(BaselineConfig(), 16, 3, 8)
    with pytest.raises(ValueError, match="dim_mult"):
        BaselineConfig(dim_mult=[])
    with pytest.raises(ValueError, match="frozen dct space"):
        Baseline(BaselineConfig(train_encoder=True), BaselineObjective(), DCT(DCTConfig(**SHAPE)), TrainingConfig())
    with pytest.raises(ValueError, match="needs decoder.train_encoder=true"):
        Baseline(BaselineConfig(), BaselineObjective(), Learned(), TrainingConfig())


# --- training ---------------------------------------------------------------------------------------------------------


def test_the_loss_encodes_draws_and_repeats():
    decoder, clip = autoencoder(), batch()
    torch.manual_seed(1)
    terms = decoder.losses(clip)
    assert terms.keys() == {"l1", "mse", "kl"}
    assert all(torch.equal(terms[k], v) for k, v in decoder.losses(clip).items())  # of one step
    stale = {**clip, "latent": torch.full((1, 4, 2, 2, 3), 9.0)}
    assert torch.equal(decoder.losses(stale)["l1"], terms["l1"])  # a latent brought along is of no use
    torch.manual_seed(2)
    other = decoder.losses(clip)
    assert other["l1"] != terms["l1"] and torch.equal(other["kl"], terms["kl"])
    source = decoder.losses({**clip, "source": torch.zeros_like(clip["video"])})
    assert source["kl"] != terms["kl"]


def test_groups_inference_weights_and_terms():
    objective = BaselineObjective(crop=16, discriminator=DiscriminatorConfig(channels=4, num_layers=3), r1_interval=2)
    weights = WEIGHTS | {"gan_g": 0.1, "gan_d": 1.0, "r1": 0.1}
    decoder = autoencoder(weights, objective)
    assert [group["name"] for group in decoder.param_groups()] == ["encoder", "decoder", "discriminator"]
    kept = {name.split(".")[0] for name in decoder.inference_parameters()}
    assert kept == {"encoder", "model"}
    terms = decoder.losses(batch())
    assert terms.keys() == weights.keys() - {"lpips"}
    sum(decoder.weight(name) * value for name, value in terms.items()).backward()
    assert all(p.grad is not None for p in decoder.parameters())
    assert decoder.losses(batch(1)).keys() == {"l1", "mse", "kl"}  # images are not judged
    assert decoder.terms_may_be_absent


def test_over_a_frozen_space_only_the_decoder_is_trained():
    config = BaselineConfig(**LAYOUT)
    training = TrainingConfig(loss_weights={"l1": 1.0, "mse": 0.0, "lpips": 0.0})
    decoder = Baseline(config, BaselineObjective(), DCT(DCTConfig(**SHAPE)), training)
    decoder.setup("fit")
    assert decoder.terms == {"l1", "mse", "lpips"} and decoder.encoder is None and not decoder.trains_encoder
    clip = decoder.with_latent(batch())
    assert torch.equal(clip["latent"], decoder.latent_space.encode(clip["video"]))
    assert decoder.losses(clip).keys() == {"l1"}
    with pytest.raises(ValueError, match="trains no encoder"):
        decoder.freeze_statistics([clip["video"]])


def test_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        decoder = autoencoder(checkpointing=checkpointing)
        torch.manual_seed(1)
        sum(decoder.losses(batch()).values()).backward()
        gradients.append([p.grad for p in decoder.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)


# --- latents ----------------------------------------------------------------------------------------------------------


def test_encode_is_the_posteriors_mean_or_a_seeded_draw():
    decoder, video = autoencoder(), batch(9)["video"]
    mean, _ = decoder.encoder(video)
    torch.testing.assert_close(decoder.encode(video), mean.detach(), atol=1e-5, rtol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(decoder.encode(video), decoder.encode(video).float())
    draws = [decoder.encode(video, sample=True, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert not draws[0].requires_grad
    assert decoder.with_latent({"video": video, "key": ["clip"]})["latent"].shape == mean.shape


def test_frozen_statistics_normalise_latents_and_leave_pictures_alone():
    decoder, clips = autoencoder(), [batch(9)["video"] for _ in range(2)]
    before = decoder.decode(decoder.encode(clips[0]))
    mean, std = decoder.freeze_statistics(clips, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    latents = torch.cat([decoder.encode(clip, sample=True, generator=generator) for clip in clips])
    latents = latents.transpose(0, 1).flatten(1)
    torch.testing.assert_close(latents.mean(1), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.std(1, correction=0), torch.ones(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(decoder.decode(decoder.encode(clips[0])), before, atol=1e-4, rtol=0)
    again, _ = decoder.freeze_statistics(clips, torch.Generator().manual_seed(0))
    torch.testing.assert_close(again, mean)  # of what the encoder gives, not of what was normalised
    with pytest.raises(ValueError, match="no clips"):
        decoder.freeze_statistics([])
    torch.testing.assert_close(decoder.model.latent_std.flatten().double(), std, rtol=1e-5, atol=0)  # those from before
    config = {"mean": mean.tolist(), "std": std.tolist()}
    loaded = autoencoder(**config)  # the same weights, seeded, and the numbers from a configuration
    torch.testing.assert_close(loaded.encode(clips[0]), decoder.encode(clips[0]))


def test_the_debug_experiment_is_a_whole_autoencoder():
    decoder = build(load("baseline_debug"))
    assert decoder.trains_encoder and decoder.terms == {"l1", "mse", "lpips", "kl"}
