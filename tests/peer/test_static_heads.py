"""Heads of the static classes through files: both ways, converted, and converted back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers
from torch import Tensor

from flexheads.testing import randomise

from .comparing import assert_close, assert_same_outputs, call, tensors_of
from .configurations import FILES
from .exchange import peer_load, written
from .head_kinds import ANSWERS, ONE_OF_3, choice_inputs, labels, lm_labels, token_labels
from .library import adapters
from .pairs import (
    NAME,
    add_our_adapter,
    add_peer_adapter,
    inputs,
    our_model,
    peer_model,
    with_backbone,
)

pytestmark = pytest.mark.peer

STATIC: dict[str, dict[str, Tensor]] = {
    "BertForSequenceClassification": ONE_OF_3,
    "BertForMultipleChoice": {"labels": labels(2, below=3)},
    "BertForTokenClassification": {"labels": token_labels(3)},
    "BertForQuestionAnswering": ANSWERS,
    "BertForMaskedLM": {"labels": lm_labels()},
    "BertLMHeadModel": {"labels": lm_labels()},
    "BertForNextSentencePrediction": {"labels": labels(3, below=2)},
    "BertForPreTraining": {
        "labels": lm_labels(),
        "next_sentence_label": labels(3, below=2),
    },
}
# Classes that the peer turns into flexible heads of its own.
CONVERTED = [name for name in STATIC if name in adapters.head_utils.STATIC_TO_FLEX_HEAD_MAP]


def static_inputs(name: str) -> dict[str, Tensor]:
    given = choice_inputs() if name == "BertForMultipleChoice" else inputs()
    return {**given, **STATIC[name]}


def mode(name: str) -> dict[str, Any]:
    """What the configuration of a class says besides the labels."""
    return {"is_decoder": True} if name == "BertLMHeadModel" else {}


def static_pair(name: str) -> tuple[Any, Any]:
    """A static model with our support and one with the peer's, with different heads."""
    kind = getattr(transformers, name)
    number = 2 if name == "BertForQuestionAnswering" else 3
    models = []
    for seed, make in enumerate((our_model, peer_model)):
        model = make(kind, num_labels=number, **mode(name))
        for part, module in model.named_children():
            if part not in ("bert", "adapters"):
                randomise(module, std=0.2, seed=seed)
        models.append(with_backbone(model))
    return models[0], models[1]


def assert_same_logits(ours: Any, theirs: Any, name: str) -> None:
    """Outputs are the same where both have them; what labels tell is left to the static classes."""
    given = {k: t for k, t in static_inputs(name).items() if k in ("input_ids", "attention_mask")}
    one, other = tensors_of(call(ours, given)), tensors_of(call(theirs, given))
    shared = one.keys() & other.keys()
    assert shared
    for key in shared:
        assert_close(one[key], other[key], key)


@pytest.mark.parametrize("name", STATIC)
def test_the_peer_reads_our_static_heads(name: str, tmp_path: Path) -> None:
    ours, theirs = static_pair(name)
    add_our_adapter(ours, "seq_bn")
    ours.save_adapter(tmp_path, NAME, with_head=True)
    peer_load(theirs, tmp_path)
    assert_same_outputs(ours, theirs, static_inputs(name))
    if name in CONVERTED:
        flexible = peer_model(**mode(name))
        peer_load(flexible, tmp_path)
        assert flexible.active_head == NAME
        assert_same_logits(ours, flexible, name)


SHARED_BIAS = ("BertForMaskedLM", "BertLMHeadModel", "BertForPreTraining")


@pytest.mark.parametrize(("name", "safe"), written(STATIC, shared=SHARED_BIAS))
def test_we_read_the_static_heads_of_the_peer(name: str, safe: bool, tmp_path: Path) -> None:
    ours, theirs = static_pair(name)
    add_peer_adapter(theirs, FILES["seq_bn"])
    theirs.save_adapter(str(tmp_path), NAME, with_head=True, use_safetensors=safe)
    ours.load_adapter(tmp_path, set_active=True)
    assert_same_outputs(ours, theirs, static_inputs(name))
    flexible = our_model(**mode(name))
    flexible.load_adapter(tmp_path, set_active=True)
    if name == "BertForPreTraining":
        flexible.active_head = NAME
        assert_close(call(flexible)["logits"], call(theirs)["prediction_logits"])
        flexible.active_head = f"{NAME}_next_sentence"
        assert_close(call(flexible)["logits"], call(theirs)["seq_relationship_logits"])
    else:
        assert flexible.active_head == NAME
        assert_same_logits(flexible, theirs, name)


@pytest.mark.parametrize("name", CONVERTED)
def test_a_converted_head_goes_on_to_the_peer(name: str, tmp_path: Path) -> None:
    """A static head that became flexible here is a flexible head for the peer."""
    static, _ = static_pair(name)
    ours, theirs = our_model(), peer_model()
    static.save_head(tmp_path / "static")
    ours.load_head(tmp_path / "static", load_as=NAME)
    ours.save_head(tmp_path / "flexible", NAME)
    theirs.load_head(str(tmp_path / "flexible"), use_safetensors=True)
    if name == "BertForMultipleChoice":
        given = {key: tensor[:, :2] for key, tensor in choice_inputs().items()}
    else:
        given = inputs()
    assert_same_outputs(ours, theirs, given)


@pytest.mark.parametrize("name", CONVERTED)
def test_a_head_that_the_peer_converted_becomes_static_again(name: str, tmp_path: Path) -> None:
    ours, static = static_pair(name)
    flexible = peer_model()
    static.save_head(str(tmp_path / "static"))
    flexible.load_head(str(tmp_path / "static"), load_as=NAME)
    flexible.save_head(str(tmp_path / "flexible"), NAME)
    ours.load_head(tmp_path / "flexible")
    assert_same_outputs(ours, static, static_inputs(name))
