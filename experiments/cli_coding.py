"""Videos to latents and back, a few frames at a time, for ``experiments/cli.py``: memory does not grow with a video's length.

An encoder or a decoder that streams takes a video of any length as one clip, to the same numbers as at once. One that does not works
on pieces: an encoder codes ``chunk`` frames as a clip by itself, and a decoder takes windows of latent frames with some
before and after them as context, which is close to the whole clip and not equal. Nothing here imports the trainer.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from datamodules.transforms import to_video
from decoders.exported import Exported, ExportError, load
from decoders.streaming import Stream

LONGEST_CLIP = 121  # frames that an encoder without a stream codes as one clip: five seconds, and LTX's usual length
CONTEXT = 2  # latent frames before and after a window
WINDOW = 16  # latent frames of a window


class Encoder(Protocol):
    """What is asked of who encodes: an ``Exported`` or ``Frozen``."""

    space: Any
    device: torch.device
    can_encode: bool
    can_stream_encode: bool

    def encode(self, video: Tensor) -> Tensor: ...

    def encode_step(self, video: Tensor, past: Any) -> tuple[Tensor, Any]: ...


@dataclass
class Frozen:
    """The encoder of a latent space that is no export: the closed-form ``dct``, or a diffusers autoencoder whose decoder only is
    taken apart here (LTX)."""

    space: Any
    device: torch.device
    can_encode: bool = True

    @property
    def can_stream_encode(self) -> bool:
        """The closed form codes every group of frames by itself."""
        return self.space.name == "dct"

    def encode(self, video: Float[Tensor, "b 3 t h w"]) -> Float[Tensor, "b c n y x"]:
        """Normalised latents."""
        return self.space.encode(video)

    def encode_step(self, video: Float[Tensor, "b 3 k h w"], past: Any) -> tuple[Float[Tensor, "b c n y x"], Any]:
        """The next frames' latents. A later group of frames has nothing to do with those before it: it is coded behind a frame that
        is left out again."""
        if past is None:
            return self.space.encode(video), True
        return self.space.encode(torch.cat([video[:, :, :1], video], 2))[:, :, 1:], True


@dataclass(frozen=True)
class Part:
    """Latent frames "1 c n y x" of a video, in order. ``starts``: coding begins anew with the first of them."""

    latent: Tensor
    starts: bool


def find_encoder(model: Exported, source: str | None, device: str, any_space: bool = False) -> Encoder:
    """Who encodes for ``model``: ``source`` if it is named, else the model's own encoder, else one that comes with the code.

    Raises:
        ExportError: nobody that we know, or an encoder of another space.
    """
    space = model.space
    if source is None and model.can_encode:
        return model
    if source is None and space.name in ("wan_mini", "dct"):
        source = space.name
    if source is None:
        raise ExportError(
            f"the decoder has no encoder of its own; name that of the {space.name} space: --encoder FOLDER (an export, "
            "or a diffusers autoencoder's folder)"
        )
    found = _frozen(source, space, device)
    if not found.can_encode:
        raise ExportError(
            f"--encoder {source}: it cannot encode either; name the autoencoder of the {space.name} space"
        )
    if found.space.fingerprint != space.fingerprint and not any_space:
        raise ExportError(
            f"--encoder {source} encodes into the space {found.space.name} ({found.space.fingerprint}), and the decoder reads "
            f"{space.name} ({space.fingerprint}); name its own, or say --any-space if they are the same after all"
        )
    return found


def _frozen(source: str, space: Any, device: str) -> Encoder:
    """The encoder that ``source`` names. Raises ExportError."""
    if source == "dct":
        from decoders.latent_spaces.dct import DCT, DCTConfig

        return Frozen(DCT(DCTConfig(space.channels, space.stride_t, space.stride_hw)), torch.device(device))
    found = load(source, device=device)
    if found.can_encode or found.family != "backbones":
        return found
    try:
        from decoders.latent_spaces.diffusers import DiffusersVAE, DiffusersVAEConfig

        return Frozen(DiffusersVAE(DiffusersVAEConfig(source)), torch.device(device))
    except (ImportError, FileNotFoundError, ValueError) as error:
        raise ExportError(f"--encoder {source}: {error}") from None


# ---- encoding


def streams_encoding(encoder: Encoder) -> bool:
    """Whether a video of any length is encoded as one clip in bounded memory: by an encoder that runs from a clip's start to its
    end, or in a space whose own rule is that coding starts anew after some frames."""
    return _native(encoder) is not None or encoder.can_stream_encode


def _native(encoder: Encoder) -> int | None:
    return getattr(encoder.space, "chunk", None)


def encoded(
    encoder: Encoder, frames: Iterable[np.ndarray], num_frames: int, multiple: int, chunk: int | None = None
) -> Iterator[Part]:
    """The latents of a video.

    Args:
        frames: uint8 [h, w, 3], ``num_frames`` of them; the last is repeated until the space can encode them, and the bottom
            row and right column until the size is a multiple of ``multiple`` pixels.
        chunk: frames that are coded as a clip by themselves; None: all of them are one clip, which takes an encoder
            that streams.
    """
    space, device = encoder.space, encoder.device
    if chunk is not None:
        for start in range(0, num_frames, chunk):
            some = min(chunk, num_frames - start)
            clip = extended(islice(frames, some), space.padded_frames(some) - some)
            yield Part(encoder.encode(clip_of(clip, multiple, device)), True)
        return
    frames = extended(frames, space.padded_frames(num_frames) - num_frames)
    total, native, past = space.padded_frames(num_frames), _native(encoder), None
    sizes = _cut(total, native, native) if native else _cut(total, 1, space.stride_t)
    for number, size in enumerate(sizes):
        clip = clip_of(islice(frames, size), multiple, device)
        if native:
            latent = encoder.encode(clip)
        else:
            latent, past = encoder.encode_step(clip, past)
        yield Part(latent, number == 0)


def _cut(total: int, first: int, rest: int) -> Iterator[int]:
    """``total`` as ``first``, then as often ``rest`` as it goes, the last perhaps less."""
    size = first
    while total > 0:
        yield min(size, total)
        total, size = total - size, rest


def extended(frames: Iterable[np.ndarray], extra: int) -> Iterator[np.ndarray]:
    """``frames``, and the last of them ``extra`` times more."""
    frame = None
    for frame in frames:
        yield frame
    if frame is not None:
        yield from (frame for _ in range(extra))


def clip_of(frames: Iterable[np.ndarray], multiple: int, device: torch.device) -> Float[Tensor, "1 3 t h w"]:
    """Frames uint8 [h, w, 3] as a clip in [-1, 1], padded to multiples of ``multiple`` pixels."""
    video = to_video(np.stack(list(frames)))[None].to(device)
    return padded(video, multiple)


def padded(video: Float[Tensor, "b 3 t h w"], multiple: int) -> Float[Tensor, "b 3 t h2 w2"]:
    """The bottom row and the right column repeated up to multiples of ``multiple`` pixels."""
    extra = (-video.shape[-2] % multiple, -video.shape[-1] % multiple)
    return F.pad(video, (0, extra[1], 0, extra[0], 0, 0), mode="replicate") if any(extra) else video


def valid_length(space: Any, longest: int) -> int:
    """The longest clip of at most ``longest`` frames that the space encodes; where there is none but an image, the next longer."""
    fitting = (t for t in range(longest, 1, -1) if space.padded_frames(t) == t)
    return next(fitting, space.padded_frames(longest))


# ---- decoding


def streamed(
    model: Exported,
    parts: Iterable[Part],
    size: tuple[int, int],
    reference: Tensor | None = None,
    seed: int = 0,
    sampling: Mapping[str, Any] | None = None,
) -> Iterator[UInt8[np.ndarray, "t h w 3"]]:
    """The frames of ``parts``, bytes, cropped to ``size`` (height, width), of a decoder that streams. A part that starts anew
    gets a stream, and noise, of its own. ``sampling``: further options of the decoder's streams."""
    video, started = None, 0
    for part in parts:
        if part.starts or video is None:
            if video is not None:
                yield to_bytes(video.finish())
            video = Stream(model, *size, reference=reference, seed=seed + started, sampling=sampling)
            started += 1
        yield from (to_bytes(video.push(frame)) for frame in part.latent.to(model.device).unbind(2))
    if video is not None:
        yield to_bytes(video.finish())


