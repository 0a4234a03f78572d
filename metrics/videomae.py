"""The VideoMAE encoder (Tong et al. 2022; v2: Wang et al. 2023) as content-debiased Fréchet distances read it.

Ge et al. 2024 ("On the Content Bias in Fréchet Video Distance") found that distances in I3D's space hardly see motion, and
that features of a large self-supervised encoder do. Their number is that of ``vit_g_hybrid_pt_1200e_ssv2_ft.pth`` (OpenGVLab,
VideoMAE v2 ViT-g/14): 16 frames of 224 x 224, tokens averaged and normalised, before the classifier. Their code (package
``cd-fvd``) gives the network RGB in [0, 1] as it is, without the ImageNet mean and deviation that it was trained with; so
do we, or the numbers would not be theirs.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from losses.pretrained import WeightsDamaged, WeightsNotFound, cache_dir, digest, read_tensors
from metrics.i3d import resize

SIZE = 224
FRAMES = 16
FILE = "vit_g_hybrid_pt_1200e_ssv2_ft"
URL = f"https://huggingface.co/OpenGVLab/InternVideoMAE_models/resolve/main/mae-g/{FILE}.pth"
_EPS = 1e-6
_HEADS = {384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16}  # ViT-S, B, L, H, g: no tensor tells it


@dataclass(frozen=True)
class Layout:
    """What the tensors say about their network."""

    dim: int
    depth: int
    heads: int
    hidden: int
    patch: int
    tubelet: int  # frames of a token

    @classmethod
    def of(cls, tensors: Mapping[str, Any], heads: int | None = None) -> "Layout":
        """Read from the shapes; ``heads`` is that of the released network of this width, if not given.

        Raises WeightsDamaged for tensors that are not a fine-tuned VideoMAE's, or cannot take 16 x 224 x 224.
        """
        stem, first = tensors.get("patch_embed.proj.weight"), tensors.get("blocks.0.mlp.fc1.weight")
        if stem is None or first is None or stem.ndim != 5 or first.ndim != 2:
            raise WeightsDamaged(
                "no patch_embed.proj.weight of five axes and blocks.0.mlp.fc1.weight: it must be a fine-tuned or "
                "distilled encoder with the names of OpenGVLab's VideoMAEv2 (not a pre-training checkpoint, whose names "
                "begin with encoder., and not transformers' naming)"
            )
        dim, _, tubelet, patch, _ = stem.shape
        depth = 1 + max(int(key.split(".")[1]) for key in tensors if key.startswith("blocks."))
        heads = heads or _HEADS.get(dim)
        if heads is None or dim % heads:
            raise WeightsDamaged(
                f"no released VideoMAE has width {dim} (heads {heads}); known widths: {sorted(_HEADS)}"
            )
        if SIZE % patch or FRAMES % tubelet:
            raise WeightsDamaged(f"patches of {tubelet}x{patch}x{patch} do not divide {FRAMES}x{SIZE}x{SIZE}")
        return cls(dim, depth, heads, first.shape[0], patch, tubelet)

    @property
    def tokens(self) -> int:
        return FRAMES // self.tubelet * (SIZE // self.patch) ** 2

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor that the network needs, under OpenGVLab's names."""
        dim, hidden = self.dim, self.hidden
        shapes: dict[str, tuple[int, ...]] = {
            "patch_embed.proj.weight": (dim, 3, self.tubelet, self.patch, self.patch),
            "patch_embed.proj.bias": (dim,),
            "fc_norm.weight": (dim,),
            "fc_norm.bias": (dim,),
        }
        block = {
            "norm1.weight": (dim,), "norm1.bias": (dim,), "norm2.weight": (dim,), "norm2.bias": (dim,),
            "attn.qkv.weight": (3 * dim, dim), "attn.q_bias": (dim,), "attn.v_bias": (dim,),
            "attn.proj.weight": (dim, dim), "attn.proj.bias": (dim,),
            "mlp.fc1.weight": (hidden, dim), "mlp.fc1.bias": (hidden,),
            "mlp.fc2.weight": (dim, hidden), "mlp.fc2.bias": (dim,),
        }  # fmt: skip
        return shapes | {f"blocks.{i}.{key}": shape for i in range(self.depth) for key, shape in block.items()}


