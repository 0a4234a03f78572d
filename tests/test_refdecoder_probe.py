"""Options that the probe found to matter: other points than the layout's own, and features without their constants."""

import pytest
import torch
from refdecoder_small import clip, small

from decoders.backbones.wan import LAYOUTS, WAN21
from decoders.refdecoder import layouts

FINE = dict(points=["up1", "up2", "out"], patches=[2, 4, 8], residual="both")


def test_left_alone_nothing_changes():
    """Named or not, the layout's own points are the same, and there are no norms on Wan."""
    own, named = small(), small(points=["up0", "up1", "up2"])
    assert own.layout == named.layout
    named.load_state_dict(own.state_dict())
    latent, reference = clip(own)
    assert torch.equal(own(latent, reference), named(latent, reference))
    assert not any("norm_video" in name for name in own.state_dict())
    videovaeplus = small("videovaeplus", points=["level1", "level0", "out"])
    assert videovaeplus.layout == small("videovaeplus").layout


@pytest.mark.parametrize("name", ["wan21", "wan22"])
def test_channels_and_cells_are_the_stages(name):
    """Every point says what really arrives there: without this a gate could not take it."""
    every = ["up0", "up1", "up2", "up3", "out"]
    model = small(name, points=every, residual="both", reread=True)
    latent, reference = clip(model, frames=3)
    x, seen = model.backbone.denormalise(latent), []
    for number, stages in model.parts:
        if number is not None:
            seen.append((x.shape[1], latent.shape[3] * model.stride_hw // x.shape[3], x.shape[2]))
        x, _, _ = model.backbone.run(x, None, True, stages=stages)
    assert seen == [(p.channels, p.cell, model.layout.frames_at(p, 3)) for p in model.layout.points]
    assert model(latent, reference).shape[-1] == reference.shape[-1]
    assert [p.channels for p in layouts.wan(LAYOUTS[name], every).points] == {
        "wan21": [384, 192, 192, 96, 96],
        "wan22": [1024, 1024, 1024, 512, 256],
    }[name]


@pytest.mark.parametrize("attention", ["full", "windowed"])
@pytest.mark.parametrize("changes", [FINE, FINE | {"point_norms": "channel", "reread": True}])
def test_points_at_full_resolution(attention, changes):
    """Begins as the plain decoder, decodes as it trains, and every new weight learns."""
    model = small(lively=False, attention=attention, **changes)
    latent, reference = clip(model, frames=3)
    plain = model(latent, skip=True)
    for given in (reference, None):  # a window runs frame by frame, which rounds otherwise
        torch.testing.assert_close(model(latent, given), plain, atol=0 if attention == "full" else 1e-5, rtol=0)
    model = small(attention=attention, **changes)
    video = model(latent, reference)
    torch.testing.assert_close(model.decode(latent, reference), video.clamp(-1, 1), atol=1e-5, rtol=0)
    video.square().mean().backward()
    new = {n: p for n, p in model.named_parameters() if n.startswith(("encoder.", "rereads.", "injection."))}
    idle = [name for name, p in new.items() if p.grad is None or p.grad.abs().sum() == 0]
    assert not idle


def test_norms_take_constants_away():
    """A constant on every channel, however large, changes no token of the video; the residual keeps it."""
    point = layouts.wan(WAN21).points[2]
    model = small(point_norms="channel", residual="both")
    gate, channels = model.injection.gates[2], model.layout.points[2].channels
    assert gate.norm_video.num_groups == gate.norm_reference.num_groups == channels and point.before == "up2"
    with torch.no_grad():
        gate.norm_video.eps = 0.0
        x = torch.randn(1, channels, 2, 8, 8, dtype=torch.float64)
        shifted = 3 * x + 100 * torch.randn(1, channels, 1, 1, 1, dtype=torch.float64)
        torch.testing.assert_close(gate.video_tokens(shifted), gate.video_tokens(x))
        assert not torch.allclose(small(residual="both").injection.gates[2].video_tokens(shifted), gate.video_tokens(x))


def test_one_reference_does_not_change_anothers_norm():
    gate = small(point_norms="channel", residual="both").injection.gates[0]
    pair = torch.randn(1, gate.norm_reference.num_channels, 2, 2, 2, dtype=torch.float64)
    changed = pair.clone()
    changed[:, :, 1] *= 9
    assert torch.equal(gate.reference_tokens(pair)[:, 0], gate.reference_tokens(changed)[:, 0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"points": ["up9"]}, "no place before up9; there are up0, up1"),
        ({"points": ["out", "up0"]}, "in the order up0, up1"),
        ({"points": ["up0", "up0"]}, "each once"),
        ({"points": []}, "must name a stage"),
        ({"points": ["up0"], "inject": "controlnet"}, "set null"),
        ({"points": ["up0", "out"], "patches": [1, 2, 4]}, r"as many numbers as points \(2\)"),
    ],
)
def test_bad_points(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)
