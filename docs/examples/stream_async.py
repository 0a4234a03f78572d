"""Latents come in on one thread, are decoded on a second, and the video is written on a third, with bounded queues between them.

    PYTHONPATH=. python docs/examples/stream_async.py wan_mini film.safetensors film.mp4     # an installed package needs no PYTHONPATH

A diffusion model that makes latents block by block takes the place of ``read_latents``. No stage runs further ahead of the next than
its queue has room, so memory stays flat whatever the length; an error in any of them ends all three and is raised here. Prints
how long the first frame took, from the moment the first latent frame was there until its bytes were on the host, and the rate.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from datamodules.latent_stream import LatentReader
from decoders.exported import Exported, load
from decoders.streaming import Behind, Stream, ahead
from experiments.video_out import video_file

ROOM = 4  # pieces that wait in each queue


def read_latents(reader: LatentReader, pause_s: float) -> Iterator[Tensor]:
    """Latent frames "1 c y x"; ``pause_s`` seconds before each stand for the diffusion model that makes it."""
    for latent in reader:
        time.sleep(pause_s)
        yield latent[:, 0][None]


def to_bytes(video: Tensor) -> Tensor:
    """ "1 3 k h w" in [-1, 1] to bytes "k h w 3" on the host."""
    return ((video[0].float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).cpu()


def run(
    model: Exported, reader: LatentReader, out: Path, pause_s: float = 0.0, codec: str = "h264"
) -> dict[str, float]:
    """Decode ``reader`` into ``out``, and return ``frames``, ``first_frame_ms`` and ``fps``."""
    header = reader.header
    height = header.height or header.rows * model.space.stride_hw
    width = header.width or header.columns * model.space.stride_hw
    video = Stream(model, height, width)
    left = header.num_frames or model.space.pixel_frames(header.frames)  # what is more than that was padding
    frames, first_ms, began = 0, 0.0, 0.0

    with video_file(out, header.fps or 16, codec) as file, Behind(file.write, ROOM) as writing:

        def show(pixels: Tensor) -> None:
            nonlocal frames, first_ms
            if pixels.shape[2] and frames < left:
                ready = to_bytes(pixels)[: left - frames]
                first_ms = first_ms or (time.perf_counter() - began) * 1000
                frames += len(ready)
                writing.put(ready)

        for latent_frame in ahead(read_latents(reader, pause_s), ROOM):
            began = began or time.perf_counter()
            show(video.push(latent_frame.to(model.device)))
        show(video.finish())
        seconds = time.perf_counter() - began
    return {"frames": frames, "first_frame_ms": first_ms, "fps": frames / seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="an exported decoder, or wan_mini")
    parser.add_argument("latents", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--pause", type=float, default=0.0, help="seconds that each latent frame takes to make")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    model = load(options.model, device=options.device)
    found = run(model, LatentReader(options.latents), options.out, options.pause)
    print(
        f"{found['frames']} frames to {options.out}; the first after {found['first_frame_ms']:.0f} ms, "
        f"{found['fps']:.1f} frames per second"
    )


if __name__ == "__main__":
    main()
