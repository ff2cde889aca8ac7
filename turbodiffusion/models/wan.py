"""The Wan video diffusion transformer (arXiv:2503.20314): every published size and task is one class.

Shapes: B batch, C channels, T H W latent frames, height, width, L video and S text tokens, E width, N heads.
Parameter names are those of the published Wan files.
"""

import re
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from kernels.int8_linear import Tokens
from kernels.norms import norm_modulate, norm_rotate
from turbodiffusion.attention import DENSE, Attention, chosen, make_core
from turbodiffusion.errors import UserError
from turbodiffusion.models.cross_attention import CrossAttention, Memory
from turbodiffusion.models.layers import LayerNorm, RMSNorm, linear_fp32, sinusoids
from turbodiffusion.models.projections import add_projected, join, modulated, normed, projected
from turbodiffusion.models.rope import rotary_table

PATCH = (1, 2, 2)
CLIP_DIM = 1280
CLIP_TOKENS = 257
FP32_NAMES = re.compile(r"(^|\.)(modulation|scale|(norm\w+|img_emb\.proj\.[04])\.(weight|bias))$")


class Conditions(NamedTuple):
    """What a network makes of texts, pictures and the latents' shape: the same at every step.

    table: rotary, of L tokens.  blocks: by its index, the text and the image that a block is given.
    """

    table: tuple[Tensor, Tensor]
    blocks: dict[int, tuple[Tensor | Memory, Tensor | Memory | None]]


