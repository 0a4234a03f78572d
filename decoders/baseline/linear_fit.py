"""The convolutions of the linear start, fitted to fields of the AR(1) model: what pixels repeated and convolved do best.

Nearest-neighbour upsampling and a 3x3 convolution cannot undo a Haar packet, but many of them together come close to the
best smooth synthesis. It is found once, by L-BFGS on random fields, in seconds and without data.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

Table = Sequence[tuple[int, int, int]]  # per channel: of which finer channel, sign along rows, along columns

FIELD = 48  # side of a random field in pixels
FIELDS = 24


def fields(variances: Sequence[float], rho: float, generator: torch.Generator) -> Tensor:
    """Random fields "b k h w", one plane per variance, pixels correlated by ``rho`` along rows and columns."""
    steps = torch.arange(FIELD, dtype=torch.float64)
    root = torch.linalg.cholesky(rho ** (steps[:, None] - steps[None, :]).abs()).float()
    noise = torch.randn(FIELDS, len(variances), FIELD, FIELD, generator=generator)
    return root @ noise @ root.T * torch.tensor(variances).sqrt().view(-1, 1, 1)


def haar(table: Table, channels: int) -> Tensor:
    """The analysis of ``table`` as a convolution "o i 2 2" of stride 2."""
    taps = torch.zeros(len(table), channels, 2, 2)
    for place, (source, p, q) in enumerate(table):
        taps[place, source] = torch.tensor([[1, q], [p, p * q]]) / 2
    return taps


def first_guess(table: Table, channels: int) -> Tensor:
    """Synthesis taps "o i 3 3": bilinear for sums, the halved slope for differences."""
    smooth, slope = torch.tensor([0.25, 0.5, 0.25]) / 2**0.5, torch.tensor([-0.5, 0.0, 0.5]) / 2**0.5
    taps = torch.zeros(channels, len(table), 3, 3)
    for place, (source, p, q) in enumerate(table):
        taps[source, place] = torch.outer(smooth if p > 0 else slope, smooth if q > 0 else slope)
    return taps


def fit(
    tables: Sequence[Table],
    carried: Sequence[Sequence[bool]],
    kept: int,
    still: int,
    variances: Sequence[float],
    rho: float,
    iterations: int = 500,
) -> tuple[list[Tensor], list[Tensor]]:
    """Taps "o i 3 3" of every reduction, outermost first, and of every upsampling, innermost first.

    Args:
        tables: of every reduction, outermost first.
        carried: of every reduction, which channels hold the same in images and in later frames; only these are used.
        kept: so many innermost channels are known of an image.
        still: and so many of them in a moving clip; one codec serves both.
        variances: of the outermost channels' pixels.
        rho: correlation of neighbouring pixels.
    """
    field = fields(variances, rho, torch.Generator().manual_seed(0))
    counts = [len(variances), *(len(table) for table in tables)]
    pairs = list(zip(tables, counts, strict=False))
    down = [F.pad(haar(table, channels), (0, 1, 0, 1)).requires_grad_() for table, channels in pairs]
    up = [first_guess(table, channels).requires_grad_() for table, channels in pairs][::-1]
    masks = [torch.tensor(c).float() for c in [[True] * len(variances), *carried]]
    known = torch.zeros(FIELDS, counts[-1], 1, 1)
    known[:, :still] = 1
    known[FIELDS // 2 :, :kept] = 1
    optimizer = torch.optim.LBFGS(down + up, max_iter=iterations, history_size=20, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        x = field
        for kernel, mask in zip(down, masks, strict=False):
            x = F.conv2d(F.pad(x, (0, 1, 0, 1)), kernel * mask.view(1, -1, 1, 1), stride=2)
        y = x * known
        for kernel, mask in zip(up, masks[-2::-1], strict=True):
            y = F.conv2d(F.interpolate(y, scale_factor=2.0, mode="nearest"), kernel * mask.view(-1, 1, 1, 1), padding=1)
        edge = 4
        error = (y - field)[..., edge:-edge, edge:-edge].square().mean()
        error.backward()
        return error

    with torch.enable_grad():
        optimizer.step(loss)
    down = [kernel.detach() * mask.view(1, -1, 1, 1) for kernel, mask in zip(down, masks, strict=False)]
    up = [kernel.detach() * mask.view(-1, 1, 1, 1) for kernel, mask in zip(up, masks[-2::-1], strict=True)]
    return down, up
