"""3x3x3 convolutions with 2.25 times fewer products: Winograd's F(2x2, 3x3) over space (Lavin and Gray, arXiv 1509.09308).

A tile of 2 x 2 outputs sees 4 x 4 pixels. Those become 16 numbers per channel (``B^T d B``), the 9 taps 16 weights
(``G g G^T``), and the convolution 16 products over channels and the three taps of time, which come back as 4 outputs
(``A^T m A``).

Rounding, against a direct bf16 convolution with one rounding at its end (relative error 1.66e-3 rms, against float64): weights
and transformed pixels are rounded to bf16, which gives 2.5 times its error with sums in float32 (convolve_bf16.cpp; 2.4 times
behind a SiLU), and 3.0 times here, where the 16 products are rounded as well. Measured on one layer of random weights and
inputs, 4 frames of 24 x 24; the same for 96 and for 384 channels. In float32: 3.8e-7, twice the direct one's.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

G = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))


def transformed_weight(weight: Float[Tensor, "o i 3 3 3"]) -> Float[Tensor, "16 i3 o"]:
    """Taps as factors of the 16 products, [of the 4x4][time tap and input channel, i3 = 3 i][output], in float32."""
    g = torch.tensor(G, device=weight.device)
    whole = torch.einsum("ay,bx,oityx->abtio", g, g, weight.detach().float())
    return whole.flatten(2, 3).flatten(0, 1)


def transform_input(x: Float[Tensor, "b t y x c"]) -> Float[Tensor, "16 b tiles t c"]:
    """Frames with a border of one zero and, on the far side, as many as make ``y`` and ``x`` even, as tiles' 16 numbers."""
    rows, columns = (x.shape[2] - 2) // 2, (x.shape[3] - 2) // 2
    d = [x[:, :, i : i + 2 * rows : 2].float() for i in range(4)]
    d = [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]]
    values = []
    for row in d:
        e = [row[:, :, :, j : j + 2 * columns : 2] for j in range(4)]
        values += [e[0] - e[2], e[1] + e[2], e[2] - e[1], e[1] - e[3]]
    return torch.stack([value.to(x.dtype).flatten(2, 3).transpose(1, 2) for value in values])


def transform_output(m: Float[Tensor, "16 b t y x o"]) -> Float[Tensor, "b t 2*y 2*x o"]:
    """The 16 products of each tile, as its 2 x 2 pixels."""
    m = m.unflatten(0, (4, 4)).float()
    half = torch.stack([m[0] + m[1] + m[2], m[1] - m[2] - m[3]])  # p q b t y x o
    y = torch.stack([half[:, 0] + half[:, 1] + half[:, 2], half[:, 1] - half[:, 2] - half[:, 3]], 1)
    p, q, b, t, rows, columns, o = y.shape
    return y.permute(2, 3, 4, 0, 5, 1, 6).reshape(b, t, rows * p, columns * q, o)


def convolve(
    x: Float[Tensor, "b i t2 h w"], weight: Float[Tensor, "16 i3 o"], bias: Float[Tensor, " o"]
) -> Float[Tensor, "b o t h w"]:
    """The 3x3x3 convolution of ``x``, t2 = t + 2 frames with the two of the past, zeros around it in space.

    ``weight``: :func:`transformed_weight`, in the dtype of ``x``. Channels are last in memory in what comes out.
    """
    b, channels, times, h, w = x.shape
    padded = F.pad(x.movedim(1, -1), (0, 0, 1, 1 + w % 2, 1, 1 + h % 2))
    values = transform_input(padded).flatten(1, 2).flatten(2)  # 16, tiles, times * channels
    rows, columns, outputs = (h + 1) // 2, (w + 1) // 2, weight.shape[-1]
    frames = [torch.bmm(values[..., t * channels : (t + 3) * channels], weight) for t in range(times - 2)]
    products = torch.stack(frames, 1).view(16, times - 2, b, rows, columns, outputs).transpose(1, 2)
    y = transform_output(products)[:, :, :h, :w] + bias.float()
    return y.to(x.dtype).movedim(-1, 1)
