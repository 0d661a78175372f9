"""Parallel: layers in which all branches are alike run once, and nobody can tell by the results."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

import flexheads
from flexheads import BatchSplit, Parallel, Stack
from flexheads.methods.config import load_config
from flexheads.sites.caches import fills_by_layer
from flexheads.testing import randomise, tiny_inputs, tiny_model, tiny_static
from flexheads.testing.repeat_checks import BRANCHES, tensors

REFT = ("loreft", "loreft[dropout=0.0]")
BRANCHING = Parallel(*BRANCHES)
TWO = Parallel(Stack("common", "one"), Stack("common", "two"))
each_mode = pytest.mark.parametrize("reentrant", [False, True], ids=["non_reentrant", "reentrant"])


def with_adapters(model: Any, upper: Any = "double_seq_bn", common: Any = "double_seq_bn") -> Any:
    """A model with one adapter everywhere, and two that leave out the first two layers."""
    model.add_adapter("common", common)
    place = {"layers": [2, 3]} if upper in REFT else {"leave_out": [0, 1]}
    for name in ("one", "two"):
        model.add_adapter(name, load_config(upper, **place))
    for seed, adapter in enumerate(model.adapters.values()):
        randomise(adapter, std=0.2, seed=seed)
    return model


def flexible(architecture: str = "bert", upper: Any = "double_seq_bn", **kwargs: Any) -> Any:
    model = randomise(tiny_model(architecture, num_hidden_layers=4), std=0.1)
    return with_adapters(model, upper, **kwargs)


def upper_only(architecture: str) -> Any:
    """A model with an adapter in all layers, and two in the upper half, or only in the last."""
    if architecture not in ("t5", "bart"):
        return flexible(architecture)
    model = randomise(tiny_model(architecture), std=0.1)
    model.add_adapter("common", "double_seq_bn")
    last = model._attachment.depth - 1
    for name in ("one", "two"):
        model.add_adapter(name, load_config("double_seq_bn", leave_out=list(range(last))))
    randomise(model.adapters, std=0.2)
    return model


def static(name: str, **changes: Any) -> Any:
    return with_adapters(flexheads.init(tiny_static(name, num_hidden_layers=4, **changes)))


@contextmanager
def rows_of_layers(model: Any) -> Iterator[list[int]]:
    """Notes how many rows each layer gives."""
    seen: list[int] = []

    def note(module: Any, args: Any, output: Any) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output).shape[0])

    layers = [entry.layer for entry in model._attachment.repeater.entries]
    handles = [layer.register_forward_hook(note) for layer in layers]
    yield seen
    for handle in handles:
        handle.remove()


@contextmanager
def repeating_at_the_entry(model: Any) -> Iterator[None]:
    """The same model without shared layers: every plan repeats rows with the inputs."""
    planner = model._attachment._planner
    original = planner.plan

    def plan(*args: Any, **kwargs: Any) -> Any:
        return dataclasses.replace(original(*args, **kwargs), repeat_at=None)

    planner.plan = plan
    model._changed()
    try:
        yield
    finally:
        del planner.plan
        model._changed()


def both(model: Any, call: Callable[[], Any]) -> tuple[Any, Any]:
    """What a call gives with shared layers, and with all rows from the beginning."""
    with rows_of_layers(model) as seen:
        shared = call()
    assert min(seen) < max(seen), "No layers were shared."
    with repeating_at_the_entry(model), rows_of_layers(model) as seen:
        whole = call()
    assert min(seen) == max(seen)
    return shared, whole


def assert_close(found: Any, expected: Any) -> None:
    one, two = dict(tensors(found)), dict(tensors(expected))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-5, msg=name)


# --- which layers ------------------------------------------------------------------------------


def test_rows_are_repeated_before_the_first_layer_that_differs() -> None:
    model = flexible()
    model.add_adapter("other", "seq_bn")
    model.add_adapter("last", load_config("seq_bn", leave_out=[0, 1, 2]))
    wanted = {
        BRANCHING: [3, 3, 9, 9],
        Parallel("one", "two"): [3, 3, 6, 6],
        Parallel("one", "last"): [3, 3, 6, 6],
        Parallel("last", Stack("last", "last")): [3, 3, 3, 6],
        Stack("common", Parallel("last", "two")): [3, 3, 6, 6],
        Parallel("common", "other"): [6, 6, 6, 6],
        Parallel("common", "one"): [6, 6, 6, 6],
        Parallel("one", "one"): [6, 6, 6, 6],  # nothing differs, so there is no such layer
        Parallel(BatchSplit("one", "two", batch_sizes=[1, 2]), "one"): [6, 6, 6, 6],
    }
    for setup, rows in wanted.items():
        with rows_of_layers(model) as seen:
            model(**tiny_inputs(model.config), adapter_names=setup)
        assert seen == rows, setup


def test_layers_that_are_dropped_are_shared() -> None:
    model = tiny_model("bert", num_hidden_layers=4)
    for name in ("a", "b"):
        model.add_adapter(name, "seq_bn")
    randomise(model.adapters)
    model.set_active_adapters(Parallel("a", "b"), skip_layers=[0, 1, 2])
    shared, whole = both(model, lambda: model(**tiny_inputs(model.config)))
    assert_close(shared, whole)
    model.set_active_adapters(Parallel("a", "b"))
    assert model._attachment.runtime.active.repeat_at is None


def test_hooks_are_there_only_where_an_adapter_begins_higher_up() -> None:
    def hooks(model: Any) -> int:
        return sum(len(entry.layer._forward_pre_hooks) for entry in entries)

    model = tiny_model("bert", num_hidden_layers=4)
    entries = model._attachment.repeater.entries
    model.add_adapter("a", "seq_bn")
    assert hooks(model) == 0
    model.add_adapter("b", load_config("seq_bn", leave_out=[0, 1, 2]))
    assert hooks(model) == 1
    model.add_adapter("c", load_config("seq_bn", leave_out=[0]))
    assert hooks(model) == 3
    for name in ("b", "c"):
        model.delete_adapter(name)
    assert hooks(model) == 0
    assert not model.bert._forward_pre_hooks


# --- what comes out ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "upper", ["lora", "par_bn", "ia3", "prefix_tuning", "loreft", "dora", "vera", "loha"]
)
@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_every_method_can_be_what_differs(architecture: str, upper: str) -> None:
    model = flexible(architecture, upper)
    shared, whole = both(model, lambda: model(**tiny_inputs(model.config), adapter_names=BRANCHING))
    assert_close(shared, whole)


@pytest.mark.parametrize(
    "common",
    [
        "lora",
        "seq_bn_inv",
        "prefix_tuning",
        "loreft",
        "prompt_tuning",
        "ln_tuning",
        "trainable_tokens[token_indices=[3, 4, 5, 6]]",
    ],
)
@pytest.mark.parametrize("architecture", ["bert", "llama", "opt"])
def test_every_method_can_be_what_is_shared(architecture: str, common: str) -> None:
    model = flexible(architecture, common=common)
    inputs = tiny_inputs(model.config)
    branches = Parallel(Stack("common", "one"), Stack("common", "two"))
    shared, whole = both(model, lambda: model(**inputs, adapter_names=branches))
    assert_close(shared, whole)
    alone = [model(**inputs, adapter_names=one).last_hidden_state for one in branches]
    torch.testing.assert_close(shared.last_hidden_state, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_shared_invertible_adapters_are_undone_for_each_head() -> None:
    model = flexible(common="seq_bn_inv")
    for name in ("one", "two"):
        model.add_masked_lm_head(name)
    model.set_active_adapters(Stack("common", Parallel("one", "two")))
    model.active_head = ["one", "two"]
    shared, whole = both(model, lambda: model(**tiny_inputs(model.config)))
    assert_close(shared["one"], whole["one"])
    assert_close(shared["two"], whole["two"])


def test_heads_labels_and_layers_that_heads_read_are_as_ever() -> None:
    model = flexible()
    model.add_classification_head("one", num_labels=3)
    model.add_tagging_head("two", num_labels=4, hidden_layer=1)
    model.set_active_adapters(Parallel("one", "two"))
    labels = {"one": torch.tensor([0, 1, 2]), "two": torch.zeros(3, 7, dtype=torch.long)}
    shared, whole = both(model, lambda: model(**tiny_inputs(model.config), labels=labels))
    for name in ("one", "two"):
        assert_close(shared[name], whole[name])
    torch.testing.assert_close(shared.loss, whole.loss)


@pytest.mark.parametrize(
    "name",
    [
        "BertForSequenceClassification",
        "BertForMaskedLM",
        "GPT2ForSequenceClassification",
        "LlamaForCausalLM",
        "ViTForImageClassification",
    ],
)
@pytest.mark.parametrize("as_dict", [True, False])
def test_static_heads_read_the_inputs_of_all_rows(name: str, as_dict: bool) -> None:
    model = static(name)
    inputs = tiny_inputs(model.config)
    shared, whole = both(
        model,
        lambda: model(
            **inputs, adapter_names=BRANCHING, return_dict=as_dict, output_hidden_states=True
        ),
    )
    assert_close(shared, whole)


def test_a_backbone_by_itself_shares_layers_too() -> None:
    model = flexheads.init(transformers.BertModel(tiny_model("bert", num_hidden_layers=4).config))
    with_adapters(model.eval())
    inputs = tiny_inputs(model.config)
    shared, whole = both(
        model, lambda: model(**inputs, adapter_names=BRANCHING, output_hidden_states=True)
    )
    assert_close(shared, whole)


def test_a_head_beside_the_parts_of_the_backbone_repeats_with_the_inputs() -> None:
    model = flexheads.init(tiny_static("T5ForConditionalGeneration"))
    depth = model._attachment.depth
    for name in ("one", "two"):
        model.add_adapter(name, load_config("seq_bn", leave_out=list(range(depth - 1))))
    randomise(model.adapters, std=0.2)
    inputs = tiny_inputs(model.config)
    labels = inputs.pop("decoder_input_ids")
    both = model(**inputs, labels=labels, adapter_names=Parallel("one", "two"))
    alone = [model(**inputs, labels=labels, adapter_names=name) for name in ("one", "two")]
    expected = torch.cat([output.logits for output in alone])
    torch.testing.assert_close(both.logits, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(both.loss, sum(output.loss for output in alone) / 2)


def test_inputs_count_whatever_their_order_and_size() -> None:
    model = flexible("llama")
    ids = tiny_inputs(model.config)["input_ids"]
    for batch in (1, 3, 7):  # as many as there are positions
        rows = ids.repeat(3, 1)[:batch]
        place = torch.arange(ids.shape[1])
        found = model(position_ids=place[None], input_ids=rows, adapter_names=BRANCHING)
        with_cache_position = model(input_ids=rows, adapter_names=BRANCHING, cache_position=place)
        alone = [model(rows, adapter_names=one).last_hidden_state for one in BRANCHING]
        for output in (found, with_cache_position):
            torch.testing.assert_close(
                output.last_hidden_state, torch.cat(alone), rtol=1e-4, atol=1e-5
            )


def test_scores_on_request_are_those_of_all_rows() -> None:
    model = flexible(common=load_config("seq_bn", use_gating=True))
    shared = model(
        **tiny_inputs(model.config), adapter_names=BRANCHING, output_adapter_gating_scores=True
    )
    gates = shared.adapter_gating_scores["common"]
    assert {scores["feed_forward"].shape[0] for scores in gates.values()} <= {3, 9}
    with repeating_at_the_entry(model):
        whole = model(
            **tiny_inputs(model.config), adapter_names=BRANCHING, output_adapter_gating_scores=True
        )
    assert_close(shared, whole)


# --- caches and generation ---------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "mistral"])
def test_a_new_cache_has_the_rows_of_all_branches_and_can_be_gone_on_from(
    architecture: str,
) -> None:
    model = flexible(architecture)
    inputs = tiny_inputs(model.config)
    ids = inputs["input_ids"]
    branches = Parallel(Stack("common", "one"), Stack("common", "two"))

    def begin() -> Any:
        return model(ids, adapter_names=branches, use_cache=True)

    shared, whole = both(model, begin)
    assert_close(shared, whole)
    assert {t.shape[0] for name, t in tensors(shared) if "past_key_values" in name} == {6}
    more = ids[:, :2]
    with rows_of_layers(model) as seen:
        found = model(more, adapter_names=branches, past_key_values=shared.past_key_values)
    assert seen == [6, 6, 6, 6]
    expected = model(torch.cat([ids, more], dim=1), adapter_names=branches, use_cache=False)
    torch.testing.assert_close(
        found.last_hidden_state, expected.last_hidden_state[:, -2:], rtol=1e-4, atol=1e-5
    )


def cache_for(model: Any) -> Any:
    """A cache that holds nothing yet."""
    if model.config.is_encoder_decoder:
        return EncoderDecoderCache(DynamicCache(), DynamicCache())
    return DynamicCache(config=model.config)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "mistral", "t5", "bart"])
def test_an_empty_cache_is_filled_by_layers_that_are_shared(architecture: str) -> None:
    model = upper_only(architecture)
    inputs = tiny_inputs(model.config)

    def begin() -> Any:
        cache = cache_for(model)
        output = model(**inputs, adapter_names=TWO, past_key_values=cache, use_cache=True)
        return output, cache

    (shared, cache), (whole, _) = both(model, begin)
    assert_close(shared, whole)
    assert {t.shape[0] for _, t in tensors(cache)} == {6}
    both_sides = model.config.is_encoder_decoder
    name = "decoder_input_ids" if both_sides else "input_ids"
    more = {**inputs, name: inputs[name][:, :2]}
    if not both_sides:
        seen = more.pop("attention_mask")
        more["attention_mask"] = torch.cat([seen, torch.ones_like(seen[:, :2])], dim=1)
    found = model(**more, adapter_names=TWO, past_key_values=cache)
    joined = {**more, name: torch.cat([inputs[name], more[name]], dim=1)}
    for number, branch in enumerate(TWO):
        alone = model(**joined, adapter_names=branch, use_cache=False).last_hidden_state[:, -2:]
        rows = found.last_hidden_state[number * 3 : number * 3 + 3]
        torch.testing.assert_close(rows, alone, rtol=1e-4, atol=1e-5)


def test_windows_that_are_shorter_than_the_sequence_are_kept_for_all_rows() -> None:
    model = with_adapters(
        randomise(tiny_model("mistral", num_hidden_layers=4, sliding_window=4), std=0.1)
    )
    ids = tiny_inputs(model.config)["input_ids"]

    def begin_and_go_on() -> Any:
        cache = DynamicCache(config=model.config)
        model(ids, adapter_names=TWO, past_key_values=cache, use_cache=True)
        assert {layer.keys.shape[0] for layer in cache.layers} == {6}
        return model(ids[:, :1], adapter_names=TWO, past_key_values=cache)

    shared, whole = both(model, begin_and_go_on)
    assert_close(shared, whole)


class OwnCache(DynamicCache):
    """A class of somebody's own, which may do anything with what it is given."""


