"""AMT-S (arXiv:2304.09790): the frame between two.  Parameters are named as in the published file.

Flows lead from the middle to both frames: (B, 4, H, W), the first frame's first, x before y.
"""

from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaluation.backbones.correlation import LEVELS, Encoder, grid, look_up, pyramid, sampled
from evaluation.backbones.weights import filled, named, read_state

STEP = 16  # sides are multiples of it
_WIDTHS = (20, 32, 44, 56)  # of the context, from half to a 16th of the size
_SIDE, _RADIUS, _GUESSES = 20, 3, 3
_LEAK = 0.1


class Bottleneck(nn.Module):
    """(B, channels, H, W) -> (B, out, H / stride, W / stride)."""

    def __init__(self, channels: int, out: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out // 4, 1)
        self.conv2 = nn.Conv2d(out // 4, out // 4, 3, stride, 1)
        self.conv3 = nn.Conv2d(out // 4, out, 1)
        shorter = (nn.Conv2d(channels, out, 1, stride), nn.InstanceNorm2d(out)) if stride > 1 else ()
        self.downsample = nn.Sequential(*shorter)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for conv in (self.conv1, self.conv2, self.conv3):
            y = F.instance_norm(conv(y)).relu()
        return (y + self.downsample(x)).relu()


class Context(nn.Module):
    """Frames (B, 3, H, W) -> features of four sizes, the largest first."""

    def __init__(self):
        super().__init__()
        for i, (channels, out) in enumerate(pairwise((3, *_WIDTHS)), 1):
            self.add_module(f"pyramid{i}", nn.Sequential(_conv(channels, out, 2), _conv(out, out)))

    def forward(self, x: Tensor) -> list[Tensor]:
        found = [x]
        for stage in self.children():
            found.append(stage(found[-1]))
        return found[1:]


class SideBlock(nn.Module):
    """A residual block whose last channels are convolved twice more (arXiv:2205.14620)."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1, self.conv3 = _conv(width, width), _conv(width, width)
        self.conv2, self.conv4 = _conv(_SIDE, _SIDE), _conv(_SIDE, _SIDE)
        self.conv5, self.prelu = nn.Conv2d(width, width, 3, padding=1), nn.PReLU(width)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for conv, side in ((self.conv1, self.conv2), (self.conv3, self.conv4)):
            y = conv(y)
            y = torch.cat((y[:, :-_SIDE], side(y[:, -_SIDE:])), dim=1)
        return self.prelu(x + self.conv5(y))


def _decoder(channels: int, width: int, out: int) -> nn.Sequential:
    """(B, channels, H, W) -> (B, out, 2 H, 2 W)."""
    enlarge = nn.ConvTranspose2d(width, out, 4, 2, 1)
    return named(convblock=nn.Sequential(_conv(channels, width), SideBlock(width), enlarge))


class Update(nn.Module):
    """Mends features and flows, `factor` times larger than maps of likeness, by what those say."""

    def __init__(self, width: int, factor: int):
        super().__init__()
        self.factor = factor
        self.convc1 = nn.Conv2d(2 * LEVELS * (2 * _RADIUS + 1) ** 2, 64, 1)
        self.convf1, self.convf2 = nn.Conv2d(4, 40, 7, padding=3), nn.Conv2d(40, 20, 3, padding=1)
        self.conv = nn.Conv2d(84, 68, 3, padding=1)
        self.gru, self.feat_head = _two_convs(68 + 4 + width, 76), _two_convs(76, width)
        self.flow_head = _two_convs(76, 4)

    def forward(self, state: Tensor, flows: Tensor, levels: tuple[list[Tensor], ...]) -> tuple[Tensor, ...]:
        small = _scaled(flows, 1 / self.factor) / self.factor
        # twice the way from the middle leads from frame to frame
        ways = (small[:, 2:], small[:, :2])
        alike = [look_up(each, grid(way) + 2 * way, _RADIUS) for each, way in zip(levels, ways, strict=True)]
        seen = _leaky(self.convc1(torch.cat(alike, dim=1)))
        moved = _leaky(self.convf2(_leaky(self.convf1(small))))
        seen = _leaky(self.conv(torch.cat((seen, moved), dim=1)))
        new = self.gru(torch.cat((seen, small, _scaled(state, 1 / self.factor)), dim=1))
        steps = _scaled(self.feat_head(new), self.factor), _scaled(self.flow_head(new), self.factor)
        return state + steps[0], flows + self.factor * steps[1]


class Amt(nn.Module):
    """Frames (B, 3, H, W) in [0, 1], H and W multiples of 16, twice -> the frame between, likewise."""

    def __init__(self):
        super().__init__()
        self.feat_encoder = Encoder(Bottleneck, nn.InstanceNorm2d, widths=(32, 64, 96), out=84)
        self.encoder = Context()
        a, b, c, d = _WIDTHS
        self.decoder4 = _decoder(2 * d + 1, 2 * d, 4 + c)
        self.decoder3, self.update4 = _decoder(3 * c + 4, 3 * c, 4 + b), Update(c, 1)
        self.decoder2, self.update3 = _decoder(3 * b + 4, 3 * b, 4 + a), Update(b, 2)
        self.decoder1, self.update2 = _decoder(3 * a + 4, 3 * a, 8 * _GUESSES), Update(a, 4)
        last = nn.Conv2d(6 * _GUESSES, 3, 3, padding=1)
        self.comb_block = nn.Sequential(*_conv(3 * _GUESSES, 6 * _GUESSES), last)

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        mean = torch.cat((one, other), dim=-1).mean(dim=(1, 2, 3), keepdim=True)
        frames = torch.cat((one - mean, other - mean))
        first, second = self.feat_encoder(frames).chunk(2)
        levels = pyramid(first, second), pyramid(second, first)
        *finer, coarsest = self.encoder(frames)
        both = torch.cat(coarsest.chunk(2), dim=1)
        out = self.decoder4(torch.cat((both, torch.full_like(both[:, :1], 0.5)), dim=1))
        flows, state = out[:, :4], out[:, 4:]
        stages = ((self.update4, self.decoder3), (self.update3, self.decoder2), (self.update2, self.decoder1))
        for (update, decoder), context in zip(stages, reversed(finer), strict=True):
            state, flows = update(state, flows, levels)
            warped = [_warped(x, flow) for x, flow in zip(context.chunk(2), flows.split(2, 1), strict=True)]
            out = decoder(torch.cat((state, *warped, flows), dim=1))
            coarse, state = 2 * _scaled(flows, 2), out[:, 4:]
            flows = coarse + out[:, :4]
        return self._painted(frames, coarse, out, mean)

    def _painted(self, frames: Tensor, coarse: Tensor, out: Tensor, mean: Tensor) -> Tensor:
        """The mean of guesses, each of flows, a mask and a residual of its own, touched up."""
        n, guesses = _GUESSES, []
        *steps, masks, residuals = out.split((2 * n, 2 * n, n, 3 * n), dim=1)
        parts = (each.chunk(n, dim=1) for each in (*steps, masks, residuals))
        for first, second, mask, residual in zip(*parts, strict=True):
            a = _warped(frames[: len(mean)], coarse[:, :2] + first)
            b = _warped(frames[len(mean) :], coarse[:, 2:] + second)
            guesses.append(mask.sigmoid() * a + (1 - mask.sigmoid()) * b + mean + residual)
        return torch.stack(guesses).mean(dim=0) + self.comb_block(torch.cat(guesses, dim=1))


def _conv(channels: int, out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, out, 3, stride, 1), nn.PReLU(out))


def _two_convs(channels: int, out: int) -> nn.Sequential:
    first, second = nn.Conv2d(channels, 76, 3, padding=1), nn.Conv2d(76, out, 3, padding=1)
    return nn.Sequential(first, nn.LeakyReLU(_LEAK), second)


def _leaky(x: Tensor) -> Tensor:
    return F.leaky_relu(x, _LEAK)


def _scaled(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1 else F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)


def _warped(x: Tensor, flow: Tensor) -> Tensor:
    return sampled(x, (grid(flow) + flow).permute(0, 2, 3, 1), "border")


@lru_cache
def load_amt(path: Path, device: torch.device) -> Amt:
    """From the published file."""
    return filled(Amt, read_state(path), path).to(device)
