"""Several processes at one network: who they are, and how they share its tokens."""

from turbodiffusion.parallel.context import split_tokens
from turbodiffusion.parallel.ranks import joined, neighbours, own_device, rank, world_size

__all__ = ["joined", "neighbours", "own_device", "rank", "split_tokens", "world_size"]
