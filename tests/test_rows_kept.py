"""Weights that are kept for rows are never old, are bounded, and go with their adapters."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from flexheads import BatchSplit, LoRAConfig, MultiTask, Parallel, Rows, Stack
from flexheads.sites import shelf as shelves
from flexheads.sites.shelf import Shelf
from flexheads.testing import randomise, tiny_inputs, tiny_model

METHODS: dict[str, Any] = {
    "lora": LoRAConfig(r=4, alpha=8),
    "seq_bn": "seq_bn",
    "par_bn": "scaled_par_bn",
    "learned": "seq_bn[scaling=learned]",
    "dora": "dora",
    "vera": "vera",
    "mtl_lora": "mtl_lora[n_up_projection=2]",
    "ia3": "ia3",
    "loreft": "loreft",
}
NAMES = ("a", "b", "c")


def build(method: str = "lora", architecture: str = "bert", names: Any = NAMES) -> Any:
    model = tiny_model(architecture).eval()
    for seed, name in enumerate(names):
        model.add_adapter(name, METHODS[method])
        randomise(model.adapters[name], seed=seed)
    return model


def hidden(model: Any, setup: Any, **call: Any) -> Tensor:
    found: Tensor = model(**tiny_inputs(model.config, batch=4), adapter_names=setup, **call)[0]
    return found


def shelf(model: Any) -> Shelf:
    found: Shelf = model._attachment.runtime.plans.shelf
    return found


def assert_right(model: Any, *rows: Any) -> None:
    """Rows give what each gives alone, when their weights are taken and when they are kept."""
    alone = [hidden(model, name or [])[row] for row, name in enumerate(rows)]
    for _ in range(2):
        together = hidden(model, Rows(list(rows)))
        for row, expected in enumerate(alone):
            torch.testing.assert_close(together[row], expected, rtol=1e-5, atol=1e-5)


def ops(call: Callable[[], Any], name: str) -> int:
    """How often an operation ran."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        call()
    return sum(event.name == name for event in seen.events())  # type: ignore[no-untyped-call]


# --- what is kept ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_rows_are_right_in_any_order_and_number(method: str) -> None:
    model = build(method)
    kept = []
    for rows in (("a", "b", "a", None), ("c", "c", "b", "a"), (None, "c", None, "a"), ["b"] * 4):
        assert_right(model, *rows)
        kept.append(shelf(model).nbytes)
    assert kept[0] > 0
    assert kept[-1] == kept[1]  # everything had joined by then


@torch.no_grad()
def test_nothing_is_stacked_or_picked_twice() -> None:
    model = build()
    same, other = Rows(["a", "b", "a", None]), Rows(["b", "b", None, "a"])
    hidden(model, same)
    hidden(model, other)
    for name in ("aten::cat", "aten::stack"):
        assert ops(lambda: hidden(model, other), name) == ops(lambda: hidden(model, []), name)
    # Matrices of one shape are picked at once for all layers.
    looked_up = ops(lambda: hidden(model, []), "aten::index_select")
    assert ops(lambda: hidden(model, other), "aten::index_select") == looked_up
    assert ops(lambda: hidden(model, same), "aten::index_select") == looked_up + 2


@torch.no_grad()
def test_other_blocks_and_chains_of_several_adapters() -> None:
    model = build()
    for seed, name in enumerate(("x", "y")):
        model.add_adapter(name, "seq_bn")
        randomise(model.adapters[name], seed=10 + seed)
    ways: list[tuple[Any, list[Any], dict[str, Any]]] = [
        (BatchSplit("a", "b", batch_sizes=[3, 1]), ["a", "a", "a", "b"], {}),
        (MultiTask("a", None, "c"), ["c", [], "a", "a"], {"task_ids": torch.tensor([2, 1, 0, 0])}),
        (
            Rows([Stack("x", "a"), "b", "y", Stack("y", "a")]),
            [["x", "a"], "b", "y", ["y", "a"]],
            {},
        ),
        (Rows(["x", "a", None, "b"]), ["x", "a", [], "b"], {}),
        (Parallel("x", "y"), ["x"] * 4 + ["y"] * 4, {}),
    ]
    for _ in range(2):
        for setup, names, call in ways:
            found = hidden(model, setup, **call)
            for place, name in enumerate(names):
                alone = hidden(model, name)[place % 4]
                torch.testing.assert_close(found[place], alone, rtol=1e-5, atol=1e-5)


def test_training_keeps_nothing() -> None:
    model = build()
    with torch.no_grad():
        hidden(model, Rows(["a", "b", "a", "c"]))
    assert shelf(model).nbytes
    hidden(model, Rows(["a", "b", "a", "c"])).pow(3).sum().backward()
    assert not shelf(model).nbytes
    assert all(p.grad is not None for p in model.adapters["c"].parameters())


def test_frozen_adapters_are_kept_and_pass_gradients_on() -> None:
    model = build()
    model.adapters.requires_grad_(False)
    with torch.inference_mode():
        hidden(model, Rows(["a", "b", "a", "c"]))
    weight = model.get_input_embeddings().weight
    gradients = []
    for rows in (lambda: hidden(model, Rows(["a"] * 4)), lambda: hidden(model, "a")):
        weight.grad = None
        rows().pow(3).sum().backward()
        gradients.append(weight.grad.clone())
    assert shelf(model).nbytes
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


