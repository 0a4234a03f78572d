"""A frame interpolator of others, from a TorchScript file: what REGEN's frames between frames are held against.

The call is that of FILM as it is published in TorchScript (Reda et al., arXiv 2202.04901): ``(x0, x1, dt) -> frame`` with both
frames "b 3 h w" in [0, 1] and ``dt`` "b 1", 0.5 for the middle. The file is the user's; nothing is downloaded.
"""

import hashlib
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

MULTIPLE = 64  # FILM's pyramid halves frames six times; sides are padded up to it


class Interpolator:
    """The network in a file, read when it is first needed. No module: it enters no checkpoint and no optimiser.

    Raises:
        ValueError: there is no such file.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path).expanduser()
        if not self.path.is_file():
            raise ValueError(
                f"objective.interpolator={path}: there is no such file; give the path of a TorchScript file that is called as FILM's "
                "is, (x0, x1, dt), or null for none"
            )
        self._network: torch.jit.ScriptModule | None = None
        self._sha256 = ""

    @property
    def name(self) -> str:
        """What the row is called."""
        return f"interpolator {self.path.name}"

    @property
    def protocol(self) -> dict[str, str]:
        """What decides its frames: the file by its sha256, and how it is called."""
        if not self._sha256:
            with open(self.path, "rb") as file:
                self._sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        called = f"(x0, x1, dt=0.5) in [0, 1], last row and column repeated to multiples of {MULTIPLE}, clamped"
        return {"file": self.path.name, "sha256": self._sha256, "called": called}

    def load(self) -> None:
        """Read the file now. Raises ValueError: it is no TorchScript, or its call is another."""
        if self._network is not None:
            return
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the format's age: such networks are published in no other
                network = torch.jit.load(str(self.path), map_location="cpu").eval()
        except RuntimeError as error:
            raise ValueError(
                f"objective.interpolator={self.path} is no TorchScript file: {str(error).splitlines()[0]}"
            ) from None
        arguments = network.forward.schema.arguments[1:]
        if len(arguments) != 3 or any(str(argument.type) != "Tensor" for argument in arguments):
            taken = ", ".join(f"{argument.name}: {argument.type}" for argument in arguments)
            raise ValueError(
                f"objective.interpolator={self.path} takes ({taken}), not the tensors (x0, x1, dt) of FILM"
            )
        self._network = network

    @torch.no_grad()
    def __call__(self, video: Float[Tensor, "b 3 t h w"]) -> Float[Tensor, "b 3 t h w"]:
        """RGB in [-1, 1] whose odd frames are made of the true ones beside them; ``t`` is odd. Frame by frame, in float32 or
        what the file's weights are."""
        self.load()
        h, w = video.shape[-2:]
        network = self._network.to(video.device)
        weights = next(network.parameters(), None)
        dtype = torch.float32 if weights is None else weights.dtype
        shown = video.clone()
        half = torch.full((len(video), 1), 0.5, device=video.device, dtype=dtype)
        with torch.autocast(video.device.type, enabled=False):
            for i in range(1, video.shape[2], 2):
                beside = [_padded((video[:, :, j].float() + 1) / 2).to(dtype) for j in (i - 1, i + 1)]
                shown[:, :, i] = (network(*beside, half)[..., :h, :w].float().clamp(0, 1) * 2 - 1).to(shown.dtype)
        return shown


def _padded(frame: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h2 w2"]:
    return F.pad(frame, (0, -frame.shape[-1] % MULTIPLE, 0, -frame.shape[-2] % MULTIPLE), mode="replicate")
