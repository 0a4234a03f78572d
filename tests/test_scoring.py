"""What validation keeps of a clip: scores where there are some, features of sets, nothing that is no number, and times."""

import csv
import json
import math

import pytest
import torch
from torch import Tensor

from decoders import scoring
from decoders.scoring import (
    BROKEN,
    DECODE,
    DECODER,
    FEATURES,
    PER_FRAME,
    SCORED,
    TRUTH,
    Clips,
    Scorer,
    named_groups,
    selected,
)
from decoders.training import ValidationConfig
from experiments import evaluate
from experiments.checkpoints import save_weights
from experiments.config import load
from experiments.runs import run_dir
from experiments.summary import by_frame, only_frames, scored_frames, shares
from experiments.train import build
from metrics.base import SetMetric

NAME = "flashdecoder_debug"


class Brightness(SetMetric):
    """Squared distance of the mean brightness of windows of two frames; counts what it is asked for."""

    name, higher_is_better, protocol = "brightness_2f", False, {"per": "set"}

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def features(self, video: Tensor) -> Tensor:
        self.seen.append(video)
        return torch.stack([video[:, :, i : i + 2].mean(dim=(1, 2, 3, 4)) for i in range(0, video.shape[2] - 1, 2)], 1)[
            ..., None
        ]

    def score(self, real: Tensor, fake: Tensor) -> float:
        return (real.mean() - fake.mean()).square().item()


def scorer(*names: str) -> Scorer:
    return Scorer(ValidationConfig(metrics=["psnr", *names]))


def clips(t: int = 5, b: int = 2, **more) -> Clips:
    video = torch.rand(b, 3, t, 16, 16) * 2 - 1
    return Clips.of({"video": video, "key": [f"k{i}" for i in range(b)], **more}, {}, 0)


def test_frames_without_a_score_are_left_out() -> None:
    made = scorer("jump", "ssim")
    batch = clips()
    made.score(DECODER, (batch.video + 0.1).clamp(-1, 1), batch)
    first = made.rows[0]
    assert first[PER_FRAME]["jump"][0] is None and all(score is not None for score in first[PER_FRAME]["jump"][1:])
    assert first["jump"] == pytest.approx(sum(first[PER_FRAME]["jump"][1:]) / 4)
    assert made.means(made.rows)["jump"] == pytest.approx(sum(row["jump"] for row in made.rows) / 2)
    assert json.dumps(made.rows, allow_nan=False)
    made.begin()
    images = clips(t=1)
    made.score(DECODER, images.video, images)
    assert made.rows[0]["jump"] is None and made.rows[0]["psnr"] == 100
    assert made.means(made.rows).keys() == {"psnr", "ssim"}
    made.score(DECODER, batch.video, batch)
    assert made.means(made.rows)["jump"] == 0, "of those clips that have a score"


def test_a_prediction_that_is_not_finite_has_no_mean() -> None:
    """Leaving the clip out would make a broken decoder better than it is."""
    made = scorer("ssim", "jump", "psnr_video")
    batch = clips()
    broken = batch.video.clone()
    broken[1, :, 3] = torch.nan
    made.score(DECODER, broken, batch)
    assert BROKEN not in made.rows[0] and set(made.rows[1][BROKEN]) == {"psnr", "ssim", "jump", "psnr_video"}
    assert made.rows[1]["psnr"] is None and made.rows[1][PER_FRAME]["psnr"][3] is None
    assert all(math.isnan(mean) for mean in made.means(made.rows).values())
    assert made.means(made.rows[:1])["psnr"] == 100
    line = by_frame([row | {"stream": "s"} for row in made.rows], ["psnr", "jump"])[0]
    assert line["psnr"] is None and line["clips"] == 2


def test_only_scored_frames_and_groups_count() -> None:
    video = torch.rand(2, 3, 6, 16, 16) * 2 - 1
    supervised = torch.tensor([False, True, True, True, True, False]).expand(2, -1)
    group = torch.tensor([True, True, True, False, False, True]).expand(2, -1)
    batch = Clips.of({"video": video, "key": ["a", "b"], "supervised": supervised}, {"some": group}, 3)
    wrong = video.clone()
    wrong[:, :, [0, 5]] = 0.0
    wrong[:, :, 3] = -video[:, :, 3]
    made = scorer("psnr_video")
    made.score("plain", wrong, batch)
    row = made.rows[0]
    assert row[SCORED] == [1, 2, 3, 4]
    assert (row["frames"], row["stream"], row["method"]) == (4, 3, "plain") and len(row[PER_FRAME]["psnr"]) == 4
    assert row["psnr_some"] == 100 and row[PER_FRAME]["in_some"] == [1, 1, 0, 0] and row["psnr"] < 100
    mse = (2 * video[0, :, 3]).square().mean() / 4  # of four frames one is wrong
    assert row["psnr_video"] == pytest.approx((10 * torch.log10(4 / mse)).item(), abs=1e-3)


