"""Sub-layers side by side or one behind the other; queries, keys and values head by head."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import flexheads
from flexheads.conversion.rules import covers, flexible_tensors
from flexheads.plugins import registry
from flexheads.testing import randomise, tiny_model, tiny_output, tiny_static


def seen(model, *paths):
    """The first input and the output of modules of the first layer, in a call."""
    found, layer = {}, model.gpt_neox.layers[0]

    def note(path):
        def hook(module, args, output):
            result = output[0] if isinstance(output, tuple) else output
            found[path] = args[0], result.clone()

        return hook

    handles = [layer.get_submodule(p).register_forward_hook(note(p)) for p in paths]
    tiny_output(model)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("side_by_side", [True, False])
def test_a_parallel_adapter_reads_the_input_with_the_result_of_the_attention(side_by_side):
    model = tiny_model("gpt_neox", use_parallel_residual=side_by_side)
    model.add_adapter("a", "par_bn[leave_out=[1]]", set_active=True)
    part = randomise(model.adapters["a"]).parts["layers.0.feed_forward"]
    found = seen(model, "", "post_attention_dropout", "mlp")
    given, result = found[""]
    attended, mlp = found["post_attention_dropout"][1], found["mlp"][1]
    residual = given + attended
    with torch.no_grad():
        inner = torch.relu(torch.nn.functional.linear(residual, *parameters(part, "down")))
        delta = torch.nn.functional.linear(inner, *parameters(part, "up"))
    assert delta.abs().max() > 1e-2
    torch.testing.assert_close(result, residual + mlp + delta * part.scaling)


def parameters(part, word):
    state = part.state_dict()
    return [
        state[next(key for key in state if word in key and key.endswith(end))]
        for end in ("weight", "bias")
    ]


@pytest.mark.parametrize(("letter", "block"), [("q", 0), ("k", 1), ("v", 2)])
def test_low_rank_changes_go_into_the_rows_of_each_head(letter, block):
    model = tiny_model("gpt_neox")
    host = model.gpt_neox.layers[0].attention.query_key_value
    before = host.weight.detach().clone()
    model.add_adapter("a", f"lora[attn_matrices=['{letter}'], leave_out=[1]]", set_active=True)
    (part,) = randomise(model.adapters["a"]).parts.values()
    acting = tiny_output(model)
    change = (part.lora_B @ part.lora_A).detach() * part.scaling
    with torch.no_grad():
        host.weight.view(4, 3, 8, 32)[:, block] += change.view(4, 8, 32)
    torch.testing.assert_close(tiny_output(model, adapter_names=[]), acting)
    with torch.no_grad():
        host.weight.copy_(before)
    model.merge_adapter("a")
    torch.testing.assert_close(tiny_output(model), acting)
    model.reset_adapter()
    assert torch.equal(host.weight, before)


def test_the_output_matrix_is_read_under_both_of_its_names():
    (rule,) = registry().conversion("GPTNeoXForCausalLM").heads
    weight = torch.ones(3, 2)
    for name in ("embed_out.weight", "lm_head.weight"):
        assert covers(rule, name)
        assert flexible_tensors(rule, {name: weight}) == {"weight": weight}


def test_a_head_comes_from_a_file_of_a_release_with_another_name(tmp_path):
    model = flexheads.init(tiny_static("GPTNeoXForCausalLM"))
    model.save_head(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    (name,), names = load_file(file), {"embed_out.weight", "lm_head.weight"}
    (other,) = names - {name}
    expected = load_file(file)[name]
    save_file({other: expected}, file, metadata={"format": "pt"})
    again = flexheads.init(tiny_static("GPTNeoXForCausalLM", seed=1))
    again.load_head(tmp_path)
    assert torch.equal(again.get_output_embeddings().weight, expected)
