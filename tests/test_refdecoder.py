"""RefDecoder's network: its structure, the plain decoder that it begins as, what training needs of it."""

import pytest
import torch
from refdecoder_small import SPACES, both, clip, small
from torch import nn
from torch.nn import functional as F

from decoders.backbones.staged import StagedDecoder
from decoders.backbones.wan import WanConfig, WanDecoder
from decoders.refdecoder.model import RefDecoderConfig, build_model
from decoders.refdecoder.transformer import Block, default_split, rope_table, rotate


def millions(module: nn.Module) -> str:
    return f"{sum(weight.numel() for weight in module.state_dict().values()) / 1e6:.4g}"


# --- structure --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "channels", "stride_hw", "counts"),
    [
        ("wan21", 16, 8, ["73.3", "36.98", "369.8", "25.96", "25.97", "0.6643"]),
        ("wan22", 48, 16, ["555.1", "36.98", "369.8", "33.03", "33.05", "7.08"]),
        ("videovaeplus", 16, 8, ["225.8", "36.98", "369.8", "201.3", "201.5", "0.05581"]),
    ],
)
def test_parameters_at_full_size(layout, channels, stride_hw, counts):
    with torch.device("meta"):
        model = build_model(RefDecoderConfig(layout=layout), channels, 4, stride_hw)
    gates, blocks = model.injection.gates, model.injection.blocks
    embeds, projections = (nn.ModuleList(getattr(gate, way) for gate in gates) for way in ("embed", "project"))
    parts = (model.backbone, blocks[0][0], blocks, embeds, projections, model.encoder)
    assert [millions(part) for part in parts] == counts
    assert sum(p.numel() for p in blocks[0][0].parameters()) == 36_982_016
    assert all(p.requires_grad for p in model.parameters())
    frozen = model.state_dict().keys() - dict(model.named_parameters()).keys()
    start = "backbone.stages.temporal." if layout == "videovaeplus" else "backbone.stages.conv_in.layers.0."
    assert frozen == {name for name in model.state_dict() if name.startswith(start)} != set()


def test_own_blocks_for_each_point():
    with torch.device("meta"):
        model = build_model(RefDecoderConfig(shared=False), 16, 4, 8)
    assert millions(model.injection.blocks) == "1109"


@pytest.mark.parametrize("layout", ["wan21", "wan22"])
def test_sequence_lengths(layout):
    """Those of the released rotary tables at 480 x 832, the reference included."""
    with torch.device("meta"):
        layout = build_model(
            RefDecoderConfig(layout=layout), *{"wan21": (16, 4, 8), "wan22": (48, 4, 16)}[layout]
        ).layout
    assert layout.sequence_lengths(2, 480, 832) == [4680, 6240, 9360]
    assert layout.sequence_lengths(5, 480, 832) == [9360, 15600, 28080]
    assert layout.sequence_lengths(5, 480, 832, references=3)[2] == 28080 + 2 * 1560


@pytest.mark.parametrize(("patches", "tokens"), [(None, 2), ([1, 2, 4], 3)])
def test_sequences_are_as_long_as_said(monkeypatch, patches, tokens):
    model, seen = small(patches=patches), []
    forward = Block.forward
    monkeypatch.setattr(Block, "forward", lambda self, x, *rest: seen.append(x.shape[1]) or forward(self, x, *rest))
    latent, reference = clip(model, references=2)
    model(latent, reference)
    expected = model.layout.sequence_lengths(2, 8, 24, references=2)
    assert expected == [tokens * 4, tokens * 5, tokens * 7]
    assert seen == [length for length in expected for _ in range(2)]


