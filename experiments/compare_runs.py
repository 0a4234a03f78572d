"""What a comparison tells of a run besides its scores: how it was trained, from what, at what cost, how large it is.

All is read from the run's folder: its configuration, ``done.json`` or the last checkpoint, and its weights' metadata. A name is a
folder's, and may say which weights: ``NAME:best``. ``NAME:start`` is what the experiment NAME starts from, which needs no run.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open

from experiments import compose
from experiments import weights as weights_of
from experiments.checkpoints import LAST, Checkpoints
from experiments.compose import ConfigError, flatten
from experiments.config import Experiment, as_dict, build_decoder, build_space, load, with_defaults
from experiments.runs import CONFIG, DONE, WEIGHTS, find_parent, is_neutral, run_name, runs_root
from experiments.show import count_parameters

PARTS = ("family", "decoder", "objective", "latent_space", "space", "init_from", "pad", "seed")


def split(name: str) -> tuple[str, str | None]:
    """The run's folder, and which of its weights are meant; None: EMA if it kept one, else last."""
    run, _, kind = name.partition(":")
    return run, kind or None


def folder_of(name: str) -> Path:
    """The run's folder; for ``NAME:start`` it need not exist."""
    return runs_root() / split(name)[0]


def config(name: str) -> dict[str, Any]:
    """The configuration that the run was trained with; the experiment's own where there is no run."""
    path = folder_of(name) / CONFIG
    return yaml.safe_load(path.read_text()) if path.is_file() else as_dict(load(stem(name), overrides_of(name)))


def require_trained(name: str, finished: bool = False) -> None:
    """Raise ConfigError, with the command, for a run without weights (``finished``: that has not come to its end)."""
    run, kind = split(name)
    weights_of.check_kind(kind)
    if kind == weights_of.START:
        load(stem(name), overrides_of(name))  # a typo is told now
        return
    folder = runs_root() / run
    done, there = (folder / DONE).is_file(), any((folder / f"weights-{kind}.safetensors").is_file() for kind in WEIGHTS)
    if finished and not done:
        raise ConfigError(f"{name} has not been trained to its end under {runs_root()}; make exp={stem(name)}")
    if not (folder / CONFIG).is_file() or not there:
        find_parent(run)  # says what is missing, or which name was meant
        raise ConfigError(f"{name} has no {CONFIG} in {folder}; first make exp={stem(name)}")


def stem(name: str) -> str:
    """The experiment's name in a run's name."""
    return split(name)[0].partition("+")[0]


def as_trained(name: str, overrides: Sequence[str] = ()) -> Experiment:
    """The experiment as the run was trained: its overrides are part of what it is, and its folder's name may be cut.

    ``overrides`` come last: what an evaluation changes of how it decodes (``objective.steps=4``).
    """
    if not (folder_of(name) / CONFIG).is_file():
        return load(stem(name), [*overrides_of(name), *overrides])
    kept = config(name)
    parts = {part: kept[part] for part in PARTS if part in kept}
    return load(stem(name), [*(f"{key}={json.dumps(value)}" for key, value in flatten(parts).items()), *overrides])


def overrides_of(name: str) -> list[str]:
    """The overrides of the run ``name``, as its evaluation takes them.

    Raises ConfigError where they cannot be told from its folder's name and its configuration.
    """
    run, _ = split(name)
    if "+" not in run:
        return []
    spelled = [_typed(text) for text in run.split("+")[1:]]
    if not (folder_of(name) / CONFIG).is_file():
        load(stem(name), spelled)  # a typo is told
        return spelled
    experiment = load(stem(name))
    kept, plain = flatten(with_defaults(config(name), experiment)), flatten(as_dict(experiment))
    keys = sorted(key for key in kept.keys() | plain.keys() if kept.get(key) != plain.get(key) and not is_neutral(key))
    for overrides in (spelled, [f"{key}={json.dumps(kept.get(key))}" for key in keys]):
        try:
            if run_name(stem(name), overrides) == run:
                load(stem(name), overrides)
                return overrides
        except ConfigError:
            continue
    raise ConfigError(
        f"{name} has no evaluation, and its overrides cannot be told from its folder's name; "
        f"make evaluate exp={stem(name)} with them, then compare"
    )


def _typed(text: str) -> str:
    """An override from a folder's name, in which lists have lost their brackets."""
    key, _, value = text.partition("=")
    return f"{key}=[{value}]" if "," in value and not value.startswith(("[", "{")) else text


def newest_step(name: str) -> int | None:
    """The step of the weights that an evaluation would measure; None where they do not say, as those of a start."""
    if split(name)[1] == weights_of.START:
        return None
    with safe_open(find_parent(name, allow_unfinished=True), framework="pt") as file:
        step = (file.metadata() or {}).get("step")
    return None if step is None else int(step)


