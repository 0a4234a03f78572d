"""Running mean and standard deviation of latents while their encoder is trained."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import functional_call

from decoders.backbones.magvit2 import Magvit2Encoder
from decoders.sharding import is_sharded, whole


class Moments:
    """Moments of what the encoder gave of late: an average over steps that forgets, each step with the same weight.

    A plain object: DDP would overwrite a module's buffers with rank 0's before every pass, and weights files hold none.
    """

    def __init__(self, channels: int, decay: float = 0.99) -> None:
        self.decay = decay
        self.sums = torch.zeros(3, channels, dtype=torch.float64)
        self._before = self.sums  # as they were before the step that is under way

    @torch.no_grad()
    def update(self, latent: Float[Tensor, "b c n y x"]) -> None:
        """Take in the latents of one step; nothing waits for the device."""
        each = latent.detach().double().transpose(0, 1).flatten(1)
        seen = torch.stack([torch.ones_like(each[:, 0]), each.mean(1), each.square().mean(1)])
        self.sums = self.sums.to(seen.device) * self.decay + seen

    def end_step(self, made: bool = True) -> None:
        """Once a step, by all ranks: each takes the mean over them, so that the checkpoint of one holds what all have seen. Of
        a step that was not ``made`` (its latents may not be finite) nothing stays."""
        if not made:
            self.sums = self._before
        elif self.sums is not self._before and torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.sums)
            self.sums /= torch.distributed.get_world_size()
        self._before = self.sums

    def restore(self, sums: Tensor) -> None:
        """Go on from a checkpoint's ``sums``."""
        self.sums = self._before = sums.clone()  # not the file's memory map

    def over_ranks(self) -> tuple[Float[Tensor, " c"], Float[Tensor, " c"]]:
        """Mean and standard deviation per channel, the same on all ranks.

        Raises:
            ValueError: nothing was seen, or a channel is constant or not finite.
        """
        sums = self.sums.clone()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        count, mean, squares = sums[0], sums[1] / sums[0], sums[2] / sums[0]
        std = (squares - mean.square()).clamp(min=0).sqrt()
        bad = [str(i) for i, ok in enumerate(((count > 0) & (std > 0) & std.isfinite()).tolist()) if not ok]
        if bad:
            raise ValueError(
                f"latent channels {', '.join(bad)} are constant or not finite: there is nothing to normalise. The last "
                "checkpoint is intact; objective.freeze_statistics=false (which makes another run) leaves latents as they are"
            )
        return mean.float(), std.float()


@torch.no_grad()
def encode_with(
    encoder: Magvit2Encoder, weights: dict[str, Tensor], clip: Float[Tensor, "b 3 t h w"]
) -> tuple[Tensor, Tensor | None]:
    """What ``encoder`` would give with other weights, in float32. Sharded, they are gathered: all processes must call this."""
    weights = {name: whole(weights[name]) for name, _ in encoder.named_parameters()}
    if is_sharded(encoder):  # a call of it would gather its own weights over these
        with torch.device("meta"):
            encoder = Magvit2Encoder(encoder.config, encoder.variational)
    with torch.autocast(clip.device.type, enabled=False):
        return functional_call(encoder, weights, (clip,))
