"""AdapterFusion without any adapter's result: what it gives and learns is that of the formula.

With a hook on the layers of an adapter its result is made, and the formula is computed as it is in
the paper; that this is right is in test_fusion.py.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd.graph import saved_tensors_hooks

import flexheads
from flexheads import Average, Fuse, Parallel, Rows, Stack
from flexheads.testing import randomise, tiny_inputs, tiny_model

FUSE = Fuse("a", "b", "c", name="f")
FEW, MANY = {"reduction_factor": 3}, {"reduction_factor": 8}
"""Adapters with more values inside than the inputs have tokens, and with fewer."""

FUSIONS: list[dict[str, Any]] = [
    {"key": key, "query": query, "value": value}
    for key, query, value in itertools.product([True, False], repeat=3)
]
FUSIONS += [
    {"residual_before": True},
    {"residual_before": True, "value": False, "dropout_prob": 0.0},
    {"query_before_ln": True, "dropout_prob": 0.0},
    {"query_before_ln": True, "residual_before": True, "dropout_prob": 0.0},
    {"temperature": True, "dropout_prob": 0.5},
]

ADAPTERS: dict[str, list[dict[str, Any]]] = {
    "double": [{"config": "double_seq_bn"}],
    "parallel": [{"config": "par_bn"}],
    "sigmoid": [{"non_linearity": "sigmoid"}],
    "of several sizes": [{}, {"reduction_factor": 4}, {"reduction_factor": 16}],
    "scaled": [{"scaling": 2.5}, {}],
    "learned": [{"scaling": "learned"}],
    "channel": [{"scaling": "channel"}, {"scaling": 0.5}],
    "gated": [{"use_gating": True}],
    "own norms only": [{"original_ln_before": False, "original_ln_after": False}],
}


def fused(*adapters: dict[str, Any], fusion: dict[str, Any] | None = None, **model: Any) -> Any:
    """A tiny model in double precision that trains a fusion and its adapters, all random."""
    built = tiny_model("bert", **model)
    for seed, (name, own) in enumerate(zip("abc", itertools.cycle(adapters or [{}]))):
        fields = {"config": "seq_bn", **MANY, **own}
        built.add_adapter(name, flexheads.load_config(fields.pop("config"), **fields))
        randomise(built.adapters[name], std=0.3, seed=seed)
    config = flexheads.AdapterFusionConfig(**(fusion or {}))
    built.add_adapter_fusion(["a", "b", "c"], config, name="f")
    randomise(built.adapter_fusions["f"], std=0.3, seed=9)
    built.train_adapter_fusion(FUSE, unfreeze_adapters=True)
    return built.double()


@contextlib.contextmanager
def by_the_formula(model: Any) -> Iterator[None]:
    """Inside, every adapter gives its result."""
    bottlenecks = [part for name in "abc" for part in model.adapters[name].parts.values()]
    handles = [part.up.register_forward_hook(lambda *given: None) for part in bottlenecks]
    yield
    for handle in handles:
        handle.remove()


def results_kept(model: Any) -> int:
    """How often autograd keeps the results of three adapters at each position."""
    kept = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor.shape[2:] == (3, model.config.hidden_size))
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        model(**tiny_inputs(model.config))
    return sum(kept)


def learned(model: Any, **call: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """What a model gives, and the gradients."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    result: Tensor = model(**tiny_inputs(model.config), **call)[0]
    result.sin().sum().backward()
    named = model.named_parameters()
    return result.detach(), {n: p.grad for n, p in named if p.grad is not None}


def check(model: Any, **call: Any) -> None:
    found, gradients = learned(model, **call)
    with by_the_formula(model):
        expected, own = learned(model, **call)
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)
    assert gradients.keys() == own.keys()
    trained = [name for name, _ in model.adapter_fusions.named_parameters("adapter_fusions")]
    assert all(name in own for name in trained)
    for name, gradient in own.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-8, rtol=1e-8, msg=name)


@pytest.mark.parametrize("fusion", FUSIONS, ids=str)
@pytest.mark.parametrize("size", [FEW, MANY], ids=["tokens first", "weights first"])
@pytest.mark.parametrize("training", [True, False])
def test_every_fusion_learns_the_same(
    fusion: dict[str, Any], size: dict[str, Any], training: bool
) -> None:
    model = fused(size, fusion=fusion).train(training)
    dropped = training and fusion.get("dropout_prob") != 0.0
    assert bool(results_kept(model)) == (dropped and "residual_before" in fusion)
    with by_the_formula(model):
        assert results_kept(model)
    if "temperature" in fusion:
        for part in model.adapter_fusions["f"].parts.values():
            part.temperature = 1.0  # otherwise each call has another
    check(model)


