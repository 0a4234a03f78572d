"""Evaluation that fits RefDecoder: distance from the reference, named sets, edits, and weights that no run trained."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from video_files import make_film

from datamodules.latents import save_latent
from decoders.base import DECODER
from decoders.refdecoder import released
from experiments import evaluate
from experiments.checkpoints import save_weights
from experiments.compose import ConfigError
from experiments.config import load
from experiments.runs import run_dir
from experiments.train import build, train
from metrics.image import Psnr

NAME = "refdecoder_debug"
QUICK = ("trainer.max_steps=2", "trainer.val_every_steps=2", "trainer.progress_bar=false", "validation.num_shown=0")
LESS = (
    "ema=null",
    "validation.metrics=[psnr]",
    "data.val.unseen.batch_size=1",
)  # one override is of the run's own clips


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A debug experiment, trained for two steps on the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RUNS_ROOT", str(tmp_path_factory.mktemp("runs")))
        yield train(load(NAME, (*QUICK, *LESS)), NAME, (*QUICK, *LESS))


def measured(*overrides: str, **options) -> dict:
    return evaluate.evaluate(NAME, (*QUICK, *LESS, *overrides), **options)


# ---- distance


def test_a_run_tells_the_effect_of_distance(run):
    folder = run / "evaluation"
    result = json.loads((folder / "result.json").read_text())
    methods = {(e["method"], e["minus"]) for e in result["distance"]}
    controls = {"without reference", "wrong reference", "plain"}
    assert methods == {(m, None) for m in {DECODER, *controls}} | {(DECODER, m) for m in controls}
    own = {e["distance"]: e["mean"] for e in result["distance"] if (e["method"], e["minus"]) == (DECODER, None)}
    assert list(own) == list(range(9)), "the first of nine frames is the reference"
    scores = next(m for m in result["means"] if m["method"] == DECODER)["scores"]
    assert own[0] == pytest.approx(scores["psnr_reference"])
    assert sum(own[d] for d in range(1, 9)) / 8 == pytest.approx(scores["psnr_others"])
    assert "| distance |" in (folder / "distance.md").read_text()


def test_other_references_have_other_distances(run):
    """Ends: no frame of nine is further than 4. Random: what frames.csv says, whatever it is."""
    before = (run / "evaluation" / "distance.md").read_bytes()
    ends = measured("objective.evaluate=ends")
    assert {e["distance"] for e in ends["distance"]} == set(range(5))
    random = measured("objective.evaluate=random", "objective.evaluate_references=2")
    folder = next(run.glob("evaluation*random*"))
    with open(folder / "frames.csv", newline="") as file:
        clips: dict[str, list[dict]] = {}
        for row in csv.DictReader(file):
            if row["method"] == DECODER:
                clips.setdefault(row["key"], []).append(row)
    expected: dict[int, list[float]] = {}
    for frames in clips.values():
        places = [t for t, row in enumerate(frames) if row["in_reference"] == "1"]
        assert len(places) == 2
        scores: dict[int, list[float]] = {}
        for t, row in enumerate(frames):
            scores.setdefault(min(abs(t - place) for place in places), []).append(float(row["psnr"]))
        for d, some in scores.items():
            expected.setdefault(d, []).append(np.mean(some))
    found = {e["distance"]: e["mean"] for e in random["distance"] if (e["method"], e["minus"]) == (DECODER, None)}
    assert found == pytest.approx({d: np.mean(some) for d, some in expected.items()})
    assert (run / "evaluation" / "distance.md").read_bytes() == before


# ---- folders


def test_other_metrics_leave_the_runs_own_result_alone(run):
    before = {path.name: path.read_bytes() for path in (run / "evaluation").iterdir()}
    result = measured("validation.metrics=[psnr,ssim]")
    assert {"psnr", "psnr_others", "psnr_reference", "ssim"} < {name for m in result["means"] for name in m["scores"]}
    assert (run / "evaluation-metrics=psnr,ssim" / "result.json").is_file()
    plain = measured("validation.references=false")
    assert {m["method"] for m in plain["means"]} == {DECODER}
    assert (run / "evaluation-references=false" / "result.json").is_file()
    assert {path.name: path.read_bytes() for path in (run / "evaluation").iterdir()} == before
    again = measured()  # the same ones: the run's own folder
    assert again["means"][0]["scores"] == pytest.approx(json.loads(before["result.json"])["means"][0]["scores"])


# ---- named sets


def test_sets_take_the_place_of_the_validation_clips(run, capsys):
    late = "data.sets={late: {sources: [unseen], size: [32, 48], num_frames: 5, window: first}, other: {sources: [motion], size: [32, 32], num_frames: 9}}"
    result = measured(late, sets=["late"])
    assert {m["stream"] for m in result["means"]} == {"late"}
    assert result["protocols"]["late/psnr"]["frames"] == [0, 5]
    assert list(run.glob("evaluation-sets=late-*/result.json"))
    with pytest.raises(ConfigError, match="has no evaluation set 'lat'; did you mean late[?] there are late, other"):
        measured(late, sets=["lat"])
    with pytest.raises(ConfigError, match=r"data.sources.films: /no/such does not exist"):
        measured(
            "data.sources.films={path: /no/such}",
            "data.sets={gone: {sources: [films], size: [32, 48], num_frames: 5}}",
            sets=["gone"],
        )
    with pytest.raises(
        ConfigError, match="data.val.late: 6 frames.*pad=replicate pads clips.*data.sets.late.num_frames="
    ):
        measured(late, "data.sets.late.num_frames=6", sets=["late"])
    evaluate.main([NAME, *QUICK, *LESS, late, "sets=[late]", "weights=last"])
    assert "late (2 of 32x48)" in capsys.readouterr().out
    assert list(run.glob("evaluation-last-sets=late-*/result.json"))


@pytest.mark.parametrize(
    "name", [f"refdecoder_{name}" for name in ("wan21_clip17", "wan21_released", "wan22_clip5", "videovaeplus_clip16")]
)
def test_the_papers_sets_are_there_in_its_protocol(name):
    """The first 17 frames at 480x832, or 16 at 216x216, at the films' own rate; the first frame is the reference."""
    frames, size, end = (16, (216, 216), "_216") if "videovaeplus" in name else (17, (480, 832), "")
    sets = [f"{named}{end}" for named in ("inter4k", "webvid", "large_motion", "davis")]
    experiment = load(name, sets=sets)
    for named in sets:
        stream = experiment.data.sets[named]
        assert (stream.num_frames, stream.size, stream.window, stream.fps) == (frames, size, "first", None)
        (source,) = stream.sources
        assert stream.num_clips is None and source == named.removesuffix(end)
        assert experiment.data.sources[source].clips_per_video == 1
    edits = experiment.data.sets["edits"]
    assert (edits.num_frames, edits.size) == (frames, size)
    assert experiment.objective.evaluate == "first"


