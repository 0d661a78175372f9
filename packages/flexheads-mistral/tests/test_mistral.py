"""A prefix is seen through a sliding window; files name two projections crosswise."""

import json

import pytest
import torch
from safetensors.torch import load_file

from flexheads.testing import randomise, tiny_inputs, tiny_model, tiny_output


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_every_position_sees_the_prefix_through_the_window(implementation):
    model = tiny_model("mistral", attn_implementation=implementation, num_hidden_layers=1)
    assert model.config.sliding_window == 4
    model.add_adapter("a", "prefix_tuning[prefix_length=2]", set_active=True)
    randomise(model.adapters["a"])
    changed = (tiny_output(model) - tiny_output(model, adapter_names=[])).abs().amax(dim=(0, 2))
    assert (changed > 1e-3).all()
    # What is out of the window stays so: the first token has no part in the last position.
    given = tiny_inputs(model.config)
    other = {**given, "input_ids": given["input_ids"].clone()}
    other["input_ids"][:, 0] += 1
    with torch.no_grad():
        moved = (model(**given)[0] - model(**other)[0]).abs().amax(dim=(0, 2))
    assert moved[0] > 1e-3
    assert (moved[4:] == 0).all()


def test_both_attention_implementations_give_the_same_with_a_prefix():
    outputs = []
    for implementation in ("eager", "sdpa"):
        model = tiny_model("mistral", attn_implementation=implementation)
        model.add_adapter("a", "prefix_tuning[prefix_length=2]", set_active=True)
        randomise(model.adapters["a"])
        outputs.append(tiny_output(model))
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize(
    ("field", "path", "in_file"),
    [
        ("intermediate_lora", "mlp.up_proj", "output_lora"),
        ("output_lora", "mlp.down_proj", "intermediate_lora"),
    ],
)
def test_files_call_each_projection_by_the_other_name(field, path, in_file, tmp_path):
    model = tiny_model("mistral")
    model.add_adapter("a", f"lora[attn_matrices=[], {field}=True]", set_active=True)
    randomise(model.adapters["a"])
    model.save_adapter(tmp_path, "a")
    (file,) = tmp_path.glob("*.safetensors")
    assert all(f".{path}.loras." in key for key in load_file(file))
    config = json.loads((tmp_path / "adapter_config.json").read_text())["config"]
    named = {name for name in ("intermediate_lora", "output_lora") if config[name]}
    assert named == {in_file}
    other = tiny_model("mistral")
    other.load_adapter(tmp_path, set_active=True)
    assert torch.equal(tiny_output(other), tiny_output(model))
