"""What the benchmark reads and works out: operations by kind, ceilings, energy counters, errors and their bounds, ratios."""

import ctypes
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from decoders.flashdecoder.model import FlashDecoderConfig, FlashDecoderModel
from experiments import bench_meters
from experiments.bench_check import against_exact, against_plain, difference
from experiments.bench_meters import Energy, OperationCounter, Operations, Rates, eight_bit_rate
from experiments.bench_results import complete, operations_of, ratio

CPU = torch.device("cpu")


# --- operations and ceilings ------------------------------------------------------------------------------------------


def test_operations_by_kind_also_of_the_cpus_own_attention():
    query, key = torch.randn(1, 2, 5, 64), torch.randn(1, 2, 7, 64)
    with OperationCounter() as counter:
        F.scaled_dot_product_attention(query, key, key)
        torch.randn(3, 4) @ torch.randn(4, 5)
        F.conv2d(torch.randn(1, 2, 6, 6), torch.randn(3, 2, 3, 3), padding=1)
    found = counter.counted()
    assert found.attention == 2 * (2 * 2 * 5 * 7 * 64)  # two products of every head
    assert found.products == 2 * 3 * 4 * 5 + 2 * 6 * 6 * 3 * 2 * 9
    assert found.total == found.products + found.attention and found.linear == 0


def test_products_of_blocks_are_told_apart():
    config = FlashDecoderConfig(depth=1, dim=128, num_heads=2, num_kv_heads=1, refinement_depth=0, head_ratio=0.0)
    model = FlashDecoderModel(config, channels=4, stride_t=4, stride_hw=8).eval().requires_grad_(False)
    state = model.start_stream(1, 24, 16)
    with OperationCounter() as counter:
        model.step_stream(torch.zeros(1, 4, 3, 2), state)
    found, tokens = counter.counted(), 6
    assert found.mlp == 2 * tokens * 128 * (2 * 512 + 512)  # gate and up, then down
    assert found.linear == found.mlp + 2 * tokens * 128 * (128 + 2 * 64 + 128)  # q, k, v and out
    around = 2 * tokens * 128 * (4 + 4 * 128 + 3 * 8 * 8)  # embed, expand, pixels of one frame
    assert found.products == found.linear + around and found.attention == 4 * 2 * tokens * tokens * 64


def test_the_ceiling_by_hand():
    rates = Rates(products=100.0, attention=50.0, eight_bits=200.0, how={})
    operations = Operations(products=1000, attention=500, mlp=600, linear=800)
    assert rates.least_seconds(operations) == 20
    assert rates.least_seconds(operations, "mlp") == 4 + 3 + 10
    assert rates.least_seconds(operations, "linear") == 2 + 4 + 10
    without = Rates(100.0, 50.0, None, {})
    assert without.least_seconds(operations, "mlp") is None and without.least_seconds(operations) == 20


def test_a_clip_costs_its_first_step_and_the_second_for_every_later_one_that_gives_frames():
    first, later = (10, 1, 0, 0), (30, 6, 0, 0)
    assert operations_of({"operations": [first, later]}, [1, 4, 4, 4]).numbers() == (100, 19, 0, 0)
    assert operations_of({"operations": [(0, 0, 0, 0), later]}, [0, 5, 0, 5]).numbers() == (60, 12, 0, 0)
    assert operations_of({"operations": [first]}, [9]).numbers() == first  # a whole clip
    assert operations_of(None, [1]) is None


