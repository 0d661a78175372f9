"""The model that the pages on prediction heads are about."""

from __future__ import annotations

from typing import Any

import pytest

from .pages import prepare


@pytest.fixture
def mrpc(model: Any) -> Any:
    """The model of the page, with its adapter and its head, both random and active."""
    return prepare(model)
