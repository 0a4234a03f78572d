"""VideoVAE+'s latents (16 channels, 4 x 8 x 8; arXiv 2412.17805), frozen. Not causal: n latent frames are 4n frames.

The weights are the release's own and not ours to give; ``experiments/_videovaeplus.yaml`` says where they are.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from decoders.backbones import videovaeplus_weights
from decoders.backbones.videovaeplus import VideoVAEPlusDecoder, VideoVAEPlusEncoder
from decoders.latent_spaces.base import LatentSpace, hash_parts
from decoders.latent_spaces.learned import LOG_VARIANCE_RANGE, draw

STRIDE_T, STRIDE_HW = 4, 8  # of all releases


@dataclass
class VideoVAEPlusSpaceConfig:
    """Which weights, and how they are used."""

    path: str
    """The release's checkpoint, or a safetensors file with the same names."""
    channels: int = 16
    """Latent channels; weights with another number are refused."""
    chunk_frames: int | None = None
    """Frames that are encoded, and decoded, by themselves; null: the whole clip. Memory grows with it. It changes the
    latents: nothing passes from one chunk to the next. The release's script has 16, the length that it was trained on."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the frozen network computes in. Latents come out in float32."""

    def __post_init__(self) -> None:
        if self.chunk_frames is not None and (self.chunk_frames < STRIDE_T or self.chunk_frames % STRIDE_T):
            below = max(self.chunk_frames // STRIDE_T, 1) * STRIDE_T
            raise ValueError(
                f"chunk_frames is {self.chunk_frames}; it must be a multiple of {STRIDE_T}, such as {below}"
            )


class VideoVAEPlus(LatentSpace):
    """The frozen space. Halves are read when they are first needed, and follow the video's device.

    Latents are what the encoder gives: the release has no statistics of them, so mean 0 and std 1 are assumed. With
    ``sample`` the latents of single frames are drawn first, then those of time, from the posterior of that draw.
    """

    Config = VideoVAEPlusSpaceConfig
    name = "VideoVAE+"
    causal = False
    gaussian = False  # the latents of time are those of a draw of the frames'

    def __init__(self, config: VideoVAEPlusSpaceConfig) -> None:
        self.config = config
        self.channels, self.stride_t, self.stride_hw = config.channels, STRIDE_T, STRIDE_HW
        self._encoder: VideoVAEPlusEncoder | None = None
        self._decoder: VideoVAEPlusDecoder | None = None
        self._fingerprint: str | None = None

    @property
    def fingerprint(self) -> str:
        """Hash of the encoder's weights, as stored, the strides and the chunks."""
        self._load_encoder()
        return self._fingerprint

    def require(self) -> None:
        videovaeplus_weights.find_file(self.config.path)

    def _encode(
        self, video: Float[Tensor, "b 3 t h w"], sample: bool, generator: torch.Generator | None
    ) -> Float[Tensor, "b c n y x"]:
        encoder = self._load_encoder().to(video.device)
        chunk = self.config.chunk_frames or video.shape[2]
        clips = [clip.split(chunk, 2) for clip in video.split(1)]
        return torch.cat([torch.cat([encode_clip(encoder, c, sample, generator) for c in clip], 2) for clip in clips])

    @torch.no_grad()
    def decode(self, latent: Float[Tensor, "b c n y x"]) -> Float[Tensor, "b 3 t h w"]:
        """The space's own decoder, in chunks as they were encoded: RGB clamped to [-1, 1], float32, clip by clip."""
        if self._decoder is None:
            self._decoder = self._frozen(VideoVAEPlusDecoder.from_file(self.config.path))
        decoder = self._decoder.to(latent.device)
        chunk = (self.config.chunk_frames or 0) // STRIDE_T or latent.shape[2]
        with torch.autocast(latent.device.type, enabled=False):
            clips = [[decoder.decode(part) for part in clip.split(chunk, 2)] for clip in latent.split(1)]
        return torch.cat([torch.cat(clip, 2) for clip in clips]).float()

    def _load_encoder(self) -> VideoVAEPlusEncoder:
        if self._encoder is None:
            encoder = VideoVAEPlusEncoder.from_file(self.config.path)
            shape = {"stride_t": STRIDE_T, "stride_hw": STRIDE_HW, "chunk_frames": self.config.chunk_frames}
            # Of the weights as stored: casting to the compute dtype must not make another space of it.
            self._fingerprint = hash_parts("videovaeplus", shape, tensors=dict(encoder.named_parameters()))
            self._encoder = self._frozen(encoder)
        return self._encoder

    def _frozen(self, half: nn.Module) -> nn.Module:
        layout = half.config
        found = (layout.channels, layout.stride_t, layout.stride_hw)
        if found != (self.channels, STRIDE_T, STRIDE_HW):
            raise ValueError(
                f"{self.config.path} has (channels, stride_t, stride_hw) = {found}, the space "
                f"{(self.channels, STRIDE_T, STRIDE_HW)}; set channels to what the file has, or path to the file that was meant"
            )
        return half.requires_grad_(False).eval().to(getattr(torch, self.config.dtype))


def encode_clip(
    encoder: VideoVAEPlusEncoder, video: Tensor, sample: bool, generator: torch.Generator | None
) -> Float[Tensor, "b c n y x"]:
    """Latents of a whole clip "b 3 t h w": the posteriors' means, or of each a draw."""
    mean, log_variance = encoder.encode_frames(video)
    frames = draw(mean, log_variance.clamp(*LOG_VARIANCE_RANGE), generator) if sample else mean
    mean, log_variance = encoder.encode_time(frames)
    return draw(mean, log_variance.clamp(*LOG_VARIANCE_RANGE), generator) if sample else mean
