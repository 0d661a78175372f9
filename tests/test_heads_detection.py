"""The detection of replaced tokens equals transformers' discriminator, and says which they are."""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flexheads import AutoModelWithHeads, init
from flexheads.errors import ConfigError, LabelError
from flexheads.testing import randomise, tiny_inputs, tiny_model, tiny_static


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    """A discriminator with random weights, and a flexible model that has the same."""
    static = tiny_static("ElectraForPreTraining", hidden_act="relu")
    model = tiny_model("electra", hidden_act="relu")
    model.electra.load_state_dict(static.electra.state_dict())
    model.add_detection_head("replaced", activation_function="relu")
    layers, own = model.heads["replaced"].layers, static.discriminator_predictions
    layers.get_submodule("0").load_state_dict(own.dense.state_dict())
    layers.get_submodule("1").load_state_dict(own.dense_prediction.state_dict())
    return static, model


def labels(inputs: dict[str, Tensor]) -> Tensor:
    return (inputs["input_ids"] % 3 == 0).long()


@pytest.mark.parametrize("masked", [True, False])
def test_it_equals_the_class_of_transformers(pair: tuple[Any, Any], masked: bool) -> None:
    static, model = pair
    inputs = tiny_inputs(model.config)
    given = inputs if masked else {"input_ids": inputs["input_ids"].clamp(min=1)}
    one = model(**given, labels=labels(inputs))
    other = static(**given, labels=labels(inputs))
    assert one.logits.shape == inputs["input_ids"].shape
    assert torch.allclose(one.logits, other.logits, atol=1e-6)
    assert torch.allclose(one.loss, other.loss, atol=1e-6)
    for loss in (one.loss, other.loss):
        loss.backward()
    ours = dict(model.electra.named_parameters())
    for key, parameter in static.electra.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(ours[key].grad, parameter.grad, atol=1e-6), key


def test_what_does_not_count(pair: tuple[Any, Any]) -> None:
    model, inputs = pair[1], tiny_inputs(pair[1].config)
    given = labels(inputs)
    expected = model(**inputs, labels=given).loss
    padded = inputs["attention_mask"] == 0
    assert padded.any()
    assert torch.equal(model(**inputs, labels=given.masked_fill(padded, 1)).loss, expected)
    assert torch.equal(model(**inputs, labels=given.masked_fill(padded, -100)).loss, expected)
    assert torch.equal(model(**inputs, labels=given.bool()).loss, expected)
    fewer = model(**inputs, labels=torch.where(torch.arange(7) < 2, given, -100))
    own = torch.nn.functional.binary_cross_entropy_with_logits(
        fewer.logits[:, :2], given[:, :2].float()
    )
    assert torch.allclose(fewer.loss, own, atol=1e-6)


def test_the_checkpoint_of_a_discriminator_becomes_a_head_and_back(tmp_path: Path) -> None:
    static = init(tiny_static("ElectraForPreTraining"))
    inputs = tiny_inputs(static.config)
    with torch.no_grad():
        expected = static(**inputs).logits
    static.save_pretrained(tmp_path / "static")
    static.save_head(tmp_path / "head")
    model = AutoModelWithHeads.from_pretrained(tmp_path / "static")
    name = model.load_head(tmp_path / "head", load_as="replaced")
    assert model.heads[name].head_type == "detection"
    model.active_head = name
    with torch.no_grad():
        assert torch.allclose(model(**inputs).logits, expected, atol=1e-6)
    model.save_head(tmp_path / "flexible", name)
    other = init(tiny_static("ElectraForPreTraining", seed=1))
    other.electra.load_state_dict(static.electra.state_dict())
    other.load_head(tmp_path / "flexible")
    with torch.no_grad():
        assert torch.allclose(other(**inputs).logits, expected, atol=1e-6)


def test_decoding_names_the_tokens(pair: tuple[Any, Any], read: Any) -> None:
    _, source = read("Anna works in Berlin", "She lives")
    logits = torch.full(source.input_ids.shape, 0.5)
    logits[0, 1] = -2.0
    output, head = types.SimpleNamespace(logits=logits), pair[1].heads["replaced"]
    found = head.decode(output, source)
    for row, text in zip(found, source.texts, strict=True):
        assert all(token["word"] == text[token["start"] : token["end"]] for token in row)
    first = source.offsets[0, 1, 1]
    assert "".join(token["word"] for token in found[0]) == "AnnaworksinBerlin"[first:]
    assert "".join(token["word"] for token in found[1]) == "Shelives"
    assert [token["index"] for token in found[1]] == list(range(1, len(found[1]) + 1))
    assert all(t["score"] == pytest.approx(0.6224593) for row in found for t in row)
    assert head.decode(output, source, threshold=0.7) == [[], []]
    assert len(head.decode(output, source, threshold=0.1)[0]) == len(found[0]) + 1
    assert json.loads(json.dumps(found)) == found


def test_the_threshold_is_saved(tmp_path: Path, read: Any) -> None:
    model = tiny_model("electra")
    model.add_detection_head("replaced", threshold=0.7, loss={"type": "binary_focal", "gamma": 1})
    randomise(model.heads["replaced"])
    model.save_head(tmp_path, "replaced")
    other = tiny_model("electra")
    other.load_head(tmp_path)
    assert other.heads["replaced"].to_dict() == model.heads["replaced"].to_dict()
    _, source = read("Anna")
    output = types.SimpleNamespace(logits=torch.full(source.input_ids.shape, 0.5))
    assert other.heads["replaced"].decode(output, source) == [[]]
    with pytest.raises(ConfigError, match="threshold=2"):
        model.add_detection_head("other", threshold=2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.zeros(3, 9, dtype=torch.long), "have 9 in a row, but a row has 7 tokens"),
        (torch.full((3, 7), 2), "hold 2, but they can be 0 to 1"),
        (torch.zeros(3, 7), "float32"),
    ],
)
def test_wrong_labels_are_refused(pair: tuple[Any, Any], given: Tensor, message: str) -> None:
    with pytest.raises(LabelError, match=message):
        pair[1](**tiny_inputs(pair[1].config), labels=given)
