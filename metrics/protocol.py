"""What a number was measured under. Numbers that were measured differently are not put in one column.

A protocol has two sides. The *measured* side says what was scored and how: metric, frames, clips, size, resize, the
metric's definition. A column of a table has one measured side (:func:`require_same`). The *made* side says how the pixels
came about: dtype, sampler steps, latent space, choices of decoding. That is what rows differ in, and each row shows its own.
"""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

MADE = ("dtype", "sampler_steps", "latent_space")  # fields of the made side, and in the definition:
DECODING = "decoding"


@dataclass(frozen=True)
class Protocol:
    """Everything that changes a metric's value while the decoder's weights stay the same. Written into every result.

    Built from a metric's own settings and what the evaluation adds: ``Protocol.of(metric, frames=(0, 17), ...)``.
    """

    metric: str  # "psnr", "lpips_alex", ...
    frames: tuple[int, int]  # of each clip: the first that is scored, one past the last; what is only read is outside
    # Scored frame to scored frame, in frames of the file's native rate. None: there is no such number (another frame rate,
    # which ``resize`` names; one frame repeated). Results before 2026-11-22 have 1 there too.
    frame_stride: int | None
    size: tuple[int, int]  # height, width that are scored
    resize: str  # filter and crop, e.g. "pil bicubic, shorter side, centre crop"
    clips: str  # clip_list_hash of the clips' keys
    num_clips: int
    dtype: str  # of the decoder: "float32", "bfloat16 autocast"; the metric itself is always float32
    sampler_steps: int | None = None  # of a generative decoder; None: it has no sampler
    latent_space: str | None = None  # fingerprint of the space that was decoded
    definition: Mapping[str, Any] = field(default_factory=dict)  # the metric's own: range, window, backbone

    def __post_init__(self):
        if len(self.frames) != 2 or not 0 <= self.frames[0] < self.frames[1]:
            raise ValueError(f"frames must be (first, one past the last), got {self.frames}")
        stride = 1 if self.frame_stride is None else self.frame_stride
        if len(self.size) != 2 or min(*self.size, self.num_clips, stride) < 1:
            raise ValueError(f"size, frame_stride and num_clips must be positive, got {self}")
        # As JSON would give it back, so that a protocol read from a result equals the one that was written.
        object.__setattr__(self, "definition", json.loads(json.dumps(dict(self.definition), sort_keys=True)))

    @classmethod
    def of(cls, metric: Any, **settings: Any) -> "Protocol":
        """The protocol of ``metric`` (anything with ``.name`` and ``.protocol``) under an evaluation's ``settings``."""
        return cls(metric=metric.name, definition=metric.protocol, **settings)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Protocol":
        """Back from :meth:`to_dict` or its JSON. ValueError names the fields that are missing or unknown."""
        fields = {f.name: f for f in dataclasses.fields(cls)}
        optional = {"sampler_steps", "latent_space", "definition"}
        missing, unknown = fields.keys() - optional - values.keys(), values.keys() - fields.keys()
        if missing or unknown:
            raise ValueError(f"not a protocol: missing {sorted(missing)}, unknown {sorted(unknown)}")
        return cls(**{**values, "frames": tuple(values["frames"]), "size": tuple(values["size"])})

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def hash(self) -> str:
        """12 hex digits; equal exactly when the protocols are."""
        return _short_hash(json.dumps(self.to_dict(), sort_keys=True))

    def measured(self) -> dict[str, Any]:
        """What was scored and how; equal for all results of a column. Plain values."""
        values = {key: value for key, value in self.to_dict().items() if key not in MADE}
        return values | {"definition": {k: v for k, v in values["definition"].items() if k != DECODING}}

    @property
    def num_frames(self) -> int:
        """Scored frames of each clip; counts all from the first to the last where they have no one stride."""
        return len(range(*self.frames, self.frame_stride or 1))

    def made(self) -> dict[str, Any]:
        """How the pixels came about, shown in the row: what is None is left out, choices of decoding stand by their names."""
        values = self.to_dict()
        decoding = values["definition"].get(DECODING) or {}
        return {key: values[key] for key in MADE if values[key] is not None} | dict(decoding)

    def measured_hash(self) -> str:
        """12 hex digits; equal exactly when the two results may stand in one column."""
        return _short_hash(json.dumps(self.measured(), sort_keys=True))

    def differences(self, other: "Protocol") -> dict[str, tuple[Any, Any]]:
        """Field of the measured side -> (ours, theirs), where they differ; the definition's entries as ``definition.<key>``."""
        ours, theirs = _flat(self.measured()), _flat(other.measured())
        keys = [*ours, *(key for key in theirs if key not in ours)]
        return {key: (ours.get(key), theirs.get(key)) for key in keys if ours.get(key) != theirs.get(key)}


def require_same(protocols: Mapping[str, Protocol]) -> Protocol:
    """The first protocol of a column of results (label -> protocol), whose measured side is everybody's.

    Raises ValueError saying which fields of which result differ from the first one's.
    """
    if not protocols:
        raise ValueError("no result to compare")
    (first, expected), *others = protocols.items()
    complaints = [
        f"{label}: {key} is {theirs!r}, {first} has {ours!r}"
        for label, protocol in others
        for key, (ours, theirs) in expected.differences(protocol).items()
    ]
    if complaints:
        raise ValueError("results with different protocols are not put in one column:\n  " + "\n  ".join(complaints))
    return expected


def clip_list_hash(keys: Iterable[str]) -> str:
    """12 hex digits for a set of clips, whatever their order. ValueError if a clip is listed twice."""
    ordered = sorted(keys)
    if twice := sorted({a for a, b in itertools.pairwise(ordered) if a == b}):
        raise ValueError(f"a clip would be scored twice: {twice[:3]}")
    return _short_hash("\n".join(ordered))


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    definition = values.pop("definition")
    return values | {f"definition.{key}": value for key, value in definition.items()}


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
