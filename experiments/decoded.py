"""Frames of chosen clips as an evaluation saw them: the truth, the run's decoder, and the other methods it was held against.

What a report shows and what people vote on. Weights, seeds and code path are those of ``experiments.evaluate``, on one device.
The PSNR of every method that was decoded is compared with its row in the evaluation's ``clips.csv``, and other pixels are refused.
Not checked: a method without a PSNR there (measured without that metric, or not at all), and differences below 0.05 dB, which
another device or thread count makes too. Frames are kept in the evaluation's folder, one file per clip and method, under the weights
and the latent space that made them, and are read back by memory map.
"""

import csv
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from lightning import Callback, Trainer
from torch import Tensor

from datamodules.batch import VideoBatch
from decoders.base import DECODER, VideoDecoder
from decoders.scoring import TRUTH
from experiments import compare_runs, evaluate
from experiments import weights as weights_of
from experiments.callbacks import to_uint8
from experiments.checkpoints import write_atomically
from experiments.compose import ConfigError
from experiments.config import Experiment, require_paths

Frames = UInt8[np.ndarray, "t h w 3"]
Clips = dict[str, dict[str, Frames]]  # clip -> method -> its frames
FOLDER = "frames"  # in the evaluation's folder
ABOUT = "about.json"
FLOORS = ("mean colour of the clip", "one colour per ")  # scored, and nothing to look at
SAME_DB = 0.05  # PSNR of decoded frames and of the evaluation's row may differ by so much: another thread count, another batch


def decode(
    run: str, stream: str, keys: Sequence[str], sets: Sequence[str] | None = None, overrides: Sequence[str] = ()
) -> Clips:
    """Clip -> method -> frames of an evaluated run: ``truth``, ``decoder`` and the run's other methods.

    Args:
        run: as `make compare` takes it: a folder's name under ``RUNS_ROOT``, ``NAME:best``, ``NAME:start``.
        keys: clips of ``stream``, as in the evaluation's ``clips.csv``. Those that are in the cache are not decoded again.
        sets: the named evaluation sets that were measured; None: the validation clips.
        overrides: those of the evaluation.

    Returns:
        RGB as bytes, scored frames only, read-only memory maps. A method that has no meaning for a clip is absent.

    Raises:
        ConfigError: no such run, weights, stream or clip; or these are not the pixels that were evaluated.
    """
    found, kind = plan(run, sets, overrides), compare_runs.split(run)[1]
    home = found.folder
    rows = scored_methods(home, run)
    if missing := [key for key in keys if (stream, key) not in rows]:
        raise ConfigError(f"{run}: its evaluation ({home}) has no clip {missing[0]!r} of {stream!r}")
    file = weights_of.find(found.experiment, found.run, kind)
    weights = weights_of.sha256(Path(file)) if file else _scored_start(run, home)
    made_by = hashlib.sha256(f"{weights} {_space(home)}".encode()).hexdigest()[
        :16
    ]  # what was trained on is decoded anew
    places = {key: home / FOLDER / made_by / _slug(stream, key) for key in keys}
    wanted = [key for key in keys if not (places[key] / ABOUT).is_file()]
    if wanted:
        _decode(found, file, kind, stream, {key: places[key] for key in wanted}, weights)
        if odd := [key for key in wanted if not (places[key] / ABOUT).is_file()]:
            raise ConfigError(f"{run}: {stream} has no clip {odd[0]!r} any more: files came or went; evaluate it again")
    for key in keys:
        _check_same(run, places[key], {method: scores.get("psnr") for method, scores in rows[stream, key].items()})
    return {key: _read(places[key]) for key in keys}


def plan(run: str, sets: Sequence[str] | None = None, overrides: Sequence[str] = ()) -> evaluate.Plan:
    """What the evaluation that comparisons show of ``run`` measures, and where it is. Raises ConfigError: no such run."""
    compare_runs.require_trained(run)
    kind = compare_runs.split(run)[1]
    found = evaluate.plan(compare_runs.stem(run), [*compare_runs.overrides_of(run), *overrides], kind, sets)
    plain = sets is None and not overrides and kind is None
    return replace(found, folder=found.home / "evaluation") if plain else found


