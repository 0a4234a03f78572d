"""REGEN's objective: what is cut from a clip, tasks that move, statistics, and what validation measures."""

import csv
import json

import pytest
import torch

from datamodules.batch import VideoBatch
from decoders.latent_spaces.dct import DCT, DCTConfig
from decoders.regen.module import Regen, RegenObjective
from decoders.regen.moments import Moments
from decoders.regen.targets import draw_task, draw_wanted, needed_frames
from decoders.training import TrainingConfig
from experiments.compose import ConfigError
from experiments.config import load
from experiments.train import build, train

TASKS = ("reconstruct", "interpolate", "extrapolate")
K = 4


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def made(*overrides: str, name: str = "regen_debug") -> Regen:
    torch.manual_seed(0)
    decoder = build(load(name, overrides))
    decoder.training_config.validation.metrics = ["psnr"]
    return decoder


def clip(t: int, side: int = 32, b: int = 2) -> VideoBatch:
    video = torch.rand(b, 3, t, side, side, generator=generator(t)) * 2 - 1
    return {"video": video, "key": [f"clip{i}" for i in range(b)]}


# --- targets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [2 * K + 1, 3 * K + 2])
def test_what_is_wanted_lies_in_the_clip_at_the_time_it_says(task: str, length: int) -> None:
    shifts = set()
    for seed in range(300):
        wanted = draw_wanted(task, length, K, generator(seed))
        start = wanted.draw_start(generator(seed))
        frames = [start + i for i in (*wanted.encoded, *wanted.frames)]
        assert min(frames) >= 0 and max(frames) < length
        span = wanted.encoded[-1]
        assert span == (2 * K if task == "interpolate" else K)
        assert list(wanted.times) == pytest.approx([i / span for i in wanted.frames])
        shifts.add(wanted.frames[0])
        assert len(wanted.frames) == K + 1 or (task, wanted.frames) == ("extrapolate", tuple(range(-1, K + 1)))
    expected = {"reconstruct": {0}, "interpolate": set(range(K + 1)), "extrapolate": {*range(-K, 0), *range(1, K + 1)}}
    assert shifts == expected[task]


def test_every_start_is_drawn_and_no_other() -> None:
    wanted = draw_wanted("reconstruct", 8, K, generator(0))
    assert {wanted.draw_start(generator(seed)) for seed in range(100)} == {0, 1, 2, 3}


@pytest.mark.parametrize("task", TASKS)
def test_a_clip_that_is_too_short_is_refused(task: str) -> None:
    with pytest.raises(ValueError, match=f"takes {needed_frames(task, K)} or more"):
        draw_wanted(task, needed_frames(task, K) - 1, K, generator(0))
    assert draw_wanted(task, 1, K, generator(0)).times == (0.0,)  # an image is reconstructed


def test_tasks_come_as_often_as_asked_and_move() -> None:
    objective = RegenObjective(
        interpolation={"start": 0.0, "end": 0.25, "from_step": 20, "to_step": 60}, extrapolation=0.5
    )
    assert [objective.probabilities(step) for step in (0, 20, 40, 60, 99)] == [
        (0.0, 0.5),
        (0.0, 0.5),
        (0.125, 0.5),
        (0.25, 0.5),
        (0.25, 0.5),
    ]
    one = generator(0)
    drawn = [draw_task(0.25, 0.5, one) for _ in range(4000)]
    shares = [drawn.count(task) / len(drawn) for task in TASKS]
    assert shares == pytest.approx([0.25, 0.25, 0.5], abs=0.03)
    for wrong in ({"interpolation": 0.7, "extrapolation": 0.6}, {"interpolation": -0.1}, {"at_one": 2.0}):
        with pytest.raises(ValueError, match="must lie in|more than 1 together"):
            RegenObjective(**wrong)


# --- what the network is given ----------------------------------------------------------------------------------------


