"""Time of attention with its tangent on one GPU, the form that is shipped beside others, in bf16.

    python -m tools.bench.flash_jvp heads=12,40 length=32760 sweep=true

Every form must agree with fp64 on slices of its own output first.  Work: 12 N L^2 D FLOP for the six products
of a tangent pass, 4 N L^2 D for the two of a forward, 10 N L^2 D for the five that a backward needs.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kernels import flash_jvp_triton as flash
from kernels import reference
from kernels.flash_jvp_triton import Tile
from kernels.selftest import error_share
from tools.bench.timing import Run, Tables, Timing, cudnn, sizes, start

# rows, keys, warps, stages
OTHERS = [(128, 64, 8, 2), (128, 32, 8, 3), (128, 32, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2)]
ALLOWED = 5e-3  # bf16 rounds at 2e-3 of a number's size, a few times on the way


@dataclass
class Options(Timing):
    """The command line."""

    heads: str = "12,40"
    length: int = 32760
    width: int = 128
    sweep: bool = False
    calls: int = 1


def share(tensors: list[Tensor], outputs: tuple[Tensor, Tensor, Tensor]) -> float:
    """Of the allowed error, o's and do's (1, L, N, D): 64 rows at either end, first and last head."""
    got, wanted = [], []
    for head in (0, -1):
        for rows in (slice(0, 64), slice(-64, None)):
            q, k, v, dq, dk, dv = (x[:, :, head].double() for x in tensors)
            wanted += reference.attention(q[:, rows], k, v, dq[:, rows], dk, dv)[::2]
            got += [x[:, rows, head] for x in outputs[::2]]
    return error_share(got, wanted, ALLOWED)


def runs(tensors: list[Tensor], is_sweep: bool) -> dict[str, Run]:
    """Forms of the kernel, PyTorch's attention, and the forward and backward here, without tangents."""
    work, check = tensors[0].numel() * tensors[0].shape[1], partial(share, tensors)
    forms = [flash.form(tensors), *(Tile(*tile) for tile in OTHERS if is_sweep)]
    names = {f"tile {tuple(tile)}" if tile else "Hopper's own kernel": tile for tile in forms}
    q, k, v = (x.transpose(1, 2) for x in tensors[:3])
    plain = [*tensors[:3], None, None, None]
    o, lse, _ = flash.attention(q, k, v, None, None, None)

    ours = {n: Run(partial(flash.run, tensors, tile), 12 * work, share=check) for n, tile in names.items()}
    return ours | {
        "SDPA cuDNN forward": Run(partial(cudnn, q, k, v), 4 * work),
        "forward, no tangent": Run(partial(flash.run, plain, flash.form(plain)), 4 * work),
        "backward": Run(partial(flash.attention_backward, q, k, v, o, lse, torch.randn_like(o)), 10 * work),
    }


def tables(options: Options) -> Tables:
    """Every number of heads."""
    for (heads,) in sizes(options.heads):
        size = (1, options.length, heads, options.width)
        tensors = [torch.randn(size, device="cuda", dtype=torch.bfloat16) for _ in range(6)]
        yield f"{heads} heads x {options.length}", runs(tensors, options.sweep)


main = partial(start, Options, tables)

if __name__ == "__main__":
    main()
