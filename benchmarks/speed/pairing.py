"""Timing in pairs: every run of a work stands between two runs of what it is compared with.

Whatever else the machine does falls on both alike, so the ratio of a round says more than the times
of a round; the median of the rounds' ratios is the result, and half the distance between their
quartiles its noise.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

Call = Callable[[], Any]
Clock = Callable[[], float]

WARM_UP = 3
PATIENCE, LEAST = 20.0, 2
"""Seconds after which a work that is timed alone is not repeated any more, and how often it is."""


@dataclass(frozen=True)
class Found:
    """What was measured.

    Attributes:
        value: The median; of ratios, unless the row has a unit.
        noise: Half the distance between the quartiles.
        wall: The same as `value` in wall time, where `value` is CPU time.
        repeats: How often.
    """

    value: float
    noise: float = 0.0
    wall: float | None = None
    repeats: int = 1

    def as_json(self) -> dict[str, Any]:
        """Rounded to what is told of it; without what there is not."""
        return {
            key: round(value, 5) if isinstance(value, float) else value
            for key, value in asdict(self).items()
            if value is not None
        }


@dataclass(frozen=True)
class Trial:
    """A work and what it is compared with.

    Attributes:
        reference: What counts as one.
        call: The work.
    """

    reference: Call
    call: Call


def noise(values: Sequence[float]) -> float:
    """Half the distance between the quartiles."""
    if len(values) < 2:
        return 0.0
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return (third - first) / 2


def summed_up(values: Sequence[float], wall: Sequence[float] | None = None) -> Found:
    """The median of measurements, and their noise."""
    middle = statistics.median(wall) if wall else None
    return Found(statistics.median(values), noise(values), middle, len(values))


def cpu_time() -> float:
    """Seconds that all threads of this process have computed."""
    return time.process_time()


def taken(call: Call, clocks: Sequence[Clock]) -> list[float]:
    """What one run takes, on each clock."""
    before = [clock() for clock in clocks]
    call()
    return [clock() - begun for clock, begun in zip(clocks, before, strict=True)]


def compare(
    trials: Mapping[str, Trial], repeats: int, clocks: Sequence[Clock], collect: bool = False
) -> dict[str, Found]:
    """Times works in turns.

    Args:
        trials: The works, by name.
        repeats: How often.
        clocks: One, or CPU time and wall time.
        collect: Collect garbage before each round, of works that leave much.

    Returns:
        For each name the ratio to its own reference.
    """
    for trial in trials.values():
        for _ in range(WARM_UP):
            trial.reference()
            trial.call()
    ratios: dict[str, list[list[float]]] = {name: [] for name in trials}
    gc.collect()
    gc.disable()
    try:
        for _ in range(repeats):
            if collect:
                gc.collect()
            for name, trial in trials.items():
                around = taken(trial.reference, clocks)
                own = taken(trial.call, clocks)
                behind = taken(trial.reference, clocks)
                pairs = zip(own, around, behind, strict=True)
                ratios[name].append([2 * one / (a + b) for one, a, b in pairs])
    finally:
        gc.enable()
    return {name: summed_up(*zip(*each, strict=True)) for name, each in ratios.items()}


def spent(prepared: Callable[[], Call], repeats: int, clocks: Sequence[Clock]) -> Found:
    """Seconds of a work that can be done but once.

    Garbage that is there is collected before; collecting stays switched on meanwhile, as it is for
    everybody, so what a work itself leaves behind counts.

    Args:
        prepared: Prepares the work, and returns it.
        repeats: How often at most; see `PATIENCE`.
        clocks: One, or CPU time and wall time.
    """
    prepared()()  # what is imported late is imported
    rounds: list[list[float]] = []
    end = time.perf_counter() + PATIENCE
    while len(rounds) < repeats and (len(rounds) < LEAST or time.perf_counter() < end):
        call = prepared()
        gc.collect()
        rounds.append(taken(call, clocks))
    return summed_up(*zip(*rounds, strict=True))
