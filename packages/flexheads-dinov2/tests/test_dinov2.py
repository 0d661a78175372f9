"""What is DINOv2's own: scaled results, another feed-forward network, a wide static head."""

import pytest
import torch
from transformers import Dinov2ForImageClassification, Dinov2WithRegistersForImageClassification

import flexheads
from flexheads.testing import check_static_adapter, randomise, tiny_config, tiny_inputs, tiny_model


@torch.no_grad()
@pytest.mark.parametrize("name", ["dinov2", "dinov2_with_registers"])
def test_adapters_act_behind_the_scale(name):
    model = tiny_model(name)
    randomise(model._attachment.backbone, std=0.1)
    model.add_adapter("a", config="par_bn[leave_out=[1]]", set_active=True)
    part = randomise(model.adapters["a"]).parts["layers.0.feed_forward"]
    inputs = tiny_inputs(model.config)
    got = model(**inputs).last_hidden_state
    layer, seen = model._attachment.backbone.encoder.layer[0], {}
    layer.norm2.register_forward_pre_hook(lambda m, args: seen.update(r=args[0]))
    scale = layer.layer_scale2
    scale.register_forward_hook(lambda m, args, out: out + part.fused(seen["r"]))
    torch.testing.assert_close(model(**inputs, adapter_names=[]).last_hidden_state, got)


@torch.no_grad()
@pytest.mark.parametrize(
    "config", ["double_seq_bn", "lora[intermediate_lora=True,output_lora=True]"]
)
def test_the_gated_feed_forward_network(config):
    model = tiny_model("dinov2", use_swiglu_ffn=True)
    inputs = tiny_inputs(model.config)
    before = model(**inputs).last_hidden_state
    model.add_adapter("a", config=config, set_active=True)
    torch.testing.assert_close(model(**inputs).last_hidden_state, before)
    randomise(model.adapters)
    assert not torch.allclose(model(**inputs).last_hidden_state, before, atol=1e-3)


@pytest.mark.parametrize(
    ("static_class", "name"),
    [
        (Dinov2ForImageClassification, "dinov2"),
        (Dinov2WithRegistersForImageClassification, "dinov2_with_registers"),
    ],
)
def test_adapters_on_the_static_class(static_class, name):
    model = flexheads.init(static_class(tiny_config(name)).eval())
    inputs = tiny_inputs(model.config)
    check_static_adapter(model, inputs, "seq_bn")
