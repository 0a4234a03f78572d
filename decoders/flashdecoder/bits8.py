"""FlashDecoder's products with eight bits and scales fixed beforehand: what is rounded, calibration, and its file.

``quantise`` takes linear layers of the optimised form (:mod:`decoders.flashdecoder.fast`) out and puts layers of
:mod:`decoders.layers.linear8` in: FP8 on CUDA, int8 on a CPU. Its paper names FP8 as one of three accelerations of its fastest
decoder and says no more (arXiv 2607.14898); what is rounded, and how, is ours.

Calibration runs some latents through the network and keeps, of what enters each layer, the largest magnitude of every channel
and a few rows. FP8 needs the first only. Int8 has equal steps, so where those rows gain by it channels that are large among the
others are made smaller before rounding and their weights larger (SmoothQuant, Xiao et al., arXiv 2211.10438, eq. 4), by powers of
two, which rounds nothing: into the gain of the norm before, or the rows of `up`.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from decoders.layers.linear8 import E4M3_MAX, INT8_MAX, LAYERS, Linear8, to_offset_bytes, weight_to_int8

FORMAT = "flashdecoder-bits8-1"
MLP, ALL = "mlp", "linear"
ROWS = 128  # of what enters a layer, kept to choose scales by
OUTPUTS = 512  # of a layer at most, that scales are chosen by
STRENGTHS = (0.0, 0.5)  # of smoothing (alpha of SmoothQuant, eq. 4); 0: none


@dataclass(frozen=True)
class Site:
    """A linear layer that is rounded, and where a scale of its input channels can be put without changing the function."""

    name: str
    parent: nn.Module
    attribute: str
    gain: str | None = None  # the parent's: gain of the norm whose output enters
    rows_of: str | None = None  # the parent's: the layer whose last rows make what enters, linearly

    @property
    def layer(self) -> nn.Module:
        return getattr(self.parent, self.attribute)


def sites(fast: nn.Module, bits8: str) -> list[Site]:
    """The layers of ``bits8``: "mlp", the MLPs of all blocks; "linear", all linear layers of the blocks.

    The head stays as it is: no residual carries anything past it, and its MLP, 7 % of XL's products, cost ten times as many
    dB as all blocks together (LOG.md).
    """
    if bits8 not in (MLP, ALL):
        raise ValueError(f"bits8={bits8!r} is neither {MLP} nor {ALL}")
    found = []
    for index, block in enumerate(fast.blocks):
        name = f"blocks.{index}"
        if bits8 == ALL:
            found += [Site(f"{name}.qkv", block, "qkv", gain="attention_gain"), Site(f"{name}.out", block, "out")]
        found += [Site(f"{name}.gate_up", block, "gate_up", gain="mlp_gain")]
        found += [Site(f"{name}.down", block, "down", rows_of="gate_up")]
    return found


@dataclass
class Seen:
    """What entered a layer while the network was calibrated."""

    largest: Tensor | None = None  # " i", of every channel
    rows: list[Tensor] = field(default_factory=list)  # each "r i"
    every: int = 1  # of so many calls one's rows are kept
    calls: int = 0

    def add(self, x: Float[Tensor, "... i"]) -> None:
        """Raises ValueError: not finite."""
        flat = x.detach().flatten(0, -2)
        largest = flat.abs().amax(dim=0).float()
        if not largest.isfinite().all():
            raise ValueError("is not finite")
        self.largest = largest if self.largest is None else torch.maximum(self.largest, largest)
        if self.calls % self.every == 0:
            self.rows.append(flat[:: -(-len(flat) // 8)].clone())
            if sum(len(part) for part in self.rows) > 2 * ROWS:
                self.rows, self.every = self.rows[::2], 2 * self.every
        self.calls += 1

    def sample(self) -> Float[Tensor, "r i"]:
        every = torch.cat(self.rows).float()
        return every[:: -(-len(every) // ROWS)]


@dataclass(frozen=True)
class Scale:
    """Of one layer: what a step of its rounded input is worth, and exponents of two that its channels are divided by first."""

    scale: float
    exponents: Tensor | None = None  # int8 " i"


@dataclass(frozen=True)
class Calibration:
    """Scales of all layers, for one set of weights. ``optimise`` takes it in place of latents."""

    bits8: str
    arithmetic: Literal["fp8", "int8"]
    weights: str  # digest of the layers' weights
    num_latents: int
    scales: dict[str, Scale]

    def save(self, file: str | os.PathLike) -> None:
        """One safetensors file; what is no tensor is JSON in its header."""
        tensors = {f"{name}.scale": torch.tensor(one.scale, dtype=torch.float64) for name, one in self.scales.items()}
        tensors |= {f"{name}.exponents": s.exponents for name, s in self.scales.items() if s.exponents is not None}
        about = {"bits8": self.bits8, "arithmetic": self.arithmetic, "weights": self.weights}
        about |= {"num_latents": self.num_latents, "layers": list(self.scales)}
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, file, metadata={"format": FORMAT, "about": json.dumps(about)})

    @classmethod
    def load(cls, file: str | os.PathLike) -> "Calibration":
        """Raises ValueError: it is no such file. FileNotFoundError."""
        try:
            with safe_open(file, "pt") as opened:
                found = opened.metadata() or {}
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{file} cannot be read as safetensors: {error}") from None
        if found.get("format") != FORMAT:
            raise ValueError(f"{file} is no calibration of this kind ({FORMAT}): calibrate again")
        about = json.loads(found["about"])
        scales = {
            name: Scale(tensors[f"{name}.scale"].item(), tensors.get(f"{name}.exponents"))
            for name in about.pop("layers")
        }
        return cls(scales=scales, **about)


def arithmetic_of(fast: nn.Module) -> Literal["fp8", "int8"]:
    """FP8 on CUDA, int8 on a CPU."""
    return "fp8" if next(iter(fast.parameters())).is_cuda else "int8"


def weights_digest(chosen: Sequence[Site]) -> str:
    """Of the names, shapes and bytes of the layers' weights."""
    found = hashlib.sha256()
    for site in chosen:
        weight = site.layer.weight.detach().cpu().contiguous()
        found.update(f"{site.name} {weight.dtype} {tuple(weight.shape)}".encode())
        found.update(weight.flatten().view(torch.uint8).numpy())
    return found.hexdigest()


