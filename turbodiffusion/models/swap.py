"""Exchanging submodules of a network that is already built."""

from collections.abc import Callable

from torch import nn


def swap(
    module: nn.Module, match: Callable[[str, nn.Module], bool], make: Callable[[nn.Module], nn.Module]
) -> list[str]:
    """Put make(old) in the place of every submodule whose name and self match -> the names of those places.

    One at a time, and the old ones are let go: memory need not hold both networks.  Raises ValueError where
    nothing matches.
    """
    names = [name for name, child in module.named_modules() if name and match(name, child)]
    if not names:
        raise ValueError(f"nothing to swap: no submodule of this {type(module).__name__} matches")
    for name in names:
        module.set_submodule(name, make(module.get_submodule(name)))
    return names
