"""Exchanging submodules."""

import pytest
from torch import nn

from turbodiffusion.models.swap import swap


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.GELU(), nn.Linear(3, 4)))


def test_matching_modules_are_replaced_by_what_is_made_of_them_and_named() -> None:
    module = network()
    gelu = module[1][0]
    names = swap(
        module, lambda _, child: isinstance(child, nn.Linear), lambda old: nn.Identity(old.out_features)
    )
    assert names == ["0", "1.1"]
    assert [type(child) for child in (module[0], module[1][1])] == [nn.Identity, nn.Identity]
    assert module[1][0] is gelu


def test_the_module_itself_is_not_replaced() -> None:
    module = network()
    assert swap(module, lambda _, child: isinstance(child, nn.Sequential), lambda _: nn.Identity()) == ["1"]


def test_nothing_to_swap_is_an_error() -> None:
    with pytest.raises(ValueError, match="no submodule of this Sequential matches"):
        swap(network(), lambda _, child: isinstance(child, nn.Conv3d), nn.Module)
