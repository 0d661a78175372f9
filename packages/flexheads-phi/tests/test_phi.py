"""Sub-layers side by side in Phi; blocks of several sizes in the projections of Phi-3."""

import pytest
import torch
from torch.nn import functional

from flexheads.testing import randomise, tiny_model, tiny_output


def bottleneck(part, hidden):
    """The adapter's own layers, written out: up(relu(down(x))), Houlsby et al. 2019."""
    state = part.state_dict()

    def layer(word):
        return [
            next(t for key, t in state.items() if word in key and key.endswith(end))
            for end in ("weight", "bias")
        ]

    inner = functional.relu(functional.linear(hidden, *layer("down")))
    return functional.linear(inner, *layer("up"))


@pytest.mark.parametrize(("config", "reads_all"), [("seq_bn", False), ("par_bn", True)])
def test_what_adapters_read_beside_the_attention(config, reads_all):
    model = tiny_model("phi")
    model.add_adapter("a", f"{config}[leave_out=[1]]", set_active=True)
    part = randomise(model.adapters["a"]).parts["layers.0.feed_forward"]
    found, layer = {}, model.model.layers[0]
    for name, module in (("layer", layer), ("attn", layer.self_attn.dense), ("mlp", layer.mlp.fc2)):
        module.register_forward_hook(
            lambda module, args, output, name=name: found.update({name: (args, output)})
        )
    tiny_output(model)
    (given, *_), result = found["layer"]
    result = result[0] if isinstance(result, tuple) else result
    attended, mlp = found["attn"][1], found["mlp"][1]
    read = given + attended if reads_all else mlp
    with torch.no_grad():
        delta = bottleneck(part, read) * getattr(part, "scaling", 1.0)
    assert delta.abs().max() > 1e-2
    torch.testing.assert_close(result, given + attended + mlp + delta)


ROWS = {
    "attn_matrices=['q']": ("self_attn.qkv_proj", slice(0, 32)),
    "attn_matrices=['k']": ("self_attn.qkv_proj", slice(32, 48)),
    "attn_matrices=['v']": ("self_attn.qkv_proj", slice(48, 64)),
    "attn_matrices=[], intermediate_lora=True": ("mlp.gate_up_proj", slice(64, 128)),
}


@pytest.mark.parametrize("fields", ROWS)
def test_low_rank_changes_go_into_their_own_rows(fields):
    model = tiny_model("phi3")
    path, rows = ROWS[fields]
    host = model.model.layers[0].get_submodule(path)
    before = host.weight.detach().clone()
    model.add_adapter("a", f"lora[{fields}, leave_out=[1]]", set_active=True)
    (part,) = randomise(model.adapters["a"]).parts.values()
    acting = tiny_output(model)
    model.merge_adapter("a")
    torch.testing.assert_close(tiny_output(model), acting)
    wanted = before.clone()
    wanted[rows] += (part.lora_B @ part.lora_A).detach() * part.scaling
    torch.testing.assert_close(host.weight.detach(), wanted)
    model.reset_adapter()
    assert torch.equal(host.weight, before)
