import pytest
import torch
from diffusers import UniPCMultistepScheduler

from turbodiffusion.errors import UserError
from turbodiffusion.models.wan import WanModel
from turbodiffusion.samplers.denoiser import Denoiser, experts_used
from turbodiffusion.samplers.few_step import sample_rcm
from turbodiffusion.samplers.noise import SampleNoise
from turbodiffusion.samplers.ode import sample_dpmpp, sample_euler, sample_unipc
from turbodiffusion.samplers.time import dpmpp_times, student_times, unipc_times

B, C, T, H, W = 2, 4, 3, 4, 6
TOKENS = (H // 2) * (W // 2)


def randn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def s_of(value):
    return torch.tensor(value, dtype=torch.float64)


class Field:
    """A network in closed form: its velocity depends on all it is given, and it remembers its calls."""

    def __init__(self, scale=1.0):
        self.scale, self.calls = scale, []

    def __call__(self, x, timesteps, context, *, condition, clip):
        self.calls.append((x, timesteps, context))
        given = context.mean((1, 2))
        for extra in (condition, clip):
            given = given if extra is None else given + extra.flatten(1).mean(1)
        if timesteps.ndim == 2:
            timesteps = timesteps.unflatten(1, (T, H // 2, W // 2))
            timesteps = timesteps.repeat_interleave(2, 2).repeat_interleave(2, 3).unsqueeze(1)
        else:
            timesteps = timesteps.view(-1, 1, 1, 1, 1)
        return (self.scale * torch.tanh(x + timesteps / 1000) + given.view(-1, 1, 1, 1, 1)).float()


POSITIVE, NEGATIVE = randn(1, B, 5, 8), randn(2, B, 5, 8)
X = randn(3, B, C, T, H, W).double()


def test_guidance_extrapolates_from_the_negative():
    s, network = s_of(0.7), Field()
    v_c, v_u = (Denoiser(network=network, context=text)(X, s) for text in (POSITIVE, NEGATIVE))
    guided = Denoiser(network=network, context=POSITIVE, negative=NEGATIVE, guidance=5.0)(X, s)
    # roundings of fp64
    assert torch.allclose(guided, v_u + 5 * (v_c - v_u), rtol=0, atol=1e-14)
    assert guided.dtype == torch.float64


def test_guidance_one_runs_the_network_once():
    network = Field()
    Denoiser(network=network, context=POSITIVE, negative=NEGATIVE)(X, s_of(0.7))
    assert len(network.calls) == 1


def tiny_wan():
    torch.manual_seed(0)
    network = WanModel(
        dim=24, ffn_dim=32, heads=2, layers=2, in_channels=C + 2, out_channels=C, text_dim=8, text_length=6
    )
    torch.nn.init.normal_(network.head.head.weight)
    return network


@pytest.mark.parametrize("first_frame", [None, randn(6, 1, C, 1, H, W)], ids=["t2v", "ti2v"])
@torch.no_grad()
def test_shared_rows_change_nothing(first_frame):
    network, s = tiny_wan(), s_of(0.6)
    one, negative, condition = randn(4, 1, 5, 8), randn(5, 1, 5, 8), randn(7, 1, 2, T, H, W)

    def run(text, condition):
        denoiser = Denoiser(
            network=network,
            context=text,
            negative=negative,
            guidance=4.0,
            condition=condition,
            first_frame=first_frame,
        )
        return denoiser(X, s)

    expected = run(one.repeat(B, 1, 1), condition.repeat(B, 1, 1, 1, 1))
    # fp32 products may be summed in another order; guidance 4 amplifies that
    assert torch.allclose(run(one, condition), expected, rtol=0, atol=1e-4)
    assert not torch.allclose(run(negative, condition), expected, rtol=0, atol=1e-2)


@pytest.mark.parametrize(
    ("rule", "told"), [("float", 987.6543209876543), ("truncate", 987.0), ("bfloat16", 988.0)]
)
def test_the_network_is_told_the_time_by_the_rule(rule, told):
    network = Field()
    Denoiser(network=network, context=POSITIVE, timesteps=rule)(X, student_times(1, 80.0)[0])
    _, timesteps, _ = network.calls[0]
    assert timesteps.tolist() == pytest.approx([told] * B, rel=1e-15)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [(1, ["high"]), (2, ["high"] * 2), (3, ["high"] * 2 + ["low"]), (4, ["high"] * 2 + ["low"] * 2)],
)
def test_students_switch_experts_at_the_boundary(steps, expected):
    order = []

    def expert(name):
        def network(x, timesteps, context, *, condition, clip):
            order.append(name)
            return x

        return network

    denoiser = Denoiser(network=expert("high"), network_low=expert("low"), boundary=0.9, context=POSITIVE)
    times = student_times(steps, 200.0)
    sample_rcm(denoiser, X, times, lambda: X)
    assert order == expected
    assert experts_used(times, 0.9) == tuple(dict.fromkeys(expected))


def test_the_boundary_itself_belongs_to_the_high_noise_expert():
    high, low = Field(), Field()
    denoiser = Denoiser(network=high, network_low=low, boundary=0.9, context=POSITIVE)
    denoiser(X, s_of(0.9))
    assert (len(high.calls), len(low.calls)) == (1, 0)
    assert experts_used(torch.tensor([0.9, 0.0]), 0.9) == ("high",)
    assert experts_used(torch.tensor([0.8, 0.0]), 0.9) == ("low",)


def test_each_expert_has_its_guidance():
    high, low = Field(), Field(2.0)
    denoiser = Denoiser(
        network=high,
        network_low=low,
        boundary=0.875,
        context=POSITIVE,
        negative=NEGATIVE,
        guidance=4.0,
        guidance_low=3.0,
    )
    for s, network, guidance in ((0.95, high, 4.0), (0.5, low, 3.0)):
        alone = Denoiser(network=network, context=POSITIVE, negative=NEGATIVE, guidance=guidance)
        assert torch.equal(denoiser(X, s_of(s)), alone(X, s_of(s)))


FIRST = randn(8, B, C, 1, H, W)
# rcm's own noise comes in the middle of its steps
DRAWN = SampleNoise([1, 2], (C, T, H, W))


@pytest.mark.parametrize(
    ("sampler", "times"),
    [
        (sample_euler, unipc_times(6, 5.0)),
        (sample_unipc, unipc_times(6, 5.0)),
        (sample_dpmpp, dpmpp_times(6, 5.0)),
        (lambda *given: sample_rcm(*given, DRAWN.draw), student_times(4, 80.0)),
    ],
    ids=["euler", "unipc", "dpmpp", "rcm"],
)
def test_a_first_frame_is_seen_clean_at_every_step_and_kept(sampler, times):
    network = Field()
    latents = sampler(Denoiser(network=network, context=POSITIVE, first_frame=FIRST), X, times)
    assert len(network.calls) == len(times) - 1
    for (x, timesteps, _), s in zip(network.calls, times[:-1], strict=True):
        assert torch.equal(x[:, :, :1], FIRST.double())
        told = torch.tensor([0.0] * TOKENS + [1000 * s] * (T - 1) * TOKENS, dtype=torch.float64)
        assert torch.equal(timesteps, told.expand(B, -1))
    # x - s (x - clean) / s: roundings of fp64
    assert torch.allclose(latents[:, :, :1], FIRST.double(), rtol=0, atol=1e-13)


def test_a_first_frame_equals_overwriting_the_state_around_every_step():
    network, times = Field(), unipc_times(8, 5.0)
    ours = sample_unipc(Denoiser(network=network, context=POSITIVE, first_frame=FIRST), X, times)

    # as Wan2.2 does it: before the first step and after every step
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    scheduler.set_timesteps(8)
    scheduler.sigmas = times
    scheduler.set_begin_index(0)
    x = torch.cat([FIRST.double(), X[:, :, 1:]], dim=2)
    for timestep, s in zip(scheduler.timesteps, times[:-1], strict=True):
        tokens = torch.tensor([0.0] * TOKENS + [1000 * s] * (T - 1) * TOKENS).double().expand(B, -1)
        velocity = network(x, tokens, POSITIVE, condition=None, clip=None)
        x = scheduler.step(velocity, timestep, x).prev_sample
        x = torch.cat([FIRST.double(), x[:, :, 1:]], dim=2)
    # the network computes in fp32 here: a rounding or two of 6e-8 a step
    assert (ours - x).norm() / x.norm() < 1e-6


def test_a_sample_does_not_depend_on_its_batch():
    network, times = Field(), student_times(4, 80.0)

    def run(seeds, text):
        noise = SampleNoise(seeds, (C, T, H, W))
        return sample_rcm(Denoiser(network=network, context=text), noise.draw(), times, noise.draw)

    both = run([11, 12], POSITIVE)
    # vectorised tanh may round differently at another offset
    assert torch.allclose(both[1:], run([12], POSITIVE[1:]), rtol=0, atol=1e-6)


def test_the_guidance_of_an_absent_expert_is_not_missed():
    Denoiser(network=Field(), context=POSITIVE, guidance_low=3.0)(X, s_of(0.5))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"guidance": 5.0}, "negative"),
        ({"guidance_low": 3.0, "network_low": Field(), "boundary": 0.9}, "negative"),
        ({"network_low": Field()}, "boundary"),
        ({"boundary": 0.9}, "boundary"),
    ],
)
def test_what_does_not_fit_together_is_refused(wrong, says):
    with pytest.raises(UserError, match=says):
        Denoiser(network=Field(), context=POSITIVE, **wrong)
