"""The memory plan's estimates against every tensor that really lives, counted on the meta device."""

import weakref
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from turbodiffusion.checkpoints import Report
from turbodiffusion.models.text import TextEncoder
from turbodiffusion.models.tokenizers import ByteTokenizer
from turbodiffusion.models.vae import VideoVAE
from turbodiffusion.models.vae_tiling import decode_bytes, longest_chunk
from turbodiffusion.models.wan import WanModel
from turbodiffusion.pipelines.found import Found, stages
from turbodiffusion.pipelines.memory import (
    GIB,
    RUNTIME,
    Plan,
    constant_bytes,
    denoise_bytes,
    free_memory,
    streamed_text_bytes,
    vae_chunk,
)
from turbodiffusion.pipelines.offload import Residence
from turbodiffusion.pipelines.sizes import Size
from turbodiffusion.variants import CONFIGS, variants

META, BF16 = torch.device("meta"), torch.bfloat16


class Living(TorchDispatchMode):
    """Peak bytes of the storages that operations make, a model's own left out."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in model.parameters()}
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for storage in [t.untyped_storage() for t in tree_leaves(made) if isinstance(t, Tensor)]:
            key = storage._cdata
            if key not in self.sizes:
                self.sizes[key] = storage.nbytes()
                weakref.finalize(storage, self.sizes.pop, key, None)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return made


class NoWorkspace(nn.Module):
    """What the fused attention kernels of an accelerator allocate: the result alone."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.empty_like(q)