def seen_by_the_network(decoder: Regen, batch: VideoBatch, monkeypatch: pytest.MonkeyPatch) -> dict:
    """The arguments of the network in one step; targets are what a level of 0 leaves of them."""
    seen = {}

    def network(latent, noisy, level, times):
        seen.update(latent=latent.detach(), noisy=noisy, times=times)
        return noisy * 0

    monkeypatch.setattr(decoder.model, "forward", network)
    monkeypatch.setattr("losses.flow.draw_levels", lambda n, **_: torch.zeros(n))
    decoder.losses(batch)
    return seen


@pytest.mark.parametrize("task", TASKS)
def test_an_encoder_sees_its_chunk_and_the_network_the_frames_of_its_times(task: str, monkeypatch) -> None:
    decoder = made("objective.interpolation=0.0", "objective.extrapolation=0.0")
    monkeypatch.setattr("decoders.regen.module.draw_task", lambda *_: task)
    t = 3 * K + 2
    numbers = torch.linspace(-1, 1, t)[None, None, :, None, None].expand(2, 3, t, 32, 32).contiguous()
    shown = []
    encoder = decoder.encoder.forward
    monkeypatch.setattr(decoder.encoder, "forward", lambda video: shown.append(video) or encoder(video))
    for seed in range(8):
        torch.manual_seed(seed)
        seen = seen_by_the_network(decoder, {"video": numbers, "key": ["a", "b"]}, monkeypatch)
        encoded = ((shown.pop()[0, 0, :, 0, 0] + 1) / 2 * (t - 1)).round()
        target = (seen["noisy"][0, 0, :, 0, 0] + 1) / 2 * (t - 1)
        span = encoded[-1] - encoded[0]
        assert span == (2 * K if task == "interpolate" else K)
        torch.testing.assert_close(encoded[0] + seen["times"][0] * span, target)
        assert (task == "reconstruct") == torch.equal(encoded, target.round())


