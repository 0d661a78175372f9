"""Traps: calls do not mix, between threads or with a call that has failed."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import flexheads
from flexheads.errors import CompositionError, FlexheadsError, LabelError, UnknownNameError
from flexheads.testing import randomise, tiny_inputs, tiny_model, tiny_output, tiny_static

from .classifiers import COMMON, add, each_kind

THREADS, CALLS = 8, 20


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    """A model of each kind with every method. Its adapters are only read."""
    flexible = randomise(tiny_model("bert"), std=0.1)
    flexible.add_classification_head("classes", num_labels=3)
    flexible.add_tagging_head("tags", num_labels=5)
    static = flexheads.init(tiny_static("BertForSequenceClassification", num_labels=3))
    for model in (flexible, static):
        for seed, (name, config) in enumerate(COMMON.items()):
            add(model, config, name, seed)
    return {"flexible": flexible, "static": static}


@pytest.fixture
def model(models: dict[str, Any], kind: str) -> Iterator[Any]:
    model = models[kind]
    model.set_active_adapters(None)
    if kind == "flexible":
        model.active_head = "classes"
    yield model
    model.set_active_adapters(None)


def calls_of(kind: str) -> list[dict[str, Any]]:
    """Different calls, each with its own setup and head."""
    setups = [*COMMON, [], ["houlsby", "lora"], flexheads.Rows(["lora", None, "houlsby"])]
    if kind == "static":
        return [{"adapter_names": setup} for setup in setups]
    heads = ["classes", "tags"]
    return [{"adapter_names": setup, "head": head} for setup in setups for head in heads]


# --- threads ---------------------------------------------------------------------------------


@each_kind
def test_threads_with_their_own_setups_get_the_single_threaded_answers(
    model: Any, kind: str, in_threads: Callable[..., Any]
) -> None:
    calls = calls_of(kind)
    expected = [tiny_output(model, **call) for call in calls]
    model._changed()  # so that the threads resolve the plans too

    def work(number: int) -> int:
        generator = random.Random(number)
        wrong = 0
        for _ in range(CALLS):
            index = generator.randrange(len(calls))
            wrong += not torch.equal(tiny_output(model, **calls[index]), expected[index])
        return wrong

    assert in_threads(work, THREADS) == [0] * THREADS


@each_kind
def test_threads_that_train_get_the_single_threaded_gradients(
    model: Any, kind: str, in_threads: Callable[..., Any]
) -> None:
    inputs, labels = tiny_inputs(model.config), torch.tensor([0, 1, 2])

    def gradients(name: str) -> list[torch.Tensor]:
        loss = model(**inputs, labels=labels, adapter_names=name).loss
        return list(torch.autograd.grad(loss, list(model.adapters[name].parameters())))

    names = list(COMMON)
    expected = {name: gradients(name) for name in names}

    def work(number: int) -> bool:
        chosen = [names[(number + step) % len(names)] for step in range(5)]
        return all(
            torch.equal(one, two)
            for name in chosen
            for one, two in zip(gradients(name), expected[name], strict=True)
        )

    assert all(in_threads(work, THREADS))


@each_kind
def test_what_another_thread_activates_meanwhile_counts_from_the_next_call(
    model: Any, kind: str
) -> None:
    expected = {name: tiny_output(model, adapter_names=name) for name in COMMON}

    def activate(name: str | None) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            thread = threading.Thread(target=model.set_active_adapters, args=(name,))
            thread.start()
            thread.join()

        return hook

    for before, after in zip(COMMON, [*list(COMMON)[1:], "pfeiffer"], strict=True):
        for path in ("bert.embeddings", "bert.encoder.layer.0.output", "bert.encoder.layer.1"):
            model.set_active_adapters(before)
            handle = model.get_submodule(path).register_forward_pre_hook(activate(after))
            assert torch.equal(tiny_output(model), expected[before])
            handle.remove()
            assert torch.equal(tiny_output(model), expected[after])


def test_adapter_and_head_that_are_switched_together_never_mix() -> None:
    model = randomise(tiny_model("bert"), std=0.1)
    for number, (name, method) in enumerate({"a": "houlsby", "b": "lora"}.items()):
        model.add_classification_head(name, num_labels=3 + number)
        model.add_adapter(name, method)
        randomise(model.adapters[name], std=0.2)
    legal = {3 + n: tiny_output(model, adapter_names=x, head=x) for n, x in enumerate("ab")}
    model.set_active_adapters("a")
    done = threading.Event()

    def switch() -> None:
        while not done.wait(0.0002):
            model.set_active_adapters("b" if model.active_head == "a" else "a")

    switcher = threading.Thread(target=switch)
    switcher.start()
    try:
        for _ in range(CALLS):
            found = tiny_output(model)
            assert torch.equal(found, legal[found.shape[-1]])
    finally:
        done.set()
        switcher.join()


@each_kind
def test_adding_and_deleting_adapters_does_not_disturb_calls_of_others(
    model: Any, kind: str, in_threads: Callable[..., Any]
) -> None:
    expected = tiny_output(model, adapter_names="lora")

    def work(number: int) -> bool:
        if number == 0:
            for round_ in range(10):
                model.add_adapter(f"new{round_}", "lora")
                model.delete_adapter(f"new{round_}")
            return True
        return all(
            torch.equal(tiny_output(model, adapter_names="lora"), expected) for _ in range(20)
        )

    assert all(in_threads(work, THREADS))


# --- failed calls ----------------------------------------------------------------------------


class Stumble(Exception):
    """What the tests make a module raise."""


@each_kind
@pytest.mark.parametrize(
    "path",
    [
        "bert.encoder.layer.0.output.dropout",
        "bert.encoder.layer.0.output.LayerNorm",
        "bert.encoder.layer.1.intermediate",
        "bert.encoder.layer.1.attention.self.query",
        "bert.pooler",
        "adapters",
    ],
)
def test_a_call_that_fails_leaves_nothing_behind(model: Any, kind: str, path: str) -> None:
    calls = calls_of(kind)[-4:]
    expected = [tiny_output(model, **call) for call in calls]
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    setup = model.active_adapters
    for names in ("parallel", "adapterplus", flexheads.Rows(["parallel", None, "houlsby"])):
        handles = [
            module.register_forward_pre_hook(_raise)
            for module in (
                [m for m in model.adapters.modules() if isinstance(m, nn.Linear)]
                if path == "adapters"
                else [model.get_submodule(path)]
            )
        ]
        with pytest.raises(Stumble):
            tiny_output(model, adapter_names=names)
        for handle in handles:
            handle.remove()
        assert model.active_adapters == setup
        thread = model._attachment.runtime.thread
        assert thread.plan is None
        assert thread.values == {}
        assert all(
            torch.equal(tiny_output(model, **call), answer)
            for call, answer in zip(calls, expected, strict=True)
        )
    after = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    assert after == hooks


def _raise(*_: Any) -> None:
    raise Stumble


@each_kind
def test_refused_calls_leave_nothing_behind(model: Any, kind: str) -> None:
    model.set_active_adapters("houlsby")
    expected = tiny_output(model)
    refused: list[tuple[dict[str, Any], type[FlexheadsError]]] = [
        ({"adapter_names": "nosuch"}, UnknownNameError),
        ({"adapter_names": ["houlsby", "nosuch"]}, UnknownNameError),
        ({"adapter_names": flexheads.Rows(["lora"])}, CompositionError),
        ({"adapter_names": 3}, CompositionError),
    ]
    if kind == "flexible":
        refused += [
            ({"head": "nosuch"}, UnknownNameError),
            ({"head": [], "labels": torch.tensor([0, 1, 2])}, LabelError),
        ]
    for call, error in refused:
        with pytest.raises(error):
            tiny_output(model, **call)
        assert torch.equal(tiny_output(model), expected)
    thread = model._attachment.runtime.thread
    assert thread.plan is None
    assert thread.values == {}


@each_kind
def test_nothing_of_a_call_is_kept_alive_after_it(model: Any, kind: str) -> None:
    for name in COMMON:
        model(**tiny_inputs(model.config), adapter_names=name)
        assert model._attachment.runtime.thread.values == {}
