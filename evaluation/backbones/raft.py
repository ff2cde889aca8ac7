"""RAFT (arXiv:2003.12039): how far every pixel moves between two frames.  Named as in the published files.

Shapes: B pairs, C channels, H W a frame, h w an eighth of it.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaluation.backbones.correlation import LEVELS, Encoder, grid, look_up, pyramid
from evaluation.backbones.weights import filled, named, read_state

_STEPS = 20
_RADIUS = 4
_HIDDEN = 128


class Residual(nn.Module):
    """(B, channels, H, W) -> (B, out, H / stride, W / stride)."""

    def __init__(self, channels: int, out: int, stride: int, norm: Callable[[int], nn.Module]):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, out, 3, stride, 1), norm(out)
        self.conv2, self.norm2 = nn.Conv2d(out, out, 3, 1, 1), norm(out)
        shorter = (nn.Conv2d(channels, out, 1, stride), norm(out)) if stride > 1 else ()
        self.downsample = nn.Sequential(*shorter)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(self.conv1(x)).relu()
        y = self.norm2(self.conv2(y)).relu()
        return (y + self.downsample(x)).relu()


def _encoder(norm: Callable[[int], nn.Module]) -> Encoder:
    """Frames (B, 3, H, W) in [-1, 1] -> (B, 256, h, w)."""
    return Encoder(partial(Residual, norm=norm), norm, widths=(64, 96, 128), out=256)


class MotionEncoder(nn.Module):
    """Likeness and flow -> (B, 128, h, w), the last two the flow itself."""

    def __init__(self):
        super().__init__()
        self.convc1 = nn.Conv2d(LEVELS * (2 * _RADIUS + 1) ** 2, 256, 1)
        self.convc2 = nn.Conv2d(256, 192, 3, padding=1)
        self.convf1 = nn.Conv2d(2, 128, 7, padding=3)
        self.convf2 = nn.Conv2d(128, 64, 3, padding=1)
        self.conv = nn.Conv2d(256, 126, 3, padding=1)

    def forward(self, alike: Tensor, flow: Tensor) -> Tensor:
        alike = self.convc2(self.convc1(alike).relu()).relu()
        moved = self.convf2(self.convf1(flow).relu()).relu()
        return torch.cat((self.conv(torch.cat((alike, moved), dim=1)).relu(), flow), dim=1)


class SeparableGRU(nn.Module):
    """A gated step along rows, then one along columns."""

    def __init__(self, inputs: int):
        super().__init__()
        for i, kernel in ((1, (1, 5)), (2, (5, 1))):
            for gate in "zrq":
                conv = nn.Conv2d(_HIDDEN + inputs, _HIDDEN, kernel, padding="same")
                self.add_module(f"conv{gate}{i}", conv)

    def forward(self, state: Tensor, x: Tensor) -> Tensor:
        for i in (1, 2):
            z, r, q = (self.get_submodule(f"conv{gate}{i}") for gate in "zrq")
            both = torch.cat((state, x), dim=1)
            update = z(both).sigmoid()
            new = q(torch.cat((r(both).sigmoid() * state, x), dim=1)).tanh()
            state = (1 - update) * state + update * new
        return state


class Update(nn.Module):
    """What is done 20 times, and `mask`, which says how its result is enlarged."""

    def __init__(self):
        super().__init__()
        self.encoder, self.gru = MotionEncoder(), SeparableGRU(256)
        seen, step = nn.Conv2d(_HIDDEN, 256, 3, padding=1), nn.Conv2d(256, 2, 3, padding=1)
        self.flow_head = named(conv1=seen, relu=nn.ReLU(), conv2=step)
        self.mask = nn.Sequential(nn.Conv2d(_HIDDEN, 256, 3, padding=1), nn.ReLU(), nn.Conv2d(256, 64 * 9, 1))

    def forward(self, state: Tensor, context: Tensor, alike: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
        state = self.gru(state, torch.cat((context, self.encoder(alike, flow)), dim=1))
        return state, flow + self.flow_head(state)


class Raft(nn.Module):
    """Frames (B, 3, H, W) in [0, 255], H and W multiples of 8, twice -> flow (B, 2, H, W) in pixels."""

    def __init__(self):
        super().__init__()
        self.fnet, self.cnet = _encoder(nn.InstanceNorm2d), _encoder(nn.BatchNorm2d)
        self.update_block = Update()

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        frames = torch.cat((one, other)) / 127.5 - 1
        levels = pyramid(*self.fnet(frames).chunk(2))
        state, context = self.cnet(frames[: len(one)]).chunk(2, dim=1)
        state, context = state.tanh(), context.relu()
        flow = torch.zeros_like(state[:, :2])
        for _ in range(_STEPS):
            alike = look_up(levels, grid(flow) + flow, _RADIUS)
            state, flow = self.update_block(state, context, alike, flow)
        return _enlarged(flow, 0.25 * self.update_block.mask(state))


def _enlarged(flow: Tensor, mask: Tensor) -> Tensor:
    """Each pixel's flow is a mean of 3 x 3 neighbours' at an eighth, weighted by a mask (B, 9 8 8, h, w)."""
    batch, _, height, width = flow.shape
    weight = mask.view(batch, 1, 9, 8, 8, height, width).softmax(dim=2)
    near = F.unfold(8 * flow, 3, padding=1).view(batch, 2, 9, 1, 1, height, width)
    return (weight * near).sum(dim=2).permute(0, 1, 4, 2, 5, 3).reshape(batch, 2, 8 * height, 8 * width)


@lru_cache
def load_raft(path: Path, device: torch.device) -> Raft:
    """From a published file, in which shortcuts' norms stand twice."""
    state = {name: x for name, x in read_state(path).items() if ".norm3." not in name}
    return filled(Raft, state, path).to(device)
