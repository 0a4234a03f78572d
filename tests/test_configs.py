"""Configuration: every experiment loads, every mistake is refused in one line that names the nearest right thing."""

import os
import re
import subprocess
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from omegaconf import MISSING

from experiments import compose, runs, show
from experiments.compose import ConfigError
from experiments.config import as_dict, build_space, check_sizes, load, require_paths, resolved_yaml, with_defaults

ROOT = Path(__file__).parent.parent
NAMES = compose.names()

# --- the experiments that ship -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_experiment_loads(name, monkeypatch):
    monkeypatch.delenv("DATA_ROOT", raising=False)  # a configuration can be read where the data are not
    monkeypatch.delenv("WEIGHTS_ROOT", raising=False)
    experiment = load(name)
    # A run's name begins with its family's; one of the baseline may begin with its backbone's, as papers know it by that.
    family, backbone = experiment.family.split(".")[1], getattr(experiment.decoder, "backbone", "")
    # compare_<space>_<family> is a family's part of a comparison on equal ground.
    begins = [f"{family}_", f"compare_wanmini_{family}", *([f"{backbone}_"] if family == "baseline" else [])]
    assert name.startswith(tuple(begins)), (
        f"{name}.yaml trains {family}; its name should begin with {' or '.join(begins)}"
    )
    assert yaml.safe_load(resolved_yaml(experiment)) == as_dict(experiment)
    # `make show` needs channels and strides. A space that reads them from its files can also be told them.
    space = build_space(experiment)
    assert space.channels and space.stride_t and space.stride_hw


@pytest.mark.parametrize("name", NAMES)
def test_headers_promise(name):
    """What it reproduces, the command, and the number to reach with who measured it (or that it has none)."""
    header = compose.header(name)
    assert len(header) >= 3, f"{name}.yaml: the header says what it is, the command, and the number to reach"
    assert any(re.search(rf"\bmake exp={name}\b", line) for line in header), f"no line 'make exp={name}'"
    promise = " ".join(header)
    assert re.search(r"\b(Paper|Ours|nobody yet|Reaches nothing)\b", promise), "who measured the number to reach?"


@pytest.mark.parametrize("name", sorted(p.stem for p in ROOT.glob("experiments/_*.yaml")))
def test_fragments_are_not_runnable(name):
    assert name not in NAMES
    with pytest.raises(ConfigError, match="is a fragment"):
        load(name)


def test_every_family_has_a_debug_experiment():
    families = {p.parent.name for p in ROOT.glob("decoders/*/module.py")}
    assert {f"{family}_debug" for family in families} <= set(NAMES)


def test_list_shows_all():
    listing = show.listing()
    assert all(re.search(rf"^{name}  +\S", listing, re.MULTILINE) for name in NAMES)


# --- a small suite of our own: mistakes and rules ----------------------------------------------------------------------


@dataclass
class SourceConfig:
    path: str = MISSING
    kind: Literal["video", "image"] = "video"
    span: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self):
        if self.span[0] >= self.span[1]:
            raise ValueError("span must grow")


@dataclass
class StreamConfig:
    sources: list[str] = field(default_factory=list)
    size: tuple[int, int] = (64, 64)
    total_frames: int = 5
    share: float = 1.0
    resize: str = "crop"


@dataclass
class DataConfig:
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    train: dict[str, StreamConfig] = field(default_factory=dict)
    num_workers: int = 0

    def __post_init__(self):
        if (total := sum(stream.share for stream in self.train.values())) not in (0, 1):
            raise ValueError(f"shares sum to {total:g}, not 1")


@dataclass
class DecoderConfig:
    depth: int = 2
    width: int = 64


@dataclass
class Objective:
    crop: int | None = None


@dataclass
class SpaceConfig:
    channels: int = 48


@dataclass
class OtherSpaceConfig:
    path: str = MISSING


class Space:
    Config = SpaceConfig

    def __init__(self, config: Any):
        self.config = config

    def check(self, t, h, w):
        if t % 4 != 1 or h % 16 or w % 16:
            raise ValueError(f"{t} frames of {h}x{w}: the nearest is 5 of 64x64")


class OtherSpace(Space):
    Config = OtherSpaceConfig


