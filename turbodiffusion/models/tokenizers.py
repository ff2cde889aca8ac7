"""Text to token ids.  umT5's vocabulary is read from a local file, never the network; bytes need no file.

Ids follow umT5: padding 0, end of text 1, unknown 2.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from turbodiffusion.errors import UserError

PAD, EOS = 0, 1
FILES = ("tokenizer.json", "spiece.model")
WANTED = f"wanted {' or '.join(FILES)}, or a folder with one of them, from google/umt5-xxl"


class Tokenizer(Protocol):
    """A text's ids, ending with EOS, neither padded nor cut; every id is below `vocab`."""

    vocab: int

    def __call__(self, text: str) -> list[int]: ...


class ByteTokenizer:
    """UTF-8 bytes: byte b has id b + 3."""

    vocab = 259

    def __call__(self, text: str) -> list[int]:
        return [byte + 3 for byte in text.encode()] + [EOS]

    def decode(self, ids: list[int]) -> str:
        """The text of ids; padding, EOS and unknown vanish."""
        return bytes(i - 3 for i in ids if i >= 3).decode()


class FileTokenizer:
    """google/umt5-xxl's tokenizer from `path`: tokenizer.json, spiece.model, or the folder that holds one.

    tokenizer.json is preferred: it is what the published pipelines read.  Raises UserError when neither is
    there, or when the file is another model's.
    """

    def __init__(self, path: str | Path):
        file = _find(Path(path))
        try:
            read = _read_json if file.suffix == ".json" else _read_sentencepiece
            self.vocab, special, self._encode = read(str(file))
        except Exception as error:  # tokenizers raises bare Exception for a file it cannot parse
            raise UserError(f"cannot read {file} as a tokenizer ({error}); {WANTED}") from error
        if special != (PAD, EOS):
            raise UserError(
                f"{file} is not umT5's: <pad>, </s> have ids {special}, not {(PAD, EOS)}; {WANTED}"
            )

    def __call__(self, text: str) -> list[int]:
        ids = self._encode(text)
        return ids if ids[-1:] == [EOS] else [*ids, EOS]


def _find(path: Path) -> Path:
    candidates = [path / name for name in FILES] if path.is_dir() else [path]
    for file in candidates:
        if file.is_file():
            return file
    raise UserError(f"no umT5 tokenizer at {path}; {WANTED}")


Parts = tuple[int, tuple[int | None, int | None], Callable[[str], list[int]]]


def _read_json(file: str) -> Parts:
    """Number of ids, ids of <pad> and </s>, and the encoder."""
    from tokenizers import Tokenizer as Fast

    fast = Fast.from_file(file)
    # a file may carry the padding and truncation of whoever saved it
    fast.no_padding()
    fast.no_truncation()
    special = (fast.token_to_id("<pad>"), fast.token_to_id("</s>"))
    return fast.get_vocab_size(), special, lambda text: fast.encode(text).ids


def _read_sentencepiece(file: str) -> Parts:
    from sentencepiece import SentencePieceProcessor

    pieces = SentencePieceProcessor(model_file=file)
    return pieces.get_piece_size(), (pieces.pad_id(), pieces.eos_id()), pieces.encode