# --- changes --------------------------------------------------------------------------------------


def part(model: Any, name: str = "a") -> Any:
    return next(iter(model.adapters[name].parts.values()))


def step(model: Any, **how: Any) -> None:
    optimizer = torch.optim.AdamW(model.adapters["a"].parameters(), lr=0.05, **how)
    with torch.enable_grad():
        hidden(model, "a").pow(3).sum().backward()
    optimizer.step()


def write(model: Any) -> None:
    part(model).lora_B.mul_(3)


def write_inferring(model: Any) -> None:
    with torch.inference_mode():
        part(model).lora_B.mul_(3)


def load(model: Any, **how: Any) -> None:
    state = {key: value * 2 for key, value in model.adapters["a"].state_dict().items()}
    model.adapters["a"].load_state_dict(state, **how)


def replace_parameter(model: Any) -> None:
    part(model).lora_A = nn.Parameter(part(model).lora_A * 2)


def replace_data(model: Any) -> None:
    part(model).lora_A.data = part(model).lora_A * 2


def scale(model: Any) -> None:
    part(model).scaling = 5.0


def add_again(model: Any) -> None:
    model.delete_adapter("a")
    model.add_adapter("a", METHODS["lora"])
    randomise(model.adapters["a"], seed=20)


def convert(model: Any) -> None:
    model.to(torch.float64)
    model.to(torch.float32)
    write(model)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "step": step,
    "fused step": lambda model: step(model, fused=True),
    "write": write,
    "write while inferring": write_inferring,
    "load_state_dict": load,
    "load_state_dict(assign=True)": lambda model: load(model, assign=True),
    "another parameter": replace_parameter,
    "other data": replace_data,
    "another scaling": scale,
    "another adapter of the name": add_again,
    "to": lambda model: model.to(torch.float64),
    "to and back": convert,
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_changes_are_noticed(change: str) -> None:
    model = build()
    rows = ("a", "b", None, "c")
    before = [hidden(model, name or [])[row] for row, name in enumerate(rows)]
    assert_right(model, *rows)
    CHANGES[change](model)
    assert_right(model, *rows)
    if change != "to":
        assert not torch.allclose(hidden(model, "a")[0], before[0], atol=1e-3)
        torch.testing.assert_close(hidden(model, Rows(list(rows)))[1], before[1])


@torch.no_grad()
def test_another_module_is_noticed() -> None:
    model = build("seq_bn")
    assert_right(model, "a", "b", None, "c")
    own = part(model)
    own.down = copy.deepcopy(own.down)
    own.down.weight.mul_(-2)
    assert_right(model, "a", "b", None, "c")


@torch.no_grad()
def test_the_projection_that_a_dora_reads_is_looked_at() -> None:
    model = build("dora")
    assert_right(model, "a", "b", None, "c")
    address = next(iter(model.adapters["a"].parts))
    model._attachment.sites[address].projection.host.weight.mul_(2)
    assert_right(model, "a", "b", None, "c")


@pytest.mark.parametrize("method", ["lora", "seq_bn"])
@torch.no_grad()
def test_hooks_see_their_part_run(method: str) -> None:
    model, seen = build(method), []
    rows = Rows(["a", "b", None, "a"])
    expected = hidden(model, rows)
    hidden(model, rows)
    handle = part(model).register_forward_hook(lambda *given: seen.append(given))
    torch.testing.assert_close(hidden(model, rows), expected, rtol=1e-5, atol=1e-5)
    assert len(seen) == 1
    handle.remove()
    torch.testing.assert_close(hidden(model, rows), expected, rtol=1e-5, atol=1e-5)
    assert len(seen) == 1
    own = part(model)
    own.forward = lambda *given: seen.append(given) or type(own).forward(own, *given)
    torch.testing.assert_close(hidden(model, rows), expected, rtol=1e-5, atol=1e-5)
    assert len(seen) == 2


# --- memory ---------------------------------------------------------------------------------------


@torch.no_grad()
def test_deleted_adapters_let_go_of_their_memory() -> None:
    model = build()
    hidden(model, Rows(["a", "b", "c", "a"]))
    three = shelf(model).nbytes
    model.delete_adapter("c")
    assert not shelf(model).nbytes
    hidden(model, Rows(["a", "b", "b", "a"]))
    assert shelf(model).nbytes == three // 3 * 2


@torch.no_grad()
def test_ever_other_rows_do_not_grow_what_is_kept() -> None:
    names = [f"n{number}" for number in range(12)]
    model = build(names=names)
    each = sum(parameter.nbytes for parameter in model.adapters["n0"].parameters())
    shelf(model).limit = 5 * each
    for start in range(20):
        rows = [names[(start * 5 + place) % 12] for place in range(4)]
        assert_right(model, *rows)
        assert 0 < shelf(model).nbytes <= 5 * each
    model.add_adapter("other", "seq_bn")
    model.add_adapter("another", "seq_bn")
    shelf(model).limit = 5 * each
    assert_right(model, "n0", "n1", "n2", "n3")
    assert_right(model, "other", "another", "another", "other")
    assert 0 < shelf(model).nbytes <= 5 * each


