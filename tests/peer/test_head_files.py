"""Flexible heads through files, both ways."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from torch import Tensor

from flexheads.testing import randomise

from .comparing import assert_same_outputs
from .exchange import written
from .head_kinds import HEADS, add_head, head_inputs
from .pairs import (
    NAME,
    SEED,
    our_model,
    peer_model,
    randomise_named,
    with_backbone,
)

pytestmark = pytest.mark.peer


@pytest.mark.parametrize(("kind", "safe"), written(HEADS))
def test_we_read_the_heads_that_the_peer_writes(kind: str, safe: bool, tmp_path: Path) -> None:
    theirs, ours = peer_model(), our_model()
    add_head(theirs, kind)
    randomise_named(theirs, f"heads.{NAME}.")
    given = float_labels(head_inputs(kind))
    if "lm" in kind:
        # The peer's output matrix is the embeddings themselves, which have been drawn anew.
        theirs = with_backbone(theirs)
    theirs.save_head(str(tmp_path), NAME, use_safetensors=safe)
    assert ours.load_head(tmp_path) == NAME
    assert_same_outputs(ours, theirs, given)


def float_labels(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: t.float() if t.is_floating_point() else t for key, t in given.items()}


@pytest.mark.parametrize("load_as", [None, "another"])
@pytest.mark.parametrize("kind", HEADS)
def test_the_peer_reads_the_heads_that_we_write(
    kind: str, load_as: str | None, tmp_path: Path
) -> None:
    ours, theirs = our_model(), peer_model()
    add_head(ours, kind)
    randomise(ours.heads[NAME], seed=SEED)
    ours.save_head(tmp_path, NAME)
    theirs.load_head(str(tmp_path), load_as=load_as, use_safetensors=True)
    theirs.active_head = load_as or NAME
    assert_same_outputs(ours, theirs, float_labels(head_inputs(kind)))
    saved = theirs.heads[load_as or NAME].config
    own = ours.heads[NAME].to_dict()
    assert {key: own[key] for key in saved if key in own} == {
        key: value for key, value in saved.items() if key in own
    }


def test_a_file_of_the_peer_with_another_head_in_it(tmp_path: Path) -> None:
    """The peer picks the tensors of a head by the beginning of its name."""
    theirs, ours = peer_model(), our_model()
    for name in ("mrpc", "mrpc2"):
        theirs.add_classification_head(name, num_labels=3)
    randomise_named(theirs, "heads.mrpc")
    theirs.save_head(str(tmp_path), "mrpc", use_safetensors=True)
    theirs.active_head = "mrpc"
    assert ours.load_head(tmp_path) == "mrpc"
    assert ours.heads.keys() == ("mrpc",)
    assert_same_outputs(ours, theirs, head_inputs("classification"))
