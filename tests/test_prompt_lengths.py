"""Rows of one batch have prompts of any length, in any place, or none: each row is as alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import DynamicCache, T5PreTrainedModel

import flexheads
from flexheads import BatchSplit, MultiTask, Parallel, Rows, Stack
from flexheads.errors import UnsupportedError
from flexheads.testing import randomise, tiny_inputs, tiny_model, tiny_static

V5 = int(transformers.__version__.partition(".")[0]) >= 5
PROMPTS = {
    "short": (2, "prefix"),
    "long": (5, "prefix"),
    "behind": (3, "prefix_after_bos"),
}
SETUPS = {
    "lengths": (Rows(["short", "long", "behind"]), ["short", "long", "behind"]),
    "stacks": (Rows([None, Stack("short", "behind"), "long"]), [[], ["short", "behind"], "long"]),
    "split": (BatchSplit("long", "short", batch_sizes=[1, 2]), ["long", "short", "short"]),
}
ENCODERS = ("bert", "deberta", "modernbert")
DECODERS = ("gpt2", "opt", "llama")
TWO_SIDED = ("t5", "bart")
REFT = "loreft[prefix_positions=2,suffix_positions=2,dropout=0.0]"


def with_prompts(model: Any) -> Any:
    for name, (length, place) in PROMPTS.items():
        model.add_adapter(name, flexheads.PromptTuningConfig(prompt_length=length, combine=place))
    for seed, name in enumerate(PROMPTS):
        randomise(model.adapters[name], std=0.5, seed=seed)
    return model


def prompted(architecture: str, **changes: Any) -> Any:
    pytest.importorskip(f"flexheads_{architecture}")
    return with_prompts(randomise(tiny_model(architecture, **changes), std=0.2))


def of_row(inputs: dict[str, Any], row: int) -> dict[str, Any]:
    return {name: tensor[row : row + 1] for name, tensor in inputs.items()}


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    scale = expected.abs().max().clamp(min=1e-6)
    torch.testing.assert_close(found / scale, expected / scale, atol=1e-5, rtol=0)


# --- one call -------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("architecture", [*ENCODERS, *DECODERS, *TWO_SIDED])
def test_each_row_is_as_alone(architecture: str, attention: str, masked: bool) -> None:
    if attention == "sdpa" and (
        architecture == "deberta" or (architecture == "t5" and not T5PreTrainedModel._supports_sdpa)
    ):
        pytest.skip("It has no such attention.")
    model = prompted(architecture, attn_implementation=attention)
    inputs = tiny_inputs(model.config)
    if not masked:
        inputs.pop("attention_mask", None)
    real = inputs.get("attention_mask")
    real = None if real is None or architecture in TWO_SIDED else real.bool()
    for setup, chains in SETUPS.values():
        found = model(**inputs, adapter_names=setup, output_hidden_states=True)
        seen = []
        for row, chain in enumerate(chains):
            own = of_row(inputs, row)
            alone = model(**own, adapter_names=chain, output_hidden_states=True)
            keep = slice(None) if real is None else real[row]
            close(found.last_hidden_state[row][keep], alone.last_hidden_state[0][keep])
            for one, other in zip(found[_states(found)], alone[_states(alone)], strict=True):
                close(one[row][keep], other[0][keep])
            if getattr(alone, "pooler_output", None) is not None:
                close(found.pooler_output[row], alone.pooler_output[0])
            bare = model(**own, adapter_names=[]).last_hidden_state
            seen.append((alone.last_hidden_state - bare)[0][keep].abs().max())
        assert max(seen) > 1e-3, "The prompts change nothing."


def _states(output: Any) -> str:
    return "decoder_hidden_states" if "decoder_hidden_states" in output else "hidden_states"


@pytest.mark.parametrize("architecture", ["vit", "beit"])
def test_a_model_without_masks_refuses_other_lengths(architecture: str) -> None:
    model = prompted(architecture)
    inputs = tiny_inputs(model.config)
    with pytest.raises(UnsupportedError, match="takes no attention mask"):
        model(**inputs, adapter_names=Parallel("short", "long"))
    model.add_adapter("beside", flexheads.PromptTuningConfig(prompt_length=3))
    randomise(model.adapters["beside"], std=0.5, seed=7)
    found = model(**inputs, adapter_names=Parallel("behind", "beside")).last_hidden_state
    alone = [model(**inputs, adapter_names=n).last_hidden_state for n in ("behind", "beside")]
    close(found, torch.cat(alone))


def test_gates_are_means_of_whole_rows() -> None:
    """So what fills a row up would be in them."""
    model = prompted("bert")
    model.add_adapter("gated", "seq_bn[use_gating=True]")
    for refused in (Rows(["gated", "short", "short"]), Parallel(["gated", "short"], "long")):
        with pytest.raises(UnsupportedError, match="'gated' has gates"):
            model.set_active_adapters(refused)
    inputs = tiny_inputs(model.config)
    setup = Rows([Stack("gated", "long"), "short", "behind"])  # that row is the longest
    found = model(**inputs, adapter_names=setup).last_hidden_state[:1]
    alone = model(**of_row(inputs, 0), adapter_names=setup[0]).last_hidden_state
    real = inputs["attention_mask"][:1].bool()
    close(found[real], alone[real])


def test_what_an_encoder_gave_needs_its_mask() -> None:
    model = prompted("t5")
    inputs = tiny_inputs(model.config)
    ids = inputs.pop("input_ids")
    setup = Rows(["short", "long", None])
    with flexheads.active(model, setup):
        states = model.get_encoder()(ids, attention_mask=inputs["attention_mask"])
    found = model(encoder_outputs=states, **inputs, adapter_names=setup)
    close(
        found.last_hidden_state,
        model(input_ids=ids, **inputs, adapter_names=setup).last_hidden_state,
    )
    del inputs["attention_mask"]
    with pytest.raises(UnsupportedError, match="the encoder gave encoder_outputs"):
        model(encoder_outputs=states, **inputs, adapter_names=setup)


def test_a_head_that_reads_the_first_position_reads_that_of_each_row() -> None:
    model = prompted("gpt2")
    model.add_classification_head("first", pooling="first_token")
    inputs = tiny_inputs(model.config)
    setup, chains = SETUPS["lengths"]
    found = model(**inputs, adapter_names=setup, head="first").logits
    alone = [
        model(**of_row(inputs, row), adapter_names=chain, head="first").logits
        for row, chain in enumerate(chains)
    ]
    close(found, torch.cat(alone))


def test_gradients_are_those_of_each_row_alone() -> None:
    model = prompted("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model.freeze_model()
    inputs = tiny_inputs(model.config)
    real = inputs["attention_mask"][..., None]
    setup, chains = SETUPS["lengths"]
    (model(**inputs, adapter_names=setup).last_hidden_state * real).square().sum().backward()
    found = [p.grad for p in model.adapters.parameters()]
    model.zero_grad(set_to_none=True)
    for row, chain in enumerate(chains):
        hidden = model(**of_row(inputs, row), adapter_names=chain).last_hidden_state
        (hidden * real[row]).square().sum().backward()
    for one, parameter in zip(found, model.adapters.parameters(), strict=True):
        close(one, parameter.grad)


@pytest.mark.skipif(not V5, reason="graphs are promised for 5.x")
@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_compiled_once_for_all_tasks(architecture: str) -> None:
    model = prompted(architecture)
    model.set_active_adapters(MultiTask("short", "long", "behind", None))
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    inputs = tiny_inputs(model.config)
    with torch.no_grad():
        for numbers in ([0, 1, 2], [3, 3, 1]):
            ids = torch.tensor(numbers)
            found = compiled(**inputs, task_ids=ids).last_hidden_state
            close(found, model(**inputs, task_ids=ids).last_hidden_state)
    assert counter.frame_count == 1


# --- caches and generation ------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"use_cache": False}], ids=str)
@pytest.mark.parametrize("architecture", ["gpt2", "opt", "mistral", "t5"])
def test_each_row_writes_as_alone(architecture: str, how: dict[str, Any]) -> None:
    """Also where a layer looks back by fewer positions than there are."""
    model = prompted(architecture, **({"sliding_window": 4} if architecture == "mistral" else {}))
    two_sided = architecture in TWO_SIDED
    (model.add_seq2seq_lm_head if two_sided else model.add_causal_lm_head)("lm")
    randomise(model.heads, std=0.3)
    inputs = tiny_inputs(model.config)
    inputs.pop("decoder_input_ids", None)
    if not two_sided:
        inputs["attention_mask"] = inputs["attention_mask"].flip(1)
    wanted = {"head": "lm", "min_new_tokens": 3, "max_new_tokens": 3, "do_sample": False, **how}
    for setup, chains in (SETUPS["stacks"], (Parallel("long", "short"), ["long"] * 3)):
        found = model.generate(**inputs, adapter_names=setup, **wanted)
        for row, chain in enumerate(chains):
            alone = model.generate(**of_row(inputs, row), adapter_names=chain, **wanted)
            assert torch.equal(found[row], alone[0])


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "llama"])
def test_calls_that_go_on_from_a_cache_count_positions_by_row(architecture: str) -> None:
    model = prompted(architecture)
    ids = tiny_inputs(model.config)["input_ids"]
    setup, chains = SETUPS["lengths"]
    cache, parts = DynamicCache(), (ids, ids[:, :2], ids[:, :1])
    found = [
        model(part, adapter_names=setup, past_key_values=cache, use_cache=True).last_hidden_state
        for part in parts
    ]
    for row, chain in enumerate(chains):
        whole = torch.cat(parts, dim=1)[row : row + 1]
        alone = model(whole, adapter_names=chain).last_hidden_state
        close(torch.cat(found, dim=1)[row], alone[0])


# --- beside what acts on the first and the last tokens --------------------------------------------


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("architecture", ["bert", "deberta", "modernbert", "gpt2", "t5", "bart"])
def test_positions_of_prompts_are_no_tokens(architecture: str, masked: bool) -> None:
    """In whatever order the adapters come, and whether or not a mask says that all are seen."""
    outputs = []
    for first in (True, False):
        model = randomise(tiny_model(architecture), std=0.2)
        if first:
            model.add_adapter("edit", REFT)
        with_prompts(model)
        if not first:
            model.add_adapter("edit", REFT)
        randomise(model.adapters["edit"], std=0.5, seed=9)
        inputs = tiny_inputs(model.config)
        if masked:
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        else:
            inputs.pop("attention_mask", None)
        setup = Rows([Stack("short", "edit"), Stack("long", "edit"), "edit"])
        outputs.append(model(**inputs, adapter_names=setup).last_hidden_state)
        for row, chain in enumerate(setup):
            alone = model(**of_row(inputs, row), adapter_names=chain).last_hidden_state
            close(outputs[-1][row], alone[0])
    close(*outputs)


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "t5"])
def test_a_mask_that_hides_nothing_is_as_none(architecture: str) -> None:
    model = prompted(architecture)
    model.add_adapter("edit", REFT)
    randomise(model.adapters["edit"], std=0.5, seed=9)
    inputs = tiny_inputs(model.config)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    masked = model(**inputs, adapter_names=Stack("long", "edit")).last_hidden_state
    del inputs["attention_mask"]
    close(masked, model(**inputs, adapter_names=Stack("long", "edit")).last_hidden_state)


@pytest.mark.parametrize("activated", [True, False])
def test_a_backbone_by_itself_knows_the_tokens_of_its_call(activated: bool) -> None:
    """Hooks at the model itself would run before it knows what is in force."""
    inside = flexheads.init(tiny_static("BertForSequenceClassification"))
    itself = flexheads.init(transformers.BertModel(inside.config)).eval()
    itself.load_state_dict(inside.bert.state_dict(), strict=False)
    for model in (inside, itself):
        for seed, name in enumerate(("one", "two")):
            model.add_adapter(name, REFT)
            randomise(model.adapters[name], std=0.5, seed=seed)
    inputs = tiny_inputs(inside.config)
    real = inputs["attention_mask"].bool()
    for setup, times in (("one", 1), (Parallel("one", "two"), 2)):
        for model in (inside, itself):
            model.set_active_adapters(setup if activated else None)
        named = {} if activated else {"adapter_names": setup}
        expected = inside(**inputs, **named, output_hidden_states=True).hidden_states[-1]
        found = itself(**inputs, **named).last_hidden_state
        close(found[real.repeat(times, 1)], expected[real.repeat(times, 1)])