class SelfAttention(nn.Module):
    """Attention among video tokens: add + gate times that.

    x, normed, and add (B, L, E), rotary table of L tokens, gate (B, 1 or L, E) -> (B, L, E).
    """

    def __init__(self, dim: int, heads: int, core: nn.Module):
        super().__init__()
        self.heads, self.core = heads, core
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        # over the full width, before the split into heads
        self.norm_q, self.norm_k = RMSNorm(dim), RMSNorm(dim)

    def forward(self, x: Tensor | Tokens, table: tuple[Tensor, Tensor], add: Tensor, gate: Tensor) -> Tensor:
        q, k, v = projected(x, self.q, self.k, self.v)
        q = norm_rotate(q, self.norm_q.weight, *table)
        k = norm_rotate(k, self.norm_k.weight, *table)
        v = v.unflatten(-1, (self.heads, -1))
        out = self.core(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return add_projected(add, rearrange(out, "b n l d -> b l (n d)"), self.o, gate)


class Block(nn.Module):
    """Self-attention, cross-attention and feed-forward; time modulates the first and the last.

    x (B, L, E); time (B, 1 or L, 6, E) fp32.  The residual stream keeps x's dtype.
    """

    def __init__(self, dim: int, ffn_dim: int, heads: int, has_image: bool, core: nn.Module):
        super().__init__()
        self.self_attn = SelfAttention(dim, heads, core)
        self.norm3 = LayerNorm(dim, eps=1e-6)
        self.cross_attn = CrossAttention(dim, heads, has_image)
        self.ffn = nn.Sequential(
            nn.Linear(dim, ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(ffn_dim, dim)
        )
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        table: tuple[Tensor, Tensor],
        text: Tensor | Memory,
        image: Tensor | Memory | None,
    ) -> Tensor:
        def signal(i: int) -> Tensor:  # one at a time: with per-token times each is as large as fp32 tokens
            return self.modulation[:, i].float() + time[:, :, i]

        attend, cross, (up, gelu, down) = self.self_attn, self.cross_attn, self.ffn
        h = modulated(x, signal(0), signal(1), attend.q, attend.k, attend.v)
        x = attend(h, table, x, signal(2))
        x = cross(normed(x, self.norm3, cross.q), text, image, x)
        h = modulated(x, signal(3), signal(4), up)
        return add_projected(x, gelu(up(h)), down, signal(5))


class Head(nn.Module):
    """Tokens (B, L, E) and time (B, 1 or L, E) fp32 -> patches (B, L, 4 * out channels), in fp32."""

    def __init__(self, dim: int, out_features: int):
        super().__init__()
        self.head = nn.Linear(dim, out_features)
        self.modulation = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        shift, scale = (self.modulation[:, i].float() + time for i in range(2))
        return linear_fp32(self.head, norm_modulate(x.float(), shift, scale))


class ImageEmbedding(nn.Module):
    """CLIP tokens (B, I, 1280) -> (B, I, E); a first-and-last-frame model adds positions."""

    def __init__(self, dim: int, tokens: int):
        super().__init__()
        self.proj = nn.Sequential(
            LayerNorm(CLIP_DIM),
            nn.Linear(CLIP_DIM, CLIP_DIM),
            nn.GELU(),
            nn.Linear(CLIP_DIM, dim),
            LayerNorm(dim),
        )
        if tokens > CLIP_TOKENS:
            self.emb_pos = nn.Parameter(torch.zeros(1, tokens, CLIP_DIM))

    def forward(self, clip: Tensor) -> Tensor:
        return self.proj(clip + self.emb_pos.to(clip.dtype) if hasattr(self, "emb_pos") else clip)


class WanModel(nn.Module):
    """Noisy latents -> rectified-flow velocity (noise - clean).

    attention: the self-attention's, None: dense.  clip_tokens: 0, 257 (one image) or 514 (first and last).
    """

    def __init__(  # noqa: PLR0913 (the sizes of the published table)
        self,
        *,
        dim: int,
        ffn_dim: int,
        heads: int,
        layers: int,
        in_channels: int = 16,
        out_channels: int = 16,
        text_dim: int = 4096,
        text_length: int = 512,
        freq_dim: int = 256,
        clip_tokens: int = 0,
        attention: Attention | None = None,
    ):
        super().__init__()
        if dim % heads or (dim // heads) % 2:
            raise UserError(f"dim={dim} must be heads={heads} times an even head width")
        self.config = {
            "dim": dim,
            "ffn_dim": ffn_dim,
            "heads": heads,
            "layers": layers,
            "in_channels": in_channels,
            "out_channels": out_channels,
            "text_dim": text_dim,
            "text_length": text_length,
            "freq_dim": freq_dim,
            "clip_tokens": clip_tokens,
            "attention": chosen(DENSE, attention or DENSE),
        }
        self.patch_embedding = nn.Conv3d(in_channels, dim, PATCH, PATCH)
        self.text_embedding = nn.Sequential(nn.Linear(text_dim, dim), nn.GELU("tanh"), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(nn.Linear(freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        if clip_tokens:
            self.img_emb = ImageEmbedding(dim, clip_tokens)
        has_image = clip_tokens > 0
        cores = (make_core(self.config["attention"], dim // heads) for _ in range(layers))
        self.blocks = nn.ModuleList(Block(dim, ffn_dim, heads, has_image, core) for core in cores)
        self.head = Head(dim, 4 * out_channels)
        self._init_weights()

    def _init_weights(self) -> None:
        """Xavier for every Linear; a zero head, so that an untrained model predicts zero velocity."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embedding.weight.flatten(1))
        for layer in (self.time_embedding[0], self.time_embedding[2]):
            nn.init.normal_(layer.weight, std=0.02)
        nn.init.zeros_(self.head.head.weight)

    @staticmethod
    def is_fp32(name: str) -> bool:
        """Whether it stays fp32 beside bf16 weights: norms, modulation, scales of 8 bits, at no cost."""
        return FP32_NAMES.search(name) is not None

    def set_attention(self, asked: Attention, *, drop_linear: bool = False) -> None:
        """Change self-attention as `attention.chosen` says; a new linear branch is zero, an old one stays."""
        attention = chosen(self.config["attention"], asked, drop_linear=drop_linear)
        head_dim = self.config["dim"] // self.config["heads"]
        for block in self.blocks:
            old, like = block.self_attn.core, self.patch_embedding.weight
            core = make_core(attention, head_dim).to(like.device, like.dtype)
            if type(core) is type(old):
                core.load_state_dict(old.state_dict())
            block.self_attn.core = core
        self.config["attention"] = attention

    def shard_units(self) -> list[nn.Module]:
        """The modules to shard, checkpoint, offload or compile one by one, in the order they run."""
        return list(self.blocks)

    def prepare(
        self, x: Tensor, context: Tensor, clip: Tensor | None = None, *, memorise: bool = True
    ) -> Conditions:
        """What stays the same over the steps, for `forward` to take in place of the context.

        x (B, C, T, H, W): any latents of the shape to come; context and clip as `forward` takes them.
        memorise=False leaves keys and values to the blocks, each of which makes its own when it runs.
        """
        self._check(context, clip)
        grid = (x.shape[2], x.shape[3] // PATCH[1], x.shape[4] // PATCH[2])
        table = rotary_table(grid, self.config["dim"] // self.config["heads"], x.device)
        dtype, missing = self.patch_embedding.weight.dtype, self.config["text_length"] - context.shape[1]
        text = self.text_embedding(F.pad(context.to(dtype), (0, 0, 0, missing)))
        image = None if clip is None else self.img_emb(clip.to(dtype))
        given = []
        for block in self.blocks:
            if memorise:  # all blocks are there, and stay
                join(block.self_attn.q, block.self_attn.k, block.self_attn.v)
            given.append(block.cross_attn.memorise(text, image) if memorise else (text, image))
        return Conditions(table, dict(enumerate(given)))

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor | Conditions,
        *,
        condition: Tensor | None = None,
        clip: Tensor | None = None,
    ) -> Tensor:
        """Velocity (B, out, T, H, W), fp32.

        x (B, C, T, H, W); timesteps (B,) or per token (B, L), from 0 (clean) to 1000 (noise); context
        (B, S, text_dim), zero-padded here to text_length since Wan attends to the padding; condition
        (B, in - C, T, H, W): mask and image latents; clip (B, 257 or 514, 1280).  Prepared conditions hold
        context and clip; the blocks that they name run.  Raises UserError for shapes that do not fit.
        """
        channels = x.shape[1] + (0 if condition is None else condition.shape[1])
        if channels != self.config["in_channels"]:
            raise UserError(
                f"got {channels} input channels with the condition, wanted {self.config['in_channels']}"
            )
        if x.shape[3] % PATCH[1] or x.shape[4] % PATCH[2]:
            raise UserError(f"latent height and width {tuple(x.shape[3:])} must be even")
        # else each block makes its own keys and values: its weights may be elsewhere until it runs
        prepared = isinstance(context, Conditions)
        known = context if prepared else self.prepare(x, context, clip, memorise=False)
        tokens = self._patchify(x if condition is None else torch.cat((x, condition.to(x.dtype)), dim=1))
        e, time = self._embed_time(timesteps)
        for i, (text, image) in known.blocks.items():
            tokens = self.blocks[i](tokens, time, known.table, text, image)
        return rearrange(
            self.head(tokens, e),
            "b (t h w) (p q c) -> b c t (h p) (w q)",
            t=x.shape[2],
            h=x.shape[3] // PATCH[1],
            p=PATCH[1],
            q=PATCH[2],
        )

    def _check(self, context: Tensor, clip: Tensor | None) -> None:
        if context.shape[1] > self.config["text_length"]:
            raise UserError(f"got {context.shape[1]} text tokens, at most {self.config['text_length']} fit")
        tokens = 0 if clip is None else clip.shape[1]
        if tokens != self.config["clip_tokens"]:
            raise UserError(f"got {tokens} CLIP image tokens, wanted {self.config['clip_tokens']}")

    def _patchify(self, x: Tensor) -> Tensor:
        # the convolution's stride equals its kernel: one matrix product is the same and faster
        weight = self.patch_embedding.weight
        patches = rearrange(
            x.to(weight.dtype), "b c t (h p) (w q) -> b (t h w) (c p q)", p=PATCH[1], q=PATCH[2]
        )
        return F.linear(patches, weight.flatten(1), self.patch_embedding.bias)

    def _embed_time(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Times (B,) or (B, L) -> e (B, 1 or L, E) for the head, (B, 1 or L, 6, E) for the blocks; fp32."""
        times = timesteps if timesteps.ndim == 2 else timesteps.unsqueeze(1)
        first, _, second = self.time_embedding
        e = linear_fp32(second, F.silu(linear_fp32(first, sinusoids(times, self.config["freq_dim"]))))
        return e, linear_fp32(self.time_projection[1], F.silu(e)).unflatten(-1, (6, -1))
