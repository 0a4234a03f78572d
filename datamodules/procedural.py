"""Procedural motion: moving textured shapes, drawn from a seed, no files.

A film is a slowly drifting background of smooth noise with discs and boxes that move over it on straight or circular
paths, each with a texture of its own that moves with it. Everything is a function of (seed, film, frame), so any
window can be drawn without the frames before it, on any machine, in any order.
"""

import numpy as np

NUM_SHAPES = 6


def _texture(rng: np.random.Generator, coarse: int) -> np.ndarray:
    """A periodic 64 x 64 RGB texture in [0, 1]: random Fourier modes up to ``coarse`` cycles."""
    grid = np.arange(64) * (2 * np.pi / 64)
    texture = np.tile(rng.uniform(0.2, 0.8, 3), (64, 64, 1))
    for _ in range(6):
        ky, kx = rng.integers(-coarse, coarse + 1, 2)
        wave = np.cos(ky * grid[:, None] + kx * grid[None, :] + rng.uniform(0, 2 * np.pi))
        texture = texture + wave[..., None] * rng.uniform(-0.12, 0.12, 3)
    return texture


def _sample(texture: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Periodic bilinear lookup at texture coordinates, so that sub-pixel motion is smooth."""
    y0, x0 = np.floor(y).astype(np.int64), np.floor(x).astype(np.int64)
    fy, fx = (y - y0)[..., None], (x - x0)[..., None]
    y0, x0, y1, x1 = y0 % 64, x0 % 64, (y0 + 1) % 64, (x0 + 1) % 64
    top = texture[y0, x0] * (1 - fx) + texture[y0, x1] * fx
    bottom = texture[y1, x0] * (1 - fx) + texture[y1, x1] * fx
    return top * (1 - fy) + bottom * fy


def draw_frames(seed: int, film: int, frames: list[int], size: tuple[int, int]) -> np.ndarray:
    """The given frames of a film, uint8 [t, h, w, 3].

    ``size`` is (height, width) in pixels. The same arguments always give the same pixels.
    """
    rng = np.random.default_rng([seed, film])
    height, width = size
    yy, xx = np.mgrid[0:height, 0:width].astype(np.float64)
    background, drift = _texture(rng, 3), rng.uniform(-0.8, 0.8, 2)
    shapes = [_random_shape(rng, size) for _ in range(NUM_SHAPES)]
    out = np.empty((len(frames), height, width, 3), np.uint8)
    for i, t in enumerate(frames):
        image = _sample(background, yy * (64 / height) + drift[0] * t * 0.3, xx * (64 / width) + drift[1] * t * 0.3)
        for shape in shapes:
            _paint(image, shape, t, yy, xx)
        out[i] = np.clip(image * 255 + 0.5, 0, 255).astype(np.uint8)
    return out


def _random_shape(rng: np.random.Generator, size: tuple[int, int]) -> dict:
    scale = min(size)
    return {
        "centre": rng.uniform(0, 1, 2) * size,
        "velocity": rng.uniform(-0.012, 0.012, 2) * scale,
        "swing": rng.uniform(0, 0.15) * scale,
        "rate": rng.uniform(-0.3, 0.3),
        "phase": rng.uniform(0, 2 * np.pi),
        "radius": rng.uniform(0.08, 0.25) * scale,
        "box": bool(rng.integers(2)),
        "texture": _texture(rng, 8),
    }


def _paint(image: np.ndarray, shape: dict, t: int, yy: np.ndarray, xx: np.ndarray) -> None:
    """Blend one shape into ``image`` in place, its edge one pixel soft."""
    height, width = image.shape[:2]
    angle = shape["phase"] + shape["rate"] * t
    cy, cx = shape["centre"] + shape["velocity"] * t + shape["swing"] * np.array([np.sin(angle), np.cos(angle)])
    # A shape that leaves on one side enters on the other, with a margin in which it is out of sight.
    margin = shape["radius"] * 1.5
    cy = (cy + margin) % (height + 2 * margin) - margin
    cx = (cx + margin) % (width + 2 * margin) - margin
    dy, dx = yy - cy, xx - cx
    distance = np.maximum(np.abs(dy), np.abs(dx)) if shape["box"] else np.hypot(dy, dx)
    alpha = np.clip(shape["radius"] - distance + 0.5, 0, 1)[..., None]
    inside = alpha[..., 0] > 0
    if inside.any():
        step = 64 / (4 * shape["radius"])
        colour = _sample(shape["texture"], dy[inside] * step, dx[inside] * step)
        image[inside] = image[inside] * (1 - alpha[inside]) + colour * alpha[inside]
