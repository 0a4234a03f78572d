"""The suite's headline: runs of compare_* differ in the decoder and in nothing that would decide between decoders."""

import pytest

from experiments import compose
from experiments.config import load

FAMILIES = ("baseline", "flashdecoder", "flash_vaed", "refdecoder", "regen")
OWN_SPACE = "compare_wanmini_regen_own"  # beside equal ground, marked by its compression


def test_all_families_stand_on_equal_ground() -> None:
    names = {name for name in compose.names() if name.startswith("compare_wanmini_")}
    assert names == {f"compare_wanmini_{family}" for family in FAMILIES} | {OWN_SPACE}


@pytest.mark.parametrize("family", FAMILIES[1:])
def test_nothing_but_the_decoder_differs(family: str) -> None:
    one, other = load(f"compare_wanmini_{FAMILIES[0]}"), load(f"compare_wanmini_{family}")
    assert one.family != other.family
    for part in ("latent_space", "space", "datamodule", "data", "trainer", "validation", "ema", "pad", "seed"):
        assert getattr(one, part) == getattr(other, part), part
    assert one.init_from is None and other.init_from is None, "all of the time is spent in the run itself"
    for setting in ("betas", "warmup_steps", "schedule", "grad_clip"):
        assert getattr(one.optim, setting) == getattr(other.optim, setting), setting
    used = {term: weight for term, weight in other.loss_weights.items() if weight}
    assert used == ({"diffusion": 1.0} if family == "regen" else {"l1": 1.0})


def test_the_own_encoder_differs_in_its_space_alone() -> None:
    one, other = load("compare_wanmini_regen"), load(OWN_SPACE)
    for part in ("trainer", "validation", "ema", "seed", "loss_weights", "objective"):
        assert getattr(one, part) == getattr(other, part), part
    assert one.data.val == other.data.val and one.data.sources == other.data.sources
