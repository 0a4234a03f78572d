"""FlashDecoder: a streaming, pure-Transformer latent-to-pixel decoder (Kang and Kwak, CVPR 2026, arXiv 2607.14898).

``FlashDecoder`` (the LightningModule) is looked up lazily, so that inference with ``decoders.flashdecoder.model`` imports
neither lightning nor losses, metrics or datamodules.
"""

__all__ = ["FlashDecoder"]


def __getattr__(name: str):
    if name == "FlashDecoder":
        from decoders.flashdecoder.module import FlashDecoder

        return FlashDecoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
