"""How latents steer the diffusion Transformer: the latent conditioning module C_e (section 3.2, eq. 5), and the paper's
ablation, latents as tokens beside the video's.

C_e(x, y, t_f | [z_c, z_m]) = M_s([z_c(x, y); M_t(t_f | z_m(x, y))]): a SIREN M_t maps time to features, modulated in every
cell by the motion latent; beside the content latent a linear layer and an RMSNorm, M_s, take them to the model's width.
Cells are patches, one to one. It is the only thing that tells the tokens apart: nothing else knows of positions.

Shapes: b clip, c latent channel, y x cell, t frame, g group of ``patch_t`` frames that share a token, D model width,
s = g y x token, m token beside the video's.
"""

from math import pi
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from decoders.regen.config import SirenConfig
from decoders.regen.dit import RMSNorm, sinusoids


class Condition(NamedTuple):
    """What the Transformer is told of a pair of latent frames; the same at every step of the sampler."""

    added: Float[Tensor, "b s D"]  # to the tokens of the video
    beside: Float[Tensor, "b m D"] | None = None  # further tokens


def fold_frames(x: Float[Tensor, "b t ..."], frames: int) -> Float[Tensor, "b g f ..."]:
    """Neighbouring frames in groups of ``frames``. Where they do not come out even, the first is put before itself: one
    frame stands alone, then come full groups, as in causal latents."""
    if missing := -x.shape[1] % frames:
        x = torch.cat([x[:, :1].expand(-1, missing, *x.shape[2:]), x], 1)
    return x.unflatten(1, (-1, frames))


class Siren(nn.Module):
    """Time to features, modulated by one latent for every cell (Sitzmann et al. 2020).

    Runs in float32 under autocast too: an angle of tens of radians has no digits left in bfloat16.

    Initial weights follow SIREN's rule: arguments of the sines are about standard normal in every layer, whatever its
    width. Modulations begin near one (gamma, Mehta's factors) and below a radian (beta), so that they keep this.
    """

    def __init__(self, channels: int, config: SirenConfig) -> None:
        super().__init__()
        self.config = config
        width, layers = config.width, config.layers
        self.sines = nn.ModuleList(nn.Linear(width if index else 1, width) for index in range(layers))
        self.out = nn.Linear(width, config.out)
        if config.modulation == "film":
            self.film = nn.Linear(channels, 2 * layers * width, bias=False)
        else:
            self.factors = nn.ModuleList(nn.Linear(channels + width * bool(i), width) for i in range(layers))
        self._initialise(channels)

    @torch.no_grad()
    def _initialise(self, channels: int) -> None:
        config = self.config
        for index, layer in enumerate(self.sines):
            bound = (6 / config.width) ** 0.5 / config.omega if index else 1.0
            nn.init.uniform_(layer.weight, -bound, bound)
            # Any phase in the first layer: at time 0 all sines would be 0 otherwise.
            phase = pi / config.first_omega if not index else bound
            nn.init.uniform_(layer.bias, -phase, phase)
        nn.init.uniform_(
            self.out.weight, -((6 / config.width) ** 0.5), (6 / config.width) ** 0.5
        )  # about unit variance
        nn.init.zeros_(self.out.bias)
        if config.modulation == "film":
            gamma, beta = self.film.weight.view(config.layers, 2, config.width, channels).unbind(1)
            nn.init.normal_(gamma, std=0.1 * channels**-0.5)
            nn.init.normal_(beta, std=0.5 * channels**-0.5)
        else:
            for layer in self.factors:
                nn.init.normal_(layer.weight, std=0.25 * layer.in_features**-0.5)
                nn.init.ones_(layer.bias)

    def forward(self, times: Float[Tensor, "b t"], latent: Float[Tensor, "b y x c"]) -> Float[Tensor, "b t y x out"]:
        """Features of every cell at any ``times``; 0 to 1 is one chunk."""
        with torch.autocast(latent.device.type, enabled=False):
            dtype = torch.promote_types(latent.dtype, torch.float32)
            latent = latent.to(dtype).unsqueeze(1)
            hidden = times.to(dtype)[:, :, None, None, None]
            if self.config.modulation == "film":
                hidden = self._filmed(hidden, latent)
            else:
                hidden = self._multiplied(hidden, latent)
            return _linear(self.out, hidden)

    def _omega(self, index: int) -> float:
        return self.config.omega if index else self.config.first_omega

    def _filmed(self, hidden: Tensor, latent: Tensor) -> Tensor:
        modulation = _linear(self.film, latent).chunk(2 * self.config.layers, dim=-1)
        for index, layer in enumerate(self.sines):
            scale = self._omega(index) * (1 + modulation[2 * index])
            hidden = torch.addcmul(modulation[2 * index + 1], scale, _linear(layer, hidden)).sin()
        return hidden

    def _multiplied(self, hidden: Tensor, latent: Tensor) -> Tensor:
        factor = None
        for index, (layer, modulator) in enumerate(zip(self.sines, self.factors, strict=True)):
            factor = _linear(modulator, latent if factor is None else torch.cat([factor, latent], -1)).relu()
            hidden = factor * (self._omega(index) * _linear(layer, hidden)).sin()
        return hidden


