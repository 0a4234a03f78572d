"""Cheaper operators that start from a teacher's weights instead of from noise.

Functions of tensors (``separable``, ``folded``, ``sliced``) and functions that fill a module (``init_*``). What a module is
filled with is worked out in float64 as the dense weight (o, i, kt, kh, kw) and bias it stands for; a module that
cannot hold that weight gets what it can: the sum of the temporal taps (2D convolutions of frames), or one spatial kernel
for each input channel (depthwise separable). Weights here are not differentiated through.

Neither conversion is described by the paper (Flash-VAED, arXiv 2602.19161); these are ours.
"""

import itertools
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from decoders.flash_vaed.statistics import ChannelStatistics
from decoders.layers.causal_conv import DepthwiseSeparableConv3d

Convolution = nn.Conv2d | nn.Conv3d  # CausalConv3d and FrameConv2d among them
Indices = Tensor | Sequence[int] | None  # channels; None: all of them, in order


def separable(
    weight: Float[Tensor, "o i kt kh kw"],
    covariance: Float[Tensor, "i i"] | Float[Tensor, " i"] | None = None,
    taps: Float[Tensor, "n n"] | None = None,
    steps: int = 0,
) -> tuple[Float[Tensor, "i kt kh kw"], Float[Tensor, "o i"]]:
    """Depthwise and pointwise weights whose product p[o, i] d[i, tap] is near a dense weight.

    Input channels do not meet, so the nearest in plain weights is a rank-1 SVD of each channel's (o, taps) slice:
    d = v_1, of length 1, and p = s_1 u_1. Exact for a weight that is separable. Channels weighted by their own second
    moments (``covariance`` of one axis) have the same optimum; what can be gained needs to know how inputs go together:
    ``taps``, the second moments between the taps of a kernel (:func:`tap_moments`), decides what each slice's SVD sees,
    and ``steps`` of alternating least squares lower :func:`separable_error` further where channels are correlated.
    """
    o, i = weight.shape[:2]
    dense = weight.detach().double().flatten(2)
    root = _root(taps, dense)
    dense = dense @ root  # the error is plain in these coordinates of the taps
    u, s, v = torch.linalg.svd(dense.transpose(0, 1), full_matrices=False)
    depthwise, pointwise = v[:, 0], (s[:, :1] * u[:, :, 0]).T
    if steps and covariance is not None and covariance.ndim == 2:
        depthwise, pointwise = _alternate(dense, covariance.to(dense), depthwise, pointwise, steps)
    depthwise = torch.linalg.solve(root, depthwise, left=False)
    length = depthwise.norm(dim=1) * torch.where(depthwise.sum(1) < 0, -1.0, 1.0)  # SVD leaves the sign open
    length = torch.where(length == 0, 1.0, length)
    return (depthwise / length[:, None]).reshape(i, *weight.shape[2:]), pointwise * length


def separable_error(
    weight: Float[Tensor, "o i kt kh kw"],
    depthwise: Float[Tensor, "i kt kh kw"],
    pointwise: Float[Tensor, "o i"],
    covariance: Float[Tensor, "i i"] | Float[Tensor, " i"] | None = None,
    taps: Float[Tensor, "n n"] | None = None,
) -> float:
    """Expected squared error of the outputs, summed, for inputs whose second moments are covariance x taps (None: white):
    sum over outputs of the quadratic form of the weights' difference."""
    difference = (weight.detach().double() - pointwise[:, :, None, None, None] * depthwise).flatten(2)
    difference = difference @ _root(taps, difference)
    return float(_energy(difference, _as_matrix(covariance, difference)))


