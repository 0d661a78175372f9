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
    bases: list[Times] = [run(BASE)]
    own: dict[str, list[Times]] = {name: [] for name in codes}
    for _ in range(min(repeats, 3)):
        for name, code in codes.items():
            own[name].append(run(code))
        bases.append(run(BASE))
    return {name: _over(bases, found) for name, found in own.items()}


def _over(bases: Sequence[Times], own: Sequence[Times]) -> Found:
    """The ratios of runs to those of `BASE` before and behind them."""
    rounds = list(zip(own, bases, bases[1:], strict=False))
    cpu, wall = (
        [2 * one[clock] / (before[clock] + behind[clock]) for one, before, behind in rounds]
        for clock in (0, 1)
    )
    return summed_up(cpu, wall)


def _run(code: str, environment: Mapping[str, str]) -> Times:
    begun, before = time.perf_counter(), os.times()
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, **environment})
    behind = os.times()
    cpu = behind.children_user - before.children_user
    return cpu + behind.children_system - before.children_system, time.perf_counter() - begun
