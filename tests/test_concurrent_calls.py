"""Many threads and tasks call one model at once, each under a setup of its own."""

from __future__ import annotations

import asyncio
import random
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import flexheads
from flexheads import Average, BatchSplit, Fuse, Parallel, Rows, Split, Stack
from flexheads.methods.config import load_config
from flexheads.testing import randomise, tiny_inputs, tiny_model, tiny_static
from flexheads.testing.repeat_checks import tensors

THREADS, CALLS = 16, 200
WITHOUT_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
METHODS: dict[str, Any] = {
    "a": "seq_bn",
    "like_a": "seq_bn",
    "b": "double_seq_bn",
    "replacing": flexheads.AdapterPlusConfig(reduction_factor=8, stochastic_depth=0.0),
    "lora": "lora",
    "other": "lora[r=4]",
    "prefix": "prefix_tuning[prefix_length=3,bottleneck_size=8]",
    "prompt": "prompt_tuning[prompt_length=3]",
    "reft": "loreft[dropout=0.0]",
    "norms": "ln_tuning",
    "up": load_config("seq_bn", leave_out=[0]),
    "upper": load_config("lora", leave_out=[0]),
}
SETUPS: list[Any] = [
    *METHODS,
    [],
    ["a", "lora", "prefix"],
    Rows(["lora", None, "other"]),
    Rows(["a", "prefix", "reft"]),
    BatchSplit("a", "lora", batch_sizes=[2, 1]),
    Average("lora", "other", weights=[0.3, 0.7]),
    Split("lora", "other", splits=[3, 4]),
    Fuse("a", "like_a"),
    Parallel("a", Stack("b", "lora")),
    Stack("b", Parallel("up", "upper")),
    Parallel("norms", "replacing"),
]


def build(kind: str) -> Any:
    if kind == "flexible":
        model = randomise(tiny_model("bert", **WITHOUT_DROPOUT), std=0.1)
        model.add_classification_head("classes", num_labels=3)
        model.add_classification_head("more", num_labels=3)
        model.add_tagging_head("tags", num_labels=5)
    else:
        model = flexheads.init(tiny_static("BertForSequenceClassification", num_labels=3))
    for seed, (name, config) in enumerate(METHODS.items()):
        model.add_adapter(name, config)
        randomise(model.adapters[name], std=0.2, seed=seed)
    model.add_adapter_fusion(Fuse("a", "like_a"))
    randomise(model.adapter_fusions, std=0.2)
    model.set_active_adapters(None)
    return model


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {kind: build(kind) for kind in ("flexible", "static")}


