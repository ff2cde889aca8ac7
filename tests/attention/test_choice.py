"""Which attention a network has: what is asked, what it carries, and what is lost on the way."""

import pytest
import torch

from turbodiffusion.attention import (
    DENSE,
    Attention,
    SparseLinearAttention,
    chosen,
    fastest,
    sparsity,
    trained,
)
from turbodiffusion.errors import UserError
from turbodiffusion.models.wan import WanModel

SLA = {"name": "sla", "ratio": 0.1, "block_q": 64, "block_k": 64, "feature_map": "softmax"}
SIZES = {"dim": 32, "ffn_dim": 48, "heads": 2, "layers": 2, "text_dim": 12, "text_length": 8}


@pytest.mark.parametrize(
    ("carried", "asked", "wanted"),
    [
        (DENSE, {}, DENSE),
        (DENSE, {"name": "sla"}, SLA),
        (DENSE, {"name": "sla", "ratio": 0.2}, SLA | {"ratio": 0.2}),
        (SLA | {"block_q": 128}, {}, SLA | {"block_q": 128}),
        (SLA | {"block_q": 128}, {"ratio": 0.15}, SLA | {"block_q": 128, "ratio": 0.15}),
        (SLA | {"feature_map": "elu"}, {"name": "sla"}, SLA | {"feature_map": "elu"}),
        (SLA | {"block_q": 128}, {"name": "sla_int8"}, SLA | {"name": "sla_int8", "block_q": 128}),
    ],
)
def test_what_is_not_asked_is_carried_or_the_default(
    carried: Attention, asked: Attention, wanted: Attention
) -> None:
    assert chosen(carried, asked) == wanted


@pytest.mark.parametrize(
    ("carried", "asked", "said"),
    [
        (DENSE, {"name": "foo"}, "attention=foo: choose dense or sla or sla_int8"),
        (
            DENSE,
            {"ratio": 0.2, "block_k": 8},
            "dense attention has no ratio and no block_k: pass attention=sla",
        ),
        (DENSE, {"name": "sla", "ratio": 2.0}, "ratio=2.0"),
        (SLA, {"block_q": 0}, "at least one token"),
        (SLA, DENSE, "another one when run densely"),
    ],
)
def test_what_is_no_attention_is_refused(carried: Attention, asked: Attention, said: str) -> None:
    with pytest.raises(UserError, match=said):
        chosen(carried, asked)


def test_a_linear_branch_is_lost_only_when_told() -> None:
    assert chosen(SLA, DENSE, drop_linear=True) == DENSE


def test_the_fastest_attention_of_a_cpu_is_what_was_trained() -> None:
    for attention in (DENSE, SLA):
        assert fastest(attention, 128, torch.device("cpu"), torch.bfloat16) == attention
    assert fastest(SLA | {"name": "sla_int8"}, 128, torch.device("cpu"), torch.bfloat16) == SLA


@pytest.mark.gpu
def test_the_fastest_attention_of_a_gpu_is_in_8_bits() -> None:
    for dtype, name in ((torch.bfloat16, "sla_int8"), (torch.float32, "sla")):
        assert fastest(SLA, 128, torch.device("cuda"), dtype) == SLA | {"name": name}
    assert fastest(DENSE, 128, torch.device("cuda"), torch.bfloat16) == DENSE


def network() -> WanModel:
    model = WanModel(**SIZES)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.2)  # the head would answer zero
    return model


def test_a_network_changes_its_attention_and_back() -> None:
    model = network()
    given = torch.randn(2, 16, 3, 6, 10), torch.tensor([987.0, 251.0]), torch.randn(2, 8, 12)
    dense = model(*given)
    model.set_attention({"name": "sla", "ratio": 1.0, "block_q": 16, "block_k": 8})
    # a sum of all keys in another order, through two blocks in fp32
    torch.testing.assert_close(model(*given), dense, rtol=1e-4, atol=1e-4)
    model.set_attention({"ratio": 0.2})
    sparse = model(*given)
    assert (sparse - dense).norm() > 0.01 * dense.norm()
    with pytest.raises(UserError, match="another one when run densely"):
        model.set_attention(DENSE)
    assert torch.equal(model(*given), sparse)
    model.set_attention(DENSE, drop_linear=True)
    assert torch.equal(model(*given), dense)
    assert model.state_dict().keys() == network().state_dict().keys()


def test_eight_bits_are_a_way_to_run_sla_and_not_to_train_it() -> None:
    model = network()
    given = torch.randn(2, 16, 3, 6, 10), torch.tensor([987.0, 251.0]), torch.randn(2, 8, 12)
    outputs = {}
    for name in ("sla", "sla_int8"):
        model.set_attention({"name": name, "ratio": 0.3, "block_q": 16, "block_k": 8})
        with torch.no_grad():
            outputs[name] = model(*given)
    with pytest.raises(UserError, match="train with sla"):
        model(*given)
    off = (outputs["sla_int8"] - outputs["sla"]).norm() / outputs["sla"].norm()
    # numbers of seven bits, in the weights of two attentions among six residual branches
    assert 1e-5 < off < 0.02
    assert trained(model.config["attention"]) == model.config["attention"] | {"name": "sla"}


def test_a_linear_branch_is_kept_in_the_networks_dtype() -> None:
    model = network().bfloat16()
    model.set_attention({"name": "sla"})
    cores = [block.self_attn.core for block in model.blocks]
    assert {weight.dtype for core in cores for weight in core.parameters()} == {torch.bfloat16}
    torch.nn.init.normal_(cores[1].proj_l.bias)
    model.set_attention({"ratio": 0.5})
    new = model.blocks[1].self_attn.core
    assert isinstance(new, SparseLinearAttention)
    assert new is not cores[1]
    assert torch.equal(new.proj_l.bias, cores[1].proj_l.bias)
    assert new.config["ratio"] == model.config["attention"]["ratio"] == 0.5


def test_sparsity_counts_the_blocks_that_are_left_out() -> None:
    attention = {"name": "sla", "ratio": 0.12, "block_q": 32, "block_k": 32}
    # 18 blocks, of which 2.16 are kept, rounded down; 577 tokens have another one
    assert sparsity(attention, 576) == pytest.approx(16 / 18)
    assert sparsity(attention, 577) == pytest.approx(17 / 19)
    assert sparsity(DENSE, 576) == 0
