"""Representation fine-tuning: the fields that change what it computes, files, and what differs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from .comparing import assert_same_outputs, call, check_adapter
from .configurations import ident
from .exchange import peer_load
from .pairs import NAME, adapted, add_our_adapter, inputs, our_model, peer_model

pytestmark = pytest.mark.peer

FIELDS: list[dict[str, Any]] = [
    {"tied_weights": True},
    {"r": 4, "suffix_positions": 1},
    {"prefix_positions": 1, "suffix_positions": 2, "r": 2},
    {"prefix_positions": 2, "suffix_positions": 2, "tied_weights": True},
    {"layers": [1], "r": 3, "suffix_positions": 1},
    {"non_linearity": "relu", "r": 2, "suffix_positions": 1},
]


@pytest.mark.parametrize("base", ["loreft", "noreft", "direft"])
@pytest.mark.parametrize("fields", FIELDS, ids=ident)
def test_reft(base: str, fields: dict[str, Any]) -> None:
    check_adapter(base, dropout=0.0, **fields)


@pytest.mark.parametrize("base", ["loreft", "noreft", "direft"])
def test_an_edit_without_positions(base: str) -> None:
    """In single precision, because the peer makes its states of no positions in that."""
    ours, theirs = adapted(base)
    assert_same_outputs(ours.float(), theirs.float())


def left_padded() -> dict[str, Tensor]:
    return {key: tensor.flip(1) for key, tensor in inputs().items()}


@pytest.mark.parametrize("base", ["loreft", "direft"])
def test_padding_on_the_left(base: str) -> None:
    ours, theirs = adapted(base, suffix_positions=2, r=2)
    assert_same_outputs(ours, theirs, left_padded())


def test_files_of_the_peer_do_not_say_direft_and_ours_do(tmp_path: Path) -> None:
    """The peer reads DiReFT, ours and its own, as NoReFT; we read ours as it was."""
    ours, theirs = our_model(), peer_model()
    add_our_adapter(ours, "direft[r=2]")
    ours.save_adapter(tmp_path / "ours", NAME)
    back = our_model()
    back.load_adapter(tmp_path / "ours", set_active=True)
    assert torch.equal(call(back)[0], call(ours)[0])
    peer_load(theirs, tmp_path / "ours")
    theirs.save_adapter(str(tmp_path / "theirs"), NAME)
    back = our_model()
    back.load_adapter(tmp_path / "theirs", set_active=True)
    assert back.adapters[NAME].config.subtract_projection
    assert_same_outputs(back, theirs)
    assert (call(back)[0] - call(ours)[0]).abs().max() > 0.1


def test_the_peer_edits_padding_of_short_rows_and_ours_does_not() -> None:
    ours, theirs = adapted("noreft", r=2, tied_weights=True)
    given = inputs()
    given["attention_mask"][0, 1:] = 0
    one, other = call(ours, given)[0], call(theirs, given)[0]
    torch.testing.assert_close(one[1:], other[1:])
    torch.testing.assert_close(one[0, :1], other[0, :1])
    assert (one[0, 1:3] - other[0, 1:3]).abs().max() > 1e-3
    ours.set_active_adapters(None)
    assert (one[0, :1] - call(ours, given)[0][0, :1]).abs().max() > 1e-3
