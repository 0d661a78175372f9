"""Words that hang on the root: the peer leaves them out of the loss where padding has number 0."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flexheads.testing import randomise

from .comparing import assert_same_outputs, call
from .head_kinds import TREES
from .pairs import NAME, SEED, copy_head, inputs, our_model, peer_model

pytestmark = pytest.mark.peer


def given() -> dict[str, Any]:
    trees = {key: value.clone() for key, value in TREES.items()}
    trees["labels_arcs"][:, 1] = 0
    return {**inputs(), **trees}


@pytest.mark.parametrize("ignored", [True, False])
def test_roots_in_the_loss(ignored: bool) -> None:
    ours, theirs = our_model(), peer_model()
    ours.add_dependency_parsing_head(NAME, num_labels=4, ignore_pad_arcs=ignored)
    theirs.add_dependency_parsing_head(NAME, num_labels=4)
    randomise(ours.heads[NAME], seed=SEED)
    copy_head(ours, theirs, NAME)
    if ignored:
        assert_same_outputs(ours.double(), theirs.double(), given())
        return
    one, other = call(ours, given()), call(theirs, given())
    assert torch.allclose(one["arc_preds"], other["arc_preds"], atol=1e-5)
    assert abs(one["loss"] - other["loss"]) > 1e-2
