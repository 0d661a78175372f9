"""Compacters: every field that changes what they compute."""

from __future__ import annotations

from typing import Any

import pytest

from .comparing import check_adapter
from .configurations import ident

pytestmark = pytest.mark.peer

FIELDS: list[dict[str, Any]] = [
    {},
    {"phm_dim": 2, "reduction_factor": 4},
    {"phm_dim": 1},
    {"phm_rank": 3},
    {"factorized_phm_W": False},
    {"shared_W_phm": True},
    {"shared_W_phm": True, "phm_rank": 2, "factorized_phm_rule": True},
    {"shared_phm_rule": False},
    {"factorized_phm_rule": True},
    {"shared_phm_rule": False, "factorized_phm_rule": True, "factorized_phm_W": False},
    {"shared_phm_rule": False, "shared_W_phm": True},
    {"phm_bias": False},
    {"use_gating": True, "scaling": "learned", "ln_before": True, "ln_after": True},
    {"reduction_factor": {"0": 2, "default": 4}},
]


@pytest.mark.parametrize("base", ["compacter", "compacter++"])
@pytest.mark.parametrize("fields", FIELDS, ids=ident)
def test_compacter(base: str, fields: dict[str, Any]) -> None:
    check_adapter(base, **{"reduction_factor": 2, **fields})


def test_a_parallel_compacter() -> None:
    check_adapter("par_bn", phm_layer=True, init_weights="bert")
