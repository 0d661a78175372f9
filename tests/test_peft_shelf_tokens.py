"""Trainable tokens: what they are, tied output embeddings included, and the numbers of PEFT."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flexheads
from flexheads import TrainableTokensConfig
from flexheads.errors import ConfigError, UnsupportedError
from flexheads.methods.trainable_tokens import TokenRows
from flexheads.testing import randomise, tiny_inputs, tiny_model, tiny_static

IDS = (7, 98, 3, 41)
CONFIG = TrainableTokensConfig(token_indices=IDS)
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

# PEFT asks transformers 5.23 by an old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def inputs_for(model: Any) -> dict[str, Tensor]:
    inputs = tiny_inputs(model.config)
    inputs["input_ids"][0, :4] = torch.tensor([41, 7, 98, 7])
    return inputs


def logits_of(model: Any, **call: Any) -> Tensor:
    return model(**inputs_for(model), **call).logits


def static(name: str = "BertForMaskedLM", **changes: Any) -> Any:
    return tiny_static(name, **NO_DROPOUT, **changes)


def with_rows(model: Any, name: str = "a", seed: int = 0, config: Any = CONFIG) -> Any:
    """The model with trained rows for `IDS`."""
    model.add_adapter(name, config=config)
    randomise(model.adapters[name], seed=seed)
    model.set_active_adapters(name)
    return model


def replaced(model: Any, rows: Tensor, both: bool = True) -> Any:
    """A plain copy of a static model, with the rows written into its embeddings."""
    plain = model.static_class(model.config)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "adapters." not in k})
    if not both:
        embeddings = plain.get_input_embeddings()
        embeddings.weight = nn.Parameter(embeddings.weight.detach().clone())
    with torch.no_grad():
        plain.get_input_embeddings().weight[list(IDS)] = rows
    return plain.eval()


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertLMHeadModel", "BertForPreTraining"])
def test_tied_logits_and_embeddings_use_the_rows(name: str) -> None:
    model = with_rows(flexheads.init(static(name)))
    rows = model.adapters["a"].parts["tokens"].rows
    own, plain = model(**inputs_for(model)), replaced(model, rows)(**inputs_for(model))
    assert plain.to_tuple()[0].shape[-1] == 99
    torch.testing.assert_close(own.to_tuple()[0], plain.to_tuple()[0], atol=1e-5, rtol=0)


def test_untied_output_embeddings_stay() -> None:
    model = with_rows(flexheads.init(static(tie_word_embeddings=False)))
    rows = model.adapters["a"].parts["tokens"].rows
    expected = logits_of(replaced(model, rows, both=False))
    torch.testing.assert_close(logits_of(model), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["masked_lm", "causal_lm"])
@pytest.mark.parametrize("tied", [True, False])
def test_flexible_heads_use_the_rows_where_they_are_tied(kind: str, tied: bool) -> None:
    model = randomise(tiny_model("bert", tie_word_embeddings=tied), std=0.1)
    getattr(model, f"add_{kind}_head")("lm")
    randomise(model.heads["lm"])
    model.add_adapter("a", config=CONFIG)
    randomise(model.adapters["a"])
    acting = logits_of(model, adapter_names="a", head="lm")
    table = model.bert.embeddings.word_embeddings.weight
    if not tied:
        features = model(**inputs_for(model), adapter_names="a", head=[]).last_hidden_state
        transform = model.heads["lm"].layers[0]
        head = model.heads["lm"]
        expected = transform(features) @ head.weight.T + head.bias
    with torch.no_grad():
        table[list(IDS)] = model.adapters["a"].parts["tokens"].rows
    if tied:
        expected = logits_of(model, adapter_names=[], head="lm")
    torch.testing.assert_close(acting, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("flexible", [False, True])
def test_rows_of_a_batch_have_tokens_of_their_own(flexible: bool) -> None:
    if flexible:
        model = randomise(tiny_model("bert"), std=0.1)
        for name in "ab":
            model.add_masked_lm_head(name)
    else:
        model = flexheads.init(static())
    for seed, name in enumerate("ab"):
        with_rows(model, name, seed)
    heads = {name: {"head": name} if flexible else {} for name in "ab"}
    alone = {name: logits_of(model, adapter_names=name, **heads[name]) for name in "ab"}
    setup = flexheads.BatchSplit("a", "b", batch_sizes=[1, 2])
    mixed = model(**inputs_for(model), adapter_names=setup)
    parts = [o.logits for o in mixed.ordered] if flexible else [mixed.logits[:1], mixed.logits[1:]]
    torch.testing.assert_close(parts[0], alone["a"][:1], atol=1e-5, rtol=0)
    torch.testing.assert_close(parts[1], alone["b"][1:], atol=1e-5, rtol=0)


def peft_pair(base: Any) -> tuple[Any, Any, nn.Parameter, nn.Parameter]:
    peft = pytest.importorskip("peft")
    config = peft.TrainableTokensConfig(token_indices=list(IDS), target_modules=["word_embeddings"])
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    ours = with_rows(flexheads.init(base))
    rows = ours.adapters["a"].parts["tokens"].rows
    layer = theirs.base_model.model.get_input_embeddings()
    delta = layer.trainable_tokens_delta["default"]
    with torch.no_grad():
        delta.copy_(rows)
    ours.train_adapter("a")
    return ours, theirs, rows, delta


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForSequenceClassification"])
def test_the_same_as_peft(name: str) -> None:
    base = static(name)
    if name == "BertForMaskedLM":
        nn.init.zeros_(base.cls.predictions.bias)  # see the next test
    ours, theirs, rows, delta = peft_pair(base)
    outputs = [logits_of(model.eval()) for model in (ours, theirs)]
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=0)
    weights = torch.linspace(-1, 2, outputs[0].numel()).view_as(outputs[0]) / outputs[0].numel()
    for output in outputs:
        (output * weights).sum().backward()
    assert rows.grad.abs().max() > 1e-3
    torch.testing.assert_close(rows.grad, delta.grad, atol=1e-5, rtol=0)


def test_a_bias_of_tied_output_embeddings_is_kept() -> None:
    """PEFT leaves it out, of every token, as soon as some tokens are trained."""
    base = static()
    bias = base.cls.predictions.bias.detach().clone()
    assert bias.abs().min() > 0
    ours, theirs, *_ = peft_pair(base)
    torch.testing.assert_close(logits_of(ours), logits_of(theirs) + bias, atol=1e-5, rtol=0)


def test_only_the_rows_get_gradients_through_their_tokens() -> None:
    model = with_rows(flexheads.init(static()))
    logits_of(model)[..., 41].sum().backward()
    table = model.bert.embeddings.word_embeddings.weight
    assert torch.equal(table.grad[list(IDS)], torch.zeros(4, 32))
    assert model.adapters["a"].parts["tokens"].rows.grad.abs().max() > 0


def test_a_padding_token_that_is_named_is_trained() -> None:
    """The embedding gives its row no gradients, so neither does PEFT through the embedding."""
    model = flexheads.init(static("BertForSequenceClassification"))
    model.add_adapter("a", config=TrainableTokensConfig(token_indices=(0,)), set_active=True)
    inputs = {"input_ids": torch.zeros(1, 4, dtype=torch.long)}
    model(**inputs).logits[0, 0].backward()
    assert model.adapters["a"].parts["tokens"].rows.grad.abs().max() > 0


def test_a_row_is_scaled_as_the_embedding_scales() -> None:
    part = TokenRows(torch.randn(2, 8), (5, 3), 4.0)
    ids = torch.tensor([[3, 1, 5]])
    out = part(ids, torch.zeros(1, 3, 8))
    assert torch.equal(out[0], torch.stack([part.rows[1] * 4, torch.zeros(8), part.rows[0] * 4]))


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForSequenceClassification"])
def test_identity_at_the_start_merging_and_removal(name: str) -> None:
    model = flexheads.init(static(name))
    before = logits_of(model)
    table = model.bert.embeddings.word_embeddings.weight.clone()
    model.add_adapter("a", config=CONFIG, set_active=True)
    assert torch.equal(logits_of(model), before)
    randomise(model.adapters["a"])
    acting = logits_of(model)
    assert not torch.allclose(acting, before, atol=1e-2)
    model.merge_adapter("a")
    torch.testing.assert_close(logits_of(model), acting, atol=1e-5, rtol=0)
    model.reset_adapter()
    assert torch.equal(model.bert.embeddings.word_embeddings.weight, table)
    model.delete_adapter("a")
    assert torch.equal(logits_of(model), before)


def test_a_stack_replaces_in_order() -> None:
    model = with_rows(flexheads.init(static()))
    with_rows(model, "b", 1, TrainableTokensConfig(token_indices=(98, 5)))
    stacked = logits_of(model, adapter_names=["a", "b"])
    table = model.bert.embeddings.word_embeddings.weight
    with torch.no_grad():
        for name in "ab":
            part = model.adapters[name].parts["tokens"]
            table[part.ids] = part.rows
    torch.testing.assert_close(stacked, logits_of(model, adapter_names=[]), atol=1e-5, rtol=0)


def test_files_bring_the_adapter_back(tmp_path: Path) -> None:
    model = with_rows(tiny_model("bert"))
    hidden = model(**inputs_for(model)).last_hidden_state
    model.save_adapter(tmp_path / "alone", "a")
    other = tiny_model("bert")
    other.load_adapter(tmp_path / "alone", load_as="b", set_active=True)
    assert torch.equal(other(**inputs_for(model)).last_hidden_state, hidden)
    model.save_pretrained(tmp_path / "whole")
    whole = type(model).from_pretrained(tmp_path / "whole")
    assert torch.equal(whole(**inputs_for(model)).last_hidden_state, hidden)


def test_random_rows_come_from_their_seed() -> None:
    config = CONFIG.replace(init_weights=False, init_weights_seed=3)
    rows = []
    for _ in range(2):
        model = tiny_model("bert")
        model.add_adapter("a", config=config)
        rows.append(model.adapters["a"].parts["tokens"].rows)
    assert torch.equal(*rows)
    assert not torch.allclose(rows[0], model.bert.embeddings.word_embeddings.weight[list(IDS)])


@pytest.mark.parametrize("ids", [(3, 3), (-1,), (1.5,), (True,)])
def test_bad_ids_are_refused(ids: Any) -> None:
    with pytest.raises(ConfigError, match="token_indices"):
        TrainableTokensConfig(token_indices=ids)


def test_what_does_not_fit_the_model_is_refused() -> None:
    model = tiny_model("bert")
    with pytest.raises(ConfigError, match="99 tokens"):
        model.add_adapter("a", TrainableTokensConfig(token_indices=(99,)))
    with pytest.raises(ConfigError, match="name token_indices"):
        model.add_adapter("a", "trainable_tokens")
    model.bert.embeddings.word_embeddings.max_norm = 1.0
    with pytest.raises(UnsupportedError, match="more than to look up"):
        model.add_adapter("a", CONFIG)
    assert not model.adapters


def test_an_average_of_tokens_looks_up_their_mean() -> None:
    model = tiny_model("bert")
    for name in ("a", "b", "mean"):
        model.add_adapter(name, CONFIG)
    randomise(model.adapters)
    a, b = (model.adapters[name].state_dict() for name in "ab")
    mean = {key: 0.25 * tensor + 0.75 * b[key] for key, tensor in a.items()}
    model.adapters["mean"].load_state_dict(mean)
    inputs = {"input_ids": torch.tensor([[*IDS, 5, 6]])}
    average = flexheads.composition.Average("a", "b", weights=[0.25, 0.75])
    got, right = (
        model(**inputs, adapter_names=setup).last_hidden_state for setup in (average, "mean")
    )
    torch.testing.assert_close(got, right)
    assert not torch.allclose(got, model(**inputs, adapter_names="a").last_hidden_state)
