"""Several processes at one network: who they are, how they share its tokens, and an autoencoder's rows."""

from turbodiffusion.parallel.bands import band_rows, split_rows
from turbodiffusion.parallel.context import check_heads, split_tokens
from turbodiffusion.parallel.ranks import joined, least, neighbours, own_device, rank, started, world_size

__all__ = [
    "band_rows",
    "check_heads",
    "joined",
    "least",
    "neighbours",
    "own_device",
    "rank",
    "split_rows",
    "split_tokens",
    "started",
    "world_size",
]
