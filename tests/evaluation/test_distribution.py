"""Distances between sets of clips, against closed forms and scipy."""

import math

import pytest
import torch
from torch import Tensor

from evaluation.distribution import COARSE, FINE, features, frechet_distance, spread
from turbodiffusion.errors import UserError


def sample(mean: Tensor, covariance: Tensor, *, count: int = 200) -> Tensor:
    """Numbers (count, D), fp64, whose own mean and covariance are exactly those asked for."""
    x = torch.randn(count, len(mean), dtype=torch.float64)
    x = x - x.mean(0)
    white = x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x / (count - 1))).T
    return mean + white @ torch.linalg.cholesky(covariance).T


def test_gaussians_with_commuting_covariances_have_a_closed_form() -> None:
    basis = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    scales = torch.rand(2, 6, dtype=torch.float64) + 0.1
    means = torch.randn(2, 6, dtype=torch.float64)
    one, other = (sample(m, basis @ s.diag() @ basis.T) for m, s in zip(means, scales, strict=True))
    # |m1 - m2|^2 + sum of (s1 - s2)^2, s the deviations along the common axes
    exact = (means[0] - means[1]).square().sum() + (scales.sqrt()[0] - scales.sqrt()[1]).square().sum()
    # fp64 through one whitening
    assert frechet_distance(one, other) == pytest.approx(float(exact), rel=1e-10)


def test_agrees_with_scipys_matrix_root() -> None:
    sqrtm = pytest.importorskip("scipy.linalg").sqrtm
    one, other = (
        torch.randn(90, 40).double(),
        (1.5 * torch.randn(70, 40) @ torch.randn(40, 40) + 0.3).double(),
    )
    covariances = one.T.cov().numpy(), other.T.cov().numpy()
    trace = covariances[0] + covariances[1] - 2 * sqrtm(covariances[0] @ covariances[1]).real
    exact = float((one.mean(0) - other.mean(0)).square().sum()) + trace.trace()
    # the root of a product of condition 1e6 or so loses half of fp64's digits
    assert frechet_distance(one.float(), other.float()) == pytest.approx(exact, rel=1e-5)


def test_a_set_is_at_no_distance_from_itself() -> None:
    x = 10 * torch.randn(100, 30)
    # in fp64, relative to the traces that cancel (3000)
    assert abs(frechet_distance(x, x[torch.randperm(100)])) < 1e-9


def test_distance_is_squared_in_the_units_of_the_features() -> None:
    one, other = torch.randn(80, 8), torch.randn(80, 8) + 1
    assert frechet_distance(3 * one, 3 * other) == pytest.approx(9 * frechet_distance(one, other), rel=1e-5)


@pytest.mark.parametrize("shapes", [((8, 8), (9, 8)), ((9, 8), (9, 7)), ((9,), (9,))])
def test_too_few_samples_and_other_widths_are_refused(
    shapes: tuple[tuple[int, ...], tuple[int, ...]],
) -> None:
    with pytest.raises(UserError):
        frechet_distance(*(torch.randn(shape) for shape in shapes))


@pytest.mark.parametrize("grid", [COARSE, FINE])
def test_features_are_means_and_deviations_over_cells(grid: tuple[int, int, int]) -> None:
    x = torch.randn(2, 16, 9, 16, 16)
    mean, deviation = features(x, grid).chunk(2, dim=1)
    cells = [9 // grid[0], 16 // grid[1], 16 // grid[2]]
    first = x[:, :, : cells[0], : cells[1], : cells[2]].flatten(2)
    one = math.prod(grid)
    # fp32 over 48 numbers and more of size 1; squares of the deviations lose some digits to the means
    torch.testing.assert_close(mean[:, ::one], first.mean(-1), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(deviation[:, ::one], first.std(-1, correction=0), atol=1e-5, rtol=1e-5)
    assert torch.equal(features(x[1:], grid), features(x, grid)[1:])


def test_identical_clips_have_no_spread() -> None:
    assert spread(torch.randn(3, 1, 50).expand(3, 4, 50)) == 0


def test_spread_is_the_mean_distance_within_prompts() -> None:
    # corners of a 3-4-5 triangle, then two far away from it and 7 apart from a third
    triangle = torch.tensor([[0.0, 0.0], [3.0, 0.0], [3.0, 4.0]])
    line = torch.tensor([[100.0, 0.0], [107.0, 0.0], [114.0, 0.0]])
    assert spread(torch.stack((triangle, line))) == pytest.approx((12 / 3 + 28 / 3) / 2)


def test_fewer_samples_than_features_by_definition() -> None:
    one, other = torch.randn(2, 3, 10, dtype=torch.float64)
    values = torch.linalg.eigvals(one.T.cov() @ other.T.cov()).real.clamp(min=0)
    apart = (one.mean(0) - other.mean(0)).square().sum() + one.T.cov().trace() + other.T.cov().trace()
    wanted = float(apart - 2 * values.sqrt().sum())
    # eigenvalues that should be 0 are about 1e-16, and eight roots of them are summed
    assert frechet_distance(one, other, may_be_singular=True) == pytest.approx(wanted, abs=1e-6)
    with pytest.raises(UserError, match=r"1 samples of 10 features have no .* more than 1"):
        frechet_distance(one[:1], other, may_be_singular=True)
