"""The row every comparison starts with: a video autoencoder's own decoder, released, trained here, or random for its speed.

``Baseline`` (the LightningModule) is looked up lazily, so that inference with ``decoders.baseline.model`` imports
neither lightning nor losses, metrics or datamodules.
"""

__all__ = ["Baseline"]


def __getattr__(name: str):
    if name == "Baseline":
        from decoders.baseline.module import Baseline

        return Baseline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
