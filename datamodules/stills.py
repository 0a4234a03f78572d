"""Images: as frames of a clip, and as references beside one.

A reference is a condition, not a target, so unlike a frame it may be enlarged. It is resized with PIL's Lanczos, as
RefDecoder's released scripts do.
"""

from typing import Literal

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps
from torch import Tensor

from datamodules.probe import BadFile, check_readable
from datamodules.shards import is_member, open_bytes
from datamodules.transforms import to_video


def load_image(path: str) -> UInt8[np.ndarray, "1 h w 3"]:
    """An image as RGB, turned as its EXIF data say; transparency is dropped. Raises BadFile."""
    if not is_member(path):
        check_readable(path)
    try:
        with Image.open(open_bytes(path) if is_member(path) else path) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I;16"):  # which Pillow's own conversion would clip to white
                deep = np.asarray(upright).astype(np.uint32)
                upright = Image.fromarray(((deep * 255 + 32767) // 65535).astype(np.uint8))
            return np.asarray(upright.convert("RGB"))[None]
    except (Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise BadFile(f"not a readable image: {error}".replace(path, "file"), path) from None


def tell_fit(path: str, size: tuple[int, int]) -> str:
    """What ``stretch`` does to an image that was read before: nothing, or from which size, and how far its shape changes."""
    h, w = load_image(path).shape[1:3]
    if (h, w) == size:
        return ""
    off = abs(size[1] * h / (size[0] * w) - 1)
    return f" (resized from {h}x{w}" + (f", its aspect ratio changed by {off:.0%}" if off >= 0.005 else "") + ")"


def load_reference(
    path: str, size: tuple[int, int], fit: Literal["stretch", "crop"] = "stretch"
) -> Float[Tensor, "3 1 h w"]:
    """An image at (height, width) ``size``, RGB in [-1, 1]. Raises BadFile, which names ``path``.

    stretch: the aspect ratio is given up (a latent's own first frame, which the diffusion model saw at that size).
    crop: the largest centred part of the size's aspect ratio is kept (a style image, whose strokes keep their shape).
    """
    try:
        image = Image.fromarray(load_image(path)[0])
    except BadFile as error:
        raise BadFile(f"reference: {error}", path) from None
    height, width = size
    if fit == "crop":
        resized = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    else:
        resized = image.resize((width, height), Image.Resampling.LANCZOS)
    return to_video(np.asarray(resized)[None])
