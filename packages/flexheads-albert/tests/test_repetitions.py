"""An adapter sits in ALBERT's shared layers once and acts in every repetition."""

import pytest
import torch

from flexheads.testing import randomise, tiny_inputs, tiny_model, tiny_output


def one_layer():
    return tiny_model("albert", num_hidden_groups=1, num_hidden_layers=3)


def test_one_part_for_all_repetitions():
    model = one_layer()
    model.add_adapter("a", "double_seq_bn")
    assert sorted(model.adapters["a"].parts) == ["layers.0.attention", "layers.0.feed_forward"]


@pytest.mark.parametrize("config", ["double_seq_bn", "mh_par"])
def test_each_repetition_is_the_definition(config):
    """The attention's adapter sees its result (sequential) or its input (parallel), each time."""
    fields = {"double_seq_bn": "double_seq_bn", "mh_par": "par_bn[mh_adapter=True]"}[config]
    model = one_layer()
    model.add_adapter("a", fields)
    randomise(model.adapters["a"])
    got = tiny_output(model, adapter_names="a")
    parts, scale = model.adapters["a"].state_dict(), 1.0
    if config == "mh_par":
        scale = model.adapters["a"].config.scaling
    assert isinstance(scale, float)
    layer = model.base_model.encoder.albert_layer_groups[0].albert_layers[0]
    calls, seen = [], {}

    def change(stem, inner):
        own = {k.removeprefix(stem): t for k, t in parts.items() if k.startswith(stem)}
        down = torch.relu if config == "mh_par" else torch.nn.functional.silu
        hidden = down(torch.nn.functional.linear(inner, own["down.weight"], own["down.bias"]))
        return torch.nn.functional.linear(hidden, own["up.weight"], own["up.bias"]) * scale

    def note(key):
        def hook(module, args, output=None):
            seen[key] = args[0] if output is None else output

        return hook

    def at(role):
        def hook(module, args):
            calls.append(role)
            x, r = seen[f"{role}.x"], seen[f"{role}.r"]
            inner = r if config == "mh_par" else x
            return (args[0] + change(f"layers.0.{role}.", inner),)

        return hook

    layer.attention.output_dropout.register_forward_hook(note("attention.x"))
    layer.attention.register_forward_pre_hook(note("attention.r"))
    layer.ffn_output.register_forward_hook(note("feed_forward.x"))
    layer.ffn.register_forward_pre_hook(note("feed_forward.r"))
    layer.attention.LayerNorm.register_forward_pre_hook(at("attention"))
    layer.full_layer_layer_norm.register_forward_pre_hook(at("feed_forward"))
    expected = tiny_output(model, adapter_names=[])
    assert calls == ["attention", "feed_forward"] * 3
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_a_layer_that_is_skipped_is_skipped_in_every_repetition():
    model = tiny_model("albert")  # two layers, each of which runs twice
    before = tiny_output(model)
    model.add_adapter("a")
    randomise(model.adapters["a"])
    model.set_active_adapters("a", skip_layers=[0, 1])
    assert torch.equal(tiny_output(model), before)
    model.set_active_adapters("a", skip_layers=[1])
    assert not torch.allclose(tiny_output(model), before, atol=1e-3)


def test_gating_scores_are_those_of_the_last_repetition():
    model = one_layer()
    model.add_adapter("a", "seq_bn[use_gating=True]", set_active=True)
    randomise(model.adapters["a"])
    inputs = tiny_inputs(model.config)
    output = model(**inputs, output_adapter_gating_scores=True)
    (scores,) = output.adapter_gating_scores["a"][0].values()
    assert scores.shape[0] == inputs["input_ids"].shape[0]
    shorter = tiny_model("albert", num_hidden_groups=1, num_hidden_layers=1)
    shorter.add_adapter("a", "seq_bn[use_gating=True]", set_active=True)
    randomise(shorter.adapters["a"])
    (early,) = (
        shorter(**inputs, output_adapter_gating_scores=True).adapter_gating_scores["a"][0].values()
    )
    assert not torch.allclose(early, scores)
