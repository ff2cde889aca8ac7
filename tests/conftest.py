"""Fixtures that every test gets: one seed, one thread count."""

import pytest
import torch


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
