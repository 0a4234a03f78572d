"""RefDecoder frame by frame: a stream is its clip, remembers a bounded window, and is attention under a mask."""

from functools import partial

import pytest
import torch
from refdecoder_small import clip, small
from torch.nn import functional as F

from decoders.refdecoder.model import RefDecoderConfig, RefDecoderModel, build_model
from decoders.refdecoder.transformer import Block, normalise, rope_table, rotate

WINDOWED = dict(attention="windowed", window=2)
clip = partial(clip, frames=4, clips=1)


def streamed(model: RefDecoderModel, latent: torch.Tensor, **options) -> torch.Tensor:
    height, width = (side * model.stride_hw for side in latent.shape[3:])
    state = model.start_stream(len(latent), height, width, **options)
    frames = [model.step_stream(frame, state) for frame in latent.unbind(2)]
    return torch.cat([*frames, model.end_stream(state)], dim=2)


@pytest.mark.parametrize("references", [0, 2])
@pytest.mark.parametrize(
    "changes",
    [WINDOWED, WINDOWED | dict(window=1, residual="both"), WINDOWED | dict(window=9), dict(inject="controlnet")],
)
@pytest.mark.parametrize("layout", ["wan21", "wan22"])
def test_a_stream_is_its_clip(layout, changes, references):
    model = small(layout, **changes)
    latent, reference = clip(model, references=max(1, references))
    reference = reference if references else None
    video = streamed(model, latent, reference=reference)
    assert video.shape == (1, 3, 13, model.stride_hw, 3 * model.stride_hw)
    torch.testing.assert_close(video, model.decode(latent, reference), atol=1e-4, rtol=0)
    torch.testing.assert_close(video, model(latent, reference).clamp(-1, 1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("changes", [{}, dict(inject="none"), WINDOWED])
def test_the_plain_decoder_always_streams(changes):
    model = small(**changes)
    latent, _ = clip(model)
    expected = model.backbone(latent).clamp(-1, 1)
    torch.testing.assert_close(streamed(model, latent, skip=True), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(model.decode(latent, skip=True), expected, atol=1e-4, rtol=0)


def test_streams_do_not_disturb_each_other():
    model = small(**WINDOWED)
    latent, references = clip(model, references=2)
    alone = [streamed(model, latent, reference=part) for part in references.split(1, 2)]
    states = [model.start_stream(1, 8, 24, reference=part) for part in references.split(1, 2)]
    videos = [[], []]
    for frame in latent.unbind(2):
        for video, state in zip(videos, states, strict=True):
            video.append(model.step_stream(frame, state))
    for video, expected in zip(videos, alone, strict=True):
        assert torch.equal(torch.cat(video, 2), expected)
    assert (alone[0] - alone[1]).abs().max() > 1e-3


@pytest.mark.parametrize("window", [1, 3])
def test_memory_is_constant_once_the_window_is_full(window):
    model = small(**WINDOWED | dict(window=window)).float()
    state = model.start_stream(1, 8, 24, reference=torch.zeros(1, 3, 1, 8, 24))
    sizes = []
    for frame in torch.randn(50, 1, 4, 1, 3):
        model.step_stream(frame, state)
        sizes.append(state.num_bytes())
    full = max(1, window - 1)  # the first latent frame has fewer frames than the others and leaves the window again
    assert sizes[0] <= sizes[full] and set(sizes[full:]) == {sizes[full]}
    keys = sum(k.nbytes for point in state.memory.past for block in point for k, _ in block)
    tokens = 2 * (window - 1) * (1 + 2 + 4) * 2  # a frame has 1 x 2, at three points with two blocks
    assert keys == tokens * 24 * 4


def test_a_group_sees_its_window_and_nothing_later():
    model = small(**WINDOWED, residual="both")
    latent, reference = clip(model, frames=5)
    changed = latent.clone()
    changed[:, :, 3] += 1
    difference = (model(latent, reference) - model(changed, reference)).abs().amax(dim=(0, 1, 3, 4))
    assert difference[:9].max() < 1e-9  # frames of latent frames 0, 1 and 2
    assert difference[9:13].min() > 1e-3
    # Attention alone: a key of two latent frames before is not among those kept.
    memory = model._begin(reference)
    for number in range(4):
        _, memory = model.injection.step(0, torch.randn(1, 32, 1, 1, 3, dtype=torch.float64), memory)
        assert [len(block) for block in memory.past[0]] == [min(number + 1, 1)] * 2


# --- the same function, written as attention under a mask -------------------------------------------------------------


def masked(model: RefDecoderModel, latent: torch.Tensor, reference: torch.Tensor | None) -> torch.Tensor:
    """The whole clip, layer by layer: every token scores every other, and a mask decides. References are turned by their
    own times; for their sake a query is turned by its place in its window, for the video's by its place in the clip."""
    injection = model.injection
    full = model.config.attention == "full"  # then the mask hides nothing
    window = 99 if full else model.config.window
    features = None if reference is None else model.encoder(reference)
    count = 0 if features is None else features.shape[2]
    x, _, _ = model.backbone.run(model.backbone.denormalise(latent), None, True, stages=model.parts[0][1])
    for (number, stages), point in zip(model.parts[1:], model.layout.points, strict=True):
        gate, frames = injection.gates[number], x.shape[2]
        tokens = gate.video_tokens(x)
        if count:
            tokens = torch.cat([gate.reference_tokens(features), tokens], 1)
        grid, cells = tokens.shape[2:4], tokens.shape[2] * tokens.shape[3]
        group = torch.tensor([0] + [1 + i // point.frames for i in range(frames - 1)])
        start = torch.tensor([min(i for i in range(frames) if group[i] > g - window) for g in group])
        table = partial(rope_table, rows=grid[0], columns=grid[1], split=injection.split, device=x.device)
        references = list(range(0, -count, -1))
        in_clip = table((*references, *range(1, frames + 1)))
        in_window = table((*references, *(torch.arange(frames) - start + 1).tolist()))
        group = torch.cat([torch.full((count,), -1), group]).repeat_interleave(cells)
        seen = (group[None] == -1) | ((group[None] <= group[:, None]) & (group[None] > group[:, None] - window))
        seen &= (group[:, None] >= 0) | (group[None] == -1)
        seen |= torch.tensor(full)
        shape, tokens = tokens.shape, tokens.flatten(1, 3)
        for block in injection.blocks_at(number):
            tokens = _masked_block(block, tokens, in_clip, in_window, seen, count * cells)
        tokens = tokens.unflatten(1, shape[1:4])
        out = gate.features(tokens, *x.shape[3:])
        x = out[:, :, count:] + (0 if model.config.residual == "none" else x)
        if count and number + 1 < len(injection.gates):
            carried = out[:, :, :count] + (features if model.config.residual == "both" else 0)
            features = model._carry(number, carried, reference)
        x, _, _ = model.backbone.run(x, None, True, stages=stages)
    return model.backbone.finish(x)


def _masked_block(block: Block, x, in_clip, in_window, seen, references: int) -> torch.Tensor:
    normed = normalise(x)
    heads = (part.unflatten(-1, (-1, block.head_dim)) for part in (block.q_norm(block.q(normed)), block.v(normed)))
    q, v = heads
    k = rotate(block.k_norm(block.k(normed)).unflatten(-1, (-1, block.head_dim)), in_clip)
    to_video, to_references = (torch.einsum("bshd,bmhd->bhsm", rotate(q, table), k) for table in (in_clip, in_window))
    scores = torch.cat([to_references[..., :references], to_video[..., references:]], -1) * block.head_dim**-0.5
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    x = x + block.out(torch.einsum("bhsm,bmhd->bshd", weights, v).flatten(2))
    return x + block.down(F.gelu(block.up(normalise(x)), approximate="tanh"))


CASES = [
    (1, 1, "both"),
    (2, 0, "both"),
    (2, 2, "video"),
    (3, 1, "both"),
    (4, 1, "none"),
    (None, 2, "video"),
    (None, 1, "both"),
]


@pytest.mark.parametrize(("window", "references", "residual"), CASES)
def test_attention_is_what_its_mask_says(window, references, residual):
    """Outputs and gradients of the windowed loop and of full attention (None). With a window of the clip's four latent
    frames all positions are the paper's."""
    model = small(**({} if window is None else WINDOWED | dict(window=window)), residual=residual)
    latent, reference = clip(model, references=max(1, references))
    reference = reference if references else None
    results = []
    for run in (model, partial(masked, model)):
        model.zero_grad()
        video = run(latent, reference)
        (video * torch.linspace(-1, 1, 13)[:, None, None]).sum().backward()
        results.append((video.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (video, gradients), (expected, theirs) = results
    torch.testing.assert_close(video, expected, atol=1e-5, rtol=1e-5)  # rotations are in float32
    assert gradients.keys() == theirs.keys()
    for name, gradient in gradients.items():
        scale = theirs[name].abs().max().item()
        torch.testing.assert_close(gradient, theirs[name], atol=1e-4 * scale, rtol=1e-4, msg=name)


def test_dropped_latents_frame_by_frame():
    """A mask of each latent frame falls on that frame."""
    model = small(**WINDOWED)
    latent, reference = clip(model, frames=3)
    keep = torch.ones(1, 1, 3, 1, 3)
    keep[:, :, 2] = 0
    video = model(latent, reference, keep=keep)
    other = latent.clone()
    other[:, :, 2] += 5
    torch.testing.assert_close(video, model(other, reference, keep=keep), atol=1e-9, rtol=0)
    torch.testing.assert_close(video[:, :, :5], model(latent, reference)[:, :, :5], atol=1e-9, rtol=0)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_full_attention_has_no_stream():
    with pytest.raises(TypeError, match="train one with decoder.attention=windowed"):
        small().start_stream(1, 8, 24)
    with torch.device("meta"):
        model = build_model(RefDecoderConfig(layout="videovaeplus", inject="controlnet"), 16, 4, 8)
    with pytest.raises(TypeError, match="look at future frames; decode whole clips$"):
        model.start_stream(1, 8, 24)


def test_wrong_frames_are_refused():
    model = small(**WINDOWED)
    latent, reference = clip(model)
    state = model.start_stream(1, 6, 18, reference=reference[..., :6, :18])
    assert model.step_stream(latent[:, :, 0], state).shape == (1, 3, 1, 6, 18)
    for shape in ((1, 4, 1, 4), (2, 4, 1, 3), (1, 5, 1, 3)):
        with pytest.raises(ValueError, match=r"takes \(1, 4, 1, 3\)"):
            model.step_stream(torch.zeros(shape), state)
    assert model.end_stream(state).shape == (1, 3, 0, 6, 18)
    assert state.num_bytes() == 0
    with pytest.raises(ValueError, match="has ended"):
        model.step_stream(latent[:, :, 1], state)
    with pytest.raises(ValueError, match="is empty"):
        model.start_stream(0, 8, 24)


def test_wrong_references_are_refused_at_the_start():
    model = small(**WINDOWED)
    with pytest.raises(ValueError, match="aspect ratios differ by 67 %"):
        model.start_stream(1, 24, 40, reference=torch.zeros(1, 3, 1, 36, 100))
    with pytest.raises(ValueError, match="2 references for 1 clips"):
        model.start_stream(1, 24, 40, reference=torch.zeros(2, 3, 1, 24, 40))
    with pytest.raises(ValueError, match="looks at no reference"):
        small(inject="none").start_stream(1, 24, 40, reference=torch.zeros(1, 3, 1, 24, 40))
