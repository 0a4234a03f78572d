"""The optimised backbones equal the plain ones: in float32, in bf16 to within rounding, as streams, without side effects."""

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from decoders.backbones import fast as fast_module
from decoders.backbones.fast import FastStaged
from decoders.backbones.fast_layers import WinogradConv
from decoders.backbones.ltx import LTXConfig, LTXDecoder
from decoders.backbones.magvit2 import Magvit2Config, Magvit2Decoder
from decoders.backbones.staged import StagedDecoder
from decoders.backbones.videovaeplus import VideoVAEPlusConfig, VideoVAEPlusDecoder
from decoders.backbones.wan import WanConfig, WanDecoder
from decoders.flash_vaed.wan_student import WanStudent
from decoders.inference import InferenceOptions, optimise
from decoders.layers import deployed, frames, native
from decoders.layers.frames import FrameConv, FramePool, NormSilu, write
from decoders.layers.winograd import convolve, transformed_weight

WAN21 = WanConfig(dim=16, channels=4, num_res_blocks=1)
WAN22 = WanConfig(dim=16, channels=6, residual=True, patch=2, num_res_blocks=1)
SMALL_LTX = {"widths": (32, 32, 16), "blocks": (1, 1, 1), "upsample": (True, True), "channels": 16, "patch": 2}
SMALL_LTX |= {"factors": (1, 1), "residual": (False, False), "noise": (False,) * 3}
MODULATED = SMALL_LTX | {"widths": (64, 32, 16), "factors": (2, 2), "residual": (True, True), "modulated": True}
MAGVIT2 = Magvit2Config(channels=16, res_blocks=1, multipliers=[1, 2], strides=["222", "122"], latent_channels=4)
DECODERS = {
    "wan21": lambda: WanDecoder(WAN21),
    "wan22": lambda: WanDecoder(WAN22),
    "student": lambda: WanStudent(WAN21, {"up0": "depthwise", "up2": "frame"}, {"up2": 0.5}),
    "ltx": lambda: LTXDecoder(LTXConfig(**SMALL_LTX)),
    "ltx_modulated": lambda: LTXDecoder(LTXConfig(**MODULATED)),
    "ltx_causal": lambda: LTXDecoder(LTXConfig(**SMALL_LTX, causal=True)),
    "magvit2": lambda: Magvit2Decoder(MAGVIT2),
    "magvit2_chunks": lambda: Magvit2Decoder(Magvit2Config(**vars(MAGVIT2) | {"chunk": 3, "pad_t": "zeros"})),
}
STREAMS = [name for name in DECODERS if name not in ("ltx", "ltx_modulated")]
FAST = InferenceOptions(fast_convolutions=True)
needs_kernels = pytest.mark.skipif(bool(native.missing()), reason=f"C++ kernels: {native.missing()}")


def make(name: str, dtype: torch.dtype = torch.float32) -> StagedDecoder:
    torch.manual_seed(0)
    decoder = DECODERS[name]().eval().requires_grad_(False)
    for parameter in decoder.parameters():
        if parameter.ndim < 4:  # gains, biases and shifts that do something
            parameter.add_(0.1 * torch.randn_like(parameter))
    return decoder.to(dtype)


def latents(decoder: nn.Module, b: int = 2, n: int = 4, seed: int = 0) -> Tensor:
    noise = torch.randn(b, decoder.channels, n, 5, 3, generator=torch.Generator().manual_seed(seed))
    return noise.bfloat16().float()  # the same for both precisions


def error(video: Tensor, truth: Tensor) -> float:
    return float((video.float() - truth).square().mean().sqrt())


# ---- the kernels


