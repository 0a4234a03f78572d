"""Kinds of files that the command line reads and writes. Imports nothing, so that ``--help`` works without a video library."""

from dataclasses import dataclass
from pathlib import Path

VIDEO_SUFFIXES = (".mp4", ".mkv", ".mov", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".y4m", ".gif")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
LATENT_SUFFIXES = (".safetensors", ".pt")


@dataclass(frozen=True)
class Codec:
    """What PyAV calls a codec, its pixels, and the containers it goes into, the first by default."""

    encoder: str
    pixels: str
    any_size: str  # pixels for odd heights and widths, which chroma of half the size cannot have
    suffixes: tuple[str, ...]
    crf: int | None  # quality by default; None: it has no such setting
    narrowest: int = 1  # pixels


CODECS = {
    "h264": Codec("libx264", "yuv420p", "yuv444p", (".mp4", ".mkv", ".mov"), 15),
    # Narrower than 64 pixels the x265 that PyAV 18.1 brings writes past its memory and the process is aborted (measured).
    "h265": Codec("libx265", "yuv420p", "yuv444p", (".mp4", ".mkv", ".mov"), 15, narrowest=64),
    "ffv1": Codec("ffv1", "bgr0", "bgr0", (".mkv",), None),  # lossless, RGB
    # No codec of 10 bits (ProRes): FFmpeg's conversion to them, as PyAV 18.1 brings it, is wrong for some rows of some frames whose
    # width is no multiple of 32 (measured; LOG.md).
}
SUFFIXES = tuple(dict.fromkeys(suffix for codec in CODECS.values() for suffix in codec.suffixes))


class OutputError(ValueError):
    """What was asked for cannot be written; one line."""


def check_codec(path: Path, codec: str, crf: int | None) -> None:
    """Raise OutputError where this codec cannot be written to a file of this name, or has no such quality."""
    known = CODECS[codec]
    if path.suffix.lower() not in known.suffixes:
        fits = [name for name, other in CODECS.items() if path.suffix.lower() in other.suffixes]
        other = f", or {', '.join(fits)} into {path.suffix}" if fits else ""
        raise OutputError(f"{path.name}: {codec} goes into {', '.join(known.suffixes)}{other}")
    if crf is not None and known.crf is None:
        raise OutputError(f"{codec} has no --crf; h264 and h265 have")
    if crf is not None and not 0 <= crf <= 51:
        raise OutputError(f"a crf of {crf} is outside of 0 (lossless) to 51")
