"""Frozen diffusers autoencoders, through real ``save_pretrained`` folders of small random models of every kind."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from decoders.baseline.model import DiffusersDecoder
from decoders.latent_spaces.causal_chunks import encode_in_chunks
from decoders.latent_spaces.diffusers import DiffusersVAE, DiffusersVAEConfig
from decoders.latent_spaces.diffusers_files import find_folder, find_weights

WAN = {"base_dim": 4, "num_res_blocks": 1, "dim_mult": [1, 2, 4, 4]}
LTX = {
    "latent_channels": 8,
    "layers_per_block": (1, 1, 1, 1, 1),
    "decoder_layers_per_block": (1, 1, 1, 1, 1),
    "block_out_channels": (8, 16, 16, 16),
    "decoder_block_out_channels": (8, 16, 16, 16),
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "wan21": ("AutoencoderKLWan", {**WAN, "z_dim": 16}),
    "wan22": (
        "AutoencoderKLWan",
        {
            **WAN,
            "z_dim": 48,
            "is_residual": True,
            "in_channels": 12,
            "out_channels": 12,
            "patch_size": 2,
            "scale_factor_spatial": 16,
            "latents_mean": [0.01 * i for i in range(48)],
            "latents_std": [0.5 + 0.01 * i for i in range(48)],
        },
    ),
    "ltx": ("AutoencoderKLLTXVideo", {**LTX, "scaling_factor": 2.0}),
    "ltx095": (
        "AutoencoderKLLTXVideo",
        {
            **LTX,
            "block_out_channels": (8, 16, 32, 64, 64),
            "down_block_types": ("LTXVideo095DownBlock3D",) * 4,
            "spatio_temporal_scaling": (True,) * 4,
            "downsample_type": ("spatial", "temporal", "spatiotemporal", "spatiotemporal"),
            "decoder_block_out_channels": (8, 16, 32),
            "decoder_layers_per_block": (1, 1, 1, 1),
            "decoder_spatio_temporal_scaling": (True,) * 3,
            "decoder_inject_noise": (False,) * 4,
            "upsample_residual": (True,) * 3,
            "upsample_factor": (2,) * 3,
            "timestep_conditioning": True,
            "spatial_compression_ratio": 32,
            "temporal_compression_ratio": 8,
        },
    ),
}
SHAPES = {"wan21": (16, 4, 8), "wan22": (48, 4, 16), "ltx": (8, 8, 32), "ltx095": (8, 8, 32)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One pipeline folder per kind, with the autoencoder as its ``vae``."""
    import diffusers

    root = tmp_path_factory.mktemp("autoencoders")
    torch.manual_seed(0)
    for name, (class_name, arguments) in MODELS.items():
        vae = getattr(diffusers, class_name)(**arguments)
        if class_name == "AutoencoderKLLTXVideo":
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


def random_video(t: int, h: int = 64, w: int = 32, b: int = 1) -> Tensor:
    return torch.rand(b, 3, t, h, w) * 2 - 1


def reference_latent(space: DiffusersVAE, video: Tensor) -> Tensor:
    """What diffusers itself gives for a whole clip, not normalised."""
    with torch.no_grad():
        return space._vae.encode(video).latent_dist.mode()


# --- shapes, statistics, exactness ------------------------------------------------------------------------------------


def test_shapes_come_from_the_config_without_loading_weights(folders: dict[str, Path], kind: str):
    space = DiffusersVAE(DiffusersVAEConfig(str(folders[kind])))
    assert (space.channels, space.stride_t, space.stride_hw) == SHAPES[kind]
    space.require()
    assert space._vae is None