PARENT = """
family: toys.Family
latent_space: toys.Space
datamodule: toys.Data
data:
  sources: {clips: {path: $DATA_ROOT/clips}, spare: {path: $OTHER_ROOT/spare}}
  train: {small: {sources: [clips]}}
loss_weights: {l1: 1.0}
optim: {lr: 1e-3}
trainer: {max_steps: 10}
"""


@pytest.fixture
def suite(tmp_path, monkeypatch):
    """A folder of experiments over toy classes; returns a function that adds a file to it."""
    toys = types.ModuleType("toys")
    toys.Family = type("Family", (), {"Config": DecoderConfig, "Objective": Objective})
    toys.Data = type("Data", (), {"Config": DataConfig})
    toys.Space, toys.OtherSpace = Space, OtherSpace
    monkeypatch.setitem(sys.modules, "toys", toys)
    monkeypatch.setattr(compose, "FOLDER", tmp_path)
    monkeypatch.delenv("DATA_ROOT", raising=False)

    def add(name: str, text: str) -> None:
        (tmp_path / f"{name}.yaml").write_text(text)

    add("toy", PARENT)
    return add


def refusal(name: str, *overrides: str) -> str:
    """The one line with which this is refused."""
    with pytest.raises(ConfigError) as error:
        load(name, overrides)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("decoder.dept=3", "decoder.dept: no such key; did you mean decoder.depth?"),
        ("lr=1e-4", "lr: no such key; did you mean optim.lr?"),
        ("max_steps=3", "did you mean trainer.max_steps?"),
        ("optm.lr=1e-4", "did you mean optim?"),
        ("data.sources.clips.pth=x", "did you mean data.sources.clips.path?"),
        ("decoder.zzz=1", "no such key; there are depth, width"),
        ("decoder.depth=deep", "decoder.depth: value 'deep' of type 'str' could not be converted to Integer"),
        ("decoder.depth=2.5", "decoder.depth: "),
        ("decoder=3", "decoder: takes keys of its own"),
        ("data.train=[]", "data.train: a list was given where keys belong"),
        ("data.train.small.size=64", "data.train.small.size: "),
        ("data.train.small.size=[64]", "data.train.small.size: has the wrong number of values"),
        ("data.sources.clips.kind=vidio", "expected one of ['video', 'image']"),
        ("data.sources.clips.span=[1, 0]", "data.sources.clips: span must grow"),
        ("data.sources.more.kind=video", "data.sources.more.path: must be set"),
        ("data.train.small.share=0.5", "data: shares sum to 0.5, not 1"),
        ("data.train.small.total_frames=6", "data.train.small: 6 frames of 64x64: the nearest is 5 of 64x64"),
        ("data.train.small.size=[60, 64]", "data.train.small: 5 frames of 60x64: the nearest is 5 of 64x64"),
        ("trainer.max_steps=0", "trainer: max_steps=0 must be 1 or more"),
        ("trainer.devices=many", "trainer: devices=many must be a number or auto"),
        ("loss_weights.l1=heavy", "loss_weights.l1=heavy must be a number"),
        ("loss_weights.l1={start: 0}", "loss_weights.l1={'start': 0} needs start, end and to_step"),
        ("ema.decay=2", "ema.decay=2.0 must lie between 0 and 1"),
        ("pad=maybe", "pad: invalid value 'maybe', expected one of ['error', 'replicate']"),
        ("family=toys.Famly", "family: nothing can be imported as 'toys.Famly'; did you mean toys.Family?"),
        ("family=toyz.Family", "did you mean toys.Family?"),
        ("family=toys.Data", "family: toys.Data has no dataclass Objective"),
        ("optim.lr", "'optim.lr' is not an override; write key=value"),
        ("data.train.small.size=[64", "not a YAML value"),
    ],
)
def test_mistakes_are_refused(suite, override, said):
    assert said in refusal("toy", override)


def test_mistakes_in_files_name_the_file(suite):
    suite("child", "defaults: [toy]\ndecoder: {dept: 3}\n")
    suite("grandchild", "defaults: [child]\n")
    assert refusal("grandchild") == "decoder.dept (set in child.yaml): no such key; did you mean decoder.depth?"
    suite("broken", "decoder: {depth: 1\noptim: 2\n")
    assert refusal("broken").startswith("broken.yaml, line 2: not YAML")
    suite("scalar", "- optim\n")
    assert "must be a mapping" in refusal("scalar")
    suite("odd", "defaults: toy\n")
    assert "odd.yaml: defaults must be a list of names" in refusal("odd")
    suite("empty", "defaults: []\n")
    assert refusal("empty").startswith("family: must be set")


