"""What is computed from weights and kept between inference calls is never old or in the way."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from flexheads.sites.derived import Derived, enter_call, leave_call, look_together


class Doubled(nn.Module):
    """Keeps twice the weight of a layer, times a factor."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5))
        self.factor, self.computed = 2.0, 0
        self.kept: Derived[Tensor] = Derived()
        self.eval()

    @property
    def weight(self) -> Any:
        return self.inner[0].weight

    def compute(self) -> Tensor:
        self.computed += 1
        return self.weight * self.factor

    def get(self) -> Tensor | None:
        return self.kept.get((self,), self.compute, "factor")

    def check(self) -> None:
        """What is kept now is right, and is kept once more."""
        with torch.no_grad():
            found = self.get()
            assert found is not None
            assert torch.equal(found, self.weight * self.factor)
            assert self.get() is found


@pytest.fixture
def module() -> Doubled:
    doubled = Doubled()
    doubled.check()
    assert doubled.computed == 1
    return doubled


# --- changes --------------------------------------------------------------------------------------


def step(module: Doubled, **how: Any) -> None:
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, **how)
    module.inner(torch.ones(1, 3)).sum().backward()
    optimizer.step()


def write(module: Doubled) -> None:
    with torch.no_grad():
        module.weight.mul_(3)


def write_while_inferring(module: Doubled) -> None:
    with torch.inference_mode():
        module.weight.mul_(3)


def load(module: Doubled, **how: Any) -> None:
    module.load_state_dict({k: v + 1 for k, v in module.state_dict().items()}, **how)


def write_data_before_training(module: Doubled) -> None:
    """Some optimizers write so; a forward pass that wants gradients was before."""
    assert module.get() is None
    module.weight.data.mul_(3)


def hook(module: Doubled) -> None:
    module.inner[0].register_forward_hook(lambda *given: None)
    assert module.get() is None
    module.inner[0]._forward_hooks.clear()


