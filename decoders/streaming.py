"""Streams for callers: push latent frames as a diffusion model makes them, get the pixels that are ready.

    video = Stream(model, height=480, width=832)          # model: what decoders.load returns, or a trained VideoDecoder
    for latent_frame in latents: show(video.push(latent_frame))   # "b c y x" in, "b 3 k h w" out, perhaps no frames yet
    show(video.finish())                                  # what was still pending

``cat`` of all that comes out equals the model's ``decode`` of the whole clip. A stream is only its state, which does not grow:
to pause, push nothing; to show two videos at once on one model, make two streams and push to each in any order. One
latent frame and then ``finish`` is an image (in a space where the first frame has a latent of its own). One model is used from
one thread at a time; ``ahead`` and ``Behind`` put the reading before it and the writing after it into threads of their own.
"""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

T = TypeVar("T")
Pixels = Float[Tensor, "b 3 k h w"] | UInt8[Tensor, "b k h w 3"]
LOOK_S = 0.1  # a thread that waits at a full or an empty queue looks so often whether the other side has gone
PART_S = (
    1.0  # so long the taking side waits for a making thread to end; one that is in the middle of an item ends after it
)


@runtime_checkable
class Streams(Protocol):
    """What is asked of a model: an ``Exported``, a ``VideoDecoder`` and every network with streams have it."""

    def start_stream(self, batch_size: int, height: int, width: int) -> Any: ...

    def step_stream(self, latent_frame: Tensor, state: Any) -> Tensor: ...

    def end_stream(self, state: Any) -> Tensor: ...


