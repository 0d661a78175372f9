"""Traps: a model with adapter support is the bare model until an adapter acts, and copies well."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import flexheads
from flexheads.errors import UnknownNameError, UnsupportedError
from flexheads.models.adapters.mixin import AdapterModelMixin
from flexheads.testing import randomise, tiny_config, tiny_inputs, tiny_output, tiny_static

from . import classifiers
from .classifiers import COMMON, KINDS, classifier, each_kind

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""Where hooks are; notes on how they are called stay, see `flexheads.sites.hooking`."""

each_method = pytest.mark.parametrize("method", COMMON)


def build(kind: str, *methods: str, active: str | None = None) -> Any:
    """A tiny random model with an adapter of each method, under the method's name."""
    model = classifier(kind)
    for method in methods:
        add(model, method)
    model.set_active_adapters(active)
    return model


def add(model: Any, method: str, name: str | None = None) -> None:
    classifiers.add(model, COMMON[method], name or method, seed=len(model.adapters) + 1)


def hooks(model: nn.Module) -> list[Any]:
    """Every hook on every module."""
    return [
        hook
        for module in model.modules()
        for kind in HOOKS
        for hook in getattr(module, kind).values()
    ]


# --- the bare model --------------------------------------------------------------------------


@each_method
def test_no_active_adapter_is_bit_equal_to_the_bare_backbone(method: str) -> None:
    model = build("flexible", method)
    bare = transformers.BertModel(tiny_config("bert")).eval()
    bare.load_state_dict(model.bert.state_dict())
    inputs = tiny_inputs(model.config)
    expected = bare(**inputs)
    for calls in ({"head": []}, {"head": [], "adapter_names": []}):
        found = model(**inputs, **calls)
        assert type(found) is type(expected)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert not torch.equal(model(**inputs, head=[], adapter_names=method)[0], expected[0])


@each_method
def test_no_active_adapter_is_bit_equal_to_the_bare_static_model(method: str) -> None:
    bare = tiny_static("BertForSequenceClassification", num_labels=3)
    model = build("static", method)
    assert torch.equal(tiny_output(model), tiny_output(bare))
    assert torch.equal(tiny_output(model, adapter_names=[]), tiny_output(bare))
    assert not torch.equal(tiny_output(model, adapter_names=method), tiny_output(bare))


@each_kind
def test_state_dict_keys_of_the_backbone_keep_names_and_order(kind: str) -> None:
    bare = transformers.BertForSequenceClassification(tiny_config("bert", num_labels=3))
    model = build(kind, *COMMON, active="lora")
    assert list(model.bert.state_dict()) == list(bare.bert.state_dict())
    assert [n for n, _ in model.bert.named_modules()] == [n for n, _ in bare.bert.named_modules()]
    own = [key for key in model.state_dict() if not key.startswith(("adapters.", "heads."))]
    outside = [key for key in bare.state_dict() if kind == "static" or key.startswith("bert.")]
    assert own == outside


@each_kind
def test_the_backbone_is_an_unmodified_transformers_object(kind: str) -> None:
    bare = transformers.BertModel(tiny_config("bert"))
    classes = {type(module): dict(vars(type(module))) for module in bare.modules()}
    model = build(kind, *COMMON, active="houlsby")
    tiny_output(model)
    for (path, module), original in zip(model.bert.named_modules(), bare.modules(), strict=True):
        assert type(module) is type(original), path
        assert "forward" not in vars(module), path
        assert "__call__" not in vars(module), path
    for kind_of_module, before in classes.items():
        assert dict(vars(kind_of_module)) == before, kind_of_module


def test_a_static_model_stays_an_instance_of_its_class_under_its_name() -> None:
    original = transformers.BertForSequenceClassification
    before = dict(vars(original))
    model = build("static", "pfeiffer")
    assert isinstance(model, original)
    assert isinstance(model, AdapterModelMixin)
    for word in ("__name__", "__qualname__", "__module__"):
        assert getattr(type(model), word) == getattr(original, word)
    assert dict(vars(original)) == before
    fresh = tiny_static("BertForSequenceClassification")
    assert not isinstance(fresh, AdapterModelMixin)


@each_kind
def test_a_flexible_or_static_model_is_a_pretrained_model(kind: str) -> None:
    model = build(kind)
    assert isinstance(model, transformers.PreTrainedModel)
    name = {"flexible": "BertModelWithHeads", "static": "BertForSequenceClassification"}
    assert type(model).__name__ == name[kind]
    assert model.base_model is model.bert


@each_kind
@each_method
def test_deleting_the_last_adapter_leaves_no_hook_and_bit_equal_outputs(
    kind: str, method: str
) -> None:
    model = build(kind)
    before = tiny_output(model)
    assert hooks(model) == []
    add(model, method)
    model.set_active_adapters(method)
    assert not torch.equal(tiny_output(model), before)
    assert hooks(model)
    model.delete_adapter(method)
    assert hooks(model) == []
    assert model.active_adapters is None
    assert torch.equal(tiny_output(model), before)
    assert not [key for key in model.state_dict() if key.startswith("adapters.")]


@each_kind
def test_deleting_one_adapter_keeps_the_hooks_that_others_rely_on(kind: str) -> None:
    model = build(kind, *COMMON)
    expected = {name: tiny_output(model, adapter_names=name) for name in COMMON}
    left = list(COMMON)
    while left:
        model.delete_adapter(left.pop(0))
        for name in left:
            assert torch.equal(tiny_output(model, adapter_names=name), expected[name])
    assert hooks(model) == []


# --- init ------------------------------------------------------------------------------------


