import json
import os
import signal
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from distill.objective import unwatched
from distill.scm import SCMLoss
from distill.trainer import Plan, Trainer
from tests.distill.ranks import make_trainer
from turbodiffusion.errors import UserError

Make = Callable[..., Trainer]


def weights(trainer: Trainer) -> list[Tensor]:
    """Everything that training changes: weights, averages, moments."""
    networks = [dict(masters.module.named_parameters()) for masters in trainer.masters.values()]
    networks += [average.weights for average in trainer.averages.values()]
    moments = [
        value
        for optimizer in trainer.state.optimizers.values()
        for state in optimizer.state.values()
        for value in state.values()
    ]
    return [p.detach().clone() for network in networks for p in network.values()] + moments


def stop_after(trainer: Trainer, steps: int, then: Callable[[], None]) -> None:
    """Have `then` called by the data of the step after that many."""
    batch = trainer.data.batch

    class Stopping:
        def batch(self, number: int) -> Tensor:
            if trainer.state.step == steps:
                then()
            return batch(number)

    trainer.data = Stopping()


def gradients(trainer: Trainer, steps: int) -> list[Tensor]:
    """What the optimiser is given in that many steps."""
    seen = []
    (optimizer,) = trainer.state.optimizers.values()
    optimizer.register_step_pre_hook(
        lambda optimizer, args, kwargs: seen.extend(
            p.grad.clone() for group in optimizer.param_groups for p in group["params"]
        )
    )
    for _ in range(steps):
        trainer.update()
    return seen


def test_accumulated_batches_have_the_gradient_of_one_large_batch(toy: Make):
    large = gradients(toy("large", rows=16, noise=0.0, max_grad_norm=1e9), 3)
    small = gradients(toy("small", rows=4, accumulate=4, noise=0.0, max_grad_norm=1e9), 3)
    for ours, theirs in zip(small, large, strict=True):
        # the same fp32 sums in another order
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_training_finds_the_line(toy: Make):
    trainer = toy(steps=300)
    trainer.fit()
    # noise of 0.1 on 512 rows leaves 0.005 a weight; the rate ends at zero, and so does the jitter of steps
    torch.testing.assert_close(trainer.masters["line"].module.weight, torch.ones(4, 1), rtol=0, atol=0.02)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("toy", {}), ("toy", {"matrices": "muon"}), ("toy", {"beta1": 0.0}), ("flow", {})],
)
def test_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    kind: str, options: dict[str, object], request: pytest.FixtureRequest
):
    make: Make = partial(request.getfixturevalue(kind), **options)
    whole = make("whole", accumulate=2)
    whole.fit()
    broken = make("broken", accumulate=2, save_every=5)
    stop_after(broken, 7, _die)
    with pytest.raises(RuntimeError, match="killed"):
        broken.fit()
    resumed = make("broken", accumulate=2, save_every=5)
    assert resumed.state.step == 5
    resumed.fit()
    for ours, theirs in zip(weights(resumed), weights(whole), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("before", "after", "sentence"),
    [
        ({"matrices": "muon"}, {}, "holds momentum, and this run wants exp_avg, exp_avg_sq, step;"),
        ({}, {"matrices": "muon"}, "holds exp_avg, exp_avg_sq, step, and this run wants momentum;"),
        ({"beta1": 0.0}, {}, "holds exp_avg_sq, step, and this run wants exp_avg, exp_avg_sq, step;"),
    ],
)
def test_another_optimiser_can_not_go_on(
    before: dict[str, object], after: dict[str, object], sentence: str, toy: Make
):
    toy(**before).fit()
    with pytest.raises(UserError, match=f"step-0000012 was made with another optimiser: .* {sentence}"):
        toy(**after)


def test_offload_changes_nothing_on_the_cpu(toy: Make):
    here, there = toy("here"), toy("there", offload=True)
    for trainer in (here, there):
        trainer.fit()
    assert all(torch.equal(a, b) for a, b in zip(weights(here), weights(there), strict=True))


def test_offload_is_refused_where_several_processes_were_started(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"offload=true is for one process; .* shard="):
        Plan(steps=1, offload=True)


def test_first_moments_that_are_not_wanted_are_left_behind(toy: Make):
    before = toy()
    before.fit()
    after = toy(beta1=0.0)
    assert after.state.step == 12
    (ours,), (theirs,) = (run.state.optimizers["line"].state.values() for run in (after, before))
    assert ours.keys() == {"step", "exp_avg_sq"}
    assert all(torch.equal(value, theirs[kind]) for kind, value in ours.items())


def _die() -> None:
    raise RuntimeError("killed")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_saves_and_the_run_goes_on_from_there(toy: Make, number: int):
    before = signal.getsignal(number)
    stopped = toy()
    stop_after(stopped, 4, lambda: os.kill(os.getpid(), number))
    with pytest.raises(KeyboardInterrupt):
        stopped.fit()
    assert signal.getsignal(number) is before
    resumed = toy()
    assert resumed.state.step == 5
    for ours, theirs in zip(weights(resumed), weights(stopped), strict=True):
        assert torch.equal(ours, theirs)


