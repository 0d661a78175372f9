"""Loss weights of heads: fixed and learned, in the sum, in training, and in files."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from flexheads import AutoModelWithHeads, MultiHeadOutput
from flexheads.errors import ConfigError, UnknownNameError
from flexheads.testing import randomise, tiny_inputs, tiny_model

LABELS = {
    "ner": torch.tensor([[0, 1, 2, 0, 1, 2, 0]] * 3),
    "topic": torch.tensor([0, 1, 2]),
    "price": torch.tensor([0.5, -1.0, 2.0]),
}


def build() -> Any:
    model = tiny_model("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model.add_tagging_head("ner", num_labels=3)
    model.add_classification_head("topic", num_labels=3)
    model.add_classification_head("price", num_labels=1)
    randomise(model, std=0.1)
    model.active_head = list(LABELS)
    return model


def run(model: Any, *heads: str) -> Any:
    labels = {name: LABELS[name] for name in heads or LABELS}
    return model(**tiny_inputs(model.config), labels=labels)


def test_the_loss_is_the_weighted_sum_of_those_that_had_labels() -> None:
    model = build()
    plain = run(model)
    torch.testing.assert_close(plain.loss, sum(plain.losses.values()))
    model.set_loss_weights({"ner": 0.25, "price": 0})
    assert model.get_loss_weights() == {"ner": 0.25, "topic": 1.0, "price": 0.0}
    output = run(model)
    assert output.losses == plain.losses
    torch.testing.assert_close(output.loss, plain["ner"].loss / 4 + plain["topic"].loss)
    torch.testing.assert_close(run(model, "ner").loss, plain["ner"].loss / 4)
    assert set(run(model, "ner").losses) == {"ner"}
    without = model(**tiny_inputs(model.config))
    assert without.loss is None
    assert without.losses == {}
    assert "loss" not in without
    model.set_loss_weights({"price": 2})  # others keep theirs
    assert model.get_loss_weights() == {"ner": 0.25, "topic": 1.0, "price": 2.0}
    model.set_loss_weights(None)
    torch.testing.assert_close(run(model).loss, plain.loss)


def test_learned_weights_are_those_of_the_paper() -> None:
    model = build()
    model.set_loss_weights("learned")
    values = {"ner": 0.3, "topic": -0.7, "price": 1.1}
    with torch.no_grad():
        for name, value in values.items():
            model.loss_weights[name].log_variance.fill_(value)
    output = run(model)
    # 1/(2 sigma^2) L + log sigma for numbers, 1/sigma^2 L + log sigma for classes.
    expected = sum(
        output.losses[name].item() / ((2 if name == "price" else 1) * math.exp(value / 2) ** 2)
        + math.log(math.exp(value / 2))
        for name, value in values.items()
    )
    assert output.loss.item() == pytest.approx(expected, rel=1e-6)
    assert model.get_loss_weights() == pytest.approx(
        {"ner": math.exp(-0.3), "topic": math.exp(0.7), "price": math.exp(-1.1) / 2}
    )
    # At the least of the sum, the variance of classes is twice their loss, and that of numbers
    # their loss.
    output.loss.backward()
    for name, value in values.items():
        factor = 0.5 if name == "price" else 1.0
        slope = 0.5 - factor * math.exp(-value) * output.losses[name].item()
        assert model.loss_weights[name].log_variance.grad.item() == pytest.approx(slope, rel=1e-5)


def test_learned_weights_find_the_variance() -> None:
    model = build()
    model.set_loss_weights({"topic": "learned", "price": "learned"})
    with torch.no_grad():
        output = run(model)
    optimizer = torch.optim.Adam(model.loss_weights.parameters(), lr=0.05)
    for _ in range(400):
        optimizer.zero_grad()
        total = model._total_loss(list(zip(output.head_names, output.ordered, strict=True)))
        total.backward()
        optimizer.step()
    for name, factor in (("topic", 2.0), ("price", 1.0)):
        variance = math.exp(model.loss_weights[name].log_variance.item())
        assert variance == pytest.approx(factor * output.losses[name].item(), rel=0.02)


def test_training_an_adapter_trains_the_weights_of_its_heads() -> None:
    model = build()
    model.add_adapter("all", "lora")
    model.set_loss_weights("learned")
    model.active_head = ["ner", "topic"]
    model.train_adapter("all")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    weights = {name for name in trained if name.startswith("loss_weights.")}
    assert weights == {"loss_weights.ner.log_variance", "loss_weights.topic.log_variance"}


def test_weights_are_saved_and_restored(tmp_path: Path) -> None:
    model = build()
    model.add_classification_head("a.b", num_labels=2, set_active=False)
    model.set_loss_weights({"ner": 0.5, "topic": "learned", "a.b": "learned"})
    with torch.no_grad():
        model.loss_weights["topic"].log_variance.fill_(0.4)
        model.loss_weights["a.b"].log_variance.fill_(-0.9)
    model.save_pretrained(tmp_path)
    loaded = AutoModelWithHeads.from_pretrained(tmp_path)
    assert loaded.get_loss_weights() == model.get_loss_weights()
    assert list(loaded.state_dict()) == list(model.state_dict())
    torch.testing.assert_close(run(loaded).loss, run(model).loss)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(run(other).loss, run(model).loss)


def test_a_deleted_head_takes_its_weight_along() -> None:
    model = build()
    model.set_loss_weights("learned")
    model.delete_head("topic")
    assert set(model.loss_weights) == {"ner", "price"}
    assert set(model.get_loss_weights()) == {"ner", "price"}
    model.add_classification_head("topic", num_labels=3)
    assert model.get_loss_weights()["topic"] == 1.0


@pytest.mark.parametrize("weight", [-1, math.nan, math.inf, "leaned", None, True, [1]])
def test_bad_weights_are_refused(weight: Any) -> None:
    model = build()
    with pytest.raises(ConfigError, match="head 'topic'"):
        model.set_loss_weights({"ner": 0.5, "topic": weight})
    assert model.get_loss_weights() == dict.fromkeys(LABELS, 1.0)


def test_unknown_heads_are_refused() -> None:
    model = build()
    with pytest.raises(UnknownNameError, match=r"no head named 'nerd'.*mean 'ner'"):
        model.set_loss_weights({"topic": 0.5, "nerd": 0.5})
    assert model.get_loss_weights() == dict.fromkeys(LABELS, 1.0)
    with pytest.raises(ConfigError, match="by head"):
        model.set_loss_weights(0.5)
    with pytest.raises(UnknownNameError, match="nerd"):
        model(**tiny_inputs(model.config), labels={"nerd": LABELS["ner"]})


def test_outputs_are_found_by_name_by_index_and_as_a_mapping() -> None:
    model = build()
    output = run(model)
    assert list(output) == ["loss", "ner", "topic", "price"]
    assert output[0] is output["ner"]
    assert output[-1] is output["price"]
    assert output["loss"] is output.loss is output.get("loss")
    assert len(output.ordered) == 3
    again = pickle.loads(pickle.dumps(output))
    assert list(again) == list(output)
    torch.testing.assert_close(again.loss, output.loss)
    twice = MultiHeadOutput([("a", output["ner"]), ("a", output["topic"])])
    assert twice["a"] is output["ner"]
    torch.testing.assert_close(twice.loss, output["ner"].loss + output["topic"].loss)
