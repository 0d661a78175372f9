"""Adapters run their small modules without a call, unless somebody would notice."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize, prune

import flexheads
from flexheads.sites.direct import are_plain, quiet
from flexheads.sites.prepared import NO_STEPS, Prepared
from flexheads.testing import randomise, tiny_inputs, tiny_model

METHODS = ["seq_bn", "double_seq_bn", "par_bn", "lora", "ia3", "unipelt"]


def build(*configs: Any, arch: str = "bert", **changes: Any) -> Any:
    model = tiny_model(arch, num_hidden_layers=2, **changes)
    for number, config in enumerate(configs):
        model.add_adapter(f"a{number}", config=config)
    randomise(model, std=0.2)
    model.set_active_adapters([f"a{number}" for number in range(len(configs))])
    result(model)  # in the first call nothing is prepared
    return model


def result(model: Any) -> Tensor:
    hidden: Tensor = model(**tiny_inputs(model.config)).last_hidden_state
    return hidden


def run_by_calls(monkeypatch: pytest.MonkeyPatch, model: Any, what: Callable[[Any], Any]) -> Any:
    """What comes of calling every module."""
    with monkeypatch.context() as patch:
        patch.setattr(Prepared, "steps", lambda _: NO_STEPS)
        for place in ("sites.direct", "methods.bottleneck"):
            patch.setattr(f"flexheads.{place}.quiet", lambda *_: False)
        return what(model)


@pytest.mark.parametrize("method", METHODS)
def test_results_and_gradients_are_those_of_calls(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(method, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)

    def gradients(model: Any) -> list[Tensor]:
        model.zero_grad()
        result(model).square().sum().backward()
        return [p.grad.clone() for p in model.adapters["a0"].parameters() if p.grad is not None]

    for train in (False, True):
        model.train(train)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        with torch.no_grad():
            plain = run_by_calls(monkeypatch, model, result)
            torch.testing.assert_close(result(model), plain, rtol=1e-5, atol=1e-6)
        ours, usual = gradients(model), run_by_calls(monkeypatch, model, gradients)
        assert len(ours) == len(usual) > 0
        for one, other in zip(ours, usual, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


INNER = {
    "seq_bn": ["", "down", "activation", "up", "dropout"],
    "double_seq_bn": ["", "down", "up"],
    "lora": ["", "dropout"],
    "ia3": [""],
}
CONFIGS = {"lora": flexheads.LoRAConfig(dropout=0.1)}
"""Where the usual one lacks a module that is watched."""


@pytest.mark.parametrize(
    ("method", "inner"), [(method, inner) for method, names in INNER.items() for inner in names]
)
@pytest.mark.parametrize("kind", ["hook", "pre-hook", "backward", "forward"])
def test_who_watches_a_module_sees_it_run(method: str, inner: str, kind: str) -> None:
    model, calls = build(CONFIGS.get(method, method)), []
    part = next(iter(model.adapters["a0"].parts.values()))
    module = part.get_submodule(inner)
    if kind == "hook":
        module.register_forward_hook(lambda *_: calls.append(1))
    elif kind == "pre-hook":
        module.register_forward_pre_hook(lambda *_: calls.append(1))
    elif kind == "backward" and inner:  # a whole part takes and gives no tensors alone
        module.register_full_backward_hook(lambda *_: calls.append(1))
    else:
        original = module.forward

        def forward(*args: Any) -> Any:
            calls.append(1)
            return original(*args)

        module.forward = forward
    result(model).sum().backward()
    assert calls == [1]


def test_hooks_change_what_is_computed() -> None:
    model = build("seq_bn")
    before = result(model)
    down = model.adapters["a0"].parts["layers.0.feed_forward"].down
    handle = down.register_forward_hook(lambda _, __, output: output * 0 - 1)
    assert not torch.equal(result(model), before)
    handle.remove()
    assert torch.equal(result(model), before)


def test_hooks_on_every_module_see_those_of_adapters() -> None:
    model, seen = build("seq_bn"), []
    handle = register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        result(model)
    finally:
        handle.remove()
    part = model.adapters["a0"].parts["layers.0.feed_forward"]
    assert {part, part.down, part.activation, part.up, part.dropout} <= set(seen)


class _Double(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


@pytest.mark.parametrize("method", ["seq_bn", "lora", "ia3"])
def test_weights_that_something_computes(method: str) -> None:
    model, twice = build(method), build(method)
    module, name = {
        "seq_bn": ("layers.0.feed_forward.up", "weight"),
        "lora": ("layers.0.query", "lora_B"),
        "ia3": ("layers.0.key", "lora_B"),
    }[method]
    parametrize.register_parametrization(
        model.adapters["a0"].get_submodule(module), name, _Double()
    )
    with torch.no_grad():
        getattr(twice.adapters["a0"].get_submodule(module), name).mul_(2)
    torch.testing.assert_close(result(model), result(twice))


def test_a_pruned_layer_runs_with_what_is_left() -> None:
    model, other = build("seq_bn"), build("seq_bn")
    for each in (model, other):
        up = each.adapters["a0"].parts["layers.1.feed_forward"].up
        mask = torch.ones_like(up.weight)
        mask[:, 0] = 0
        if each is model:
            prune.custom_from_mask(up, "weight", mask)
        else:
            up.weight.data *= mask
    torch.testing.assert_close(result(model), result(other))


class _Counted(Tensor):
    """A tensor that counts what is done with it."""

    count = 0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.count += 1
        return super().__torch_function__(func, types, args, kwargs or {})


def test_weights_of_a_class_of_their_own_keep_their_behaviour() -> None:
    model = build("seq_bn")
    before = result(model)
    up = model.adapters["a0"].parts["layers.1.feed_forward"].up
    up.weight = nn.Parameter(up.weight.detach().as_subclass(_Counted))
    _Counted.count = 0
    after = result(model)
    assert _Counted.count > 0
    torch.testing.assert_close(after.as_subclass(Tensor), before)


class _Eighths(nn.Linear):
    """A linear layer that computes in a way of its own, as quantised ones do."""

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.linear(hidden, (self.weight * 8).round() / 8, self.bias)


def test_a_layer_of_another_class_computes_in_its_own_way() -> None:
    model = build("seq_bn")
    before = result(model)
    for part in model.adapters["a0"].parts.values():
        part.down.__class__ = _Eighths
    quantised = result(model)
    assert not torch.allclose(quantised, before)
    layer = model.adapters["a0"].parts["layers.0.feed_forward"].down
    assert not are_plain(layer)


@pytest.mark.parametrize("method", METHODS)
def test_autocast_computes_what_calls_compute(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(method)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        ours, calls = result(model), run_by_calls(monkeypatch, model, result)
    assert ours.dtype == calls.dtype
    torch.testing.assert_close(ours, calls, rtol=2e-2, atol=2e-2)


def test_dropout_of_a_part_that_trains_alone_is_in_force() -> None:
    for config in (flexheads.SeqBnConfig(dropout=0.5), flexheads.LoRAConfig(dropout=0.5)):
        model = build(config)
        before = result(model)
        for module in model.adapters.modules():
            if isinstance(module, nn.Dropout):
                module.train()  # as in Monte Carlo dropout
        assert not torch.equal(result(model), before)


def test_copies_are_watched_for_themselves() -> None:
    model, calls = build("seq_bn"), []
    twin = copy.deepcopy(model)
    twin.adapters["a0"].parts["layers.0.feed_forward"].up.register_forward_hook(
        lambda *_: calls.append(1)
    )
    result(model)
    assert calls == []
    result(twin)
    assert calls == [1]


# --- where parts act on the sub-layer's result ----------------------------------------------------


def by_definition(model: Any, names: list[str]) -> Tensor:
    """BERT with bottlenecks that look at the sub-layer's result and add to it."""
    twin = tiny_model("bert", num_hidden_layers=2)
    twin.bert.load_state_dict(model.bert.state_dict())
    for address in model.adapters[names[0]].parts:
        layer = twin.bert.encoder.layer[int(address.split(".")[1])]
        own = layer.output if address.endswith("feed_forward") else layer.attention.output
        parts = [model.adapters[name].parts[address] for name in names]
        own.LayerNorm.register_forward_pre_hook(_adding(own, parts))
        own.dropout.register_forward_hook(lambda m, _, out, own=own: own.__dict__.update(x=out))
    return result(twin)


