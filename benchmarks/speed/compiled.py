"""Compiled works over the compiled bare backbone, beside the same by hand, compiled too."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from benchmarks.speed import by_hand
from benchmarks.speed.pairing import Call, Found, Trial, compare
from benchmarks.speed.probe import Probe, hidden, inference
from benchmarks.speed.works import SETUPS, Setup, flexible

from flexheads import MultiTask


def by_task(probe: Probe) -> Setup:
    """A LoRA for each row, out of eight, as numbers in a tensor that is an input of the graph."""
    model = flexible(probe, "lora", 8)
    names = [f"a{number}" for number in range(8)]
    model.set_active_adapters(MultiTask(*names))
    tasks = torch.arange(probe.many[0], device=probe.device) % 8

    def by(backbone: Any) -> None:
        by_hand.rows(backbone, model, [names[task] for task in tasks.tolist()])

    return Setup(model, by, {"task_ids": tasks}, probe.many)


_SAME = ("seq_bn", "lora", "ia3", "prefix_tuning", "stack", "fuse", "rows_8")
ROWS: dict[str, Callable[[Probe], Setup]] = {
    **{f"compiled_{key}": SETUPS[key] for key in _SAME},
    "compiled_tasks_8": by_task,
}


def measured(probe: Probe, key: str, repeats: int) -> dict[str, Found]:
    """The ratios of one row, with one graph for each side; empty without a compiler."""
    if probe.device == "cpu" and not (shutil.which("c++") or shutil.which("g++")):
        return {}
    torch.compiler.reset()
    trials = trials_of(probe, ROWS[key](probe))
    with inference():
        return compare(trials, repeats, probe.clocks)


def trials_of(probe: Probe, setup: Setup) -> dict[str, Trial]:
    """A setup, and the same by hand; all give the numbers of calls that are not compiled."""
    inputs = probe.inputs(setup.size)
    bare = _compiled(probe.backbone(), inputs)
    calls = {"flexheads": _compiled(setup.model, {**inputs, **setup.call})}
    if setup.by_hand is not None:
        backbone = probe.backbone()
        setup.by_hand(backbone)
        calls["floor"] = _compiled(backbone, inputs)
    with inference():
        expected = hidden(setup.model(**inputs, **setup.call))
        for call in calls.values():
            probe.require_same(hidden(call()), expected)
    return {side: Trial(bare, call) for side, call in calls.items()}


def _compiled(model: Any, given: dict[str, Any]) -> Call:
    return partial(torch.compile(model, fullgraph=True), **given)
