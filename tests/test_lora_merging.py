"""Merging into the backbone: the same outputs, the same weights afterwards, or a clear refusal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import flexheads
from flexheads.errors import UnknownNameError, UnsupportedError
from flexheads.testing import randomise, tiny_inputs, tiny_model

CONFIGS = (
    "lora[alpha=20, intermediate_lora=True, output_lora=True]",
    "lora[alpha=3, rank_stabilized=True, attn_matrices=['q', 'k', 'v', 'o']]",
    "lora[alpha=3, init_weights=pissa]",
    "ia3[alpha=2, output_lora=True]",
    "vera[alpha=3, intermediate_lora=True]",
    "dora[alpha=20, intermediate_lora=True]",
    "dvora[alpha=3]",
    "mtl_lora[n_up_projection=2, alpha=3]",
)


def build(config: str, architecture: str = "bert") -> Any:
    model = randomise(tiny_model(architecture), std=0.2)
    model.add_adapter("a", config, set_active=True)
    randomise(model.adapters["a"], std=0.3)
    return model


@torch.no_grad()
def output(model: Any, **how: Any) -> Tensor:
    return model(**tiny_inputs(model.config), head=[], **how).last_hidden_state


def weights(model: Any) -> dict[str, Tensor]:
    own = model.base_model.state_dict()
    return {key: tensor.clone() for key, tensor in own.items()}


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
@pytest.mark.parametrize("config", CONFIGS)
def test_merged_and_taken_out_again(config: str, architecture: str) -> None:
    """Also in projections that one module computes together, stored the other way round."""
    if architecture not in flexheads.registry().architectures:
        pytest.skip(f"{architecture} is not installed")
    model = build(config, architecture)
    active, bare, before = output(model), output(model, adapter_names=[]), weights(model)
    model.merge_adapter("a")
    torch.testing.assert_close(output(model), active, atol=1e-5, rtol=0)
    torch.testing.assert_close(output(model, adapter_names=[]), active, atol=1e-5, rtol=0)
    model.reset_adapter()
    assert all(torch.equal(t, before[k]) for k, t in weights(model).items())
    assert torch.equal(output(model), active)
    assert torch.equal(output(model, adapter_names=[]), bare)


@pytest.mark.parametrize("how", ["delete", "replace"])
def test_a_merged_adapter_that_goes_is_taken_out_first(how: str) -> None:
    model = build("dora")
    before = weights(model)
    model.merge_adapter("a")
    if how == "delete":
        model.delete_adapter("a")
    else:
        model.add_adapter("a", "lora", overwrite_ok=True)
    assert all(torch.equal(t, before[k]) for k, t in weights(model).items())


def refused(model: Any, message: str, name: str = "a") -> None:
    before = weights(model)
    with pytest.raises(UnsupportedError, match=message):
        model.merge_adapter(name)
    assert all(torch.equal(t, before[k]) for k, t in weights(model).items())


def test_what_cannot_be_merged_changes_nothing() -> None:
    refused(build("lora[use_gating=True]"), "gated")
    refused(build("ia3[use_gating=True]"), "gated")
    refused(build("seq_bn"), "cannot be merged")
    refused(build("lora").train(), r"eval\(\)")
    model = build("lora")
    model.merge_adapter("a")
    refused(model, r"merged already.*reset_adapter")
    with pytest.raises(UnknownNameError):
        model.merge_adapter("b")


# --- modules that store other numbers than they compute with -------------------------------------


class Quantised(nn.Module):
    """A linear layer of eight-bit integers, one scale a row, that is no ``nn.Linear``."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        scale = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight / scale).round().char(), requires_grad=False)
        self.register_buffer("scale", scale)

    def forward(self, hidden: Tensor) -> Tensor:
        return functional.linear(hidden, self.weight.float() * self.scale, self.bias)


class Readable(Quantised):
    def dequantize(self) -> Tensor:
        return self.weight.float() * self.scale


class ReadableWeight(nn.Parameter):
    """A weight that knows its numbers, as those of quantisation libraries do."""

    def dequantize(self) -> Tensor:
        return self.data.as_subclass(Tensor) * 2


def quantised(kind: Any) -> Any:
    model = randomise(tiny_model("bert"), std=0.2)
    for layer in model.bert.encoder.layer:
        attention = layer.attention.self
        attention.query, attention.value = kind(attention.query), kind(attention.value)
    fresh = type(model)(model.config).eval()  # sites are found when a model is made
    fresh.bert = model.bert
    fresh._attach(fresh.spec, fresh.bert)
    return fresh


@pytest.mark.parametrize("config", ["lora", "vera", "ia3[attn_matrices=['q', 'v']]", "mtl_lora"])
def test_methods_that_read_no_weight_work_on_any_module(config: str) -> None:
    model = quantised(Quantised)
    model.add_adapter("a", config, set_active=True)
    assert torch.equal(output(model), output(model, adapter_names=[]))
    randomise(model.adapters["a"])
    assert (output(model) - output(model, adapter_names=[])).abs().max() > 1e-2
    refused(model, "dequantize|quantised")


@pytest.mark.parametrize("config", ["dora", "dvora", "lora[init_weights=pissa]"])
def test_methods_that_read_the_weight_need_its_numbers(config: str) -> None:
    with pytest.raises(UnsupportedError, match=r"Quantised does not say.*int8"):
        quantised(Quantised).add_adapter("a", config)
    model, plain = quantised(Readable), randomise(tiny_model("bert"), std=0.2)
    for layer, own in zip(model.bert.encoder.layer, plain.bert.encoder.layer, strict=True):
        for word in ("query", "value"):
            numbers = getattr(layer.attention.self, word).dequantize()
            getattr(own.attention.self, word).weight.data.copy_(numbers)
    model.add_adapter("a", config, set_active=True)
    plain.add_adapter("a", config, set_active=True)
    torch.testing.assert_close(output(model), output(model, adapter_names=[]))
    randomise(model.adapters["a"])
    randomise(plain.adapters["a"])
    torch.testing.assert_close(output(model), output(plain), atol=1e-5, rtol=0)
    refused(model, "quantised")


def test_a_weight_that_can_be_read_gives_way_to_the_merged_one() -> None:
    model = build("dora")
    active = output(model)
    query = model.bert.encoder.layer[0].attention.self.query
    stored = ReadableWeight(query.weight.detach() / 2)
    host = model._attachment.sites["layers.0.query"].projection
    assert torch.equal(host.weight, query.weight)
    query.weight = stored
    assert torch.equal(host.weight, stored.dequantize())
    model.merge_adapter("a")
    assert type(query.weight) is nn.Parameter
    torch.testing.assert_close(output(model), active, atol=1e-5, rtol=0)
    model.reset_adapter()
    assert query.weight is stored
