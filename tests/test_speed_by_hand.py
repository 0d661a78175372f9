"""benchmarks/speed: what is written by hand computes what flexheads computes, in training too."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import BertConfig, LlamaConfig

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.speed import (
    by_hand_files,
    compiled,
    library,
    probe,
    side_flexheads,
    training,
    works,
)
from benchmarks.speed.probe import Probe, hidden, inference

sys.path.pop(0)

SMALL = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4}
TINY = {
    "bert": lambda: BertConfig(**SMALL, intermediate_size=96),
    "decoder": lambda: LlamaConfig(**SMALL, num_key_value_heads=2, intermediate_size=96),
}
WITH_FLOOR = [key for key in works.SETUPS if key not in ("attached", "inactive")]
TRAINED = ("training", "training_half", "training_lora")


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "MODELS", TINY)


def tiny(model: str = "bert") -> Probe:
    return Probe(model, many=(32, 3), train=(2, 5), keep=(2, 6), small=(2, 5))


@pytest.mark.parametrize("key", WITH_FLOOR)
@pytest.mark.parametrize("model", TINY)
def test_by_hand_is_the_same_and_not_the_bare_backbone(
    model: str, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if model == "decoder" and key == "prefix_tuning":
        pytest.skip("there is none by hand")
    one = works.one  # a hundred adapters take long, and two show the same
    monkeypatch.setattr(works, "one", lambda own, how, by, n=1: one(own, how, by, min(n, 2)))
    own = tiny(model)
    trials = works.forward(own, key)
    with inference():
        bare, floor = hidden(trials["floor"].reference()), hidden(trials["floor"].call())
        assert (bare - floor).abs().max() > 1e-3
        torch.testing.assert_close(hidden(trials["flexheads"].call()), floor, rtol=1e-4, atol=1e-4)


def test_a_difference_is_noticed() -> None:
    own = tiny()
    inputs = own.inputs()
    with pytest.raises(AssertionError):
        works.same(own, lambda: own.bare(**inputs), lambda: [own.bare(**inputs)[0] * 1.001])


@pytest.mark.parametrize("key", ["parallel", "heads"])
def test_by_hand_is_the_same_for_many_at_once(key: str) -> None:
    assert set(works.TRIALS[key](tiny(), key)) == {"flexheads", "floor"}


@pytest.mark.parametrize("key", TRAINED)
def test_by_hand_learns_the_same(key: str) -> None:
    own = tiny()
    found = side_flexheads.MEASURES[key](own, key, 1)  # compares the gradients
    assert set(found) == {"flexheads", "floor"}


def test_training_a_fusion_is_measured() -> None:
    found = side_flexheads.MEASURES["training_fuse"](tiny(), "training_fuse", 1)
    assert found["flexheads"].value > 0


def test_tasks_of_rows_have_a_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_compiled", lambda model, given: partial(model, **given))
    own = tiny()
    trials = compiled.trials_of(own, compiled.by_task(own))  # compares the numbers
    assert set(trials) == {"flexheads", "floor"}
    with inference():
        bare, floor = hidden(trials["floor"].reference()), hidden(trials["floor"].call())
    assert (bare - floor).abs().max() > 1e-3


def test_other_gradients_are_noticed() -> None:
    own = tiny()
    model = library.trained(side_flexheads.OURS, own, "seq_bn")
    backbone = side_flexheads.by_hand_training(own, model, "seq_bn")
    with torch.no_grad():
        for parameter in model.adapters.parameters():
            parameter.add_(0.1)
    with pytest.raises(AssertionError):
        side_flexheads.same_gradients(own, model, backbone)


def test_kept_activations_are_counted_once_and_without_parameters() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(256, 256, bias=False)

        def forward(self, given: torch.Tensor) -> list[torch.Tensor]:
            return [self.linear(given).sigmoid()]

    given = torch.randn(8, 128, 256)
    # The input, what sigmoid gives, and the loss's own exponentials of the last token.
    assert training.kept(Model(), {"given": given}) == (2 * 8 * 128 + 8) * 256 * 4 / 2**20


def test_less_is_kept_where_adapters_are_in_the_upper_half_only() -> None:
    own = tiny()
    sizes = {
        key: side_flexheads.MEASURES[key](own, key, 1) for key in ("kept_full", "kept", "kept_half")
    }
    full = sizes["kept_full"]["bare"].value
    assert full > sizes["kept"]["flexheads"].value > sizes["kept_half"]["flexheads"].value > 0
    assert sizes["kept"]["floor"].value < sizes["kept"]["flexheads"].value


@pytest.mark.parametrize("key", ["add", "load", "save", "switch"])
def test_managing_is_measured(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "MANY", 6)
    monkeypatch.setattr(library, "FILES", 3)
    monkeypatch.setattr(by_hand_files, "FILES", 3)
    found = side_flexheads.MEASURES[key](tiny(), key, 1)
    assert set(found) == ({"flexheads"} if key == "switch" else {"flexheads", "floor"})


def test_from_pretrained_is_measured() -> None:
    found = side_flexheads.MEASURES["from_pretrained"](tiny(), "from_pretrained", 2)
    assert found["flexheads"].repeats == 2
    assert found["flexheads"].value > 0.5
