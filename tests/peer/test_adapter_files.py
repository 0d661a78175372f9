"""Adapters through files, both ways, with a flexible head beside them or on the bare backbone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers

from flexheads import BertModelWithHeads
from flexheads.testing import randomise

from .comparing import assert_same_outputs
from .configurations import FILES, PREFIXES, UNIONS
from .exchange import peer_load, written
from .head_kinds import add_head, head_inputs
from .library import BertAdapterModel
from .pairs import (
    NAME,
    SEED,
    add_our_adapter,
    add_peer_adapter,
    our_model,
    peer_model,
    randomise_named,
)

pytestmark = pytest.mark.peer


@pytest.mark.parametrize(("kind", "safe"), written(FILES, shared=["norms", *PREFIXES, *UNIONS]))
def test_we_read_the_adapters_that_the_peer_writes(kind: str, safe: bool, tmp_path: Path) -> None:
    theirs, ours = peer_model(), our_model()
    add_peer_adapter(theirs, FILES[kind])
    add_head(theirs, "classification")
    randomise_named(theirs, f"heads.{NAME}.")
    theirs.save_adapter(str(tmp_path), NAME, with_head=True, use_safetensors=safe)
    assert ours.load_adapter(tmp_path, set_active=True) == NAME
    assert ours.active_head == NAME
    assert_same_outputs(ours, theirs, head_inputs("classification"))


@pytest.mark.parametrize("load_as", [None, "another"])
@pytest.mark.parametrize("kind", FILES)
def test_the_peer_reads_the_adapters_that_we_write(
    kind: str, load_as: str | None, tmp_path: Path
) -> None:
    ours, theirs = our_model(), peer_model()
    add_our_adapter(ours, FILES[kind])
    add_head(ours, "classification")
    randomise(ours.heads[NAME], seed=SEED)
    ours.save_adapter(tmp_path, NAME, with_head=True)
    assert peer_load(theirs, tmp_path, load_as=load_as) == (load_as or NAME)
    assert theirs.active_head == (load_as or NAME)
    assert_same_outputs(ours, theirs, head_inputs("classification"))


@pytest.mark.parametrize("kind", ["norms", "seq_bn_inv", "lora_all"])
@pytest.mark.parametrize("reader", [transformers.BertModel, None])
def test_adapters_of_the_bare_backbone(kind: str, reader: Any, tmp_path: Path) -> None:
    """Saved from a base model and read into a base model or one with heads, both ways."""
    ours, theirs = our_model(transformers.BertModel), peer_model(transformers.BertModel)
    add_our_adapter(ours, FILES[kind])
    ours.save_adapter(tmp_path / "ours", NAME)
    target = peer_model(reader or BertAdapterModel)
    peer_load(target, tmp_path / "ours")
    assert_same_outputs(ours, target)
    peer_load(theirs, tmp_path / "ours")
    theirs.save_adapter(str(tmp_path / "theirs"), NAME)
    back = our_model(reader or BertModelWithHeads)
    back.load_adapter(tmp_path / "theirs", set_active=True)
    assert_same_outputs(back, theirs)
