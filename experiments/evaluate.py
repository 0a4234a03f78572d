"""Measure a run on its validation clips: ``python -m experiments.evaluate NAME [key=value ...]``.

    weights    ema, last or best of the run, default EMA if it kept one, else last; start: those that its training starts
               from (objective.start, init_from), for which there need be no run
    sets       evaluation sets by name in place of the validation clips: sets=[inter4k,davis], built in (--sets lists them)
               or the experiment's own, under data.sets

Everything else is an override; :func:`evaluate` says which name another run, and which what a run is measured on. Writes
what ``experiments/summary.py`` says, where some frames were references ``distance.md``, and where clips have categories
``categories.md``. An evaluation that was interrupted goes on when the same command is typed again (``experiments/resumed.py``).
"""

import hashlib
import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning import Callback, Trainer
from torch import Tensor
from tqdm import tqdm

from datamodules import named
from datamodules.batch import VideoBatch
from datamodules.clips import NoOtherClip
from datamodules.config import SourceConfig
from datamodules.faults import Unreachable
from datamodules.loaders import UnreadableClip
from datamodules.quarantine import TooManyBadFiles
from datamodules.sources import SourceError, find
from datamodules.streams import StreamError
from decoders.base import DECODER, Method, VideoDecoder
from decoders.latent_spaces.base import LatentSpace, pad_to_valid
from decoders.latent_spaces.dct import dc_decode
from decoders.scoring import TRUTH
from experiments import categories, distance
from experiments import sets as sets_of
from experiments import weights as weights_of
from experiments.callbacks import Progress
from experiments.compose import ConfigError, run_cli
from experiments.config import Experiment, as_dict, check_own, load, require_paths
from experiments.resumed import Resumed, code, identity
from experiments.runs import CONFIG, LONGEST_NAME, run_dir, run_name
from experiments.sets import another_shape, check_sets, require_sets
from experiments.summary import BY_FRAME, CLIPS, DISTANCE, FRAMES, RESULT, TABLE, summarise, write
from losses.pretrained import WeightsNotFound

__all__ = ["BY_FRAME", "CLIPS", "DISTANCE", "FRAMES", "RESULT", "TABLE", "evaluate", "evaluation_dir", "run"]
MEASURED_ON = (
    "data.",
    "pad=",
    "objective.evaluate",
    "objective.controls",
    "objective.compare_",
    "objective.steps=",
    "objective.extension=",
    "objective.tasks",
    "objective.ahead=",
    "objective.interpolator=",
)  # what a run is measured on, not what it learnt
LEARNT = ("data.train", "data.order")  # of these: nothing but training reads them


def reference_methods(space: LatentSpace) -> dict[str, Method]:
    """What a decoder is held against on the same clips, from nothing learnt to the space's own decoder."""

    def mean_colour(batch: VideoBatch) -> Tensor:
        video = batch["video"]
        return video.mean(dim=(2, 3, 4), keepdim=True).expand_as(video)

    def cell_colour(batch: VideoBatch) -> Tensor:
        t, h, w = batch["video"].shape[2:]
        whole = pad_to_valid(batch["video"], space)
        chunks = whole.split(getattr(space, "chunk", whole.shape[2]), dim=2)
        cells = [dc_decode(chunk, space.stride_t, space.stride_hw, space.causal) for chunk in chunks]
        return torch.cat(cells, dim=2)[:, :, :t, :h, :w]

    def own_decoder(batch: VideoBatch) -> Tensor | None:
        t, h, w = batch["video"].shape[2:]
        video = space.decode(batch["latent"])  # None: what was encoded is not the clip, but every second frame, say
        return video[:, :, :t, :h, :w] if video.shape[2] >= t else None

    def truth(batch: VideoBatch) -> Tensor:
        return batch["video"]

    cell = f"one colour per {space.stride_hw}x{space.stride_hw}x{space.stride_t} cell"
    methods = {TRUTH: truth, "mean colour of the clip": mean_colour, cell: cell_colour}
    return methods | ({f"the {space.name} space's own decoder": own_decoder} if hasattr(space, "decode") else {})


