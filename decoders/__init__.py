"""Decoders from latents to pixels: one folder per family, `base.py` for what all share, `latent_spaces/` for encoders.

Importing this package imports nothing else: a family's network is used without lightning, losses or data.
``decoders.load(folder, hub id, run or "wan_mini")`` is a trained decoder for inference: see ``exported.py``.
"""

__all__ = ["load"]


def __getattr__(name: str):
    if name == "load":
        from decoders.exported import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
