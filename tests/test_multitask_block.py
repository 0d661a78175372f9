"""MultiTask: each row goes to the branch of its task, which a call tells by numbers."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import flexheads
from flexheads import Average, BatchSplit, LoRAConfig, MultiTask, Parallel, Rows, Stack
from flexheads.errors import CompositionError
from flexheads.models.calls.task_ids import with_task_ids
from flexheads.testing import randomise, tiny_inputs, tiny_model, tiny_static

METHODS: dict[str, Any] = {
    "seq_bn": "seq_bn",
    "double_seq_bn": "double_seq_bn",
    "par_bn": "scaled_par_bn",
    "learned scaling": flexheads.AdapterPlusConfig(reduction_factor=8),
    "compacter": "compacter[phm_dim=2, reduction_factor=8]",
    "lora": "lora",
    "dora": "dora",
    "vera": "vera",
    "mtl_lora": "mtl_lora[n_up_projection=2]",
    "pissa": LoRAConfig(r=2, init_weights="pissa"),
    "ia3": "ia3",
    "loreft": "loreft",
    "prefix_tuning": "prefix_tuning[prefix_length=3, bottleneck_size=8]",
    "unipelt": "unipelt",
    "prompt_tuning": "prompt_tuning[prompt_length=3]",
    "ln_tuning": "ln_tuning",
    "loha": "loha",
    "seq_bn_inv": "seq_bn_inv",
}
BANKS = (
    "seq_bn",
    "double_seq_bn",
    "par_bn",
    "lora",
    "dora",
    "vera",
    "mtl_lora",
    "pissa",
    "ia3",
    "loreft",
)
TASKS = ("a", None, "b", "c")


def build(method: str, architecture: str = "bert") -> Any:
    """A model with three adapters of a method that matter."""
    model = tiny_model(architecture).eval()
    for seed, name in enumerate("abc"):
        model.add_adapter(name, METHODS[method])
        randomise(model.adapters[name], seed=seed)
    return model


def hidden(model: Any, setup: Any, **call: Any) -> Tensor:
    found: Tensor = model(**tiny_inputs(model.config, batch=4), adapter_names=setup, **call)[0]
    return found


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_each_row_is_as_under_the_branch_of_its_task(method: str) -> None:
    model = build(method)
    # All rows of one batch have prompts.
    tasks = ("a", "b", "c") if method == "prompt_tuning" else TASKS
    alone = [hidden(model, name or []) for name in tasks]
    for ids in ([2, 1, 0, 2], [1, 1, 2, 2], [0, 0, 0, 0], [2, 0, 1, 0]):
        mixed = hidden(model, MultiTask(*tasks), task_ids=torch.tensor(ids))
        for row, task in enumerate(ids):
            torch.testing.assert_close(mixed[row], alone[task][row], msg=f"{ids}, row {row}")
    assert not torch.allclose(alone[0], alone[2], atol=1e-3)


@pytest.mark.parametrize("method", BANKS)
def test_methods_with_a_bank_use_it(method: str) -> None:
    model = build(method)
    model.set_active_adapters(MultiTask("a", "b", "c"))
    ops = model._attachment.runtime.active.ops.values()
    assert ops
    assert all(op.bank is not None for op in ops)


@pytest.mark.parametrize("architecture", ["gpt2", "t5", "vit"])
@torch.no_grad()
def test_other_architectures(architecture: str) -> None:
    for method in ("double_seq_bn", "dora"):
        model = build(method, architecture)
        alone = [hidden(model, name or []) for name in TASKS]
        mixed = hidden(model, MultiTask(*TASKS), task_ids=[3, 1, 0, 3])
        for row, task in enumerate([3, 1, 0, 3]):
            torch.testing.assert_close(mixed[row], alone[task][row])


@pytest.mark.parametrize("method", ["double_seq_bn", "dora", "ia3", "mtl_lora", "loreft"])
def test_gradients_are_those_of_the_rows_alone(method: str) -> None:
    model = build(method)
    own = list(model.adapters["a"].parameters())
    hidden(model, MultiTask(*TASKS), task_ids=[0, 2, 0, 1]).pow(3).sum().backward()
    together = [None if p.grad is None else p.grad.clone() for p in own]
    model.zero_grad()
    hidden(model, "a")[[0, 2]].pow(3).sum().backward()
    assert any(gradient is not None and bool(gradient.any()) for gradient in together)
    for parameter, gradient in zip(own, together, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-4)
    assert all(p.grad is None for p in model.adapters["c"].parameters())


@torch.no_grad()
def test_what_stands_around_and_inside() -> None:
    model = build("seq_bn")
    model.add_adapter("lora", "lora")
    randomise(model.adapters["lora"])
    for setup, branches in (
        (Stack("c", MultiTask("a", "b")), [Stack("c", "a"), Stack("c", "b")]),
        (Average("c", MultiTask("a", "b")), [Average("c", "a"), Average("c", "b")]),
        (MultiTask(["c", "a"], "lora"), [Stack("c", "a"), "lora"]),
        (MultiTask("a", Average("a", "b"), "a"), ["a", Average("a", "b"), "a"]),
    ):
        ids = [len(branches) - 1, 0, 1, 0]
        mixed = hidden(model, setup, task_ids=ids)
        for row, task in enumerate(ids):
            torch.testing.assert_close(mixed[row], hidden(model, branches[task])[row])


@torch.no_grad()
def test_rows_are_tasks_by_values() -> None:
    """Rows with the same adapters in another order share what a plan does at the sites."""
    model = build("seq_bn")
    rows = Rows(["b", None, "a", "b"])
    ids = MultiTask("a", "b", None).ids(rows)
    assert ids == [1, 2, 0, 1]
    by_number = hidden(model, MultiTask("a", "b", None), task_ids=torch.tensor(ids))
    assert torch.equal(hidden(model, rows), by_number)
    one, other = (model._call_plan(r) for r in (rows, Rows(["a", "a", None, "b"])))
    assert one.ops is other.ops
    assert one.routing.chains == other.routing.chains


def test_only_the_branches_in_a_batch_are_touched() -> None:
    """Of a hundred adapters, those without a row are not even looked at."""
    model = tiny_model("bert").eval()
    for number in range(100):
        model.add_adapter(str(number), "lora")
    model.set_active_adapters(MultiTask(*map(str, range(100))))
    for number in range(100):
        if number not in (3, 77):
            for module in model.adapters[str(number)].modules():
                module._parameters.clear()
    with torch.no_grad():
        found = model(**tiny_inputs(model.config, batch=4), task_ids=torch.tensor([77, 3, 3, 77]))
    assert found[0].isfinite().all()


def test_the_heads_of_tasks_see_their_rows() -> None:
    model = build("lora")
    for name, labels in (("a", 2), ("b", 3), ("c", 4)):
        model.add_classification_head(name, num_labels=labels, set_active=False)
    randomise(model.heads)
    model.set_active_adapters(MultiTask("a", "b", "c"))
    inputs = tiny_inputs(model.config, batch=4)
    labels = {"c": torch.tensor([1, 3]), "a": torch.tensor([0, 1])}
    output = model(**inputs, task_ids=[2, 0, 2, 0], labels=labels)
    assert output.head_names == ("a", "c")  # no row is for b
    same = model(
        **inputs,
        adapter_names=Rows(["c", "a", "c", "a"]),
        head=Rows(["c", "a", "c", "a"]),
        labels=labels,
    )
    for name in ("a", "c"):
        torch.testing.assert_close(output[name].logits, same[name].logits)
    torch.testing.assert_close(output.loss, same.loss)


ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "missing": ({}, "needs task_ids"),
    "too few": ({"task_ids": torch.tensor([0, 1])}, "2 rows, but the batch has 4"),
    "too large": ({"task_ids": torch.tensor([0, 1, 2, 4])}, "4 stands for 0 tasks"),
    "negative": ({"task_ids": torch.tensor([0, -1, 2, 3])}, "-1 stands for 0 tasks"),
    "no such branch": ({"task_ids": ["a", "d", "b", "a"]}, "'d' stands for 0 tasks"),
    "no whole numbers": ({"task_ids": torch.ones(4)}, "whole numbers"),
    "two dimensions": ({"task_ids": torch.zeros(4, 1, dtype=torch.long)}, r"\(4, 1\)"),
    "without the block": ({"task_ids": [0] * 4, "adapter_names": "a"}, "no MultiTask"),
    "without adapters": ({"task_ids": [0] * 4, "adapter_names": []}, "no MultiTask"),
}


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("kind", ["flexible", "static"])
def test_bad_ids_are_refused_before_anything_runs(name: str, kind: str) -> None:
    call, message = ERRORS[name]
    if kind == "flexible":
        model = build("lora")
    else:
        model = flexheads.init(tiny_static("BertForSequenceClassification"))
        for adapter in "abc":
            model.add_adapter(adapter, "lora")
    model.set_active_adapters(MultiTask(*TASKS))
    ran: list[Any] = []
    model._attachment.backbone.register_forward_pre_hook(lambda *_: ran.append(1))
    with pytest.raises(CompositionError, match=message):
        model(**tiny_inputs(model.config, batch=4), **call)
    assert not ran


def test_where_it_has_no_meaning() -> None:
    model = build("lora")
    for setup in (
        Parallel(MultiTask("a", "b"), "c"),
        BatchSplit(MultiTask("a", "b"), "c", batch_sizes=2),
        Stack(MultiTask("a", "b"), MultiTask("a", "b", "c")),
        Stack(MultiTask("a", "b"), Rows(["a", "b"])),
    ):
        with pytest.raises(CompositionError, match="MultiTask"):
            model.set_active_adapters(setup)
    model.set_active_adapters(MultiTask("a", "b"))
    with pytest.raises(CompositionError, match="model's forward"):
        model.bert(**tiny_inputs(model.config))


def test_it_is_a_value() -> None:
    block = MultiTask("a", None, ["a", "b"])
    assert pickle.loads(pickle.dumps(block)) == block
    assert repr(block) == "MultiTask('a', None, Stack('a', 'b'))"
    assert {block: 1}[MultiTask("a", None, Stack("a", "b"))] == 1
    assert block.ids([0, "a", None, ["a", "b"]]) == [0, 0, 1, 2]
    with pytest.raises(CompositionError, match="2 tasks"):
        MultiTask("a", "a").ids(["a"])


@torch.no_grad()
def test_copies_and_pickles_of_a_model_keep_it() -> None:
    model = build("double_seq_bn")
    model.set_active_adapters(MultiTask(*TASKS))
    expected = hidden(model, None, task_ids=[2, 1, 0, 2])
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.active_adapters == MultiTask(*TASKS)
        assert torch.equal(hidden(other, None, task_ids=[2, 1, 0, 2]), expected)


@pytest.mark.parametrize("beams", [1, 2])
@torch.no_grad()
def test_generation_keeps_the_task_of_each_row(beams: int) -> None:
    inputs: dict[str, Any]
    for kind in ("flexible", "static"):
        if kind == "flexible":
            model = tiny_model("gpt2").eval()
            model.add_causal_lm_head("lm")
        else:
            model = flexheads.init(tiny_static("GPT2LMHeadModel")).eval()
        for seed, name in enumerate("ab"):
            model.add_adapter(name, "lora")
            randomise(model.adapters[name], std=0.5, seed=seed)
        model.set_active_adapters(MultiTask("a", "b"))
        inputs = tiny_inputs(model.config, batch=3)
        how = {"max_new_tokens": 4, "num_beams": beams, "do_sample": False, "pad_token_id": 0}
        found = model.generate(**inputs, task_ids=["b", "a", "b"], **how)
        for row, name in enumerate("bab"):
            alone = model.generate(**inputs, adapter_names=name, **how)
            assert torch.equal(found[row], alone[row]), (kind, row)


def test_a_plan_without_the_block_stays_as_it_is() -> None:
    plan = build("lora")._call_plan(Rows(["a", "b"]))
    assert with_task_ids(plan, None) is plan
