"""What REGEN promises of decoding: a sampler that is right, seeds, streams, latent extension, any time, bounded memory."""

import warnings
import weakref

import pytest
import torch
from regen_small import CHANNELS, STRIDE_HW, VARIANTS, K, latents, tiny
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from decoders.regen.config import RegenConfig, SirenConfig
from decoders.regen.model import RegenDecoder
from decoders.regen.sampler import coefficients_of, sample, skip_factors, variance_preserving
from decoders.regen.windows import asked, num_frames, whole_pair


def stream(model: RegenDecoder, latent: Tensor, **sampling) -> Tensor:
    state = model.start_stream(len(latent), *(side * STRIDE_HW for side in latent.shape[-2:]), **sampling)
    frames = [model.step_stream(frame, state) for frame in latent.unbind(2)]
    return torch.cat([*frames, model.end_stream(state)], 2)


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in numbers]


# ---- the sampler


@pytest.mark.parametrize("steps", [1, 2, 7, 50])
@pytest.mark.parametrize("prediction", ["velocity", "epsilon"])
def test_with_the_truth_the_sampler_finds_the_clip(prediction: str, steps: int) -> None:
    """Float32 throughout. Velocity to 1e-5; the first step of epsilon divides by 0.068, so to 1e-4."""
    clean, noise = torch.rand(2, 3, 5, 8, 8) * 2 - 1, torch.randn(2, 3, 5, 8, 8)
    coefficients, seen = coefficients_of(prediction), []

    def truth(x: Tensor, level: Tensor) -> Tensor:
        a, b = (part.view(-1, 1, 1, 1, 1) for part in coefficients(level))
        seen.append(level[0].item())
        own_noise = (x - a * clean) / b  # of the path that leads through x
        return own_noise - clean if prediction == "velocity" else own_noise

    found, kept = sample(truth, noise, steps, prediction=prediction)
    torch.testing.assert_close(found, clean, atol=1e-5 if prediction == "velocity" else 1e-4, rtol=0)
    assert seen == pytest.approx([1 - i / steps for i in range(steps)])
    assert kept == []


def test_one_step_is_noise_less_velocity_and_steps_are_eulers() -> None:
    """A velocity that is not constant, so that the path is curved: dx/ds = x, whose Euler steps are known."""
    noise = torch.randn(1, 3, 1, 2, 2)
    for steps in (1, 4):
        found, _ = sample(lambda x, level: x, noise, steps)
        torch.testing.assert_close(found, noise * (1 - 1 / steps) ** steps, atol=1e-6, rtol=1e-5)


def test_the_schedule_is_stable_diffusions() -> None:
    a, b = variance_preserving(torch.tensor([0.0, 0.0005, 0.001, 0.5, 1.0]))
    assert (a[0], b[0]) == (1, 0)
    assert a[2] ** 2 == pytest.approx(1 - 0.00085, abs=1e-7)
    assert a[4] ** 2 == pytest.approx(0.004660, abs=1e-6)  # alphas_cumprod[999] of its scheduler
    assert a[1] == pytest.approx((a[0] * a[2]).sqrt().item(), abs=1e-7)
    torch.testing.assert_close(a**2 + b**2, torch.ones(5))
    assert variance_preserving(torch.tensor(0.3, dtype=torch.float64))[0].dtype == torch.float64


@pytest.mark.parametrize("prediction", ["velocity", "epsilon"])
@pytest.mark.parametrize("spread", [0.1, 0.5])
def test_the_skip_is_the_best_linear_estimate(prediction: str, spread: float) -> None:
    """By least squares over many draws, from the noisy pixel and the mean. Pure noise: the clean video is the mean."""
    mean, noise = torch.randn(200_000), torch.randn(200_000)
    clean = mean + spread * torch.randn(200_000)
    for level in (0.1, 0.5, 0.9):
        a, b = coefficients_of(prediction)(torch.tensor(level))
        known = torch.stack([a * clean + b * noise, mean], dim=1)
        target = noise - clean if prediction == "velocity" else noise
        found = torch.linalg.lstsq(known, target[:, None]).solution[:, 0]
        factors = skip_factors(torch.tensor(level), prediction, spread)
        torch.testing.assert_close(torch.stack(factors), found, atol=0.04, rtol=0.02)
    of_noisy, of_mean = skip_factors(torch.ones(1), prediction, spread)
    if prediction == "velocity":
        assert (of_noisy, of_mean) == (1, -1)


