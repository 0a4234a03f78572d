"""What a file says about itself. PyAV and PIL, never decord; of a film one frame is decoded.

decord starts threads that do not survive a fork, so it must not run in the process that starts the workers; and of a
film that was cut short it may deliver what is left, as a shorter film, without a word. The container knows better:
an mp4 lists where its frames should lie, and a demuxer that hits the end of a matroska file says so.
"""

import io
import os
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from datamodules.faults import OUR_FAULT, BadFile
from datamodules.remote import is_remote
from datamodules.shards import check_member, is_member, open_part, openable, parse

__all__ = ["OUR_FAULT", "BadFile", "Info", "check_readable", "file_stamp", "inspect_image", "inspect_video"]

# Of a film's frame: 8192x8192. A header that says more is damaged or hostile; no memory is asked for it.
MAX_PIXELS = 2**26

_listening, _num_listening, _level_before = threading.Lock(), 0, None


@dataclass(frozen=True)
class Info:
    """Size in pixels, as displayed, number of frames and frame rate; an image has one frame and 0 frames per second."""

    width: int
    height: int
    num_frames: int
    fps: float


def check_readable(path: str) -> None:
    """Raise BadFile where the file is missing, empty or cannot be read. Disk full, too many open files: OSError.

    Of a member of a shard on a server nothing is asked here: opening it asks.
    """
    if is_member(path):
        return check_member(parse(path))
    try:
        with open(path, "rb") as file:
            empty = not file.read(1)
    except OSError as error:
        if error.errno in OUR_FAULT:
            raise
        raise BadFile(f"cannot be opened: {error.strerror or error}") from None
    if empty:
        raise BadFile("empty file")


def inspect_image(path: str, data: io.BytesIO | None = None) -> Info:
    """Size of an image, EXIF orientation applied, from its header alone. ``data``: its bytes, where they are at hand."""
    from PIL import Image, UnidentifiedImageError

    if data is None:
        check_readable(path)
    try:
        with data or open_part(path) as file, Image.open(file) as image:
            width, height = image.size
            if image.getexif().get(0x0112, 1) >= 5:  # orientations 5 to 8 are quarter turns
                width, height = height, width
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in OUR_FAULT:
            raise
        reason = "no known format" if isinstance(error, UnidentifiedImageError) else str(error).replace(path, "file")
        raise BadFile(f"not a readable image: {reason}") from None
    return Info(width, height, 1, 0.0)


def inspect_video(path: str, data: io.BytesIO | None = None) -> Info:
    """Read all packets of a video, and decode its first frame, which knows which way up it is.

    About 10 ms for ten seconds of film. ``data``: its bytes, where they are at hand. Raises BadFile for what is not a video,
    and for files cut short.
    """
    import av
    import av.logging

    if data is None:
        check_readable(path)
    try:
        with _errors_reported(), av.logging.Capture() as messages:
            info = _count_packets(*((data, data.getbuffer().nbytes) if data is not None else _opened(path)))
        # A demuxer reports an unexpected end or a damaged structure; codecs' own messages are often harmless.
        complaints = [text.strip() for level, name, text in messages if level <= av.logging.ERROR and "," in name]
    except av.error.FFmpegError as error:
        if error.errno in OUR_FAULT:
            raise
        raise BadFile(f"not a readable video: {error.strerror}") from None
    if complaints:
        raise BadFile(f"damaged or cut short: {complaints[0]}")
    return info


@contextmanager
def _errors_reported():
    """PyAV reports FFmpeg's errors while at least one thread is in here; the level is the process's, hence the count."""
    import av.logging

    global _num_listening, _level_before
    with _listening:
        if _num_listening == 0:
            _level_before = av.logging.get_level(), av.logging.get_skip_repeated()
            av.logging.set_level(av.logging.ERROR)
            av.logging.set_skip_repeated(False)  # or the second of two damaged files would pass
        _num_listening += 1
    try:
        yield
    finally:
        with _listening:
            _num_listening -= 1
            if _num_listening == 0:
                av.logging.set_level(_level_before[0])
                av.logging.set_skip_repeated(_level_before[1])


def _opened(path: str) -> tuple[str | io.BytesIO, int]:
    """What PyAV opens, and its size in bytes."""
    return openable(path), parse(path).size if is_member(path) else os.path.getsize(path)


def _count_packets(film: str | io.BytesIO, size: int) -> Info:
    import av

    with av.open(film) as container:
        stream = container.streams.best("video")
        if stream is None:
            raise BadFile("holds no video stream")
        limit_frames(stream)
        num, corrupt, undated, first = 0, 0, 0, None
        stream.codec_context.thread_count = 1
        for entry in stream.index_entries:
            if entry.pos + entry.size > size:
                raise BadFile(f"cut short: a frame lies at byte {entry.pos + entry.size}, the file has {size}")
        for packet in container.demux(stream):
            if packet.size:
                num += 1
                corrupt += packet.is_corrupt
                undated += packet.pts is None
            if first is None:
                first = next(iter(packet.decode()), None)
        if corrupt:
            raise BadFile(f"damaged or cut short: {corrupt} of {num} packets are incomplete")
        if undated:
            raise BadFile(f"{undated} of {num} frames have no presentation time, so none can be found; remux it to mp4")
        if not num:
            raise BadFile("its video stream has no frames")
        if stream.frames and num < stream.frames:
            raise BadFile(f"cut short: {stream.frames} frames are announced, {num} are there")
        fps = float(stream.average_rate or stream.guessed_rate or 0)
        if first is None or not fps:
            raise BadFile("no frame of it can be decoded" if first is None else "it has no frame rate")
        lying = first.rotation % 180 != 0
        width, height = (first.height, first.width) if lying else (first.width, first.height)
        return Info(width, height, num, fps)


def limit_frames(stream) -> None:
    """Raise BadFile where a film's header says larger frames than MAX_PIXELS, and have its decoder refuse them as well."""
    context = stream.codec_context
    if (context.width or 0) * (context.height or 0) > MAX_PIXELS:
        raise BadFile(f"its header says frames of {context.height}x{context.width}, more than {MAX_PIXELS} pixels")
    context.options = {"max_pixels": str(MAX_PIXELS)}


def file_stamp(path: str | Path) -> tuple[int, int]:
    """(size in bytes, modification time in ns): a file with another stamp is another file. Of a member, its shard's.

    Nothing is asked of a server: a member of a shard there has its own size, and 0.
    """
    if is_member(str(path)):
        member = parse(str(path))
        if is_remote(member.tar):
            return member.size, 0
        path = member.tar
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns
