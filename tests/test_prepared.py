"""What a plan does at its sites is prepared once, and never runs on what has changed since."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.module import register_module_forward_hook

import flexheads
from flexheads import Fuse, Rows
from flexheads.sites.prepared import NO_STEPS, Prepared
from flexheads.testing import randomise, tiny_inputs, tiny_model

METHODS = ["seq_bn", "double_seq_bn", "lora", "ia3"]
SITES = {"seq_bn": 2, "double_seq_bn": 4, "lora": 4, "ia3": 6}
"""Sites of two layers where a step is prepared."""


def build(*configs: Any, arch: str = "bert") -> Any:
    model = tiny_model(arch, num_hidden_layers=2)
    for number, config in enumerate(configs):
        model.add_adapter(f"a{number}", config=config)
    randomise(model, std=0.2)
    model.set_active_adapters([f"a{number}" for number in range(len(configs))])
    return called(model.eval())


def called(model: Any) -> Any:
    """A model whose plan has had its first call, in which nothing is prepared."""
    with torch.no_grad():
        model(**tiny_inputs(model.config))
    return model


def result(model: Any, **call: Any) -> Tensor:
    hidden: Tensor = model(**tiny_inputs(model.config), **call).last_hidden_state
    return hidden


def known(model: Any) -> Prepared | None:
    runtime = model._attachment.runtime
    found: Prepared | None = runtime._prepared.get(runtime.active)
    return found


def unprepared(model: Any, **call: Any) -> Tensor:
    """What comes of parts that are called one by one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Prepared, "steps", lambda _: NO_STEPS)
        return result(model, **call)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("arch", ["bert", "gpt2", "t5"])
def test_steps_do_what_the_parts_do(method: str, arch: str) -> None:
    for configs in ((method,), (method, method)):
        model = tiny_model(arch)
        for number, config in enumerate(configs):
            model.add_adapter(f"a{number}", config=config)
        randomise(model, std=0.2)
        model.set_active_adapters([f"a{number}" for number in range(len(configs))])
        with torch.no_grad():
            torch.testing.assert_close(result(called(model)), unprepared(model))


@pytest.mark.parametrize("method", METHODS)
def test_which_sites_have_steps(method: str) -> None:
    model = build(method)
    assert known(model) is None
    result(model)
    prepared = known(model)
    assert prepared is not None
    assert len(prepared.steps()) == SITES[method]
    result(model)
    assert known(model) is prepared


@pytest.mark.parametrize(
    "config",
    [
        flexheads.SeqBnConfig(scaling=3.0),
        flexheads.SeqBnConfig(scaling="learned"),
        flexheads.SeqBnConfig(scaling="channel"),
        flexheads.SeqBnConfig(non_linearity="gelu", residual_before_ln="post_add"),
        flexheads.SeqBnConfig(residual_before_ln=True),
        flexheads.SeqBnConfig(ln_before=True, ln_after=True),
        flexheads.SeqBnConfig(use_gating=True),
        flexheads.SeqBnConfig(original_ln_after=False),
        flexheads.LoRAConfig(r=4, alpha=12),
        flexheads.LoRAConfig(use_gating=True),
        flexheads.LoRAConfig(use_dora=True),
        flexheads.LoRAConfig(init_weights="pissa"),
        flexheads.LoRAConfig(composition_mode="scale", alpha=3, r=1),
    ],
)
def test_steps_of_every_variant(config: Any) -> None:
    model = build(config)
    with torch.no_grad():
        torch.testing.assert_close(result(model), unprepared(model))


def _part(model: Any) -> Any:
    return next(iter(model.adapters["a0"].parts.values()))


def _weight_replaced(model: Any) -> None:
    part = _part(model)
    owner = part if hasattr(part, "lora_B") else part.up
    name = "lora_B" if hasattr(part, "lora_B") else "weight"
    setattr(owner, name, nn.Parameter(getattr(owner, name).detach() * 2))


def _weight_written(model: Any) -> None:
    for parameter in _part(model).parameters():
        parameter.data.mul_(2)


def _state_loaded(model: Any) -> None:
    state = {key: value * 2 for key, value in model.adapters["a0"].state_dict().items()}
    model.adapters["a0"].load_state_dict(state, assign=True)


def _scaling_changed(model: Any) -> None:
    part = _part(model)
    part.scaling = part.scaling * 2
    if hasattr(part, "config"):
        part.config = part.config.replace(scaling=2.0)


def _module_replaced(model: Any) -> None:
    part = _part(model)
    if hasattr(part, "activation"):
        part.activation = nn.Tanh()
    else:
        part.gate = nn.Linear(part.lora_B.shape[0], 1)