@pytest.fixture(autouse=True)
def restless() -> Iterator[None]:
    """Threads take turns far more often than they would by themselves."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def calls_of(kind: str) -> list[dict[str, Any]]:
    """Calls that all differ, in what adapters and what heads they ask for."""
    if kind == "static":
        return [{"adapter_names": setup} for setup in SETUPS]
    heads: list[Any] = ["classes", "tags", ["classes", "more"], Rows(["more", "classes", "more"])]
    given = [{"adapter_names": setup, "head": heads[n % 3]} for n, setup in enumerate(SETUPS)]
    return [*given, {"adapter_names": "lora", "head": heads[3]}, {"adapter_names": "a", "head": []}]


@torch.no_grad()
def answer(model: Any, call: dict[str, Any]) -> dict[str, torch.Tensor]:
    output = model(**tiny_inputs(model.config), **call)
    return dict(tensors(getattr(output, "outputs", output)))


def equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], expected[name]) for name in expected
    )


def wrong_answers(
    model: Any,
    calls: list[dict[str, Any]],
    expected: list[dict[str, torch.Tensor]],
    count: int,
    seed: int,
) -> list[dict[str, Any]]:
    """Those of `count` calls, in an order of their own, that do not give what they should."""
    order = random.Random(seed).choices(range(len(calls)), k=count)
    return [calls[n] for n in order if not equal(answer(model, calls[n]), expected[n])]


# --- calls ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["flexible", "static"])
def test_each_of_many_threads_gets_its_own_answers(
    models: dict[str, Any], kind: str, in_threads: Callable[..., Any]
) -> None:
    model, calls = models[kind], calls_of(kind)
    expected = [answer(model, call) for call in calls]
    model._changed()  # so that the threads resolve the plans too
    count = CALLS if kind == "flexible" else CALLS // 8
    wrong = in_threads(lambda number: wrong_answers(model, calls, expected, count, number), THREADS)
    assert wrong == [[]] * THREADS


def test_asynchronous_tasks_get_their_own_answers(models: dict[str, Any]) -> None:
    model, calls = models["flexible"], calls_of("flexible")
    expected = [answer(model, call) for call in calls]
    model._changed()

    async def all_at_once() -> list[Any]:
        order = [n % len(calls) for n in range(4 * len(calls))]
        found = [asyncio.to_thread(answer, model, calls[n]) for n in order]
        return [
            equal(one, expected[n])
            for n, one in zip(order, await asyncio.gather(*found), strict=True)
        ]

    assert all(asyncio.run(all_at_once()))


def test_contexts_of_asynchronous_tasks_do_not_mix(models: dict[str, Any]) -> None:
    model = models["flexible"]
    names = [call["adapter_names"] for call in calls_of("flexible")]
    expected = [answer(model, {"adapter_names": name, "head": "classes"}) for name in names]

    async def one(number: int) -> bool:
        with flexheads.active(model, names[number], head="classes"):
            await asyncio.sleep(0)
            found = await asyncio.to_thread(answer, model, {})
            await asyncio.sleep(0)
            again = await asyncio.to_thread(answer, model, {})
        return equal(found, expected[number]) and equal(again, expected[number])

    async def all_at_once() -> list[bool]:
        return list(await asyncio.gather(*map(one, range(len(names)))))

    assert all(asyncio.run(all_at_once()))


# --- beside changes ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["flexible", "static"])
def test_calls_that_name_their_adapters_do_not_notice_changes_of_others(
    kind: str, tmp_path: Path, in_threads: Callable[..., Any]
) -> None:
    model, calls = build(kind), calls_of(kind)
    model.save_adapter(tmp_path, "lora")
    expected = [answer(model, call) for call in calls]
    done = threading.Event()

    def change() -> int:
        """Adds, loads, activates and deletes what the calls do not name: adapters, and heads."""
        rounds = 0
        while not done.is_set():
            for method in METHODS.values():
                if kind == "flexible":
                    model.add_classification_head("new", num_labels=2)
                model.add_adapter("new", method, set_active=True)
                model.load_adapter(tmp_path, load_as="loaded", with_head=False)
                model.set_active_adapters(Stack("new", "loaded"))
                model.set_active_adapters("new", skip_layers=[0])
                model.delete_adapter("new")
                model.delete_adapter("loaded")
                if kind == "flexible":
                    model.delete_head("new")
                model.set_active_adapters(None, skip_layers=[])
            rounds += 1
        return rounds

    with ThreadPoolExecutor(1) as changer:
        changing = changer.submit(change)
        try:
            wrong = in_threads(lambda n: wrong_answers(model, calls, expected, 40, n), 4)
        finally:
            done.set()
        assert changing.result() >= 1
    assert wrong == [[]] * 4
    assert set(model.adapters) == set(METHODS)


def test_hooks_that_come_and_go_disturb_nobody(in_threads: Callable[..., Any]) -> None:
    model = randomise(tiny_model("bert"), std=0.1)
    model.add_adapter("norms", "ln_tuning")
    randomise(model.adapters, std=0.2)
    call = {"adapter_names": "norms"}
    expected, done = answer(model, call), threading.Event()

    def change() -> None:
        while not done.is_set():
            for method in METHODS.values():  # each relies on hooks that no other adapter needs
                model.add_adapter("new", method)
                model.delete_adapter("new")

    changer = threading.Thread(target=change)
    changer.start()
    try:
        wrong = in_threads(lambda n: wrong_answers(model, [call], [expected], 150, n), 4)
    finally:
        done.set()
        changer.join()
    assert wrong == [[]] * 4


# --- training ------------------------------------------------------------------------------------


def gradients(model: Any, name: Any) -> list[torch.Tensor]:
    """The gradients of adapters; through `torch.autograd.backward`, as checkpoints want."""
    names = [name] if isinstance(name, str) else list(dict.fromkeys(name.names()))
    parameters = [p for n in names for p in model.adapters[n].parameters()]
    output = model(**tiny_inputs(model.config), adapter_names=name, head="classes")
    first = output.logits if hasattr(output, "logits") else output
    first.pow(2).mean().backward()
    found = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    return found


def _close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.allclose(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # in calls beside it
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_training_beside_calls_under_other_setups(
    reentrant: bool | None, in_threads: Callable[..., Any]
) -> None:
    model, calls = build("flexible"), calls_of("flexible")
    model.freeze_model()
    trained = ["a", "replacing", "lora", "reft", "prefix", Stack("b", Parallel("up", "upper"))]
    wanted = [gradients(model, name) for name in trained]
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.train()
    expected = [answer(model, call) for call in calls]

    def train(number: int) -> list[Any]:
        wrong = []
        for name, own in [*zip(trained, wanted, strict=True)][number::2] * 3:
            close = map(_close, gradients(model, name), own)
            wrong += [] if all(close) else [name]
        return wrong

    def work(number: int) -> list[Any]:
        if number < 2:
            return train(number)
        return wrong_answers(model, calls, expected, 30, number)

    assert in_threads(work, 4) == [[]] * 4
    assert [model._attachment.runtime.peek(key) for key in ("call", "once")] == [None, None]
