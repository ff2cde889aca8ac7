import torch
from torch import nn

from distill.precision import Compute, halved


def make() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 2))


def is_norm(name: str) -> bool:
    return name.startswith("1.")


def test_float32_computes_with_the_weights_themselves():
    module, x = make(), torch.randn(3, 8)
    assert torch.equal(Compute(module, torch.float32, is_norm)(x), module(x))


def test_bfloat16_computes_what_the_rounded_module_computes():
    module, x = make(), torch.randn(3, 8).bfloat16()
    out = Compute(module, torch.bfloat16, lambda name: False)(x)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, halved(module, lambda name: False)(x))


def test_gradients_arrive_in_fp32_at_the_fp32_weights():
    module, x = make(), torch.randn(3, 8).bfloat16()
    Compute(module, torch.bfloat16, lambda name: False)(x).sum().backward()
    rounded = halved(module, lambda name: False)
    rounded(x).sum().backward()
    for ours, theirs in zip(module.parameters(), rounded.parameters(), strict=True):
        assert ours.dtype == ours.grad.dtype == torch.float32
        # the cast's derivative is one: the same numbers, in another dtype
        assert torch.equal(ours.grad, theirs.grad.float())


def test_named_weights_stay_fp32():
    seen = {}
    module = make()
    module[1].register_forward_pre_hook(lambda layer, args: seen.update(norm=layer.weight.dtype))
    module[1].forward = lambda x: x
    module[2].register_forward_pre_hook(lambda layer, args: seen.update(linear=layer.weight.dtype))
    Compute(module, torch.bfloat16, is_norm)(torch.randn(3, 8).bfloat16())
    assert seen == {"norm": torch.float32, "linear": torch.bfloat16}


def test_halved_is_a_copy_that_keeps_the_named_weights():
    module = make()
    copied = halved(module, is_norm)
    assert [p.dtype for p in copied.parameters()] == [torch.bfloat16] * 2 + [torch.float32] * 2 + [
        torch.bfloat16
    ] * 2
    assert all(p.dtype == torch.float32 for p in module.parameters())
