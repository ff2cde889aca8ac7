"""Activation checkpointing, put onto a network from outside: what a backward needs is computed again there.

Source of "keep_attention": arXiv:2205.05198.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from turbodiffusion.attention import SPARSE_OPERATOR
from turbodiffusion.errors import UserError

aten = torch.ops.aten
# every kernel behind scaled_dot_product_attention, and ours of sparse attention: its twin on a CPU runs again
ATTENTION = [
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_fused_attention_overrideable.default,
    SPARSE_OPERATOR,
]
# of torch.utils.checkpoint
SETTINGS = {
    "block": {},
    "keep_attention": {"context_fn": partial(create_selective_checkpoint_contexts, ATTENTION)},
}
MODES = ("none", *SETTINGS)


def rematerialize(units: Iterable[nn.Module], mode: str) -> None:
    """Have each unit keep its inputs alone ("block"), the results of attention too, or everything ("none").

    Gradients are the same to the bit; a backward takes as long as another forward more, with
    "keep_attention" one without attention.  Parameters keep their names, a copy of a unit its mode; apply it
    before compile_units() and fully_shard().  Raises UserError for another mode.
    """
    if mode not in MODES:
        raise UserError(f"remat={mode}: choose {', '.join(MODES)}")
    for unit in units:
        vars(unit).pop("forward", None)  # of an earlier mode
        if mode != "none":
            unit.forward = _Recomputed(unit.forward, mode)


@dataclass(frozen=True)
class _Recomputed:
    """A unit's forward.  An object, not a closure: deepcopy binds it to the copied unit."""

    forward: Callable[..., Tensor]
    mode: str

    def __call__(self, *args: object, **kwargs: object) -> Tensor:
        # without a graph nothing is kept anyway; dual numbers pass without one (distill/jvp.py)
        if not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        return checkpoint(
            self.forward,
            *args,
            use_reentrant=False,
            preserve_rng_state=False,
            **SETTINGS[self.mode],
            **kwargs,
        )