def test_a_set_of_other_clips_has_a_folder_of_its_own(run):
    """Else the second would take the first one's place."""
    made = "data.sets={one: {sources: [unseen], size: [32, 48], num_frames: 5}}"
    measured(made, sets=["one"])
    (first,) = run.glob("evaluation-sets=one*")
    before = (first / "result.json").read_bytes()
    measured(made, "data.sets.one.num_frames=9", sets=["one"])
    assert len(list(run.glob("evaluation-sets=one*"))) == 2
    assert (first / "result.json").read_bytes() == before


def test_small_films_are_enlarged_or_told(run, tmp_path, capsys):
    """WebVid's films are smaller than the paper's size: no set may lose them without a word."""
    for i, size in enumerate([(32, 48), (16, 24), (48, 64)]):
        make_film(tmp_path / f"{i}.mp4", 5, size, film=i)
    source = f"data.sources.films={{path: {tmp_path}}}"
    for resize, number in (("stretch", 2), ("enlarge", 3)):
        stream = f"data.sets={{s: {{sources: [films], size: [32, 48], num_frames: 5, resize: {resize}}}}}"
        result = measured(source, stream, sets=["s"])
        left_out = {} if number == 3 else {"too small": 1}
        assert result["files"] == {"s": {"used": number, "found": 3, "left_out": left_out}}
        assert ("s: 2 of 3 files; left out: 1 too small" in capsys.readouterr().out) == (number == 2)
        assert result["means"][0]["clips"] == number
        assert resize in result["protocols"]["s/psnr"]["resize"]


# ---- which run


def test_what_only_training_reads_is_never_left_out(run):
    """Overrides of the training clips name another run; measuring this one in its place would be another model's number."""
    with pytest.raises(ConfigError, match=r"data.train.video.batch_size=9\+.* has not been trained"):
        measured("data.train.video.batch_size=9")
    with pytest.raises(ConfigError, match=r"data.train.image.batch_size=5\+.* has not been trained"):
        measured("data.train.image.batch_size=5", "data.val.unseen.num_frames=5")
    kept = [*QUICK, *LESS, "data.order=shares"]
    assert evaluate.which_run(NAME, [*kept, "data.val.more=null"]) == kept[:-2] + kept[-1:]


