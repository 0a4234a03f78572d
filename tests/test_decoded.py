"""Decoded clips are those that were scored: weights, seeds, path; and they are decoded once."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest

from decoders.base import VideoDecoder
from experiments import decoded, evaluate, weights
from experiments.compose import ConfigError
from experiments.config import load
from experiments.runs import run_dir
from experiments.train import build, train

NAME = "regen_space_debug"  # it draws noise, and has methods of its own
QUICK = ["trainer.progress_bar=false", "validation.num_shown=0"]
SHORT = [*QUICK, "trainer.max_steps=1"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RUNS_ROOT", str(root))
        return train(load(NAME, SHORT), NAME, SHORT)


@pytest.fixture(autouse=True)
def root(run, monkeypatch):
    monkeypatch.setenv("RUNS_ROOT", str(run.parent))


def rows(run: Path) -> dict[tuple[str, str], float]:
    with open(run / "evaluation" / evaluate.CLIPS, newline="") as file:
        return {(row["key"], row["method"]): float(row["psnr"]) for row in csv.DictReader(file)}


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = ((a.astype(np.float64) - b) ** 2).mean(axis=(1, 2, 3)) / 255**2
    return float(np.mean(-10 * np.log10(np.maximum(error, 1e-10))))  # 100 dB at most, as our metric has it


def test_frames_are_those_that_were_scored(run):
    scored = rows(run)
    keys = sorted({key for key, _ in scored})
    assert run.name == f"{NAME}+trainer.max_steps=1", "a run with overrides is found by its folder's name"
    found = decoded.decode(run.name, "unseen", keys)
    assert [*found] == keys
    for key, films in found.items():
        methods = {method for other, method in scored if other == key}
        assert {*films} == {"truth"} | {m for m in methods if not m.startswith(decoded.FLOORS)}
        assert [*films][:2] == ["truth", "decoder"] and len(films) > 2
        for method, frames in films.items():
            assert frames.dtype == np.uint8 and frames.shape == films["truth"].shape and not frames.flags.writeable
            if method != "truth":
                assert psnr(frames, films["truth"]) == pytest.approx(scored[key, method], abs=0.05), method


def test_only_what_is_wanted_is_decoded_and_only_once(run, monkeypatch):
    keys = sorted({key for key, _ in rows(run)})
    calls = []
    plain = VideoDecoder._decode_clip
    monkeypatch.setattr(VideoDecoder, "_decode_clip", lambda self, *a: calls.append(a) or plain(self, *a))
    monkeypatch.setattr(decoded, "FOLDER", "frames-again")
    whole = decoded.decode(run.name, "unseen", keys[:1])
    assert len(calls) == 1
    again = decoded.decode(run.name, "unseen", keys[:1])
    assert len(calls) == 1 and np.array_equal(whole[keys[0]]["decoder"], again[keys[0]]["decoder"])
    both = decoded.decode(run.name, "unseen", keys)
    assert len(calls) == 2 and np.array_equal(both[keys[0]]["decoder"], whole[keys[0]]["decoder"])


def test_other_pixels_than_those_scored_are_refused(run, monkeypatch):
    """The evaluation's table says something else: it was measured with other weights."""
    monkeypatch.setattr(decoded, "FOLDER", "frames-odd")
    path = run / "evaluation" / evaluate.CLIPS
    kept = path.read_text()
    (key, _), *_ = rows(run)
    scored = rows(run)[key, "decoder"]
    try:
        text = kept.replace(
            next(p for p in kept.replace("\n", ",").split(",") if p.startswith(f"{scored:.6f}"[:8])), "99.0"
        )
        path.write_text(text)
        with pytest.raises(ConfigError, match="was evaluated at 99.00 dB: these are not the pixels"):
            decoded.decode(run.name, "unseen", [key])
    finally:
        path.write_text(kept)
    assert decoded.decode(run.name, "unseen", [key])


@pytest.mark.parametrize("method", ["2 steps", "one colour per 8x8x4 cell"])
def test_other_pixels_of_any_method_are_refused(run, monkeypatch, method):
    """All that is kept is checked, not the decoder alone; what is not shown, and has another score, is not."""
    monkeypatch.setattr(decoded, "FOLDER", f"frames-{method[:3]}")
    (key, _), *_ = rows(run)
    plain = decoded.scored_methods

    def odd(home, name):
        found = plain(home, name)
        assert method in found["unseen", key]
        found["unseen", key][method]["psnr"] += 1.0
        return found

    monkeypatch.setattr(decoded, "scored_methods", odd)
    if method.startswith(decoded.FLOORS):
        assert decoded.decode(run.name, "unseen", [key])
        return
    for _ in range(2):  # the second time too: nothing of it was kept
        with pytest.raises(ConfigError, match=f"by {method} decodes to .* these are not the pixels"):
            decoded.decode(run.name, "unseen", [key])


