import pytest
import torch
from torch import nn

from distill.muon import Muon, orthogonal
from distill.optim import Optim


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 8, 24), (2, 24, 8)])
def test_directions_keep_singular_vectors_and_make_singular_values_alike(shape: tuple[int, ...]):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    sizes = u.mT @ orthogonal(matrices) @ vh.mT
    diagonal = sizes.diagonal(dim1=-2, dim2=-1)
    # the iteration is an odd polynomial of the matrix: exact in its vectors, up to fp64 rounding
    torch.testing.assert_close(sizes, torch.diag_embed(diagonal), rtol=0, atol=1e-12)
    # five rounds of the quintic bring what is not smaller than a fiftieth of the largest to 0.68 .. 1.21
    clear = s > s.amax(-1, keepdim=True) / 50
    assert ((diagonal > 0.65) & (diagonal < 1.25))[clear].all()


def test_first_step_has_the_size_of_adamw_and_decays_the_weight():
    weight = nn.Parameter(torch.ones(32, 8))
    weight.grad = torch.randn(32, 8, generator=torch.Generator().manual_seed(1))
    Muon([weight], lr=0.1, weight_decay=0.5).step()
    moved = weight.detach() - (1 - 0.1 * 0.5)
    # 8 singular values about 1 in 256 numbers, times 0.2 sqrt(32): root mean square 0.2, as AdamW's is
    assert moved.square().mean().sqrt().item() == pytest.approx(0.1 * 0.2, rel=0.25)
    # downhill
    assert (moved * weight.grad).sum() < 0


def test_only_matrices_are_moved_by_muon():
    net = nn.Sequential(nn.Conv1d(2, 4, 3), nn.Linear(4, 4))
    optimizer = Optim(lr=0.1, matrices="muon").build(net.parameters())
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    kinds = {name: set(optimizer.state[p]) for name, p in net.named_parameters()}
    assert kinds.pop("1.weight") == {"momentum"}
    assert all("exp_avg" in kind for kind in kinds.values())
    optimizer.zero_grad(set_to_none=True)
    assert all(p.grad is None for p in net.parameters())


def test_matrix_without_a_gradient_stays():
    weight = nn.Parameter(torch.ones(2, 2))
    Muon([weight], lr=0.1, weight_decay=0.5).step()
    assert torch.equal(weight, torch.ones(2, 2))
