"""CLIP (Radford et al. 2021) from a local folder: does a clip keep its content, and which category is it of."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from losses.pretrained import WeightsDamaged, WeightsNotFound, digest
from metrics.base import Metric, exact_fp32

if TYPE_CHECKING:
    from transformers import CLIPModel

_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP's training images
_FRAMES_OF_A_CATEGORY = 8


class ClipConsistency(Metric):
    """Cosine between the CLIP image embeddings of a frame and the one before it (Esser et al. 2023, EvalCrafter).

    Of the prediction alone, at most 1; the truth's own value is ``metric(target, target)``. ``weights``: a folder as
    transformers saves a CLIP model; papers mean ViT-L/14. Embeddings are the projected ones. Frames are resized as CLIP's
    (bicubic with antialiasing, shorter side to the network's, centre crop), in float. What a mask does not count is
    filled with CLIP's mean colour.
    """

    name, higher_is_better, pairs = "clip_consistency", True, True

    def __init__(self, weights: str | os.PathLike | None):
        self._model = load_clip(weights)
        self._fingerprint = fingerprint(self._model)

    @property
    def protocol(self) -> dict[str, Any]:
        return {
            "backbone": self._fingerprint,
            "embedding": "projected, of the image",
            "resize": "bicubic antialiased, shorter side, centre crop",
            "per": "frame, against the one before; of the prediction alone; the first has none",
        }

    def _frames(self, prediction: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
        if mask is not None:
            prediction = torch.where(mask > 0, prediction, _of_channels(_MEAN, prediction) * 2 - 1)
        embedded = embed(self._model, prediction)
        return (embedded[1:] * embedded[:-1]).sum(dim=1)


class ClipCategories:
    """Zero-shot categories of clips: ``categories(video) -> one of the names for each clip``.

    The category whose prompt (``template`` with its name) has the greatest cosine to the mean embedding of up to 8
    frames, evenly spaced over the clip. ``folder``: a CLIP model with its tokenizer, as transformers saves them.
    ``fingerprint`` names the network.

    Raises:
        ValueError: no category, one named twice, or a template without ``{category}``.
        WeightsNotFound, WeightsDamaged: as :func:`load_clip`; also without a tokenizer.
    """

    def __init__(
        self, folder: str | os.PathLike | None, categories: Sequence[str], template: str = "a video of {category}"
    ):
        if not categories or len(set(categories)) != len(categories):
            raise ValueError(f"categories must be one or more different names, got {list(categories)}")
        if "{category}" not in template:
            raise ValueError(f"the template must contain {{category}}, got {template!r}")
        self.categories = list(categories)
        self._model = load_clip(folder)
        self.fingerprint = fingerprint(self._model)
        prompts = [template.replace("{category}", name) for name in self.categories]
        self._prompts = _embed_prompts(self._model, Path(folder).expanduser(), prompts)

    @torch.no_grad()
    def __call__(self, video: Float[Tensor, "b 3 t h w"]) -> list[str]:
        """The category of each clip; RGB in [-1, 1]."""
        t = video.shape[2]
        chosen = torch.linspace(0, t - 1, min(t, _FRAMES_OF_A_CATEGORY)).round().long().tolist()
        found = []
        with exact_fp32(video.device):
            for clip in video:
                embedded = embed(self._model, clip[:, chosen].transpose(0, 1).float().clamp(-1, 1)).mean(dim=0)
                found.append(self.categories[(self._prompts.to(embedded.device) @ embedded).argmax().item()])
        return found


def load_clip(folder: str | os.PathLike | None) -> "CLIPModel":
    """The frozen float32 model in ``folder`` (config.json and model.safetensors), from the disk alone.

    Raises:
        WeightsNotFound: no folder was given, or it holds no model; says what to download.
        WeightsDamaged: the files are not a whole CLIP.
    """
    help = "save openai/clip-vit-large-patch14 (config.json, model.safetensors and the tokenizer's files) into a folder"
    help += " and name that as weights of clip"
    if folder is None:
        raise WeightsNotFound(f"CLIP has no weights of its own: {help}")
    path = Path(folder).expanduser()
    if not (path / "config.json").is_file():
        raise WeightsNotFound(f"CLIP weights: there is no {path / 'config.json'}: {help}")
    from transformers import CLIPModel  # here: it takes seconds

    try:
        with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
            model, said = CLIPModel.from_pretrained(
                path, local_files_only=True, dtype=torch.float32, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise WeightsDamaged(f"{path} holds no CLIP that can be read ({error}): {help}") from error
    if missing := sorted(said["missing_keys"]):  # transformers draws them at random and only warns
        raise WeightsDamaged(f"{path} holds no whole CLIP: {missing[0]} is missing ({len(missing)} in all): {help}")
    return model.requires_grad_(False).eval()


def fingerprint(model: "CLIPModel") -> str:
    """Architecture and digest of the weights: equal on every machine that has the same network."""
    vision = model.config.vision_config
    what = f"CLIP ViT {vision.num_hidden_layers} layers, patch {vision.patch_size}, {vision.image_size} px"
    return f"{what}, {model.config.projection_dim}-d:{digest(model.state_dict())[:12]}"


def embed(model: "CLIPModel", frames: Float[Tensor, "frames 3 h w"]) -> Float[Tensor, "frames d"]:
    """Projected image embeddings at length 1; RGB in [-1, 1]."""
    _follow(model, frames.device)
    pixels = preprocess(frames, model.config.vision_config.image_size)
    return F.normalize(model.get_image_features(pixel_values=pixels).pooler_output, dim=1)


def preprocess(frames: Float[Tensor, "frames 3 h w"], size: int) -> Float[Tensor, "frames 3 size size"]:
    """CLIP's: shorter side to ``size`` (bicubic, antialiased), centre crop, [0, 1], its mean and deviation."""
    h, w = frames.shape[-2:]
    resized = [max(size, side * size // min(h, w)) for side in (h, w)]
    rgb = F.interpolate((frames + 1) / 2, resized, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    top, left = ((side - size) // 2 for side in resized)
    rgb = rgb[..., top : top + size, left : left + size]
    return (rgb - _of_channels(_MEAN, rgb)) / _of_channels(_STD, rgb)


@torch.no_grad()
def _embed_prompts(model: "CLIPModel", folder: Path, prompts: list[str]) -> Tensor:
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):  # it would make an empty one
        raise WeightsNotFound(f"{folder} has no tokenizer (tokenizer.json, or vocab.json and merges.txt)")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    longest = model.config.text_config.max_position_embeddings
    tokens = tokenizer(prompts, padding=True, truncation=True, max_length=longest, return_tensors="pt")
    given = {key: tokens[key] for key in ("input_ids", "attention_mask")}
    with exact_fp32(torch.device("cpu")):
        return F.normalize(model.get_text_features(**given).pooler_output, dim=1)


def _follow(model: "CLIPModel", device: torch.device) -> None:
    with torch.inference_mode(False):  # weights moved in inference mode stay inference tensors for good
        model.to(device)


def _of_channels(values: tuple[float, float, float], like: Tensor) -> Tensor:
    return torch.tensor(values, device=like.device).view(3, 1, 1)
