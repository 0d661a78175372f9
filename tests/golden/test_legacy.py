"""Folders that the ancestor's releases wrote: the same outputs, static heads and converted ones."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

import flexheads
from flexheads.plugins import registry

from .common import MARKS, assert_close, assert_tensor_close, call, chosen, read_json
from .legacy import Legacy, all_legacy

pytestmark = MARKS

LEGACY = [case for case in all_legacy() if case.left_out() is None]
STATIC = [case for case in LEGACY if case.folder.name.startswith("static_")]


@pytest.mark.parametrize("case", LEGACY, ids=lambda case: case.name)
def test_legacy(case: Legacy) -> None:
    inputs, expected = case.recorded()
    model = case.static() if case in STATIC else case.flexible()
    expected = expected if case in STATIC else case.unscaled(model, expected)
    assert_close(chosen(call(model, inputs), expected), expected)


@pytest.mark.parametrize(
    "case", [c for c in all_legacy() if c.left_out() == "whole model"], ids=lambda case: case.name
)
def test_legacy_whole_model(case: Legacy) -> None:
    """Every tensor of adapters and heads in the file finds its place, with its values."""
    model = flexheads.AutoModelWithHeads.from_pretrained(str(case.folder))
    content = torch.load(case.folder / "pytorch_model.bin", weights_only=True)
    described = read_json(case.folder / "config.json")
    assert list(model.adapters) == list(described["adapters"]["adapters"])
    assert list(model.heads) == list(described["prediction_heads"])
    for name in model.adapters:
        layers = [t for k, t in content.items() if f"adapters.{name}." in k]
        assert total(model.adapters[name].state_dict().values()) == pytest.approx(total(layers))
        own = [t for k, t in content.items() if k.startswith(f"heads.{name}.")]
        assert total(model.heads[name].state_dict().values()) == pytest.approx(total(own))


def total(tensors: Iterable[Tensor]) -> float:
    return sum(tensor.double().abs().sum().item() for tensor in tensors)


@pytest.mark.parametrize("case", STATIC, ids=lambda case: case.name)
def test_legacy_static_head_becomes_flexible(case: Legacy) -> None:
    """The converted heads give what the static class gives, also where that release refused."""
    inputs, expected = case.recorded()
    static, model = case.static(), case.flexible()
    rules = registry().conversion(case.head["model_class"]).heads
    assert len(model.heads) == len(rules)
    whole = call(static, inputs)
    for rule in rules:
        output = call(model, inputs, head=model.adapters.keys()[0] + rule.suffix)
        fields = [rule.output, "end_logits"] if rule.output == "start_logits" else [rule.output]
        for field in fields:
            own = output[field if field in output else "logits"]
            assert_tensor_close(own, whole[field], field)
            if field in expected:
                assert_tensor_close(own, expected[field], field)


@pytest.mark.parametrize(
    "case", [c for c in STATIC if (c.folder / "converted.pt").is_file()], ids=lambda c: c.name
)
def test_legacy_conversion(case: Legacy) -> None:
    """Our conversion gives the outputs and the configuration of that release's own."""
    inputs, expected = case.recorded("converted.pt")
    model = case.flexible()
    assert_close(chosen(call(model, inputs), expected), expected)
    theirs = torch.load(case.folder / "converted.pt", weights_only=True)["head_config"]
    ours = model.heads[model.active_head].to_dict()
    differing = {k: (v, ours[k]) for k, v in theirs.items() if k in ours and ours[k] != v}
    if ours["head_type"] == "multiple_choice":
        # That release took the label names of the static class, by default two, for the choices.
        # Ours reads the number of choices off each input.
        differing.pop("num_choices", None)
        differing.pop("label2id", None)
    assert not differing