def test_a_guide_sets_the_first_frame_and_the_last_is_kept() -> None:
    noise, guide, seen = torch.randn(1, 3, 3, 2, 2), [torch.full((1, 3, 1, 2, 2), float(i)) for i in range(4)], []

    def predict(x: Tensor, level: Tensor) -> Tensor:
        seen.append(x.clone())
        return torch.ones_like(x)

    _, kept = sample(predict, noise, 4, guide=guide, keep=True)
    for index, x in enumerate(seen):
        assert torch.equal(x[:, :, :1], guide[index])
        assert torch.equal(x[:, :, -1:], kept[index])
        torch.testing.assert_close(x[:, :, 1:], noise[:, :, 1:] - index / 4)
    assert all(part.untyped_storage().nbytes() == 3 * 4 * 4 for part in kept)  # one frame, not a view of all
    with pytest.raises(ValueError, match="guide of 4 steps cannot lead 3"):
        sample(predict, noise, 3, guide=guide)


# ---- whole clips and streams


@pytest.mark.parametrize("chunked", [True, False])
def test_the_same_seeds_give_the_same_video_however_clips_are_batched(chunked: bool) -> None:
    model, latent = tiny(chunked), latents(4, batch=3)
    for ask in (dict(steps=2), dict(steps=2, extension=True), dict(times=[3.5, 0, 7, -1])):
        together = model.decode(latent, generator=seeds(5, 6, 7), **ask)
        alone = [model.decode(latent[i : i + 1], generator=seeds(5 + i), **ask) for i in range(3)]
        torch.testing.assert_close(torch.cat(alone), together, atol=1e-5, rtol=0)
        assert (model.decode(latent, generator=seeds(5, 6, 8), **ask) - together)[2].abs().max() > 0.1
        one, same = seeds(1, 1)  # one generator for all: clips are seeded in turn
        parts = [model.decode(latent[:2], generator=one, **ask), model.decode(latent[2:], generator=one, **ask)]
        torch.testing.assert_close(torch.cat(parts), model.decode(latent, generator=same, **ask), atol=1e-5, rtol=0)
    torch.testing.assert_close(model.decode(latent)[1:], model.decode(latent[1:]), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="2 generators for 3 clips"):
        model.decode(latent, generator=seeds(1, 2))


@pytest.mark.parametrize("extension", [False, True])
@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("variant", ["paper", "patch_t_2", "in_context"])
def test_streaming_equals_decoding(variant: str, chunked: bool, extension: bool) -> None:
    model, latent = tiny(chunked, **VARIANTS[variant]), latents(6)
    ask = dict(steps=3, extension=extension)
    streamed = stream(model, latent, generator=seeds(1, 2), **ask)
    assert torch.equal(streamed, model.decode(latent, generator=seeds(1, 2), **ask))
    assert streamed.shape[2] == (15 if chunked else 21)
    assert streamed.std() > 0.1
    image = latent[:, :, :1]
    assert torch.equal(stream(model, image, **ask), model.decode(image, **ask))


def test_frames_come_as_soon_as_their_latents_are_there() -> None:
    for chunked, expected in ((True, [0, 5, 0, 5, 0]), (False, [0, 5, 4, 4, 4])):
        model = tiny(chunked)
        state = model.start_stream(2, 16, 24)
        lengths = [model.step_stream(frame, state).shape[2] for frame in latents(5).unbind(2)]
        assert lengths == expected
        assert model.end_stream(state).shape[2] == int(chunked)  # the content frame that waited is an image
        with pytest.raises(ValueError, match="has ended"):
            model.step_stream(latents(1)[:, :, 0], state)


@pytest.mark.parametrize("chunked", [True, False])
def test_a_streams_state_does_not_grow(chunked: bool) -> None:
    model = tiny(chunked)
    state = model.start_stream(1, 16, 24, steps=3, extension=True)
    sizes = set()
    for index in range(12):
        model.step_stream(latents(5, batch=1)[:, :, 3], state)
        if index > 1:
            sizes.add(state.num_bytes())
    frame, guide = CHANNELS * 6 * 4, 3 * 3 * 16 * 24 * 4
    assert sizes == ({guide, guide + frame} if chunked else {guide + frame})
    assert state.pending is None or state.pending.untyped_storage().nbytes() == frame  # no view of the whole clip


def test_sizes_that_the_patch_does_not_divide_are_cropped() -> None:
    model, latent = tiny(), latents(2)
    state = model.start_stream(2, 13, 20)
    frames = [model.step_stream(frame, state) for frame in latent.unbind(2)]
    assert torch.equal(torch.cat([*frames, model.end_stream(state)], 2), model.decode(latent)[..., :13, :20])


