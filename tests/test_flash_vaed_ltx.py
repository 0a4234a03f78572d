"""Flash-VAED's student of LTX-Video: shares of channels, a start computed from the teacher, the family's phases."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from decoders.backbones.ltx import LTXConfig, LTXDecoder
from decoders.backbones.ltx_layers import EdgeConv3d
from decoders.flash_vaed.calibrate_ltx import (
    PruneConfig,
    causal,
    choose,
    gather,
    initialise,
    pruning_report,
    window_moments,
)
from decoders.flash_vaed.ltx_student import RELEASED_OPERATORS, LTXStudent
from decoders.flash_vaed.model import FlashVaedConfig, build_student
from decoders.flash_vaed.prune import Selection
from decoders.flash_vaed.teacher import load_teacher
from experiments.config import build_decoder, build_space, load
from experiments.train import train

SMALL = LTXConfig(channels=4, widths=(32, 32, 32, 16, 8), blocks=(2, 1, 1, 2, 1))
RESIDUAL = replace(SMALL, widths=(16, 16, 16, 32, 16), residual=(False, False, True, True))
LATER = LTXConfig(
    channels=4,
    widths=(32, 16, 8, 4),
    blocks=(1, 2, 1, 2),
    upsample=(True,) * 3,
    factors=(2,) * 3,
    residual=(True, True, False),
    noise=(True, False, True, True),
    modulated=True,
)
LAYOUTS = {"first": SMALL, "residual": RESIDUAL, "causal": replace(SMALL, causal=True), "later": LATER}
HALF = {"up2": 0.5, "up3": 0.5}


def teacher_of(layout: LTXConfig) -> LTXDecoder:
    """Random, and with no weight at its initial value: zero scales, the shortcuts' norms and the statistics too."""
    torch.manual_seed(0)
    spread = [0.5 + number / layout.channels for number in range(layout.channels)]
    teacher = LTXDecoder(replace(layout, mean=[1 - s for s in spread], std=spread)).requires_grad_(False).eval()
    for name, parameter in teacher.named_parameters():
        parameter.add_(0.3 * torch.randn(parameter.shape)) if parameter.ndim < 5 else parameter.mul_(1.5)
        if "skip_norm.weight" in name:
            parameter.uniform_(0.5, 1.5)
    return teacher


def clips(num: int = 1) -> Tensor:
    """Latents that move little from frame to frame."""
    generator = torch.Generator().manual_seed(num)
    first, last = torch.randn(2, num, 4, 1, 3, 3, generator=generator)
    return torch.cat([first + step * (last - first) for step in (0.0, 0.3, 0.6)], 2)


def started(teacher: LTXDecoder, operators: dict, keep: dict, **options) -> LTXStudent:
    config = PruneConfig(positions=None, **options)
    student = LTXStudent(replace(teacher.config, mean=None, std=None), operators, keep)
    statistics = gather(teacher, [clips(2)], config.positions)
    initialise(student, teacher, statistics, choose(student, teacher, statistics, config), config.refit)
    return student.requires_grad_(False).eval()


def difference(student: nn.Module, teacher: nn.Module) -> float:
    """Mean squared error on another clip, as a share of the teacher's variance."""
    with torch.no_grad():
        expected = teacher(clips(1))
        return float((student(clips(1)) - expected).square().mean() / expected.var())


# --- structure --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", [1, 2, 3])
def test_the_experiments_have_the_released_size(phase, monkeypatch):
    monkeypatch.delenv("WEIGHTS_ROOT", raising=False)
    experiment = load(f"flash_vaed_ltx_phase{phase}")
    with torch.device("meta"):
        decoder = build_decoder(experiment, build_space(experiment))
    student = decoder.model
    assert round(sum(p.numel() for p in decoder.parameters()) / 1e6, 2) == 66.96
    assert student.operators == {**RELEASED_OPERATORS, "up2": "dense"}
    assert student.config.widths == (512, 512, 512, 64, 32)
    assert {name for name, _ in student.named_buffers()} == {
        "latent_mean", "latent_std", "kept_up2", "recon_up2", "kept_up3", "recon_up3",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"keep": {"up9": 0.5}}, "no such stage; there are mid, up0"),
        ({"keep": {"up2": 0.0}}, "must lie above 0"),
        ({"keep": {"up1": 0.5}}, r"can be pruned \(up2, up3\)"),
        ({"operators": {"up2": "sparse"}}, "none of dense, depthwise, frame"),
        ({"operators": {"up1.entry": "frame"}}, "no such stage"),
    ],
)
def test_impossible_plans_are_refused(config, said):
    with pytest.raises(ValueError, match=said):
        FlashVaedConfig(layout="ltx", **config)


