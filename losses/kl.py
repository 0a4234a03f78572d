"""The price of a latent: KL divergence of a diagonal Gaussian posterior to the standard normal prior."""

from jaxtyping import Float
from torch import Tensor

LOG_VARIANCE_RANGE = (-30.0, 20.0)  # diffusers' and the original latent diffusion's: e^20 still squares in float32


def kl_to_standard_normal(
    mean: Float[Tensor, "b c n y x"], log_variance: Float[Tensor, "b c n y x"]
) -> Float[Tensor, ""]:
    """``0.5 (mean^2 + var - 1 - log var)`` in nats, mean over all latent elements, in float32.

    A mean and not a sum over a clip's elements, so that a weight means the same for any clip size (weights of latent
    diffusion's code, which sums, are to be multiplied by the number of elements). The log-variance is clamped to
    [-30, 20]; beyond that it has no gradient.

    Raises:
        ValueError: the shapes differ.
    """
    if mean.shape != log_variance.shape:
        raise ValueError(f"mean {tuple(mean.shape)} and log-variance {tuple(log_variance.shape)} must have one shape")
    mean, log_variance = mean.float(), log_variance.float().clamp(*LOG_VARIANCE_RANGE)
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
