"""Measures flexheads, and the same by hand, in this process."""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed import works
from benchmarks.speed.probe import MODELS, Probe
from benchmarks.speed.rows import ROWS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="")
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", default="probe", choices=MODELS)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    probe = Probe(asked.model, threads=asked.threads)
    keys = asked.only.split(",") if asked.only else list(works.TRIALS)
    for key in keys:
        try:
            found = works.measured(probe, key, asked.repeats)
        except Exception:
            traceback.print_exc()
            continue
        print(
            key,
            {s: f"{f.value:.3f} ± {f.noise:.3f} (wall {f.wall:.3f})" for s, f in found.items()},
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