def test_unknown_names_and_circles(suite):
    assert "no experiment 'toi'; did you mean toy?" in refusal("toi")
    assert "there are: toy" in refusal("something_else_entirely")
    assert "no experiment '../toy'" in refusal("../toy")
    suite("orphan", "defaults: [_tooy]\n")
    suite("_tooyy", "")
    assert refusal("orphan").startswith("orphan.yaml: no experiment '_tooy'; did you mean _tooyy")
    suite("one", "defaults: [two]\n")
    suite("two", "defaults: [one]\n")
    assert refusal("one") == "defaults go round in a circle: one -> two -> one"


def test_order_of_layers(suite):
    assert load("toy").optim.eps == 1e-8  # dataclass default
    suite("_a", "defaults: [toy]\noptim: {lr: 2e-3, eps: 1e-7}\n")
    suite("_b", "defaults: [toy]\noptim: {eps: 1e-6}\n")
    suite("child", "defaults: [_a, _b]\ndecoder: {depth: 7}\n")
    child = load("child", ["decoder.width=8", "decoder.width=16"])
    # toy is merged once, so _b does not bring toy's lr back over _a's.
    assert (child.optim.lr, child.optim.eps, child.decoder.depth, child.decoder.width) == (2e-3, 1e-6, 7, 16)
    assert load("child", ["decoder.depth=1"]).decoder.depth == 1


def test_null_takes_away(suite):
    suite("child", "defaults: [toy]\ndata: {train: {small: null, big: {sources: [clips]}}}\n")
    assert list(load("child").data.train) == ["big"]
    assert load("toy", ["loss_weights.l1=null", "loss_weights.mse=1"]).loss_weights == {"mse": 1}
    replaced = load("child", ["data.train=null", "data.train.own={sources: [spare], share: 1}"])
    assert list(replaced.data.train) == ["own"]
    assert load("toy", ["ema.decay=0.5"]).ema.decay == 0.5
    assert load("toy", ["ema.decay=0.5", "ema=null"]).ema is None
    assert load("toy", ["objective.crop=3", "objective.crop=null"]).objective.crop is None


def test_another_class_starts_its_part_afresh(suite):
    suite("child", "defaults: [toy]\nspace: {channels: 16}\n")
    other = load("child", ["latent_space=toys.OtherSpace", "space.path=/weights"])
    assert as_dict(other)["space"] == {"path": "/weights"}
    assert load("child", ["latent_space=toys.Space"]).space.channels == 16


def test_environment_variables(suite, monkeypatch):
    with pytest.raises(ConfigError, match=r"data.sources.clips.path needs DATA_ROOT; set DATA_ROOT=.* or data.sources"):
        require_paths(load("toy"))
    # OTHER_ROOT stays unset: no stream names its source, so nobody needs it.
    require_paths(load("toy", ["data.sources.clips.path=/somewhere"]))
    monkeypatch.setenv("DATA_ROOT", "/d")
    experiment = load("toy", ["data.sources.spare.path=${DATA_ROOT}/x"])
    require_paths(experiment)
    assert [source.path for source in experiment.data.sources.values()] == ["/d/clips", "/d/x"]


def test_sizes_of_the_decoder(suite):
    with pytest.raises(ConfigError, match=r"64x64: this decoder takes multiples of 48 pixels; .* 48x48 or 96x96"):
        check_sizes(load("toy"), 48)
    check_sizes(load("toy", ["pad=replicate"]), 48)


# --- runs ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ([], "toy"),
        (["trainer.devices=8", "trainer.num_nodes=2", "data.num_workers=3"], "toy"),
        (["trainer.log_every_steps=1", "data.cache_dir=/y", "trainer.max_minutes=3"], "toy"),
        (["data.sources.clips.path=x.csv"], "toy+data.sources.clips.path=x.csv"),  # other data, another run
        (["seed=1", "optim.lr=1e-4"], "toy+optim.lr=0.0001+seed=1"),
        (["optim.lr=0.0001", "seed=1"], "toy+optim.lr=0.0001+seed=1"),
        (["seed=1", "seed=2"], "toy+seed=2"),
        (["data.train.small.size=[32, 64]"], "toy+data.train.small.size=32,64"),
        (["init_from=null", "optim.fused=true"], "toy+init_from=null+optim.fused=true"),
    ],
)
def test_run_name(overrides, name):
    assert runs.run_name("toy", overrides) == name


