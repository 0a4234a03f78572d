"""Means by category: of a list's column, or of words that a network chooses."""

import csv
import json
from types import SimpleNamespace

import pytest
from evaluated import untrained
from video_files import make_film

from decoders.base import DECODER
from experiments import categories, evaluate

NAME = "flashdecoder_debug"
QUICK = ("validation.metrics=[psnr]", "trainer.progress_bar=false")
WORDS = ["people", "animals", "", "people"]


@pytest.fixture
def listed(tmp_path) -> tuple[str, ...]:
    lines = ["path,category"]
    for i, word in enumerate(WORDS):
        make_film(tmp_path / f"{i}.mp4", 6, (32, 48), film=i)
        lines.append(f"{i}.mp4,{word}")
    (tmp_path / "films.csv").write_text("\n".join(lines) + "\n")
    stream = "data.sets={films: {sources: [films], size: [32, 48], num_frames: 5}}"
    return f"data.sources.films={{path: {tmp_path}/films.csv}}", stream


def test_a_lists_categories(runs_root, listed) -> None:
    untrained(NAME)
    result = evaluate.evaluate(NAME, (*QUICK, *listed), sets=["films"])
    folder = evaluate.evaluation_dir(NAME, (*QUICK, *listed), sets=["films"])
    with open(folder / "clips.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["method"] == DECODER]
    assert [row["category"] for row in rows] == WORDS
    own = {e["category"]: e for e in result["categories"] if e["method"] == DECODER}
    assert {word: entry["clips"] for word, entry in own.items()} == {"people": 2, "animals": 1, categories.NONE: 1}
    people = [float(row["psnr"]) for row in rows if row["category"] == "people"]
    assert own["people"]["scores"]["psnr"] == pytest.approx(sum(people) / 2)
    methods = {entry["method"] for entry in result["categories"]}
    assert methods == {mean["method"] for mean in result["means"]} and result["categories"][0]["method"] == DECODER
    assert json.loads((folder / "result.json").read_text())["categories"] == result["categories"]
    text = (folder / "categories.md").read_text()
    assert "## films" in text and "| people" in text and f"{own['animals']['scores']['psnr']:.3f}" in text


def test_words_of_a_network(runs_root, listed, monkeypatch) -> None:
    """What a list says counts; for the rest the network is asked, once per clip."""
    asked = []

    class Classify:
        def __init__(self, folder: str, words: list[str]) -> None:
            assert (folder, words) == ("/clip", ["people", "landscapes"])
            self.fingerprint = "clip:test"

        def __call__(self, video):
            asked.append(video.shape)
            return ["landscapes"] * len(video)

    monkeypatch.setitem(__import__("sys").modules, "metrics.clip", SimpleNamespace(ClipCategories=Classify))
    untrained(NAME)
    chosen = ("validation.categories=[people,landscapes]", "validation.weights.clip=/clip")
    result = evaluate.evaluate(NAME, (*QUICK, *listed, *chosen), sets=["films"])
    own = {e["category"]: e["clips"] for e in result["categories"] if e["method"] == DECODER}
    assert own == {"people": 2, "animals": 1, "landscapes": 1} and len(asked) == 4
    assert result["categories_told_by"] == {"network": "clip:test", "words": ["people", "landscapes"]}
    folder = evaluate.evaluation_dir(NAME, (*QUICK, *listed, *chosen), sets=["films"])
    assert folder != evaluate.evaluation_dir(NAME, (*QUICK, *listed), sets=["films"])
