"""VideoVAE+'s autoencoder against numbers that the released code gave, and the frozen space that is made of it.

That code is not free to be used here, so what it computes is kept as numbers: a digest of its weights' names and shapes,
and outputs for weights and inputs that anybody can draw again (commit c829d91 of github.com/VideoVerses/VideoVAEPlus).
"""

import hashlib
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from decoders.backbones import videovaeplus_weights as released
from decoders.backbones.videovaeplus import VideoVAEPlusConfig, VideoVAEPlusDecoder, VideoVAEPlusEncoder
from decoders.backbones.videovaeplus_layers import DoubleFrames, EdgeConv3d, TimeAttention
from decoders.latent_spaces.videovaeplus import VideoVAEPlus, VideoVAEPlusSpaceConfig
from experiments.compose import read
from experiments.config import locate

QUARTER = VideoVAEPlusConfig(dim=32, temporal_dim=32)  # norms have 32 groups, so not smaller
TINY = VideoVAEPlusConfig(dim=8, temporal_dim=8, groups=4, channels=4, num_res_blocks=1, max_distance=3)


def drawn(name: str, shape: tuple[int, ...]) -> Tensor:
    """A weight by the release's name: the same on every machine, and of a size that keeps outputs in range."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    if len(shape) > 1:
        return noise / 2 if name.endswith("table") else noise / noise[0].numel() ** 0.5
    return 0.1 * noise + float(name.endswith("weight"))


def made(kind: type, config: VideoVAEPlusConfig) -> nn.Module:
    module = kind(config)
    state = {name: drawn(name, tuple(tensor.shape)) for name, tensor in released.to_released(module).items()}
    return released.fill(module, state, "drawn").requires_grad_(False).eval()


@pytest.fixture(scope="module")
def quarter() -> tuple[VideoVAEPlusEncoder, VideoVAEPlusDecoder]:
    return made(VideoVAEPlusEncoder, QUARTER), made(VideoVAEPlusDecoder, QUARTER)


@pytest.fixture(scope="module")
def tiny() -> tuple[VideoVAEPlusEncoder, VideoVAEPlusDecoder]:
    return made(VideoVAEPlusEncoder, TINY), made(VideoVAEPlusDecoder, TINY)


def random_video(t: int, h: int = 16, w: int = 24, b: int = 1) -> Tensor:
    return torch.rand(b, 3, t, h, w, generator=torch.Generator().manual_seed(t)) * 2 - 1


def random_latent(config: VideoVAEPlusConfig, n: int, b: int = 1) -> Tensor:
    return torch.randn(b, config.channels, n, 2, 3, generator=torch.Generator().manual_seed(n))


# --- the released code's own numbers ----------------------------------------------------------------------------------

# Half -> parameters, and sha256 of the lines "name shape", of what the release with 16 channels has and runs.
RELEASE = {
    "encoder": (160_735_296, "54635f788c55295e7a344d4ba573ea2e58e926f03830f5a168a9b8382d5e1571"),
    "decoder": (225_839_507, "f196e6a175c86a7d07bb82c6430028a9dec2f153e74546e8e4a16b02e91f7cf6"),
}
# Mean, standard deviation and eight values, evenly spread, of what it gives at a quarter of the width.
MEAN = (0.05051, 0.46944, [0.7715, -0.7786, -0.6578, 0.6278, 0.0707, -0.313, 0.1177, 0.22])
LOG_VARIANCE = (-0.14486, 0.58112, [-0.3619, -0.7096, -0.092, -0.7732, 0.2444, 0.5582, -0.6217, 0.722])
TEMPORAL = (-0.16416, 1.01336, [-1.0893, 1.4144, -0.0568, -0.2582, -1.3237, -1.284, -3.0433, 0.062])
VIDEO = (0.02567, 0.56893, [0.0771, 0.3241, -0.4982, 0.1553, -0.2025, 0.1697, 0.1879, -0.173])


def assert_given(x: Tensor, expected: tuple[float, float, list[float]]) -> None:
    mean, std, values = expected
    found = torch.tensor([x.mean(), x.std(), *x.flatten()[:: x.numel() // 8 + 1]])
    torch.testing.assert_close(found, torch.tensor([mean, std, *values]), atol=2e-4, rtol=0)


@pytest.mark.parametrize("half", list(RELEASE))
def test_parameters_are_those_of_the_release(half: str):
    with torch.device("meta"):
        module = (VideoVAEPlusEncoder if half == "encoder" else VideoVAEPlusDecoder)(VideoVAEPlusConfig())
    shapes = {name: tuple(tensor.shape) for name, tensor in released.to_released(module).items()}
    lines = "\n".join(f"{name} {shape}" for name, shape in sorted(shapes.items()))
    count = sum(parameter.numel() for parameter in module.parameters())
    assert (count, hashlib.sha256(lines.encode()).hexdigest()) == RELEASE[half]


def test_encoder_gives_what_the_released_one_gives(quarter):
    mean, log_variance = quarter[0](random_video(8))
    assert_given(mean, MEAN)
    assert_given(log_variance, LOG_VARIANCE)


def test_decoder_gives_what_the_released_one_gives(quarter):
    video, features = quarter[1](random_latent(QUARTER, 2), taps=["temporal"])
    assert_given(features["temporal"], TEMPORAL)
    assert_given(video, VIDEO)


# --- layers ------------------------------------------------------------------------------------------------------------


def test_attention_over_time_is_the_sum_that_its_docstring_says():
    """One pixel, number by number; clips are longer than the distances that the tables tell apart."""
    layer = TimeAttention(4, 1, max_distance=2)
    t, c = 6, 4
    q, k, v = torch.randn(3, 1, t, c)
    with torch.no_grad():
        mixed = layer._mix(q, k, v)
        for i in range(t):
            near = [max(-2, min(2, i - j)) for j in range(t)]
            logits = [
                (q[0, i] @ k[0, j] / c**0.5 + q[0, j] @ layer.keys[2 + near[j]] / c**0.25).item() for j in range(t)
            ]
            weights = torch.tensor(logits).softmax(0)
            expected = sum(weights[j] * (v[0, j] + layer.values[2 - near[j]]) for j in range(t))
            torch.testing.assert_close(mixed[0, i], expected)


def test_doubled_frames_see_themselves_and_the_next():
    up, x = DoubleFrames(2, 3), torch.randn(1, 2, 4, 3, 3)
    with torch.no_grad():
        before, _ = up(x)
        x[:, :, 2] += 1
        changed = (up(x)[0] - before).abs().amax((0, 1, 3, 4)) > 0
    assert changed.tolist() == [False, False, False, True, True, True, False, False]


def test_halved_frames_are_centred_on_every_second():
    down, x = EdgeConv3d(2, 3, halved=True), torch.randn(1, 2, 4, 3, 3)
    with torch.no_grad():
        whole = EdgeConv3d(2, 3)
        whole.load_state_dict(down.state_dict())
        torch.testing.assert_close(down(x)[0], whole(x)[0][:, :, ::2])


# --- the backbone ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 5])
def test_shapes_and_stages(tiny, n: int):
    encoder, decoder = tiny
    names = ["temporal", "conv_in", "mid", "level3", "level2", "level1", "level0", "out"]
    assert list(decoder.stages) == names
    latent = random_latent(TINY, n, b=2)
    video, features = decoder(latent, taps=names)
    assert video.shape == (2, 3, 4 * n, 16, 24)
    assert features["temporal"].shape == (2, 4, 4 * n, 2, 3)
    assert [features[name].shape[1] for name in names[1:]] == [32, 32, 32, 32, 16, 8, 3]
    assert [features[name].shape[3] for name in names[1:]] == [2, 2, 4, 8, 16, 16, 16]
    torch.testing.assert_close(features["out"], video)
    later, _, _ = decoder.run(features["level2"], None, True, stages=("level1", "level0", "out"))
    torch.testing.assert_close(later, video)
    assert torch.equal(decoder.decode(latent), video.clamp(-1, 1))
    mean, log_variance = encoder(video)
    assert mean.shape == log_variance.shape == latent.shape


def test_every_frame_depends_on_every_other(tiny):
    encoder, decoder = tiny
    latent, video = random_latent(TINY, 3), random_video(12)
    for function, x in ((decoder, latent), (lambda clip: encoder(clip)[0], video)):
        before = function(x)
        for frame in (0, x.shape[2] - 1):
            other = x.clone()
            other[:, :, frame] += 0.5
            assert ((function(other) - before).abs().amax((0, 1, 3, 4)) > 1e-6).all()


def test_a_stage_takes_a_single_frame(tiny):
    """As references pass it: each as a clip of its own, whatever else is in the batch."""
    _, decoder = tiny
    references = torch.randn(3, 32, 1, 4, 6)
    together, _ = decoder.stages["level1"](references, None, True)
    assert together.shape == (3, 16, 1, 8, 12)
    apart = torch.cat([decoder.stages["level1"](one, None, True)[0] for one in references.split(1)])
    torch.testing.assert_close(together, apart)
    image, _, _ = decoder.run(together, None, True, stages=("level0", "out"))
    assert image.shape == (3, 3, 1, 8, 12)


def test_there_is_no_stream(tiny):
    _, decoder = tiny
    assert not decoder.can_stream
    with pytest.raises(ValueError, match="cannot stream.*future latent frames"):
        decoder.start_stream(1, 16, 16)


def test_checkpointing_changes_no_gradient():
    for module, x in (
        (made(VideoVAEPlusDecoder, TINY), random_latent(TINY, 2)),
        (made(VideoVAEPlusEncoder, TINY), None),
    ):
        module.requires_grad_(True)

        def gradients(enabled: bool, module=module, x=x) -> list[Tensor]:
            module.set_checkpointing(enabled)
            module.zero_grad()
            out = module(x) if x is not None else torch.cat(module(random_video(4)))
            out.square().mean().backward()
            return [parameter.grad.clone() for parameter in module.parameters() if parameter.grad is not None]

        for plain, again in zip(gradients(False), gradients(True), strict=True):
            assert torch.equal(plain, again)


def test_odd_lengths_are_refused(tiny):
    with pytest.raises(ValueError, match="6 frames.*multiples of 4"):
        tiny[0](random_video(6))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 40}, "dim=40 must be a multiple of groups=32"),
        ({"temporal_dim": 8}, "temporal_dim=8 must be"),
        ({"channels": 0}, "channels is 0; it must be at least 1"),
        ({"dim_mult": (1, 0)}, r"dim_mult is \(1, 0\)"),
        ({"num_halvings": -1}, "num_halvings is -1; it must be at least 0"),
    ],
)
def test_layouts_that_cannot_work_are_refused(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        VideoVAEPlusConfig(**changes)


# --- weights -----------------------------------------------------------------------------------------------------------


def state_of(config: VideoVAEPlusConfig) -> dict[str, Tensor]:
    """The weights of both halves as the release has them, with a convolution that it never runs."""
    state = released.to_released(made(VideoVAEPlusEncoder, config)) | released.to_released(
        made(VideoVAEPlusDecoder, config)
    )
    return {**state, "decoder.mid.block_1.conv3_tmp.conv.bias": torch.ones(1), "loss.logvar": torch.ones(1)}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of the quarter-size layout as the release's: a Lightning checkpoint."""
    path = tmp_path_factory.mktemp("videovaeplus") / "quarter.ckpt"
    torch.save({"epoch": 3, "state_dict": state_of(QUARTER)}, path)
    return path


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_files_give_layout_and_weights(quarter, file: Path, tmp_path: Path, suffix: str):
    if suffix == ".safetensors":
        save_file(state_of(QUARTER), tmp_path / "quarter.safetensors")
        file = tmp_path / "quarter.safetensors"
    for half in quarter:
        again = type(half).from_file(file)
        assert again.config == QUARTER
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), half.parameters(), strict=True))


