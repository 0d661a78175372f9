"""What a session measured: a file, and the same as a table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.speed.pairing import Found
from benchmarks.speed.rows import ROWS, SIDES, Row

FILE = Path(__file__).with_name("results.json")
NAMES = {"flexheads": "flexheads", "floor": "by hand", "adapters": "adapters", "peft": "PEFT"}


@dataclass
class Results:
    """Numbers by row and side.

    Attributes:
        made: On which machine, with which versions, and how.
        rows: For each row, what each side took.
    """

    made: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, dict[str, Found]] = field(default_factory=dict)

    def take(self, other: Results) -> None:
        """Adds what another side measured."""
        self.made = {**other.made, **self.made}
        self.made["versions"] = other.made.get("versions", {}) | self.made.get("versions", {})
        for key, sides in other.rows.items():
            self.rows.setdefault(key, {}).update(sides)

    def write(self, file: Path) -> None:
        """Writes a file."""
        rows = {
            key: {side: found.as_json() for side, found in self.rows[key].items()}
            for key in ROWS
            if key in self.rows
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"made": self.made, "rows": rows}, indent=1) + "\n", "utf-8")

    @classmethod
    def read(cls, file: Path) -> Results:
        """Reads a file."""
        told = json.loads(file.read_text("utf-8"))
        rows = {
            key: {side: Found(**found) for side, found in sides.items()}
            for key, sides in told["rows"].items()
        }
        return cls(told["made"], rows)


def table(results: Results) -> str:
    """A Markdown table with a line for each row and a column for each side."""
    sides = [side for side in SIDES if any(side in found for found in results.rows.values())]
    ours = [found["flexheads"] for found in results.rows.values() if "flexheads" in found]
    wall = any(found.wall is not None for found in ours)
    head = ["", "over", *(NAMES[side] for side in sides), "wanted"]
    head += ["flexheads, wall"] if wall else []
    lines = [head, ["---"] * len(head)]
    for key, row in ROWS.items():
        if key in results.rows:
            lines.append(_line(row, results.rows[key], sides, wall))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _line(row: Row, found: Mapping[str, Found], sides: list[str], wall: bool) -> list[str]:
    bare, ours = found.get("bare"), found.get("flexheads")
    title = f"{row.title}: {shown(row, bare.value)}" if bare else row.title
    cells = [_cell(row, found[side]) if side in found else "" for side in sides]
    wanted = "" if row.wanted is None else f"{row.wanted:g} {row.unit}".strip()
    line = [title, row.over, *cells, wanted]
    if wall:
        line.append("" if ours is None or ours.wall is None else shown(row, ours.wall))
    return line


def shown(row: Row, value: float) -> str:
    """A number as people read it."""
    if row.unit == "MiB":
        return f"{value:.0f} MiB"
    return f"{value:.3g} {row.unit}" if row.unit else f"{value:.3f}"


def _cell(row: Row, found: Found) -> str:
    if not found.noise:
        return shown(row, found.value)
    digits = "±{:.2g}" if row.unit else "±{:.3f}"
    return f"{shown(row, found.value)} {digits.format(found.noise)}"
