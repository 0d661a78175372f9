"""Invertible adapters act on the embeddings of tokens, before positions are added.

The paper has them there, and so had the releases from 2020 to 2022. The library of today has them
behind the positions; adapters in its files were trained there, and act there.
"""

import pytest
import torch

from flexheads.testing import randomise, tiny_model, tiny_output


def alone(model):
    """The coupling block alone: the bottlenecks add nothing."""
    model.add_adapter("a", "seq_bn_inv")
    address = "late_embeddings" if model.adapters["a"].config.inv_adapter_late else "embeddings"
    return randomise(model.adapters["a"].parts[address])


def test_a_new_one_acts_before_the_positions():
    model = tiny_model("gpt2")
    coupling = alone(model)
    got = tiny_output(model, adapter_names="a")
    model.transformer.wte.register_forward_hook(lambda module, args, out: coupling(out))
    torch.testing.assert_close(tiny_output(model), got)


@pytest.mark.parametrize(("version", "late"), [("adapters.1.3.0", True), ("3.2.1", False)])
def test_one_from_a_file_acts_where_it_was_trained(version, late, tmp_path):
    import json

    model = tiny_model("gpt2")
    alone(model)
    model.save_adapter(tmp_path, "a")
    file = tmp_path / "adapter_config.json"
    content = json.loads(file.read_text())
    del content["flexheads"]
    file.write_text(json.dumps({**content, "version": version}))
    other = tiny_model("gpt2")
    other.load_adapter(tmp_path, set_active=True)
    assert other.adapters["a"].config.inv_adapter_late == late
    host = other.transformer.drop if late else other.transformer.wte
    (coupling,) = (part for a, part in other.adapters["a"].parts.items() if "embeddings" in a)
    got = tiny_output(other)
    host.register_forward_hook(lambda module, args, out: coupling(out))
    torch.testing.assert_close(tiny_output(other, adapter_names=[]), got)


def test_both_kinds_are_undone_before_a_language_model_head():
    model = tiny_model("gpt2")
    model.add_causal_lm_head("lm", layers=1)
    for name, late in (("early", False), ("late", True)):
        model.add_adapter(name, f"seq_bn_inv[inv_adapter_late={late}]")
        randomise(model.adapters[name])
    both, hidden = ["early", "late"], tiny_output(model, adapter_names=["early", "late"], head=[])
    couplings = [
        model.adapters[name].parts[address]
        for name, address in (("late", "late_embeddings"), ("early", "embeddings"))
    ]
    for coupling in couplings:
        hidden = coupling.inverse(hidden)
    with torch.no_grad():
        expected = hidden @ model.transformer.wte.weight.T
    got = tiny_output(model, adapter_names=both, head="lm")
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
