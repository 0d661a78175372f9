"""Models that the peer describes by an interface, without heads: our adapters, its outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import flexheads
from flexheads.testing import randomise, tiny_config, tiny_inputs

from .comparing import assert_close
from .library import adapters

pytestmark = pytest.mark.peer


@torch.no_grad()
def test_modernbert_with_lora(tmp_path: Path) -> None:
    """The peer gives a projection without bias a random one; without that it gives the same."""
    config = tiny_config("modernbert", attn_implementation="eager")
    ours: Any = flexheads.init(transformers.ModernBertModel(config).eval())
    theirs: Any = transformers.ModernBertModel(config).eval()
    randomise(ours, std=0.1)
    theirs.load_state_dict(ours.state_dict())
    given = tiny_inputs(config)
    before = theirs(**given).last_hidden_state
    assert_close(ours(**given).last_hidden_state, before)
    adapters.init(theirs)
    for layer in theirs.layers:
        assert layer.attn.Wqkv.bias.abs().max() > 0
        layer.attn.Wqkv.bias = None
    assert_close(theirs(**given).last_hidden_state, before)
    ours.add_adapter("a", "lora[intermediate_lora=True, output_lora=True]", set_active=True)
    assert torch.equal(ours(**given).last_hidden_state, before)
    assert all(layer.attn.Wqkv.bias is None for layer in ours.layers)
    randomise(ours.adapters["a"])
    ours.save_adapter(tmp_path, "a")
    theirs.load_adapter(str(tmp_path), set_active=True, use_safetensors=True)
    output = ours(**given).last_hidden_state
    assert (output - before).abs().max() > 0.01
    assert_close(output, theirs(**given).last_hidden_state)