def tap_moments(
    features: Float[Tensor, "b c t h w"], kernel: tuple[int, int, int] = (3, 3, 3), mean: Tensor | None = None
) -> Float[Tensor, "n n"]:
    """Second moments between the taps of a causal convolution's kernel, averaged over channels and positions, in float64;
    scaled to a mean of 1 on the diagonal. Taps in the padding count as zeros. ``mean``, one a channel, is taken off."""
    features = features.detach().double()
    if mean is not None:
        features = features - mean.to(features)[:, None, None, None]
    (kt, kh, kw), (t, h, w) = kernel, features.shape[2:]
    padded = F.pad(features, (kw // 2, kw // 2, kh // 2, kh // 2, kt - 1, 0)).flatten(0, 1)
    starts = list(itertools.product(range(kt), range(kh), range(kw)))
    moments = features.new_zeros(len(starts), len(starts))
    for maps in padded.split(max(1, (1 << 22) // (len(starts) * t * h * w))):  # patches of a few at a time: 32 MiB
        patches = torch.stack([maps[:, z : z + t, y : y + h, x : x + w].flatten() for z, y, x in starts])
        moments += patches @ patches.T
    scale = moments.diagonal().mean()
    return moments / scale if scale > 0 else torch.eye(len(moments)).to(moments)


def _root(taps: Tensor | None, like: Tensor) -> Tensor:
    """L of taps = L L^T, a little away from singular; the identity if nothing is known."""
    identity = torch.eye(like.shape[-1]).to(like)
    if taps is None:
        return identity
    return torch.linalg.cholesky(taps.to(like) + 1e-6 * taps.diagonal().mean().to(like) * identity)


def _as_matrix(covariance: Tensor | None, like: Tensor) -> Tensor:
    if covariance is None:
        return torch.eye(like.shape[1]).to(like)
    return covariance.to(like).diag() if covariance.ndim == 1 else covariance.to(like)


def _energy(difference: Tensor, covariance: Tensor) -> Tensor:
    return (difference * torch.einsum("ij,ojn->oin", covariance, difference)).sum()


def _alternate(
    dense: Tensor, covariance: Tensor, depthwise: Tensor, pointwise: Tensor, steps: int
) -> tuple[Tensor, Tensor]:
    """Least squares for p with d fixed, then for d with p fixed. A small proximal term keeps singular systems solvable
    and each half step from raising the error; the best is returned, so that rounding cannot either."""

    def solve(matrix: Tensor, right: Tensor) -> Tensor:
        ridge = 1e-9 * matrix.diagonal().mean().clamp(min=1e-300)
        return torch.linalg.solve(matrix + ridge * torch.eye(len(matrix)).to(matrix), right)

    def error() -> float:
        return float(_energy(dense - pointwise[:, :, None] * depthwise, covariance))

    target = torch.einsum("ij,ojn->oin", covariance, dense)
    best = (error(), depthwise, pointwise)
    for _ in range(steps):
        system = covariance * (depthwise @ depthwise.T)
        right = torch.einsum("oin,in->io", target, depthwise)
        pointwise = pointwise + solve(system, right - system @ pointwise.T).T
        system = covariance * (pointwise.T @ pointwise)
        right = torch.einsum("oin,oi->in", target, pointwise)
        depthwise = depthwise + solve(system, right - system @ depthwise)
        best = min(best, (error(), depthwise, pointwise), key=lambda found: found[0])
    return best[1:]


def sliced(
    weight: Float[Tensor, "o i *kernel"], bias: Float[Tensor, " o"] | None, rows: Indices, columns: Indices
) -> tuple[Tensor, Tensor]:
    """A convolution's weight and bias (zeros for None) for these output rows and input columns, in that order."""
    weight, bias = _exact(weight, bias)
    if rows is not None:
        weight, bias = weight[_index(rows, weight)], bias[_index(rows, weight)]
    return weight if columns is None else weight[:, _index(columns, weight)], bias


def folded(
    weight: Float[Tensor, "o i *kernel"],
    bias: Float[Tensor, " o"] | None,
    matrix: Float[Tensor, "k i"],
    offset: Float[Tensor, " i"] | None = None,
) -> tuple[Float[Tensor, "o k *kernel"], Float[Tensor, " o"]]:
    """The convolution of x @ matrix + offset as one of x: K'[o, s] = sum_c W[s, c] K[o, c], bias + sum_c,taps K[o, c] b[c].

    Exact, but that zeros padded around x stand for ``offset`` where a tap meets padding.
    """
    weight, bias = _exact(weight, bias)
    if offset is not None:
        bias = bias + weight.flatten(2).sum(2) @ offset.to(weight)
    return torch.einsum("si,oi...->os...", matrix.to(weight), weight), bias


def init_depthwise_separable(
    target: DepthwiseSeparableConv3d,
    dense: Convolution,
    statistics: ChannelStatistics | None = None,
    taps: Float[Tensor, "n n"] | None = None,
    steps: int = 8,
) -> None:
    """Fill with the separable convolution nearest to a dense one (:func:`separable`).

    With ``statistics`` of the dense convolution's input, nearest is meant for such inputs: errors count by covariance,
    and the bias takes up what the mean input loses. ``taps`` should then be :func:`tap_moments` about the same mean.
    Raises ValueError for channels or a kernel that differ, and for statistics of other channels or of nothing.
    """
    weight, bias = _exact(dense.weight, dense.bias)
    _check(target, weight)
    if statistics is not None and (statistics.channels != weight.shape[1] or statistics.count < 2):
        raise ValueError(
            f"statistics of {statistics.channels} channels at {statistics.count} positions do not describe the input of a "
            f"convolution of {weight.shape[1]} channels"
        )
    covariance = None if statistics is None else statistics.covariance.to(weight)
    depthwise, pointwise = separable(weight, covariance, taps, steps)
    if statistics is not None:
        lost = weight.flatten(2).sum(2) - pointwise * depthwise.flatten(1).sum(1)
        bias = bias + lost @ statistics.mean.to(weight)
    _fill_separable(target, depthwise, pointwise, bias)


def init_frame(target: nn.Conv2d, dense: Convolution, rows: Indices = None, columns: Indices = None) -> None:
    """Fill a 2D convolution of frames with the sum of a causal 3D one's temporal taps: equal where nothing has moved for
    kt frames. Rows and columns as in :func:`init_sliced`. Raises ValueError for channels or a kernel that differ."""
    init_sliced(target, dense, rows, columns)


def init_sliced(target: nn.Module, dense: Convolution, rows: Indices = None, columns: Indices = None) -> None:
    """Fill with output rows and input columns of a convolution; ``target`` may be any operator of ours.
    Raises ValueError for channels or a kernel that differ."""
    fill(target, *sliced(dense.weight, dense.bias, rows, columns))


def init_folded(
    target: nn.Module,
    source: Convolution,
    matrix: Float[Tensor, "k i"],
    offset: Float[Tensor, " i"] | None = None,
    rows: Indices = None,
) -> None:
    """Fill a consumer of k kept channels with the ``rows`` of a consumer of all, reading them through a reconstruction
    (:func:`folded`). Raises ValueError for channels or a kernel that differ."""
    weight, bias = sliced(source.weight, source.bias, rows, None)
    fill(target, *folded(weight, bias, matrix, offset))


def init_map(
    target: nn.Module, matrix: Float[Tensor, "k i"], offset: Float[Tensor, " i"] | None = None, rows: Indices = None
) -> None:
    """Fill a 1x1 convolution with a reconstruction itself: from k kept channels to all, or to ``rows`` of them (the skip
    of a block whose input and output keep different channels). Raises ValueError if ``target`` is not that."""
    identity = torch.eye(matrix.shape[1], dtype=torch.float64)[:, :, None, None]
    weight, bias = sliced(identity, None, rows, None)
    fill(target, *folded(weight, bias, matrix.cpu(), None if offset is None else offset.cpu()))


def fill(target: nn.Module, weight: Float[Tensor, "o i *kernel"], bias: Float[Tensor, " o"]) -> None:
    """Put a dense weight, 2D or 3D, and a bias into a convolution as well as it can hold them.

    Raises ValueError for channels or a kernel that differ, for groups, and for a bias where there is none.
    """
    if weight.ndim == 4 and not isinstance(target, nn.Conv2d):
        weight = weight.unsqueeze(2)
    _check(target, weight)
    if isinstance(target, DepthwiseSeparableConv3d):
        return _fill_separable(target, *separable(weight), bias)
    if weight.ndim == 5 and isinstance(target, nn.Conv2d):
        weight = weight.sum(2)
    _copy(target.weight, weight)
    _copy_bias(target, bias)


def _fill_separable(target: DepthwiseSeparableConv3d, depthwise: Tensor, pointwise: Tensor, bias: Tensor) -> None:
    _copy(target.depthwise.weight, depthwise.unsqueeze(1))
    _copy_bias(target.depthwise, torch.zeros(len(depthwise)))
    _copy(target.pointwise.weight, pointwise[:, :, None, None, None])
    _copy_bias(target.pointwise, bias)


def _check(target: nn.Module, weight: Tensor) -> None:
    """Channels and kernel of ``target`` beside those of the weight that it is to stand for."""
    is_separable = isinstance(target, DepthwiseSeparableConv3d)
    if not is_separable and (not isinstance(target, Convolution) or target.groups != 1):
        raise ValueError(f"{type(target).__name__} is no dense or depthwise separable convolution; nothing to fill")
    first, last = (target.depthwise, target.pointwise) if is_separable else (target, target)
    kernel = tuple(weight.shape[2:])
    if isinstance(target, nn.Conv2d):
        kernel = kernel[-2:]
    wanted, given = (last.out_channels, first.in_channels), tuple(weight.shape[:2])
    if wanted != given or tuple(first.kernel_size) != kernel:
        raise ValueError(
            f"a weight of {given[1]} -> {given[0]} channels and kernel {kernel} does not fit {type(target).__name__} of "
            f"{wanted[1]} -> {wanted[0]} and kernel {tuple(first.kernel_size)}"
        )


def _exact(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    weight = weight.detach().double()
    return weight, weight.new_zeros(len(weight)) if bias is None else bias.detach().double()


def _index(channels: Tensor | Sequence[int], like: Tensor) -> Tensor:
    return torch.as_tensor(channels, dtype=torch.long, device=like.device)


@torch.no_grad()
def _copy(parameter: Tensor, value: Tensor) -> None:
    parameter.copy_(value.reshape(parameter.shape))


def _copy_bias(convolution: Convolution, bias: Tensor) -> None:
    if convolution.bias is not None:
        _copy(convolution.bias, bias)
    elif bias.any():
        raise ValueError(f"{type(convolution).__name__} has no bias to hold the one that it is to be filled with")