@torch.no_grad()
def calibrate(
    fast: nn.Module,
    bits8: str,
    latents: Sequence[Tensor],
    arithmetic: Literal["fp8", "int8"] | None = None,
) -> Calibration:
    """Run ``latents`` (each "b c n y x", normalised, of clips like those to be decoded; a few suffice) and choose the scales.

    Args:
        fast: the optimised form, not yet rounded and not yet compiled.
        arithmetic: by default the one of its device.

    Raises:
        ValueError: no latents, or one of them, or what enters a layer, is not finite.
    """
    chosen, arithmetic = sites(fast, bits8), arithmetic or arithmetic_of(fast)
    seen = observe(fast, chosen, latents)
    scales = {site.name: SCALES[arithmetic](site, seen[site.name]) for site in chosen}
    return Calibration(bits8, arithmetic, weights_digest(chosen), len(latents), scales)


def observe(fast: nn.Module, chosen: Sequence[Site], latents: Sequence[Tensor]) -> dict[str, Seen]:
    """What enters each layer while ``latents`` are decoded. Raises ValueError, see :func:`calibrate`."""
    if not len(latents):
        raise ValueError(
            "bits8 fixes its scales by calibration: give normalised latents of clips like those to be decoded (a few suffice), "
            "or a Calibration that was saved"
        )
    like = next(iter(fast.parameters()))
    seen = {site.name: Seen() for site in chosen}
    hooks = [site.layer.register_forward_pre_hook(_watch(site.name, seen[site.name])) for site in chosen]
    try:
        for number, latent in enumerate(latents):
            if not latent.isfinite().all():
                raise ValueError(f"calibration latent {number} is not finite")
            fast.decode(latent.to(like.device, like.dtype))
    finally:
        for hook in hooks:
            hook.remove()
    if unused := [name for name, one in seen.items() if one.largest is None]:
        raise ValueError(f"no calibration latent reached {', '.join(unused)}")
    return seen


def _watch(name: str, seen: Seen):
    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        try:
            seen.add(inputs[0])
        except ValueError as error:
            raise ValueError(f"calibration: what enters {name} {error}: its scale would be wrong") from None

    return hook


# ---- scales


def _fp8_scale(site: Site, seen: Seen) -> Scale:
    return Scale((seen.largest.max().item() or 1.0) / E4M3_MAX)


