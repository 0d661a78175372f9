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


def import_ratio(more: str, repeats: int, environment: Mapping[str, str]) -> Found:
    """CPU time of a new interpreter with these imports, over that with `BASE` alone."""
    repeats = min(repeats, 3)  # each takes seconds
    base, own = (partial(_run, code, environment) for code in (BASE, f"{BASE}; {more}"))
    base(), own()  # modules are compiled and files are in memory
    runs = [run() for run in (*[base, own] * repeats, base)]
    rounds = [runs[start : start + 3] for start in range(0, 2 * repeats, 2)]
    cpu, wall = (
        [2 * own[clock] / (before[clock] + behind[clock]) for before, own, behind in rounds]
        for clock in (0, 1)
    )
    return summed_up(cpu, wall)


def _run(code: str, environment: Mapping[str, str]) -> Sequence[float]:
    begun, before = time.perf_counter(), os.times()
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, **environment})
    behind = os.times()
    cpu = behind.children_user - before.children_user
    return cpu + behind.children_system - before.children_system, time.perf_counter() - begun