# ---- weights that no run trained


SMALL = ("decoder.residual=none", "decoder.zero_init=null", "decoder.blocks=2")


@pytest.fixture
def release(tmp_path, monkeypatch) -> Path:
    """A file of the released names and shapes with random weights, at the debug experiment's size."""
    monkeypatch.setenv("RUNS_ROOT", str(tmp_path / "runs"))
    torch.manual_seed(7)
    decoder = build(load(NAME, SMALL))
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    state = {name: tensor.clone() for name, tensor in released.to_released(decoder.model).items()}
    torch.save({"state_dict": state | {"ae.encoder.conv_in.weight": torch.zeros(1)}}, tmp_path / "model.pt")
    return tmp_path / "model.pt"


def test_the_released_file_is_measured_without_a_run(release, tmp_path, capsys):
    overrides = (*SMALL, f"objective.start=refdecoder:{release}", "data.val.unseen.num_frames=5")
    result = evaluate.evaluate(NAME, overrides, weights="start")
    assert len(result["weights"].pop("sha256")) == 64
    assert result["weights"] == {"kind": "start", "step": 0, "file": f"refdecoder:{release}"}
    assert f"refdecoder:{release} (step 0)" in capsys.readouterr().out
    (folder,) = (tmp_path / "runs").glob("*/evaluation-start*")
    assert "num_frames=5" in folder.name and "num_frames" not in folder.parent.name
    decoder = build(load(NAME, overrides))
    assert decoder.take_start() == f"refdecoder:{release}"
    theirs = torch.load(release)["state_dict"]
    ours = released.to_released(decoder.model)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    other = evaluate.evaluate(NAME, (*overrides, "seed=1"), weights="start")  # other random weights, the same file
    assert other["means"][0]["scores"] == pytest.approx(result["means"][0]["scores"])


def test_a_start_that_cannot_be_had_is_refused(release, tmp_path):
    for overrides, message in (
        (
            (*SMALL, f"objective.start=refdecoder:{tmp_path}/none.pt"),
            "no file .*none.pt; get it with `hf download Arrok",
        ),
        (
            (f"objective.start=refdecoder:{release}",),
            "with residual=none; with decoder.layout=wan21 and residual=video",
        ),
        ((*SMALL, "decoder.blocks=3", f"objective.start=refdecoder:{release}"), "The file has 2 blocks; decoder must"),
        (
            (*SMALL, "decoder.ffn=32", f"objective.start=refdecoder:{release}"),
            r"is \(64,\), expected \(32,\). The file has 2",
        ),
        ((), "nothing in this configuration names weights of RefDecoder"),
        (("objective.start=null",), "nothing in this configuration names weights"),
        (("objective.start=null", "init_from=refdecoder_debug"), "init_from: refdecoder_debug has not been trained"),
    ):
        with pytest.raises(ConfigError, match=message):
            evaluate.evaluate(NAME, overrides, weights="start")
    with pytest.raises(ConfigError, match="has not been trained.*weights=start takes those"):
        evaluate.evaluate(NAME)
    with pytest.raises(ConfigError, match="weights=first is none of ema, best, last, start"):
        evaluate.evaluate(NAME, weights="first")
    with pytest.raises(ConfigError, match="nothing in this configuration names weights of FlashDecoder"):
        evaluate.evaluate("flashdecoder_debug", weights="start")


def test_a_stage_starts_from_its_parents_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("RUNS_ROOT", str(tmp_path / "runs"))
    parent = build(load(NAME))
    weights = {**parent.inference_parameters(), **parent.inference_buffers()}
    kept = {"latent_space": parent.latent_space.fingerprint, "step": "40"}
    save_weights(run_dir(NAME) / "weights-last.safetensors", weights, kept)
    child = ("objective.start=null", f"init_from={NAME}", "allow_unfinished_parent=true", "seed=3")
    result = evaluate.evaluate(NAME, child, weights="start")
    assert result["weights"]["kind"] == "start" and result["weights"]["step"] == 40
    own = evaluate.evaluate(NAME, (), weights="last")
    assert own["means"][0]["scores"]["psnr"] == pytest.approx(result["means"][0]["scores"]["psnr"])
    assert load_file(run_dir(NAME) / "weights-last.safetensors").keys() == weights.keys()


def test_a_computed_codec_is_a_start(tmp_path, monkeypatch):
    monkeypatch.setenv("RUNS_ROOT", str(tmp_path / "runs"))
    monkeypatch.setattr("decoders.baseline.module.linear_start", lambda *_: None)  # half a minute
    decoder = build(load("baseline_debug", ["decoder.start=linear"]))
    assert build(load("baseline_debug")).take_start() is None
    assert decoder.take_start() == "a computed codec (decoder.start=linear)"