def test_init_twice_changes_nothing() -> None:
    model = build("static", "houlsby", active="houlsby")
    before, count, kind = tiny_output(model), len(hooks(model)), type(model)
    assert flexheads.init(model) is model
    assert type(model) is kind
    assert len(hooks(model)) == count
    assert torch.equal(tiny_output(model), before)
    flexible = build("flexible")
    assert flexheads.init(flexible) is flexible


@pytest.mark.parametrize("in_place", [True, False])
def test_init_on_a_compiled_model_names_the_way_out(in_place: bool) -> None:
    bare = tiny_static("BertForSequenceClassification")
    model = bare
    if in_place:
        bare.compile(backend="eager")
    else:
        model = torch.compile(bare, backend="eager")
    with pytest.raises(UnsupportedError, match=r"flexheads\.init .*first and compile afterwards"):
        flexheads.init(model)
    assert type(bare) is transformers.BertForSequenceClassification


def test_init_on_an_unknown_architecture_names_the_package_and_changes_nothing() -> None:
    class NosuchConfig(transformers.BertConfig):
        model_type = "nosuch"

    config = NosuchConfig(**flexheads.registry().architecture("bert").tiny)
    model = transformers.BertModel(config)
    with pytest.raises(UnknownNameError, match="pip install flexheads-nosuch"):
        flexheads.init(model)
    assert type(model) is transformers.BertModel
    assert not hasattr(model, "adapters")


# --- copies ----------------------------------------------------------------------------------

COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch_save": lambda model: _through_torch_save(model),
}


def _through_torch_save(model: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)


@pytest.fixture(params=KINDS)
def used(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A model that has been called, with an active adapter and plans in its cache."""
    model = build(request.param, "houlsby", "parallel", "lora", active="houlsby")
    for names in ("parallel", "lora", ["houlsby", "lora"], []):
        tiny_output(model, adapter_names=names)
    assert model._attachment.runtime.plans
    return model


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_answers_as_the_original_and_is_independent(used: Any, way: str) -> None:
    names = ("houlsby", "parallel", "lora", [])
    before = {str(n): tiny_output(used, adapter_names=n) for n in names}
    twin = COPIES[way](used)
    assert type(twin) is type(used)
    assert repr(twin.active_adapters) == repr(used.active_adapters)
    assert torch.equal(tiny_output(twin), tiny_output(used))
    for n in names:
        assert torch.equal(tiny_output(twin, adapter_names=n), before[str(n)])
    # The copy's hooks call the copy's adapters, and only those.
    for adapter in twin.adapters.values():
        randomise(adapter, std=0.5, seed=9)
    for n in names[:-1]:
        assert not torch.equal(tiny_output(twin, adapter_names=n), before[str(n)])
        assert torch.equal(tiny_output(used, adapter_names=n), before[str(n)])
    shared = {p.data_ptr() for p in used.parameters()} & {p.data_ptr() for p in twin.parameters()}
    assert not shared


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_adds_and_deletes_adapters_of_its_own(used: Any, way: str) -> None:
    before, count = tiny_output(used), len(hooks(used))
    bare = tiny_output(used, adapter_names=[])
    twin = COPIES[way](used)
    assert len(hooks(twin)) == count
    add(twin, "adapterplus")
    assert not torch.equal(tiny_output(twin, adapter_names="adapterplus"), bare)
    assert "adapterplus" not in used.adapters
    assert len(hooks(used)) == count
    for name in list(twin.adapters):
        twin.delete_adapter(name)
    assert hooks(twin) == []
    assert torch.equal(tiny_output(twin), bare)
    assert len(hooks(used)) == count
    assert torch.equal(tiny_output(used), before)


def test_training_a_copy_leaves_the_original_alone(used: Any) -> None:
    before = tiny_output(used)
    twin = copy.deepcopy(used)
    twin.train_adapter("houlsby")
    loss = twin(**tiny_inputs(twin.config), labels=torch.tensor([0, 1, 2])).loss
    loss.backward()
    assert all(p.grad is None for p in used.parameters())
    touched = {n for n, p in twin.named_parameters() if p.grad is not None}
    assert touched
    assert all(n.startswith(("adapters.houlsby.", "heads.", "classifier.")) for n in touched)
    torch.optim.SGD([p for p in twin.parameters() if p.requires_grad], lr=1.0).step()
    assert not torch.equal(tiny_output(twin), before)
    assert torch.equal(tiny_output(used), before)


@pytest.mark.parametrize("names", [["houlsby", "lora"], flexheads.Rows(["lora", None, "houlsby"])])
def test_a_copy_keeps_an_active_composition(used: Any, names: Any) -> None:
    used.set_active_adapters(names)
    before = tiny_output(used)
    for way in COPIES.values():
        twin = way(used)
        assert twin.active_adapters == used.active_adapters
        assert torch.equal(tiny_output(twin), before)


IN_ANOTHER_PROCESS = """
import sys, torch
for path in sys.argv[1:]:
    model, inputs, expected = torch.load(path, weights_only=False)
    assert torch.equal(model(**inputs).logits, expected), path
    model.add_adapter("new", "lora", set_active=True)
    model.delete_adapter("houlsby")
    model(**inputs)
"""


def test_a_saved_model_object_loads_in_another_process(tmp_path: Path) -> None:
    files = []
    for kind in KINDS:
        model = build(kind, "houlsby", active="houlsby")
        files.append(tmp_path / f"{kind}.pt")
        torch.save((model, tiny_inputs(model.config), tiny_output(model)), files[-1])
    command = [sys.executable, "-c", textwrap.dedent(IN_ANOTHER_PROCESS), *map(str, files)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
