"""Which encoder the latents of a cache must be of, and handing a cache to a run: ``data.latent_cache.path=FOLDER``."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datamodules.latent_cache import CacheError
from decoders.base import VideoDecoder
from experiments.compose import ConfigError
from experiments.config import Experiment

KEY = "data.latent_cache"


def about_encoder(experiment: Experiment, decoder: VideoDecoder) -> dict[str, Any]:
    """All besides the clips that decides what is encoded. Reads the encoder's weights."""
    space = decoder.latent_space
    return {
        "space": type(space).__name__,
        "fingerprint": space.fingerprint,
        "computed_in": getattr(getattr(space, "config", None), "dtype", "float32"),
        "padded_to": decoder.size_multiple if experiment.pad == "replicate" else None,
        "seed": experiment.seed,
    }


def check_encoder(decoder: VideoDecoder) -> None:
    """Raise ConfigError for a family that does not train on the frozen latents of its clips."""
    if decoder.trains_encoder:
        raise ConfigError(
            f"{KEY}: {type(decoder).__name__} encodes within its own loss (it trains the encoder, or encodes other frames than the "
            "clip's), so latents that were made before are of no use to it: leave latent_cache out"
        )


def command(name: str, overrides: Sequence[str], folder: str) -> str:
    """What makes the cache of a run."""
    kept = [text for text in overrides if not text.startswith((f"{KEY}.", f"{KEY}="))]
    return " ".join(["make cache-latents", f"exp={name}", *map(shlex.quote, [f"out={folder}", *kept])])


def give(experiment: Experiment, decoder: VideoDecoder, data: Any, name: str, overrides: Sequence[str] = ()) -> None:
    """Check the cache that the experiment names, if it names one, and let the datamodule take latents from it.

    Raises:
        ConfigError: there is no such cache, it is not whole, or it is not of this run's clips and encoder.
    """
    wanted = getattr(experiment.data, "latent_cache", None)
    if wanted is None:
        return
    if wanted.path is None:
        if wanted.sample and not decoder.samples_latents:
            raise ConfigError(
                f"{KEY}.sample=true says how cached latents are used, but {KEY}.path is null: name the cache, or leave both out"
            )
        return
    check_encoder(decoder)
    if wanted.sample and not decoder.latent_space.gaussian:
        raise ConfigError(
            f"{KEY}.sample: a sample of {decoder.latent_space.name} is no draw from one Gaussian, so it cannot be taken from a cache: "
            "train on the posterior's mean (of RefDecoder: objective.sample=false too), or without the cache"
        )
    if decoder.samples_latents and not wanted.sample:
        raise ConfigError(
            f"{KEY}.sample=false, but without the cache this run would draw from the posterior (objective.sample=true): set "
            f"{KEY}.sample=true, or objective.sample=false"
        )
    try:
        data.use_cache(
            about_encoder(experiment, decoder), command(name, overrides, str(Path(wanted.path).expanduser()))
        )
    except CacheError as error:
        raise ConfigError(f"{KEY}.path: {error}") from None
