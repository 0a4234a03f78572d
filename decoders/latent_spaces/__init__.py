"""Frozen encoders that turn pixels into normalised latents: `dct` (closed form) and `diffusers` (Wan 2.1/2.2, LTX)."""