@pytest.mark.parametrize("groups", [0, 1, 4])
def test_encode_and_decode_shapes(spaces: dict[str, DiffusersVAE], kind: str, groups: int):
    space = spaces[kind]
    video = random_video(1 + groups * space.stride_t)
    latent = space.encode(video)
    assert latent.shape == (1, space.channels, 1 + groups, 64 // space.stride_hw, 32 // space.stride_hw)
    assert latent.dtype == torch.float32 and latent.isfinite().all()
    assert space.decode(latent).shape == video.shape


def test_encoding_equals_diffusers_on_the_whole_clip(spaces: dict[str, DiffusersVAE], kind: str):
    space = spaces[kind]
    video = random_video(1 + 4 * space.stride_t)
    latent = space.encode(video)
    torch.testing.assert_close(latent * space._std + space._mean, reference_latent(space, video), atol=1e-5, rtol=0)


@pytest.mark.parametrize("chunk_latents", [1, 2, 3, 100])
@pytest.mark.parametrize("name", ["ltx", "ltx095"])
def test_ltx_in_chunks_of_any_size_equals_the_whole(spaces: dict[str, DiffusersVAE], name: str, chunk_latents: int):
    encoder, video = spaces[name]._vae.encoder, random_video(41)
    with torch.no_grad():
        whole = encoder(video)
        chunked = encode_in_chunks(encoder, video, chunk_latents * 8)
        again = encoder(video)
    torch.testing.assert_close(chunked, whole, atol=1e-5, rtol=0)
    assert torch.equal(again, whole)  # nothing is left behind in the encoder


def test_a_failing_chunk_leaves_the_encoder_as_it_was(spaces: dict[str, DiffusersVAE]):
    encoder, video = spaces["ltx"]._vae.encoder, random_video(9)
    before = encoder(video)
    with pytest.raises(RuntimeError):
        encode_in_chunks(encoder, random_video(9, h=63), 8)
    assert torch.equal(encoder(video), before)


def test_latents_do_not_depend_on_later_frames(spaces: dict[str, DiffusersVAE], kind: str):
    space = spaces[kind]
    video = random_video(1 + 3 * space.stride_t)
    short = space.encode(video[:, :, : 1 + space.stride_t])
    torch.testing.assert_close(space.encode(video)[:, :, :2], short, atol=1e-5, rtol=0)


def test_normalised_latents_undo_at_decode(spaces: dict[str, DiffusersVAE], kind: str):
    space = spaces[kind]
    config = space._vae.config
    video = random_video(1 + space.stride_t)
    raw = reference_latent(space, video)
    if kind.startswith("wan"):
        mean, std = torch.tensor(config.latents_mean), torch.tensor(config.latents_std)
    else:
        mean, std = space._vae.latents_mean, space._vae.latents_std / config.scaling_factor
    shape = (1, -1, 1, 1, 1)
    torch.testing.assert_close(space.encode(video), (raw - mean.view(shape)) / std.view(shape), atol=1e-4, rtol=1e-4)
    time_step = (torch.zeros(1),) if config.get("timestep_conditioning") else ()
    with torch.no_grad():
        expected = space._vae.decode(raw, *time_step).sample
    torch.testing.assert_close(space.decode(space.encode(video)), expected, atol=1e-4, rtol=1e-4)


def test_a_batch_equals_its_clips(spaces: dict[str, DiffusersVAE], kind: str):
    space = spaces[kind]
    video = random_video(1 + space.stride_t, b=2)
    assert torch.equal(space.encode(video), torch.cat([space.encode(video[:1]), space.encode(video[1:])]))


def test_sampling_repeats_with_its_generator(spaces: dict[str, DiffusersVAE], kind: str):
    space = spaces[kind]
    video = random_video(1)

    def draw(seed: int) -> Tensor:
        return space.encode(video, sample=True, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    assert not torch.equal(draw(1), space.encode(video))


def test_frozen_and_never_in_a_checkpoint(spaces: dict[str, DiffusersVAE], kind: str):
    space = spaces[kind]
    video = random_video(1).requires_grad_()
    assert not space.encode(video).requires_grad
    assert not any(p.requires_grad for p in space._vae.parameters()) and not space._vae.training
    holder = torch.nn.Module()
    holder.space = space
    assert not list(holder.parameters()) and not holder.state_dict()


def test_bfloat16_stays_close_and_autocast_changes_nothing(
    folders: dict[str, Path], spaces: dict[str, DiffusersVAE], kind: str
):
    low = DiffusersVAE(DiffusersVAEConfig(str(folders[kind]), dtype="bfloat16"))
    video = random_video(1 + low.stride_t)
    full = spaces[kind].encode(video)
    half = low.encode(video)
    assert half.dtype == torch.float32
    assert (half - full).square().mean() < 0.01 * full.square().mean()
    assert low.fingerprint == spaces[kind].fingerprint
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(spaces[kind].encode(video), full)


def test_fingerprints_follow_the_encoder_and_the_statistics(folders: dict[str, Path], kind: str, tmp_path: Path):
    def fingerprint(folder: Path) -> str:
        return DiffusersVAE(DiffusersVAEConfig(str(folder))).fingerprint

    def changed(name: str) -> str:
        copy = tmp_path / name
        shutil.copytree(folders[kind] / "vae", copy)
        path = copy / "diffusion_pytorch_model.safetensors"
        weights = load_file(path)
        key = next(key for key in weights if key.startswith(name))
        save_file(weights | {key: weights[key] + 1}, path, metadata={"format": "pt"})
        return fingerprint(copy)

    original = fingerprint(folders[kind])
    assert fingerprint(folders[kind] / "vae") == original
    assert changed("encoder.") != original
    assert changed("decoder.") == original  # another decoder reads the same latents
    if kind.startswith("ltx"):
        assert changed("latents_std") != original


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["wan21", "ltx"])
def test_activations_do_not_grow_with_length(spaces: dict[str, DiffusersVAE], name: str):
    """The largest tensor that any layer makes is that of one chunk, however long the clip."""
    space, largest = spaces[name], {}

    def watch(frames: int) -> int:
        sizes = []
        hooks = [
            module.register_forward_hook(lambda module, inputs, output: sizes.append(output.numel()))
            for module in space._vae.encoder.modules()
            if not list(module.children())
        ]
        space.encode(random_video(frames, 32, 32))
        for hook in hooks:
            hook.remove()
        return max(sizes)

    chunk = space.stride_t * (space.config.chunk_latents if name == "ltx" else 1)
    largest = {groups: watch(1 + groups * chunk) for groups in (1, 2, 4)}
    assert len(set(largest.values())) == 1


# --- errors -----------------------------------------------------------------------------------------------------------


def test_a_missing_folder_says_where_it_looked_and_how_to_get_it():
    with pytest.raises(FileNotFoundError) as error:
        DiffusersVAE(DiffusersVAEConfig("/nowhere/Wan2.2"))
    message = str(error.value)
    for part in ("/nowhere/Wan2.2/config.json", "/nowhere/Wan2.2/vae/config.json", "hf download", "--local-dir"):
        assert part in message
    assert "hub's cache" not in message  # an absolute path is no hub id


def test_a_hub_id_that_cannot_be_had_says_so_once():
    hub_id = "Wan-AI/Wan2.2-TI2V-5B-Diffusers"
    with pytest.raises(FileNotFoundError) as error:
        find_folder(hub_id, None, download=True)
    message = str(error.value)
    assert "the hub's cache" in message and "the hub (" in message
    assert f"hf download {hub_id} --include 'vae/*'" in message
    assert "\n" not in message and error.value.__cause__ is None


def test_declared_shapes_stand_in_for_missing_files(folders: dict[str, Path]):
    space = DiffusersVAE(DiffusersVAEConfig("Wan-AI/Wan2.2-TI2V-5B-Diffusers", channels=48, stride_t=4, stride_hw=16))
    assert (space.channels, space.latent_frames(17)) == (48, 5)
    with pytest.raises(ValueError, match="13 or 17"):
        space.check(16, 64, 64)
    for action in (space.require, lambda: space.encode(random_video(1)), lambda: space.fingerprint):
        with pytest.raises(FileNotFoundError, match="hf download"):
            action()


def test_declared_shapes_that_disagree_are_refused(folders: dict[str, Path]):
    with pytest.raises(ValueError, match="channels is declared as 48.*has 16"):
        DiffusersVAE(DiffusersVAEConfig(str(folders["wan21"]), channels=48))


def test_a_folder_without_weights_is_refused(folders: dict[str, Path], tmp_path: Path):
    shutil.copy(folders["wan21"] / "vae" / "config.json", tmp_path)
    space = DiffusersVAE(DiffusersVAEConfig(str(tmp_path)))
    with pytest.raises(FileNotFoundError, match=r"diffusion_pytorch_model.safetensors is missing.*hf download"):
        space.require()
    with pytest.raises(FileNotFoundError, match="is missing"):
        space.encode(random_video(1))


def rewritten(folder: Path, to: Path, **changes: Any) -> DiffusersVAE:
    shutil.copytree(folder / "vae", to)
    config = json.loads((to / "config.json").read_text()) | changes
    (to / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value != "absent"}))
    return DiffusersVAE(DiffusersVAEConfig(str(to)))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "wan21",
            {"_class_name": "AutoencoderKL"},
            "is a AutoencoderKL; supported are AutoencoderKLWan, .*KLMochi, AutoencoderVidTok",
        ),
        ("wan21", {"z_dim": "absent"}, "has no 'z_dim'"),
        ("wan21", {"temperal_downsample": [True, True, True]}, "temporal stride 8"),
        ("ltx", {"encoder_causal": False}, "not causal"),
    ],
)
def test_configs_that_cannot_work_are_refused_at_once(
    folders: dict[str, Path], tmp_path: Path, name: str, changes: dict[str, Any], message: str
):
    with pytest.raises(ValueError, match=message):
        rewritten(folders[name], tmp_path / "vae", **changes)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        # diffusers would quietly take Wan 2.1's sixteen
        ("wan22", {"latents_mean": "absent"}, "latents_mean has 16 numbers for 48"),
        ("wan21", {"latents_std": [0.0] * 16}, "latents_std above zero"),
    ],
)
def test_wrong_statistics_are_refused(
    folders: dict[str, Path], tmp_path: Path, name: str, changes: dict[str, Any], message: str
):
    with pytest.raises(ValueError, match=message):
        rewritten(folders[name], tmp_path / "vae", **changes).encode(random_video(1))