def _adding(own: Any, parts: list[Any]) -> Any:
    def hook(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        changed = own.x
        for part in parts:
            changed = changed + part.up(part.activation(part.down(changed)))
        return (args[0] - own.x + changed,)

    return hook


@pytest.mark.parametrize("count", [1, 2])
def test_bottlenecks_on_the_result_of_a_sub_layer(count: int) -> None:
    model = build(*["double_seq_bn"] * count)
    names = [f"a{number}" for number in range(count)]
    torch.testing.assert_close(result(model), by_definition(model, names), rtol=1e-4, atol=1e-5)


def test_they_keep_their_place_beside_others_that_read_more() -> None:
    model = build("double_seq_bn", "seq_bn", "par_bn")
    alone = build("double_seq_bn")
    alone.load_state_dict(model.state_dict(), strict=False)
    model.set_active_adapters("a0")
    torch.testing.assert_close(result(model), result(alone))
    for setup in (["a0", "a1"], ["a1", "a0"], ["a0", "a2", "a1"]):
        model.set_active_adapters(setup)
        assert torch.isfinite(result(model)).all()
        assert not torch.allclose(result(model), result(alone))


def test_what_is_plain_and_quiet() -> None:
    module, other = nn.Linear(2, 2), nn.Linear(2, 2, bias=False)
    assert are_plain(module, other)
    assert quiet(module, other)
    weight = other.weight.detach()
    del other.weight
    other.weight = weight  # type: ignore[assignment]
    assert not are_plain(module, other)
    module.compile(backend="eager")
    assert not quiet(module)
