"""Flexible language-model heads generate the tokens of transformers' own classes."""

from __future__ import annotations

import copy
import json
import tempfile
import threading
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor
from torch.nn import functional
from transformers.generation.streamers import BaseStreamer

import flexheads
from flexheads import BatchSplit, Parallel, Rows, Stack
from flexheads.errors import (
    CompositionError,
    ConfigError,
    LabelError,
    UnknownNameError,
    UnsupportedError,
)
from flexheads.models.generating.generate import generates
from flexheads.models.with_heads import with_heads_class
from flexheads.plugins import registry, resolve
from flexheads.testing import randomise, tiny_inputs, tiny_model, tiny_static

NEW = 5
NEWER = Version(transformers.__version__) >= Version("5")


def writes(static_class: str) -> bool:
    """Whether a class has one head, and that generates."""
    (head, *others) = registry().conversion(static_class).heads
    return not others and generates(resolve(registry().head_type(head.head_type).head))


WRITERS = [n for n in registry().conversions if hasattr(transformers, n) and writes(n)]
FOUR = ["GPT2LMHeadModel", "LlamaForCausalLM", "BartForConditionalGeneration"]
FOUR += ["T5ForConditionalGeneration"]


def twins(static_class: str) -> tuple[Any, Any]:
    """A static model, and one with a flexible head of the same weights, through files."""
    spec = registry().architecture(registry().conversion(static_class).architecture)
    decodes = {} if spec.pooling in ("last_token", "eos") else {"is_decoder": True}
    static = tiny_static(static_class, **decodes)
    static.generation_config.eos_token_id = None
    static.generation_config.pad_token_id = 0
    with tempfile.TemporaryDirectory() as directory:
        static.save_pretrained(directory)
        model = with_heads_class(spec.with_heads).from_pretrained(directory)
        flexheads.init(copy.deepcopy(static)).save_head(f"{directory}/head")
        model.load_head(f"{directory}/head", load_as="lm")
    return static, model


def prompts(config: Any, rows: int = 3) -> dict[str, Tensor]:
    """What a model goes on from; the last row is padded on the left."""
    inputs = tiny_inputs(config, batch=rows)
    inputs.pop("decoder_input_ids", None)
    tokens = {"input_ids", "attention_mask"} & inputs.keys()
    return {**inputs, **{name: inputs[name].flip(1) for name in tokens}}