@pytest.mark.parametrize(
    ("scored", "resampled", "expected"),
    [
        (None, False, ((0, 6), 1, "")),
        (None, True, ((0, 6), None, "")),
        ([2, 3, 4], False, ((2, 5), 1, "")),
        ([2, 3, 4], True, ((2, 5), None, "")),
        ([1, 3, 5], False, ((1, 6), 2, "")),
        ([1, 3, 5], True, ((1, 6), None, "1, 3, 5")),
        ([0, 1, 4], False, ((0, 5), None, "0-1, 4")),
        ([4], False, ((4, 5), 1, "")),
    ],
)
def test_a_protocol_says_which_frames_are_scored(scored, resampled, expected) -> None:
    """Frames of a film that another two frames stand beside are other frames, as is every second one."""
    row = {"frames": 6} if scored is None else {"frames": len(scored), SCORED: scored}
    assert scored_frames(row, resampled) == expected


def test_sets_are_scored_once_for_all_clips(monkeypatch) -> None:
    metric = Brightness()
    monkeypatch.setattr(scoring.metrics, "build", lambda names, weights=None: [metric])
    made = Scorer(ValidationConfig())
    batch, more = clips(), clips(t=4)
    darker = batch.video - 0.2
    made.score(DECODER, darker, batch)
    made.score("floor", batch.video, batch)
    assert len(metric.seen) == 3, "the truth once for both methods"
    made.score(DECODER, more.video, more)
    own = [row for row in made.rows if row["method"] == DECODER]
    score, windows = scoring.set_score(metric, own)
    assert windows == 8 and made.rows[0][FEATURES][metric.name]["fake"].shape == (2, 1)
    assert score == pytest.approx(0.1**2, abs=1e-5), "half of all windows are darker by 0.2"
    shuffled = scoring.set_score(metric, own[::-1])[0]
    assert shuffled == score and made.means(own) == {metric.name: score}
    broken = darker.clone()
    broken[0, 0, 0] = torch.inf
    made.score("broken", broken, batch)
    assert math.isnan(made.means([row for row in made.rows if row["method"] == "broken"])[metric.name])


def test_a_mask_is_for_sets_too(monkeypatch) -> None:
    metric = Brightness()
    monkeypatch.setattr(scoring.metrics, "build", lambda names, weights=None: [metric])
    made, mask = Scorer(ValidationConfig()), torch.ones(2, 1, 5, 16, 16)
    mask[..., :8] = 0
    batch = clips(mask=mask)
    wrong = batch.video.clone()
    wrong[..., :8] = 1.0
    made.score(DECODER, wrong, batch)
    assert made.means(made.rows)[metric.name] == 0


def test_only_the_decoders_own_clips_are_timed() -> None:
    made, batch = scorer("ssim"), clips()
    made.score("floor", batch.video, batch)
    assert made.seconds == {}
    with made.timed(DECODE, torch.device("cpu")):
        pass
    made.score(DECODER, batch.video, batch)
    assert made.seconds.keys() == {DECODE, "psnr", "ssim"} and min(made.seconds.values()) >= 0
    assert shares({DECODE: 3.0, "ssim": 1.0}) == "time: decoding 75 %, ssim 25 % (of 4.0 s)\n" and shares({}) == ""


def test_some_clips_of_a_batch() -> None:
    batch = {"video": torch.arange(3.0)[:, None, None, None, None].expand(3, 3, 1, 2, 2), "key": ["a", "b", "c"]}
    part = selected(batch, [0, 2])
    assert part["key"] == ["a", "c"] and part["video"][:, 0, 0, 0, 0].tolist() == [0, 2]
    assert selected(batch, [0, 1, 2]) is batch and selected(batch, [])["video"].shape[0] == 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"weights": {"clipp": "x"}}, "clipp: no metric has such weights; there are lpips"),
        ({"categories": ["people"], "weights": {"clip": "x"}}, "two or more"),
        ({"categories": ["people", "animals"]}, "set validation.weights.clip"),
    ],
)
def test_settings_that_cannot_work(values, message) -> None:
    with pytest.raises(ValueError, match=message):
        ValidationConfig(**values)


