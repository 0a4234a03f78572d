"""An evaluation that was interrupted goes on: what was scored is kept batch by batch, beside the results to come.

Every process appends to a file of its own, ``part-<rank>.jsonl``: a header that says under what the scores were made, then a
line per batch, so a kill costs at most the batch that was being decoded. The same command skips the clips that are there, on
any number of processes; under anything else that decides the numbers they are thrown away (:func:`identity`). A finished
evaluation leaves no such file.
"""

import base64
import hashlib
import json
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning import Callback, Trainer

from datamodules.probe import file_stamp
from datamodules.reader import ClipRequest
from decoders.base import Row, VideoDecoder
from decoders.scoring import FEATURES, added
from experiments.config import Experiment, as_dict

SYNC_S = 5.0  # a line reaches the kernel at once, which a kill cannot undo, and the disk at least so often
PARTS = ("family", "decoder", "objective", "latent_space", "space", "pad", "seed")  # of a configuration, what decodes
ROOT, CACHE = Path(__file__).parent.parent, "cache"
ROOMS = ("datamodules", "decoders", "losses", "metrics")  # whose sources decide the numbers, and of the experiments':
MODULES = ("evaluate", "summary", "distance", "categories")  # the floors, the means
# Whose versions decide them too: they read, resize, warp and hold networks. A film is read by one of each two.
PACKAGES = (
    "opencv-python-headless", "opencv-python", "decord2", "decord",
    "av", "pillow", "torchvision", "diffusers", "transformers",
)  # fmt: skip
WEIGHTS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".npz", ".json")  # files of networks in a folder


def identity(experiment: Experiment, decoder: VideoDecoder, data, about: dict[str, Any], trainer: Trainer) -> str:
    """A hash of everything that decides the numbers of an evaluation. Opens files that are not in the index yet.

    Besides the configuration: the weights measured (``about``), the latent space's and the metrics' networks by their
    contents; other files of networks (a teacher, an interpolator, the space's own decoder) and the clips' files by size and
    time of change, without reading them; sources; versions of packages; device. Not seen: a teacher that is a hub's name, and
    that the hub has another under it now.
    """
    config = as_dict(experiment)
    requests = {name: [s.request(i, None) for i in range(len(s))] for name, s in data.streams("val").items()}
    validation = ("metrics", "references", "groups", "weights", "categories")
    named = {key: config[key] for key in PARTS} | {"weights": config["validation"]["weights"]}
    folders = [getattr(decoder.latent_space, "folder", ""), *(ROOT / room for room in ROOMS)]  # a hub's copy; our own
    decided = {
        "config": {key: config[key] for key in PARTS} | {"val": config["data"]["val"]},
        "validation": {key: config["validation"][key] for key in validation},
        "reading": config["data"].get("verify"),
        "weights": about,
        "latent_space": decoder.latent_space.fingerprint,
        "metrics": decoder.metric_protocols,
        "networks": _stamps([*_strings(named), *map(str, folders)], WEIGHTS),
        "clips": {name: [asdict(request) for request in some] for name, some in requests.items()},
        "films": _stamps(_files_of(request for some in requests.values() for request in some)),
        "precision": [str(trainer.precision), _device(trainer), config["trainer"]["deterministic"]],
        "code": code(),
        "versions": [torch.__version__, lightning.__version__, np.__version__, *map(_version, PACKAGES)],
    }
    return hashlib.sha256(json.dumps(decided, sort_keys=True, default=str).encode()).hexdigest()


def hash_of_sources(root: Path) -> str:
    """Of the sources below ``root`` that decide an evaluation's numbers: their names and bytes."""
    digest = hashlib.sha256()
    files = [file for room in ROOMS for file in (root / room).rglob("*.py")]
    files += [file for name in MODULES if (file := root / "experiments" / f"{name}.py").is_file()]
    for file in sorted(files):
        digest.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes())
    return digest.hexdigest()


_CODE = hash_of_sources(ROOT)  # now, when they are imported: a training may last days


def code() -> str:
    """The hash of the sources that this process runs, which every result carries (:func:`hash_of_sources`)."""
    return _CODE


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _device(trainer: Trainer) -> str:
    device = trainer.strategy.root_device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _strings(values: Any) -> Iterator[str]:
    """All strings in lists and dictionaries, but where a cache is kept: it grows, and decides nothing."""
    if isinstance(values, str):
        yield values
    elif isinstance(values, dict | list | tuple):
        for key, value in values.items() if isinstance(values, dict) else enumerate(values):
            if key != CACHE:
                yield from _strings(value)


def _files_of(requests: Iterable[ClipRequest]) -> Iterator[str]:
    for r in requests:
        yield from (r.path, r.reference, r.input, r.mask, r.edited)


def _stamps(names: Iterable[str], suffixes: tuple[str, ...] = ()) -> list[Any]:
    """(name, size, time of change) of those that are files, and of the files in those that are folders; any suffix, or these."""
    found = []
    for name in sorted(set(names) - {""}):
        path = Path(os.path.expandvars(name)).expanduser()
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        files = [file for file in inside if file.is_file() and (file == path or file.name.endswith(suffixes or ("",)))]
        found += [(str(file), *file_stamp(file)) for file in files]
    return found


