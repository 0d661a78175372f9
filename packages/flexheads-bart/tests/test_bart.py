"""What is the family's own: decoder inputs, a bias of the vocabulary, classes with one side."""

import pytest
import torch
from transformers import BartForCausalLM, MBartForCausalLM

import flexheads
from flexheads.testing import (
    check_static_adapter,
    tiny_config,
    tiny_inputs,
    tiny_model,
    tiny_static,
)

STATIC = {"bart": "Bart", "mbart": "MBart", "plbart": "PLBart"}


def undecoded(config):
    """Inputs for the encoder alone."""
    inputs = tiny_inputs(config)
    inputs.pop("decoder_input_ids", None)
    return inputs


@pytest.mark.parametrize("name", STATIC)
def test_a_decoder_without_inputs_reads_what_the_static_class_lets_it_read(name):
    static = tiny_static(f"{STATIC[name]}ForConditionalGeneration")
    model = tiny_model(name)
    model.model.load_state_dict(static.model.state_dict())
    model.add_seq2seq_lm_head("written")
    inputs = undecoded(model.config)
    got = model(**inputs, head=[]).last_hidden_state
    torch.testing.assert_close(got, static.model(**inputs).last_hidden_state)
    labels = torch.randint(3, 99, (3, 5))
    labels[0, -2:] = -100
    expected, got = static(**inputs, labels=labels), model(**inputs, labels=labels)
    torch.testing.assert_close(got.logits, expected.logits)
    torch.testing.assert_close(got.loss, expected.loss)


@pytest.mark.parametrize("zero", [False, True])
def test_the_bias_of_the_vocabulary_goes_along_both_ways(zero, tmp_path):
    static = flexheads.init(tiny_static("BartForConditionalGeneration"))
    if not zero:
        static.final_logits_bias.normal_()
    static.save_head(tmp_path)
    model = tiny_model("bart")
    model.model.load_state_dict(static.model.state_dict())
    model.load_head(tmp_path, load_as="a")
    assert model.heads["a"].config.bias is not zero
    inputs = tiny_inputs(model.config)
    torch.testing.assert_close(model(**inputs).logits, static(**inputs).logits)
    model.save_head(tmp_path / "back", "a")
    other = flexheads.init(tiny_static("BartForConditionalGeneration"))
    other.load_head(tmp_path / "back")
    assert torch.equal(other.final_logits_bias, static.final_logits_bias)


@torch.no_grad()
def test_pooling_is_at_the_last_end_of_sequence_token_however_many_there_are():
    model = tiny_model("bart")
    model.add_classification_head("a", layers=1)
    inputs = undecoded(model.config)
    inputs["input_ids"][0] = torch.tensor([0, 2, 6, 2, 7, 8, 9])
    ends = torch.tensor([3, 6, 4])
    hidden = model(**inputs, head=[]).last_hidden_state[torch.arange(3), ends]
    torch.testing.assert_close(model(**inputs).logits, model.heads["a"].layers(hidden))


@pytest.mark.parametrize("static_class", [BartForCausalLM, MBartForCausalLM])
@pytest.mark.parametrize("config", ["double_seq_bn", "lora", "prefix_tuning", "loreft"])
def test_adapters_work_on_classes_with_a_decoder_alone(static_class, config):
    name = static_class.__name__.removesuffix("ForCausalLM").lower()
    own = tiny_config(name, is_decoder=True, is_encoder_decoder=False)
    model = flexheads.init(static_class(own).eval())
    ids = torch.randint(3, 99, (2, 6))
    check_static_adapter(model, {"input_ids": ids}, config)
