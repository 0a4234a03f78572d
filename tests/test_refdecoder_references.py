"""RefDecoder's references, and latents that are dropped so that it looks at them."""

from functools import partial

import pytest
import torch
from refdecoder_small import both, clip, small
from torch.nn import functional as F

from decoders.refdecoder.reference import fit

# --- references -------------------------------------------------------------------------------------------------------


def test_references_count_and_their_order_counts():
    model = small(residual="both")
    latent, pair = clip(model, references=2)
    outputs = [model(latent, refs) for refs in (pair[:, :, :1], pair, pair.flip(2), pair[:, :, [0, 0]])]
    for i, one in enumerate(outputs):
        for other in outputs[:i]:
            assert (one - other).abs().max() > 1e-4


@pytest.mark.parametrize("changes", [{}, dict(attention="windowed"), dict(inject="controlnet")])
def test_every_clip_has_its_own_reference(changes):
    model = small(**changes)
    latent, reference = clip(model)
    other = torch.cat([reference[:1], -reference[1:]])
    same, different = (model(latent, reference) - model(latent, other)).abs().amax(dim=(1, 2, 3, 4))
    assert same < 1e-9 < 1e-4 < different


def test_references_are_brought_to_the_clip():
    reference = torch.rand(2, 3, 2, 24, 40) * 2 - 1
    assert fit(reference, 2, (24, 40), (24, 40)) is reference
    # Another size: by area for whole factors, up to what bicubic weights do at edges of a random image.
    large = reference.repeat_interleave(4, 3).repeat_interleave(4, 4)
    resized = fit(large, 2, (24, 40), (24, 40))
    assert resized.shape == reference.shape and resized.abs().max() <= 1
    assert F.mse_loss(resized, reference) < 0.15 * reference.var()
    flat = torch.full((1, 3, 1, 50, 82), 0.25)
    torch.testing.assert_close(fit(flat, 1, (24, 40), (24, 40)), torch.full((1, 3, 1, 24, 40), 0.25))
    stripes = torch.tensor([-1.0, 1.0]).repeat(60).expand(1, 3, 1, 72, 120)  # finer than the clip can show
    assert fit(stripes, 1, (24, 40), (24, 40))[..., 2:-2].abs().max() < 0.05
    edges = torch.tensor([-1.0, 1.0]).repeat_interleave(10).expand(1, 3, 1, 12, 20)  # bicubic weights go beyond them
    assert fit(edges, 1, (24, 40), (24, 40)).abs().max() == 1
    # A clip that is no whole number of latent pixels: its edge goes on.
    padded = fit(reference[..., :20, :36], 2, (20, 36), (24, 40))
    assert torch.equal(padded[..., :20, :36], reference[..., :20, :36])
    assert torch.equal(padded[..., 23, :36], reference[..., 19, :36])
    assert torch.equal(padded[..., :20, 39], reference[..., :20, 35])


def test_a_padded_clip_has_a_padded_reference():
    model = small()
    latent, reference = clip(model)
    cut = reference[..., :6, :18]
    expected = model(latent, fit(cut, 2, (6, 18), (8, 24)))
    assert torch.equal(model(latent, cut), expected)
    assert torch.equal(model(latent, cut, size=(6, 18)), expected)
    double = cut.repeat_interleave(2, 3).repeat_interleave(2, 4)  # only with its size is it known to be one of 6 x 18
    resized = fit(double, 2, (6, 18), (8, 24))
    assert torch.equal(model(latent, double, size=(6, 18)), model(latent, resized))


@pytest.mark.parametrize(
    ("shape", "dtype", "said"),
    [
        (
            (2, 3, 1, 24, 44),
            torch.float32,
            r"24x44 pixels for a clip of 24x40: .* differ by 10 %.* crop it first, to 24x40",
        ),
        ((2, 3, 1, 60, 80), torch.float32, "crop it first, to 48x80"),
        ((2, 1, 1, 24, 40), torch.float32, r"must be \(b, 3, r, h, w\)"),
        ((2, 3, 0, 24, 40), torch.float32, "with r of 1 or more"),
        ((2, 3, 24, 40), torch.float32, r"must be \(b, 3, r, h, w\)"),
        ((1, 3, 1, 24, 40), torch.float32, "1 references for 2 clips"),
        ((2, 3, 1, 24, 40), torch.uint8, r"floats in \[-1, 1\]"),
    ],
)
def test_references_that_do_not_fit_are_refused(shape, dtype, said):
    with pytest.raises(ValueError, match=said):
        fit(torch.zeros(shape, dtype=dtype), 2, (24, 40), (24, 40))


