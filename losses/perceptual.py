"""LPIPS on clips, as a training loss and as the network behind the metric; and the crops it is computed on."""

import os
import warnings
from collections.abc import Iterator, Sequence
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
_BACKBONES: dict[str, tuple[str, int]] = {"vgg": ("vgg16", 16), "alex": ("alexnet", 31)}  # weights, smallest side


class Lpips(nn.Module):
    """LPIPS v0.1 (Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features"), frame by frame.

    ``net``: "vgg" is what decoders are trained with, "alex" what papers report. ``weights``: file or folder of the
    ImageNet backbone; None looks for it (:mod:`losses.pretrained`). The calibrated heads come from the ``lpips``
    package. ``frames_per_chunk`` bounds memory: chunks of frames go through the network and again in the backward.

    The network is frozen and hidden from ``parameters()``, ``state_dict()`` and ``.to()``: no optimiser, EMA, DDP
    bucket or checkpoint ever meets it; it follows its inputs to their device. Gradients flow to both inputs.

    Precision: the convolutions follow the surrounding autocast on a GPU (they are most of the cost) and are float32 on
    a CPU; normalising, differences and heads are always float32. The metric turns autocast off.
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
        return self.distance(self.features(prediction), self.features(target), mask)

    def features(self, frames: Float[Tensor, "frames 3 h w"]) -> tuple[Float[Tensor, "frames ..."], ...]:
        """What is compared: each layer's features with every pixel's channels at length 1, float32. RGB in [-1, 1]."""
        self._check_size(*frames.shape[-2:])
        self._follow(frames.device)
        with convolution_precision(frames.device):
            layers = list(self.network.net(self.network.scaling_layer(frames.float())))
        with torch.autocast(frames.device.type, enabled=False):
            return tuple(_unit(layers.pop(0).float()) for _ in range(len(layers)))

    def distance(
        self, ours: Sequence[Tensor], theirs: Sequence[Tensor], mask: Float[Tensor, "frames 1 h w"] | None = None
    ) -> Float[Tensor, " frames"]:
        """LPIPS of frames from their :meth:`features`; ``mask`` as in :meth:`per_frame`."""
        total = torch.zeros(len(ours[0]), device=ours[0].device)
        with torch.autocast(total.device.type, enabled=False):
            for head, one, other in zip(self.network.lins, ours, theirs, strict=True):
                cell = head((one - other).square())  # (frames, 1, y, x)
                if mask is None:
                    total = total + cell.mean(dim=(1, 2, 3))
                else:
                    share = F.adaptive_avg_pool2d(mask.float(), cell.shape[-2:])
                    total = total + (cell * share).sum(dim=(1, 2, 3)) / share.sum(dim=(1, 2, 3))
        return total


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
