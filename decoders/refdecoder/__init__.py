"""RefDecoder: a pretrained decoder that looks at reference images while it decodes (arXiv 2605.15196).

``RefDecoder`` (the LightningModule) is looked up lazily, so that inference with ``decoders.refdecoder.model`` imports
neither lightning nor losses, metrics or datamodules.
"""

__all__ = ["RefDecoder"]


def __getattr__(name: str):
    if name == "RefDecoder":
        from decoders.refdecoder.module import RefDecoder

        return RefDecoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
