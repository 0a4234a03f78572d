"""Where decoders come from: released autoencoders, runs of the trainer, the hub."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from exports import clip, small_flashdecoder, trained
from safetensors.torch import save_file
from test_backbones_ltx import KINDS as LTX_KINDS
from test_backbones_ltx import shake
from test_backbones_videovaeplus import TINY, made
from test_latent_spaces_diffusers import MODELS

import decoders
from decoders import exported
from decoders.backbones import videovaeplus_weights, wan_weights
from decoders.backbones.videovaeplus import VideoVAEPlusDecoder, VideoVAEPlusEncoder
from decoders.exported import CONFIG, WEIGHTS, ExportError
from decoders.latent_spaces import wan_mini
from decoders.latent_spaces.diffusers import DiffusersVAE, DiffusersVAEConfig
from decoders.latent_spaces.videovaeplus import VideoVAEPlus, VideoVAEPlusSpaceConfig
from experiments.checkpoints import save_weights
from experiments.config import load, resolved_yaml


def noise(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def again(decoder: exported.Exported, folder: Path) -> exported.Exported:
    """Saved and loaded."""
    return decoders.load(exported.save(folder, decoder, {}))


# --- released autoencoders --------------------------------------------------------------------------------------------


def test_wan_mini_is_the_space_to_the_bit(tmp_path: Path) -> None:
    space, found = wan_mini.WanMini(), decoders.load("wan_mini")
    video = torch.cat([clip(5, 16, 24), clip(5, 16, 24).flip(-1)])
    latent = space.encode(video)
    for decoder in (found, again(found, tmp_path / "out")):
        assert decoder.space.fingerprint == space.fingerprint and decoder.can_stream and decoder.can_encode
        assert torch.equal(decoder.encode(video), latent)
        drawn = (other.encode(video, sample=True, generator=noise()) for other in (decoder, space))
        assert torch.equal(*drawn)
        assert torch.equal(decoder.decode(latent), space.decode(latent))
        torch.testing.assert_close(decoder.normalise(decoder.denormalise(latent)), latent)
    half = decoders.load("wan_mini", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.encode(video).dtype == torch.float32
    assert (half.decode(latent).float() - found.decode(latent)).abs().mean() < 0.05


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    import diffusers

    root = tmp_path_factory.mktemp("vaes")
    torch.manual_seed(0)
    kinds = {name: MODELS[name] for name in ("wan21", "wan22")}
    kinds |= {f"ltx-{name}": ("AutoencoderKLLTXVideo", arguments) for name, arguments in LTX_KINDS.items()}
    for name, (class_name, arguments) in kinds.items():
        vae = getattr(diffusers, class_name)(**arguments)
        if name.startswith("ltx"):
            shake(vae)
            vae.latents_mean += torch.linspace(-1, 1, 4)
            vae.latents_std *= torch.linspace(0.5, 2, 4)
        vae.save_pretrained(root / name / "vae")
    return {name: root / name for name in kinds}


@pytest.mark.parametrize("name", ["wan21", "wan22"])
def test_wans_folder_is_the_latent_space_of_diffusers(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    space = DiffusersVAE(DiffusersVAEConfig(str(folders[name])))
    found = decoders.load(folders[name])
    assert found.space.fingerprint == space.fingerprint  # without diffusers: of the same weights and statistics
    video = clip(5, 32, 32)
    latent = space.encode(video)
    torch.testing.assert_close(found.encode(video), latent, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.decode(latent), space.decode(latent), atol=1e-4, rtol=1e-4)
    assert (found.space.mean, found.space.std) == tuple(map(tuple, space.statistics))
    copy = again(found, tmp_path / "out")
    assert copy.space == found.space
    assert torch.equal(copy.decode(latent), found.decode(latent)) and torch.equal(
        copy.encode(video), found.encode(video)
    )
    assert decoders.load(folders[name] / "vae").space.fingerprint == space.fingerprint


@pytest.mark.parametrize("kind", LTX_KINDS)
def test_ltxs_folder_is_the_latent_space_of_diffusers(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = folders[f"ltx-{kind}"]
    space = DiffusersVAE(DiffusersVAEConfig(str(folder)))
    found = decoders.load(folder)
    assert found.space.fingerprint == space.fingerprint
    latent = torch.randn(1, space.channels, 2, 2, 2)
    videos = []
    for decoder in (found, again(found, tmp_path / "out")):
        torch.manual_seed(1)  # of noise that some releases' blocks add
        videos.append(decoder.decode(latent))
    assert torch.equal(*videos)
    torch.manual_seed(1)
    torch.testing.assert_close(videos[0], space.decode(latent).clamp(-1, 1), atol=1e-4, rtol=1e-4)
    assert not found.can_encode
    with pytest.raises(ExportError, match="no encoder"):
        found.encode(clip(9, 64, 64))


def test_other_autoencoders_of_diffusers_are_told(tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / CONFIG).write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    with pytest.raises(ExportError, match="AutoencoderKL; supported are"):
        decoders.load(tmp_path)
    config = {
        "_class_name": "AutoencoderKLMochi",
        "latent_channels": 12,
        "temporal_expansions": [6],
        "spatial_expansions": [8],
    }
    (tmp_path / "vae" / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ExportError, match="Wan and LTX, use diffusers"):
        decoders.load(tmp_path)


def test_videovaeplus_and_wans_own_file(tmp_path: Path) -> None:
    halves = [made(kind, TINY) for kind in (VideoVAEPlusEncoder, VideoVAEPlusDecoder)]
    file = tmp_path / "sota.safetensors"
    save_file({k: v.contiguous() for half in halves for k, v in videovaeplus_weights.to_released(half).items()}, file)
    monkeyed = videovaeplus_weights.NORM_GROUPS
    videovaeplus_weights.NORM_GROUPS = TINY.groups
    try:
        found = decoders.load(file)
        space = VideoVAEPlus(VideoVAEPlusSpaceConfig(str(file), channels=4))
        video = clip(8, 16, 24)
        latent = space.encode(video)
        assert found.space.fingerprint == space.fingerprint and not found.space.causal and not found.can_stream
        for decoder in (found, again(found, tmp_path / "out")):
            assert torch.equal(decoder.encode(video), latent)
            drawn = (other.encode(video, sample=True, generator=noise()) for other in (decoder, space))
            assert torch.equal(*drawn)
            assert torch.equal(decoder.decode(latent), space.decode(latent))
    finally:
        videovaeplus_weights.NORM_GROUPS = monkeyed
    (tmp_path / "Wan2.1_VAE.pth").write_bytes(b"no pickle")
    with pytest.raises(ExportError):
        decoders.load(tmp_path / "Wan2.1_VAE.pth")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ExportError, match=r"no VideoVAE\+"):
        decoders.load(tmp_path / "other.safetensors")


def test_wans_folder_with_a_weight_too_few(folders: dict[str, Path], tmp_path: Path) -> None:
    _, state = wan_weights.read(str(folders["wan21"]))
    state.pop(next(name for name in state if name.startswith("decoder.")))
    (tmp_path / CONFIG).write_text((folders["wan21"] / "vae" / CONFIG).read_text())
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ExportError, match="do not fit"):
        decoders.load(tmp_path)


# --- runs -------------------------------------------------------------------------------------------------------------


def run_of(name: str, folder: Path, *overrides: str) -> tuple[Any, Path]:
    """A run's folder as training leaves it, with its weights and a checkpoint, and the decoder."""
    own = trained(name, *overrides)
    for part in own.modules():  # what no weights file holds is what the configuration says
        if hasattr(part, "reset_statistics"):
            part.reset_statistics()
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(resolved_yaml(load(name, overrides)))
    weights = {**own.inference_parameters(), **own.inference_buffers()}
    said = {"step": "5", "latent_space": own.latent_space.fingerprint}
    save_weights(folder / "weights-last.safetensors", weights, said)
    return own, folder


