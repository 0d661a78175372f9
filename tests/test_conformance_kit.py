"""The checks for architectures try everything that is installed, and find what is wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flexheads.composition import BLOCKS, Average
from flexheads.errors import UnknownNameError
from flexheads.heads.custom import class_of
from flexheads.heads.ordinal import OrdinalHead
from flexheads.models.heads.methods import HeadsMixin
from flexheads.plugins import registry
from flexheads.sites.rows import Chosen, KnownRows
from flexheads.sites.shelf import Stacks
from flexheads.testing.block_checks import BLOCK_CHECKS, check_block
from flexheads.testing.head_checks import check_head, check_head_refusals, fits
from flexheads.testing.tiny_heads import makes_labels


def test_every_type_of_head_makes_labels() -> None:
    missing = [name for name in registry().head_types if not makes_labels(class_of(name))]
    assert missing == []


def test_every_type_of_head_fits_some_architecture() -> None:
    specs = registry().architectures.values()
    assert [t for t in registry().head_types if not any(fits(t, spec) for spec in specs)] == []


def test_every_block_is_checked() -> None:
    assert BLOCK_CHECKS.keys() == BLOCKS.keys()


def test_a_part_that_does_not_learn_is_found(monkeypatch: Any) -> None:
    finish = OrdinalHead.finish
    monkeypatch.setattr(
        OrdinalHead, "finish", lambda self, scores, *a, **k: finish(self, scores.detach(), *a, **k)
    )
    with pytest.raises(AssertionError, match=r"layers.* does not learn"):
        check_head("bert", "ordinal")


def test_a_part_that_is_not_saved_is_found(monkeypatch: Any) -> None:
    state_dict = OrdinalHead.state_dict
    monkeypatch.setattr(
        OrdinalHead,
        "state_dict",
        lambda self, *a, **k: {n: t * 2 for n, t in state_dict(self, *a, **k).items()},
    )
    with pytest.raises(AssertionError, match="the file gives another"):
        check_head("bert", "ordinal")


def test_a_type_that_takes_what_it_cannot_read_is_found(monkeypatch: Any) -> None:
    check_head_refusals("bert")
    monkeypatch.setattr(HeadsMixin, "_build_head", lambda self, *given: self.heads["none"])
    with pytest.raises(UnknownNameError):
        check_head_refusals("bert")


@pytest.mark.parametrize("block", ["Parallel", "BatchSplit", "Rows"])
def test_rows_that_change_places_are_found(block: str, monkeypatch: Any) -> None:
    pick, kept = Chosen.by_row, Stacks.picked
    monkeypatch.setattr(KnownRows, "merge", lambda self, parts: torch.cat(list(parts)).flip(0))
    monkeypatch.setattr(Chosen, "by_row", lambda self, each: pick(self, each).flip(0))
    monkeypatch.setattr(Stacks, "picked", lambda self, rows: kept(self, rows[::-1]))
    with pytest.raises(AssertionError, match="outputs differ"):
        check_block("bert", block)


def test_a_mean_with_other_weights_is_found(monkeypatch: Any) -> None:
    whole = Average.__init__
    monkeypatch.setattr(Average, "__init__", lambda self, *c, weights=None: whole(self, *c))
    with pytest.raises(AssertionError, match="no weight"):
        check_block("bert", "Average")
