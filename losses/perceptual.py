"""LPIPS on clips, as a training loss and as the network behind the metric; and the crops it is computed on."""

import copy
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from losses.pixel import check_pair
from losses.precision import convolution_precision
from losses.pretrained import digest, load_weights

Net = Literal["vgg", "alex"]
Precision = Literal["auto", "float32", "bfloat16"]
_BACKBONES: dict[str, tuple[str, int]] = {"vgg": ("vgg16", 16), "alex": ("alexnet", 31)}  # weights, smallest side


class Lpips(nn.Module):
    """LPIPS v0.1 (Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features"), frame by frame.

    ``net``: "vgg" is what decoders are trained with, "alex" what papers report. ``weights``: file or folder of the
    ImageNet backbone; None looks for it (:mod:`losses.pretrained`). The calibrated heads come from the ``lpips``
    package. ``frames_per_chunk`` bounds memory: chunks of frames go through the network and again in the backward.

    The network is frozen and hidden from ``parameters()``, ``state_dict()`` and ``.to()``: no optimiser, EMA, DDP
    bucket or checkpoint ever meets it; it follows its inputs to their device. Gradients flow to both inputs.

    Precision: by default ("auto") the convolutions follow the surrounding autocast on a GPU (they are most of the cost)
    and are float32 on a CPU; ``precision`` sets them by itself. Normalising, differences and heads are always float32.
    The metric turns autocast off and leaves ``precision`` alone.
    """

    def __init__(
        self, net: Net = "vgg", weights: str | os.PathLike | None = None, *, frames_per_chunk: int | None = None
    ):
        super().__init__()
        if net not in _BACKBONES:
            raise ValueError(f"no LPIPS network {net!r}; there are {list(get_args(Net))}")
        if frames_per_chunk is not None and frames_per_chunk < 1:
            raise ValueError(f"frames_per_chunk must be 1 or more, or None for all at once, got {frames_per_chunk}")
        self.net, self.frames_per_chunk = net, frames_per_chunk
        backbone, self.smallest = _BACKBONES[net]
        features = load_weights(backbone, weights)
        self.fingerprint = f"{backbone}:{digest(features)[:12]}"
        with torch.inference_mode(False):
            self._hidden = [_build(net, features)]  # in a list, which nn.Module does not look into
        self._halved: list[nn.Module] = []  # the convolutions in bfloat16, once they are asked for
        self.precision: Precision = "auto"
        self.fused: Callable[..., Tensor] | None = (
            None  # a compiled `distance_of_layer`; None: the package's own layers
        )

    @property
    def network(self) -> nn.Module:
        """The frozen network (package ``lpips``), in eval mode."""
        return self._hidden[0]

    def forward(self, prediction: Float[Tensor, "b 3 t h w"], target: Float[Tensor, "b 3 t h w"]) -> Float[Tensor, ""]:
        """Mean LPIPS over all frames; RGB in [-1, 1]. ValueError if frames are too small for the network."""
        return self.per_frame(prediction, target).mean()

    def per_frame(
        self,
        prediction: Float[Tensor, "b 3 t h w"],
        target: Float[Tensor, "b 3 t h w"],
        mask: Float[Tensor, "b 1 t h w"] | None = None,
    ) -> Float[Tensor, "b t"]:
        """LPIPS of each frame. With a mask each layer's distances are averaged with the mask's share of every cell.

        An all-ones mask changes nothing. A frame in which nothing counts gives NaN: the caller knows what to say.
        """
        check_pair(prediction, target, mask)
        b, _, t, h, w = prediction.shape
        self._check_size(h, w)
        folded = [x if x is None else x.transpose(1, 2).flatten(0, 1) for x in (prediction, target, mask)]
        return torch.cat([self._chunk(*chunk) for chunk in self._chunks(*folded)]).unflatten(0, (b, t))

    def _check_size(self, h: int, w: int) -> None:
        if min(h, w) < self.smallest:
            raise ValueError(f"LPIPS-{self.net} needs frames of {self.smallest}x{self.smallest} or more, got {h}x{w}")

    def _follow(self, device: torch.device) -> None:
        # Lightning validates in inference mode, and tensors made there can never again take part in a backward.
        with torch.inference_mode(False):
            self.network.to(device)

    def _chunks(self, prediction: Tensor, target: Tensor, mask: Tensor | None) -> Iterator[tuple]:
        size = self.frames_per_chunk or len(prediction)
        masks = [None] * -(-len(prediction) // size) if mask is None else mask.split(size)
        return zip(prediction.split(size), target.split(size), masks, strict=True)

    def _chunk(self, prediction: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
        needs_graph = torch.is_grad_enabled() and (prediction.requires_grad or target.requires_grad)
        if self.frames_per_chunk is None or not needs_graph:
            return self._distance(prediction, target, mask)
        return checkpoint(self._distance, prediction, target, mask, use_reentrant=False, preserve_rng_state=False)

    def _distance(self, prediction: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
        """(frames, 3, h, w) twice -> (frames,)."""
        if self.fused is None:
            return self.distance(self.features(prediction), self.features(target), mask)
        self._check_size(*prediction.shape[-2:])
        layers = zip(self.network.lins, self._layers(prediction), self._layers(target), strict=True)
        with torch.autocast(prediction.device.type, enabled=False):
            return _mean([self.fused(one, other, head.model[-1].weight) for head, one, other in layers], mask)

    def features(self, frames: Float[Tensor, "frames 3 h w"]) -> tuple[Float[Tensor, "frames ..."], ...]:
        """What is compared: each layer's features with every pixel's channels at length 1, float32. RGB in [-1, 1]."""
        self._check_size(*frames.shape[-2:])
        layers = self._layers(frames)
        with torch.autocast(frames.device.type, enabled=False):
            return tuple(_unit(layers.pop(0).float()) for _ in range(len(layers)))

    def _layers(self, frames: Tensor) -> list[Tensor]:
        """Each layer's features as the network gives them, in the precision of its convolutions."""
        self._follow(frames.device)
        if self.precision == "auto":
            with convolution_precision(frames.device):
                return list(self.network.net(self.network.scaling_layer(frames.float())))
        with torch.autocast(frames.device.type, enabled=False):
            scaled = self.network.scaling_layer(frames.float())
            if self.precision == "float32":
                return list(self.network.net(scaled))
            return list(self._halved_net(frames.device)(scaled.to(torch.bfloat16, memory_format=torch.channels_last)))

    def _halved_net(self, device: torch.device) -> nn.Module:
        """The convolutions in bfloat16: autocast would round the frozen weights anew at every call."""
        with torch.inference_mode(False):
            if not self._halved:
                halved = copy.deepcopy(self.network.net).to(torch.bfloat16, memory_format=torch.channels_last)
                self._halved.append(halved)
            return self._halved[0].to(device)

    def distance(
        self, ours: Sequence[Tensor], theirs: Sequence[Tensor], mask: Float[Tensor, "frames 1 h w"] | None = None
    ) -> Float[Tensor, " frames"]:
        """LPIPS of frames from their :meth:`features`; ``mask`` as in :meth:`per_frame`."""
        with torch.autocast(ours[0].device.type, enabled=False):
            layers = zip(self.network.lins, ours, theirs, strict=True)
            return _mean([head((one - other).square()) for head, one, other in layers], mask)


def random_crop_pair(
    prediction: Float[Tensor, "b 3 t h w"],
    target: Float[Tensor, "b 3 t h w"],
    size: int = 224,
    generator: torch.Generator | None = None,
    mask: Float[Tensor, "b 1 t h w"] | None = None,
) -> tuple[Tensor, ...]:
    """One random ``size`` x ``size`` window per clip: the same for all its frames, for prediction, target and mask.

    A dimension that is ``size`` or smaller is kept whole. ``generator`` lives on the CPU; None draws from torch's
    global one. Returns (prediction, target), and the mask third if one was given. Gradients flow through.
    """
    check_pair(prediction, target, mask)
    if size < 1:
        raise ValueError(f"crop size must be 1 or more, got {size}")
    (b, _, _, h, w), tensors = prediction.shape, [x for x in (prediction, target, mask) if x is not None]
    height, width = min(size, h), min(size, w)
    tops = torch.randint(h - height + 1, (b,), generator=generator).tolist()
    lefts = torch.randint(w - width + 1, (b,), generator=generator).tolist()
    return tuple(
        torch.stack(
            [clip[..., top : top + height, left : left + width] for clip, top, left in zip(x, tops, lefts, strict=True)]
        )
        for x in tensors
    )


def distance_of_layer(
    one: Float[Tensor, "frames c y x"], other: Float[Tensor, "frames c y x"], weight: Float[Tensor, "1 c 1 1"]
) -> Float[Tensor, "frames 1 y x"]:
    """Weighted squared difference of two frames' features of a layer, each pixel's channels at length 1, in float32.

    What :meth:`Lpips.features` and a head do in a dozen passes over memory; compiled it is two forward and two backward.
    """
    return ((_unit(one.float()) - _unit(other.float())).square() * weight).sum(dim=1, keepdim=True)


def _mean(cells: list[Tensor], mask: Tensor | None) -> Tensor:
    """Each layer's distances "frames 1 y x", averaged over positions or their shares in the mask, and summed."""
    total = torch.zeros(len(cells[0]), device=cells[0].device)
    for cell in cells:
        if mask is None:
            total = total + cell.mean(dim=(1, 2, 3))
        else:
            share = F.adaptive_avg_pool2d(mask.float(), cell.shape[-2:])
            total = total + (cell * share).sum(dim=(1, 2, 3)) / share.sum(dim=(1, 2, 3))
    return total


def _unit(features: Tensor) -> Tensor:
    """Each pixel's channels at length 1.

    Not the package's ``sqrt(sum(x^2))``: its gradient is NaN or inf where all channels are 0 or underflow.
    """
    return features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + 1e-10)


def _build(net: Net, features: dict[str, Tensor]) -> nn.Module:
    """The package's network with our weights: its own constructor downloads, or draws 500 MB of random numbers."""
    import lpips  # here: it takes seconds (scipy, torchvision)

    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")  # it calls torchvision in a deprecated way
        module = lpips.LPIPS(pretrained=False, net=net, pnet_rand=True, use_dropout=True, verbose=False)
    heads = Path(lpips.__file__).parent / "weights" / "v0.1" / f"{net}.pth"
    state = torch.load(heads, map_location="cpu", weights_only=True)
    state |= {key.replace("lin", "lins.", 1): value for key, value in state.items()}  # it registers each head twice
    state |= {f"scaling_layer.{key}": value for key, value in lpips.ScalingLayer().state_dict().items()}
    slices = (key for key in module.state_dict() if key.startswith("net.slice"))
    state |= {key: features[f"features.{key.split('.', 2)[2]}"] for key in slices}
    module.to_empty(device="cpu").load_state_dict(state, strict=True)
    if net == "vgg":  # a third less time on a CPU, and what tensor cores want; AlexNet gains nothing
        module.to(memory_format=torch.channels_last)
    return module.requires_grad_(False).eval()
