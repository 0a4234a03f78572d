"""Which run is measured, and which is described beside others: the one that was meant, or an error."""

import pytest

from experiments import compare_runs, evaluate
from experiments.compose import ConfigError
from experiments.config import load, resolved_yaml
from experiments.runs import run_dir
from experiments.train import build

NAME = "refdecoder_debug"


def test_two_runs_that_fit_as_well_are_told(tmp_path, monkeypatch):
    monkeypatch.setenv("RUNS_ROOT", str(tmp_path))
    first, second = "data.val.unseen.num_frames=5", "objective.evaluate=ends"
    run_dir(NAME).mkdir()
    assert evaluate.which_run(NAME, [first, second]) == []
    run_dir(NAME, [first]).mkdir()
    assert evaluate.which_run(NAME, [first, second]) == [first]
    run_dir(NAME, [second]).mkdir()
    with pytest.raises(
        ConfigError, match="evaluate=ends, .*num_frames=5 were trained with some of these overrides each"
    ):
        evaluate.which_run(NAME, [first, second])
    run_dir(NAME, [first, second]).mkdir()
    assert evaluate.which_run(NAME, [first, second]) == [first, second]
    assert evaluate.which_run(NAME, ["data.num_workers=0", first]) == ["data.num_workers=0", first]


def test_a_run_beside_others_is_counted_as_it_was_trained(tmp_path, monkeypatch):
    """Its overrides are in its configuration; the experiment of its name has another number of parameters."""
    monkeypatch.setenv("RUNS_ROOT", str(tmp_path))
    counts = []
    for overrides in ((), ("decoder.blocks=3", "decoder.points=[up1,out]")):
        folder = run_dir(NAME, overrides)
        folder.mkdir()
        experiment = load(NAME, overrides)
        (folder / "config.yaml").write_text(resolved_yaml(experiment))
        counts.append(sum(p.numel() for p in build(experiment).model.parameters()))
        assert compare_runs.decoder_parameters(folder.name)[0] == counts[-1]
    assert counts[0] != counts[1]
