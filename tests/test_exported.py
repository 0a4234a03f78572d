"""Exported decoders: to the bit what the run's own decoder gives, from a folder that is whole or not there."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from exports import clip, frames_of, shaken, small_flashdecoder, trained
from safetensors import safe_open
from safetensors.torch import load_file

import decoders
from decoders import exported, exported_files
from decoders.base import VideoDecoder
from decoders.ema import Ema
from decoders.exported import CONFIG, WEIGHTS, ExportError, SpaceInfo
from decoders.inference import InferenceOptions
from decoders.training import EmaConfig

ROOT = Path(__file__).parent.parent
FAMILIES = sorted(path.parent.name for path in ROOT.glob("decoders/*/module.py"))


def noise(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def latents(decoder, n: int | None = None) -> torch.Tensor:
    space = decoder.latent_space if hasattr(decoder, "latent_space") else decoder.space
    n = n or space.latent_frames(frames_of(space))
    return torch.randn(2, space.channels, n, 2, 4, generator=noise(1))


@pytest.fixture(scope="module")
def kept() -> dict[str, tuple[VideoDecoder, Path]]:
    return {}


@pytest.fixture
def pair(debug_name: str, kept: dict, tmp_path_factory: pytest.TempPathFactory) -> tuple[VideoDecoder, Path]:
    """A family's decoder and the folder of its export; made once, and changed by no test."""
    if debug_name not in kept:
        own = trained(debug_name)
        kept[debug_name] = own, exported.save(tmp_path_factory.mktemp(debug_name) / "out", own, {"step": 3})
    return kept[debug_name]


# --- equal to the run's own -------------------------------------------------------------------------------------------


def test_what_is_loaded_decodes_to_the_bit(pair: tuple[VideoDecoder, Path]) -> None:
    own, folder = pair
    found = decoders.load(folder)
    assert not found.training and not any(p.requires_grad for p in found.parameters())
    assert found.about == {"step": 3} and found.family == type(own).__module__.split(".")[1]
    assert found.size_multiple == own.size_multiple
    latent = latents(own)
    given = {"reference": clip(2, 16, 32).expand(2, -1, -1, -1, -1)} if found.uses_reference else {}
    assert torch.equal(found.decode(latent, **given), own.decode(latent, **given))
    cut = {"size": (3, 11, 27), "generator": None}
    assert torch.equal(found.decode(latent, **cut), own.decode(latent, **cut))
    assert torch.equal(found.decode(latent, generator=noise()), own.decode(latent, generator=noise()))
    image = latent[:, :, :1]
    assert torch.equal(found.decode(image), own.decode(image))


def test_a_loaded_stream_is_the_runs_own_to_the_bit(pair: tuple[VideoDecoder, Path]) -> None:
    own, folder = pair
    found = decoders.load(folder)
    latent = latents(own)
    if not found.can_stream:
        with pytest.raises(ExportError, match="cannot stream"):
            found.start_stream(2, 16, 32)
        with pytest.raises((TypeError, ValueError)):
            own.start_stream(2, 16, 32)
        return
    streams = [(decoder, decoder.start_stream(2, 14, 29, generator=noise())) for decoder in (found, own)]
    for frame in latent.unbind(2):
        ours, theirs = (decoder.step_stream(frame, state) for decoder, state in streams)
        assert torch.equal(ours, theirs)
    assert torch.equal(*(decoder.end_stream(state) for decoder, state in streams))


def test_a_trained_encoder_is_part_of_it(pair: tuple[VideoDecoder, Path], tmp_path: Path) -> None:
    own, folder = pair
    found = decoders.load(folder)
    video = clip(frames_of(found.space), 16, 24)
    if getattr(own, "encoder", None) is None:
        assert not found.can_encode and found.space.fingerprint == own.latent_space.fingerprint
        with pytest.raises(ExportError, match=own.latent_space.name):
            found.encode(video)
        return
    assert torch.equal(found.encode(video), own.encode(video))
    assert torch.equal(*(d.encode(video, sample=True, generator=noise()) for d in (found, own)))
    torch.testing.assert_close(found.space.mean, tuple(own.model.latent_mean.flatten().tolist()))
    assert found.space.std != (1.0,) * found.space.channels
    assert found.space.fingerprint not in (own.latent_space.fingerprint, "")
    changed = copy.deepcopy(own)
    shaken(changed.encoder)
    other = decoders.load(exported.save(tmp_path / "other", changed, {}))
    assert other.space.fingerprint != found.space.fingerprint  # another encoder, other latents


