"""The outputs of many heads are made when somebody looks at them; nobody can tell."""

from __future__ import annotations

import copy
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree

from flexheads import ModelWithHeads
from flexheads.heads.outputs import MultiHeadOutput, _Unread
from flexheads.testing import randomise, tiny_inputs, tiny_model

NAMES = ["topic", "loss", "mood", "tags", "next"]


@pytest.fixture
def model() -> ModelWithHeads:
    """A model with two classes of heads, in a mixed order."""
    model = tiny_model("bert")
    model.add_classification_head("topic", num_labels=3)
    model.add_classification_head("loss", num_labels=4)
    model.add_tagging_head("tags", num_labels=5)
    model.add_tagging_head("next", num_labels=5)
    model.add_classification_head("mood", num_labels=3)
    randomise(model.heads, std=0.1)
    return model


def run(model: ModelWithHeads, **more: Any) -> Any:
    with torch.no_grad():
        return model(**tiny_inputs(model.config), head=NAMES, **more)


def assert_read(output: Any, model: ModelWithHeads) -> None:
    """An output that has been looked into is what each head gives alone."""
    assert type(output) is MultiHeadOutput
    assert list(output) == list(output.head_names) == NAMES
    assert (output.loss, output.losses) == (None, {})
    assert "make" not in vars(output)
    with torch.no_grad():
        for place, name in enumerate(NAMES):
            alone = model(**tiny_inputs(model.config), head=name)
            assert output[place] is output[name] is output.ordered[place]
            assert (type(output[name]), list(output[name])) == (type(alone), list(alone))
            torch.testing.assert_close(output[name].logits, alone.logits)
            assert vars(output[name]).keys() == vars(alone).keys()


READ: dict[str, Callable[[Any], Any]] = {
    "by name": lambda o: o["mood"],
    "by index": lambda o: o[-1],
    "get": lambda o: o.get("mood"),
    "in": lambda o: "mood" in o,
    "len": len,
    "bool": bool,
    "iteration": list,
    "backwards": lambda o: list(reversed(o)),
    "keys": lambda o: o.keys(),
    "values": lambda o: o.values(),
    "items": lambda o: o.items(),
    "dict": dict,
    "unpacked": lambda o: {**o},
    "joined": lambda o: {} | o,
    "equal": lambda o: o == {},
    "different": lambda o: o != {},
    "repr": repr,
    "str": str,
    "copy": copy.copy,
    "own copy": lambda o: o.copy(),
    "deep copy": copy.deepcopy,
    "pickle": pickle.dumps,
    "ordered": lambda o: o.ordered,
    "names": lambda o: o.head_names,
    "hasattr": lambda o: hasattr(o, "ordered"),
    "vars": lambda o: vars(o) and o.ordered,
}


@pytest.mark.parametrize("way", READ)
def test_every_way_of_looking_makes_the_outputs(way: str, model: ModelWithHeads) -> None:
    output = run(model)
    assert type(output) is _Unread
    READ[way](output)
    assert_read(output, model)


def test_what_comes_out_of_a_dictionary_is_never_a_gap(model: ModelWithHeads) -> None:
    assert {**run(model)}.keys() == dict(run(model)).keys() == set(NAMES)
    assert run(model).pop("mood").logits.shape == (3, 3)
    assert len(run(model).values()) == len(run(model)) == len(NAMES)
    changed = run(model)
    changed["more"] = 1
    assert list(changed) == [*NAMES, "more"]


@pytest.mark.parametrize(
    "twin", [copy.copy, copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))]
)
def test_copies_are_whole(twin: Callable[[Any], Any], model: ModelWithHeads) -> None:
    assert_read(twin(run(model)), model)


def test_an_unknown_attribute_reads_nothing(model: ModelWithHeads) -> None:
    output = run(model)
    with pytest.raises(AttributeError, match="'MultiHeadOutput' object has no attribute 'logits'"):
        output.logits  # noqa: B018
    assert (output.loss, output.losses) == (None, {})
    assert isinstance(output, MultiHeadOutput)
    assert type(output) is _Unread


def test_what_libraries_build_of_an_unread_one_is_a_usual_one(model: ModelWithHeads) -> None:
    output = run(model)
    kind = type(output)  # accelerate takes the class before it looks at the items
    doubled = kind({name: own.logits * 2 for name, own in output.items()})
    assert type(doubled) is MultiHeadOutput
    assert torch.equal(doubled["mood"], output["mood"].logits * 2)
    again = type(run(model))([("a", {}), ("loss", torch.tensor(2.0))])
    assert type(again) is MultiHeadOutput
    assert (again.loss, again.head_names) == (torch.tensor(2.0), ("a",))


