"""The two sides of a protocol: what was measured is one for a column, how the pixels were made is shown in the row."""

import json

import pytest

from metrics.protocol import Protocol, clip_list_hash, require_same

SETTINGS = {
    "metric": "psnr", "frames": (0, 9), "frame_stride": 1, "size": (32, 48), "resize": "PIL bicubic, crop, centre",
    "clips": clip_list_hash(["a", "b"]), "num_clips": 2, "dtype": "32-true", "latent_space": "wan_mini-1",
    "definition": {"peak": 1.0, "decoding": {"steps": 1}},
}  # fmt: skip
MADE = {
    "dtype": "bf16-mixed",
    "sampler_steps": 4,
    "latent_space": "dct-2",
    "definition": {"peak": 1.0, "decoding": {"steps": 4, "extension": True}},
}
MEASURED = {
    "metric": "ssim", "frames": (1, 9), "frame_stride": 2, "size": (32, 64), "resize": "area", "num_clips": 3,
    "clips": clip_list_hash(["a", "c"]), "definition": {"peak": 2.0, "decoding": {"steps": 1}},
}  # fmt: skip


@pytest.mark.parametrize("name", MADE)
def test_rows_may_differ_in_how_their_pixels_were_made(name):
    ours, theirs = Protocol(**SETTINGS), Protocol(**SETTINGS | {name: MADE[name]})
    assert require_same({"ours": ours, "theirs": theirs}) == ours
    assert ours.differences(theirs) == {} and ours.measured_hash() == theirs.measured_hash()
    assert ours.hash() != theirs.hash() and ours.made() != theirs.made()


@pytest.mark.parametrize("name", MEASURED)
def test_what_was_measured_is_one_for_a_column(name):
    ours, theirs = Protocol(**SETTINGS), Protocol(**SETTINGS | {name: MEASURED[name]})
    field = "definition.peak" if name == "definition" else name
    assert list(ours.differences(theirs)) == [field] and ours.measured_hash() != theirs.measured_hash()
    with pytest.raises(ValueError, match=f"theirs: {field} is"):
        require_same({"ours": ours, "theirs": theirs})


@pytest.mark.parametrize(
    ("frames", "stride", "number"), [((0, 9), 1, 9), ((1, 9), 2, 4), ((1, 8), 2, 4), ((2, 9), None, 7)]
)
def test_another_frame_rate_has_no_stride(frames, stride, number):
    """And results that have one are another column than those without; older ones can still be read."""
    protocol = Protocol(**SETTINGS | {"frames": frames, "frame_stride": stride})
    assert Protocol.from_dict(json.loads(json.dumps(protocol.to_dict()))) == protocol
    assert protocol.num_frames == number
    assert ("frame_stride" in Protocol(**SETTINGS).differences(protocol)) == (stride != 1)
    with pytest.raises(ValueError, match="must be positive"):
        Protocol(**SETTINGS | {"frame_stride": 0})


def test_the_sides_together_are_the_protocol():
    protocol = Protocol(**SETTINGS)
    assert set(MADE) | set(MEASURED) == set(protocol.to_dict())
    assert protocol.made() == {"dtype": "32-true", "latent_space": "wan_mini-1", "steps": 1}
    assert protocol.measured()["definition"] == {"peak": 1.0}
    plain = Protocol(**SETTINGS | {"latent_space": None, "definition": {"peak": 1.0}})
    assert plain.made() == {"dtype": "32-true"} and require_same({"a": protocol, "b": plain}) == protocol