def test_incomplete_weights_are_refused(folders: dict[str, Path], tmp_path: Path):
    shutil.copytree(folders["wan21"] / "vae", tmp_path / "vae")
    path = find_weights(tmp_path / "vae", "")[0]
    weights = load_file(path)
    weights.pop("encoder.conv_in.weight")
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 missing keys, such as encoder.conv_in.weight"):
        DiffusersVAE(DiffusersVAEConfig(str(tmp_path))).encode(random_video(1))


# --- the baseline's decoder -------------------------------------------------------------------------------------------


def test_baseline_equals_the_teacher(folders: dict[str, Path], spaces: dict[str, DiffusersVAE], kind: str):
    decoder, space = DiffusersDecoder.from_folder(str(folders[kind])), spaces[kind]
    latent = torch.randn(1, space.channels, 3, 2, 1)
    torch.testing.assert_close(decoder(latent), space.decode(latent))
    assert not any("encoder" in name.split(".") for name, _ in decoder.named_parameters())


@pytest.mark.parametrize("name", ["wan21", "wan22"])
def test_baseline_stream_equals_its_whole_clip(folders: dict[str, Path], name: str):
    decoder = DiffusersDecoder.from_folder(str(folders[name]))
    latent = torch.randn(2, decoder.layout.channels, 5, 2, 3)
    state = decoder.start_stream(2, 2 * decoder.layout.stride_hw, 3 * decoder.layout.stride_hw)
    frames = [decoder.step_stream(frame, state) for frame in latent.unbind(2)]
    assert [f.shape[2] for f in frames] == [1, 4, 4, 4, 4]
    torch.testing.assert_close(torch.cat(frames, 2), decoder(latent), atol=1e-5, rtol=1e-5)