def test_weights_that_do_not_fit_are_refused():
    state = state_of(TINY)
    decoder = VideoVAEPlusDecoder(TINY)
    moved = state.pop("decoder.conv_out.bias")
    with pytest.raises(ValueError, match=r"here: 1 weights do not fit this layout; decoder.conv_out.bias is missing"):
        released.fill(decoder, state, "here")
    state |= {"decoder.conv_out.bias": moved, "decoder.up.1.attn.0.to_q.weight": moved}  # the release with captions
    with pytest.raises(ValueError, match=r"decoder.up.1.attn.0.to_q.weight is left over"):
        released.fill(decoder, state, "here")
    state.pop("decoder.up.1.attn.0.to_q.weight")
    state["decoder.conv_in.weight"] = state["decoder.conv_in.weight"].transpose(0, 1)
    with pytest.raises(ValueError, match=r"decoder.conv_in.weight is \(4, 32, 1, 3, 3\), expected \(32, 4, 3, 3\)"):
        released.fill(decoder, state, "here")


def test_files_that_cannot_be_used_say_what_to_do(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"no file .*nothing.ckpt; get sota-16z of github.com.*CC BY-NC-ND"):
        VideoVAEPlusDecoder.from_file(tmp_path / "nothing.ckpt")
    torch.save({"state_dict": {"encoder.conv_in.weight": torch.zeros(1)}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"other.ckpt is no VideoVAE\+ autoencoder: decoder.conv_in.weight is missing"):
        VideoVAEPlusDecoder.from_file(tmp_path / "other.ckpt")
    torch.save({"state_dict": {}, "more": TINY}, tmp_path / "pickle.ckpt")
    with pytest.raises(ValueError, match="holds more than tensors"):
        VideoVAEPlusDecoder.from_file(tmp_path / "pickle.ckpt")


# --- the latent space --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def space(file: Path) -> VideoVAEPlus:
    return VideoVAEPlus(VideoVAEPlusSpaceConfig(str(file)))


def test_the_space_is_its_halves(space: VideoVAEPlus, quarter):
    encoder, decoder = quarter
    video = random_video(8, b=2)
    latent = space.encode(video)
    assert latent.shape == (2, 16, 2, 2, 3) and latent.dtype == torch.float32
    torch.testing.assert_close(latent, encoder(video)[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(space.decode(latent), decoder(latent).clamp(-1, 1), atol=1e-4, rtol=0)
    assert torch.equal(latent, torch.cat([space.encode(video[:1]), space.encode(video[1:])]))


def test_lengths_are_multiples_of_four(space: VideoVAEPlus):
    assert not space.causal
    assert [space.latent_frames(t) for t in (4, 16)] == [1, 4] and space.pixel_frames(4) == 16
    for frames, nearest in ((17, "16 or 20"), (6, "4 or 8"), (1, "is 4$")):
        with pytest.raises(ValueError, match=rf"{frames} frames: the VideoVAE\+ space encodes clips of 4k.*{nearest}"):
            space.encode(random_video(frames))
    with pytest.raises(ValueError, match="multiples of 8.*16x24 or 24x24"):
        space.encode(random_video(4, 20, 24))


def test_chunks_are_clips_of_their_own(space: VideoVAEPlus, file: Path):
    chunked = VideoVAEPlus(VideoVAEPlusSpaceConfig(str(file), chunk_frames=8))
    video = random_video(12)
    latent = chunked.encode(video)
    parts = [space.encode(part) for part in video.split(8, 2)]
    assert torch.equal(latent, torch.cat(parts, 2)) and not torch.allclose(latent, space.encode(video), atol=1e-3)
    assert torch.equal(chunked.decode(latent), torch.cat([space.decode(part) for part in parts], 2))
    assert chunked.fingerprint != space.fingerprint
    for wrong, near in ((6, 4), (2, 4), (19, 16)):
        with pytest.raises(ValueError, match=f"chunk_frames is {wrong}; it must be a multiple of 4, such as {near}"):
            VideoVAEPlusSpaceConfig(str(file), chunk_frames=wrong)


def test_both_posteriors_are_drawn(space: VideoVAEPlus, quarter):
    video = random_video(4)

    def draw(seed: int) -> Tensor:
        return space.encode(video, sample=True, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    encoder, generator = quarter[0], torch.Generator().manual_seed(1)
    x = video
    for half in (encoder.encode_frames, encoder.encode_time):
        mean, log_variance = half(x)
        x = mean + (log_variance / 2).exp() * torch.randn(mean.shape, generator=generator)
    torch.testing.assert_close(draw(1), x, atol=1e-4, rtol=1e-4)


def test_the_space_is_frozen_and_never_in_a_checkpoint(space: VideoVAEPlus, file: Path):
    video = random_video(4).requires_grad_()
    assert not space.encode(video).requires_grad
    holder = nn.Module()
    holder.space = space
    assert not list(holder.parameters()) and not holder.state_dict()
    low = VideoVAEPlus(VideoVAEPlusSpaceConfig(str(file), dtype="bfloat16"))
    full, half = space.encode(video), low.encode(video)
    assert half.dtype == torch.float32 and (half - full).square().mean() < 0.01 * full.square().mean()
    assert low.fingerprint == space.fingerprint


def test_missing_and_other_weights_are_refused(file: Path, tmp_path: Path):
    absent = VideoVAEPlus(VideoVAEPlusSpaceConfig(str(tmp_path / "nothing.ckpt")))
    assert (absent.channels, absent.stride_t, absent.stride_hw) == (16, 4, 8)  # enough to show an experiment
    for action in (absent.require, lambda: absent.encode(random_video(4)), lambda: absent.fingerprint):
        with pytest.raises(FileNotFoundError, match="get sota-16z"):
            action()
    other = VideoVAEPlus(VideoVAEPlusSpaceConfig(str(file), channels=4))
    other.require()
    with pytest.raises(ValueError, match=r"\(16, 4, 8\).*set channels to what the file has"):
        other.encode(random_video(4))


def test_the_fragment_names_the_space(monkeypatch: pytest.MonkeyPatch):
    path = Path(__file__).parent.parent / "experiments" / "_videovaeplus.yaml"
    fragment = read(path)
    kind = locate(fragment["latent_space"])
    assert kind is VideoVAEPlus and kind(kind.Config(**fragment["space"])).channels == 16
    assert "CC BY-NC-ND" in path.read_text()
