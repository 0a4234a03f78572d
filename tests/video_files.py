"""Small real video files for tests, drawn and encoded here, and ways to damage them."""

from itertools import islice
from pathlib import Path

import av
import numpy as np

from datamodules.clips import ClipData
from datamodules.procedural import draw_frames


def make_film(
    path: Path,
    num_frames: int = 40,
    size: tuple[int, int] = (48, 64),
    fps: int = 25,
    film: int = 0,
    codec: str = "libx264",
    params: str = "keyint=12:bframes=2:scenecut=0",
    front: bool = False,
    still: bool = False,
) -> Path:
    """Encode a procedural film. ``front`` puts an mp4's index before its data; ``still`` repeats the first frame."""
    frames = draw_frames(0, film, [0] * num_frames if still else list(range(num_frames)), size)
    key = {"libx264": "x264-params", "libx265": "x265-params"}.get(codec)
    options = {key: params + (":log-level=none" if codec == "libx265" else "")} if key else {}
    with av.open(str(path), "w", options={"movflags": "faststart"} if front else {}) as container:
        stream = container.add_stream(codec, rate=fps, options=options)
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def decoded(path: Path) -> np.ndarray:
    """All frames of a film by plain decoding from the start, uint8 [t, h, w, 3]: the truth to compare with."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def cut(source: Path, target: Path, share: float) -> Path:
    """The first ``share`` of a file's bytes."""
    data = source.read_bytes()
    target.write_bytes(data[: int(len(data) * share)])
    return target


def overwrite(source: Path, target: Path, frame: int, num_bytes: int, skip: int = 40) -> Path:
    """Zero ``num_bytes`` within the coded frame number ``frame``, ``skip`` bytes after its begin."""
    data = bytearray(source.read_bytes())
    with av.open(str(source)) as container:
        packets = [p for p in container.demux(video=0) if p.size]
        begin = packets[frame].pos + skip
        assert packets[frame].size > skip + num_bytes
    data[begin : begin + num_bytes] = bytes(num_bytes)
    target.write_bytes(data)
    return target


def index_of(video, truth: np.ndarray) -> list[int]:
    """Which frames of ``truth`` the frames of a clip "3 t h w" in [-1, 1] are; -1 where there is none that is equal."""
    frames = ((video.permute(1, 2, 3, 0) + 1) * 127.5).round().numpy().astype(np.int16)
    out = []
    for frame in frames:
        distance = np.abs(truth.astype(np.int16) - frame).mean((1, 2, 3))
        out.append(int(distance.argmin()) if distance.min() < 0.5 else -1)
    return out


def take(data: ClipData, num: int, consume: bool = True) -> list[dict]:
    batches = []
    for batch in islice(data.train_dataloader(), num):
        batches.append(batch)
        if consume:
            data.batch_consumed()
    return batches


def keys(batches: list[dict]) -> list[list[str]]:
    return [batch["key"] for batch in batches]
