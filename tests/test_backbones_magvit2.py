"""MAGVIT-v2's autoencoder: what latents may depend on, the paper's frame counts and sizes, streams, what is refused."""

import pytest
import torch
from einops import rearrange
from torch.nn import functional as F

from decoders.backbones.magvit2 import (
    LAYOUTS,
    Magvit2Config,
    Magvit2Decoder,
    Magvit2Encoder,
    layout,
    num_parameters,
    widened,
)
from decoders.backbones.magvit2_layers import NORMS, CausalConv3d, FrameGroupNorm, Upsample
from decoders.baseline import Baseline
from decoders.baseline.model import BaselineConfig, build_decoder
from decoders.baseline.module import BaselineObjective
from decoders.latent_spaces.learned import Learned, LearnedConfig
from decoders.training import TrainingConfig
from experiments.config import load
from losses.adversarial import DiscriminatorConfig

SMALL = {"channels": 8, "res_blocks": 1, "latent_channels": 4}


def film(t: int, h: int = 16, w: int = 24, b: int = 1) -> torch.Tensor:
    return torch.rand(b, 3, t, h, w) * 2 - 1


def latents(n: int, y: int = 2, x: int = 3, b: int = 1) -> torch.Tensor:
    return torch.randn(b, 4, n, y, x)


# --- what a latent frame may depend on --------------------------------------------------------------------------------


@pytest.mark.parametrize("k", LAYOUTS)
@pytest.mark.parametrize("pad_t", ["replicate", "zeros"])
@pytest.mark.parametrize("norm", NORMS)
def test_the_first_latent_is_the_first_frames_to_the_bit(k, pad_t, norm):
    encoder = Magvit2Encoder(layout(k, **SMALL, pad_t=pad_t, norm=norm))
    video = film(k + 1, b=2)
    latent, none = encoder(video)
    assert none is None and latent.shape == (2, 4, 2, 2, 3)
    for later in (film(k + 1, b=2), torch.zeros_like(video), 1e4 * film(k + 1, b=2)):
        other, _ = encoder(torch.cat([video[:, :, :1], later[:, :, 1:]], 2))
        assert torch.equal(other[:, :, 0], latent[:, :, 0])
        assert (other[:, :, 1] - latent[:, :, 1]).abs().max() > 1e-3
    assert torch.equal(encoder(video[:, :, :1])[0], latent[:, :, :1])  # an image is a video's first frame
    moved = torch.cat([film(1, b=2), video[:, :, 1:]], 2)
    assert (encoder(moved)[0][:, :, 0] - latent[:, :, 0]).abs().max() > 1e-3


@pytest.mark.parametrize("k", LAYOUTS)
def test_the_motion_latent_sees_every_frame(k):
    video = film(k + 1).requires_grad_()
    latent, _ = Magvit2Encoder(layout(k, **SMALL))(video)
    (gradient,) = torch.autograd.grad(latent[:, :, 1].square().sum(), video)
    assert (gradient.abs().amax(dim=(0, 1, 3, 4)) > 0).all()


def test_a_later_latent_changes_no_earlier_frame():
    decoder = Magvit2Decoder(layout(4, **SMALL))
    latent = latents(4)
    video = decoder(latent)
    latent[:, :, 2:] = latents(2)
    changed = decoder(latent)
    torch.testing.assert_close(changed[:, :, :5], video[:, :, :5], atol=1e-6, rtol=0)
    assert (changed[:, :, 5] - video[:, :, 5]).abs().max() > 1e-4
    assert torch.equal(decoder(latent[:, :, :1]), changed[:, :, :1])


@pytest.mark.parametrize("pad_t", ["replicate", "zeros"])
def test_a_still_clip_is_its_image_again_and_again_where_the_first_frame_is_repeated(pad_t):
    encoder = Magvit2Encoder(layout(4, **SMALL, pad_t=pad_t))
    latent, _ = encoder(film(1).expand(-1, -1, 9, -1, -1))
    same = torch.allclose(latent, latent[:, :, :1].expand_as(latent), atol=1e-5)
    assert same == (pad_t == "replicate")


@pytest.mark.parametrize("k", LAYOUTS)
def test_latents_begin_by_saying_something_of_motion(k):
    """With torch's own start the two latents of clips that change colour every frame differ by 0.01 (k = 4)."""
    encoder = Magvit2Encoder(layout(k, **SMALL | {"res_blocks": 2}))
    colours = film(k + 1, 1, 1, b=2)
    latent, _ = encoder(colours.expand(-1, -1, -1, 16, 16))
    assert (latent[:, :, 1] - latent[:, :, 0]).square().mean().sqrt() > 0.1


