"""The projections that DeBERTa runs once more, on relative positions, and its fused one."""

import copy
import json

import pytest
import torch

from flexheads import Parallel, Rows
from flexheads.errors import CheckpointError
from flexheads.testing import randomise, tiny_model, tiny_output

LORA = {"attn_matrices": ["q", "k", "v"], "architecture": "lora"}


def with_adapters(architecture, **configs):
    model = tiny_model(architecture)
    for name, config in configs.items():
        model.add_adapter(name, config)
    randomise(model.adapters)
    for number, name in enumerate(configs):
        randomise(model.adapters[name], std=0.5, seed=number)
    return model


def by_weights(architecture, adapter):
    """The output with the deltas written into the weights, of which no hook knows."""
    plain = tiny_model(architecture)
    size = plain.config.hidden_size // plain.config.num_attention_heads
    for number, layer in enumerate(plain.base_model.encoder.layer):
        own = layer.attention.self
        for place, role in enumerate(("query", "key", "value")):
            part = adapter.state_dict()
            stem = f"layers.{number}.{role}."
            delta = part[f"{stem}lora_B"] @ part[f"{stem}lora_A"]
            delta = delta * adapter.config.alpha / adapter.config.r
            if architecture == "deberta-v2":
                getattr(own, f"{role}_proj").weight.data += delta
                continue
            for head in range(plain.config.num_attention_heads):
                start = (3 * head + place) * size
                own.in_proj.weight.data[start : start + size] += delta[
                    head * size : (head + 1) * size
                ]
    return tiny_output(plain)


@pytest.mark.parametrize("architecture", ["deberta-v2", "deberta"])
def test_lora_is_what_its_deltas_in_the_weights_are(architecture):
    model = with_adapters(architecture, a=LORA)
    expected = by_weights(architecture, model.adapters["a"])
    torch.testing.assert_close(tiny_output(model, adapter_names="a"), expected, atol=1e-5, rtol=0)
    model.merge_adapter("a")
    torch.testing.assert_close(tiny_output(model), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("config", [LORA, "ia3"])
def test_rows_have_the_relative_positions_of_their_own_adapters(config):
    model = with_adapters("deberta-v2", a=config, b=config)
    mixed = tiny_output(model, adapter_names=Rows(["b", None, "a"]))
    for row, name in enumerate(["b", [], "a"]):
        alone = tiny_output(model, adapter_names=name)[row]
        torch.testing.assert_close(mixed[row], alone, atol=1e-5, rtol=0)
    both = tiny_output(model, adapter_names=Parallel("a", "b"))
    torch.testing.assert_close(both[3:], tiny_output(model, adapter_names="b"), atol=1e-5, rtol=0)


def test_rows_with_prefixes_too():
    model = with_adapters("deberta-v2", a=LORA, b="prefix_tuning[prefix_length=3]", c=LORA)
    mixed = tiny_output(model, adapter_names=Rows(["a", "b", "c"]))
    for row, (name, length) in enumerate(zip("abc", (7, 7, 5), strict=True)):
        alone = tiny_output(model, adapter_names=name)[row]  # padding attends to everything alike
        torch.testing.assert_close(mixed[row, :length], alone[:length], atol=1e-5, rtol=0)


def test_compiled_models_and_copies_give_the_same():
    model = with_adapters("deberta-v2", a=LORA, b=LORA, p="prefix_tuning[prefix_length=3]")
    rows = Rows([["a", "p"], "b", None])
    expected = tiny_output(model, adapter_names=rows)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(tiny_output(compiled, adapter_names=rows), expected)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(tiny_output(twin, adapter_names=rows), expected)
    randomise(twin.adapters, seed=7)
    torch.testing.assert_close(tiny_output(model, adapter_names=rows), expected)
    assert not torch.allclose(tiny_output(twin, adapter_names=rows), expected, atol=1e-3)


def test_a_prefix_has_no_relative_positions():
    model = with_adapters("deberta-v2", a="prefix_tuning[prefix_length=3]")
    attention = model.base_model.encoder.layer[0].attention.self
    model.set_active_adapters("a")
    seen, bias = [], vars(attention)["disentangled_attention_bias"]

    def noting(query, key, *args):
        seen.append(bias(query, key, *args))
        return seen[-1]

    attention.disentangled_attention_bias = noting
    tiny_output(model)
    attention.disentangled_attention_bias = bias
    (given,) = seen
    assert given.shape[-1] == 7 + 3
    assert not given[..., :3].any()
    assert given[..., 3:].any()


def test_hooks_leave_nothing_behind():
    model = with_adapters("deberta-v2", a=LORA, b="prefix_tuning")
    attention = model.base_model.encoder.layer[0].attention.self
    for name in "ab":
        assert "disentangled_attention_bias" in vars(attention)
        model.delete_adapter(name)
    assert "disentangled_attention_bias" not in vars(attention)


def test_bias_less_projections_stay_so():
    model = tiny_model("deberta")
    before = tiny_output(model)
    model.add_adapter("a", LORA)
    assert torch.equal(tiny_output(model, adapter_names="a"), before)
    for layer in model.base_model.encoder.layer:
        assert layer.attention.self.in_proj.bias is None


def test_a_file_that_says_nothing_sensible_is_refused(tmp_path):
    """The library of that layout cuts the fused projection where no block ends."""
    model = with_adapters("deberta", a=LORA)
    model.save_adapter(tmp_path, "a")
    other = tiny_model("deberta")
    assert other.load_adapter(tmp_path) == "a"
    file = tmp_path / "adapter_config.json"
    content = json.loads(file.read_text())
    del content["flexheads"]
    file.write_text(json.dumps({**content, "version": "adapters.1.3.0"}))
    with pytest.raises(CheckpointError, match="head by head"):
        other.load_adapter(tmp_path, load_as="b")
