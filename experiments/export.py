"""A run as a folder that is used without the trainer: ``python -m experiments.export NAME [key=value ...]``.

    make export exp=flashdecoder_demo                              # RUN/exported: config.json, model.safetensors, README.md
    make export exp=NAME out=FOLDER weights=best dtype=bfloat16
    make export exp=NAME hub=user/name private=true licence=apache-2.0    # and sends it to the hub; asks before that
    make export out=FOLDER hub=user/name                           # sends a folder that was exported before

    out        the folder; default: ``exported`` in the run's own, marked with what is not the default of weights and dtype
    weights    ema, last or best of the run, default EMA if it kept one, else last; start: those that its training starts from
    dtype      float32 or bfloat16: what weights are stored in
    licence    of the weights, as the hub spells it (apache-2.0, mit, cc-by-4.0); nothing is sent without one. One that the hub
               has no name for is written into the lines at the top of FOLDER/README.md, and FOLDER sent afterwards
    overwrite  true: replace a folder that was exported before
    hub        user/name: where to send it. The token is HF_TOKEN's, or that of `hf auth login`
    private    true: others cannot see it
    yes        true: send without asking (scripts)

Everything else is an override of the experiment, and part of the run's name as in training. ``decoders.load(FOLDER)`` reads it
again. What was written is reloaded and decodes a latent of noise before the folder gets its name: in float32 it must give the
run's own pixels to the bit. Exit status: 2 for what was asked wrongly, 1 where the copy differs or nothing was sent.
"""

import glob
import json
import os
import platform
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from decoders import exported
from decoders.base import VideoDecoder
from decoders.exported_files import is_export
from decoders.version import VERSION
from experiments import hub, model_card
from experiments import weights as weights_of
from experiments.bench_all import read_options
from experiments.compose import ConfigError, flatten, run_cli
from experiments.config import Experiment, as_dict, check_own, load, require_paths, with_defaults
from experiments.measured import require_folder
from experiments.model_card import EVALUATION
from experiments.runs import CONFIG, DONE, is_neutral, run_dir, run_name
from experiments.train import build, quiet

FILES = (exported.CONFIG, exported.WEIGHTS, exported.CARD, EVALUATION)  # all that an exported folder holds
DECIDES = (
    "family",
    "latent_space",
    "decoder.",
    "space.",
    "objective.",
)  # of a configuration: what the network computes


class ExportFailed(RuntimeError):
    """The exported copy does not do what the run does."""


@dataclass
class ExportConfig:
    """The command's own options."""

    out: str = ""
    weights: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    licence: str = ""
    overwrite: bool = False
    hub: str = ""
    private: bool = False
    yes: bool = False

    def __post_init__(self) -> None:
        weights_of.check_kind(self.weights)
        if self.licence and not model_card.LICENCE.fullmatch(self.licence):
            raise ValueError(
                f"licence={self.licence} is not spelled as the hub does: small letters, digits, dots and hyphens, such as apache-2.0"
            )
        if self.licence == "other":
            raise ValueError(
                "licence=other does not say which: export without a licence, write license: other, license_name and license_link into "
                "the lines at the top of its README.md, then make export out=FOLDER hub=user/name"
            )
        if not self.hub and (self.private or self.yes):
            raise ValueError(f"{'private' if self.private else 'yes'}=true says how to send: name where, hub=user/name")