class Resumed(Callback):
    """Keeps an evaluation's rows in ``folder`` as they come, and takes in those that are there from one that was interrupted.

    :meth:`attach` before validation, so that what is done is not even read again; :meth:`finish` when results are written.
    """

    def __init__(self, folder: Path, same: str) -> None:
        self._folder, self._same = folder, same
        self._found: list[dict[str, Any]] = []  # {"rows", "seconds"} of batches
        self.done: set[tuple[int, str]] = set()  # (stream, key)
        for part in (part for file in _files(folder) for part in _read(file, same)):
            clips = {(row["stream"], row["key"]) for row in part["rows"]}
            if not clips & self.done:  # the same command may have run twice at once
                self._found.append(part)
                self.done |= clips
        self._file: int | None = None  # its number: open from the first to the last batch
        self._num_rows, self._seconds, self._synced = 0, {}, 0.0

    def attach(self, decoder: VideoDecoder, data) -> None:
        """Leave the clips that are done out of the validation to come."""
        warnings.filterwarnings("ignore", message=".*across ranks is zero.*")  # a stream that is done
        names = list(data.val_names)
        begun = {(names[stream], key.partition("@")[0]) for stream, key in self.done}
        decoder.wanted = lambda stream, key: (stream, key) not in self.done
        data.wanted = lambda stream, beginning: (stream, beginning) not in begun

    def on_validation_start(self, trainer: Trainer, pl_module: VideoDecoder) -> None:
        trainer.strategy.barrier()  # all have read before anyone writes
        if not self._found and trainer.is_global_zero:
            self.finish()
        trainer.strategy.barrier()
        path = self._folder / f"part-{trainer.global_rank}.jsonl"
        _prepare(path, self._same)
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: VideoDecoder) -> None:
        """The decoder has begun anew: give it what is known, once for all processes."""
        scorer = pl_module.scorer()
        if trainer.is_global_zero:
            scorer.rows = [row for part in self._found for row in part["rows"]]
            scorer.seconds = added(part["seconds"] for part in self._found)
        self._num_rows, self._seconds, self._synced = len(scorer.rows), dict(scorer.seconds), time.monotonic()

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        scorer = pl_module.scorer()
        rows = scorer.rows[self._num_rows :]
        if not rows:
            return
        spent = {what: s - self._seconds.get(what, 0.0) for what, s in scorer.seconds.items()}
        os.write(self._file, json.dumps({"rows": [_plain(row) for row in rows], "seconds": spent}).encode() + b"\n")
        if time.monotonic() - self._synced > SYNC_S:
            os.fsync(self._file)
            self._synced = time.monotonic()
        self._num_rows, self._seconds = len(scorer.rows), dict(scorer.seconds)

    def on_validation_end(self, trainer: Trainer, pl_module: VideoDecoder) -> None:
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: VideoDecoder, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self._file is not None:
            os.fsync(self._file)
            os.close(self._file)
            self._file = None

    def finish(self) -> None:
        """Nothing to go on with any more."""
        for file in _files(self._folder):
            file.unlink()


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*.jsonl"), key=lambda file: (len(file.name), file.name))


def _lines(file: Path) -> Iterator[tuple[bytes, Any]]:
    """Whole lines and what they say, up to the first that a kill has cut."""
    with open(file, "rb") as lines:
        for line in lines:
            try:
                if not line.endswith(b"\n"):
                    return
                yield line, json.loads(line)
            except ValueError:
                return


def _read(file: Path, same: str) -> list[dict[str, Any]]:
    """{"rows", "seconds"} per batch, or nothing where the header is another."""
    lines = _lines(file)
    _, header = next(lines, (b"", None))
    if header != {"same": same}:
        return []
    return [{"rows": [_row(row) for row in part["rows"]], "seconds": part["seconds"]} for _, part in lines]


def _prepare(file: Path, same: str) -> None:
    """Make ``file`` one to append to: what is whole of it, or a new one with its header."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = list(_lines(file)) if file.exists() else []
    if not lines or lines[0][1] != {"same": same}:
        lines = [(json.dumps({"same": same}).encode() + b"\n", None)]
        file.write_bytes(lines[0][0])
    os.truncate(file, sum(len(line) for line, _ in lines))


def _plain(row: Row) -> Row:
    return row | {FEATURES: _mapped(row[FEATURES], _packed)} if FEATURES in row else row


def _row(plain: Row) -> Row:
    return plain | {FEATURES: _mapped(plain[FEATURES], _unpacked)} if FEATURES in plain else plain


def _mapped(features: dict[str, dict[str, Any]], of: Callable[[Any], Any]) -> dict[str, dict[str, Any]]:
    return {name: {side: of(part) for side, part in sides.items()} for name, sides in features.items()}


def _packed(tensor: torch.Tensor) -> list[Any]:
    return [list(tensor.shape), base64.b64encode(tensor.float().contiguous().numpy().tobytes()).decode()]


def _unpacked(packed: Sequence[Any]) -> torch.Tensor:
    shape, text = packed
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), np.float32).copy()).reshape(shape)
