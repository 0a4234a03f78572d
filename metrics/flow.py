"""Optical flow between neighbouring frames, warping along it, and which pixels both frames see.

A flow "pairs 2 h w" holds (x, y) in pixels: what is at ``p`` in the one frame is at ``p + flow(p)`` in the other.
"""

import os
import pickle
from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from losses.pretrained import WeightsDamaged, WeightsNotFound, digest

_RAFT_URL = "https://download.pytorch.org/models/raft_large_C_T_SKHT_V2-ff5fadd5.pth"


class Flow(ABC):
    """``flow(frames) -> (forward, backward)`` between neighbours. ``definition`` says all that decides the numbers."""

    name: str
    definition: str

    @abstractmethod
    def _between(self, one: Tensor, other: Tensor) -> Tensor:
        """Frames (3, h, w) in [-1, 1] -> (2, h, w), of ``one`` to ``other``."""

    def __call__(
        self, frames: Float[Tensor, "frames 3 h w"]
    ) -> tuple[Float[Tensor, "pairs 2 h w"], Float[Tensor, "pairs 2 h w"]]:
        """Flow of each frame to the next, and of the next back to it; RGB in [-1, 1]. Each pair by itself."""
        pairs = list(zip(frames[:-1], frames[1:], strict=True))
        forward = torch.stack([self._between(one, other) for one, other in pairs])
        return forward, torch.stack([self._between(other, one) for one, other in pairs])


class DisFlow(Flow):
    """Dense inverse search (Kroeger et al. 2016) by OpenCV, medium preset, on 8-bit luma: no weights, on the CPU.

    Frames need 16 x 16 pixels.
    """

    name = "dis"
    definition = "OpenCV DIS, medium preset, 8-bit luma (Rec. 601), one thread"
    _smallest = 16  # a patch of 8 at half size; below, OpenCV 5.0 crashes on long frames

    def _between(self, one: Tensor, other: Tensor) -> Tensor:
        import cv2  # here: only who measures flow pays for it

        if min(one.shape[-2:]) < self._smallest:
            height, width = one.shape[-2:]
            raise ValueError(
                f"DIS flow needs frames of {self._smallest}x{self._smallest} or more, got {height}x{width}"
            )
        dis, threads = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM), cv2.getNumThreads()
        cv2.setNumThreads(1)  # rows are shared out by the number of threads: the same on every machine
        try:
            flow = dis.calc(_luma(one), _luma(other), None)
        finally:
            cv2.setNumThreads(threads)
        return torch.from_numpy(flow).permute(2, 0, 1).to(one.device)