class Stream:
    """One video (or ``batch_size`` in step) being decoded.

    Args:
        model: with ``start_stream``, ``step_stream`` and ``end_stream``.
        height, width: pixels of the frames that come out. Where the model takes multiples of some number of pixels only,
            latents are those of the next larger size and the frames are cropped.
        reference: "b 3 r h w" in [-1, 1], of these frames' size or the latents', of a decoder that looks at one.
        seed: of a decoder that draws noise. One seed, one video, also after ``reset``.
        sampling: what an ``Exported``'s streams take besides (its ``stream_options``), such as ``{"steps": 4}``.

    Raises:
        ValueError: the model cannot stream, or not with this ``sampling``.
    """

    def __init__(
        self,
        model: Streams,
        height: int,
        width: int,
        *,
        batch_size: int = 1,
        reference: Float[Tensor, "b 3 r h w"] | None = None,
        seed: int = 0,
        sampling: Mapping[str, Any] | None = None,
    ) -> None:
        asked = dict(sampling or {})
        able = getattr(model, "can_stream", hasattr(model, "start_stream"))
        if able and asked and not (hasattr(model, "streams") and model.streams(asked)):
            takes = ", ".join(getattr(model, "stream_options", ())) or "no such options"
            raise ValueError(f"a stream of this decoder does not take {', '.join(asked)}: it takes {takes}")
        if not able and not (asked and hasattr(model, "streams") and model.streams(asked)):
            raise ValueError("this decoder cannot stream, it looks at latent frames to come: decode the whole clip")
        if height < 1 or width < 1 or batch_size < 1:
            raise ValueError(f"a stream of {batch_size} videos of {height}x{width} pixels is empty")
        self.model, self.height, self.width, self.batch_size = model, height, width, batch_size
        self.reference, self.seed, self.sampling = reference, seed, asked
        self.num_frames = 0  # that came out
        self._state: Any = None

    @torch.no_grad()  # a bare network would keep every frame's graph in the state
    def push(self, latent: Float[Tensor, "b c y x"] | Float[Tensor, "b c n y x"]) -> Pixels:
        """The frames that are ready after the next latent frame, or frames, normalised: perhaps none. About [-1, 1], or bytes
        "b k h w 3" where the model gives those.

        Raises:
            ValueError: another shape than this stream takes.
        """
        if self._state is None:
            self._state = self._start()
        frames = latent.unbind(2) if latent.ndim == 5 else [latent]
        if not frames:
            raise ValueError(f"latents of shape {tuple(latent.shape)} have no latent frame")
        ready = [self.model.step_stream(frame, self._state) for frame in frames]
        return self._cropped(torch.cat(ready, _time(ready[0])))

    @torch.no_grad()
    def finish(self) -> Pixels:
        """What was still pending, perhaps nothing. The next ``push`` begins another video.

        Raises:
            ValueError: nothing was pushed.
        """
        if self._state is None:
            raise ValueError("nothing was pushed to this stream, so there is nothing to finish")
        state, self._state = self._state, None
        return self._cropped(self.model.end_stream(state))

    def reset(self) -> None:
        """Forget what was pushed: the next ``push`` begins another video with the same size, reference and seed."""
        self._state, self.num_frames = None, 0

    def _start(self) -> Any:
        size = self._full_size()
        given: dict[str, Any] = {}
        if hasattr(self.model, "size_multiple"):  # a bare network takes neither
            device = getattr(self.model, "device", None) or torch.device("cpu")
            given = {"reference": self._padded(), "generator": torch.Generator(device).manual_seed(self.seed)}
        self.num_frames = 0
        return self.model.start_stream(self.batch_size, *size, **given, **self.sampling)

    def _full_size(self) -> tuple[int, int]:
        """Pixels that the latents stand for."""
        multiple = getattr(self.model, "size_multiple", 1)
        return -(-self.height // multiple) * multiple, -(-self.width // multiple) * multiple

    def _padded(self) -> Tensor | None:
        """The reference at that size: its last row and column are repeated, as those of the video were to encode it."""
        if self.reference is None:
            return None
        height, width = self._full_size()
        extra = (0, width - self.reference.shape[-1], 0, height - self.reference.shape[-2], 0, 0)
        return F.pad(self.reference, extra, mode="replicate") if any(extra) else self.reference

    def _cropped(self, frames: Tensor) -> Tensor:
        self.num_frames += frames.shape[_time(frames)]
        if frames.dtype == torch.uint8:
            return frames[:, :, : self.height, : self.width]
        return frames[..., : self.height, : self.width]


def _time(frames: Tensor) -> int:
    """The axis of frames: an optimised form may give bytes, "b k h w 3" (``InferenceOptions.uint8``)."""
    return 1 if frames.dtype == torch.uint8 else 2


def stream(
    model: Streams,
    latents: Float[Tensor, "b c n y x"] | Iterable[Tensor],
    height: int,
    width: int,
    *,
    reference: Float[Tensor, "b 3 r h w"] | None = None,
    seed: int = 0,
) -> Iterator[Pixels]:
    """The pixels of ``latents``, piece after piece as they are ready, none of them empty.

    Args:
        latents: a clip, or its latent frames "b c y x" one after the other, from wherever they come.
        height, width, reference, seed: as of :class:`Stream`.

    Raises:
        ValueError: the model cannot stream, or there are no latents.
    """
    video: Stream | None = None
    for frame in latents.unbind(2) if isinstance(latents, Tensor) else latents:
        if video is None:
            video = Stream(model, height, width, batch_size=len(frame), reference=reference, seed=seed)
        if (ready := video.push(frame)).numel():
            yield ready
    if video is None:
        raise ValueError("there are no latent frames")
    if (rest := video.finish()).numel():
        yield rest


def ahead(items: Iterable[T], room: int = 4) -> Iterator[T]:
    """``items``, made by a thread of its own, at most ``room`` of them ahead of who takes them.

    What the thread raises is raised here, in its place. Closing the iterator, or leaving its loop, ends the thread: at once, or,
    where an item is being made, after that item, which is not waited for longer than a second. ValueError: no room.
    """
    waiting = _queue(room)
    gone, end = threading.Event(), object()

    def put(item: Any) -> bool:
        while not gone.is_set():
            try:
                waiting.put(item, timeout=LOOK_S)
                return True
            except queue.Full:
                continue
        return False

    def make() -> None:
        try:
            for item in items:
                if not put((item, None)):
                    return
            put((end, None))
        except BaseException as error:  # handed over, not lost with the thread
            put((end, error))

    thread = threading.Thread(target=make, daemon=True)
    thread.start()
    try:
        while True:
            item, error = waiting.get()
            if error is not None:
                raise error
            if item is end:
                return
            yield item
    finally:
        gone.set()
        thread.join(PART_S)


def _queue(room: int) -> queue.Queue:
    if room < 1:  # a queue of 0 would have no bound at all
        raise ValueError(f"room={room}: at least one item must be able to wait")
    return queue.Queue(room)


class Behind(Generic[T]):
    """Gives what is put to ``take`` in a thread of its own, in order; at most ``room`` items wait, then ``put`` does.

    A context manager: leaving it waits until all was taken, or, where an error left it, drops what waits. What ``take`` raises
    is raised by the next ``put``, or on leaving.
    """

    def __init__(self, take: Callable[[T], object], room: int = 4) -> None:
        self._take, self._waiting = take, _queue(room)
        self._error: BaseException | None = None
        self._gone, self._last = threading.Event(), object()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def put(self, item: T) -> None:
        """Hand over ``item``; waits while ``room`` of them wait already. ValueError: the context was left."""
        while self._thread.is_alive():
            try:
                self._waiting.put(item, timeout=LOOK_S)
                return
            except queue.Full:
                continue
        raise self._error or ValueError("nothing can be put any more: its context was left")

    def __enter__(self) -> "Behind[T]":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is not None:
            self._gone.set()
        while self._thread.is_alive():
            try:
                self._waiting.put(self._last, timeout=LOOK_S)
                break
            except queue.Full:
                continue
        self._thread.join()
        if kind is None and self._error is not None:
            raise self._error

    def _run(self) -> None:
        while (item := self._waiting.get()) is not self._last:
            if self._gone.is_set():
                continue
            try:
                self._take(item)
            except BaseException as error:  # the putting side raises it
                self._error = error
                return
