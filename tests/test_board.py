"""TensorBoard: one layout for all families, HParams that tell runs apart, measurements in the events of their run."""

import json
import re
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from experiments import board
from experiments.config import load
from experiments.train import train

ROOT = Path(__file__).parent.parent


def events(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    found.Reload()
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, EventAccumulator]:
    """Two families, trained for two steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RUNS_ROOT", str(tmp_path_factory.mktemp("runs")))
        found = {}
        for name in ("flashdecoder_debug", "regen_space_debug"):
            overrides = ["trainer.progress_bar=false", "trainer.max_steps=2", "trainer.val_every_steps=1"]
            overrides += ["trainer.peak_tflops=1"] * (name == "flashdecoder_debug")
            found[name] = events(train(load(name, overrides), name, overrides))
        return found


def tags(found: EventAccumulator) -> set[str]:
    return {*found.Tags()["scalars"]}


def test_layout_is_written_once_and_equal_for_all_families(runs):
    layouts = []
    for found in runs.values():
        (written,) = found.Tensors("custom_scalars__config__")
        layouts.append(Layout.FromString(written.tensor_proto.string_val[0]))
    assert layouts[0] == layouts[1]
    assert [c.title for c in layouts[0].category][:3] == ["quality", "losses", "throughput"]


def test_every_chart_of_the_layout_has_a_line_in_some_run(runs):
    """But for what these two runs do not do: adversaries, distillation, LPIPS, a benchmark."""
    there = set().union(*(tags(found) for found in runs.values()))
    empty = {
        f"{category}: {chart}"
        for category, charts in board.layout().items()
        for chart, (_, patterns) in charts.items()
        if not any(re.search(pattern, tag) for pattern in patterns for tag in there)
    }
    assert empty == {
        "quality: LPIPS, all validation clips",
        "quality: LPIPS, by clips",
        "losses: adversarial terms",
        "losses: distillation and regularisation",
        "at the end: frames/s, by size",
    }


def test_every_loss_term_of_every_experiment_has_a_chart():
    losses = board.layout()["losses"]
    parts = [pattern for chart, (_, own) in losses.items() if chart != "every term" for pattern in own]
    for path in ROOT.glob("experiments/[!_]*_debug.yaml"):
        for term in load(path.stem).loss_weights:
            assert any(re.search(pattern, f"train/{term}") for pattern in parts), f"{path.stem}: {term}"


def test_hparams_are_the_same_few_for_all_families_and_metrics_are_the_evaluations(runs):
    keys = []
    for name, found in runs.items():
        sums = found.SummaryMetadata
        start = HParamsPluginData.FromString(
            sums("_hparams_/session_start_info").plugin_data.content
        ).session_start_info
        experiment = HParamsPluginData.FromString(sums("_hparams_/experiment").plugin_data.content).experiment
        keys.append([*start.hparams])
        metrics = {info.name.tag for info in experiment.metric_infos}
        assert {"final/unseen/psnr", "final/unseen/ssim"} <= metrics <= tags(found), "a metric is a scalar of this tag"
        assert start.hparams["steps"].number_value == 2 and start.hparams["family"].string_value
        folder = Path(found.path)
        result = json.loads((folder / "evaluation" / "result.json").read_text())
        scored = next(m for m in result["means"] if m["method"] == "decoder")["scores"]["psnr"]
        assert metrics == {
            f"final/unseen/{m}" for m in next(m for m in result["means"] if m["method"] == "decoder")["scores"]
        }
        (point,) = found.Scalars("final/unseen/psnr")
        assert point.value == pytest.approx(scored, rel=1e-5) and point.step == 2, name
    assert keys[0] == keys[1] and len(keys[0]) < 12


def test_measurements_go_to_the_run_and_make_none(tmp_path):
    summary = {"fps": 12.5, "first_frame_ms": 80.0, "step_ms": None, "weights_gib": 0.5, "peak_gib": None}
    rows = {"mine": {"summary": summary}, "a peer": {"summary": {"fps": 99.0}}, "tired": {"summary": None}}
    bench = {"experiment": "mine", "sizes": [{"size": [256, 384], "rows": rows}]}
    board.add_measurement(tmp_path / "mine", "bench", bench, "text")
    assert not (tmp_path / "mine").exists()
    (tmp_path / "mine").mkdir()
    board.add_measurement(tmp_path / "mine", "bench", bench, "a table\n```")
    stage = {"total_s": 0.5, "flops": 2e9, "stages": {"between stages": {"s": 0.25, "flops": 0}}}
    profile = {"experiment": "mine", "sizes": [{"size": [64, 64], "rows": {"mine": stage, "its teacher": stage}}]}
    board.add_measurement(tmp_path / "mine", "profile", profile, "another")
    found = events(tmp_path / "mine")
    values = {tag: found.Scalars(tag)[0].value for tag in tags(found)}
    assert values == {
        "bench/frames_per_s/256x384": 12.5,
        "bench/first_frame_ms/256x384": 80.0,
        "bench/weights_gib/256x384": 0.5,
        "profile/ms/64x64": 500.0,
        "profile/gflop/64x64": 2.0,
        "profile/stage_ms/between_stages/64x64": 250.0,
    }
    text = found.Tensors("bench/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text == "```\na table\n'''\n```"
    bench["sizes"][0]["rows"]["mine"]["summary"] = None
    assert board.bench_scalars(bench) == {}