def export(name: str, overrides: Sequence[str] = (), config: ExportConfig | None = None) -> Path:
    """Write the run's decoder, its card and its scores to a folder, whole or not at all, and return that folder.

    Raises:
        ConfigError: no such run or weights, a folder that is taken, or one that cannot be written.
        ExportFailed: read back, the copy does not decode as the run does.
    """
    config = config or ExportConfig()
    quiet()
    experiment, home = load(name, overrides), run_dir(name, overrides)
    out = Path(config.out).expanduser().absolute() if config.out else home / _default_name(config)
    check_place(out, config.overwrite)
    file = weights_of.find(experiment, run_name(name, overrides), config.weights)
    if config.weights != weights_of.START:
        check_as_trained(experiment, home)
    require_folder(out.parent)
    decoder, weights = _decoder(load(name, overrides), file, config.weights)
    scores = model_card.evaluations(home, weights, file)
    about = _about(name, experiment, home, weights, scores, config)
    stage = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        for left in out.parent.glob(f".{glob.escape(out.name)}.*.tmp"):  # of an export that was killed
            shutil.rmtree(left)
        exported.save(stage, decoder, about, dtype=getattr(torch, config.dtype))
        model = exported.load(stage)
        print(compare(decoder, model, exact=config.dtype == "float32"), flush=True)
        if scores:
            (stage / EVALUATION).write_text(json.dumps(scores, indent=1, allow_nan=False) + "\n")
        facts = model_card.Facts.of(name, overrides, experiment, model, home, scores)
        (stage / exported.CARD).write_text(
            model_card.card(facts, where=config.hub or out.name, on_hub=bool(config.hub))
        )
        _put(stage, out)
    except exported.ExportError as error:
        raise ConfigError(str(error)) from None
    except OSError as error:
        raise ConfigError(
            f"{out} cannot be written: {error.strerror or error}; choose another with out=FOLDER"
        ) from None
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    print(f"{file or weights['file']} (step {weights['step']}) -> {out}\n{_listed(out)}")
    return out


def _default_name(config: ExportConfig) -> str:
    marks = [config.weights or "", config.dtype if config.dtype != "float32" else ""]
    return "-".join(["exported", *filter(None, marks)])


def check_place(out: Path, overwrite: bool) -> None:
    """Raise ConfigError unless ``out`` can become the folder: nothing is there, or an export that may be replaced."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"out={out} is a file; name a folder")
    there = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    if not there:
        return
    strangers = [file for file in there if file not in FILES]
    if strangers or not is_export(out):
        raise ConfigError(f"out={out} holds {(strangers or there)[0]}, and is no exported decoder; name another folder")
    if not overwrite:
        raise ConfigError(f"{out} is there already; overwrite=true replaces it, out=FOLDER writes another")


def check_as_trained(experiment: Experiment, home: Path) -> None:
    """Raise ConfigError where the run's network was another one than this configuration's: weights may fit and yet mean
    something else (a window, a number of steps)."""
    kept = home / CONFIG
    if not kept.is_file():
        return
    old, new = (
        flatten(side) for side in (with_defaults(yaml.safe_load(kept.read_text()), experiment), as_dict(experiment))
    )
    for key in sorted(old.keys() | new.keys()):
        if key.startswith(DECIDES) and not is_neutral(key) and old.get(key) != new.get(key):
            raise ConfigError(
                f"{home.name} was trained with {key}={json.dumps(old.get(key))}, and the experiment now says "
                f"{json.dumps(new.get(key))}: give what it was trained with, {key}=... in the experiment's file"
            )


def _decoder(experiment: Experiment, file: str | None, kind: str | None) -> tuple[VideoDecoder, dict[str, Any]]:
    """The decoder with the weights of ``file``, ready to infer, and which they are. The run's data need not be there."""
    experiment.data.train, experiment.data.val = {}, {}
    require_paths(experiment)
    experiment.ema = None  # the file holds one set of weights
    decoder = build(experiment)
    weights = weights_of.fill(decoder, experiment, file, kind)
    return decoder.eval(), weights


