"""Two commands from runs to a table: real runs of the debug experiments, evaluated and compared, checked by hand."""

import copy
import csv
import dataclasses
import json
import os
import statistics
from pathlib import Path

import pytest
import torch
import yaml

from experiments import compare, compare_runs, compare_speed, compare_table
from experiments.checkpoints import save_weights
from experiments.comparison import Comparison, Stream
from experiments.compose import ConfigError
from experiments.config import load, resolved_yaml
from experiments.runs import run_name
from experiments.train import build, quiet

FIRST, SECOND = "flashdecoder_debug", "baseline_debug"
CHANGED = "optim.lr=0.5"


def make_run(root: Path, name: str, overrides=(), done: bool = True, minutes: float = 6.0) -> str:
    """A run's folder with random weights, as training would leave it."""
    experiment = load(name, overrides)
    decoder = build(experiment)
    folder = root / run_name(name, overrides)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(resolved_yaml(experiment))
    weights = {**decoder.inference_parameters(), **decoder.inference_buffers()}
    save_weights(
        folder / "weights-last.safetensors", weights, {"step": "3", "latent_space": decoder.latent_space.fingerprint}
    )
    summary = {"minutes": minutes, "steps": 3, "clips_seen": 6, "precision": "32-true", "devices": 2}
    if done:
        (folder / "done.json").write_text(json.dumps(summary))
    return folder.name


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Three runs: two of other families and latent spaces on the same clips, one under an override."""
    folder, before = tmp_path_factory.mktemp("compared"), os.environ["RUNS_ROOT"]
    os.environ["RUNS_ROOT"] = str(folder)
    quiet()
    make_run(folder, FIRST)
    make_run(folder, SECOND, minutes=3.0)
    make_run(folder, FIRST, [CHANGED], done=False)
    yield folder
    os.environ["RUNS_ROOT"] = before


@pytest.fixture(scope="module")
def comparison(root):
    return compare.gather([SECOND, FIRST], baseline=FIRST, speed=False)


def scores(root: Path, run: str, method: str = "decoder") -> dict[str, dict[str, float]]:
    """metric -> clip -> score, read without any code of ours."""
    with open(root / run / "evaluation" / "clips.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["method"] == method]
    return {metric: {row["key"]: float(row[metric]) for row in rows} for metric in ("psnr", "ssim")}


def by_student(values) -> list[float]:
    """The 95 % interval of the mean of two values: Student's t of one degree of freedom is 12.706."""
    mean, half = statistics.fmean(values), 12.706 * statistics.stdev(values) / 2**0.5
    return [mean - half, mean + half]


def test_the_table_has_the_means_of_the_clips(root, comparison):
    assert [row.id for row in comparison.own_rows()] == [FIRST, SECOND], "the baseline stands first"
    theirs = scores(root, FIRST)
    for name in (FIRST, SECOND):
        for metric, values in scores(root, name).items():
            score = comparison.row(name).scores[f"unseen/{metric}"]
            assert score.mean == pytest.approx(statistics.fmean(values.values())) and score.clips == len(values) == 2
            assert [score.low, score.high] == pytest.approx(by_student(values.values()))
            if name == SECOND:
                by_clip = [values[key] - theirs[metric][key] for key in values]
                assert score.delta == pytest.approx([statistics.fmean(by_clip), *by_student(by_clip)])
    floor = comparison.row("mean colour of the clip")
    assert floor.runs == [FIRST, SECOND]
    assert floor.scores["unseen/psnr"].mean == pytest.approx(
        statistics.fmean(scores(root, FIRST, "mean colour of the clip")["psnr"].values())
    )


def test_what_a_run_cost_and_what_it_is(comparison):
    run = comparison.run(FIRST)
    assert (run.minutes, run.devices, run.device_hours, run.steps, run.clips_seen) == (6.0, 2, 0.2, 3, 6)
    assert (run.device_kind, run.start, run.latent_space, run.finished) == ("CPU", "from scratch", "dct", True)
    assert run.parameters == sum(p.numel() for p in build(load(FIRST)).model.parameters())
    assert comparison.run(SECOND).parameters == sum(p.numel() for p in build(load(SECOND)).model.parameters()), (
        "no encoder"
    )
    assert run.compression != comparison.run(SECOND).compression


