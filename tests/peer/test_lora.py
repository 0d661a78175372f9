"""Low-rank adaptation and IA3: the fields that change what they compute, and merging."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from .comparing import assert_same_outputs, check_adapter
from .configurations import ident
from .library import PeerConfig
from .pairs import NAME, adapted

pytestmark = pytest.mark.peer

LORA: list[dict[str, Any]] = [
    *({"attn_matrices": list(m)} for n in (1, 2, 3) for m in itertools.combinations("qkv", n)),
    {"intermediate_lora": True},
    {"output_lora": True},
    {"selfattn_lora": False, "intermediate_lora": True, "output_lora": True},
    {"intermediate_lora": True, "output_lora": True, "leave_out": [0]},
    {"r": 1},
    {"r": 3, "alpha": 16},
    {"alpha": 1},
    {"use_gating": True},
    {"use_gating": True, "intermediate_lora": True, "output_lora": True, "alpha": 2},
    {"init_weights": "bert"},
    {"init_weights": "ia3", "r": 2},
]


@pytest.mark.parametrize("fields", LORA, ids=ident)
def test_lora(fields: dict[str, Any]) -> None:
    check_adapter("lora", **fields)


IA3: list[dict[str, Any]] = [
    {},
    {"alpha": 3},
    {"attn_matrices": ["q"], "intermediate_lora": False},
    {"output_lora": True},
    {"use_gating": True},
    {"leave_out": [1]},
]


@pytest.mark.parametrize("changes", IA3, ids=ident)
def test_ia3(changes: dict[str, Any]) -> None:
    check_adapter(PeerConfig.load("ia3", **changes).to_dict())


@pytest.mark.parametrize("fields", [{}, {"r": 2, "alpha": 7, "intermediate_lora": True}], ids=ident)
def test_a_merged_lora(fields: dict[str, Any]) -> None:
    ours, theirs = adapted("lora", **fields)
    for model in (ours, theirs):
        model.merge_adapter(NAME)  # which stays active, in the peer too, and acts only once
    assert_same_outputs(ours, theirs)
