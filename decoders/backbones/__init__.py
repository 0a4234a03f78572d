"""Convolutional VAE decoders as we take them apart: named stages, caller-owned streams, weights by any of their names."""
