"""REGEN's objective: what is cut from a clip, tasks that move, statistics, and what validation measures."""

import re
from itertools import islice

import pytest
import torch
from lightning import Callback
from regen_small import clip, generator, made

from datamodules.batch import VideoBatch
from decoders.ema import Ema
from decoders.latent_spaces.dct import DCT, DCTConfig
from decoders.regen.module import MEASURED_STEPS, Regen, RegenObjective
from decoders.regen.moments import Moments
from decoders.regen.targets import draw_task, draw_wanted, needed_frames
from decoders.training import EmaConfig, TrainingConfig
from experiments.checkpoints import load_weights
from experiments.compose import ConfigError
from experiments.config import load
from experiments.train import build, build_data, train

TASKS = ("reconstruct", "interpolate", "extrapolate")
K = 4


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
    between = {"end": 0.0, "from_step": 500, "to_step": 900}, {"end": 0.9, "to_step": 100}
    for wrong in (
        {"interpolation": 0.7, "extrapolation": 0.6},
        {
            "interpolation": {"start": 0.9} | between[0],
            "extrapolation": {"start": 0.0} | between[1],
        },  # 1.8 at 100 to 500
        {"interpolation": -0.1},
        {"at_one": 2.0},
    ):
        with pytest.raises(ValueError, match="must lie in|more than 1 together"):
            RegenObjective(**wrong)
    for wrong in ("half", {"start": 0.0, "end": 0.5}):
        with pytest.raises(ValueError, match="numbers or schedules"):
            RegenObjective(interpolation=wrong)


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
    torch.nn.init.xavier_uniform_(decoder.model.dit.final.weight)
    decoder.losses(clip(1))["diffusion"].backward()
    for part in (decoder.encoder, decoder.model.condition):
        silent = [name for name, p in part.named_parameters() if p.grad is None or not p.grad.any()]
        assert silent == (["siren.sines.0.weight"] if part is decoder.model.condition else [])  # times time 0
    batch = clip(2 * K + 1)
    image = decoder.encoder(batch["video"][:, :, :1])[0]
    video = decoder.encoder(batch["video"][:, :, : K + 1])[0]
    assert torch.equal(image[:, :, 0], video[:, :, 0])


@pytest.mark.parametrize("name", ["regen_debug", "regen_space_debug"])
def test_frames_without_a_target_may_hold_anything(name: str) -> None:
    decoder = made("objective.interpolation=0.0", "objective.extrapolation=0.0", name=name)
    torch.nn.init.xavier_uniform_(decoder.model.dit.final.weight)
    whole, counted, found = clip(K + 1), torch.arange(K + 1) < 3, []
    for anything in (0.5, float("nan")):
        video = torch.where(counted[:, None, None], whole["video"], anything)
        torch.manual_seed(1)
        batch = {"video": video, "source": whole["video"], "supervised": counted.expand(2, -1), "key": whole["key"]}
        found.append(decoder.losses(batch)["diffusion"])
    assert found[0].isfinite() and torch.equal(*found)
    found[1].backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in decoder.parameters())


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


def test_latents_keep_their_digits_under_autocast() -> None:
    decoder, video = made(), clip(K + 1)["video"]
    with torch.autocast("cpu", torch.bfloat16):
        latent = decoder.encode(video)
    assert torch.equal(latent, decoder.encode(video))


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


def test_moments_are_of_all_ranks_and_survive_a_resume(monkeypatch) -> None:
    decoder, other = made(), Moments(4)
    decoder.moments.update(torch.randn(2, 4, 2, 8, 8, generator=generator(1)))
    other.update(torch.randn(2, 4, 2, 8, 8, generator=generator(2)) + 3)
    assert not any(
        "moments" in name for name, _ in decoder.named_buffers()
    )  # DDP sends rank 0's to all before each pass
    checkpoint = {}
    decoder.on_save_checkpoint(checkpoint)
    resumed = made()
    resumed.on_load_checkpoint(checkpoint)
    assert torch.equal(resumed.moments.sums, decoder.moments.sums) and decoder.moments.sums.any()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda sums: sums.add_(other.sums))
    mean, std = resumed.moments.over_ranks()
    assert mean.tolist() == pytest.approx([1.5] * 4, abs=0.3)
    assert std.tolist() == pytest.approx([(1 + 1.5**2) ** 0.5] * 4, abs=0.3)
    assert torch.equal(resumed.moments.sums, decoder.moments.sums)  # not changed by asking


def test_the_last_step_freezes_statistics_that_change_no_picture(runs_root) -> None:
    overrides = ["trainer.max_steps=4", "trainer.progress_bar=false", "trainer.val_every_steps=4"]
    experiment = load("regen_debug", overrides)
    folder = train(experiment, "regen_debug", overrides)
    decoder = build(experiment)
    load_weights(decoder, folder / "weights-last.safetensors")
    assert (decoder.model.latent_mean != 0).all() and (decoder.model.latent_std != 1).all()
    batch = clip(2 * (K + 1))["video"]
    shown = decoder.decode(decoder.encode(batch), generator=generator(1))
    decoder.model.latent_mean.zero_()
    decoder.model.latent_std.fill_(1.0)
    torch.testing.assert_close(decoder.decode(decoder.encode(batch), generator=generator(1)), shown, atol=1e-4, rtol=0)


def averaged_elsewhere(*overrides: str) -> Regen:
    """A decoder whose averaged encoder gives latents that lie 5 above its own."""
    decoder = made(*overrides)
    decoder.ema = Ema(decoder.inference_parameters(), EmaConfig(decay=0.99, warmup_steps=0))
    last = [name for name in decoder.ema.average if name.startswith("encoder.") and name.endswith("bias")][-1]
    decoder.ema.average[last][:4] += 5.0  # the means, where there are log-variances too
    return decoder


