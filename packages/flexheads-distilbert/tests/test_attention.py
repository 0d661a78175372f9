"""Prefixes in DistilBERT's attention, whose releases are called in different ways."""

import torch
from torch.nn.functional import linear

from flexheads import Stack
from flexheads.testing import randomise, tiny_inputs, tiny_model


@torch.no_grad()
def test_gates_at_the_projections_read_the_input_alone_beside_a_prefix():
    model = tiny_model("distilbert")
    seen = []
    for name in ("k_lin", "v_lin"):
        projection = model.base_model.transformer.layer[0].attention.get_submodule(name)
        projection.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    inputs = tiny_inputs(model.config)
    model(**inputs)
    model.add_adapter("prefix", "prefix_tuning[flat=True,prefix_length=5]")
    model.add_adapter("gated", "lora[attn_matrices=['k','v'],use_gating=True]")
    randomise(model.adapters)
    model(**inputs, adapter_names=Stack("prefix", "gated"))
    torch.testing.assert_close(seen[2:], seen[:2])


@torch.no_grad()
def test_a_prefix_is_keys_and_values_that_every_token_may_attend_to():
    model = tiny_model("distilbert", attn_implementation="eager")
    model.add_adapter("a", "prefix_tuning[flat=True,prefix_length=5]", set_active=True)
    randomise(model.adapters)
    attention = model.base_model.transformer.layer[0].attention
    seen = {}
    attention.q_lin.register_forward_hook(lambda module, args, out: seen.update(hidden=args[0]))
    attention.out_lin.register_forward_pre_hook(lambda module, args: seen.update(context=args[0]))
    inputs = tiny_inputs(model.config)
    model(**inputs)
    heads, size = model.config.n_heads, model.config.dim // model.config.n_heads
    layers = model.config.n_layers
    pool = model.adapters["a"].state_dict()["shared.self.control_trans"]
    prefix = pool.view(5, layers, 2, heads, size)[:, 0].permute(1, 2, 0, 3)  # (2, heads, 5, size)
    rows = []
    for hidden, mask in zip(seen["hidden"], inputs["attention_mask"], strict=True):
        query, key, value = (
            linear(hidden, projection.weight, projection.bias).view(-1, heads, size).transpose(0, 1)
            for projection in (attention.q_lin, attention.k_lin, attention.v_lin)
        )
        real = mask.bool()
        key = torch.cat([prefix[0], key[:, real]], dim=1)
        value = torch.cat([prefix[1], value[:, real]], dim=1)
        scores = (query @ key.transpose(1, 2) / size**0.5).softmax(dim=-1)
        rows.append((scores @ value).transpose(0, 1).flatten(1))
    torch.testing.assert_close(seen["context"], torch.stack(rows), atol=1e-5, rtol=0)
