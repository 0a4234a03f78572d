"""Where in each backbone the reference meets the video (App. B.1 of arXiv 2605.15196; Wan 2.2 is ours).

| backbone   | before stage         | channels         | pixels a cell | cells a token |
|------------|----------------------|------------------|---------------|---------------|
| wan21      | up0, up1, up2        | 384, 192, 192    | 8, 4, 2       | 2, 4, 8       |
| wan22      | up0, up1, up2        | 1024, 1024, 1024 | 16, 8, 4      | 1, 2, 4       |
| videovaeplus | level1, level0, out | 512, 256, 128   | 2, 1, 1       | 8, 16, 16     |

A token is 16 x 16 pixels of one frame everywhere, so one set of blocks serves all three places.
"""

from dataclasses import dataclass, replace
from typing import Literal

from decoders.backbones.staged import StagedDecoder
from decoders.backbones.videovaeplus import VideoVAEPlusConfig, VideoVAEPlusDecoder
from decoders.backbones.wan import LAYOUTS, WanConfig, WanDecoder

NAMES = (*LAYOUTS, "wan_mini", "videovaeplus")
TOKEN = 16  # pixels on a token's side
Norms = Literal["none", "group", "channel"]  # GroupNorms of up to 32 groups, or with every channel a group of its own


@dataclass(frozen=True)
class Point:
    """One place where the reference meets the video."""

    before: str  # the backbone's stage that comes next
    channels: int
    cell: int  # pixels on the side of a grid cell
    patch: int  # cells on the side of a token
    frames: int  # video frames per latent frame here; a causal backbone has one for the first latent frame


@dataclass(frozen=True)
class Layout:
    """What the reference's path needs to know of a backbone."""

    points: tuple[Point, ...]
    drop: tuple[str, int]  # latents are dropped in this stage, before its layer of this number
    drop_frames: int  # frames per latent frame there
    frozen: tuple[str, ...]  # beginnings of the names of weights that are never trained (App. B.2)
    encoder_norm: bool  # whether the reference encoder ends in a norm
    point_norms: Norms  # of video and reference, each by itself, on their way into the tokens
    branch: tuple[str, ...]  # stages that a ControlNet's copy runs before the first point
    causal: bool

    def frames_at(self, point: Point, latent_frames: int) -> int:
        """Video frames of a clip of ``latent_frames`` at ``point``."""
        return 1 + (latent_frames - 1) * point.frames if self.causal else latent_frames * point.frames

    def sequence_lengths(self, latent_frames: int, height: int, width: int, references: int = 1) -> list[int]:
        """Tokens that see one another at each point, references included, for clips of ``height`` x ``width`` pixels.

        480 x 832 with one reference: 4680, 6240 and 9360 for 5 frames, 9360, 15600 and 28080 for 17 (Wan 2.1 and 2.2).
        """
        lengths = []
        for point in self.points:
            side = point.cell * point.patch
            tokens = -(-height // side) * -(-width // side)
            lengths.append(tokens * (references + self.frames_at(point, latent_frames)))
        return lengths


def wan(config: WanConfig, names: list[str] | None = None) -> Layout:
    """Before every stage that enlarges, or those of up0 ... up3 and out that are named. Dropping comes after the frozen
    1x1x1 convolution, as in the released code."""
    points, frames = [], 1
    widths = [config.dim * mult for mult in (config.dim_mult[-1], *reversed(config.dim_mult))]
    for number, doubles in enumerate((*reversed(config.temporal), None)):
        channels = widths[number] // (2 if number and not config.residual else 1)
        cell = config.stride_hw // 2**number
        points.append(Point(f"up{number}", channels, cell, max(1, TOKEN // cell), frames))
        frames *= 2 if doubles else 1
    points.append(replace(points[-1], before="out", channels=widths[-1]))
    return Layout(
        points=_chosen(points, [f"up{number}" for number in range(len(config.temporal))] if names is None else names),
        drop=("conv_in", 1),
        drop_frames=1,
        frozen=("stages.conv_in.layers.0.",),
        encoder_norm=True,
        point_norms="none",
        branch=("mid",),
        causal=True,
    )


def videovaeplus(config: VideoVAEPlusConfig, names: list[str] | None = None) -> Layout:
    """At the two finest levels and before the head, or those of them that are named. Dropping comes after the frozen
    decoder of latent time."""
    dim, mult, frames = config.dim, config.dim_mult, config.stride_t
    points = [
        Point("level1", dim * mult[2], 2, TOKEN // 2, frames),
        Point("level0", dim * mult[1], 1, TOKEN, frames),
        Point("out", dim * mult[0], 1, TOKEN, frames),
    ]
    return Layout(
        points=tuple(points) if names is None else _chosen(points, names),
        drop=("conv_in", 0),
        drop_frames=frames,
        frozen=("stages.temporal.",),
        encoder_norm=False,  # the norms at the points do its work
        point_norms="group",
        branch=(),
        causal=False,
    )


def _chosen(points: list[Point], names: list[str]) -> tuple[Point, ...]:
    """The points before the named stages."""
    known = [point.before for point in points]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"decoder.points: no place before {unknown[0]}; there are {', '.join(known)}")
    if names != sorted(set(names), key=known.index):
        raise ValueError(f"decoder.points={list(names)} must be in the order {', '.join(known)}, each once")
    return tuple(point for point in points if point.before in names)


def build_backbone(
    name: str,
    dim: int | None,
    patches: list[int] | None,
    channels: int,
    stride_t: int,
    stride_hw: int,
    points: list[str] | None = None,
) -> tuple[StagedDecoder, Layout]:
    """The backbone of a layout with random weights, and where references meet its video.

    Args:
        name: one of ``NAMES``.
        dim: another width at full resolution than the layout's; None for its own.
        patches: other tokens than the layout's, as cells on their side at each point; None for its own.
        channels, stride_t, stride_hw: of the latent space.
        points: before which stages, in order; None for the layout's own places.

    Raises:
        ValueError: there is no such layout or stage, or it decodes with other strides than the latent space has.
    """
    if name not in NAMES:
        raise ValueError(f"decoder.layout={name} is none of {', '.join(NAMES)}")
    config: WanConfig | VideoVAEPlusConfig
    if name == "videovaeplus":
        config = VideoVAEPlusConfig()
    elif name == "wan_mini":
        from decoders.latent_spaces.wan_mini import load_config

        config = load_config()
    else:
        config = LAYOUTS[name]
    if (config.stride_t, config.stride_hw) != (stride_t, stride_hw):
        raise ValueError(
            f"decoder.layout={name} decodes {config.stride_t}x{config.stride_hw}x{config.stride_hw}, the latent space is "
            f"{stride_t}x{stride_hw}x{stride_hw}"
        )
    if isinstance(config, VideoVAEPlusConfig):
        if dim is not None:  # as many channels to a group of the norms' as in the release
            groups = max(1, config.groups * dim // config.dim)
            config = replace(config, dim=dim, temporal_dim=dim, groups=groups)
        config = replace(config, channels=channels)
        return VideoVAEPlusDecoder(config), _patched(videovaeplus(config, points), patches)
    if channels != config.channels:  # another space in the same layout: its statistics are not the release's
        config = replace(config, channels=channels, mean=None, std=None)
    if dim is not None:
        config = replace(config, dim=dim, encoder_dim=None)
    return WanDecoder(config), _patched(wan(config, points), patches)


def _patched(layout: Layout, patches: list[int] | None) -> Layout:
    if patches is None:
        return layout
    pairs = zip(layout.points, patches, strict=True)
    return replace(layout, points=tuple(replace(point, patch=patch) for point, patch in pairs))
