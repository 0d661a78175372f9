"""Whether ratios have become worse than those that are committed."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.speed.pairing import Found
from benchmarks.speed.results import Results, shown
from benchmarks.speed.rows import ROWS

SIDE = "flexheads"


@dataclass(frozen=True)
class Worse:
    """A row that has become worse.

    Attributes:
        key: The row.
        before: The committed number.
        now: What was measured.
    """

    key: str
    before: Found
    now: Found

    def __str__(self) -> str:
        row = ROWS[self.key]
        now, before = (shown(row, found.value) for found in (self.now, self.before))
        noise = f"the noise of this run is {self.now.noise:.3f}"
        return f"{self.key}: {now}, where {before} is committed; {noise}"


def checked(results: Results) -> list[str]:
    """The rows that can be checked: ratios, and what is counted. Seconds are those of a machine."""
    found = results.rows
    return [k for k in ROWS if SIDE in found.get(k, {}) and ROWS[k].unit in ("", "MiB")]


def worse(committed: Results, now: Results) -> list[Worse]:
    """The rows whose number is larger than the committed one by more than the noise of this run.

    Args:
        committed: What is compared with.
        now: What was measured; rows that it lacks are left out.
    """
    found = []
    for key in checked(committed):
        if SIDE in now.rows.get(key, {}):
            before, fresh = committed.rows[key][SIDE], now.rows[key][SIDE]
            # Files have five digits.
            if fresh.value > before.value + fresh.noise + 1e-5:
                found.append(Worse(key, before, fresh))
    return found
