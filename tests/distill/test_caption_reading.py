"""The text encoder's own training: what it is asked, and that asking helps."""

import pytest
import torch

from distill.caption_reading import CaptionReading, CaptionStream, Reader, ReaderOutcome
from distill.objective import unwatched
from turbodiffusion.models.text import TextEncoder
from turbodiffusion.models.tokenizers import PAD, ByteTokenizer
from turbodiffusion.small_world.split import triples


@pytest.fixture
def encoder() -> TextEncoder:
    return TextEncoder(
        tokenizer=ByteTokenizer(), length=96, vocab=259, dim=32, ffn_dim=32, heads=2, head_dim=8, layers=1
    )


def test_captions_state_their_triples_and_come_from_their_split(encoder: TextEncoder) -> None:
    batch = CaptionStream(encoder, 16, seed=0, split="held_out_combinations").batch(3)
    held_out = {tuple(triple) for triple in triples("held_out_combinations").tolist()}
    assert all(tuple(triple) in held_out for triple in batch.triples.tolist())
    text = bytes((batch.tokens[0][batch.tokens[0] > 2] - 3).tolist()).decode()
    from turbodiffusion.small_world.sprites import subject_names

    assert subject_names()[batch.triples[0, 0]] in text


def test_padding_does_not_change_what_is_read(encoder: TextEncoder) -> None:
    reader = Reader(encoder)
    tokens = CaptionStream(encoder, 4, seed=0).batch(0).tokens
    padded = torch.nn.functional.pad(tokens, (0, 9), value=PAD)
    for short, long in zip(reader(tokens), reader(padded), strict=True):
        torch.testing.assert_close(short, long, rtol=1e-4, atol=1e-5)  # fp32, another order of summation


def test_twenty_steps_lower_the_loss_and_the_shipped_encoder_has_no_heads(encoder: TextEncoder) -> None:
    reader, stream = Reader(encoder), CaptionStream(encoder, 16, seed=0)
    objective = CaptionReading(reader)
    optimizer = torch.optim.Adam(reader.parameters(), lr=1e-2)
    losses = []
    for step in range(20):
        ((_, loss),) = objective.losses(stream.batch(0), step, torch.Generator(), unwatched)
        loss.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.mean().item())
    # one batch, learnt by heart: far below the start, ln 72 + ln 9 + ln 16
    assert losses[-1] < 0.8 * losses[0]
    outcome = ReaderOutcome(stream, 1, "text")
    (product,) = outcome.products({"reader": reader})
    assert product.module is encoder
    assert set(outcome.measure({"reader": reader})) == {
        "held_out/subject",
        "held_out/motion",
        "held_out/background",
    }
