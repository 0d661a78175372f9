"""The page on whole models: everything comes back, in order; and any string is a name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import flexheads
from flexheads import (
    AutoModelWithHeads,
    BatchSplit,
    BertModelWithHeads,
    LoRAConfig,
    Parallel,
    Rows,
    Stack,
)
from flexheads.errors import CheckpointError, UnsupportedError
from flexheads.testing import randomise, tiny_inputs, tiny_static

# Sorting any of these would change their order.
ORDER = ("z", "a", "m")
NAMES = (
    "mrpc",
    "mrpc2",
    "a.b",
    "score",
    "",
    "keys",
    "training",
    "a/b",
    "..",
    "ünïcode",
    "100%",
    "embeddings",
    "heads",
    "adapters",
    "bert",
    "weight",
    "kind",
    "loss",
    "_modules",
    "%",
    "%keys",
    "a%2Eb",
    " a b ",
    "LayerNorm.gamma",
    "None",
    "line\nbreak",
    '"',
)

each_name = pytest.mark.parametrize("name", NAMES, ids=ascii)


def full(directory: str) -> Any:
    """A model with several adapters and heads of several kinds, all random."""
    model = BertModelWithHeads.from_pretrained(directory)
    model.add_classification_head("z", id2label={0: "yes", 1: "no", 2: "maybe"})
    model.add_tagging_head("a", num_labels=5)
    model.add_classification_head("m", num_labels=4, multilabel=True, use_pooler=True)
    model.add_masked_lm_head("lm")
    model.add_qa_head("b")
    model.add_adapter("z", config="houlsby[reduction_factor=4]")
    model.add_adapter("a", config=LoRAConfig(r=3, alpha=7))
    model.add_adapter("m", config="pfeiffer+inv")
    for number, module in enumerate((*model.adapters.values(), *model.heads.values())):
        randomise(module, std=0.2, seed=number)
    model.active_head = None
    return model


@torch.no_grad()
def said(model: Any) -> list[Tensor]:
    """Every tensor that a default call gives."""
    output = model(**tiny_inputs(model.config, batch=4))
    outputs = output.ordered if isinstance(output, flexheads.MultiHeadOutput) else [output]
    return [tensor for o in outputs for tensor in o.to_tuple() if isinstance(tensor, Tensor)]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(map(torch.equal, left, right))


def settings(model: Any) -> dict[str, Any]:
    """What the configuration says to readers, in order."""
    config = model.config
    return {
        "adapters": [(name, fields) for name, fields in config.adapters.items()],
        "heads": [(name, fields) for name, fields in config.prediction_heads.items()],
        "labels": (config.id2label, config.label2id, config.num_labels),
    }


ACTIVE: dict[str, tuple[Any, Any]] = {
    "nothing": (None, None),
    "adapter and head": ("z", "z"),
    "adapter and another head": ("z", "a"),
    "head alone": (None, "m"),
    "adapter alone": ("m", []),
    "several heads": ("z", ["m", "z", "lm"]),
    "stack": (Stack("m", "z"), "z"),
    "parallel": (Parallel("z", "a"), ...),
    "parallel with a stack": (Parallel(Stack("a", "z"), "m"), ...),
    "batch split": (BatchSplit("z", "m", batch_sizes=[1, 3]), ...),
    "rows": (Rows(["z", None, ["a", "m"], "z"]), ...),
    "one head for all branches": (Parallel("z", "a"), "m"),
}


@pytest.mark.parametrize("case", ACTIVE)
@pytest.mark.parametrize("auto", [BertModelWithHeads, AutoModelWithHeads])
def test_the_whole_model_comes_back(
    case: str, auto: Any, backbone_dir: str, tmp_path: Path, hashed: Callable
) -> None:
    model = full(backbone_dir)
    setup, head = ACTIVE[case]
    model.set_active_adapters(setup)
    if head is not ...:
        model.active_head = head
    model.save_pretrained(tmp_path)
    again = auto.from_pretrained(tmp_path)

    assert type(again) is BertModelWithHeads
    assert not again.training
    assert tuple(again.adapters) == ORDER
    assert tuple(again.heads) == (*ORDER, "lm", "b")
    assert again.active_adapters == model.active_adapters
    assert again.active_head == model.active_head
    assert settings(again) == settings(model)
    assert [n for n, _ in settings(again)["adapters"]] == list(ORDER)
    assert [n for n, _ in settings(again)["heads"]] == [*ORDER, "lm", "b"]
    for name in again.heads:
        assert again.heads[name].config == model.heads[name].config
        assert type(again.heads[name]) is type(model.heads[name])
    assert again.get_labels("z") == ["yes", "no", "maybe"]
    for name in again.adapters:
        assert again.adapters[name].config == model.adapters[name].config
    states = [{k: hashed(t) for k, t in m.state_dict().items()} for m in (model, again)]
    assert list(states[0]) == list(states[1])
    assert states[0] == states[1]
    assert same(said(again), said(model))
    assert not hasattr(again.config, "flexheads"), "what was read from the file is used up"

    again.save_pretrained(tmp_path / "again")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / file).read_bytes()


def test_saving_leaves_the_model_as_it_is(
    backbone_dir: str, tmp_path: Path, snapshot: Callable
) -> None:
    model = full(backbone_dir)
    model.set_active_adapters(Parallel("z", "a"))
    model.save_pretrained(tmp_path)  # sets architectures and the like, as for any model
    before = snapshot(model)
    model.save_pretrained(tmp_path)
    assert snapshot(model) == before


def test_the_saved_backbone_loads_as_a_plain_one(backbone_dir: str, tmp_path: Path) -> None:
    model = full(backbone_dir)
    model.set_active_adapters("z")
    model.save_pretrained(tmp_path)
    original = transformers.BertModel.from_pretrained(backbone_dir)
    for loaded in (
        transformers.BertModel.from_pretrained(tmp_path),
        transformers.AutoModel.from_pretrained(tmp_path),
        transformers.BertForSequenceClassification.from_pretrained(tmp_path).bert,
    ):
        assert type(loaded) is transformers.BertModel
        state = loaded.state_dict()
        assert list(state) == list(original.state_dict())
        assert all(torch.equal(state[key], t) for key, t in original.state_dict().items())


def test_the_saved_configuration_tells(backbone_dir: str, tmp_path: Path) -> None:
    full(backbone_dir).save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert set(config.adapters) == set(ORDER)
    assert config.adapters["a"]["architecture"] == "lora"
    assert config.adapters["a"]["r"] == 3
    assert set(config.prediction_heads) == {*ORDER, "lm", "b"}
    assert config.prediction_heads["a"]["head_type"] == "tagging"
    content = json.loads((tmp_path / "config.json").read_text("utf-8"))
    assert content["architectures"] == ["BertModelWithHeads"]
    assert content["model_type"] == "bert"


def test_shards_and_dtypes(backbone_dir: str, tmp_path: Path) -> None:
    model = full(backbone_dir)
    model.set_active_adapters("z")
    model.save_pretrained(tmp_path / "shards", max_shard_size="30KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    again = BertModelWithHeads.from_pretrained(tmp_path / "shards")
    assert same(said(again), said(model))
    model.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    again = BertModelWithHeads.from_pretrained(tmp_path / "half", dtype=torch.bfloat16)
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    assert same(said(again), said(model))
    again = BertModelWithHeads.from_pretrained(tmp_path / "shards", dtype=torch.float16)
    assert {p.dtype for p in again.parameters()} == {torch.float16}


def test_a_merged_adapter_is_refused(backbone_dir: str, tmp_path: Path) -> None:
    model = full(backbone_dir)
    model.merge_adapter("a")
    with pytest.raises(UnsupportedError, match=r"'a' is merged.*reset_adapter"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    model.reset_adapter()
    model.save_pretrained(tmp_path / "model")
    again = BertModelWithHeads.from_pretrained(tmp_path / "model")
    assert all(torch.equal(t, again.state_dict()[k]) for k, t in model.state_dict().items())


def test_a_static_model_comes_back_whole(tmp_path: Path) -> None:
    model = flexheads.init(tiny_static("BertForSequenceClassification", num_labels=3))
    for number, name in enumerate(ORDER):
        model.add_adapter(name, config="lora" if number else "houlsby")
        randomise(model.adapters[name], std=0.2, seed=number)
    model.set_active_adapters(Stack("z", "m"))
    model.save_pretrained(tmp_path)
    again = flexheads.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(again).__name__ == "BertForSequenceClassification"
    assert tuple(again.adapters) == tuple(again.config.adapters) == ORDER
    assert again.active_adapters == Stack("z", "m")
    assert same(said(again), said(model))
    plain = transformers.BertForSequenceClassification.from_pretrained(tmp_path)
    model.set_active_adapters(None)
    assert same(said(plain), said(model))


def test_a_model_with_heads_passes_through_a_static_class(
    backbone_dir: str, tmp_path: Path
) -> None:
    """Its heads have no place there and go; its adapters stay."""
    model = full(backbone_dir)
    model.set_active_adapters("z")
    model.save_pretrained(tmp_path / "flexible")
    static = flexheads.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "flexible", num_labels=3
    )
    assert tuple(static.adapters) == ORDER
    assert static.active_adapters == Stack("z")
    static.save_pretrained(tmp_path / "static")
    again = AutoModelWithHeads.from_pretrained(tmp_path / "static")
    assert (tuple(again.adapters), tuple(again.heads)) == (ORDER, ())
    assert (again.active_adapters, again.active_head) == (Stack("z"), None)
    assert same(said(again), list(model(**tiny_inputs(model.config, batch=4), head=[])[:2]))


def test_missing_tensors_of_a_whole_model_are_named(backbone_dir: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    full(backbone_dir).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for start in ("adapters.a.", "heads.b."):
        gone = next(key for key in tensors if key.startswith(start))
        left = {k: t for k, t in tensors.items() if k != gone}
        save_file(left, tmp_path / "model.safetensors", metadata={"format": "pt"})
        name = gone.split(".")[1]
        with pytest.raises(CheckpointError, match=rf"(adapter|head) '{name}'.*is missing"):
            BertModelWithHeads.from_pretrained(tmp_path)


# --- any string is a name --------------------------------------------------------------------


def named(directory: str, *names: str) -> Any:
    """A model with adapter and head of each name, no two alike."""
    model = BertModelWithHeads.from_pretrained(directory)
    for number, name in enumerate(names):
        model.add_adapter(name, config="pfeiffer")
        model.add_classification_head(name, num_labels=2 + number)
        randomise(model.adapters[name], std=0.2, seed=2 * number)
        randomise(model.heads[name], std=0.2, seed=2 * number + 1)
    return model


@torch.no_grad()
def logits(model: Any, name: str) -> Tensor:
    return model(**tiny_inputs(model.config), adapter_names=name, head=name).logits


@each_name
def test_any_string_names_an_adapter_and_a_head(
    name: str, backbone_dir: str, tmp_path: Path, snapshot: Callable
) -> None:
    model = named(backbone_dir, name)
    assert (list(model.adapters), list(model.heads)) == ([name], [name])
    assert (list(model.config.adapters), model.active_head) == ([name], name)
    assert model.get_labels(name) == ["LABEL_0", "LABEL_1"]
    model.train()
    model.eval()
    expected = logits(model, name)
    model.set_active_adapters(name)
    assert (model.active_adapters, model.active_head) == (Stack(name), name)
    assert torch.equal(model(**tiny_inputs(model.config)).logits, expected)
    assert all(model.get_parameter(key) is p for key, p in model.named_parameters())
    assert all(model.get_submodule(key) is m for key, m in model.named_modules())
    model.train_adapter(name)
    assert sum(p.requires_grad for p in model.parameters()) == 8 + 4

    model.save_adapter(tmp_path / "adapter", name)
    model.save_head(tmp_path / "head", name)
    again = BertModelWithHeads.from_pretrained(backbone_dir)
    before = snapshot(again)
    assert again.load_adapter(tmp_path / "adapter", set_active=True) == name
    assert (again.active_adapters, again.active_head) == (Stack(name), name)
    assert torch.equal(logits(again, name), expected)
    again.delete_head(name)
    again.delete_adapter(name)
    again.config.id2label = {0: "LABEL_0", 1: "LABEL_1"}
    assert snapshot(again) == before
    assert again.load_head(tmp_path / "head") == name
    again.load_adapter(tmp_path / "adapter", with_head=False)
    assert torch.equal(logits(again, name), expected)
    again.load_adapter(tmp_path / "adapter", load_as=f"{name}2")
    again.load_adapter(tmp_path / "adapter", load_as="plain")
    for other in (name, f"{name}2", "plain"):
        assert torch.equal(logits(again, other), expected)
    again.save_adapter(tmp_path / "plain", "plain")
    assert again.load_adapter(tmp_path / "plain", load_as=name, overwrite_ok=True) == name
    assert torch.equal(logits(again, name), expected)

    again.set_active_adapters(name)
    again.save_pretrained(tmp_path / "whole")
    whole = BertModelWithHeads.from_pretrained(tmp_path / "whole")
    assert (list(whole.adapters), list(whole.heads)) == (list(again.adapters), list(again.heads))
    assert (whole.active_adapters, whole.active_head) == (Stack(name), name)
    assert torch.equal(whole(**tiny_inputs(whole.config)).logits, expected)


@each_name
def test_any_string_names_an_adapter_of_a_static_model(name: str, tmp_path: Path) -> None:
    model = flexheads.init(tiny_static("BertForSequenceClassification"))
    bare = said(model)
    model.add_adapter(name, config="lora")
    randomise(model.adapters[name], std=0.2)
    model.set_active_adapters(name)
    expected = said(model)
    assert not same(bare, expected)
    model.save_adapter(tmp_path / "adapter", name)
    model.save_pretrained(tmp_path / "whole")
    again = flexheads.AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole")
    assert same(said(again), expected)
    again.delete_adapter(name)
    assert same(said(again), bare)
    assert again.load_adapter(tmp_path / "adapter", set_active=True) == name
    assert same(said(again), expected)
    flexible = BertModelWithHeads.from_pretrained(tmp_path / "whole")
    flexible.load_adapter(tmp_path / "adapter", load_as="flexible")
    found = flexible(**tiny_inputs(flexible.config, batch=4), adapter_names=name, head="flexible")
    torch.testing.assert_close(found.logits, expected[0], rtol=0, atol=1e-6)


def test_all_names_live_side_by_side(backbone_dir: str, tmp_path: Path) -> None:
    model = named(backbone_dir, *NAMES)
    keys = [key.split(".")[:2] for key in model.state_dict() if not key.startswith("bert.")]
    assert len({tuple(key) for key in keys}) == 2 * len(NAMES)
    expected = {name: logits(model, name) for name in NAMES}
    assert [value.shape[1] for value in expected.values()] == [2 + n for n in range(len(NAMES))]
    model.save_pretrained(tmp_path / "whole")
    whole = BertModelWithHeads.from_pretrained(tmp_path / "whole")
    assert tuple(whole.adapters) == tuple(whole.heads) == NAMES
    assert all(torch.equal(logits(whole, name), expected[name]) for name in NAMES)

    others = list(NAMES)
    for number, name in enumerate(NAMES):
        model.save_adapter(tmp_path / str(number), name)
        model.delete_adapter(name)
        model.delete_head(name)
        others.remove(name)
        assert list(model.adapters) == list(model.heads) == others
        model.load_adapter(tmp_path / str(number))
        others.append(name)
        assert list(model.adapters) == list(model.heads) == others
    assert all(torch.equal(logits(model, name), expected[name]) for name in NAMES)
