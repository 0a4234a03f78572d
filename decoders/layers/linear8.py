"""Linear layers whose products run with eight bits: FP8 (E4M3) on CUDA, int8 on a CPU, and both emulated exactly anywhere.

Weights are rounded once, when a layer is made; what comes in is rounded with one scale for the whole tensor, fixed beforehand
by calibration, so that rounding is one fused pass and nothing is measured while decoding. Results come in the dtype of what
came in. No gradients, no biases.

    FP8   x / scale clamped to +-448 and rounded to E4M3; weights by one scale too, so that the products take the plainest and
          fastest kernel. Scales of each output channel, which int8 needs, would change next to nothing: a floating-point
          format rounds relative to each value, down to 1/28672 of the largest (its smallest normal number is 2**-6).
    int8  x / scale + 128 in 0..255; weights in -127..127 with a scale of each output channel; sums in int32. oneDNN's product
          of unsigned by signed bytes is what AVX512-VNNI computes; signed by signed takes a path a thousand times slower.

What differs between two layers of one shape is in tensors, numbers too, so code compiled for one block serves all.
E4M3: Micikevicius et al., "FP8 formats for deep learning", arXiv 2209.05433.
"""

import itertools
import math
import weakref

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

E4M3_MAX = 448.0
INT8_MAX = 127.0
ZERO_POINT = 128  # what stands for 0 among unsigned bytes
MULTIPLE = 16  # features in and out of an FP8 product on CUDA


def to_e4m3(x: Tensor, inverse: float | Tensor) -> Tensor:
    """``x * inverse`` in float32, clamped to +-448 and rounded to E4M3, nearest and ties to even (without the clamp a larger
    value would become NaN)."""
    return (x.float() * inverse).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def to_offset_bytes(x: Tensor, inverse: float | Tensor) -> UInt8[Tensor, "..."]:
    """``x * inverse`` in float32 rounded to an integer, clamped to +-127, plus 128."""
    scaled = x.float() * inverse  # a new tensor, so what follows may change it: fewer passes through new memory
    return scaled.round_().clamp_(-INT8_MAX, INT8_MAX).add_(ZERO_POINT).to(torch.uint8)


def weight_to_e4m3(weight: Float[Tensor, "o i"]) -> tuple[Tensor, float]:
    """(weights in E4M3, their scale): weight = E4M3 * scale, the largest at 448."""
    scale = (weight.float().abs().max().item() or E4M3_MAX) / E4M3_MAX
    return to_e4m3(weight, 1 / scale), scale


def weight_to_int8(weight: Float[Tensor, "o i"]) -> tuple[Tensor, Float[Tensor, " o"]]:
    """(weights in -127..127, the scale of each row): weight = int8 * scale. A row of zeros has the scale 1."""
    weight = weight.float()
    largest = weight.abs().amax(dim=1)
    scale = torch.where(largest > 0, largest / INT8_MAX, 1.0)
    return (weight / scale[:, None]).round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8), scale


def has_int8() -> bool:
    """Whether this CPU multiplies bytes natively (AVX512-VNNI). Without it oneDNN's sums may saturate at 16 bits."""
    return torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported()


class Linear8(nn.Module):
    """What both have in common.

    Args:
        weight: of the layer that this takes the place of; it is read, never changed.
        scale: what one step of the rounded input is worth; from calibration.
        emulated: compute with the very same rounded numbers in floating point, on any device (slow; for measuring the loss).

    Raises:
        ValueError: a weight or a scale that is not finite, or a scale that is not positive.
    """

    def __init__(self, weight: Float[Tensor, "o i"], scale: float, emulated: bool) -> None:
        super().__init__()
        if not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"a scale of {scale} is not positive: calibrate again, on latents that are finite")
        if not weight.isfinite().all():
            raise ValueError("the weights are not finite, so they cannot be rounded to eight bits")
        self.out_features, self.in_features = weight.shape
        self.emulated = emulated
        self.register_buffer("scale", torch.tensor(scale, device=weight.device), persistent=False)
        self.register_buffer("inverse", torch.tensor(1 / scale, device=weight.device), persistent=False)

    def extra_repr(self) -> str:
        shown = ", emulated" if self.emulated else ""
        return f"{self.in_features} -> {self.out_features}, scale={self.scale.item():.3g}{shown}"


