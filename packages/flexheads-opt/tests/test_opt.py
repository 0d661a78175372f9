"""A feed-forward network that sees all positions in one dimension; classes that enter inside."""

import pytest
import torch
import transformers

from flexheads import BatchSplit, Rows, init
from flexheads.errors import UnsupportedError
from flexheads.testing import (
    randomise,
    tiny_config,
    tiny_inputs,
    tiny_model,
    tiny_output,
    tiny_static,
)

FEED_FORWARD = (
    "seq_bn[use_gating=True]",
    "par_bn",
    "lora[intermediate_lora=True, output_lora=True, attn_matrices=[], use_gating=True]",
    "ia3",
    "ln_tuning",
)


@pytest.mark.parametrize("config", FEED_FORWARD)
def test_rows_go_their_own_ways(config):
    model = tiny_model("opt")
    model.add_adapter("a", config)
    model.add_adapter("b", config)
    randomise(model.adapters["a"], seed=1)
    randomise(model.adapters["b"], seed=2)
    alone = [tiny_output(model, adapter_names=name) for name in ("a", "b")]
    assert (alone[0] - alone[1]).abs().max() > 1e-3
    named = tiny_output(model, adapter_names=Rows(["b", "a", "b"]))
    torch.testing.assert_close(named, torch.stack([alone[1][0], alone[0][1], alone[1][2]]))
    split = tiny_output(model, adapter_names=BatchSplit("a", "b", batch_sizes=[1, 2]))
    torch.testing.assert_close(split, torch.cat([alone[0][:1], alone[1][1:]]))


def test_a_gate_is_one_number_for_a_row():
    model = tiny_model("opt")
    model.add_adapter("a", "seq_bn[use_gating=True]", set_active=True)
    randomise(model.adapters["a"])
    given = tiny_inputs(model.config)
    with torch.no_grad():
        whole = model(**given)[0]
        rows = [model(**{k: v[row : row + 1] for k, v in given.items()})[0] for row in range(3)]
    torch.testing.assert_close(torch.cat(rows), whole)


@pytest.mark.parametrize("config", ["loreft", "prompt_tuning[prompt_length=3]", "prefix_tuning"])
def test_the_static_class_runs_adapters_that_read_the_call(config):
    static = init(tiny_static("OPTForCausalLM"))
    model = tiny_model("opt")
    model.model.load_state_dict(static.model.state_dict())
    for each in (static, model):
        each.add_adapter("a", config, set_active=True)
        randomise(each.adapters["a"])
    hidden = tiny_output(model)
    with torch.no_grad():
        torch.testing.assert_close(tiny_output(static), static.lm_head(hidden))
    assert (hidden - tiny_output(model, adapter_names=[])).abs().max() > 1e-3


def test_a_prompt_stands_before_the_embeddings():
    """Lester et al. 2021, section 2: [P; X] enters the model, and positions count through it."""
    model = tiny_model("opt")
    model.add_adapter("a", "prompt_tuning[prompt_length=3]", set_active=True)
    (part,) = randomise(model.adapters["a"]).parts.values()
    given = tiny_inputs(model.config)
    embedded = model.model.decoder.embed_tokens(given["input_ids"])
    prompt = part().expand(3, -1, -1)
    mask = torch.cat([torch.ones(3, 3, dtype=torch.long), given["attention_mask"]], dim=1)
    got = tiny_output(model)
    with torch.no_grad():
        joined = torch.cat([prompt, embedded], dim=1)
        wanted = model(inputs_embeds=joined, attention_mask=mask, adapter_names=[])[0][:, 3:]
    torch.testing.assert_close(got, wanted)


def test_the_member_that_is_built_in_another_way_is_refused():
    model = transformers.OPTForCausalLM(tiny_config("opt", do_layer_norm_before=False))
    with pytest.raises(UnsupportedError, match="do_layer_norm_before=True; this one has"):
        init(model)
