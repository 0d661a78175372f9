"""Prints how many lines each architecture package has, and the median of all."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CORE = "flexheads"


def lines(files: Iterable[Path]) -> int:
    """The lines of some files together."""
    return sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)


def sizes(package: Path) -> tuple[int, int, int]:
    """The lines of a package's plugin module, of its whole source, and of its tests."""
    source = sorted((package / "src").rglob("*.py"))
    plugins = [file for file in source if file.name == "plugin.py"]
    return lines(plugins), lines(source), lines(sorted((package / "tests").rglob("*.py")))


def main() -> None:
    """Prints the table."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    found = {
        package.name: sizes(package)
        for package in sorted((ROOT / "packages").iterdir())
        if package.name != CORE and (package / "pyproject.toml").is_file()
    }
    print(f"{'package':28}{'plugin.py':>10}{'source':>8}{'tests':>8}")
    for name, counts in found.items():
        print(f"{name:28}{counts[0]:10}{counts[1]:8}{counts[2]:8}")
    plugin, source, tests = (
        statistics.median(column) for column in zip(*found.values(), strict=True)
    )
    print(f"{f'median of {len(found)}':28}{plugin:10g}{source:8g}{tests:8g}")


if __name__ == "__main__":
    main()
