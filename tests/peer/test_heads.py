"""Flexible heads of every kind, without an adapter and with one."""

from __future__ import annotations

import pytest

from flexheads.testing import randomise

from .comparing import assert_same_gradients, assert_same_outputs, call
from .head_kinds import HEADS, add_head, head_inputs
from .pairs import NAME, SEED, adapted, adapter_keys, copy_head, our_model, peer_model

pytestmark = pytest.mark.peer


@pytest.mark.parametrize("adapter", [None, "seq_bn", "seq_bn_inv"])
@pytest.mark.parametrize("kind", HEADS)
def test_heads(kind: str, adapter: str | None) -> None:
    ours, theirs = our_model(), peer_model()
    if adapter is not None:
        ours, theirs = adapted(adapter, theirs, ours)
    for model in (ours, theirs):
        add_head(model, kind)
    randomise(ours.heads[NAME], seed=SEED)
    keys = copy_head(ours, theirs, NAME)
    ours, theirs, given = ours.double(), theirs.double(), head_inputs(kind)
    assert call(ours, given)["loss"] is not None
    assert_same_outputs(ours, theirs, given)
    parameters = {f"heads.{NAME}.{address}": [key] for address, key in keys.items()}
    if adapter is not None:
        parameters |= adapter_keys(ours)
    assert_same_gradients(ours, theirs, parameters, given)