def test_csv_and_json_come_back(comparison):
    lines = list(csv.DictReader(compare_table.render(comparison, "csv").splitlines()))
    assert len(lines) == sum(len(row.scores) for row in comparison.rows)
    for line in lines:
        row = comparison.row(line["row"])
        score = row.scores[f"{line['stream']}/{line['metric']}"]
        assert float(line["mean"]) == score.mean and int(line["best"]) == score.best
        assert [float(line[key]) for key in ("delta", "delta_low", "delta_high") if line[key]] == (score.delta or [])
        assert line["parameters"] == ("" if row.parameters is None else str(row.parameters))
        assert line["total_minutes"] == (str(comparison.run(row.run).total_minutes) if row.kind == "run" else "")
    assert Comparison.from_dict(json.loads(json.dumps(comparison.to_dict(), allow_nan=False))) == comparison


def test_one_command_writes_tables_and_plots(root, tmp_path, capsys, comparison):
    compare.main([FIRST, SECOND, "speed=false", "methods=none", f"out={tmp_path}"])
    printed, written = capsys.readouterr().out, {path.name for path in tmp_path.iterdir()}
    assert {"table.txt", "table.md", "table.tex", "table.csv", "comparison.json"} <= written
    told = json.loads((tmp_path / "comparison.json").read_text())["runs"]
    assert [run["run_folder"] for run in told] == [FIRST, SECOND], "under RUNS_ROOT, wherever that is"
    pictures = {name for name in written if name.endswith(".png")}
    assert pictures == {f"scatter_{SECOND}_unseen-psnr.png", "frames_unseen_psnr.png"}, (
        "no speed and no events: no such plots"
    )
    assert {name.replace(".png", ".svg") for name in pictures} <= written
    assert all((tmp_path / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for name in pictures)
    assert (tmp_path / "table.txt").read_text() in printed and "mean colour" not in printed
    assert f"python -m experiments.compare {FIRST} {SECOND} speed=false" in (tmp_path / "table.md").read_text()
    assert "2 clips of 2 films (list " in printed and "32x48" in printed and "32-true on cpu" in printed


def test_a_run_that_stopped_early_says_so_and_its_overrides_are_found(root):
    name = f"{FIRST}+{CHANGED}"
    assert compare_runs.overrides_of(name) == [CHANGED] and compare_runs.as_trained(name).optim.lr != 0.5
    assert not compare_runs.finished(name) and compare_runs.newest_step(name) == 3
    assert compare_runs.cost(name) == {
        "minutes": None, "steps": None, "clips_seen": None, "precision": None, "devices": 1, "device": "CPU",
    }  # fmt: skip
    with pytest.raises(ConfigError, match=f"to its end.*make exp={FIRST}$"):
        compare.gather([FIRST, name], finished=True)


def test_what_an_experiment_starts_from_needs_no_run(root):
    name = f"{FIRST}+decoder.depth=1:start"
    compare_runs.require_trained(name)
    assert compare_runs.as_trained(name).decoder.depth == 1 and compare_runs.newest_step(name) is None
    assert (
        compare_runs.cost(name)["minutes"] is None and compare_runs.parents(name) == [] and compare_runs.finished(name)
    )
    fewer, more = (compare_runs.decoder_parameters(n)[0] for n in (name, FIRST))
    assert 0 < fewer < more
    assert compare_runs.decoder_parameters(f"{SECOND}:start")[0] > 0
    with pytest.raises(ConfigError, match="no such key"):
        compare_runs.require_trained(f"{FIRST}+decoder.dpth=1:start")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "which runs"),
        (["flashdecoder_demo"], r"has not been trained.*make exp=flashdecoder_demo"),
        (["flashdecoder_debgu"], "did you mean flashdecoder_debug"),
        ([FIRST, "baseline=other"], "baseline=other is none of the runs"),
        ([FIRST, "methods=few"], "none of some, all, none"),
        ([FIRST, "bseline=x"], "no such option of compare; there are sets, baseline"),
        ([FIRST, "speed=no"], "neither true nor false"),
        ([f"{FIRST}:lats"], "lats is none of"),
    ],
)
def test_mistakes_are_told_before_any_work(root, arguments, message):
    with pytest.raises(ConfigError, match=message):
        compare.main(arguments)


def test_weights_evaluated_before_the_last_step_are_evaluated_again(root, comparison, monkeypatch):
    asked = []

    def evaluated(*arguments, **_):
        asked.append(arguments)
        raise ConfigError("stop here")

    monkeypatch.setattr(compare.compare_scores.evaluate, "evaluate", evaluated)
    compare.compare_scores.read(FIRST)
    monkeypatch.setattr(compare_runs, "newest_step", lambda name: 4)
    with pytest.raises(ConfigError, match="stop here"):
        compare.compare_scores.read(FIRST)
    assert asked == [(FIRST, [], None, None)]


