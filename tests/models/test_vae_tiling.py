"""Tiled encoding and decoding against the whole picture, the size of the seams, and the memory estimate."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from turbodiffusion.errors import UserError
from turbodiffusion.models.vae import VideoVAE
from turbodiffusion.models.vae_tiling import decode_bytes, decode_tiled, encode_tiled, longest_chunk

CONFIGS = Path(__file__).parents[2] / "configs" / "vae"

# How far, in latent pixels, a pixel sees through the decoder's convolutions with one block a level: nine at
# the latents' size, five at each doubled one and one at the end: 9 + 5/2 + 5/4 + 6/8. The encoder sees less.
REACH = 13.5

Tiled = Callable[..., Tensor]


def build(*, local: bool = True, patch: int = 1) -> VideoVAE:
    """A random VAE; a local one has no attention, as its output projection starts from zero."""
    torch.manual_seed(0)
    vae = VideoVAE(
        base=4, latent_channels=4, res_blocks=1, patch=patch, latent_mean=[0.0] * 4, latent_std=[1.0] * 4
    )
    if not local:
        for half in (vae.encoder, vae.decoder):
            torch.nn.init.normal_(half.middle[1].proj.weight, std=0.5)
    return vae.eval()


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)


def tall_case(tiled: Tiled, vae: VideoVAE) -> tuple[Tensor, Tensor]:
    """A tall input of 96 latent rows, and what the whole gives."""
    if tiled is decode_tiled:
        latents = noise(1, 4, 1, 96, 2)
        return latents, vae.decode(latents)
    frames = noise(1, 3, 1, 768, 16)
    return frames, vae.encode(frames)


@pytest.mark.parametrize("overlap", [0, 8, 32])
@pytest.mark.parametrize("tiled", [decode_tiled, encode_tiled])
@torch.no_grad()
def test_tiles_equal_the_whole_beyond_the_reach_of_their_edges(tiled: Tiled, overlap: int) -> None:
    vae = build()
    x, whole = tall_case(tiled, vae)
    # two tiles, the seam in the middle
    result = tiled(vae, x, tile=(48 + overlap // 2, 48 + overlap // 2 + 32), overlap=overlap)
    rows = (result - whole).abs().amax((0, 1, 2, 4))
    position = (torch.arange(len(rows)) + 0.5) * 96 / len(rows)
    edges = torch.tensor([48 - overlap / 2, 48 + overlap / 2])
    is_beyond = (position[:, None] - edges).abs().amin(dim=1) > REACH
    # of the widest overlap, the middle is beyond both edges as well
    assert is_beyond[len(rows) // 2] == (overlap == 32)
    # fp32 rounding: the same sums, taken at other offsets
    assert rows[is_beyond].max() < 1e-5


@pytest.mark.parametrize("tiled", [decode_tiled, encode_tiled])
@torch.no_grad()
def test_blending_softens_seams_fourfold(tiled: Tiled) -> None:
    vae = build(local=False)
    x, whole = tall_case(tiled, vae)
    hard, soft = ((tiled(vae, x, tile=(56, 56), overlap=overlap) - whole) for overlap in (0, 8))
    # a seam shows as a step from row to row, which a ramp over n rows divides by n; the tiles' outermost rows
    # and what attention misses leave more than that (seen: a tenth)
    assert soft.diff(dim=-2).abs().max() < hard.diff(dim=-2).abs().max() / 4
    assert soft.abs().max() < hard.abs().max() / 4


@pytest.mark.parametrize(("tile", "overlap"), [((8, 12), 4), ((9, 7), 3), ((5, 5), 0), ((64, 6), 2)])
@torch.no_grad()
def test_weights_sum_to_one_everywhere(tile: tuple[int, int], overlap: int) -> None:
    vae = build(patch=2)
    for parameter in vae.parameters():
        parameter.zero_()
    # a net that knows nothing of its input: every tile is this constant
    vae.decoder.head["2"].bias.fill_(0.25)
    vae.conv1.bias.fill_(0.5)
    options = {"tile": tile, "overlap": overlap}
    frames = decode_tiled(vae, torch.zeros(2, 4, 2, 17, 10), **options)
    latents = encode_tiled(vae, torch.zeros(1, 3, 5, 17 * 16, 10 * 16), **options)
    # fp32 rounding of a weighted sum
    torch.testing.assert_close(frames, torch.full((2, 3, 5, 17 * 16, 10 * 16), 0.25), rtol=1e-6, atol=0)
    torch.testing.assert_close(latents, torch.full((1, 4, 2, 17, 10), 0.5), rtol=1e-6, atol=0)


@torch.no_grad()
def test_the_network_never_sees_more_than_a_tile() -> None:
    vae = build()
    seen = []
    for half in (vae.encoder, vae.decoder):
        half.middle.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[-2:]))
    decode_tiled(vae, noise(1, 4, 2, 13, 21), tile=(8, 6), overlap=2)
    encode_tiled(vae, noise(1, 3, 5, 13 * 8, 21 * 8), tile=(8, 6), overlap=2)
    assert max(height for height, _ in seen) <= 8
    assert max(width for _, width in seen) <= 6


@torch.no_grad()
def test_one_tile_is_the_whole() -> None:
    vae = build(local=False)
    latents = noise(1, 4, 2, 6, 5)
    assert torch.equal(decode_tiled(vae, latents, tile=(6, 8)), vae.decode(latents))


def test_an_overlap_over_half_a_tile_is_refused() -> None:
    with pytest.raises(UserError, match=r"overlap=8 for tiles of 12; use 0 to 6"):
        decode_tiled(build(), noise(1, 4, 1, 40, 40), tile=(32, 12), overlap=8)


def test_frames_that_do_not_divide_are_refused_before_tiling() -> None:
    with pytest.raises(UserError, match="both sides must divide by 8"):
        encode_tiled(build(), torch.zeros(1, 3, 1, 300, 300))


def published(name: str) -> VideoVAE:
    values = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    del values["_target_"]
    with torch.device("meta"):
        return VideoVAE(**values).to(torch.bfloat16)


@pytest.mark.parametrize(
    ("name", "shape", "chunk", "gibibytes"),
    [
        ("wan2.1", (21, 60, 104), 1, 3.58),
        ("wan2.1", (21, 60, 104), 4, 7.93),
        ("wan2.1", (21, 90, 160), 1, 8.33),
        ("wan2.2", (31, 44, 80), 1, 7.78),
        ("wan2.2", (31, 44, 80), 2, 11.26),
    ],
)
def test_the_memory_estimate_agrees_with_measurements(
    name: str, shape: tuple[int, int, int], chunk: int, gibibytes: float
) -> None:
    # bf16, peak less weights and input, one H200, torch 2.11 and cuDNN 9.19, whose workspaces vary by shape
    assert 0.95 < decode_bytes(published(name), shape, chunk=chunk) / 2**30 / gibibytes < 1.25


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that operations make."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        self.count = max([self.count, *(x.numel() for x in tree_leaves(made) if isinstance(x, Tensor))])
        return made


@pytest.mark.parametrize(
    ("name", "height", "width"), [("wan2.1", 60, 104), ("wan2.1", 90, 160), ("wan2.2", 44, 80)]
)
@torch.no_grad()
def test_the_longest_piece_counts_its_numbers_in_32_bits(name: str, height: int, width: int) -> None:
    vae = published(name)
    chunk = longest_chunk(vae, (1, height, width))
    counts = []
    for length in (chunk, chunk + 1):
        # behind a piece, a piece is whole: no frame of it stays alone
        latents = torch.empty(1, vae.latent_channels, 1 + length, height, width, device="meta")
        past = {}
        vae._pixels(latents[:, :, :1], past)
        with Largest() as largest:
            vae._pixels(latents[:, :, 1:], past)
        counts.append(largest.count)
    assert counts[0] < 2**31 <= counts[1]
