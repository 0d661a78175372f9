"""LN tuning: its definition, and the same numbers as PEFT on the same weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import flexheads
from flexheads import LNTuningConfig
from flexheads.errors import ConfigError
from flexheads.methods.ln_tuning import OwnNorm
from flexheads.testing import randomise, tiny_inputs, tiny_model, tiny_static

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

# PEFT asks transformers 5.23 by an old name.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),  # PEFT, of norms
]


def logits_of(model: Any) -> Tensor:
    return model(**tiny_inputs(model.config)).logits


def tuned(**fields: Any) -> Any:
    model = flexheads.init(tiny_static("BertForSequenceClassification", **NO_DROPOUT))
    model.add_adapter("a", config=LNTuningConfig(**fields), set_active=True)
    return model


def test_the_same_as_peft() -> None:
    peft = pytest.importorskip("peft")
    base = tiny_static("BertForSequenceClassification", **NO_DROPOUT)
    theirs = peft.get_peft_model(
        copy.deepcopy(base), peft.LNTuningConfig(target_modules=["LayerNorm"])
    )
    ours = tuned()
    randomise(ours.adapters["a"])
    paths, same = ours._attachment.paths(), {}
    for address, part in ours.adapters["a"].parts.items():
        layer = theirs.get_submodule(f"base_model.model.bert.{paths[address]}")
        same |= {getattr(layer.ln_tuning_layers["default"], n): p for n, p in nn_of(part).items()}
    assert len(same) == 2 * 5 == sum(p.requires_grad for p in theirs.parameters())
    with torch.no_grad():
        for other, parameter in same.items():
            other.copy_(parameter)
    ours.train_adapter("a")
    outputs = [logits_of(model) for model in (ours, theirs)]
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=0)
    weights = torch.linspace(-1, 2, outputs[0].numel()).view_as(outputs[0])
    for output in outputs:
        (output * weights).sum().backward()
    for other, parameter in same.items():
        assert parameter.grad.abs().max() > 0
        torch.testing.assert_close(parameter.grad, other.grad, atol=1e-5, rtol=0)
    ours.merge_adapter("a")
    assert torch.equal(logits_of(ours), outputs[0])


def nn_of(part: OwnNorm) -> dict[str, nn.Parameter]:
    return dict(part.norm.named_parameters())


def test_by_its_definition() -> None:
    model = tuned(outside=False, leave_out=(0,))
    adapter = randomise(model.adapters["a"])
    assert list(adapter.parts) == ["layers.1.norms.0", "layers.1.norms.1"]
    host, own = model.bert.encoder.layer[1].output.LayerNorm, adapter.parts["layers.1.norms.1"].norm
    hidden = torch.randn(2, 5, 32)
    expected = functional.layer_norm(hidden, (32,), own.weight, own.bias, host.eps)
    torch.testing.assert_close(host(hidden), expected, atol=1e-6, rtol=0)


class Rms(nn.Module):
    """A norm as many models have it: no bias, a weight around zero, an epsilon."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.randn(size)), eps

    def forward(self, hidden: Tensor) -> Tensor:
        variance = hidden.pow(2).mean(-1, keepdim=True)
        return hidden * torch.rsqrt(variance + self.eps) * (1.0 + self.weight)


def test_norms_of_any_class_are_copied_without_their_hooks() -> None:
    host = Rms(8, eps=0.3)
    called = []
    host.register_forward_hook(lambda *_: called.append(1))
    host.register_forward_pre_hook(lambda *_: called.append(2), with_kwargs=False)
    host.requires_grad_(False)
    part, hidden = OwnNorm(host), torch.randn(2, 3, 8)
    assert torch.equal(part(hidden, hidden), host.forward(hidden))
    assert not called
    assert part.norm.weight is not host.weight
    assert part.norm.weight.requires_grad


@pytest.mark.parametrize("active", [False, True])
def test_the_copy_of_a_model_is_independent(active: bool) -> None:
    model = tuned()
    if not active:
        model.set_active_adapters(None)
    before = logits_of(model)
    copied = copy.deepcopy(model)
    randomise(copied.adapters["a"])
    assert torch.equal(logits_of(model), before)
    assert torch.equal(logits_of(copied), before) is not active


