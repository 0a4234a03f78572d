"""Flash-VAED: students of the released structure, starts computed from a teacher, guidance, and the hand-over of phases."""

from pathlib import Path

import pytest
import torch
from torch import nn

from datamodules.clips import ClipData
from datamodules.reader import ClipReader
from datamodules.samples import sample_config
from decoders.backbones.wan import WAN21, WAN22, WanConfig, WanDecoder
from decoders.flash_vaed import released
from decoders.flash_vaed.cache import TeacherCache
from decoders.flash_vaed.calibrate import PruneConfig, Statistics, choose, gather, initialise, pruning_report
from decoders.flash_vaed.model import FlashVaedConfig, build_student
from decoders.flash_vaed.prune import kept_count, select
from decoders.flash_vaed.teacher import load_teacher
from decoders.flash_vaed.wan_student import WanStudent
from decoders.latent_spaces.wan_mini import WanMini, load_decoder
from experiments.compose import ConfigError
from experiments.config import build_decoder, build_space, load
from experiments.runs import run_dir
from experiments.train import train
from losses.distillation import feature_mse

OPERATORS = {"mid": "depthwise", "up0": "depthwise", "up1": "depthwise", "up2": "frame", "up3": "frame"}
LAYOUTS = {
    "wan21": WanConfig(dim=8, channels=4),
    "wan22": WanConfig(dim=8, channels=4, residual=True, patch=2),
}
PLANS = [{"up2": 0.5, "up3": 0.5}, {"up3": 0.25}, {"up1": 0.5, "up2": 0.25}]


@pytest.fixture(params=list(LAYOUTS))
def teacher(request) -> WanDecoder:
    """A small teacher, its norms' gains away from 1."""
    torch.manual_seed(0)
    decoder = WanDecoder(LAYOUTS[request.param]).requires_grad_(False).eval()
    for name, parameter in decoder.named_parameters():
        if name.endswith("gain"):
            parameter.uniform_(0.5, 1.5)
    return decoder


@pytest.fixture
def latents() -> torch.Tensor:
    return torch.randn(2, 4, 3, 4, 5, generator=torch.Generator().manual_seed(0))


def started(teacher: WanDecoder, operators: dict, keep: dict, latents: torch.Tensor, **options) -> WanStudent:
    config = PruneConfig(positions=None, **options)
    student = WanStudent(teacher.config, operators, keep)
    statistics = gather(teacher, [latents], config.positions)
    initialise(student, teacher, statistics, choose(student, teacher, statistics, config), config.refit)
    return student.requires_grad_(False).eval()


# --- structure --------------------------------------------------------------------------------------------------------


def test_released_sizes():
    with torch.device("meta"):
        student = build_student(FlashVaedConfig(), channels=16, stride_t=4, stride_hw=8)
        of_wan22 = WanStudent(WAN22, OPERATORS, {"up2": 0.125, "up3": 0.125})
    assert sum(p.numel() for p in student.parameters()) == 5_859_995
    parts = {name: sum(p.numel() for p in stage.parameters()) for name, stage in student.stages.items()}
    assert {name: round(count / 1e6, 3) for name, count in parts.items()} == {
        "conv_in": 0.167, "mid": 1.228, "up0": 2.503, "up1": 1.918, "up2": 0.036, "up3": 0.008, "out": 0.001,
    }  # fmt: skip
    assert f"{sum(p.numel() for p in of_wan22.parameters()) / 1e6:.1f}" == "47.5"


@pytest.mark.parametrize("keep", [{}, *PLANS])
@pytest.mark.parametrize("operators", [{}, OPERATORS])
def test_any_student_streams_its_whole_clip(teacher, latents, operators, keep):
    """In float64: norms over the two to four channels of such small students magnify rounding."""
    student = WanStudent(teacher.config, operators, keep).double().eval()
    video = student(latents).clamp(-1, 1)
    assert video.shape == teacher(latents).shape
    torch.testing.assert_close(student.decode(latents), video, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"keep": {"up4": 0.5}}, "no such stage; there are mid, up0"),
        ({"keep": {"up2": 0.0}}, "must lie above 0"),
        ({"keep": {"mid": 0.5}}, "only stages behind an upsampling can be pruned"),
        ({"operators": {"up2": "sparse"}}, "none of dense, depthwise, depthwise5, frame"),
        ({"layout": "wan3"}, "none of wan21, wan22"),
    ],
)
def test_impossible_plans_are_refused(config, said):
    with pytest.raises(ValueError, match=said):
        FlashVaedConfig(**config)


