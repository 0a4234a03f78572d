"""Edited films: which of their pixels count, and the latent and first frame of an edit.

A source of ``kind: edit`` is a CSV list with the columns path, mask (relative paths are taken from the list's own folder):

    path        the source film: what was NOT edited of it is what the result must equal, so it is the target
    mask        white where the film was edited: a film, a folder of images (one a frame, in the order of their names, in which
                2 comes before 10), or one image for all frames; of the film's own size and length
    latent      optional: the edit's saved latent (latents.py), from the film's first frame on. Without it the film itself is
                encoded, and the mask only says where its reconstruction is scored
    reference   with latent: the image that the edit was made from, usually its edited first frame

Batches are {video, mask, key}, and with latents {video, mask, latent, reference, key}. The batch's mask is the *opposite* of
the file's: 1 where a pixel counts, which is outside the edit. It is cut by the same box as the film and resized by nearest
neighbour. White is a pixel of which a channel is above 127.

``mask: box`` of the source, the default, takes each connected white part's bounding box, enlarged by 10 % (half of it on either
side); boxes of less than 100 pixels are noise and are left out. So cjeen/LoRAEdit makes the masks that its edits are trained
with (predata_app.py; its tracker then calls that with 50). ``mask: tight`` takes the white pixels as they are.
"""

import os
import re

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image
from torch import Tensor, from_numpy

from datamodules.latents import load_latent
from datamodules.probe import BadFile, Info, inspect_image, inspect_video
from datamodules.stills import load_image, load_reference
from datamodules.transforms import Geometry, crop_frames
from datamodules.triples import ANY_LENGTH, is_image

SMALLEST_BOX = 100  # pixels
ENLARGED = 0.1
WHITE = 127  # above it
BLACK = {True: 0, False: 20}  # at most, by whether the file is an image: H.264 makes no exact black


def frames_of(folder: str) -> list[str]:
    """The images of a folder in the order of their names, numbers in them by value. Hidden files are none."""
    names = (name for name in os.listdir(folder) if is_image(name) and not name.startswith("."))
    return [os.path.join(folder, name) for name in sorted(names, key=_natural)]


def _natural(name: str) -> tuple[list[str | int], str]:
    """A name for sorting: what is no number, then a number, and so on."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)], name


def inspect_mask(path: str) -> Info:
    """Size and length of a mask; one image has any length. Raises BadFile."""
    if os.path.isdir(path):
        images = frames_of(path)
        if not images:
            raise BadFile("holds no images, one for each frame of the film")
        first = inspect_image(images[0])
        return Info(first.width, first.height, len(images), 0.0)
    if is_image(path):
        image = inspect_image(path)
        return Info(image.width, image.height, ANY_LENGTH, 0.0)
    return inspect_video(path)


def check_mask(film: Info, mask: Info) -> None:
    """Raise BadFile unless a mask is of its film's size and length."""
    if (mask.height, mask.width) != (film.height, film.width):
        raise BadFile(
            f"its mask is {mask.height}x{mask.width} and it {film.height}x{film.width} pixels: make masks of the film's own size"
        )
    if mask.num_frames not in (film.num_frames, ANY_LENGTH):
        raise BadFile(
            f"its mask has {mask.num_frames} frames and it {film.num_frames}: frame i of one belongs to frame i of the other"
        )


def still_frames(path: str, indices: np.ndarray) -> UInt8[np.ndarray, "t h w 3"]:
    """The frames of these numbers of a folder of images, or one image for all. Raises BadFile, which names the file."""
    images = frames_of(path) if os.path.isdir(path) else [path] * (int(indices.max()) + 1)
    if indices.max() >= len(images):
        raise BadFile(f"has {len(images)} images, and frame {indices.max()} is asked for", path)
    loaded = {i: load_image(images[i]) for i in dict.fromkeys(indices.tolist())}
    shapes = {frame.shape[1:3] for frame in loaded.values()}
    if len(shapes) > 1:
        raise BadFile(f"its images are of different sizes: {sorted(shapes)}", path)
    return np.concatenate([loaded[i] for i in indices.tolist()])


