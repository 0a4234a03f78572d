"""Flash-VAED: a convolutional decoder pruned, given cheaper operators, and distilled from itself (arXiv 2602.19161).

``FlashVaed`` (the LightningModule) is looked up lazily, so that inference with ``decoders.flash_vaed.model`` imports
neither lightning nor losses, metrics or datamodules.
"""

__all__ = ["FlashVaed"]


def __getattr__(name: str):
    if name == "FlashVaed":
        from decoders.flash_vaed.module import FlashVaed

        return FlashVaed
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
