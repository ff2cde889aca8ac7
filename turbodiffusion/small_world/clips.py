"""Scenes of the small world and their rendering: one sprite, one motion, one background, 4 s."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from turbodiffusion.small_world.split import COLORS, MOTIONS, triples
from turbodiffusion.small_world.sprites import PHASES, SIDE, Sprites

FRAMES = 33
FPS = 8
PIXELS = 128
MARGIN = 2.0
TINT = 0.03

# sRGB in [0, 1], in the order of COLORS; duller than the sprites, so that each sprite stands out on each
_RGB = (
    (0.70, 0.16, 0.18),
    (0.90, 0.50, 0.16),
    (0.94, 0.84, 0.36),
    (0.28, 0.56, 0.24),
    (0.14, 0.62, 0.66),
    (0.20, 0.32, 0.74),
    (0.44, 0.22, 0.58),
    (0.94, 0.62, 0.76),
)
_DIRECTIONS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}


@dataclass
class Scenes:
    """B scenes on the CPU.  All but the first three and `animation` are draws that a caption does not name.

    subject, motion, background: (B,) int64.  size: (B,) px, the sprite's canvas halfway through the clip.
    extent: (B,) in [0, 1], how far the motion goes.  tempo: (B,) in [0, 1], how often it bounces.
    turn: (B,) in [0, 1), where a circle or bounce begins.  clockwise: (B,) bool.
    animation: (B,) int64, the sprite's first phase.  place: (B, 2) in [0, 1], x and y in the room left.
    tint: (B, 3) added to the background's RGB, which is in [0, 1].
    """

    subject: Tensor
    motion: Tensor
    background: Tensor
    size: Tensor
    extent: Tensor
    tempo: Tensor
    turn: Tensor
    clockwise: Tensor
    animation: Tensor
    place: Tensor
    tint: Tensor

    def __len__(self) -> int:
        return len(self.subject)

    def __getitem__(self, index: slice | Tensor) -> "Scenes":
        """Some of the scenes, by slice, mask or index tensor."""
        return Scenes(*(getattr(self, field.name)[index] for field in fields(self)))

    def to(self, device: torch.device | str) -> "Scenes":
        """The same scenes on another device."""
        return Scenes(*(getattr(self, field.name).to(device) for field in fields(self)))


def draw_scenes(count: int, generator: torch.Generator, split: str = "train") -> Scenes:
    """Scenes whose triples are uniform over the split's; a CPU generator's state decides them wholly."""
    allowed = triples(split)
    chosen = allowed[torch.randint(len(allowed), (count,), generator=generator)]
    draws = torch.rand((count, 11), generator=generator)
    return Scenes(
        subject=chosen[:, 0],
        motion=chosen[:, 1],
        background=chosen[:, 2],
        size=44 + 20 * draws[:, 0],
        extent=draws[:, 1],
        tempo=draws[:, 2],
        turn=draws[:, 3],
        clockwise=draws[:, 4] < 0.5,
        animation=(draws[:, 5] * PHASES).long(),
        place=draws[:, 6:8],
        tint=TINT * (2 * draws[:, 8:11] - 1),
    )


def trajectories(scenes: Scenes) -> tuple[Tensor, Tensor]:
    """Canvas centre (B, F, 2), x and y in px, and canvas side (B, F) in px, of every frame.

    Travel 40 to 60 px, growth 1.8 to 2.25 fold, a circle of radius 16 to 24 px, 2 to 3 bounces of 24 to 40.
    """
    u = torch.linspace(0, 1, FRAMES, device=scenes.size.device)
    extent, turn = scenes.extent[:, None], scenes.turn[:, None]
    ways = torch.tensor([_DIRECTIONS.get(name, (0.0, 0.0)) for name in MOTIONS], device=u.device)
    travel = ((40 + 20 * extent) * (u - 0.5))[..., None] * ways[scenes.motion][:, None]

    angle = 2 * torch.pi * (turn + u * torch.where(scenes.clockwise, 1, -1)[:, None])
    circle = (16 + 8 * extent)[..., None] * torch.stack((angle.cos(), angle.sin()), dim=-1)
    hop = (turn + (2 + scenes.tempo[:, None]) * u) % 1
    height = -(24 + 16 * extent) * 4 * hop * (1 - hop)
    bounce = torch.stack((torch.zeros_like(height), height), dim=-1)

    is_motion = {name: (scenes.motion == i)[:, None] for i, name in enumerate(MOTIONS)}
    offset = travel + is_motion["circle"][..., None] * circle + is_motion["bounce"][..., None] * bounce
    zoom = is_motion["grow"].float() - is_motion["shrink"].float()
    size = scenes.size[:, None] * (1.35 + 0.15 * extent) ** (zoom * (2 * u - 1))

    low = (offset - size[..., None] / 2).amin(dim=1)
    high = (offset + size[..., None] / 2).amax(dim=1)
    origin = torch.lerp(MARGIN - low, PIXELS - MARGIN - high, scenes.place)
    return offset + origin[:, None], size


def background_rows(background: Tensor, tint: Tensor) -> Tensor:
    """Colour (B, 3, 128), in [0, 1], of every pixel row of backgrounds (B,) with tints (B, 3).

    The last half of the backgrounds run from 40 % white at the top down to half the colour at the bottom.
    """
    rgb = torch.tensor(_RGB, device=tint.device)[background % len(COLORS)][..., None]
    gradient = torch.lerp(0.4 + 0.6 * rgb, 0.5 * rgb, torch.linspace(0, 1, PIXELS, device=rgb.device))
    rows = torch.where((background < len(COLORS))[:, None, None], rgb, gradient)
    return (rows + tint[..., None]).clamp(0, 1)


def area_weights(start: Tensor, step: Tensor, cells: int, texels: int) -> Tensor:
    """Weights (N, cells, texels) that resample one axis; cell j starts at start + step * j.

    start, step: (N,), in texels.  A cell averages what it covers, one texel at least: antialiased when
    shrinking, linear interpolation when not.  Rows sum to 1 inside the axis and fade to 0 outside.
    """
    middle = start[:, None] + step[:, None] * (torch.arange(cells, device=start.device) + 0.5)
    width = step.clamp(min=1)[:, None]
    edges = torch.arange(texels + 1, device=start.device)
    covered = (edges - (middle - width / 2)[..., None]).clamp(min=0).minimum(width[..., None])
    return covered.diff(dim=-1) / width[..., None]


def render(scenes: Scenes, sprites: Sprites) -> Tensor:
    """Frames (B, 3, 33, 128, 128) fp32 in [-1, 1], on the sprites' device."""
    device = sprites.rgba.device
    # 30 MB a clip while it works: a GPU wants more at once, a CPU pays page faults for it
    chunk = 1 if device.type == "cpu" else 16
    frames = torch.empty((len(scenes), 3, FRAMES, PIXELS, PIXELS), device=device)
    for start in range(0, len(scenes), chunk):
        part = slice(start, start + chunk)
        _render(scenes[part].to(device), sprites, frames[part])
    return frames


def _render(scenes: Scenes, sprites: Sprites, out: Tensor) -> None:
    centre, size = trajectories(scenes)
    phase = (scenes.animation[:, None] + torch.arange(FRAMES, device=size.device)) % PHASES
    texels = sprites.premultiplied(scenes.subject.repeat_interleave(FRAMES), phase.flatten())

    # two batched products, columns then rows; (N, y, channel, x) keeps both free of copies
    step = (SIDE / size).flatten()
    start = SIDE / 2 - centre.flatten(0, 1) * step[:, None]
    columns, rows = (area_weights(start[:, axis], step, PIXELS, SIDE) for axis in (0, 1))
    texels = texels.transpose(1, 2).reshape(-1, SIDE * 4, SIDE) @ columns.mT
    layer = (rows @ texels.view(-1, SIDE, 4 * PIXELS)).view(len(scenes), FRAMES, PIXELS, 4, PIXELS)

    colour, alpha = layer.permute(0, 3, 1, 2, 4).split((3, 1), dim=1)
    backdrop = 2 * background_rows(scenes.background, scenes.tint)[:, :, None, :, None] - 1
    torch.addcmul(colour, 1 - alpha, backdrop, out=out)
