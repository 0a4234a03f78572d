"""Seeds that depend on names, and on nothing else."""

from hashlib import sha256


def key_seed(key: str, seed: int) -> int:
    """A seed for one clip that depends on nothing but its key and the run's seed."""
    return int.from_bytes(sha256(f"{seed}:{key}".encode()).digest()[:7], "big")
