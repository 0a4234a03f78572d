"""An experiment's name and some ``key=value`` overrides, turned into typed dataclasses and checked before any work.

Three layers, one order: dataclass defaults < the YAML chain (see :mod:`experiments.compose`) < overrides.
``null`` takes an entry of a dictionary away (a parent's stream, source or loss), or all that was set below it, so that
``data.train=null data.train.mine={...}`` leaves one stream. Naming another class starts its part afresh, too.
After :func:`load` nobody sees omegaconf. Whatever is wrong is a ConfigError: one line that names the key, where it was
set, and the nearest right thing.
"""

import contextlib
import dataclasses
import importlib
import re
import types
import typing
from collections.abc import Collection, Sequence
from difflib import get_close_matches
from typing import Any

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from decoders.training import TrainingConfig, check_loss_weights
from experiments import compose
from experiments.compose import COMMAND_LINE, VARIABLE, ConfigError, flatten
from experiments.schema import Experiment, TrainerConfig

# part of the experiment -> the key that names a class, and the attribute of that class that is the part's dataclass
PARTS = {
    "decoder": ("family", "Config"),
    "objective": ("family", "Objective"),
    "space": ("latent_space", "Config"),
    "data": ("datamodule", "Config"),
}


# --- the schema --------------------------------------------------------------------------------------------------------