@pytest.mark.parametrize("adapters", ADAPTERS.values(), ids=ADAPTERS)
@pytest.mark.parametrize("before", [True, False])
def test_every_bottleneck_learns_the_same(adapters: list[dict[str, Any]], before: bool) -> None:
    fusion = {"residual_before": before, "query_before_ln": before}
    model = fused(*adapters, fusion=fusion).eval()
    assert not results_kept(model)
    check(model)


OTHERWISE: dict[str, list[dict[str, Any]]] = {
    "norm before": [{"ln_before": True}],
    "hypercomplex": [{"config": "compacter", "reduction_factor": 4}],
    "wide": [{"reduction_factor": 0.5}],
    "of two kinds": [{}, {"non_linearity": "gelu"}],
}


@pytest.mark.parametrize("adapters", OTHERWISE.values(), ids=OTHERWISE)
def test_others_are_computed_as_they_are(adapters: list[dict[str, Any]]) -> None:
    model = fused(*adapters).eval()
    assert results_kept(model)
    check(model)


def test_what_drops_whole_rows_is_computed_as_it_is() -> None:
    model = fused({"stochastic_depth": 0.5}).train()
    assert results_kept(model)
    assert not results_kept(model.eval())


def test_the_temperature_cools_with_every_call() -> None:
    model = fused(fusion={"temperature": True}).train()
    (part, *_) = model.adapter_fusions["f"].parts.values()
    for _ in range(3):
        learned(model)
    assert part.temperature == pytest.approx(49.85)
    model.eval()
    learned(model)
    assert part.temperature == pytest.approx(49.85)


@pytest.mark.parametrize(
    "block", [Rows([FUSE, "a", FUSE]), Parallel(FUSE, "a"), Stack("c", FUSE), Average(FUSE, "a")]
)
def test_blocks_around_a_fusion(block: Any) -> None:
    check(fused().eval(), adapter_names=block)


def test_hooks_on_the_attention_and_its_projections_still_run() -> None:
    model, seen = fused().eval(), []
    part = model.adapter_fusions["f"].parts["layers.0.feed_forward"]
    for module in (part, part.query, part.value):
        handle = module.register_forward_hook(lambda module, *given: seen.append(module))
        learned(model)
        handle.remove()
        assert seen.pop() is module
        assert not seen


class Own(Tensor):
    """Weights of a kind of their own, as quantised ones are: good for what their layer needs."""

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        assert function not in (torch.cat, torch.matmul, Tensor.t, Tensor.__matmul__)
        found = super().__torch_function__(function, types, args, kwargs or {})
        return found.as_subclass(Tensor) if function is nn.functional.linear else found


def test_weights_of_other_kinds_do_no_more_than_their_layer_needs() -> None:
    model = fused().eval()
    expected = learned(model)[0]
    up = model.adapters["b"].parts["layers.0.feed_forward"].up
    up.weight = nn.Parameter(up.weight.detach().as_subclass(Own), requires_grad=False)
    torch.testing.assert_close(learned(model)[0], expected, atol=1e-9, rtol=0)


def test_half_precision_is_as_near_as_by_the_formula() -> None:
    exact, model = learned(fused().eval())[0], fused().eval().bfloat16()
    found = learned(model)[0]
    with by_the_formula(model):
        plain = learned(model)[0]
    errors = [(each.double() - exact).abs().mean() for each in (found, plain)]
    assert errors[0] < 1.2 * errors[1]


def test_autocast_learns_the_same() -> None:
    model = fused().float().eval()
    with torch.autocast("cpu", torch.bfloat16):
        found, gradients = learned(model)
        with by_the_formula(model):
            expected, own = learned(model)
    torch.testing.assert_close(found, expected, atol=0.1, rtol=0.1)
    assert {n: g.dtype for n, g in gradients.items()} == {n: g.dtype for n, g in own.items()}


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_code_is_one_graph_that_learns_the_same() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    model = fused(num_hidden_layers=1).eval()
    expected, own = learned(model)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        found = compiled(**tiny_inputs(model.config))[0]
        torch.testing.assert_close(found.detach(), expected, atol=1e-9, rtol=0)
        found.sin().sum().backward()
    for name, parameter in model.named_parameters():
        if name in own:
            torch.testing.assert_close(parameter.grad, own[name], atol=1e-8, rtol=1e-8, msg=name)
    assert counter.frame_count == 1