def run(
    trainer: Trainer,
    decoder: VideoDecoder,
    data,
    folder: Path,
    references: bool,
    weights: dict[str, Any],
    about: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Validate, gather the clips of all ranks, and write the files. Returns the result.

    ``weights`` says which were measured: kind, step, file; ``about`` is put into the result. Callbacks of the trainer that are
    :class:`Resumed` have what an interrupted evaluation left. The evaluation that ends a training has none: its weights are in
    memory, and the same command comes back to it anyhow, as the run is not complete before.
    """
    decoder.references = decoder.own_references() | reference_methods(decoder.latent_space) if references else {}
    told_by = {} if decoder.categories else take_categories(decoder)  # else :func:`evaluate` has
    after_training = any(isinstance(callback, Progress) for callback in trainer.callbacks)
    bar = [Bar(0)] if after_training else []  # else :func:`evaluate` chooses
    trainer.callbacks += bar
    trainer.validate(decoder, datamodule=data, verbose=False)
    trainer.callbacks = trainer.callbacks[: len(trainer.callbacks) - len(bar)]
    decoder.references, decoder.categories = {}, None
    rows = [row | {"stream": data.val_names[row["stream"]]} for row in decoder.validation_rows]
    categories.take_listed(rows, data)
    if "sha256" not in weights and (file := folder.parent / weights["file"]).is_file():
        weights = weights | {"sha256": weights_of.sha256(file)}
    result = {"experiment": folder.parent.name, "weights": weights, "code": code()} | (about or {}) | told_by
    result |= summarise(rows, trainer, decoder, data)
    result["distance"] = distance.by_distance(rows, [DECODER, *decoder.own_references()])
    if trainer.is_global_zero:
        write(folder, rows, result, decoder.metric_protocols)
    return result


def take_categories(decoder: VideoDecoder) -> dict[str, Any]:
    """Let the decoder's validation ask CLIP for categories, where ``validation.categories`` names some; what is asked, for the
    result. Raises WeightsNotFound."""
    validation = decoder.training_config.validation
    if not validation.categories:
        return {}
    from metrics.clip import ClipCategories

    classify = ClipCategories(validation.weights["clip"], validation.categories)
    decoder.categories = lambda video: classify(video)  # it is no part of the decoder
    return {"categories_told_by": {"network": classify.fingerprint, "words": validation.categories}}


class SpacesAgree(Callback):
    """Before anything is measured: saved latents among the clips are of the run's own space, as far as they say."""

    def on_validation_start(self, trainer: Trainer, pl_module: VideoDecoder) -> None:
        space = pl_module.latent_space
        for where, found in getattr(trainer.datamodule, "latent_spaces", {}).items():
            if odd := sorted(found.keys() - {"", space.name, space.fingerprint}):
                raise ConfigError(
                    f"{where}: {found[odd[0]]} of its latents are of the space {odd[0]}, and this run decodes {space.name} "
                    f"({space.fingerprint})"
                )


class Bar(Callback):
    """Clips done and time left; where there is no terminal, a line now and then."""

    def __init__(self, done: int) -> None:
        self._done = done
        self._bar: tqdm | None = None

    def on_validation_start(self, trainer: Trainer, pl_module: VideoDecoder) -> None:
        if not trainer.is_global_zero:
            return
        terminal, data = sys.stderr.isatty(), trainer.datamodule
        self._bar = tqdm(
            total=sum(len(stream) for stream in data.streams("val").values()),
            initial=self._done,
            unit="clip",
            mininterval=0.5 if terminal else 20.0,
            maxinterval=0.5 if terminal else 60.0,
            ncols=None if terminal else 120,
        )

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        if self._bar is not None:  # other processes are about as far
            moved = len(outputs["prediction"]) * trainer.world_size
            self._bar.update(min(moved, self._bar.total - self._bar.n))

    def teardown(self, trainer: Trainer, pl_module: VideoDecoder, stage: str) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


@dataclass
class Plan:
    """What is measured, where its run is, and where the results go."""

    experiment: Experiment
    run: str  # the run's name
    home: Path  # the run's folder
    folder: Path


def plan(
    name: str, overrides: Sequence[str] = (), weights: str | None = None, sets: Sequence[str] | None = None
) -> Plan:
    """As for :func:`evaluate`, without doing it. Raises ConfigError for what is no experiment or set."""
    experiment = load(name, overrides, sets or ())
    trained = which_run(name, overrides)
    home = run_dir(name, trained)
    experiment.data.train = {}  # not read, so it need not be there
    if sets is not None:
        experiment.data.val = {named: experiment.data.sets[named] for named in check_sets(name, experiment, sets)}
    measured = [weights] if weights else []
    measured += [f"sets={','.join(experiment.data.val)}"] if sets is not None else []
    measured += _other_metrics(name, experiment, home)
    defined = ("data.sets",) if sets is not None else ()
    others = [text for text in overrides if text not in trained or text.startswith(defined)]
    measured += [more] if (more := run_name("", others, counts=defined)) else []  # last: it may be cut
    return Plan(experiment, run_name(name, trained), home, home / _short("-".join(["evaluation", *measured])))


def evaluation_dir(
    name: str, overrides: Sequence[str] = (), weights: str | None = None, sets: Sequence[str] | None = None
) -> Path:
    """The folder that :func:`evaluate` writes to, given the same; it need not exist. Raises ConfigError."""
    return plan(name, overrides, weights, sets).folder


def evaluate(
    name: str, overrides: Sequence[str] = (), weights: str | None = None, sets: Sequence[str] | None = None
) -> dict[str, Any]:
    """Measure a run's weights (EMA if kept, else last) on its validation clips, or on others.

    Overrides of ``data``, ``pad`` and of what the objective says about evaluation (``MEASURED_ON``) that no run was trained with
    say what the run without them is measured on: ``data.val.unseen.size=[480,832]``. Results of named weights, of other clips or by other
    metrics (``validation.metrics``, ``validation.references``) go to a folder of their own. Interrupted, the same call goes on.

    Args:
        weights: ema, last, best, or start: what training starts from, which needs no run.
        sets: names of ``data.sets`` or of built-in sets (:mod:`datamodules.named`), which take the place of ``data.val``. No file
            of theirs may be unreadable, unless ``data.max_bad_share`` is given.

    Raises:
        ConfigError: no such run, weights, sets or files.
    """
    from experiments.train import build, build_data, build_trainer, quiet

    quiet()
    found = plan(name, overrides, weights, sets)
    experiment, home, folder = found.experiment, found.home, found.folder
    require_sets(experiment, sets or ())
    require_paths(experiment)
    file = weights_of.find(experiment, found.run, weights)
    require_files(experiment)
    experiment.ema = None  # the file holds one set of weights: those are measured
    try:
        decoder = build(experiment)
        decoder.scorer()  # metrics' weights that are missing are told before any work
        told_by = take_categories(decoder)
    except (WeightsNotFound, ValueError) as error:
        raise ConfigError(f"{error}{another_shape(sets, str(error))}") from None
    about = weights_of.fill(decoder, experiment, file, weights)
    about["sha256"] = weights_of.sha256(Path(file)) if file else weights_of.digest(decoder)
    data = build_data(experiment, home)
    trainer = build_trainer(experiment, home, [], find_unused=False)
    trainer.logger = None
    try:
        resumed = Resumed(folder, identity(experiment, decoder, data, about | told_by, trainer))
        resumed.attach(decoder, data)
        trainer.callbacks += [SpacesAgree(), resumed]
        trainer.callbacks += [Bar(len(resumed.done))] if experiment.trainer.progress_bar else []
        said = {"sets": {one: named.read(one).protocol for one in sets if one in named.names()}} if sets else {}
        result = run(trainer, decoder, data, folder, experiment.validation.references, about, said | told_by)
    except (SourceError, StreamError, TooManyBadFiles, Unreachable, UnreadableClip, NoOtherClip) as error:
        raise ConfigError(str(error)) from None
    if trainer.is_global_zero:
        resumed.finish()
        shown = f"distance from the reference: {folder / DISTANCE}\n" if result["distance"] else ""
        print(
            f"{file or about['file']} (step {about['step']})\n\n{(folder / TABLE).read_text()}\n{shown}results: {folder}"
        )
    return result


def which_run(name: str, overrides: Sequence[str]) -> list[str]:
    """Those of the overrides that the run was trained with: of the runs that are there the one that names most of them.

    Raises ConfigError where two runs name as many.
    """
    on = [i for i, text in enumerate(overrides) if text.startswith(MEASURED_ON) and not text.startswith(LEARNT)]
    for number in range(len(on)):
        found: dict[Path, list[str]] = {}
        for left_out in itertools.combinations(on, number):
            kept = [text for i, text in enumerate(overrides) if i not in left_out]
            if (folder := run_dir(name, kept)).is_dir():
                found.setdefault(folder, kept)
        if len(found) > 1:
            raise ConfigError(
                f"{', '.join(folder.name for folder in found)} were trained with some of these overrides each: leave those out "
                "that the run that you mean was not trained with, or move the other runs away"
            )
        if found:
            return next(iter(found.values()))
    return [text for i, text in enumerate(overrides) if i not in on]


def require_files(experiment: Experiment) -> None:
    """Refuse sources that lead nowhere, before a decoder is built. Opens no film. Raises ConfigError."""
    sources = getattr(experiment.data, "sources", {})
    for name in dict.fromkeys(name for stream in experiment.data.val.values() for name in stream.sources):
        if isinstance(sources.get(name), SourceConfig) and sources[name].kind != "procedural":
            try:
                find(name, sources[name])
            except SourceError as error:
                raise ConfigError(str(error)) from None


def _short(folder: str) -> str:
    """A name that file systems take; what is cut off is in its hash."""
    digest = hashlib.sha256(folder.encode()).hexdigest()[:8]
    return folder if len(folder) <= LONGEST_NAME else f"{folder[:LONGEST_NAME]}-{digest}"


def _other_metrics(name: str, experiment: Experiment, home: Path) -> list[str]:
    """How the metrics differ from those that the run itself was measured with (without one: from the experiment's)."""
    kept = home / CONFIG
    own = (yaml.safe_load(kept.read_text()) if kept.is_file() else as_dict(load(name)))["validation"]
    found, now = [], experiment.validation
    if set(now.metrics) != set(own["metrics"]):
        found.append(f"metrics={','.join(now.metrics)}")
    if now.references != own["references"]:
        found.append(f"references={str(now.references).lower()}")
    if now.categories != own.get("categories", []):
        found.append(f"categories={','.join(now.categories)}")
    return found


def main(arguments: list[str]) -> None:
    if not arguments:
        raise ConfigError("name an experiment: make evaluate exp=NAME (make list shows them)")
    if arguments[0] == "--sets":
        print(sets_of.listed())
        return
    name, *rest = arguments
    options = dict(text.split("=", 1) for text in rest if text.startswith(("weights=", "sets=")))
    sets = options.get("sets")
    check_own(rest, ("weights", "sets"))
    wanted = None if sets is None else [one.strip() for one in sets.strip("[]").split(",") if one.strip()]
    overrides = [text for text in rest if not text.startswith(("weights=", "sets="))]
    evaluate(name, overrides, options.get("weights"), wanted)


if __name__ == "__main__":
    run_cli(main)