def test_a_run_is_read_like_its_export(debug_name: str, tmp_path: Path) -> None:
    own, folder = run_of(debug_name, tmp_path / "run")
    found, copy = decoders.load(folder), decoders.load(exported.save(tmp_path / "out", own, {}))
    assert found.architecture == copy.architecture and found.sampling == copy.sampling
    assert found.space == copy.space and found.about["step"] == 5
    assert found.state_dict().keys() == copy.state_dict().keys()
    both = [dict(decoder.named_buffers()) | dict(decoder.named_parameters()) for decoder in (found, copy)]
    assert both[0].keys() == both[1].keys() and all(torch.equal(both[0][key], both[1][key]) for key in both[0])
    latent = torch.randn(1, found.space.channels, 2, 4, 4)
    assert torch.equal(found.decode(latent), own.decode(latent))


def test_checkpoints_are_read_with_their_average(tmp_path: Path) -> None:
    own, folder = run_of("flashdecoder_gan_debug", tmp_path / "run", "pad=replicate")
    average = {name: p.detach() + 1 for name, p in own.inference_parameters().items()}
    state = {
        "state_dict": own.state_dict(),
        "global_step": 7,
        "ema": average,
        "optimizer_states": [{"x": torch.zeros(2)}],
    }
    torch.save(state, folder / "last.ckpt")
    found = decoders.load(folder / "last.ckpt")
    assert found.about == {"run": "run", "weights": "last.ckpt", "step": 7} and found.sampling["pad"] == "replicate"
    for name, value in average.items():
        assert torch.equal(found.get_parameter("network." + name.removeprefix("model.")), value)
    torch.save({"state_dict": own.state_dict(), "global_step": 7}, folder / "last.ckpt")
    latent = torch.randn(1, 12, 2, 2, 2)
    assert torch.equal(decoders.load(folder / "last.ckpt").decode(latent), own.decode(latent))


