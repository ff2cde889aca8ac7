import pytest
import torch
from torch.autograd import forward_ad

from turbodiffusion.models.layers import LayerNorm, RMSNorm

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("norm", [RMSNorm, LayerNorm])
def test_norms_of_bf16_give_bf16_tangents(norm: type[torch.nn.Module], device: str) -> None:
    x, dx = torch.randn(2, 3, 8, device=device).bfloat16().unbind()
    layer = norm(8).to(device)
    with torch.no_grad(), forward_ad.dual_level():
        y, dy = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, dx)))
    assert y.dtype == dy.dtype == torch.bfloat16
    h = 1e-3
    ahead, behind = (layer.double()(x.double() + e * dx.double()) for e in (h, -h))
    # one rounding to bf16, 2^-8
    torch.testing.assert_close(dy.double(), (ahead - behind) / (2 * h), rtol=2**-8, atol=2**-8)