def test_plans_that_a_layout_refuses():
    with pytest.raises(ValueError, match="up2 takes its channels as they are"):
        LTXStudent(replace(SMALL, widths=(32, 32, 16, 16, 8)), {}, {"up1": 0.5})
    with pytest.raises(ValueError, match=r"leaves no channel of 8"):
        LTXStudent(SMALL, {}, {"up3": 0.1})
    # Pruned to the width of the next stage, which keeps its first block.
    student = LTXStudent(SMALL, {}, {"up2": 0.5})
    assert [len(student.stages[name].layers) for name in ("up2", "up3")] == [4, 3]


def test_a_smaller_teacher_by_its_width():
    config = FlashVaedConfig(layout="ltx", dim=8, keep=HALF)
    student = build_student(config, channels=6, stride_t=8, stride_hw=32)
    assert student.layout.widths == (32, 32, 32, 16, 8) and student.config.widths == (32, 32, 32, 8, 4)
    assert isinstance(load_teacher("random", student.layout), LTXDecoder)
    with pytest.raises(ValueError, match="wan_mini is no LTX-Video decoder"):
        load_teacher("wan_mini", student.layout)
    with pytest.raises(ValueError, match="decodes 8x32x32"):
        build_student(config, channels=6, stride_t=4, stride_hw=8)


def test_a_folder_with_another_layout_is_refused(monkeypatch):
    monkeypatch.setattr(LTXDecoder, "from_folder", lambda path: teacher_of(SMALL))
    assert load_teacher("folder", SMALL).config.mean is not None  # statistics come with the weights
    with pytest.raises(ValueError, match=r"differs from decoder.layout in widths: widths \(32, 32, 32, 16, 8\)"):
        load_teacher("folder", replace(SMALL, widths=(32, 32, 32, 16, 4)))


# --- the start --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LAYOUTS)
def test_nothing_changed_is_the_teacher_to_the_bit(kind):
    teacher = teacher_of(LAYOUTS[kind])
    student = started(teacher, {}, {})
    videos = []
    for decoder in (student, teacher):
        torch.manual_seed(1)  # the later release's decoder draws noise
        videos.append(decoder(clips(1)))
    assert torch.equal(*videos)
    assert pruning_report(student, teacher, {}) == "all channels are kept"


@pytest.mark.parametrize("kind", ["first", "residual", "causal"])
@pytest.mark.parametrize("operators", [{}, {**RELEASED_OPERATORS, "up3.entry": "frame"}])
def test_a_start_is_closer_than_random_weights(kind, operators):
    teacher = teacher_of(LAYOUTS[kind])
    torch.manual_seed(1)
    chance = difference(LTXStudent(teacher.config, operators, HALF).eval(), teacher)
    student = started(teacher, operators, HALF)
    sliced = started(teacher, operators, HALF, refit=False)
    print(f"{kind} {sorted(set(operators.values()))}: refit {difference(student, teacher):.3f}, sliced "
          f"{difference(sliced, teacher):.3f}, random {chance:.3f}")  # fmt: skip
    assert difference(student, teacher) < 0.5 * chance
    assert student(clips(1)).shape == (1, 3, 17, 96, 96)


