"""Defects of the adapters library that were reproduced, and that no other test here is about.

The others have their tests where their subject has: averages and stacks in the golden cases of
blocks, DoRA, VeRA, IA3 and MTL-LoRA with LoRA, prefixes under sdpa and ejected ones with prefix
tuning, cached decoding with ReFT, GLOW and compacter's initialisation with their methods.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import flexheads
from flexheads import Fuse, Stack
from flexheads.testing import randomise, tiny_config, tiny_model, tiny_output

SHARED = ("compacter[reduction_factor=4]", "vera")


def causal(architecture: str, adapter: str | None = None) -> Any:
    """A language model with adapter support, and an active adapter where one is named."""
    kinds = {"gpt2": transformers.GPT2LMHeadModel, "llama": transformers.LlamaForCausalLM}
    torch.manual_seed(0)
    model = flexheads.init(kinds[architecture](tiny_config(architecture)).eval())
    if adapter is not None:
        model.add_adapter("a", adapter, set_active=True)
        randomise(model.adapters["a"], std=0.1)
    return model


@pytest.mark.parametrize("adapter", [None, "seq_bn", "lora", "prefix_tuning", "seq_bn_inv"])
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_the_cache_is_filled_and_gives_the_same_logits(
    architecture: str, adapter: str | None
) -> None:
    model = causal(architecture, adapter)
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        first = model(input_ids=ids[:, :6], use_cache=True)
        cache = first.past_key_values
        assert cache.get_seq_length() == 6
        rest = model(input_ids=ids[:, 6:], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(rest, whole[:, 6:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_generation_reads_the_whole_prompt(architecture: str) -> None:
    model = causal(architecture, "lora")
    prompts = torch.tensor([[5, 9, 7, 11, 8], [6, 4, 30, 20, 8]])  # the same last token
    how: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    how |= {"output_scores": True, "return_dict_in_generate": True}
    one, other = (model.generate(prompt[None], **how) for prompt in prompts)
    uncached = model.generate(prompts[:1], use_cache=False, **how)
    assert torch.equal(one.sequences, uncached.sequences)
    assert not torch.allclose(one.scores[0], other.scores[0], atol=1e-4)


@pytest.mark.parametrize("config", ["seq_bn[dropout=0.5]", "lora[dropout=0.5]", "loreft"])
def test_what_is_added_to_a_model_in_eval_mode_is_in_eval_mode(config: str) -> None:
    model = tiny_model("bert")
    model.add_adapter("a", config)
    model.add_classification_head("a", num_labels=2)
    assert not [name for name, module in model.named_modules() if module.training]
    model.train().add_adapter("b", config)
    assert all(module.training for module in model.adapters["b"].modules())


def test_configurations_that_differ_in_one_field_stay_apart(tmp_path: Path) -> None:
    """The peer tells configurations apart by a hash that drops fields."""
    model = tiny_model("bert")
    model.add_adapter("bn", "seq_bn[reduction_factor=2, non_linearity=gelu]")
    model.add_adapter("phm", "compacter++[reduction_factor=2]")
    randomise(model.adapters)
    other = tiny_model("bert")
    for name in ("bn", "phm"):
        model.save_adapter(tmp_path / name, name)
        other.load_adapter(tmp_path / name)
        expected = tiny_output(model, adapter_names=name)
        assert torch.equal(tiny_output(other, adapter_names=name), expected)


@pytest.mark.parametrize("config", SHARED)
def test_shared_parameters_are_saved_from_a_bare_backbone(config: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    bare = flexheads.init(transformers.BertModel(tiny_config("bert")).eval())
    bare.add_adapter("a", config, set_active=True)
    randomise(bare.adapters["a"])
    bare.save_adapter(tmp_path, "a")
    torch.manual_seed(0)
    other = flexheads.init(transformers.BertModel(tiny_config("bert")).eval())
    other.load_adapter(tmp_path, set_active=True)
    assert torch.equal(tiny_output(other), tiny_output(bare))


@pytest.mark.parametrize("config", SHARED)
def test_shared_parameters_serve_an_adapter_that_a_call_names(config: str) -> None:
    model = tiny_model("bert")
    model.add_adapter("a", config)
    model.add_adapter("b", "seq_bn", set_active=True)
    randomise(model.adapters)
    named = tiny_output(model, adapter_names="a")
    model.set_active_adapters("a")
    assert torch.equal(tiny_output(model), named)


@pytest.mark.parametrize(
    "config", ["prefix_tuning", "prompt_tuning", "compacter[reduction_factor=4]"]
)
def test_load_as_loads_every_tensor(config: str, tmp_path: Path) -> None:
    model, other = tiny_model("bert"), tiny_model("bert")
    model.add_adapter("a", config, set_active=True)
    randomise(model.adapters["a"])
    model.save_adapter(tmp_path, "a")
    assert other.load_adapter(tmp_path, load_as="another", set_active=True) == "another"
    assert torch.equal(tiny_output(other), tiny_output(model))


def test_saving_a_whole_model_leaves_prefixes_working(tmp_path: Path) -> None:
    model = tiny_model("bert")
    model.add_adapter("a", "prefix_tuning", set_active=True)
    before = tiny_output(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(tiny_output(model), before)
    model.add_adapter("b", "prefix_tuning")
    model.delete_adapter("a")
    assert torch.equal(tiny_output(type(model).from_pretrained(tmp_path)), before)


def test_a_deleted_adapter_does_not_stay_merged() -> None:
    model = tiny_model("bert")
    before = tiny_output(model)
    model.add_adapter("a", "ia3", set_active=True)
    randomise(model.adapters["a"])
    model.merge_adapter("a")
    assert not torch.allclose(tiny_output(model), before, atol=1e-3)
    model.delete_adapter("a")
    assert torch.equal(tiny_output(model), before)
    model.set_active_adapters(None)


def test_nested_blocks_can_be_trained() -> None:
    model = tiny_model("bert")
    for name in "abc":
        model.add_adapter(name)
    model.add_adapter_fusion(["a", "b"])
    model.train_adapter(Stack("c", Fuse("a", "b")))
    assert all(p.requires_grad for p in model.adapters.parameters())


@pytest.mark.parametrize(
    "config",
    ["seq_bn", "lora", "dora", "vera", "prefix_tuning", "loreft", "compacter[reduction_factor=4]"],
)
def test_adapters_take_the_dtype_of_the_model(config: str) -> None:
    model = tiny_model("bert").to(torch.bfloat16)
    model.add_adapter("a", config, set_active=True)
    assert {p.dtype for p in model.adapters.parameters()} == {torch.bfloat16}
    assert tiny_output(model).isfinite().all()


def test_a_language_model_head_leaves_the_labels_of_the_configuration() -> None:
    model = tiny_model("bert")
    before = dict(model.config.id2label)
    model.add_masked_lm_head("lm")
    assert model.config.id2label == before
    assert model.config.num_labels == len(before)
