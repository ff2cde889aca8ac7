"""Flow matching: a network learns the velocity from data to noise (arXiv:2210.02747, arXiv:2403.03206).

Shapes: B batch, C latent channels, T h w latent frames, height, width, S text tokens.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distill.objective import OneNetwork, Watch
from distill.times import Times
from turbodiffusion.models.text import TextEncoder
from turbodiffusion.models.tokenizers import EOS, PAD
from turbodiffusion.models.wan import WanModel

TIME_SCALE = 1000.0  # the network counts time from 0 to 1000
MASK_CHANNELS = 4
Velocity = Callable[..., Tensor]  # (x, 1000 s, what else it is given)


@dataclass(frozen=True)
class Captioned:
    """Latents (B, C, T, h, w), what their first frame alone encodes to (alike), and caption ids (B, S)."""

    latents: Tensor
    image: Tensor
    tokens: Tensor


def flow_matching_loss(velocity: Velocity, x0: Tensor, noise: Tensor, s: Tensor, *given: Tensor) -> Tensor:
    """Mean squared error of velocity(x, 1000 s, *given) at x = (1 - s) x0 + s noise, against noise - x0.

    x0, noise (B, C, T, h, w), s (B,).  Returns (B,) fp32.
    """
    x = torch.lerp(x0, noise, s.to(x0.dtype).view(-1, 1, 1, 1, 1))
    return (velocity(x, TIME_SCALE * s, *given).float() - (noise - x0)).square().flatten(1).mean(1)


class TextToVelocity(nn.Module):
    """A text encoder and a network that train as one: (x, 1000 s, caption ids, condition) -> velocity."""

    def __init__(self, network: WanModel, text_encoder: TextEncoder, *, freeze_text: bool):
        super().__init__()
        self.network = network
        self.text_encoder = text_encoder.requires_grad_(not freeze_text)
        self.is_text_frozen = freeze_text

    @staticmethod
    def is_fp32(name: str) -> bool:
        """Whether the parameter stays fp32 in mixed precision."""
        part, _, rest = name.partition(".")
        return part == "network" and WanModel.is_fp32(rest)

    def forward(self, x: Tensor, timesteps: Tensor, tokens: Tensor, condition: Tensor) -> Tensor:
        return self.network(x, timesteps, self.context(tokens), condition=condition)

    def context(self, tokens: Tensor) -> Tensor:
        """What the network sees of caption ids (B, S): (B, length, E)."""
        return self.text_encoder.encode(tokens, tokens != PAD)


@dataclass(frozen=True)
class FlowMatching(OneNetwork):
    """Trains the role "student" on captioned latents.

    A share text_drop of captions is emptied, for classifier-free guidance; a share image_share of clips shows
    its first frame through the mask and image channels, which are zero otherwise.
    """

    student: nn.Module  # (x, 1000 s, caption ids, condition) -> velocity
    times: Times
    text_drop: float = 0.1
    image_share: float = 0.3

    role = "student"

    def losses(
        self, batch: Captioned, step: int, rng: torch.Generator, watch: Watch
    ) -> Iterator[tuple[str, Tensor]]:
        x0 = batch.latents.float()
        count = len(x0)
        noise = torch.randn(x0.shape, generator=rng, device=x0.device)
        s = self.times(count, rng)
        is_empty, has_image = (
            torch.rand(count, generator=rng, device=x0.device) < share
            for share in (self.text_drop, self.image_share)
        )
        tokens = torch.where(is_empty.unsqueeze(1), empty_caption(batch.tokens), batch.tokens)
        given = tokens, condition(batch.image, has_image)
        loss = flow_matching_loss(self.student, x0, noise, s, *given)
        watch("flow/velocity", loss, s)
        yield "velocity", loss


def condition(image: Tensor, has_image: Tensor) -> Tensor:
    """Encoded "first frame, grey ..." (B, C, T, h, w) -> mask and image channels (B, 4 + C, T, h, w).

    All zero where has_image (B,) is not set.  The mask is 1 on the first latent frame, which is known.
    """
    b, _, t, h, w = image.shape
    mask = image.new_zeros(b, MASK_CHANNELS, t, h, w)
    mask[:, :, 0] = 1
    return torch.cat((mask, image), dim=1) * has_image.view(b, 1, 1, 1, 1)


def empty_caption(tokens: Tensor) -> Tensor:
    """Ids of the empty text, in the shape of tokens (B, S)."""
    empty = torch.full_like(tokens, PAD)
    empty[:, 0] = EOS
    return empty