def test_a_walk_over_trees_takes_both_alike(model: ModelWithHeads) -> None:
    unread, read = run(model), run(model)
    list(read)
    assert len(_pytree.tree_leaves([unread])) == len(_pytree.tree_leaves([read])) == 1


def test_accelerate_walks_over_it(model: ModelWithHeads) -> None:
    accelerate = pytest.importorskip("accelerate.utils.operations")
    halved = accelerate.convert_to_fp32(run(model))
    assert list(halved) == NAMES
    assert all(isinstance(own.logits, Tensor) for own in halved.values())


def test_labels_and_heads_that_compute_more_are_there_at_once(model: ModelWithHeads) -> None:
    labels = torch.zeros(3, dtype=torch.long)
    output = run(model, labels={"mood": labels})
    assert type(output) is MultiHeadOutput
    assert output.loss is output.losses["mood"]
    model.add_qa_head("answer")
    with torch.no_grad():
        mixed = model(**tiny_inputs(model.config), head=[*NAMES, "answer"])
    assert type(mixed) is MultiHeadOutput
    with torch.enable_grad():
        trained = model(**tiny_inputs(model.config), head=NAMES)
    assert type(trained) is MultiHeadOutput


def test_a_head_with_a_finish_of_its_own_is_asked_at_once(model: ModelWithHeads) -> None:
    from flexheads.heads.classification import ClassificationHead

    class Softened(ClassificationHead):
        def finish(self, scores: Tensor, features: Any, **labels: Any) -> Any:
            return super().finish(scores / 2, features, **labels)

    usual = run(model)["mood"].logits
    model.heads["mood"].__class__ = Softened
    model._changed()
    output = run(model)
    assert type(output) is MultiHeadOutput
    torch.testing.assert_close(output["mood"].logits, usual / 2)


def test_later_changes_of_the_model_change_nothing(model: ModelWithHeads) -> None:
    expected = {name: own.logits.clone() for name, own in run(model).items()}
    output = run(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    run(model)
    for name in list(model.heads):
        model.delete_head(name)
    for name, own in output.items():
        torch.testing.assert_close(own.logits, expected[name])


def test_an_unread_output_does_not_keep_what_the_backbone_computed(model: ModelWithHeads) -> None:
    seen: list[weakref.ref[Tensor]] = []
    handle = model.base_model.register_forward_hook(
        lambda module, args, output: seen.append(weakref.ref(output.last_hidden_state))
    )
    run(model)
    output = run(model)
    handle.remove()
    assert type(output) is _Unread
    assert [ref() for ref in seen] == [None, None]


def test_hidden_states_are_those_of_the_call(model: ModelWithHeads) -> None:
    output = run(model, output_hidden_states=True)
    assert all(len(own.hidden_states) == 3 for own in output.values())
    assert all(own.attentions is None and "attentions" not in own for own in output.values())


def test_threads_may_look_at_once(model: ModelWithHeads) -> None:
    for _ in range(20):
        output, found, start = run(model), [], threading.Barrier(4)

        def look(output: Any = output, found: Any = found, start: Any = start) -> None:
            start.wait()
            found.append([output[name].logits for name in NAMES])

        threads = [threading.Thread(target=look) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 4
        for own in found:
            assert all(map(torch.equal, own, found[0]))
    assert_read(output, model)


@pytest.mark.parametrize("rows", [1, 2, 8, 9, 33])
def test_few_and_many_rows_have_the_scores_of_each_head_alone(rows: int) -> None:
    model = tiny_model("bert")
    for number, (layers, size) in enumerate([(1, 3), (1, 3), (3, 2), (3, 2), (3, 2)]):
        model.add_classification_head(
            f"head {number}", num_labels=size, layers=layers, layer_norm=layers > 1, bias=True
        )
    randomise(model.heads, std=0.1)
    ids = torch.randint(3, 50, (rows, 7))
    with torch.no_grad():
        together = model(input_ids=ids, head=list(model.heads))
        for name in model.heads:
            alone = model(input_ids=ids, head=name).logits
            assert together[name].logits.is_contiguous()
            torch.testing.assert_close(together[name].logits, alone, atol=1e-5, rtol=1e-5)