def test_the_released_experiment_is_the_released_model(monkeypatch):
    experiment = load("refdecoder_wan21_released")
    assert experiment.objective.start.startswith("refdecoder:$WEIGHTS_ROOT/") and experiment.init_from is None
    from decoders.refdecoder.model import RefDecoderConfig

    assert vars(experiment.decoder) == vars(RefDecoderConfig(checkpointing=True))


# ---- edits


def edits(folder: Path, space: str, form: str = "tight") -> tuple[str, ...]:
    """Two edited films with latents: overrides that make them an evaluation set of their own."""
    lines = ["path,mask,latent,reference"]
    for i in range(2):
        make_film(folder / f"{i}.mp4", 9, (32, 48), film=i)
        mask = np.zeros((32, 48), np.uint8)
        mask[4:20, 8:30] = 255
        Image.fromarray(mask).save(folder / "mask.png")
        latent = torch.randn(12, 3, 4, 6, generator=torch.Generator().manual_seed(i))
        save_latent(folder / f"{i}.safetensors", latent, space=space, height=32, width=48)
        Image.fromarray(np.full((32, 48, 3), 90 * i, np.uint8)).save(folder / f"{i}.png")
        lines.append(f"{i}.mp4,mask.png,{i}.safetensors,{i}.png")
    (folder / "edits.csv").write_text("\n".join(lines) + "\n")
    return (
        f"data.sources.edits={{path: {folder}/edits.csv, kind: edit, mask: {form}, strides: [4, 8]}}",
        "data.sets={edits: {sources: [edits], size: [32, 48], num_frames: 9}}",
    )


def test_edits_are_scored_outside_the_edit(run, tmp_path):
    """The run's decoder on the edits' own latents, against the source films, where the mask is black."""
    made = edits(tmp_path, "dct")
    result = measured(*made, sets=["edits"])
    experiment = load(NAME, (*QUICK, *LESS, *made))
    experiment.data.train, experiment.data.val = {}, dict(experiment.data.sets)
    decoder = build(experiment).eval()
    from experiments.checkpoints import load_weights
    from experiments.train import build_data

    load_weights(decoder, run / "weights-last.safetensors")
    scores, whole = [], []
    for batch in build_data(experiment, None).val_dataloader()[0]:
        video = decoder.decode(batch["latent"], size=(9, 32, 48), reference=batch["reference"])
        error = (video - batch["video"]).square().mean(1)
        keep = torch.ones(32, 48, dtype=torch.bool)
        keep[4:20, 8:30] = False
        scores.append((10 * torch.log10(4 / error[..., keep].mean(-1))).mean().item())
        whole.append(Psnr()(video, batch["video"]).mean().item())
    own = next(m for m in result["means"] if m["method"] == DECODER)
    assert own["scores"]["psnr"] == pytest.approx(np.mean(scores), abs=1e-4)
    assert abs(own["scores"]["psnr"] - np.mean(whole)) > 1e-3
    assert result["protocols"]["edits/psnr"]["definition"]["pixels"].startswith("outside the edit, tight masks")
    assert result["distance"] == [], "the reference is no frame of the source film"


def test_a_mask_that_nothing_can_be_scored_by_is_one_line(run, tmp_path):
    made = edits(tmp_path, "dct")
    Image.fromarray(np.full((32, 48), 255, np.uint8)).save(tmp_path / "mask.png")
    with pytest.raises(ConfigError, match="mask.png: marks all of the clip's frame 0 as edited"):
        measured(*made, sets=["edits"])
    with pytest.raises(ConfigError, match="its edits have latents, so no fps"):
        measured(*made, "data.sets.edits.fps=5", sets=["edits"])
    lines = (tmp_path / "edits.csv").read_text().splitlines()
    (tmp_path / "edits.csv").write_text("\n".join(lines[:2]) + "\n")
    Image.fromarray(np.zeros((32, 48), np.uint8)).save(tmp_path / "mask.png")
    with pytest.raises(ConfigError, match=r"all clips are of one file.*leave that control out \(objective.controls\)"):
        measured(*made, sets=["edits"])
    assert measured(*made, "objective.controls=[plain]", sets=["edits"])["means"]


def test_edits_latents_of_another_space_are_refused(run, tmp_path):
    with pytest.raises(ConfigError, match="data.sources.edits: 2 of its latents are of the space wan21, and this run"):
        measured(*edits(tmp_path, "wan21"), sets=["edits"])
