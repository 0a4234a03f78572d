"""Films, opened by one of three libraries behind one interface. Runs in the workers; decord and torchcodec are imported here alone.

decord       what it delivers is compared with PyAV's frames (``replay.py`` says why), so a clip costs about twice as much
pyav         PyAV alone, which says of every frame whether it was damaged, so that nothing has to be decoded twice
torchcodec   not among our requirements; it takes FFmpeg from the system; compared with PyAV's frames, as decord's are

Of a file that is in order all three deliver the same frames, byte for byte, under the same times (``tests/test_films.py``).
So ``data.reader`` decides how fast a clip is read and never what it is.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal, get_args

import numpy as np

from datamodules.probe import BadFile
from datamodules.replay import SAME_TIME_S, agrees, frame_times, read_frames
from datamodules.shards import openable

Reader = Literal["decord", "pyav", "torchcodec"]
PIECE = 16  # frames of a whole film that are in memory at their full size at once

_decord_ran = False  # in this process; ClipData then no longer forks


def decord_ran() -> bool:
    """Whether decord was used in this process, after which forked children may hang in it."""
    return _decord_ran


class Film(ABC):
    """An open film; closed on leaving, whatever happened. ``seconds``, ``decode`` and the length are the library's own."""

    def __init__(self, path: str):
        self.path = path

    def __enter__(self) -> "Film":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    @abstractmethod
    def __len__(self) -> int:
        """Number of frames."""

    @abstractmethod
    def close(self) -> None:
        """Give the file back."""

    @abstractmethod
    def seconds(self, stop: int) -> np.ndarray:
        """Times of the first ``stop`` frames in seconds, ascending, counted from the first one. Raises BadFile."""

    @abstractmethod
    def decode(self, indices: np.ndarray) -> np.ndarray:
        """The frames of these ascending numbers as the library has them, uint8 [t, h, w, 3]. Raises BadFile."""

    def frames(self, indices: np.ndarray, verify: str) -> np.ndarray:
        """The frames, uint8 [t, h, w, 3], with a second opinion: always (``window``), or only if two neighbours are equal.

        Where the library fails, or took other frames than it was asked for, PyAV's are returned. Raises BadFile.
        """
        seconds = self.seconds(len(self))[indices]
        try:
            frames = self.decode(indices)
        except BadFile:  # mostly damage; but decord also fails on some sound films, such as narrow ones filmed upright
            return read_frames(self.path, seconds)
        repeats = _repeats(frames)
        if verify == "window" or repeats:
            ends = {0: frames[0], len(frames) - 1: frames[-1]}
            if not agrees(self.path, seconds, ends, repeats):
                frames = read_frames(self.path, seconds)
        return frames

    def all_frames(self, verify: str, shrink: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """All frames, shrunk piece by piece so that they are never all in memory at full size. Raises BadFile."""
        num, parts, repeats, last = len(self), [], set(), None
        for i in range(0, num, PIECE):
            frames = self.decode(np.arange(i, min(i + PIECE, num)))
            if last is None:
                first = frames[0].copy()
            else:
                repeats |= {i - 1} if np.array_equal(last, frames[0]) else set()
            repeats |= {i + k for k in _repeats(frames)}
            last = frames[-1].copy()
            parts.append(shrink(frames))
        doubtful = verify == "window" or bool(repeats)
        if doubtful and not agrees(self.path, self.seconds(num), {0: first, num - 1: last}, repeats):
            raise BadFile("two libraries read different frames")
        return np.concatenate(parts)


class DecordFilm(Film):
    """By decord2."""

    def __init__(self, path: str):
        super().__init__(path)
        global _decord_ran
        import decord

        decord.logging.set_level(decord.logging.QUIET)
        _decord_ran = True
        self._errors = (decord.DECORDError, RuntimeError)
        source = openable(path)
        try:
            self._reader = decord.VideoReader(source, ctx=decord.cpu(0), num_threads=1)
        except self._errors as error:
            raise BadFile(_reason(error)) from None

    def close(self) -> None:
        del self._reader

    def __len__(self) -> int:
        return len(self._reader)

    def seconds(self, stop: int) -> np.ndarray:
        times = self._reader.get_frame_timestamp(np.arange(min(stop, len(self))))[:, 0].astype(np.float64)
        if not np.isfinite(times).all() or times[0] < -1 or (np.diff(times) < 0).any():
            raise BadFile("its frames have no usable presentation times; remux it to mp4")
        return times

    def decode(self, indices: np.ndarray) -> np.ndarray:
        try:
            frames = self._reader.get_batch(indices).asnumpy()
        except self._errors as error:
            raise BadFile(_reason(error)) from None
        return _counted(frames, indices)


class PyavFilm(Film):
    """By PyAV: every frame is found by its time and asked whether it is damaged, so there is nobody else to ask."""

    def __init__(self, path: str):
        super().__init__(path)
        self._times = frame_times(path)

    def close(self) -> None:
        """Nothing is held: every reading opens the file anew."""

    def __len__(self) -> int:
        return len(self._times)

    def seconds(self, stop: int) -> np.ndarray:
        return self._times[:stop]

    def decode(self, indices: np.ndarray) -> np.ndarray:
        return read_frames(self.path, self._times[indices])

    def frames(self, indices: np.ndarray, verify: str) -> np.ndarray:
        return self.decode(indices)

    def all_frames(self, verify: str, shrink: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        return read_frames(self.path, self._times, shrink, PIECE)


class TorchcodecFilm(Film):
    """By torchcodec; which frames there are, and when, by PyAV."""

    def __init__(self, path: str):
        super().__init__(path)
        open_decoder = find_torchcodec()
        self._times = frame_times(path)
        source = openable(path)
        try:
            self._decoder = open_decoder(source, dimension_order="NHWC", num_ffmpeg_threads=1)
        except (RuntimeError, ValueError) as error:
            raise _judged(error) from None

    def close(self) -> None:
        del self._decoder

    def __len__(self) -> int:
        return len(self._times)

    def seconds(self, stop: int) -> np.ndarray:
        return self._times[:stop]

    def decode(self, indices: np.ndarray) -> np.ndarray:
        try:
            found = self._decoder.get_frames_at(indices.tolist())
        except (RuntimeError, ValueError, IndexError) as error:
            raise _judged(error) from None
        late = found.pts_seconds.numpy() - self._decoder.metadata.begin_stream_seconds - self._times[indices]
        if np.abs(late).max() > SAME_TIME_S:
            raise BadFile(f"a frame came {np.abs(late).max():.3f} s beside its time")
        return _counted(found.data.numpy(), indices)


def open_film(path: str, reader: Reader) -> Film:
    """A file, or a member of a shard, opened. Raises BadFile, and Unreachable for a server that does not answer."""
    kinds = dict(zip(get_args(Reader), (DecordFilm, PyavFilm, TorchcodecFilm), strict=True))
    return kinds[reader](path)


def find_torchcodec() -> Callable:
    """torchcodec's VideoDecoder. Raises ValueError that says what is missing."""
    other = "or set data.reader: pyav, which reads the same frames"
    try:
        from torchcodec.decoders import VideoDecoder
    except ModuleNotFoundError:
        raise ValueError(f"data.reader: torchcodec is not installed: pip install torchcodec, {other}") from None
    except (ImportError, OSError, RuntimeError) as error:  # RuntimeError: its libraries did not load
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"data.reader: torchcodec is installed but does not load ({reason.strip()}): it needs the shared libraries of "
            f"FFmpeg 4 to 8 (apt-get install ffmpeg, or conda's) and the release made for this torch, {other}"
        ) from None
    return VideoDecoder


def _counted(frames: np.ndarray, indices: np.ndarray) -> np.ndarray:
    if len(frames) != len(indices):
        raise BadFile(f"{len(indices)} frames were asked for, {len(frames)} came")
    return frames


def _repeats(frames: np.ndarray) -> set[int]:
    """Positions i whose frames i and i + 1 are equal."""
    return {i for i in range(len(frames) - 1) if np.array_equal(frames[i], frames[i + 1])}


def _judged(error: Exception) -> Exception:
    """BadFile, but for a lack of memory, which is not the file's fault."""
    return error if "allocate memory" in str(error) else BadFile(_reason(error))


def _reason(error: Exception) -> str:
    """The telling part of a library's message, which may carry a stack trace."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    message = lines[0] if lines else type(error).__name__
    return "decoding fails: " + message.split("Check failed: ")[-1][:200]