def test_gradients_are_clipped_to_the_limit(toy: Make):
    (gradient,) = gradients(toy(max_grad_norm=1e-3), 1)
    # PyTorch adds 1e-6 to the norm it divides by, which is about 4 here
    assert gradient.norm().item() == pytest.approx(1e-3, rel=1e-5)


def test_small_gradients_are_left_alone(toy: Make):
    clipped, free = toy("a", max_grad_norm=1e6), toy("b", max_grad_norm=float("inf"))
    for trainer in (clipped, free):
        trainer.update()
    for ours, theirs in zip(weights(clipped), weights(free), strict=True):
        assert torch.equal(ours, theirs)


def test_bad_gradient_stops_before_the_step_and_names_it(toy: Make):
    trainer = toy(poison_at=3)
    for _ in range(3):
        trainer.update()
    before = weights(trainer)
    with pytest.raises(UserError, match=r"norm of line is (inf|nan) at step 3"):
        trainer.update()
    for ours, theirs in zip(weights(trainer), before, strict=True):
        assert torch.equal(ours, theirs)


def test_bad_gradient_leaves_the_last_good_checkpoint(toy: Make):
    with pytest.raises(UserError):
        toy(poison_at=7, save_every=3).fit()
    resumed = toy()
    assert resumed.state.step == 6
    assert all(value.isfinite().all() for value in weights(resumed))


class Broken(nn.Module):
    """A network that fails on the first sample of every batch."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor, **given: Tensor | None) -> Tensor:
        out = self.network(x, timesteps, context, **given)
        return torch.cat((out[:1] * torch.nan, out[1:]))


@pytest.mark.parametrize("skip", [False, True])
def test_sample_without_numbers_is_skipped_or_stops_the_run_as_configured(skip: bool, tmp_path: Path):
    trainer = make_trainer(tmp_path)
    rcm = trainer.objective
    consistency = replace(rcm.method.consistency, loss=SCMLoss(warmup_steps=2, skip_nonfinite=skip))
    method = replace(rcm.method, consistency=consistency)
    trainer.objective = replace(rcm, method=method, teacher=Broken(rcm.teacher))
    before = weights(trainer)
    with nullcontext() if skip else pytest.raises(UserError, match="consistency of batch 0"):
        trainer.update()
    after = weights(trainer)[: len(before)]  # the moments come last
    assert all(value.isfinite().all() for value in after)
    assert skip != all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_flow_matching_run_lowers_the_loss(flow: Make):
    trainer = flow("flow", steps=30)

    def loss() -> float:
        """At the same clips, times and noise whenever it is asked for."""
        rng = torch.Generator().manual_seed(1)
        made = trainer.objective.losses(trainer.data.batch(0), 0, rng, unwatched)
        return dict(made)["velocity"].mean().item()

    before = loss()
    trainer.fit()
    lines = [json.loads(line) for line in trainer.log.path.read_text().splitlines()]
    assert len([line for line in lines if "loss/velocity" in line]) == 30
    # random latents and noise give 2 at the start; knowing nothing but their mean gives 1 to 2, by time
    assert loss() < 0.9 * before


def test_run_ends_by_time_with_its_rate_annealed(toy: Make):
    trainer = toy(steps=10**9, max_minutes=0.01)
    trainer.fit()
    lines = [json.loads(line) for line in trainer.log.path.read_text().splitlines()]
    rates = [line["lr"] for line in lines if "lr" in line]
    assert trainer.plan.progress(trainer.state) >= 1
    # steps last well under a hundredth of the 0.6 s: the cosine's last hundredth is below 1e-3 of the rate
    assert rates[-1] < 0.02 * max(rates)


def test_more_steps_continue_a_finished_run(toy: Make):
    toy(steps=4).fit()
    longer = toy(steps=6)
    assert longer.state.step == 4
    longer.fit()
    assert longer.state.step == 6


def test_averages_are_what_the_outcome_sees(toy: Make):
    trainer = toy()
    trainer.fit()
    (shown,) = trainer.outcome.shown
    assert torch.equal(shown["weight"], trainer.averages["line"].weights["weight"])
    assert not torch.equal(shown["weight"], trainer.masters["line"].module.weight)


def test_previews_and_log_are_written(toy: Make):
    trainer = toy(preview_every=6)
    trainer.fit()
    names = sorted(path.name for path in (trainer.folder / "previews").iterdir())
    assert names == [f"step-00000{n}.{kind}" for n in ("06", "12") for kind in ("png", "webp")]
    lines = [json.loads(line) for line in trainer.log.path.read_text().splitlines()]
    assert {"step", "loss/square", "grad_norm/line", "lr", "samples_per_s"} <= lines[0].keys()
    assert [line["step"] for line in lines if "size" in line] == [6, 12]


def test_verdict_is_the_last_word_of_a_finished_run_alone(toy: Make, capsys: pytest.CaptureFixture[str]):
    toy(preview_every=6).fit()
    assert capsys.readouterr().out.count("the size is 1") == 1


def test_impossible_plan_is_refused():
    with pytest.raises(UserError, match="accumulate=0"):
        Plan(steps=1, accumulate=0)
