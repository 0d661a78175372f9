"""Adapters act behind the model's own language adapters, which stay as they are."""

import pytest
import torch
from torch.nn.functional import layer_norm, linear

from flexheads import Parallel
from flexheads.testing import randomise, tiny_model, tiny_output

KINDS = {
    "plain": {},
    "norms first": {"pre_norm": True},
    "its own norm": {"adapter_layer_norm": True},
    "residual before the norm": {"ln_before_adapter": False},
    "no norm inside": {"adapter_reuse_layer_norm": False, "pre_norm": True},
}
kinds = pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)


def with_adapter(changes, config):
    """The first layer of a model with random norms, and what passes through it.

    The layer, its sum and its residual without the adapter, the adapter's weights there, and what
    the layer gives with it.
    """
    model, seen = tiny_model("xmod", **changes), {}
    randomise(model.base_model, std=0.2)
    layer = model.base_model.encoder.layer[0]
    layer.attention.register_forward_hook(lambda m, args, out: seen.update(r=out[0]))
    layer.output.register_forward_hook(lambda m, args, out: seen.update(total=out))
    layer.register_forward_hook(
        lambda m, args, out: seen.update(out=out[0] if isinstance(out, tuple) else out)
    )
    tiny_output(model)
    total, residual = seen["total"], seen["r"]
    model.add_adapter("a", config)
    randomise(model.adapters)
    part = model.adapters["a"].parts["layers.0.feed_forward"].state_dict()
    tiny_output(model, adapter_names="a")
    return layer, total, residual, part, seen["out"]


def finished(layer, total, changes):
    """What the layer makes of its sum."""
    if changes.get("pre_norm"):
        return total
    norm = layer.output.LayerNorm
    return layer_norm(total, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def bottleneck(part, hidden):
    down = linear(hidden, part["down.weight"], part["down.bias"]).relu()
    return linear(down, part["up.weight"], part["up.bias"])


@kinds
@pytest.mark.parametrize("norm", [True, False])
@torch.no_grad()
def test_a_sequential_adapter_reads_what_the_language_adapter_gives(changes, norm):
    layer, total, residual, part, out = with_adapter(changes, f"seq_bn[original_ln_before={norm}]")
    read = finished(layer, total, changes) if norm else total - residual
    expected = finished(layer, total + bottleneck(part, read), changes)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


@kinds
@torch.no_grad()
def test_the_last_addition_and_norm_can_be_left_out(changes):
    layer, total, residual, part, out = with_adapter(changes, "seq_bn[original_ln_after=False]")
    expected = total - residual + bottleneck(part, finished(layer, total, changes))
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


@kinds
@torch.no_grad()
def test_a_parallel_adapter_reads_the_residual(changes):
    layer, total, residual, part, out = with_adapter(changes, "par_bn[scaling=2.0]")
    expected = finished(layer, total + 2.0 * bottleneck(part, residual), changes)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_languages_are_chosen_as_before_and_never_trained():
    model = tiny_model("xmod")
    randomise(model.base_model, std=0.2)
    model.add_adapter("a")
    model.add_adapter("b", "lora")
    randomise(model.adapters)
    model.train_adapter("a")
    assert not any(p.requires_grad for n, p in model.named_parameters() if "adapter_modules" in n)
    english = tiny_output(model)
    german = tiny_output(model, lang_ids=torch.ones(3, dtype=torch.long))
    assert not torch.allclose(english, german, atol=1e-3)
    mixed = tiny_output(model, lang_ids=torch.tensor([0, 1, 1]))
    torch.testing.assert_close(mixed, torch.cat([english[:1], german[1:]]))
    both = tiny_output(model, lang_ids=torch.tensor([0, 1, 1]), adapter_names=Parallel("a", "b"))
    torch.testing.assert_close(both[:3], mixed)
    model.base_model.set_default_language("de_DE")
    torch.testing.assert_close(tiny_output(model), german)
