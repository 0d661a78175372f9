"""Methods x architectures x attention x precision, each plain, recomputed and compiled.

The yardstick is the same model with the same weights in single precision with eager attention.

| what | tolerance |
|---|---|
| another attention implementation, single precision | 1e-5 |
| bfloat16, either implementation | mean error below 4 % of the mean magnitude |
| recomputed activations, both kinds: gradients | 1e-4 of the largest; in bfloat16 their direction,
cosine above 0.99 (what several layers read adds up its gradients in another order) |
| compiled whole (``fullgraph=True``) | 1e-6, in bfloat16 1e-2 |
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flexheads
from flexheads.errors import UnsupportedError
from flexheads.plugins import registry
from flexheads.testing import randomise, tiny_inputs, tiny_model

pytestmark = pytest.mark.numerics

ARCHITECTURES = ("bert", "gpt2", "llama", "t5", "vit")
ATTENTION = ("eager", "sdpa")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# Sizes that fit tiny models.
SIZES: dict[str, dict[str, Any]] = {
    "compacter": {"reduction_factor": 4},
    "compacter++": {"reduction_factor": 4},
    "adapter_plus": {"reduction_factor": 4, "stochastic_depth": 0.0},
    "prefix_tuning": {"prefix_length": 3, "bottleneck_size": 8},
    "prefix_tuning_flat": {"prefix_length": 3},
    "prompt_tuning": {"prompt_length": 3},
    "trainable_tokens": {"token_indices": [3, 4, 5, 6, 7, 8, 9]},
    "loreft": {"dropout": 0.0},
    "noreft": {"dropout": 0.0},
    "direft": {"dropout": 0.0},
    "oft": {"oft_block_size": 4},
    "boft": {"boft_block_size": 4},
}
EXTRA: dict[str, Any] = {
    "glow": ("seq_bn", {"inv_adapter": "glow", "inv_adapter_reduction_factor": 2}),
    "lora_all": ("lora", {"attn_matrices": ["q", "k", "v", "o"], "intermediate_lora": True}),
    "lora_gated": ("lora", {"use_gating": True}),
    "pissa": ("lora", {"init_weights": "pissa"}),
}


def methods() -> dict[str, Any]:
    """Every configuration that has a short name, once, and some more."""
    found: dict[str, Any] = {}
    for method in registry().methods.values():
        for name in method.identifiers:
            config = flexheads.load_config(name, **SIZES.get(name, {}))
            if config not in found.values():
                found[name] = config
    return found | {
        name: flexheads.load_config(base, **fields) for name, (base, fields) in EXTRA.items()
    }


METHODS = methods()


def without_dropout(model: Any) -> Any:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout", "dropout_prob"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


def build(method: str, architecture: str, attention: str, dtype: str) -> Any:
    """A model with one active adapter whose weights are all random; the same in every precision."""
    model = tiny_model(architecture, attn_implementation=attention).to(DTYPES[dtype])
    model.add_adapter("a", METHODS[method], set_active=True)
    randomise(model.adapters["a"], std=0.1)
    return without_dropout(model)


def inputs(model: Any) -> dict[str, Tensor]:
    given = tiny_inputs(model.config)
    return {k: t.to(model.dtype) if t.is_floating_point() else t for k, t in given.items()}


@torch.no_grad()
def run(model: Any, compiled: Any = None) -> Tensor:
    hidden: Tensor = (model if compiled is None else compiled)(**inputs(model)).last_hidden_state
    return hidden


def gradients(model: Any, recompute: bool | None = None) -> list[Tensor]:
    """Of every parameter of the adapter; with reentrant recomputation, or the other, or none."""
    model.train()
    model.train_adapter("a")
    model.zero_grad()
    backbone = model._attachment.backbone
    if recompute is not None:
        switch(backbone, "enable", {"use_reentrant": recompute})
    hidden = model(**inputs(model)).last_hidden_state.float()
    (hidden * torch.linspace(-1, 2, hidden.numel()).view_as(hidden)).sum().backward()
    if recompute is not None:
        switch(backbone, "disable")
    model.eval()
    return [p.grad for p in model.adapters.parameters() if p.grad is not None]


def switch(backbone: Any, what: str, *how: Any) -> None:
    """Recomputation on or off, under the name that the installed transformers prefers."""
    new = getattr(backbone, f"activation_checkpointing_{what}", None)
    (new or getattr(backbone, f"gradient_checkpointing_{what}"))(*how)


@functools.cache
def yardstick(method: str, architecture: str) -> Tensor:
    return run(build(method, architecture, "eager", "fp32"))


def check_close(actual: Tensor, expected: Tensor, dtype: str, atol: float) -> None:
    if dtype == "fp32":
        torch.testing.assert_close(actual, expected, atol=atol, rtol=0)
        return
    error = (actual.float() - expected.float()).abs().mean() / expected.float().abs().mean()
    assert error < 0.04, f"bfloat16 is off by {error:.1%} on average"


def check_same_gradients(actual: list[Tensor], expected: list[Tensor], dtype: str) -> None:
    if dtype == "fp32":
        for got, wanted in zip(actual, expected, strict=True):
            size = wanted.abs().max().item()
            torch.testing.assert_close(got, wanted, atol=1e-4 * size, rtol=0)
        return
    got, wanted = (torch.cat([g.double().flatten() for g in each]) for each in (actual, expected))
    likeness = torch.nn.functional.cosine_similarity(got, wanted, dim=0).item()
    assert likeness > 0.99, f"bfloat16 gradients point elsewhere: {likeness:.5f}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("method", METHODS)
def test_matrix(method: str, architecture: str, attention: str, dtype: str) -> None:
    try:
        model = build(method, architecture, attention, dtype)
    except UnsupportedError as error:
        assert not tiny_model(architecture).adapters
        pytest.skip(str(error))
    plain = run(model)
    check_close(plain, yardstick(method, architecture), dtype, atol=1e-5)
    expected = gradients(model)
    assert any(gradient.abs().max() > 0 for gradient in expected)
    for reentrant in (False, True):
        recomputed = gradients(model, reentrant)
        assert len(recomputed) == len(expected)
        check_same_gradients(recomputed, expected, dtype)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    atol = 1e-6 if dtype == "fp32" else 1e-2
    torch.testing.assert_close(run(model, compiled), plain, atol=atol, rtol=0)
