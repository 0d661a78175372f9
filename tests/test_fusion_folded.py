"""In inference AdapterFusion is folded into its adapters: the result is that of the formula.

Gradients are wanted where nothing is kept, so the same model computes both ways.
"""

from __future__ import annotations

import copy
import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import flexheads
from flexheads import Average, Fuse, Parallel, Rows, Stack
from flexheads.testing import randomise, tiny_inputs, tiny_model

V5 = int(transformers.__version__.partition(".")[0]) >= 5

FUSIONS: list[dict[str, Any]] = [
    {"key": key, "query": query, "value": value}
    for key, query, value in itertools.product([True, False], repeat=3)
]
FUSIONS += [
    {"residual_before": True},
    {"residual_before": True, "value": False},
    {"query_before_ln": True},
    {"query_before_ln": True, "residual_before": True},
    {"value_before_softmax": False, "temperature": True, "dropout_prob": 0.5},
    {"regularization": False, "value_initialized": False},
]

FOLDED: dict[str, dict[str, Any]] = {
    "double": {"config": "double_seq_bn"},
    "parallel": {"config": "par_bn"},
    "gelu": {"non_linearity": "gelu"},
    "sigmoid": {"non_linearity": "sigmoid"},
    "leaky": {"non_linearity": "leakyrelu"},
    "gated": {"use_gating": True},
    "scaled": {"scaling": 2.5},
    "learned": {"scaling": "learned"},
    "channel": {"scaling": "channel"},
    "norm behind": {"ln_after": True},
    "skip behind the norm": {"residual_before_ln": False},
    "skip before the norm": {"residual_before_ln": "post_add"},
    "own norms only": {"original_ln_before": False, "original_ln_after": False},
}

UNFOLDED: dict[str, dict[str, Any]] = {
    "norm before": {"ln_before": True},
    "hypercomplex": {"config": "compacter", "reduction_factor": 4},
    "as wide as the model": {"reduction_factor": 0.5},
}


def fused(
    *adapters: dict[str, Any], architecture: str = "bert", fusion: dict[str, Any] | None = None
) -> Any:
    """A tiny model in double precision with adapters a, b, c in a fusion, all random."""
    pytest.importorskip(f"flexheads_{architecture}")
    model = tiny_model(architecture)
    for seed, (name, own) in enumerate(zip("abc", itertools.cycle(adapters or ({},)))):
        fields = {"config": "seq_bn", "reduction_factor": 8, **own}
        model.add_adapter(name, flexheads.load_config(fields.pop("config"), **fields))
        randomise(model.adapters[name], std=0.3, seed=seed)
    config = flexheads.AdapterFusionConfig(**(fusion or {}))
    model.add_adapter_fusion(["a", "b", "c"], config, name="f", set_active=True)
    randomise(model.adapter_fusions["f"], std=0.3, seed=9)
    return model.double().eval()


FUSE = Fuse("a", "b", "c", name="f")


def unfolded(model: Any, **call: Any) -> Tensor:
    result: Tensor = model(**tiny_inputs(model.config), **call)[0]
    assert result.requires_grad
    return result.detach()


@torch.inference_mode()
def inferred(model: Any, **call: Any) -> Tensor:
    result: Tensor = model(**tiny_inputs(model.config), **call)[0]
    return result


def folds(model: Any) -> list[bool]:
    """For each site, whether its attention is folded now."""
    kept = [part.kept._kept for part in model.adapter_fusions["f"].parts.values()]
    return [one is not None and one.value is not None for one in kept]


def check(model: Any, folding: bool = True, **call: Any) -> None:
    expected = unfolded(model, **call)
    assert not any(folds(model))
    actual = inferred(model, **call)
    assert folds(model) == [folding] * len(folds(model))
    torch.testing.assert_close(actual, expected, atol=1e-9, rtol=1e-9)
    bare = inferred(model, adapter_names=[])
    assert not torch.allclose(actual, bare, atol=1e-2)


@pytest.mark.parametrize("fusion", FUSIONS, ids=str)
def test_every_fusion_gives_the_same(fusion: dict[str, Any]) -> None:
    check(fused({}, {"reduction_factor": 16}, fusion=fusion))


@pytest.mark.parametrize("adapter", FOLDED.values(), ids=FOLDED)
@pytest.mark.parametrize("before", [True, False])
def test_every_bottleneck_gives_the_same(adapter: dict[str, Any], before: bool) -> None:
    fusion = {"residual_before": before, "query_before_ln": before}
    check(fused(adapter, fusion=fusion))


@pytest.mark.parametrize("adapter", UNFOLDED.values(), ids=UNFOLDED)
def test_what_cannot_be_folded_stays_as_it_is(adapter: dict[str, Any]) -> None:
    check(fused(adapter), folding=False)


def test_adapters_of_several_kinds_stay_as_they_are() -> None:
    check(fused({}, {"non_linearity": "gelu"}), folding=False)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "t5", "modernbert"])
def test_every_kind_of_layer_gives_the_same(architecture: str) -> None:
    check(fused(architecture=architecture))


def test_half_precision_is_as_near_as_without_folding() -> None:
    exact, model = unfolded(fused()), fused().bfloat16()
    both = (unfolded(model), inferred(model))
    errors = [(found.double() - exact).abs().mean() for found in both]
    assert errors[1] < 1.5 * errors[0]