def test_run_name_is_safe_and_unique():
    odd = [["a=x/y"], ["a=x:y"], ["a=x y"], ["a={b: 1}"], ["a=[[1], [2]]"], ["a=[1, 2]"], ["a=.."]]
    odd += [[f"key_{i}=123456789" for i in range(count)] for count in (30, 31)]
    names = [runs.run_name("toy", overrides) for overrides in odd]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"toy\+[\w.,=+-]+", name) and len(name) <= runs.LONGEST_NAME for name in names)


def test_diff(suite):
    before = resolved_yaml(load("toy"))
    after = resolved_yaml(load("toy", ["optim.lr=2e-3", "loss_weights.mse=1", "trainer.devices=4", "seed=0"]))
    assert runs.diff(before, before) == []
    assert runs.diff(before, after) == ["loss_weights.mse: (absent) -> 1", "optim.lr: 0.001 -> 0.002"]


def test_keys_that_came_later_are_no_difference(suite):
    now = load("toy", ["data.train.small.resize=none"])
    old = as_dict(load("toy"))
    del old["decoder"]["width"], old["trainer"]["guard"], old["pad"], old["data"]["train"]["small"]["resize"]
    assert runs.diff(with_defaults(old, load("toy")), as_dict(load("toy"))) == []
    assert runs.diff(with_defaults(old, now), as_dict(now)) == ['data.train.small.resize: "crop" -> "none"']
    old["data"]["gone"] = 1  # what there is no more has no default to compare with
    assert runs.diff(with_defaults(old, load("toy")), as_dict(load("toy"))) == ["data.gone: 1 -> (absent)"]


def test_parents_are_found_by_name(suite, runs_root):
    folder = runs_root / "toy"
    with pytest.raises(ConfigError, match=r"toy has not been trained under .*; first make exp=toy"):
        runs.find_parent("toy")
    folder.mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"toy is not finished .* make exp=toy, .*allow_unfinished_parent=true"):
        runs.find_parent("toy")
    with pytest.raises(ConfigError, match=r"it has no weights yet; go on with make exp=toy"):
        runs.find_parent("toy", allow_unfinished=True)
    (folder / runs.DONE).write_text("{}")
    (folder / "weights-last.safetensors").touch()
    assert runs.find_parent("toy").name == "weights-last.safetensors"
    with pytest.raises(ConfigError, match=r"has no weights-ema.safetensors; it has last"):
        runs.find_parent("toy:ema")
    (folder / "weights-ema.safetensors").touch()
    assert runs.find_parent("toy").name == "weights-ema.safetensors"
    assert runs.find_parent("toy:last").name == "weights-last.safetensors"
    with pytest.raises(ConfigError, match="'emma' is none of ema, best, last"):
        runs.find_parent("toy:emma")
    with pytest.raises(ConfigError, match="there is no file /nowhere.safetensors"):
        runs.find_parent("/nowhere.safetensors")


# --- from the command line ----------------------------------------------------------------------------------------------


def test_the_command_line_says_one_line_and_no_traceback():
    command = [sys.executable, "-m", "experiments.show", "flashdecoder_dbug"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert run.returncode == 2
    assert run.stderr.startswith("error: no experiment 'flashdecoder_dbug'; did you mean flashdecoder_debug")
    assert run.stderr.count("\n") == 1


def test_make_hands_overrides_on_as_typed(tmp_path):
    typed = ["data.train.v.size=[64, 64]", "a='x' \"y\"", "ema={decay: 0.9}", "p=$DATA_ROOT/**/*.mp4", "q=a;b(c)&|<d"]
    (tmp_path / "python").write_text("printf '%s\\n' \"$@\"\n")
    command = ["make", f"python=bash {tmp_path}/python", "exp=toy", *typed]
    outside = {
        key: value for key, value in os.environ.items() if not key.startswith("MAKE")
    }  # `make test` runs this, too
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=outside, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == ["-m", "experiments.train", "toy", *sorted(typed)]
