"""Traps: what from_pretrained and save_pretrained do to a model's tensors loses nothing of ours."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import flexheads
from flexheads.errors import CheckpointError, UnsupportedError
from flexheads.testing import randomise, tiny_model, tiny_output, tiny_static

from .classifiers import COMMON, KINDS, add, classifier, each_kind

METHODS: dict[str, Any] = {
    **COMMON,
    "parallel": flexheads.ParBnConfig(scaling="learned", reduction_factor=4),
    "gated": flexheads.LoRAConfig(use_gating=True),
    "invertible": "seq_bn_inv",
}
LOADERS: dict[str, Any] = {
    "flexible": flexheads.BertModelWithHeads,
    "static": flexheads.AutoModelForSequenceClassification,
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Directories that transformers itself has saved, one of them in bfloat16. Read only."""
    model = tiny_static("BertForSequenceClassification", num_labels=3)
    directories = {}
    for dtype in ("float32", "bfloat16"):
        directory = tmp_path_factory.mktemp(dtype)
        model.to(getattr(torch, dtype)).save_pretrained(directory)
        directories[dtype] = str(directory)
    return directories


def build(kind: str) -> Any:
    """A model with every method, a head of every common type, and something active."""
    model = classifier(kind)
    if kind == "flexible":
        model.add_tagging_head("tags", num_labels=5)
        model.add_masked_lm_head("lm")
        randomise(model.heads, std=0.2)
        model.active_head = "head"
    for seed, (name, config) in enumerate(METHODS.items()):
        add(model, config, name, seed)
    model.set_active_adapters("houlsby")
    return model


@pytest.fixture(scope="module", params=KINDS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: Any) -> tuple[str, Any, Path]:
    """A kind, a model of it, and the directory it was saved to. Read only."""
    model = build(request.param)
    directory = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(directory)
    return request.param, model, directory


