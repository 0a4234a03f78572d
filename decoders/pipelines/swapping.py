"""The doors to the adapters: ``for_pipeline`` makes one, ``swap`` puts one into a pipeline and takes it out again."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from decoders.exported import Exported, ExportError, SpaceInfo
from decoders.pipelines.adapter import PipelineDecoder
from decoders.pipelines.ltx import LTXPipelineDecoder
from decoders.pipelines.own_vae import OwnVAE
from decoders.pipelines.wan import WanPipelineDecoder

KINDS: dict[str, type[PipelineDecoder]] = {"wan": WanPipelineDecoder, "ltx": LTXPipelineDecoder}
LTX_STRIDES = (8, 32)


def for_pipeline(
    decoder: nn.Module,
    vae: nn.Module | str | Path | None = None,
    *,
    kind: Literal["wan", "ltx"] | None = None,
    seed: int | None = None,
    sampling: Mapping[str, Any] | None = None,
) -> PipelineDecoder:
    """A module that a Wan or LTX pipeline of diffusers takes as its autoencoder and that decodes with ``decoder``.

    Args:
        decoder: what ``decoders.load`` returns. Or a network or trained module with ``decode(latent)`` of normalised latents; it
            says nothing of its space, so ``vae`` is needed.
        vae: the autoencoder that the pipeline came with, or the folder (or cached hub id) of it or of the pipeline, read when
            something is first encoded. Needed for image to video; text to video does without where the decoder states its
            space's statistics.
        kind: which pipelines; None: ``vae``'s, or by the strides of the decoder's space.
        seed: of the noise of decoders that sample (REGEN), the same in every call; None: the decoder's own default.
        sampling: further arguments of the decoder's ``decode``, such as ``{"steps": 4}``.

    Raises:
        ExportError: decoder and autoencoder have different latents; neither says what the latents' statistics are; another
            kind of autoencoder.
        FileNotFoundError: no autoencoder at ``vae``; says where it was looked for.
    """
    _require_module(decoder)
    if isinstance(decoder, PipelineDecoder):
        raise ExportError("this decoder stands in for an autoencoder already: give what it was made of, its .decoder")
    if isinstance(vae, PipelineDecoder):
        raise ExportError("vae is a decoder that stands in for an autoencoder: give the pipeline's own, its .own.vae")
    own = None if vae is None else OwnVAE(vae)
    space = decoder.space if isinstance(decoder, Exported) else None
    if own is not None:
        if space is not None:
            own.check(space)
        strides, mean, std = (own.layout.stride_t, own.layout.stride_hw), own.mean, own.std
        if own.rounding and space is not None and space.mean is not None and space.std is not None:
            mean, std = torch.tensor(space.mean), torch.tensor(space.std)  # which the pipeline then reads too
        if kind not in (None, own.layout.kind):
            raise ExportError(
                f"kind={kind}, but the pipeline's autoencoder is a {own.layout.class_name}: leave kind out"
            )
        kind, config = own.layout.kind, own.config
    else:
        strides, mean, std = _stated(decoder, space)
        kind, config = kind or ("ltx" if strides == LTX_STRIDES else "wan"), {}
    if kind not in KINDS:
        raise ExportError(f"kind={kind} is none of {', '.join(KINDS)}")
    cls = KINDS[kind]
    stated = cls.stated(config, mean, std, strides)
    return cls(decoder, stated, mean, std, strides, own, seed=seed, sampling=sampling)


def _require_module(decoder: Any) -> None:
    if not isinstance(decoder, nn.Module):
        raise ExportError(
            f"{str(decoder)[:200]!r} is a {type(decoder).__name__} and no decoder: give decoders.load(...)"
        )


def _stated(decoder: nn.Module, space: SpaceInfo | None) -> tuple[tuple[int, int], torch.Tensor, torch.Tensor]:
    """Strides and statistics as the decoder itself says them."""
    if space is None:
        raise ExportError("the decoder does not say which latents it decodes: give the pipeline's autoencoder as vae")
    if space.mean is None or space.std is None:
        if not getattr(decoder, "can_encode", False):
            raise ExportError(
                f"the decoder's space ({space.name}) states no statistics of raw latents: give the pipeline's autoencoder as vae"
            )
        mean, std = [0.0] * space.channels, [1.0] * space.channels  # its encoder gives what its decoder takes
    else:
        mean, std = space.mean, space.std
    return (space.stride_t, space.stride_hw), torch.tensor(mean), torch.tensor(std)


class Swapped:
    """A pipeline with another decoder in it, until ``undo()`` or the end of a ``with``, which gives the adapter.

    Attributes:
        pipe: the pipeline.
        adapter: what stands in it now.
    """

    def __init__(self, pipe: Any, adapter: PipelineDecoder, before: nn.Module) -> None:
        self.pipe, self.adapter, self._before = pipe, adapter, before
        self._stay = pipe._exclude_from_cpu_offload  # of parts that sequential offloading leaves whole
        pipe._exclude_from_cpu_offload = [*self._stay, "vae"]
        pipe.register_modules(vae=adapter)

    def undo(self) -> None:
        """Put back what was there before; where the pipeline offloads its parts, it offloads that one too. Again: without effect."""
        if self.pipe.vae is not self.adapter:
            return
        if offloaded := hasattr(self.adapter, "_hf_hook"):
            from accelerate.hooks import remove_hook_from_module

            remove_hook_from_module(self.adapter, recurse=True)
        if self.adapter.own is not None and self.adapter.own.is_loaded:
            # Its encoder may have moved with the adapter, its decoder has not.
            self.adapter.own.vae.to(self.adapter.device)
        self.pipe.register_modules(vae=self._before)  # an assignment would keep what a failed save noted of the part
        self.pipe._exclude_from_cpu_offload = self._stay
        if offloaded:
            self.pipe.maybe_free_model_hooks()  # what diffusers itself calls to lay its hooks anew

    def __enter__(self) -> PipelineDecoder:
        return self.adapter

    def __exit__(self, *error: Any) -> None:
        self.undo()


def swap(
    pipe: Any, decoder: nn.Module, *, seed: int | None = None, sampling: Mapping[str, Any] | None = None
) -> Swapped:
    """Put ``decoder`` into ``pipe`` in the place of its autoencoder, on the device of that. See :func:`for_pipeline`.

        with swap(pipe, decoders.load(folder)):
            frames = pipe(prompt).frames

    At once; as a context it is undone at the end. In a pipeline that has a decoder swapped in already, the new one stands for
    the autoencoder too, and ``undo`` brings the earlier one back. ``enable_tiling`` and ``enable_slicing`` of the autoencoder do not
    carry over.

    Raises:
        ExportError: as ``for_pipeline``; the pipeline has no autoencoder; its parts are being offloaded.
    """
    before = getattr(pipe, "vae", None)
    if before is None:
        raise ExportError(f"{type(pipe).__name__} has no vae: build it with vae=for_pipeline(decoder)")
    if hasattr(before, "_hf_hook"):
        raise ExportError(
            "the pipeline's parts are offloaded by hooks, which a swap would miss: swap first, then enable_model_cpu_offload(); "
            "pipe.remove_all_hooks() takes them off"
        )
    own = before
    if isinstance(before, PipelineDecoder):
        own = None if before.own is None else before.own.vae
    _require_module(decoder)
    decoder.to(next(before.parameters()).device)
    return Swapped(pipe, for_pipeline(decoder, own, seed=seed, sampling=sampling), before)