def _int8_scale(site: Site, seen: Seen) -> Scale:
    """Smoothing by which the layer's result on the rows that were kept comes nearest to the exact one.

    Nothing that calibration saw saturates: ranges chosen narrower, by the error of those rows, lost up to 2.4 times as much on
    latents that were not among them (LOG.md).
    """
    weight, rows = site.layer.weight.detach(), seen.sample()
    some = weight[:: -(-len(weight) // OUTPUTS)].float()
    exact = F.linear(rows, some)
    folds = site.gain is not None or site.rows_of is not None
    best, least = None, float("inf")
    for strength in STRENGTHS if folds else (0.0,):
        exponents = _exponents(seen.largest, weight, strength)
        factors = 1.0 if exponents is None else torch.exp2(exponents.float())
        scale = ((seen.largest / factors).max().item() or 1.0) / INT8_MAX
        rounded, of_rows = weight_to_int8(some * factors)
        product = F.linear(_int8_values(rows / factors, scale), rounded.float() * of_rows[:, None])
        error = (product - exact).square().sum().item()
        if error < least:
            best, least = Scale(scale, exponents), error
    return best


def _exponents(largest: Tensor, weight: Tensor, strength: float) -> Tensor | None:
    """Exponents of two nearest to SmoothQuant's factors max|x|^a / max|w|^(1-a) (eq. 4), their middle at 0."""
    if not strength:
        return None
    columns = weight.abs().amax(dim=0).float()
    alive = (largest > 0) & (columns > 0)
    logs = strength * largest.clamp(min=1e-30).log2() - (1 - strength) * columns.clamp(min=1e-30).log2()
    logs = torch.where(alive, logs - logs[alive].median() if alive.any() else 0.0, 0.0)
    return logs.round().clamp(-8, 8).to(torch.int8)


def _int8_values(x: Tensor, scale: float) -> Tensor:
    return (to_offset_bytes(x, 1 / scale).float() - 128) * scale


SCALES = {"fp8": _fp8_scale, "int8": _int8_scale}


# ---- putting the layers in


@torch.no_grad()
def quantise(
    fast: nn.Module,
    bits8: str,
    calibration: Sequence[Tensor] | Calibration,
    arithmetic: Literal["fp8", "int8"] | None = None,
    emulated: bool = False,
) -> nn.Module:
    """Put layers of eight bits into ``fast``, in place, and return it. The weights that it shares are not touched.

    Args:
        calibration: latents as for :func:`calibrate`, or what it returned for these very weights.
        arithmetic: by default the device's own (FP8 on CUDA, int8 on a CPU).
        emulated: the same rounding in floating point, on any device; slow, for measuring what is lost.

    Raises:
        ValueError: no calibration, one of other weights or of another kind, or a device without such products.
    """
    chosen, arithmetic = sites(fast, bits8), arithmetic or arithmetic_of(fast)
    if isinstance(calibration, Calibration):
        _check(calibration, chosen, bits8, arithmetic)
    else:
        calibration = calibrate(fast, bits8, calibration, arithmetic)
    made = {}
    for site in chosen:
        weight = site.layer.weight.detach()
        exponents = calibration.scales[site.name].exponents
        if exponents is not None:  # exact: powers of two
            weight = weight * torch.exp2(exponents.to(weight))
        made[site.name] = weight
    for site in chosen:
        exponents = calibration.scales[site.name].exponents
        if exponents is not None:
            _divide_before(site, torch.exp2(-exponents.to(made[site.name])), made)
    for site in chosen:
        layer: Linear8 = LAYERS[arithmetic](made.pop(site.name), calibration.scales[site.name].scale, emulated)
        setattr(site.parent, site.attribute, layer)
    return fast


def _divide_before(site: Site, factors: Float[Tensor, " i"], weights: dict[str, Tensor]) -> None:
    """Multiply what enters the layer by ``factors``, in what makes it."""
    if site.gain is not None:
        gain = getattr(site.parent, site.gain).detach() * factors
        setattr(site.parent, site.gain, nn.Parameter(gain, requires_grad=False))
    else:
        name = site.name.removesuffix(site.attribute) + site.rows_of
        before = weights[name].clone()
        before[-len(factors) :] *= factors[:, None]
        weights[name] = before


def _check(calibration: Calibration, chosen: Sequence[Site], bits8: str, arithmetic: str) -> None:
    if (calibration.bits8, calibration.arithmetic) != (bits8, arithmetic):
        raise ValueError(
            f"this calibration is for bits8={calibration.bits8} in {calibration.arithmetic}, and bits8={bits8} in {arithmetic} "
            "was asked for: calibrate again"
        )
    if list(calibration.scales) != [site.name for site in chosen] or calibration.weights != weights_digest(chosen):
        raise ValueError(
            "this calibration was made of other weights, whose scales these do not fit: calibrate again, on this network"
        )


def rounded_layers(fast: nn.Module) -> Iterator[tuple[str, Linear8]]:
    """Every layer of eight bits that a network has, with its name."""
    return ((name, module) for name, module in fast.named_modules() if isinstance(module, Linear8))
