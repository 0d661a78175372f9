"""``flexheads.active``: a setup holds for a thread or task, and the model stays as it is."""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import flexheads
from flexheads import BatchSplit, Parallel, Rows, Stack
from flexheads.errors import CompositionError, UnknownNameError, UnsupportedError
from flexheads.sites.plan_cache import PlanCache
from flexheads.testing import randomise, tiny_inputs, tiny_model, tiny_static

NAMES = "abc"


def with_adapters(model: Any) -> Any:
    for seed, name in enumerate(NAMES):
        model.add_adapter(name, "lora" if name == "b" else "seq_bn")
        randomise(model.adapters[name], std=0.2, seed=seed)
    model.set_active_adapters("c")
    return model


@pytest.fixture
def model() -> Any:
    found = tiny_model("bert")
    for name, labels in (("a", 2), ("b", 3), ("other", 4)):
        found.add_classification_head(name, num_labels=labels)
    return with_adapters(found)


@torch.no_grad()
def run(model: Any, **how: Any) -> Tensor:
    owner = getattr(model, "_orig_mod", model)
    found: Tensor = model(**tiny_inputs(owner.config), **how)[0]
    return found


def states(model: Any, **how: Any) -> Tensor:
    return run(model, head=[], **how)


def tensors(output: Any) -> list[Tensor]:
    several = getattr(output, "ordered", None)
    if several is None:
        return [value for value in output.values() if isinstance(value, Tensor)]
    return [tensor for one in several for tensor in tensors(one)]


@pytest.fixture
def alone(model: Any) -> dict[str, Tensor]:
    return {name: states(model, adapter_names=name) for name in NAMES}


def test_three_ways_to_say_the_same(model: Any) -> None:
    for setup in ("a", Stack("c", "a"), None, Rows(["a", "b", "a"]), Parallel("a", "b")):
        chosen = copy.deepcopy(model)
        chosen.set_active_adapters(setup)
        expected = chosen(**tiny_inputs(model.config))
        with flexheads.active(model, setup):
            found = model(**tiny_inputs(model.config))
        assert type(found) is type(expected)
        torch.testing.assert_close(tensors(found), tensors(expected), msg=str(setup))


def test_the_model_stays_as_it_is(model: Any) -> None:
    model.train_adapter("c")
    model.active_head = "other"
    before = [p.requires_grad for p in model.parameters()]
    labels = model.config.num_labels
    with flexheads.active(model, "a"):
        assert run(model).shape == (3, 2)
        assert (model.active_adapters, model.active_head) == (Stack("c"), "other")
        assert model.config.num_labels == labels
    assert [p.requires_grad for p in model.parameters()] == before
    assert run(model).shape == (3, 4)


def test_what_a_call_names_counts_more(model: Any, alone: dict[str, Tensor]) -> None:
    with flexheads.active(model, "a"):
        assert torch.equal(states(model), alone["a"])
        assert torch.equal(states(model, adapter_names="b"), alone["b"])
        assert run(model, head="other").shape == (3, 4)
        bare = states(model, adapter_names=[])
    with flexheads.active(model, None):
        assert torch.equal(states(model), bare)


def test_heads_and_adapters_can_be_chosen_apart(model: Any, alone: dict[str, Tensor]) -> None:
    model.active_head = "other"
    with flexheads.active(model, "c"):
        assert run(model).shape == (3, 4)  # there is no head of that name
    with flexheads.active(model, head=["a", "b"]):
        found = model(**tiny_inputs(model.config))
        assert [head.logits.shape[1] for head in found.ordered] == [2, 3]
        assert torch.equal(found["a"].logits, run(model, adapter_names="c", head="a"))
    with flexheads.active(model, "a", head=[]):
        assert torch.equal(run(model), alone["a"])


def test_blocks_nest_and_end_with_errors(model: Any, alone: dict[str, Tensor]) -> None:
    other = copy.deepcopy(model)
    with flexheads.active(model, "a"):
        with pytest.raises(UnknownNameError), flexheads.active(model, "b"):
            states(model, adapter_names="nobody")
        with flexheads.active(model, "b"), flexheads.active(other, "a"):
            assert torch.equal(states(model), alone["b"])
            assert torch.equal(states(other), alone["a"])
        assert torch.equal(states(other), alone["c"])
        assert torch.equal(states(model), alone["a"])
        assert torch.equal(states(copy.deepcopy(model)), alone["c"])
    assert torch.equal(states(model), alone["c"])


