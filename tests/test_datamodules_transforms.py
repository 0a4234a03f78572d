"""Geometry and resizing against numbers worked out by hand."""

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.procedural import draw_frames
from datamodules.transforms import TooSmall, cover, crop_frames, fits, plan_geometry, resize_frames, to_video


@pytest.mark.parametrize(
    ("frame", "size", "expected"),
    [
        ((720, 1280), (480, 832), (480, 853)),  # the shorter side decides
        ((272, 640), (96, 96), (96, 226)),
        ((960, 540), (480, 832), None),  # upright: 540 < 832 would have to be enlarged
        ((960, 540), (96, 176), (313, 176)),  # upright film, wide target: the width decides
        ((1080, 1920), (1080, 1920), (1080, 1920)),
        ((144, 176), (144, 176), (144, 176)),
        ((480, 853), (480, 832), (480, 853)),
        ((479, 853), (480, 832), None),
    ],
)
def test_cover(frame, size, expected):
    if expected is None:
        with pytest.raises(TooSmall):
            cover(frame, size)
        assert not fits(*frame, size, "crop")
    else:
        assert cover(frame, size) == expected
        assert fits(*frame, size, "crop")


def test_fits_many_frames_at_once():
    height, width = np.array([480, 960, 479, 2000]), np.array([832, 540, 900, 600])
    assert fits(height, width, (480, 832), "crop").tolist() == [True, False, False, False]
    assert fits(height, width, (480, 832), "keep").tolist() == [True, True, False, True]


def test_centre_and_random_crops():
    centre = plan_geometry((720, 1280), (480, 832))
    assert (centre.resized, centre.offset, centre.size) == ((480, 853), (0, 10), (480, 832))
    corners = [plan_geometry((720, 1280), (480, 832), "crop", "random", (0.0, u)).offset for u in (0.0, 0.9999)]
    assert corners == [(0, 0), (0, 21)], "first and last of 22 places"


def test_resize_modes():
    assert plan_geometry((720, 1280), (512, 512), "stretch").resized == (512, 512)
    assert plan_geometry((720, 1280), (512, 512), "crop", "resize").resized == (512, 512)
    keep = plan_geometry((720, 1280), (480, 480), "keep", multiple=16)
    assert (keep.resized, keep.size, keep.offset) == ((480, 853), (480, 848), (0, 2))
    native = plan_geometry((720, 1280), (512, 512), "none")
    assert (native.resized, native.offset, native.size) == ((720, 1280), (104, 384), (512, 512))
    assert plan_geometry((336, 596), (480, 832), "enlarge").resized == (480, 832)
    assert fits(336, 596, (480, 832), "enlarge") and not fits(336, 596, (480, 832), "stretch")
    for mode in ("stretch", "none", "keep"):
        with pytest.raises(TooSmall):
            plan_geometry((300, 400), (512, 512), mode)


def test_geometry_names_are_unique():
    places = [plan_geometry((60, 80), (32, 32), mode, "random", (u, v))
              for mode in ("crop", "none") for u in (0.0, 0.5) for v in (0.0, 0.3, 0.9)]  # fmt: skip
    assert len({str(place) for place in places}) == len(set(places))


def test_resizing_is_pils_bicubic_and_antialiased():
    frames = draw_frames(0, 0, [0, 3], (90, 120))
    small = resize_frames(frames, (30, 40))
    expected = np.asarray(Image.fromarray(frames[1]).resize((40, 30), Image.Resampling.BICUBIC))
    assert np.array_equal(small[1], expected)
    # A one-pixel chequerboard must become grey. Without antialiasing it becomes black and white again.
    board = np.indices((90, 120)).sum(0) % 2 * 255
    board = np.repeat(board[None, :, :, None], 3, 3).astype(np.uint8)
    inner = resize_frames(board, (30, 40))[0, 2:-2, 2:-2].astype(float)
    assert abs(inner.mean() - 127.5) < 2 and inner.std() < 6
    assert resize_frames(frames, (90, 120)) is frames, "nothing to do, nothing done"


def test_values_and_axes():
    frames = np.zeros((2, 3, 4, 3), np.uint8)
    frames[1, 2, 3] = (255, 51, 0)
    video = to_video(crop_frames(frames, plan_geometry((3, 4), (3, 2), "none", "random", (0.0, 0.99))))
    assert video.shape == (3, 2, 3, 2) and video.dtype == torch.float32
    assert torch.allclose(video[:, 1, 2, 1], torch.tensor([1.0, -0.6, -1.0]))
    assert video.min() == -1 and (video[:, 0] == -1).all()


def test_procedural_motion_is_determined_by_its_arguments_and_moves():
    frames = draw_frames(3, 5, [4, 5, 6], (40, 60))
    assert frames.shape == (3, 40, 60, 3) and frames.dtype == np.uint8
    assert np.array_equal(frames[1], draw_frames(3, 5, [5], (40, 60))[0]), "no frame needs the ones before it"
    for other in (draw_frames(4, 5, [4], (40, 60)), draw_frames(3, 6, [4], (40, 60))):
        assert np.abs(other[0].astype(int) - frames[0]).mean() > 5
    for a, b in zip(frames, frames[1:], strict=False):
        assert np.abs(a.astype(int) - b).mean() > 0.3
    assert frames.std() > 15, "there is something to see"
