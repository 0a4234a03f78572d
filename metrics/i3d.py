"""I3D (Carreira and Zisserman 2017, "Quo Vadis, Action Recognition?"): RGB, Kinetics-400, as Fréchet distances read it.

The network of the TensorFlow release: SAME padding (which pads the end where the padding is odd), batch normalisation
without a scale, eps 1e-3. Normalisation is folded into the convolutions when the weights are read.
"""

import os
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from losses.pretrained import digest, load_weights
from losses.released import I3D_LOGITS, I3D_MIXED, i3d_units

SIZE = 224
LEAST_FRAMES = 10
_EPS = 1e-3


class I3d(nn.Module):
    """Frozen. ``tensors``: named and shaped as in :mod:`losses.released`; see :meth:`load`.

    ``fingerprint`` names the weights whatever file held them.
    """

    layer = "400 logits, mean over time"

    def __init__(self, tensors: Mapping[str, Tensor]):
        super().__init__()
        self.fingerprint = f"i3d:{digest(tensors)[:12]}"
        self.stem = nn.ModuleDict()
        self.mixed = nn.ModuleDict({name: _Mixed() for name in I3D_MIXED})
        for name in i3d_units():
            unit = _Unit(_folded(tensors, name), stride=2 if name == "Conv3d_1a_7x7" else 1)
            if "Branch" in name:
                block, branch, inner = name.split(".")
                self.mixed[block].units[f"{branch}/{inner}"] = unit
            else:
                self.stem[name] = unit
        last = (tensors[f"{I3D_LOGITS}.conv.weight"], tensors[f"{I3D_LOGITS}.conv.bias"])
        self.logits = _Unit(last, relu=False)
        self.requires_grad_(False).eval()

    @classmethod
    def load(cls, weights: str | os.PathLike | None = None) -> "I3d":
        """From a file or folder; None looks in the usual places (:mod:`losses.pretrained`, name "i3d").

        Raises WeightsNotFound or WeightsDamaged.
        """
        return cls(load_weights("i3d", weights))

    @staticmethod
    def check(frames: int) -> None:
        """ValueError for windows that are too short."""
        if frames < LEAST_FRAMES:
            raise ValueError(
                f"I3D needs windows of {LEAST_FRAMES} frames or more, got {frames}: it divides time by 8 and then pools "
                f"pairs, which takes 9; the published values that it is checked against begin at {LEAST_FRAMES}"
            )

    def forward(self, video: Float[Tensor, "b 3 t 224 224"]) -> Float[Tensor, "b 400"]:
        """RGB in [-1, 1] -> logits, averaged over time."""
        return self.logits(self.pooled(video)).mean(dim=(2, 3, 4))

    def pooled(self, video: Float[Tensor, "b 3 t 224 224"]) -> Float[Tensor, "b 1024 n 1 1"]:
        """What the logits are made of: the last block, averaged over pairs of positions in time and all in space."""
        x = self.stem["Conv3d_1a_7x7"](video)
        x = _pool(x, (1, 3, 3), (1, 2, 2))
        x = self.stem["Conv3d_2c_3x3"](self.stem["Conv3d_2b_1x1"](x))
        x = _pool(x, (1, 3, 3), (1, 2, 2))
        for name, block in self.mixed.items():
            if name == "Mixed_4b":
                x = _pool(x, (3, 3, 3), (2, 2, 2))
            elif name == "Mixed_5b":
                x = _pool(x, (2, 2, 2), (2, 2, 2))
            x = block(x)
        return F.avg_pool3d(x, (2, 7, 7), stride=1)

    @staticmethod
    def prepare(video: Float[Tensor, "b 3 t h w"]) -> Float[Tensor, "b 3 t 224 224"]:
        """Frames of any size in [-1, 1] -> what the network reads."""
        return resize(video, SIZE)


class _Unit(nn.Module):
    """Convolution with SAME padding, and ReLU."""

    def __init__(self, tensors: tuple[Tensor, Tensor], stride: int = 1, relu: bool = True):
        super().__init__()
        self.weight, self.bias = (nn.Parameter(tensor, requires_grad=False) for tensor in tensors)
        self.stride, self.relu = stride, relu

    def forward(self, x: Tensor) -> Tensor:
        padding = [same_padding(n, self.weight.shape[-1], self.stride) for n in x.shape[2:]]
        if any(before != after for before, after in padding):
            x, padding = _padded(x, padding, 0.0), [(0, 0)] * 3
        x = F.conv3d(x, self.weight, self.bias, self.stride, [before for before, _ in padding])
        return x.relu_() if self.relu else x


class _Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.units = nn.ModuleDict()

    def forward(self, x: Tensor) -> Tensor:
        unit = self.units
        return torch.cat(
            [
                unit["Branch_0/Conv3d_0a_1x1"](x),
                unit["Branch_1/Conv3d_0b_3x3"](unit["Branch_1/Conv3d_0a_1x1"](x)),
                unit["Branch_2/Conv3d_0b_3x3"](unit["Branch_2/Conv3d_0a_1x1"](x)),
                unit["Branch_3/Conv3d_0b_1x1"](_pool(x, (3, 3, 3), (1, 1, 1))),
            ],
            dim=1,
        )


def same_padding(length: int, kernel: int, stride: int) -> tuple[int, int]:
    """TensorFlow's SAME: as many outputs as strides begin in ``length``; what is odd goes to the end."""
    total = max(0, (-(-length // stride) - 1) * stride + kernel - length)
    return total // 2, total - total // 2


def resize(video: Float[Tensor, "b 3 t h w"], size: int) -> Float[Tensor, "b 3 t size size"]:
    """Each frame to ``size`` x ``size``: bilinear at pixel centres, without antialiasing, whatever its aspect.

    That is what the public PyTorch evaluations do (StyleGAN-V, cd-fvd); :data:`RESIZE` says so in a protocol.
    """
    b, _, t, _, _ = video.shape
    frames = video.transpose(1, 2).flatten(0, 1)
    frames = F.interpolate(frames, (size, size), mode="bilinear", align_corners=False, antialias=False)
    return frames.unflatten(0, (b, t)).transpose(1, 2)


RESIZE = "bilinear, align_corners=False, no antialiasing, aspect not kept"


def _pool(x: Tensor, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> Tensor:
    padding = [same_padding(*sizes) for sizes in zip(x.shape[2:], kernel, stride, strict=True)]
    if any(before != after for before, after in padding):
        x, padding = _padded(x, padding, float("-inf")), [(0, 0)] * 3
    return F.max_pool3d(x, kernel, stride, [before for before, _ in padding])


def _padded(x: Tensor, padding: list[tuple[int, int]], value: float) -> Tensor:
    return F.pad(x, [side for pair in reversed(padding) for side in pair], value=value)


def _folded(tensors: Mapping[str, Tensor], unit: str) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that does what convolution and normalisation did, made in float64."""
    weight, mean, variance, bias = (
        tensors[f"{unit}.{key}"].double() for key in ("conv.weight", "bn.running_mean", "bn.running_var", "bn.bias")
    )
    scale = (variance + _EPS).rsqrt()
    return (weight * scale[:, None, None, None, None]).float(), (bias - mean * scale).float()