@pytest.mark.parametrize("name", ["baseline_debug", "wan_mini"])
def test_frames_encoded_as_they_come_are_the_clips_own(name: str, tmp_path: Path) -> None:
    found = decoders.load("wan_mini" if name == "wan_mini" else exported.save(tmp_path / "out", trained(name), {}))
    video, past, parts = clip(13), None, []
    for part in (video[:, :, :1], video[:, :, 1:5], video[:, :, 5:9], video[:, :, 9:]):
        latent, past = found.encode_step(part, past)
        parts.append(latent)
    assert torch.equal(torch.cat(parts, 2), found.encode(video))
    for frames, started in ((2, None), (3, past)):
        with pytest.raises(ExportError, match="goes on with 4"):
            found.encode_step(video[:, :, :frames], started)


def test_regen_takes_its_own_options(tmp_path: Path) -> None:
    own = trained("regen_space_debug", "objective.steps=2")
    found = decoders.load(exported.save(tmp_path / "out", own, {}))
    latent = latents(own, 2)
    for options in ({}, {"steps": 3}, {"times": [0, 1.5, 2]}, {"extension": True}):
        assert torch.equal(found.decode(latent, **options), own.decode(latent, **options))
    assert not torch.equal(found.decode(latent), found.decode(latent, steps=1))
    with pytest.raises(ExportError, match="taps is no option of regen"):
        found.decode(latent, taps=3)


def test_a_plain_baseline_skeleton_and_padding_are_kept(tmp_path: Path) -> None:
    own = trained("baseline_debug", "decoder.skeleton=true", "pad=replicate")
    found = decoders.load(exported.save(tmp_path / "out", own, {}))
    assert torch.equal(found.decode(latents(own)), own.decode(latents(own)))
    odd = clip(6, 30, 44)
    assert torch.equal(found.encode(odd), own.encode(odd))


def test_every_family_has_an_export() -> None:
    assert {*FAMILIES, "backbones"} == set(exported.families())
    for family in FAMILIES:
        hook = exported.hooks(family)
        assert all(callable(getattr(hook, name)) for name in ("describe", "build", "from_run")), family


# --- what is in the folder --------------------------------------------------------------------------------------------


def test_the_averaged_weights_are_stored_and_nothing_else_changes(tmp_path: Path) -> None:
    own = trained("flashdecoder_gan_debug")
    own.ema = Ema(own.inference_parameters(), EmaConfig(decay=0.5, warmup_steps=0))
    before = {name: p.clone() for name, p in own.named_parameters()}
    shaken(own.model)
    last = {name: p.clone() for name, p in own.named_parameters()}
    stored = load_file(exported.save(tmp_path / "out", own, {}) / WEIGHTS)
    assert all(torch.equal(own.get_parameter(name), value) for name, value in last.items())
    assert stored and not any("discriminator" in name for name in stored)
    for name, value in stored.items():
        if (whole := "model." + name.removeprefix("network.")) in before:
            assert torch.equal(value, before[whole]) and not torch.equal(value, last[whole])
    with own.ema_weights():
        wanted = own.decode(latents(own))
    assert torch.equal(decoders.load(tmp_path / "out").decode(latents(own)), wanted)


def test_neither_teacher_nor_projections_nor_a_frozen_encoder_are_stored(tmp_path: Path) -> None:
    own = trained("flash_vaed_debug", "objective.match=projected", "objective.start=null", "objective.taps=[mid]")
    assert any(name.startswith("projections.") for name, _ in own.named_parameters())
    names = load_file(exported.save(tmp_path / "out", own, {}) / WEIGHTS).keys()
    assert {name.split(".")[0] for name in names} == {"network"}
    assert len(names) == len([*own.model.parameters(), *own.model.buffers()])


def test_an_export_can_be_exported_again(pair: tuple[VideoDecoder, Path], tmp_path: Path) -> None:
    _, first = pair
    again = exported.save(tmp_path / "again", decoders.load(first), {})
    assert json.loads((first / CONFIG).read_text()) == json.loads((again / CONFIG).read_text())
    one, two = load_file(first / WEIGHTS), load_file(again / WEIGHTS)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_a_folder_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = small_flashdecoder()
    folder = exported.save(tmp_path / "out", decoder, {"step": 1}, files={"README.md": "card"})
    assert (folder / "README.md").read_text() == "card"
    with pytest.raises(ExportError, match="is not empty"):
        exported.save(folder, decoder, {"step": 2})

    def full(*_, **__) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exported_files, "write_tensors", full)
    with pytest.raises(ExportError, match="No space left"):
        exported.save(folder, decoder, {"step": 2}, overwrite=True)
    assert decoders.load(folder).about == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    monkeypatch.undo()
    exported.save(folder, decoder, {"step": 2}, overwrite=True)
    assert decoders.load(folder).about == {"step": 2} and not (folder / "README.md").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_is_no_export_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "text.tex").write_text("years")
    with pytest.raises(ExportError, match="something else"):
        exported.save(tmp_path / "thesis", small_flashdecoder(), {}, overwrite=True)
    assert (tmp_path / "thesis" / "text.tex").read_text() == "years"
    with pytest.raises(ExportError, match="is a file"):
        exported.save(tmp_path / "thesis" / "text.tex", small_flashdecoder(), {}, overwrite=True)
    with pytest.raises(ExportError, match="cannot be written"):
        exported.save(tmp_path / "thesis" / "text.tex" / "below", small_flashdecoder(), {})
    with pytest.raises(ExportError, match="finite"):
        exported.save(tmp_path / "out", small_flashdecoder(), {"psnr": float("nan")})
    assert not (tmp_path / "out").exists()


