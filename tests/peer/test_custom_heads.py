"""One class of a head, on the peer's base class and on ours: the same weights, the same outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput, TokenClassifierOutput

from flexheads import BertModelWithHeads
from flexheads.heads import CustomHead, custom

from .comparing import assert_same_gradients, assert_same_outputs, call
from .head_kinds import IDS, labels, token_labels
from .library import adapters
from .pairs import (
    NAME,
    adapted,
    adapter_keys,
    inputs,
    our_model,
    peer_model,
    randomise_named,
)

pytestmark = pytest.mark.peer


def scaled(base: Any) -> Any:
    class Scaled(base):
        """The sequence of modules that `build` makes, and a factor."""

        def __init__(
            self,
            model: Any,
            head_name: str,
            num_labels: int = 2,
            layers: int = 2,
            activation_function: str | None = "tanh",
            id2label: Mapping[int, str] | None = None,
            use_pooler: bool = False,
            scale: float = 1.0,
        ) -> None:
            super().__init__(head_name)
            self.config = {
                "head_type": "scaled",
                "num_labels": num_labels,
                "layers": layers,
                "activation_function": activation_function,
                "label2id": {n: i for i, n in id2label.items()} if id2label else None,
                "use_pooler": use_pooler,
                "scale": scale,
            }
            self.build(model)

        def forward(
            self,
            outputs: Any,
            cls_output: Tensor | None = None,
            attention_mask: Tensor | None = None,
            return_dict: bool = False,
            **kwargs: Any,
        ) -> Any:
            if cls_output is None:
                cls_output = self._get_cls_output(outputs, **kwargs)
            logits = super().forward(cls_output) * self.config["scale"]
            given, loss = kwargs.pop("labels", None), None
            if given is not None:
                loss = nn.functional.cross_entropy(logits, given)
            return SequenceClassifierOutput(loss=loss, logits=logits)

    return Scaled


def deep(base: Any) -> Any:
    class Deep(base):
        """What `build` makes without labels, one vector for each token, and a layer behind it."""

        def __init__(self, model: Any, head_name: str, size: int = 4, **kwargs: Any) -> None:
            super().__init__(head_name)
            self.config = {"layers": 2, "activation_function": "relu", "size": size, **kwargs}
            self.build(model)
            self.add_module("last", nn.Linear(model.config.hidden_size, size))

        def forward(
            self,
            outputs: Any,
            cls_output: Tensor | None = None,
            attention_mask: Tensor | None = None,
            return_dict: bool = False,
            **kwargs: Any,
        ) -> Any:
            logits = super().forward(outputs[0]) * attention_mask.unsqueeze(-1)
            given, loss = kwargs.pop("labels", None), None
            if given is not None:
                loss = nn.functional.cross_entropy(logits.transpose(1, 2), given)
            return TokenClassifierOutput(loss=loss, logits=logits)

    return Deep


HEADS: dict[str, tuple[Any, dict[str, Any], Tensor]] = {
    "scaled": (scaled, {}, labels(3, below=2)),
    "scaled_pooler": (scaled, {"use_pooler": True, "layers": 1}, labels(3, below=2)),
    "scaled_linear": (scaled, {"activation_function": None, "scale": 3.0}, labels(3, below=2)),
    "scaled_named": (scaled, {"num_labels": 3, "id2label": IDS}, labels(3, below=3)),
    "deep": (deep, {"size": 5}, token_labels(5)),
}


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    before = dict(custom._CUSTOM)
    yield
    custom._CUSTOM.clear()
    custom._CUSTOM.update(before)


def add(model: Any, kind: str, base: Any, name: str = NAME) -> None:
    make, arguments, _ = HEADS[kind]
    model.register_custom_head(make.__name__, make(base))
    model.add_custom_head(head_type=make.__name__, head_name=name, **arguments)


def add_both(kind: str, ours: Any, theirs: Any) -> dict[str, str]:
    """Adds the head to both, with the same weights; its parameters have the same names."""
    add(ours, kind, CustomHead)
    add(theirs, kind, adapters.heads.PredictionHead)
    randomise_named(theirs, f"heads.{NAME}.")
    state = theirs.heads[NAME].state_dict()
    assert list(state) == list(ours.heads[NAME].state_dict())
    ours.heads[NAME].load_state_dict(state)
    return {f"heads.{NAME}.{key}": f"heads.{NAME}.{key}" for key in state}


def given(kind: str) -> dict[str, Tensor]:
    return {**inputs(), "labels": HEADS[kind][2]}


@pytest.mark.parametrize("adapter", [None, "seq_bn"])
@pytest.mark.parametrize("kind", HEADS)
def test_the_same_class_does_the_same(kind: str, adapter: str | None) -> None:
    ours, theirs = our_model(), peer_model()
    if adapter is not None:
        ours, theirs = adapted(adapter, theirs, ours)
    names = add_both(kind, ours, theirs)
    ours, theirs = ours.double(), theirs.double()
    assert call(ours, given(kind))["loss"] is not None
    assert_same_outputs(ours, theirs, given(kind))
    keys = {own: [other] for own, other in names.items()}
    if adapter is not None:
        keys |= adapter_keys(ours)
    assert_same_gradients(ours, theirs, keys, given(kind))
    if kind.startswith("scaled"):
        assert ours.get_labels_dict() == theirs.get_labels_dict()


@pytest.mark.parametrize("kind", HEADS)
def test_files_of_either(kind: str, tmp_path: Path) -> None:
    ours, theirs = our_model(), peer_model()
    add_both(kind, ours, theirs)
    theirs.save_head(str(tmp_path / "theirs"), NAME)
    assert ours.load_head(tmp_path / "theirs", load_as="from them") == "from them"
    assert_same_outputs(ours, theirs, given(kind))
    ours.save_head(tmp_path / "ours", NAME)
    theirs.delete_head(NAME)
    theirs.load_head(str(tmp_path / "ours"), use_safetensors=True)
    theirs.active_head = NAME
    assert_same_outputs(ours, theirs, given(kind))


@pytest.mark.parametrize("kind", HEADS)
def test_a_whole_model_of_the_peer(kind: str, tmp_path: Path) -> None:
    ours, theirs = our_model(), peer_model()
    add_both(kind, ours, theirs)
    theirs.save_pretrained(str(tmp_path))
    loaded = BertModelWithHeads.from_pretrained(tmp_path)
    loaded.active_head = NAME
    assert type(loaded.heads[NAME]) is type(ours.heads[NAME])
    assert_same_outputs(loaded, theirs, given(kind))


def test_configurations_of_the_peer() -> None:
    theirs, ours = peer_model(), our_model()
    theirs.add_classification_head("c", num_labels=3, id2label=IDS)
    theirs.add_tagging_head("t", num_labels=4, layers=2)
    theirs.add_multiple_choice_head("m", num_choices=3)
    theirs.add_qa_head("q")
    theirs.add_masked_lm_head("lm")
    theirs.add_causal_lm_head("clm")
    for name, config in theirs.get_prediction_heads_config().items():
        ours.add_prediction_head_from_config(name, config)
    found = ours.get_prediction_heads_config()
    for name, config in theirs.get_prediction_heads_config().items():
        same = set(config) & set(found[name])
        assert {"head_type", "layers", "activation_function"} <= same
        assert {key: found[name][key] for key in same} == {key: config[key] for key in same}
    assert ours.active_head == "clm"


def test_built_heads_as_in_the_peer() -> None:
    ours, theirs = our_model(), peer_model()
    for model, base in ((ours, CustomHead), (theirs, adapters.heads.PredictionHead)):
        torch.manual_seed(0)
        model.add_prediction_head(scaled(base)(model, NAME, num_labels=3))
        assert model.active_head == NAME
        with pytest.raises(ValueError, match=NAME):
            model.add_prediction_head(scaled(base)(model, NAME))
    assert ours.get_labels() == theirs.get_labels()
    ours.heads[NAME].load_state_dict(theirs.heads[NAME].state_dict())
    assert_same_outputs(ours, theirs, {**inputs(), "labels": labels(3, below=3)})