def locate(path: str, key: str = "import path") -> Any:
    """The object at a dotted import path; ``key`` is who names it, for the error."""
    module_name, _, attribute = path.rpartition(".")
    try:
        module = importlib.import_module(module_name) if module_name else None
    except ModuleNotFoundError as error:
        # A module that exists and fails to import something of its own is a bug to be seen, not a typo to be explained.
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise
        module = None
    if module is not None and hasattr(module, attribute):
        return getattr(module, attribute)
    near = get_close_matches(path, _values_in_use(key), n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ConfigError(f"{key}: nothing can be imported as '{path}'{hint}")


def _values_in_use(key: str) -> list[str]:
    used = set()
    for path in compose.FOLDER.glob("*.yaml"):
        with contextlib.suppress(ConfigError):
            used.add(compose.read(path).get(key))
    return sorted(value for value in used if isinstance(value, str))


def load(name: str, overrides: Sequence[str] = (), sets: Sequence[str] = ()) -> Experiment:
    """The typed experiment ``name`` under ``overrides``, checked as far as that goes without data, weights or a model.

    ``sets``: built-in evaluation sets (:mod:`datamodules.named`) to have among ``data.sets``. Raises ConfigError.
    """
    layers = compose.layers(name, overrides, sets)
    raw = compose.expand(_merge_layers(layers))
    parts = {}
    for part, (key, attribute) in PARTS.items():
        if not isinstance(raw.get(key), str):
            raise ConfigError(f"{key}: must be set to an import path, such as decoders.flashdecoder.FlashDecoder")
        parts[part] = getattr(locate(raw[key], key), attribute, None)
        if not dataclasses.is_dataclass(parts[part]):
            raise ConfigError(f"{key}: {raw[key]} has no dataclass {attribute}, so it is no {key.replace('_', ' ')}")
    schema = OmegaConf.structured(Experiment)
    for part, cls in {**parts, "trainer": TrainerConfig}.items():
        schema[part] = OmegaConf.structured(cls)  # of the class, not of an instance: its checks run once all is merged
    raw = _drop_nulls(raw, {**typing.get_type_hints(Experiment), **parts})
    merged = _merge(schema, raw, layers)
    missing = sorted(OmegaConf.missing_keys(merged))
    if missing:
        raise ConfigError(f"{', '.join(missing)}: must be set, in {name}.yaml or on the command line")
    experiment = _instantiate(merged)
    check_sizes(experiment)
    return experiment


def _merge_layers(layers: list[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """All layers in order. One that names another class drops what was set for the class before it: a space that takes
    the place of another does not inherit its path."""
    merged: dict[str, Any] = {}
    for _, layer in layers:
        for part, (key, _) in PARTS.items():
            if layer.get(key, merged.get(key)) != merged.get(key, layer.get(key)):
                merged.pop(part, None)
        merged = compose.merge(merged, layer)
    return merged


def _drop_nulls(node: Any, hint: Any) -> Any:
    """``node`` without ``null`` where ``hint``, a type or the types by key, has a dictionary, an entry of one, or a part."""
    if not isinstance(node, dict):
        return node
    if isinstance(hint, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not types.NoneType)
    if typing.get_origin(hint) is dict:
        node = {key: value for key, value in node.items() if value is not None}
        hint = dict.fromkeys(node, typing.get_args(hint)[1])
    elif not isinstance(hint, dict):
        hint = typing.get_type_hints(hint) if dataclasses.is_dataclass(hint) else {}
    resets = {key for key, type_ in hint.items() if dataclasses.is_dataclass(type_) or typing.get_origin(type_) is dict}
    return {key: _drop_nulls(v, hint.get(key)) for key, v in node.items() if v is not None or key not in resets}


def check_own(arguments: Sequence[str], own: Collection[str]) -> None:
    """Raise ConfigError for a ``key=value`` that is no key of an experiment and nearest to an option of the command's ``own``. Other
    unknown keys are told, with their nearest, when the experiment is loaded."""
    keys = [field.name for field in dataclasses.fields(Experiment)]
    for text in arguments:
        key, equals, _ = text.partition("=")
        if not equals or "." in key or key in own or key in keys:
            continue
        near = get_close_matches(key, [*own, *keys], n=1)
        if near and near[0] in own:
            raise ConfigError(f"{key}: no such option or key; did you mean {near[0]}?")


def _merge(schema: DictConfig, raw: dict[str, Any], layers: list[tuple[str, dict[str, Any]]]) -> DictConfig:
    """``schema`` with ``raw`` merged in; an error names the key and the file that set it."""
    try:
        return OmegaConf.merge(schema, raw)
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        key, error = _culprit(schema, raw) or (str(getattr(error, "full_key", "") or ""), error)
        origin = next((label for label, layer in reversed(layers) if _sets(layer, key)), COMMAND_LINE)
        where = "" if origin == COMMAND_LINE else f" (set in {origin})"
        raise ConfigError(f"{key}{where}: {_reason(error, key, schema)}") from None


def _culprit(schema: DictConfig, raw: dict[str, Any]) -> tuple[str, Exception] | None:
    """The first single value that the schema refuses. Some of omegaconf's errors do not say which it was."""
    for key, value in flatten(raw).items():
        try:
            OmegaConf.merge(schema, compose.nest(key, value))
        except (OmegaConfBaseException, ValueError, TypeError) as error:
            return str(getattr(error, "full_key", None) or key), error
    return None


def _sets(layer: Any, key: str) -> bool:
    for part in re.sub(r"\[\d+\]", "", key).split("."):
        if not isinstance(layer, dict) or part not in layer:
            return False
        layer = layer[part]
    return True


_OMEGACONF_SAYS = {
    "Merge error": "takes keys of its own (key.subkey=value), not one value",
    "incompatible container": "a list was given where keys belong, or keys where a list belongs",
    "is not a ListConfig": "takes a list, such as [1, 2]",
    "is not a TupleConfig": "takes a list, such as [1, 2]",
    "TupleConfig length": "has the wrong number of values",
}


def _reason(error: Exception, key: str, schema: DictConfig) -> str:
    message = str(error).splitlines()[0]
    for sign, meaning in _OMEGACONF_SAYS.items():
        if sign in message:
            return meaning
    if not isinstance(error, OmegaConfBaseException) or "not in '" not in message:
        return message[0].lower() + message[1:]
    # An unknown key. Its neighbours first, then the same name anywhere else (lr -> optim.lr).
    parent, _, last = key.rpartition(".")
    cls = getattr(error, "object_type", None)
    neighbours = [f.name for f in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else []
    near = [f"{parent}.{name}".lstrip(".") for name in get_close_matches(last, neighbours, n=1)]
    elsewhere = {path: path.rpartition(".")[2] for path in flatten(OmegaConf.to_container(schema, resolve=False))}
    near = near or [path for path, name in elsewhere.items() if name == last]
    near = near or get_close_matches(key, elsewhere, n=1, cutoff=0.8)
    return f"no such key; did you mean {near[0]}?" if near else f"no such key; there are {', '.join(neighbours)}"


def _instantiate(merged: DictConfig) -> Experiment:
    try:
        return OmegaConf.to_object(merged)
    except (OmegaConfBaseException, ValueError) as error:
        path, error = _refused(merged, "", error)
        message = str(error).splitlines()[0]
        raise ConfigError(message if not path or message.startswith(path) else f"{path}: {message}") from None


def _refused(node: DictConfig, path: str, error: Exception) -> tuple[str, Exception]:
    """The innermost dataclass whose ``__post_init__`` refuses its values, by dotted path."""
    for key in node:
        child = None
        try:
            child = node[key]
            if isinstance(child, DictConfig):
                OmegaConf.to_object(child)
        except (OmegaConfBaseException, ValueError) as inner:
            below = f"{path}.{key}".lstrip(".")
            return _refused(child, below, inner) if isinstance(child, DictConfig) else (below, inner)
    return path, error


# --- checks across the parts ------------------------------------------------------------------------------------------


def build_space(experiment: Experiment) -> Any:
    """The experiment's latent space; its network is loaded when it first encodes.

    Raises ConfigError, and FileNotFoundError for a space that cannot tell its shape without its files.
    """
    try:
        return locate(experiment.latent_space, "latent_space")(experiment.space)
    except ValueError as error:
        raise ConfigError(f"space: {error}") from None


def build_decoder(experiment: Experiment, space: Any) -> Any:
    """The experiment's decoder, as it is before any training step, over ``space``."""
    training = TrainingConfig(
        loss_weights=experiment.loss_weights,
        optim=experiment.optim,
        ema=experiment.ema,
        validation=experiment.validation,
        pad=experiment.pad,
        seed=experiment.seed,
        max_steps=experiment.trainer.max_steps,
    )
    return locate(experiment.family, "family")(experiment.decoder, experiment.objective, space, training)


def check_sizes(experiment: Experiment, multiple: int = 1) -> None:
    """Refuse a stream whose length or size cannot be encoded; a space without its files is asked when it has them.

    ``multiple``: pixels that the decoder wants height and width to be divisible by (``VideoDecoder.size_multiple``).
    """
    if experiment.pad == "replicate":
        return
    try:
        space = build_space(experiment)
    except FileNotFoundError:  # training will say so; `make show` goes on without
        return
    for where, stream in streams(experiment).items():
        height, width = (stream.multiple,) * 2 if stream.resize == "keep" else stream.size
        try:
            space.check(encoded_frames(experiment, space, where, stream), height, width)
        except ValueError as error:
            raise ConfigError(f"{where}: {error}") from None
        if height % multiple or width % multiple:
            near = " or ".join(f"{f(height, multiple)}x{f(width, multiple)}" for f in (_below, _above))
            raise ConfigError(
                f"{where}: {height}x{width}: this decoder takes multiples of {multiple} pixels; the nearest are {near}, "
                "or set pad: replicate"
            )


def encoded_frames(experiment: Experiment, space: Any, where: str, stream: Any) -> int:
    """Frames of a clip of ``stream`` that the family encodes at once."""
    rule = getattr(locate(experiment.family, "family"), "encoded_frames", None)
    return rule(space, experiment.objective, where, stream.total_frames) if rule else stream.total_frames


def check_decoder(experiment: Experiment, decoder: Any) -> None:
    """What only the built decoder knows: the terms of its loss, and sizes that it wants beyond the latent space's."""
    try:
        check_loss_weights(experiment.loss_weights, decoder.terms)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    check_sizes(experiment, decoder.size_multiple)


def _below(size: int, multiple: int) -> int:
    return max(size // multiple, 1) * multiple


def _above(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def streams(experiment: Experiment) -> dict[str, Any]:
    """``data.train.<name>``, each bucket apart, and ``data.val.<name>`` of a datamodule that has them -> the stream's config."""
    splits = {split: getattr(experiment.data, split, {}) for split in ("train", "val")}
    splits["train"] = getattr(experiment.data, "train_streams", splits["train"])
    return {f"data.{split}.{name}": stream for split in splits for name, stream in splits[split].items()}


def with_defaults(written: dict[str, Any], experiment: Experiment) -> dict[str, Any]:
    """``written``, a configuration as :func:`as_dict` gives it, perhaps by an older version of this code: keys that it lacks,
    because there were none of the kind, with their dataclasses' defaults."""

    def filled(old: Any, new: Any) -> Any:
        if not isinstance(old, dict):
            return old
        if isinstance(new, dict):
            return {key: filled(value, new.get(key)) for key, value in old.items()}
        if not dataclasses.is_dataclass(new):
            return old
        found = {key: filled(value, getattr(new, key, None)) for key, value in old.items()}
        for one in dataclasses.fields(new):
            made = one.default if one.default_factory is dataclasses.MISSING else one.default_factory()
            if one.name not in old and made not in (dataclasses.MISSING, MISSING):
                found[one.name] = _plain(made)
        return found

    return filled(written, experiment)


def as_dict(experiment: Experiment) -> dict[str, Any]:
    """Plain dictionaries, lists and scalars, as they go to YAML."""
    return _plain(experiment)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return {key: _plain(child) for key, child in value.items()}
    return [_plain(child) for child in value] if isinstance(value, list | tuple) else value


def resolved_yaml(experiment: Experiment) -> str:
    """The whole configuration as YAML text: what a run's folder keeps, and what ``make show`` prints."""
    return yaml.safe_dump(as_dict(experiment), sort_keys=False, default_flow_style=None, width=120)


def require_paths(experiment: Experiment) -> None:
    """Refuse environment variables that are still unset. Sources that no stream names do not count.

    Raises ConfigError.
    """
    used = {source for stream in streams(experiment).values() for source in stream.sources}
    for key, value in flatten(as_dict(experiment)).items():
        unused = key.startswith("data.sources.") and key.split(".")[2] not in used
        variable = VARIABLE.search(value) if isinstance(value, str) and not unused else None
        if variable:
            name = variable[1] or variable[2]
            raise ConfigError(f"{key} needs {name}; set {name}=/where/it/is in the environment, or {key}=/full/path")
