"""CLIP (arXiv:2103.00020) and ViCLIP (arXiv:2307.06942), with parameters named as in their files.

Sizes are read from the file; heads are 64 wide.  On a GPU CLIP is fp16 but for its norms, as upstream has it;
ViCLIP is fp32.  Shapes: B images, F frames, L tokens, E width.
"""

import gzip
import html
from collections.abc import Callable
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path

import ftfy
import torch
from tokenizers import Regex, Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from torch import Tensor, nn
from transformers.activations import QuickGELUActivation

from evaluation.backbones.weights import Net, below, filled, named, read_state
from turbodiffusion.checkpoints.sources import State
from turbodiffusion.errors import UserError

_HEAD = 64
_MERGES = 48894  # the file lists more than were used
_WORD = "</w>"  # ends the last piece of a word
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


class LayerNorm(nn.LayerNorm):
    """In fp32, whatever comes."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).to(x.dtype)


class Block(nn.Module):
    """Attention and feed-forward, each after its norm; (B, L, E) to the same."""

    def __init__(self, width: int):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, width // _HEAD, batch_first=True)
        self.ln_1, self.ln_2 = LayerNorm(width), LayerNorm(width)
        wide, back = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.mlp = named(c_fc=wide, gelu=QuickGELUActivation(), c_proj=back)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class Blocks(nn.Module):
    """Blocks one after the other."""

    def __init__(self, width: int, layers: int):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width) for _ in range(layers))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class ImageTower(nn.Module):
    """Images (B, 3, side, side) -> (B, out)."""

    def __init__(self, *, width: int, layers: int, patch: int, length: int, out: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty(length, width))
        self.ln_pre, self.ln_post = LayerNorm(width), LayerNorm(width)
        self.transformer = Blocks(width, layers)
        self.proj = nn.Parameter(torch.empty(width, out))

    def forward(self, images: Tensor) -> Tensor:
        return self._out(self._tokens(images.to(self.proj.dtype)))

    def _tokens(self, images: Tensor) -> Tensor:
        patches = self.conv1(images).flatten(2).mT
        first = self.class_embedding.expand(len(patches), 1, -1)
        return torch.cat((first, patches), dim=1) + self.positional_embedding

    def _out(self, tokens: Tensor) -> Tensor:
        return self.ln_post(self.transformer(self.ln_pre(tokens))[:, 0]) @ self.proj


class VideoTower(ImageTower):
    """Videos (B, F, 3, side, side) -> (B, out): every patch of every frame attends to all, and one token."""

    def __init__(self, *, frames: int, width: int, **sizes: int):
        super().__init__(width=width, **sizes)
        self.temporal_positional_embedding = nn.Parameter(torch.empty(1, frames, width))

    def forward(self, videos: Tensor) -> Tensor:
        tokens = self._tokens(videos.flatten(0, 1)).unflatten(0, videos.shape[:2])
        patches = tokens[:, :, 1:] + self.temporal_positional_embedding[:, :, None]
        return self._out(torch.cat((tokens[:, 0, :1], patches.flatten(1, 2)), dim=1))


class TextTower(nn.Module):
    """Token ids (B, L), L at most `length` -> (B, out), of the last token; each sees those before it."""

    def __init__(self, *, width: int, layers: int, vocabulary: int, length: int, out: int):
        super().__init__()
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.positional_embedding = nn.Parameter(torch.empty(length, width))
        self.transformer = Blocks(width, layers)
        self.ln_final = LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, out))

    def forward(self, ids: Tensor) -> Tensor:
        length = ids.shape[1]
        later = torch.ones(length, length, dtype=torch.bool, device=ids.device).triu(1)
        x = self.transformer(self.token_embedding(ids) + self.positional_embedding[:length], later)
        return self.ln_final(x[:, -1]) @ self.text_projection


@lru_cache
def load_image_tower(path: Path, device: torch.device) -> ImageTower:
    """From a file of OpenAI's."""
    return _placed(_image_tower(below(read_state(path), "visual."), path), device)


@lru_cache
def load_text_tower(path: Path, device: torch.device) -> TextTower:
    """From a file of OpenAI's."""
    others = ("visual.", "logit_scale", "input_resolution", "context_length", "vocab_size")
    state = {name: x for name, x in read_state(path).items() if not name.startswith(others)}
    return _placed(_text_tower(state, path), device)


@lru_cache
def load_viclip(path: Path, device: torch.device) -> tuple[VideoTower, TextTower]:
    """Both from one file."""
    state = read_state(path)
    video = below(state, "vision_encoder.")
    video["conv1.weight"] = video["conv1.weight"].squeeze(2)  # of one frame
    frames = video["temporal_positional_embedding"].shape[1]
    seen = _image_tower(video, path, partial(VideoTower, frames=frames))
    return seen.to(device), _text_tower(below(state, "text_encoder."), path).to(device)


def _image_tower(state: State, path: Path, make: Callable[..., Net] = ImageTower) -> Net:
    patch = state["conv1.weight"].shape[-1]
    return filled(lambda: make(patch=patch, **_sizes(state, "proj")), state, path)


def _text_tower(state: State, path: Path) -> TextTower:
    vocabulary = len(state["token_embedding.weight"])
    return filled(lambda: TextTower(vocabulary=vocabulary, **_sizes(state, "text_projection")), state, path)


def _sizes(state: State, last: str) -> dict[str, int]:
    width, out = state[last].shape
    layers = sum(name.endswith(".ln_1.weight") for name in state)
    return {"width": width, "out": out, "layers": layers, "length": len(state["positional_embedding"])}


def _placed(tower: ImageTower | TextTower, device: torch.device) -> ImageTower | TextTower:
    if device.type == "cuda":
        norms = {id(x) for each in tower.modules() if isinstance(each, LayerNorm) for x in each.parameters()}
        for x in tower.parameters():
            x.data = x.data if id(x) in norms else x.data.half()
    return tower.to(device)


@lru_cache
def load_tokenizer(path: Path) -> Callable[[str], list[int]]:
    """Text -> ids, from START to END; path: of OpenAI's list of merges."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        merges = [tuple(line.split()) for line in islice(file, 1, _MERGES + 1)]
    letters = sorted(ByteLevel.alphabet())
    pieces = [*letters, *(each + _WORD for each in letters), *map("".join, merges)]
    ids = {piece: i for i, piece in enumerate(pieces)}
    encoder = Tokenizer(BPE(ids, merges, end_of_word_suffix=_WORD))
    encoder.pre_tokenizer = Sequence(
        [Split(Regex(_WORDS), "removed", invert=True), ByteLevel(add_prefix_space=False, use_regex=False)]
    )

    def encode(text: str) -> list[int]:
        clean = html.unescape(html.unescape(ftfy.fix_text(text))).lower()
        return [len(ids), *encoder.encode(clean).ids, len(ids) + 1]

    return encode


def tokens(text: str, encode: Callable[[str], list[int]], tower: TextTower, *, may_cut: bool) -> Tensor:
    """Ids (1, L) for a tower, the last of which is END even where others had to go."""
    ids, most = encode(text), len(tower.positional_embedding)
    if len(ids) > most:
        if not may_cut:
            raise UserError(f"has a text of {len(ids)} tokens, and CLIP reads {most}: {text!r}")
        ids = [*ids[: most - 1], ids[-1]]
    return torch.tensor([ids], device=tower.positional_embedding.device)
