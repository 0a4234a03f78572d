"""What of ``trainer`` makes a training step faster, put together."""

from typing import Any

from lightning import Callback

from decoders.base import VideoDecoder
from experiments.ahead import EncodeAhead
from experiments.compiling import compile_decoder
from experiments.config import Experiment, streams
from experiments.recompute import Recompute


def hasten(experiment: Experiment, decoder: VideoDecoder, data: Any) -> list[Callback]:
    """What of ``trainer`` makes a step faster and leaves its function as it is: compiled parts, an encoder that works ahead,
    activations that are kept where they fit. Before the trainer begins; the callbacks that it takes.

    Raises ConfigError for what this decoder cannot do.
    """
    t, callbacks = experiment.trainer, []
    if t.encode_ahead:
        callbacks.append(EncodeAhead(decoder))
        callbacks[-1].wrap(data)
    if t.checkpointing == "auto":
        callbacks.append(Recompute(experiment))
    if t.compile:
        sizes = {(s.batch_size, s.total_frames, *s.size) for w, s in streams(experiment).items() if "train" in w}
        compile_decoder(decoder, t.compile, t.strategy == "fsdp", len(sizes) > 1)
    return callbacks
