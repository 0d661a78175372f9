"""Scaled embeddings, and logits that are kept below a bound."""

import pytest
import torch
import transformers

from flexheads import init
from flexheads.testing import (
    randomise,
    tiny_config,
    tiny_inputs,
    tiny_model,
    tiny_output,
    tiny_static,
)

NAMES = ("gemma", "gemma2", "gemma3_text")


@pytest.mark.parametrize("architecture", NAMES)
def test_invertible_adapters_act_on_embeddings_that_are_scaled(architecture):
    model = tiny_model(architecture)
    model.add_adapter("a", "seq_bn_inv")  # of which the coupling alone is random
    coupling = randomise(model.adapters["a"].parts["embeddings"])
    acting = tiny_output(model, adapter_names="a")
    seen = []

    def enter(module, args, kwargs):
        seen.append(args[0])
        return (coupling(args[0]), *args[1:]), kwargs

    model.model.layers[0].register_forward_pre_hook(enter, with_kwargs=True)
    torch.testing.assert_close(tiny_output(model), acting)
    ids = tiny_inputs(model.config)["input_ids"]
    embedded = model.model.embed_tokens.weight[ids]
    torch.testing.assert_close(seen[0], embedded * model.config.hidden_size**0.5)


@pytest.mark.parametrize("static_class", ["Gemma2ForCausalLM", "Gemma3ForCausalLM"])
def test_capped_logits_convert(static_class, tmp_path):
    static = init(tiny_static(static_class, final_logit_softcapping=1.5))
    static.add_adapter("a", set_active=True)
    static.save_adapter(tmp_path, "a")
    name = {"Gemma2ForCausalLM": "gemma2", "Gemma3ForCausalLM": "gemma3_text"}[static_class]
    model = tiny_model(name, final_logit_softcapping=1.5)
    model.model.load_state_dict(static.model.state_dict())
    model.load_adapter(tmp_path, set_active=True)
    given = tiny_inputs(static.config)
    with torch.no_grad():
        logits = model(**given, head="a").logits
        torch.testing.assert_close(logits, static(**given).logits)
    assert 1.0 < logits.abs().max() < 1.5
    model.save_head(tmp_path / "flexible", "a")
    other = tiny_model(name, final_logit_softcapping=1.5)
    other.load_head(tmp_path / "flexible")
    assert other.heads["a"].config.softcap == 1.5


def test_a_class_whose_base_model_is_itself_has_its_backbone_found():
    """So it is with transformers 4.57."""
    config = tiny_config("gemma3_text")
    static = transformers.Gemma3ForCausalLM(config)
    assert init(static)._attachment.backbone is static.model
