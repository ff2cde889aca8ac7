import pytest
import torch
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker

from distill.ema import PowerEMA
from distill.objective import nothing
from distill.precision import AT_ONCE, Masters, lower, stored
from distill.sharding import mesh, shard


def make() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 2))


def is_norm(name: str) -> bool:
    return name.startswith("1.")


def test_named_weights_stay_fp32():
    dtypes = [p.dtype for p in lower(make(), torch.bfloat16, is_norm).parameters()]
    assert dtypes == [torch.bfloat16] * 2 + [torch.float32] * 2 + [torch.bfloat16] * 2


def test_what_is_stored_is_rounded_but_for_named_weights_and_buffers():
    module = make()
    module.register_buffer("scale", torch.tensor(1 / 3))
    for name, value in stored(module, is_norm).items():
        wanted = module.state_dict()[name]
        assert torch.equal(value, wanted if is_norm(name) or name == "scale" else wanted.bfloat16())
        assert wanted.dtype == torch.float32


def test_an_fp32_module_is_its_own_master():
    module = make()
    masters = Masters(module)
    assert all(a is b for a, b in zip(module.parameters(), masters.weights.values(), strict=True))


def test_gradients_of_two_backwards_add_up_in_fp32():
    module, plain = (lower(make(), torch.bfloat16, nothing) for _ in range(2))
    masters, parts = Masters(module), []
    for x in (torch.randn(3, 8), 1e-3 * torch.randn(3, 8)):
        for each in (module, plain):
            each(x.bfloat16()).sum().backward()
        masters.collect()
        parts.append([p.grad.float() for p in plain.parameters()])
        plain.zero_grad()
    for master, first, second in zip(masters.weights.values(), *parts, strict=True):
        assert torch.equal(master.grad, first + second)
    assert all(p.grad is None for p in module.parameters())


def test_what_trains_lives_where_it_is_sent():
    module = lower(make(), torch.bfloat16, is_norm)
    masters = Masters(module, torch.device("meta"))
    average = PowerEMA(masters, 0.1)
    for _ in range(2):  # the first's wait for `collect`, the second's do not
        module(torch.randn(3, 8).bfloat16()).float().sum().backward()
        masters.collect()
        assert all(p.grad is None for p in module.parameters())
    grads = [master.grad for master in masters.weights.values()]
    for each in (*masters.weights.values(), *grads, *average.weights.values()):
        assert (each.device.type, each.dtype) == ("meta", torch.float32)


@pytest.mark.gpu
def test_masters_on_the_host_see_and_give_the_same_bits():
    seen = []
    for device in (None, torch.device("cpu")):
        module = lower(make(), torch.bfloat16, is_norm).cuda()
        first, norm, last = module
        masters, rng = Masters(module, device), torch.Generator().manual_seed(0)
        for _ in range(2):
            x = first(torch.randn(3, 8, generator=rng).cuda().bfloat16())
            last(norm(x.float()).bfloat16()).sum().backward()
            masters.collect()
        for master in masters.weights.values():
            # one exact product and one sum, which all devices round alike
            master.data.add_(master.grad / 8)
        masters.publish()
        seen.append([x.cpu() for m in masters.weights.values() for x in (m, m.grad)])
        seen[-1] += [weight.cpu() for weight in module.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


@pytest.mark.filterwarnings("ignore:Expected a tensor")  # the input has no gradient
@pytest.mark.parametrize("backwards", [1, 2])
def test_gradients_take_four_bytes_a_weight(backwards: int):
    layers = 4 * AT_ONCE
    module = lower(
        nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(layers))), torch.bfloat16, nothing
    )
    masters, memory = Masters(module), MemTracker()
    memory.track_external(module, *masters.weights.values())
    with memory:
        for _ in range(backwards):
            memory.reset_mod_stats()
            module(torch.randn(1, 64).bfloat16()).sum().backward()
            masters.collect()
    (peak,) = memory.get_tracker_snapshot("peak").values()
    # beside 6 of weights and masters: the last ones moved still have their 2; activations are a row a layer
    assert peak["Total"] / (64 * 64 * layers) - 6 == pytest.approx(4 + 2 / 4, abs=2 * 2 / 64)


@pytest.mark.usefixtures("two_ranks")
def test_a_second_backward_of_shards_is_added_as_it_comes():
    module = lower(make(), torch.bfloat16, nothing)
    shard(module, [module[0]], mesh(torch.device("cpu"), 2))
    masters = Masters(module)
    for are_added in (False, True):
        module(torch.randn(3, 8).bfloat16()).sum().backward()
        assert all((p.grad is None) is are_added for p in module.parameters())
        masters.collect()
        assert all(p.grad is None for p in module.parameters())


def test_steps_too_small_for_bf16_are_kept_by_the_masters():
    module = lower(nn.Linear(1, 1, bias=False), torch.bfloat16, nothing)
    nn.init.constant_(module.weight, 1.0)
    masters = Masters(module)
    for _ in range(100):
        masters.weights["weight"].data.add_(1e-4)
        masters.publish()
    # 1 + 1e-4 rounds to 1 in bf16, whose spacing there is 1/128; a hundred of them to 1 + 1/128
    assert masters.weights["weight"].item() == pytest.approx(1.01, abs=1e-5)
    assert module.weight.item() == 1 + 1 / 128


def test_frozen_parameters_have_no_master_and_travel_in_the_state():
    module = make()
    module[0].requires_grad_(False)
    masters = Masters(lower(module, torch.bfloat16, is_norm))
    assert set(masters.weights) == {"1.weight", "1.bias", "2.weight", "2.bias"}
    assert set(masters.tensors()) == set(module.state_dict())
