"""Blocks that two or more decoders use."""
