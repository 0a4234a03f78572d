"""One door to the optimised inference path of every decoder network: `optimise(network, options)`.

A network keeps its plain path for training and as the reference; its optimised form is another module with the same
`decode`, `start_stream`, `step_stream` and `end_stream`, for inference only, that shares or repacks the weights.  Each
family builds its own (`network.optimised(options, calibration)`); this file only says what may be asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from decoders.layers.deployed import at_rest

EIGHT_BITS = ("none", "mlp", "linear")


@dataclass(frozen=True)
class InferenceOptions:
    """What the optimised form may do beyond what changes nothing.

    compile: torch.compile of one step, without graph breaks.  graphs: on CUDA, a step is captured as a CUDA graph and
    replayed; on a CPU without effect.  bits8: which products run with 8 bits and scales fixed by calibration (FP8 E4M3
    on CUDA, int8 on a CPU): none, those of the MLPs, or all linear layers of the blocks.  attention: "auto" (the
    fastest one that runs here, measured once a shape) or one kernel's name (decoders/flashdecoder/attention.py).
    uint8: frames come as uint8 "b k h w 3", clamped to [-1, 1] and rounded to 0..255 (NaN to 0), else as "b 3 k h w" in
    the model's dtype and range.  fast_convolutions: convolutions with fewer products and more rounding (Winograd).
    """

    compile: bool = False
    graphs: bool = True
    bits8: Literal["none", "mlp", "linear"] = "none"
    attention: str = "auto"
    uint8: bool = False
    fast_convolutions: bool = False

    def __post_init__(self) -> None:
        if self.bits8 not in EIGHT_BITS:
            raise ValueError(f"bits8 is one of {', '.join(EIGHT_BITS)}, got {self.bits8!r}")


DEFAULT = InferenceOptions()


def optimise(
    model: nn.Module, options: InferenceOptions = DEFAULT, calibration: Sequence[Tensor] | Any = ()
) -> nn.Module:
    """The optimised form of a decoder's network (a LightningModule's `.model`), which stays usable and unchanged.

    calibration: latents "b z f h w" that the network is run on to fix the scales of 8-bit products, or what was saved of
    such a run (decoders.flashdecoder.bits8.Calibration); needed only for `bits8`.  `attention=triton_fp8` takes latents too,
    and measures at every call without.  The result is in eval mode without gradients, in the model's dtype and
    on its device at this moment; later `.to()` of the model does not reach it.  Of the weights some are the model's own
    numbers in memory and some copies (packed, joined, rounded): after the model's weights were changed in place (an
    optimiser's step, `load_state_dict`), the result is neither the old nor the new network.  Build it anew then, or give
    `copy.deepcopy(model)`.  ValueError: the network has no optimised form, or its family has no use for an option that was
    asked for.
    """
    build = getattr(model, "optimised", None)
    if build is None:
        raise ValueError(f"{type(model).__name__} has no optimised form: give a decoder's network (module.model)")
    with at_rest(next(model.parameters()).device):  # weights are repacked as they are, whatever the caller is in
        return build(options, calibration)
