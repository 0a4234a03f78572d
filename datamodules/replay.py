"""Frames by PyAV, found by their presentation times: alone, or as a second opinion on what decord or torchcodec decoded.

Why it is needed. Measured with decord2 3.4 on real files, some damaged on purpose:

* Open groups of pictures (x265's default), periodic intra refresh, transport streams: after a seek decord counts frames
  that the decoder dropped, and delivers a window that begins some frames late; at the end of the film it then repeats the
  last frame up to 16 times. No error.
* A few hundred bytes overwritten inside a frame: FFmpeg patches the picture up, later frames copy from it, and decord
  delivers them, often without a message. Only a flag on the decoded frame tells.
* Bytes missing or overwritten on a larger scale: decord raises. That needs no second opinion.

A film that stands still is legitimate: equal neighbours are a fault only where PyAV has unequal ones. Where both
libraries decode the right frame, their RGB is identical.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import TypeVar

import numpy as np

from datamodules.probe import OUR_FAULT, BadFile, limit_frames
from datamodules.shards import openable

T = TypeVar("T")
TOLERANCE = 1.0  # mean absolute difference in grey levels: other releases of the two may round differently
SAME_TIME_S = 2e-3  # both libraries read the same time stamps, but decord gives float32 seconds


def agrees(path: str, seconds: np.ndarray, ours: dict[int, np.ndarray], repeats: set[int]) -> bool:
    """Whether another library's window is what the file holds.

    ``seconds`` are the frames' times, ascending, counted from the film's first frame; ``ours`` some of its frames by
    position in the window (uint8 [h, w, 3]); ``repeats`` the positions i whose frames i and i + 1 came out equal. Raises
    BadFile if the file itself is damaged: a frame missing, or one patched up between the key frame and the window's end.
    """

    def compare(frames: Iterator[tuple[int, np.ndarray]]) -> bool:
        before, same = None, True
        for i, frame in frames:
            if i not in ours and i not in repeats and i - 1 not in repeats:
                continue
            rgb = _rgb(frame)
            if i in ours and not _equal(ours[i], rgb):
                same = False
            if i - 1 in repeats and before is not None and not np.array_equal(before, rgb):
                same = False
            before = rgb
        return same  # only now: damage further on must be seen too

    return _decode(path, seconds, compare)


def read_frames(
    path: str, seconds: np.ndarray, shrink: Callable[[np.ndarray], np.ndarray] | None = None, piece: int = 0
) -> np.ndarray:
    """The frames at these ascending times, uint8 [t, h, w, 3], upright; with ``shrink`` each ``piece`` of them is made smaller
    before the next is decoded. Raises BadFile."""
    if shrink is None:
        return _decode(path, seconds, lambda frames: _stacked([_rgb(frame) for _, frame in frames]))

    def in_pieces(frames: Iterator) -> np.ndarray:
        parts = []
        while some := [_rgb(frame) for _, frame in islice(frames, piece)]:
            parts.append(shrink(_stacked(some)))
        return _stacked(parts, np.concatenate)

    return _decode(path, seconds, in_pieces)


def _stacked(frames: list[np.ndarray], join: Callable = np.stack) -> np.ndarray:
    shapes = {frame.shape[-3:] for frame in frames}
    if len(shapes) > 1:
        sizes = ", ".join(f"{h}x{w}" for h, w, _ in sorted(shapes))
        raise BadFile(f"its frames are of different sizes ({sizes}): cut it where they change")
    return join(frames)


def frame_times(path: str) -> np.ndarray:
    """When the frames of a film are shown, in seconds, ascending, counted from the first one. Reads all packets and decodes
    none. Raises BadFile."""
    with _opened(path) as (container, stream):
        shown = [packet.pts for packet in container.demux(stream) if packet.size]
        times = np.sort([np.nan if time is None else time for time in shown])
        if not len(times) or np.isnan(times).any():
            raise BadFile("its frames have no usable presentation times; remux it to mp4")
        return (times - (stream.start_time or 0)) * float(stream.time_base)


def read_film(path: str) -> Iterator[np.ndarray]:
    """All frames from the first on, one at a time, uint8 [h, w, 3], upright. Raises BadFile, perhaps after some frames."""
    with _opened(path, one_thread=False) as (container, stream):
        for number, frame in enumerate(container.decode(stream)):
            if frame.is_corrupt:
                raise BadFile(f"damaged: frame {number} could only be patched up")
            yield _rgb(frame)


@contextmanager
def _opened(path: str, one_thread: bool = True) -> Iterator[tuple]:
    """PyAV's (container, video stream) of a file or a member of a shard, with FFmpeg's errors as BadFile."""
    import av

    source = openable(path)
    try:
        with av.open(source) as container:
            stream = container.streams.best("video")
            if stream is None:
                raise BadFile("holds no video stream")
            limit_frames(stream)
            if one_thread:  # in a worker, of which there are as many as cores
                stream.codec_context.thread_count = 1
            yield container, stream
    except av.error.FFmpegError as error:
        if error.errno in OUR_FAULT:
            raise
        raise BadFile(f"decoding fails: {error.strerror}") from None


def _decode(path: str, seconds: np.ndarray, use: Callable[[Iterator], T]) -> T:
    """Feed the frames to ``use``: after a seek, and if that fails from the start, which decides.

    A seek may land where the frames before the next key frame cannot be decoded, in films that are in order.
    """
    try:
        return use(_frames(path, seconds, seek=True))
    except BadFile:
        return use(_frames(path, seconds, seek=False))


def _frames(path: str, seconds: np.ndarray, seek: bool) -> Iterator[tuple]:
    """(position in the window, frame), in order and complete. Raises BadFile."""
    with _opened(path) as (container, stream):
        first, base = stream.start_time or 0, stream.time_base
        if seek:  # to the key frame at or before the window; rounding must not lead to the one before that
            container.seek(first + int((seconds[0] + SAME_TIME_S) / base), stream=stream)
        position, patched_up = 0, None
        for frame in container.decode(stream):
            time = None if frame.pts is None else float((frame.pts - first) * base)
            if time is None or time > seconds[-1] + SAME_TIME_S:
                break
            if frame.is_corrupt:
                patched_up = time
            elif frame.key_frame:  # nothing after it copies from what was before
                patched_up = None
            if patched_up is not None and time >= seconds[0] - SAME_TIME_S:
                raise BadFile(f"damaged: the frame at {patched_up:.2f} s could only be patched up")
            if time > seconds[position] + SAME_TIME_S:
                break
            if time >= seconds[position] - SAME_TIME_S:
                yield position, frame
                position += 1
                if position == len(seconds):
                    return
        raise BadFile(
            f"damaged: {len(seconds) - position} of {len(seconds)} frames are missing, the first at "
            f"{seconds[position]:.2f} s"
        )


def _rgb(frame) -> np.ndarray:
    """RGB as uint8 [h, w, 3], turned as the container says, as decord does."""
    rgb = frame.to_ndarray(format="rgb24")
    return np.rot90(rgb, frame.rotation // 90 % 4) if frame.rotation else rgb


def _equal(ours: np.ndarray, theirs: np.ndarray) -> bool:
    if ours.shape != theirs.shape:
        return False
    return float(np.abs(ours.astype(np.int16) - theirs).mean()) <= TOLERANCE
