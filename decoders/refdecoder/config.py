"""RefDecoder's architecture as a dataclass."""

from dataclasses import dataclass
from typing import Literal

from decoders.refdecoder.layouts import NAMES
from decoders.refdecoder.transformer import default_split


@dataclass
class RefDecoderConfig:
    """The architecture; the defaults are the released model's on Wan 2.1. The latent space gives channels and strides."""

    layout: str = "wan21"  # wan21, wan22, wan_mini or videovaeplus
    dim: int | None = None  # another width at full resolution than the layout's
    inject: Literal["attention", "controlnet", "none"] = "attention"  # none: the plain decoder, to compare with
    blocks: int = 10
    heads: int = 12
    head_dim: int = 128
    ffn: int = 8960
    rope_split: list[int] | None = None  # of a head's dimensions: time, height, width; null: 44, 42, 42 of 128
    # Before which of the backbone's stages references meet the video, in order; null: the layout's own three. Wan has up0 ...
    # up3 and out, of which the last two are at full resolution, where VideoVAE+'s layout has points (ours).
    points: list[str] | None = None
    patches: list[int] | None = None  # cells on a token's side at each point; null: 16 pixels everywhere
    # channel: video and references lose every channel's mean and scale on their way into the tokens, and reference encoders their
    # norm, which hides brightness; a backbone with large constant features needs it (wan_mini, ours).
    # layout: as released, nothing on Wan, and on VideoVAE+ GroupNorms and no norm of the encoder
    point_norms: Literal["layout", "channel"] = "layout"
    shared: bool = True  # one set of blocks for all points, or one for each
    # What comes out of the Transformer. none: takes the features' place (released code, Wan); video: is added to the
    # video's and takes the references' place (released code, VideoVAE+); both: is added to both (ours).
    residual: Literal["none", "video", "both"] = "none"
    zero_init: bool | None = None  # begin as the plain decoder; null: wherever there is a residual
    reread: bool = False  # references' pixels are taken in anew at every point, not at the first alone (ours)
    local_start: bool = False  # attention begins at the same place of every frame (local_start.py, ours)
    attention: Literal["full", "windowed"] = "full"  # all of the clip, or a window that streams (windowed.py)
    window: int = 4  # latent frames that windowed attention sees, the current one included
    checkpointing: bool = False  # recompute blocks in the backward pass

    def __post_init__(self) -> None:
        if self.layout not in NAMES:
            raise ValueError(f"decoder.layout={self.layout} is none of {', '.join(NAMES)}")
        for name in (
            "inject",
            "residual",
            "attention",
            "point_norms",
        ):  # configs check these too; whoever builds one in Python does not
            allowed = RefDecoderConfig.__annotations__[name].__args__
            if getattr(self, name) not in allowed:
                raise ValueError(f"decoder.{name}={getattr(self, name)} is none of {', '.join(allowed)}")
        for name in ("blocks", "heads", "head_dim", "ffn", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"decoder.{name}={getattr(self, name)} must be 1 or more")
        split = self.split
        if len(split) != 3 or sum(split) != self.head_dim or any(dims < 0 or dims % 2 for dims in split):
            raise ValueError(
                f"decoder.rope_split={list(split)} must be three even numbers that sum to head_dim={self.head_dim}"
            )
        if self.points is not None and (not self.points or self.inject == "controlnet"):
            raise ValueError(
                f"decoder.points={list(self.points)} must name a stage, and inject=controlnet has its own: set null"
            )
        number = 3 if self.points is None else len(self.points)
        if self.patches is not None and (len(self.patches) != number or min(self.patches) < 1):
            count = "three numbers" if number == 3 else f"as many numbers as points ({number})"
            raise ValueError(f"decoder.patches={list(self.patches)} must be {count} of 1 or more, or null")
        if self.reread and self.inject != "attention":
            raise ValueError(f"decoder.reread=true is for inject=attention, not {self.inject}")
        if self.local_start and min(split[1:]) < 2:
            raise ValueError(
                f"decoder.local_start needs dimensions that turn with height and width; rope_split={list(split)} has none"
            )
        if self.zero_init and self.residual == "none":
            raise ValueError(
                "decoder.zero_init=true with residual=none would replace the video by zeros; set residual to video or both"
            )
        if self.attention == "windowed" and self.layout == "videovaeplus":
            raise ValueError("decoder.layout=videovaeplus looks at future frames and cannot stream; set attention=full")

    @property
    def split(self) -> tuple[int, ...]:
        """Dimensions of a head that turn with time, height and width."""
        return default_split(self.head_dim) if self.rope_split is None else tuple(self.rope_split)
