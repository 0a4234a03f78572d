"""Our LTX-Video decoder against diffusers' on the same weights, its names, its causal form, and Flash-VAED's student."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from decoders.backbones import ltx_weights
from decoders.backbones.ltx import LTXConfig, LTXDecoder
from decoders.backbones.ltx_layers import EdgeConv3d, ResBlock, SeparableEdgeConv3d, Upsample
from decoders.flash_vaed.ltx_student import from_released, ltx_student
from decoders.latent_spaces.diffusers import decode_clips
from decoders.layers.causal_conv import FrameConv2d

FIRST = {
    "latent_channels": 4,
    "layers_per_block": (1, 1, 1, 1, 1),
    "decoder_layers_per_block": (2, 1, 1, 2, 1),
    "block_out_channels": (4, 4, 4, 4),
    "decoder_block_out_channels": (4, 8, 16, 16),
    "scaling_factor": 2.0,
}
LATER = {
    **FIRST,
    "decoder_block_out_channels": (8, 16, 32),
    "decoder_layers_per_block": (1, 2, 1, 2),
    "decoder_spatio_temporal_scaling": (True,) * 3,
    "decoder_inject_noise": (True, False, True, True),
    "upsample_residual": (True, True, False),
    "upsample_factor": (2, 2, 2),
    "timestep_conditioning": True,
}
KINDS = {"first": FIRST, "causal": {**FIRST, "decoder_causal": True}, "later": LATER}
SMALL = LTXConfig(channels=4, widths=(16, 16, 16, 8, 4), blocks=(2, 1, 2, 1, 1))


def shake(module: nn.Module) -> None:
    """Every weight away from its initial value, norms and zero scales too."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim > 1 and "scale" not in name:
                parameter.mul_(1.5)
            elif "multiplier" not in name:
                parameter.add_(0.3 * torch.randn(parameter.shape))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A pipeline folder per kind, with the autoencoder as its ``vae``."""
    from diffusers import AutoencoderKLLTXVideo

    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("ltx")
    for kind, arguments in KINDS.items():
        vae = AutoencoderKLLTXVideo(**arguments)
        shake(vae)
        vae.latents_mean += torch.linspace(-1, 1, 4)
        vae.latents_std *= torch.linspace(0.5, 2, 4)
        vae.save_pretrained(root / kind / "vae")
    return {kind: root / kind for kind in KINDS}


def theirs(folder: Path, latent: Tensor) -> Tensor:
    """What diffusers makes of normalised latents, at timestep 0."""
    from diffusers import AutoencoderKLLTXVideo

    vae = AutoencoderKLLTXVideo.from_pretrained(folder, subfolder="vae", local_files_only=True).eval()
    mean, std = (values.view(1, -1, 1, 1, 1) for values in (vae.latents_mean, vae.latents_std))
    torch.manual_seed(1)
    with torch.no_grad():
        return decode_clips(vae, latent * std / vae.config.scaling_factor + mean)


@pytest.mark.parametrize("frames", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_equal_to_diffusers(folders, kind, frames):
    latent = torch.randn(2, 4, frames, 2, 3)
    expected = theirs(folders[kind], latent)
    decoder = LTXDecoder.from_folder(str(folders[kind]))
    torch.manual_seed(1)  # the later release's decoder draws noise
    with torch.no_grad():
        video = decoder(latent)
    assert video.shape == (2, 3, 1 + 8 * (frames - 1), 64, 96)
    assert expected.std() > 0.05
    assert (video - expected).abs().max() < 1e-4


def test_bfloat16_is_near(folders):
    latent = torch.randn(1, 4, 2, 2, 2)
    decoder = LTXDecoder.from_folder(str(folders["first"]))
    exact = decoder.decode(latent)
    rounded = decoder.to(torch.bfloat16).decode(latent)
    assert rounded.dtype == torch.bfloat16
    assert (rounded - exact).square().mean() < 1e-3 * exact.square().mean()


def test_taps_are_what_the_stages_give(folders):
    decoder = LTXDecoder.from_folder(str(folders["first"]))
    names = ("mid", "up0", "up1", "up2", "up3")
    with torch.no_grad():
        video, features = decoder(torch.randn(1, 4, 2, 1, 2), taps=names)
        again, _, _ = decoder.run(features["up2"], None, True, stages=("up3", "out"))
    shapes = {name: tuple(feature.shape[1:]) for name, feature in features.items()}
    assert shapes == {
        "mid": (16, 2, 1, 2),
        "up0": (16, 2, 1, 2),
        "up1": (16, 3, 2, 4),
        "up2": (8, 5, 4, 8),
        "up3": (4, 9, 8, 16),
    }
    assert torch.equal(decoder.finish(again), video)
    with pytest.raises(ValueError, match="no stage up4"):
        decoder(torch.randn(1, 4, 1, 1, 1), taps=["up4"])


def test_names_are_inverse(folders):
    state = load_file(folders["first"] / "vae" / "diffusion_pytorch_model.safetensors")
    decoder = LTXDecoder.from_folder(str(folders["first"]))
    back = ltx_weights.to_diffusers(decoder)
    assert back.keys() == {name for name in state if not name.startswith("encoder.")}
    assert torch.allclose(back.pop("latents_std") * 2, state["latents_std"])  # the scaling factor is in it
    assert all(torch.equal(tensor, state[name]) for name, tensor in back.items())
    own = ltx_weights.from_diffusers(decoder, state)
    assert own.keys() == dict(decoder.named_parameters()).keys()
    assert all(torch.equal(tensor, own[name]) for name, tensor in decoder.state_dict().items())


def test_a_folded_timestep_is_not_given_back(folders):
    with pytest.raises(ValueError, match="time embedding folded"):
        ltx_weights.to_diffusers(LTXDecoder.from_folder(str(folders["later"])))


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("first", {"decoder.conv_in.conv.bias": None}, "decoder.conv_in.conv.bias is missing"),
        ("first", {"decoder.more": torch.zeros(1)}, "decoder.more is left over"),
        ("first", {"decoder.conv_in.conv.bias": torch.zeros(3)}, r"conv_in.conv.bias is \(3,\), expected \(16,\)"),
        ("first", {"latents_std": None}, "latents_std is missing"),
        ("first", {"latents_std": torch.zeros(4)}, "latents_std above zero"),
        ("first", {"latents_mean": torch.zeros(3)}, "3 numbers for 4 channels"),
        ("later", {"decoder.time_embedder.timestep_embedder.linear_2.bias": None}, "config.json says"),
        ("later", {"decoder.scale_shift_table": None}, "decoder.scale_shift_table is missing"),
    ],
)
def test_weights_that_do_not_fit(folders, tmp_path, kind, change, message):
    source = folders[kind] / "vae"
    state = load_file(source / "diffusion_pytorch_model.safetensors") | change
    save_file({n: t for n, t in state.items() if t is not None}, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    with pytest.raises(ValueError, match=message):
        LTXDecoder.from_folder(str(tmp_path))


def test_another_autoencoder_is_refused(tmp_path):
    wan = {
        "_class_name": "AutoencoderKLWan",
        "temperal_downsample": [False, True, True],
        "dim_mult": [1] * 4,
        "z_dim": 16,
    }
    (tmp_path / "config.json").write_text(json.dumps(wan))
    with pytest.raises(ValueError, match="no LTX-Video autoencoder"):
        LTXDecoder.from_folder(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="hf download Lightricks/LTX-Video"):
        LTXDecoder.from_folder("Lightricks/LTX-Video")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks": (1, 1)}, "blocks has 2 entries; 5 widths need 5"),
        ({"widths": (16, 16, 0, 8, 4)}, "must be 1 or more"),
        ({"factors": (1, 2, 1, 1)}, "up1 narrows 16 to 16"),
        ({"modulated": True}, "cannot be modulated"),
        ({"causal": True, "noise": (True,) * 5}, "causal decoder cannot have it"),
    ],
)
def test_layouts_that_cannot_be(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)
    with pytest.raises(ValueError, match="cannot become pixels"):
        Upsample(6, residual=True)
    with pytest.raises(ValueError, match="no blocks at up4"):
        LTXDecoder(SMALL, force_skip=["up4"])


def test_the_released_decoder_cannot_stream():
    with pytest.raises(ValueError, match="future latent frames"):
        LTXDecoder(SMALL).start_stream(1, 32, 32)


@pytest.mark.parametrize("student", [False, True])
def test_a_causal_decoder_streams_and_equals_the_whole_clip(student):
    config = replace(SMALL, causal=True)
    decoder = ltx_student(config, {"up2": 4, "up3": 2}) if student else LTXDecoder(config)
    shake(decoder)
    decoder.double()  # norms over two channels enlarge the rounding of float32
    latent = torch.randn(1, 4, 4, 2, 1)
    with torch.no_grad():
        whole = decoder(latent)
    state = decoder.start_stream(1, 64, 32)
    parts, sizes = [], []
    for frame in latent.unbind(2):
        parts.append(decoder.step_stream(frame, state))
        sizes.append(state.num_bytes())
    assert [part.shape[2] for part in parts] == [1, 8, 8, 8]
    assert len(set(sizes)) == 1  # what is remembered does not grow
    assert torch.allclose(torch.cat(parts, 2), whole.clamp(-1, 1), rtol=0, atol=1e-11)


@pytest.mark.parametrize("kind", ["first", "later"])
def test_checkpointing_changes_no_gradient(folders, kind):
    decoder = LTXDecoder.from_folder(str(folders[kind]))
    latent = torch.randn(1, 4, 2, 1, 2)
    gradients = []
    for enabled in (False, True):
        decoder.set_checkpointing(enabled)
        decoder.zero_grad()
        torch.manual_seed(2)
        decoder(latent).square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in decoder.parameters()])
    assert all(torch.equal(first, second) for first, second in zip(*gradients, strict=True))
    assert all(gradient.abs().sum() > 0 for gradient in gradients[0])


def size(decoder: nn.Module) -> int:
    return sum(parameter.numel() for parameter in decoder.parameters())


def test_sizes_are_the_released_ones():
    with torch.device("meta"):
        teacher, student = LTXDecoder(LTXConfig()), ltx_student()
    assert round(size(teacher) / 1e6, 1) == 238.8
    assert round(size(student) / 1e6, 2) == 66.96
    assert round(size(student.stages["up1"]) / 1e6, 1) == 58.3
    for decoder in (teacher, student):
        assert list(decoder.stages) == ["conv_in", "mid", "up0", "up1", "up2", "up3", "out"]
        assert (decoder.channels, decoder.stride_t, decoder.stride_hw) == (128, 8, 32)


def test_the_students_operators():
    student = ltx_student(SMALL, {"up2": 4, "up3": 2})
    kinds = {name: [type(layer) for layer in student.stages[name].layers] for name in SMALL.stages}
    assert kinds["up1"] == [Upsample, ResBlock, ResBlock]
    assert kinds["up2"] == kinds["up3"] == [ResBlock, Upsample, ResBlock]
    convs = {name: type(student.stages[name].layers[-1].conv1) for name in SMALL.stages}
    separable = dict.fromkeys(("mid", "up0", "up1"), SeparableEdgeConv3d)
    assert convs == {**separable, "up2": EdgeConv3d, "up3": FrameConv2d}
    assert type(student.stages["up3"].layers[0].conv1) is EdgeConv3d
    assert all((student.stages[name].layers[-1].skip is not None) == (name in ("up2", "up3")) for name in SMALL.stages)
    assert not student.can_stream
    assert student(torch.randn(1, 4, 2, 1, 2)).shape == (1, 3, 9, 32, 64)


def test_a_student_that_changes_nothing_is_the_teacher():
    teacher = LTXDecoder(SMALL)
    student = ltx_student(SMALL, widths={}, operators=dict.fromkeys(SMALL.stages, "dense"))
    student.load_state_dict(teacher.state_dict())
    latent = torch.randn(1, 4, 2, 1, 2)
    with torch.no_grad():
        assert torch.equal(student(latent), teacher(latent))
    for changes, message in (
        ({"widths": {"up9": 4}}, "no width at up9"),
        ({"operators": {"mid": "fft"}}, "no operator fft"),
    ):
        with pytest.raises(ValueError, match=message):
            ltx_student(SMALL, **changes)


def test_the_released_students_names():
    """Names as the public inference code has them, one of each kind."""
    with torch.device("meta"):
        student = ltx_student()
    theirs = set(ltx_weights.other_names(student).values())
    assert len(theirs) == len(dict(student.named_parameters()))
    for name in (
        "conv_in.conv.weight",
        "mid_block.resnets.3.conv1.depthwise.weight",
        "up_blocks.0.resnets.2.conv2.pointwise.bias",
        "up_blocks.1.upsamplers.0.conv.conv.weight",
        "up_blocks.2.conv_in.conv_shortcut.conv.weight",
        "up_blocks.2.resnets.2.norm3.bias",
        "up_blocks.3.conv_in.conv1.conv.weight",
        "up_blocks.3.resnets.3.conv2.weight",
        "up_blocks.3.resnets.0.conv_shortcut.weight",
        "conv_out.conv.bias",
    ):
        assert f"decoder.{name}" in theirs


def test_a_released_student_is_read(tmp_path, monkeypatch):
    teacher = replace(SMALL, mean=[1.0, 2.0, 3.0, 4.0])
    student = ltx_student(teacher, {"up2": 4, "up3": 2})
    state = ltx_weights.to_diffusers(student) | {"encoder.x": torch.zeros(1), "mean_of_means": torch.zeros(1)}
    state["latents_mean"] = torch.zeros(4)  # never those of the space in that code
    torch.save(state, tmp_path / "student.pth")
    monkeypatch.setattr(
        "decoders.flash_vaed.ltx_student.ltx_student", lambda config: ltx_student(config, {"up2": 4, "up3": 2})
    )
    read = from_released(tmp_path / "student.pth", teacher)
    latent = torch.randn(1, 4, 1, 1, 1)
    with torch.no_grad():
        assert torch.equal(read(latent), student(latent))
    with pytest.raises(FileNotFoundError, match="hf download Aoko955/Flash-VAED"):
        from_released(tmp_path / "none.pth")


@pytest.mark.slow
def test_full_size_is_equal_to_diffusers():
    from diffusers.models.autoencoders.autoencoder_kl_ltx import LTXVideoDecoder3d

    reference = LTXVideoDecoder3d(inject_noise=(False,) * 5).eval()
    shake(reference)
    state = {f"decoder.{name}": tensor for name, tensor in reference.state_dict().items()}
    decoder = ltx_weights.fill(LTXDecoder(LTXConfig()), state)
    for frames in (1, 2):
        latent = torch.randn(1, 128, frames, 1, 2)
        with torch.no_grad():
            video, expected = decoder(latent), reference(latent)
        assert (video - expected).abs().max() < 1e-4 * max(1.0, float(expected.abs().max()))
