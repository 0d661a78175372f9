"""What importing a library costs, over importing what everybody imports."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial

from benchmarks.speed.pairing import Found, summed_up

BASE = "import torch, transformers; from transformers import AutoModel, PreTrainedModel"
Times = Sequence[float]
"""CPU time and wall time of one interpreter."""
Ratios = Sequence[float]
"""The same over those of the runs of `BASE` before and behind."""


def import_ratios(
    more: Mapping[str, str], repeats: int, environment: Mapping[str, str]
) -> dict[str, Found]:
    """CPU time of a new interpreter with these imports, over that with `BASE` alone.

    Args:
        more: What is imported, by name.
        repeats: How often; not more than three times, because each takes seconds.
        environment: Variables of the interpreters.
    """
    run = partial(_run, environment=environment)
    codes = {name: f"{BASE}; {code}" for name, code in more.items()}
    for code in (BASE, *codes.values()):  # modules are compiled and files are in memory
        run(code)
    rounds: dict[str, list[Ratios]] = {name: [] for name in codes}
    before = run(BASE)
    for _ in range(min(repeats, 3)):
        for name, code in codes.items():
            own, behind = run(code), run(BASE)
            times = zip(own, before, behind, strict=True)
            rounds[name].append([2 * one / (a + b) for one, a, b in times])
            before = behind
    return {name: summed_up(*zip(*each, strict=True)) for name, each in rounds.items()}


def _run(code: str, environment: Mapping[str, str]) -> Times:
    begun, before = time.perf_counter(), os.times()
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, **environment})
    behind = os.times()
    cpu = behind.children_user - before.children_user
    return cpu + behind.children_system - before.children_system, time.perf_counter() - begun