@pytest.mark.parametrize("kind", ["static", "own", "filled"])
def test_other_caches_have_all_rows_from_the_beginning(kind: str) -> None:
    model = flexible("llama")
    ids = tiny_inputs(model.config)["input_ids"]
    cache: Any = OwnCache() if kind == "own" else DynamicCache()
    if kind == "static":
        cache = StaticCache(config=model.config, max_cache_len=16)
    if kind == "filled":
        model(ids, adapter_names=TWO, past_key_values=cache)
    with rows_of_layers(model) as seen:
        found = model(ids, adapter_names=TWO, past_key_values=cache)
    assert seen == [6, 6, 6, 6]
    whole = torch.cat([ids, ids], dim=1) if kind == "filled" else ids
    expected = model(whole, adapter_names=TWO, use_cache=False).last_hidden_state[:, -7:]
    torch.testing.assert_close(found.last_hidden_state, expected, rtol=1e-4, atol=1e-5)


def test_which_caches_take_any_rows() -> None:
    full, offloading = DynamicCache(), DynamicCache()
    full.update(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1), 0)
    offloading.offloading = True
    assert fills_by_layer(DynamicCache())
    assert fills_by_layer(EncoderDecoderCache(DynamicCache(), DynamicCache()))
    for other in (full, offloading, OwnCache(), EncoderDecoderCache(DynamicCache(), full), ()):
        assert not fills_by_layer(other)