def test_a_wrong_latent_is_refused():
    model = small()
    with pytest.raises(ValueError, match=r"this decoder reads \(b, 4, n, y, x\)"):
        model(torch.zeros(1, 5, 2, 1, 3))


# --- dropped latents --------------------------------------------------------------------------------------------------


DROPPED = [{}, dict(attention="windowed", window=2), dict(inject="controlnet")]


@pytest.mark.parametrize(("layout", "changes"), both(["wan21", "videovaeplus"], DROPPED))
def test_dropped_latents(layout, changes):
    model = small(layout, **changes)
    latent, reference = clip(model)
    shape = (2, *model.keep_shape(*latent.shape[2:]))
    assert shape == (2, 1, 8 if layout == "videovaeplus" else 2, 1, 3)
    run = partial(model, latent, reference)
    torch.testing.assert_close(run(keep=torch.ones(shape)), run(), atol=1e-9, rtol=0)
    # All dropped: nothing of the latents is left, the reference is.
    nothing = run(keep=torch.zeros(shape))
    assert nothing.isfinite().all()
    torch.testing.assert_close(nothing, model(-2 * latent, reference, keep=torch.zeros(shape)), atol=1e-9, rtol=0)
    assert (nothing - model(latent, -reference, keep=torch.zeros(shape))).abs().mean() > 1e-4
    # One mask for all frames, or one for each.
    mask = (torch.rand(2, 1, 1, 1, 3) < 0.5).float()
    torch.testing.assert_close(run(keep=mask), run(keep=mask.expand(shape)), atol=1e-9, rtol=0)
    for wrong in (torch.ones(2, 1, 3, 1, 3), torch.ones(1, 1, 1, 1, 3), torch.ones(2, 1, 1, 3, 3)):
        with pytest.raises(ValueError, match="or with 1 frame for all"):
            model._check_keep(wrong, latent)


def test_latents_are_dropped_behind_the_frozen_convolution():
    """As in the released code: a dropped position is zero there, not the convolution's bias."""
    model = small(inject="none")
    latent, _ = clip(model)
    keep = (torch.rand(2, 1, 2, 1, 3) < 0.5).double()
    pointwise, conv = model.backbone.stages["conv_in"].layers
    x = conv(keep * pointwise(model.backbone.denormalise(latent))[0])[0]
    x, _, _ = model.backbone.run(x, None, True, stages=[name for name in model.backbone.stages if name != "conv_in"])
    torch.testing.assert_close(model(latent, keep=keep.float()), x, atol=1e-9, rtol=0)


@pytest.mark.parametrize("attention", ["full", "windowed"])
def test_references_read_again_at_every_point(attention):
    """Later points see detail that the first, at an eighth of the resolution, gives away."""
    model = small(residual="both", reread=True, attention=attention)
    assert [encoder.fold for encoder in model.rereads] == [4, 2]
    latent, reference = clip(model, frames=3)
    video = model(latent, reference)
    torch.testing.assert_close(model.decode(latent, reference), video.clamp(-1, 1), atol=1e-5, rtol=0)
    video.square().mean().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.rereads.parameters())
    with torch.no_grad():
        model.rereads.requires_grad_(False)
        for encoder in model.rereads:
            encoder.conv.weight.zero_(), encoder.conv.bias.zero_()
    once = small(residual="both", attention=attention)
    once.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("rereads.")})
    torch.testing.assert_close(model(latent, reference), once(latent, reference))
    assert not torch.allclose(model(latent, reference), video)
    with pytest.raises(ValueError, match="reread"):
        small(inject="controlnet", reread=True)