class RaftFlow(Flow):
    """RAFT-large (Teed and Deng 2020) in torchvision's form, 20 updates, float32.

    ``weights``: a file of torchvision's state dict (``.pth``, read with ``weights_only``) or the same as safetensors.
    Frames are padded at the right and the bottom to multiples of 8 by repeating their edge. RAFT takes 128 x 128 or
    more: smaller frames are enlarged by the least whole factor that gets there (bilinear) and the flow is averaged and
    divided back.

    Raises:
        WeightsNotFound: no file was given or it is not there; names the file to download.
        WeightsDamaged: the file does not hold exactly RAFT-large.
    """

    name = "raft"
    _smallest, _updates = 128, 20

    def __init__(self, weights: str | os.PathLike | None):
        tensors = _read_raft(weights)
        self._network = _build_raft(tensors, weights)
        self.definition = f"torchvision RAFT-large:{digest(tensors)[:12]}, {self._updates} updates, "
        self.definition += f"padded to multiples of 8, enlarged to {self._smallest} or more"

    def _between(self, one: Tensor, other: Tensor) -> Tensor:
        with torch.inference_mode(False):  # weights moved in inference mode stay inference tensors for good
            self._network.to(one.device)
        factor = -(-self._smallest // min(one.shape[-2:]))
        pair = [self._fitted(frame[None], factor) for frame in (one, other)]
        flow = self._network(*pair, num_flow_updates=self._updates)[-1]
        h, w = (side * factor for side in one.shape[-2:])
        return F.avg_pool2d(flow[:, :, :h, :w], factor)[0] / factor

    def _fitted(self, frame: Tensor, factor: int) -> Tensor:
        if factor > 1:
            frame = F.interpolate(frame, scale_factor=factor, mode="bilinear", align_corners=False)
        h, w = frame.shape[-2:]
        return F.pad(frame, (0, -w % 8, 0, -h % 8), mode="replicate")


def warp(frames: Float[Tensor, "pairs c h w"], flow: Float[Tensor, "pairs 2 h w"]) -> Float[Tensor, "pairs c h w"]:
    """``frames`` read at ``p + flow(p)``, bilinear; outside a frame its edge goes on."""
    points = _targets(flow)
    size = torch.tensor([flow.shape[-1], flow.shape[-2]], device=flow.device).view(1, 2, 1, 1)
    grid = (2 * points / (size - 1).clamp(min=1) - 1).permute(0, 2, 3, 1)
    return F.grid_sample(frames, grid, mode="bilinear", padding_mode="border", align_corners=True)


def visible(
    forward: Float[Tensor, "pairs 2 h w"], backward: Float[Tensor, "pairs 2 h w"]
) -> Float[Tensor, "pairs 1 h w"]:
    """1 where a pixel of the earlier frame is seen in the later one too, else 0 (Lai et al. 2018).

    With B the forward flow and A the backward flow where B leads, a pixel is occluded if |A + B|^2 > 0.01 (|A|^2 +
    |B|^2) + 0.5, and on a motion boundary, where flow is not to be trusted, if the squared differences of B to the next
    pixel right and below are more than 0.01 |B|^2 + 0.002 together; magnitudes in pixels. Pixels that B leads out of the
    frame are not seen either, which Lai et al. leave to the first rule.
    """
    back = warp(backward, forward)
    disagree = _square(back + forward) > 0.01 * (_square(back) + _square(forward)) + 0.5
    right = F.pad(forward.diff(dim=3), (0, 1))
    below = F.pad(forward.diff(dim=2), (0, 0, 0, 1))
    boundary = _square(right) + _square(below) > 0.01 * _square(forward) + 0.002
    x, y = _targets(forward).split(1, dim=1)
    inside = (x >= 0) & (x <= forward.shape[3] - 1) & (y >= 0) & (y <= forward.shape[2] - 1)
    return (inside & ~disagree & ~boundary).float()


def _targets(flow: Tensor) -> Tensor:
    y, x = (torch.arange(side, dtype=flow.dtype, device=flow.device) for side in flow.shape[-2:])
    return flow + torch.stack([x.expand(len(y), -1), y[:, None].expand(-1, len(x))])


def _square(flow: Tensor) -> Tensor:
    return flow.square().sum(dim=1, keepdim=True)


def _luma(frame: Tensor) -> np.ndarray:
    """(3, h, w) in [-1, 1] -> uint8 (h, w)."""
    weights = torch.tensor([0.299, 0.587, 0.114], device=frame.device).view(3, 1, 1)
    luma = ((frame + 1) * 127.5 * weights).sum(dim=0)
    return np.ascontiguousarray(luma.round().clamp(0, 255).byte().cpu().numpy())


def _read_raft(weights: str | os.PathLike | None) -> dict[str, Tensor]:
    help = f"download {_RAFT_URL} and name the file as weights of raft"
    if weights is None:
        raise WeightsNotFound(f"warp_raft has no weights of its own: {help}; warp_dis needs none")
    path = Path(weights).expanduser()
    if not path.is_file():
        raise WeightsNotFound(f"RAFT weights: {path} is not a file: {help}; warp_dis needs none")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise WeightsDamaged(f"{path} is not a readable state dict ({error}): {help}") from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise WeightsDamaged(f"{path} is not a state dict of tensors: {help}")
    return tensors


def _build_raft(tensors: dict[str, Tensor], source: str | os.PathLike | None) -> nn.Module:
    from torchvision.models.optical_flow import raft_large  # here: only who measures flow pays for it

    with torch.inference_mode(False):
        with torch.device("meta"):  # its constructor would draw random numbers
            network = raft_large(weights=None, progress=False)
        try:
            network.load_state_dict(tensors, strict=True, assign=True)
        except RuntimeError as error:
            raise WeightsDamaged(f"{source} does not hold RAFT-large: {str(error)[:300]}") from error
        return network.float().requires_grad_(False).eval()
