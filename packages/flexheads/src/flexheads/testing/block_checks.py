"""The checks of compositions: every block is its definition, on every architecture."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flexheads.composition import (
    Average,
    BatchSplit,
    Block,
    Fuse,
    MultiTask,
    Parallel,
    Rows,
    Split,
    Stack,
)
from flexheads.models.calls.inputs import batch_size
from flexheads.models.with_heads import ModelWithHeads
from flexheads.sites.base import first_tensor
from flexheads.sites.residual import AttachedResidual
from flexheads.testing.fitting import other_config, refusal
from flexheads.testing.static_checks import same
from flexheads.testing.tiny import randomise, tiny_inputs, tiny_model

Row = tuple[str | None, int]
"""An adapter, and the row of the input that it acts on."""


def check_block(architecture: str, block: str) -> None:
    """A block is what its definition says; see `BLOCK_CHECKS`.

    The model has four adapters: *a*; *copy* with the same weights; *new*, which is the identity;
    and *b* of another method.
    """
    model = tiny_model(architecture)
    for name in ("a", "copy", "new"):
        model.add_adapter(name, config="double_seq_bn")
    model.add_adapter("b", config=other_config(model))
    for name in ("a", "b"):
        randomise(model.adapters[name])
    model.adapters["copy"].load_state_dict(model.adapters["a"].state_dict())
    with torch.no_grad():
        BLOCK_CHECKS[block](model)


def _check_stack(model: ModelWithHeads) -> None:
    """Identities in a stack change nothing; weights that are merged act as before."""
    alone = _states(model, "a")
    _equal(_states(model, Stack("a", "new")), alone, "Stack of an adapter and the identity")
    _equal(_states(model, Stack("new", "a")), alone, "Stack of the identity and an adapter")
    both = _states(model, Stack("a", "b"))
    _differ(both, alone, "Stack of two adapters")
    if other_config(model) == "lora":
        model.merge_adapter("b")
        _equal(_states(model, "a"), both, "Stack on weights with the other adapter merged")


def _check_fuse(model: ModelWithHeads) -> None:
    """What is the same for all adapters is what attention over them gives."""
    for names in (("a", "copy"), ("a", "new")):
        model.add_adapter_fusion(Fuse(*names), config="static")
    alone = _states(model, "a")
    _equal(_states(model, Fuse("a", "copy")), alone, "Fuse of twice the same")
    _differ(_states(model, Fuse("a", "new")), alone, "Fuse with the identity")


def _check_split(model: ModelWithHeads) -> None:
    """Positions that all go through the same adapter are as without a split.

    Where layers see sequences of different lengths, no split fits, and the error says so.
    """
    length, *others = sorted(_lengths(model))
    splits, alone = (2, length - 2), _states(model, "a")
    same_way = functools.partial(_states, model, Split("a", "copy", splits=splits))
    if others:
        assert str(length) in refusal(same_way, "Split")
        return
    _equal(same_way(), alone, "Split to the same")
    _differ(_states(model, Split("a", "new", splits=splits)), alone, "Split to another")


def _lengths(model: ModelWithHeads) -> set[int]:
    """The lengths of what the layers give."""
    seen: set[int] = set()

    def note(module: nn.Module, args: Any, found: Any) -> None:
        seen.add(first_tensor(found).shape[-2])

    sites = model._attachment.sites.values()
    layers = {site.host for site in sites if isinstance(site, AttachedResidual)}
    handles = [layer.register_forward_hook(note) for layer in layers]
    _states(model, None)
    for handle in handles:
        handle.remove()
    return seen


def _check_average(model: ModelWithHeads) -> None:
    """A mean of the same is the same, and what weighs nothing has no effect."""
    alone = _states(model, "a")
    _equal(_states(model, Average("a", "copy", weights=[0.3, 0.7])), alone, "Average of the same")
    _equal(_states(model, Average("a", "b", weights=[1, 0])), alone, "Average with no weight")
    _differ(_states(model, Average("a", "new")), alone, "Average with the identity")


def _check_rows(model: ModelWithHeads) -> None:
    _check_each(model, Rows(["a", None, "b"]), [("a", 0), (None, 1), ("b", 2)])


def _check_batch_split(model: ModelWithHeads) -> None:
    rows: list[Row] = [("a", 0), ("a", 1), ("b", 2)]
    _check_each(model, BatchSplit("a", "b", batch_sizes=[2, 1]), rows)


def _check_parallel(model: ModelWithHeads) -> None:
    rows: list[Row] = [(name, row) for name in ("a", "b") for row in range(_batch(model))]
    _check_each(model, Parallel("a", "b"), rows)


def _check_multi_task(model: ModelWithHeads) -> None:
    rows: list[Row] = [("b", 0), (None, 1), ("a", 2)]
    _check_each(model, MultiTask("a", None, "b"), rows, task_ids=torch.tensor([2, 1, 0]))


def _check_each(model: ModelWithHeads, block: Block, rows: list[Row], **call: Any) -> None:
    """Each row is as under its adapter alone, before heads and in the head of that name."""
    alone = {name: _states(model, name) for name, _ in rows}
    mixed = _states(model, block, **call)
    for number, (name, row) in enumerate(rows):
        _equal(mixed[number], alone[name][row], f"{block}, row {number}")
    if model.spec.pooling is None:
        return
    for name in ("a", "b"):
        model.add_classification_head(name, num_labels=2, set_active=False)
    inputs = tiny_inputs(model.config)
    found = model(**inputs, adapter_names=block, **call)
    for name in ("a", "b"):
        scores = model(**inputs, adapter_names=name, head=name).logits
        own = [row for adapter, row in rows if adapter == name]
        _equal(found[name].logits, scores[own], f"{block}, head {name!r}")


def _states(model: ModelWithHeads, setup: Block | str | None, **call: Any) -> Tensor:
    """What each row becomes under a setup, as far as the backbone says.

    Of a model of two parts that are compared, these are the vectors of texts.
    """
    model.set_active_adapters(setup)
    model.active_head = None
    found = model(**tiny_inputs(model.config), **call)
    names = ("last_hidden_state", "text_embeds", "logits")
    states: Tensor = found[next(name for name in names if name in found)]
    return states


def _batch(model: ModelWithHeads) -> int:
    return batch_size(tiny_inputs(model.config))


def _equal(actual: Tensor, expected: Tensor, what: str) -> None:
    """Asserts that outputs are the same, by the size of the largest."""
    scale = expected.abs().max().clamp(min=1.0)
    same(actual / scale, expected / scale, what)


def _differ(actual: Tensor, expected: Tensor, what: str) -> None:
    assert not torch.allclose(actual, expected, atol=1e-4), f"{what} has no effect."


BLOCK_CHECKS: Mapping[str, Callable[[ModelWithHeads], Any]] = {
    "Stack": _check_stack,
    "Fuse": _check_fuse,
    "Split": _check_split,
    "Average": _check_average,
    "Parallel": _check_parallel,
    "BatchSplit": _check_batch_split,
    "Rows": _check_rows,
    "MultiTask": _check_multi_task,
}
"""How each block is compared with its definition."""