def scored_clips(home: Path, run: str) -> dict[tuple[str, str], dict[str, float]]:
    """(stream, key) -> metric -> score of the decoder, from the evaluation in ``home``. Raises ConfigError without one."""
    return {clip: methods[DECODER] for clip, methods in scored_methods(home, run).items() if DECODER in methods}


def scored_methods(home: Path, run: str) -> dict[tuple[str, str], dict[str, dict[str, float]]]:
    """(stream, key) -> method -> metric -> score, from the evaluation in ``home``. Raises ConfigError without one."""
    path = home / evaluate.CLIPS
    if not path.is_file():
        raise ConfigError(
            f"{run} has not been evaluated ({path} is not there); make evaluate exp={compare_runs.stem(run)}"
        )
    about = ("stream", "key", "method")
    found: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            scores = {
                name: number for name, v in row.items() if name not in about and (number := _number(v)) is not None
            }
            found.setdefault((row["stream"], row["key"]), {})[row["method"]] = scores
    return found


def _number(text: str | None) -> float | None:
    """A cell of a table; None for an empty one, or for what is no number."""
    try:
        return float(text or "")
    except ValueError:
        return None


def _result(home: Path) -> dict[str, Any]:
    path = home / evaluate.RESULT
    return json.loads(path.read_text()) if path.is_file() else {}


def _scored_start(run: str, home: Path) -> str:
    """The digest of the weights that ``NAME:start`` was evaluated with: they are in no file of ours."""
    found = _result(home).get("weights", {}).get("sha256")
    if not found:
        raise ConfigError(
            f"{run}: its evaluation ({home}) does not say which weights it started from; "
            f"make evaluate exp={compare_runs.stem(run)} weights=start"
        )
    return found


def _space(home: Path) -> list[str]:
    """Fingerprints of the latent spaces that the evaluation's columns name."""
    protocols = _result(home).get("protocols", {}).values()
    return sorted({str(protocol.get("latent_space", "")) for protocol in protocols})


def _decode(
    found: evaluate.Plan, file: str | None, kind: str | None, stream: str, places: dict[str, Path], weights: str
) -> None:
    """Decode the clips of ``places`` as an evaluation does, and keep their frames there."""
    from experiments.train import build, build_data, build_trainer, quiet

    quiet()
    experiment, validation = found.experiment, found.experiment.validation
    require_paths(experiment)
    evaluate.require_files(experiment)
    experiment.ema = None  # the file holds one set of weights
    validation.metrics, validation.best, validation.categories = ["psnr"], "psnr", []  # all that the check needs
    # A few clips, and one process that knows all of them.
    experiment.trainer.devices, experiment.trainer.num_nodes, experiment.trainer.strategy = 1, 1, "auto"
    decoder = build(experiment)
    weights_of.fill(decoder, experiment, file, kind)
    if not file and weights_of.digest(decoder) != weights:
        raise ConfigError(
            f"{found.run} starts from other weights now than were evaluated; make evaluate exp={found.run} weights=start measures "
            "again"
        )
    data = build_data(experiment, found.home)
    keeper = Keeper(places)
    decoder.wanted = lambda index, key: data.val_names[index] == stream and key in places
    # Nothing else is read; controls that take another clip read it by themselves (ClipData.another_clip).
    data.wanted = lambda name, beginning: name == stream and any(_begins(key, beginning) for key in places)
    decoder.references = {name: keeper.watched(name, method) for name, method in _methods(decoder, experiment).items()}
    decoder.references[TRUTH] = keeper.truth
    trainer = build_trainer(experiment, found.home, [evaluate.SpacesAgree(), keeper], find_unused=False)
    trainer.logger = None
    trainer.validate(decoder, datamodule=data, verbose=False)
    psnr: dict[str, dict[str, float]] = {}
    for row in decoder.validation_rows:
        psnr.setdefault(row["key"], {})[row["method"]] = row["psnr"]
    for key, methods in psnr.items():
        keeper.close(key, methods)