def test_a_start_costs_what_the_run_it_starts_from_did(root):
    name = f"{FIRST}+init_from={SECOND}:start"
    assert compare_runs.parents(name) == [SECOND] and compare_runs.start(name) == f"init_from {SECOND}"
    costs = [compare_runs.cost(each) for each in (name, SECOND)]
    assert [cost["minutes"] for cost in costs] == [0.0, 3.0] and [cost["steps"] for cost in costs] == [0, 3]
    assert compare_runs.cost(f"{FIRST}:start")["minutes"] is None, "nobody here knows what released weights cost"
    assert compare_runs.start(f"{FIRST}:start") == "as they are there" and compare_runs.pretrained(f"{FIRST}:start")


@pytest.mark.parametrize(
    ("objective", "told", "pretrained"),
    [
        ({"teacher": "wan_mini", "start": {"method": "greedy", "refit": True}}, "objective.teacher wan_mini; objective.start method=greedy", True),
        ({"teacher": "wan_mini", "start": None}, "from scratch", False),
        ({"start": "wan_mini", "transformer": None}, "objective.start wan_mini", True),
        ({"start": "random", "transformer": "Wan-AI"}, "objective.transformer Wan-AI", True),
        ({"start": "random"}, "from scratch", False),
        ({"steps": 1}, "from scratch", False),
    ],
)  # fmt: skip
def test_what_a_run_starts_from_is_named(runs_root, objective, told, pretrained):
    (runs_root / "a_run").mkdir(parents=True)
    (runs_root / "later").mkdir()
    (runs_root / "a_run" / "config.yaml").write_text(yaml.safe_dump({"init_from": None, "objective": objective}))
    (runs_root / "later" / "config.yaml").write_text(yaml.safe_dump({"init_from": "a_run", "objective": {}}))
    assert (compare_runs.start("a_run"), compare_runs.pretrained("a_run")) == (told, pretrained)
    assert (compare_runs.start("later"), compare_runs.pretrained("later")) == ("init_from a_run", pretrained)


def test_runs_that_start_from_pretrained_weights_are_named_below_the_costs(comparison):
    begun = copy.deepcopy(comparison)
    assert "pretrained" not in compare_table.render(begun, "txt")
    begun.run(SECOND).pretrained = True
    text = compare_table.render(begun, "txt")
    assert f"{SECOND} starts from pretrained weights whose training is not counted." in text
    assert "LatentSpace" not in text and "REGEN's paper leaves the first frame out" in text


def test_a_checkpoints_time_is_that_of_the_callback_that_counts_it(runs_root):
    folder = runs_root / FIRST
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(resolved_yaml(load(FIRST)))
    callbacks = {"Other": {"seconds": 6.0}, "Checkpoints": {"seconds": 120.0}}
    torch.save({"callbacks": callbacks, "global_step": 2, "seen": {"clips": 4}}, folder / "last.ckpt")
    assert compare_runs.cost(FIRST)["minutes"] == 2.0 and compare_runs.cost(FIRST)["steps"] == 2


def test_other_bytes_of_the_same_step_are_evaluated_again(root, comparison, monkeypatch):
    path = root / FIRST / "evaluation" / "result.json"
    kept, result = path.read_text(), json.loads(path.read_text())
    assert len(result["weights"]["sha256"]) == 64
    monkeypatch.setattr(compare.compare_scores.evaluate, "evaluate", lambda *_, **__: result | {"again": True})
    assert "again" not in compare.compare_scores.read(FIRST).result
    try:
        path.write_text(json.dumps(result | {"weights": result["weights"] | {"sha256": "0" * 64}}))
        assert compare.compare_scores.read(FIRST).result["again"]
    finally:
        path.write_text(kept)


def test_other_code_is_told(comparison):
    later = copy.deepcopy(comparison)
    assert not any("other code" in note for note in later.notes)
    later.run(SECOND).code = "of another day"
    assert f"{SECOND}: evaluated by other code than today's: make evaluate exp=... measures again." in compare._notes(
        later
    )


def test_a_folder_keeps_what_is_not_the_commands_own(comparison, tmp_path):
    (tmp_path / "table.txt").write_text("not a comparison's folder: nothing is taken away")
    (tmp_path / "scatter_mine.txt").write_text("mine")
    (tmp_path / "fps_psnr.png").write_text("of somebody")
    compare.write(comparison, tmp_path)
    assert (tmp_path / "fps_psnr.png").exists()
    (tmp_path / "notes.md").write_text("mine")
    (tmp_path / "fps_lpips_alex.svg").write_text("of the comparison before, which had speeds")
    compare.write(comparison, tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"notes.md", "scatter_mine.txt", "table.txt", "comparison.json"} <= names
    assert not {"fps_lpips_alex.svg", "fps_psnr.png"} & names


