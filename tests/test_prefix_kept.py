"""In inference the keys and values of prefixes are kept: the result is that of computing them.

Gradients are wanted where nothing is kept, so the same model computes both ways.
"""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import flexheads
from flexheads import Average, BatchSplit, Parallel, Rows, Stack
from flexheads.sites.attention import AttentionPart
from flexheads.testing import randomise, tiny_inputs, tiny_model

V5 = int(transformers.__version__.partition(".")[0]) >= 5
SMALL = {"prefix_length": 4, "bottleneck_size": 8}

CONFIGS: dict[str, dict[str, Any]] = {
    "network": {},
    "flat": {"flat": True},
    "lengths by layer": {"prefix_length": {"0": 2, "default": 5}},
    "gates": {"use_gating": True},
    "two gates": {"use_gating": True, "shared_gating": False},
    "dropout": {"dropout": 0.5},
    "a layer left out": {"leave_out": [0]},
}

SETUPS = [
    "a",
    Stack("a", "b"),
    Rows(["a", None, "b"]),
    BatchSplit("b", "a", batch_sizes=[1, 2]),
    Parallel("a", "b"),
    Average("a", "a"),
]


def prefixed(architecture: str = "bert", **config: Any) -> Any:
    pytest.importorskip("flexheads_" + architecture.partition("-")[0])
    model = randomise(tiny_model(architecture), std=0.2)
    for seed, own in enumerate((config, {"flat": True, "prefix_length": 2})):
        model.add_adapter("ab"[seed], flexheads.PrefixTuningConfig(**{**SMALL, **own}))
        randomise(model.adapters["ab"[seed]], std=0.5, seed=seed)
    model.set_active_adapters("a")
    return model.double().eval()


def computed(model: Any, **call: Any) -> Tensor:
    result: Tensor = model(**tiny_inputs(model.config), **call)[0]
    assert result.requires_grad
    assert not any(keeps(model))
    return result.detach()


@torch.inference_mode()
def inferred(model: Any, **call: Any) -> Tensor:
    result: Tensor = model(**tiny_inputs(model.config), **call)[0]
    return result


def keeps(model: Any) -> list[bool]:
    """For each pool of the adapter, whether what it gives is kept."""
    pools = {id(m): m for m in model.adapters["a"].modules() if hasattr(m, "kept")}
    return [pool.kept._kept is not None for pool in pools.values()]


def check(model: Any, **call: Any) -> None:
    expected, actual = computed(model, **call), inferred(model, **call)
    assert keeps(model)
    assert all(keeps(model))
    torch.testing.assert_close(actual, expected, atol=1e-9, rtol=1e-9)
    assert not torch.allclose(actual[:1], inferred(model, adapter_names=[])[:1], atol=1e-3)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_configuration_gives_the_same(config: dict[str, Any]) -> None:
    check(prefixed(**config))


@pytest.mark.parametrize("setup", SETUPS, ids=str)
@pytest.mark.parametrize("config", [{}, {"use_gating": True}], ids=["plain", "gated"])
def test_every_setup_gives_the_same(setup: Any, config: dict[str, Any]) -> None:
    check(prefixed(**config), adapter_names=setup)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "t5", "bart", "deberta-v2"])
def test_every_way_in_gives_the_same(architecture: str) -> None:
    check(prefixed(architecture))


@pytest.mark.skipif(not V5, reason="before 5.0 this class has no attention functions")
def test_parts_of_ones_own_see_the_hidden_states() -> None:
    """A plain prefix needs no hook; beside a part that reads, both are right."""
    model = prefixed()
    host = model.bert.encoder.layer[0].attention.self
    assert not host._forward_pre_hooks
    model.add_adapter("g", flexheads.PrefixTuningConfig(**SMALL, use_gating=True))
    assert AttentionPart.reads_hidden
    assert len(host._forward_pre_hooks) == 1
    check(model, adapter_names=Stack("a", "g"))
    model.delete_adapter("g")
    assert not host._forward_pre_hooks
    check(model)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("flat", [False, True])
def test_steps_of_training_are_seen(flat: bool, fused: bool) -> None:
    model = prefixed(flat=flat)
    before = inferred(model)
    model.train_adapter("a")
    optimizer = torch.optim.AdamW(model.adapters["a"].parameters(), lr=0.05, fused=fused)
    for _ in range(2):
        model.train()(**tiny_inputs(model.config))[0].sin().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        after = inferred(model.eval())
        assert not torch.allclose(after, before, atol=1e-4)
        torch.testing.assert_close(after, computed(model), atol=1e-9, rtol=0)
        before = after


def test_gradients_are_what_they_were_without_inference_before() -> None:
    found = []
    for use in (False, True):
        model = prefixed()
        if use:
            inferred(model)
        model.train_adapter("a")
        model(**tiny_inputs(model.config))[0].sin().sum().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[1][name], gradient) for name, gradient in found[0].items())


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_moves_have_their_own(twin: Any) -> None:
    model = prefixed()
    expected = inferred(model)
    other = twin(model)
    assert not any(keeps(other))
    randomise(other.adapters["a"], std=0.3, seed=8)
    assert not torch.allclose(inferred(other), expected, atol=1e-3)
    assert torch.equal(inferred(model), expected)
    assert inferred(model.float()).dtype == torch.float32
    torch.testing.assert_close(inferred(model).double(), expected, atol=1e-4, rtol=1e-4)


def test_a_loaded_prefix_and_an_ejected_one_are_seen() -> None:
    model, other = prefixed(), prefixed()
    inferred(model)
    randomise(other.adapters["a"], std=0.3, seed=8)
    model.adapters["a"].load_state_dict(other.adapters["a"].state_dict())
    expected = inferred(other)
    torch.testing.assert_close(inferred(model), expected, atol=1e-12, rtol=0)
    model.eject_prefix_tuning("a")
    torch.testing.assert_close(inferred(model), expected, atol=1e-9, rtol=0)


def test_generation_is_the_same_with_kept_prefixes() -> None:
    pytest.importorskip("flexheads_gpt2")
    backbone = tiny_model("gpt2").base_model.config
    kind = transformers.GPT2LMHeadModel(backbone).double().eval()
    model = flexheads.init(randomise(kind, std=0.2))
    model.generation_config.eos_token_id = None
    model.add_adapter("a", flexheads.PrefixTuningConfig(**SMALL), set_active=True)
    randomise(model.adapters["a"], std=0.5)
    tokens = torch.randint(3, 90, (2, 5), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(tokens)
    how = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    found = model.generate(tokens, **how)
    assert all(keeps(model))
    longest = tokens
    for _ in range(5):
        logits = model(longest, attention_mask=torch.ones_like(longest)).logits
        assert logits.requires_grad
        longest = torch.cat([longest, logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(found, longest)
