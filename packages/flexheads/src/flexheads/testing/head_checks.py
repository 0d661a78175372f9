"""The checks of types of heads: each that fits an architecture learns on it, and is saved."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Mapping
from typing import Any

import torch
from torch import Generator, Tensor

from flexheads.errors import UnsupportedError
from flexheads.heads.base import PredictionHead
from flexheads.heads.custom import class_of
from flexheads.heads.labels import InputShape
from flexheads.models.with_heads import ModelWithHeads
from flexheads.plugins import registry
from flexheads.specs import ArchitectureSpec
from flexheads.testing.fitting import refusal
from flexheads.testing.tiny import randomise, tiny_inputs, tiny_model
from flexheads.testing.tiny_heads import makes_labels, tiny_head, tiny_labels

ROWS = 4


def head_types(architecture: str) -> list[str]:
    """The installed types of heads that fit an architecture, and make labels for tests."""
    spec = registry().architecture(architecture)
    fitting = [name for name in registry().head_types if fits(name, spec)]
    return [name for name in fitting if makes_labels(class_of(name))]


def fits(head_type: str, spec: ArchitectureSpec) -> bool:
    """Whether an architecture has what a type of head needs."""
    try:
        class_of(head_type).check_architecture(spec)
    except UnsupportedError:
        return False
    return True


def check_head(architecture: str, head_type: str) -> None:
    """A head gets a finite loss from random labels, all of it learns, and its file gives it back.

    The outputs of the head that is loaded are the same bit for bit, the loss with them.
    """
    model = tiny_model(architecture)
    shape = _shape(model, tiny_head(head_type, model.spec).get("side"))
    model.add_head("new", head_type, **tiny_head(head_type, model.spec))
    head = model.heads["new"]
    randomise(head)
    labels = tiny_labels(head, shape, Generator().manual_seed(0))
    found = _outputs(model, labels)
    assert bool(torch.isfinite(found["loss"])), f"{head_type}: the loss is {found['loss']}."
    found["loss"].backward()
    _check_gradients(head)
    with tempfile.TemporaryDirectory() as directory:
        model.save_head(directory, "new")
        other = tiny_model(architecture)
        other.load_head(directory)
    again = _outputs(other, labels)
    assert again.keys() == found.keys(), f"{head_type}: the file gives a head with other outputs."
    for name, tensor in found.items():
        assert torch.equal(again[name], tensor), f"{head_type}: the file gives another {name}."


def check_head_refusals(architecture: str) -> None:
    """Adding a head that does not fit says why, and changes nothing."""
    model = tiny_model(architecture)
    for head_type in registry().head_types:
        if not fits(head_type, model.spec):
            fields = tiny_head(head_type, model.spec)
            add = functools.partial(model.add_head, "new", head_type, **fields)
            reason = refusal(add, head_type)
            assert model.spec.with_heads in reason, f"{head_type}: another reason: {reason}"
            assert not len(model.heads), f"{head_type}: refused, but something has changed."


def _shape(model: ModelWithHeads, side: str | None) -> InputShape:
    """Rows and positions of what a head reads."""
    with torch.no_grad():
        found = model(**tiny_inputs(model.config, batch=ROWS))
    states = found.encoder_last_hidden_state if side == "encoder" else found.last_hidden_state
    return InputShape(*states.shape[:2])


def _outputs(model: ModelWithHeads, labels: Mapping[str, Tensor]) -> dict[str, Any]:
    """The tensors that a call with labels gives."""
    found = model(**tiny_inputs(model.config, batch=ROWS), **labels)
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def _check_gradients(head: PredictionHead) -> None:
    """Every parameter gets a gradient, and none gets one that is no number."""
    for name, parameter in head.named_parameters():
        gradient = parameter.grad
        assert gradient is not None, f"{head.head_type}: {name} does not learn."
        assert bool(torch.isfinite(gradient).all()), f"{head.head_type}: {name} gets no numbers."
    moved = [p.grad.abs().max() > 0 for p in head.parameters() if p.grad is not None]
    assert any(moved) or not moved, f"{head.head_type}: no gradient is other than zero."
