"""Whether a kernel computes what it should, on this machine: asked once, when it is first needed.

A compiler or a driver can make a kernel wrong without a word.  An op therefore lists its forms, the fastest
first and one that cannot fail last, and uses the first that agrees with its twin on a small example.  The
caller remembers the answer, by functools.cache, for each device and whatever else a form is compiled for.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

import torch
from torch import Tensor

Form = TypeVar("Form")

_unfused: ContextVar[bool] = ContextVar("unfused", default=False)


def first_sound(name: str, forms: Mapping[str, Form], check: Callable[[Form], float]) -> Form:
    """The first of the named forms that passes; a warning names those before it and what was wrong.

    check: runs a form and returns its error as a share of what is allowed.  More than 1 is wrong, and so are
    NaN and any exception.  It may differentiate, whatever the caller is in the middle of.  RuntimeError where
    no form is left.
    """
    rejected = []
    for label, form in forms.items():
        try:
            share = _alone(check, form)
        except Exception as error:  # compiler, driver and launcher each raise their own
            first_line = next(iter(str(error).splitlines()), "")
            rejected.append(f"{label} raises {type(error).__name__}: {first_line[:150]}")
            continue
        if share <= 1:
            if rejected:
                warnings.warn(f"{name}: {'; '.join(rejected)}; using {label} instead", stacklevel=2)
            return form
        rejected.append(f"{label} is wrong, by {share:.2g} times the allowed error")
    raise RuntimeError(f"{name}: no form of it is sound on this machine: {'; '.join(rejected)}")


def _alone(check: Callable[[Form], float], form: Form) -> float:
    """check(form) in a thread of its own, which has none of this one's modes and hooks.

    Within inference mode, or where activation checkpointing computes a forward again, nothing could be
    differentiated: tensors would be saved where they do not belong.
    """
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else -1

    def run() -> float:
        with torch.cuda.device(device):
            return check(form)

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()


def error_share(got: Sequence[Tensor], truth: Sequence[Tensor], allowed: float) -> float:
    """Largest error of a tensor relative to its truth, in the 2-norm, over the allowed; NaN if one has."""
    errors = [(x.double() - y).norm() / y.norm() for x, y in zip(got, truth, strict=True)]
    # of Python's numbers, max may lose a NaN
    return (torch.stack(errors).max() / allowed).item()


@contextmanager
def poisoned() -> Iterator[None]:
    """Within, new memory holds NaN, or the largest integer: what a kernel does not write is seen."""
    mode = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        # of operators that have no deterministic form, which nothing here asks for
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(mode[0], warn_only=mode[1])


@contextmanager
def unfused() -> Iterator[None]:
    """Within, steps that are one kernel are PyTorch's operators: what a network costs without fusion."""
    token = _unfused.set(True)
    try:
        yield
    finally:
        _unfused.reset(token)


def is_unfused() -> bool:
    """Whether a caller is within `unfused`."""
    return _unfused.get()