def weights_file(name: str) -> Path | None:
    """The file that an evaluation would measure; None where the decoder itself knows where its start is."""
    if split(name)[1] != weights_of.START:
        return find_parent(name, allow_unfinished=True)
    init_from = config(name).get("init_from")
    return find_parent(init_from, allow_unfinished=True) if init_from else None


def parents(name: str) -> list[str]:
    """The runs whose weights this one started from, nearest first."""
    found: list[str] = []
    while (parent := config(name).get("init_from")) and not parent.endswith(".safetensors"):
        name = parent.partition(":")[0]
        if name in found or not (runs_root() / name / CONFIG).is_file():
            return [*found, name]
        found.append(name)
    return found


def start(name: str) -> str:
    """Where the weights came from before any step of this run: a run or file, or networks and what was made of them."""
    kept = config(name)
    if kept.get("init_from"):
        return f"init_from {kept['init_from']}"
    named = "; ".join(f"objective.{key} {_shown(value)}" for key, value in _started_from(kept).items())
    return named or ("as they are there" if split(name)[1] == weights_of.START else "from scratch")


def _started_from(kept: dict[str, Any]) -> dict[str, Any]:
    """Of the objective what names pretrained weights that fill the network, the network before how it is cut. A teacher alone
    fills nothing: it is followed, where there is no ``start`` that takes from it."""
    objective = kept.get("objective") or {}
    how, transformer = objective.get("start"), objective.get("transformer")
    if how == "random":
        how = None
    named = {"teacher": objective.get("teacher") if isinstance(how, dict) else None, "start": how}
    return {key: value for key, value in (named | {"transformer": transformer}).items() if value}


def _shown(value: Any) -> str:
    return ", ".join(f"{k}={v}" for k, v in list(value.items())[:1]) if isinstance(value, dict) else str(value)


def pretrained(name: str) -> bool:
    """Whether training began, in the first stage that is known, with weights that were trained elsewhere, at a cost not told."""
    last = [name, *parents(name)][-1]
    if not (folder_of(last) / CONFIG).is_file() and split(last)[1] != weights_of.START:
        return True  # a stage that is not here
    kept = config(last)
    released = (
        split(last)[1] == weights_of.START and (kept.get("decoder") or {}).get("start") != "linear"
    )  # which is computed
    return bool(kept.get("init_from") or _started_from(kept) or released)


def cost(name: str) -> dict[str, Any]:
    """Minutes, steps and clips of this run alone; devices and their kind, where they are known. None for what was not kept.

    A start has none of its own where it is another run's end; else nobody here knows what its weights cost.
    """
    folder = folder_of(name)
    found: dict[str, Any] = dict.fromkeys(("minutes", "steps", "clips_seen", "precision", "devices", "device"))
    if split(name)[1] == weights_of.START:
        if parents(name):
            found |= {"minutes": 0.0, "steps": 0, "clips_seen": 0, "devices": 1}
        return found
    if not (folder / CONFIG).is_file():
        return found  # a parent that has been moved away
    if (folder / DONE).is_file():
        done = json.loads((folder / DONE).read_text())
        found |= {key: done.get(key) for key in found}
    elif (folder / LAST).is_file():
        found |= _of_checkpoint(folder / LAST)
    trainer = config(name)["trainer"]
    found["devices"] = found["devices"] or _devices(trainer)
    found["device"] = found["device"] or ("CPU" if trainer["accelerator"] == "cpu" else None)
    return found


def _of_checkpoint(path: Path) -> dict[str, Any]:
    kept = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    seconds = kept.get("callbacks", {}).get(Checkpoints.__qualname__, {}).get("seconds")
    return {
        "minutes": None if seconds is None else round(seconds / 60, 2),
        "steps": kept.get("global_step"),
        "clips_seen": kept.get("seen", {}).get("clips"),
    }


def _devices(trainer: dict[str, Any]) -> int | None:
    """How many devices a configuration names; None for all that there were on a GPU machine."""
    if isinstance(trainer["devices"], int):
        return trainer["devices"] * trainer.get("num_nodes", 1)
    return 1 if trainer["accelerator"] == "cpu" else None


def total(values: Sequence[float | None]) -> float | None:
    """The sum; None as soon as one is not known."""
    return None if any(value is None for value in values) else sum(values)


def decoder_parameters(name: str, overrides: Sequence[str] = ()) -> tuple[int | None, Any]:
    """Parameters of the network that decodes (no encoder, teacher or discriminator), and the run's latent space.

    None where the decoder has no network of its own: a latent space decodes for it, and does not say how large it is.
    """
    experiment = as_trained(name, overrides)
    space = build_space(experiment)
    with torch.device("meta"):
        decoder = build_decoder(experiment, space)
    return count_parameters(decoder.model) or None, space


def header(name: str) -> str:
    """The first line of what the experiment's file says of itself."""
    return (compose.header(stem(name)) or [""])[0]


def finished(name: str) -> bool:
    """Whether the run has come to its last step."""
    return split(name)[1] == weights_of.START or (folder_of(name) / DONE).is_file()