def _forward_replaced(model: Any) -> None:
    part = _part(model)
    kind = part.forward
    part.forward = lambda *args: kind(*args)  # as what offloads weights does
    _weight_written(model)


def _hooked(model: Any) -> None:
    part = _part(model)
    inner = part.up if hasattr(part, "up") else part
    inner.register_forward_hook(lambda *args: args[-1] * 2)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "change",
    [
        _weight_replaced,
        _weight_written,
        _state_loaded,
        _scaling_changed,
        _module_replaced,
        _forward_replaced,
        _hooked,
    ],
)
@torch.no_grad()
def test_changes_are_in_force_in_the_next_call(method: str, change: Any) -> None:
    model = build(method)
    before = result(model)
    change(model)
    after = result(model)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, unprepared(model))


def test_a_hook_that_has_gone_leaves_steps_as_they_were() -> None:
    model = build("seq_bn")
    before = result(model)
    prepared = known(model)
    handle = _part(model).up.register_forward_hook(lambda *args: args[-1] * 2)
    assert not torch.allclose(result(model), before)
    handle.remove()
    assert torch.equal(result(model), before)
    assert known(model) is prepared


def test_hooks_on_every_module_see_parts_run() -> None:
    model, seen = build("lora"), []
    result(model)
    handle = register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        result(model)
    finally:
        handle.remove()
    assert _part(model) in seen


@torch.no_grad()
def test_weights_that_are_swapped_for_one_call() -> None:
    model = build("lora")
    before = result(model)
    name = next(key for key, _ in model.named_parameters() if key.endswith("lora_B"))
    twice = {name: model.get_parameter(name) * 2}
    other = functional_call(model, twice, (), tiny_inputs(model.config)).last_hidden_state
    assert not torch.allclose(before, other)
    assert torch.equal(result(model), before)


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_other_types_and_back(method: str) -> None:
    model = build(method)
    before = result(model)
    model.double()
    torch.testing.assert_close(result(model), before.double(), rtol=1e-4, atol=1e-5)
    model.float()
    torch.testing.assert_close(result(model), before)


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_an_adapter_of_another_type_than_its_backbone(method: str) -> None:
    model = build(method)
    model.base_model.to(torch.bfloat16)
    model.adapters.to(torch.float32)
    try:
        expected = unprepared(model)
    except RuntimeError:
        with pytest.raises(RuntimeError):
            result(model)
        return
    found = result(model)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


@torch.no_grad()
def test_copies_and_pickles_prepare_for_themselves() -> None:
    model = build("lora")
    before = result(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert known(twin) is None
        torch.testing.assert_close(result(called(twin)), before)
        _weight_replaced(twin)
        assert not torch.allclose(result(twin), before)
        assert torch.equal(result(model), before)


def test_training_and_inference_take_turns() -> None:
    model = build(flexheads.LoRAConfig(dropout=0.5))
    before = result(model)
    model.adapters.train()
    assert not torch.equal(result(model), result(model))
    model.eval()
    assert torch.equal(result(model), before)


@pytest.mark.parametrize(
    ("changes", "steps"),
    [({}, True), ({"dropout": 0.5}, False), ({"stochastic_depth": 0.5}, False)],
)
def test_a_training_bottleneck_has_steps_unless_it_draws(
    changes: dict[str, float], steps: bool
) -> None:
    model = build(flexheads.SeqBnConfig(**changes))
    result(model)
    model.train()
    result(called(model))
    prepared = known(model)
    assert prepared is not None
    assert bool(prepared.steps()) == steps


def test_rows_and_blocks_do_without() -> None:
    model = build("lora", "lora", "seq_bn", "seq_bn")
    rows = Rows(["a0", "a1", "a0"])
    torch.testing.assert_close(
        result(model, adapter_names=rows), unprepared(model, adapter_names=rows)
    )
    model.add_adapter_fusion(Fuse("a2", "a3"))
    model.set_active_adapters(Fuse("a2", "a3"))
    torch.testing.assert_close(result(called(model)), unprepared(model))


def test_setups_take_turns_in_threads() -> None:
    model = build("seq_bn", "double_seq_bn", "lora")
    names = ["a0", "a1", "a2"]
    with torch.no_grad():
        expected = {name: unprepared(model, adapter_names=name) for name in names}
    wrong: list[str] = []

    def run(name: str) -> None:
        with torch.no_grad():
            for _ in range(8):
                if not torch.allclose(result(model, adapter_names=name), expected[name], atol=1e-6):
                    wrong.append(name)

    threads = [threading.Thread(target=run, args=(name,)) for name in names * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_what_is_prepared_goes_with_its_plan() -> None:
    model = build("lora")
    result(model)
    gone = weakref.ref(known(model))
    model.set_active_adapters(None)
    model.delete_adapter("a0")
    gc.collect()
    assert gone() is None