def test_a_method_without_a_score_is_not_checked(run, monkeypatch):
    monkeypatch.setattr(decoded, "FOLDER", "frames-without")
    (key, _), *_ = rows(run)
    monkeypatch.setattr(decoded, "scored_methods", lambda *_: {("unseen", key): {"decoder": {}}})
    assert "2 steps" in decoded.decode(run.name, "unseen", [key])[key]


def test_no_other_clip_is_read(run, monkeypatch):
    """Clips of other streams and other batches: for two films of a set of hundreds nobody reads the set."""
    changed = ["data.val.unseen.batch_size=1", "data.val.small={sources: [unseen], size: [32, 32], num_frames: 9}"]
    evaluate.evaluate(NAME, [*SHORT, *changed])
    there = decoded.scored_clips(decoded.plan(run.name, None, changed).folder, run.name)
    keys = sorted(key for stream, key in there if stream == "unseen")
    assert len(keys) == 2 and len(there) == 4
    seen, others = [], []
    plain = VideoDecoder.validation_step

    def step(self, batch, *more):
        seen.extend(batch["key"])
        others.append(self.trainer.datamodule.another_clip(batch["key"][0]))  # what controls take
        return plain(self, batch, *more)

    monkeypatch.setattr(VideoDecoder, "validation_step", step)
    found = decoded.decode(run.name, "unseen", keys[1:], overrides=changed)
    assert seen == keys[1:] and [*found] == keys[1:] and others[0].shape[0] == 3
    assert decoded._begins("a@b.mp4#0@0,0,8x8", "a@b.mp4#0") and not decoded._begins("a.mp4#01@0", "a.mp4#0")


def test_one_process_decodes_on_a_machine_of_several(run, monkeypatch):
    monkeypatch.setattr(decoded, "FOLDER", "frames-devices")
    from experiments import train as training

    class Seen(Exception):
        pass

    def build_trainer(experiment, *more, **named):
        t = experiment.trainer
        raise Seen(t.devices, t.num_nodes, t.strategy)

    monkeypatch.setattr(training, "build_trainer", build_trainer)
    (key, _), *_ = rows(run)
    many = ["trainer.devices=2", "trainer.num_nodes=2", "trainer.strategy=ddp"]
    with pytest.raises(Seen) as seen:
        decoded.decode(run.name, "unseen", [key], overrides=many)
    assert seen.value.args == (1, 1, "auto")


def test_frames_of_a_start_are_kept_under_its_weights(run, monkeypatch):
    """``NAME:start`` has no file of weights: a start that changes is not shown from what was kept of the one before."""
    monkeypatch.setattr(decoded, "FOLDER", "frames-start")
    (key, _), *_ = rows(run)
    fill, file = weights.fill, weights.find(load(NAME, SHORT), run.name, None)
    decoder = build(load(NAME, SHORT))
    fill(decoder, load(NAME, SHORT), file, None)
    own = weights.digest(decoder)
    monkeypatch.setattr(weights, "find", lambda *_: None)
    monkeypatch.setattr(weights, "fill", lambda decoder, experiment, *_: fill(decoder, experiment, file, None))
    path = run / "evaluation" / evaluate.RESULT
    kept = path.read_text()

    def says(digest: str | None) -> None:
        path.write_text(json.dumps(json.loads(kept) | {"weights": {"sha256": digest}}))

    try:
        says(own)
        assert decoded.decode(run.name, "unseen", [key])
        says("0" * 64)
        with pytest.raises(ConfigError, match="starts from other weights now"):
            decoded.decode(run.name, "unseen", [key])
        says(None)
        with pytest.raises(ConfigError, match="does not say which weights"):
            decoded.decode(run.name, "unseen", [key])
    finally:
        path.write_text(kept)
    assert len(list((run / "evaluation" / "frames-start").iterdir())) == 1


def test_what_is_not_there_is_told(run):
    with pytest.raises(ConfigError, match="has no clip 'nothing' of 'unseen'"):
        decoded.decode(run.name, "unseen", ["nothing"])
    with pytest.raises(ConfigError, match="flashdecoder_debug"):
        decoded.decode("flashdecoder_debug", "unseen", ["nothing"])
    assert not run_dir("flashdecoder_debug").exists()


def test_places_of_clips_are_apart_and_inside_whatever_the_keys_are():
    keys = ["a/b#1", "a/b#2", "../../etc/passwd", "/etc/passwd", "x" * 500, "<script>", "", "a\0b"]
    names = [decoded._slug(stream, key) for key in keys for stream in ("one", "two")]
    assert len(set(names)) == len(names)
    assert all(os.path.basename(name) == name and len(name) < 80 and name.strip(".") for name in names)
