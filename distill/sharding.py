"""Sharded training (FSDP2): every rank keeps a part of each weight, and gathers a unit's while it computes.

A forward, and whatever takes a whole tensor, is then a meeting of the ranks: all of them must ask for it.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate

from distill.replicas import teams
from turbodiffusion.parallel import world_size


def mesh(device: torch.device, shard: int) -> DeviceMesh:
    """The ranks as (replicas, shards); `shard` neighbours hold one copy of the weights together."""
    shape = (world_size() // shard, shard)
    return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))


def shard(network: nn.Module, units: Iterable[nn.Module], ranks: DeviceMesh, context: int = 1) -> None:
    """Shard a network whose parameters have one dtype: its units, then what is left of it.

    Gradients arrive averaged over the teams of ranks, in fp32 until they are rounded to the weights' dtype.
    """
    # inputs keep their dtype: an fp32 modulation would be rounded on its way into a unit
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in (*units, network):
        # the root, too: kept from a pass without a backward, its weights would miss the next update
        fully_shard(module, mesh=ranks, mp_policy=policy, reshard_after_forward=True)
        if context > 1:  # else the mean is over the ranks
            module.set_gradient_divide_factor(teams(context))
            module.set_force_sum_reduction_for_comms(True)  # gloo has no sum of multiples


def local(tensor: Tensor) -> Tensor:
    """This rank's part, in the same memory; of a tensor that is not sharded, all of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a sharded tensor, gathered from the ranks; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def joined(part: Tensor, like: Tensor) -> Tensor:
    """All of a tensor whose parts the ranks have, cut as `like` is; this one, where that is not sharded."""
    if not isinstance(like, DTensor):
        return part
    place = (like.device_mesh, like.placements)
    return DTensor.from_local(part, *place, shape=like.shape, stride=like.stride()).full_tensor()


def cut(tensor: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a tensor that all ranks have whole: `joined` undone."""
    if not isinstance(like, DTensor):
        return tensor
    everywhere = [Replicate()] * like.device_mesh.ndim
    whole = DTensor.from_local(tensor, like.device_mesh, everywhere, run_check=False)
    return whole.redistribute(placements=like.placements).to_local()
