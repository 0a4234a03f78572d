"""PSNR by distance from the nearest reference: what a distance is, means clip by clip, and a frame that is broken."""

import json

import pytest

from decoders.base import DECODER, PER_FRAME
from experiments import distance


@pytest.mark.parametrize(
    ("references", "expected"),
    [
        ([1, 0, 0, 0], [0, 1, 2, 3]),
        ([0, 0, 0, 1], [3, 2, 1, 0]),
        ([1, 0, 0, 0, 1], [0, 1, 2, 1, 0]),
        ([0, 1, 0, 0, 0, 1, 0], [1, 0, 1, 2, 1, 0, 1]),
        ([1, 1], [0, 0]),
    ],
)
def test_distance_is_to_the_nearest_reference(references, expected):
    assert distance.distances(references) == expected
    with pytest.raises(ValueError, match="no frame is a reference"):
        distance.distances([0] * len(references))


def rows(method: str, gain: float, references: list[list[int]]) -> list[dict]:
    """Clips whose frames lose 2 dB for each frame of distance, and a little by clip."""
    found = []
    for i, marks in enumerate(references):
        scores = [30 + gain + i - 2 * d for d in distance.distances(marks)]
        found.append(
            {"method": method, "stream": "s", "key": str(i), PER_FRAME: {"psnr": scores, "in_reference": marks}}
        )
    return found


def test_scores_by_distance():
    """First and last, then another frame of each clip: what is averaged is of one distance, clip by clip."""
    marks = [[1, 0, 0, 1], [0, 1, 0, 0], [0, 0, 0, 1]]
    some = rows(DECODER, 0.0, marks) + rows("plain", -0.5, marks)[:2]
    some.append({"method": DECODER, "stream": "images", "key": "0", PER_FRAME: {"psnr": [1.0]}})
    entries = distance.by_distance(some, [DECODER, "plain"])
    own = {e["distance"]: e for e in entries if e["method"] == DECODER and e["minus"] is None}
    assert {d: (e["clips"], round(e["mean"], 6)) for d, e in own.items()} == {
        0: (3, 31), 1: (3, 29), 2: (2, 27.5), 3: (1, 26),
    }  # fmt: skip
    half = 4.303 / 3**0.5  # Student's interval of 30, 31, 32
    assert (own[0]["low"], own[0]["high"]) == pytest.approx((31 - half, 31 + half)) and own[3]["low"] is None
    paired = {e["distance"]: e for e in entries if e["minus"] == "plain"}
    assert {d: (e["clips"], e["mean"], e["low"], e["high"]) for d, e in paired.items() if d < 2} == {
        0: (2, 0.5, 0.5, 0.5), 1: (2, 0.5, 0.5, 0.5),
    }, "on the same clips, so that clips do not blur it"  # fmt: skip
    assert json.loads(json.dumps(entries)) == entries
    text = distance.text(entries)
    assert (
        "## s\n" in text and "images" not in text and "minus its controls" in text and "+0.50 (+0.50 to +0.50)" in text
    )
    assert distance.by_distance(some, ["mean colour"]) == []


def test_a_frame_that_is_not_finite_leaves_its_distance_without_a_mean():
    """And no other; what was decoded for hours is still written."""
    some = rows(DECODER, 0.0, [[1, 0, 0], [1, 0, 0]]) + rows("plain", -0.5, [[1, 0, 0], [1, 0, 0]])
    some[1][PER_FRAME]["psnr"][2] = None
    entries = distance.by_distance(some, [DECODER, "plain"])
    means = {(e["method"], e["minus"], e["distance"]): (e["clips"], e["mean"]) for e in entries}
    assert means[DECODER, None, 2] == means[DECODER, "plain", 2] == (2, None)
    assert means[DECODER, None, 1] == (2, 28.5) and means["plain", None, 2] == (2, 26.0)
    assert json.loads(json.dumps(entries, allow_nan=False)) == entries
    assert distance.text(entries).count("not finite") == 2
