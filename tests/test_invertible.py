"""Invertible adapters: affine and additive coupling, against their definition and undone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flexheads import load_config
from flexheads.checkpoints.store import read_tensors
from flexheads.methods.invertible import GlowCoupling, NiceCoupling
from flexheads.testing import randomise, tiny_inputs, tiny_model

KINDS = {"nice": NiceCoupling, "glow": GlowCoupling}
each_kind = pytest.mark.parametrize("kind", KINDS)
WIDTHS = (32, 33)  # halves need not be equal


def block(kind: str, width: int = 32) -> Any:
    return randomise(KINDS[kind](width, "tanh", 2).double(), std=0.4)


@each_kind
@pytest.mark.parametrize("width", WIDTHS)
def test_it_is_undone(kind: str, width: int) -> None:
    coupling, hidden = block(kind, width), torch.randn(2, 5, width, dtype=torch.float64)
    there = coupling(hidden)
    assert (there - hidden).abs().max() > 0.1
    torch.testing.assert_close(coupling.inverse(there), hidden)
    torch.testing.assert_close(coupling(coupling.inverse(hidden)), hidden)


@pytest.mark.parametrize("width", WIDTHS)
def test_glow_is_its_definition(width: int) -> None:
    """Scales and shifts of one half are functions of the other, one after the other."""
    glow, hidden = block("glow", width), torch.randn(2, 5, width, dtype=torch.float64)
    x1, x2 = hidden[..., : width // 2], hidden[..., width // 2 :]

    def affine(net: Any, seen: Tensor, changed: Tensor) -> Tensor:
        both, size = net(seen), changed.shape[-1]
        assert both.shape[-1] == 2 * size
        log, shift = both[..., :size], both[..., size:]
        return torch.exp(5.0 * 0.636 * torch.atan(log / 5.0)) * changed + shift

    y1 = affine(glow.s2, x2, x1)
    y2 = affine(glow.s1, y1, x2)
    torch.testing.assert_close(glow(hidden), torch.cat([y1, y2], dim=-1))


@each_kind
def test_in_a_model_and_its_language_model_head(kind: str, tmp_path: Path) -> None:
    model = tiny_model("bert")
    model.add_adapter("x", load_config("seq_bn_inv", inv_adapter=kind, leave_out=[0, 1]))
    model.add_masked_lm_head("x")
    randomise(model.adapters["x"])
    model.set_active_adapters("x")
    given = tiny_inputs(model.config)
    coupling = model.adapters["x"].parts["embeddings"]
    seen: dict[str, Tensor] = {}
    handle = model.bert.encoder.register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(encoder=(args or tuple(kwargs.values()))[0]),
        with_kwargs=True,
    )
    with torch.no_grad():
        logits = model(**given).logits
        embedded = model.bert.embeddings(given["input_ids"])  # the active adapter acts here too
        torch.testing.assert_close(seen["encoder"], embedded)
        handle.remove()
        model.set_active_adapters(None)
        plain = model.bert.embeddings(given["input_ids"])
        torch.testing.assert_close(embedded, coupling(plain))
        assert (embedded - plain).abs().max() > 0.1
    model.set_active_adapters("x")
    model.save_adapter(tmp_path, "x")
    other = tiny_model("bert")
    other.load_adapter(tmp_path, set_active=True)
    with torch.no_grad():
        assert torch.equal(other(**given).logits, logits)
    words = {"nice": ("F", "G"), "glow": ("s1", "s2")}[kind]
    keys = {k for k in read_tensors(tmp_path / "adapter.safetensors") if "invertible" in k}
    assert keys == {
        f"bert.invertible_adapters.x.{word}.{number}.{tensor}"
        for word in words
        for number in (0, 2)
        for tensor in ("weight", "bias")
    }