def low_rank(weight: Tensor, bias: Tensor, group: int, signs: Tensor) -> None:
    """Rows that are copies of the first quarter's, with signs that sum to zero in it."""
    rows, base = weight.unflatten(0, (-1, group)), bias.unflatten(0, (-1, group))
    quarter = torch.arange(len(signs)) % (len(signs) // 4) // 2 * 2
    rows.copy_(torch.einsum("c,cg...->cg...", signs, rows[quarter].clone()))
    base.copy_(signs[:, None] * base[quarter].clone())


def test_features_of_low_rank_are_recovered():
    """Every channel of the last stage is one of a quarter of them, whose sum is zero, and its inner blocks add nothing:
    pruned to that quarter, with norms, folds and normalised shortcuts, the student is the teacher."""
    teacher = teacher_of(replace(SMALL, widths=(8, 8, 8, 8, 16), blocks=(1, 1, 1, 1, 2)))
    layers = teacher.stages["up3"].layers
    signs = torch.tensor([1.0, -1.0] * 8)
    entry, up, *blocks = layers
    for conv, group in ((entry.conv1, 1), (entry.conv2, 1), (entry.skip, 1), (up.conv, 8)):
        low_rank(conv.weight, conv.bias, group, signs)
    up.conv.weight.mul_(100)  # the norms' eps, which the teacher's last one meets at other sizes, is nothing
    up.conv.bias.mul_(100)
    for block in blocks:
        nn.init.zeros_(block.conv2.weight)
        nn.init.zeros_(block.conv2.bias)
    student = LTXStudent(teacher.config, {}, {"up3": 0.25})
    statistics = gather(teacher, [clips(2)])
    names = [f"up3.{i}.{what}" for i in range(4) for what in ("hidden", "out") if (i, what) != (1, "hidden")]
    first = Selection(torch.arange(4), 16, "by hand", 1.0, [0, 1, 2, 3], [1.0] * 4)
    initialise(student, teacher, statistics, dict.fromkeys(names, first))
    expected, features = teacher(clips(1), taps=["up3"])
    assert expected.std() > 0.05
    assert (student(clips(1)) - expected).abs().max() < 1e-4
    features = features["up3"]
    again = torch.einsum("bkthw,kc->bcthw", features[:, student.kept_up3], student.recon_up3)
    assert torch.allclose(again, features, rtol=1e-4, atol=1e-3)


def test_a_frame_ahead_is_predicted_from_those_behind():
    """Of features that decay over time: better than taking the last frame again, which is exact where nothing moves."""
    torch.manual_seed(0)
    dense = EdgeConv3d(4, 3).requires_grad_(False)
    frames = [torch.randn(2, 4, 1, 12, 12)]
    for _ in range(15):
        frames.append(0.5 * frames[-1] + 0.8 * torch.randn(2, 4, 1, 12, 12))
    features = torch.cat(frames, 2) + 2
    mean = features.mean((0, 2, 3, 4))
    expected, errors = dense(features)[0], []
    for moments, about in ((None, None), (window_moments(features, mean), mean)):
        seen = EdgeConv3d(4, 3, causal=True).requires_grad_(False)
        found = causal(dense, moments, about)
        seen.weight.copy_(found.weight)
        seen.bias.copy_(found.bias)
        errors.append(float((seen(features)[0] - expected)[..., 1:-1, 1:-1].square().mean()))  # away from padding
        if moments is None:
            still = features[:, :, :1].expand(-1, -1, 4, -1, -1)
            assert torch.allclose(seen(still)[0], dense(still)[0], atol=1e-5)
    assert errors[1] < 0.8 * errors[0]


def test_a_start_without_motion_or_for_another_teacher():
    teacher = teacher_of(SMALL)
    statistics = gather(teacher, [clips(1)[:, :, :1]])
    assert "mid.0.act1" not in statistics.taps and "up3.0.unit" in statistics
    student = LTXStudent(teacher.config, RELEASED_OPERATORS, {})
    initialise(student, teacher, statistics, {})
    assert torch.isfinite(student(clips(1))).all()
    with pytest.raises(ValueError, match="layout"):
        initialise(LTXStudent(RESIDUAL, {}, {}), teacher, statistics, {})
    with pytest.raises(ValueError, match="no calibration clip"):
        gather(teacher, [])
    with pytest.raises(ValueError, match="too few for the rank"):
        few = gather(teacher, [clips(1)[:, :, :1]], positions=1)
        choose(LTXStudent(teacher.config, {}, HALF), teacher, few, PruneConfig())


def test_the_report_names_what_was_pruned():
    teacher = teacher_of(SMALL)
    student = LTXStudent(teacher.config, RELEASED_OPERATORS, HALF)
    selections = choose(student, teacher, gather(teacher, [clips(2)]), PruneConfig())
    assert list(selections)[:4] == ["up2.0.hidden", "up2.0.out", "up2.1.out", "up2.2.hidden"]
    lines = pruning_report(student, teacher, selections).splitlines()
    assert len(lines) == 1 + len(selections) + 2
    assert "8/16" in lines[1] and "predicted speed-up" in lines[-1]


# --- phases -----------------------------------------------------------------------------------------------------------

QUICK = ("trainer.progress_bar=false", "validation.num_shown=0", "trainer.max_steps=1", "trainer.val_every_steps=1")
TINY = (
    "decoder.layout=ltx", "decoder.dim=8", "decoder.operators.up2=dense", "space.stride_t=8", "space.stride_hw=32",
    "data.train.video.size=[32,64]", "data.val.unseen.size=[32,64]",
)  # fmt: skip


def test_phases_hand_over(runs_root: Path):
    """Phase 1 prunes, starts and follows the teacher; phase 2 starts from its weights, kept channels included."""
    options = (
        *TINY,
        *QUICK,
        "objective.feed=teacher",
        "objective.match=reconstructed",
        "objective.start.num_clips=8",
    )
    first = train(load("flash_vaed_debug", options), "flash_vaed_debug", options)
    assert "student against teacher before any training" in (first / "pruning.txt").read_text()
    kept = torch.load(first / "pruning.pt", weights_only=True)["up3.5.out"]["kept"]
    options = (*TINY, *QUICK, f"init_from={first.name}", "objective.start=null", "seed=1")
    second = train(load("flash_vaed_debug", options), "flash_vaed_debug", options)
    state = torch.load(second / "last.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(state["model.kept_up3"], kept)
