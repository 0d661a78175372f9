"""The checks of classes that write from left to right only where ``is_decoder`` is set.

In a package's tests::

    from flexheads.testing import decoder_checks

    @decoder_checks("AcmeForCausalLM")
    def test_decoder(check):
        check()
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from flexheads.models.static import init
from flexheads.testing.tiny import randomise, tiny_inputs, tiny_static

_PREFIX = "prefix_tuning[flat=True,prefix_length=3]"
CONFIGS = ("double_seq_bn", "lora", _PREFIX)
"""One configuration of each kind: what acts on the stream, on projections, and on attention."""


def decoder_checks(*static_classes: str) -> Any:
    """A pytest decorator: one test for each check of each class.

    Args:
        static_classes: Names of transformers' classes, as a package registers them.
    """
    import pytest

    checks = {
        f"{name}-{config}": functools.partial(check_generation_with_a_cache, name, config)
        for name in static_classes
        for config in CONFIGS
    } | {f"{name}-order": functools.partial(check_order, name) for name in static_classes}
    return pytest.mark.parametrize("check", checks.values(), ids=checks.keys())


@torch.no_grad()
def check_generation_with_a_cache(static_class: str, config: str) -> None:
    """Generating with a cache is generating without one, and the adapter acts in both."""
    model = _decoder(static_class, config)
    acting = _generated(model, use_cache=True)
    torch.testing.assert_close(acting, _generated(model, use_cache=False), atol=1e-4, rtol=0)
    model.set_active_adapters(None)
    assert not torch.allclose(acting, _generated(model, use_cache=True), atol=1e-2)


@torch.no_grad()
def check_order(static_class: str) -> None:
    """A token does not see what follows it, with a prefix in front of all."""
    model = _decoder(static_class, _PREFIX)
    ids = _ids(model)
    whole, part = model(ids).logits, model(ids[:, :4]).logits
    torch.testing.assert_close(whole[:, :4], part, atol=1e-5, rtol=0)


def _decoder(static_class: str, config: str) -> Any:
    model: Any = init(tiny_static(static_class, is_decoder=True))
    model.add_adapter("a", config, set_active=True)
    randomise(model.adapters, std=1.0)
    return model


def _ids(model: Any) -> Tensor:
    return tiny_inputs(model.config)["input_ids"][:2]


def _generated(model: Any, use_cache: bool) -> Tensor:
    """The logits of what is generated, ``(5, 2, vocabulary)``."""
    ids = _ids(model)
    found = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        use_cache=use_cache,
        max_new_tokens=5,
        min_new_tokens=5,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.stack(found.logits)
