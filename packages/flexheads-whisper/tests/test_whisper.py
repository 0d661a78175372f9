"""What is Whisper's own: sound at the encoder, heads on the decoder, classes with one side."""

import json

import pytest
import torch
from transformers import WhisperForAudioClassification, WhisperForCausalLM

import flexheads
from flexheads.errors import ConfigError, UnsupportedError
from flexheads.testing import (
    check_static_adapter,
    randomise,
    tiny_config,
    tiny_inputs,
    tiny_model,
    tiny_output,
    tiny_static,
)


def test_a_language_model_head_reads_its_labels_one_step_late():
    static = tiny_static("WhisperForConditionalGeneration")
    model = tiny_model("whisper")
    model.model.load_state_dict(static.model.state_dict())
    model.add_seq2seq_lm_head("written")
    sound = {"input_features": tiny_inputs(model.config)["input_features"]}
    labels = torch.randint(4, 99, (3, 5))
    labels[0, -2:] = -100
    expected, got = static(**sound, labels=labels), model(**sound, labels=labels)
    torch.testing.assert_close(got.logits, expected.logits)
    torch.testing.assert_close(got.loss, expected.loss)
    with pytest.raises(ConfigError, match="nothing to read"):
        model(**sound)


@torch.no_grad()
def test_heads_pool_the_last_token_of_the_decoder():
    model = tiny_model("whisper")
    model.add_classification_head("a", layers=1)
    inputs = tiny_inputs(model.config)
    inputs["decoder_input_ids"][1, -2:] = model.config.pad_token_id
    hidden = model(**inputs, head=[]).last_hidden_state[torch.arange(3), [6, 4, 6]]
    torch.testing.assert_close(model(**inputs).logits, model.heads["a"].layers(hidden))
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[2, -3:] = 0
    given = {**inputs, "decoder_attention_mask": mask}
    hidden = model(**given, head=[]).last_hidden_state[torch.arange(3), [6, 6, 3]]
    torch.testing.assert_close(model(**given).logits, model.heads["a"].layers(hidden))


def alone(model):
    """The coupling block alone: the bottlenecks add nothing."""
    model.add_adapter("a", "seq_bn_inv")
    late = model.adapters["a"].config.inv_adapter_late
    address = "late_embeddings" if late else "embeddings"
    return randomise(model.adapters["a"].parts[address])


def test_a_new_invertible_adapter_acts_before_the_first_layer():
    model = tiny_model("whisper")
    coupling = alone(model)
    got = tiny_output(model, adapter_names="a")
    model.model.encoder.layers[0].register_forward_pre_hook(
        lambda module, args: (coupling(args[0]), *args[1:])
    )
    torch.testing.assert_close(tiny_output(model), got)


def test_one_of_the_adapters_library_acts_where_it_was_trained(tmp_path):
    """There it is hooked to the norm behind the last layer."""
    model = tiny_model("whisper")
    alone(model)
    model.save_adapter(tmp_path, "a")
    file = tmp_path / "adapter_config.json"
    content = json.loads(file.read_text())
    del content["flexheads"]
    file.write_text(json.dumps({**content, "version": "adapters.1.3.0"}))
    other = tiny_model("whisper")
    other.load_adapter(tmp_path, set_active=True)
    coupling, got = other.adapters["a"].parts["late_embeddings"], tiny_output(other)
    other.model.encoder.layer_norm.register_forward_hook(lambda m, args, out: coupling(out))
    torch.testing.assert_close(tiny_output(other, adapter_names=[]), got)


@pytest.mark.parametrize("config", ["double_seq_bn", "lora", "prefix_tuning"])
@pytest.mark.parametrize("static_class", [WhisperForAudioClassification, WhisperForCausalLM])
def test_adapters_work_on_classes_with_one_side(static_class, config):
    model = flexheads.init(static_class(tiny_config("whisper")).eval())
    inputs = tiny_inputs(model.config)
    inputs = {"input_features": inputs["input_features"]}
    if static_class is WhisperForCausalLM:
        inputs = {"input_ids": torch.randint(4, 99, (2, 6))}
    check_static_adapter(model, inputs, config, difference=1e-5)


def test_prompts_are_refused():
    with pytest.raises(UnsupportedError, match="positions up by their number"):
        tiny_model("whisper").add_adapter("a", config="prompt_tuning")
