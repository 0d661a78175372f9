"""ELECTRA's embeddings may be narrower than its layers; what acts on them has their width."""

import pytest
import torch

from flexheads.testing import randomise, tiny_inputs, tiny_model


@pytest.mark.parametrize("width", [16, 32])
@torch.no_grad()
def test_invertible_adapters_prompts_and_generators_have_the_width_of_embeddings(width):
    model = tiny_model("electra", embedding_size=width)
    model.add_adapter("a", "seq_bn_inv")
    model.add_adapter("b", "prompt_tuning[prompt_length=4]")
    model.add_masked_lm_head("a")
    randomise(model.adapters)
    assert model.adapters["a"].parts["embeddings"](torch.zeros(1, 2, width)).shape == (1, 2, width)
    assert [tuple(p.shape) for p in model.adapters["b"].parameters()] == [(4, width)]
    (transform,) = model.heads["a"].layers
    assert transform.dense.weight.shape == (width, 32)
    inputs = tiny_inputs(model.config)
    hidden = {
        name: model(**inputs, adapter_names=name, head=[]).last_hidden_state for name in ("a", "b")
    }
    assert hidden["a"].shape == hidden["b"].shape == (3, 7, 32)
    embedded = model.base_model.embeddings
    coupling = model.adapters["a"].parts["embeddings"]
    scores = model(**inputs, adapter_names="a", head="a").logits
    weight = embedded.word_embeddings.weight
    expected = coupling.inverse(transform(hidden["a"])) @ weight.T + model.heads["a"].bias
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)
