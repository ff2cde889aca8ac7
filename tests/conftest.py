"""Fixtures that every test gets: one seed, one thread count."""

import signal

import pytest
import torch


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def pytest_configure() -> None:
    """Have the commands of tests hear Ctrl-C: a shell starts what runs in its background deaf to it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
