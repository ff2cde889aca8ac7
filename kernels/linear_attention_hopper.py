"""The linear branch at the end of a tile of sparse attention, for Hopper GPUs, in Gluon.

To the tile's softmax attention o / l are added, as by kernels/linear_attention_triton.py's output_kernel,

    (f F + w shift) / t + bias,    w = f mass,    t = 1e-5 + w,

f being features of the queries and F the folded state of their head.  Products add up where o is, which is
multiplied by t / l before, and divided by t after.  The loader brings F, and the queries where sparse
attention has them in another form, as it brings keys; what is read from global memory is a few numbers a
thread, traded in shared memory: pointers for all columns would not stay in registers.
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
def add_branch(o, inverse, q, branch, head, MAP: gl.constexpr):
    """o * inverse [rows, D] and the branch; all as a product in 16 bits leaves its sums, or its rows."""
    _, tiles, _, _, _, free = branch[0]
    vectors_ptr, bias_ptr = branch[1]
    D: gl.constexpr = q.shape[1]
    OUT: gl.constexpr = q.type.layout
    f = features(q, MAP).to(q.dtype)
    vectors_ptr += head * (3 * D)
    weight = gl.sum(f.to(gl.float32) * _columns(vectors_ptr, OUT, D)[None, :], 1)
    total = EPS + weight
    o = o * (total * inverse)[:, None]
    f = gl.convert_layout(f, gl.DotOperandLayout(0, OUT, 2))
    o = warpgroup_mma(f, tiles.index(0).reshape([D, D]), o, is_async=True)
    o = warpgroup_mma_wait(0, [o])
    mbarrier.arrive(free)
    # not before, as there are not registers enough
    shift = _columns(vectors_ptr + 2 * D, OUT, D)
    bias = _columns(bias_ptr, OUT, D).to(gl.float32)
    return (o + weight[:, None] * shift[None, :]) * (1 / total)[:, None] + bias[None, :]


@gluon.jit
def _columns(ptr, OUT: gl.constexpr, D: gl.constexpr):
    """D numbers, of the columns of a matrix."""
    x = gl.load(ptr + gl.arange(0, D, gl.BlockedLayout([1], [32], [4], [0])))
    return gl.convert_layout(x, gl.SliceLayout(0, OUT))
