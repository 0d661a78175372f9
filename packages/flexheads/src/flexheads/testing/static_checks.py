"""The checks of one static class: its head converts both ways, and it generates under adapters."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flexheads.checkpoints.bundle import SavedHead
from flexheads.conversion.to_static import convert_to_static
from flexheads.methods.bottleneck_config import SeqBnConfig
from flexheads.models.static import init
from flexheads.models.with_heads import ModelWithHeads, with_heads_class
from flexheads.plugins import registry
from flexheads.sites.base import argument_names
from flexheads.specs import HeadConversion
from flexheads.testing.tiny import randomise, tiny_config, tiny_inputs, tiny_static


def same(actual: Tensor, expected: Tensor, what: str, tolerance: float = 1e-5) -> None:
    """Asserts that two tensors differ by no more than a tolerance."""
    difference = (actual - expected).abs().max().item()
    assert difference <= tolerance, f"{what}: outputs differ by {difference:.2e}."


@torch.no_grad()
def check_static_adapter(
    model: Any, inputs: Mapping[str, Tensor], config: str, difference: float = 1e-3
) -> None:
    """An adapter acts on a class as transformers has it, leaves nothing, and comes from its file.

    For classes that no conversion names, such as those with one side of a model that has two.

    Args:
        model: What `flexheads.init` gives, without adapters.
        inputs: Its inputs.
        config: The adapter's configuration.
        difference: What it changes somewhere in the first output, at least.
    """
    before = model(**inputs)[0]
    model.add_adapter("a", config=config, set_active=True)
    randomise(model.adapters)
    acting = model(**inputs)[0]
    assert not torch.allclose(acting, before, atol=difference), f"{config}: nothing changes."
    with tempfile.TemporaryDirectory() as directory:
        model.save_adapter(directory, "a")
        model.delete_adapter("a")
        assert torch.equal(model(**inputs)[0], before), f"{config}: deleting leaves something."
        model.load_adapter(directory, set_active=True)
    assert torch.equal(model(**inputs)[0], acting), f"{config}: the file gives another adapter."


def check_conversion(static_class: str) -> None:
    """A static head becomes flexible heads that give its outputs, and comes back as it was."""
    conversion = registry().conversion(static_class)
    static = init(tiny_static(static_class))
    static.add_adapter("a", set_active=True)
    randomise(static.adapters)
    pooled = any(rule.config.get("use_pooler") for rule in conversion.heads)
    if pooled and getattr(static._attachment.backbone, "pooler", static) is None:
        return  # this release leaves out the pooler that the class reads
    name = registry().architecture(conversion.architecture).with_heads
    model = with_heads_class(name)(tiny_config(conversion.architecture)).eval()
    model._attachment.backbone.load_state_dict(_backbone_state(static, model), strict=False)
    inputs = tiny_inputs(model.config, batch=4)
    heads = ["a" + rule.suffix for rule in conversion.heads]
    with tempfile.TemporaryDirectory() as directory:
        static.save_adapter(directory, "a")
        _load(model, directory, static)
    choices = "multiple_choice" in {rule.head_type for rule in conversion.heads}
    if choices:
        inputs = {key: value.view(2, 2, -1) for key, value in inputs.items()}
    with torch.no_grad():
        expected = static(**_taken(static, inputs))
        for head, rule in zip(heads, conversion.heads, strict=True):
            wanted = expected[rule.output]
            actual = model(**inputs, head=head).to_tuple()[0].reshape(wanted.shape)
            same(actual, wanted, f"{static_class} as {rule.head_type}")
    saved: list[SavedHead] = [model._saved_head(head) for head in heads]  # type: ignore[misc]
    original = static._saved_head("a").tensors
    back = convert_to_static(saved, conversion, model.config, model._embeddings(), original)
    assert set(back.tensors) == set(original), "Names differ after the way there and back."
    for key in set(original) - _unread(conversion, original):
        assert torch.equal(back.tensors[key], original[key]), f"{key} differs after the way back."


def _load(model: ModelWithHeads, directory: str, static: Any) -> None:
    """Loads what a static model saved; one of one side has no adapters in the other's layers."""
    others = range(static._attachment.depth, model._attachment.depth)
    if not others:
        model.load_adapter(directory, set_active=True)
        return
    model.add_adapter("a", config=SeqBnConfig(leave_out=list(others)))
    model.adapters["a"].load_state_dict(static.adapters["a"].state_dict())
    model.load_head(directory, load_as="a")
    model.set_active_adapters("a")


def _taken(static: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those inputs that a static class takes; one of them says where choices are read."""
    names = argument_names(type(static).forward)
    taken = {name: value for name, value in inputs.items() if name in names}
    if "mc_token_ids" in names:
        taken["mc_token_ids"] = inputs["attention_mask"].sum(dim=-1) - 1
    return taken


def _unread(conversion: HeadConversion, tensors: Mapping[str, Tensor]) -> set[str]:
    """Aliases that this release of transformers keeps beside what they should repeat.

    So does 5.0 where a configuration lacks ``tie_word_embeddings`` there. That no
    forward reads them is checked with the outputs.
    """
    aliases = [pair for rule in conversion.heads for pair in rule.aliases.items()]
    own = {key: tensor.data_ptr() for key, tensor in tensors.items()}
    return {one for one, other in aliases if own.get(one) != own.get(other)}


def check_generation(static_class: str) -> None:
    """Generating with a cache gives the tokens that come without one; an adapter changes them."""
    static = init(tiny_static(static_class))
    static.add_adapter("a", config="double_seq_bn", set_active=True)
    randomise(static.adapters)
    inputs = tiny_inputs(static.config)
    inputs.pop("decoder_input_ids", None)
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    for name in {"input_ids", "attention_mask"} & inputs.keys():
        inputs[name] = inputs[name].flip(1)

    def generate(use_cache: bool) -> Tensor:
        found: Tensor = static.generate(**inputs, use_cache=use_cache, **settings)
        return found

    cached = generate(True)
    assert torch.equal(cached, generate(False)), f"{static_class}: the cache changes the tokens."
    static.set_active_adapters(None)
    assert not torch.equal(cached, generate(True)), f"{static_class}: the adapter has no effect."


def _backbone_state(static: Any, model: ModelWithHeads) -> dict[str, Tensor]:
    """The static model's backbone weights; a part that its class leaves out stays random."""
    own, wanted = static._attachment.backbone.state_dict(), model._attachment.backbone.state_dict()
    part = {key.partition(".")[2]: tensor for key, tensor in own.items()}  # of several
    return {key: tensor for key, tensor in {**part, **own}.items() if key in wanted}
