"""Wan 2.1 and 2.2: WanPipeline, WanImageToVideoPipeline and the others that use an ``AutoencoderKLWan`` in their way."""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor

from decoders.pipelines.adapter import PipelineDecoder


class WanPipelineDecoder(PipelineDecoder):
    """Stands for an ``AutoencoderKLWan``: statistics are lists in ``config``, sizes are ``scale_factor_temporal`` and ``_spatial``.

    Image to video: the pipeline encodes its image as the first of otherwise blank frames (Wan 2.2 TI2V: by itself), a last image
    as the last. Those pictures, at the video's size, are the references of the decoding that follows; text to video has none.
    """

    @classmethod
    def stated(cls, config: Mapping[str, Any], mean: Tensor, std: Tensor, strides: tuple[int, int]) -> dict[str, Any]:
        """``vae.config`` as these pipelines read it: that of the own autoencoder, completed."""
        numbers = {"z_dim": len(mean), "latents_mean": mean.tolist(), "latents_std": std.tolist()}
        return {**numbers, **config, "scale_factor_temporal": strides[0], "scale_factor_spatial": strides[1]}

    @property
    def temperal_downsample(self) -> list[bool]:
        """Which of three halvings of the picture halve the frames too; spelt as diffusers does. Video to video counts them."""
        halvings = self.stride_t.bit_length() - 1
        return [False] * (3 - halvings) + [True] * halvings

    def _see(self, x: Float[Tensor, "b 3 t h w"]) -> None:
        if not self.uses_reference:
            return
        ends = x[:, :, :: max(x.shape[2] - 1, 1)]
        # A blank frame is exactly 0 in [-1, 1], which lies between two of a picture's 256 values.
        self._seen = ends if ends[:, :, -1].any() else ends[:, :, :1]
