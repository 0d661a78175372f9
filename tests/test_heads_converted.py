"""Heads made of static ones where more than names differs: poolings, sides, two heads at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from flexheads.errors import ConfigError, UnsupportedError
from flexheads.models.static import init
from flexheads.testing import tiny_inputs, tiny_model, tiny_static

Converted = Callable[..., tuple[Any, Any]]


@pytest.mark.parametrize("pooling", ["bos", "mean", "late"])
def test_scores_averaged_late(converted: Converted, pooling: str) -> None:
    if "EuroBertForSequenceClassification" not in dir(transformers):
        pytest.skip("this release does not have the class yet")
    static, model = converted("EuroBertForSequenceClassification", classifier_pooling=pooling)
    inputs, labels = tiny_inputs(model.config), torch.tensor([0, 1, 1])
    expected, actual = static(**inputs, labels=labels), model(**inputs, labels=labels)
    torch.testing.assert_close(actual.logits, expected.logits)
    torch.testing.assert_close(actual.loss, expected.loss)
    assert model.heads["h"].config.late == (pooling == "late")


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("bias", [True, False])
def test_norms_between_layers(
    tmp_path: Path, converted: Converted, pooling: str, bias: bool
) -> None:
    settings = {"classifier_pooling": pooling, "classifier_bias": bias, "norm_bias": bias}
    static, model = converted("ModernBertForSequenceClassification", **settings)
    inputs = tiny_inputs(model.config)
    torch.testing.assert_close(model(**inputs).logits, static(**inputs).logits)
    model.save_head(tmp_path / "back", "h")
    static.load_head(tmp_path / "back")  # as it was
    torch.testing.assert_close(model(**inputs).logits, static(**inputs).logits)


def test_both_losses_of_two_heads_at_once(converted: Converted) -> None:
    static, model = converted("GPT2DoubleHeadsModel")
    inputs = {name: value.view(2, 2, -1) for name, value in tiny_inputs(model.config, 4).items()}
    last = inputs["attention_mask"].sum(dim=-1) - 1
    words = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    right = torch.tensor([1, 0])
    expected = static(**inputs, mc_token_ids=last, labels=words, mc_labels=right)
    labels = {"h": words.flatten(0, 1), "h_choice": right}
    actual = model(**inputs, head=["h", "h_choice"], labels=labels)
    torch.testing.assert_close(actual["h"].loss, expected.loss)
    torch.testing.assert_close(actual["h_choice"].loss, expected.mc_loss)


def test_what_a_rule_does_not_know_is_refused(tmp_path: Path) -> None:
    static = init(tiny_static("GPT2DoubleHeadsModel", summary_activation="tanh"))
    static.save_head(tmp_path)
    model = tiny_model("gpt2", summary_activation="tanh")
    with pytest.raises(UnsupportedError, match="summary_activation='tanh' has no flexible equal"):
        model.load_head(tmp_path, load_as="h")


# --- the encoder alone ------------------------------------------------------------------------


def test_a_head_on_the_encoder_runs_no_decoder(converted: Converted) -> None:
    static, model = converted("T5ForTokenClassification")
    inputs, ran = tiny_inputs(model.config), []
    model._attachment.backbone.decoder.register_forward_hook(lambda *_: ran.append(1))
    labels = torch.randint(2, inputs["input_ids"].shape)
    labels = labels.masked_fill(inputs["attention_mask"] == 0, -100)
    expected = static(inputs["input_ids"], inputs["attention_mask"], labels=labels)
    actual = model(inputs["input_ids"], inputs["attention_mask"], labels=labels)
    torch.testing.assert_close(actual.logits, expected.logits)
    torch.testing.assert_close(actual.loss, expected.loss)
    assert not ran
    # Beside a head of the decoder everything runs, and both are what they are alone.
    model.add_seq2seq_lm_head("written")
    alone = model(**inputs).logits
    both = model(**inputs, head=["h", "written"])
    assert len(ran) == 2
    torch.testing.assert_close(both["h"].logits, actual.logits)
    torch.testing.assert_close(both["written"].logits, alone)


@pytest.mark.parametrize("layer", [None, 1, "mix"])
@pytest.mark.parametrize("config", ["seq_bn", "prefix_tuning", "prompt_tuning", "loreft"])
def test_adapters_below_a_head_on_the_encoder(config: str, layer: int | str | None) -> None:
    model = tiny_model("t5")
    model.add_classification_head("h", pooling="mean", side="encoder", hidden_layer=layer)
    model.add_tagging_head("decoder")
    model.add_adapter("a", config=config)
    torch.nn.init.normal_(next(p for n, p in model.adapters["a"].named_parameters() if p.dim() > 1))
    inputs = tiny_inputs(model.config)
    with torch.no_grad():
        bare = model(**inputs, head="h").logits
        alone = model(**inputs, adapter_names="a", head="h").logits
        beside = model(**inputs, adapter_names="a", head=["h", "decoder"])["h"].logits
    torch.testing.assert_close(alone, beside)
    assert alone.shape == bare.shape


def test_an_encoder_that_is_not_there() -> None:
    model = tiny_model("bert")
    with pytest.raises(ConfigError, match="should be"):
        model.add_classification_head("h", side="left")
    with pytest.raises(UnsupportedError, match="has one side"):
        model.add_classification_head("h", side="encoder")
