"""Writes what was measured into docs/speed.md, and draws it.

A table stands on the page between ``<!-- speed: FILE -->``, with the name of a file beside this
one, and ``<!-- end -->``. ``--check`` only says whether the tables are those of the files.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from benchmarks.speed.results import FILE, NAMES, Results, table
from benchmarks.speed.rows import ROWS, SIDES

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE, PLOT = DOCS / "speed.md", DOCS / "assets" / "speed.svg"
PART = re.compile(r"(<!-- speed: (\S+) -->\n).*?(<!-- end -->)", flags=re.DOTALL)

COLORS = {"flexheads": "#00695c", "floor": "#9e9e9e", "adapters": "#ef6c00", "peft": "#5e35b1"}
MARKS = {"flexheads": "o", "floor": "|", "adapters": "s", "peft": "D"}


def filled(page: str) -> str:
    """A page with its tables written anew."""

    def part(match: re.Match[str]) -> str:
        results = Results.read(FILE.with_name(match[2]))
        return f"{match[1]}\n{table(results)}\n\n{conditions(results)}\n\n{match[3]}"

    return PART.sub(part, page)


def conditions(results: Results) -> str:
    """Where and how it was measured, in a paragraph."""
    made, probe = results.made, results.made["probe"]
    where = f"{probe['threads']} threads" if probe["device"] == "cpu" else probe["device"]
    lines = [f"{made['machine']}, {where}, {probe['dtype']}, medians of {made['repeats']}."]
    for name, versions in made["versions"].items():
        others = ", ".join(f"{key} {versions[key]}" for key in ("torch", "transformers"))
        lines.append(f"{name} {versions['version']} on {others}.")
    return " ".join([*lines, *([made["note"]] if "note" in made else [])])


def draw(results: Results, file: Path) -> None:
    """Draws the ratios of all sides, with what is wanted and the noise."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    keys = [key for key, row in ROWS.items() if key in results.rows and not row.unit]
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "speed", "font.size": 9}):
        figure = Figure(figsize=(8, 0.9 + 0.26 * len(keys)), layout="constrained")
        axes = figure.subplots()
        _points(axes, results, keys)
        axes.axvline(1, color="#424242", linewidth=0.8)
        axes.set_yticks(range(len(keys)), [_label(key) for key in keys])
        axes.invert_yaxis()
        axes.set_xlabel("ratio to what is compared with; lower is better")
        axes.grid(axis="x", linewidth=0.3)
        figure.legend(loc="outside upper right", ncols=5, frameon=False)
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, metadata={"Date": None})


def _points(axes: Any, results: Results, keys: list[str]) -> None:
    for side in SIDES:
        all_found = enumerate(results.rows[key].get(side) for key in keys)
        there = {height: found for height, found in all_found if found is not None}
        if there:
            axes.errorbar(
                [found.value for found in there.values()],
                [*there],
                xerr=[found.noise for found in there.values()],
                fmt=MARKS[side],
                color=COLORS[side],
                markersize=9 if side == "floor" else 5,
                linewidth=0.8,
                label=NAMES[side],
            )
    wanted = [(y, ROWS[key].wanted) for y, key in enumerate(keys) if ROWS[key].wanted is not None]
    heights = [y for y, _ in wanted]
    axes.plot([x for _, x in wanted], heights, "v", color="#c62828", markersize=4, label="wanted")


def _label(key: str) -> str:
    row = ROWS[key]
    over = "" if row.over in ("bare backbone", "compiled bare backbone") else f", over {row.over}"
    return f"{row.title}{over}".replace("`", "")


def main() -> int:
    """Writes the page and the plot, or compares the page."""
    parser = argparse.ArgumentParser("python -m benchmarks.speed.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, fail on a difference")
    asked = parser.parse_args()
    page = PAGE.read_text("utf-8")
    new = filled(page)
    if asked.check:
        return int(new != page)
    PAGE.write_text(new, "utf-8")
    draw(Results.read(FILE), PLOT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
