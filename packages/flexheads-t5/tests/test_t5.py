"""What is T5's own: decoder inputs, pooling, scaling, classes that are their own backbone."""

import pytest
import torch
from transformers import T5EncoderModel, T5ForConditionalGeneration, T5ForTokenClassification

import flexheads
from flexheads import Parallel, Rows
from flexheads.errors import ConfigError, UnsupportedError
from flexheads.testing import (
    check_static_adapter,
    randomise,
    tiny_config,
    tiny_inputs,
    tiny_model,
    tiny_static,
)


def undecoded(config):
    """Inputs for the encoder alone."""
    inputs = tiny_inputs(config)
    inputs.pop("decoder_input_ids", None)
    return inputs


@torch.no_grad()
def test_without_decoder_inputs_the_decoder_reads_the_tokens_one_step_late():
    model = tiny_model("t5")
    inputs = undecoded(model.config)
    late = torch.cat([torch.zeros(3, 1, dtype=torch.long), inputs["input_ids"][:, :-1]], dim=1)
    expected = model(**inputs, decoder_input_ids=late).last_hidden_state
    assert torch.equal(model(**inputs).last_hidden_state, expected)


def test_a_language_model_head_reads_its_labels_one_step_late():
    static = tiny_static("T5ForConditionalGeneration")
    flexheads.init(static)
    model = tiny_model("t5")
    model.transformer.load_state_dict(static.state_dict(), strict=False)
    model.add_seq2seq_lm_head("written")
    inputs = undecoded(model.config)
    labels = torch.randint(3, 99, (3, 4))
    labels[0, -1] = -100
    expected, got = static(**inputs, labels=labels), model(**inputs, labels=labels)
    torch.testing.assert_close(got.logits, expected.logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(got.loss, expected.loss)


def test_a_decoder_with_nothing_to_read_is_refused():
    model = tiny_model("t5")
    with pytest.raises(ConfigError, match="decoder_input_ids"):
        model(inputs_embeds=torch.randn(2, 3, 32))


def test_pooling_is_at_the_last_end_of_sequence_token():
    model = tiny_model("t5")
    model.add_classification_head("a", layers=1)
    inputs = undecoded(model.config)
    inputs["input_ids"][0] = torch.tensor([5, 1, 6, 1, 7, 8, 9])
    ends = torch.tensor([3, 6, 4])
    hidden = model(**inputs, head=[]).last_hidden_state[torch.arange(3), ends]
    torch.testing.assert_close(model(**inputs).logits, model.heads["a"].layers(hidden))
    inputs["input_ids"][1] = 5
    with pytest.raises(UnsupportedError, match="no end-of-sequence token"):
        model(**inputs)
    with pytest.raises(UnsupportedError, match="Leave out decoder_input_ids"):
        model(**inputs, decoder_input_ids=torch.ones(3, 2, dtype=torch.long))


@torch.no_grad()
def test_invertible_adapters_act_on_the_encoder_alone():
    model = tiny_model("t5")
    model.add_adapter("a", config="seq_bn_inv[leave_out=[0, 1, 2, 3]]", set_active=True)
    randomise(model.adapters)
    seen = {}
    for name in ("encoder", "decoder"):
        first = model.transformer.get_submodule(name).block[0]
        first.layer[0].layer_norm.register_forward_pre_hook(
            lambda module, args, name=name: seen.__setitem__(name, args[0])
        )
    inputs = tiny_inputs(model.config)
    model(**inputs)
    embed = model.transformer.shared
    torch.testing.assert_close(seen["decoder"], embed(inputs["decoder_input_ids"]))
    coupling = model.adapters["a"].parts["embeddings"]
    torch.testing.assert_close(seen["encoder"], coupling(embed(inputs["input_ids"])))


@pytest.mark.parametrize("static_class", [T5EncoderModel, T5ForTokenClassification])
def test_adapters_work_on_classes_with_an_encoder_alone(static_class):
    model = flexheads.init(static_class(tiny_config("t5")).eval())
    inputs = undecoded(model.config)
    check_static_adapter(model, inputs, "double_seq_bn_inv")


def test_training_a_class_that_is_its_own_backbone_trains_adapter_and_head():
    model = flexheads.init(tiny_static("T5ForQuestionAnswering"))
    model.add_adapter("a")
    model.train_adapter("a")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.partition(".")[0] for name in trained} == {"adapters", "qa_outputs"}
    tied = flexheads.init(T5ForConditionalGeneration(tiny_config("t5")))
    tied.add_adapter("a")
    tied.train_adapter("a")
    trained = {name for name, p in tied.named_parameters() if p.requires_grad}
    assert {name.partition(".")[0] for name in trained} == {"adapters"}


@torch.no_grad()
def test_a_new_question_answering_head_reads_scaled_states_and_a_converted_one_does_not():
    model = tiny_model("t5")
    model.add_qa_head("a")
    inputs = tiny_inputs(model.config)
    hidden = model(**inputs, head=[]).last_hidden_state
    start = model.heads["a"].layers(hidden * 32**-0.5)[..., 0]
    torch.testing.assert_close(model(**inputs).start_logits, start)


def test_generation_runs_the_encoder_under_the_adapters_of_the_call():
    model = flexheads.init(tiny_static("T5ForConditionalGeneration"))
    for seed, name in enumerate(("a", "b")):
        model.add_adapter(name, config="double_seq_bn")
        randomise(model.adapters[name], seed=seed)
    inputs = undecoded(model.config)
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    settings |= {"output_logits": True, "return_dict_in_generate": True}

    def logits(**how):
        return torch.stack(model.generate(**inputs, **settings, **how).logits, dim=1)

    alone = {}
    for name in ("a", "b"):
        model.set_active_adapters(name)
        alone[name] = logits()
    model.set_active_adapters("a")
    torch.testing.assert_close(logits(adapter_names="b"), alone["b"])
    mixed = torch.cat([alone["a"][:1], alone["b"][1:]])
    torch.testing.assert_close(logits(adapter_names=Rows(["a", "b", "b"])), mixed)
    assert not torch.allclose(alone["a"], alone["b"], atol=1e-2)
    both = torch.cat([alone["a"], alone["b"]])
    torch.testing.assert_close(logits(adapter_names=Parallel("a", "b")), both)
