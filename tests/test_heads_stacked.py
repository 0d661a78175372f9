"""Heads of one shape run as one product: equal to each head alone, whatever has happened."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flexheads import ModelWithHeads, Parallel
from flexheads.heads.stacking import HeadStack, stack_key
from flexheads.testing import randomise, tiny_inputs, tiny_model

TOLERANCE = 1e-6


def build() -> ModelWithHeads:
    """A model with heads of several shapes, most of which have company."""
    model = tiny_model("bert")
    for number, size in enumerate([2, 2, 2, 3, 4, 7]):
        model.add_classification_head(f"sort {number}", num_labels=size)
    for kind in ("mean", "mean", "max", "attention"):
        model.add_classification_head(f"by {kind} {len(model.heads)}", pooling=kind)
    model.add_classification_head("shallow 0", layers=1)
    model.add_classification_head("shallow 1", layers=1, num_labels=2, bias=True)
    model.add_classification_head("bare 0", layers=3, layer_norm=True, bias=False)
    model.add_classification_head("bare 1", layers=3, layer_norm=True, bias=False)
    model.add_classification_head("mild 0", activation_function="gelu")
    model.add_classification_head("mild 1", activation_function="gelu")
    for number in range(3):
        model.add_tagging_head(f"tag {number}", num_labels=5 + number)
        model.add_qa_head(f"answer {number}")
        model.add_classification_head(f"deep {number}", hidden_layer=1)
    model.add_classification_head("mixed", hidden_layer="mix")
    model.add_masked_lm_head("words")
    for number in range(2):  # heads without layers, with parameters of their own, of other sizes
        model.add_head(f"vector {number}", "embedding")
        model.add_head(f"short {number}", "embedding", embedding_size=5)
        model.add_head(f"level {number}", "ordinal", num_labels=4)
        model.add_head(f"rank {number}", "ranking")
    randomise(model.heads, std=0.1)
    return model


def tensors(output: Any) -> list[Tensor]:
    return [value for value in output.values() if isinstance(value, Tensor)]


def assert_each_as_alone(model: ModelWithHeads, names: list[str], **inputs: Any) -> None:
    together = model(**inputs, head=names)
    assert together.head_names == tuple(names)
    for name in names:
        alone = model(**inputs, head=name)
        own = together[name]
        assert (type(own), list(own)) == (type(alone), list(alone))
        for mine, other in zip(tensors(own), tensors(alone), strict=True):
            assert mine.shape == other.shape
            torch.testing.assert_close(mine, other, atol=TOLERANCE, rtol=TOLERANCE)


@contextmanager
def stacks() -> Iterator[list[int]]:
    """Counts the heads of every product that runs inside."""
    counted: list[int] = []
    call = HeadStack.__call__

    def spy(self: HeadStack, inputs: Tensor) -> Tensor:
        scores = call(self, inputs)
        counted.append(len(scores))
        return scores

    HeadStack.__call__ = spy  # type: ignore[method-assign]
    try:
        yield counted
    finally:
        HeadStack.__call__ = call  # type: ignore[method-assign]


def some(count: int = 4, **config: Any) -> tuple[ModelWithHeads, list[str], dict[str, Tensor]]:
    """A model with several equal heads, their names, and inputs."""
    model = tiny_model("bert")
    names = [f"head {number}" for number in range(count)]
    for name in names:
        model.add_classification_head(name, **config)
    return model, names, tiny_inputs(model.config)


@pytest.mark.parametrize("rows", [1, 3])
@torch.no_grad()
def test_every_head_gives_what_it_gives_alone(rows: int) -> None:
    model = build()
    inputs = {name: value[-rows:] for name, value in tiny_inputs(model.config).items()}
    with stacks() as counted:
        assert_each_as_alone(model, list(model.heads), **inputs)
    # 2, 2, 2 with the pooling of the model; 3 and 4; mean; and so on. The rest is alone.
    assert sorted(counted) == [2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3]


@torch.no_grad()
def test_the_order_of_outputs_is_that_of_the_call() -> None:
    model = build()
    names = list(reversed(model.heads.keys()))
    assert_each_as_alone(model, names, **tiny_inputs(model.config))


@torch.no_grad()
def test_losses_are_those_of_each_head() -> None:
    model, names, inputs = some(num_labels=3)
    labels = {name: torch.tensor([number % 3, 0, 2]) for number, name in enumerate(names)}
    with stacks() as counted:
        together = model(**inputs, head=names, labels=labels)
    assert counted == [4]
    for name in names:
        alone = model(**inputs, head=name, labels=labels[name])
        torch.testing.assert_close(together[name].loss, alone.loss)


@pytest.mark.parametrize("inference", [False, True])
def test_the_weights_are_stacked_once(inference: bool) -> None:
    model, names, inputs = some()
    with torch.inference_mode(inference), torch.no_grad():
        model(**inputs, head=names)
        (first,) = model._stacks._stacks.values()
        model(**inputs, head=names)
        assert model._stacks._stacks[tuple(names)] is first
    with torch.no_grad():  # what inference mode has made serves outside of it
        model(**inputs, head=names)
    assert model._stacks._stacks[tuple(names)] is first


def _in_place(linear: nn.Linear) -> None:
    linear.weight.mul_(2)


def _replaced(linear: nn.Linear) -> None:
    linear.weight = nn.Parameter(linear.weight * 2)


def _new_data(linear: nn.Linear) -> None:
    linear.weight.data = linear.weight.data * 2


def _rounded(linear: nn.Linear) -> None:
    linear.to(torch.bfloat16).to(torch.float32)


def _assigned(linear: nn.Linear) -> None:
    state = {name: value * 2 for name, value in linear.state_dict().items()}
    linear.load_state_dict(state, assign=True)


def _hooked(linear: nn.Linear) -> None:
    linear.register_forward_hook(lambda module, args, output: output + 1)


def _shifted(linear: nn.Linear) -> None:
    linear.bias.add_(1)


CHANGES = [_in_place, _replaced, _new_data, _rounded, _assigned, _hooked, _shifted]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
@pytest.mark.parametrize("layer", ["0", "1"])
@torch.no_grad()
def test_a_changed_weight_is_seen(change: Any, layer: str) -> None:
    model, names, inputs = some()
    before = model(**inputs, head=names)[names[1]].logits
    change(model.heads[names[1]].layers.get_submodule(layer))
    assert_each_as_alone(model, names, **inputs)
    assert not torch.equal(model(**inputs, head=names)[names[1]].logits, before)


@torch.no_grad()
def test_a_replaced_layer_and_a_replaced_head_are_seen() -> None:
    model, names, inputs = some()
    model(**inputs, head=names)
    layers = model.heads[names[0]].layers
    layers.add_module("0", nn.Sequential(nn.Linear(layers.get_submodule("0").in_features, 32)))
    layers.get_submodule("0").requires_grad_(False)
    width = layers.get_submodule("1").in_features
    layers.add_module("0", nn.Linear(width, width))
    assert_each_as_alone(model, names, **inputs)
    model.add_classification_head(names[2], overwrite_ok=True)
    assert_each_as_alone(model, names, **inputs)
    model.heads.put(names[3], copy.deepcopy(model.heads[names[0]]))
    assert_each_as_alone(model, names, **inputs)


@torch.no_grad()
def test_hooks_on_heads_and_on_all_modules_are_called() -> None:
    model, names, inputs = some()
    model(**inputs, head=names)
    seen: list[Any] = []
    handle = model.heads[names[0]].register_forward_hook(lambda m, a, o: seen.append(m))
    model(**inputs, head=names)
    handle.remove()
    assert seen == [model.heads[names[0]]]
    everywhere = nn.modules.module.register_module_forward_hook(lambda m, a, o: seen.append(m))
    try:
        model(**inputs, head=names)
    finally:
        everywhere.remove()
    assert {id(model.heads[name]) for name in names} <= {id(module) for module in seen}


@torch.no_grad()
def test_nothing_is_kept_of_heads_that_are_gone_and_little_of_others() -> None:
    model, names, inputs = some(6)
    for count in range(2, 7):
        model(**inputs, head=names[:count])
        model(**inputs, head=names[-count:])
    assert 0 < len(model._stacks._stacks) <= 4
    model.delete_head(names[0])
    assert not model._stacks._stacks
    assert not list(model._stacks._groups)


@torch.no_grad()
def test_copies_pickles_and_files_carry_no_stacks(tmp_path: Any) -> None:
    model, names, inputs = some()
    model.active_head = names
    expected = model(**inputs)
    keys = set(model.state_dict())
    assert model._stacks._stacks
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not twin._stacks._stacks
        twin.heads[names[0]].layers.get_submodule("1").weight.zero_()
        assert_each_as_alone(twin, names, **inputs)
    torch.testing.assert_close(model(**inputs)[0].logits, expected[0].logits)
    assert set(model.state_dict()) == keys
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(again(**inputs)[0].logits, expected[0].logits)


def test_training_runs_each_head_with_its_own_dropout_and_gradients() -> None:
    model, names, inputs = some(3, dropout_prob=0.5)
    for name in names[1:]:
        model.heads[name].load_state_dict(model.heads[names[0]].state_dict())
    model.base_model.eval()
    model.freeze_model()
    for name in names:
        model.heads[name].train()
    labels = torch.tensor([0, 1, 1])
    with stacks() as counted:
        first, second, _ = model(**inputs, head=names, labels=labels).ordered
        assert not torch.equal(first.logits, second.logits)
        model.heads.eval()
        together = model(**inputs, head=names, labels=labels)
    assert not counted
    together.loss.backward()
    found = [p.grad.clone() for p in model.heads.parameters()]
    model.zero_grad()
    for name in names:
        model(**inputs, head=name, labels=labels).loss.backward()
    for parameter, gradient in zip(model.heads.parameters(), found, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_a_training_step_ends_what_was_kept() -> None:
    """Some optimizers write to ``.data``, which leaves no trace."""
    model, names, inputs = some()
    with torch.no_grad():
        model(**inputs, head=names)
    model(**inputs, head=names, labels=torch.zeros(3, dtype=torch.long)).loss.backward()
    for parameter in model.heads.parameters():
        parameter.data.sub_(parameter.grad)
    with torch.no_grad(), stacks() as counted:
        assert_each_as_alone(model, names, **inputs)
    assert counted == [4]


def test_frozen_heads_pass_gradients_on_to_what_they_read() -> None:
    model, names, inputs = some()
    model.heads.requires_grad_(False)
    embeds = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    gradients = []
    for each in (names, *names):
        leaf = embeds.clone().requires_grad_()
        output = model(inputs_embeds=leaf, **inputs, head=each)
        found = [output.logits] if isinstance(each, str) else [o.logits for o in output.ordered]
        sum(logits.square().sum() for logits in found).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[0], sum(gradients[1:]))


@torch.no_grad()
def test_parallel_heads_see_their_own_rows_only() -> None:
    model, names, inputs = some(3)
    for name in names:
        model.add_adapter(name, config="seq_bn")
        randomise(model.adapters[name], std=0.1)
    setup = Parallel(*names)
    with stacks() as counted:
        output = model(**inputs, adapter_names=setup)
    assert not counted
    for name in names:
        alone = model(**inputs, adapter_names=name, head=name)
        torch.testing.assert_close(output[name].logits, alone.logits)
    with stacks() as counted:
        together = model(**inputs, adapter_names=setup, head=names)
    assert counted == [3]
    for name in names:
        rows = [model(**inputs, adapter_names=each, head=name).logits for each in names]
        torch.testing.assert_close(together[name].logits, torch.cat(rows))


@torch.no_grad()
def test_heads_of_other_kinds_stay_by_themselves() -> None:
    model = build()
    alone = {name for name, head in model.heads.items() if stack_key(head) is None}
    kinds = {name.rpartition(" ")[0] or name for name in alone}
    assert kinds == {"mixed", "words", "by attention", "vector", "level"}
    model.heads["tag 0"].half()
    model.heads["sort 0"].requires_grad_(False)
    assert stack_key(model.heads["tag 0"]) != stack_key(model.heads["tag 1"])
    assert stack_key(model.heads["sort 0"]) == stack_key(model.heads["sort 1"])
    nn.utils.parametrizations.weight_norm(model.heads["sort 0"].layers.get_submodule("0"))
    assert stack_key(model.heads["sort 0"]) is None


@torch.no_grad()
def test_threads_get_what_they_asked_for() -> None:
    model, names, inputs = some(6)
    expected = {name: model(**inputs, head=name).logits for name in names}
    wrong: list[str] = []

    def work(start: int) -> None:
        torch.set_grad_enabled(False)
        for turn in range(30):
            chosen = names[(start + turn) % 5 :]
            output = model(**inputs, head=chosen)
            wrong.extend(n for n in chosen if not torch.allclose(output[n].logits, expected[n]))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@torch.no_grad()
def test_several_heads_compile_into_one_graph() -> None:
    model, names, inputs = some(3)
    expected = model(**inputs, head=names)
    model.active_head = names
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with stacks() as counted:
        output = compiled(**inputs)
    assert not counted  # the compiler sees the heads, and may do with them what it likes
    for name in names:
        torch.testing.assert_close(output[name].logits, expected[name].logits)
