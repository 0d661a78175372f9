"""Unions act as their members do together, and are written and read as one adapter."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import flexheads
from flexheads import ConfigUnion, LoRAConfig, ParBnConfig, PrefixTuningConfig, SeqBnConfig
from flexheads.checkpoints.store import read_json
from flexheads.errors import ConfigError, FlexheadsError, UnsupportedError
from flexheads.testing import randomise, tiny_inputs, tiny_model

PREFIX = PrefixTuningConfig(prefix_length=3, bottleneck_size=8)
UNIONS: dict[str, Any] = {
    "mam": flexheads.MAMConfig(PREFIX),
    "unipelt": flexheads.UniPELTConfig(PREFIX, SeqBnConfig(reduction_factor=4)),
    "three": "prefix_tuning_flat[prefix_length=3]|lora[r=2]|seq_bn[reduction_factor=8]",
    "by_place": ConfigUnion(
        SeqBnConfig(reduction_factor=4, ln_before=True),
        flexheads.DoubleSeqBnConfig(output_adapter=False, reduction_factor=8),
    ),
    "by_layer": ConfigUnion(LoRAConfig(r=2, leave_out=[0]), LoRAConfig(r=4, leave_out=[1])),
    "prompt": "prompt_tuning[prompt_length=3]|lora[attn_matrices=['k']]|loreft",
}


def model_with(config: Any, name: str = "a") -> Any:
    model = randomise(tiny_model("bert"), std=0.2)
    model.add_adapter(name, config, set_active=True)
    randomise(model.adapters[name], std=0.4)
    return model


# --- what they do ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", UNIONS)
def test_a_union_is_its_members_stacked(kind: str) -> None:
    """Members that act at different places do not see one another, so a Stack does the same."""
    model = model_with(UNIONS[kind])
    given = tiny_inputs(model.config)
    together = model(**given)[0]
    state = model.adapters["a"].state_dict()
    names = []
    for number, member in enumerate(model.adapters["a"].config.configs):
        names.append(f"member {number}")
        model.add_adapter(names[-1], member)
        own = model.adapters[names[-1]].state_dict()
        model.adapters[names[-1]].load_state_dict({key: state[key] for key in own})
    assert sum(len(model.adapters[name].state_dict()) for name in names) == len(state)
    torch.testing.assert_close(together, model(**given, adapter_names=names)[0], atol=1e-5, rtol=0)
    for name in names:
        assert not torch.allclose(together, model(**given, adapter_names=name)[0], atol=1e-3)


@pytest.mark.parametrize("kind", UNIONS)
def test_a_union_comes_back_from_its_file(kind: str, tmp_path: Path) -> None:
    model = model_with(UNIONS[kind])
    given = tiny_inputs(model.config)
    model.save_adapter(tmp_path, "a")
    content = read_json(tmp_path / "adapter_config.json")["config"]
    assert content["architecture"] == "union"
    assert set(content) == {"architecture", "configs"}
    model.load_adapter(tmp_path, load_as="b")
    assert model.adapters["b"].config == model.adapters["a"].config
    expected = model(**given)[0]
    torch.testing.assert_close(model(**given, adapter_names="b")[0], expected)
    whole = tmp_path / "whole"
    model.save_pretrained(whole)
    again = flexheads.AutoModelWithHeads.from_pretrained(str(whole))
    torch.testing.assert_close(again(**given)[0], expected, atol=1e-6, rtol=0)


def test_a_union_of_mergeable_members_is_merged() -> None:
    model = model_with("lora[attn_matrices=['q']]|lora[attn_matrices=['v'], leave_out=[0]]")
    given = tiny_inputs(model.config)
    expected = model(**given)[0]
    bare = model(**given, adapter_names=[])[0]
    model.merge_adapter("a")
    torch.testing.assert_close(model(**given, adapter_names=[])[0], expected, atol=1e-5, rtol=0)
    model.reset_adapter()
    assert torch.equal(model(**given, adapter_names=[])[0], bare)
    with pytest.raises(UnsupportedError):
        model_with("lora|seq_bn").merge_adapter("a")


def test_copies_are_independent() -> None:
    model = model_with(UNIONS["unipelt"])
    given = tiny_inputs(model.config)
    before = model(**given)[0]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(**given)[0], before)
        randomise(other.adapters["a"], seed=5)
        assert not torch.allclose(other(**given)[0], before, atol=1e-3)
    assert torch.equal(model(**given)[0], before)


# --- the configuration ----------------------------------------------------------------------------


def test_members_and_their_fields_are_found() -> None:
    union = flexheads.load_config("prefix_tuning[prefix_length=5]|par_bn")
    assert union == ConfigUnion(PrefixTuningConfig(prefix_length=5), ParBnConfig())
    assert union[1] == ParBnConfig()
    assert union["0.prefix_length"] == 5
    assert union["1.scaling"] == 4.0
    assert len(union) == len(list(union)) == len(union[0]) + len(union[1])
    assert dict(union)["1.reduction_factor"] == 2
    for key in ("prefix_length", "2.dropout", "0.nothing", "x.dropout"):
        assert key not in union
    assert hash(union) == hash(copy.deepcopy(union))
    assert pickle.loads(pickle.dumps(union)) == union
    assert union != ConfigUnion(ParBnConfig(), PrefixTuningConfig(prefix_length=5))
    assert flexheads.load_config(union.to_dict()) == union


def test_fields_are_replaced_in_the_members_that_have_them() -> None:
    union = flexheads.load_config("prefix_tuning|par_bn|lora")
    assert [c.dropout for c in union.replace(dropout=0.5).configs] == [0.5, 0.5, 0.5]
    assert [c.dropout for c in union.replace(**{"1.dropout": 0.5}).configs] == [0.0, 0.5, 0.0]
    assert union.replace(r=2)[2].r == 2
    with pytest.raises(ConfigError, match="nothing"):
        union.replace(nothing=1)
    assert flexheads.load_config("mam[prefix_length=3]")["0.prefix_length"] == 3
    assert all(c.use_gating for c in flexheads.load_config("unipelt").configs)
    assert flexheads.load_config("mam")["0.bottleneck_size"] == 800


@pytest.mark.parametrize("text", ["seq_bn|", "|lora", "seq_bn||lora", "lora|unheard_of"])
def test_strings_that_are_no_union_are_refused(text: str) -> None:
    with pytest.raises(FlexheadsError):
        flexheads.load_config(text)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ((), "at least one"),
        ((SeqBnConfig(), "lora"), "no adapter configuration"),
        ((SeqBnConfig(), ConfigUnion(LoRAConfig())), "a union"),
        ((LoRAConfig(), LoRAConfig(r=2)), "cannot hold both"),
        ((SeqBnConfig(), ParBnConfig()), "cannot hold both"),
        ((PREFIX, PrefixTuningConfig(flat=True)), "cannot hold both"),
    ],
)
def test_members_that_do_not_fit_are_refused(members: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ConfigUnion(*members)


def test_members_that_meet_in_the_model_are_refused() -> None:
    model = tiny_model("bert")
    union = ConfigUnion(LoRAConfig(leave_out=[0]), LoRAConfig(attn_matrices=["v"]))
    with pytest.raises(ConfigError, match=r"layers\.1\.value"):
        model.add_adapter("a", union)
    assert not model.adapters
    with pytest.raises(ConfigError, match="configs"):
        flexheads.load_config({"architecture": "union"})
