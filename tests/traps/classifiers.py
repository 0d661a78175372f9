"""A classifier of each kind, and adapters of the usual methods."""

from __future__ import annotations

from typing import Any

import pytest

import flexheads
from flexheads.testing import randomise, tiny_model, tiny_static

COMMON: dict[str, Any] = {
    "pfeiffer": "pfeiffer",
    "houlsby": "houlsby",
    "parallel": "par_bn",
    "adapterplus": flexheads.AdapterPlusConfig(reduction_factor=8),
    "lora": flexheads.LoRAConfig(intermediate_lora=True, output_lora=True),
}
KINDS = ("flexible", "static")
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

each_kind = pytest.mark.parametrize("kind", KINDS)


def plain(kind: str, **changes: Any) -> Any:
    """A tiny random classifier: with a flexible head, or transformers' own class as it is."""
    if kind == "static":
        return tiny_static("BertForSequenceClassification", num_labels=3, **changes)
    model = randomise(tiny_model("bert", **changes), std=0.1)
    model.add_classification_head("head", num_labels=3)
    return model


def classifier(kind: str, **changes: Any) -> Any:
    """The same, ready for adapters."""
    return flexheads.init(plain(kind, **changes))


def add(model: Any, config: Any, name: str, seed: int) -> None:
    """Adds an adapter that is random enough to matter."""
    model.add_adapter(name, config)
    randomise(model.adapters[name], std=0.2, seed=seed)
