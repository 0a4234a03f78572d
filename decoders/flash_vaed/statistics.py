"""What calibration remembers of a feature map: how many positions, the channels' means and their centred Gram matrix.

Everything that pruning decides (which channels are kept, what they say of the others, how strong they are) is a function
of these three, so that features are read once, streamed, and never stored.
"""

import os
from pathlib import Path

import torch
from jaxtyping import Float, Float64
from safetensors.torch import load_file, save_file
from torch import Tensor

_ELEMENTS_PER_CHUNK = 1 << 24  # 128 MiB of float64: bounds memory, changes no value beyond rounding


class ChannelStatistics:
    """Second-order statistics of C channels in float64, gathered where the features are.

    ``positions`` of every clip and call enter (None: all), spread evenly over frames and pixels with seeded jitter, so
    that the same clips in the same order give the same statistics however they are batched. Batches are merged by their
    means and centred Gram matrices (Chan, Golub and LeVeque, 1983): no large sums are subtracted.
    """

    def __init__(self, channels: int, positions: int | None = None, seed: int = 0) -> None:
        """Raises ValueError if there is no channel, or no position is to be read."""
        if channels < 1 or (positions is not None and positions < 1):
            raise ValueError(f"statistics need channels and positions, got {channels} and {positions}")
        self.channels, self.positions = channels, positions
        self.count = 0
        self.mean = torch.zeros(channels, dtype=torch.float64)
        self.gram = torch.zeros(channels, channels, dtype=torch.float64)
        self._generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def update(self, features: Float[Tensor, "b c t h w"]) -> None:
        """Read a batch, in any precision, on any device. Raises ValueError for other channels or what is not finite."""
        if features.shape[1] != self.channels:
            raise ValueError(f"these statistics are of {self.channels} channels; the features have {features.shape[1]}")
        for clip in features:
            clip = clip.flatten(1)
            if self.positions is not None and self.positions < clip.shape[1]:
                clip = clip[:, self._sample(clip.shape[1]).to(clip.device)]
            for chunk in clip.split(max(1, _ELEMENTS_PER_CHUNK // self.channels), dim=1):
                self._add(chunk)

    def _sample(self, total: int) -> Tensor:
        """One position of each of ``positions`` equal parts of ``range(total)``: sorted, all different."""
        edges = torch.arange(self.positions + 1) * total // self.positions
        jitter = torch.rand(self.positions, generator=self._generator, dtype=torch.float64)
        return edges[:-1] + (jitter * edges.diff()).long()

    def _add(self, chunk: Float[Tensor, "c m"]) -> None:
        device = chunk.device if chunk.device.type != "mps" else torch.device("cpu")  # MPS has no float64
        chunk = chunk.to(device).double()
        mean = chunk.mean(1)
        if not mean.isfinite().all():
            raise ValueError(
                "the calibration features are not finite; look for the clip or layer that makes NaN or Inf"
            )
        chunk = chunk - mean[:, None]
        self._merge(chunk.shape[1], mean, chunk @ chunk.T)

    def _merge(self, count: int, mean: Tensor, gram: Tensor) -> None:
        if not count:
            return
        self.mean, self.gram = self.mean.to(mean.device), self.gram.to(mean.device)
        total = self.count + count
        shift = mean - self.mean
        self.gram = self.gram + gram + torch.outer(shift, shift) * (self.count * count / total)
        self.mean = self.mean + shift * (count / total)
        self.count = total

    def merge(self, other: "ChannelStatistics") -> None:
        """Take in what another rank or run gathered. Raises ValueError if its channels are not as many."""
        if other.channels != self.channels:
            raise ValueError(f"statistics of {other.channels} channels cannot join statistics of {self.channels}")
        self._merge(other.count, other.mean, other.gram)

    def require(self, rank: int) -> None:
        """Raise ValueError unless there are positions enough to tell ``rank`` channels apart (one goes to the mean)."""
        if self.count < rank + 1:
            raise ValueError(
                f"calibration clips too few for the rank: {self.count} positions were gathered and at least {rank + 1} "
                f"are needed to keep {rank} of {self.channels} channels; give more or larger clips"
            )

    @property
    def covariance(self) -> Float64[Tensor, "c c"]:
        """Mean product of two centred channels."""
        return self.gram / max(self.count, 1)

    @property
    def variance(self) -> Float64[Tensor, " c"]:
        """Mean square of each centred channel."""
        return self.covariance.diagonal().clamp(min=0)

    @property
    def mean_square(self) -> Float64[Tensor, " c"]:
        """Mean square of each channel, its mean included."""
        return self.variance + self.mean.square()

    def tensors(self) -> dict[str, Tensor]:
        """``count``, ``mean`` and ``gram`` on the CPU: all there is to store."""
        return {"count": torch.tensor([self.count]), "mean": self.mean.cpu(), "gram": self.gram.cpu()}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> "ChannelStatistics":
        """The inverse of :meth:`tensors`. Raises ValueError for missing names and shapes that do not fit."""
        wrong = sorted({"count", "mean", "gram"} ^ set(tensors))
        if wrong or tensors["gram"].shape != (len(tensors["mean"]),) * 2:
            raise ValueError(
                f"not channel statistics: names {sorted(tensors)}, needed are count (1), mean (c), gram (c c)"
            )
        statistics = cls(len(tensors["mean"]))
        statistics.count = int(tensors["count"])
        statistics.mean, statistics.gram = tensors["mean"].double(), tensors["gram"].double()
        return statistics

    def save(self, path: str | os.PathLike) -> None:
        """Write the three tensors as safetensors."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in self.tensors().items()}, path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "ChannelStatistics":
        """Read what :meth:`save` wrote. Raises FileNotFoundError, or ValueError for another file."""
        return cls.from_tensors(load_file(path))