def test_positions():
    assert default_split(128) == (44, 42, 42)
    table = rope_table((0, 3, -2), 2, 2, (4, 4, 4), torch.device("cpu"))
    x = torch.zeros(1, 12, 1, 12)
    x[..., 0] = 1  # the fastest pair of the time's dimensions is (0, 1)
    angles = torch.tensor([0.0, 3.0, -2.0]).repeat_interleave(4)
    turned = rotate(x, table)[0, :, 0]
    torch.testing.assert_close(turned[:, :2], torch.stack([angles.cos(), angles.sin()], 1))
    assert turned[:, 2:].abs().max() == 0
    # What two tokens make of each other depends on how far apart they are, not on where they stand.
    q, k = torch.randn(2, 1, 12, 1, 12)
    later = rope_table((10, 13, 8), 2, 2, (4, 4, 4), torch.device("cpu"))
    scores = [rotate(q, t)[0, :, 0] @ rotate(k, t)[0, :, 0].T for t in (table, later)]
    torch.testing.assert_close(*scores)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"layout": "wan3"}, "none of wan21, wan22, wan_mini, videovaeplus"),
        ({"blocks": 0}, "blocks=0 must be 1 or more"),
        ({"rope_split": [44, 42, 40]}, "sum to head_dim=128"),
        ({"patches": [2, 4]}, "three numbers"),
        ({"zero_init": True}, "replace the video by zeros"),
        ({"layout": "videovaeplus", "attention": "windowed"}, "set attention=full"),
    ],
)
def test_impossible_architectures_are_refused(config, said):
    with pytest.raises(ValueError, match=said):
        RefDecoderConfig(**config)


def test_a_misspelt_choice_is_refused_in_python_too():
    config = RefDecoderConfig()
    config.residual = "all"  # here the types are checked; elsewhere __post_init__ is all there is
    with pytest.raises(ValueError, match="residual=all is none of none, video, both"):
        config.__post_init__()


def test_another_latent_space_is_refused():
    with pytest.raises(ValueError, match=r"wan22 decodes 4x16x16, the latent space is 4x8x8"):
        build_model(RefDecoderConfig(layout="wan22"), 16, 4, 8)


# --- the plain decoder ------------------------------------------------------------------------------------------------

PLAIN = [
    dict(residual="video"),
    dict(residual="both"),
    dict(residual="video", shared=False),
    dict(residual="both", attention="windowed", window=2),
    dict(inject="controlnet"),
]


@pytest.mark.parametrize(("layout", "changes"), both(list(SPACES), PLAIN))
def test_begins_as_the_plain_decoder_to_the_bit(layout, changes):
    """With and without references; in windowed mode, which runs frame by frame, within rounding."""
    model = small(layout, lively=False, **changes).float()
    latent, reference = (part.float() for part in clip(model))
    pretrained = type(model.backbone)(model.backbone.config)
    model.fill_backbone(pretrained)
    expected = pretrained(latent)
    outputs = [model(latent), model(latent, reference), model(latent, reference.repeat(1, 1, 2, 1, 1))]
    for output in outputs:
        if "attention" in changes:
            torch.testing.assert_close(output, expected, atol=1e-4, rtol=1e-4)
        else:
            assert torch.equal(output, expected)
    assert torch.equal(model(latent, reference, skip=True), expected)


@pytest.mark.parametrize("layout", list(SPACES))
def test_skip_is_the_plain_decoder_and_no_reference_is_not(layout):
    model = small(layout)
    latent, reference = clip(model)
    plain = model.backbone(latent)
    assert torch.equal(model(latent, skip=True), plain)
    alone = model(latent)
    assert (alone - plain).abs().mean() > 1e-2
    assert (alone - model(latent, reference)).abs().mean() > 1e-3


@pytest.mark.parametrize("changes", [{}, dict(inject="controlnet"), dict(inject="none")])
@pytest.mark.parametrize("layout", ["wan22", "videovaeplus"])
def test_decode_is_the_clip_clamped(layout, changes):
    """Although it runs the finest stages a few frames at a time, or all of them."""
    model = small(layout, **changes)
    latent, reference = clip(model, frames=3)
    reference = reference if model.uses_reference else None
    for skip in (False, True):
        video = model(latent, reference, skip=skip).clamp(-1, 1)
        decoded = model.decode(latent, reference, skip=skip)
        torch.testing.assert_close(decoded, video, atol=1e-6, rtol=0)
        assert not decoded.requires_grad


