"""VBench's layouts, the scorers run as they are run, and their results read back. The scorers here are stand-ins that look for
files and write results as Vchitect/VBench (commit 45e79ec) does; the real ones need a GPU and models."""

import csv
import json
import sys
from pathlib import Path

import pytest

from experiments import vbench, vbench_scores
from experiments.compose import ConfigError
from experiments.fixed_seed import ABOUT, TABLE
from experiments.vbench_suites import SUITES, totals

LONG = "A very long plot, told in many words. " * 8
INFO = {
    "vbench": [
        {"prompt_en": "a dog runs", "dimension": ["motion_smoothness", "imaging_quality"]},
        {"prompt_en": "a red car", "dimension": ["color"], "auxiliary_info": {"color": "red"}},
    ],
    "i2v": [{"prompt_en": "a beach", "dimension": ["i2v_background"], "image_name": "a beach.jpg"}],
    "vbench2": [
        {"prompt_en": LONG, "dimension": ["Complex_Plot"], "auxiliary_info": "x"},
        {"prompt_en": "a man runs", "dimension": ["Human_Anatomy"]},
        {"prompt_en": "a man runs", "dimension": ["Human_Clothes"]},
    ],
}
DIMENSIONS = {
    "vbench": ["motion_smoothness", "imaging_quality", "color"],
    "i2v": ["i2v_background"],
    "vbench2": ["Complex_Plot", "Human_Anatomy", "Human_Clothes"],
}
# What the scripts do with their arguments, and the files that they look for.
SCORER = """
import argparse, json, os, sys
p = argparse.ArgumentParser()
for name in ("videos_path", "output_path", "mode", "full_json_dir", "prompt_file", "ratio", "custom_image_folder"):
    p.add_argument("--" + name)
p.add_argument("--dimension", nargs="+")
a = p.parse_args()
assert os.path.basename(os.getcwd()) == {work!r} and "PYTHONPATH" not in os.environ
(dimension,), videos = a.dimension, []
names = os.listdir(a.videos_path)
assert all(name.endswith(".mp4") for name in names)
if a.mode == "custom_input":
    if a.prompt_file:
        assert set(names) <= set(json.load(open(a.prompt_file)))
    if a.custom_image_folder:
        assert {{name.rsplit("-", 1)[0] for name in names}} == {{os.path.splitext(f)[0] for f in os.listdir(a.custom_image_folder)}}
    videos = [os.path.join(a.videos_path, name) for name in sorted(names)]
else:
    for entry in json.load(open(a.full_json_dir)):
        if dimension in entry["dimension"]:
            for i in range({samples}):
                videos.append(os.path.join(a.videos_path, f'{{entry["prompt_en"]{cut}}}-{{i}}.mp4'))
                assert os.path.basename(videos[-1]) in names, videos[-1]
if {ratio}:
    assert a.mode == "custom_input" or a.ratio == "16-9"
scores = [float(open(video).read()) for video in videos]
said = [score * 100 if dimension == "imaging_quality" else score for score in scores]
os.makedirs(a.output_path, exist_ok=True)
result = {{dimension: [sum(scores) / len(scores), [{{"video_path": v, "video_results": s}} for v, s in zip(videos, said)]]}}
json.dump(result, open(os.path.join(a.output_path, "results_2026_eval_results.json"), "w"))
print("done")
"""


@pytest.fixture
def scorer(tmp_path: Path) -> Path:
    clone = tmp_path / "VBench"
    (clone / "VBench-2.0").mkdir(parents=True)
    for suite in SUITES.values():
        work = clone / suite.folder
        cut = "[:180]" if suite.longest_prompt else ""
        text = SCORER.format(
            work=work.resolve().name, samples=3 if suite.name == "vbench2" else 5, cut=cut, ratio=suite.name == "i2v"
        )
        (work / suite.script).write_text(text)
    return clone