class ContentAware(nn.Module):
    """C_e: a position embedding that is made of the latents.

    The first-frame rule (Fig. 3) makes an image and the first frame of a video one thing: wherever the time is exactly 0,
    M_t(t | z_m) gives way to

    - content: M_t(0 | z_c), the same network of the content latent;
    - linear: P z_c, a linear map of its own;
    - letter: M_t(0 | z_m), which takes the place of z_c too (the caption word for word). The content is then not in the first
      frame's embedding, and an image, which has no z_m, takes z_c for it.
    """

    def __init__(self, channels: int, width: int, patch_t: int, siren: SirenConfig, first_frame: str) -> None:
        super().__init__()
        if first_frame == "letter" and siren.out != channels:
            raise ValueError(
                f"decoder.first_frame=letter puts features of time in the content latent's place: decoder.siren.out="
                f"{siren.out} must be its {channels} channels"
            )
        self.patch_t, self.first_frame = patch_t, first_frame
        self.siren = Siren(channels, siren)
        self.first = nn.Linear(channels, siren.out) if first_frame == "linear" else None
        self.project = nn.Linear(patch_t * (channels + siren.out), width)
        self.norm = RMSNorm(width)
        self._initialise(channels, siren.out)

    @torch.no_grad()
    def _initialise(self, channels: int, features: int) -> None:
        """Content and time with equal shares: by a common rule the few channels of content would hardly be heard."""
        weight = self.project.weight.view(-1, self.patch_t, channels + features)
        nn.init.normal_(weight[..., :channels], std=(2 * self.patch_t * channels) ** -0.5)
        nn.init.normal_(weight[..., channels:], std=(2 * self.patch_t * features) ** -0.5)
        nn.init.zeros_(self.project.bias)

    def forward(self, latent: Float[Tensor, "b c n y x"], times: Float[Tensor, "b t"]) -> Condition:
        """Of a pair of latent frames (n = 2), or of an image (n = 1; its time is taken for 0)."""
        cells = rearrange(latent, "b c n y x -> n b y x c")
        content, motion = cells[0], cells[-1]
        if len(cells) == 1:
            features = self._at_zero(content, motion)
            content = features if self.first_frame == "letter" else content.unsqueeze(1)
        else:
            features, zero = self.siren(times, motion), (times == 0)[:, :, None, None, None]
            content = content.unsqueeze(1).expand(-1, times.shape[1], -1, -1, -1)
            if self.first_frame == "letter":
                content = torch.where(zero, features, content)
            else:
                features = torch.where(zero, self._at_zero(*cells), features)
        both = torch.cat([content.to(features.dtype), features], -1)
        folded = rearrange(fold_frames(both, self.patch_t), "b g f y x c -> b (g y x) (f c)")
        return Condition(self.norm(self.project(folded.to(self.project.weight.dtype))))

    def _at_zero(self, content: Tensor, motion: Tensor) -> Float[Tensor, "b 1 y x out"]:
        if self.first is not None:
            with torch.autocast(content.device.type, enabled=False):
                return _linear(self.first, content).unsqueeze(1)
        latent = motion if self.first_frame == "letter" else content
        return self.siren(latent.new_zeros(len(latent), 1), latent)


class InContext(nn.Module):
    """The paper's ablation (Table 3): latent frames as tokens beside the video's, and a fixed embedding of positions.

    Positions are plain numbers, never rescaled: frames from the chunk's first on, cells from the corner. Content stands at
    time 0, motion at the chunk's end; each has a linear map of its own.
    """

    def __init__(self, channels: int, width: int, patch_t: int, stride_t: int) -> None:
        super().__init__()
        if width % 2:
            raise ValueError(f"decoder.conditioning=in_context needs an even decoder.width, not {width}")
        self.width, self.patch_t, self.stride_t = width, patch_t, stride_t
        self.content, self.motion = nn.Linear(channels, width), nn.Linear(channels, width)
        for layer in (self.content, self.motion):
            nn.init.normal_(layer.weight, std=channels**-0.5)  # Xavier's rule would drown 8 channels in positions
            nn.init.zeros_(layer.bias)

    def forward(self, latent: Float[Tensor, "b c n y x"], times: Float[Tensor, "b t"]) -> Condition:
        """Of a pair of latent frames (n = 2), or of an image (n = 1)."""
        frames, grid = rearrange(latent, "b c n y x -> n b (y x) c"), latent.shape[-2:]
        ends = times.new_tensor([[0.0, 1.0]])[:, : len(frames)]
        layers = (self.content, self.motion)[: len(frames)]
        tokens = [layer(frame.to(layer.weight.dtype)) for layer, frame in zip(layers, frames, strict=True)]
        beside = torch.cat(tokens, 1) + self._positions(ends, *grid)
        return Condition(self._positions(fold_frames(times, self.patch_t).mean(-1), *grid), beside)

    def _positions(self, times: Float[Tensor, "b g"], rows: int, columns: int) -> Float[Tensor, "b s D"]:
        """Sines and cosines of time, row and column, a third of the width each (time takes the rest)."""
        side = 2 * (self.width // 6)
        frames = sinusoids(times * self.stride_t, self.width - 2 * side)[:, :, None, None]
        row = sinusoids(torch.arange(rows, device=times.device).float(), side)[None, None, :, None]
        column = sinusoids(torch.arange(columns, device=times.device).float(), side)[None, None, None]
        shape = (*times.shape, rows, columns)
        parts = [part.expand(*shape, -1) for part in (frames, row, column)]
        return torch.cat(parts, -1).flatten(1, 3).to(self.content.weight.dtype)


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """``layer`` in the dtype of ``x``, float32 here, whatever its own."""
    return F.linear(x, layer.weight.to(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))