@pytest.mark.parametrize("beams", [1, 2])
def test_generation_gives_the_tokens_of_each_branch(beams: int) -> None:
    model = flexible("gpt2")
    model.add_causal_lm_head("lm")
    inputs = tiny_inputs(model.config)
    how: dict[str, Any] = {"max_new_tokens": 4, "num_beams": beams, "do_sample": False}
    branches = Parallel(Stack("common", "one"), Stack("common", "two"))
    found = model.generate(**inputs, adapter_names=branches, head="lm", **how)
    alone = [model.generate(**inputs, adapter_names=one, head="lm", **how) for one in branches]
    length = max(tokens.shape[1] for tokens in alone)
    pad = model.config.pad_token_id
    padded = [torch.nn.functional.pad(t, (0, length - t.shape[1]), value=pad) for t in alone]
    assert torch.equal(found, torch.cat(padded))


@pytest.mark.parametrize("how", [{}, {"num_beams": 3, "num_return_sequences": 2}], ids=str)
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "t5", "bart"])
def test_the_first_call_of_a_generation_shares_layers(
    architecture: str, how: dict[str, Any]
) -> None:
    """An encoder that has no part in the difference reads one copy of the batch."""
    model = upper_only(architecture)
    both_sides = model.config.is_encoder_decoder
    (model.add_seq2seq_lm_head if both_sides else model.add_causal_lm_head)("lm")
    inputs = tiny_inputs(model.config)
    inputs.pop("decoder_input_ids", None)
    wanted = {"min_new_tokens": 4, "max_new_tokens": 4, "do_sample": False, **how}

    def generate(setup: Any) -> Any:
        return model.generate(**inputs, adapter_names=setup, head="lm", **wanted)

    rows = 3 * how.get("num_beams", 1)
    with rows_of_layers(model) as seen:
        found = generate(TWO)
    encoded = [3, 3] if both_sides else []
    first = [rows, 2 * rows] if both_sides else [rows, rows, 2 * rows, 2 * rows]
    later = [2 * rows] * len(first) * 3
    assert seen == [*encoded, *first, *later]
    assert torch.equal(found, torch.cat([generate(branch) for branch in TWO]))


