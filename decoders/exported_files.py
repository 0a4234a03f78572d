"""The folder of an exported decoder on disk: ``config.json`` and ``model.safetensors``, written whole or not at all.

What is read may come from anybody, so nothing of it is believed: keys, types and sizes of the config are checked against the
dataclasses that it fills, a network may not have more parameters than the weights' file has tensors for, and names and shapes
must be the network's own. Weights are read by memory map: pages that are never used are never read.
"""

import dataclasses
import json
import os
import shutil
import threading
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.modules import module as registration

from decoders.exported_space import ExportError, SpaceInfo

CONFIG, WEIGHTS = "config.json", "model.safetensors"
FORMAT = 1
KEYS = ("format", "family", "space", "network", "sampling", "about")
ALIGNED = 64  # bytes; where torch itself puts what it allocates
CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
LARGEST_CONFIG = 16 << 20  # bytes
LARGEST_INT, LONGEST_LIST, LONGEST_TEXT = 1_000_000, 4096, 4096
T = TypeVar("T")


@dataclasses.dataclass
class Contents:
    """All of an exported decoder that is not a module: what a folder holds, wherever it came from.

    Attributes:
        family: the folder in ``decoders/`` whose ``exported.py`` builds it.
        network: the architecture, as that file describes it; plain values.
        sampling: how its ``decode`` and ``encode`` do by default what the run's did; plain values.
        tensors: parameters and buffers, ``network.<name>`` and ``encoder.<name>``.
        where: for errors.
    """

    family: str
    space: SpaceInfo
    network: dict[str, Any]
    sampling: dict[str, Any]
    about: dict[str, Any]
    tensors: Mapping[str, Tensor]
    where: str = "this decoder"


@dataclasses.dataclass
class Sampling:
    """What every family's ``decode`` and ``encode`` may have been set to; a family with more adds fields."""

    pad: Literal["replicate"] | None = None  # what is encoded is filled up to a size that fits; null: refused


# --- writing ---------------------------------------------------------------------------------------------------------


def write(
    folder: Path, contents: Contents, *, overwrite: bool, dtype: torch.dtype | None, files: Mapping[str, str] | None
) -> Path:
    """Write ``contents`` and text ``files`` beside it: a temporary neighbour of ``folder`` first, then one rename.

    Raises:
        ExportError: something is there already, cannot be written, or is no JSON.
    """
    folder = folder.expanduser().absolute()
    _refuse_existing(folder, overwrite)
    text = _config_text(contents)
    if odd := sorted(name for name in files or {} if Path(name).name != name or name in (CONFIG, WEIGHTS)):
        raise ExportError(f"files: {odd[0]} is no name for a text beside {CONFIG} and {WEIGHTS}")
    temporary, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{kind}") for kind in ("tmp", "old"))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        (temporary / CONFIG).write_text(text)
        for name, content in (files or {}).items():
            (temporary / name).write_text(content)
        write_tensors(temporary / WEIGHTS, contents.tensors, dtype)
        for file in temporary.iterdir():
            with open(file, "rb") as written:
                os.fsync(written.fileno())
        if folder.exists() and any(folder.iterdir()):
            os.rename(folder, old)
        os.rename(temporary, folder)
    except (OSError, SafetensorError) as error:
        if old.exists() and not folder.exists():
            os.rename(old, folder)
        reason = getattr(error, "strerror", None) or str(error)
        raise ExportError(f"{folder} cannot be written ({reason}): free some space, or name another folder") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    return folder


def _refuse_existing(folder: Path, overwrite: bool) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ExportError(f"{folder} is a file; name a folder")
    if not any(folder.iterdir()):
        return
    if not overwrite:
        raise ExportError(f"{folder} is not empty; name another folder, or overwrite the export that is there")
    if not is_export(folder):
        raise ExportError(f"{folder} holds something else than an exported decoder and is not overwritten")