def assert_same(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    assert list(found) == list(expected)
    assert not [key for key in expected if not torch.equal(found[key], expected[key])]


# --- created after loading -------------------------------------------------------------------


@each_kind
def test_what_is_added_to_a_loaded_model_holds_the_values_of_its_initialisation(
    kind: str, plain: dict[str, str]
) -> None:
    model = LOADERS[kind].from_pretrained(plain["float32"])
    for name, config in METHODS.items():
        model.add_adapter(name, config)
    if kind == "flexible":
        model.add_classification_head("head", num_labels=3)
        model.add_masked_lm_head("lm")
    own = {n: p for n, p in model.named_parameters() if n.startswith(("adapters.", "heads."))}
    assert own
    for name, parameter in own.items():
        assert parameter.device.type == "cpu", name
        assert torch.isfinite(parameter).all(), name
        assert parameter.abs().max() < 5, name
    part = model.adapters["parallel"].get_submodule("layers.1.feed_forward")
    assert (part.up.weight == 0).all()  # "mam_adapter"
    assert (part.up.bias == 0).all()
    assert part.down.weight.abs().max() > 0
    assert part.scaling.tolist() == [1.0]
    part = model.adapters["pfeiffer"].get_submodule("layers.0.feed_forward")
    assert 0.005 < part.down.weight.std() < 0.05  # "bert"
    assert (part.up.weight == 0).all()
    assert (part.up.bias == 0).all()
    part = model.adapters["adapterplus"].get_submodule("layers.0.feed_forward")
    assert (part.scaling == 1).all()
    assert 0 < part.down.weight.abs().max() <= 0.02  # "houlsby"
    part = model.adapters["lora"].get_submodule("layers.0.query")
    assert (part.lora_B == 0).all()
    assert part.lora_A.std() > 0.05
    assert torch.equal(
        tiny_output(
            model, adapter_names="lora", **({"head": "head"} if kind == "flexible" else {})
        ),
        tiny_output(model, **({"head": "head"} if kind == "flexible" else {})),
    )


@each_kind
@pytest.mark.parametrize("source", ["float32", "bfloat16"])
def test_adapters_and_heads_have_the_dtype_of_the_loaded_model(
    kind: str, source: str, plain: dict[str, str], tmp_path: Path
) -> None:
    dtype = getattr(torch, source)
    model = LOADERS[kind].from_pretrained(plain[source], dtype=dtype)
    if kind == "flexible":
        model.add_classification_head("head", num_labels=3)
    for name, config in METHODS.items():
        model.add_adapter(name, config)
        randomise(model.adapters[name], std=0.2)
    assert {p.dtype for p in model.parameters()} == {dtype}
    for name in METHODS:
        found = tiny_output(model, adapter_names=name)
        assert found.dtype == dtype
        assert torch.isfinite(found).all()
    model.save_pretrained(tmp_path)
    again = LOADERS[kind].from_pretrained(tmp_path, dtype=dtype)
    assert {p.dtype for p in again.parameters()} == {dtype}
    assert_same(again.state_dict(), model.state_dict())
    moved = again.to(torch.float64)
    moved.add_adapter("later", "lora")
    assert {p.dtype for p in moved.parameters()} == {torch.float64}


@each_kind
@pytest.mark.parametrize("training", [False, True])
def test_what_is_added_is_in_the_mode_of_the_model(kind: str, training: bool) -> None:
    model = build(kind).train(training)
    model.add_adapter("later", flexheads.LoRAConfig(dropout=0.5))
    if kind == "flexible":
        model.add_tagging_head("later")
    assert {module.training for module in model.modules()} == {training}
    if not training:
        randomise(model.adapters["later"], std=0.5)
        names = {"adapter_names": "later"}
        assert torch.equal(tiny_output(model, **names), tiny_output(model, **names))


@each_kind
def test_adapters_lie_on_the_device_of_the_layer_they_sit_at(kind: str) -> None:
    model = build(kind)
    model.bert.encoder.layer[1].to("meta")  # as good as another device, for where things lie
    model.bert.pooler.to("meta")
    for name, config in METHODS.items():
        model.add_adapter(f"new_{name}", config)
        for address, part in model.adapters[f"new_{name}"].parts.items():
            expected = "meta" if address.startswith("layers.1.") else "cpu"
            assert {p.device.type for p in part.parameters()} == {expected}, address
    if kind == "flexible":
        model.add_classification_head("new", num_labels=3)  # behind the last layer
        assert {p.device.type for p in model.heads["new"].parameters()} == {"meta"}


# --- whole models ----------------------------------------------------------------------------


def test_a_saved_model_comes_back_with_every_value(saved: tuple[str, Any, Path]) -> None:
    kind, model, directory = saved
    again = LOADERS[kind].from_pretrained(directory)
    assert_same(again.state_dict(), model.state_dict())
    assert again.adapters.keys() == model.adapters.keys()
    assert again.active_adapters == model.active_adapters
    assert torch.equal(tiny_output(again), tiny_output(model))
    for name in METHODS:
        assert torch.equal(
            tiny_output(again, adapter_names=name), tiny_output(model, adapter_names=name)
        )
    assert not again.training
    assert not any(module.training for module in again.modules())


def test_the_classes_own_from_pretrained_restores_too(saved: tuple[str, Any, Path]) -> None:
    _, model, directory = saved
    again, info = type(model).from_pretrained(directory, output_loading_info=True)
    assert type(again) is type(model)
    assert_same(again.state_dict(), model.state_dict())
    assert not info["missing_keys"]


def test_the_backbone_loads_bit_equal_into_the_plain_class(saved: tuple[str, Any, Path]) -> None:
    _, model, directory = saved
    for cls in (transformers.BertModel, transformers.AutoModel):
        plain_model = cls.from_pretrained(directory)
        assert type(plain_model) is transformers.BertModel
        assert_same(plain_model.state_dict(), model.bert.state_dict())


def test_a_saved_static_model_loads_bit_equal_into_its_plain_class(
    saved: tuple[str, Any, Path],
) -> None:
    kind, model, directory = saved
    if kind == "flexible":
        pytest.skip("has no static head")
    plain_model = transformers.BertForSequenceClassification.from_pretrained(directory)
    assert torch.equal(tiny_output(plain_model), tiny_output(model, adapter_names=[]))


def test_parameters_are_saved_under_their_own_names(saved: tuple[str, Any, Path]) -> None:
    _, model, directory = saved
    files = list(directory.glob("*.safetensors"))
    assert [file.name for file in files] == ["model.safetensors"]
    written, state = load_file(files[0]), model.state_dict()
    assert written.keys() == state.keys()
    assert not [key for key in state if not torch.equal(written[key], state[key])]


def test_a_model_directory_holds_no_adapter_config(saved: tuple[str, Any, Path]) -> None:
    _, _, directory = saved
    assert not (directory / "adapter_config.json").exists()
    assert {file.name for file in directory.iterdir()} <= {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }
    assert "flexheads" in json.loads((directory / "config.json").read_text())


@each_kind
def test_saving_an_adapter_beside_a_whole_model_is_refused(kind: str, tmp_path: Path) -> None:
    model = build(kind)
    model.save_pretrained(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(CheckpointError, match="directory of its own"):
        model.save_adapter(tmp_path, "lora")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    model.save_adapter(tmp_path / "lora", "lora")
    assert torch.equal(tiny_output(LOADERS[kind].from_pretrained(tmp_path)), tiny_output(model))
    transformers.AutoModel.from_pretrained(tmp_path)


@each_kind
def test_a_sharded_model_comes_back(kind: str, tmp_path: Path) -> None:
    model = build(kind)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = list(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 3
    again = LOADERS[kind].from_pretrained(tmp_path)
    assert_same(again.state_dict(), model.state_dict())
    assert torch.equal(tiny_output(again), tiny_output(model))
    assert_same(
        transformers.BertModel.from_pretrained(tmp_path).state_dict(), model.bert.state_dict()
    )


@each_kind
def test_a_saved_configuration_says_nothing_of_ours_once_adapters_are_gone(
    kind: str, tmp_path: Path
) -> None:
    model = build(kind)
    model.save_pretrained(tmp_path)
    assert not hasattr(model.config, "flexheads")
    for name in METHODS:
        model.delete_adapter(name)
    model.save_pretrained(tmp_path)
    again = LOADERS[kind].from_pretrained(tmp_path)
    assert len(again.adapters) == 0
    assert_same(again.state_dict(), model.state_dict())


# --- transformers' own methods for PEFT ------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`", "ignore:Adapter theirs was")
@each_kind
def test_transformers_own_adapter_methods_still_work(kind: str) -> None:
    peft = pytest.importorskip("peft")
    ours = {name: tiny_output(build(kind), adapter_names=name) for name in METHODS}
    model = build(kind)
    tensors = {name: adapter.state_dict() for name, adapter in model.adapters.items()}
    for name in METHODS:
        model.delete_adapter(name)
    bare = tiny_output(model)
    settings = {"r": 4, "init_lora_weights": False}
    model.add_adapter(peft.LoraConfig(target_modules=["query"], **settings), "theirs")
    model.add_adapter(
        adapter_config=peft.LoraConfig(target_modules=["value"], **settings), adapter_name="more"
    )
    assert set(model.peft_config) == {"theirs", "more"}
    assert len(model.adapters) == 0
    model.set_adapter("theirs")
    with_theirs = tiny_output(model)
    assert not torch.equal(with_theirs, bare)
    for name, config in METHODS.items():
        model.add_adapter(name, config)
        model.adapters[name].load_state_dict(tensors[name])
        assert not torch.equal(tiny_output(model, adapter_names=name), with_theirs)
    model.disable_adapters()
    assert torch.equal(tiny_output(model), bare)
    for name in METHODS:
        assert torch.equal(tiny_output(model, adapter_names=name), ours[name])
    model.enable_adapters()
    assert len(model.get_adapter_state_dict("theirs")) == 4
    for name in ("theirs", "more"):
        model.delete_adapter(name)
    for name in METHODS:
        assert torch.equal(tiny_output(model, adapter_names=name), ours[name])


@each_kind
def test_peft_is_kept_from_changing_adapters_that_are_there(kind: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = build(kind)
    before, keys = tiny_output(model), list(model.state_dict())
    config = peft.LoraConfig(target_modules="all-linear")
    for call in (
        lambda: model.add_adapter(config, "theirs"),
        lambda: model.add_adapter(adapter_config=config, adapter_name="theirs"),
        lambda: model.load_adapter(str(tmp_path), adapter_name="theirs"),
        lambda: model.load_adapter(peft_model_id=str(tmp_path)),
    ):
        with pytest.raises(UnsupportedError, match="Add those of PEFT first"):
            call()
    assert list(model.state_dict()) == keys
    assert torch.equal(tiny_output(model), before)


@each_kind
def test_a_whole_model_with_adapters_of_peft_is_not_saved_in_part(
    kind: str, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    model = randomise(tiny_model("bert"), std=0.1) if kind == "flexible" else None
    if model is None:
        model = flexheads.init(tiny_static("BertForSequenceClassification", num_labels=3))
    model.add_adapter(peft.LoraConfig(target_modules=["query"]), "theirs")
    model.add_adapter("lora", "lora")
    with pytest.raises(UnsupportedError, match="save_adapter"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    model.save_adapter(tmp_path / "lora", "lora")


def test_transformers_own_load_adapter_still_works(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    theirs = tiny_static("BertForSequenceClassification", num_labels=3)
    theirs.add_adapter(
        peft.LoraConfig(target_modules=["query"], init_lora_weights=False), "default"
    )
    theirs.save_pretrained(tmp_path)
    for call in (
        {"adapter_name_or_path": str(tmp_path), "adapter_name": "x"},
        {"peft_model_id": str(tmp_path)},
    ):
        model = flexheads.init(tiny_static("BertForSequenceClassification", num_labels=3))
        model.load_adapter(**call)
        assert torch.equal(tiny_output(model), tiny_output(theirs))
        assert len(model.adapters) == 0
