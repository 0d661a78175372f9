"""Methods that do not fit a model: what the error says, and that nothing changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flexheads.errors import ConfigError, FlexheadsError, UnsupportedError
from flexheads.testing import randomise, tiny_inputs, tiny_model

CASES: dict[str, tuple[str, Any, type[FlexheadsError], str]] = {
    "reduction factor": ("bert", "seq_bn[reduction_factor=33]", ConfigError, "hidden size 32"),
    "layer left out": ("bert", "lora[leave_out=[2]]", ConfigError, "layers"),
    "layer of ReFT": ("bert", "loreft[layers=[5]]", ConfigError, "layers"),
    "layer in a map": ("bert", "seq_bn[reduction_factor={'1': 2}]", ConfigError, "layer 0"),
    "matrix": ("gpt2", "lora[attn_matrices=['q', 'x']]", ConfigError, "'x'"),
    "token": ("bert", "trainable_tokens[token_indices=[99]]", ConfigError, "99"),
    "rank": ("bert", "lora[r=0]", ConfigError, "r=0"),
    "images": ("vit", "trainable_tokens[token_indices=[1]]", UnsupportedError, "no tokens"),
    "unknown field": ("bert", "lora[rank=3]", ConfigError, "no field 'rank'"),
    "prefix": ("bert", "prefix_tuning[prefix_length=0]", ConfigError, "prefix_length"),
    "prompt": ("bert", "prompt_tuning[prompt_length=0]", ConfigError, "prompt_length"),
    "union": ("bert", "seq_bn|seq_bn", ConfigError, "same"),
}


@torch.no_grad()
def output(model: Any) -> Any:
    return model(**tiny_inputs(model.config)).last_hidden_state


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_that_does_not_fit_changes_nothing(case: str) -> None:
    architecture, config, error, words = CASES[case]
    model = tiny_model(architecture)
    before, hooks = output(model), hook_count(model)
    keys = list(model.state_dict())
    with pytest.raises(error, match=words):
        model.add_adapter("a", config)
    assert not model.adapters
    assert hook_count(model) == hooks
    assert list(model.state_dict()) == keys
    assert torch.equal(output(model), before)


def hook_count(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_a_missing_role_is_named_and_who_has_it() -> None:
    """No architecture here lacks a residual site of its own, so one is taken away."""
    model = tiny_model("bert")
    sites = model._attachment.sites
    for address in [a for a, site in sites.items() if site.kind == "attention"]:
        del sites[address]
    with pytest.raises(UnsupportedError, match=r"self_attention.*bert"):
        model.add_adapter("a", "prefix_tuning")
    assert not model.adapters


def test_merging_is_refused_with_nothing_changed() -> None:
    model = tiny_model("bert")
    for name, config in (
        ("a", "lora"),
        ("b", "lora"),
        ("s", "seq_bn"),
        ("g", "lora[use_gating=True]"),
    ):
        model.add_adapter(name, config)
    randomise(model.adapters)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for name in ("s", "g"):
        with pytest.raises(UnsupportedError):
            model.merge_adapter(name)
    model.train_adapter("a")
    model.train()
    with pytest.raises(UnsupportedError, match="train"):
        model.merge_adapter("a")
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    model.eval().merge_adapter("a")
    with pytest.raises(UnsupportedError, match="reset_adapter"):
        model.merge_adapter("b")
    model.reset_adapter()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
