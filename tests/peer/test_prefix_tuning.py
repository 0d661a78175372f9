"""Prefix tuning and unions give the peer's outputs and gradients."""

from __future__ import annotations

from typing import Any

import pytest

from .comparing import check_adapter
from .configurations import PREFIXES, UNIONS

pytestmark = pytest.mark.peer

KINDS = {
    **PREFIXES,
    **UNIONS,
    "string": "prefix_tuning[prefix_length=3, bottleneck_size=8]|par_bn[reduction_factor=4]",
}


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_the_peers(kind: str) -> None:
    fields: Any = KINDS[kind]
    check_adapter(fields)
