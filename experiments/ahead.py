"""``trainer.encode_ahead``: the next batch goes to the device and through the frozen encoder while the current one is trained on.

On a GPU that happens in a stream of its own, from pinned memory. A step's numbers are those it would have anyway: an encoder
is frozen, and what is drawn of a posterior is drawn from the seed of the step that the batch is for. Memory for one more batch
and for the encoder's activations beside a step's is the price. On a CPU there is nothing to overlap: the order changes, and
no more.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from lightning import Callback, Trainer
from torch import Tensor

from datamodules.batch import VideoBatch
from decoders.base import VideoDecoder
from experiments.compose import ConfigError

READY = "ready"  # of a batch: the event after which its tensors are there


class EncodeAhead(Callback):
    """Hands training batches on with their latents.

    Raises ConfigError for a family whose loss encodes by itself.
    """

    def __init__(self, decoder: VideoDecoder) -> None:
        if decoder.trains_encoder:
            raise ConfigError(
                f"trainer.encode_ahead=true: {type(decoder).__name__} encodes within its own loss, which is part of its step: "
                "leave it out"
            )
        self.decoder = decoder
        self.training = False  # who else goes through the loader, to calibrate, say, gets plain batches
        self._stream: torch.cuda.Stream | None = None

    def wrap(self, data: Any) -> None:
        """Let the training loader of ``data`` bring latents."""
        made: Callable[[], Iterable[VideoBatch]] = data.train_dataloader
        data.train_dataloader = lambda: Ahead(self, made())

    def on_train_start(self, trainer: Trainer, pl_module: VideoDecoder) -> None:
        self.training = True

    def on_train_end(self, trainer: Trainer, pl_module: VideoDecoder) -> None:
        self.training = False

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: VideoDecoder, batch: VideoBatch, batch_idx: int
    ) -> None:
        ready = batch.pop(READY, None)
        if ready is None:
            return
        step = torch.cuda.current_stream(pl_module.device)
        step.wait_event(ready)
        for value in batch.values():
            if isinstance(value, Tensor):
                value.record_stream(step)  # its memory may be taken again only when the step is done with it

    def prepared(self, batch: VideoBatch, number: int) -> VideoBatch:
        """``batch``, the run's batch ``number`` (from 0), on the device and with its latent."""
        decoder, device = self.decoder, self.decoder.device
        with torch.random.fork_rng(
            devices=[]
        ):  # a step sets its seed before it draws, so the GPU's needs no place back
            torch.manual_seed(decoder.step_seed(decoder.global_rank, number))
            if device.type != "cuda":
                return decoder.with_latent(batch)
            if self._stream is None:
                self._stream = torch.cuda.Stream(device)
                self._stream.wait_stream(torch.cuda.current_stream(device))  # an encoder may just have moved there
            with torch.cuda.stream(self._stream):
                batch = decoder.with_latent({name: moved(value, device) for name, value in batch.items()})
                return {**batch, READY: self._stream.record_event()}


class Ahead:
    """A loader whose batches were encoded when they were asked for; the trainer asks for one more than it trains on."""

    def __init__(self, encode: EncodeAhead, loader: Iterable[VideoBatch]) -> None:
        self.encode, self.loader = encode, loader

    def __iter__(self) -> Iterator[VideoBatch]:
        first = self.encode.decoder.batches_seen
        for number, batch in enumerate(self.loader, start=first):
            yield self.encode.prepared(batch, number) if self.encode.training else batch


def moved(value: Any, device: torch.device) -> Any:
    """A tensor on a GPU, copied from pinned memory without waiting; anything else as it is."""
    return value.pin_memory().to(device, non_blocking=True) if isinstance(value, Tensor) else value
