"""The benchmark of everything: its table of decoders, a run from end to end, resuming, and what it refuses."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from decoders.backbones import ltx, magvit2, wan  # noqa: F401  their tables must not be made on the meta device
from decoders.inference import InferenceOptions
from experiments import (
    bench_all,
    bench_group,
    bench_meters,
    bench_plot,
    bench_results,
    bench_rows,
    bench_worker,
    compose,
)
from experiments.bench_all import AllConfig, code_hash, main, read_options
from experiments.bench_build import build
from experiments.bench_group import Cell, batched, cells_of
from experiments.bench_rows import GROUPS, PROFILES, Entry, Group, chosen, is_lossless, options_of
from experiments.bench_worker import Bench, Job
from experiments.compose import ConfigError

TINY = replace(PROFILES["cpu"], sizes=((9, 32, 32),), check_size=(5, 32, 32), rounds=2)
ENTRIES = (
    Entry("anchor", "flash_vaed_debug", millions=1),
    Entry("flash", "flashdecoder_debug", millions=1, ways={"cpu": ("plain", "optimised", "optimised+uint8")}),
    Entry("tiny", "", "wan21", "taehv", 9.8, ways={"cpu": ("plain", "optimised", "optimised+mlp8")}),
)


class Inside:
    """Stands in for :class:`experiments.bench.Decoder`: the same worker, in this process."""

    started: list[str] = []
    worker: type = Bench
    break_at = ""  # the request that fails

    def __init__(self, job: Job) -> None:
        self.job, self.failed = job, ""
        Inside.started.append(job.label)
        self.process = SimpleNamespace(is_alive=lambda: False)

    def wait_until_built(self) -> None:
        self.bench = self.worker(self.job)

    def ask(self, request: str, **arguments: Any) -> Any:
        self.failed = ""
        if Inside.break_at == f"{self.job.label} {request}":
            self.failed = "out of memory: tried to allocate 99 GiB"
            return None
        try:
            return getattr(self.bench, request)(**arguments)
        except ValueError as error:  # as the process tells of it: a traceback
            raise RuntimeError(f"{self.job.label}: Traceback\nValueError: {error}") from error

    def end(self) -> None: ...

    close = end


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Runs the benchmark of three small decoders, in this process; returns main's status and the JSON's content."""
    monkeypatch.setattr(bench_group, "Decoder", Inside)
    monkeypatch.setattr(Inside, "started", [])
    monkeypatch.setattr(Inside, "break_at", "")
    monkeypatch.setitem(bench_all.PROFILES, "cpu", TINY)
    monkeypatch.setattr(bench_worker, "release_memory", lambda device: None)  # collecting garbage takes long
    monkeypatch.setitem(bench_meters.RATE_SIZE, "cpu", 64)
    monkeypatch.setitem(bench_meters.ATTENTION_SIZE, "cpu", (2, 32, 64))
    monkeypatch.setitem(bench_results.ANCHORS, "tiny", "anchor")
    monkeypatch.setattr(bench_all, "code_hash", lambda: "the code")

    draw = bench_plot.draw

    def run(*arguments: str, entries: tuple[Entry, ...] = ENTRIES, drawn: bool = False) -> tuple[int, dict[str, Any]]:
        monkeypatch.setattr(bench_plot, "draw", draw if drawn else lambda *given: None)  # a second each
        monkeypatch.setattr(bench_all, "chosen", lambda profile, only: [Group("tiny", entries)])
        status = main(["profile=cpu", "dtype=fp32", f"out={tmp_path}", *arguments])
        (path,) = tmp_path.glob("bench-all-*.json")
        return status, json.loads(path.read_text())

    return run


# --- the table of decoders --------------------------------------------------------------------------------------------


def quick_or_slow(entry: Entry) -> Any:
    return pytest.param(entry, id=entry.label, marks=() if "cpu" in entry.profiles else pytest.mark.slow)


