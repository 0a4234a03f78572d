"""Exports that are damaged, hostile or of another version: one clear line each, before any work."""

import json
from pathlib import Path

import pytest
import torch
from exports import small_flashdecoder
from safetensors.torch import load_file, save_file

import decoders
from decoders import exported
from decoders.exported import CONFIG, WEIGHTS, Exported, ExportError
from decoders.exported_space import space_of
from decoders.latent_spaces.base import LatentSpace
from decoders.latent_spaces.learned import LOG_VARIANCE_RANGE
from losses import kl

CONFIGS = {
    "newer": (lambda c: c.update(format=2), "format 2; this version reads up to 1"),
    "no format": (lambda c: c.pop("format"), "format None"),
    "format as text": (lambda c: c.update(format="1"), "format '1'"),
    "unknown key": (lambda c: c.update(code="import os"), "code is unknown"),
    "missing key": (lambda c: c.pop("space"), "space is missing"),
    "another family": (lambda c: c.update(family="os.path"), "'os.path' is none of"),
    "a family above": (lambda c: c.update(family="../experiments"), "is none of"),
    "unknown setting": (lambda c: c["network"].update(widths=3), "network.widths is unknown"),
    "text for a number": (lambda c: c["network"].update(depth="12"), "network.depth is '12'"),
    "true for a number": (lambda c: c["network"].update(depth=True), "network.depth is True"),
    "huge number": (lambda c: c["network"].update(depth=10**12), "network.depth is 1000000000000"),
    "many layers": (lambda c: c["network"].update(depth=999_999), "far more"),
    "another width": (lambda c: c["network"].update(head_ratio=2.0), "network.head.up.weight is"),
    "a width that cannot be": (lambda c: c["network"].update(dim=65), "decoder.dim=65"),
    "more layers": (lambda c: c["network"].update(depth=2), "is missing"),
    "fewer layers": (lambda c: c["network"].update(refinement_depth=0), "is left over"),
    "channels": (lambda c: c["space"].update(channels=5, mean=None, std=None), "network.embed.weight is"),
    "statistics": (lambda c: c["space"].update(mean=[0.0]), "space.mean has 1 numbers for 4 channels"),
    "no spread": (lambda c: c["space"].update(std=[1.0, 0.0, 1.0, 1.0]), "must be above 0"),
    "a chunk of nothing": (lambda c: c["space"].update(chunk=0), "a chunk of 0 frames"),
    "pairs without chunks": (lambda c: c["space"].update(paired=True), "space.chunk is missing"),
    "another chunk than its pairs": (lambda c: c["space"].update(paired=True, chunk=-1), "space.chunk is -1"),
    "no stride": (lambda c: c["space"].update(stride_t=0), "stride_t is 0"),
    "sampling": (lambda c: c["sampling"].update(steps=0), "sampling.steps is unknown"),
    "pad": (lambda c: c["sampling"].update(pad="zeros"), "sampling.pad is 'zeros'"),
    "no table": (lambda c: c.update(network=[]), "network is no table"),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return exported.save(tmp_path_factory.mktemp("good") / "out", small_flashdecoder(), {})


def copied(good: Path, folder: Path) -> Path:
    folder.mkdir()
    for name in (CONFIG, WEIGHTS):
        (folder / name).write_bytes((good / name).read_bytes())
    return folder


@pytest.mark.parametrize("case", CONFIGS)
def test_a_wrong_config_is_one_clear_line(case: str, good: Path, tmp_path: Path) -> None:
    change, message = CONFIGS[case]
    folder = copied(good, tmp_path / "bad")
    config = json.loads((folder / CONFIG).read_text())
    change(config)
    (folder / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ExportError) as caught:
        decoders.load(folder)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "[1]", "{", '{"format": NaN}', "[" * 100_000, '{"format": 1e999}', "\x00\xff"], ids=range(7)
)
def test_what_is_no_config_is_one_clear_line(text: str, good: Path, tmp_path: Path) -> None:
    folder = copied(good, tmp_path / "bad")
    (folder / CONFIG).write_text(text, encoding="latin-1")
    with pytest.raises(ExportError) as caught:
        decoders.load(folder)
    assert "\n" not in str(caught.value) and CONFIG in str(caught.value)