def decoded(folder: Path, prompts: list[str], samples: int = 5, **offset: float) -> Path:
    """A folder as ``fixed_seed`` leaves it. A "video" here is its score as text: index / 10 and the decoder's offset."""
    folder.mkdir()
    (folder / "image.png").write_bytes(b"x")
    rows = []
    for number, prompt in enumerate(prompts):
        for index in range(samples):
            name = f"clip{number}-{index}"
            rows.append({"name": name, "prompt": prompt, "index": index, "reference": str(folder / "image.png")})
            for label, more in offset.items():
                (folder / label).mkdir(exist_ok=True)
                (folder / label / f"{name}.mp4").write_text(str(index / 10 + more * (1 + number)))
    with open(folder / TABLE, "w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    (folder / ABOUT).write_text(json.dumps({"how": {"decoders": dict.fromkeys(offset, {})}}))
    return folder


def laid_out(tmp_path: Path, suite: str, *more: str) -> Path:
    prompts = list(dict.fromkeys(entry["prompt_en"] for entry in INFO[suite]))
    source = decoded(tmp_path / f"decoded-{suite}", prompts, own=0.0, ours=0.1)
    (tmp_path / "info.json").write_text(json.dumps(INFO[suite]))
    arguments = [f"in={source}", f"out={tmp_path / suite}", f"suite={suite}", f"info={tmp_path / 'info.json'}"]
    assert vbench.main(["layout", *arguments, *more]) == 0
    return tmp_path / suite


@pytest.mark.parametrize("suite", list(SUITES))
def test_from_decoded_pairs_to_a_table(suite: str, scorer: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """The scorer finds its files, and the difference between decoders is what was put into their videos."""
    monkeypatch.setenv("PYTHONPATH", "here")  # the scorer's environment is its own
    folder = laid_out(tmp_path, suite)
    arguments = [f"in={folder}", f"scorer={scorer}", f"scorer_python={sys.executable}", "ratio=16-9"]
    capsys.readouterr()
    assert vbench.main(["score", *arguments]) == 0
    assert capsys.readouterr().out.count(f"{sys.executable} {SUITES[suite].script} --videos_path") == 2 * len(
        DIMENSIONS[suite]
    )
    assert vbench.main(["score", *arguments]) == 0
    told = capsys.readouterr().out
    assert "--videos_path" not in told and "has a result" in told
    assert vbench.main(["table", f"in={folder}"]) == 0
    result = json.loads((folder / "scores.json").read_text())
    samples = 3 if suite == "vbench2" else 5
    for label, offset in (("own", 0.0), ("ours", 0.1)):
        rows = result["decoders"][label]["dimensions"]
        assert sorted(rows) == sorted(DIMENSIONS[suite])
        first = rows[DIMENSIONS[suite][0]]  # of the first prompt alone
        assert first["score"] == pytest.approx(sum(range(samples)) / 10 / samples + offset)
        assert first["videos"] == samples
        if label == "ours":
            for number, name in enumerate(DIMENSIONS[suite]):
                prompt = 0 if name == "imaging_quality" or number == 0 else 1
                assert rows[name]["difference"][0] == pytest.approx(0.1 * (1 + prompt))
                assert (rows[name]["pairs"], rows[name]["prompts"]) == (samples, 1)
    assert "| ours - own (95 %)" in (folder / "scores.md").read_text()
    if suite == "vbench2":
        assert len(list((folder / "own" / "Complex_Plot").iterdir())) == 3
        assert (folder / "own" / "Complex_Plot" / f"{LONG[:180]}-2.mp4").is_file()


@pytest.mark.parametrize(
    ("suite", "dimension"), [("vbench", "aesthetic_quality"), ("i2v", "i2v_subject"), ("vbench2", "Human_Anatomy")]
)
def test_own_prompts_in_the_dimensions_that_take_any(suite: str, dimension: str, scorer: Path, tmp_path: Path) -> None:
    source = decoded(tmp_path / "decoded", ["a kite", "a boat"], samples=2, own=0.0, ours=0.1)
    out = tmp_path / "out"
    assert vbench.main(["layout", f"in={source}", f"out={out}", f"suite={suite}", f"dimensions=[{dimension}]"]) == 0
    assert vbench.main(["score", f"in={out}", f"scorer={scorer}", f"scorer_python={sys.executable}"]) == 0
    text = vbench.table(vbench.TableConfig(str(out)))
    assert "own prompts" in text and "no totals" in text
    row = json.loads((out / "scores.json").read_text())["decoders"]["ours"]["dimensions"][dimension]
    assert row["difference"][0] == pytest.approx(0.15) and row["prompts"] == 2
    assert row["difference"][1] < 0.15 < row["difference"][2]


def test_a_benchmark_is_whole_or_said_to_be_partial(scorer: Path, tmp_path: Path) -> None:
    source = decoded(tmp_path / "decoded", ["a dog runs"], own=0.0)
    (tmp_path / "info.json").write_text(json.dumps(INFO["vbench"]))
    arguments = [f"in={source}", f"out={tmp_path / 'out'}", f"info={tmp_path / 'info.json'}"]
    with pytest.raises(ConfigError, match="asks for 2 prompts, and 1 lack videos, such as 'a red car-0.mp4'"):
        vbench.main(["layout", *arguments])
    assert vbench.main(["layout", *arguments, "partial=true", "dimensions=[motion_smoothness,color]"]) == 0
    assert json.loads((tmp_path / "out" / "info.json").read_text()) == INFO["vbench"][:1]
    (tmp_path / "out" / "results").mkdir()
    with pytest.raises(ConfigError, match="has no result"):
        vbench.main(["table", f"in={tmp_path / 'out'}"])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["suite=i2v"], "is the list of suite=vbench, not of i2v"),
        (["dimensions=[i2v_subject]"], "no prompt is of i2v_subject"),
        (["info=null", "dimensions=[color]"], "color needs the suite's own prompts"),
        (["info=null", "suite=vbench2", "dimensions=[Diversity]"], "needs videos 0 to 19"),
        (["suite=other"], "other"),
    ],
)
def test_what_cannot_be_laid_out_is_refused(more: list[str], message: str, tmp_path: Path) -> None:
    source = decoded(tmp_path / "decoded", ["a dog runs"], own=0.0)
    (tmp_path / "info.json").write_text(json.dumps(INFO["vbench"]))
    with pytest.raises(ConfigError, match=message):
        vbench.main(["layout", f"in={source}", f"out={tmp_path / 'out'}", f"info={tmp_path / 'info.json'}", *more])


