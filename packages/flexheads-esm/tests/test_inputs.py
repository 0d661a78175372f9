"""ESM's embeddings read the mask, and its older models have other parts."""

import pytest
import torch

from flexheads import load_config
from flexheads.testing import randomise, tiny_inputs, tiny_model

OLD = {
    "position_embedding_type": "absolute",
    "emb_layer_norm_before": True,
    "token_dropout": False,
}


@torch.no_grad()
def run(model, inputs, **call):
    return model(**inputs, **call).last_hidden_state


@pytest.mark.parametrize("changes", [{}, OLD], ids=["new", "old"])
@pytest.mark.parametrize("config", ["double_seq_bn_inv", "prefix_tuning", "prompt_tuning"])
def test_what_is_padded_changes_nothing(config, changes):
    model = tiny_model("esm", **changes)
    fields = load_config(config)
    model.add_adapter("a", fields.replace(flat=True) if "flat" in fields else fields)
    randomise(model.adapters)
    inputs = tiny_inputs(model.config)
    before, after = run(model, inputs), run(model, inputs, adapter_names="a")
    assert not torch.allclose(before, after, atol=1e-3)
    short = {key: value[-1:, :-2] for key, value in inputs.items()}  # without its padding
    torch.testing.assert_close(after[-1:, :-2], run(model, short, adapter_names="a"))


@torch.no_grad()
def test_invertible_adapters_act_on_embeddings_that_the_mask_has_been_laid_on():
    model = tiny_model("esm")
    model.add_adapter("a", "seq_bn_inv")  # its bottlenecks add nothing
    coupling = randomise(model.adapters["a"].parts["embeddings"])
    inputs = tiny_inputs(model.config)
    got = run(model, inputs, adapter_names="a")
    model.base_model.embeddings.register_forward_hook(lambda module, args, out: coupling(out))
    torch.testing.assert_close(run(model, inputs), got)