def test_a_long_clip_is_told_frame_by_frame(runs_root) -> None:
    """401 frames: the whole clip is decoded, and by_frame.csv says how the score goes on."""
    decoder = build(load(NAME))
    weights = {**decoder.inference_parameters(), **decoder.inference_buffers()}
    kept = {"latent_space": decoder.latent_space.fingerprint, "step": "3"}
    save_weights(run_dir(NAME) / "weights-last.safetensors", weights, kept)
    overrides = [
        "data.val.unseen.num_frames=401", "data.val.unseen.size=[16,16]", "data.sources.unseen.num_frames=401",
        "data.sources.unseen.size=[16,16]", "validation.metrics=[psnr,jump]", "validation.references=false", "trainer.progress_bar=false",
    ]  # fmt: skip
    result = evaluate.evaluate(NAME, overrides, weights="last")
    folder = evaluate.evaluation_dir(NAME, overrides, weights="last")
    assert json.loads((folder / "result.json").read_text()) == result
    lines = [line for line in csv.DictReader((folder / "by_frame.csv").open()) if line["method"] == DECODER]
    assert [int(line["frame"]) for line in lines] == list(range(401)) and {line["clips"] for line in lines} == {"2"}
    assert lines[0]["jump"] == "" and all(line["jump"] for line in lines[1:])
    mean = sum(float(line["psnr"]) for line in lines) / 401
    assert mean == pytest.approx(result["means"][0]["scores"]["psnr"])
    frames = [float(x["psnr"]) for x in csv.DictReader((folder / "frames.csv").open()) if x["method"] == DECODER]
    assert (frames[7] + frames[408]) / 2 == pytest.approx(float(lines[7]["psnr"]))
    assert result["experiment"] == NAME and result["weights"]["step"] == 3 and len(result["weights"]["sha256"]) == 64
    assert result["seconds"].keys() == {"decode", "psnr", "jump"}
    assert "time: decoding" in (folder / "table.md").read_text()


def test_the_truth_is_scored_where_it_has_a_value_of_its_own() -> None:
    video = torch.rand(1, 3, 4, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    clips = Clips.of({"video": video, "key": ["a"]}, {}, 0)
    scorer = Scorer(ValidationConfig(metrics=["psnr", "flicker"]))
    scorer.score(TRUTH, video, clips)
    assert scorer.rows[0]["flicker"] == pytest.approx((video.diff(dim=2).abs() / 2).mean().item(), rel=1e-5)
    assert "psnr" not in scorer.rows[0], "100 dB would say nothing"
    scorer = Scorer(ValidationConfig(metrics=["psnr"]))
    scorer.score(TRUTH, video, clips)
    assert not scorer.rows


def test_groups_by_name_are_frames_of_every_clip() -> None:
    batch = {"key": ["a", "b"], "video": torch.zeros(2, 3, 4, 2, 2)}
    found = named_groups(batch, {"others": [1, 17], "late": [2, 4], "all": [0, 9], "none": [8, 9]})
    assert {name: group.tolist() for name, group in found.items()} == {
        "others": [[False, True, True, True]] * 2,
        "late": [[False, False, True, True]] * 2,
    }, "what is all of a clip, or none of it, is no group"
    with pytest.raises(ValueError, match=r"validation.groups.odd=\[3, 3\]"):
        ValidationConfig(groups={"odd": [3, 3]})


def test_groups_of_one_name_and_other_frames_are_told_apart() -> None:
    def rows(**members: list[int]) -> list[dict]:
        return [{"key": key, PER_FRAME: {"in_seam": inside}} for key, inside in members.items()]

    one = only_frames("seam", rows(a=[0, 0, 1, 0], b=[0, 0, 1, 0]))
    assert one == {"only_frames": {"group": "seam", "frames": "2"}}
    assert only_frames("seam", rows(a=[1, 0, 1, 1], b=[1, 0, 1, 1]))["only_frames"]["frames"] == "0, 2-3"
    mixed, swapped = only_frames("seam", rows(a=[0, 1], b=[1, 0])), only_frames("seam", rows(a=[1, 0], b=[0, 1]))
    assert mixed["only_frames"]["frames"] == swapped["only_frames"]["frames"] == "differ by clip"
    assert mixed != swapped
