"""Which of the small world's motions a trajectory is: the model curve that explains it best."""

from functools import lru_cache

import torch
from torch import Tensor

from turbodiffusion.small_world.clips import FRAMES
from turbodiffusion.small_world.split import MOTIONS

# weight of the logarithm of size against px, about a sprite's half width: a scaling then moves its rim as far
_SIZE_WEIGHT = 30.0
# least amplitudes that count as motion, half of the least in the world's clips; growth times weight
_LEAST_TRAVEL, _LEAST_GROWTH, _LEAST_RADIUS, _LEAST_HOP = 20.0, 10.0, 8.0, 12.0
# a residual of so many px (root mean square over x, y and size) leaves a confidence of one half
_TOLERANCE = 4.0


@lru_cache
def _curves() -> tuple[Tensor, Tensor, Tensor]:
    """Candidate motions: a signed multiple of one unit atom, or any mix of two (a circle's phase).

    Returns motion (K,) int64; atoms (K, 2, 3 F), unit norm or zero; least (K,), a trajectory's least norm.
    """
    u = torch.linspace(0, 1, FRAMES)
    zero = torch.zeros_like(u)
    motion, atoms, least = [MOTIONS.index("still")], [torch.zeros(2, 3, FRAMES)], [0.0]

    def add(
        name: str, first: tuple[Tensor, ...], amplitude: float, second: tuple[Tensor, ...] = (zero,) * 3
    ) -> None:
        pair = torch.stack((torch.stack(first), torch.stack(second)))
        pair = pair - pair.mean(dim=-1, keepdim=True)
        norm = pair.flatten(1).norm(dim=1)
        motion.append(MOTIONS.index(name))
        atoms.append(pair / norm.clamp(min=1e-6)[:, None, None])
        least.append(amplitude * float(norm[0]))

    add("left", (-u, zero, zero), _LEAST_TRAVEL)
    add("right", (u, zero, zero), _LEAST_TRAVEL)
    add("up", (zero, -u, zero), _LEAST_TRAVEL)
    add("down", (zero, u, zero), _LEAST_TRAVEL)
    add("grow", (zero, zero, u), _LEAST_GROWTH)
    add("shrink", (zero, zero, -u), _LEAST_GROWTH)
    for turns in (0.8, 0.9, 1.0, 1.1, 1.2):
        angle = 2 * torch.pi * turns * u
        for way in (1, -1):
            sine, cosine = angle.sin(), angle.cos()
            add("circle", (cosine, way * sine, zero), _LEAST_RADIUS, (-sine, way * cosine, zero))
    for hops in torch.arange(1.6, 3.5, 0.1).tolist():
        for start in torch.arange(0, 1, 1 / 16).tolist():
            hop = (start + hops * u) % 1
            add("bounce", (zero, -4 * hop * (1 - hop), zero), _LEAST_HOP)
    return torch.tensor(motion), torch.stack(atoms).flatten(2), torch.tensor(least)


def classify(centre: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Motion (B,) and confidence (B,) in [0, 1] of trajectories: centre (B, F, 2) px, size (B, F) px.

    Of the curves with an amplitude that counts, the one with the least residual; standing still has no curve.
    """
    motion, atoms, least = (part.to(size.device) for part in _curves())
    path = torch.cat((centre, _SIZE_WEIGHT * size.clamp(min=1).log()[..., None]), dim=-1).mT
    # one frame's slip is not motion
    middle = path.unfold(-1, 3, 1).median(dim=-1).values
    path = torch.cat((path[..., :1], middle, path[..., -1:]), dim=-1)
    path = (path - path.mean(dim=-1, keepdim=True)).flatten(1)

    share = torch.einsum("bd,kad->bka", path, atoms)
    explained = share.square().sum(dim=-1)
    is_mix = atoms[:, 1].any(dim=-1)
    is_possible = (explained.sqrt() >= least) & (is_mix | (share[..., 0] >= 0))
    residual = path.square().sum(dim=-1, keepdim=True) - explained
    residual, best = residual.masked_fill(~is_possible, torch.inf).min(dim=-1)
    distance = (residual.clamp(min=0) / path.shape[1]).sqrt()
    return motion[best], 1 / (1 + (distance / _TOLERANCE) ** 2)