def half(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        if not WanModel.is_fp32(name):
            parameter.data = parameter.data.to(BF16)
    return model


@pytest.mark.parametrize(
    ("name", "latents", "per_token"),
    [
        ("wan2.1_t2v_1.3b", (16, 21, 60, 104), False),
        ("wan2.1_t2v_14b", (16, 21, 90, 160), False),
        ("wan2.2_ti2v_5b", (48, 31, 44, 80), False),
        ("wan2.2_ti2v_5b", (48, 31, 44, 80), True),
    ],
)
@torch.no_grad()
def test_denoising_takes_what_the_plan_says(
    name: str, latents: tuple[int, int, int, int], per_token: bool
) -> None:
    # two layers use the memory of forty: every layer's is free when the next one starts
    with META:
        model = half(WanModel(**{**variants()[name].network, "layers": 2}))
        for block in model.blocks:
            block.self_attn.core, block.cross_attn.core = NoWorkspace(), NoWorkspace()
        x = torch.empty(1, *latents, dtype=torch.float64)
        tokens = latents[1] * latents[2] * latents[3] // 4
        times = torch.empty((1, tokens) if per_token else 1, dtype=torch.float64)
        context = torch.empty(1, 512, 4096, dtype=BF16)
    with Living(model) as living:
        model(x, times, context)
    # not below, or a run that is promised to fit does not; not far above, or one that fits is refused
    assert 1 <= denoise_bytes(model.config, latents, BF16, per_token=per_token) / living.peak < 1.25


@torch.no_grad()
def test_constants_take_what_the_plan_says() -> None:
    with META:
        model = half(WanModel(**{**variants()["wan2.1_i2v_14b_480p"].network, "layers": 2}))
        x, context = torch.empty(1, 16, 21, 60, 104), torch.empty(1, 512, 4096)
        prepared = model.prepare(x, context, torch.empty(1, 257, 1280))
    one = sum(x.nbytes for given in prepared.blocks.values() for memory in given for x in memory)
    # of both texts, and the copy that a graph reads
    assert constant_bytes(model.config, BF16, networks=1) == 3 * one


@torch.no_grad()
def test_a_streamed_text_encoder_takes_what_the_plan_says() -> None:
    sizes = {"length": 24, "vocab": 1024, "dim": 256, "ffn_dim": 512, "heads": 4, "head_dim": 64, "layers": 5}
    encoder = TextEncoder(tokenizer=ByteTokenizer(), **sizes)
    residence = Residence(torch.device("cpu"), "block")
    with Living(encoder) as living:
        residence.use(encoder, encoder.shard_units())
        encoder.shard_units()[0](torch.zeros(1, 1, 256))
    places = living.peak
    residence.release()
    weights = sum(p.nbytes for p in encoder.parameters())
    embedding = encoder.encoder.embed_tokens.weight.nbytes
    # two fifths of the last norm, and what the one token makes, are the difference
    planned = streamed_text_bytes(encoder.config, weights, torch.float32)
    assert planned == pytest.approx(embedding + places, rel=0.01)


@pytest.mark.parametrize(
    ("name", "frames", "size"),
    [("wan2.1", 21, (480, 832)), ("wan2.2", 21, (704, 1280)), ("tiny", 33, (128, 128))],
)
@torch.no_grad()
def test_the_vae_takes_what_the_plan_says(name: str, frames: int, size: tuple[int, int]) -> None:
    sizes = yaml.safe_load((CONFIGS / "vae" / f"{name}.yaml").read_text())
    sizes.pop("_target_")
    with META:
        vae = VideoVAE(**sizes)
    vae = vae.to(META, BF16)
    shape = (1 + (frames - 1) // 4, *(side // vae.spatial_factor for side in size))
    clip = 4 * 3 * frames * size[0] * size[1]
    with Living(vae) as decoding:
        vae.decode(torch.empty(1, vae.latent_channels, *shape, device=META))
    with Living(vae) as encoding:
        vae.encode(torch.empty(1, 3, frames, *size, device=META))
    planned = clip + decode_bytes(vae, shape)
    assert 1 <= planned / decoding.peak < 1.6  # convolutions' workspaces have to find room too
    assert planned / encoding.peak >= 1


@torch.no_grad()
def test_the_smallest_video_model_is_planned_into_8_gib_block_by_block() -> None:
    row = variants()["wan2.1_t2v_1.3b"]
    sizes = yaml.safe_load((CONFIGS / "vae" / "wan2.1.yaml").read_text())
    sizes.pop("_target_")
    with META:
        models = {"network": WanModel(**row.network), "vae": VideoVAE(**sizes)}
        models["text_encoder"] = TextEncoder(tokenizer=ByteTokenizer())
    reports = {}
    for kind, model in models.items():
        count = sum(2 * p.numel() for p in model.parameters())
        reports[kind] = Report(Path(), kind, "ours", "", {BF16: (1, count)}, [], config=model.config)
    found = Found(row, row.sampling, {}, "none", reports, None)
    work = stages(found, Size(832, 480), 81, BF16, tiled=False)
    plan = Plan(work, "block", tiled=False, free=8 * GIB - RUNTIME, host_free=None)
    assert plan.fits("block")
    # the whole text encoder alone is 10.6 GiB
    assert not plan.fits("stage")


@pytest.mark.parametrize(("spare", "wanted"), [(0, 1), (4 * GIB, 3), (8 * GIB, 6), (60 * GIB, 7)])
def test_a_clip_takes_the_fewest_even_pieces_that_are_spared(spare: int, wanted: int) -> None:
    sizes = yaml.safe_load((CONFIGS / "vae" / "wan2.1.yaml").read_text())
    sizes.pop("_target_")
    with META:
        vae = VideoVAE(**sizes).to(BF16)

    one = decode_bytes(vae, (21, 60, 104), chunk=1)

    def fits(chunk: int) -> bool:
        return decode_bytes(vae, (21, 60, 104), chunk=chunk) - one <= spare and chunk <= longest_chunk(
            vae, (1, 60, 104)
        )

    even = (-(-21 // pieces) for pieces in range(1, 22))
    assert next(filter(fits, even)) == wanted
    assert vae_chunk(vae, (1, 16, 21, 60, 104), tiled=False, free=one + 2 * spare) == wanted


@pytest.mark.gpu
def test_a_limit_of_the_process_is_all_that_is_free() -> None:
    device = torch.device("cuda")
    whole = torch.cuda.get_device_properties(device).total_memory
    kept = torch.empty(64 << 20, dtype=torch.uint8, device=device)
    # freed, but still PyTorch's
    torch.empty(256 << 20, dtype=torch.uint8, device=device)
    torch.cuda.set_per_process_memory_fraction(2 * GIB / whole, 0)
    try:
        expected = 2 * GIB - torch.cuda.memory_allocated(device) - RUNTIME
        # a fraction in floating point
        assert free_memory(device).device == pytest.approx(expected, abs=1 << 20)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, 0)
    assert kept.numel() == 64 << 20
