"""Compiled works over the compiled bare backbone."""

from __future__ import annotations

import shutil
from functools import partial
from typing import Any

import torch
from benchmarks.speed.pairing import Found, Trial, compare
from benchmarks.speed.probe import Probe, hidden, inference
from benchmarks.speed.works import SETUPS

ROWS = {f"compiled_{key}": key for key in ("seq_bn", "lora", "stack", "fuse", "rows_8")}


def measured(probe: Probe, key: str, repeats: int) -> dict[str, Found]:
    """The ratio of one row, with one graph for each side; empty without a compiler."""
    if probe.device == "cpu" and not (shutil.which("c++") or shutil.which("g++")):
        return {}
    torch.compiler.reset()
    setup = SETUPS[ROWS[key]](probe)
    inputs = probe.inputs(setup.size)
    bare = partial(_compiled(probe.backbone()), **inputs)
    ours = partial(_compiled(setup.model), **inputs, **setup.call)
    with inference():
        probe.require_same(hidden(ours()), hidden(setup.model(**inputs, **setup.call)))
        return compare({"flexheads": Trial(bare, ours)}, repeats, probe.clocks)


def _compiled(model: Any) -> Any:
    return torch.compile(model, fullgraph=True)
