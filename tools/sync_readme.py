"""Writes the tables of README.md from the registry; ``--check`` only says whether they are true."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from flexheads.plugins import registry

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN, END = "<!-- generated: tools/sync_readme.py -->\n", "<!-- end -->"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    lines = [list(head)]
    lines += [["---"] * len(lines[0]), *map(list, rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def tables() -> str:
    """Every table, in the order of the page."""
    found = registry()
    architectures = (
        (
            f"`{spec.name}`",
            f"`{spec.with_heads}`",
            f"`{found.provider_of(spec).distribution}`",
            ", ".join(f"`{c.static_class}`" for c in found.conversions_for(spec.name)),
        )
        for spec in found.architectures.values()
    )
    heads = (
        (f"`{spec.name}`", spec.description, f"`{found.provider_of(spec).distribution}`")
        for spec in found.head_types.values()
    )
    methods = (
        (
            f"`{spec.name}`",
            spec.description,
            ", ".join(f"`{name}`" for name in spec.identifiers),
        )
        for spec in found.methods.values()
    )
    return "\n".join(
        [
            table(("architecture", "class", "package", "static heads that convert"), architectures),
            table(("head type", "what", "package"), heads),
            table(("adapter method", "what", "configurations"), methods),
        ]
    )


def synced(text: str) -> str:
    """The page with its tables written anew."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{tables()}\n{END}{after}"


def main() -> int:
    """Writes the page, or compares it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, fail where it differs")
    text = README.read_text(encoding="utf-8")
    if not parser.parse_args().check:
        README.write_text(synced(text), encoding="utf-8")
    elif text != synced(text):
        print("README.md is not what the registry says; run: python tools/sync_readme.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