@needs_kernels
@pytest.mark.parametrize("winograd", [False, True])
@pytest.mark.parametrize(
    "shape", [(1, 16, 3, 1, 1, 1), (2, 32, 20, 5, 7, 3), (1, 48, 96, 8, 13, 4), (2, 16, 64, 3, 4, 10)]
)
def test_frames_convolve_whole_numbers_exactly(shape, winograd):
    """Small whole numbers, and quarters of them, are exact in bf16: so is every product and sum, whatever the order."""
    b, c, o, h, w, t = shape
    generator = torch.Generator().manual_seed(0)
    x, residual = (torch.randint(-1, 2, (b, n, h, w, k), generator=generator) for n, k in ((t + 2, c), (t, o)))
    weight = torch.randint(-1, 2, (o, c, 3, 3, 3), generator=generator) * (torch.rand(o, c, 1, 1, 1) < 0.2)
    bias = torch.randint(-3, 4, (o,), generator=generator)
    pool = FramePool()
    frames = write(x.bfloat16(), pool)
    conv = FrameConv(weight.float(), bias.float(), winograd)
    expected = F.conv3d(x.movedim(-1, 1).float(), weight.float(), bias.float(), padding=(0, 1, 1)).movedim(1, -1)
    assert expected.abs().max() <= 256  # whole numbers that bf16 holds
    past = tuple(frames[:2])
    assert torch.equal(conv(frames[2:], past, (h, w)).float(), expected)
    added = conv(frames[2:], past, (h, w), residual.bfloat16())
    assert torch.equal(added.float(), (expected + residual).bfloat16().float())
    begun = conv(frames, (None, None), (h, w)).float()  # no frames before: zeros
    padded = F.conv3d(F.pad(x.movedim(-1, 1).float(), (1, 1, 1, 1, 2, 0)), weight.float(), bias.float()).movedim(1, -1)
    assert torch.equal(begun, padded)


@needs_kernels
@pytest.mark.parametrize("centred", [False, True])
def test_norm_and_silu_on_frames(centred):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 4, 5, 32, generator=generator).mul(8).bfloat16()
    x[0, 0, 0, 0] = 0  # no length
    x[0, 0, 0, 1, 0] = 3e38
    gain, shift = torch.randn(2, 32, generator=generator).mul(20)
    frames = NormSilu(gain, shift, 1e-8 * 32, centred)(x, FramePool())
    y = x.double() - (x.double().mean(-1, keepdim=True) if centred else 0)
    y = y / (y.square().sum(-1, keepdim=True) + 1e-8 * 32).sqrt() * gain + shift
    inside = torch.stack([frame[:, 1:5, 1:6] for frame in frames], 1)
    rounded = F.silu(y)
    usual = torch.ones(2, 3, 4, 5, dtype=torch.bool)
    usual[0, 0, 0, 1] = False  # its square is beyond float32
    torch.testing.assert_close(inside[usual].double(), rounded[usual], atol=1e-5, rtol=2**-8)
    assert not any(
        frame[:, 0].any() or frame[:, :, 0].any() or frame[:, 5:].any() or frame[:, :, 6:].any() for frame in frames
    )
    x[1, 2, 3, 4, 5] = float("nan")
    assert NormSilu(gain, shift, 1e-8, centred)(x, FramePool())[2][1, 4, 5].isnan().all()  # not hidden


@pytest.mark.parametrize("size", [(1, 1), (4, 6), (5, 3)])
def test_winograd_in_torch_is_the_convolution(size):
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((2, 6, 5, *size), (7, 6, 3, 3, 3), (7,)))
    expected = F.conv3d(x, weight, bias, padding=(0, 1, 1))
    torch.testing.assert_close(convolve(x, transformed_weight(weight), bias), expected, atol=2e-5, rtol=1e-5)


def test_frames_in_use_are_not_given_out():
    pool = FramePool()
    kept = pool.take(1, 4, 4, 16)
    other = pool.take(1, 4, 4, 16)
    assert other is not kept and pool.take(1, 4, 5, 16).shape != kept.shape
    address = other.data_ptr()
    del other
    assert pool.take(1, 4, 4, 16).data_ptr() == address
    view = pool.take(1, 4, 4, 16)
    assert view.data_ptr() == address and view is not kept


# ---- decoders


@pytest.mark.parametrize("name", DECODERS)
def test_float32_is_equal(name):
    decoder = make(name)
    z = latents(decoder)
    expected = decoder.decode(z)
    torch.testing.assert_close(optimise(decoder).decode(z), expected, atol=1e-5, rtol=0)
    fast = optimise(decoder, FAST)
    torch.testing.assert_close(fast.decode(z), expected, atol=5e-5, rtol=0)
    assert fast.kernels == "torch" and any(isinstance(module, WinogradConv) for module in fast.modules())
    assert torch.equal(decoder.decode(z), expected)


