"""The suite's headline: runs of compare_* differ in the decoder and in nothing that would decide between decoders."""

import dataclasses

import pytest

from experiments import compose
from experiments.config import load

SCRATCH = ("baseline", "flashdecoder", "regen")
STARTED = ("flash_vaed", "refdecoder", "refdecoder_plain")  # from wan_mini's decoder
OWN_SPACE = "compare_wanmini_regen_own"  # beside equal ground, marked by its compression


def test_all_families_stand_on_equal_ground() -> None:
    names = {name for name in compose.names() if name.startswith("compare_wanmini_")}
    assert names == {f"compare_wanmini_{family}" for family in SCRATCH + STARTED} | {OWN_SPACE}


@pytest.mark.parametrize("family", SCRATCH[1:] + STARTED)
def test_nothing_but_the_decoder_and_its_start_differs(family: str) -> None:
    one, other = load(f"compare_wanmini_{SCRATCH[0]}"), load(f"compare_wanmini_{family}")
    assert one.family != other.family
    for part in ("latent_space", "space", "datamodule", "data", "trainer", "validation", "ema", "pad", "seed"):
        assert getattr(one, part) == getattr(other, part), part
    assert one.init_from is None and other.init_from is None, "what a run learnt before is named by its start alone"
    for setting in ("betas", "warmup_steps", "schedule", "grad_clip", "weight_decay"):
        assert getattr(one.optim, setting) == getattr(other.optim, setting), setting
    used = {term: weight for term, weight in other.loss_weights.items() if weight}
    assert used == ({"diffusion": 1.0} if family == "regen" else {"l1": 1.0})
    start = getattr(other.objective, "start", None)
    assert (start is not None) == (family in STARTED), "who starts from a trained decoder stands in the second group"


def test_the_own_encoder_differs_in_its_space_alone() -> None:
    one, other = load("compare_wanmini_regen"), load(OWN_SPACE)
    for part in ("trainer", "validation", "ema", "seed", "loss_weights", "objective"):
        assert getattr(one, part) == getattr(other, part), part
    assert one.data.val == other.data.val and one.data.sources == other.data.sources
    (mine,), (theirs,) = one.data.train.values(), other.data.train.values()
    assert theirs.num_frames == mine.num_frames + 1, "two whole chunks of five frames, in place of nine frames"
    assert dataclasses.replace(theirs, num_frames=mine.num_frames) == mine
