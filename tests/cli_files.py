"""What the tests of the command line read: exports of debug experiments, and films with sound, rotation and uneven times."""

import contextlib
from pathlib import Path

import av
import numpy as np
import torch

from datamodules.procedural import draw_frames
from decoders import exported
from experiments import cli
from experiments.config import build_decoder, build_space, load
from experiments.video_out import VideoFile


def export(name: str, folder: Path, seed: int = 0, **about) -> Path:
    """A debug experiment with the weights it begins with, as a folder."""
    experiment = load(name)
    torch.manual_seed(seed)
    decoder = build_decoder(experiment, build_space(experiment)).eval()
    return exported.save(folder, decoder, {"experiment": name, **about})


def rotated(source: Path, target: Path) -> Path:
    """An mp4 that says it is to be shown turned by a quarter: the matrix in its track's header is replaced."""
    data = bytearray(source.read_bytes())
    start = data.index(b"tkhd") + 4 + 40  # version, times, number, duration, layer, volume: 40 bytes
    numbers = (0, 0x10000, 0, -0x10000, 0, 0, 0, 0, 0x40000000)
    data[start : start + 36] = b"".join(number.to_bytes(4, "big", signed=True) for number in numbers)
    target.write_bytes(data)
    return target


def uneven(path: Path, seconds: list[float], size: tuple[int, int] = (32, 48)) -> Path:
    """A film whose frames are shown at these times."""
    sink = VideoFile(path, 25)
    sink.write(draw_frames(0, 0, list(range(len(seconds))), size), seconds)
    sink.close()
    return path


def with_sound(source: Path, target: Path, codec: str = "aac", video: bool = True) -> Path:
    """A film's packets with a tone of the same length beside them, or the tone alone."""
    with av.open(str(source)) as film, av.open(str(target), "w") as out:
        given = film.streams.video[0]
        stream = out.add_stream_from_template(given) if video else None
        seconds = float(given.duration * given.time_base)
        sound = out.add_stream(codec, rate=16000, layout="mono")
        for packet in film.demux(given) if video else ():
            if packet.dts is not None:
                packet.stream = stream
                out.mux(packet)
        tone = (np.sin(np.arange(int(seconds * 16000)) / 10) * 9000).astype(np.int16)
        for start in range(0, len(tone), 1024):
            frame = av.AudioFrame.from_ndarray(tone[None, start : start + 1024], format="s16", layout="mono")
            frame.sample_rate, frame.pts = 16000, start
            out.mux(sound.encode(frame))
        out.mux(sound.encode())
    return target


def frames_of(path: Path) -> np.ndarray:
    """All frames, uint8 [t, h, w, 3]."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def times_of(path: Path) -> list[float]:
    """When they are shown."""
    with av.open(str(path)) as container:
        return [frame.time for frame in container.decode(video=0)]


def run(*arguments: object) -> int:
    """The command line in this process: its exit status, also where argparse leaves by SystemExit."""
    with contextlib.suppress(SystemExit):
        return cli.main([str(argument) for argument in arguments])
    return 2


def files(folder: Path) -> set[str]:
    """Everything below a folder, hidden and temporary files too."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