def _begins(key: str, beginning: str) -> bool:
    """Whether a clip's key is ``name#start`` or that and how it was cut."""
    return key == beginning or key.startswith(f"{beginning}@")


def _methods(decoder: VideoDecoder, experiment: Experiment) -> dict[str, Any]:
    """What the evaluation held the decoder against, less what shows nothing."""
    if not experiment.validation.references:
        return {}
    methods = decoder.own_references() | evaluate.reference_methods(decoder.latent_space)
    return {name: method for name, method in methods.items() if not name.startswith(FLOORS)}


class Keeper(Callback):
    """Writes the frames of a validation as they come, so that no more than a batch is in memory."""

    def __init__(self, places: dict[str, Path]) -> None:
        self.places = places
        self._files: dict[str, dict[str, str]] = {key: {} for key in places}
        self._batch: VideoBatch | None = None  # as the decoder was given it

    def truth(self, batch: VideoBatch) -> None:
        """A method that is not scored: it keeps the truth, and which clips are being decoded."""
        self._batch = batch
        self._keep(TRUTH, batch["video"], batch)

    def watched(
        self, name: str, method: Callable[[VideoBatch], Tensor | None]
    ) -> Callable[[VideoBatch], Tensor | None]:
        """``method``, whose frames are kept."""

        def run(batch: VideoBatch) -> Tensor | None:
            if (video := method(batch)) is not None:
                self._keep(name, video, batch)
            return video

        return run

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: VideoDecoder, outputs, batch, batch_idx, dataloader_idx=0
    ) -> None:
        if self._batch is not None:
            self._keep(DECODER, outputs["prediction"], self._batch)
            self._batch = None

    def _keep(self, method: str, video: Tensor, batch: VideoBatch) -> None:
        if len(video) != len(batch["key"]):
            raise ValueError(f"{method}: {len(video)} videos for {len(batch['key'])} clips")
        supervised = batch["supervised"][0] if "supervised" in batch else slice(None)  # frames beside have no target
        for index, key in enumerate(batch["key"]):
            if key in self.places:
                name = f"{len(self._files[key])}.npy"
                frames = to_uint8(video[index][:, supervised].float().cpu()).numpy()
                write_atomically(self.places[key] / name, lambda path, frames=frames: _save(path, frames))
                self._files[key][method] = name

    def close(self, key: str, psnr: dict[str, float | None]) -> None:
        """All of the clip's frames are written; ``psnr`` by method, None where it has none."""
        about = json.dumps({"key": key, "psnr": psnr, "files": self._files[key]}, indent=1)
        write_atomically(self.places[key] / ABOUT, lambda path: path.write_text(about))


def _save(path: Path, frames: Frames) -> None:
    with open(path, "wb") as file:
        np.save(file, frames)


def _read(place: Path) -> dict[str, Frames]:
    files = json.loads((place / ABOUT).read_text())["files"]
    order = sorted(files, key=lambda method: (method != TRUTH, method != DECODER))
    return {method: np.load(place / files[method], mmap_mode="r", allow_pickle=False) for method in order}


def _check_same(run: str, place: Path, scored: dict[str, float | None]) -> None:
    about = json.loads((place / ABOUT).read_text())
    for method, now in about["psnr"].items():
        then = scored.get(method)
        if then is None or now is None or math.isclose(now, then, abs_tol=SAME_DB):
            continue
        shutil.rmtree(place)
        what = "decodes" if method == DECODER else f"by {method} decodes"
        raise ConfigError(
            f"{run}: {about['key']} {what} to {now:.2f} dB and was evaluated at {then:.2f} dB: these are not the pixels that "
            "were scored (other weights, another precision or device?); evaluate the run again here"
        )


def _slug(stream: str, key: str) -> str:
    """A folder name for a clip, whatever its key holds."""
    plain = "".join(c if c.isalnum() else "-" for c in os.path.basename(key))[:40]
    return f"{plain}-{hashlib.sha256(f'{stream}/{key}'.encode()).hexdigest()[:12]}"
