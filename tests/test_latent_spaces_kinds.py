"""Every diffusers video autoencoder as a latent space and as a baseline row, against the class itself on the same weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from decoders.baseline import Baseline
from decoders.baseline.model import NO_STREAM, BaselineConfig, DiffusersDecoder, SpaceDecoder
from decoders.baseline.module import BaselineObjective
from decoders.latent_spaces.base import pad_to_valid
from decoders.latent_spaces.dct import DCT, DCTConfig
from decoders.latent_spaces.diffusers import DiffusersVAE, DiffusersVAEConfig, for_frames
from decoders.latent_spaces.diffusers_files import READERS
from decoders.latent_spaces.learned import Learned
from decoders.training import TrainingConfig
from experiments.compose import ConfigError
from experiments.config import load
from experiments.evaluate import evaluate
from experiments.train import train

SMALL = {"layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4, "block_out_channels": (8, 8, 8, 8)}
VIDTOK = {"ch": 8, "ch_mult": [1, 2, 2, 2], "z_channels": 4, "num_res_blocks": 1}
COSMOS = {
    "num_layers": 1,
    "encoder_block_out_channels": (8,) * 4,
    "decode_block_out_channels": (8,) * 4,
    "resolution": 64,
}
LTX2 = {"latent_channels": 8, "block_out_channels": (8, 16, 32, 64), "decoder_block_out_channels": (8, 16, 32)}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "hunyuanvideo": ("AutoencoderKLHunyuanVideo", SMALL),
    "hunyuanvideo15": (
        "AutoencoderKLHunyuanVideo15",
        {"block_out_channels": (16, 16, 32, 32, 32), "layers_per_block": 1, "latent_channels": 4},
    ),
    "cosmos": ("AutoencoderKLCosmos", COSMOS),
    "cogvideox": ("AutoencoderKLCogVideoX", SMALL),
    "mochi": (
        "AutoencoderKLMochi",
        {
            "encoder_block_out_channels": (32,) * 4,
            "decoder_block_out_channels": (32,) * 4,
            "layers_per_block": (1,) * 5,
        },
    ),
    "vidtok": ("AutoencoderVidTok", VIDTOK),
    "vidtok_noncausal": ("AutoencoderVidTok", {**VIDTOK, "is_causal": False}),
    "vidtok_fsq": (
        "AutoencoderVidTok",
        {**VIDTOK, "z_channels": 5, "double_z": False, "regularizer": "fsq", "codebook_size": 8**5},
    ),
    "ltx2": (
        "AutoencoderKLLTX2Video",
        {**LTX2, "layers_per_block": (1,) * 5, "decoder_layers_per_block": (1,) * 4, "scaling_factor": 2.0},
    ),
}
# channels, stride_t, stride_hw, causal, frames from one valid length to the next
SHAPES = {
    "hunyuanvideo": (4, 4, 8, True, 4),
    "hunyuanvideo15": (4, 4, 16, True, 4),
    "cosmos": (16, 8, 8, True, 8),
    "cogvideox": (4, 4, 8, True, 8),
    "mochi": (12, 6, 8, True, 6),
    "vidtok": (4, 4, 8, True, 4),
    "vidtok_noncausal": (4, 4, 8, False, 16),
    "vidtok_fsq": (5, 4, 8, True, 4),
    "ltx2": (8, 8, 32, True, 8),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each kind, as its release has it: the autoencoder as ``vae``."""
    import diffusers

    root = tmp_path_factory.mktemp("autoencoders")
    torch.manual_seed(0)
    for name, (class_name, arguments) in MODELS.items():
        vae = getattr(diffusers, class_name)(**arguments)
        if name == "ltx2":
            vae.latents_mean += torch.linspace(-1, 1, 8)
            vae.latents_std *= torch.linspace(0.5, 2, 8)
        vae.save_pretrained(root / name / "vae")
    return {name: root / name for name in MODELS}


@pytest.fixture(scope="module")
def spaces(folders: dict[str, Path]) -> dict[str, DiffusersVAE]:
    return {name: DiffusersVAE(DiffusersVAEConfig(str(folder))) for name, folder in folders.items()}


