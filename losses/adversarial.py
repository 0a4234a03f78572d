"""The adversarial game: a 3D PatchGAN discriminator, the non-saturating logistic losses and R1.

One backward serves both players. In one ``losses()`` call a family with discriminator D returns::

    fake = decode(latent)                                # one forward, shared by both terms
    {"gan_g": generator_loss(D, fake),                   # reaches G through a D whose parameters are detached copies
     "gan_d": discriminator_loss(D, video, fake),        # reaches D only: it sees fake.detach()
     "gan_r1": r1_penalty(D, video)}                     # every 16th step; absent in the others

The base sums the weighted terms, calls backward once and steps one AdamW with a group for each player. Both players
see the weights from before the step, exactly as in the usual loop of two optimisers that reuses one forward, and
the result is the same to the last bit (``tests/test_losses.py``). Nothing toggles ``requires_grad``, so activation
checkpointing, which runs the forward again during backward, recomputes what was computed.

R1 (Mescheder et al. 2018): ``0.5 * E[ sum over elements of (dD/dx)^2 ]`` with the usual factor 1/2 inside, D(x) being
the sum of the patch logits (the usual code for PatchGANs; the paper does not say). FlashDecoder's supplement (Table A)
has weight 0.1024 every 16 steps; applied lazily (Karras et al. 2020, StyleGAN2, appendix B) the caller's weight is
0.1024 * 16 in the steps that have the term.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from losses.precision import convolution_precision


@dataclass
class DiscriminatorConfig:
    """The discriminator of FlashDecoder's stage 3: five conv layers, base 128 (supplement, Table A).

    How 2D became 3D is not published. Here time gets kernel 3 where space has 4: with padding 1 and strides
    2, 2, 1, 1, 1 the 17 frames of a clip become 9, 5, 5, 5, 5, so there is a row of patch logits per latent frame of
    a space of stride 4, and any length down to one image is valid. ``kernel_t: 4`` is the literal extension; it needs
    16 frames or more.
    """

    channels: int = 128  # of the first layer; doubled by each of the next until 4 times as many
    num_layers: int = 5  # convolutions, the last to one logit included
    kernel_t: int = 3
    # Of the middle layers. Never batch norm: with it a sample's logit depends on the other samples, which R1's
    # per-sample gradient does not see, and real and fake batches get different statistics.
    norm: Literal["group", "none"] = "group"

    def __post_init__(self):
        if self.num_layers < 3 or self.channels < 1:
            raise ValueError(
                f"a PatchGAN has num_layers >= 3 and channels >= 1, got {self.num_layers}, {self.channels}"
            )
        if self.kernel_t not in (1, 3, 4):
            raise ValueError(f"kernel_t must be 1, 3 or 4, got {self.kernel_t}")
        if self.norm not in ("group", "none"):
            raise ValueError(f"norm must be 'group' or 'none', got {self.norm!r}")


class PatchDiscriminator3d(nn.Module):
    """The PatchGAN of pix2pix (Isola et al. 2017) and VQGAN (Esser et al. 2021), extended to time.

    Kernel 4 and padding 1 in space; strides 2, 2, 2, 1, 1 in space and 2, 2, 1, 1, 1 in time; channels 128, 256, 512,
    512, 1; LeakyReLU(0.2); 20.5 M parameters. A 224 x 224 crop of 17 frames gives 5 x 26 x 26 logits, each of 31
    frames of 70 x 70 pixels.
    """

    Config = DiscriminatorConfig

    def __init__(self, channels: int = 128, num_layers: int = 5, *, kernel_t: int = 3, norm: str = "group"):
        super().__init__()
        DiscriminatorConfig(channels, num_layers, kernel_t, norm)  # refuses what makes no sense
        widths = [channels * min(2**i, 4) for i in range(num_layers - 1)] + [1]
        self.layers = nn.ModuleList()
        last = 3
        for i, width in enumerate(widths):
            strides = (2 if i < num_layers - 3 else 1, *([2 if i < num_layers - 2 else 1] * 2))
            self.layers.append(nn.Conv3d(last, width, (kernel_t, 4, 4), strides, padding=(min(1, kernel_t - 1), 1, 1)))
            last = width
        normed = [norm == "group" and 0 < i < num_layers - 1 for i in range(num_layers)]
        self.norms = nn.ModuleList(
            nn.GroupNorm(_groups(width), width) if has else nn.Identity()
            for width, has in zip(widths, normed, strict=True)
        )
        for layer in self.layers:  # pix2pix's initialisation
            nn.init.normal_(layer.weight, 0.0, 0.02)
            nn.init.zeros_(layer.bias)

    @classmethod
    def from_config(cls, config: DiscriminatorConfig) -> "PatchDiscriminator3d":
        return cls(config.channels, config.num_layers, kernel_t=config.kernel_t, norm=config.norm)

    def output_size(self, t: int, h: int, w: int) -> tuple[int, int, int]:
        """Patch logits along time, height and width for a clip of this size; 0 or less means too small."""
        sizes = [t, h, w]
        for layer in self.layers:
            geometry = zip(sizes, layer.kernel_size, layer.stride, layer.padding, strict=True)
            sizes = [(n + 2 * p - k) // s + 1 if n > 0 else 0 for n, k, s, p in geometry]
        return tuple(sizes)

    def smallest(self) -> tuple[int, int, int]:
        """The smallest clip (frames, height, width) that gives a logit."""
        return tuple(
            next(n for n in range(1, 4096) if self.output_size(*(n if a == axis else 4096 for a in range(3)))[axis] > 0)
            for axis in range(3)
        )

    def forward(self, video: Float[Tensor, "b 3 t h w"]) -> Float[Tensor, "b 1 pt ph pw"]:
        """RGB in [-1, 1] -> patch logits, high for real. ValueError if the clip is too small, naming the smallest."""
        if video.ndim != 5 or video.shape[1] != 3:
            raise ValueError(f"the discriminator reads (b, 3, t, h, w), got {tuple(video.shape)}")
        if min(self.output_size(*video.shape[2:])) < 1:
            (t, h, w), (needs_t, needs_h, needs_w) = video.shape[2:], self.smallest()
            raise ValueError(
                f"a clip of {t} frames of {h}x{w} is too small for this discriminator: it needs {needs_t} frames of "
                f"{needs_h}x{needs_w} or more (take a longer clip or a larger crop, or fewer num_layers)"
            )
        with convolution_precision(video.device):
            x = video.to(self.layers[0].weight.dtype) if video.device.type == "cpu" else video
            for layer, norm in zip(self.layers[:-1], self.norms[:-1], strict=True):
                x = F.leaky_relu(norm(layer(x)), 0.2)
            return self.layers[-1](x)


def generator_loss(disc: nn.Module, fake: Float[Tensor, "b 3 t h w"]) -> Float[Tensor, ""]:
    """Non-saturating logistic loss, ``E[softplus(-D(fake))]`` (Goodfellow et al. 2014), for the generator only.

    The discriminator runs on detached copies of its parameters (views, no memory), so gradients flow through it
    to ``fake`` and never into it.
    """
    frozen = {name: tensor.detach() for name, tensor in (*disc.named_parameters(), *disc.named_buffers())}
    return F.softplus(-torch.func.functional_call(disc, frozen, (fake,)).float()).mean()


def discriminator_loss(
    disc: nn.Module, real: Float[Tensor, "b 3 t h w"], fake: Float[Tensor, "b 3 t h w"]
) -> Float[Tensor, ""]:
    """``E[softplus(-D(real))] + E[softplus(D(fake))]`` (a sum, not halved), for the discriminator only.

    ``fake`` is detached here. An undecided discriminator gives 2 ln 2 = 1.386.
    """
    on_real, on_fake = disc(real.detach()).float(), disc(fake.detach()).float()
    return F.softplus(-on_real).mean() + F.softplus(on_fake).mean()


def r1_penalty(disc: nn.Module, real: Float[Tensor, "b 3 t h w"]) -> Float[Tensor, ""]:
    """``0.5 * E[||dD/dx||^2]`` at real clips, squares summed over a clip's elements, D(x) being the sum of its logits.

    In float32 outside autocast: the gradient of a gradient in bf16 has too few bits to steer by. Reaches the
    discriminator only. Weight times interval is the caller's (lazy R1; the module's docstring).
    """
    with torch.autocast(real.device.type, enabled=False):
        real = real.detach().float().requires_grad_()
        (gradient,) = torch.autograd.grad(disc(real).sum(), real, create_graph=True)
        return 0.5 * gradient.square().flatten(1).sum(1).mean()


def _groups(channels: int) -> int:
    """32 groups as in VQGAN, or as many as divide a narrow test net."""
    return next(groups for groups in range(min(32, channels), 0, -1) if channels % groups == 0)