def test_a_share_that_leaves_no_channel_is_refused():
    with pytest.raises(ValueError, match=r"leaves no channel of 8; the smallest that leaves one is 1/8"):
        WanStudent(LAYOUTS["wan21"], {}, {"up3": 0.1})


def test_released_names(tmp_path: Path):
    """The authors' file, as far as its names go: round trip, and what is said of files that do not fit."""
    student = build_student(FlashVaedConfig(), channels=16, stride_t=4, stride_hw=8)
    state = {released.released_name(name, student): p.detach() for name, p in student.named_parameters()}
    assert "decoder.middle.0.residual.2.depthwise_conv.weight" in state
    assert "decoder.upsamples.8.shortcut.weight" in state and "decoder.upsamples.7.time_conv.weight" in state
    torch.save(state, tmp_path / "vae.pth")
    again = released.from_released(tmp_path / "vae.pth")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), student.parameters(), strict=True))
    state.pop("decoder.head.2.bias")
    torch.save(state, tmp_path / "vae.pth")
    with pytest.raises(ValueError, match=r"decoder.head.2.bias is missing"):
        released.from_released(tmp_path / "vae.pth")
    with pytest.raises(FileNotFoundError, match="Flash-VAED"):
        released.from_released(tmp_path / "nothing.pth")


# --- the start --------------------------------------------------------------------------------------------------------


def test_nothing_pruned_is_the_teacher_to_the_bit(teacher, latents):
    student = started(teacher, {}, {}, latents)
    assert torch.equal(student(latents), teacher(latents))


@pytest.mark.parametrize("refit", [True, False])
def test_redundant_channels_cost_nothing(latents, refit):
    """Channels of up2 that are copies of others can go: half of them pruned, the student is the teacher still."""
    torch.manual_seed(0)
    teacher = WanDecoder(WanConfig(dim=8, dim_mult=(1, 2, 2, 4), channels=4)).requires_grad_(False).eval()
    _make_redundant(teacher)
    student = started(teacher, {}, {"up3": 0.5}, latents, refit=refit)
    if refit:
        torch.testing.assert_close(student(latents), teacher(latents), atol=2e-4, rtol=0)
    else:  # what read the dropped copies is missing
        assert (student(latents) - teacher(latents)).abs().max() > 1e-3


def _make_redundant(teacher: WanDecoder) -> None:
    """Make every second channel of stage up3 a copy of the one before it, by what makes them."""

    def double(convolution: nn.Module) -> None:
        convolution.weight[1::2] = convolution.weight[::2]
        convolution.bias[1::2] = convolution.bias[::2]

    double(teacher.stages["up2"].layers[-1].conv)
    for block in teacher.stages["up3"].layers:
        double(block.conv1)
        double(block.conv2)


@pytest.mark.parametrize("keep", PLANS)
@torch.no_grad()
def test_a_computed_start_is_nearer_to_the_teacher_than_a_random_one(teacher, latents, keep):
    """By the features of stages: pixels of a teacher with random weights are noise, which no student of fewer channels has."""
    torch.manual_seed(1)
    _, taught = teacher(latents, taps=["mid", "up0", "up1"])

    def errors(student: WanStudent) -> list[float]:
        _, own = student(latents, taps=list(taught))
        kept = {name: getattr(student, f"kept_{name}", slice(None)) for name in taught}
        return [float(feature_mse(own[name], taught[name][:, kept[name]])) for name in taught]

    computed = errors(started(teacher, OPERATORS, keep, latents))
    by_chance = [errors(WanStudent(teacher.config, OPERATORS, keep)) for _ in range(3)]
    assert all(error < min(others) for error, *others in zip(computed, *by_chance, strict=True))


@pytest.fixture(scope="module")
def real_features() -> tuple[Statistics, WanDecoder]:
    """Statistics of wan_mini's decoder over two real clips."""
    data = ClipData(sample_config((64, 64), 9, num_workers=0), world_size=1, rank=0)
    space, latents = WanMini(), []
    for stream in data.streams("train").values():
        requests = [stream.request(clip, None) for clip in (0, len(stream) - 1)]
        latents = [space.encode(ClipReader().read(request).tensors["video"][None]) for request in requests]
    teacher = load_decoder().eval()
    return gather(teacher, latents, positions=4000), teacher


