"""Time of one forward of a model at real size, random weights (time does not depend on them).

    python -m tools.bench.forward variant=wan2.1_t2v_1.3b size=832x480,1280x720 attention=dense,sla,sla_int8

Kinds of attention take turns on the same weights; the first is the yardstick.  A correctness gate comes
first: on a small clip, all blocks kept, each must agree in bf16 with itself in fp32 on the same weights.
Included: everything WanModel.forward does.  Excluded: text encoder, VAE, sampler, weight loading.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from tools.bench.timing import Run, Tables, Timing, sizes, start
from turbodiffusion.models.wan import WanModel
from turbodiffusion.variants import Variant, variant


@dataclass
class Network:
    """Options of every benchmark of networks: which, at what size, and the blocks of sparse attention."""

    variant: str = "wan2.1_t2v_1.3b"
    size: str = "832x480"
    frames: int = 81
    ratio: float = 0.1
    block_q: int = 128
    block_k: int = 64
    device: str = "cuda"
    compile: bool = False


@dataclass
class Options(Timing, Network):
    """The command line."""

    attention: str = "dense"
    repeats: int = 10
    calls: int = 1


def randomize(module: nn.Module, device: torch.device, dtype_of: Callable[[str], torch.dtype]) -> None:
    """Give a module built on the meta device random weights of plausible sizes; norms stay near one."""
    for name, parameter in list(module.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        is_scale = leaf == "gamma" or (parameter.ndim == 1 and leaf == "weight")
        spread = 0.02 if parameter.ndim < 2 or is_scale else parameter[0].numel() ** -0.5
        value = torch.randn(parameter.shape, device=device, dtype=dtype_of(name)).mul_(spread)
        value = nn.Parameter(value + 1 if is_scale else value, requires_grad=False)
        module.get_submodule(owner).register_parameter(leaf, value)


def random_network(row: Variant, device: torch.device, dtype: torch.dtype) -> WanModel:
    """The variant with random weights in every layer (a fresh model's head is zero), norms in fp32."""
    with torch.device("meta"):
        network = WanModel(**row.network)
    randomize(network, device, lambda name: torch.float32 if WanModel.is_fp32(name) else dtype)
    return network


def shortened(row: Variant, layers: int | None) -> Variant:
    """A variant of so many layers, or all."""
    return row if layers is None else replace(row, network=row.network | {"layers": layers})


def twin(module: nn.Module) -> nn.Module:
    """Another of the same weights."""
    return deepcopy(module, {id(p): p for p in module.parameters()})


def latent_size(row: Variant, size: str, frames: int) -> tuple[int, int, int]:
    """Latent frames, height and width of a clip of WIDTHxHEIGHT pixels."""
    factor = 16 if row.vae == "wan2.2" else 8
    ((width, height),) = sizes(size)
    return (frames - 1) // 4 + 1, height // factor, width // factor


def network_inputs(
    row: Variant, size: tuple[int, int, int], device: torch.device
) -> dict[str, Tensor | None]:
    """Random inputs at a latent size (T, H, W), batch 1."""
    usual = {"in_channels": 16, "out_channels": 16, "text_dim": 4096, "text_length": 512, "clip_tokens": 0}
    network = usual | row.network
    extra, tokens = network["in_channels"] - network["out_channels"], network["clip_tokens"]
    return {
        "x": torch.randn(1, network["out_channels"], *size, device=device),
        "timesteps": torch.full((1,), 700.0, device=device),
        "context": torch.randn(1, network["text_length"], network["text_dim"], device=device),
        "condition": torch.randn(1, extra, *size, device=device) if extra else None,
        "clip": torch.randn(1, tokens, 1280, device=device) if tokens else None,
    }


def attend(network: WanModel, name: str, options: Network, ratio: float) -> None:
    """Give the network another kind of attention; its linear branch is zero, which takes as long."""
    sizes = {"ratio": ratio, "block_q": options.block_q, "block_k": options.block_k}
    network.set_attention({"name": name} | ({} if name == "dense" else sizes), drop_linear=True)


@torch.no_grad()
def gate(network: WanModel, row: Variant, names: list[str], options: Network) -> dict[str, float]:
    """Relative errors of two blocks with every kind of attention, all keys kept, against fp32 and dense."""
    blocks, got = network.blocks, {}
    network.blocks = blocks[:2]
    inputs = network_inputs(row, (3, 12, 16), torch.device(options.device))
    for name in names:
        attend(network, name, options, ratio=1.0)
        got[name] = network(**inputs).double()
    attend(network, "dense", options, ratio=1.0)
    kept = {name: p.dtype for name, p in network.named_parameters()}
    wanted = network.float()(**inputs).double()
    for name, parameter in network.named_parameters():
        parameter.data = parameter.data.to(kept[name])
    network.blocks = blocks
    errors = {name: ((x - wanted).norm() / wanted.norm()).item() for name, x in got.items()}
    for name, error in errors.items():
        # bf16 rounds at 0.4 %, a few dozen times in two blocks; 8 bits at a few per cent, in attention alone
        if not error < 3e-2:
            raise SystemExit(f"in bf16 {name} differs from dense fp32 by {error:.3f}: not timed")
    return errors


def tables(options: Options) -> Tables:
    """Every size."""
    device, row, names = torch.device(options.device), variant(options.variant), options.attention.split(",")
    network = random_network(row, device, torch.bfloat16)
    print(f"errors {gate(network, row, names, options)}")
    networks = {name: twin(network) for name in names}
    for name, each in networks.items():
        attend(each, name, options, options.ratio)
        for block in each.shard_units() if options.compile else ():
            block.compile()
    for size in options.size.split(","):
        inputs = network_inputs(row, latent_size(row, size, options.frames), device)
        yield size, {name: Run(partial(each, **inputs)) for name, each in networks.items()}


main = partial(start, Options, tables)

if __name__ == "__main__":
    main()
