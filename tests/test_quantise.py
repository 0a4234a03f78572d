"""`make quantise`: what eight bits cost on a run's weights, with calibrated scales and paired differences."""

import json
import math

import pytest
import torch

from decoders.flashdecoder import bits8
from decoders.inference import optimise
from experiments import quantise
from experiments.compose import ConfigError
from experiments.config import load
from experiments.runs import run_dir
from experiments.train import train

NAME = "flashdecoder_debug"
OVERRIDES = ("trainer.max_steps=2", "trainer.progress_bar=false", "validation.num_shown=0")


@pytest.fixture(scope="module", autouse=True)
def runs(tmp_path_factory):
    """A debug experiment, trained for two steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RUNS_ROOT", str(tmp_path_factory.mktemp("runs")))
        train(load(NAME, OVERRIDES), NAME, OVERRIDES)
        yield


def test_every_form_is_scored_on_the_same_clips_and_scales_are_saved(tmp_path, capsys) -> None:
    quantise.main(
        [NAME, "bits8=mlp,linear", "latents=3", f"out={tmp_path}", f"scales={tmp_path / 'scales'}", *OVERRIDES]
    )
    shown = capsys.readouterr().out
    file = next(tmp_path.glob("quantise-*.json"))
    result = json.loads(file.read_text())
    names = [entry["form"] for entry in result["scores"]]
    assert names[:2] == [quantise.EXACT, quantise.BASE] and len(names) == 6 == len(set(names))
    assert [form["rounded_layers"] for form in result["forms"].values()] == [0, 0, 6, 6, 12, 12]  # three blocks
    assert result["weights"]["kind"] == "ema" and result["calibration"]["num_latents"] == 3
    assert {key.partition("/")[0] for key in result["calibration"]["clips"]} == {"motion", "stills"}
    for entry in result["scores"]:
        assert entry["clips"] == 2 and entry["stream"] == "unseen" and math.isfinite(entry["scores"]["psnr"])
        assert (entry["form"] in shown) and set(entry["minus_bf16"]) == (
            set() if entry["form"] == quantise.BASE else {"psnr", "ssim"}
        )
    # The difference of the means is the mean of the paired differences, and rounding did something.
    scores = {entry["form"]: entry for entry in result["scores"]}
    for name in names[2:]:
        paired = scores[name]["minus_bf16"]["psnr"]
        assert paired["mean"] == pytest.approx(
            scores[name]["scores"]["psnr"] - scores["bf16"]["scores"]["psnr"], abs=1e-6
        )
        assert 0 < abs(paired["mean"]) < 0.5 and paired["low"] < paired["mean"] < paired["high"]
    # What was saved fits the very weights that were scored.
    experiment = load(NAME, OVERRIDES)
    decoder = quantise.build(experiment)
    quantise.weights_of.fill(decoder, experiment, str(run_dir(NAME, OVERRIDES) / "weights-ema.safetensors"), None)
    fast = optimise(decoder.model.to(torch.bfloat16).eval())
    saved = bits8.Calibration.load(tmp_path / "scales" / "int8-mlp.safetensors")
    assert len(list(bits8.rounded_layers(bits8.quantise(fast, "mlp", saved, "int8", emulated=True)))) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name an experiment"),
        ([NAME, "bits8=head", *OVERRIDES], "bits8=head is neither"),
        ([NAME, "latents=0", *OVERRIDES], "latents and clips must be 1 or more"),
        ([NAME, "weights=newest", *OVERRIDES], "weights=newest is none of ema"),
        ([NAME, "trainer.max_steps=77"], "has no weights|no run|not found|is not there|make exp="),
        (["flash_vaed_debug", "weights=start", "out=/dev/null/x"], "results cannot be written to /dev/null/x: "),
        (["flash_vaed_debug", "weights=start"], "has no eight-bit form; FlashDecoder's experiments have"),
    ],
)
def test_what_cannot_work_is_told_before_any_work(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        quantise.main(arguments)
