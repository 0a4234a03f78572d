"""Where a decoder for inference may come from: an exported folder, the hub, a run of the trainer, released autoencoders."""

import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from decoders.backbones.staged import StagedDecoder
from decoders.exported import Exported, build, hooks
from decoders.exported_files import (
    CONFIG,
    WEIGHTS,
    Contents,
    fill,
    is_export,
    read,
    read_json,
    read_tensors,
    weightless,
)
from decoders.exported_space import HUB_ID, ExportError, SpaceInfo, fingerprint_of, public_name
from decoders.latent_spaces.base import LatentSpace

RUN_CONFIG, RUN_CHECKPOINT = "config.yaml", "last.ckpt"
RUN_WEIGHTS = ("ema", "last")  # what a run's folder is read for, the first that is there
SPACES = "decoders.latent_spaces."  # only these are imported by a run's word


def open_source(
    source: str | Path,
    dtype: torch.dtype | None,
    device: str | torch.device,
    revision: str | None = None,
    token: str | None = None,
) -> Exported:
    """As :func:`decoders.exported.load`. Raises ExportError."""
    if str(source) == "wan_mini":
        return _released(lambda own: own.from_wan_mini(), dtype, device)
    path = Path(source).expanduser()
    if not path.exists():
        if isinstance(source, str) and HUB_ID.fullmatch(source):
            return build(read(from_hub(source, revision, token), torch.device(device)), dtype, device)
        raise ExportError(
            f"there is no {source}: give an exported folder, a run's, one of diffusers, a hub id (user/name) or wan_mini"
        )
    if path.is_file():
        if (path.parent / RUN_CONFIG).is_file() and path.suffix in (".safetensors", ".ckpt"):
            return build(from_run(path.parent, path, torch.device(device)), dtype, device)
        if path.name in (WEIGHTS, CONFIG) and is_export(path.parent):
            return build(read(path.parent, torch.device(device)), dtype, device)
        if path.suffix != ".safetensors" and not zipfile.is_zipfile(path):  # what torch.save writes is one
            raise ExportError(f"{path} is no file of weights: give an exported folder, a run's, or one of diffusers")
        return _released(lambda own: own.from_file(path), dtype, device)
    if (path / RUN_CONFIG).is_file():
        return build(from_run(path, _weights_of(path), torch.device(device)), dtype, device)
    if (folder := _diffusers(path)) is not None:
        return _released(lambda own: own.from_diffusers(folder, str(source)), dtype, device)
    if not (path / CONFIG).is_file():
        raise ExportError(f"{path} has no {CONFIG}: it is no exported decoder, no run and no diffusers folder")
    return build(read(path, torch.device(device)), dtype, device)


# --- released autoencoders -------------------------------------------------------------------------------------------