def test_calls_inside_of_a_generation_are_no_copies() -> None:
    """A processor of scores may run the model on rows of its own, with a cache of its own."""
    model = flexible("gpt2")
    model.add_causal_lm_head("lm")
    inputs = tiny_inputs(model.config)
    others = (inputs["input_ids"].repeat(2, 1) + torch.arange(6)[:, None]) % 20
    given: list[torch.Tensor] = []

    def process(tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for cache in (DynamicCache(), None):
            given.append(model(others, past_key_values=cache, use_cache=True).logits)
        return scores

    how = {"adapter_names": TWO, "head": "lm", "max_new_tokens": 2, "logits_processor": [process]}
    model.generate(**inputs, **how)
    rows = [
        model(own, adapter_names=branch, head="lm").logits
        for own, branch in zip(others.split(3), TWO, strict=True)
    ]
    assert len(given) == 4
    for found in given:
        torch.testing.assert_close(found, torch.cat(rows), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("upper", [True, False])
@pytest.mark.parametrize("kind", ["output", "tuple"])
def test_what_an_encoder_has_given_is_repeated(kind: str, upper: bool) -> None:
    model = upper_only("t5")
    model.add_adapter("everywhere", "double_seq_bn")
    randomise(model.adapters["everywhere"], std=0.2)
    branches = TWO if upper else Parallel("common", "everywhere")
    inputs = tiny_inputs(model.config)
    encoded = model.get_encoder()(inputs.pop("input_ids"))
    inputs["encoder_outputs"] = encoded if kind == "output" else encoded.to_tuple()
    found = model(**inputs, adapter_names=branches).last_hidden_state
    alone = [model(**inputs, adapter_names=branch).last_hidden_state for branch in branches]
    torch.testing.assert_close(found, torch.cat(alone), rtol=1e-4, atol=1e-5)


# --- training ----------------------------------------------------------------------------------


def gradients(model: Any, **call: Any) -> dict[str, torch.Tensor]:
    hidden = model(**tiny_inputs(model.config), adapter_names=BRANCHING, **call)
    hidden.last_hidden_state[..., :4].pow(2).mean().backward()
    found = {n: p.grad for n, p in model.adapters.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


@each_mode
@pytest.mark.parametrize("architecture", ["bert", "llama"])
@pytest.mark.parametrize("method", ["double_seq_bn", "loreft[dropout=0.0]"])
def test_gradients_are_the_same_with_checkpointing(
    architecture: str, method: str, reentrant: bool
) -> None:
    changes = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    changes = changes if architecture == "bert" else {"use_cache": False}
    model = randomise(tiny_model(architecture, num_hidden_layers=4, **changes), std=0.1)
    with_adapters(model, method, method).train()
    model.freeze_model()
    shared, whole = both(model, lambda: gradients(model))
    assert shared.keys() == whole.keys()
    assert {name.partition(".")[0] for name in shared} == {"common", "one", "two"}
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    last = model._attachment.repeater.entries[-1].layer
    linears = [m for m in last.modules() if isinstance(m, torch.nn.Linear)]
    runs: list[int] = []
    linears[0].register_forward_hook(lambda module, args, output: runs.append(output.shape[0]))
    recomputed = gradients(model)
    assert runs == [9, 9]
    assert [model._attachment.runtime.peek(key) for key in ("call", "once")] == [None, None]
    for name, expected in whole.items():
        scale = expected.abs().max().clamp(min=1e-6)
        for found in (shared[name], recomputed[name]):
            torch.testing.assert_close(found / scale, expected / scale, rtol=1e-3, atol=1e-4)


# --- compiled, copied, saved -------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["flexible", "static"])
def test_compiled_as_one_graph(kind: str) -> None:
    model = tiny_model("bert")
    if kind == "static":
        model = flexheads.init(tiny_static("BertForSequenceClassification"))
    for name in ("one", "two"):
        model.add_adapter(name, load_config("seq_bn", leave_out=[0]))
    randomise(model.adapters)
    model.set_active_adapters(Parallel("one", "two"))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        for batch in (3, 5) if kind == "flexible" else (3,):  # other sizes once they vary
            inputs = tiny_inputs(model.config, batch=batch)
            expected, _ = both(model, lambda: model(**inputs))  # noqa: B023
            assert_close(compiled(**inputs), expected)


def test_a_part_that_is_compiled_already_repeats_at_the_entry() -> None:
    model = tiny_model("bert", num_hidden_layers=4)
    model.add_adapter("common", "seq_bn")
    model.bert.pooler.compile(backend="eager")
    model.add_adapter("one", load_config("seq_bn", leave_out=[0, 1]))
    randomise(model.adapters)
    with torch.no_grad(), rows_of_layers(model) as seen:
        model(**tiny_inputs(model.config), adapter_names=Parallel("one", []))
    assert seen == [6, 6, 6, 6]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_share_layers_by_themselves(copied: Callable[[Any], Any]) -> None:
    model = flexible()
    expected = model(**tiny_inputs(model.config), adapter_names=BRANCHING)
    twin = copied(model)
    del model
    with rows_of_layers(twin) as seen:
        found = twin(**tiny_inputs(twin.config), adapter_names=BRANCHING)
    assert seen == [3, 3, 9, 9]
    assert_close(found, expected)
