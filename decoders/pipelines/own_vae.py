"""The autoencoder that a pipeline came with: its shapes and statistics at once, its encoder when an image is first encoded."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from decoders.exported import ExportError, SpaceInfo
from decoders.latent_spaces.diffusers import latent_statistics, load_vae
from decoders.latent_spaces.diffusers_files import READERS, VAELayout, find_folder, find_weights, read_layout

KINDS = ("wan", "ltx")
FAR = 1e-3  # statistics further apart than this, in units of the latents, are those of another space


class OwnVAE:
    """An ``AutoencoderKLWan`` or ``AutoencoderKLLTXVideo``, or the folder (or cached hub id) of one.

    A plain object and no module: what holds it does not move or cast the half of it that is not used.

    Attributes:
        config: as its ``config.json`` has it.
        layout: channels and strides.
        mean, std: "c", float32, of its latents: ``normalised = (raw - mean) / std``. A scaling factor is in ``std``, and not in
            ``unscaled_std``.
        rounding: of them, relative, beyond float32's: an LTX autoencoder that was cast to bfloat16 has its statistics rounded with its weights.

    Raises:
        FileNotFoundError: there is no such folder; says where it was looked for.
        ValueError: another kind of model.
    """

    def __init__(self, source: nn.Module | str | Path) -> None:
        self._folder: Path | None = None
        self._vae: nn.Module | None = None
        if isinstance(source, nn.Module):
            self.layout = _layout_of(source)
            self.config: Mapping[str, Any] = source.config
            self._vae = stated = source
        else:
            self._folder = find_folder(str(source), None, download=False)
            self.layout = read_layout(self._folder)
            self.config = json.loads((self._folder / "config.json").read_text())
            stated = _statistics_on_disk(self._folder, self.config, self.layout)
        if self.layout.kind not in KINDS:
            raise ExportError(
                f"a pipeline with {self.layout.class_name}: only pipelines of AutoencoderKLWan and AutoencoderKLLTXVideo "
                "take a decoder of this project"
            )
        self.mean, self.std = (part.flatten().float() for part in latent_statistics(stated, self.layout))
        self.unscaled_std = stated.latents_std.detach().float().cpu() if self.layout.kind == "ltx" else self.std
        cast = self.layout.kind == "ltx" and stated.latents_std.dtype != torch.float32
        self.rounding = torch.finfo(stated.latents_std.dtype).eps if cast else 0.0

    @property
    def is_loaded(self) -> bool:
        return self._vae is not None

    @property
    def vae(self) -> nn.Module:
        """The autoencoder with its weights, read from the folder when this is first asked."""
        if self._vae is None:
            self._vae = load_vae(self._folder, self.layout)
        return self._vae

    def check(self, space: SpaceInfo) -> None:
        """Raise ExportError unless a decoder of ``space`` decodes this autoencoder's latents."""
        for name in ("channels", "stride_t", "stride_hw"):
            ours, theirs = getattr(space, name), getattr(self.layout, name)
            if ours != theirs:
                raise ExportError(
                    f"the decoder is of the space {space.name} with {name}={ours}, the pipeline's latents have "
                    f"{name}={theirs}: take a decoder that was trained in the pipeline's space"
                )
        for name, ours, theirs in (("mean", space.mean, self.mean), ("std", space.std, self.std)):
            if ours is not None and self._is_far(theirs.new_tensor(ours), theirs):
                raise ExportError(
                    f"the decoder is of the space {space.name}, whose latents have another {name} than the pipeline's: the "
                    "two have different autoencoders; take a decoder that was trained in the pipeline's space"
                )

    def _is_far(self, ours: Tensor, theirs: Tensor) -> bool:
        # Twice: the scaling factor is divided by after the rounding.
        return bool(((ours - theirs).abs() > FAR + 2 * self.rounding * ours.abs()).any())


def _layout_of(vae: nn.Module) -> VAELayout:
    name = type(vae).__name__
    if name not in READERS:
        raise ExportError(f"{name} is no video autoencoder of diffusers; give pipe.vae, or the pipeline's folder")
    return READERS[name](vae.config)


def _statistics_on_disk(folder: Path, config: Mapping[str, Any], layout: VAELayout) -> nn.Module:
    """What ``latent_statistics`` reads, without the weights: LTX keeps its numbers among them."""
    stated = nn.Module()
    stated.config = config
    if layout.kind == "ltx":
        found = _tensors(find_weights(folder, str(folder)), ("latents_mean", "latents_std"))
        stated.latents_mean, stated.latents_std = found["latents_mean"], found["latents_std"]
    return stated


def _tensors(files: list[Path], names: tuple[str, ...]) -> dict[str, Tensor]:
    from safetensors import safe_open

    found = {}
    for path in files:
        with safe_open(path, framework="pt") as tensors:
            found |= {name: tensors.get_tensor(name) for name in names if name in tensors.keys()}  # noqa: SIM118
    if missing := [name for name in names if name not in found]:
        raise ExportError(
            f"{files[0].parent} has no {missing[0]} in its weights: save it again with a current diffusers"
        )
    return found