def test_what_the_model_activates_inside_counts_afterwards(
    model: Any, alone: dict[str, Tensor]
) -> None:
    with flexheads.active(model, "a"):
        model.set_active_adapters("b")
        assert torch.equal(states(model), alone["a"])
    assert torch.equal(states(model), alone["b"])


def test_changes_of_adapters_are_seen_inside(model: Any, alone: dict[str, Tensor]) -> None:
    with flexheads.active(model, "a"):
        model.add_adapter("a", "seq_bn", overwrite_ok=True)
        fresh = states(model)
        assert not torch.allclose(fresh, alone["a"], atol=1e-3)
        assert torch.equal(fresh, states(model, adapter_names="a"))
        model.delete_adapter("a")
        with pytest.raises(UnknownNameError, match="'a'"):
            states(model)
    assert torch.equal(states(model), alone["c"])


def test_a_backbone_by_itself_follows_it(model: Any, alone: dict[str, Tensor]) -> None:
    def backbone() -> Tensor:
        with torch.no_grad():
            found: Tensor = model.bert(**tiny_inputs(model.config)).last_hidden_state
        return found

    with flexheads.active(model, "a"):
        assert torch.equal(backbone(), alone["a"])
    with flexheads.active(model, Rows(["a", None, "b"])):
        torch.testing.assert_close(backbone()[2], alone["b"][2])
    with flexheads.active(model, Parallel("a", "b")), pytest.raises(CompositionError, match="rows"):
        backbone()
    assert torch.equal(backbone(), alone["c"])


@pytest.mark.parametrize("setup", ["nobody", Stack("a", "nobody"), 3])
def test_what_is_refused_is_refused_at_the_beginning(model: Any, setup: Any) -> None:
    before = states(model)
    with pytest.raises((UnknownNameError, CompositionError)), flexheads.active(model, setup):
        pytest.fail("The block was entered.")
    assert torch.equal(states(model), before)


def test_heads_and_models_that_do_not_fit(model: Any) -> None:
    static = flexheads.init(tiny_static("BertForSequenceClassification"))
    refusals = [
        (static, {"head": "a"}, UnsupportedError),
        (torch.nn.Linear(2, 2), {}, UnsupportedError),
        (model, {"head": "nobody"}, UnknownNameError),
    ]
    for target, how, error in refusals:
        with pytest.raises(error), flexheads.active(target, None, **how):
            pytest.fail("The block was entered.")


def test_tasks_and_predictions_follow_it(model: Any) -> None:
    inputs = tiny_inputs(model.config)
    with torch.no_grad(), flexheads.active(model, "b"):
        found = model(**inputs, task=["other"] * 3)["other"].logits
        expected = model(**inputs, adapter_names="b", head="other").logits
    torch.testing.assert_close(found, expected)
    with (
        flexheads.active(model, BatchSplit("a", "b", batch_sizes=1)),
        pytest.raises(CompositionError, match="predict"),
    ):
        model.predict("other", ["some", "words"], tokenizer=lambda *a, **k: None)


def test_gradient_checkpointing_recomputes_under_it(model: Any) -> None:
    model.train_adapter("a")
    own = list(model.adapters["a"].parameters())

    def gradients() -> list[Tensor]:
        torch.manual_seed(0)  # for the dropout of the head
        with flexheads.active(model, "a"):
            loss = model(**tiny_inputs(model.config), labels=torch.tensor([0, 1, 1])).loss
        return list(torch.autograd.grad(loss, own))

    model.train()
    expected = gradients()
    model.set_active_adapters("c")
    model.bert.gradient_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(gradients(), expected, atol=1e-5, rtol=1e-4)


# --- generation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("class_name", ["GPT2LMHeadModel", "T5ForConditionalGeneration"])
def test_static_models_generate_under_it(class_name: str) -> None:
    model = with_adapters(flexheads.init(tiny_static(class_name, pad_token_id=0)))
    ids = torch.randint(3, 90, (3, 5))
    how: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2}
    with flexheads.active(model, "a"):
        found = model.generate(ids, **how)
        other = model.generate(ids, **how, adapter_names="b")
    assert torch.equal(found, model.generate(ids, **how, adapter_names="a"))
    assert torch.equal(other, model.generate(ids, **how, adapter_names="b"))


