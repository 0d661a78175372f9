"""Bottleneck adapters: each configuration class, and each field that changes what they compute."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from .comparing import check_adapter
from .configurations import CLASSES, both, ident, shared_fields

pytestmark = pytest.mark.peer


@pytest.mark.parametrize("name", CLASSES)
def test_configuration_classes(name: str) -> None:
    fields, theirs = both(name)
    assert shared_fields(fields) == theirs.to_dict()
    check_adapter(theirs.to_dict())


def orders() -> Iterator[dict[str, Any]]:
    """Every legal combination of the fields that order norms and residuals."""
    flags = (
        "is_parallel",
        "original_ln_before",
        "original_ln_after",
        "ln_before",
        "ln_after",
        "adapter_residual_before_ln",
    )
    for values in itertools.product((False, True), repeat=len(flags)):
        fields = dict(zip(flags, values, strict=True))
        for skip in (True, False, "post_add"):
            if skip == "post_add" and not (fields["original_ln_before"] or fields["is_parallel"]):
                continue  # the peer has no residual there and fails
            yield {**fields, "residual_before_ln": skip}


@pytest.mark.parametrize("fields", list(orders()), ids=ident)
def test_order_of_norms_and_residuals(fields: dict[str, Any]) -> None:
    common = {"mh_adapter": True, "output_adapter": True, "reduction_factor": 4}
    check_adapter({**common, "non_linearity": "gelu", **fields})


@pytest.mark.parametrize("base", ["seq_bn", "double_seq_bn", "par_bn"])
@pytest.mark.parametrize("scaling", [1.0, 0.3, "learned", "channel"])
@pytest.mark.parametrize("use_gating", [False, True])
def test_scaling_and_gating(base: str, scaling: Any, use_gating: bool) -> None:
    check_adapter(base, scaling=scaling, use_gating=use_gating)


OTHER_FIELDS: list[dict[str, Any]] = [
    {"reduction_factor": 1},
    {"reduction_factor": 0.5},
    {"reduction_factor": 3},
    {"reduction_factor": {"0": 2, "default": 8}},
    {"reduction_factor": {"0": 2, "1": 4}},
    {"reduction_factor": {"default": 5.5}},
    {"leave_out": [0]},
    {"leave_out": [1], "reduction_factor": {"0": 4}},
    {"mh_adapter": True, "output_adapter": False},
    {"mh_adapter": True},
    {"cross_adapter": True},
    {"inv_adapter": "nice", "inv_adapter_reduction_factor": 1},
    {"inv_adapter": "nice", "inv_adapter_reduction_factor": 4, "non_linearity": "tanh"},
    {"leave_out": [0, 1], "inv_adapter": "nice", "inv_adapter_reduction_factor": 2},
]


@pytest.mark.parametrize("fields", OTHER_FIELDS, ids=ident)
def test_other_fields(fields: dict[str, Any]) -> None:
    check_adapter("seq_bn", **fields)


@pytest.mark.parametrize(
    "word", ["relu", "gelu", "gelu_new", "swish", "tanh", "leakyrelu", "ReLU", "silu", "mish"]
)
def test_non_linearities(word: str) -> None:
    check_adapter("seq_bn", non_linearity=word)
