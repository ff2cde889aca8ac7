"""What the tests of several processes run in each: `python -m tests.parallel.ranks FOLDER`."""

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from torch import Tensor, nn

from distill.jvp import jvp
from distill.remat import rematerialize
from distill.sharding import whole
from tests.distill.ranks import CPU, DESCENT, Noise, everything, make_trainer
from turbodiffusion.attention import Attention
from turbodiffusion.errors import UserError
from turbodiffusion.models.wan import WanModel
from turbodiffusion.parallel import joined, neighbours, rank, split_tokens
from turbodiffusion.pipelines.found import find, load
from turbodiffusion.pipelines.generate import Clip, Pipeline
from turbodiffusion.pipelines.options import read
from turbodiffusion.pipelines.sizes import Size

SLA = {"name": "sla", "ratio": 0.5, "block_q": 4, "block_k": 4}
# 16 tokens, 18, and 5
GRIDS = {"even": (4, 4, 4), "uneven": (3, 4, 6), "short": (5, 2, 2)}
# blocks of 2, of which half is kept; the grids have 8 and 9 tokens
SPARSE = {"name": "sla", "ratio": 0.5, "block_q": 2, "block_k": 2}
UNEVEN = Noise(grid=(3, 2, 6))
TRAINED = {
    "dense": {"shard": 1, "data": UNEVEN},
    "sparse": {"shard": 1, "data": UNEVEN, "attention": SPARSE},
    "sparse, sharded": {"shard": 2, "data": UNEVEN, "attention": SPARSE},
    "dense, sharded": {"shard": 4, "data": Noise()},
}
STEPS = {"optim": DESCENT, "steps": 4, "log_every": 1}