@pytest.mark.parametrize("entry", [quick_or_slow(e) for g in GROUPS for e in g.entries if e.kind != "backbone"])
def test_every_decoder_exists_and_has_the_size_that_the_table_says(entry: Entry):
    job = SimpleNamespace(
        experiment=(entry.experiment, ()) if entry.experiment else None, release=entry.release, kind=entry.kind
    )
    with torch.device("meta"):
        model, _, multiple = build(job)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(entry.millions, rel=0.01)
    assert multiple in (8, 16, 32)


def test_groups_share_a_space_and_backbones_name_what_they_equal():
    for group in GROUPS:
        labels = [entry.label for entry in group.entries]
        assert len(set(labels)) == len(labels)
        for entry in group.entries:
            assert not entry.equals or entry.equals == group.entries[0].label
            for profile in ("cpu", "gpu"):
                ways = entry.ways.get(profile, ("plain",))
                assert ways[0] == "plain", "the others are held against it"
                for way in ways:
                    options_of(way)


def test_ways_are_words():
    assert options_of("plain") is None and options_of("optimised") == InferenceOptions()
    assert options_of("optimised+compiled+linear8+uint8") == InferenceOptions(compile=True, bits8="linear", uint8=True)
    assert is_lossless("optimised+compiled+uint8") and not is_lossless("optimised+mlp8")
    for wrong in ("optimized", "optimised+tf32", "plain+compiled", "optimised+optimised"):
        with pytest.raises(ValueError, match="there are plain and optimised, with"):
            options_of(wrong)


def test_only_chooses_by_label_experiment_or_group_and_keeps_anchors():
    def labels(*only: str) -> list[list[str]]:
        return [[entry.label for entry in group.entries] for group in chosen("cpu", list(only))]

    assert labels("flashdecoder-xl") == [["diffusers Wan 2.2", "FlashDecoder-XL"]]
    assert labels("flash_vaed_wan2*") == [
        ["diffusers Wan 2.2", "Flash-VAED Wan 2.2"],
        ["diffusers Wan 2.1", "Flash-VAED Wan 2.1"],
    ]
    assert labels("k32") == [["MAGVIT-v2 k32", "REGEN k32"]]  # also what the profile leaves out
    assert labels("wan22") == labels("wan22", "flashdecoder-xl"), "of a group, what the profile has"
    assert "FlashDecoder-S" not in labels("wan22")[0] and "FlashDecoder-S" in labels("wan22", "*-s")[0]
    assert "REGEN k32" not in sum(labels(), []) and "REGEN k4" in sum(labels(), [])
    with pytest.raises(ValueError, match="'flashdecodr' names no decoder; there are diffusers Wan 2.2"):
        labels("k4", "flashdecodr")


def test_cells_are_the_entrys_own_or_what_was_asked_for():
    entry = Entry("x", sizes={"cpu": ((5, 64, 64),)}, arguments=((("steps", 1),), (("steps", 4),)))
    assert [str(cell) for cell in cells_of(entry, TINY, "cpu", [], None)] == [
        "5x64x64 stream steps=1",
        "5x64x64 stream steps=4",
    ]
    assert cells_of(Entry("y"), TINY, "cpu", [(48, 80)], [1, 17]) == [
        Cell(1, (48, 80), "stream"),
        Cell(17, (48, 80), "stream"),
    ]


def test_batches_fit_into_memory_and_have_their_anchor_and_plain_forms():
    def runner(label: str, way: str) -> Any:
        return SimpleNamespace(entry=Entry(label, millions=1000), way=way)

    runners = [runner("anchor", "plain")]
    runners += [runner(label, way) for label in "ab" for way in ("plain", "optimised", "optimised+uint8")]
    batches = batched(runners, max_gib=9)
    assert [[(r.entry.label, r.way) for r in batch] for batch in batches] == [
        [("anchor", "plain"), ("a", "plain"), ("a", "optimised")],
        [("anchor", "plain"), ("a", "plain"), ("a", "optimised+uint8")],
        [("anchor", "plain"), ("b", "plain"), ("b", "optimised")],
        [("anchor", "plain"), ("b", "plain"), ("b", "optimised+uint8")],
    ]
    assert batched(runners, max_gib=1000) == [runners]


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("profil=cpu", "Did you mean: 'profile'"),
        ("ways=[fast]", "no way 'fast' to run a decoder"),
        ("sizes=[[256]]", r"\[256\] is not \[height, width\]"),
        ("modes=[whole]", "no mode whole"),
        ("num_frames=[]", "must not be empty"),
        ("rounds=0", "1 or more"),
        ("cpu", "options are written key=value; there are profile, only"),
    ],
)
def test_wrong_options_are_one_line(argument: str, message: str):
    with pytest.raises(ConfigError, match=message) as error:
        read_options([argument], AllConfig)
    assert "\n" not in str(error.value)