@pytest.mark.parametrize("variational", [False, True])
def test_statistics_are_of_the_averaged_encoder_where_there_is_one(variational: bool) -> None:
    more = ["objective.variational=true", "loss_weights.kl=1e-6"] if variational else []
    still = ["objective.interpolation=0.0", "objective.extrapolation=0.0"]
    decoder = averaged_elsewhere(*still, *more)
    batch = clip(K + 1)
    decoder.losses(batch)
    mean, _ = decoder.moments.over_ranks()
    own = decoder.encode(batch["video"]).transpose(0, 1).flatten(1).mean(1)
    with decoder.ema_weights():
        averaged = decoder.encode(batch["video"]).transpose(0, 1).flatten(1).mean(1)
    torch.testing.assert_close(averaged - own, torch.full((4,), 5.0), atol=1e-3, rtol=0)
    torch.testing.assert_close(mean, averaged, atol=0.3 if variational else 1e-4, rtol=0)


def test_the_average_is_measured_only_towards_the_end_and_without_gradients(monkeypatch) -> None:
    decoder, calls = averaged_elsewhere(), []
    forward = decoder.encoder.forward
    monkeypatch.setattr(
        decoder.encoder, "forward", lambda video: calls.append(torch.is_grad_enabled()) or forward(video)
    )
    for steps, used, measured in (
        (MEASURED_STEPS, None, True),
        (MEASURED_STEPS + 1, None, False),
        (10**6, 0.79, False),
        (10**6, 0.81, True),
    ):
        decoder.training_config.max_steps = steps
        decoder.progress = None if used is None else lambda used=used: used
        decoder._used = None  # no step before this one
        calls.clear()
        decoder.losses(clip(2 * K + 1))["diffusion"].backward()
        assert calls == [True, False] if measured else calls == [True]
    for used, measured in ((0.3, False), (0.6, True)):  # a step as long as the last one is the last that time leaves
        decoder.progress = lambda used=used: used
        decoder._used = decoder._used if measured else None
        calls.clear()
        decoder.losses(clip(2 * K + 1))
        assert calls == [True, False] if measured else calls == [True]
    decoder.objective.freeze_statistics = False
    calls.clear()
    decoder.losses(clip(2 * K + 1))
    assert calls == [True]


class Clock(Callback):
    """A time that is used up after 24 steps, whatever the machine."""

    def setup(self, trainer, pl_module, stage) -> None:
        pl_module.progress = lambda: trainer.global_step / 24

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        trainer.should_stop = trainer.global_step >= 24


@pytest.mark.parametrize("ended_by", ["steps", "time"])
def test_exported_latents_are_normalised_by_what_the_averaged_weights_give(ended_by: str, runs_root) -> None:
    """With an average that stays where training began: its latents have mean 0 and std 1, those of the last weights not."""
    overrides = [
        "trainer.max_steps=24",
        "trainer.progress_bar=false",
        "trainer.val_every_steps=100000",
        "optim.lr=3e-2",
    ]
    overrides += ["validation.references=false", "validation.num_shown=0", "ema={decay: 0.999999, warmup_steps: 0}"]
    overrides += ["trainer.max_steps=100000"] if ended_by == "time" else []
    experiment = load("regen_debug", overrides)
    folder = train(experiment, "regen_debug", overrides, [Clock()] if ended_by == "time" else [])
    decoder, data = build(experiment), build_data(experiment, None)
    data.prepare_data()
    data.setup("fit")
    videos = [batch["video"][:, :, : K + 1] for batch in islice(data.train_dataloader(), 24)]
    off = {}
    for kind in ("ema", "last"):
        load_weights(decoder, folder / f"weights-{kind}.safetensors")
        latent = torch.cat([decoder.encode(video).transpose(0, 1).flatten(1) for video in videos], 1)
        off[kind] = (latent.mean(1).square() + (latent.std(1) - 1).square()).mean().sqrt().item()
    assert off["ema"] < 0.3 < 0.6 < off["last"], off


# --- refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.train.video.num_frames=8", "interpolate with k = 4 takes 9 or more"),
        ("data.train.video.num_frames=3", "the nearest are 1 and 5"),
        ("data.val.unseen.num_frames=9", "the nearest are 5 and 10"),
        ("objective.tasks={unseen: interpolate}", "10 frames: to interpolate takes an odd number"),
        ("objective.tasks={unsen: interpolate}", "objective.tasks.unsen: no such stream in data.val; there are unseen"),
        ("objective.ahead=10 objective.tasks={unseen: extrapolate}", "none is left to encode"),
        ("pad=replicate data.train.video.size=[30,32]", "30x32: what is trained on is never padded"),
        ("data.train.video.num_frames=8 data.train.video.extend=[1,1]", "leave extend out"),
        ("pad=replicate objective.ahead=3 objective.tasks={unseen: extrapolate}", "7 frames: .* whole chunks"),
        ("objective.tasks={unseen: guess}", "there are reconstruct, interpolate, extrapolate"),
        ("objective.controls=[shuffled]", "no 'shuffled'"),
        ("objective.steps=0", "must be 1 or more"),
        ("decoder.encoder=null", "needs decoder.encoder"),
        ("space.channels=6", "the space has 6, 4 and 8"),
        ("decoder.patch=4", "cells and patches are one to one"),
    ],
)
def test_what_cannot_work_is_told_before_any_step(override: str, message: str, runs_root) -> None:
    overrides = re.split(r" (?=objective|data)", override)
    with pytest.raises((ConfigError, ValueError), match=message):
        train(load("regen_debug", [*overrides, "trainer.progress_bar=false"]), "regen_debug", overrides)


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