CHANGES: dict[str, Callable[[Doubled], Any]] = {
    "optimizer": step,
    "fused optimizer": lambda m: step(m, fused=True),
    "foreach optimizer": lambda m: step(m, foreach=True),
    "in place": write,
    "in place while inferring": write_while_inferring,
    "loaded": load,
    "loaded and assigned": lambda m: load(m, assign=True),
    "other data": lambda m: setattr(m.weight, "data", m.weight.data + 1),
    "data before training": write_data_before_training,
    "other parameter": lambda m: setattr(m.inner[0], "weight", nn.Parameter(torch.ones(2, 3))),
    "other layer": lambda m: m.inner.__setitem__(0, nn.Linear(3, 2).eval()),
    "dtype": lambda m: m.double(),
    "dtype there and back": lambda m: m.bfloat16().float(),
    "attribute": lambda m: setattr(m, "factor", 3.0),
    "vector": lambda m: nn.utils.vector_to_parameters(torch.ones(8), m.parameters()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changes_are_noticed(module: Doubled, change: Callable[[Doubled], Any]) -> None:
    change(module)
    module.check()
    assert module.computed == 2


class Silent(torch.optim.SGD):
    """Writes so that it leaves no trace."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.sub_(1.0)


def test_steps_of_optimizers_of_ones_own_are_noticed(module: Doubled) -> None:
    Silent(module.parameters(), lr=1.0).step()
    module.check()
    assert module.computed == 2


def test_steps_for_other_weights_change_nothing(module: Doubled) -> None:
    step(Doubled())
    step(Doubled(), foreach=True)
    module.check()
    assert module.computed == 1


def test_writing_to_data_alone_is_not_noticed(module: Doubled) -> None:
    module.weight.data.mul_(3)
    with torch.no_grad():
        module.get()
    assert module.computed == 1


def test_a_weight_that_is_computed_by_somebody_else_is_not_kept(module: Doubled) -> None:
    nn.utils.parametrizations.orthogonal(module.inner[0])
    with torch.no_grad():
        first = module.get()
        module.inner[0].parametrizations.weight.original.mul_(2)
        second = module.get()
    for found in (first, second):
        assert found is None or torch.equal(found, module.weight * 2)


# --- where nothing is kept ------------------------------------------------------------------------


def overridden(module: Doubled) -> None:
    module.inner[0].forward = lambda hidden: hidden
    assert module.get() is None


def hooked_everywhere(module: Doubled) -> None:
    handle = nn.modules.module.register_module_forward_hook(lambda *given: None)
    try:
        assert module.get() is None
    finally:
        handle.remove()


def traced(module: Doubled) -> None:
    def run(hidden: Tensor) -> Tensor:
        assert module.get() is None
        return hidden

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.trace(run, torch.ones(1), check_trace=False)


def transformed(module: Doubled) -> None:
    def run(hidden: Tensor) -> Tensor:
        assert module.get() is None
        return hidden

    torch.func.vmap(run)(torch.ones(1))


def counted(module: Doubled) -> None:
    with FlopCounterMode(display=False):
        assert module.get() is None


def cast(module: Doubled) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert module.get() is None


def hooked(module: Doubled) -> None:
    module.inner[0].register_forward_pre_hook(lambda *given: None)
    assert module.get() is None


def training(module: Doubled) -> None:
    module.train()
    assert module.get() is None


def dropping(module: Doubled) -> None:
    module.inner[1].train()
    assert module.get() is None


def on_meta(module: Doubled) -> None:
    module.to("meta")
    assert module.get() is None


@pytest.mark.parametrize(
    "case",
    [
        overridden,
        hooked_everywhere,
        traced,
        transformed,
        counted,
        cast,
        hooked,
        training,
        dropping,
        on_meta,
    ],
)
def test_there_is_no_value_where_somebody_would_notice(
    module: Doubled, case: Callable[[Doubled], None]
) -> None:
    with torch.no_grad():
        case(module)


def test_there_is_no_value_in_a_graph_that_is_recorded(
    module: Doubled, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    for recording in (True, False):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: recording)  # noqa: B023
        with torch.no_grad():
            assert (module.get() is None) == recording


def test_there_is_no_value_where_gradients_are_wanted(module: Doubled) -> None:
    assert module.get() is None
    module.requires_grad_(False)
    assert module.get() is not None


def test_weights_of_inference_mode_are_not_kept() -> None:
    with torch.inference_mode():
        module = Doubled()
        assert module.get() is None


def test_other_weights_for_one_call_stay_there(module: Doubled) -> None:
    others = {name: p.detach() * 5 for name, p in module.named_parameters()}
    expected = others["inner.0.weight"] * 2

    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self) -> Tensor | None:
            return self.module.get()

    found = torch.func.functional_call(Asks(), {f"module.{n}": t for n, t in others.items()}, ())
    assert found is not None
    assert torch.equal(found, expected)
    module.check()


def test_compiled_code_computes_by_itself(module: Doubled) -> None:
    torch._dynamo.reset()

    def run(hidden: Tensor) -> Tensor:
        kept = module.get()
        return hidden + (module.weight * 7 if kept is None else kept)

    with torch.no_grad():
        compiled = torch.compile(run, fullgraph=True, backend="eager")
        assert torch.equal(compiled(torch.zeros(2, 3)), module.weight * 7)
        assert torch.equal(run(torch.zeros(2, 3)), module.weight * 2)
    torch._dynamo.reset()


# --- what is kept ---------------------------------------------------------------------------------


def test_training_can_use_what_inference_mode_has_kept() -> None:
    module = Doubled()
    with torch.inference_mode():
        found = module.get()
    assert found is not None
    assert not found.is_inference()
    assert not found.requires_grad
    hidden = torch.ones(3, requires_grad=True)
    (found @ hidden).sum().backward()
    assert hidden.grad is not None
    module.requires_grad_(False)
    assert module.get() is found


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_empty_and_apart(module: Doubled, twin: Any) -> None:
    other = Doubled()
    look_together([module.kept, other.kept])
    both = twin(nn.ModuleList([module, other]))
    assert both[0].kept._kept is None
    assert both[0].kept._together == (both[0].kept, both[1].kept)
    write(module)
    both[0].check()
    module.check()
    assert not torch.equal(module.weight, both[0].weight)


def test_a_call_looks_once(module: Doubled) -> None:
    with torch.no_grad():
        around = enter_call()
        before = module.get()
        write(module)
        assert module.get() is before
        leave_call(around)
    module.check()


def test_a_call_inside_of_another_looks_again(module: Doubled) -> None:
    with torch.no_grad():
        outer = enter_call()
        module.get()
        write(module)
        inner = enter_call()
        module.check()
        leave_call(inner)
        leave_call(outer)


def test_values_are_looked_at_together(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = [Doubled() for _ in range(3)]
    look_together(module.kept for module in modules)
    with torch.no_grad():
        for module in modules:
            module.check()
        around = enter_call()
        assert modules[0].get() is not None
        looked: list[Any] = []
        monkeypatch.setattr("flexheads.sites.derived.watched", lambda: looked.append(1))
        for module in modules:
            assert module.get() is not None
        leave_call(around)
    assert not looked
    write(modules[1])
    for module in modules:
        module.check()
    assert [module.computed for module in modules] == [1, 2, 1]


def test_one_place_for_other_modules_is_right_for_each(module: Doubled) -> None:
    other = Doubled()
    other.kept = module.kept
    around = enter_call()
    for _ in range(2):
        for each in (module, other):
            with torch.no_grad():
                found = each.get()
            assert found is not None
            assert torch.equal(found, each.weight * 2)
    leave_call(around)


def test_threads_may_ask_at_once(module: Doubled) -> None:
    def ask(number: int) -> bool:
        with torch.inference_mode(number % 2 == 0), torch.no_grad():
            around = enter_call()
            found = module.get()
            leave_call(around)
            return found is not None and torch.equal(found, module.weight * 2)

    with ThreadPoolExecutor(8) as pool:
        for _ in range(20):
            write(module)
            assert all(pool.map(ask, range(16)))
