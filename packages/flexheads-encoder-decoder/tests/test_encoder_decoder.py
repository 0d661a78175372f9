"""Adapters on both sides of two models that make one."""

import pytest
import torch
from transformers import EncoderDecoderConfig, EncoderDecoderModel

import flexheads
from flexheads import Rows
from flexheads.errors import UnknownNameError, UnsupportedError
from flexheads.testing import randomise, tiny_config, tiny_inputs

METHODS = ("double_seq_bn", "lora", "ia3", "prefix_tuning", "loreft", "seq_bn_inv", "ln_tuning")


def uneven():
    """A model whose sides have different sizes."""
    sizes = tiny_config("encoder-decoder").to_dict()
    encoder = {**sizes["encoder"], "hidden_size": 48, "num_hidden_layers": 3}
    encoder["num_attention_heads"] = 6
    decoder = {**sizes["decoder"], "cross_attention_hidden_size": None}
    torch.manual_seed(0)
    config = EncoderDecoderConfig(encoder=encoder, decoder=decoder, decoder_start_token_id=1)
    config.pad_token_id, config.eos_token_id = 0, 2
    return flexheads.init(randomise(EncoderDecoderModel(config).eval(), std=0.1))


@torch.no_grad()
@pytest.mark.parametrize("config", METHODS)
def test_sides_of_different_sizes(config, tmp_path):
    model = uneven()
    inputs = tiny_inputs(model.config)
    before = model(**inputs)
    model.add_adapter("a", config=config, set_active=True)
    randomise(model.adapters)
    acting = model(**inputs)
    for field in ("logits", "encoder_last_hidden_state"):
        assert not torch.allclose(acting[field], before[field], atol=1e-3)
    model.save_adapter(tmp_path, "a")
    other = uneven()
    other.load_adapter(tmp_path, set_active=True)
    assert torch.equal(other(**inputs).logits, acting.logits)
    other.delete_adapter("a")
    assert torch.equal(other(**inputs).logits, before.logits)


def test_every_sub_layer_of_both_sides_is_a_site():
    model = uneven()
    model.add_adapter("a", config="double_seq_bn[cross_adapter=True]")
    parts = set(model.adapters["a"].parts)
    sub_layers = {"attention", "feed_forward"}
    wanted = {f"layers.{n}.{role}" for n in range(5) for role in sub_layers}
    assert parts == wanted | {f"layers.{n}.cross_attention" for n in (3, 4)}
    paths = model._attachment.paths()
    assert paths["layers.0.attention"] == "encoder.encoder.layer.0.attention.output"
    below = "decoder.bert.encoder.layer.0"
    assert paths["layers.3.cross_attention"] == f"{below}.crossattention.output"


@torch.no_grad()
def test_rows_follow_their_adapters_on_both_sides():
    model = uneven()
    for seed, (name, config) in enumerate((("a", "double_seq_bn"), ("b", "lora"))):
        model.add_adapter(name, config=config)
        randomise(model.adapters[name], seed=seed)
    inputs = tiny_inputs(model.config)
    mixed = model(**inputs, adapter_names=Rows(["a", None, "b"])).logits
    for row, name in ((0, "a"), (1, []), (2, "b")):
        torch.testing.assert_close(mixed[row], model(**inputs, adapter_names=name).logits[row])


@torch.no_grad()
def test_generation_is_the_same_with_and_without_a_cache():
    model = uneven()
    model.add_adapter("a", config="double_seq_bn", set_active=True)
    randomise(model.adapters)
    inputs = tiny_inputs(model.config)
    del inputs["decoder_input_ids"]
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    cached = model.generate(**inputs, use_cache=True, **settings)
    assert torch.equal(cached, model.generate(**inputs, use_cache=False, **settings))
    model.set_active_adapters(None)
    assert not torch.equal(cached, model.generate(**inputs, **settings))


def test_a_side_without_a_package_is_named():
    model = EncoderDecoderModel(tiny_config("encoder-decoder"))
    model.encoder.config.model_type = "acme"
    with pytest.raises(UnknownNameError, match="acme"):
        flexheads.init(model)
    assert type(model) is EncoderDecoderModel


def test_prompts_are_refused():
    with pytest.raises(UnsupportedError, match="no embeddings that a prompt could join"):
        uneven().add_adapter("a", config="prompt_tuning")
