"""Decoders from latents to pixels: one folder per family, `base.py` for what all share, `latent_spaces/` for encoders.

Importing this package imports nothing else: a family's network is used without lightning, losses or data.
"""
