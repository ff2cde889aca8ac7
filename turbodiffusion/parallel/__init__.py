"""Several processes at one network: who they are, and how they share its tokens."""

from turbodiffusion.parallel.context import check_heads, split_tokens
from turbodiffusion.parallel.ranks import joined, neighbours, own_device, rank, started, world_size

__all__ = [
    "check_heads",
    "joined",
    "neighbours",
    "own_device",
    "rank",
    "split_tokens",
    "started",
    "world_size",
]
