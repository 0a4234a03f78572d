"""`make show`: what a run would be, without running it and without its memory."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from experiments import show
from experiments.compose import ConfigError
from experiments.config import build_decoder, build_space, load

ROOT = Path(__file__).parent.parent


def test_show_says_all(debug_name, capsys):
    assert show.main([debug_name, "optim.lr=0.25"]) == 0
    said = capsys.readouterr().out
    assert f"{debug_name}+optim.lr=0.25 (not begun)" in said
    assert re.search(r"^  lr: 0.25$", said, re.MULTILINE)
    assert re.search(r"^trained +\d+\.\d\d$", said, re.MULTILINE)
    assert re.search(r"^  train\.\w+ +\d+x\d+ .* [1-9][\d,]* +\d+ of \d+", said, re.MULTILINE), "clips that survive"
    assert "memory per GPU, estimated" in said


def test_attention_is_counted_place_by_place(monkeypatch):
    """480x832, 17 frames and one reference: the lengths that the released code makes its tables for."""
    monkeypatch.delenv("DATA_ROOT", raising=False)
    experiment = load("refdecoder_wan21_clip17")
    with torch.device("meta"):
        said = show.stream_table(experiment, build_decoder(*_with_space(experiment)))
    assert re.search(r"train.video .* up0 9,360, up1 15,600, up2 28,080 +1 +53,040 ", said)
    decoder = build_decoder(*_with_space(load("refdecoder_debug", ["objective.reference=ends"])))
    assert decoder.tokens(3, 4, 6) == {"up0": 6 * 5, "up1": 6 * 7, "up2": 6 * 11}
    for plain in ("decoder.inject=none", "decoder.inject=controlnet"):
        assert (
            build_decoder(*_with_space(load("refdecoder_debug", ["decoder.zero_init=null", plain]))).tokens(3, 4, 6)
            == {}
        )
    assert build_decoder(*_with_space(load("flashdecoder_debug"))).tokens(3, 4, 6) == {}


def _with_space(experiment):
    return experiment, build_space(experiment)


def test_an_empty_size_is_refused():
    with pytest.raises(ConfigError, match=r"data.train.big: no clip survives"):
        show.main(
            [
                "flashdecoder_demo",
                "data.train=null",
                "data.train.big={sources: [bikes], size: [1088, 1920], share: 1}",
            ]
        )


def test_missing_data_does_not_hide_the_rest(capsys, monkeypatch):
    monkeypatch.delenv("DATA_ROOT", raising=False)
    assert show.main(["flashdecoder_debug", "data.sources.here={path: $DATA_ROOT/k, kind: video}",
                      "data.val.more={sources: [here], size: [32, 48], num_frames: 9}"]) == 0  # fmt: skip
    said = capsys.readouterr().out
    assert re.search(r"^data not found: data.sources.here: .*DATA_ROOT", said, re.MULTILINE)
    assert re.search(r"^  train\.\w+ .* \d+ of \d+", said, re.MULTILINE)
    assert "memory per GPU" in said


def test_missing_terms_are_refused():
    with pytest.raises(ConfigError, match=r"loss_weights.l1 is missing"):
        show.main(["flashdecoder_debug", "loss_weights.l1=null"])


def test_memory_is_counted():
    """By hand: the first layer keeps its input (10 x 8), the ReLU its output (10 x 16), which the last layer shares."""
    with torch.device("meta"):
        network = nn.Sequential(nn.Linear(8, 16, bias=False), nn.ReLU(), nn.Linear(16, 4, bias=False))
    saved, largest, peak = show.fake_steps(network, {"small": (5, 8), "large": (10, 8)}, autocast=False)
    assert saved == {"small": 4 * 5 * (8 + 16), "large": 4 * 10 * (8 + 16)}
    assert largest == "large"
    gradients = 4 * (8 * 16 + 16 * 4)
    assert saved["large"] + gradients / 2 < peak < 3 * (saved["large"] + gradients)


def test_what_automatic_checkpointing_would_do_is_told(runs_root, capsys):
    def told(*overrides: str) -> str:
        assert show.main(["flashdecoder_debug", *overrides]) == 0
        return capsys.readouterr().out

    assert "checkpointing=auto" not in told()
    said = told("trainer.checkpointing=auto", "trainer.memory_gib=0.001")
    assert re.search(r"checkpointing=auto: 0 GiB for activations; .*video .* again", said)
    assert "of 0.001 GiB (given)" in said and "(not begun)" in said
    assert re.search(r"video .* kept", told("trainer.checkpointing=auto", "trainer.memory_gib=100"))


@pytest.mark.slow
def test_references_are_counted():
    """What a step looks at is held too: two references cost more than one, and one more than none."""
    sizes = []
    for choice in ("decoder={inject: none, zero_init: null}", "objective.reference=first", "objective.reference=ends"):
        experiment = load("refdecoder_debug", [choice])
        with torch.device("meta"):
            decoder = build_decoder(*_with_space(experiment))
        saved, _, _ = show.fake_steps(decoder.model, {"s": (1, 12, 3, 4, 6)}, False, decoder.step_inputs)
        sizes.append(saved["s"])
    assert sizes == sorted(set(sizes))


def test_attention_that_begins_local_is_shown(capsys):
    """Its start is computed, and here nothing has values to compute with."""
    assert show.main(["refdecoder_demo"]) == 0
    assert "memory per GPU, estimated" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_show_does_not_allocate_the_model():
    """XL's weights alone are 3 GB; the process stays below that, imports included.

    VmHWM rather than getrusage: a child's ru_maxrss begins at what its parent, here pytest, once held.
    """
    code = (
        "from experiments import show; show.main(['flashdecoder_xl_stage2']);"
        "print('peak', open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert re.search(r"^model +769\.28$", run.stdout, re.MULTILINE)
    assert int(re.search(r"^peak (\d+)$", run.stdout, re.MULTILINE)[1]) < 2000 * 1024
