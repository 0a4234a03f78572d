"""The profile attributes all of the time, and all operations, to the right stage and kind of operator."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from decoders.backbones.wan import WanConfig, WanDecoder
from decoders.flash_vaed.wan_student import WanStudent
from experiments.bench import options
from experiments.compose import ConfigError
from experiments.profile import KINDS, OUTSIDE, ProfileConfig, kind_of, main, prepare, profile, report, watched

LAYOUT = WanConfig(dim=8, channels=4)


def test_kinds_of_the_students_operators():
    operators = {"mid": "depthwise", "up0": "depthwise", "up1": "depthwise", "up2": "frame", "up3": "frame"}
    student = WanStudent(LAYOUT, operators, {"up2": 0.5, "up3": 0.5})
    kinds = {name: kind_of(module) for name, module in student.named_modules()}
    expected = {
        "stages.conv_in.layers.0": "1x1 convolution",
        "stages.conv_in.layers.1": "dense 3D convolution",
        "stages.mid.layers.0.conv1": None,
        "stages.mid.layers.0.conv1.depthwise": "depthwise 3D convolution",
        "stages.mid.layers.0.conv1.pointwise": "1x1 convolution",
        "stages.mid.layers.1": "attention",
        "stages.up0.layers.3.time_conv": "convolution in time",
        "stages.up0.layers.3": "enlarging",
        "stages.up2.layers.0.conv1": "2D convolution",
        "stages.up2.layers.0.norm1": "norm",
        "stages.up2.layers.0": None,
    }
    assert {name: kinds[name] for name in expected} == expected
    assert set(filter(None, kinds.values())) < set(KINDS)


def test_all_operations_are_counted_where_they_are():
    decoder = WanDecoder(LAYOUT)
    prepare(decoder, torch.device("cpu"), torch.float32)
    latent = torch.randn(1, 4, 2, 2, 2)
    with FlopCounterMode(display=False) as plain:
        decoder.decode(latent)
    with FlopCounterMode(display=False) as counter, watched(decoder, counter.get_total_flops, True) as ledger:
        decoder.decode(latent)
    assert ledger.total() == plain.get_total_flops()
    by_stage, by_kind = Counter(), Counter()
    for (stage, kind), flops in ledger.items():
        by_stage[stage] += flops
        by_kind[kind] += flops
    # The last convolution, 8 to 3 channels of 16 x 16: one frame with the last of three taps, then four with all.
    assert ledger["out", "dense 3D convolution"] == 2 * 8 * 3 * 256 * (9 + 4 * 27)
    # From 16 to 8 channels at 8 x 8 (one frame, then four) as four 2x2 convolutions of 9 x 9 places; taps added up, twice.
    assert ledger["up2", "enlarging"] == 2 * 16 * 8 * 16 * 81 * 5 + 2 * (2 * 16 * 8 * 9 * 16)
    assert by_stage[OUTSIDE] == 0 and by_kind["attention"] > 0
    decoder(latent)
    assert ledger.total() == plain.get_total_flops(), "nobody watches any longer"


def test_time_goes_to_the_innermost():
    decoder = WanDecoder(LAYOUT).eval().requires_grad_(False)
    ticks = iter(range(10**6))
    with watched(decoder, lambda: next(ticks), True) as ledger:
        decoder.decode(torch.randn(1, 4, 1, 2, 2))
    assert ledger.total() == next(ticks) - 1, "every tick is somebody's"
    assert {stage for stage, _ in ledger} == {*decoder.stages, OUTSIDE}
    assert {kind for stage, kind in ledger if stage == "mid"} >= {"attention", "norm", "dense 3D convolution"}


def test_a_run_prints_tables_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture):
    choices = ["sizes=[[32,32]]", "num_frames=5", "rounds=2", "dtype=fp32", "device=cpu", f"results={tmp_path}"]
    main(["flash_vaed_debug", *(f"profile.{choice}" for choice in choices)])
    printed = capsys.readouterr().out
    for part in ("32x32", "teacher GFLOP/s", "up0", "attention", "times as long", str(tmp_path)):
        assert part in printed
    (path,) = tmp_path.glob("profile-flash_vaed_debug-*-fp32.json")
    result = json.loads(path.read_text())
    assert result["device"] and result["versions"]["torch"] == torch.__version__.split("+")[0] and result["date"]
    student, teacher = result["sizes"][0]["rows"].values()
    for row in (student, teacher):
        low, high = row["total_s_min_max"]
        assert 0 < low <= row["total_s"] <= high
        assert sum(stage["flops"] for stage in row["stages"].values()) == row["flops"] > 0
        assert sum(kind["flops"] for kind in row["operators"].values()) == row["flops"]
    assert student["flops"] < teacher["flops"]
    assert report(result) in printed


def test_what_cannot_be_profiled_is_refused():
    with pytest.raises(ConfigError, match="not made of named stages.*make bench exp=flashdecoder_debug"):
        profile("flashdecoder_debug", (), ProfileConfig(device="cpu"))
    with pytest.raises(ConfigError, match="num_frames=16.*nearest is 13 or 17"):
        profile("flash_vaed_debug", (), ProfileConfig(num_frames=16, device="cpu"))
    with pytest.raises(ConfigError, match="which experiment"):
        main(["profile.rounds=1"])
    for override, message in (("profile.round=1", "Did you mean: 'rounds'"), ("profile.sizes=[[1]]", "height, width")):
        with pytest.raises(ConfigError, match=message):
            options([override], ProfileConfig, "profile")