def test_the_spaces_own_decoder_is_not_exported(tmp_path: Path) -> None:
    own = trained("baseline_wan_mini")
    assert exported.describe(trained("baseline_debug"))["family"] == "baseline"
    if type(own.model).__name__ == "SpaceDecoder":
        with pytest.raises(ExportError, match=r"decoders\.load"):
            exported.save(tmp_path / "out", own, {})


# --- dtype, device, speed ---------------------------------------------------------------------------------------------


def test_dtype_is_chosen_at_loading(pair: tuple[VideoDecoder, Path], tmp_path: Path) -> None:
    own, folder = pair
    plain, half = decoders.load(folder), decoders.load(folder, dtype=torch.bfloat16)
    assert (plain.dtype, half.dtype) == (torch.float32, torch.bfloat16)
    latent = latents(own)
    with torch.no_grad():
        video = half.decode(latent, generator=noise()).float()
    assert video.isfinite().all()
    assert (video - plain.decode(latent, generator=noise())).abs().mean() < 0.1
    stored = decoders.load(exported.save(tmp_path / "half", own, {}, dtype=torch.bfloat16))
    assert stored.dtype == torch.bfloat16
    assert torch.equal(stored.decode(latent, generator=noise()), half.decode(latent, generator=noise()))
    with pytest.raises(ExportError, match="not floating"):
        decoders.load(folder, dtype=torch.int8)


def test_weights_stay_in_the_file(tmp_path: Path) -> None:
    folder = exported.save(tmp_path / "out", small_flashdecoder(), {})
    found = decoders.load(folder)
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        assert set(file.keys()) == set(dict(found.named_parameters())) | set(dict(found.named_buffers()))
    assert all(parameter.data_ptr() % 64 == 0 for parameter in found.parameters())
    mapped = Path("/proc/self/maps")
    if mapped.exists():
        assert str(folder / WEIGHTS) in mapped.read_text()


def test_an_optimised_form_is_an_export_too(pair: tuple[VideoDecoder, Path]) -> None:
    own, folder = pair
    plain = decoders.load(folder)
    fast, latent = plain.optimised(), latents(own)
    assert (fast.dtype, fast.device, fast.can_stream) == (plain.dtype, plain.device, plain.can_stream)
    given = {"reference": clip(1, 16, 32).expand(2, -1, -1, -1, -1)} if fast.uses_reference else {}
    wanted = plain.decode(latent, size=(3, 11, 27), generator=noise(), **given)
    torch.testing.assert_close(
        fast.decode(latent, size=(3, 11, 27), generator=noise(), **given), wanted, atol=2e-4, rtol=1e-3
    )
    quantised = plain.optimised(InferenceOptions(uint8=True))
    frames = quantised.decode(latent, size=(3, 11, 27), generator=noise(), **given)
    assert frames.dtype == torch.uint8 and frames.shape == (2, 3, 11, 27, 3)
    with pytest.raises(ExportError, match="not exported"):
        exported.save(folder.parent / "fast", fast, {})


# --- latents ----------------------------------------------------------------------------------------------------------


def test_statistics_go_there_and_back() -> None:
    decoder = small_flashdecoder()
    raw = torch.randn(2, 4, 3, 2, 2) * 3 + 1
    mean, std = (torch.tensor(v).view(1, 4, 1, 1, 1) for v in (decoder.space.mean, decoder.space.std))
    torch.testing.assert_close(decoder.normalise(raw), (raw - mean) / std)
    torch.testing.assert_close(decoder.denormalise(decoder.normalise(raw)), raw)
    without = SpaceInfo("bare", 4, 4, 8, True, "f2")
    with pytest.raises(ExportError, match="states no mean"):
        without.normalise(raw)


@pytest.mark.parametrize("shape", [(1, 5, 2, 4, 4), (4, 2, 4, 4), (1, 4, 0, 4, 4)])
def test_latents_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises((ExportError, TypeError)):
        small_flashdecoder().decode(torch.zeros(shape))


