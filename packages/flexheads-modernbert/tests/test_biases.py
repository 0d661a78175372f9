"""ModernBERT has projections and norms without a bias, which stay without."""

import pytest
import torch
from transformers import ModernBertForMaskedLM

import flexheads
from flexheads.errors import ConversionWarning
from flexheads.testing import randomise, tiny_config, tiny_inputs, tiny_model


def test_an_adapter_brings_no_bias():
    model = tiny_model("modernbert")
    before = model(**tiny_inputs(model.config)).last_hidden_state
    model.add_adapter("a", "lora", set_active=True)
    assert torch.equal(model(**tiny_inputs(model.config)).last_hidden_state, before)
    assert all(layer.attn.Wqkv.bias is None for layer in model.base_model.layers)


def flexible(tmp_path, **config):
    """A static head, loaded as a flexible one."""
    static = flexheads.init(ModernBertForMaskedLM(tiny_config("modernbert", **config)).eval())
    static.add_adapter("a")
    static.save_adapter(tmp_path, "a")
    model = tiny_model("modernbert", **config)
    model.load_adapter(tmp_path)
    return static, model


def test_a_head_with_biases_does_not_go_back(tmp_path):
    static, model = flexible(tmp_path / "a")
    randomise(model.heads["a"])
    model.save_adapter(tmp_path / "b", "a")
    with pytest.warns(ConversionWarning, match=r"dense\.bias of the head is not zero"):
        static.load_adapter(tmp_path / "b", load_as="b")


def test_biases_that_the_class_has_are_taken_over(tmp_path):
    static, model = flexible(tmp_path, classifier_bias=True, norm_bias=True)
    assert static.head.dense.bias is not None
    with torch.no_grad():
        static.head.dense.bias.fill_(0.5)
    static.save_adapter(tmp_path, "a")
    model.load_adapter(tmp_path, load_as="b")
    assert torch.equal(model.heads["b"].layers[0].dense.bias, static.head.dense.bias)
