"""Adapters and heads of every architecture that both libraries have go through files, both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from flexheads.models.with_heads import with_heads_class
from flexheads.plugins import registry
from flexheads.specs import ArchitectureSpec
from flexheads.testing import randomise, tiny_config, tiny_inputs

from .comparing import assert_close, assert_same_outputs, call
from .configurations import FILES
from .exchange import peer_load
from .library import adapters
from .pairs import NAME, SEED, add_our_adapter, add_peer_adapter, randomise_named
from .test_architectures import config_of

pytestmark = [
    pytest.mark.peer,
    pytest.mark.filterwarnings("ignore:`past_key_value` is deprecated:FutureWarning"),
]


def in_both(spec: ArchitectureSpec) -> bool:
    """Whether both read tokens with one side, so that one call fits all, and mean the same."""
    known = type(tiny_config(spec.name)) in adapters.AutoAdapterModel._model_mapping
    plain = spec.inputs == "tokens" and all(layers.side is None for layers in spec.layers)
    # The peer takes X-MOD's own adapters out, and swaps what ALBERT's attention adapters are given.
    return known and plain and spec.name not in ("bert", "xmod", "albert")


NAMES = [name for name, spec in registry().architectures.items() if in_both(spec)]
KINDS = ("seq_bn", "lora_all", "prefix_flat", "prefix", "loreft_tied", "unipelt")


def pair(architecture: str) -> tuple[Any, Any]:
    """Our model and the peer's with the same backbone."""
    ours = with_heads_class(registry().architecture(architecture).with_heads)(
        config_of(architecture)
    )
    theirs = adapters.AutoAdapterModel.from_config(config_of(architecture))
    randomise(ours.base_model, seed=SEED, std=0.1)
    theirs.base_model.load_state_dict(ours.base_model.state_dict(), strict=False)
    return ours.eval(), theirs.eval()


def fits(architecture: str, kind: str) -> bool:
    """Whether both can: the peer cuts fused projections its own way; we refuse some prefixes."""
    spec = registry().architecture(architecture)
    if any(layers.fused for layers in spec.layers) and kind in ("lora_all", "unipelt"):
        return False
    return "self_attention" in spec.roles or "prefix" not in kind


CASES = [(name, kind) for name in NAMES for kind in KINDS if fits(name, kind)]


@pytest.mark.parametrize(("architecture", "kind"), CASES)
def test_we_read_what_the_peer_writes(architecture: str, kind: str, tmp_path: Path) -> None:
    ours, theirs = pair(architecture)
    add_peer_adapter(theirs, FILES[kind])
    theirs.save_adapter(str(tmp_path), NAME, with_head=False, use_safetensors=False)
    assert ours.load_adapter(tmp_path, set_active=True) == NAME
    assert_same_outputs(ours.base_model, theirs.base_model, tiny_inputs(ours.config))


@pytest.mark.parametrize(("architecture", "kind"), CASES)
def test_the_peer_reads_what_we_write(architecture: str, kind: str, tmp_path: Path) -> None:
    ours, theirs = pair(architecture)
    add_our_adapter(ours, FILES[kind])
    ours.save_adapter(tmp_path, NAME)
    assert peer_load(theirs, tmp_path) == NAME
    assert_same_outputs(ours.base_model, theirs.base_model, tiny_inputs(ours.config))


@pytest.mark.parametrize("architecture", [n for n in NAMES if n != "bert-generation"])
def test_heads(architecture: str, tmp_path: Path) -> None:
    """A classification head of two layers, and one that reads every token."""
    ours, theirs = pair(architecture)
    theirs.add_classification_head("first", num_labels=3)
    randomise_named(theirs, "heads.first.")
    theirs.save_head(str(tmp_path / "first"), "first")
    ours.load_head(tmp_path / "first")
    ours.add_tagging_head("second", num_labels=4)
    randomise(ours.heads["second"], seed=SEED)
    ours.save_head(tmp_path / "second", "second")
    theirs.load_head(str(tmp_path / "second"), use_safetensors=True)
    for name in ("first", "second"):
        ours.active_head = theirs.active_head = name
        assert_same_outputs(ours, theirs, tiny_inputs(ours.config))


STATIC = [
    name
    for name, conversion in registry().conversions.items()
    if conversion.architecture in NAMES and name in adapters.head_utils.STATIC_TO_FLEX_HEAD_MAP
]


@pytest.mark.parametrize("static_class", STATIC)
def test_heads_of_static_classes(static_class: str, tmp_path: Path) -> None:
    """What the peer saves of a static class becomes a flexible head with the same outputs."""
    conversion = registry().conversion(static_class)
    (rule,) = conversion.heads
    theirs = getattr(transformers, static_class)(config_of(conversion.architecture))
    randomise(theirs, seed=SEED, std=0.1)
    known = {name for name, _ in theirs.named_parameters()}
    adapters.init(theirs)
    for name, parameter in theirs.named_parameters():
        if name not in known:  # it gives DeBERTa's fused projection a random bias
            torch.nn.init.zeros_(parameter)
    add_peer_adapter(theirs, FILES["seq_bn"])
    theirs.save_adapter(str(tmp_path), NAME, with_head=True, use_safetensors=False)
    ours, _ = pair(conversion.architecture)
    state = theirs.base_model.state_dict()
    own = ours.base_model.state_dict()
    ours.base_model.load_state_dict({k: v for k, v in state.items() if k in own}, strict=False)
    ours.load_adapter(tmp_path, set_active=True)
    given = tiny_inputs(ours.config, batch=4)
    if rule.head_type == "multiple_choice":
        given = {key: value.view(2, 2, -1) for key, value in given.items()}
    assert_close(call(ours, given)[rule.output], call(theirs, given)[rule.output])