@needs_kernels
@pytest.mark.parametrize("name", DECODERS)
def test_bf16_is_equal_within_rounding(name):
    """Against float32 on the same weights: no further from it than plain bf16; with fewer products at most 1.6 times."""
    decoder = make(name, torch.bfloat16)
    z = latents(decoder)
    truth = copy.deepcopy(decoder).float().decode(z)
    plain = error(decoder.decode(z.bfloat16()), truth)
    lossless, fast = optimise(decoder), optimise(decoder, FAST)
    assert lossless.kernels == fast.kernels == "frames"
    assert 0 < error(lossless.decode(z.bfloat16()), truth) < 1.1 * plain
    assert 0 < error(fast.decode(z.bfloat16()), truth) < 1.6 * plain


def test_videovaeplus():
    torch.manual_seed(0)
    config = VideoVAEPlusConfig(dim=8, dim_mult=(1, 2), num_res_blocks=1, temporal_dim=8, groups=4, num_halvings=1)
    decoder = VideoVAEPlusDecoder(config).eval().requires_grad_(False)
    z = torch.randn(1, decoder.channels, 2, 3, 3)
    torch.testing.assert_close(optimise(decoder).decode(z), decoder.decode(z), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="no convolution that would gain"):
        optimise(decoder, FAST)


@needs_kernels
@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("options", [InferenceOptions(), FAST], ids=["plain", "fast"])
def test_streams_do_not_disturb_each_other(name, options):
    decoder = optimise(make(name, torch.bfloat16), options)
    a, b = (latents(decoder, b=1, seed=seed).bfloat16() for seed in (1, 2))
    size = (5 * decoder.stride_hw - 1, 3 * decoder.stride_hw - 2)
    alone = decoder.decode(a)[..., : size[0], : size[1]]
    one, two = decoder.start_stream(1, *size), decoder.start_stream(1, *size)
    parts = []
    for first, second in zip(a.unbind(2), b.unbind(2), strict=True):
        decoder.step_stream(second, two)
        parts.append(decoder.step_stream(first, one))
        before = copy.copy(one)  # a state that was kept goes on from where it was
        parts_again = decoder.step_stream(first, before)
        assert torch.equal(decoder.step_stream(first, copy.copy(one)), decoder.step_stream(first, copy.copy(one)))
        assert parts_again.shape[-2:] == size
    assert torch.equal(torch.cat(parts, 2), alone)
    assert decoder.end_stream(one).shape == (1, 3, 0, *size)
    with pytest.raises(ValueError, match="has ended"):
        decoder.step_stream(a[:, :, 0], one)


@needs_kernels
def test_a_hundred_steps_hold_no_more_than_three():
    decoder = optimise(make("wan21", torch.bfloat16), FAST)
    state = decoder.start_stream(1, 16, 16)
    frame = torch.randn(1, 4, 2, 2).bfloat16()

    def frames() -> int:
        return sum(map(len, decoder.network.frame_pool._frames.values()))

    held = []
    for _ in range(100):
        decoder.step_stream(frame, state)
        held.append((state.num_bytes(), frames()))
    assert held[2:] == [held[2]] * 98
    decoder.end_stream(state)
    assert frames() == 0 and state.num_bytes() == 0


@pytest.mark.parametrize("name", ["wan21", "ltx"])
def test_uint8(name):
    decoder = make(name)
    z = latents(decoder, b=2)
    video, frames = optimise(decoder).decode(z), optimise(decoder, InferenceOptions(uint8=True)).decode(z)
    assert frames.dtype == torch.uint8 and frames.shape == (*video.movedim(1, -1).shape,) and frames.is_contiguous()
    assert torch.equal(frames, ((video + 1) * 127.5).round().to(torch.uint8).movedim(1, -1))
    if decoder.can_stream:
        fast = optimise(decoder, InferenceOptions(uint8=True))
        state = fast.start_stream(2, 5 * 8, 3 * 8)
        assert torch.equal(fast.step_stream(z[:, :, 0], state), frames[:, :1])
        assert fast.end_stream(state).shape == (2, 0, 40, 24, 3)


def test_the_source_stays_as_it_is():
    decoder = make("wan22", torch.bfloat16)
    before, strides = copy.deepcopy(decoder.state_dict()), [p.stride() for p in decoder.parameters()]
    fast = optimise(decoder, FAST)
    fast.decode(latents(decoder).bfloat16())
    after = decoder.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert strides == [p.stride() for p in decoder.parameters()]
    assert not any(parameter.requires_grad for parameter in fast.parameters()) and not fast.training
    decoder.train().requires_grad_(True)
    decoder.float()(latents(decoder)).sum().backward()  # can be trained on


