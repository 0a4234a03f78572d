"""The reproduction index: page and YAML say the same, and every command is one that can be typed."""

import re
import shlex
from functools import cache
from pathlib import Path

import pytest
import torch

from datamodules import named
from experiments import compose, evaluate, reproduction
from experiments.config import build_decoder, build_space, check_sizes, load

ROOT = Path(__file__).parent.parent
ITEMS = [(paper, item) for paper, content in reproduction.papers().items() for item in content["items"]]
COMMANDS = sorted({command for _, item in ITEMS for command in item["commands"]})
OF_EXPERIMENTS = ("edits",)  # sets that an experiment itself has, under data.sets
# Options of the commands themselves; all else in a command is an override.
OWN = ("exp", "exps", "sets", "weights", "in", "out", "baseline", "methods", "speed")


def parsed(command: str) -> tuple[str, list[str], list[str], list[str] | None]:
    """Target, experiments, overrides and evaluation sets of a command line."""
    make, *words = shlex.split(command)
    assert make == "make"
    target = words.pop(0) if "=" not in words[0] else "train"
    options = dict(word.split("=", 1) for word in words)
    own = (*OWN, *(key for key in options if key.startswith(f"{target}.")))  # bench.sizes is bench's own
    overrides = [f"{key}={value}" for key, value in options.items() if key not in own]
    sets = options["sets"].strip("[]").split(",") if "sets" in options else None
    names = [name.partition(":")[0] for name in options.get("exp", options.get("exps", "")).split()]
    return target, names, overrides, sets


def test_the_page_is_what_the_yaml_says():
    assert reproduction.PAGE.read_text() == reproduction.page(), "make index"


def test_every_item_says_all_there_is_to_say():
    for paper, item in ITEMS:
        where = f"{paper}, {item['where']}"
        assert item["shows"] and set(item["needs"]) == {"data", "weights", "gpus", "hours"}, where
        assert item.get("theirs") or item.get("missing") or "none" in item["needs"]["data"], where
        assert not item.keys() - {"where", "shows", "theirs", "missing", "commands", "needs", "measured"}, where
        for figure in item.get("theirs", []):
            assert figure["label"] and figure["setting"] and figure["values"], where
            assert figure.keys() <= {"label", "setting", "values", "run"}, where


def test_each_table_of_the_papers_stands_there_once():
    """As far as our copies say how many there are."""
    tables = dict.fromkeys(reproduction.papers(), 0)
    for paper, item in ITEMS:
        tables[paper] += bool(re.fullmatch(r"Table \d+", item["where"]))
    assert tables == {"flashdecoder": 5, "flash_vaed": 0, "refdecoder": 11, "regen": 5}
    figures = {name: set() for name in tables}
    for paper, item in ITEMS:
        if item["where"].startswith("Figure"):
            figures[paper] |= {int(number) for number in re.findall(r"\b\d+\b", item["where"])}
    assert figures["refdecoder"] == set(range(1, 14)) and figures["regen"] == set(range(1, 16))
    where = [(paper, item["where"]) for paper, item in ITEMS]
    assert len(where) == len(set(where))


def test_experiments_that_figures_name_exist():
    named = {figure["run"] for _, item in ITEMS for figure in item.get("theirs", []) if "run" in figure}
    assert named and not named - set(compose.names())


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_names_what_there_is(command):
    target, names, _, sets = parsed(command)
    assert re.search(rf"^{target}:.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE), "no such target"
    assert names and not set(names) - set(compose.names())
    assert not set(sets or ()) - {*named.names(), *OF_EXPERIMENTS}


@cache
def size_multiple(name: str) -> int:
    """Of the experiment's decoder, built without memory."""
    experiment = load(name)
    with torch.device("meta"):
        return build_decoder(experiment, build_space(experiment)).size_multiple


ON_SETS = [command for command in COMMANDS if "sets=" in command]
QUICK = [command for command in ON_SETS if "pad=" in command or "data.sets" in command]  # a decoder each takes its time


@pytest.mark.parametrize("command", [pytest.param(c, marks=() if c in QUICK else pytest.mark.slow) for c in ON_SETS])
def test_a_set_has_a_size_and_a_length_that_can_be_encoded(command):
    """Every set by every experiment that a command measures on it; or the command says that clips are padded."""
    _, names, overrides, sets = parsed(command)
    for name in names:
        experiment = load(name, overrides, sets)
        experiment.data.train, experiment.data.val = {}, {one: experiment.data.sets[one] for one in sets}
        check_sizes(experiment, size_multiple(name))


def test_networks_that_metrics_need_are_named():
    """What has no usual place must be typed, or the command ends before any work."""
    for command in COMMANDS:
        for words, network in (("warp_raft", "raft"), ("clip_consistency", "clip"), ("validation.categories", "clip")):
            assert words not in command or f"validation.weights.{network}=" in command, command


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_can_be_typed(command):
    """Overrides and sets fit every experiment that it names."""
    _, names, overrides, sets = parsed(command)
    for name in names:
        experiment = load(name, overrides, sets or ())
        if sets:
            evaluate.check_sets(name, experiment, sets)


def test_links_to_results_lead_somewhere():
    links = re.findall(r"\]\(([^)]+)\)", reproduction.page())
    assert links and not [link for link in links if not (ROOT / "results" / link).is_file()]


def test_a_run_gets_the_figures_of_its_experiment_marked_as_theirs():
    found = reproduction.figures_of("flashdecoder_xl_stage3", "my_run")
    assert {figure["run"] for figure in found} == {"my_run"} and len(found) == 3
    row = next(figure for figure in found if figure["setting"].startswith("720p"))
    assert row["values"] == {"psnr": "38.38", "lpips": "0.05", "rfvd": "12.75", "fps": "76.3", "gib": "2.4"}
    assert reproduction.figures_of("flashdecoder_table1_baseline", "x")[0]["values"]["psnr"] == "30.30", (
        "digits as printed"
    )
    assert reproduction.figures_of("flashdecoder_debug", "x") == []