def test_rows_and_blocks_around_a_fusion() -> None:
    model = fused()
    expected = unfolded(model)
    alone = unfolded(model, adapter_names="a")
    rows = inferred(model, adapter_names=Rows([FUSE, "a", FUSE]))
    torch.testing.assert_close(rows[[0, 2]], expected[[0, 2]], atol=1e-9, rtol=0)
    torch.testing.assert_close(rows[1], alone[1], atol=1e-9, rtol=0)
    both = inferred(model, adapter_names=Parallel(FUSE, "a"))
    torch.testing.assert_close(both, torch.cat([expected, alone]), atol=1e-9, rtol=0)
    for block in (Stack("c", FUSE), Average(FUSE, "a")):
        torch.testing.assert_close(
            inferred(model, adapter_names=block),
            unfolded(model, adapter_names=block),
            atol=1e-9,
            rtol=0,
        )


def test_branches_that_are_stacks_stay_as_they_are() -> None:
    model = fused()
    inferred(model)
    block = Fuse(Stack("c", "a"), "b", "c", name="f")
    torch.testing.assert_close(
        inferred(model, adapter_names=block),
        unfolded(model, adapter_names=block),
        atol=1e-9,
        rtol=0,
    )


def test_scores_are_shown_as_without_folding() -> None:
    model, given = fused(), tiny_inputs(fused().config)
    wanted = {"output_adapter_fusion_attentions": True}
    expected = model(**given, **wanted).adapter_fusion_attentions["f"]
    with torch.no_grad():
        actual = model(**given, **wanted).adapter_fusion_attentions["f"]
    assert all(folds(model))
    assert list(actual) == list(expected)
    for layer, scores in expected.items():
        torch.testing.assert_close(
            actual[layer]["feed_forward"], scores["feed_forward"], atol=1e-9, rtol=0
        )


# --- never old ------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused_optimizer", [False, True])
@pytest.mark.parametrize("unfreeze", [False, True])
def test_steps_of_training_are_seen(fused_optimizer: bool, unfreeze: bool) -> None:
    model = fused()
    before = inferred(model)
    model.train_adapter_fusion(FUSE, unfreeze_adapters=unfreeze)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.05, fused=fused_optimizer)
    for _ in range(2):
        model.train()
        model(**tiny_inputs(model.config))[0].sin().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        after = inferred(model)
        assert not torch.allclose(after, before, atol=1e-3)
        torch.testing.assert_close(after, unfolded(model), atol=1e-9, rtol=1e-9)
        before = after


def test_training_is_what_it_was_without_inference_before() -> None:
    fresh, used = fused(), fused()
    inferred(used)
    found = []
    for model in (fresh, used):
        model.train_adapter_fusion(FUSE, unfreeze_adapters=True)
        torch.manual_seed(3)
        model.train()(**tiny_inputs(model.config))[0].sin().sum().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[1][name], gradient) for name, gradient in found[0].items())


def test_other_weights_of_one_adapter_are_seen() -> None:
    model, other = fused(), fused({}, {"reduction_factor": 8})
    randomise(other.adapters["b"], std=0.4, seed=33)
    inferred(model)
    model.adapters["b"].load_state_dict(other.adapters["b"].state_dict())
    torch.testing.assert_close(inferred(model), inferred(other), atol=1e-9, rtol=0)


def test_another_scaling_is_seen() -> None:
    model = fused({"scaling": 2.5})
    before = inferred(model)
    for part in model.adapters["a"].parts.values():
        part.scaling = 5.0
    after = inferred(model)
    assert not torch.allclose(before, after, atol=1e-3)
    torch.testing.assert_close(after, unfolded(model), atol=1e-9, rtol=0)


def test_an_adapter_that_takes_the_place_of_another_is_seen() -> None:
    model = fused()
    inferred(model)
    model.add_adapter("b", flexheads.load_config("seq_bn", reduction_factor=4), overwrite_ok=True)
    randomise(model.adapters["b"], std=0.4, seed=34)
    model.set_active_adapters(FUSE)
    torch.testing.assert_close(inferred(model), unfolded(model), atol=1e-9, rtol=0)


def test_hooks_on_what_is_folded_still_run() -> None:
    model, seen = fused(), []
    inferred(model)
    up = model.adapters["b"].parts["layers.0.feed_forward"].up
    handle = up.register_forward_hook(lambda module, args, output: seen.append(output))
    expected = unfolded(model)
    seen.clear()
    torch.testing.assert_close(inferred(model), expected, atol=1e-9, rtol=0)
    assert len(seen) == 1
    handle.remove()
    inferred(model)
    assert len(seen) == 1


def test_copies_and_moves_have_their_own() -> None:
    model = fused()
    expected = inferred(model)
    twin = copy.deepcopy(model)
    assert not any(folds(twin))
    randomise(twin.adapters["a"], std=0.4, seed=77)
    assert not torch.allclose(inferred(twin), expected, atol=1e-3)
    assert torch.equal(inferred(model), expected)
    single = inferred(model.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), expected, atol=1e-4, rtol=1e-4)


def test_threads_infer_while_others_load() -> None:
    model = fused()
    states = [copy.deepcopy(model.adapters["a"].state_dict()) for _ in range(2)]
    for tensor in states[1].values():
        tensor.mul_(-1)
    allowed = []
    for state in states:
        model.adapters["a"].load_state_dict(state)
        allowed.append(inferred(model))

    def run(number: int) -> Tensor:
        return inferred(model)

    for round_ in range(10):
        model.adapters["a"].load_state_dict(states[round_ % 2])
        with ThreadPoolExecutor(4) as pool:
            for found in pool.map(run, range(8)):
                torch.testing.assert_close(found, allowed[round_ % 2], atol=1e-9, rtol=0)


@pytest.mark.skipif(not V5, reason="graphs are promised for 5.x")
def test_compiled_code_is_one_graph_whatever_was_kept() -> None:
    torch._dynamo.reset()
    model, given = fused(), tiny_inputs(fused().config)
    expected = inferred(model)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(**given)[0], expected, atol=1e-9, rtol=0)
        torch.testing.assert_close(inferred(model), expected, atol=0, rtol=0)
    torch._dynamo.reset()