def test_extension_hands_the_last_frame_over() -> None:
    """Every step of a later chunk sees, first, the state that the frame had at the same step of the chunk before."""
    for chunked in (True, False):
        model, latent, seen = tiny(chunked), latents(4), []
        real = model._predict

        def watched(noisy, level, condition, real=real, seen=seen):
            seen.append(noisy)
            return real(noisy, level, condition)

        model._predict = watched
        extended = model.decode(latent, steps=3, extension=True)
        first, second = seen[:3], seen[3:6]
        for before, after in zip(first, second, strict=True):
            assert torch.equal(before[:, :, -1:], after[:, :, :1])
        assert second[0].shape[2] == (K + 2 if chunked else K + 1)
        seen.clear()
        plain = model.decode(latent, steps=3)
        assert torch.equal(seen[3][:, :, -K:], second[0][:, :, -K:])  # the same noise with and without
        assert torch.equal(plain[:, :, : K + 1], extended[:, :, : K + 1])
        assert (plain - extended)[:, :, K + 1 :].abs().max() > 1e-3


# ---- times


@pytest.mark.parametrize("variant", ["paper", "patch_t_2"])
@pytest.mark.parametrize("chunked", [True, False])
def test_every_frame_asked_for_is_the_whole_clip(variant: str, chunked: bool) -> None:
    model, latent = tiny(chunked, **VARIANTS[variant]), latents(4)
    whole = model.decode(latent, steps=2)
    t = whole.shape[2]
    assert torch.equal(model.decode(latent, times=range(t), steps=2), whole)
    order = torch.randperm(t)
    assert torch.equal(model.decode(latent, times=order, steps=2), whole[:, :, order])
    twice = [0, 3, 3, *range(t)]
    assert torch.equal(model.decode(latent, times=twice, steps=2), whole[:, :, twice])


@pytest.mark.parametrize("chunked", [True, False])
def test_times_between_before_and_after(chunked: bool) -> None:
    model, latent = tiny(chunked), latents(4)
    times = [i / 2 for i in range(-3, 26)]
    video = model.decode(latent, times=times)
    assert video.shape == (2, 3, 29, 16, 24) and video.isfinite().all()
    one, near = (model.decode(latent, times=[t]) for t in (1.3, 1.3004))
    assert 0 < (one - near).abs().max() < 0.1
    assert model.decode(latent[:, :, :1], times=[0, 0.0]).shape[2] == 2


def test_times_find_their_pair() -> None:
    def places(chunked: bool, *times: float) -> list[tuple[int, tuple[float, ...]]]:
        return [(w.pair, w.times) for w in asked(times, 4, K, chunked)]

    assert places(True, 0, 4, 5, 9) == [(0, (0.0, 1.0)), (1, (0.0, 1.0))]
    assert places(True, 4.5, 4.6) == [(0, (1.125,)), (1, (pytest.approx(-0.1),))]  # between chunks the nearer one
    assert places(True, -2, 12) == [(0, (-0.5,)), (1, (1.75,))]
    assert places(False, 4, 5) == [(0, (1.0,)), (1, (0.0, 0.25))]  # the shared frame as context
    assert places(False, -2, 14) == [(0, (-0.5,)), (2, (0.0, 1.5))]
    halves = asked([i / 2 for i in range(9)], 2, K, True)
    assert [len(w.times) for w in halves] == [5, 4]  # no more together than in training
    assert [w.outputs for w in halves] == [(0, 1, 2, 3, 4), (5, 6, 7, 8)]


@pytest.mark.parametrize("k", [1, 4, 32])
def test_whole_pairs_cover_the_clip_once(k: int) -> None:
    for chunked, n in ((True, 6), (False, 4)):
        for extension in (False, True):
            windows = [whole_pair(pair, k, chunked, extension) for pair in range(3)]
            assert [i for w in windows for i in w.outputs] == list(range(num_frames(n, k, chunked)))
            assert [w.guided for w in windows] == [False, extension, extension]
            assert all(len(w.frames) == len(w.outputs) for w in windows)