class VideoMae(nn.Module):
    """Frozen. ``tensors``: under OpenGVLab's names, float; see :meth:`load`. Positions are the fixed sinusoids, or
    ``pos_embed`` where the checkpoint has learned ones.

    ``fingerprint`` names the weights whatever file held them.
    """

    layer = "mean over tokens, normalised; before the classifier"

    def __init__(self, tensors: Mapping[str, Tensor], heads: int | None = None):
        super().__init__()
        self.layout = layout = Layout.of(tensors, heads)
        tensors = _checked(tensors, layout)
        self.fingerprint = f"videomae:{digest(tensors)[:12]}"
        positions = tensors.pop("pos_embed", None)
        self.register_buffer(
            "positions", sinusoids(layout.tokens, layout.dim) if positions is None else positions[0], persistent=False
        )
        with torch.device("meta"):
            self.patch_embed = nn.Sequential()
            side = (layout.tubelet, layout.patch, layout.patch)
            self.patch_embed.proj = nn.Conv3d(3, layout.dim, side, side)
            self.blocks = nn.ModuleList(_Block(layout) for _ in range(layout.depth))
            self.fc_norm = nn.LayerNorm(layout.dim, eps=_EPS)
        self.load_state_dict(tensors, strict=True, assign=True)
        self.requires_grad_(False).eval()

    @classmethod
    def load(cls, weights: str | os.PathLike | None = None) -> "VideoMae":
        """From a torch file (tensors flat, or under "module" or "model") or safetensors; a folder that holds it; or,
        for None, our cache folder.

        Raises WeightsNotFound or WeightsDamaged, which say what is looked for.
        """
        path = _find(weights)
        tensors = read_tensors(path)
        for key in ("model", "module"):
            tensors = tensors.get(key, tensors) if isinstance(tensors, Mapping) else {}
        try:
            return cls(tensors)
        except WeightsDamaged as error:
            raise WeightsDamaged(f"{path} is no VideoMAE: {error}") from error

    @staticmethod
    def check(frames: int) -> None:
        """ValueError for windows of another length than the networks were trained with."""
        if frames != FRAMES:
            raise ValueError(
                f"VideoMAE reads windows of {FRAMES} frames, got {frames}: its positions are fixed, and no published number "
                f"has another length; ask for fvd_videomae_{FRAMES}f"
            )

    def forward(self, video: Float[Tensor, "b 3 16 224 224"]) -> Float[Tensor, "b d"]:
        """RGB in [0, 1] -> features."""
        x = self.patch_embed.proj(video).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.fc_norm(x.mean(dim=1))

    @staticmethod
    def prepare(video: Float[Tensor, "b 3 t h w"]) -> Float[Tensor, "b 3 t 224 224"]:
        """Frames of any size in [-1, 1] -> what the network reads: the [0, 1] that cd-fvd feeds."""
        return (resize(video, SIZE) + 1) / 2


class _Block(nn.Module):
    def __init__(self, layout: Layout):
        super().__init__()
        self.norm1 = nn.LayerNorm(layout.dim, eps=_EPS)
        self.attn = _Attention(layout)
        self.norm2 = nn.LayerNorm(layout.dim, eps=_EPS)
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(layout.dim, layout.hidden), "fc2": nn.Linear(layout.hidden, layout.dim)}
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class _Attention(nn.Module):
    """Queries and values have a bias, keys none (it would cancel in the softmax)."""

    def __init__(self, layout: Layout):
        super().__init__()
        self.heads = layout.heads
        self.qkv = nn.Linear(layout.dim, 3 * layout.dim, bias=False)
        self.q_bias = nn.Parameter(torch.empty(layout.dim))
        self.v_bias = nn.Parameter(torch.empty(layout.dim))
        self.proj = nn.Linear(layout.dim, layout.dim)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        parts = (query + self.q_bias, key, value + self.v_bias)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        x = F.scaled_dot_product_attention(query, key, value)
        return self.proj(x.transpose(1, 2).flatten(2))


def sinusoids(count: int, dim: int) -> Float[Tensor, "count dim"]:
    """Vaswani et al. 2017: sine in even channels, cosine in odd ones, wavelengths 2 pi to 20000 pi over the channels."""
    position = torch.arange(count, dtype=torch.float64)[:, None]
    angle = position / 10000 ** (2 * (torch.arange(dim) // 2).double() / dim)
    return torch.where(torch.arange(dim) % 2 == 0, angle.sin(), angle.cos()).float()


def _checked(tensors: Mapping[str, Any], layout: Layout) -> dict[str, Tensor]:
    shapes = layout.shapes()
    if "pos_embed" in tensors:
        shapes["pos_embed"] = (1, layout.tokens, layout.dim)
    faults = [f"{key} is missing" for key in shapes if key not in tensors]
    faults += [
        f"{key} has shape {tuple(tensors[key].shape)}, not {shape}"
        for key, shape in shapes.items()
        if key in tensors and tuple(tensors[key].shape) != shape
    ]
    faults += [f"{key} is not known" for key in tensors if key not in shapes and not key.startswith("head.")]
    if faults:
        raise WeightsDamaged(f"{faults[0]} ({len(faults)} such in all; read as {layout})")
    return {key: tensors[key].float().contiguous() for key in shapes}


def _find(weights: str | os.PathLike | None) -> Path:
    path = cache_dir() if weights is None else Path(weights).expanduser()
    if path.is_file():
        return path
    names = [f"{FILE}.pth", f"{FILE}.safetensors"]
    for name in names:
        if (path / name).is_file():
            return path / name
    where = f"{path} does not exist" if not path.exists() else f"the folder {path} has none of {names}"
    raise WeightsNotFound(
        f"VideoMAE weights: {where}. Any one of these helps: (1) set the config's weights path (videomae) to the file or to "
        f"a folder that holds it; (2) put {FILE}.pth (about 4 GB, from {URL}) into {cache_dir()}, or point WEIGHTS_ROOT at "
        "a folder that holds it"
    )
