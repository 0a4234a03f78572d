"""The gate: only a ratio that fell beyond the spread of both runs is worse; what has no speed any more is; seconds never are."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from experiments.bench_gate import main
from experiments.compose import ConfigError


def run(fps: float = 8.0, low: float = 7.8, high: float = 8.2, memory: float = 0.2, **changes: Any) -> dict[str, Any]:
    rows = {name: {"status": "measured", "reason": ""} for name in ("peer", "ours", "fast")}
    ratios = [
        {"row": "ours", "over": "peer", "fps": fps, "low": low, "high": high, "memory": memory},
        {"row": "fast", "over": "ours", "fps": 1.5, "low": 1.4, "high": 1.6, "memory": 1.0},
    ]
    about = {"device": "a CPU", "dtype": "bf16", "arithmetic": "bf16"}
    return copy.deepcopy(about | {"rows": rows, "ratios": ratios} | changes)


@pytest.fixture
def gate(tmp_path: Path):
    def judged(base: dict[str, Any], new: dict[str, Any], *options: str) -> int:
        for name, content in (("base", base), ("new", new)):
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        return main([f"base={tmp_path / 'base.json'}", f"run={tmp_path / 'new.json'}", *options])

    return judged


def test_the_same_ratios_pass_whatever_the_seconds(gate, capsys: pytest.CaptureFixture):
    assert gate(run(), run()) == 0
    assert "2 ratios compared, 0 worse" in capsys.readouterr().out
    assert gate(run(), run(fps=12.0, low=11.0, high=13.0)) == 0


def test_a_ratio_that_fell_is_worse_and_named(gate, capsys: pytest.CaptureFixture):
    assert gate(run(), run(fps=6.0, low=5.9, high=6.1)) == 1
    printed = capsys.readouterr().out
    assert "worse: ours / peer: 6x (5.9 to 6.1), was 8x (7.8 to 8.2)" in printed and "1 worse" in printed


def test_within_the_tolerance_or_the_spread_it_is_not(gate):
    assert gate(run(), run(fps=7.5, low=7.4, high=7.6)) == 0  # 6 %
    assert gate(run(), run(fps=7.5, low=7.4, high=7.6), "tolerance=0.05") == 1
    assert gate(run(), run(fps=6.0, low=5.0, high=7.9)) == 0  # a noisy run proves nothing
    assert gate(run(low=5.5), run(fps=6.0, low=5.9, high=6.1)) == 0  # nor a noisy base


def test_more_memory_is_worse(gate, capsys: pytest.CaptureFixture):
    assert gate(run(), run(memory=0.3)) == 1
    assert "0.3x the memory, was 0.2x" in capsys.readouterr().out
    assert gate(run(), run(memory=0.21)) == 0
    assert gate(run(), run(memory=0.3), "memory_tolerance=0.6") == 0
    assert gate(run(memory=None), run(memory=0.3)) == 0


@pytest.mark.parametrize("status", ["out of memory", "refused", "failed", "not available"])
def test_a_row_without_a_speed_any_more_is_worse(gate, status: str, capsys: pytest.CaptureFixture):
    new = run()
    new["ratios"] = new["ratios"][:1]
    new["rows"]["fast"] = {"status": status, "reason": "why"}
    assert gate(run(), new, "allow_missing=true") == 1
    assert f"fast is {status}: why" in capsys.readouterr().out


def test_rows_that_were_not_tried_are_worse_unless_allowed(gate):
    new = run()
    new["ratios"] = new["ratios"][:1]
    del new["rows"]["fast"]
    assert gate(run(), new) == 1
    assert gate(run(), new, "allow_missing=true") == 0


def test_what_cannot_be_compared_is_refused(gate, tmp_path: Path):
    with pytest.raises(ConfigError, match="device is a CPU .* and another in .*no ratios to compare"):
        gate(run(), run(device="another"))
    with pytest.raises(ConfigError, match="no rows in common"):
        gate(run(ratios=[]), run())
    with pytest.raises(ConfigError, match="has no ratios: it is not of a finished"):
        unfinished = run()
        del unfinished["ratios"]
        gate(run(), unfinished)
    with pytest.raises(ConfigError, match="no file"):
        main([f"base={tmp_path / 'absent.json'}"])
    with pytest.raises(ConfigError, match="which run to compare with"):
        main([])
    with pytest.raises(ConfigError, match="is the base itself"):
        main([f"base={tmp_path / 'base.json'}", f"run={tmp_path / 'base.json'}"])
    (tmp_path / "base.json").write_text("{")
    with pytest.raises(ConfigError, match="is not JSON"):
        main([f"base={tmp_path / 'base.json'}", f"run={tmp_path / 'new.json'}"])
