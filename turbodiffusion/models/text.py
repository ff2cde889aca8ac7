"""The umT5 text encoder (arXiv:2304.09151) that conditions Wan: prompts -> context.

Shapes: B prompts, S tokens of the longest prompt, E width.
"""

import html
import warnings

import ftfy
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import UMT5Config, UMT5EncoderModel

from turbodiffusion.errors import UserError
from turbodiffusion.models.tokenizers import PAD, Tokenizer


def clean(text: str) -> str:
    """Mends broken encodings, undoes HTML escapes (twice, as some captions are) and collapses white space."""
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


class TextEncoder(nn.Module):
    """Prompts -> context (B, length, E), zero beyond each prompt's last token.

    The default sizes are umT5-xxl's; the tokenizer is not part of `config`.  Parameters are named as in
    transformers' UMT5EncoderModel, without `shared.weight`, its second name for the embedding.
    """

    def __init__(  # noqa: PLR0913 (the sizes of umT5)
        self,
        *,
        tokenizer: Tokenizer,
        length: int = 512,
        vocab: int = 256384,
        dim: int = 4096,
        ffn_dim: int = 10240,
        heads: int = 64,
        head_dim: int = 64,
        layers: int = 24,
    ):
        super().__init__()
        if tokenizer.vocab > vocab:
            raise UserError(
                f"the tokenizer has {tokenizer.vocab} ids but the encoder {vocab}; give the encoder's own"
            )
        self.tokenizer, self.length = tokenizer, length
        self.config = {
            "length": length,
            "vocab": vocab,
            "dim": dim,
            "ffn_dim": ffn_dim,
            "heads": heads,
            "head_dim": head_dim,
            "layers": layers,
        }
        sizes = UMT5Config(
            vocab_size=vocab,
            d_model=dim,
            d_ff=ffn_dim,
            num_heads=heads,
            d_kv=head_dim,
            num_layers=layers,
            dropout_rate=0.0,
        )
        # the stack alone: the whole model names its embedding twice, and an assigning load would part the two
        self.encoder = UMT5EncoderModel(sizes).encoder

    @torch.no_grad()
    def forward(self, prompts: list[str]) -> Tensor:
        """Context (B, length, E) on the encoder's device, in its dtype.  Warns when a prompt is too long."""
        ids, mask = self.tokenize(prompts)
        device = self.encoder.embed_tokens.weight.device
        return self.encode(ids.to(device), mask.to(device))

    def tokenize(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Ids (B, S) of the cleaned prompts, padded to the longest; boolean mask (B, S) of the real ones."""
        if isinstance(prompts, str) or not prompts:
            raise UserError(f"got {prompts!r} as prompts, wanted a list of at least one")
        rows = [torch.tensor(self._fit(self.tokenizer(clean(prompt)))) for prompt in prompts]
        lengths = torch.tensor([len(row) for row in rows])
        ids = pad_sequence(rows, batch_first=True, padding_value=PAD)
        return ids, torch.arange(ids.shape[1]) < lengths[:, None]

    def encode(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Context (B, length, E) of ids (B, S <= length), zero where the mask (B, S) is; differentiable.

        Positions are relative and masked keys weigh exactly nothing, so S need not reach `length`.
        """
        missing = self.length - ids.shape[1]
        if missing < 0:
            raise UserError(f"got {ids.shape[1]} tokens, at most {self.length} fit")
        states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return F.pad(states.masked_fill(~mask.unsqueeze(-1), 0), (0, 0, 0, missing))

    def shard_units(self) -> list[nn.Module]:
        """The modules to offload one by one, in the order they run."""
        return list(self.encoder.block)

    def _fit(self, ids: list[int]) -> list[int]:
        """The first length - 1 ids and EOS."""
        dropped = len(ids) - self.length
        if dropped <= 0:
            return ids
        warnings.warn(
            f"a prompt has {len(ids)} tokens and {self.length} fit: its last {dropped} were dropped",
            stacklevel=2,
        )
        return ids[: self.length - 1] + ids[-1:]