def test_the_averaged_weights_of_a_run_come_first(tmp_path: Path) -> None:
    own, folder = run_of("flashdecoder_debug", tmp_path / "run")
    weights = {name: tensor + 1 for name, tensor in {**own.inference_parameters(), **own.inference_buffers()}.items()}
    save_weights(
        folder / "weights-ema.safetensors", weights, {"step": "6", "latent_space": own.latent_space.fingerprint}
    )
    assert decoders.load(folder).about == {"run": "run", "weights": "weights-ema.safetensors", "step": 6}
    assert decoders.load(folder / "weights-last.safetensors").about["step"] == 5


def test_runs_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    own, folder = run_of("flashdecoder_debug", tmp_path / "run")
    config = (folder / "config.yaml").read_text()
    cases = {
        "decoder: [": "cannot be read",
        "- 1": "no configuration of a run",
        "seed: 0": "no configuration of a run",
        config.replace("decoders.flashdecoder.FlashDecoder", "decoders.nothing.X"): "is none of",
        config.replace("decoders.latent_spaces.dct.DCT", "os.path.join"): "is none of decoders.latent_spaces",
        config.replace("decoders.latent_spaces.dct.DCT", "decoders.latent_spaces.dct.Nothing"): "no configuration",
        config.replace("depth:", "deep:"): "decoder.deep is unknown",
    }
    for text, message in cases.items():
        (folder / "config.yaml").write_text(text)
        with pytest.raises(ExportError, match=message) as caught:
            decoders.load(folder)
        assert "\n" not in str(caught.value)
    (folder / "config.yaml").write_text(config)
    (folder / "last.ckpt").write_bytes(b"cut")
    with pytest.raises(ExportError, match="damaged"):
        decoders.load(folder / "last.ckpt")
    (folder / "weights-last.safetensors").unlink()
    (folder / "last.ckpt").unlink()
    with pytest.raises(ExportError, match="without weights"):
        decoders.load(folder)
    save_weights(folder / "weights-last.safetensors", dict(own.model.named_parameters()), {})
    with pytest.raises(ExportError, match="holds no decoder"):
        decoders.load(folder)


# --- the hub ----------------------------------------------------------------------------------------------------------


def test_the_hub_is_asked_for_two_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    folder, asked = exported.save(tmp_path / "snapshot", small_flashdecoder(), {"step": 9}), []

    def snapshot_download(repository: str, **options: Any) -> str:
        asked.append((repository, options))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    found = decoders.load("someone/decoder", revision="v1", token="secret")
    assert found.about == {"step": 9}
    wanted = {"revision": "v1", "token": "secret", "allow_patterns": [CONFIG, WEIGHTS]}
    assert asked == [("someone/decoder", wanted)]
    (folder / CONFIG).write_text('{"_class_name": "AutoencoderKLWan"}')
    with pytest.raises(ExportError, match="no exported decoder"):
        decoders.load("someone/decoder")


def test_a_hub_that_does_not_answer_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def snapshot_download(repository: str, **_: Any) -> str:
        raise LocalEntryNotFoundError("no connection\nmore lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ExportError, match=r"nor to be had from the hub \(no connection\)") as caught:
        decoders.load("someone/decoder")
    assert "\n" not in str(caught.value)
    with pytest.raises(ExportError, match="there is no no_such_thing"):
        decoders.load("no_such_thing")