def test_heads_generate_under_it() -> None:
    model = tiny_model("gpt2", pad_token_id=0)
    for name in NAMES:
        model.add_causal_lm_head(name)
        randomise(model.heads[name], std=0.2)
    with_adapters(model)
    ids = torch.randint(3, 90, (3, 5))
    how: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    for setup in ("a", Rows(["a", "b", "a"])):
        with flexheads.active(model, setup):
            found = model.generate(ids, **how)
            assert torch.equal(
                found, model.generate(ids, **how, adapter_names=setup)
            ) or isinstance(setup, str)
        chosen = copy.deepcopy(model)
        chosen.set_active_adapters(setup)
        assert torch.equal(found, chosen.generate(ids, **how))


# --- threads and tasks ----------------------------------------------------------------------------


def test_threads_hold_their_own(model: Any, alone: dict[str, Tensor]) -> None:
    begin = threading.Barrier(4)

    def work(number: int) -> bool:
        begin.wait()
        name, right = NAMES[number % 3], True
        for _ in range(20):
            with flexheads.active(model, name):
                right &= torch.equal(states(model), alone[name])
            right &= torch.equal(states(model), alone["c"])
        return right

    with flexheads.active(model, "b"), ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))  # threads begin with what the model has active


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_asynchronous_tasks_hold_their_own(
    model: Any, alone: dict[str, Tensor], compiled: bool
) -> None:
    model.active_head = None
    torch._dynamo.reset()
    counter = CompileCounter()
    call = torch.compile(model, backend=counter, fullgraph=True) if compiled else model
    model.delete_head("a"), model.delete_head("b")

    async def task(name: str) -> None:
        with flexheads.active(model, name):
            for _ in range(3):
                await asyncio.sleep(0)
                torch.testing.assert_close(run(call), alone[name])
                found = await asyncio.to_thread(run, call)
                torch.testing.assert_close(found, alone[name])
        torch.testing.assert_close(run(call), alone["c"])

    async def together() -> None:
        await asyncio.gather(*map(task, "abcab"))
        with flexheads.active(model, "b"):
            await asyncio.create_task(_expect(call, alone["b"]))

    asyncio.run(together())
    if compiled:  # one graph for each kind of adapter
        assert 0 < counter.frame_count <= len(NAMES)


async def _expect(model: Any, states: Tensor) -> None:
    torch.testing.assert_close(run(model), states)


# --- plans that are kept --------------------------------------------------------------------------


def test_ever_new_rows_do_not_fill_the_memory(model: Any) -> None:
    model.add_classification_head("c")
    cache = model._attachment.runtime.plans = PlanCache(size=8)
    kept = model._call_plan("a")
    for number in range(40):
        rows: list[Any] = [NAMES[number % 3], NAMES[number // 3 % 3], NAMES[number // 9 % 3], None][
            : 2 + number % 3
        ]
        model._call_plan(Rows(rows))
        assert model._call_plan("a") is kept  # asked for again and again, it stays
        assert len(cache) <= 8


def test_the_cache_serves_many_threads() -> None:
    cache, plan = (
        PlanCache(size=16),
        flexheads.testing.tiny_model("bert")._attachment.runtime.active,
    )
    begin = threading.Barrier(8)

    def work(seed: int) -> bool:
        begin.wait()
        for number in range(2000):
            key = number * (seed + 1) % 40
            if cache.get(key) is None:
                cache.keep(key, plan)
        return len(cache) <= 16

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


def test_plans_that_were_resolved_before_a_change_are_not_kept(model: Any) -> None:
    original: Callable[..., Any] = model._make_plan

    def slow(*args: Any) -> Any:
        plan = original(*args)
        del model._make_plan
        model.add_adapter("a", "seq_bn", overwrite_ok=True)  # as another thread would, meanwhile
        return plan

    model._make_plan = slow
    stale = model._call_plan(Stack("a", "c"))
    assert model._call_plan(Stack("a", "c")) is not stale