@pytest.mark.parametrize("task", TASKS)
def test_over_a_frozen_space_every_pair_has_the_frames_of_its_times(task: str, monkeypatch) -> None:
    decoder = made(name="regen_space_debug")
    monkeypatch.setattr("decoders.regen.module.draw_task", lambda *_: task)
    t = 4 * K + 1
    numbers = torch.linspace(-1, 1, t)[None, None, :, None, None].expand(2, 3, t, 32, 32).contiguous()
    space = decoder.latent_space
    whole = space.encode(numbers[:, :, ::2] if task == "interpolate" else numbers)
    for seed in range(8):
        torch.manual_seed(seed)
        seen = seen_by_the_network(decoder, {"video": numbers, "key": ["a", "b"]}, monkeypatch)
        pairs = len(seen["latent"]) // 2
        for row, (latent, target, times) in enumerate(zip(seen["latent"], seen["noisy"], seen["times"], strict=True)):
            frames = (target[0, :, 0, 0] + 1) / 2 * (t - 1)
            span = 2 * K if task == "interpolate" else K
            pair = round(((frames[0] - times[0] * span) / span).item())
            torch.testing.assert_close(latent, whole[row // pairs, :, pair : pair + 2])
            torch.testing.assert_close((pair + times) * span, frames)
        assert pairs == {"reconstruct": 4, "interpolate": 2}.get(task, pairs) and pairs >= 1


def test_an_image_trains_the_path_of_a_first_frame() -> None:
    decoder = made()
    decoder.losses(clip(1))["diffusion"].backward()
    decoder.zero_grad()
    batch = clip(2 * K + 1)
    image = decoder.encoder(batch["video"][:, :, :1])[0]
    video = decoder.encoder(batch["video"][:, :, : K + 1])[0]
    assert torch.equal(image[:, :, 0], video[:, :, 0])


def test_kl_is_a_term_of_a_variational_encoder_alone() -> None:
    assert made().terms == {"diffusion"}
    decoder = made("objective.variational=true", "loss_weights.kl=1e-6")
    decoder.setup("fit")
    found = decoder.losses(clip(2 * K + 1))
    assert found.keys() == {"diffusion", "kl"} == decoder.terms
    batch = clip(K + 1)["video"]
    drawn = [decoder.encode(batch, sample=True, generator=generator(seed)) for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert torch.equal(decoder.encode(batch), decoder.encode(batch, sample=False))


def test_long_videos_are_encoded_chunk_by_chunk() -> None:
    decoder = made()
    video = clip(3 * (K + 1))["video"]
    whole = decoder.encode(video)
    parts = [decoder.encode(part) for part in video.split(K + 1, dim=2)]
    torch.testing.assert_close(whole, torch.cat(parts, dim=2))
    assert whole.shape[2] == 6


@pytest.mark.parametrize("change", ["decoder.patch_t=1", "decoder.patch_t=2", "decoder.conditioning=in_context"])
def test_tokens_are_those_that_attention_sees(change: str, monkeypatch) -> None:
    decoder = made(change)
    seen = []
    block = decoder.model.dit.blocks[0]
    monkeypatch.setattr(block, "forward", lambda x, shared: seen.append(x.shape[0] * x.shape[1]) or x)
    for n in (1, 2, 4):
        decoder.decode(torch.zeros(1, 4, n, 2, 3))
        assert sum(decoder.tokens(n, 2, 3).values()) == sum(seen)
        seen.clear()


# --- statistics ---------------------------------------------------------------------------------------------------------


def test_moments_are_those_of_the_latents() -> None:
    latent = torch.randn(64, 3, 2, 8, 8, generator=generator(0)) * torch.tensor([1.0, 5.0, 0.1]).view(3, 1, 1, 1) + 2.0
    moments = Moments(3, decay=0.9)
    moments.update(torch.full_like(latent, 1e3))  # long forgotten
    for part in latent.repeat(6, 1, 1, 1, 1).split(2):
        moments.update(part)
    mean, std = moments.over_ranks()
    torch.testing.assert_close(mean, torch.full((3,), 2.0), atol=0.4, rtol=0.05)
    torch.testing.assert_close(std, torch.tensor([1.0, 5.0, 0.1]), rtol=0.1, atol=0)
    with pytest.raises(ValueError, match="channels 0, 1, 2 are constant"):
        Moments(3).over_ranks()


def test_the_last_step_freezes_statistics_that_change_no_picture(runs_root) -> None:
    overrides = ["trainer.max_steps=4", "trainer.progress_bar=false", "trainer.val_every_steps=4"]
    experiment = load("regen_debug", overrides)
    folder = train(experiment, "regen_debug", overrides)
    from experiments.checkpoints import load_weights

    decoder = build(experiment)
    load_weights(decoder, folder / "weights-last.safetensors")
    assert (decoder.model.latent_mean != 0).all() and (decoder.model.latent_std != 1).all()
    batch = clip(2 * (K + 1))["video"]
    shown = decoder.decode(decoder.encode(batch), generator=generator(1))
    decoder.model.latent_mean.zero_()
    decoder.model.latent_std.fill_(1.0)
    torch.testing.assert_close(decoder.decode(decoder.encode(batch), generator=generator(1)), shown, atol=1e-4, rtol=0)


# --- validation ---------------------------------------------------------------------------------------------------------


def test_validation_scores_what_each_task_asks_for(runs_root) -> None:
    """Every second frame encoded: the others count. Frames ahead: those count. Two chunks: the seam is a group."""
    stream = "{{sources: [unseen], size: [32, 48], num_frames: {}, batch_size: 2}}"
    overrides = [
        "trainer.max_steps=2", "trainer.progress_bar=false", "trainer.val_every_steps=2", "validation.metrics=[psnr,jump]",
        "objective.tasks={between: interpolate, ahead: extrapolate}", "objective.ahead=3", "objective.compare_seeds=1",
        "objective.compare_extension=true", f"data.val.between={stream.format(9)}", f"data.val.ahead={stream.format(8)}",
    ]  # fmt: skip
    folder = train(load("regen_debug", overrides), "regen_debug", overrides)
    rows = list(csv.DictReader((folder / "evaluation" / "clips.csv").open()))
    frames = {row["stream"]: int(row["frames"]) for row in rows}
    assert frames == {"unseen": 10, "between": 4, "ahead": 3}
    methods = {name: {row["method"] for row in rows if row["stream"] == name} for name in frames}
    for name in frames:
        assert {"decoder", "2 steps", "other noise 1", "repeated frames", "mean colour of the clip"} <= methods[name]
    assert "average of the frames beside" in methods["between"] - methods["unseen"] - methods["ahead"]
    assert "2 steps, latent extension" in methods["unseen"] - methods["between"] - methods["ahead"]
    for control in ("motion of another clip", "content of another clip"):
        assert control in methods["unseen"] - methods["between"] - methods["ahead"]
    own = next(row for row in rows if row["stream"] == "unseen" and row["method"] == "decoder")
    assert float(own["jump_seam"]) > 0 and float(own["jump_inside"]) > 0
    result = json.loads((folder / "evaluation" / "result.json").read_text())
    assert {mean["stream"] for mean in result["means"]} == frames.keys()


def test_the_average_of_neighbours_is_right_on_a_line() -> None:
    """On a clip whose brightness grows evenly the mean of the frames beside is the frame."""
    from decoders.regen import controls

    video = torch.linspace(-1, 1, 9)[None, None, :, None, None].expand(1, 3, 9, 8, 8)
    scored = torch.tensor([[bool(i % 2) for i in range(9)]])
    torch.testing.assert_close(controls._averaged({"video": video, "supervised": scored, "key": ["a"]}), video)
    assert controls._averaged({"video": video, "key": ["a"]}) is None


def test_other_steps_and_batches_change_what_they_should(runs_root) -> None:
    decoder = made()
    with torch.no_grad():
        torch.nn.init.normal_(decoder.model.dit.final.weight, std=0.3, generator=generator(5))
    latent = decoder.encode(clip(K + 1)["video"])
    one, again, four = (decoder.decode(latent[:1], steps=n, generator=generator(3)) for n in (1, 1, 4))
    assert torch.equal(one, again) and not torch.equal(one, four)
    assert torch.equal(decoder.decode(latent[:1]), decoder.decode(latent[:1]))  # without a generator: the run's seed
    between = decoder.decode(latent, times=[0.5, 3.25])
    assert between.shape == (2, 3, 2, 32, 32)


# --- refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.train.video.num_frames=8", "interpolate with k = 4 takes 9 or more"),
        ("data.train.video.num_frames=3", "the nearest are 1 and 5"),
        ("data.val.unseen.num_frames=9", "the nearest are 5 and 10"),
        ("objective.tasks={unseen: guess}", "there are reconstruct, interpolate, extrapolate"),
        ("objective.controls=[shuffled]", "no 'shuffled'"),
        ("objective.steps=0", "must be 1 or more"),
        ("decoder.encoder=null", "needs decoder.encoder"),
        ("space.channels=6", "the space has 6, 4 and 8"),
        ("decoder.patch=4", "cells and patches are one to one"),
    ],
)
def test_what_cannot_work_is_told_before_any_step(override: str, message: str, runs_root) -> None:
    with pytest.raises((ConfigError, ValueError), match=message):
        train(load("regen_debug", [override, "trainer.progress_bar=false"]), "regen_debug", [override])


def test_a_frozen_space_takes_no_encoder_and_must_be_causal() -> None:
    experiment = load("regen_space_debug")
    with pytest.raises(ConfigError, match="set latent_space to decoders.latent_spaces.chunked.Chunked"):
        build(load("regen_space_debug", ["decoder.encoder={channels: 8}"]))
    space = DCT(DCTConfig(12, 4, 8))
    space.causal = False
    with pytest.raises(ValueError, match="not causal"):
        Regen(experiment.decoder, experiment.objective, space, TrainingConfig())


def test_latents_alone_teach_nothing() -> None:
    with pytest.raises(ValueError, match="learns pixels"):
        made().losses({"latent": torch.zeros(1, 4, 2, 4, 4), "key": ["a"]})