# --- layers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [(1, 1, 1), (1, 2, 2), (2, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize("replicate", [True, False])
def test_convolutions_equal_a_padded_one(stride, replicate):
    conv = CausalConv3d(3, 5, stride, replicate)
    x = torch.randn(2, 3, 9, 6, 8)
    padded = torch.cat([x[:, :, :1] * float(replicate)] * 2 + [x], 2)
    whole = F.conv3d(padded, conv.weight, conv.bias, stride, (0, 1, 1))
    for split in ([1, 8], [1, 4, 4], [1, 2, 6]):
        past, parts = None, []
        for part in x.split(split, 2):
            y, past = conv(part, past)
            parts.append(y)
        torch.testing.assert_close(torch.cat(parts, 2), whole)
    with pytest.raises(ValueError, match="begins with one frame by itself, not with 9"):
        conv(x)


@pytest.mark.parametrize("stride", [(1, 2, 2), (2, 1, 1), (2, 2, 2)])
def test_enlarging_leaves_out_the_frame_before_the_first(stride):
    enlarge = Upsample(4, stride, True)
    x, (k, p, q) = torch.randn(2, 4, 3, 5, 6), stride
    padded = torch.cat([x[:, :, :1]] * 2 + [x], 2)
    y = F.conv3d(padded, enlarge.conv.weight, enlarge.conv.bias, 1, (0, 1, 1))
    whole = rearrange(y, "b (k p q c) t y x -> b c (t k) (y p) (x q)", k=k, p=p, q=q)[:, :, k - 1 :]
    head, past = enlarge(x[:, :, :1])
    rest, _ = enlarge(x[:, :, 1:], past)
    torch.testing.assert_close(torch.cat([head, rest], 2), whole)


def test_group_norm_is_each_frames_own():
    norm, x = FrameGroupNorm(48), torch.randn(2, 48, 3, 4, 5)  # 16 groups
    frames = [F.group_norm(frame, 16, eps=1e-6) for frame in x.unbind(2)]
    torch.testing.assert_close(norm(x), torch.stack(frames, 2))


@pytest.mark.parametrize("norm", NORMS)
def test_features_stay_bf16_with_their_channels_last(norm):
    """A float32 copy or another layout costs more than the norm itself."""
    config = layout(4, **SMALL, norm=norm)
    encoder, decoder, seen = Magvit2Encoder(config), Magvit2Decoder(config), []

    def look(module, inputs, output):
        output = output[0] if isinstance(output, tuple) else output
        seen.append((type(module).__name__, output.dtype, output.movedim(1, -1).is_contiguous()))

    kinds = (CausalConv3d, NORMS[norm])
    for module in (*encoder.modules(), *decoder.modules()):
        if isinstance(module, kinds):
            module.register_forward_hook(look)
    with torch.autocast("cpu", torch.bfloat16):
        decoder(encoder(film(5, b=2))[0])
    assert {name for name, _, _ in seen} == {kind.__name__ for kind in kinds}
    assert all(dtype == torch.bfloat16 and last for _, dtype, last in seen)


# --- the paper's counts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "t", "n"), [(4, 17, 5), (8, 17, 3), (16, 17, 2), (32, 33, 2), (4, 5, 2), (8, 25, 4)])
def test_frame_counts(k, t, n):
    config = layout(k, **SMALL)
    assert (config.stride_t, config.stride_hw) == (k, 8)
    encoder, decoder = Magvit2Encoder(config, variational=True), Magvit2Decoder(config)
    mean, log_variance = encoder(film(t))
    assert mean.shape == log_variance.shape == (1, 4, n, 2, 3)
    assert decoder(mean).shape == (1, 3, t, 16, 24)
    assert decoder(mean[:, :, :1]).shape == (1, 3, 1, 16, 24)
    chunked = encoder.encode_in_chunks(film(t))
    assert chunked[0].shape == mean.shape


@pytest.mark.parametrize("k", LAYOUTS)
def test_chunks_give_the_latents_of_the_whole(k):
    encoder, video = Magvit2Encoder(layout(k, **SMALL), variational=True), film(1 + 2 * k)
    for part, whole in zip(encoder.encode_in_chunks(video), encoder(video), strict=True):
        torch.testing.assert_close(part, whole, atol=1e-5, rtol=0)


FULL = {4: (217_819_784, 265_758_467), 8: (361_166_216, 425_030_915), 16: (361_166_216, 440_956_931),
        32: (361_166_216, 317_087_747)}  # fmt: skip


@pytest.mark.parametrize("k", LAYOUTS)
def test_full_size(k):
    with torch.device("meta"):
        encoder, decoder = Magvit2Encoder(layout(k)), Magvit2Decoder(layout(k))
    assert tuple(sum(p.numel() for p in half.parameters()) for half in (encoder, decoder)) == FULL[k]
    assert layout(k).widths() == [128, 256, 512, 768, *([768] if k > 4 else [])]


