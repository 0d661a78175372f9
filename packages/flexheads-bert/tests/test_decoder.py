"""BERT as a decoder, in both of its families: generating with a cache is generating without one."""

import pytest
import torch

import flexheads
from flexheads.testing import randomise, tiny_inputs, tiny_static

CLASSES = ("BertLMHeadModel", "BertGenerationDecoder")
CONFIGS = ("double_seq_bn", "lora", "prefix_tuning[flat=True,prefix_length=3]")


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("static_class", CLASSES)
@torch.no_grad()
def test_generation(static_class, config):
    model = flexheads.init(tiny_static(static_class, is_decoder=True))
    model.add_adapter("a", config, set_active=True)
    randomise(model.adapters, std=1.0)
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    settings |= {"output_logits": True, "return_dict_in_generate": True}
    ids = tiny_inputs(model.config)["input_ids"][:2]

    def generate(use_cache):
        found = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=use_cache, **settings
        )
        return torch.stack(found.logits)

    acting = generate(True)
    torch.testing.assert_close(acting, generate(False), atol=1e-4, rtol=0)
    model.set_active_adapters(None)
    assert not torch.allclose(acting, generate(True), atol=1e-2)


@torch.no_grad()
def test_a_token_does_not_see_what_follows():
    model = flexheads.init(tiny_static("BertGenerationDecoder", is_decoder=True))
    model.add_adapter("a", "prefix_tuning[flat=True,prefix_length=3]", set_active=True)
    randomise(model.adapters)
    ids = tiny_inputs(model.config)["input_ids"][:2]
    whole, part = model(ids).logits, model(ids[:, :4]).logits
    torch.testing.assert_close(whole[:, :4], part, atol=1e-5, rtol=0)
