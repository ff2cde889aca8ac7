"""The linear branch at the end of a tile of sparse attention, for Hopper GPUs, in Gluon.

To the tile's softmax attention o / l are added, as by kernels/linear_attention_triton.py's output_kernel,

    (f F + w shift) / t + bias,    w = f mass,    t = 1e-5 + w,

f being features of the queries and F the folded state of their head.  Products add up where o is, which is
multiplied by t / l before, and divided by t after.  The loader brings F, and the queries where sparse
attention has them in another form, as it brings keys.  mass, shift and bias are read from global memory, one
number of each a thread, and traded in shared memory: pointers for all columns would not stay in registers.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from kernels.linear_attention_triton import EPS, features
from kernels.tiles_hopper import new_barriers, new_tiles, tma_load


@gluon.jit
def new_branch(folded_desc, q_desc, q_tiles, vectors_ptr, bias_ptr):
    """Buffers and barriers, the phases of which count tiles; and pointers."""
    ready, free = new_barriers(1, 1).index(0), new_barriers(1, q_tiles.shape[0]).index(0)
    return (folded_desc, new_tiles(folded_desc, 1), q_desc, q_tiles, ready, free), (vectors_ptr, bias_ptr)


@gluon.jit
def fetch_branch(branch, head, place, first, parity, QUERIES: gl.constexpr):
    """Load a head's folded state and, if QUERIES, the tile's queries from row `first` on."""
    desc, tiles, q_desc, q_tiles, ready, free = branch[0]
    GROUPS: gl.constexpr = q_tiles.shape[0]
    mbarrier.wait(free, parity ^ 1)
    if QUERIES:
        mbarrier.expect(ready, desc.block_type.nbytes + GROUPS * q_desc.block_type.nbytes)
        for group in gl.static_range(GROUPS):
            rows = first + group * q_tiles.shape[2]
            tma_load(q_desc, [place[0], rows, place[1]], ready, q_tiles.index(group))
    else:
        mbarrier.expect(ready, desc.block_type.nbytes)
    tma_load(desc, [head, 0, 0], ready, tiles.index(0))


@gluon.jit
def branch_queries(branch, group, parity, OUT: gl.constexpr):
    """A warp group's queries, when all that was fetched is there."""
    _, _, _, tiles, ready, _ = branch[0]
    mbarrier.wait(ready, parity)
    return tiles.index(group).reshape([tiles.shape[2], tiles.shape[3]]).load(OUT)


@gluon.jit
def branch_numbers(branch, head, D: gl.constexpr):
    """mass, shift and bias [D]: asked for early, as they take long, by one number a thread."""
    vectors_ptr, bias_ptr = branch[1]
    at = gl.arange(0, D, gl.BlockedLayout([1], [32], [4], [0]))
    vectors_ptr += head * (3 * D) + at
    return gl.load(vectors_ptr), gl.load(vectors_ptr + 2 * D), gl.load(bias_ptr + at)


@gluon.jit
def add_branch(o, inverse, q, numbers, branch, MAP: gl.constexpr):
    """o * inverse [rows, D] and the branch; all as a product in 16 bits leaves its sums, or its rows."""
    _, tiles, _, _, _, free = branch[0]
    mass, shift, bias = numbers
    D: gl.constexpr = q.shape[1]
    OUT: gl.constexpr = q.type.layout
    COLUMN: gl.constexpr = gl.SliceLayout(0, OUT)
    f = features(q, MAP).to(q.dtype)
    weight = gl.sum(f.to(gl.float32) * gl.convert_layout(mass, COLUMN)[None, :], 1)
    total = EPS + weight
    o = o * (total * inverse)[:, None]
    f = gl.convert_layout(f, gl.DotOperandLayout(0, OUT, 2))
    o = warpgroup_mma(f, tiles.index(0).reshape([D, D]), o, is_async=True)
    o = warpgroup_mma_wait(0, [o])
    mbarrier.arrive(free)
    # for all columns not before, as there are not registers enough
    shift = gl.convert_layout(shift, COLUMN)
    bias = gl.convert_layout(bias, COLUMN).to(gl.float32)
    return (o + weight[:, None] * shift[None, :]) * (1 / total)[:, None] + bias[None, :]