def test_latents_of_another_space_and_raw_ones_are_told() -> None:
    decoder, normalised = small_flashdecoder(), torch.randn(1, 4, 3, 8, 8)
    decoder.check_latent(normalised, "f1")
    decoder.check_latent(0.4 * normalised)  # a flat film
    with pytest.raises(ExportError, match=r"of the space f2, and this decoder reads small \(f1\)"):
        decoder.check_latent(normalised, "f2")
    with pytest.raises(ExportError, match="look raw"):
        decoder.check_latent(decoder.denormalise(normalised))
    with pytest.raises(ExportError, match="not finite"):
        decoder.check_latent(normalised / 0)
    with pytest.raises(ExportError, match="std 9"):
        SpaceInfo("bare", 4, 4, 8, True, "f2").check_latent(9 * torch.randn(1, 4, 9, 32, 32))
    with pytest.raises(ExportError, match=r"torch\.int64"):
        decoder.decode(torch.ones(1, 4, 1, 2, 2, dtype=torch.int64))


def test_wan_minis_latents_of_films_look_normalised_and_raw_ones_raw() -> None:
    decoder = decoders.load("wan_mini")
    for video in (clip(5, 48, 64), 0.2 * clip(5, 48, 64) - 0.5, torch.rand(1, 3, 5, 48, 64) * 2 - 1):
        decoder.check_latent(decoder.encode(video))


def test_frame_rules_are_the_spaces_own(pair: tuple[VideoDecoder, Path]) -> None:
    own, _ = pair
    info = exported.describe(own)["space"]
    for t in range(1, 24):
        answers = []
        for space in (info, own.latent_space):
            try:
                answers.append((space.latent_frames(t), space.padded_frames(t)))
            except ValueError as error:
                answers.append(str(error))
        assert answers[0] == answers[1]
        try:
            n = own.latent_space.pixel_frames(t)
        except ValueError:
            with pytest.raises(ValueError):
                info.pixel_frames(t)
        else:
            assert info.pixel_frames(t) == n


# --- without the trainer ----------------------------------------------------------------------------------------------

HEAVY = (
    "lightning",
    "pytorch_lightning",
    "omegaconf",
    "torchmetrics",
    "losses",
    "metrics",
    "datamodules",
    "experiments",
    "diffusers",
)
LOADING = """
import json, resource, sys, time
import torch
torch.set_num_threads(1)
def resident():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) / 1024
before, start = resident(), time.perf_counter()
import decoders
decoder = decoders.load(sys.argv[1])
seconds, after = time.perf_counter() - start, resident()
heavy = [name for name in sys.argv[2].split(",") if name in sys.modules]
print(json.dumps({"seconds": seconds, "mib": after - before, "heavy": heavy}))
"""


def loaded_elsewhere(source: str | Path) -> dict:
    command = [sys.executable, "-c", LOADING, str(source), ",".join(HEAVY)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_loading_imports_nothing_of_the_trainer(kept: dict, tmp_path: Path) -> None:
    names = ("regen_debug", "magvit2_debug", "refdecoder_debug", "flash_vaed_debug", "flashdecoder_debug")
    known = {
        name: kept[name][1] if name in kept else exported.save(tmp_path / name, trained(name), {}) for name in names
    }
    code = "import sys, decoders\nfor source in sys.argv[2:]: decoders.load(source)\n"
    code += "print([name for name in sys.argv[1].split(',') if name in sys.modules])"
    command = [sys.executable, "-c", code, ",".join(HEAVY), *map(str, known.values()), "wan_mini"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[]"


@pytest.mark.slow
def test_a_gigabyte_is_mapped_and_s_is_there_in_a_second(tmp_path: Path) -> None:
    """S (12 layers of 512) beyond importing torch, and a file of about 1 GiB of which next to nothing is read. The weights are
    random: what is measured is loading."""
    small = small_flashdecoder(depth=12, dim=512, num_heads=8, num_kv_heads=2, refinement_depth=2)
    found = loaded_elsewhere(exported.save(tmp_path / "s", small, {}))
    print("S:", found)
    assert found["heavy"] == [] and found["seconds"] < 1.0
    large = small_flashdecoder(depth=6, dim=1536, num_heads=24, num_kv_heads=3, refinement_depth=1)
    folder = exported.save(tmp_path / "large", large, {})
    size = (folder / WEIGHTS).stat().st_size / 2**20
    del large
    found = loaded_elsewhere(folder)
    print(f"{size:.0f} MiB:", found)
    assert size > 900
    assert found["mib"] < 300 and found["seconds"] < 3.0  # what python imports, and the pages that were touched