def _config_text(contents: Contents) -> str:
    space = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(contents.space).items()}
    values = {
        "format": FORMAT,
        "family": contents.family,
        "space": space,
        "network": contents.network,
        "sampling": contents.sampling,
        "about": dict(contents.about),
    }
    try:
        return json.dumps(values, indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ExportError(f"{CONFIG}: {error}; what is said about an export must be plain, finite values") from None


def write_tensors(file: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> None:
    """Write a safetensors file, one tensor in memory at a time; parameters in ``dtype``, buffers (statistics, kept channels)
    as they are.

    What the library writes begins wherever the tensors before it end. Products of matrices depend in their last bit on how
    their memory is aligned, and what is mapped lies as it does in the file: so here data begin at multiples of ``ALIGNED``
    bytes, and the few tensors of other lengths are last.
    """
    stored = {name: _cast_dtype(tensor, dtype) for name, tensor in tensors.items()}
    sizes = {name: tensor.numel() * stored[name].itemsize for name, tensor in tensors.items()}
    order = sorted(tensors, key=lambda name: (sizes[name] % ALIGNED != 0, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name in order:
        offsets = [start, start + sizes[name]]
        header[name] = {"dtype": CODES[stored[name]], "shape": list(tensors[name].shape), "data_offsets": offsets}
        start = offsets[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNED)
    with open(file, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            flat = tensors[name].detach().to("cpu", stored[name]).contiguous().flatten()
            out.write(flat.view(torch.uint8).numpy())


def _cast_dtype(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    is_weight = isinstance(tensor, nn.Parameter) and tensor.is_floating_point()
    return dtype if dtype is not None and is_weight else tensor.dtype


# --- reading ---------------------------------------------------------------------------------------------------------


def is_export(folder: Path) -> bool:
    """Whether ``folder`` has a config of ours."""
    try:
        return "format" in read_json(folder / CONFIG)
    except (ExportError, OSError):
        return False


def read(folder: Path, device: torch.device) -> Contents:
    """What the folder of an exported decoder holds; the weights by memory map, or on ``device``. Raises ExportError."""
    config = read_json(folder / CONFIG)
    found = config.get("format")
    if type(found) is not int or found < 1:
        raise ExportError(
            f"{folder / CONFIG} says format {found!r}, and an exported decoder has {FORMAT}; export it again"
        )
    if found > FORMAT:
        raise ExportError(f"{folder / CONFIG} has format {found}; this version reads up to {FORMAT}: update it")
    if odd := sorted(set(KEYS) ^ set(config)):
        raise ExportError(
            f"{folder / CONFIG}: {odd[0]} is {'missing' if odd[0] in KEYS else 'unknown'}; export it again"
        )
    for key, kind in (("family", str), ("space", dict), ("network", dict), ("sampling", dict), ("about", dict)):
        if not isinstance(config[key], kind):
            raise ExportError(f"{folder / CONFIG}: {key} is no {'text' if kind is str else 'table'}; export it again")
    return Contents(
        config["family"],
        fill(SpaceInfo, config["space"], "space"),
        config["network"],
        config["sampling"],
        config["about"],
        read_tensors(folder / WEIGHTS, device),
        str(folder),
    )


def read_json(file: Path) -> dict[str, Any]:
    """A JSON table of finite numbers. Raises ExportError."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no number")

    try:
        if file.stat().st_size > LARGEST_CONFIG:
            raise ExportError(f"{file} has more than {LARGEST_CONFIG >> 20} MiB; that is no config")
        values = json.loads(file.read_text(encoding="utf-8"), parse_constant=refuse)
    except FileNotFoundError:
        raise ExportError(f"there is no {file}") from None
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, ExportError):
            raise
        raise ExportError(f"{file} cannot be read as JSON ({error}); export the decoder again") from None
    if not isinstance(values, dict):
        raise ExportError(f"{file} holds no table; export the decoder again")
    return values


def read_tensors(file: Path, device: torch.device) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU backed by the file itself. Raises ExportError: truncated, or no such."""
    try:
        with safe_open(file, framework="pt", device=str(device)) as content:
            return {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise ExportError(f"there is no {file}: the weights belong beside {CONFIG}") from None
    except (OSError, SafetensorError, RuntimeError, ValueError, KeyError) as error:
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ExportError(f"{file} is damaged or no safetensors file ({line}); get it again") from None


# --- plain values into dataclasses -----------------------------------------------------------------------------------


def fill(cls: type[T], values: Any, where: str) -> T:
    """The dataclass ``cls`` from a table, nested ones too. Raises ExportError: unknown or missing keys, other types, sizes out
    of bounds, or what ``cls`` itself refuses."""
    if not isinstance(values, Mapping):
        raise ExportError(f"{where} is no table")
    hints, known = typing.get_type_hints(cls), {entry.name for entry in dataclasses.fields(cls)}
    if unknown := sorted(str(key) for key in values if key not in known):
        raise ExportError(f"{where}.{unknown[0]} is unknown; update, or export the decoder again")
    filled = {key: _value(hints[key], value, f"{where}.{key}") for key, value in values.items()}
    try:
        return cls(**filled)
    except ExportError:
        raise
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ExportError(f"{where}: {error}") from None


def plain(config: Any) -> dict[str, Any]:
    """A dataclass as the table that :func:`fill` reads, tuples as lists."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _value(hint: Any, value: Any, where: str) -> Any:
    """``value`` as ``hint`` wants it: only the forms that configurations of networks have."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in inner:
            return None
        return _value(next(kind for kind in inner if kind is not type(None)), value, where)
    if origin is Literal and isinstance(value, str) and value in inner:
        return value
    if origin in (list, tuple) and isinstance(value, list) and len(value) <= LONGEST_LIST:
        if origin is list or inner[-1] is Ellipsis:
            return origin(_value(inner[0], item, f"{where}[{i}]") for i, item in enumerate(value))
        if len(inner) == len(value):
            return tuple(
                _value(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(inner, value, strict=True))
            )
    if origin is dict and isinstance(value, dict) and len(value) <= LONGEST_LIST:
        return {_value(str, key, where): _value(inner[1], item, f"{where}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(hint):
        return fill(hint, value, where)
    if hint is float and type(value) in (int, float) and abs(value) < 1e30:
        return float(value)
    if hint is int and type(value) is int and abs(value) <= (2**63 - 1 if where.endswith("seed") else LARGEST_INT):
        return value
    if (hint is bool and type(value) is bool) or (hint is str and type(value) is str and len(value) <= LONGEST_TEXT):
        return value
    shown = repr(value)
    raise ExportError(
        f"{where} is {shown[:60]}{'...' if len(shown) > 60 else ''}, which it cannot be; export the decoder again"
    )


# --- networks without weights, and weights into them -----------------------------------------------------------------


@contextmanager
def weightless(num_tensors: int) -> Iterator[None]:
    """Modules made within are on the meta device; ExportError as soon as they have many more parameters or modules than a
    file of ``num_tensors`` can fill: a config that asks for a million layers is told so at once, not after an hour."""
    counts, most, thread = {"parameters": 0, "modules": 0}, 20 * num_tensors + 1000, threading.get_ident()

    def counted(kind: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if threading.get_ident() != thread:
                return
            counts[kind] += 1
            if counts[kind] > most:
                raise ExportError(
                    f"the network has far more {kind} than the {num_tensors} tensors of the weights: {CONFIG} is wrong"
                )

        return hook

    handles = [
        registration.register_module_parameter_registration_hook(counted("parameters")),
        registration.register_module_module_registration_hook(counted("modules")),
    ]
    try:
        with torch.device("meta"):
            yield
    finally:
        for handle in handles:
            handle.remove()


def assign(
    module: nn.Module, tensors: Mapping[str, Tensor], dtype: torch.dtype | None, device: torch.device, where: str
) -> None:
    """Put ``tensors`` in the places of all parameters and buffers of ``module``, without a copy where dtype and device fit.

    ``dtype``: of floating ones; None: of most of them, as they are stored.

    Raises:
        ExportError: names that are missing or left over, other shapes, or another kind of number.
    """
    own = dict(module.named_parameters()) | dict(module.named_buffers())
    if odd := sorted(own.keys() ^ tensors.keys()):
        which = "missing" if odd[0] in own else "left over"
        raise ExportError(f"{where}: {len(odd)} weights do not fit what {CONFIG} describes; {odd[0]} is {which}")
    dtype = dtype or stored_dtype(tensors)
    for name, target in own.items():
        tensor = tensors[name]
        if tensor.shape != target.shape:
            raise ExportError(f"{where}: {name} is {tuple(tensor.shape)}, and {CONFIG} makes it {tuple(target.shape)}")
        if (
            tensor.is_floating_point() != target.is_floating_point()
            or tensor.is_complex()
            or tensor.itemsize < 2 <= target.itemsize
        ):
            raise ExportError(f"{where}: {name} is {tensor.dtype}, expected {target.dtype}; export the decoder again")
        tensor = tensor.to(device, dtype if dtype and tensor.is_floating_point() else target.dtype)
        if tensor.data_ptr() % ALIGNED:  # from the middle of a file: see write_tensors
            tensor = tensor.clone()
        owner, _, leaf = name.rpartition(".")
        part = module.get_submodule(owner)
        if isinstance(target, nn.Parameter):
            part._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
        else:
            part._buffers[leaf] = tensor
    left = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    if empty := [name for name, tensor in left if tensor.is_meta]:
        raise ExportError(f"{where}: {empty[0]} has no weights; export the decoder again")


def stored_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype | None:
    """The floating dtype that most numbers are stored in."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in tensors.values():
        if tensor.is_floating_point():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
    return max(sizes, key=lambda kind: sizes[kind]) if sizes else None
