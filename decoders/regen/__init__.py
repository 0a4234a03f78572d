"""REGEN: a video embedder whose decoder is a diffusion Transformer in pixel space (Zhang et al. 2025, arXiv 2503.08665).

``Regen`` (the LightningModule) is looked up lazily, so that inference with ``decoders.regen.model`` imports neither
lightning nor losses, metrics or datamodules.
"""

__all__ = ["Regen"]


def __getattr__(name: str):
    if name == "Regen":
        from decoders.regen.module import Regen

        return Regen
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