@pytest.fixture(params=list(MODELS))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def film(space: DiffusersVAE, groups: int = 1, b: int = 1) -> Tensor:
    """A clip of the shortest length and ``groups`` steps more."""
    side = 64 if space.stride_hw == 32 else 32
    t = (1 if space.causal else space.frame_step) + groups * space.frame_step
    return torch.rand(b, 3, t, side, side) * 2 - 1


def by_the_class(vae: nn.Module, video: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """The posterior's mode and its decoding, as the class itself has them."""
    with torch.no_grad():
        if kind.startswith("vidtok"):
            if vae.is_causal:  # which its forward does
                video = torch.nn.functional.pad(video, (0, 0, 0, 0, 3, 0), mode="replicate")
            encoded = vae.encode(video)
            raw = encoded[0] if isinstance(encoded, tuple) else encoded.latent_dist.mode()
            return raw, vae.decode(raw)
        raw = vae.encode(video).latent_dist.mode()
        return raw, vae.decode(raw).sample


def statistics(space: DiffusersVAE, kind: str, n: int) -> tuple[Tensor, Tensor]:
    """What a pipeline of this kind subtracts and divides by, read from the class."""
    config, shape = space.vae.config, (1, space.channels, -1, 1, 1)
    if kind == "cosmos":
        given = (torch.tensor(config[key]).view(shape)[:, :, :n] for key in ("latents_mean", "latents_std"))
        return tuple(given)
    if kind == "mochi":
        return torch.tensor(config.latents_mean).view(shape), torch.tensor(config.latents_std).view(shape)
    if kind == "ltx2":
        return space.vae.latents_mean.view(shape), space.vae.latents_std.view(shape) / 2.0
    return torch.zeros(1), torch.tensor(1 / config.get("scaling_factor", 1.0))


# --- the space --------------------------------------------------------------------------------------------------------


def test_all_supported_classes_are_tested_here_or_beside():
    tested = {class_name for class_name, _ in MODELS.values()}
    assert tested | {"AutoencoderKLWan", "AutoencoderKLLTXVideo"} == set(READERS)


def test_shapes_and_frame_rules_come_from_the_config_without_weights(folders: dict[str, Path], kind: str):
    space = DiffusersVAE(DiffusersVAEConfig(str(folders[kind])))
    assert (space.channels, space.stride_t, space.stride_hw, space.causal, space.frame_step) == SHAPES[kind]
    space.require()
    assert space._vae is None
    first = 1 if space.causal else space.frame_step
    valid = [first + i * space.frame_step for i in range(5)]
    for t in valid:
        assert space.pixel_frames(space.latent_frames(t)) == t == space.padded_frames(t)
    for t in set(range(1, valid[-1])) - set(valid):
        assert space.padded_frames(t) == min(length for length in valid if length >= t)
        with pytest.raises(ValueError, match=f"{t} frames: .* the nearest is .*{space.padded_frames(t)}"):
            space.check(t, 64, 64)
    assert space.compression == pytest.approx(3 * space.stride_t * space.stride_hw**2 / space.channels, rel=1e-3)


@pytest.mark.parametrize("groups", [0, 2])
def test_encoding_and_decoding_are_the_classs_own(spaces: dict[str, DiffusersVAE], kind: str, groups: int):
    space = spaces[kind]
    video = film(space, groups)
    latent = space.encode(video)
    raw, shown = by_the_class(space.vae, video, kind)
    assert latent.dtype == torch.float32 and latent.shape[2] == space.latent_frames(video.shape[2])
    mean, std = statistics(space, kind, latent.shape[2])
    torch.testing.assert_close(latent, (raw - mean) / std, atol=1e-5, rtol=1e-5)
    assert shown.shape == video.shape
    torch.testing.assert_close(space.decode(latent), shown, atol=1e-4, rtol=1e-4)


def test_padded_clips_go_through_at_any_length(spaces: dict[str, DiffusersVAE], kind: str):
    space = spaces[kind]
    whole = pad_to_valid(film(space)[:, :, :6, :-3], space)
    assert space.decode(space.encode(whole)).shape == whole.shape


def test_a_batch_is_its_clips_and_draws_repeat(spaces: dict[str, DiffusersVAE], kind: str):
    space = spaces[kind]
    video = film(space, 0, b=2)
    latent = space.encode(video)
    torch.testing.assert_close(latent, torch.cat([space.encode(clip) for clip in video.split(1)]))
    drawn = [space.encode(video, sample=True, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], latent) == (kind in ("cosmos", "vidtok_fsq")), "one latent, no posterior"
    assert torch.equal(drawn[0], drawn[2]) == (kind in ("cosmos", "vidtok_fsq"))


def test_latents_that_would_decode_to_other_frames_are_refused(spaces: dict[str, DiffusersVAE]):
    for kind, n, rule in (("cogvideox", 2, r"1 \+ 2k"), ("cogvideox", 4, r"1 \+ 2k"), ("vidtok_noncausal", 5, "4k")):
        space = spaces[kind]
        with pytest.raises(ValueError, match=f"{n} latent frames: .* decodes {rule} of them"):
            space.decode(torch.zeros(1, space.channels, n, 2, 2))


def test_statistics_of_every_latent_frame_go_on_with_the_last():
    values = torch.arange(6.0).view(1, 2, 3, 1, 1)
    assert torch.equal(for_frames(values, 2), values[:, :, :2])
    assert for_frames(values, 5).flatten().tolist() == [0, 1, 2, 2, 2, 3, 4, 5, 5, 5]
    assert for_frames(values[:, :, :1], 5) is not None and for_frames(values[:, :, :1], 5).shape[2] == 1


def test_declared_rules_stand_in_for_missing_files(folders: dict[str, Path]):
    shape = {"channels": 4, "stride_t": 4, "stride_hw": 8}
    plain, cog, apart = (
        DiffusersVAE(DiffusersVAEConfig("/nowhere/vae", **shape, **more))
        for more in ({}, {"frame_step": 8}, {"causal": False, "frame_step": 16})
    )
    assert [space.padded_frames(12) for space in (plain, cog, apart)] == [13, 17, 16]
    with pytest.raises(ValueError, match="frame_step is declared as 4, but the autoencoder at .* has 8"):
        DiffusersVAE(DiffusersVAEConfig(str(folders["cogvideox"]), frame_step=4))


def test_classes_that_are_not_known_name_those_that_are(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKLAllegro"}')
    with pytest.raises(
        ValueError, match="is a AutoencoderKLAllegro; supported are .*HunyuanVideo15, AutoencoderKLCosmos"
    ):
        DiffusersVAE(DiffusersVAEConfig(str(tmp_path)))


# --- the row ----------------------------------------------------------------------------------------------------------


def row(space, **changes) -> Baseline:
    return Baseline(BaselineConfig(backbone="space"), BaselineObjective(), space, TrainingConfig(**changes))


def test_the_row_decodes_as_the_space_does(folders: dict[str, Path], kind: str):
    space = DiffusersVAE(DiffusersVAEConfig(str(folders[kind])))
    torch.manual_seed(1)  # the folders' weights are of seed 0
    decoder = row(space)
    latent = space.encode(film(space, int(space.causal)))
    assert not torch.allclose(decoder.decode(latent), space.decode(latent)), "random weights so far"
    assert decoder.take_start() == f"the {space.name} space's own decoder"
    with torch.autocast("cpu", torch.bfloat16):
        shown = decoder.decode(latent, size=(2, 30, 31))
    assert torch.equal(shown, space.decode(latent)[:, :, :2, :30, :31])
    own = {name for name, _ in space.vae.named_parameters() if name.startswith(("decoder", "post_quant"))}
    assert {name.removeprefix("model.vae.") for name, _ in decoder.named_parameters()} == own
    assert space.vae.encoder is not None and torch.equal(
        space.encode(film(space, 0) * 0), space.encode(film(space, 0) * 0)
    )
    assert not list(decoder.trainable()) and decoder.inference_buffers().keys() >= {f"model.vae.{name}" for name in own}
    with pytest.raises(ValueError, match="cannot stream: .*use decode"):
        decoder.start_stream(1, 32, 32)
    assert decoder.model.layout.kind in NO_STREAM


def test_the_row_pads_and_crops(folders: dict[str, Path]):
    space = DiffusersVAE(DiffusersVAEConfig(str(folders["mochi"])))
    decoder = row(space, pad="replicate")
    decoder.take_start()
    video = torch.rand(1, 3, 9, 30, 28) * 2 - 1
    latent = decoder.encode(video)
    assert latent.shape == (1, 12, 3, 4, 4)
    assert decoder.decode(latent, size=tuple(video.shape[2:])).shape == video.shape


def test_the_row_computes_in_the_spaces_dtype(folders: dict[str, Path]):
    space = DiffusersVAE(DiffusersVAEConfig(str(folders["hunyuanvideo"]), dtype="bfloat16"))
    decoder = row(space)
    decoder.take_start()
    assert {p.dtype for p in decoder.parameters()} == {torch.bfloat16}
    latent = space.encode(film(space))
    assert torch.equal(decoder.decode(latent).float(), space.decode(latent))


def test_the_row_is_counted_without_weights(folders: dict[str, Path]):
    space = DiffusersVAE(DiffusersVAEConfig(str(folders["cosmos"])))
    with torch.device("meta"):
        decoder = row(space)
    counted = sum(p.numel() for p in decoder.parameters())
    own = (space.vae.decoder, space.vae.post_quant_conv)
    assert counted == sum(p.numel() for part in own for p in part.parameters()) > 0
    assert all(p.is_meta for p in decoder.parameters())


def test_the_row_is_not_trained_and_says_so(folders: dict[str, Path]):
    decoder = row(DiffusersVAE(DiffusersVAEConfig(str(folders["mochi"]))))
    assert decoder.terms == frozenset()
    with pytest.raises(ValueError, match="is not trained; make evaluate exp=NAME weights=start"):
        decoder.setup("fit")
    for changes, message in (
        ({"dim": 8}, "decoder.dim is a setting"),
        ({"train_encoder": True}, "decoder.train_encoder"),
    ):
        with pytest.raises(ValueError, match=message):
            BaselineConfig(backbone="space", **changes)
    with pytest.raises(ValueError, match="needs decoder.train_encoder=true"):
        row(Learned())


def test_a_row_is_measured_with_the_spaces_weights_and_cannot_be_trained(folders: dict[str, Path], runs_root: Path):
    """17 frames of 36x44 pixels are filled up to 19 of 40x48, and only the 17 are scored."""
    overrides = [f"space.path={folders['mochi']}", "data.val.carphone.size=[36,44]", "data.val.carphone.num_clips=1"]
    overrides += ["validation.metrics=[psnr]", "trainer.progress_bar=false"]
    result = evaluate("baseline_mochi", overrides, "start")
    (mean,) = result["means"]
    assert mean["method"] == "decoder" and 0 < mean["scores"]["psnr"] < 20
    assert result["weights"]["kind"] == "start" and result["weights"]["file"].endswith("space's own decoder")
    protocol = result["protocols"]["carphone/psnr"]
    assert (list(protocol["frames"]), list(protocol["size"])) == ([0, 17], [36, 44])
    with pytest.raises(ConfigError, match="has nothing to train; make evaluate exp=baseline_mochi weights=start"):
        train(load("baseline_mochi", overrides), "baseline_mochi", overrides)


def test_any_space_with_a_decoder_is_a_row():
    space = DCT(DCTConfig(12, 4, 8))
    decoder = row(space)
    latent = space.encode(torch.rand(1, 3, 5, 16, 24) * 2 - 1)
    assert isinstance(decoder.model, SpaceDecoder) and torch.equal(decoder.decode(latent), space.decode(latent))
    assert decoder.take_start() == "the dct space's own decoder"
    with pytest.raises(TypeError, match="cannot stream"):
        decoder.start_stream(1, 16, 24)
    gone = row(DiffusersVAE(DiffusersVAEConfig("/nowhere/vae", channels=4, stride_t=4, stride_hw=8)))
    with pytest.raises(FileNotFoundError, match="no autoencoder at /nowhere/vae"):
        gone.decode(latent[:, :4])


def test_wans_row_streams(tmp_path: Path):
    from diffusers import AutoencoderKLWan

    AutoencoderKLWan(base_dim=4, num_res_blocks=1, z_dim=16).save_pretrained(tmp_path / "vae")
    decoder = row(DiffusersVAE(DiffusersVAEConfig(str(tmp_path))))
    decoder.take_start()
    latent = torch.randn(1, 16, 3, 2, 3)
    state = decoder.start_stream(1, 16, 24)
    frames = [decoder.step_stream(frame, state) for frame in latent.unbind(2)]
    frames.append(decoder.end_stream(state))
    torch.testing.assert_close(torch.cat(frames, 2), decoder.decode(latent), atol=1e-5, rtol=0)
    assert isinstance(decoder.model, DiffusersDecoder) and decoder.model.can_stream