def test_ltx_has_no_stream_and_says_why(folders: dict[str, Path]):
    decoder = DiffusersDecoder.from_folder(str(folders["ltx"]))
    with pytest.raises(ValueError, match="future latent frames"):
        decoder.start_stream(1, 64, 64)


@pytest.mark.parametrize(("release", "millions"), [("wan21", 73.3), ("wan22", 555.0)])
def test_random_decoders_have_the_released_layout(release: str, millions: float):
    with torch.device("meta"):
        decoder = DiffusersDecoder.random(release)
    assert round(sum(p.numel() for p in decoder.vae.decoder.parameters()) / 1e6, 1) == millions
    with pytest.raises(ValueError, match="wan21, wan22, ltx"):
        DiffusersDecoder.random("wan23")


def test_real_wan_latents_decode_to_the_right_shape(assets: Path, folders: dict[str, Path]):
    latent = torch.load(assets / "latents/test_latents_wan21.pth", map_location="cpu", weights_only=True)
    assert latent.shape == (1, 16, 16, 40, 64)
    assert 0.5 < latent.float().std() < 1.5  # normalised
    video = DiffusersDecoder.from_folder(str(folders["wan21"]))(latent[:, :, :2, :16, :24].float())
    assert video.shape == (1, 3, 5, 128, 192) and video.isfinite().all()