def test_prompts_that_are_no_file_names(tmp_path: Path) -> None:
    for number, (prompts, message) in enumerate(
        [(["either/or"], "can be none"), ([LONG[:180] + "a", LONG[:180] + "b"], "share the file name")]
    ):
        source = decoded(tmp_path / f"decoded{number}", prompts, own=0.0)
        with pytest.raises(ConfigError, match=message):
            vbench.main(["layout", f"in={source}", f"out={tmp_path / 'out'}", "suite=vbench2"])


def test_a_scorer_that_fails_is_told(scorer: Path, tmp_path: Path, capsys) -> None:
    folder = laid_out(tmp_path, "vbench", "dimensions=[motion_smoothness]")
    (scorer / "evaluate.py").write_text("print('no CUDA device'); raise SystemExit(3)")
    arguments = [f"in={folder}", f"scorer={scorer}", f"scorer_python={sys.executable}"]
    assert vbench.main(["score", *arguments]) == 1
    told = capsys.readouterr().err
    assert "failed (status 3): no CUDA device" in told and "scorer.log" in told
    with pytest.raises(ConfigError, match="is no clone of VBench"):
        vbench.main(["score", f"in={folder}", f"scorer={tmp_path}"])
    with pytest.raises(ConfigError, match="the interpreter of the scorer's environment"):
        vbench.main(["score", f"in={folder}", f"scorer={scorer}", f"scorer_python={tmp_path / 'gone'}"])
    with pytest.raises(ConfigError, match="say what to do"):
        vbench.main([])
    assert vbench.main(["score", *arguments, "run=false"]) == 0  # only says the command
    place = folder / "results" / "own" / "motion_smoothness"
    (place / "x_eval_results.json").write_text('{"motion_smoothness": []}')
    with pytest.raises(ConfigError, match="is no result of motion_smoothness"):
        vbench.main(["table", f"in={folder}"])


