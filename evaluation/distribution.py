"""Sets of clips compared: how far apart two are, and how much a prompt's clips differ.

Both look at features of latents: mean and deviation of every channel of the small world's VAE over the
cells of a grid.  The VAE was trained to reconstruct rendered clips and has seen no model's; the repository
ships no network trained on other pictures, and none would know these sprites better.  A latent is what a
sampler ends with, so nothing comes between the model and the measure, and an error that the decoder would
hide counts too.

The grids were chosen on real clips.  With half of their finest detail gone, 256 are 32 times as far from
others as equals are where cells span the picture, 4 times at 2 x 2.  A prompt's clips that differ in tint
and animation alone keep 0.30 of their spread at 4 x 4, 0.86 where cells span the picture.  The figures
belong to one VAE: compare them within a table only.
"""

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool3d

from turbodiffusion.errors import UserError

# cells in time, height and width for the distance, whose bias grows with them, and for the spread
COARSE, FINE = (3, 1, 1), (3, 4, 4)


def features(latents: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Normalised latents (B, C, T, h, w) -> (B, 2 C cells), fp32: means, then standard deviations."""
    x = latents.float()
    mean = adaptive_avg_pool3d(x, grid)
    variance = adaptive_avg_pool3d(x.square(), grid) - mean.square()
    return torch.cat((mean.flatten(1), variance.clamp(min=0).sqrt().flatten(1)), dim=1)


def frechet_distance(one: Tensor, other: Tensor, *, may_be_singular: bool = False) -> float:
    """Between Gaussians fitted to features (N, D) and (M, D), N and M above D; squared, in fp64.

    |m1 - m2|^2 + Tr(C1 + C2 - 2 (C1 C2)^1/2) (arXiv:1706.08500, equation 6), C with N - 1.  With C = R^T R
    the last trace is the sum of the singular values of R1 R2^T, which needs no root of a matrix.  It is
    biased upwards, at unit variances by about D^2 / 2N: compare it with two equal sets of the same sizes.
    Raises UserError for fewer samples, whose covariance would be singular; or for fewer than two.
    """
    if one.ndim != 2 or other.ndim != 2 or one.shape[1] != other.shape[1]:
        raise UserError(f"got features {tuple(one.shape)} and {tuple(other.shape)}; give (N, D) and (M, D)")
    if (least := min(len(one), len(other))) <= (wanted := 1 if may_be_singular else one.shape[1]):
        raise UserError(
            f"{least} samples of {one.shape[1]} features have no covariance to compare; "
            f"give more than {wanted}"
        )
    one, other = one.double(), other.double()
    roots = [torch.linalg.qr((x - x.mean(0)) / (len(x) - 1) ** 0.5, mode="r").R for x in (one, other)]
    between = (one.mean(0) - other.mean(0)).square().sum() + sum(root.square().sum() for root in roots)
    return float(between - 2 * torch.linalg.svdvals(roots[0] @ roots[1].T).sum())


def spread(features: Tensor) -> float:
    """Mean distance between two samples of a prompt, features (prompts, samples, D), samples at least 2."""
    return float(torch.stack([torch.pdist(prompt).mean() for prompt in features.double()]).mean())
