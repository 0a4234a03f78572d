"""RefDecoder's objective: references, dropped latents, saved latents, rates, and what evaluation compares."""

import csv

import pytest
import torch

from datamodules.config import StreamConfig
from decoders.base import VideoDecoder
from decoders.latent_spaces.wan_mini import load_decoder
from decoders.refdecoder.local_start import begin_local
from decoders.refdecoder.module import RefDecoderObjective
from decoders.refdecoder.transformer import Block, normalise, rope_table, rotate
from experiments.compose import ConfigError
from experiments.config import load
from experiments.train import build, build_data, train

DEBUG = "refdecoder_debug"


def made(*overrides: str) -> VideoDecoder:
    experiment = load(DEBUG, overrides)
    torch.manual_seed(0)
    decoder = build(experiment)
    decoder.setup("fit")
    return decoder


def clip(decoder: VideoDecoder, clips: int = 2, frames: int = 9) -> dict:
    generator = torch.Generator().manual_seed(1)
    video = torch.rand(clips, 3, frames, 32, 48, generator=generator) * 2 - 1
    return {"video": video, "key": [f"film/{i}.mp4#0@32x48" for i in range(clips)]}


# ---- references


@pytest.mark.parametrize(
    ("choice", "number", "expected"),
    [("first", 1, {(0,)}), ("last", 1, {(8,)}), ("ends", 1, {(0, 8)}), ("random", 2, None)],
)
def test_training_references_are_frames_of_the_clip(choice, number, expected):
    decoder = made(f"objective.reference={choice}", f"objective.num_references={number}", "objective.no_reference=0")
    batch, found = clip(decoder), set()
    for seed in range(12):
        torch.manual_seed(seed)
        reference = decoder._training_reference(batch)
        same = [
            tuple(t for t in range(9) if torch.equal(batch["video"][i, :, t], reference[i, :, r]))
            for i in range(2) for r in range(reference.shape[2])
        ]  # fmt: skip
        assert all(len(frames) == 1 for frames in same)
        first, second = same[: len(same) // 2], same[len(same) // 2 :]
        assert first == second  # the same frames for all clips of a step
        found.add(tuple(frames[0] for frames in first))
    if expected is None:
        assert len(found) > 6 and all(len(frames) == 2 and frames[0] < frames[1] for frames in found)
    else:
        assert found == expected


def test_references_come_from_frames_with_a_target():
    decoder = made("objective.reference=random", "objective.no_reference=0")
    batch = clip(decoder)
    batch["supervised"] = torch.zeros(2, 9, dtype=torch.bool)
    batch["supervised"][:, 3] = True
    batch["mask"] = torch.ones(2, 1, 9, 32, 48)
    batch["mask"][..., :10] = 0
    batch["video"][..., :10] = float("nan")
    reference = decoder._training_reference(batch)
    assert reference.isfinite().all()
    assert torch.equal(reference[..., 10:], batch["video"][:, :, 3:4, :, 10:])


def test_a_share_of_steps_has_no_reference_and_given_ones_are_asked_for():
    decoder = made("objective.no_reference=0.25")
    batch, none = clip(decoder), 0
    for seed in range(400):
        torch.manual_seed(seed)
        none += decoder._training_reference(batch) is None
    assert 70 <= none <= 130
    decoder = made("objective.reference=given", "objective.no_reference=0")
    with pytest.raises(ValueError, match="brings no reference"):
        decoder._training_reference(batch)
    own = torch.zeros(2, 3, 1, 32, 48)
    assert decoder._training_reference({**batch, "reference": own}) is own


def test_validation_references_do_not_depend_on_the_batch():
    decoder = made("objective.evaluate=random", "objective.evaluate_references=2").eval()
    batch = clip(decoder)
    whole = decoder.with_latent(batch)["reference"]
    alone = [decoder.with_latent({"video": batch["video"][i : i + 1], "key": batch["key"][i : i + 1]}) for i in (0, 1)]
    assert torch.equal(whole, torch.cat([part["reference"] for part in alone]))
    groups = decoder.frame_groups(decoder.with_latent(batch))
    assert groups["reference"].sum(1).tolist() == [2, 2] and torch.equal(groups["others"], ~groups["reference"])
    for i in range(2):
        frames = batch["video"][i][:, groups["reference"][i]]
        assert torch.equal(frames, whole[i])
    given = {**batch, "reference": torch.zeros(2, 3, 1, 32, 48)}
    assert decoder.with_latent(given)["reference"] is given["reference"]
    assert not decoder.frame_groups(decoder.with_latent(given))  # whatever it shows, it is none of these frames
    with pytest.raises(ValueError, match="objective.evaluate=given"):
        made("objective.evaluate=given").eval().with_latent(batch)


def test_validation_references_have_a_target():
    decoder = made("objective.evaluate=first").eval()
    batch = clip(decoder)
    batch["supervised"] = torch.zeros(2, 9, dtype=torch.bool)
    batch["supervised"][:, 4:8] = True
    batch = decoder.with_latent(batch)
    assert torch.equal(batch["reference"], batch["video"][:, :, 4:5])
    assert decoder.frame_groups(batch)["reference"][:, 4].all()


# ---- dropped latents


@pytest.mark.parametrize("kind", ["shared", "independent"])
def test_share_of_dropped_latents(kind):
    decoder = made("objective.dropout=0.7", f"objective.dropout_mask={kind}").train()
    latent, shares = torch.zeros(1, 12, 3, 40, 60), []
    for seed in range(60):
        torch.manual_seed(seed)
        keep = decoder._keep(latent)
        assert keep.shape == (1, 1, 1 if kind == "shared" else 3, 40, 60) and set(keep.unique().tolist()) <= {0.0, 1.0}
        shares.append(1 - keep.mean().item())
        if kind == "independent":
            assert not torch.equal(keep[:, :, 0], keep[:, :, 1])
    assert min(shares) < 0.1 and 0.6 < max(shares) < 0.75 and abs(sum(shares) / 60 - 0.35) < 0.07  # p ~ U(0, 0.7)
    assert decoder.eval()._keep(latent) is None
    assert made("objective.dropout=0").train()._keep(latent) is None


# ---- saved latents


@pytest.mark.parametrize(("reverse", "shown"), [(0.0, 0), (1.0, -1)])
def test_only_the_frame_that_the_reference_shows_counts_for_saved_latents(reverse, shown):
    decoder = made(f"objective.reverse={reverse}", "objective.dropout=0", "objective.no_reference=0").train()
    batch = decoder.with_latent(clip(decoder))
    latent, reference = batch["latent"], batch["video"][:, :, :1]
    found = decoder.losses({"latent": latent, "reference": reference, "key": batch["key"]})
    expected = decoder.encode(decoder.latent_space.decode(latent).flip(2)) if reverse else latent
    video = decoder.model(expected, reference).clamp(-1, 1)[:, :, shown]
    torch.testing.assert_close(found["l1"], (video - reference[:, :, 0]).abs().mean())
    with pytest.raises(ValueError, match="reference image"):
        decoder.losses({"latent": latent, "key": batch["key"]})


def test_latents_of_another_space_are_refused():
    decoder = made()
    decoder._check_latents({"data.sources.i2v": {"": 3, "dct": 2, decoder.latent_space.fingerprint: 1}})
    with pytest.raises(ValueError, match="data.sources.i2v: 7 of its latents are of the space wan21"):
        decoder._check_latents({"data.sources.i2v": {"wan21": 7}})


# ---- groups and rates


def test_rates_at_the_first_step_after_warm_up_and_at_the_end():
    optim = load("refdecoder_wan21_clip5").optim
    for step, new, pretrained in ((0, 2e-6, 2e-7), (1000, 2e-4, 2e-5), (100_000, 2e-6, 2e-6)):
        assert optim.lr * optim.lr_factor(step, 100_000, "attention") == pytest.approx(new)
        assert optim.groups["decoder"].lr * optim.lr_factor(step, 100_000, "decoder") == pytest.approx(pretrained)
    assert optim.lr * optim.lr_factor(500, 100_000, "attention") == pytest.approx(2e-4 * 0.505)
    assert 2e-6 < optim.lr * optim.lr_factor(90_000, 100_000, "attention") < 2e-5


def test_groups_hold_what_is_new_and_what_is_pretrained():
    decoder = made()
    groups = {group["name"]: group["params"] for group in decoder.param_groups()}
    assert set(groups) == {"attention", "decoder"}
    assert all(name.startswith("model.backbone.") for name in groups["decoder"])
    frozen = {f"model.backbone.stages.conv_in.layers.0.{kind}" for kind in ("weight", "bias")}
    assert frozen <= decoder.inference_buffers().keys()  # and yet they are stored: decoding needs them
    optimizer = decoder.configure_optimizers()["optimizer"]
    rates = {group["name"]: group["initial_lr"] for group in optimizer.param_groups}
    assert rates == {"attention": 2e-3, "decoder": 1e-3}
    plain = made("decoder.inject=none").eval()
    batch = plain.with_latent(clip(plain))
    assert "reference" not in batch and plain.frame_groups(batch)
    image = batch["video"][:, :, :1]
    assert torch.equal(plain.decode(batch["latent"], reference=image), plain.decode(batch["latent"]))
    assert plain.train().losses({"latent": batch["latent"], "reference": image, "key": batch["key"]})["l1"].isfinite()
    assert [group["name"] for group in plain.param_groups()] == ["decoder"] and not plain.own_references()


# ---- decoding


def test_begins_as_wan_mini_bit_for_bit():
    experiment = load("refdecoder_demo", ["objective.dropout=0", "loss_weights.lpips=0", "space.dtype=float32"])
    decoder = build(experiment)
    decoder.setup("fit")
    decoder.eval()
    video = clip(decoder, 1)["video"][..., :32, :32]
    latent = decoder.encode(video)
    plain, loaded = decoder.model.backbone(latent), load_decoder()
    assert torch.equal(plain, loaded(latent))
    for reference in (None, video[:, :, :1], video[:, :, [0, 8]]):
        assert torch.equal(decoder.model(latent, reference), plain)
        decoded = decoder.decode(latent, reference=reference, size=(9, 32, 32))
        torch.testing.assert_close(decoded, loaded.decode(latent), atol=1e-5, rtol=0)


def test_long_clips_are_reconstructed_in_chunks_that_share_the_reference():
    decoder = made().eval()
    video = torch.rand(1, 3, 12, 32, 48, generator=torch.Generator().manual_seed(2)) * 2 - 1
    reference = video[:, :, :1]
    whole = decoder.reconstruct(video, reference, chunk=9)
    assert whole.shape == video.shape
    first = decoder.decode(decoder.encode(video[:, :, :9]), reference=reference)
    torch.testing.assert_close(whole[:, :, :9], first)
    filled = torch.cat([video[:, :, 9:], video[:, :, -1:].expand(-1, -1, 6, -1, -1)], 2)
    rest = decoder.decode(decoder.encode(filled), reference=reference)
    torch.testing.assert_close(whole[:, :, 9:], rest[:, :, :3])
    with pytest.raises(ValueError, match="nearest is 5 or 9"):
        decoder.reconstruct(video, reference, chunk=8)


def test_controls_differ_from_one_another():
    decoder = made().eval()
    data = build_data(load(DEBUG), None)
    data.setup("validate")
    batch = decoder.with_latent(next(iter(data.val_dataloader()[0])))
    strangers = torch.cat([data.another_clip(key)[None, :, :1] for key in batch["key"]])
    assert not any(torch.equal(mine, theirs) for mine, theirs in zip(batch["reference"], strangers, strict=True))
    size = tuple(batch["video"].shape[2:])
    outputs = [
        decoder.decode(batch["latent"], size=size, reference=batch["reference"]),
        decoder.decode(batch["latent"], size=size, reference=strangers),
        decoder.decode(batch["latent"], size=size),
        decoder.decode(batch["latent"], size=size, skip=True),
    ]
    assert not any(torch.equal(a, b) for i, a in enumerate(outputs) for b in outputs[:i])


@pytest.mark.parametrize(("head_dim", "split"), [(32, (12, 10, 10)), (128, (44, 42, 42))])
def test_local_start_looks_at_the_same_place(head_dim, split):
    torch.manual_seed(0)
    block = Block(2, head_dim, 64)
    begin_local(block, split)
    tokens = normalise(torch.randn(1, 3 * 12 * 12, 2 * head_dim))
    table = rope_table((0, 1, 2), 12, 12, split, torch.device("cpu"))
    q = rotate(block._heads(block.q_norm(block.q(tokens))), table)
    k = rotate(block.keys_values(tokens)[0], table)
    scores = torch.einsum("bqhd,bkhd->hqk", q, k) / head_dim**0.5
    seen = scores.softmax(-1).unflatten(-1, (3, 12, 12)).unflatten(1, (3, 12, 12))
    middle = seen[:, 1, 6, 5]  # what a token of the second frame sees: "H t y x"
    same_place = middle[:, :, 6, 5]
    assert (same_place.sum(1) > 0.25).all() and (same_place.min(1).values > 0.03).all()  # in all three frames
    assert (middle[:, :, 5:8, 4:7].sum(dim=(1, 2, 3)) > 0.75).all()


@pytest.mark.parametrize(
    "wrong",
    [
        {"dropout": 1.5},
        {"controls": ["nothing"]},
        {"num_references": 0},
        {"crop": 8},
        {"evaluate_references": 2},
        {"num_references": 2, "reference": "first"},
    ],
)
def test_objectives_that_cannot_work_are_refused(wrong):
    with pytest.raises(ValueError, match=f"objective.{next(iter(wrong))}"):
        RefDecoderObjective(**wrong)


def test_two_sources_of_weights_are_refused():
    with pytest.raises(ConfigError, match="objective.start"):
        load(DEBUG, ["init_from=refdecoder_debug"])
    load(DEBUG, ["init_from=refdecoder_debug", "objective.start=null"])
    with pytest.raises(ConfigError, match="objective.transformer"):
        load(DEBUG, ["init_from=refdecoder_debug", "objective.start=null", "objective.transformer=t2v"])


def test_every_experiment_of_the_curriculum_has_its_stages():
    for name in ("wan21", "wan22", "wan21_dropout0", "wan21_windowed"):
        second = load(f"refdecoder_{name}_clip17")
        assert second.init_from == f"refdecoder_{name}_clip5" and second.objective.start is None
        stream: StreamConfig = second.data.train["video"]
        assert (stream.num_frames, tuple(stream.size), stream.fps) == (17, (480, 832), 15.0)
        first = load(second.init_from)
        assert first.objective.start and vars(first.decoder) == vars(second.decoder)
        assert vars(first.objective) | {"start": None} == vars(second.objective)


def test_a_missing_stranger_is_told_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setenv("RUNS_ROOT", str(tmp_path))
    one = ["data.sources.unseen.num_videos=1", "trainer.max_steps=1"]
    with pytest.raises(ValueError, match="objective.controls=\\[without reference, plain\\]"):
        train(load(DEBUG, one), DEBUG, one)
    fewer = [*one, "objective.controls=[without reference, plain]"]
    train(load(DEBUG, fewer), DEBUG, fewer)
    found = next(path for path in tmp_path.glob("*/evaluation/frames.csv"))
    with open(found, newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["method"] == "decoder"]
    assert [row["in_reference"] for row in rows[:9]] == ["1", *["0"] * 8]  # the first of nine frames
    assert all(float(row["psnr"]) > 0 for row in rows)
