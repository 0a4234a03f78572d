"""The latent space that an exported decoder expects, as plain values: shape, rule of frames, statistics, fingerprint."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from decoders.latent_spaces.base import LatentSpace, hash_parts
from decoders.latent_spaces.chunked import Chunked, ChunkedConfig
from decoders.latent_spaces.learned import Learned, LearnedConfig

LARGEST_MEAN = 1.0  # of all values of a normalised clip; the next two too, as datamodules/latents.py measured them
SMALLEST_STD, LARGEST_STD = 0.2, 1.9
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
RAW_MARGIN = 0.2  # nats per value by which the space's own statistics must explain latents better than 0 and 1


class ExportError(ValueError):
    """Something is wrong with an exported decoder or with what it is given; one line that says what to do."""


@dataclass(frozen=True)
class SpaceInfo:
    """A latent space without its encoder: what ``config.json`` keeps of it.

    Attributes:
        name: for people: ``wan_mini``, ``dct``, a diffusers autoencoder's path or hub id.
        channels, stride_t, stride_hw, causal: as :class:`decoders.latent_spaces.base.LatentSpace` has them.
        fingerprint: hash of all that decides the latents' values; latents on disk carry it.
        mean, std: of raw latents, per channel: ``normalised = (raw - mean) / std``. None: the space states none.
        chunk: frames after which coding starts anew; None: never.
        paired: whether a chunk has two latent frames, content and motion (REGEN's own encoder).
    """

    name: str
    channels: int
    stride_t: int
    stride_hw: int
    causal: bool
    fingerprint: str
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    chunk: int | None = None
    paired: bool = False

    def __post_init__(self) -> None:
        if (self.mean is None) != (self.std is None):
            raise ExportError("space: mean and std belong together; one of them is missing")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and len(values) != self.channels:
                raise ExportError(f"space.{name} has {len(values)} numbers for {self.channels} channels")
        if self.std is not None and not min(self.std) > 0:
            raise ExportError("space.std must be above 0 in every channel")
        if self.chunk is not None and self.chunk != getattr(self.rule, "chunk", None):
            raise ExportError(f"space.chunk is {self.chunk}, and chunks of this space have {self.rule.chunk} frames")
        if self.paired and self.chunk is None:
            raise ExportError("space.chunk is missing: a space whose chunks are pairs of latent frames has one")
        _ = self.rule  # refuses shapes that there are not

    @property
    def rule(self) -> LatentSpace:
        """Lengths and sizes, as the space itself has them; it cannot encode."""
        shape = {"channels": self.channels, "stride_t": self.stride_t, "stride_hw": self.stride_hw}
        if self.paired:
            return _named(Chunked(ChunkedConfig(**shape)), self.name)
        rule = _named(Learned(LearnedConfig(**shape, chunk=self.chunk)), self.name)
        rule.causal = self.causal
        return rule

    def latent_frames(self, t: int) -> int:
        """Latent frames of ``t`` pixel frames. Raises ValueError for a length that cannot be encoded."""
        return self.rule.latent_frames(t)

    def pixel_frames(self, n: int) -> int:
        """Pixel frames of ``n`` latent frames. Raises ValueError for a number that there cannot be."""
        return self.rule.pixel_frames(n)

    def padded_frames(self, t: int) -> int:
        """The shortest length, ``t`` or longer, that can be encoded."""
        return self.rule.padded_frames(t)

    def check(self, t: int, h: int, w: int) -> None:
        """Raise ValueError, naming the nearest that fit, unless ``t`` frames of h x w can be encoded."""
        self.rule.check(t, h, w)

    # ---- statistics

    def normalise(self, raw: Float[Tensor, "b c n y x"]) -> Float[Tensor, "b c n y x"]:
        """(raw - mean) / std in float32. Raises ExportError where the space states no statistics."""
        mean, std = self._statistics(raw)
        return (raw.float() - mean) / std

    def denormalise(self, latent: Float[Tensor, "b c n y x"]) -> Float[Tensor, "b c n y x"]:
        """The inverse of :meth:`normalise`: what the autoencoder itself gives and takes."""
        mean, std = self._statistics(latent)
        return latent.float() * std + mean

    def check_fingerprint(self, fingerprint: str) -> None:
        """Raise ExportError unless latents that carry ``fingerprint`` (or the space's name) are of this space."""
        if fingerprint not in (self.fingerprint, self.name):
            raise ExportError(
                f"these latents are of the space {fingerprint}, and this decoder reads {self.name} ({self.fingerprint}): "
                "encode the videos in its space, or load the decoder of theirs"
            )

    def check_latent(self, latent: Float[Tensor, "b c n y x"]) -> None:
        """Raise ExportError for values that are no normalised latents of this space as far as one clip can tell: not finite,
        |mean| or std out of bounds, or explained better by the space's own statistics (raw latents). A guess, for commands:
        they let users overrule it."""
        values = latent.detach().double()
        if not bool(values.isfinite().all()):
            raise ExportError("these latents have values that are not finite; make them anew")
        mean, std = float(values.mean()), float(values.std()) if values.numel() > 1 else 1.0
        if self.looks_raw(latent):
            raise ExportError(
                f"these latents look raw (mean {mean:.2f}, std {std:.2f}), and normalised ones are decoded, (raw - mean) / std by "
                "the space's statistics: say that they are raw, or normalise them"
            )
        if abs(mean) > LARGEST_MEAN or not SMALLEST_STD <= std <= LARGEST_STD:
            raise ExportError(
                f"these latents have mean {mean:.2f} and std {std:.2f} over all values, and those of a normalised clip lie within "
                f"+-{LARGEST_MEAN} and {SMALLEST_STD} to {LARGEST_STD}: normalise them, (raw - mean) / std, or say that they are"
            )

    def looks_raw(self, latent: Float[Tensor, "b c n y x"]) -> bool:
        """Whether the space's own mean and std explain the values clearly better than 0 and 1 do (independent Gaussians)."""
        if self.std is None:
            return False
        channels = latent.detach().double().transpose(0, 1).flatten(1)
        mean, square = channels.mean(1), channels.square().mean(1)
        own_mean = torch.tensor(self.mean, dtype=torch.float64, device=mean.device)
        own_std = torch.tensor(self.std, dtype=torch.float64, device=mean.device)
        as_raw = own_std.log() + (square - 2 * mean * own_mean + own_mean.square()) / (2 * own_std.square())
        return bool((square / 2).mean() > as_raw.mean() + RAW_MARGIN)

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        if like.ndim != 5 or like.shape[1] != self.channels:
            raise ExportError(f"latent is {tuple(like.shape)}; the {self.name} space has (b, {self.channels}, n, y, x)")
        if self.mean is None:
            raise ExportError(
                f"the {self.name} space states no mean and std of raw latents: what it gives is normalised"
            )
        mean, std = (torch.tensor(v, dtype=torch.float32, device=like.device) for v in (self.mean, self.std))
        return mean.view(1, -1, 1, 1, 1), std.view(1, -1, 1, 1, 1)


def space_of(space: LatentSpace, network: nn.Module, encoder: nn.Module | None) -> SpaceInfo:
    """What an export says of the space that a decoder was trained on; with a trained ``encoder`` the space is its.

    Raises:
        ExportError: the files that decide the fingerprint are not there, or a rule of frames that has no form here.
    """
    paired, chunk = isinstance(space, Chunked), getattr(space, "chunk", None)
    if getattr(space, "frame_step", space.stride_t) != space.stride_t:
        raise ExportError(
            f"the {space.name} space encodes {space.frame_step} frames more at a time, not {space.stride_t}: such a space has no "
            "export; decode with the run itself"
        )
    shape: dict[str, Any] = {key: getattr(space, key) for key in ("channels", "stride_t", "stride_hw", "causal")}
    if encoder is None:
        statistics = getattr(space, "statistics", None)
        try:
            fingerprint = space.fingerprint
        except FileNotFoundError as error:
            raise ExportError(f"the fingerprint of the {space.name} space takes its files: {error}") from None
    else:
        statistics = tuple(_numbers(getattr(network, f"latent_{key}")) for key in ("mean", "std"))
        weights = dict(encoder.named_parameters()) | dict(encoder.named_buffers())
        fingerprint = fingerprint_of(weights, {**shape, "chunk": chunk, "paired": paired}, *statistics)
    mean, std = (None, None) if statistics is None else (tuple(values) for values in statistics)
    return SpaceInfo(
        public_name(space.name), **shape, fingerprint=fingerprint, mean=mean, std=std, chunk=chunk, paired=paired
    )


def public_name(name: str) -> str:
    """A space's name without the path of somebody's machine: of a folder its own name, ``vae`` aside; a hub id stays."""
    if "/" not in name or (HUB_ID.fullmatch(name) and not Path(name).exists()):
        return name
    parts = [part for part in Path(name).parts if part != "vae"]
    return parts[-1] if parts else name


def fingerprint_of(weights: Mapping[str, Tensor], shape: Mapping[str, Any], mean: list[float], std: list[float]) -> str:
    """Hash of a trained encoder's weights, the shape of its space and the statistics."""
    return hash_parts("trained", dict(shape), {"mean": mean, "std": std}, tensors=weights)


def _numbers(values: Tensor) -> list[float]:
    return values.detach().float().flatten().tolist()


def _named(rule: LatentSpace, name: str) -> LatentSpace:
    rule.name = name
    return rule