@pytest.mark.parametrize(("k", "width", "count"), [(16, 216, 1_255_411_011), (32, 248, 1_189_886_147)])
def test_the_widened_decoder_is_as_large_as_regens(k, width, count):
    wide = widened(layout(k))
    assert (wide.decoder_channels, num_parameters(wide)) == (width, count)
    for other in (width - 8, width + 8):
        assert abs(num_parameters(layout(k, decoder_channels=other)) - 1.21e9) > abs(count - 1.21e9)
    with torch.device("meta"):
        encoder = Magvit2Encoder(wide)
    assert sum(p.numel() for p in encoder.parameters()) == FULL[k][0]  # the encoder stays


def test_late_enlarges_before_the_last_stage():
    config = layout(32, **SMALL)
    assert config.late and not layout(16).late
    for late, frames, rows in (
        (True, [2, 2, 2, 2, 2, 33], [2, 2, 2, 2, 2, 16]),
        (False, [2, 3, 5, 9, 17, 33], [2, 2, 2, 4, 8, 16]),
    ):
        decoder = Magvit2Decoder(layout(32, **SMALL, late=late))
        names = ["conv_in", "up4", "up3", "up2", "up1", "up0"]
        assert list(decoder.stages) == [*names, "out"]
        video, features = decoder(latents(2), taps=names)
        assert [features[name].shape[2] for name in names] == frames
        assert [features[name].shape[3] for name in names] == rows
        assert video.shape == (1, 3, 33, 16, 24)


# --- streams and training ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", LAYOUTS)
@pytest.mark.parametrize("pad_t", ["replicate", "zeros"])
def test_a_stream_is_the_whole_clip_in_state_that_does_not_grow(k, pad_t):
    decoder = Magvit2Decoder(layout(k, **SMALL, pad_t=pad_t), mean=[0.5, 0.0, -1.0, 2.0], std=[1.0, 2.0, 0.5, 3.0])
    latent = latents(4, b=2)
    state, frames, sizes = decoder.start_stream(2, 16, 20), [], []
    for frame in latent.unbind(2):
        frames.append(decoder.step_stream(frame, state))
        sizes.append(state.num_bytes())
    frames.append(decoder.end_stream(state))
    whole = decoder(latent)
    assert whole.std() > 0.05
    torch.testing.assert_close(torch.cat(frames, 2), whole[..., :20].clamp(-1, 1), atol=1e-5, rtol=0)
    assert [part.shape[2] for part in frames] == [1, k, k, k, 0]
    assert len(set(sizes)) == 1, "the state is as large after one latent frame as after four"


@pytest.mark.parametrize("k", [4, 32])
def test_gradients_reach_all_and_checkpointing_changes_none(k):
    config = layout(k, **SMALL)
    encoder, decoder, video = Magvit2Encoder(config, variational=True), Magvit2Decoder(config), film(k + 1)

    def gradients(enabled: bool) -> list[torch.Tensor]:
        halves = torch.nn.ModuleList([encoder, decoder])
        halves.zero_grad()
        for half in halves:
            half.set_checkpointing(enabled)
        mean, log_variance = encoder(video)
        ((decoder(mean) - video).square().mean() + log_variance.square().mean()).backward()
        return [parameter.grad.clone() for parameter in halves.parameters()]

    kept, again = gradients(False), gradients(True)
    assert all(gradient.abs().sum() > 0 for gradient in kept)
    for one, two in zip(kept, again, strict=True):
        torch.testing.assert_close(one, two)
    assert Magvit2Encoder(layout(k, **SMALL, checkpointing=True)).stages["down0"].checkpointing


# --- what is refused --------------------------------------------------------------------------------------------------


def test_clips_that_cannot_be_encoded_name_the_nearest():
    encoder = Magvit2Encoder(layout(4, **SMALL))
    for shape, said in (
        ((4, 16, 24), "4 frames: .* the nearest are 1 and 5"),
        ((7, 16, 24), "7 frames: .* the nearest are 5 and 9"),
        ((5, 17, 24), "17x24 pixels: .* the nearest are 16x24 and 24x24"),
        ((5, 16, 4), "16x4 pixels: .* multiples of 8; the nearest are 16x8"),
    ):
        with pytest.raises(ValueError, match=said):
            encoder(film(*shape))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"multipliers": [1, 2]}, "2 multipliers for 4 strides"),
        ({"multipliers": [1, 2, 0, 4]}, "each must be 1 or more"),
        ({"strides": ["122", "222", "222", "112"]}, "'112' is none of 111, 122, 211 and 222"),
        ({"strides": ["122", "222", "222", "1"]}, "'1' is none of"),
        ({"res_blocks": 0}, "res_blocks is 0"),
        ({"decoder_channels": 0}, "decoder_channels is 0"),
    ],
)
def test_layouts_that_make_no_sense_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        Magvit2Config(**changes)