def test_damaged_weights_are_one_clear_line(good: Path, tmp_path: Path) -> None:
    whole = (good / WEIGHTS).read_bytes()
    header = int.from_bytes(whole[:8], "little")
    overlapping = json.loads(whole[8 : 8 + header])
    names = [name for name in overlapping if name != "__metadata__"]
    overlapping[names[0]]["data_offsets"] = [0, 2**62]
    text = json.dumps(overlapping).encode()
    cases = {
        "empty": b"",
        "cut in the header": whole[: header // 2],
        "cut in the weights": whole[:-100],
        "a header of exabytes": (2**62).to_bytes(8, "little") + whole[8:],
        "offsets outside": len(text).to_bytes(8, "little") + text + whole[8 + header :],
        "a pickle": b"\x80\x04cos\nsystem\n(S'true'\ntR.",
    }
    for case, content in cases.items():
        folder = copied(good, tmp_path / case.replace(" ", "-"))
        (folder / WEIGHTS).write_bytes(content)
        with pytest.raises(ExportError, match="damaged") as caught:
            decoders.load(folder)
        assert "\n" not in str(caught.value), case
    folder = copied(good, tmp_path / "none")
    (folder / WEIGHTS).unlink()
    with pytest.raises(ExportError, match="belong beside"):
        decoders.load(folder)


def test_weights_of_another_kind_are_refused(good: Path, tmp_path: Path) -> None:
    tensors = load_file(good / WEIGHTS)
    name = next(name for name, tensor in tensors.items() if tensor.ndim == 2)
    for wrong in (tensors[name].to(torch.int64), tensors[name].to(torch.float8_e4m3fn), tensors[name][:1].clone()):
        folder = tmp_path / f"{wrong.dtype}-{len(wrong)}"
        copied(good, folder)
        save_file({**tensors, name: wrong}, folder / WEIGHTS)
        with pytest.raises(ExportError, match=name):
            decoders.load(folder)


def test_exported_is_a_module(tmp_path: Path) -> None:
    decoder = small_flashdecoder()
    assert isinstance(decoder, Exported) and isinstance(decoder, torch.nn.Module)
    assert decoder.to(torch.float64).dtype == torch.float64
    with pytest.raises(ExportError, match="there is no"):
        decoders.load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ExportError, match="no config"):
        decoders.load(tmp_path / "empty")
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        _ = decoders.laod


class Own(LatentSpace):
    """A space of somebody's own."""

    name = "somebody/own"
    channels, stride_t, stride_hw = 4, 4, 8
    mean, std = (0.0, 1.0, 2.0, 3.0), torch.tensor([1.0, 2.0, 3.0, 4.0])
    fingerprint = "mine"

    def _encode(self, video: torch.Tensor, sample: bool, generator: torch.Generator | None) -> torch.Tensor:
        return torch.zeros(len(video), 4, 1, 2, 2)


def test_a_space_of_ones_own_keeps_its_statistics_and_no_path() -> None:
    space, network = Own(), torch.nn.Identity()
    info = space_of(space, network, None)
    assert (info.mean, info.std, info.fingerprint) == ((0.0, 1.0, 2.0, 3.0), (1.0, 2.0, 3.0, 4.0), "mine")
    assert info.name == "somebody/own"
    space.std, space.name = None, "/data/someone/Wan2.1-Diffusers/vae"
    info = space_of(space, network, None)
    assert info.mean is None and info.name == "Wan2.1-Diffusers"
    space.frame_step = 8
    with pytest.raises(ExportError, match="8 frames more at a time"):
        space_of(space, network, None)


def test_losses_and_spaces_clamp_log_variances_alike() -> None:
    assert kl.LOG_VARIANCE_RANGE == LOG_VARIANCE_RANGE


def test_a_device_that_is_not_there_is_not_the_weights_fault(good: Path) -> None:
    with pytest.raises(ExportError, match="device cuda:63 is not to be had here"):
        decoders.load(good, device="cuda:63")


def test_a_file_that_holds_no_weights_is_told_so(tmp_path: Path) -> None:
    (tmp_path / "film.mp4").write_bytes(b"no weights" * 100)
    with pytest.raises(ExportError, match="film.mp4 is no file of weights"):
        decoders.load(tmp_path / "film.mp4")
