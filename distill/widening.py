"""Start a network from one with narrower feed-forward layers, without a change in what it computes."""

import torch
from torch import Tensor

from turbodiffusion.errors import UserError
from turbodiffusion.models.wan import WanModel


@torch.no_grad()
def widen(network: WanModel, narrow: WanModel) -> None:
    """Give the network the narrow one's weights; its new hidden features start unheard (arXiv:1511.05641).

    Raises UserError where the two differ in more than the feed-forward layers' width, or that is not less.
    """
    wide_config, narrow_config = network.config, narrow.config
    unlike = sorted(name for name in wide_config if wide_config[name] != narrow_config[name])
    if unlike not in ([], ["ffn_dim"]) or narrow_config["ffn_dim"] > wide_config["ffn_dim"]:
        raise UserError(
            "the checkpoint to start from may differ from this network only by a smaller ffn_dim; "
            + ", ".join(f"{name} is {narrow_config[name]}, not {wide_config[name]}" for name in unlike)
        )
    given = narrow.state_dict()
    network.load_state_dict({name: _grown(w, given[name], name) for name, w in network.state_dict().items()})


def _grown(weight: Tensor, given: Tensor, name: str) -> Tensor:
    grown = weight.clone()
    if name.endswith(".ffn.2.weight"):
        grown.zero_()
    grown[tuple(slice(size) for size in given.shape)] = given
    return grown