def generate(model: Any, seed: int = 0, **kwargs: Any) -> Any:
    """What a model generates, with everything that transformers can tell of it."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False}
    settings |= {"return_dict_in_generate": True, "output_logits": True, **kwargs}
    return model.generate(**(prompts(model.config) | settings))


def same(found: Any, expected: Any) -> None:
    assert torch.equal(found.sequences, expected.sequences)
    assert type(found) is type(expected)
    for one, other in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 1.5},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampled beams": {"num_beams": 2, "do_sample": True},
    "no cache": {"use_cache": False},
}


@pytest.mark.parametrize("static_class", WRITERS)
def test_tokens_are_those_of_transformers(static_class: str) -> None:
    static, model = twins(static_class)
    # Before release 5 only some classes have a static cache.
    further = [{"cache_implementation": "static"}] if NEWER or static_class in FOUR else []
    for settings in [*WAYS.values(), *further]:
        same(generate(model, **settings), generate(static, **settings))
    assert model.generation_config.to_dict() == static.generation_config.to_dict()
    call = tiny_inputs(static.config)
    found, expected = model(**call), static(**call)
    assert type(found) is type(expected)
    assert set(expected.keys()) <= set(found.keys())


@pytest.fixture(scope="module", params=FOUR)
def pair(request: Any) -> tuple[Any, Any]:
    """A static model and its flexible twin, with adapters and more heads. Read only."""
    static, model = twins(request.param)
    two_sides = model.config.is_encoder_decoder
    for seed, name in enumerate(("a", "b")):
        add = model.add_seq2seq_lm_head if two_sides else model.add_causal_lm_head
        add(f"{name}-lm", layers=2, activation_function="gelu", tied=False, set_active=False)
        randomise(model.heads[f"{name}-lm"], seed=seed)
    model.add_classification_head("topic", set_active=False)
    for seed, (name, config) in enumerate(METHODS.items()):
        model.add_adapter(name, config)
        randomise(model.adapters[name], std=0.2, seed=seed)
    return static, model


METHODS: dict[str, Any] = {
    "bottleneck": "double_seq_bn",
    "invertible": "seq_bn_inv",
    "lora": flexheads.LoRAConfig(attn_matrices=["q", "k", "v"]),
    "prefix": flexheads.PrefixTuningConfig(prefix_length=3, bottleneck_size=8),
    "prompt": flexheads.PromptTuningConfig(prompt_length=2),
}


def alone(model: Any, row: int, **kwargs: Any) -> Any:
    """What is generated for a batch that has the same prompt in every row."""
    inputs = prompts(model.config)
    return generate(model, **{n: t[row : row + 1] for n, t in inputs.items()}, **kwargs)


@pytest.mark.parametrize("way", ["greedy", "beams", "no cache"])
@pytest.mark.parametrize(
    "setup",
    [
        ["invertible", "lora", None],
        ["prefix", Stack("prefix", "bottleneck"), Stack("lora", "prefix")],
        ["prompt", Stack("prompt", "lora"), "prompt"],
    ],
    ids=["methods", "prefixes", "prompts"],
)
def test_each_row_follows_its_own_adapters(pair: Any, setup: list[Any], way: str) -> None:
    _, model = pair
    mixed = generate(model, adapter_names=Rows(setup), head="lm", **WAYS[way]).sequences
    each = len(mixed) // len(setup)
    for row, adapter in enumerate(setup):
        own = alone(model, row, adapter_names=adapter or [], head="lm", **WAYS[way])
        assert torch.equal(mixed[row * each : (row + 1) * each], own.sequences), adapter
    assert len({tuple(r) for r in mixed.tolist()}) > 1


@pytest.mark.parametrize("name", METHODS)
def test_adapters_act(pair: Any, name: str) -> None:
    _, model = pair
    bare = generate(model, head="lm", adapter_names=[])
    acting = generate(model, head="lm", adapter_names=name)
    assert not torch.equal(acting.logits[0], bare.logits[0])
    same(generate(model, head="lm", adapter_names=name, use_cache=False), acting)


def test_invertible_adapters_are_undone_before_the_output(pair: Any) -> None:
    static, model = pair
    twin = flexheads.init(copy.deepcopy(static))
    with tempfile.TemporaryDirectory() as directory:
        model.save_adapter(directory, "invertible", with_head=False)
        twin.load_adapter(directory, set_active=True)
    for settings in WAYS.values():
        same(
            generate(model, adapter_names="invertible", head="lm", **settings),
            generate(twin, **settings),
        )


@pytest.mark.parametrize("way", ["greedy", "beams"])
def test_batch_split_and_parallel(pair: Any, way: str) -> None:
    _, model = pair
    split = BatchSplit("lora", Stack("bottleneck", "invertible"), batch_sizes=[2, 1])
    found = generate(model, adapter_names=split, head="lm", **WAYS[way])
    rows = Rows(["lora", "lora", Stack("bottleneck", "invertible")])
    same(found, generate(model, adapter_names=rows, head="lm", **WAYS[way]))
    parallel = generate(
        model, adapter_names=Parallel("lora", "bottleneck"), head="lm", **WAYS[way]
    ).sequences
    own = [generate(model, adapter_names=n, head="lm", **WAYS[way]) for n in ("lora", "bottleneck")]
    assert torch.equal(parallel, torch.cat([o.sequences for o in own]))


@pytest.mark.parametrize("way", ["greedy", "beams"])
def test_rows_with_heads_of_their_own(pair: Any, way: str) -> None:
    _, model = pair
    mixed = generate(model, head=Rows(["a-lm", "lm", "b-lm"]), adapter_names=[], **WAYS[way])
    each = len(mixed.sequences) // 3
    for row, head in enumerate(("a-lm", "lm", "b-lm")):
        own = alone(model, row, head=head, adapter_names=[], **WAYS[way]).sequences
        assert torch.equal(mixed.sequences[row * each : (row + 1) * each], own), head


def test_parallel_with_a_head_for_each_branch(pair: Any) -> None:
    _, model = pair
    model = copy.deepcopy(model)
    for name, head in (("lora", "a-lm"), ("bottleneck", "b-lm")):
        own = copy.deepcopy(model.heads[head])
        own.name = name
        model._install_head(own)
    found = generate(model, adapter_names=Parallel("lora", "bottleneck"), num_beams=2)
    own = [
        generate(model, adapter_names=adapter, head=head, num_beams=2).sequences
        for adapter, head in (("lora", "a-lm"), ("bottleneck", "b-lm"))
    ]
    assert torch.equal(found.sequences, torch.cat(own))
    cache = transformers.DynamicCache()
    with pytest.raises(UnsupportedError, match="past_key_values"):
        generate(model, adapter_names=Parallel("lora", "bottleneck"), past_key_values=cache)


def test_what_is_active_holds_too(pair: Any) -> None:
    _, model = pair
    model = copy.deepcopy(model)
    named = generate(model, adapter_names="lora", head="a-lm")
    model.active_head = "a-lm"
    model.set_active_adapters("lora")
    same(generate(model), named)
    rows = Rows(["lora", None, "bottleneck"])
    named = generate(model, adapter_names=rows, head="b-lm", num_beams=2)
    model.active_head = "b-lm"
    model.set_active_adapters(rows)
    same(generate(model, num_beams=2), named)


def test_adapters_that_change_are_seen_by_the_next_generation(pair: Any) -> None:
    _, model = pair
    model = copy.deepcopy(model)
    settings: dict[str, Any] = {"adapter_names": Rows(["lora", None, "lora"]), "head": "lm"}
    before = generate(model, num_beams=2, **settings)
    same(generate(model, num_beams=2, **settings), before)
    model.delete_adapter("lora")
    model.add_adapter("lora", "double_seq_bn")
    randomise(model.adapters["lora"])
    after = generate(model, num_beams=2, **settings)
    own = alone(model, 2, num_beams=2, adapter_names="lora", head="lm").sequences
    assert torch.equal(after.sequences[2:], own)
    assert not torch.equal(after.logits[0], before.logits[0])


def test_a_head_over_another_layer_writes_what_its_scores_say(pair: Any) -> None:
    _, model = pair
    model = copy.deepcopy(model)
    two_sides = model.config.is_encoder_decoder
    add = model.add_seq2seq_lm_head if two_sides else model.add_causal_lm_head
    add("low", hidden_layer=-2, layers=2, tied=False)
    randomise(model.heads["low"])
    call = {name: value[:1] for name, value in prompts(model.config).items()}
    written = alone(model, 0, output_hidden_states=False).sequences
    key = "decoder_input_ids" if two_sides else "input_ids"
    ids = written[:, :-NEW]
    for _ in range(NEW):
        scores = model(**{"input_ids": call["input_ids"], key: ids}).logits[:, -1]
        ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(written, ids)


def test_threads_do_not_mix(pair: Any) -> None:
    _, model = pair
    setups: list[Any] = [Rows(["lora", None, "bottleneck"]), "prefix", Rows([None, "lora", "lora"])]
    expected = [generate(model, adapter_names=s, head="lm", num_beams=2) for s in setups]
    found: dict[int, list[Any]] = {number: [] for number in range(len(setups))}

    def work(number: int) -> None:
        for _ in range(3):
            own = generate(model, adapter_names=setups[number], head="lm", num_beams=2)
            found[number].append(own.sequences)

    threads = [threading.Thread(target=work, args=(number,)) for number in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, own in found.items():
        assert len(own) == 3
        assert all(torch.equal(one, expected[number].sequences) for one in own)


def test_states_attentions_and_caches_come_back(pair: Any) -> None:
    static, model = pair
    settings = {"output_hidden_states": True, "output_attentions": True, "output_scores": True}
    static.set_attn_implementation("eager")
    model.set_attn_implementation("eager")
    for way in ("greedy", "beams"):
        found = generate(model, head="lm", **settings, **WAYS[way])
        expected = generate(static, **settings, **WAYS[way])
        same(found, expected)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            for one, other in zip(_tensors(found[name]), _tensors(value), strict=True):
                torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
        assert found.past_key_values.get_seq_length() == expected.past_key_values.get_seq_length()
    indices = {"beam_indices": found.beam_indices}
    chosen = model.compute_transition_scores(found.sequences, found.scores, **indices)
    torch.testing.assert_close(
        chosen, static.compute_transition_scores(expected.sequences, expected.scores, **indices)
    )


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for v in value for t in _tensors(v)] if isinstance(value, tuple) else []


class Collected(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def test_streaming(pair: Any) -> None:
    _, model = pair
    streamer = Collected()
    found = alone(model, 0, head="lm", adapter_names="lora", streamer=streamer)
    assert streamer.ended
    assert streamer.tokens == found.sequences[0].tolist()


def test_an_assistant_changes_the_speed_alone(pair: Any) -> None:
    static, model = pair
    settings: dict[str, Any] = {"head": "lm", "adapter_names": "lora", "eos_token_id": 2}
    expected = alone(model, 0, **settings).sequences
    for helper in (static, model):
        found = alone(model, 0, assistant_model=helper, **settings).sequences
        assert torch.equal(found, expected)
    if not model.config.is_encoder_decoder:  # its prompt begins with the token that ends it
        looked_up = alone(model, 0, prompt_lookup_num_tokens=2, **settings).sequences
        assert torch.equal(looked_up, expected)


def test_only_what_is_asked_for_is_scored(pair: Any, monkeypatch: Any) -> None:
    _, model = pair
    lengths: list[int] = []
    head = type(model.heads["lm"])
    score = head._score
    record = lambda own, hidden, features: (  # noqa: E731
        lengths.append(hidden.shape[1]) or score(own, hidden, features)
    )
    monkeypatch.setattr(head, "_score", record)
    generate(model, head="lm")
    assert lengths == [1] * NEW
    call = tiny_inputs(model.config)
    whole = model(**call, head="lm").logits
    which = torch.tensor([0, 2])
    torch.testing.assert_close(model(**call, head="lm", logits_to_keep=2).logits, whole[:, -2:])
    torch.testing.assert_close(
        model(**call, head="lm", logits_to_keep=which).logits, whole[:, which]
    )
    assert lengths[-3:] == [whole.shape[1], 2, 2]
    topic = model(**call, head="topic", logits_to_keep=2)
    torch.testing.assert_close(topic.logits, model(**call, head="topic").logits)
    labels = torch.zeros_like(call["input_ids"])
    with pytest.raises(LabelError, match="logits_to_keep"):
        model(**call, head="lm", logits_to_keep=2, labels=labels)


def test_who_cannot_generate_says_so_first(pair: Any, monkeypatch: Any) -> None:
    _, model = pair
    monkeypatch.setattr(type(model), "forward", lambda *a, **k: pytest.fail("It has run."))
    with pytest.raises(UnsupportedError, match="'topic' is of type classification"):
        generate(model, head="topic")
    with pytest.raises(UnsupportedError, match="all score the same rows"):
        generate(model, head=["lm", "a-lm"])
    if model.config.is_encoder_decoder:
        model = copy.deepcopy(model)
        model.add_seq2seq_lm_head("side", side="encoder")
        with pytest.raises(UnsupportedError, match="'side' reads the encoder"):
            generate(model, head="side")
    with pytest.raises(UnsupportedError, match=r"rows \[1\].*active_head"):
        generate(model, head=Rows(["lm", None, "a-lm"]))
    with pytest.raises(UnsupportedError, match="Nothing scores the vocabulary for the batch"):
        generate(model, head=[])
    with pytest.raises(UnknownNameError, match="nobody"):
        generate(model, head="nobody")
    with pytest.raises(UnknownNameError, match="nobody"):
        generate(model, adapter_names="nobody", head="lm")


def test_vocabularies_of_different_sizes(pair: Any) -> None:
    _, model = pair
    model = copy.deepcopy(model)
    add = model.add_seq2seq_lm_head if model.config.is_encoder_decoder else model.add_causal_lm_head
    add("small", vocab_size=50, tied=False)
    with pytest.raises(UnsupportedError, match="'small': 50"):
        generate(model, head=Rows(["lm", "small", "lm"]))


def test_rows_that_do_not_fit_the_batch(pair: Any) -> None:
    _, model = pair
    with pytest.raises(CompositionError, match="2 rows"):
        generate(model, adapter_names=Rows(["lora", None]), head="lm")
    four = prompts(model.config, rows=4)  # twice as many are no beams of these two
    with pytest.raises(CompositionError, match="2 rows"):
        generate(model, adapter_names=Rows(["lora", None]), head="lm", **four)
    with pytest.raises(CompositionError, match="2 rows"):
        model.generate(
            next(iter(four.values())), adapter_names=[], head=Rows(["lm", "a-lm"]), max_new_tokens=2
        )


def test_whole_models_keep_how_they_generate(pair: Any, tmp_path: Any) -> None:
    _, model = pair
    model = copy.deepcopy(model)
    model.active_head = "lm"
    model.generation_config.update(max_new_tokens=3, repetition_penalty=1.5)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.generation_config.repetition_penalty == 1.5
    inputs = prompts(model.config)
    assert torch.equal(again.generate(**inputs), model.generate(**inputs))
    given = transformers.GenerationConfig(max_new_tokens=2)
    other = type(model).from_pretrained(tmp_path, generation_config=given)
    assert other.generation_config.max_new_tokens == 2
    with pytest.raises(ConfigError, match="generation_config"):
        type(model).from_pretrained(tmp_path, generation_config={"max_new_tokens": 2})


@pytest.mark.parametrize("told", [{}, {"num_beams": 3, "eos_token_id": 7}])
def test_without_a_file_of_its_own_the_configuration_says_how_to_generate(
    told: dict[str, Any], pair: Any, tmp_path: Any
) -> None:
    static, _ = pair
    static.base_model.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), **told}), "utf-8")
    usual = transformers.GenerationConfig.from_pretrained(
        tmp_path, config_file_name="config.json", _from_model_config=True
    )
    ours = flexheads.AutoModelWithHeads.from_pretrained(tmp_path).generation_config
    # What is false is false whether it is told or not.
    own, expected = ({k: v for k, v in each.to_dict().items() if v} for each in (ours, usual))
    assert own | {"transformers_version": ""} == expected | {"transformers_version": ""}
    assert told.items() <= own.items()


def test_labels_are_checked_and_the_loss_is_that_of_transformers(pair: Any) -> None:
    static, model = pair
    call = tiny_inputs(model.config)
    labels = torch.randint(3, 99, call["input_ids"].shape)
    labels[0, 2:4] = -100
    for given in (labels, labels.int()):
        loss = model(**call, head="lm", labels=given).loss
        torch.testing.assert_close(loss, static(**call, labels=labels).loss)
    for wrong, why in (
        (labels[:, :3], "shape"),
        (labels[:2], "shape"),
        (labels.float(), "whole numbers"),
        (labels + 99, "0 to 98"),
    ):
        with pytest.raises(LabelError, match=why):
            model(**call, head="lm", labels=wrong)


def test_output_embeddings_are_those_of_the_active_head(pair: Any) -> None:
    static, model = pair
    model = copy.deepcopy(model)
    model.active_head = "lm"
    found = model.get_output_embeddings()
    assert torch.equal(found.weight, static.get_output_embeddings().weight)
    tied = model.heads["lm"].config.tied
    assert found.weight is (model._embeddings() if tied else model.heads["lm"].weight)
    hidden = torch.randn(2, found.in_features)
    torch.testing.assert_close(found(hidden), functional.linear(hidden, found.weight, found.bias))
    model.active_head = "topic"
    assert model.get_output_embeddings() is None


@pytest.mark.parametrize("size", [120, 80])
def test_heads_follow_resized_embeddings(pair: Any, size: int) -> None:
    _, model = pair
    model = copy.deepcopy(model)
    add = model.add_seq2seq_lm_head if model.config.is_encoder_decoder else model.add_causal_lm_head
    add("tied", tied=True, bias=True, set_active=False)
    randomise(model.heads["tied"])
    call = {name: value.clamp(max=79) for name, value in tiny_inputs(model.config).items()}
    names = ("lm", "a-lm", "tied")
    before = {name: model(**call, head=name).logits for name in names}
    model.active_head = "lm"
    model.resize_token_embeddings(size, mean_resizing=False)
    kept = min(size, 99)
    for name in names:
        logits = model(**call, head=name).logits
        assert logits.shape[-1] == model.heads[name].config.vocab_size == size
        torch.testing.assert_close(logits[..., :kept], before[name][..., :kept])
        assert generate(model, head=name).sequences.max() < size
    assert model.config.prediction_heads["tied"]["vocab_size"] == size


# --- other architectures --------------------------------------------------------------------------


def test_whisper_repeats_rows_before_it_encodes() -> None:
    _, model = twins("WhisperForConditionalGeneration")
    model.add_adapter("a", "double_seq_bn")
    model.add_adapter("b", "lora")
    randomise(model.adapters)
    setup = ["a", None, "b"]
    settings = {"do_sample": True, "top_k": 1, "num_return_sequences": 2}
    found = model.generate(
        **prompts(model.config), adapter_names=Rows(setup), max_new_tokens=NEW, **settings
    )
    for row, adapter in enumerate(setup):
        own = {name: value[row : row + 1] for name, value in prompts(model.config).items()}
        expected = model.generate(
            **own, adapter_names=adapter or [], max_new_tokens=NEW, **settings
        )
        assert torch.equal(found[2 * row : 2 * row + 2], expected)


def test_an_encoder_decoder_of_two_writes_with_its_own_head() -> None:
    model = tiny_model("encoder-decoder")
    randomise(model, std=0.2)
    bare = model._attachment.backbone
    for settings in WAYS.values():
        same(generate(model, **settings), generate(bare, **settings))
    model.add_adapter("a", "double_seq_bn")
    model.add_adapter("b", "lora")
    randomise(model.adapters)
    mixed = generate(model, adapter_names=Rows(["a", None, "b"]), num_beams=2).sequences
    for row, adapter in enumerate(["a", None, "b"]):
        own = alone(model, row, adapter_names=adapter or [], num_beams=2).sequences
        assert torch.equal(mixed[row : row + 1], own)


def test_an_encoder_alone_does_not_generate() -> None:
    model = tiny_model("bert")
    model.add_causal_lm_head("lm")
    with pytest.raises(UnsupportedError, match="is_decoder=True"):
        generate(model)
    assert type(model).can_generate()
    assert not type(tiny_model("vit")).can_generate()