@pytest.mark.parametrize("device", ["cpu"])
def test_rates_are_those_of_the_machine(device: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(bench_meters.RATE_SIZE, device, 128)
    monkeypatch.setitem(bench_meters.ATTENTION_SIZE, device, (2, 64, 128))
    rates = bench_meters.measure_rates(torch.device(device), torch.float32)
    assert rates.products > 1e8 and rates.attention > 1e7 and set(rates.how) == {"products", "attention", "eight_bits"}
    eight, how = eight_bit_rate(torch.device(device))
    assert (eight is None) == how.startswith("none")


# --- energy -----------------------------------------------------------------------------------------------------------


def package(folder: Path, name: str, microjoules: int, span: int = 1_000_000_000) -> Path:
    path = folder / name
    path.mkdir(parents=True)
    (path / "energy_uj").write_text(f"{microjoules}\n")
    (path / "max_energy_range_uj").write_text(f"{span}\n")
    return path / "energy_uj"


def test_energy_of_packages_adds_up_and_counters_may_go_round(tmp_path: Path):
    first, second = package(tmp_path, "intel-rapl:0", 999_000_000), package(tmp_path, "intel-rapl:1", 5_000_000)
    package(tmp_path, "intel-rapl:0:0", 7)  # a part of a package would be counted twice
    energy = Energy(CPU, tmp_path)
    before = energy.read()
    first.write_text("2000000")  # beyond 1,000 J it began anew
    second.write_text("9000000")
    assert energy.source == "RAPL" and before == (999.0, 5.0)
    assert energy.used(before, energy.read()) == pytest.approx(3 + 4)


def test_energy_that_cannot_be_read_is_not_readable(tmp_path: Path):
    (tmp_path / "intel-rapl:0").mkdir()
    for folder in (tmp_path, tmp_path / "absent"):
        energy = Energy(CPU, folder)
        assert energy.source == "not readable" and energy.used(energy.read(), energy.read()) is None


class Driver:
    """NVML as far as it is asked."""

    def __init__(self, status: int = 0) -> None:
        self.status, self.millijoules, self.asked = status, 5_000, b""

    def nvmlInit_v2(self) -> int:
        return 0

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes, handle: Any) -> int:
        self.asked = uuid
        return 0

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: Any, value: Any) -> int:
        ctypes.cast(value, ctypes.POINTER(ctypes.c_ulonglong))[0] = self.millijoules
        return self.status


def test_energy_of_a_gpu_is_its_drivers_count(monkeypatch: pytest.MonkeyPatch):
    uuid = "8a3c6a1e-0000-0000-0000-000000000000"
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=uuid))
    driver = Driver()
    read = bench_meters._nvml(torch.device("cuda"), driver)
    before = read()
    driver.millijoules = 12_500
    assert (before, read()) == ((5.0,), (12.5,)) and driver.asked == f"GPU-{uuid}".encode()
    assert bench_meters._nvml(torch.device("cuda"), Driver(status=3)) is None  # not supported


# --- errors and their bounds ------------------------------------------------------------------------------------------


def frames(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.3, (1, 5, 64, 64, 3)).astype(np.float32)


def test_difference_by_hand():
    truth = np.zeros((1, 1, 1, 2, 3), np.float32)
    other = truth.copy()
    other[..., 0, 0] = 0.6
    found = difference(other, truth)
    assert found.rms == pytest.approx((0.36 / 6) ** 0.5) and found.largest == pytest.approx(0.6)
    assert found.db == pytest.approx(20 * np.log10(2 / found.rms))
    assert difference(truth, truth).db is None
    with pytest.raises(ValueError, match="shape"):
        difference(truth[..., :1, :], truth)
    with pytest.raises(ValueError, match="not finite"):
        difference(np.full_like(truth, np.nan), truth)


