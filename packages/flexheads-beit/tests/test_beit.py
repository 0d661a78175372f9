"""What is BEiT's own: sub-layers that share a module, biases by position, the model's pooling."""

import pytest
import torch

from flexheads.errors import UnsupportedError
from flexheads.testing import randomise, tiny_inputs, tiny_model

BIASES = ("use_relative_position_bias", "use_shared_relative_position_bias")


@torch.no_grad()
@pytest.mark.parametrize(("role", "norm"), [("attention", "before"), ("feed_forward", "after")])
def test_each_sub_layer_has_its_own_adapter(role, norm):
    """Both results go through the one module; only that of the adapter's sub-layer changes."""
    model = tiny_model("beit")
    randomise(model.beit, std=0.1)
    fields = "mh_adapter=True,output_adapter=False" if role == "attention" else "mh_adapter=False"
    model.add_adapter("a", config=f"par_bn[{fields},leave_out=[1]]", set_active=True)
    (address,) = model.adapters["a"].parts
    assert address == f"layers.0.{role}"
    part = randomise(model.adapters["a"]).parts[address]
    inputs = tiny_inputs(model.config)
    got = model(**inputs).last_hidden_state
    layer = model._attachment.sites[address].host
    calls, seen = [], {}
    layer.get_submodule(f"layernorm_{norm}").register_forward_pre_hook(
        lambda module, args: seen.update(r=args[0])
    )

    def change(module, args, output):
        calls.append(output)
        own = len(calls) == (1 if role == "attention" else 2)
        return output + part.fused(seen["r"]) if own else output

    layer.drop_path.register_forward_hook(change)
    torch.testing.assert_close(model(**inputs, adapter_names=[]).last_hidden_state, got)
    assert len(calls) == 2


@torch.no_grad()
@pytest.mark.parametrize("mean", [False, True])
def test_heads_read_what_the_model_pools(mean):
    model = tiny_model("beit", use_mean_pooling=mean)
    model.add_image_classification_head("a", num_labels=3)
    inputs = tiny_inputs(model.config)
    hidden = model(**inputs, head=[]).last_hidden_state
    pooled = hidden[:, 0]
    if mean:
        pooled = model.beit.pooler.layernorm(hidden[:, 1:].mean(1))
    torch.testing.assert_close(model(**inputs).logits, model.heads["a"].layers(pooled))


@pytest.mark.parametrize("bias", BIASES)
def test_prompts_are_refused_where_positions_have_biases(bias):
    model = tiny_model("beit", **{bias: True})
    with pytest.raises(UnsupportedError, match="looks positions up by their number"):
        model.add_adapter("a", config="prompt_tuning")
    assert not model.adapters


@torch.no_grad()
@pytest.mark.parametrize("bias", BIASES)
def test_prefixes_have_no_part_in_biases_by_position_or_are_refused(bias):
    model = tiny_model("beit", **{bias: True})
    inputs = tiny_inputs(model.config)
    before = model(**inputs).last_hidden_state
    try:
        model.add_adapter("a", config="prefix_tuning", set_active=True)
        randomise(model.adapters)
        acting = model(**inputs).last_hidden_state
    except UnsupportedError:
        model.set_active_adapters(None)
    else:
        assert not torch.allclose(acting, before, atol=1e-3)
        for part in model.adapters["a"].parts.values():  # keys of little weight, values of none
            for parameter in part.parameters():
                parameter.zero_()
        zero = model(**inputs).last_hidden_state
        assert zero.isfinite().all()
        model.delete_adapter("a")
    assert torch.equal(model(**inputs).last_hidden_state, before)