class Fp8Linear(Linear8):
    """``x W^T`` in E4M3 through ``torch._scaled_mm``; sums as the tensor cores make them (about 14 bits, "fast accumulation"),
    emulated in float32. Features in and out must be multiples of 16."""

    def __init__(self, weight: Float[Tensor, "o i"], scale: float, emulated: bool = False) -> None:
        super().__init__(weight, scale, emulated)
        if self.in_features % MULTIPLE or self.out_features % MULTIPLE:
            raise ValueError(
                f"a linear layer {self.in_features} -> {self.out_features}: FP8 products take multiples of {MULTIPLE}; use bits8=none"
            )
        if not emulated and weight.is_cuda and torch.cuda.get_device_capability(weight.device) < (8, 9):
            name = torch.cuda.get_device_name(weight.device)
            raise ValueError(f"{name} has no FP8 products (compute capability 8.9 or more has); use bits8=none")
        rounded, weight_scale = weight_to_e4m3(weight.detach())
        self.register_buffer("weight", rounded, persistent=False)
        self.register_buffer("weight_scale", torch.tensor(weight_scale, device=weight.device), persistent=False)

    def forward(self, x: Float[Tensor, "... i"]) -> Float[Tensor, "... o"]:
        rounded = to_e4m3(x, self.inverse).flatten(0, -2)
        if self.emulated:
            product = F.linear(rounded.float(), self.weight.float()) * (self.scale * self.weight_scale)
            return product.to(x.dtype).unflatten(0, x.shape[:-1])
        product = torch._scaled_mm(
            rounded,
            self.weight.t(),
            scale_a=self.scale,
            scale_b=self.weight_scale,
            out_dtype=x.dtype,
            use_fast_accum=x.is_cuda,
        )
        return product.unflatten(0, x.shape[:-1])


class _Packed:
    """Weights in oneDNN's own order. torch.compile cannot trace such a tensor, so compiled code knows it by a number."""

    def __init__(self, weight: Tensor, scale: Float[Tensor, " o"]) -> None:
        self.weight = torch.ops.onednn.qlinear_prepack(weight, None)
        self.scale = scale
        self.zero_points = torch.zeros(len(scale), dtype=torch.int32)
        self.number = next(_numbers)
        _packed[self.number] = self

    def __deepcopy__(self, memo: dict) -> "_Packed":
        return self  # nobody changes it


_numbers = itertools.count()
_packed: "weakref.WeakValueDictionary[int, _Packed]" = weakref.WeakValueDictionary()


@torch.library.custom_op("decoders::int8_linear", mutates_args=())
def _int8_linear(x: Tensor, scale: Tensor, number: Tensor, out_features: int, dtype: torch.dtype) -> Tensor:
    w = _packed[number.item()]
    return torch.ops.onednn.qlinear_pointwise(
        x, scale.item(), ZERO_POINT, w.weight, w.scale, w.zero_points, None, 1.0, 0, dtype, "none", [], ""
    )


@_int8_linear.register_fake
def _(x: Tensor, scale: Tensor, number: Tensor, out_features: int, dtype: torch.dtype) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features), dtype=dtype)


class Int8Linear(Linear8):
    """``x W^T`` in int8 with sums in int32, through oneDNN on a CPU with AVX512-VNNI; emulated in float64, which holds the
    sums exactly."""

    def __init__(self, weight: Float[Tensor, "o i"], scale: float, emulated: bool = False) -> None:
        super().__init__(weight, scale, emulated)
        if not emulated and (weight.is_cuda or not has_int8()):
            raise ValueError(
                "int8 products need a CPU with AVX512-VNNI, which this is not; use bits8=none (or emulate them, slowly)"
            )
        if weight.dtype not in (torch.bfloat16, torch.float32):
            raise ValueError(f"int8 products give bfloat16 or float32, and the model is in {weight.dtype}")
        rounded, weight_scale = weight_to_int8(weight.detach())
        self._packed = None if emulated else _Packed(rounded, weight_scale)
        number = None if emulated else torch.tensor(self._packed.number)
        self.register_buffer("number", number, persistent=False)
        self.register_buffer("weight", rounded if emulated else None, persistent=False)
        self.register_buffer("weight_scale", weight_scale if emulated else None, persistent=False)

    def forward(self, x: Float[Tensor, "... i"]) -> Float[Tensor, "... o"]:
        rounded = to_offset_bytes(x, self.inverse)
        if not self.emulated:
            return _int8_linear(rounded, self.scale, self.number, self.out_features, x.dtype)
        sums = F.linear(rounded.double() - ZERO_POINT, self.weight.double())
        return (sums * (self.scale.double() * self.weight_scale.double())).to(x.dtype)


LAYERS: dict[str, type[Linear8]] = {"fp8": Fp8Linear, "int8": Int8Linear}