def test_frames_are_compared_clamped():  # LTX's own decoder leaves its frames unclamped, our backbone clamps them
    truth = np.array([-3.0, -1.0, 0.0, 1.0, 3.0, 0.5], np.float32).reshape(1, 1, 1, 2, 3)
    levels = ((truth.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8)
    assert difference(levels, truth).largest < 0.5 / 127.5 + 1e-6
    assert difference(truth.clip(-1, 1), truth).largest == 0 < difference(0.9 * truth, truth).largest


def test_rounding_passes_and_more_is_refused():
    truth = frames()
    noise = np.random.default_rng(1).normal(0, 0.004, truth.shape).astype(np.float32)
    plain = difference(truth + noise, truth)
    assert not against_exact(difference(truth - noise, truth), plain, "optimised+compiled")
    worse = difference(truth + 1.2 * noise, truth)
    assert "more than" in against_exact(worse, plain, "optimised")
    assert not against_exact(worse, plain, "plain", other_code=True)
    assert not against_exact(difference(truth + 4 * noise, truth), plain, "optimised+fast")
    assert against_exact(difference(truth + 8 * noise, truth), plain, "optimised+fast")
    broken = truth + noise
    broken[0, 0, 0, 0, 0] += 0.2
    assert "by up to" in against_exact(difference(broken, truth), plain, "plain", other_code=True)
    assert not against_plain(difference(truth - noise, truth + noise), plain, "optimised")
    assert against_plain(difference(truth + 4 * noise, truth), plain, "optimised")


def test_eight_bits_may_lose_something_but_not_everything():
    truth = frames()
    plain = difference(truth + 0.001, truth)
    assert not against_exact(difference(truth * 1.1, truth), plain, "optimised+linear8")
    assert against_exact(difference(truth * 1.3, truth), plain, "optimised+linear8")
    assert against_exact(difference(truth * 1.1, truth), plain, "optimised")


# --- summaries and ratios ---------------------------------------------------------------------------------------------


def row(label: str, way: str, *step_s: list[float], group: str = "wan22", **changes: Any) -> dict[str, Any]:
    repetitions = [
        {
            "step_s": each,
            "step_frames": [1, 4, 4],
            "beyond_weights_bytes": 2**29,
            "reserved_bytes": None,
            "joules": 18.0,
        }
        | {"others_cpu_share": None}
        for each in step_s
    ]
    about = {"weights_bytes": 2**30, "held_bytes": 3 * 2**29, "parameters": 10}
    return {
        "id": f"{label} | {way}",
        "label": label,
        "way": way,
        "group": group,
        "asked": [9, 64, 64],
        "mode": "stream",
        "arguments": {},
        "status": "measured",
        "reason": "",
        "frames": 9,
        "repetitions": repetitions,
        "about": about,
        "check": {},
        "operations": [(100, 50, 0, 0), (200, 100, 100, 100)] if way == "plain" else [],
    } | changes


def completed(*rows: dict[str, Any]) -> dict[str, Any]:
    rates = {"products": 1000.0, "attention": 500.0, "eight_bits": 2000.0, "how": {}}
    return complete({"rows": {each["id"]: each for each in rows}, "rates": rates})


def test_a_summary_by_hand():
    rows = row("x", "plain", [1.0, 1.0, 1.0], [1.0, 4.0, 4.0]), row("x", "optimised+mlp8", [0.5, 0.5, 0.5])
    plain, fast = (each["summary"] for each in completed(*rows)["rows"].values())
    assert plain["fps_min_max"] == [1.0, 3.0] and plain["fps"] == 2.0
    assert (plain["first_frame_ms"], plain["step_ms"], plain["step_ms_p95"]) == (1000, 2500, 4000)
    assert (plain["peak_gib"], plain["beyond_weights_gib"], plain["joules_per_frame"]) == (2.0, 0.5, 2.0)
    assert plain["gflop_per_frame"] == pytest.approx(750 / 9 / 1e9)
    assert plain["ceiling_fps"] == pytest.approx(9 / (500 / 1000 + 250 / 500))
    assert plain["of_ceiling"] == pytest.approx(2 / 9)
    assert fast["ceiling_fps"] == pytest.approx(9 / (300 / 1000 + 200 / 2000 + 250 / 500))


def test_ratios_are_of_rounds_and_of_the_anchor_at_the_same_size():
    anchor = row("diffusers Wan 2.2", "plain", [4.0, 4.0, 4.0], [8.0, 8.0, 8.0])
    ours, fast = row("x", "plain", [1.0, 1.0, 1.0], [1.0, 1.0, 1.0]), row("x", "optimised", [0.5, 0.5, 0.5])
    elsewhere = row("y", "plain", [1.0, 1.0, 1.0], asked=[9, 128, 128])
    found = {(each["row"], each["over"]): each for each in completed(anchor, ours, fast, elsewhere)["ratios"]}
    assert set(found) == {
        ("x | plain", "diffusers Wan 2.2 | plain"),
        ("x | optimised", "diffusers Wan 2.2 | plain"),
        ("x | optimised", "x | plain"),
    }
    paired = found["x | plain", "diffusers Wan 2.2 | plain"]
    assert (paired["fps"], paired["low"], paired["high"]) == (6.0, 4.0, 8.0)
    assert paired["later_steps"] == 6.0 and paired["memory"] == 1.0
    unpaired = found["x | optimised", "diffusers Wan 2.2 | plain"]
    assert (unpaired["low"], unpaired["high"]) == (8.0, 16.0)
    assert unpaired["fps"] == pytest.approx(6.0 / ((9 / 12 + 9 / 24) / 2))


def test_the_product_rate_is_the_best_of_the_run():
    ours = row("x", "plain", [1.0, 1.0, 1.0])
    ours["repetitions"][0]["matmul_flops_per_s"] = 2000.0  # the machine was busy when rates were measured
    summary = completed(ours)["rows"]["x | plain"]["summary"]
    assert summary["ceiling_fps"] == pytest.approx(9 / (500 / 2000 + 250 / 500))


def test_what_has_no_speed_has_no_ratio():
    refused = row("x", "optimised", [1.0, 1.0, 1.0], status="refused", reason="wrong")
    rows = completed(row("x", "plain", [1.0, 1.0, 1.0]), refused)
    assert rows["ratios"] == [] and rows["rows"]["x | optimised"]["summary"] is None
    assert ratio(refused, refused) is None