def windowed(
    model: Exported,
    read: Callable[[int, int], Tensor],
    num_latents: int,
    size: tuple[int, int],
    reference: Tensor | None = None,
    seed: int = 0,
    window: int = WINDOW,
    sampling: Mapping[str, Any] | None = None,
) -> Iterator[UInt8[np.ndarray, "t h w 3"]]:
    """The frames of one clip, bytes, cropped to ``size`` (height, width), of a decoder that does not stream: ``window`` latent frames
    at a time with ``CONTEXT`` around them, 0 for all at once. In a space whose coding starts anew after a chunk windows are whole
    chunks, which need no context.

    Args:
        read: latent frames start to stop, "1 c n y x".
        sampling: further options of the decoder's ``decode``.
    """
    context, space = CONTEXT, model.space
    if space.chunk is not None:
        each = space.latent_frames(space.chunk)
        window, context = -(-window // each) * each, 0
    window = window or num_latents
    for start in range(0, num_latents, window):
        stop = min(start + window, num_latents)
        left, right = max(start - context, 0), min(stop + context, num_latents)
        generator = torch.Generator(model.device).manual_seed(seed + start)
        latent = read(left, right).to(model.device)
        video = model.decode(latent, reference=reference, generator=generator, **(sampling or {}))
        before = space.pixel_frames(start - left) if start > left else 0
        cut = video[:, :, before : space.pixel_frames(stop - left), : size[0], : size[1]]
        for some in cut.split(8, dim=2):
            yield to_bytes(some)


def at_once(
    model: Exported,
    latent: Float[Tensor, "1 c n y x"],
    reference: Tensor | None,
    seed: int,
    sampling: Mapping[str, Any],
) -> Iterator[UInt8[np.ndarray, "t h w 3"]]:
    """The frames of one clip, bytes, decoded as a whole: at times of their own choice, which no stream has. Memory grows with the
    clip and with the number of frames."""
    generator = torch.Generator(model.device).manual_seed(seed)
    video = model.decode(latent.to(model.device), reference=reference, generator=generator, **sampling)
    for some in video.split(8, dim=2):
        yield to_bytes(some)


def to_bytes(video: Float[Tensor, "1 3 t h w"]) -> UInt8[np.ndarray, "t h w 3"]:
    """RGB in [-1, 1], rounded; what lies outside is clamped."""
    frames = ((video[0].float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return frames.permute(1, 2, 3, 0).cpu().numpy()


def limited(pieces: Iterable[np.ndarray], num_frames: int) -> Iterator[np.ndarray]:
    """The first ``num_frames`` frames of ``pieces``; those after them are padding."""
    for frames in pieces:
        if num_frames > 0 and len(frames):
            yield frames[:num_frames]
        num_frames -= len(frames)
