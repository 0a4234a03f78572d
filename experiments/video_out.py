"""Where decoded frames go: a video file, a folder of PNG images, or raw RGB for another program. Frames come in pieces, bytes
"t h w 3", and memory does not grow with their number. Without the trainer's libraries."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from datamodules.whole import whole
from experiments.video_kinds import CODECS, OutputError, check_codec

Frames = UInt8[np.ndarray, "t h w 3"] | Tensor
CLOCK = 90_000  # ticks per second of a video whose frame rate varies; MPEG's own
BT709, NARROW = 1, 1  # FFmpeg's numbers for the matrix, primaries and transfer of BT.709, and for 16 to 235


class Sink(ABC):
    """Takes a video's frames."""

    @abstractmethod
    def write(self, frames: Frames, seconds: Sequence[float] | None = None) -> None:
        """The next frames; ``seconds``: when they are shown, of a video whose frame rate varies."""

    def close(self) -> None:  # noqa: B027  not everything has something left to write
        """All frames were written."""


class VideoFile(Sink):
    """A video file, written in place (``video_file`` writes one whole or not at all).

    Args:
        path: its suffix says the container.
        fps: frames per second; of a varying rate about so many.
        codec: a key of ``CODECS``.
        crf: quality, 0 (lossless) to 51, of h264 and h265; None: the codec's default here.
        audio: a file whose audio is copied, packet for packet, beside the frames.
        container: mp4, mkv or mov, where the name does not say it.

    Raises:
        OutputError: codec and container do not go together, or the audio cannot be copied.
    """

    def __init__(
        self,
        path: Path,
        fps: float,
        codec: str = "h264",
        crf: int | None = None,
        audio: str | None = None,
        container: str | None = None,
    ) -> None:
        self._codec, self._crf = CODECS[codec], crf
        self._rate = Fraction(fps).limit_denominator(1001)  # 29.97 is 2997/100
        kind = container or path.suffix[1:].lower()
        options = {"movflags": "faststart"} if kind in ("mp4", "mov") else {}
        form = {"mkv": "matroska"}.get(kind, kind)
        self._open = ExitStack()
        self._container = self._open.enter_context(av.open(str(path), "w", format=form, options=options))
        self._stream: av.VideoStream | None = None
        self._audio: _Audio | None = None
        self._path, self._audio_path = path, audio
        self._next, self._num = 0, 0

    def write(self, frames: Frames, seconds: Sequence[float] | None = None) -> None:
        for number, frame in enumerate(np.asarray(frames)):
            if self._stream is None:
                self._start(frame.shape[0], frame.shape[1], varying=seconds is not None)
            self._write_one(np.ascontiguousarray(frame), None if seconds is None else seconds[number])

    def _start(self, height: int, width: int, varying: bool) -> None:
        codec = self._codec
        crf = codec.crf if self._crf is None else self._crf
        options = {} if crf is None else {"crf": str(crf)}
        if codec.encoder == "libx265":
            options["x265-params"] = "log-level=error"  # it would write a page of statistics to the terminal
        if width < codec.narrowest:
            raise OutputError(
                f"{codec.encoder} takes frames of {codec.narrowest} pixels in width and more: use --codec h264 or ffv1"
            )
        stream = self._container.add_stream(codec.encoder, rate=self._rate, options=options)
        stream.height, stream.width = height, width
        stream.pix_fmt = codec.any_size if height % 2 or width % 2 else codec.pixels
        self._clock = Fraction(1, CLOCK) if varying else 1 / self._rate
        stream.codec_context.time_base = self._clock
        if stream.pix_fmt.startswith("yuv"):  # untagged, players guess the matrix by the size
            context = stream.codec_context
            context.colorspace = context.color_primaries = context.color_trc = BT709
            context.color_range = NARROW
        self._stream = stream
        if self._audio_path is not None:
            self._audio = _Audio(self._audio_path, self._container, self._path.suffix, self._open)

    def _write_one(self, frame: np.ndarray, second: float | None) -> None:
        picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
        if self._stream.pix_fmt.startswith("yuv"):
            picture = picture.reformat(format=self._stream.pix_fmt, dst_colorspace="ITU709", dst_color_range="MPEG")
        tick = self._num if second is None else round(second * CLOCK)
        picture.pts, picture.time_base = max(tick, self._next), self._clock
        self._num, self._next = self._num + 1, picture.pts + 1
        self._container.mux(self._stream.encode(picture))
        if self._audio is not None:
            self._audio.copy(float(picture.pts * self._clock))

    def close(self) -> None:
        with self._open:
            if self._stream is not None:
                self._container.mux(self._stream.encode())
            if self._audio is not None:
                self._audio.copy(float("inf"))

    def abandon(self) -> None:
        """Close the file as it is, after an error."""
        with suppress(av.error.FFmpegError, ValueError):
            self._open.close()