@pytest.mark.parametrize("share", [0.125, 0.25, 0.5])
def test_greedy_is_at_least_as_good_on_real_features(real_features, share):
    statistics, teacher = real_features
    explained = {}
    for method in ("greedy", "qr", "magnitude", "random"):
        for stage in ("up2", "up3"):
            for name in (
                name for name in statistics if name.startswith(stage) and name.endswith(("out", "hidden", stage))
            ):
                count = kept_count(statistics[name].channels, share)
                explained[name, method] = select(
                    statistics[name], count, method, swaps=3 if method == "greedy" else 0
                ).r2
    points = {name for name, _ in explained}
    assert len(points) == 14
    for name in points:
        best = max(explained[name, method] for method in ("qr", "magnitude", "random"))
        assert explained[name, "greedy"] >= best - 1e-3, (
            name,
            {m: explained[name, m] for m in ("greedy", "magnitude")},
        )
    means = {m: sum(explained[name, m] for name in points) / len(points) for m in ("greedy", "magnitude", "random")}
    assert means["greedy"] > means["magnitude"] and means["greedy"] > means["random"]


def test_dropped_inputs_are_better_read_through_their_reconstruction(teacher, latents):
    taught = teacher(latents)
    errors = {
        refit: (started(teacher, {}, {"up2": 0.5, "up3": 0.5}, latents, refit=refit)(latents) - taught).square().mean()
        for refit in (True, False)
    }
    assert errors[True] < errors[False]