def _released(open_: Any, dtype: torch.dtype | None, device: str | torch.device) -> Exported:
    try:
        return open_(import_module("decoders.backbones.exported")).to(device, dtype)
    except ExportError:
        raise
    except (OSError, ValueError, LookupError, SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ExportError(str(error).splitlines()[0] if str(error) else type(error).__name__) from error


def _diffusers(path: Path) -> Path | None:
    """Where in ``path`` a diffusers autoencoder is: the folder itself, or its ``vae``."""
    for folder in (path, path / "vae"):
        if (folder / CONFIG).is_file() and "_class_name" in read_json(folder / CONFIG):
            return folder
    return None


# --- the hub ---------------------------------------------------------------------------------------------------------


def from_hub(repository: str, revision: str | None, token: str | None) -> Path:
    """The folder of a snapshot with the two files, from the hub's cache or the hub. Raises ExportError: says why not."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ExportError(f"{repository} is not a folder here, and a hub takes `pip install huggingface_hub`") from None
    try:
        folder = snapshot_download(repository, revision=revision, token=token, allow_patterns=[CONFIG, WEIGHTS])
    except (OSError, ValueError, RuntimeError) as error:  # the hub's own errors derive from these
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ExportError(
            f"{repository} is neither a folder here nor to be had from the hub ({line}): check the name, the token and the network"
        ) from error
    if not is_export(Path(folder)):
        raise ExportError(
            f"{repository} on the hub is no exported decoder (its {CONFIG} is not ours); for a diffusers autoencoder download its "
            "folder and give that"
        )
    return Path(folder)


# --- runs of the trainer ---------------------------------------------------------------------------------------------


def _weights_of(folder: Path) -> Path:
    files = [folder / f"weights-{kind}.safetensors" for kind in RUN_WEIGHTS] + [folder / RUN_CHECKPOINT]
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        raise ExportError(f"{folder} is a run without weights yet ({files[0].name} and others): train it first")
    return found


def from_run(folder: Path, file: Path, device: torch.device) -> Contents:
    """What the weights ``file`` of the run in ``folder`` would be exported as. Raises ExportError."""
    config = _run_config(folder / RUN_CONFIG)
    try:
        family = str(config["family"]).split(".")[1]
        hook = hooks(family)
        tensors, said = _run_tensors(file, device)
        latent_space = _space(config)
        space = _info(latent_space, said.get("latent_space"))
        with weightless(len(tensors)):
            network, sampling = hook.from_run(config, space)
        sampling = {**sampling, "pad": "replicate" if config.get("pad") == "replicate" else None}
        tensors |= _statistics(hook, network, sampling, space, tensors, device)
    except ExportError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise ExportError(
            f"{folder / RUN_CONFIG} is no configuration of a run ({error}); export the run instead"
        ) from error
    if any(name.startswith("encoder.") for name in tensors):
        space = _trained(space, hook, network, sampling, tensors)
    about = {"run": folder.name, "weights": file.name, "step": int(said.get("step", -1))}
    return Contents(family, space, network, sampling, about, tensors, str(file))


def _run_config(file: Path) -> dict[str, Any]:
    try:
        import yaml
    except ImportError:
        raise ExportError(
            f"reading a run takes PyYAML (pip install pyyaml), for {file}; an exported folder takes nothing: make export exp=NAME"
        ) from None
    try:
        config = yaml.safe_load(file.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ExportError(f"{file} cannot be read ({str(error).splitlines()[0]})") from None
    if not isinstance(config, dict):
        raise ExportError(f"{file} is no configuration of a run")
    return config


def _run_tensors(file: Path, device: torch.device) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Weights by the names of an export, and what the file says of itself."""
    said: dict[str, str] = {}
    if file.suffix == ".ckpt":
        state, said = _checkpoint(file, device)
    else:
        state = read_tensors(file, device)
        with safe_open(file, framework="pt") as content:
            said = content.metadata() or {}
    renamed = {}
    for name, tensor in state.items():
        if name.startswith("model."):
            renamed["network." + name.removeprefix("model.")] = tensor
        elif name.startswith("encoder."):
            renamed[name] = tensor
    if not renamed:
        raise ExportError(f"{file} holds no decoder: none of its names begins with model.")
    return renamed, said


def _checkpoint(file: Path, device: torch.device) -> tuple[Mapping[str, Tensor], dict[str, str]]:
    """All of the trainer's checkpoint that inference needs, averaged weights in place of the last ones; by memory map."""
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        state = dict(checkpoint["state_dict"]) | dict(checkpoint.get("ema") or {})
        if not all(isinstance(tensor, Tensor) for tensor in state.values()):
            raise TypeError("its weights are no tensors")
        return {name: t.to(device) for name, t in state.items()}, {"step": str(int(checkpoint["global_step"]))}
    except (
        OSError,
        RuntimeError,
        LookupError,
        TypeError,
        ValueError,
        EOFError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
    ) as error:
        line = (str(error) or type(error).__name__).splitlines()[0]
        raise ExportError(f"{file} is no checkpoint of the trainer, or damaged ({line})") from None


def _space(config: Mapping[str, Any]) -> LatentSpace:
    """The run's latent space, without its encoder's weights."""
    module, _, name = str(config["latent_space"]).rpartition(".")
    if not module.startswith(SPACES):
        raise ExportError(
            f"latent_space {config['latent_space']} is none of {SPACES}*; export the run instead (make export)"
        )
    kind = getattr(import_module(module), name)
    try:
        return kind(fill(kind.Config, config.get("space") or {}, "space"))
    except FileNotFoundError as error:
        raise ExportError(f"the run's latent space: {error}") from None


def _info(space: LatentSpace, fingerprint: str | None) -> SpaceInfo:
    """``space`` as an export has it. ``fingerprint``: what the weights say, so that the space's files need not be there."""
    try:
        statistics = getattr(space, "statistics", None)
    except FileNotFoundError:
        statistics = None
    try:
        fingerprint = fingerprint or space.fingerprint
    except FileNotFoundError as error:
        raise ExportError(f"a checkpoint does not name its latent space, and its files are not here: {error}") from None
    mean, std = (None, None) if statistics is None else (tuple(values) for values in statistics)
    shape = (public_name(space.name), space.channels, space.stride_t, space.stride_hw, space.causal, fingerprint)
    return SpaceInfo(*shape, mean, std, getattr(space, "chunk", None), type(space).__name__ == "Chunked")


def _statistics(
    hook: Any, network: Any, sampling: Any, space: SpaceInfo, tensors: Mapping[str, Tensor], device: torch.device
) -> dict[str, Tensor]:
    """The latents' mean and std of every backbone inside, which no weights file of a run holds: they are in its config."""
    with weightless(len(tensors)):
        empty = hook.build(network, sampling, space)
    found: dict[str, Tensor] = {}
    for where, part in empty.named_modules():
        if isinstance(part, StagedDecoder):
            part.reset_statistics()
            own = {f"{where}.{name}": getattr(part, name).to(device) for name in ("latent_mean", "latent_std")}
            found |= {name: tensor for name, tensor in own.items() if name not in tensors}
    return found


def _trained(space: SpaceInfo, hook: Any, network: Any, sampling: Any, tensors: Mapping[str, Tensor]) -> SpaceInfo:
    """``space`` with the statistics and the fingerprint of the encoder that was trained for it."""
    with weightless(len(tensors)):
        encoder = hook.build(network, sampling, space).encoder
    own = {name: tensors[f"encoder.{name}"] for name, _ in (*encoder.named_parameters(), *encoder.named_buffers())}
    mean, std = (tensors[f"network.latent_{name}"].float().flatten().tolist() for name in ("mean", "std"))
    shape = {key: getattr(space, key) for key in ("channels", "stride_t", "stride_hw", "causal", "chunk", "paired")}
    return replace(space, mean=tuple(mean), std=tuple(std), fingerprint=fingerprint_of(own, shape, mean, std))