def test_a_profile_without_its_device_and_a_name_of_nothing_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="no CUDA device"):
        main(["profile=gpu"])
    with pytest.raises(ConfigError, match="'nothing' names no decoder"):
        main(["profile=cpu", "only=[nothing]"])


# --- a run ------------------------------------------------------------------------------------------------------------


def test_a_run_measures_checks_compares_and_writes(tiny, tmp_path: Path, capsys: pytest.CaptureFixture):
    status, result = tiny(drawn=True)
    assert status == 0
    rows = result["rows"]
    assert len(rows) == 7 and {row["status"] for row in rows.values()} == {"measured", "not available"}
    refused = rows["tiny | optimised+mlp8 | 9x32x32 stream"]
    assert refused["status"] == "not available" and "no use for bits8" in refused["reason"]
    fast = rows["flash | optimised | 9x32x32 stream"]
    assert len(fast["repetitions"]) == 2 and sum(fast["repetitions"][0]["step_frames"]) == 9
    assert fast["check"]["float32"]["rms"] < 1e-4 and fast["check"]["plain"]["deviation"] > 0.01
    assert result["rates"]["products"] > 1e6 and result["energy"] and result["date"] and result["command"]
    pairs = {(each["row"].rpartition(" | ")[0], each["over"].rpartition(" | ")[0]) for each in result["ratios"]}
    assert ("flash | optimised", "anchor | plain") in pairs and ("flash | optimised", "flash | plain") in pairs
    printed = capsys.readouterr().out
    for part in ("9 frames of 32x32", "TFLOP/s", "of it", "not available: TaehvDecoder has no use", "random weights"):
        assert part in printed
    (page,), (plot,) = tmp_path.glob("*.md"), tmp_path.glob("*.svg")
    assert page.read_text() in printed and "<svg" in plot.read_text()
    assert not list(tmp_path.glob("*.frames"))


def test_what_was_measured_is_not_measured_again_but_by_other_code(tiny, monkeypatch: pytest.MonkeyPatch, capsys):
    _, before = tiny("ways=[optimised]", entries=ENTRIES[:2])
    Inside.started.clear()
    _, again = tiny("ways=[optimised]", entries=ENTRIES[:2])
    assert Inside.started == [] and again["rows"] == before["rows"]
    both = (*ENTRIES[:2], replace(ENTRIES[0], label="another"))
    _, more = tiny("ways=[optimised]", entries=both)  # a new decoder: the group takes turns again
    assert "another plain" in Inside.started and len(more["rows"]) == 4
    Inside.started.clear()
    tiny("fresh=true", entries=ENTRIES[:1])
    assert Inside.started == ["anchor plain"]
    Inside.started.clear()
    monkeypatch.setattr(bench_all, "code_hash", lambda: "other code")
    tiny(entries=ENTRIES[:1])
    assert Inside.started == ["anchor plain"] and "measured anew: other code" in capsys.readouterr().err


def test_an_anchor_that_comes_again_with_every_batch_is_built_anew(tiny):
    status, result = tiny("max_gib=0.0001", "ways=[optimised]", "rounds=1", entries=ENTRIES[:2])
    assert status == 0 and {row["status"] for row in result["rows"].values()} == {"measured"}
    assert Inside.started.count("anchor plain") > 1 and len(result["rows"]) == 3


