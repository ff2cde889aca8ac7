"""What test_bands.py runs in each process: `python -m tests.parallel.band_ranks FOLDER`."""

import json
import sys
from copy import deepcopy
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from turbodiffusion.errors import UserError
from turbodiffusion.models.vae import VideoVAE
from turbodiffusion.models.vae_tiling import decode_tiled, encode_tiled
from turbodiffusion.parallel import joined, neighbours, rank, split_rows
from turbodiffusion.pipelines.memory import vae_chunk

# of latents: frames, height and width.  9 rows are 5 + 4 or 3 + 2 + 2 + 2; of 3 a rank would have but one
SIZES = {"uneven": (3, 9, 2), "low": (2, 3, 2)}


def build(patch: int) -> VideoVAE:
    """Of Wan2.1's kind or, with a patch of 2, of Wan2.2's; every part says something."""
    torch.manual_seed(0)
    vae = VideoVAE(
        base=4, multipliers=(1, 2, 2, 2), latent_channels=4, res_blocks=1, patch=patch,
        latent_mean=[0.1] * 4, latent_std=[0.5] * 4,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return vae


def made(vae: VideoVAE) -> dict[str, Tensor]:
    """Frames and latents of every size, in pieces and whole, and by tiles."""
    results, scale = {}, vae.spatial_factor
    rng = torch.Generator().manual_seed(1)
    for size, (t, h, w) in SIZES.items():
        latents = torch.randn(1, 4, t, h, w, generator=rng)
        clip = torch.rand(1, 3, 4 * t - 3, scale * h, scale * w, generator=rng) * 2 - 1
        for chunk in (1, 2, None) if size == "uneven" else (None,):
            results[f"decode {size} {chunk}"] = vae.decode(latents, chunk=chunk)
            results[f"encode {size} {chunk}"] = vae.encode(clip, chunk=chunk)
    tiles = {"tile": (6, 3), "overlap": 2}  # of the last size
    results["decode tiled"] = decode_tiled(vae, torch.randn(2, 4, 1, 9, 3, generator=rng), **tiles)
    clip = torch.rand(2, 3, 1, 9 * scale, 3 * scale, generator=rng) * 2 - 1
    return results | {"encode tiled": encode_tiled(vae, clip, **tiles)}


@torch.no_grad()
def compare(*groups: dist.ProcessGroup) -> dict[str, float]:
    """Errors against an autoencoder that is not shared, in [-1, 1] of frames and near it of latents."""
    errors = {}
    for patch in (1, 2):
        vae = build(patch).double()
        alone = made(vae)
        for group in groups:
            shared = deepcopy(vae)
            split_rows(shared, group)
            for name, result in made(shared).items():
                error = (result - alone[name]).abs().max().item()
                errors[f"{name}, patch {patch}, {group.size()} ranks"] = error
    return errors


@torch.no_grad()
def rows(group: dist.ProcessGroup) -> dict[str, list[int]]:
    """By size, the latent rows of this rank when it encodes and decodes."""
    vae, seen = build(1), []
    split_rows(vae, group)
    for half in (vae.encoder, vae.decoder):
        half.middle.register_forward_pre_hook(lambda _, args: seen[-1].append(args[0].shape[3]))
    for t, h, w in SIZES.values():
        seen.append([])
        vae.encode(vae.decode(torch.zeros(1, 4, t, h, w)))
    return dict(zip(SIZES, seen, strict=True))


def chunks(group: dist.ProcessGroup) -> list[int]:
    """What is chosen where the second rank has less memory, and with that memory for a band alone."""
    with torch.device("meta"):
        vae = VideoVAE(latent_mean=[0.0] * 16, latent_std=[1.0] * 16).bfloat16()
    free = [20 * 2**30, 8 * 2**30]
    shared = vae_chunk(vae, (1, 16, 21, 60, 104), tiled=False, free=free[group.rank()], ranks=group)
    return [shared, vae_chunk(vae, (1, 16, 21, 31, 104), tiled=False, free=free[1])]


def refusal(group: dist.ProcessGroup) -> str:
    """What is said where gradients are recorded."""
    vae = build(1)
    split_rows(vae, group)
    try:
        vae.decode(torch.zeros(1, 4, 1, 4, 2))
    except UserError as error:
        return str(error)
    return ""


def main(folder: Path) -> None:
    with joined(torch.device("cpu")):
        pairs = neighbours(2)
        four = neighbours(4)
        results = {
            "errors": compare(pairs, four),
            "rows": rows(four),
            "chunks": chunks(pairs),
            "refused": refusal(pairs),
        }
        (folder / f"rank{rank()}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