def counted_pixels(
    frames: UInt8[np.ndarray, "t h w 3"], geometry: Geometry, form: str, path: str
) -> Float[Tensor, "1 t h w"]:
    """A mask's frames, of the film's own size, as the batch's mask: 1 outside the edit, cut as ``geometry`` cuts the film.

    ``form``: box or tight. Raises BadFile: neither black nor white, or a frame of which nothing is left.
    """
    value = frames.max(-1)
    if BLACK[is_image(path) or os.path.isdir(path)] < value.max(initial=0) <= WHITE:
        raise BadFile(f"its largest value is {value.max()}: white (255) marks what was edited, black the rest", path)
    edited = value > WHITE
    if form == "box":
        edited = np.stack([boxes(frame) for frame in edited])
    cut = crop_frames(_resized(edited, geometry.resized), geometry)
    for number, frame in enumerate(cut):
        if frame.all():
            raise BadFile(f"marks all of the clip's frame {number} as edited, so nothing of it can be scored", path)
    return from_numpy(np.ascontiguousarray(~cut)).float()[None]


def boxes(edited: Bool[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """The bounding boxes of the connected parts (corners connect), enlarged; the module's docstring has the rule."""
    out = np.zeros_like(edited)
    for top, left, bottom, right in connected(edited):
        h, w = bottom - top, right - left
        if h * w < SMALLEST_BOX:
            continue
        more_h, more_w = int(h * ENLARGED), int(w * ENLARGED)
        top, left = max(0, top - more_h // 2), max(0, left - more_w // 2)
        out[top : top + h + more_h, left : left + w + more_w] = True
    return out


def connected(edited: Bool[np.ndarray, "h w"]) -> list[tuple[int, int, int, int]]:
    """(top, left, bottom, right), ends excluded, of every connected part: rows' runs, joined where they touch."""
    found: list[tuple[int, int, int, int]] = []  # parts that no run of the last row belongs to
    open_parts: list[tuple[tuple[int, int, int, int], list[tuple[int, int]]]] = []  # box, runs in the last row
    steps = np.diff(np.pad(edited, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    for row, step in enumerate(steps):
        now: list[tuple[tuple[int, int, int, int], list[tuple[int, int]]]] = []
        for left, right in zip(np.flatnonzero(step == 1).tolist(), np.flatnonzero(step == -1).tolist(), strict=True):
            now.append(((row, left, row + 1, right), [(left, right)]))
        for box, runs in open_parts:
            touching = [i for i, (_, own) in enumerate(now) if _touch(runs, own)]
            if not touching:
                found.append(box)
                continue
            joined = [now[i] for i in touching]
            boxes_ = [box, *(part for part, _ in joined)]
            whole = tuple(f(sides) for f, sides in zip((min, min, max, max), zip(*boxes_, strict=True), strict=True))
            now = [part for i, part in enumerate(now) if i not in touching]
            now.append((whole, [run for _, own in joined for run in own]))
        open_parts = now
    return found + [box for box, _ in open_parts]


def _touch(above: list[tuple[int, int]], below: list[tuple[int, int]]) -> bool:
    """Whether a run of one row meets one of the next, corners included."""
    return any(a <= d and c <= b for a, b in above for c, d in below)


def read_edit(path: str, reference: str, shape: tuple[int, int, int], size: tuple[int, int]) -> dict[str, Tensor]:
    """{latent "c n y x", reference "3 1 h w"} of an edit: the first ``n`` latent frames of ``shape`` (n, y, x).

    Raises BadFile.
    """
    try:
        latent, _ = load_latent(path)
    except BadFile as error:
        raise BadFile(f"an edit's latent: {error}", path) from None
    frames, *grid = shape
    if latent.shape[1] < frames or list(latent.shape[2:]) != grid:
        raise BadFile(
            f"an edit's latent: is {tuple(latent.shape)}, where (c, {frames}, {grid[0]}, {grid[1]}) is needed", path
        )
    return {"latent": latent[:, :frames], "reference": load_reference(reference, size)}


def _resized(edited: Bool[np.ndarray, "t h w"], size: tuple[int, int]) -> np.ndarray:
    """Nearest neighbour: a mask has no values between."""
    if edited.shape[1:] == tuple(size):
        return edited
    images = (Image.fromarray(frame.astype(np.uint8)) for frame in edited)
    return np.stack([np.asarray(image.resize(size[::-1], Image.Resampling.NEAREST)) for image in images]).astype(bool)