# --- speed --------------------------------------------------------------------------------------------------------------


def test_what_others_did_meanwhile_is_of_all_rounds(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    taken = [{"seconds": 1.0, "others_s": 0.5}, {"seconds": 3.0, "others_s": -0.1}]
    assert compare_speed.others_share(taken) == pytest.approx(0.05)
    assert compare_speed.others_share([*taken, {"seconds": 1.0, "others_s": None}]) is None
    assert compare_speed.others_share([]) is None


def test_summary_of_speed_by_hand():
    stream = Stream("s", 1, 9, [32, 48], 1, "", [])
    gib = 2**30
    taken = [{"seconds": s, "beyond_bytes": b * gib} for s, b in ((1.0, 1), (9.0, 2), (3.0, 1))]
    speed = compare_speed.summarise(taken, {"weights_bytes": gib, "failed": ""}, stream)
    assert (speed.fps, speed.fps_low, speed.fps_high) == (3.0, 1.0, 9.0)
    assert (speed.weights_gib, speed.beyond_gib, speed.peak_gib) == (1, 2, 3)
    twice = compare_speed.summarise(
        [{**t, "seconds": 2 * t["seconds"]} for t in taken], {"weights_bytes": None}, stream
    )
    assert twice.peak_gib is None and compare_speed.ratio(twice, speed) == [0.5, 0.5, 0.5]
    none = compare_speed.summarise([], {"weights_bytes": 1, "failed": "out of memory"}, stream)
    assert none.fps is None and none.failed == "out of memory" and compare_speed.ratio(none, speed) is None


@pytest.mark.parametrize("method", ["decoder", "the dct space's own decoder"])
def test_what_is_timed_decodes_the_clip(root, method):
    turn = compare_speed.Turn("x", FIRST, method, "unseen", 9, (32, 48), "cpu", bf16=False)
    timed = compare_speed.Timed(turn)
    found = timed.measure(warm_up=1)
    assert found["seconds"] > 0 and (found["beyond_bytes"] is None or found["beyond_bytes"] >= 0)
    own = sum(p.nbytes for p in build(load(FIRST)).model.parameters())
    assert timed.description()["weights_bytes"] == (own if method == "decoder" else None)


def test_what_is_timed_is_what_was_evaluated(root, monkeypatch):
    """Overrides of the evaluation (sampling steps, padding) reach the decoders that are timed."""
    asked, real = [], compare.compare_scores.read

    class Stopped(Exception):
        """Nothing is decoded here."""

    def stop(rows, *_, **how):
        asked.append(how["overrides"])
        raise Stopped

    def read(name, sets, overrides):
        asked.append(overrides)
        return real(name, sets)

    monkeypatch.setattr(compare.compare_scores, "read", read)
    monkeypatch.setattr(compare_speed, "measure", stop)
    with pytest.raises(Stopped):
        compare.main([FIRST, "pad=replicate"])
    assert asked == [["pad=replicate"]] * 2
    turn = compare_speed.Turn("x", FIRST, "decoder", "unseen", 9, (30, 46), "cpu", bf16=False)
    with pytest.raises(ValueError, match="multiples of"):
        compare_speed.Timed(turn)
    padded = dataclasses.replace(turn, overrides=("pad=replicate",))
    assert compare_speed.Timed(padded).measure()["seconds"] > 0


@pytest.mark.slow
def test_decoders_take_turns_and_a_run_shows_others_beside_itself(root):
    text = compare.beside([FIRST, SECOND])
    assert "rounds in turns" in text and "minus flashdecoder_debug" in text and "mean colour" not in text
    comparison = compare.gather([FIRST, SECOND])
    speeds = {row.id: row.speed for row in comparison.rows if row.speed}
    assert set(speeds) == {FIRST, SECOND, "the dct space's own decoder"}
    assert all(len(speed.seconds) == compare_speed.ROUNDS and speed.fps > 0 for speed in speeds.values())
    median = statistics.median(b / a for a, b in zip(speeds[SECOND].seconds, speeds[FIRST].seconds, strict=True))
    assert speeds[SECOND].ratio[0] == pytest.approx(median) and speeds[FIRST].ratio is None
    assert comparison.machine["rounds"] == compare_speed.ROUNDS and comparison.machine["dtype"] == "float32"
