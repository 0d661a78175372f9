"""Every test begins with the same random numbers, whatever ran before it in its process."""

from __future__ import annotations

import random

import pytest
import torch


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Seeds before the fixtures of a test are made."""
    random.seed(0)
    torch.manual_seed(0)
