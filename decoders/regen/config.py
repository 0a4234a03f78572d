"""The architecture of REGEN as plain values; the defaults are the paper's full size where it gives one."""

from dataclasses import dataclass, field
from typing import Literal

from decoders.backbones.magvit2 import Magvit2Config


@dataclass
class SirenConfig:
    """M_t, the network of time. The paper names SIREN and gives none of these."""

    width: int = 256
    layers: int = 3  # sines; a linear layer follows
    out: int = 256  # features beside the content latent's
    first_omega: float = 30.0  # highest angle per chunk of time, in radians
    omega: float = 30.0
    # film: sin(omega gamma (W h + b) + beta), gamma and beta linear in the latent (pi-GAN). multiply: every layer's output
    # times its own numbers, from a small network of the latent (Mehta et al. 2021).
    modulation: Literal["film", "multiply"] = "film"

    def __post_init__(self) -> None:
        if min(self.width, self.layers, self.out) < 1:
            raise ValueError("decoder.siren.width, layers and out must be 1 or more")
        if min(self.first_omega, self.omega) <= 0:
            raise ValueError("decoder.siren.first_omega and omega must be above 0")


@dataclass
class RegenConfig:
    """The architecture. The latent space gives channels and strides."""

    width: int = 2048
    blocks: int = 24
    heads: int = 16
    mlp_ratio: float = 4.0
    patch: int = 8  # pixels per token and side: the space's stride_hw
    patch_t: int = 1  # frames per token; with 2 the first frame of an odd number stands alone
    qk_norm: bool = True
    modulation: Literal["none", "single"] = "none"  # single: adaLN-single, besides the addition to the tokens
    # embedding: C_e, the paper's; in_context: its ablation, latents as tokens and a fixed embedding of positions.
    conditioning: Literal["embedding", "in_context"] = "embedding"
    first_frame: Literal["content", "linear", "letter"] = (
        "content"  # readings of the first-frame rule, see ContentAware
    )
    gain: float = 1.0  # of C_e's norm at first: how loud the latents are beside the noise and what blocks add
    siren: SirenConfig = field(default_factory=SirenConfig)
    prediction: Literal["velocity", "epsilon"] = (
        "velocity"  # epsilon: the paper's formula, whose last step divides by 0.07
    )
    # The network gives the mean of the clean video, to which the noisy one is added by as much as it says besides: noise need not
    # be carried from the first layer to the last, for which a width below 3 patch^2 has no room.
    skip: bool = False
    spread: float = 0.15  # of pixels about that mean, as skip takes it; RGB in [-1, 1]
    checkpointing: bool = False  # run blocks again in the backward pass
    encoder: Magvit2Config | None = None  # the space's, trained with the decoder; null: the space is frozen

    def __post_init__(self) -> None:
        if min(self.width, self.blocks, self.heads, self.patch) < 1 or self.mlp_ratio <= 0:
            raise ValueError("decoder.width, blocks, heads and patch must be 1 or more, mlp_ratio above 0")
        if self.width % self.heads:
            raise ValueError(f"decoder.heads={self.heads} must divide decoder.width={self.width}")
        if self.conditioning == "in_context" and self.first_frame != "content":
            raise ValueError("decoder.first_frame is a rule of the embedding; conditioning=in_context has none")
        if min(self.gain, self.spread) <= 0:
            raise ValueError(f"decoder.gain={self.gain} and spread={self.spread} must be above 0")
        if self.patch_t not in (1, 2):
            raise ValueError(f"decoder.patch_t={self.patch_t} must be 1 or 2")
