"""Rows that follow chains of their own: states, attentions, caches, heads and generation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import flexheads
from flexheads import BatchSplit, Parallel, Rows, Stack
from flexheads.errors import CompositionError
from flexheads.testing import randomise, tiny_inputs, tiny_model, tiny_static
from flexheads.testing.block_matrix import way_of

SETUPS: dict[str, Any] = {
    "Rows": Rows(["a", None, "b"]),
    "BatchSplit": BatchSplit("a", Stack("b", "c"), batch_sizes=[1, 2]),
    "Parallel": Parallel("a", "b"),
    "Parallel of Rows": Parallel(Rows(["a", None, "c"]), "b"),
}
STATIC = ("GPT2LMHeadModel", "T5ForConditionalGeneration")
PREFIX = "prefix_tuning[prefix_length=3,bottleneck_size=8]"
CONFIGS = {
    "GPT2LMHeadModel": {"a": "seq_bn", "b": "lora", "c": PREFIX},
    "T5ForConditionalGeneration": {"a": "seq_bn", "b": "lora", "c": "par_bn"},
}
ROWS = 3

each_setup = pytest.mark.parametrize("setup", SETUPS.values(), ids=SETUPS)


def prepared(class_name: str) -> Any:
    model = tiny_static(class_name, pad_token_id=0, attn_implementation="eager")
    model.generation_config.eos_token_id = None
    flexheads.init(model)
    for seed, (name, config) in enumerate(CONFIGS[class_name].items()):
        model.add_adapter(name, config)
        randomise(model.adapters[name], std=0.2, seed=seed)
    return model


@pytest.fixture(scope="module", params=STATIC)
def model(request: Any) -> Any:
    return prepared(request.param)


@pytest.fixture(scope="module")
def decoder() -> Any:
    return prepared(STATIC[0])


def padded(length: int = 5) -> dict[str, Tensor]:
    """Prompts with padding on the left."""
    ids = torch.randint(3, 90, (ROWS, length), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    ids[0, :2], mask[0, :2] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def ways(setup: Any) -> list[tuple[int, Any]]:
    """For each row of the output the row of the input, and its own setup."""
    copies = 2 if isinstance(setup, Parallel) else 1
    found = [(row, way_of(setup, row, ROWS, copy)) for copy in range(copies) for row in range(ROWS)]
    return [(row, [] if way is None else way) for row, way in found]


def states(output: Any) -> dict[str, tuple[Tensor, ...]]:
    """Everything that was recorded layer by layer."""
    return {
        name: value for name, value in output.items() if name.endswith(("states", "attentions"))
    }


@each_setup
@torch.no_grad()
def test_states_and_attentions_are_those_of_the_rows(model: Any, setup: Any) -> None:
    asked = {"output_hidden_states": True, "output_attentions": True}
    inputs = tiny_inputs(model.config, ROWS)
    found = states(model(**inputs, **asked, adapter_names=setup))
    assert len(found) >= 2 + 3 * model.config.is_encoder_decoder
    for place, (row, way) in enumerate(ways(setup)):
        alone = states(model(**inputs, **asked, adapter_names=way))
        assert alone.keys() == found.keys()
        for name, layers in alone.items():
            for mine, theirs in zip(found[name], layers, strict=True):
                # A row that has no prefix sees those of the others as padding.
                width = theirs.shape[-1] if "attentions" in name else None
                got = mine[place][..., -width:] if width else mine[place]
                torch.testing.assert_close(got, theirs[row], atol=1e-5, rtol=1e-4, msg=name)


@each_setup
@torch.no_grad()
def test_going_on_from_a_cache_is_reading_it_all(decoder: Any, setup: Any) -> None:
    inputs = padded(length=6)
    whole = decoder(**inputs, adapter_names=setup).logits
    first = {name: tensor[:, :4] for name, tensor in inputs.items()}
    begun = decoder(**first, adapter_names=setup, use_cache=True)
    cache = begun.past_key_values
    for step in (4, 5):
        mask = inputs["attention_mask"][:, : step + 1]
        ids = inputs["input_ids"][:, step : step + 1]
        found = decoder(
            input_ids=ids, attention_mask=mask, past_key_values=cache, adapter_names=setup
        ).logits
        # Positions are counted from the left here, padding included, as in the whole.
        torch.testing.assert_close(found[:, 0], whole[:, step], atol=1e-4, rtol=1e-4)


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "no cache": {"use_cache": False},
    "beams": {"num_beams": 2},
    "several": {"num_beams": 3, "num_return_sequences": 2},
}


@pytest.mark.parametrize("way", WAYS)
@each_setup
def test_each_row_generates_under_its_own_chain(model: Any, setup: Any, way: str) -> None:
    how = {"max_new_tokens": 4, "do_sample": False, **WAYS[way]}
    inputs, count = padded(), WAYS[way].get("num_return_sequences", 1)
    found = model.generate(**inputs, adapter_names=setup, **how).unflatten(0, (-1, count))
    for place, (row, own) in enumerate(ways(setup)):
        alone = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
        assert torch.equal(found[place], model.generate(**alone, adapter_names=own, **how))
    model.set_active_adapters(setup)
    active = model.generate(**inputs, **how)
    model.set_active_adapters(None)
    assert torch.equal(active, found.flatten(0, 1))


def test_a_generation_with_other_rows_is_refused_at_once(model: Any) -> None:
    with pytest.raises(CompositionError, match="2 rows, but the batch has 3"):
        model.generate(**padded(), adapter_names=Rows(["a", "b"]), num_beams=2)


@each_setup
@torch.no_grad()
def test_pooled_heads_see_their_rows(setup: Any) -> None:
    model = tiny_model("bert")
    for seed, (name, config) in enumerate({"a": "seq_bn", "b": "lora", "c": "par_bn"}.items()):
        model.add_adapter(name, config)
        model.add_classification_head(name, num_labels=2 + seed, use_pooler=bool(seed % 2))
        randomise(model.adapters[name], std=0.2, seed=seed)
    inputs = tiny_inputs(model.config, ROWS)
    output = model(**inputs, adapter_names=setup)
    rows: dict[tuple[int, str], list[Tensor]] = {}
    for place, (row, way) in enumerate(ways(setup)):
        if way:
            head = way if isinstance(way, str) else way[-1]
            logits = model(**inputs, adapter_names=way, head=head).logits[row]
            rows.setdefault((place // ROWS, head), []).append(logits)
    expected = [torch.stack(own) for own in rows.values()]
    assert len(output.ordered) == len(expected)
    for logits in (own.logits for own in output.ordered):
        fitting = [other for other in expected if other.shape == logits.shape]
        assert any(torch.allclose(logits, other, atol=1e-5) for other in fitting)
