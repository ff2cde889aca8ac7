"""Which form of a kernel is used when some are wrong: real functions, of which some are."""

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels.selftest import error_share, first_sound, poisoned

Form = Callable[[Tensor], tuple[Tensor, Tensor]]


def right(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.exp(), x.sum()


def wrong(x: Tensor) -> tuple[Tensor, Tensor]:
    return 1 + x, x.sum()


def unfinished(x: Tensor) -> tuple[Tensor, Tensor]:
    """Leaves the last element of its output as it was allocated."""
    out = torch.empty_like(x)
    out[:-1] = x[:-1].exp()
    return out, x.sum()


def raising(x: Tensor) -> tuple[Tensor, Tensor]:
    raise ValueError(f"out of resource for {len(x)} elements\nand a long story")


def check(form: Form) -> float:
    x = torch.linspace(0, 1, 100)
    with poisoned():
        got = form(x)
    # fp32 rounds at 6e-8; 1 + x is off by 0.2
    return error_share(got, right(x.double()), allowed=1e-6)


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        (wrong, r"fast is wrong, by [\d.e+]+ times the allowed error"),
        (unfinished, "fast is wrong, by nan times the allowed error"),
        (raising, "fast raises ValueError: out of resource for 100 elements"),
    ],
)
def test_an_unsound_form_is_named_and_passed_over(form: Form, reason: str) -> None:
    with pytest.warns(UserWarning, match=f"^exponentials: {reason}; using safe instead$") as caught:
        assert first_sound("exponentials", {"fast": form, "safe": right}, check) is right
    assert len(caught) == 1


def test_the_fastest_sound_form_is_taken_in_silence() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert first_sound("exponentials", {"fast": right, "safe": wrong}, check) is right


def test_one_warning_names_every_form_that_was_passed_over() -> None:
    forms = {"fast": raising, "middling": wrong, "safe": right}
    with pytest.warns(
        UserWarning, match="fast raises .*; middling is wrong, .*; using safe instead"
    ) as caught:
        assert first_sound("exponentials", forms, check) is right
    assert len(caught) == 1


def test_no_sound_form_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"exponentials: no form .* fast is wrong, .*; safe raises"):
        first_sound("exponentials", {"fast": wrong, "safe": raising}, check)


def test_an_error_of_one_output_is_not_lost_among_others() -> None:
    truth = [torch.ones(3, dtype=torch.float64)] * 3
    for bad in (torch.nan, torch.inf, 2.0):
        for place in range(3):
            got = [torch.full((3,), bad) if i == place else torch.ones(3) for i in range(3)]
            assert not error_share(got, truth, allowed=0.5) <= 1


def slope(form: Form) -> float:
    x = torch.linspace(0, 1, 100, requires_grad=True)
    (grad,) = torch.autograd.grad(form(x)[0].sum(), x)
    return error_share([grad], [x.double().exp()], allowed=1e-6)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_check_may_differentiate_in_any_mode(mode: Callable[[], AbstractContextManager[None]]) -> None:
    with mode():
        assert first_sound("exponentials", {"fast": right}, slope) is right


def test_a_check_may_differentiate_where_a_forward_is_computed_again() -> None:
    def layer(x: Tensor) -> Tensor:
        return first_sound("exponentials", {"fast": right}, slope)(x)[0].sin()

    x = torch.linspace(0, 1, 100, requires_grad=True)
    (grad,) = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).sum(), x)
    assert torch.allclose(grad, x.exp() * x.exp().cos())


def test_poison_reaches_new_memory_and_is_cleared_away() -> None:
    with poisoned():
        assert torch.empty(8).isnan().all()
        assert (torch.empty(8, dtype=torch.int32) == torch.iinfo(torch.int32).max).all()
    assert not torch.are_deterministic_algorithms_enabled()