def _about(
    name: str,
    experiment: Experiment,
    home: Path,
    weights: dict[str, Any],
    scores: list[dict[str, Any]],
    config: ExportConfig,
) -> dict[str, Any]:
    """What ``config.json`` tells of the weights; nothing of the machine that they were made on."""
    finished = (home / DONE).is_file() and config.weights != weights_of.START
    return {
        "experiment": name,
        "weights": {
            "kind": weights["kind"],
            "step": weights["step"],
            "max_steps": experiment.trainer.max_steps,
            "finished": finished,
        },
        "licence": config.licence or None,
        "scores": model_card.brief(scores),
        "versions": {"latent-to-pixel": VERSION, "torch": torch.__version__, "python": platform.python_version()},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


@torch.no_grad()
def compare(decoder: VideoDecoder, copy: exported.Exported, *, exact: bool) -> str:
    """Decode one latent of noise with ``decoder``, which is frozen for it, and with its ``copy``; a line on how they agree.

    Frozen, because torch's matmul folds batches by whether a weight requires a gradient, even where none is taken, and
    so rounds otherwise (regen_debug, two clips: 6e-8): what is asked here is whether the copy is whole.

    Raises:
        ExportFailed: ``exact``, and a pixel differs; or one of them is not finite where the other is.
    """
    space = decoder.requires_grad_(False).latent_space
    side = 2 * decoder.size_multiple
    n, y = space.latent_frames(space.padded_frames(1 + space.stride_t)), side // space.stride_hw
    noise = torch.Generator().manual_seed(0)
    latent = torch.randn(1, space.channels, n, y, y, generator=noise)
    given = {"reference": torch.randn(1, 3, 1, side, side, generator=noise).clamp(-1, 1)} if copy.uses_reference else {}
    ours, theirs = (
        one.decode(latent, generator=torch.Generator().manual_seed(1), **given).float() for one in (decoder, copy)
    )
    told = f"read back: {n} latent frames of {y}x{y} decode"
    if ours.shape == theirs.shape and torch.equal(ours, theirs):
        return f"{told} to the same pixels, to the bit"
    if exact or ours.shape != theirs.shape or not bool(theirs.isfinite().all()):
        raise ExportFailed(
            f"what was written does not decode as the run does ({tuple(ours.shape)} and {tuple(theirs.shape)}"
            + (f", {(ours - theirs).abs().max():.3g} apart" if ours.shape == theirs.shape else "")
            + "); nothing is exported. This is an error of the exporter: please report it"
        )
    return f"{told} to pixels that differ by at most {(ours - theirs).abs().max() * 127.5:.2g} of 255 from those of float32"


def _put(stage: Path, out: Path) -> None:
    """``stage`` in the place of ``out``, which is absent, empty, or an earlier export."""
    old = out.with_name(f".{out.name}.{os.getpid()}.old.tmp")
    if out.exists():
        os.rename(out, old)
    os.rename(stage, out)
    shutil.rmtree(old, ignore_errors=True)


def _listed(folder: Path) -> str:
    parts = [folder / part for part in FILES if (folder / part).is_file()]
    return "\n".join(f"  {part.name:18}{hub.size(part.stat().st_size)}" for part in parts)


def main(arguments: list[str]) -> int:
    own = {field.name for field in fields(ExportConfig)}
    names = [text for text in arguments if "=" not in text]
    typed = [text for text in arguments if text.partition("=")[0] in own]
    overrides = [text for text in arguments if "=" in text and text not in typed]
    check_own(overrides, own)
    config = read_options(typed, ExportConfig)
    if len(names) > 1 or (not names and not (config.out and config.hub)):
        raise ConfigError(
            "name one experiment: make export exp=NAME; or a folder to send: make export out=FOLDER hub=user/name"
        )
    if not names and (given := [*overrides, *(text for text in typed if text.startswith(("weights=", "dtype=")))]):
        raise ConfigError(f"{given[0]}: without exp=NAME the folder {config.out} is sent as it is")
    if config.hub:
        hub.check_asked(config.hub, config.yes)
        if names and not config.licence:
            raise ConfigError(
                "licence=... is needed to send weights: the one that they are given under, such as licence=apache-2.0; weights "
                "that began as somebody else's have theirs (README, Licences)"
            )
    try:
        folder = export(names[0], overrides, config) if names else _as_sent(Path(config.out), config)
        if config.hub:
            return 0 if hub.send(folder, FILES, config.hub, private=config.private, yes=config.yes) else 1
    except (ExportFailed, hub.NotSent) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _as_sent(folder: Path, config: ExportConfig) -> Path:
    """``folder``, an export with a card that states a licence. Raises ConfigError where it is none."""
    try:
        exported.load(folder)
    except exported.ExportError as error:
        raise ConfigError(str(error)) from None
    path = folder / exported.CARD
    stated = model_card.licence_of(path.read_text()) if path.is_file() else None
    if not stated:
        raise ConfigError(f"{path} states no licence: write it into the lines at its top, such as license: apache-2.0")
    if config.licence not in ("", stated):
        raise ConfigError(f"licence={config.licence}, and {path} says {stated}: change it there")
    return folder


if __name__ == "__main__":
    run_cli(main)
