import pytest
import torch

from distill.widening import widen
from turbodiffusion.errors import UserError
from turbodiffusion.models.wan import WanModel


def build(**sizes: int) -> WanModel:
    table = {"dim": 24, "ffn_dim": 16, "heads": 2, "layers": 2, "in_channels": 4, "out_channels": 4}
    network = WanModel(**table | {"text_dim": 8, "text_length": 6} | sizes).double()
    # a new network's head is zero, and would hide every difference
    torch.nn.init.normal_(network.head.head.weight)
    return network


@torch.no_grad()
def test_wider_network_computes_what_the_narrow_one_does():
    narrow, wide = build(), build(ffn_dim=40)
    widen(wide, narrow)
    given = torch.randn(1, 4, 2, 4, 4).double(), torch.tensor([500.0]), torch.randn(1, 6, 8).double()
    # fp64, but for the fp32 islands of time and head
    torch.testing.assert_close(wide(*given), narrow(*given), rtol=1e-5, atol=1e-6)
    # and its new features are ready to learn: they differ, and nothing listens to them yet
    assert wide.blocks[0].ffn[0].weight[16:].std() > 0
    assert not wide.blocks[0].ffn[2].weight[:, 16:].any()


def test_equal_networks_are_copied():
    narrow, same = build(), build()
    widen(same, narrow)
    for ours, theirs in zip(same.parameters(), narrow.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("sizes", "named"), [({"dim": 48}, "dim is 24, not 48"), ({"ffn_dim": 8}, "ffn_dim")]
)
def test_other_differences_are_refused(sizes: dict[str, int], named: str):
    with pytest.raises(UserError, match=named):
        widen(build(**sizes), build())
