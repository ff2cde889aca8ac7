"""SparseLinearAttention as a core: against dense attention, alone and within the network."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from kernels.reference import block_map, linear_attention
from turbodiffusion.attention import DenseAttention, SparseLinearAttention
from turbodiffusion.errors import UserError
from turbodiffusion.models.wan import WanModel

LENGTHS = [1, 63, 64, 65]
SIZES = {
    "dim": 32,
    "ffn_dim": 48,
    "heads": 2,
    "layers": 2,
    "text_dim": 12,
    "text_length": 8,
    "freq_dim": 16,
}


def draw(length: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(2, 3, length, 16, dtype=dtype) for _ in range(3)]


def trained(core: nn.Module) -> nn.Module:
    """The core with its projection away from zero."""
    for weight in core.parameters():
        nn.init.normal_(weight, std=0.3)
    return core


def networks(ratio: float) -> tuple[WanModel, WanModel]:
    """A dense network of random weights, and the sparse one with the same."""
    attention = {"name": "sla", "ratio": ratio, "block_q": 16, "block_k": 8}
    dense, sparse = WanModel(**SIZES), WanModel(**SIZES, attention=attention)
    with torch.no_grad():
        for weight in dense.parameters():
            weight.add_(0.1 * torch.randn_like(weight))  # the head would answer zero
    projections = {name: w for name, w in sparse.state_dict().items() if ".proj_l." in name}
    sparse.load_state_dict(dense.state_dict() | projections, strict=True)
    return dense, sparse


def relative_error(got: Tensor, wanted: Tensor) -> float:
    return ((got.double() - wanted.double()).norm() / wanted.double().norm()).item()


@pytest.mark.parametrize("blocks", [(64, 64), (128, 64), (16, 8)])
@pytest.mark.parametrize("length", LENGTHS)
def test_all_blocks_and_no_projection_equal_dense_attention(length: int, blocks: tuple[int, int]) -> None:
    q, k, v = draw(length)
    core = SparseLinearAttention(16, ratio=1.0, block_q=blocks[0], block_k=blocks[1]).double()
    # fp64 rounding
    torch.testing.assert_close(core(q, k, v), DenseAttention()(q, k, v), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("ratio", [1e-9, 0.1, 0.5])
@pytest.mark.parametrize("length", LENGTHS)
def test_sum_of_masked_attention_and_projected_linear_attention(length: int, ratio: float) -> None:
    q, k, v = draw(length)
    core = trained(SparseLinearAttention(16, ratio=ratio, block_q=16, block_k=8, feature_map="elu").double())
    index = block_map(q, k, block_q=16, block_k=8, ratio=ratio).long()
    chosen = F.one_hot(index, -(-length // 8)).sum(-2).bool()
    mask = chosen.repeat_interleave(16, 2).repeat_interleave(8, 3)[:, :, :length, :length]
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    wanted = wanted + F.linear(linear_attention(q, k, v, "elu"), core.proj_l.weight, core.proj_l.bias)
    # fp64 rounding
    torch.testing.assert_close(core(q, k, v), wanted, rtol=1e-12, atol=1e-12)


def test_samples_and_heads_do_not_meet() -> None:
    q, k, v = draw(65)
    core = trained(SparseLinearAttention(16, ratio=0.3, block_q=16, block_k=8).double())
    alone = core(*(x[1:, 2:] for x in (q, k, v)))
    # fp64 rounding: another shape of product may sum in another order
    torch.testing.assert_close(core(q, k, v)[1:, 2:], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("feature_map", ["softmax", "elu", "relu"])
def test_tangent_equals_central_differences(feature_map: str) -> None:
    # no step crosses the kink of relu
    primals, tangents = [x + 0.01 * x.sign() for x in draw(65)], draw(65)
    blocks = {"block_q": 16, "block_k": 8}
    core = trained(SparseLinearAttention(16, ratio=0.3, feature_map=feature_map, **blocks).double())
    h = 1e-6
    moved = [[x + step * dx for x, dx in zip(primals, tangents, strict=True)] for step in (h, -h)]
    # the choice jumps where scores cross: not between these two points
    maps = [block_map(*point[:2], ratio=0.3, **blocks) for point in moved]
    assert torch.equal(*maps)
    with torch.no_grad(), forward_ad.dual_level():
        got = forward_ad.unpack_dual(core(*map(forward_ad.make_dual, primals, tangents))).tangent
        ahead, behind = (core(*point) for point in moved)
    # rounding of 1e-16 / h, on differences of numbers near one
    assert relative_error(got, (ahead - behind) / (2 * h)) < 1e-8


def test_gradients_reach_the_projection_before_it_is_trained() -> None:
    q, k, v = (x.requires_grad_() for x in draw(65))
    core = SparseLinearAttention(16, ratio=0.3, block_q=16, block_k=8).double()
    core(q, k, v).square().sum().backward()
    assert all(x.grad.abs().sum() > 0 for x in (q, k, v, *core.parameters()))


def test_bf16_loses_no_more_than_pytorch_in_bf16() -> None:
    q, k, v = draw(65, torch.bfloat16)
    core = trained(SparseLinearAttention(16, ratio=1.0, block_q=16, block_k=8)).bfloat16()
    got = core(q, k, v)
    assert got.dtype == torch.bfloat16

    def plain(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        o = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
        q, k = q.softmax(-1), k.softmax(-1)
        linear = q @ (k.mT @ v) / (1e-5 + q @ k.sum(-2).unsqueeze(-1))
        return o + F.linear(linear, weight, bias)

    tensors = (q, k, v, core.proj_l.weight, core.proj_l.bias)
    truth = plain(*(x.double() for x in tensors))
    assert relative_error(got, truth) <= relative_error(plain(*tensors), truth)


def test_network_with_all_blocks_equals_the_dense_one() -> None:
    dense, sparse = networks(ratio=1.0)
    x, dx = torch.randn(2, 2, 16, 3, 6, 10)
    times, context = torch.tensor([987.0, 251.0]), torch.randn(2, 8, 12)
    results = []
    with torch.no_grad(), forward_ad.dual_level():
        for network in (dense, sparse):
            results.append(forward_ad.unpack_dual(network(forward_ad.make_dual(x, dx), times, context)))
    # fp32 rounding through two blocks; tangents take twice the operations
    assert relative_error(results[1].primal, results[0].primal) < 1e-5
    assert relative_error(results[1].tangent, results[0].tangent) < 2e-5


def test_network_names_initialises_and_trains_the_projection() -> None:
    dense, sparse = networks(ratio=0.2)
    added = sparse.state_dict().keys() - dense.state_dict().keys()
    place = "blocks.{}.self_attn.core.proj_l.{}"
    assert added == {place.format(i, leaf) for i in range(2) for leaf in ("weight", "bias")}
    assert all(sparse.state_dict()[name].abs().max() == 0 for name in added)
    out = sparse(torch.randn(2, 16, 3, 6, 10), torch.tensor([987.0, 251.0]), torch.randn(2, 8, 12))
    out.square().mean().backward()
    assert not [name for name, p in sparse.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


def test_arguments_are_kept_and_shown() -> None:
    arguments = {"ratio": 0.15, "block_q": 128, "block_k": 64, "feature_map": "relu"}
    core = SparseLinearAttention(16, **arguments)
    assert core.config == arguments
    assert "ratio=0.15, block_q=128, block_k=64, feature_map=relu" in repr(core)
    again = SparseLinearAttention(16, **core.config)
    q, k, v = draw(65, torch.float32)
    assert torch.equal(again(q, k, v), core(q, k, v))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"ratio": 0.0}, "ratio=0.0"),
        ({"ratio": 1.5}, "at most 1"),
        ({"block_q": 0}, "blocks of 0 queries"),
        ({"feature_map": "hedgehog"}, "one of softmax, elu, relu"),
    ],
)
def test_meaningless_arguments_are_refused(arguments: dict[str, float | str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        SparseLinearAttention(16, **arguments)
