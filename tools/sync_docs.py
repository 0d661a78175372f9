"""Writes the generated parts of README.md and docs/; ``--check`` only says whether they are true.

A generated part stands between ``<!-- generated: PART ARGUMENTS -->`` and ``<!-- end -->``; what
PART can be is in tables.py.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from tables import PARTS

ROOT = Path(__file__).resolve().parents[1]
_PART = re.compile(r"(<!-- generated: (\w+)((?: \S+)*?) -->\n).*?(<!-- end -->)", flags=re.DOTALL)


def synced(text: str) -> str:
    """A page with its generated parts written anew."""

    def part(match: re.Match[str]) -> str:
        begin, name, words, end = match.groups()
        return f"{begin}\n{PARTS[name](*words.split())}\n{end}"

    return _PART.sub(part, text)


def main() -> int:
    """Writes the pages, or compares them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing, fail where one differs"
    )
    parser.add_argument("pages", nargs="*", type=Path, help="all by default")
    arguments = parser.parse_args()
    pages = arguments.pages or [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    different = []
    for page in pages:
        text = page.read_text(encoding="utf-8")
        new = synced(text)
        if text != new:
            different.append(page.name)
            if not arguments.check:
                page.write_text(new, encoding="utf-8")
    if arguments.check and different:
        print(f"{', '.join(different)}: not what the code says; run: python tools/sync_docs.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