def test_another_pretrained_decoder_is_refused():
    with pytest.raises(ValueError, match=r"no wan21 of this width: \d+ weights do not fit; the first is stages"):
        small().fill_backbone(WanDecoder(WanConfig(dim=16, channels=4)))


def test_inject_none_refuses_references():
    model = small(inject="none")
    latent, reference = clip(model)
    assert torch.equal(model(latent), model.backbone(latent))
    with pytest.raises(ValueError, match="looks at no reference"):
        model(latent, reference)


# --- training ---------------------------------------------------------------------------------------------------------

TRAINED = [
    {},
    dict(residual="both", shared=False),
    dict(residual="video", attention="windowed", window=2),
    dict(inject="controlnet"),
]


@pytest.mark.parametrize(("layout", "changes"), both(list(SPACES), TRAINED))
def test_gradients_reach_all_that_is_trained(layout, changes):
    model = small(layout, **changes)
    latent, reference = clip(model)
    model(latent, reference).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    frozen = {name: weight for name, weight in model.named_buffers() if name in model.state_dict()}
    assert {name.removeprefix("backbone.").startswith(model.layout.frozen) for name in frozen} == {True}
    assert not any(weight.requires_grad or weight.grad is not None for weight in frozen.values())


@pytest.mark.parametrize(("layout", "changes"), both(["wan21"], TRAINED) + both(["videovaeplus"], TRAINED[:1]))
def test_checkpointing_changes_nothing(layout, changes):
    model = small(layout, **changes)
    latent, reference = clip(model)
    results = []
    for enabled in (False, True):
        model.set_checkpointing(enabled)
        model.zero_grad()
        video = model(latent, reference)
        video.square().mean().backward()
        results.append((video.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (video, plain), (again, checkpointed) = results
    assert torch.equal(video, again) and plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, msg=name)


def test_autocast(monkeypatch):
    """Attention in the dtype of autocast; sums and norms hold it near what float32 gives."""
    model = small(residual="both").float()
    latent, reference = (part.float() for part in clip(model))
    seen, attend = set(), F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, *rest: seen.add(q.dtype) or attend(q, *rest))
    with torch.autocast("cpu", torch.bfloat16):
        video = model(latent, reference)
        video.float().square().mean().backward()
    assert seen == {torch.bfloat16}
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_controlnet_adds_the_same_to_every_frame():
    model = small(inject="controlnet")
    _, reference = clip(model, references=2)
    memory = model._begin(reference)
    video = torch.randn(2, 16, 3, 2, 6, dtype=torch.float64)
    added = model.injection.step(1, video, memory)[0] - video
    torch.testing.assert_close(added, added[:, :, :1].expand_as(added))
    # Several references add their mean.
    each = [model._begin(part)[1] for part in reference.split(1, 2)]
    torch.testing.assert_close(memory[1], sum(each) / 2)
    # The branch is a copy of the pretrained stages, but for what a single frame never passes.
    pretrained = WanDecoder(model.backbone.config).double()
    model.fill_backbone(pretrained)
    stages: dict[str, nn.Module] = {name: pretrained.stages[name] for name in ("mid", "up0", "up1")}
    theirs = {name: p for name, p in nn.ModuleDict(stages).named_parameters() if "time_conv" not in name}
    ours = dict(model.injection.stages.named_parameters())
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_stages_are_those_of_the_backbone():
    """Every stage runs once for the video, whatever the layout."""
    for layout in SPACES:
        model = small(layout)
        assert isinstance(model.backbone, StagedDecoder)
        assert [stage for _, stages in model.parts for stage in stages] == list(model.backbone.stages)
