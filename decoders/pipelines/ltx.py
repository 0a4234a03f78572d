"""LTX-Video: LTXPipeline, LTXImageToVideoPipeline and the others that use an ``AutoencoderKLLTXVideo`` in their way."""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor

from decoders.pipelines.adapter import PipelineDecoder


class LTXPipelineDecoder(PipelineDecoder):
    """Stands for an ``AutoencoderKLLTXVideo``: statistics are tensors of the model, with a scaling factor in ``config``.

    ``config.timestep_conditioning`` is false whatever the own autoencoder says: the pipeline then adds no noise before decoding
    (``decode_timestep``, ``decode_noise_scale`` are without effect). What an image-to-video pipeline encodes is one image, and no
    decoder here looks at references in this space.
    """

    tile = (512, 512)  # diffusers' defaults for LTX
    step = (448, 448)

    @classmethod
    def stated(cls, config: Mapping[str, Any], mean: Tensor, std: Tensor, strides: tuple[int, int]) -> dict[str, Any]:
        """``vae.config`` as these pipelines read it: that of the own autoencoder, completed."""
        return {"latent_channels": len(mean), "scaling_factor": 1.0, **config, "timestep_conditioning": False}

    @property
    def latents_mean(self) -> Float[Tensor, " c"]:
        return self.mean

    @property
    def latents_std(self) -> Float[Tensor, " c"]:
        """Before the scaling factor, which the pipeline divides by."""
        exact = self.own is not None and not self.own.rounding
        return self.own.unscaled_std if exact else self.std * self.config.scaling_factor

    @property
    def spatial_compression_ratio(self) -> int:
        return self.stride_hw

    @property
    def temporal_compression_ratio(self) -> int:
        return self.stride_t

    def enable_tiling(
        self,
        tile_sample_min_height: int | None = None,
        tile_sample_min_width: int | None = None,
        tile_sample_min_num_frames: int | None = None,
        tile_sample_stride_height: int | float | None = None,
        tile_sample_stride_width: int | float | None = None,
        tile_sample_stride_num_frames: int | float | None = None,
    ) -> None:
        """As :meth:`PipelineDecoder.enable_tiling`, with LTX's arguments. Sizes in frames mean nothing: all are decoded at once."""
        super().enable_tiling(
            tile_sample_min_height, tile_sample_min_width, tile_sample_stride_height, tile_sample_stride_width
        )
