"""Models and their blocks come to the device, run there, and leave as they came."""

from itertools import pairwise

import pytest
import torch

from turbodiffusion.models.int8 import Int8Linear
from turbodiffusion.models.text import TextEncoder
from turbodiffusion.models.tokenizers import ByteTokenizer
from turbodiffusion.pipelines.offload import Residence

CPU = torch.device("cpu")


@torch.no_grad()
def test_streamed_blocks_run_elsewhere_and_come_home() -> None:
    # an odd number: places must not follow the index; one in 8 bits: blocks need not be alike
    blocks = [torch.nn.Linear(4, 4, bias=i > 0) for i in range(3)]
    blocks[1] = Int8Linear.from_linear(blocks[1])
    model, x = torch.nn.Sequential(*blocks), torch.randn(2, 4)
    wanted, homes = model(x), [block.weight.data_ptr() for block in blocks]
    seen: list[int] = []
    for block in blocks:
        block.register_forward_hook(lambda module, *_: seen.append(module.weight.data_ptr()), prepend=True)
    residence = Residence(CPU, "block")
    residence.use(model, blocks)
    seen.clear()
    for _ in range(4):
        assert torch.equal(model(x), wanted)
    assert len(set(seen)) == 2
    assert not set(seen) & set(homes)
    assert all(one != two for one, two in pairwise(seen))
    residence.release()
    assert [block.weight.data_ptr() for block in blocks] == homes


@torch.no_grad()
def test_a_block_that_fails_comes_home_too() -> None:
    blocks = [torch.nn.Linear(4, 4) for _ in range(2)]
    homes = [block.weight.data_ptr() for block in blocks]
    residence = Residence(CPU, "block")
    residence.use(torch.nn.Sequential(*blocks), blocks)
    with pytest.raises(RuntimeError):
        blocks[0](torch.randn(2, 5))
    residence.release()
    assert [block.weight.data_ptr() for block in blocks] == homes


@pytest.mark.gpu
def test_staging_sends_home_what_is_not_in_use() -> None:
    device = torch.device("cuda")
    one, two = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    weight = one.weight.clone()
    residence = Residence(device, "stage")
    residence.use(one)
    assert one.weight.is_cuda
    assert not two.weight.is_cuda
    residence.use(two)
    assert two.weight.is_cuda
    assert torch.equal(one.weight, weight)
    residence.release()
    assert not two.weight.is_cuda


@pytest.mark.gpu
@torch.no_grad()
def test_streaming_holds_two_blocks_and_computes_the_same() -> None:
    device, width, count = torch.device("cuda"), 2048, 8
    blocks = [torch.nn.Linear(width, width) for _ in range(count)]
    model, x = torch.nn.Sequential(*blocks), torch.randn(4, width, device=device)
    wanted = model.to(device)(x)
    model.to("cpu")
    idle = torch.cuda.memory_allocated()  # workspaces of the libraries, too
    residence = Residence(device, "block")
    residence.use(model, blocks)
    for _ in range(3):  # round and round, as denoising steps do
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        assert torch.equal(model(x), wanted)
        torch.cuda.synchronize()
        # the two places were there before; activations are small beside a block of 4 * width ** 2 bytes
        assert torch.cuda.max_memory_allocated() - before < width**2
    assert torch.cuda.memory_allocated() - idle < 2.5 * 4 * width**2
    residence.release()
    assert not any(p.is_cuda for p in model.parameters())
    torch.cuda.synchronize()


@pytest.mark.gpu
def test_a_streamed_text_encoder_has_its_embedding_and_two_blocks_on_the_device() -> None:
    sizes = {"length": 64, "dim": 1024, "ffn_dim": 2048, "heads": 16, "head_dim": 64, "layers": 8}
    encoder = TextEncoder(tokenizer=ByteTokenizer(), vocab=8192, **sizes).to(torch.bfloat16)
    embedding = encoder.encoder.embed_tokens.weight
    block = sum(p.nbytes for p in encoder.shard_units()[0].parameters())
    device, texts = torch.device("cuda"), [["an octopus drifts left"], [""]]
    whole, streamed = Residence(device, "stage"), Residence(device, "block")
    whole.use(encoder)
    wanted = [encoder(text) for text in texts]
    whole.release()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    idle = torch.cuda.memory_allocated()  # workspaces of the libraries, too
    streamed.use(encoder, encoder.shard_units())
    assert all(torch.equal(encoder(text), context) for text, context in zip(texts, wanted, strict=True))
    # what 23 tokens make is small beside a block of 21 MB
    assert torch.cuda.max_memory_allocated() - idle < embedding.nbytes + 2.5 * block
    streamed.release()
    assert not any(p.is_cuda for p in encoder.parameters())
