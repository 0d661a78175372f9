"""AdapterFusion: outputs, gradients and files, both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import flexheads
from flexheads.checkpoints.hub.fusion import FusionNames
from flexheads.testing import randomise

from .comparing import assert_same_gradients, assert_same_outputs
from .library import adapters
from .pairs import SEED, adapter_keys, copy_adapter, our_model, peer_model

pytestmark = pytest.mark.peer

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "dynamic": ("seq_bn", {}),
    "static": ("double_seq_bn", {"value": False, "value_initialized": False}),
    "value_after": ("seq_bn", {"value_before_softmax": False}),
    "query_first": ("seq_bn", {"query_before_ln": True}),
    "no_query": ("double_seq_bn", {"query": False}),
}


def pair(kind: str) -> tuple[Any, Any, dict[str, list[str]]]:
    """Two models with adapters a and b and their fusion, and the peer's names of our parameters."""
    fields, changes = CONFIGS[kind]
    ours, theirs, keys = our_model(), peer_model(), {}
    for seed, name in enumerate("ab"):
        ours.add_adapter(name, fields)
        theirs.add_adapter(name, config=fields)
        randomise(ours.adapters[name], seed=seed)
        copy_adapter(ours, theirs, name)
        keys |= adapter_keys(ours, name)
    ours.add_adapter_fusion(["a", "b"], flexheads.AdapterFusionConfig(**changes))
    theirs.add_adapter_fusion(["a", "b"], adapters.AdapterFusionConfig.load("dynamic", **changes))
    state = randomise(ours.adapter_fusions["a,b"], seed=SEED, std=0.1).state_dict()
    names = FusionNames("a,b", {}, ours._layout())
    written = {names.keys(address)[0]: tensor for address, tensor in state.items()}
    assert set(written) == {key for key in theirs.state_dict() if "fusion_layer" in key}
    theirs.load_state_dict(written, strict=False)
    keys |= {f"adapter_fusions.a,b.{address}": names.keys(address) for address in state}
    return ours, theirs, keys


@pytest.mark.parametrize("kind", CONFIGS)
def test_outputs_and_gradients(kind: str) -> None:
    ours, theirs, keys = pair(kind)
    ours.double().set_active_adapters(flexheads.Fuse("a", "b"))
    theirs.double().set_active_adapters(adapters.Fuse("a", "b"))
    assert_same_outputs(ours, theirs)
    assert_same_gradients(ours, theirs, keys)


def test_regularisation() -> None:
    ours, theirs, _ = pair("dynamic")
    ours.train_adapter_fusion(flexheads.Fuse("a", "b"))
    theirs.train_adapter_fusion(adapters.Fuse("a", "b"))
    expected = theirs.get_fusion_regularization_loss().item()
    assert ours.get_fusion_regularization_loss().item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_files_both_ways(kind: str, tmp_path: Path) -> None:
    ours, theirs, _ = pair(kind)
    ours.save_adapter_fusion(tmp_path / "ours", "a,b")
    theirs.save_adapter_fusion(str(tmp_path / "theirs"), "a,b")
    theirs.delete_adapter_fusion("a,b")
    theirs.load_adapter_fusion(str(tmp_path / "ours"), use_safetensors=True)
    theirs.set_active_adapters(adapters.Fuse("a", "b"))
    ours.load_adapter_fusion(tmp_path / "theirs", overwrite_ok=True, set_active=True)
    assert_same_outputs(ours, theirs)


def test_setups_both_ways(tmp_path: Path) -> None:
    ours, theirs, _ = pair("dynamic")
    ours.save_adapter_setup(tmp_path / "ours", flexheads.Fuse("a", "b"))
    theirs.save_adapter_setup(str(tmp_path / "theirs"), adapters.Fuse("a", "b"))
    one, other = our_model(), peer_model()
    one.load_adapter_setup(tmp_path / "theirs", set_active=True)
    other.load_adapter_setup(str(tmp_path / "ours"), set_active=True, use_safetensors=True)
    assert_same_outputs(one, other)