def test_what_is_kept_is_told_and_stays_with_the_weights(teacher, latents):
    student = started(teacher, OPERATORS, {"up2": 0.5, "up3": 0.5}, latents)
    full = student.recon_up1.shape[1]
    assert student.kept_up1.shape == (full // 2,) and student.kept_up1.max() < full
    rows = torch.arange(len(student.kept_up1))
    torch.testing.assert_close(student.recon_up1[rows, student.kept_up1], torch.ones(len(rows)))
    assert {"kept_up1", "recon_up1"} <= student.state_dict().keys()
    statistics = gather(teacher, [latents])
    selections = choose(student, teacher, statistics, PruneConfig())
    report = pruning_report(student, teacher, selections)
    assert "up2.0.hidden" in report and "predicted speed-up" in report
    assert len(selections) == 14, "the released student's dump points"


def test_too_few_clips_for_the_rank(teacher):
    student = WanStudent(teacher.config, {}, {"up3": 0.5})
    statistics = gather(teacher, [torch.randn(1, 4, 1, 1, 1)], positions=3)
    with pytest.raises(ValueError, match="calibration clips too few for the rank"):
        choose(student, teacher, statistics, PruneConfig())
    with pytest.raises(ValueError, match="no calibration clip"):
        gather(teacher, [])


def test_teachers_of_another_layout_are_refused(tmp_path: Path, teacher):
    with pytest.raises(ValueError, match="the teacher's layout"):
        initialise(WanStudent(WAN21, {}, {}), teacher, Statistics(), {})
    if teacher.config.residual:
        return
    import json

    from safetensors.torch import save_file

    from decoders.backbones.wan_weights import to_config, to_diffusers

    (tmp_path / "config.json").write_text(json.dumps(to_config(teacher.config)))
    save_file(to_diffusers(teacher), tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match=r"differs from decoder.layout in dim.*: dim 8 against 96"):
        load_teacher(str(tmp_path), WAN21)
    same = load_teacher(str(tmp_path), WanConfig(dim=8, channels=4, mean=[0.0] * 4, std=[1.0] * 4))
    assert all(torch.equal(a, b) for a, b in zip(same.parameters(), teacher.parameters(), strict=True))


# --- phases -----------------------------------------------------------------------------------------------------------

QUICK = ("trainer.progress_bar=false", "validation.num_shown=0", "trainer.max_steps=2", "trainer.val_every_steps=2")


def test_phases_hand_over(runs_root: Path, capsys):
    """Phase 1 prunes and reports; phase 2 starts from its weights, kept channels included, and needs no calibration."""
    first = train(load("flash_vaed_debug", QUICK), "flash_vaed_debug", QUICK)
    assert "student against teacher before any training" in (first / "pruning.txt").read_text()
    kept = torch.load(first / "pruning.pt", weights_only=True)["up2"]["kept"]
    assert "| teacher" in capsys.readouterr().out
    second = (*QUICK, f"init_from={first.name}", "objective.start=null", "objective.feed=student", "seed=1")
    folder = train(load("flash_vaed_debug", second), "flash_vaed_debug", second)
    assert not (folder / "pruning.txt").exists()
    state = torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(state["model.kept_up1"], kept)


@pytest.mark.parametrize(
    "override", ["objective.match=reconstructed", "objective.feed=teacher", "objective.target=teacher"]
)
def test_other_ways_to_be_taught(runs_root: Path, override):
    overrides = (*QUICK, override)
    train(load("flash_vaed_debug", overrides), "flash_vaed_debug", overrides)
    assert (run_dir("flash_vaed_debug", overrides) / "done.json").is_file()


def test_what_the_teacher_said_is_kept(tmp_path: Path):
    """The same losses from the cache within half precision, the teacher not asked again, and no more than fits."""
    experiment = load("flash_vaed_debug", [f"objective.cache={tmp_path}", "objective.start=null"])
    decoder = build_decoder(experiment, build_space(experiment))
    video = torch.rand(2, 3, 5, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    batch = decoder.with_latent({"video": video, "key": ["a@0", "a@5"]})
    first = decoder.losses(batch)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    decoder._ask = None  # would raise
    again = decoder.losses(batch)
    torch.testing.assert_close(again["guidance"], first["guidance"], rtol=2e-2, atol=0)
    full = TeacherCache(str(tmp_path), "another teacher", limit_gib=0.0)
    full.put(["a@0"], {"mid": torch.zeros(1, 2)})
    assert full.get(["a@0"], torch.device("cpu")) is None
    assert len(list(tmp_path.iterdir())) == 2


def test_objectives_that_cannot_work_are_refused():
    with pytest.raises(ConfigError, match="objective.teacher is null"):
        load("flash_vaed_debug", ["objective.teacher=null"])
    with pytest.raises(ConfigError, match="objective.crop=8"):
        load("flash_vaed_debug", ["objective.crop=8"])


@pytest.mark.slow
def test_turbo_vaeds_layout_learns_from_a_teacher_of_another_width(runs_root: Path):
    """Its own operators, upsampling and widths; features through trained projections that inference does not have."""
    turbo = [
        "decoder.dim=8",
        "decoder.operators={mid: depthwise5, up0: depthwise5, up1: frame, up2: frame, up3: frame}",
        "decoder.keep={up2: 1.0, up3: 1.0}",
        "decoder.upsample=shuffle",
        "objective={teacher: random, start: null, taps: [mid, up1, up3], match: projected}",
    ]
    experiment = load("flash_vaed_debug", turbo)
    decoder = build_decoder(experiment, build_space(experiment))
    kernels = {m.depthwise.kernel_size for m in decoder.model.stages["up0"].modules() if hasattr(m, "depthwise")}
    assert kernels == {(5, 5, 5)}
    assert not any(name.startswith("projections") for name in decoder.inference_parameters())
    batch = decoder.with_latent({"video": torch.rand(1, 3, 9, 32, 48) * 2 - 1, "key": ["a"]})
    decoder.log_dict = lambda *_: None
    decoder.losses(batch)["guidance"].backward()
    assert all(p.grad.abs().sum() > 0 for p in decoder.projections.parameters())
    assert decoder.model.stages["up0"].layers[0].conv1.depthwise.weight.grad.abs().sum() > 0
    model, latent = decoder.model, batch["latent"]
    state = model.start_stream(1, 32, 48)
    streamed = torch.cat([model.step_stream(frame, state) for frame in latent.unbind(2)], 2)
    with torch.no_grad():
        torch.testing.assert_close(streamed, model(latent).clamp(-1, 1), atol=1e-4, rtol=0)
    train(experiment, "flash_vaed_debug", turbo)
    with pytest.raises(ConfigError, match="no computed start"):
        bad = load("flash_vaed_debug", [*turbo[:4]])
        from experiments.train import build

        build(bad)


def test_turbo_on_wan21_is_what_its_header_says():
    experiment = load("flash_vaed_wan21_turbo")
    with torch.device("meta"):
        student = build_student(experiment.decoder, 16, 4, 8)
    assert [student.out_channels(f"up{n}") for n in range(4)] == [128, 128, 64, 64]
    assert not student.has_computed_start