def test_identity_at_the_start_and_again_after_removal() -> None:
    model = tuned()
    before = model(**tiny_inputs(model.config), adapter_names=[]).logits
    assert torch.equal(logits_of(model), before)
    randomise(model.adapters["a"])
    assert not torch.allclose(logits_of(model), before, atol=1e-3)
    model.delete_adapter("a")
    assert torch.equal(logits_of(model), before)


def test_rows_have_norms_of_their_own() -> None:
    model = tuned()
    model.add_adapter("b", config="ln_tuning")
    for seed, name in enumerate("ab"):
        randomise(model.adapters[name], seed=seed)
    inputs = tiny_inputs(model.config)
    alone = {name: model(**inputs, adapter_names=name).logits for name in "ab"}
    mixed = model(**inputs, adapter_names=flexheads.BatchSplit("a", "b", batch_sizes=[1, 2])).logits
    expected = torch.cat([alone["a"][:1], alone["b"][1:]])
    torch.testing.assert_close(mixed, expected, atol=1e-6, rtol=0)


OTHERS: dict[str, Any] = {
    "reads the norm": "pfeiffer",
    "behind the norm": flexheads.BnConfig(
        mh_adapter=True,
        output_adapter=True,
        reduction_factor=8,
        non_linearity="relu",
        original_ln_before=True,
        original_ln_after=False,
        residual_before_ln=False,
        adapter_residual_before_ln=False,
    ),
    "parallel": "par_bn",
    "lora": "lora",
}


@pytest.mark.parametrize("first", ["a", "other"])
@pytest.mark.parametrize("other", OTHERS)
def test_other_adapters_meet_the_tuned_norm(other: str, first: str) -> None:
    """In whatever order they come, they act as if the norm had been the model's."""
    model = flexheads.init(tiny_static("BertForSequenceClassification", **NO_DROPOUT))
    for name in dict.fromkeys((first, "a", "other")):
        model.add_adapter(name, config="ln_tuning" if name == "a" else OTHERS[other])
        randomise(model.adapters[name])
    model.add_adapter("b", config="ln_tuning")
    inputs = tiny_inputs(model.config)
    stacked = model(**inputs, adapter_names=["a", "other"]).logits
    plain = model(**inputs, adapter_names=["b", "other"]).logits
    assert torch.equal(plain, model(**inputs, adapter_names="other").logits)
    setup = flexheads.BatchSplit(["a", "other"], ["b", "other"], batch_sizes=[1, 2])
    mixed = model(**inputs, adapter_names=setup).logits
    torch.testing.assert_close(mixed, torch.cat([stacked[:1], plain[1:]]), atol=1e-5, rtol=0)
    model.merge_adapter("a")
    merged = model(**inputs, adapter_names="other").logits
    torch.testing.assert_close(stacked, merged, atol=1e-5, rtol=0)
    assert not torch.allclose(stacked, plain, atol=1e-3)


def test_files_bring_the_adapter_back(tmp_path: Path) -> None:
    model = tiny_model("bert")
    model.add_adapter("a", config="ln_tuning", set_active=True)
    randomise(model.adapters["a"])
    hidden = model(**tiny_inputs(model.config)).last_hidden_state
    model.save_adapter(tmp_path / "alone", "a")
    other = tiny_model("bert")
    other.load_adapter(tmp_path / "alone", load_as="b", set_active=True)
    assert torch.equal(other(**tiny_inputs(model.config)).last_hidden_state, hidden)
    model.save_pretrained(tmp_path / "whole")
    whole = type(model).from_pretrained(tmp_path / "whole")
    assert torch.equal(whole(**tiny_inputs(model.config)).last_hidden_state, hidden)


def test_what_tunes_nothing_is_refused() -> None:
    model = tiny_model("bert")
    with pytest.raises(ConfigError, match="tunes nothing"):
        model.add_adapter("a", LNTuningConfig(leave_out=(0, 1), outside=False))
    with pytest.raises(ConfigError, match="leave_out"):
        model.add_adapter("a", LNTuningConfig(leave_out=(5,)))
