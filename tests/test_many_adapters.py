"""Managing many adapters: what is the same for all is found out once, and nothing else changes."""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import flexheads
from flexheads.checkpoints import store
from flexheads.checkpoints.store import read_tensors, write_tensors
from flexheads.methods.config import AdapterConfig, load_config
from flexheads.models.heads.static import StaticHead
from flexheads.sites.attach import Attachment
from flexheads.testing import randomise, tiny_model, tiny_static

KINDS = ["lora[r=4]", "seq_bn", "double_seq_bn", "ia3", "prefix_tuning", "seq_bn_inv", "mam"]


@contextmanager
def counted(owner: Any, name: str) -> Iterator[list[Any]]:
    """The calls of a method, by what it was called on or with first."""
    calls: list[Any] = []
    usual = getattr(owner, name)

    def spy(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(args[0] if args else self)
        return usual(self, *args, **kwargs)

    setattr(owner, name, spy)
    try:
        yield calls
    finally:
        setattr(owner, name, usual)


# --- once for each adapter, or once for all -----------------------------------------------------


def test_adding_an_adapter_looks_at_no_other() -> None:
    model = tiny_model("bert")
    with counted(Attachment, "hooks_for") as asked, counted(AdapterConfig, "to_dict") as described:
        for number in range(10):
            model.add_adapter(f"a{number}", config="lora[r=4]")
        for number in range(5):
            model.delete_adapter(f"a{number}")
    assert len(asked) == len(described) == 10


def test_equal_adapters_register_nothing_new() -> None:
    model = tiny_model("bert")
    model.add_adapter("a", config="lora[r=4]")
    version = model._attachment.runtime.version
    model.add_adapter("b", config="lora[r=2]")
    model.delete_adapter("a")
    assert model._attachment.runtime.version == version
    model.delete_adapter("b")
    assert model._attachment.runtime.version == version + 1
    assert not model._attachment._handles


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_hooks_are_those_of_the_adapters_that_are_left(twin: Callable[[Any], Any]) -> None:
    model = tiny_model("bert")
    for kind in KINDS:
        model.add_adapter(kind, config=kind)
    for kind in KINDS:
        model = twin(model)
        model.delete_adapter(kind)
        fresh = tiny_model("bert")
        for name, adapter in model.adapters.items():
            fresh.add_adapter(name, config=adapter.config)
        assert model._attachment._handles.keys() == fresh._attachment._handles.keys()


def test_the_configuration_describes_what_adapters_have_now() -> None:
    model = tiny_model("bert")
    model.add_adapter("a", config="lora[r=4]")
    model.adapters["a"].config = load_config("lora[r=4, alpha=3]")
    model.add_adapter("b", config="seq_bn")
    assert model.config.adapters["a"]["alpha"] == 3
    assert model.config.adapters == {n: a.config.to_dict() for n, a in model.adapters.items()}
    assert copy.deepcopy(model).adapters["a"].described() == model.config.adapters["a"]


def test_a_part_that_was_replaced_is_the_part() -> None:
    model = tiny_model("bert")
    model.add_adapter("a", config="lora[r=4]")
    new = copy.deepcopy(model.adapters["a"].parts["layers.0.query"])
    model.adapters["a"].get_submodule("layers.0").query = new
    assert model.adapters["a"].parts["layers.0.query"] is new
    model.set_active_adapters("a")
    assert model._attachment.runtime.active.ops["layers.0.query"].chains[0][0] is new


def test_files_ask_the_model_once(tmp_path: Path) -> None:
    model = tiny_model("bert")
    with counted(Attachment, "paths") as asked:
        for number in range(3):
            model.add_adapter(f"a{number}", config="lora[r=4]")
            model.save_adapter(tmp_path / str(number), f"a{number}")
            model.load_adapter(tmp_path / str(number), load_as=f"b{number}")
    assert len(asked) == 1
    twin = copy.deepcopy(model)
    assert twin._layout() == model._layout()


# --- values -------------------------------------------------------------------------------------


def test_a_lora_is_drawn_as_ever() -> None:
    model = tiny_model("bert")
    torch.manual_seed(3)
    model.add_adapter("a", config="lora[r=4]")
    torch.manual_seed(3)
    for part in model.adapters["a"].parts.values():
        expected = nn.init.kaiming_uniform_(torch.empty(part.lora_A.shape), a=5**0.5)
        assert torch.equal(part.lora_A, expected)
        assert not part.lora_B.any()


def test_a_bottleneck_is_drawn_as_ever() -> None:
    model = tiny_model("bert")
    torch.manual_seed(3)
    model.add_adapter("a", config="seq_bn")
    torch.manual_seed(3)
    for part in model.adapters["a"].parts.values():
        down = nn.Linear(part.down.in_features, part.down.out_features)
        nn.Linear(part.up.in_features, part.up.out_features)
        nn.init.normal_(down.weight, std=0.02)
        assert torch.equal(part.down.weight, down.weight)
        assert not any(p.any() for p in (part.down.bias, part.up.weight, part.up.bias))
        assert type(part.down) is type(part.up) is nn.Linear


@pytest.mark.parametrize(
    "kind",
    [
        *KINDS,
        "dora",
        "vera",
        "loreft[orthogonality=False]",
        "compacter[reduction_factor=4]",
        "prompt_tuning",
    ],
)
def test_loading_gives_what_was_saved_in_memory_of_its_own(kind: str, tmp_path: Path) -> None:
    model = tiny_model("bert")
    model.add_adapter("a", config=kind)
    randomise(model.adapters["a"])
    model.save_adapter(tmp_path, "a")
    twin = tiny_model("bert")
    twin.load_adapter(tmp_path)
    assert twin.adapters["a"].state_dict().keys() == model.adapters["a"].state_dict().keys()
    for file in tmp_path.iterdir():
        file.write_bytes(b"\0" * file.stat().st_size)
    for key, tensor in twin.adapters["a"].state_dict().items():
        assert torch.equal(tensor, model.adapters["a"].state_dict()[key]), key
    for parameter in twin.adapters["a"].parameters():
        assert parameter.requires_grad
        assert parameter.is_leaf
        assert parameter.untyped_storage().nbytes() == parameter.numel() * 4


@pytest.mark.parametrize("kind", ["lora[r=4]", "seq_bn", "double_seq_bn"])
def test_loading_draws_nothing(kind: str, tmp_path: Path) -> None:
    model = tiny_model("bert")
    model.add_adapter("a", config=kind)
    model.save_adapter(tmp_path, "a")
    before = torch.get_rng_state()
    model.load_adapter(tmp_path, load_as="b")
    assert torch.equal(before, torch.get_rng_state())
    model.add_adapter("c", config=kind)
    assert not torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_new_adapters_are_where_their_layers_are(dtype: torch.dtype) -> None:
    model = tiny_model("bert").to(dtype)
    for kind in KINDS:
        model.add_adapter(kind, config=kind)
    model.add_adapter("own", config="lora[dtype=float32]")
    own = {p.dtype for p in model.adapters["own"].parameters()}
    others = {p.dtype for n, a in model.adapters.items() if n != "own" for p in a.parameters()}
    assert (own, others) == ({torch.float32}, {dtype})
    mixed = tiny_model("bert")
    mixed.bert.encoder.layer[1].to(dtype)
    mixed.add_adapter("a", config="seq_bn")
    assert [part.down.weight.dtype for part in mixed.adapters["a"].parts.values()] == [
        torch.float32,
        dtype,
    ]


# --- training -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["with heads", "static"])
def test_exactly_what_is_named_is_trained(name: str) -> None:
    model = tiny_model("bert")
    if name == "static":
        model = flexheads.init(tiny_static("BertForSequenceClassification"))
    for number in range(4):
        model.add_adapter(f"a{number}", config=KINDS[number])
    model.adapters["a1"].requires_grad_(False)
    model.train_adapter(["a1", "a2"])
    head = {"classifier"} if name == "static" else set()
    trained = {
        n.split(".")[0] + n.split(".")[1]
        for n, p in model.named_parameters()
        if p.requires_grad and n.startswith("adapters")
    }
    assert trained == {"adaptersa1", "adaptersa2"}
    others = {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert others == {"adapters", *head}
    assert all(p.requires_grad for n in ("a1", "a2") for p in model.adapters[n].parameters())


CLASSES = ["BertForSequenceClassification", "BertForMaskedLM", "BertForPreTraining"]


@pytest.mark.parametrize("name", CLASSES)
def test_a_static_head_is_what_lies_outside_of_the_backbone(name: str) -> None:
    model = flexheads.init(tiny_static(name))
    model.add_adapter("a", config="lora[r=4]")
    inside = ("bert.", "adapters.", "adapter_fusions.")
    expected = {k: t for k, t in model.state_dict().items() if not k.startswith(inside)}
    head = StaticHead(model)
    assert head.keys == tuple(head.state) == tuple(expected)
    assert all(head.state[key].data_ptr() == tensor.data_ptr() for key, tensor in expected.items())


# --- files --------------------------------------------------------------------------------------


def test_tensors_that_share_memory_are_written_each(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(3, 4)
    tensors = {"a": whole, "b": whole, "c": whole[1], "d": whole.t(), "e": torch.ones(2)[1:]}
    write_tensors(tmp_path / "x.safetensors", tensors)
    read = read_tensors(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    assert torch.equal(whole, torch.arange(12.0).view(3, 4))


@pytest.mark.parametrize("links", [True, False])
def test_files_come_back_when_replacing_them_fails(
    links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("bert")
    model.add_adapter("a", config="lora[r=4]")
    model.save_adapter(tmp_path / "x", "a")
    before = {file.name: file.read_bytes() for file in (tmp_path / "x").iterdir()}
    randomise(model.adapters["a"])
    replace, places = os.replace, []

    def refuse(source: Any, target: Any) -> None:
        raise PermissionError("no links here")

    def fail(source: Any, target: Any) -> None:
        places.append(target)
        if len(places) == 2:
            raise OSError("busy")
        replace(source, target)

    if not links:
        monkeypatch.setattr(store.os, "link", refuse)
    monkeypatch.setattr(store.os, "replace", fail)
    with pytest.raises(OSError, match="busy"):
        model.save_adapter(tmp_path / "x", "a")
    monkeypatch.undo()
    assert {file.name: file.read_bytes() for file in (tmp_path / "x").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_saving_again_changes_no_other_name_of_a_file(tmp_path: Path) -> None:
    model = tiny_model("bert")
    model.add_adapter("a", config="lora[r=4]")
    model.save_adapter(tmp_path / "x", "a")
    weights = tmp_path / "x" / "adapter.safetensors"
    os.link(weights, tmp_path / "kept")
    before = (tmp_path / "kept").read_bytes()
    randomise(model.adapters["a"])
    model.save_adapter(tmp_path / "x", "a")
    assert (tmp_path / "kept").read_bytes() == before != weights.read_bytes()
