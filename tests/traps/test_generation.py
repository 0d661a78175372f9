"""Traps: generation with adapters, through caches, beams and padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import flexheads
from flexheads.testing import tiny_static

from .classifiers import COMMON, add

METHODS: dict[str, Any] = {
    **COMMON,
    "lora": flexheads.LoRAConfig(attn_matrices=["q", "k", "v"], output_lora=True),
    "prefix": flexheads.PrefixTuningConfig(prefix_length=3, bottleneck_size=8),
    "invertible": "seq_bn_inv",
}
NEW = 6

each_method = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(scope="module")
def loaded() -> Any:
    """A decoder with every method. Read only, but for what is active."""
    model = flexheads.init(decoder())
    for seed, (name, config) in enumerate(METHODS.items()):
        add(model, config, name, seed)
    return model


@pytest.fixture
def model(loaded: Any) -> Any:
    loaded.set_active_adapters(None)
    return loaded


def decoder() -> Any:
    model = tiny_static("BertLMHeadModel", is_decoder=True, pad_token_id=0)
    model.generation_config.eos_token_id = None
    return model


def prompt(padded: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 99, (3, 5), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        ids[0, :3], mask[0, :3] = 0, 0
        ids[2, :1], mask[2, :1] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model: Any, padded: bool = False, **kwargs: Any) -> Any:
    """Tokens and the scores of each step: ``(rows, steps, vocabulary)``."""
    settings = {"max_new_tokens": NEW, "do_sample": False, **kwargs}
    found = model.generate(
        **prompt(padded), **settings, output_scores=True, return_dict_in_generate=True
    )
    return found.sequences, torch.stack(found.scores, dim=1)


def assert_agree(one: Any, two: Any) -> None:
    assert torch.equal(one[0], two[0])
    torch.testing.assert_close(one[1], two[1], atol=1e-4, rtol=1e-4)


@each_method
@pytest.mark.parametrize("padded", [False, True], ids=["plain", "left_padded"])
def test_generation_with_a_cache_is_that_without(model: Any, method: str, padded: bool) -> None:
    without_adapter = generate(model, padded)
    model.set_active_adapters(method)
    cached = generate(model, padded, use_cache=True)
    assert_agree(cached, generate(model, padded, use_cache=False))
    assert not torch.allclose(cached[1], without_adapter[1], atol=1e-2)


@each_method
def test_beam_search_with_a_cache_is_that_without(model: Any, method: str) -> None:
    model.set_active_adapters(method)
    settings = {"num_beams": 3, "padded": True}
    cached, plain = (generate(model, use_cache=use, **settings) for use in (True, False))
    assert_agree(cached, plain)


@pytest.fixture(scope="module")
def static_cache() -> dict[str, Any]:
    """The settings for a static cache, where the class itself can do it."""
    settings = {"cache_implementation": "static", "disable_compile": True}
    try:
        generate(decoder(), **settings)
    except ValueError as error:  # before 5.0 this class expects masks as long as the input
        pytest.skip(f"this transformers cannot do it with the bare class either: {error}")
    return settings


@each_method
def test_a_static_cache_gives_the_same_tokens(
    model: Any, method: str, static_cache: dict[str, Any]
) -> None:
    model.set_active_adapters(method)
    expected = generate(model, True)
    assert_agree(generate(model, True, **static_cache), expected)


@pytest.mark.parametrize("beams", [1, 3])
def test_adapter_names_holds_for_every_step_of_one_generation(model: Any, beams: int) -> None:
    model.set_active_adapters("houlsby")
    expected = {}
    for name in METHODS:
        model.set_active_adapters(name)
        expected[name] = generate(model, True, num_beams=beams)
    model.set_active_adapters("houlsby")
    for name in METHODS:
        found = generate(model, True, num_beams=beams, adapter_names=name)
        assert torch.equal(found[0], expected[name][0])
        assert torch.equal(found[1], expected[name][1])
    assert torch.equal(generate(model, True, num_beams=beams)[0], expected["houlsby"][0])


def test_each_row_generates_with_its_own_adapter(model: Any) -> None:
    rows = flexheads.Rows(["lora", None, "parallel"])
    mixed = generate(model, True, adapter_names=rows)
    for row, name in enumerate(["lora", [], "parallel"]):
        alone = generate(model, True, adapter_names=name)
        assert torch.equal(mixed[0][row], alone[0][row])
        torch.testing.assert_close(mixed[1][row], alone[1][row], atol=1e-4, rtol=1e-4)


def test_generation_with_a_lora_is_that_of_the_bare_model_with_merged_weights(model: Any) -> None:
    bare = decoder()
    expected = generate(bare, True)
    assert torch.equal(generate(model, True)[1], expected[1])
    found = generate(model, True, adapter_names="lora")
    model.merge_adapter("lora")
    try:
        bare.load_state_dict(
            {k: v for k, v in model.state_dict().items() if not k.startswith("adapters.")}
        )
    finally:
        model.reset_adapter()
    assert_agree(generate(bare, True), found)


def test_an_adapter_that_is_added_after_a_generation_acts(model: Any) -> None:
    late = flexheads.init(decoder())
    generate(late)
    late.add_adapter("houlsby", METHODS["houlsby"])
    late.adapters["houlsby"].load_state_dict(model.adapters["houlsby"].state_dict())
    late.set_active_adapters("houlsby")
    assert torch.equal(generate(late)[1], generate(model, adapter_names="houlsby")[1])
