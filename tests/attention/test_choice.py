"""Which attention a network has: what is asked, what it carries, and what is lost on the way."""

import pytest
import torch

from turbodiffusion.attention import DENSE, Attention, SparseLinearAttention, chosen
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
    ],
)
def test_what_is_not_asked_is_carried_or_the_default(
    carried: Attention, asked: Attention, wanted: Attention
) -> None:
    assert chosen(carried, asked) == wanted


@pytest.mark.parametrize(
    ("carried", "asked", "said"),
    [
        (DENSE, {"name": "foo"}, "attention=foo: choose dense or sla"),
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
