"""Networks, texts and guidance behind one velocity(x, s): all that a sampler knows of a model."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from turbodiffusion.errors import UserError
from turbodiffusion.samplers.time import to_timestep

# latent rows, and columns, to a token in every Wan model
PATCH = 2


class Network(Protocol):
    """WanModel's forward, or a wrapper that fetches the weights first."""

    def __call__(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor,
        *,
        condition: Tensor | None,
        clip: Tensor | None,
    ) -> Tensor:
        """Velocity (B, C, T, H, W)."""


@dataclass(frozen=True, kw_only=True)
class Denoiser:
    """x (B, C, T, H, W), s () -> velocity like x.  Tensors given here have B rows, or one for all.

    In training s may be one time a sample, (B,), and carry a tangent like x: with neither experts nor a first
    frame.

    guidance g: v = v_negative + g (v_context - v_negative); 1 runs the context alone and needs no negative.
    network_low takes over from network while s < boundary (Wan2.2's experts), with a guidance of its own.
    first_frame: the clean latent frame a video starts with (TI2V).  The network sees it in place of x's own,
    at timestep 0, and the velocity returned there leads straight to it, so samplers need not know of it.
    """

    network: Network
    context: Tensor  # (B, S, E)
    negative: Tensor | None = None  # (B, S, E)
    guidance: float = 1.0
    network_low: Network | None = None
    guidance_low: float | None = None  # None: the same
    boundary: float | None = None
    condition: Tensor | None = None  # (B, channels, T, H, W)
    clip: Tensor | None = None  # (B, tokens, width)
    first_frame: Tensor | None = None  # (B, C, 1, H, W)
    timesteps: str = "float"  # a rule of time.TIMESTEP_RULES

    def __post_init__(self):
        if (self.network_low is None) != (self.boundary is None):
            raise UserError("give a low-noise expert and the boundary below which it takes over together")
        for guidance in (self.guidance, None if self.network_low is None else self.guidance_low):
            if guidance not in (None, 1) and self.negative is None:
                raise UserError(
                    f"guidance={guidance} needs a negative context: encode the negative prompt (it may be "
                    "empty), or pass guidance=1"
                )

    def __call__(self, x: Tensor, s: Tensor) -> Tensor:
        """Guided velocity at time s, in x's dtype."""
        if self.first_frame is None:
            return self._guided(x, s)
        clean = self.first_frame.to(x).expand_as(x[:, :, :1])
        rest = self._guided(torch.cat([clean, x[:, :, 1:]], dim=2), s)[:, :, 1:]
        return torch.cat([(x[:, :, :1] - clean) / s.item(), rest], dim=2)

    def _guided(self, x: Tensor, s: Tensor) -> Tensor:
        network, guidance = self._expert(s)
        timesteps = self._timesteps(x, s)
        positive = self._run(network, x, timesteps, self.context)
        if guidance == 1:
            return positive
        return self._run(network, x, timesteps, self.negative).lerp(positive, guidance)

    def _expert(self, s: Tensor) -> tuple[Network, float]:
        if self.network_low is None or s >= self.boundary:
            return self.network, self.guidance
        return self.network_low, self.guidance if self.guidance_low is None else self.guidance_low

    def _timesteps(self, x: Tensor, s: Tensor) -> Tensor:
        """(B,); or (B, L) where a first frame is given, whose tokens are at 0."""
        # a GPU fetches it when it comes to it, and nobody waits
        timestep = to_timestep(s, self.timesteps).to(x, non_blocking=True)
        if self.first_frame is None:
            return timestep.expand(len(x))
        batch, _, frames, height, width = x.shape
        per_frame = (height // PATCH) * (width // PATCH)
        tokens = timestep.repeat(batch, frames * per_frame)
        tokens[:, :per_frame] = 0
        return tokens

    def _run(self, network: Network, x: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        """One forward, in x's dtype."""

        def rows(tensor: Tensor | None) -> Tensor | None:
            # itself, where it can be: a network may know it again
            if tensor is None or len(tensor) == len(x):
                return tensor
            return tensor.expand(len(x), *tensor.shape[1:])

        condition, clip = rows(self.condition), rows(self.clip)
        return network(x, timesteps, rows(text), condition=condition, clip=clip).to(x.dtype)


def experts_used(times: Tensor, boundary: float) -> tuple[str, ...]:
    """Which of ("high", "low") a schedule (N + 1,) evaluates; its last time is only arrived at."""
    high = times[:-1] >= boundary
    return tuple(name for name, used in (("high", high.any()), ("low", (~high).any())) if used)