def build(attention: Attention | None = None) -> WanModel:
    """Every part says something; four heads."""
    torch.manual_seed(0)
    network = WanModel(
        dim=48, ffn_dim=64, heads=4, layers=2, in_channels=6, out_channels=4, text_dim=8, text_length=6,
        freq_dim=16, attention=attention,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return network


class Inputs:
    """Of one grid; per_token: with a time for each token."""

    def __init__(self, grid: tuple[int, int, int], *, per_token: bool):
        rng = torch.Generator().manual_seed(1)
        self.x, self.dx = (torch.randn(2, 4, *grid, generator=rng) for _ in range(2))
        tokens = grid[0] * grid[1] * grid[2] // 4
        self.s = 1000 * torch.rand(2, *([tokens] if per_token else []), generator=rng)
        self.context = torch.randn(2, 5, 8, generator=rng)
        self.condition = torch.randn(2, 2, *grid, generator=rng)

    def all_of(self, network: nn.Module, chained: nn.Module) -> dict[str, Tensor]:
        """Velocity, its tangent, and gradients by what they are of; `chained` makes the input."""
        x, context = self.x.clone().requires_grad_(), self.context.clone().requires_grad_()
        made = chained(x, self.s, context, condition=self.condition)
        out = network(made, self.s, context, condition=self.condition)
        (out.square().mean() + x.square().mean()).backward()
        found = {"velocity": out.detach(), "x": x.grad, "context": context.grad}
        found |= {f"weights/{name}": p.grad for name, p in network.named_parameters()}
        found |= {f"weights/chained.{name}": p.grad for name, p in chained.named_parameters()}
        primals, tangents = (self.x, self.s), (self.dx, torch.ones_like(self.s))
        return found | {"tangent": jvp(partial(self.of, network), primals, tangents)[1]}

    def of(self, network: nn.Module, x: Tensor, s: Tensor) -> Tensor:
        return network(x, s, self.context, condition=self.condition)


def worst(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, float]:
    """The largest error of each kind, relative to the largest of the numbers it is in."""
    kinds: dict[str, float] = {}
    for name, value in theirs.items():
        error = (ours[name] - value).abs().max() / value.abs().max()
        kinds[name.split("/")[0]] = max(kinds.get(name.split("/")[0], 0.0), error.item())
    return kinds


def compare(*groups: dist.ProcessGroup) -> dict[str, dict[str, float]]:
    """By case and the group's size, errors against a network that is not split."""
    cases = {
        "dense even": (None, "even", False, "none"),
        "dense uneven": (None, "uneven", False, "block"),
        "dense short": (None, "short", False, "none"),
        "sla even": (SLA, "even", False, "none"),
        "sla uneven": (SLA, "uneven", True, "block"),
    }
    errors = {}
    for case, (attention, grid, per_token, remat) in cases.items():
        inputs = Inputs(GRIDS[grid], per_token=per_token)
        theirs = inputs.all_of(build(attention), build(attention))
        for group in groups:
            networks = build(attention), build(attention)
            for network in networks:
                rematerialize(network.shard_units(), remat)
                split_tokens(network, group)
            ours = inputs.all_of(*networks)
            for name, grad in ours.items():
                if name.startswith("weights/"):
                    dist.all_reduce(grad, group=group)
            errors[f"{case} on {group.size()}"] = worst(ours, theirs)
    return errors


def change_attention(group: dist.ProcessGroup) -> float:
    """The error where attention was exchanged after the split."""
    inputs, networks = Inputs(GRIDS["uneven"], per_token=False), (build(), build())
    split_tokens(networks[0], group)
    ours, theirs = (
        inputs.of(network, inputs.x, inputs.s) for network in networks for _ in [network.set_attention(SLA)]
    )
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def refusals(group: dist.ProcessGroup) -> list[str]:
    """What is said where tokens or heads can not be shared."""
    odd = WanModel(dim=36, ffn_dim=8, heads=3, layers=1, text_dim=8)
    few, inputs = build(), Inputs((1, 2, 2), per_token=False)
    split_tokens(few, group)
    said = []
    for attempt in (
        lambda: split_tokens(odd, group),
        lambda: inputs.of(few, inputs.x, inputs.s),
    ):
        try:
            attempt()
        except UserError as error:
            said.append(str(error))
    return said


def make_video(group: dist.ProcessGroup) -> float:
    """The largest error of frames that continue a picture in the small world, in [-1, 1]."""
    cfg = OmegaConf.load("configs/infer.yaml")
    del cfg["defaults"], cfg["hydra"]
    # not the students in 8 bits, where a last bit decides between two levels
    found = find(read(OmegaConf.merge(cfg, {"ckpt": "assets/wan_tiny.safetensors"})))
    models = load(found, device=CPU, dtype=torch.float32)
    sampling = replace(found.sampling, steps=2, guidance=1.0)
    picture = torch.rand(1, 3, 96, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    clip = Clip(prompts=["a fox jumps"], size=Size(64, 96), frames=5, image=picture)
    alone, shared = (
        Pipeline(models, sampling, device=CPU, ranks=ranks)(clip, [3]).frames for ranks in (None, group)
    )
    return (shared - alone).abs().max().item()


def train(folder: Path, case: str) -> dict[str, list[float]]:
    """Plain descent on two teams of two ranks: the losses; weights and averages to CASE.pt."""
    trainer, losses = make_trainer(folder / case, **TRAINED[case], context=2, **STEPS), {}
    for _ in range(STEPS["steps"]):
        trainer.update()
        losses |= {f"{name} at {trainer.state.step}": x.tolist() for name, x in trainer.losses.items()}
    trainer.fit()
    found = {name: whole(value) for name, value in everything(trainer).items()}
    if rank() == 0:
        torch.save(found, folder / f"{case}.pt")
    return losses


def main(folder: Path) -> None:
    with joined(CPU):
        pairs = neighbours(2)
        results = {
            "networks": compare(pairs, neighbours(4)),
            "exchanged": change_attention(pairs),
            "refused": refusals(pairs),
            "video": make_video(pairs),
            "losses": {case: train(folder, case) for case in TRAINED},
        }
        (folder / f"rank{rank()}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
