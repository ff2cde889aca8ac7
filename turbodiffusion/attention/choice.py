"""Which core self-attention has: its name and the core's options, as they travel in a network's config."""

import torch
from torch import nn

from kernels.block_sparse_int8 import is_sound
from kernels.reference import kept_blocks
from turbodiffusion.attention.dense import DenseAttention
from turbodiffusion.attention.sparse_linear import SparseLinearAttention
from turbodiffusion.errors import UserError

Attention = dict[str, str | int | float]  # a name of NAMES, and the options of that core

# sla_int8 is sla, computed in 8 bits: a way to run a network, not to train one
NAMES = ("dense", "sla", "sla_int8")
DENSE: Attention = {"name": "dense"}


def chosen(carried: Attention, asked: Attention, *, drop_linear: bool = False) -> Attention:
    """What is asked of a network that carries one attention: what is not said it keeps, else has by default.

    Raises UserError for what is no attention, and where a linear branch would be lost without drop_linear.
    """
    name = asked.get("name", carried["name"])
    options = {option: value for option, value in asked.items() if option != "name"}
    if name not in NAMES:
        raise UserError(f"attention={name}: choose {' or '.join(NAMES)}")
    if name != "dense":
        kept = {} if carried["name"] == "dense" else carried
        core = make_core({**kept, **options, "name": name}, head_dim=1)
        return {"name": name, **core.config}
    if options:
        raise UserError(f"dense attention has no {' and no '.join(options)}: pass attention=sla with it")
    if carried["name"] != "dense" and not drop_linear:
        raise UserError(
            "a network tuned for SLA attention is another one when run densely: leave attention= away, or "
            "pass drop_linear=true to infer.py"
        )
    return dict(DENSE)


def make_core(attention: Attention, head_dim: int) -> nn.Module:
    """The core of an attention that was chosen."""
    options = {option: value for option, value in attention.items() if option != "name"}
    if attention["name"] == "dense":
        return DenseAttention()
    return SparseLinearAttention(head_dim, **options, int8=attention["name"] == "sla_int8")


def fastest(attention: Attention, head_dim: int, device: torch.device, dtype: torch.dtype) -> Attention:
    """The same by 8-bit kernels where these run on the device and are right."""
    if attention["name"] == "dense":
        return attention
    blocks = attention["block_q"], attention["block_k"]
    return attention | {"name": "sla_int8" if is_sound(device, dtype, head_dim, *blocks) else "sla"}


def trained(attention: Attention) -> Attention:
    """What a checkpoint says: the attention that was trained, however it is computed now."""
    return attention if attention["name"] == "dense" else attention | {"name": "sla"}


def sparsity(attention: Attention, tokens: int) -> float:
    """The share of the key blocks of that many tokens that is left out."""
    if attention["name"] == "dense":
        return 0.0
    blocks = -(-tokens // attention["block_k"])
    return 1 - kept_blocks(attention["ratio"], blocks) / blocks


def spoken(attention: Attention) -> str:
    """In words, for tables."""
    return ", ".join(f"{name} {value}" for name, value in attention.items()).removeprefix("name ")