@pytest.mark.parametrize("option", [{"bits8": "mlp"}, {"attention": "math"}])
def test_options_of_others_are_refused(option):
    with pytest.raises(ValueError, match="takes compile, graphs, uint8 and fast_convolutions"):
        optimise(make("wan21"), InferenceOptions(**option))
    with pytest.raises(ValueError, match="cannot stream"):
        optimise(make("ltx")).start_stream(1, 8, 8)


def test_without_a_compiler(monkeypatch):
    """No C++ compiler, or none of the instructions: the same by torch, and it says so."""
    monkeypatch.setattr(native, "compiler", lambda: None)
    native.library.cache_clear()
    decoder = make("wan21", torch.bfloat16)
    fast = optimise(decoder, FAST)
    assert isinstance(fast, FastStaged) and fast.kernels == "torch" and fast.reason
    z = latents(decoder)
    truth = copy.deepcopy(decoder).float().decode(z)
    assert error(fast.decode(z.bfloat16()), truth) < 4 * error(decoder.decode(z.bfloat16()), truth)
    with pytest.raises(RuntimeError, match="cannot run"):
        native.library(frames.SOURCE)
    native.library.cache_clear()


class Replayed:
    """What a captured graph is, without a GPU: every replay runs the function on the same tensors."""

    def __init__(self, function, device) -> None:
        self.function, self.output = function, function().clone()  # a warm-up leaves its traces in the buffers

    def replay(self) -> Tensor:
        return self.output.copy_(self.function())


@pytest.mark.parametrize("name", ["wan21", "wan22", "magvit2_chunks"])
def test_steps_by_graph(name, monkeypatch):
    """Buffers that two streams share in turns, sizes that come and go; the graph itself is the GPU's test."""
    monkeypatch.setattr(fast_module, "capture", Replayed)
    monkeypatch.setattr(fast_module, "MAX_GRAPHS", 1)
    decoder = make(name)
    fast = FastStaged(decoder, InferenceOptions(graphs=False))
    fast.network.advance = fast._replay
    a, b = (latents(decoder, b=1, n=7, seed=seed) for seed in (1, 2))
    size = (5 * decoder.stride_hw, 3 * decoder.stride_hw)
    one, two = fast.start_stream(1, *size), fast.start_stream(1, *size)
    parts: list[list[Tensor]] = [[], []]
    for number, (first, second) in enumerate(zip(a.unbind(2), b.unbind(2), strict=True)):
        parts[0].append(fast.step_stream(first, one))
        if number == 4:
            saved = copy.deepcopy(one)
            again = fast.step_stream(a[:, :, 5], saved)  # from the same point a second time
            fast.decode(latents(decoder, b=1)[..., :4, :])  # another size takes the graph's place
        if number != 5:
            parts[1].append(fast.step_stream(second, two))
    assert fast._graphs and all(isinstance(graph.captured, Replayed) for graph in fast._graphs.values())
    torch.testing.assert_close(torch.cat(parts[0], 2), decoder.decode(a), atol=1e-5, rtol=0)
    torch.testing.assert_close(parts[0][5], again, atol=1e-5, rtol=0)
    expected = decoder.decode(torch.cat([b[:, :, :5], b[:, :, 6:]], 2))
    torch.testing.assert_close(torch.cat(parts[1], 2), expected, atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("name", "backend"), [("ltx", "inductor"), ("wan21", "aot_eager"), ("wan22", "aot_eager"), ("magvit2", "aot_eager")]
)
def test_compiled_without_breaks(name, backend, monkeypatch):
    """With ``aot_eager`` all is traced as for the compiler, and C++ is neither written nor compiled, which takes minutes."""
    monkeypatch.setattr(deployed.torch, "compile", partial(torch.compile, backend=backend))
    decoder = make(name)
    z = latents(decoder)
    compiled = optimise(decoder, InferenceOptions(compile=True, fast_convolutions=name == "wan21"))
    torch.testing.assert_close(compiled.decode(z), decoder.decode(z), atol=5e-5, rtol=0)
