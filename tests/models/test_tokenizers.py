import json
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import ByT5Tokenizer

from turbodiffusion.errors import UserError
from turbodiffusion.models.tokenizers import EOS, ByteTokenizer, FileTokenizer

TEXTS = ["", "an octopus drifts left", "ein Käse, 熊猫 🐙\n", "a\u0301 \u200b tab\t"]


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_are_those_of_byt5(text: str) -> None:
    assert ByteTokenizer()(text) == ByT5Tokenizer()(text).input_ids


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_decode_to_the_text(text: str) -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.decode([*tokenizer(text), 0, 0]) == text


def test_every_byte_has_an_id_inside_the_vocabulary() -> None:
    ids = {i for text in map(chr, range(0x800)) for i in ByteTokenizer()(text)}
    assert max(ids) < ByteTokenizer.vocab
    assert min(ids) == EOS


def _write_json(folder: Path, specials: list[str], *, adds_eos: bool = True) -> Path:
    """Built as umT5's is: metaspace words, EOS from a template.  Padding and truncation are left on."""
    pieces = [*specials, *(("▁" + word) for word in ["a", "cat", "sits"]), "t"]
    fast = Tokenizer(models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], unk_id=2))
    fast.normalizer = normalizers.NFKC()
    fast.pre_tokenizer = pre_tokenizers.Metaspace()
    if adds_eos:
        end = ("</s>", specials.index("</s>"))
        fast.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[end])
    fast.enable_padding(length=16)
    fast.enable_truncation(max_length=2)
    fast.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


UMT5_SPECIALS = ["<pad>", "</s>", "<unk>"]


@pytest.mark.parametrize("adds_eos", [True, False])
def test_json_file_gives_its_pieces_and_one_eos(tmp_path: Path, adds_eos: bool) -> None:
    tokenizer = FileTokenizer(_write_json(tmp_path, UMT5_SPECIALS, adds_eos=adds_eos))
    assert tokenizer("a cat sits") == [3, 4, 5, EOS]
    assert tokenizer("") == [EOS]
    assert tokenizer.vocab == 7


def _write_sentencepiece(folder: Path) -> Path:
    corpus = folder / "corpus.txt"
    corpus.write_text("a cat sits\nthe dog sits\na dog and a cat\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(folder / "spiece"),
        vocab_size=16,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return folder / "spiece.model"


def test_sentencepiece_file_gives_its_pieces_and_one_eos(tmp_path: Path) -> None:
    file = _write_sentencepiece(tmp_path)
    tokenizer, pieces = FileTokenizer(file), sentencepiece.SentencePieceProcessor(model_file=str(file))
    assert tokenizer("a cat sits") == [*pieces.encode("a cat sits"), EOS]
    assert tokenizer("") == [EOS]
    assert tokenizer.vocab == 16


def test_folder_prefers_the_json_file(tmp_path: Path) -> None:
    _write_sentencepiece(tmp_path)
    assert FileTokenizer(tmp_path).vocab == 16
    _write_json(tmp_path, UMT5_SPECIALS)
    assert FileTokenizer(str(tmp_path)).vocab == 7


def test_missing_file_says_what_is_wanted_and_whence(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        with pytest.raises(UserError, match=r"tokenizer\.json or spiece\.model.*google/umt5-xxl"):
            FileTokenizer(path)


@pytest.mark.parametrize("name", ["tokenizer.json", "spiece.model"])
def test_unreadable_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match="cannot read"):
        FileTokenizer(tmp_path / name)


def test_another_models_file_is_refused(tmp_path: Path) -> None:
    # XLM-R's ids; Wan's image-to-video folders hold its tokenizer next to umT5's
    file = _write_json(tmp_path, ["<s>", "<pad>", "<unk>", "</s>"])
    assert json.loads(file.read_text())["model"]["type"] == "Unigram"
    with pytest.raises(UserError, match="not umT5's"):
        FileTokenizer(file)
