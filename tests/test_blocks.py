"""Average, Split and skipped layers: each equals its definition, for every kind of method."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import flexheads
from flexheads import Average, BatchSplit, Parallel, Split, Stack
from flexheads.errors import CompositionError, ConfigError
from flexheads.testing import randomise, tiny_inputs, tiny_model

METHODS = ("seq_bn", "double_seq_bn", "par_bn", "lora", "adapter_plus[reduction_factor=4]")


def model_with(config: Any, names: str = "abc") -> Any:
    model = tiny_model("bert", num_hidden_layers=1)
    for seed, name in enumerate(names):
        model.add_adapter(name, config)
        randomise(model.adapters[name], std=0.2, seed=seed)
    return model


@torch.no_grad()
def run(model: Any, setup: Any) -> Any:
    return model(**tiny_inputs(model.config), adapter_names=setup).last_hidden_state


@pytest.mark.parametrize("config", METHODS)
def test_average_of_equal_adapters_is_that_adapter(config: str) -> None:
    """The peer divides a mean with weights that sum to one by their number once more."""
    model = model_with(config, "ab")
    model.adapters["b"].load_state_dict(model.adapters["a"].state_dict())
    average = Average("a", "b", weights=[1, 3])
    torch.testing.assert_close(run(model, average), run(model, "a"), atol=1e-5, rtol=0)


def test_average_is_the_weighted_mean_of_what_the_adapters_give() -> None:
    """Pre-norm results are averaged: with the layer norm taken out, so are the outputs."""
    model = model_with("seq_bn", "ab")
    model.bert.encoder.layer[0].output.LayerNorm = torch.nn.Identity()
    model = flexheads.init(model)
    a, b = run(model, "a"), run(model, "b")
    got = run(model, Average("a", "b", weights=[0.3, 0.7]))
    torch.testing.assert_close(got, 0.3 * a + 0.7 * b, atol=1e-4, rtol=0)


def test_average_of_loras_is_the_lora_of_the_averaged_delta() -> None:
    model = model_with("lora", "ab")
    got = run(model, Average("a", "b", weights=[0.3, 0.7]))
    for address, part in model.adapters["a"].parts.items():
        other = model.adapters["b"].parts[address]
        delta = 0.3 * part.lora_B @ part.lora_A + 0.7 * other.lora_B @ other.lora_A
        host = model._attachment.sites[address].host
        host.weight.data += delta
    torch.testing.assert_close(run(model, []), got, atol=1e-5, rtol=0)


@pytest.mark.parametrize("config", ["seq_bn", "par_bn", "adapter_plus[reduction_factor=4]"])
def test_split_gives_each_adapter_its_positions(config: str) -> None:
    """One layer, so that a position's own adapter is all that it can see."""
    model = model_with(config, "ab")
    got = run(model, Split("a", "b", splits=[3, 4]))
    torch.testing.assert_close(got[:, :3], run(model, "a")[:, :3], atol=1e-5, rtol=0)
    torch.testing.assert_close(got[:, 3:], run(model, "b")[:, 3:], atol=1e-5, rtol=0)


def test_blocks_nest_in_stacks_and_in_rows() -> None:
    model = model_with("seq_bn")
    average = Average("a", Stack("b", "c"))
    alone = run(model, Stack("c", average))
    rows = run(model, BatchSplit(Stack("c", average), "a", batch_sizes=[2, 1]))
    torch.testing.assert_close(rows[:2], alone[:2], atol=1e-5, rtol=0)
    torch.testing.assert_close(rows[2:], run(model, "a")[2:], atol=1e-5, rtol=0)
    parallel = run(model, Parallel(average, "b"))
    torch.testing.assert_close(parallel[:3], run(model, average), atol=1e-5, rtol=0)


def test_skipped_layers_run_bare() -> None:
    model = tiny_model("bert")
    model.add_adapter("a")
    randomise(model.adapters)
    model.set_active_adapters("a", skip_layers=[0, 1])
    bare = run(model, [])
    with torch.no_grad():
        assert torch.equal(model(**tiny_inputs(model.config)).last_hidden_state, bare)
        model.set_active_adapters("a", skip_layers=[0])
        half = model(**tiny_inputs(model.config)).last_hidden_state
    assert not torch.allclose(half, bare, atol=1e-3)
    assert not torch.allclose(half, run(model, "a"), atol=1e-3)
    with pytest.raises(ConfigError, match="skip_layers"):
        model.set_active_adapters("a", skip_layers=[2])


def test_a_split_that_does_not_fit_the_sequence_is_refused() -> None:
    model = model_with("seq_bn")
    with pytest.raises(CompositionError, match="7"):
        run(model, Split("a", "b", splits=[3, 3]))


def test_weights_and_sizes_must_fit() -> None:
    with pytest.raises(CompositionError, match="weights"):
        Average("a", "b", weights=[1])
    with pytest.raises(CompositionError, match="splits"):
        Split("a", "b", splits=[1])
    assert Average("a", "b", weights=[1, 3]).weights == (0.25, 0.75)
    assert Average("a", "b", weights=[1, 3], normalize_weights=False).weights == (1.0, 3.0)