def test_results_with_special_cases(tmp_path: Path) -> None:
    """imaging_quality is out of 100 per video, -1 is not judged, camera_motion of VBench-I2V has three parts."""
    lines = [{"video_path": "/x/a-0.mp4", "video_results": -1}, {"video_path": "/x/a-1.mp4", "video_results": 0.5}]
    (tmp_path / "r_eval_results.json").write_text(json.dumps({"Multi-View_Consistency": [0.5, lines]}))
    read = vbench_scores.read_result(tmp_path, "Multi-View_Consistency")
    assert read.score == 0.5 and read.videos["a-1.mp4"] == 0.5 and read.videos["a-0.mp4"] != read.videos["a-0.mp4"]
    lines = [{"video_path": "a-0.mp4", "video_results": 1.0, "predict_type": ["static"]}]
    (tmp_path / "r_eval_results.json").write_text(json.dumps({"camera_motion": [1.0, {"static": 1.0}, lines]}))
    assert vbench_scores.read_result(tmp_path, "camera_motion").videos == {"a-0.mp4": 1.0}
    (tmp_path / "r_eval_results.json").write_text(
        json.dumps({"human_action": [1.0, [{"video_path": "b-0.mp4", "video_results": True}]]})
    )
    assert vbench_scores.read_result(tmp_path, "human_action").videos == {"b-0.mp4": 1.0}


def test_json_of_another_shape_is_refused(tmp_path: Path) -> None:
    for content in ("[1, 2]", '{"suite": "vbench"}', "{"):
        (tmp_path / "layout.json").write_text(content)
        with pytest.raises(ConfigError, match="cannot be read"):
            vbench.main(["table", f"in={tmp_path}"])
    (tmp_path / "fixed_seed.csv").write_text("name\n")
    (tmp_path / "fixed_seed.json").write_text("[]")
    with pytest.raises(ConfigError, match="is damaged"):
        vbench.main(["layout", f"in={tmp_path}", f"out={tmp_path / 'out'}"])
    (tmp_path / "r_eval_results.json").write_text(json.dumps({"human_action": [0.5, {"video_path": "a-0.mp4"}]}))
    with pytest.raises(ConfigError, match="a dict where the list of videos"):
        vbench_scores.read_result(tmp_path, "human_action")


def test_totals_are_the_leaderboards() -> None:
    """At the ends of the ranges of scripts/constant.py the totals are 1 and 0; between, worked out by hand."""
    ranges = {
        "subject_consistency": (0.1462, 1),
        "background_consistency": (0.2615, 1),
        "temporal_flickering": (0.6293, 1),
    }
    ranges |= {"motion_smoothness": (0.706, 0.9975), "scene": (0, 0.8222), "appearance_style": (0.0009, 0.2855)}
    ranges |= {"temporal_style": (0, 0.364), "overall_consistency": (0, 0.364)}
    for end in (0, 1):
        scores = {name: ranges.get(name, (0, 1))[end] for name in SUITES["vbench"].dimensions}
        assert totals("vbench", scores) == pytest.approx({"quality": end, "semantic": end, "total": end})
    # quality: dynamic_degree counts half: (5 + 1 + 0.5 * 0) / 6.5; total: (4 q + s) / 5
    scores = {name: ranges.get(name, (0, 1))[1] for name in SUITES["vbench"].dimensions} | {"dynamic_degree": 0.0}
    assert totals("vbench", scores) == pytest.approx(
        {"quality": 6 / 6.5, "semantic": 1, "total": (4 * 6 / 6.5 + 1) / 5}
    )
    del scores["scene"]
    assert totals("vbench", scores) == pytest.approx({"quality": 6 / 6.5})  # what is not measured is not taken as 0
    i2v = dict.fromkeys(SUITES["i2v"].dimensions, 1.0) | {"motion_smoothness": 0.9975, "camera_motion": 0.0}
    assert totals("i2v", i2v) == pytest.approx({"quality": 1, "i2v": 2 / 2.1, "total": (1 + 2 / 2.1) / 2})
    second = dict.fromkeys(SUITES["vbench2"].dimensions, 0.5) | {"Composition": 1.0}
    assert totals("vbench2", second)["creativity"] == 0.75 and totals("vbench2", second)["total"] == pytest.approx(0.55)
    assert len(second) == 18
