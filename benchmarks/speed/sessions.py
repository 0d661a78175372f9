"""A session: every side measures its rows, in a process and an environment of its own."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import logging
import platform
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from benchmarks.speed.pairing import Found
from benchmarks.speed.probe import Probe
from benchmarks.speed.results import Results, shown
from benchmarks.speed.rows import ROWS
from transformers.utils import logging as transformers_logging

SIDES = ("flexheads", "adapters", "peft")
"""What can be measured; flexheads brings what is written by hand with it."""
ROOT = Path(__file__).resolve().parents[2]


def measure(side: str, probe: Probe, keys: Sequence[str], repeats: int) -> Results:
    """Measures rows of one side in this process; what fails is told, and left out."""
    module: Any = importlib.import_module(f"benchmarks.speed.side_{side}")
    torch.set_num_threads(probe.threads)
    _be_quiet()
    results = Results(_made(probe, repeats, module.DISTRIBUTIONS))
    for key in keys:
        if key not in module.MEASURES or not fits(key, probe):
            continue
        begun = time.perf_counter()
        try:
            found = module.MEASURES[key](probe, key, repeats)
        except Exception:
            traceback.print_exc()
            print(f"{key}: failed on {side}", flush=True)
            continue
        results.take(Results({}, {key: found}))
        _tell(key, found, time.perf_counter() - begun)
    return results


def _be_quiet() -> None:
    """No progress bars, and no warnings of works that are meant as they are."""
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    for name in ("transformers", "adapters"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")


def fits(key: str, probe: Probe) -> bool:
    """Whether a row can be measured on this model."""
    if probe.model.startswith("decoder"):
        return key not in ("prefix_tuning", "heads")
    return True


def _tell(key: str, found: Mapping[str, Found], seconds: float) -> None:
    row = ROWS[key]
    for side, each in found.items():
        numbers = f"{shown(row, each.value)} ±{each.noise:.2g}"
        if each.wall is not None:
            numbers += f", wall {shown(row, each.wall)}"
        print(f"{key:18} {side:10} {numbers:40} {seconds:6.1f} s", flush=True)


def _made(probe: Probe, repeats: int, distributions: Sequence[str]) -> dict[str, Any]:
    own = {name: importlib.metadata.version(name) for name in distributions}
    common = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    return {
        "probe": dataclasses.asdict(probe),
        "repeats": repeats,
        "machine": _machine(probe),
        "python": platform.python_version(),
        "versions": {name: {"version": own[name], **common} for name in own},
    }


def _machine(probe: Probe) -> str:
    if probe.device != "cpu":
        return torch.cuda.get_device_name() if torch.cuda.is_available() else probe.device
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return f"{names[0]}, {len(names)} cores" if names else platform.processor()


def run_apart(side: str, pythons: Sequence[str], arguments: Sequence[str]) -> Results | None:
    """Measures one side in another process, with the first Python that has it.

    Returns:
        The results, or None where no Python has it.
    """
    for python in pythons:
        if _has(python, side):
            break
    else:
        return None
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "results.json"
        command = [python, "-m", "benchmarks.speed", "--sides", side, "--json", str(file)]
        done = subprocess.run([*command, *arguments], cwd=ROOT)
        return Results.read(file) if done.returncode == 0 and file.exists() else None


def pythons_for(side: str, peer_python: str | None) -> list[str]:
    """Where a side may be installed, best first."""
    own = [sys.executable]
    return own if side == "flexheads" or not peer_python else [peer_python, *own]


def _has(python: str, module: str) -> bool:
    code = f"import importlib.util as u; raise SystemExit(u.find_spec({module!r}) is None)"
    return subprocess.run([python, "-c", code], cwd=ROOT).returncode == 0
