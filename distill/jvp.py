"""The directional derivative of a network, in one forward pass with dual numbers."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad


def jvp(
    fn: Callable[..., Tensor], primals: Sequence[Tensor], tangents: Sequence[Tensor | None], *args: object
) -> tuple[Tensor, Tensor]:
    """fn(*primals, *args) and its derivative along the tangents, without a graph.

    A tangent has its primal's shape and dtype; None stands for zero.  Raises RuntimeError when no tangent
    comes out of fn: taken for zero, it would silently remove a term from a loss.
    """
    with torch.no_grad(), forward_ad.dual_level():
        duals = [
            primal if tangent is None else forward_ad.make_dual(primal, tangent)
            for primal, tangent in zip(primals, tangents, strict=True)
        ]
        out, tangent = forward_ad.unpack_dual(fn(*duals, *args))
    if tangent is None:
        raise RuntimeError(
            "the function returned no tangent; usual causes: every tangent given is None, "
            "torch.inference_mode(), a detach(), or a custom op without a jvp rule on the way"
        )
    return out, tangent