def test_out_of_memory_is_a_row_and_not_the_end(tiny):
    Inside.break_at = "flash plain measure"
    status, result = tiny("ways=[optimised]", entries=ENTRIES[:2])
    assert status == 0
    row = result["rows"]["flash | plain | 9x32x32 stream"]
    assert row["status"] == "out of memory" and "99 GiB" in row["reason"]
    assert result["rows"]["flash | optimised | 9x32x32 stream"]["status"] == "measured"
    assert not any("flash | plain" in each["over"] for each in result["ratios"])


def test_wrong_frames_are_refused_and_have_no_speed(tiny, monkeypatch: pytest.MonkeyPatch, capsys):
    class Wrong(Bench):
        def look(self, exact: bool = False) -> np.ndarray:
            frames = super().look(exact)
            return frames + 0.01 if self.optimised else frames

    monkeypatch.setattr(Inside, "worker", Wrong)
    status, result = tiny("ways=[optimised]", entries=ENTRIES[:2])
    assert status == 1
    row = result["rows"]["flash | optimised | 9x32x32 stream"]
    assert row["status"] == "refused" and "differs from float32 by 0.0" in row["reason"]
    assert row["repetitions"] == [] and not any("optimised" in each["row"] for each in result["ratios"])
    streams = capsys.readouterr()
    assert "refused: flash | optimised" in streams.err and "refused" in streams.out


def test_alone_each_is_measured_by_itself_and_ratios_say_the_widest_spread(tiny, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(bench_all.PROFILES, "cpu", replace(TINY, together=False, modes=("stream", "clip")))
    status, result = tiny("ways=[optimised]", entries=ENTRIES[:2])
    assert status == 0 and len(result["rows"]) == 6
    assert Inside.started == ["anchor plain", "flash plain", "flash optimised"]
    clip = result["rows"]["flash | optimised | 9x32x32 clip"]
    assert clip["repetitions"][0]["step_frames"] == [9]
    over = {each["over"] for each in result["ratios"] if each["row"] == clip["id"]}
    assert over == {"anchor | plain | 9x32x32 clip", "flash | plain | 9x32x32 clip"}


def test_backbones_hold_the_weights_of_the_peer_in_the_other_process():
    jobs = [SimpleNamespace(experiment=None, release="wan21", kind=kind) for kind in ("diffusers", "backbone")]
    latent = torch.randn(1, 16, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    frames = []
    for job in jobs:
        torch.manual_seed(0)
        model, _, _ = build(job)
        frames.append(model.eval().requires_grad_(False).decode(latent))
    torch.testing.assert_close(*frames, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="no kind 'other'"):
        build(SimpleNamespace(experiment=None, release="wan21", kind="other"))


def test_code_hash_sees_the_decoders_and_not_the_tables(tmp_path: Path):
    for name in ("decoders/a.py", "experiments/bench_worker.py", "experiments/bench_results.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1")
    before = code_hash(tmp_path)
    (tmp_path / "experiments/bench_results.py").write_text("2")
    assert code_hash(tmp_path) == before
    (tmp_path / "decoders/a.py").write_text("2")
    assert code_hash(tmp_path) != before


def test_experiments_of_the_table_are_there():
    names = {entry.experiment for group in bench_rows.GROUPS for entry in group.entries if entry.experiment}
    assert names <= set(compose.names())


@pytest.mark.slow
def test_processes_take_turns_on_the_command_line(tmp_path: Path):
    """The real thing, in processes: one small size of the tiny baseline and its anchor."""
    arguments = ["profile=cpu", "only=['TAEHV-like Wan 2.1']", "sizes=[[64,64]]", "num_frames=[5]", "rounds=1"]
    assert main([*arguments, f"out={tmp_path}"]) == 0
    (path,) = tmp_path.glob("*.json")
    rows = json.loads(path.read_text())["rows"].values()
    assert {row["status"] for row in rows} == {"measured"} and len(rows) == 3