@torch.no_grad()
def test_what_is_too_large_is_stacked_in_each_call() -> None:
    model = build()
    shelf(model).limit = 1000
    assert_right(model, "a", "b", None, "c")
    assert not shelf(model).nbytes


@torch.no_grad()
def test_many_rows_are_picked_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelves, "AT_ONCE", 1000)
    for method in ("lora", "seq_bn"):
        model = build(method)
        assert_right(model, "a", "b", None, "c")
        assert shelf(model).nbytes


@torch.no_grad()
def test_those_asked_for_last_stay() -> None:
    model = build(names=[*NAMES, "d"])
    each = sum(parameter.nbytes for parameter in model.adapters["a"].parameters())
    shelf(model).limit = 3 * each
    hidden(model, Rows(["a", "b", "c", "c"]))
    hidden(model, Rows(["a", "a", "c", "c"]))
    hidden(model, Rows(["d", "a", "a", "a"]))  # in the place of b
    cats = ops(lambda: hidden(model, []), "aten::cat")
    assert ops(lambda: hidden(model, Rows(["c", "a", "d", "d"])), "aten::cat") == cats
    assert ops(lambda: hidden(model, Rows(["b", "a", "a", "a"])), "aten::cat") > cats


# --- copies and threads --------------------------------------------------------------------------


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@torch.no_grad()
def test_copies_keep_their_own(way: Callable[[Any], Any]) -> None:
    model = build()
    model.set_active_adapters(MultiTask(*NAMES))
    ids = torch.tensor([2, 0, 1, 1])
    expected = hidden(model, None, task_ids=ids)
    other = way(model)
    assert not shelf(other).nbytes
    torch.testing.assert_close(hidden(other, None, task_ids=ids), expected)
    write(other)
    assert not torch.allclose(hidden(other, None, task_ids=ids)[1], expected[1], atol=1e-3)
    torch.testing.assert_close(hidden(model, None, task_ids=ids), expected)
    hook = part(other).register_forward_pre_hook(lambda *given: None)
    assert_right(other, "a", "b", None, "c")
    hook.remove()


@torch.no_grad()
def test_threads_whose_adapters_crowd_each_other_out() -> None:
    names = [f"n{number}" for number in range(8)]
    model = build(names=names)
    each = sum(parameter.nbytes for parameter in model.adapters["n0"].parameters())
    shelf(model).limit = 4 * each
    alone = {name: hidden(model, name) for name in names}

    def wrong(seed: int) -> int:
        order, bad = torch.Generator().manual_seed(seed), 0
        with torch.no_grad():
            for _ in range(30):
                rows = [names[n] for n in torch.randint(8, (4,), generator=order).tolist()]
                found = hidden(model, Rows(rows))
                close = [
                    torch.allclose(found[r], alone[n][r], atol=1e-5) for r, n in enumerate(rows)
                ]
                bad += not all(close)
        return bad

    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(wrong, range(6))) == 0
    assert shelf(model).nbytes <= 4 * each


# --- plans ----------------------------------------------------------------------------------------


@torch.no_grad()
def test_other_rows_over_adapters_of_one_kind_plan_nothing() -> None:
    names = [f"n{number}" for number in range(6)]
    model = build(names=names)
    model.add_adapter("other", "seq_bn")
    randomise(model.adapters["other"], seed=9)
    for rows in ([*names[:4]], [*names[2:]], ["n0", "n5", None, "n0"]):
        assert_right(model, *rows)
    plans = [model._call_plan(Rows(rows)) for rows in (["n5", "n1", "n1", None], ["n3", "n0"] * 2)]
    assert plans[0].ops is plans[1].ops
    assert_right(model, "n5", "n1", "n1", None)
    # One of another kind, or alone, has a plan of its own.
    assert model._call_plan(Rows(["n0", "other"] * 2)).ops is not plans[0].ops
    assert model._call_plan(Rows(["n0"] * 4)).ops is not plans[0].ops
    assert_right(model, "n0", "other", None, "n4")
    assert_right(model, "n0", "n0", "n0", "n0")


@torch.no_grad()
def test_heads_of_rows_whose_plan_serves_more() -> None:
    model = build()
    for labels, name in enumerate(NAMES, start=2):
        model.add_classification_head(name, num_labels=labels)
    randomise(model.heads)
    inputs = tiny_inputs(model.config, batch=4)
    for rows in (["a", "b", "c", "a"], ["c", "b", "c", "b"], ["b", "c", "b", "b"]):
        output = model(**inputs, adapter_names=Rows(rows))
        assert list(output) == list(dict.fromkeys(rows))
        for name in output:
            own = [row for row, other in enumerate(rows) if other == name]
            alone = model(**inputs, adapter_names=name, head=name).logits[own]
            torch.testing.assert_close(output[name].logits, alone, rtol=1e-5, atol=1e-5)