class _Audio:
    """A film's audio packets, copied as far as the frames are written, with their distance in time to the film's first frame."""

    def __init__(self, path: str, container: av.container.OutputContainer, suffix: str, opened: ExitStack) -> None:
        source = opened.enter_context(av.open(path))
        stream = source.streams.best("audio")
        if stream is None:
            raise OutputError(f"{path} has no audio stream to copy; leave --audio out")
        video = source.streams.best("video")
        start = 0 if video is None or video.start_time is None else video.start_time * video.time_base
        try:
            self._out = container.add_stream_from_template(stream)
            container.start_encoding()
        except (av.error.FFmpegError, ValueError) as error:
            raise OutputError(
                f"{stream.codec_context.name} audio cannot be copied into a {suffix} file ({error}); write .mkv, which takes any"
            ) from None
        self._container, self._start = container, round(start / stream.time_base)
        self._packets = source.demux(stream)
        self._waiting: av.Packet | None = None

    def copy(self, second: float) -> None:
        """All packets until ``second`` of the film."""
        while (packet := self._waiting or next(self._packets, None)) is not None:
            self._waiting = None
            if packet.dts is None:  # the demuxer's last word
                continue
            if (packet.dts - self._start) * packet.time_base > second:
                self._waiting = packet
                return
            shown = packet.dts if packet.pts is None else packet.pts
            packet.pts, packet.dts = shown - self._start, packet.dts - self._start
            packet.stream = self._out
            self._container.mux(packet)


class PngFolder(Sink):
    """000000.png, 000001.png, ... in a folder that is there."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._num = folder, 0

    def write(self, frames: Frames, seconds: Sequence[float] | None = None) -> None:
        for frame in np.asarray(frames):
            Image.fromarray(frame).save(self._folder / f"{self._num:06d}.png")
            self._num += 1


class RawPipe(Sink):
    """RGB, a byte each, row by row, to a file or to standard output: FFmpeg's rawvideo, rgb24."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def write(self, frames: Frames, seconds: Sequence[float] | None = None) -> None:
        self._file.write(np.ascontiguousarray(np.asarray(frames)).tobytes())

    def close(self) -> None:
        self._file.flush()


@contextmanager
def video_file(
    path: Path, fps: float, codec: str = "h264", crf: int | None = None, audio: str | None = None
) -> Iterator[VideoFile]:
    """A video that is there when all of it was written, and not before. Raises OutputError, OSError."""
    check_codec(path, codec, crf)
    with whole(path) as temporary:
        sink = VideoFile(temporary, fps, codec, crf, audio)
        try:
            yield sink
            sink.close()
        except BaseException:
            sink.abandon()
            raise


@contextmanager
def png_folder(path: Path) -> Iterator[PngFolder]:
    """A folder of images that is there when all of them were written. Raises OSError."""
    with whole(path, folder=True) as temporary:
        yield PngFolder(temporary)


@contextmanager
def raw_pipe(path: str) -> Iterator[RawPipe]:
    """Standard output for "-", else a file, whole or not at all. Raises OSError."""
    with ExitStack() as stack:
        if path == "-":
            file = sys.stdout.buffer
        else:
            file = stack.enter_context(open(stack.enter_context(whole(path)), "wb"))
        sink = RawPipe(file)
        yield sink
        sink.close()


def write_video(path: Path, parts: Iterable[Frames], fps: float, crf: int) -> None:
    """Pieces of a video, each bytes "t h w 3", as mp4, whatever ``path`` ends in: H.264, yuv420p, constant quality ``crf``."""
    sink = VideoFile(path, fps, "h264", crf, container="mp4")
    try:
        for frames in parts:
            sink.write(frames)
        sink.close()
    except BaseException:
        sink.abandon()
        raise