def test_times_far_outside_are_told() -> None:
    model, latent = tiny(), latents(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.decode(latent, times=[-4, 8])
    with pytest.warns(UserWarning, match="times from 0.0 to 8.5 go more than 4 frames outside the clip of 0 to 4"):
        model.decode(latent, times=[0, 8.5])
    with pytest.warns(UserWarning, match="times from -4.5 to 0.0 go"):
        model.decode(latent, times=[0, -4.5])


# ---- memory


class Live(TorchDispatchMode):
    """The most bytes of tensors that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple] = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.alive:
                    self.alive[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, storage._cdata).atexit = False
        self.peak = max(self.peak, sum(self.alive.values()))
        return result


@pytest.mark.parametrize(
    ("side", "autocast", "gib"), [(256, False, 1.7), (512, False, 6.9), (256, True, 4.2), (512, True, 10.2)]
)
def test_memory_of_33_frames_is_what_the_readme_says(side: int, autocast: bool, gib: float) -> None:
    """At full size, beyond the weights, without allocating any; one pass of one pair."""
    kept = torch.get_default_dtype()
    with FakeTensorMode():
        torch.set_default_dtype(torch.float32 if autocast else torch.bfloat16)
        try:
            model = RegenDecoder(RegenConfig(), CHANNELS, 32, STRIDE_HW, chunked=True)
        finally:
            torch.set_default_dtype(kept)
        latent, noise = torch.empty(1, CHANNELS, 2, side // 8, side // 8), torch.empty(1, 3, 33, side, side)
        live = Live()
        live.alive = {parameter.untyped_storage()._cdata: 0 for parameter in model.parameters()}
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast), live:
            model(latent, noise)
    assert live.peak / 2**30 == pytest.approx(gib, rel=0.02)


@pytest.mark.parametrize("extension", [False, True])
def test_decoding_more_chunks_takes_no_more_memory(extension: bool) -> None:
    """Beyond the video itself, which grows."""
    model = tiny()
    peaks = {}
    for chunks in (2, 4, 8):
        latent = latents(2 * chunks, batch=1)
        with Live() as live:
            video = model.decode(latent, steps=3, extension=extension)
        peaks[chunks] = live.peak - video.nbytes
    assert peaks[8] <= 1.01 * peaks[2] and peaks[4] <= 1.01 * peaks[2]


def test_the_condition_is_made_once_per_pair() -> None:
    model, calls = tiny(), []
    model.condition.register_forward_hook(lambda *_: calls.append(1))
    model.decode(latents(6), steps=5)
    assert len(calls) == 3


# ---- the door


def test_latents_are_denormalised_at_the_door() -> None:
    model, latent = tiny(), latents(4)
    plain = model.decode(latent)
    model.latent_mean.copy_(torch.randn(CHANNELS))
    model.latent_std.copy_(torch.rand(CHANNELS) + 0.5)
    shape = (-1, 1, 1, 1)
    normalised = (latent - model.latent_mean.view(shape)) / model.latent_std.view(shape)
    torch.testing.assert_close(model.decode(normalised), plain, atol=1e-4, rtol=0)
    assert {"latent_mean", "latent_std"} <= model.state_dict().keys()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.decode(latents(2), steps=0), "at least one step"),
        (lambda m: m.start_stream(1, 16, 16, steps=0), "at least one step"),
        (lambda m: m.decode(latents(3)), "3 latent frames: chunks have two each"),
        (lambda m: m(latents(5)), "chunks have two each"),
        (lambda m: m.decode(latents(2), times=[]), "one or more finite"),
        (lambda m: m.decode(latents(2), times=[0, float("nan")]), "one or more finite"),
        (lambda m: m.decode(latents(2), times=[0], extension=True), "extension joins whole chunks"),
        (lambda m: m.decode(latents(1), times=[0.5]), "is an image"),
        (lambda m: m(latents(1), times=torch.ones(2, 1)), "is an image"),
        (lambda m: m(latents(4), level=torch.ones(2)), "fold pairs into the batch"),
        (lambda m: m(latents(2), torch.randn(2, 3, 4, 16, 24)), r"make it \(2, 3, 5, 16, 24\)"),
        (lambda m: m(latents(2), times=torch.ones(2, 0)), "one row per clip"),
        (lambda m: m(torch.randn(1, 4, 2, 2, 2)), r"this decoder reads \(b, 8, n, y, x\)"),
        (lambda m: m.decode(torch.randn(1, 4, 2, 2, 2)), r"this decoder reads \(b, 8, n, y, x\)"),
        (lambda m: m.start_stream(0, 16, 16), "is empty"),
        (lambda m: m.step_stream(torch.randn(1, CHANNELS, 3, 3), m.start_stream(1, 16, 16)), "takes"),
        (lambda m: m.fold_pairs(latents(1)), "is an image"),
        (lambda m: m.fold_frames(torch.randn(1, 3, 9, 16, 16)), "no whole number of pairs"),
    ],
)
def test_misuse_is_told_plainly(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(tiny())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(heads=5), "must divide"),
        (dict(width=0), "1 or more"),
        (dict(patch_t=3), "must be 1 or 2"),
        (dict(patch=16), "set decoder.patch=8"),
        (dict(patch_t=2, k=3), "must divide the space's stride_t=3"),
        (dict(first_frame="letter"), "must be its 8 channels"),
        (dict(conditioning="in_context", width=47, heads=1), "even decoder.width"),
    ],
)
def test_impossible_architectures_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


def test_impossible_sirens_are_refused() -> None:
    for changes in (dict(width=0), dict(omega=0.0)):
        with pytest.raises(ValueError, match="decoder.siren"):
            SirenConfig(**changes)