def test_other_strides_have_no_layout():
    with pytest.raises(ValueError, match="for 5 frames per latent frame; there are 4, 8, 16, 32"):
        layout(5)


# --- in the baseline family -------------------------------------------------------------------------------------------


def magvit2(k: int = 4, **changes) -> BaselineConfig:
    return BaselineConfig(**{"backbone": "magvit2", "magvit2": layout(k, **SMALL), "train_encoder": True} | changes)


def autoencoder(k: int, weights: dict, objective: BaselineObjective | None = None) -> Baseline:
    space = Learned(LearnedConfig(channels=4, stride_t=k, stride_hw=8))
    decoder = Baseline(magvit2(k), objective or BaselineObjective(), space, TrainingConfig(loss_weights=weights))
    decoder.setup("fit")
    return decoder


@pytest.mark.parametrize("name", ["k4", "k8", "k16", "k32", "k16_wide", "k32_wide"])
def test_experiments_have_the_papers_layouts(name):
    config, k = load(f"magvit2_{name}"), int(name.removesuffix("_wide")[1:])
    chunk = 33 if k == 32 else 17
    expected = widened(layout(k, chunk=chunk)) if name.endswith("_wide") else layout(k, chunk=chunk)
    assert config.decoder.magvit2 == expected
    assert config.space == LearnedConfig(channels=8, stride_t=k, stride_hw=8, chunk=chunk)
    assert Learned(config.space).latent_frames(chunk) == {4: 5, 8: 3, 16: 2, 32: 2}[k]
    assert config.data.train["video_192"].num_frames == (33 if k == 32 else 17)


@pytest.mark.parametrize("k", [4, 8])
def test_both_players_learn_and_images_have_no_adversary(k):
    objective = BaselineObjective(crop=16, discriminator=DiscriminatorConfig(channels=4, num_layers=3), r1_interval=2)
    weights = {"l1": 1.0, "mse": 1.0, "lpips": 0.0, "kl": 1e-6, "gan_g": 0.1, "gan_d": 1.0, "r1": 0.01}
    decoder = autoencoder(k, weights, objective)
    terms = decoder.losses({"video": film(k + 1), "key": ["clip"]})
    assert terms.keys() == weights.keys() - {"lpips"}
    sum(decoder.weight(name) * value for name, value in terms.items()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in decoder.parameters())
    decoder.zero_grad()
    terms = decoder.losses({"video": film(1), "key": ["image"]})
    assert terms.keys() == {"l1", "mse", "kl"}
    sum(decoder.weight(name) * value for name, value in terms.items()).backward()
    assert all(p.grad is not None for half in (decoder.encoder, decoder.model) for p in half.parameters())


def test_posteriors_start_narrow_and_frozen_statistics_change_no_video():
    decoder = autoencoder(8, {"l1": 1.0, "mse": 0.0, "lpips": 0.0, "kl": 1e-6})
    video = film(9)
    mean, log_variance = decoder.encoder(video)
    assert log_variance.mean().item() == pytest.approx(-6, abs=0.5)
    latent, before = decoder.encode(video), decoder.decode(decoder.encode(video))
    torch.testing.assert_close(latent, mean, atol=1e-5, rtol=0)
    decoder.freeze_statistics([film(9), video])
    again = decoder.encode(video)
    assert (again - latent).abs().max() > 0.1
    torch.testing.assert_close(decoder.decode(again), before, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"magvit2": None}, "needs decoder.magvit2"),
        ({"backbone": "wan"}, "decoder.backbone is wan"),
        ({"dim": 8}, "decoder.dim is a setting of the backbone wan"),
        ({"start": "linear"}, "decoder.start is a setting of the backbone wan"),
        ({"magvit2": layout(4, checkpointing=True)}, "set decoder.checkpointing"),
    ],
)
def test_settings_of_the_other_backbone_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        magvit2(**changes)


def test_layouts_that_do_not_fit_the_space_are_refused():
    for shape, said in (((8, 4, 8), "latent_channels make 4, but"), ((4, 8, 8), "make 4, but"), ((4, 4, 16), "make 8")):
        with pytest.raises(ValueError, match=said):
            build_decoder(magvit2(), *shape)
    space = Learned(LearnedConfig(channels=4, stride_t=4, stride_hw=8))
    with pytest.raises(ValueError, match="split_branches knows"):
        Baseline(magvit2(), BaselineObjective(split_branches=True), space, TrainingConfig())
