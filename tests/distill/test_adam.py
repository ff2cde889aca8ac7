import pytest
import torch
from torch import Tensor, nn

from distill.adam import AdamWithoutMomentum
from distill.optim import Optim
from distill.sharding import local, mesh, shard

BETA2 = 0.95


def make_groups(device: str, dtype: torch.dtype) -> list[dict[str, object]]:
    """A group that decays and one that does not, of sizes that vectorised loops do not divide."""
    rng = torch.Generator().manual_seed(0)
    weights = [torch.randn(size, generator=rng, dtype=dtype) for size in ((37, 41), (19, 3), (37,), (1,))]
    matrices, vectors = ([nn.Parameter(w.to(device)) for w in part] for part in (weights[:2], weights[2:]))
    return [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]


def draw_gradients(weights: list[Tensor], step: int) -> None:
    """Of sizes from none to 1e3; the second weight misses a step."""
    rng = torch.Generator().manual_seed(1 + step)
    for number, weight in enumerate(weights):
        grad = torch.randn(weight.shape, generator=rng, dtype=weight.dtype)
        grad *= 10 ** (9 * torch.rand(weight.shape, generator=rng) - 6) * (grad > -1)
        weight.grad = None if (step, number) == (2, 1) else grad.to(weight.device)


def train(optimizer: torch.optim.Optimizer) -> list[dict[str, Tensor]]:
    """Weights, second moments and counts after each of six steps of changing rates."""
    weights, seen = [w for group in optimizer.param_groups for w in group["params"]], []
    for step in range(6):
        draw_gradients(weights, step)
        for group in optimizer.param_groups:
            group["lr"] = 0.1 / (step + 1)
        optimizer.step()
        for weight in weights:
            state = optimizer.state[weight]
            seen.append({"weight": weight.detach().clone()} | {kind: x.clone() for kind, x in state.items()})
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_it_does_what_torch_s_does_to_the_bit(device: str, dtype: torch.dtype):
    ours = train(AdamWithoutMomentum(make_groups(device, dtype), lr=0.0, beta2=BETA2))
    theirs = train(torch.optim.AdamW(make_groups(device, dtype), betas=(0.0, BETA2), fused=True))
    for our, their in zip(ours, theirs, strict=True):
        assert our.keys() == their.keys() - {"exp_avg"}
        assert all(torch.equal(value, their[kind]) for kind, value in our.items())


@pytest.mark.usefixtures("two_ranks")
def test_a_rank_moves_its_part_of_sharded_weights():
    module = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 1))  # of the last bias the other rank has nothing
    shard(module, [module[0]], mesh(torch.device("cpu"), 2))
    optimizer = Optim(lr=0.1, betas=(0.0, BETA2)).build(module.parameters())
    parts = [nn.Parameter(local(weight).detach().clone()) for weight in module.parameters()]
    plain = torch.optim.AdamW(parts, lr=0.1, betas=(0.0, BETA2), weight_decay=0.0, fused=True)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    for _ in range(3):
        module(torch.randn(4, 8)).sum().backward()
        for weight, part in zip(module.parameters(), parts, strict=True):
            part.grad = local(weight.grad).clone()
        optimizer.step()
        plain.step()
        optimizer.zero_grad(set_to_none=True)
    for weight, part in zip(module.parameters(), parts, strict=True):
        assert torch.equal(local(weight), part)
        # sharded like the weight: a checkpoint has every rank's
        assert optimizer.state[weight]["exp_avg_sq"].shape == weight.shape


def test_it_is_what_trains_where_beta1_is_0():
    net = nn.Sequential(nn.Conv1d(2, 4, 3), nn.Linear(4, 4))
    for matrices in ("adamw", "muon"):
        optimizer = Optim(lr=0.1, betas=(0.0, BETA2), matrices=matrices).build(net.parameters())
        for p in net.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        stored = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
        assert sum(x.numel() for x in stored) == sum(p.numel() for p in net.parameters())
