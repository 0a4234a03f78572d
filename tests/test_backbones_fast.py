"""What is fast equals what is plain: memory layout, enlarging convolutions, norms of few channels, work in place."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from decoders.backbones.staged import StagedDecoder
from decoders.backbones.wan import WanConfig, WanDecoder
from decoders.backbones.wan_layers import ChannelNorm, repeat_and_convolve
from decoders.flash_vaed.wan_student import WanStudent

CLOSE = {"atol": 1e-5, "rtol": 0}
WAN21 = WanConfig(dim=8, channels=4)
WAN22 = WanConfig(dim=8, channels=6, residual=True, patch=2)
OPERATORS = {"mid": "depthwise", "up0": "depthwise", "up1": "depthwise", "up2": "frame", "up3": "frame"}
DECODERS = {
    "wan21": lambda: WanDecoder(WAN21),
    "wan22": lambda: WanDecoder(WAN22),
    "student21": lambda: WanStudent(WAN21, OPERATORS, {"up2": 0.5, "up3": 0.5}),
    "student22": lambda: WanStudent(WAN22, OPERATORS, {"up2": 0.5}),
}


@pytest.fixture(params=list(DECODERS))
def decoder(request) -> StagedDecoder:
    torch.manual_seed(0)
    return DECODERS[request.param]().eval().requires_grad_(False)


def latents(decoder: StagedDecoder, b: int = 1, n: int = 3) -> Tensor:
    return torch.randn(b, decoder.channels, n, 3, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("b", [1, 2])
def test_channels_stay_last_in_memory(decoder, b):
    """One layer that loses the layout makes all later ones slow; it did, for the first frame of one clip."""
    lost, decoder = [], decoder.bfloat16()  # few float32 numbers are convolved by something else, without the layout

    def look(name: str):
        def hook(module, inputs, output) -> None:
            y = output[0] if isinstance(output, tuple) else output
            if y.ndim > 3 and y.shape[1] > 1 and y.stride(1) != 1:
                lost.append(name)

        return hook

    for name, module in decoder.named_modules():
        if name and not name.endswith("stages"):
            module.register_forward_hook(look(name))
    state = decoder.start_stream(b, 3 * decoder.stride_hw, 4 * decoder.stride_hw)
    for frame in latents(decoder, b).unbind(2):
        decoder.step_stream(frame, state)
    decoder(latents(decoder, b))
    assert not lost


def test_layout_of_weights_and_latents_changes_nothing(decoder):
    decoder, z = decoder.double(), latents(decoder).double()
    expected = decoder.decode(z)
    for parameter in decoder.parameters():
        if parameter.ndim > 3:
            last = torch.channels_last if parameter.ndim == 4 else torch.channels_last_3d
            parameter.data = parameter.data.contiguous(memory_format=last)
    torch.testing.assert_close(decoder.decode(z.contiguous(memory_format=torch.channels_last_3d)), expected, **CLOSE)


def test_in_place_is_only_for_what_nobody_sees(decoder):
    """Without gradients layers reuse memory; features, what a stream remembers and what was given stay as they are."""
    z = latents(decoder, b=2)
    names = list(decoder.stages)
    kept = z.clone()
    _, plain = decoder.double()(z.double(), taps=names)  # gradients are on: nothing is in place
    with torch.no_grad():
        _, past, features = decoder.run(decoder.denormalise(z.double()), None, True, names)
        for name in names:
            torch.testing.assert_close(features[name], plain[name], **CLOSE)
        remembered = decoder.run(decoder.denormalise(z.double()), past, False)[0]
        again = decoder.run(decoder.denormalise(z.double()), past, False)[0]
    assert torch.equal(z, kept) and torch.equal(remembered, again)


@pytest.mark.parametrize("size", [(1, 1), (3, 5)])
def test_repeat_and_convolve_is_what_it_says(size):
    generator = torch.Generator().manual_seed(0)
    frames, weight, bias, seen = (
        torch.randn(shape, generator=generator)
        for shape in ((2, 6, *size), (5, 6, 3, 3), (5,), (2, 5, 2 * size[0], 2 * size[1]))
    )

    def run(function) -> list[Tensor]:
        given = [tensor.clone().requires_grad_() for tensor in (frames, weight, bias)]
        y = function(*given)
        (y * seen).sum().backward()
        return [y.detach(), *(tensor.grad for tensor in given)]

    def plain(frames: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv2d(F.interpolate(frames, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)

    for ours, expected in zip(run(repeat_and_convolve), run(plain), strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("channels", [1, 12, 31, 40])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_norm_without_gradient_is_norm_with(channels, layout):
    generator = torch.Generator().manual_seed(0)
    norm = ChannelNorm(channels)
    with torch.no_grad():
        norm.gain.copy_(torch.randn(channels, generator=generator))  # negative ones too
    x = torch.randn(2, channels, 3, 4, 5, generator=generator)
    x[:, :, 0, 0, 0] = 0  # no length
    x = x.contiguous(memory_format=layout)
    expected = x / x.square().sum(1, keepdim=True).clamp_min(1e-24).sqrt() * channels**0.5
    expected = expected * norm.gain.view(-1, 1, 1, 1)
    given = x.clone()
    with torch.no_grad():
        torch.testing.assert_close(norm(x), expected, **CLOSE)
        in_bf16 = norm.bfloat16()(x.bfloat16()).float()
    torch.testing.assert_close(in_bf16, expected, atol=0.02, rtol=0.02)
    assert torch.equal(x, given)
    torch.testing.assert_close(norm.float()(x.requires_grad_()), expected, atol=0.02, rtol=0.02)  # gains were rounded
