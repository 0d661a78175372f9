"""Prompt tuning is its definition, for models that read in both directions and for causal ones."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor

import flexheads
from flexheads.errors import ConfigError, UnsupportedError
from flexheads.testing import randomise, tiny_inputs, tiny_model, tiny_static

V5 = int(transformers.__version__.partition(".")[0]) >= 5
LENGTH = 3
PLACES = ("prefix", "prefix_after_bos")
each_place = pytest.mark.parametrize("combine", PLACES)
each_attention = pytest.mark.parametrize("attention", ["eager", "sdpa"])


def with_prompt(model: Any, name: str = "a", seed: int = 1, **config: Any) -> Any:
    config = {"prompt_length": LENGTH, **config}
    model.add_adapter(name, flexheads.PromptTuningConfig(**config), set_active=True)
    randomise(model.adapters[name], std=0.5, seed=seed)
    return model


def encoder(**config: Any) -> Any:
    return randomise(tiny_model("bert", **config), std=0.2)


def decoder(architecture: str, **config: Any) -> Any:
    pytest.importorskip(f"flexheads_{architecture}")
    backbone = tiny_model(architecture, **config).base_model
    kind = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM"}[architecture]
    model = flexheads.init(randomise(getattr(transformers, kind)(backbone.config), std=0.2).eval())
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def ids(padded: bool = False) -> dict[str, Tensor]:
    tokens = torch.randint(3, 90, (3, 6), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(tokens)
    if padded:
        tokens[0, :2], mask[0, :2] = 0, 0
    return {"input_ids": tokens, "attention_mask": mask}


def joined(prompt: Tensor, rest: Tensor, combine: str) -> Tensor:
    prompt = prompt.expand(rest.shape[0], *prompt.shape)
    first = 0 if combine == "prefix" else 1
    return torch.cat([rest[:, :first], prompt, rest[:, first:]], dim=1)


def cut(tensor: Tensor, combine: str) -> Tensor:
    first = 0 if combine == "prefix" else 1
    return torch.cat([tensor[:, :first], tensor[:, first + LENGTH :]], dim=1)


def prompt_of(model: Any, name: str = "a") -> Tensor:
    weight: Tensor = model.adapters[name].state_dict()["prompt.prompt_embedding.weight"]
    return weight


# --- models that read in both directions ----------------------------------------------------------


@each_place
@each_attention
def test_the_prompt_joins_what_enters_the_first_layer(combine: str, attention: str) -> None:
    """Row by row without padding, on a copy whose embeddings give rows and prompt."""
    model = with_prompt(encoder(attn_implementation=attention), combine=combine)
    given = tiny_inputs(model.config)
    with torch.no_grad():
        output = model(**given, output_hidden_states=True)
        for row, length in enumerate(given["attention_mask"].sum(1).tolist()):
            plain = encoder(attn_implementation="eager").base_model
            own = given["input_ids"][row : row + 1, :length]
            rows = joined(prompt_of(model), plain.embeddings(own), combine)
            plain.embeddings.register_forward_hook(lambda *_, r=rows: r)
            expected = plain(torch.zeros(1, length + LENGTH, dtype=torch.long))
            found = output.last_hidden_state[row, :length]
            wanted = cut(expected.last_hidden_state, combine)[0]
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
            pooled = output.pooler_output[row]
            torch.testing.assert_close(pooled, expected.pooler_output[0], atol=1e-5, rtol=0)
    assert {h.shape for h in output.hidden_states} == {output.last_hidden_state.shape}
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)


@each_place
def test_plain_tuples_are_cut_too(combine: str) -> None:
    model = with_prompt(encoder(), combine=combine)
    given = tiny_inputs(model.config)
    as_dict = model(**given, output_hidden_states=True)
    as_tuple = model(**given, output_hidden_states=True, return_dict=False)
    for one, other in zip(as_dict.to_tuple(), as_tuple, strict=True):
        torch.testing.assert_close(one, other)


def test_a_static_model_and_its_base_give_the_same() -> None:
    static = flexheads.init(tiny_static("BertForTokenClassification", num_labels=3))
    base = flexheads.init(copy.deepcopy(static.bert))
    for model in (static, base):
        with_prompt(model)
        model.set_active_adapters(None)
    given = {**ids(True), "labels": torch.randint(0, 3, (3, 6))}
    output = static(**given, adapter_names="a", output_hidden_states=True)
    assert output.logits.shape == (3, 6, 3)
    assert output.loss.isfinite()
    labels = given.pop("labels")
    hidden = base(**given, adapter_names="a").last_hidden_state
    torch.testing.assert_close(output.hidden_states[-1], hidden, atol=1e-6, rtol=0)
    expected = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(output.loss, expected)
    assert not torch.allclose(base(**given).last_hidden_state, hidden, atol=1e-2)
    parallel = base(**given, adapter_names=flexheads.Parallel("a", "a")).last_hidden_state
    torch.testing.assert_close(parallel, hidden.repeat(2, 1, 1), atol=1e-6, rtol=0)


def test_heads_that_read_the_first_position_read_the_prompts() -> None:
    """As the pooler of the model does, and the adapters library."""
    model = with_prompt(encoder())
    model.add_classification_head("a", num_labels=2, layers=1, activation_function=None)
    seen: list[Tensor] = []
    model.base_model.pooler.register_forward_hook(lambda m, args, out: seen.append(args[0][:, 0]))
    logits = model(**tiny_inputs(model.config), head="a").logits
    (layer,) = (m for m in model.heads["a"].modules() if isinstance(m, torch.nn.Linear))
    torch.testing.assert_close(logits, layer(seen[0]))
    bare = model(**tiny_inputs(model.config), adapter_names=[], head="a").logits
    torch.testing.assert_close(bare, layer(seen[1]))


def test_images_take_prompts() -> None:
    pytest.importorskip("flexheads_vit")
    model = randomise(tiny_model("vit"), std=0.2)
    pixels = torch.randn(2, 3, model.config.image_size, model.config.image_size)
    bare = model(pixel_values=pixels)[0]
    with_prompt(model, combine="prefix_after_bos")
    output = model(pixel_values=pixels)[0]
    assert output.shape == bare.shape
    assert not torch.allclose(output, bare, atol=1e-2)


# --- causal models --------------------------------------------------------------------------------


@each_place
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_positions_of_causal_models_count_through_the_prompt(
    architecture: str, combine: str
) -> None:
    model = with_prompt(decoder(architecture), combine=combine)
    plain, given = decoder(architecture), ids()
    embeddings = model.get_input_embeddings()(given["input_ids"])
    with torch.no_grad():
        expected = plain(inputs_embeds=joined(prompt_of(model), embeddings, combine)).logits
        for kept in (given, {"input_ids": given["input_ids"]}, {"inputs_embeds": embeddings}):
            found = model(**kept).logits
            torch.testing.assert_close(found, cut(expected, combine), atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_causal_models_give_what_peft_gives(architecture: str) -> None:
    peft = pytest.importorskip("peft")
    model, given = with_prompt(decoder(architecture)), ids()
    bare = {"gpt2": transformers.GPT2LMHeadModel, "llama": transformers.LlamaForCausalLM}
    theirs = bare[architecture](copy.deepcopy(model.config))
    theirs.load_state_dict(decoder(architecture).state_dict(), strict=False)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH)
    theirs = peft.get_peft_model(theirs.eval(), config).eval()
    with torch.no_grad():
        theirs.prompt_encoder["default"].embedding.weight.copy_(prompt_of(model))
        expected = theirs(**given).logits[:, LENGTH:]
        torch.testing.assert_close(model(**given).logits, expected, atol=1e-5, rtol=0)


def generate(model: Any, padded: bool, **how: Any) -> tuple[Tensor, Tensor]:
    found = model.generate(
        **ids(padded),
        max_new_tokens=5,
        do_sample=False,
        output_scores=True,
        return_dict_in_generate=True,
        **how,
    )
    return found.sequences, torch.stack(found.scores, dim=1)


@each_place
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_generation_with_a_cache_is_that_without(
    architecture: str, padded: bool, combine: str
) -> None:
    model = with_prompt(decoder(architecture), combine=combine)
    for beams in (1, 3):
        cached = generate(model, padded, use_cache=True, num_beams=beams)
        plain = generate(model, padded, use_cache=False, num_beams=beams)
        assert torch.equal(cached[0], plain[0])
        torch.testing.assert_close(cached[1], plain[1], atol=1e-4, rtol=1e-4)
    bare = generate(model, padded, adapter_names=[])
    assert not torch.allclose(bare[1], generate(model, padded)[1], atol=1e-2)


def test_generation_row_by_row_is_that_of_the_batch_with_padding() -> None:
    model = with_prompt(decoder("llama"))
    given = ids(True)
    whole = generate(model, True)[1]
    alone = model.generate(
        given["input_ids"][:1, 2:],
        attention_mask=given["attention_mask"][:1, 2:],
        max_new_tokens=5,
        do_sample=False,
        output_scores=True,
        return_dict_in_generate=True,
    )
    torch.testing.assert_close(whole[:1], torch.stack(alone.scores, dim=1), atol=1e-4, rtol=1e-4)


def test_a_cache_holds_the_prompt_once() -> None:
    model = with_prompt(decoder("llama"))
    given = ids()
    first = model(**given, use_cache=True)
    assert first.past_key_values.get_seq_length() == 6 + LENGTH
    mask = torch.ones(3, 7, dtype=torch.long)
    token = torch.full((3, 1), 7)
    cache = first.past_key_values
    second = model(input_ids=token, attention_mask=mask, past_key_values=cache, use_cache=True)
    whole = model(input_ids=torch.cat([given["input_ids"], token], 1), attention_mask=mask)
    torch.testing.assert_close(second.logits[:, 0], whole.logits[:, -1], atol=1e-5, rtol=0)


def test_a_static_cache_is_refused() -> None:
    model = with_prompt(decoder("llama"))
    with pytest.raises(UnsupportedError, match="static cache"):
        generate(model, True, cache_implementation="static", disable_compile=True)


# --- an encoder beside a decoder ------------------------------------------------------------------


@each_place
def test_the_encoder_of_two_sides_takes_the_prompt(combine: str) -> None:
    pytest.importorskip("flexheads_t5")
    config = tiny_model("t5").config
    plain = randomise(transformers.T5ForConditionalGeneration(config).eval(), std=0.2)
    model = with_prompt(flexheads.init(copy.deepcopy(plain)), combine=combine)
    given = {**ids(True), "decoder_input_ids": ids()["input_ids"][:, :4]}
    mask = given["attention_mask"]
    prompt_mask = joined(torch.ones(LENGTH, dtype=mask.dtype), mask, combine)
    with torch.no_grad():
        embeds = joined(prompt_of(model), plain.shared(given["input_ids"]), combine)
        expected = plain(
            inputs_embeds=embeds,
            attention_mask=prompt_mask,
            decoder_input_ids=given["decoder_input_ids"],
        )
        found = model(**given)
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-5, rtol=0)
    states = cut(expected.encoder_last_hidden_state, combine)
    torch.testing.assert_close(found.encoder_last_hidden_state, states, atol=1e-5, rtol=0)
    how: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    mine = model.generate(**ids(True), **how)
    theirs = plain.generate(inputs_embeds=embeds, attention_mask=prompt_mask, **how)
    assert torch.equal(mine, theirs)


# --- rows, copies, training -----------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_each_row_has_its_own_prompt(architecture: str) -> None:
    model = encoder() if architecture == "bert" else decoder("gpt2")
    with_prompt(with_prompt(model, "a"), "b", seed=4)
    given = ids(True)
    mixed = model(**given, adapter_names=flexheads.Rows(["a", "b", "a"]))[0]
    for row, name in enumerate(["a", "b", "a"]):
        alone = model(**given, adapter_names=name)[0]
        torch.testing.assert_close(mixed[row], alone[row], atol=1e-5, rtol=0)


def test_stacked_prompts_stand_before_one_another() -> None:
    model = with_prompt(with_prompt(encoder(), "a"), "b", seed=4)
    both = torch.cat([prompt_of(model, "b"), prompt_of(model, "a")])
    with_prompt(model, "both", prompt_length=2 * LENGTH)
    model.adapters["both"].load_state_dict({"prompt.prompt_embedding.weight": both})
    given = tiny_inputs(model.config)
    stacked = model(**given, adapter_names=["a", "b"])[0]
    torch.testing.assert_close(stacked, model(**given, adapter_names="both")[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_removal(twin: Any) -> None:
    model = encoder()
    given = tiny_inputs(model.config)
    bare = model(**given)[0]
    before = with_prompt(model)(**given)[0]
    other = twin(model)
    assert torch.equal(other(**given)[0], before)
    other.delete_adapter("a")
    assert torch.equal(other(**given)[0], bare)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in other.base_model.modules())
    assert torch.equal(model(**given)[0], before)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    found = []
    for use in (False, True):
        model = with_prompt(encoder(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
        model.train_adapter("a")
        if use:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.train()(**tiny_inputs(model.config))[0].square().sum().backward()
        found.append(next(model.adapters["a"].parameters()).grad)
    assert found[0].abs().max() > 0
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-4)


@pytest.mark.skipif(not V5, reason="graphs are promised for 5.x")
@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_compiled_code_is_one_graph(architecture: str) -> None:
    torch._dynamo.reset()
    model = encoder() if architecture == "bert" else decoder("llama", use_cache=False)
    with_prompt(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for name in ("a", None):
        model.set_active_adapters(name)
        torch.testing.assert_close(compiled(**ids())[0], model(**ids())[0], atol=1e-5, rtol=0)
    torch._dynamo.reset()


# --- configuration --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt_length": 0},
        {"combine": "postfix"},
        {"prompt_init": "zeros"},
        {"prompt_init": "from_string"},
    ],
)
def test_impossible_configurations_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields))):
        flexheads.PromptTuningConfig(**fields)


def test_the_scale_is_a_field_and_saved(tmp_path: Any) -> None:
    model = encoder()
    model.add_adapter("a", "prompt_tuning[prompt_length=50, random_uniform_scale=0.01]")
    assert 0.005 < prompt_of(model).abs().max() <= 0.01
    model.save_adapter(tmp_path, "a")
    model.load_adapter(tmp_path, load_as="b")
    assert model.adapters["b"].config.random_uniform_scale == 0.01
    assert torch.equal(prompt_of(model, "a"), prompt_of(model, "b"))


def test_a_text_needs_its_tokenizer() -> None:
    model = encoder()
    with pytest.raises(ConfigError, match="tokenizer"):
        model.add_adapter("a", "prompt_tuning[prompt_init=from_string, prompt_init_text=hi]")
    assert "a" not in model.adapters


def test_a_text_gives_its_embeddings_again_and_again(tmp_path: Any) -> None:
    tokenizer = Tokenizer(WordLevel({"[UNK]": 0, "good": 1, "film": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    model = encoder()
    model.config.tokenizer_name_or_path = str(tmp_path)
    config = {"prompt_init": "from_string", "prompt_init_text": "good film", "prompt_length": 6}
    model.add_adapter("a", flexheads.PromptTuningConfig(**config))
    weight = model.base_model.embeddings.word_embeddings.weight
    tokens = transformers.AutoTokenizer.from_pretrained(tmp_path)("good film")["input_ids"]
    assert torch.equal(prompt_of(model), weight[torch.tensor([*tokens] * 3)])
    # A saved prompt has its values, so it needs no tokenizer.
    model.save_adapter(tmp_path / "saved", "a")
    del model.config.tokenizer_name_or_path
    model.load_adapter(tmp_path / "saved", load_as="b")
    assert torch.equal(prompt_of(model, "b"), prompt_of(model, "a"))


def test_a_decoder_of_the_other_kind_is_refused() -> None:
    model = flexheads.init(tiny_static("BertLMHeadModel", is_decoder=True))
    with pytest.raises(UnsupportedError, match="is_decoder"):
        model.add_adapter("a", "prompt_tuning")
