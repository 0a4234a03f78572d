"""Frozen encoders that turn pixels into normalised latents: `dct` (closed form) and `diffusers` (Wan, LTX and others)."""
