"""Measures what flexheads costs, beside the same by hand and beside its peers.

Run it alone on a machine, from the root of the repository. Sides that are not installed are left
out; packages of this repository need not be.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.speed.check import checked, worse
from benchmarks.speed.probe import MODELS, Probe
from benchmarks.speed.results import FILE, Results, table
from benchmarks.speed.rows import ROWS
from benchmarks.speed.sessions import SIDES, measure, pythons_for, run_apart
from benchmarks.speed.uninstalled import make_importable

QUICK = 9


def _size(text: str) -> tuple[int, int]:
    rows, _, tokens = text.partition("x")
    return int(rows), int(tokens)


def _names(known: Sequence[str]) -> Callable[[str], list[str]]:
    def names(text: str) -> list[str]:
        found = text.split(",")
        if unknown := [name for name in found if name not in known]:
            raise argparse.ArgumentTypeError(f"no {unknown[0]!r}; known: {', '.join(known)}")
        return found

    return names


def parser() -> argparse.ArgumentParser:
    """What can be said on the command line."""
    groups = sorted({row.group for row in ROWS.values()})
    parser = argparse.ArgumentParser("python -m benchmarks.speed", description=__doc__)
    add = parser.add_argument
    add("--only", type=_names([*ROWS]), metavar="ROW,...", help="rows; all by default")
    add(
        "--groups",
        type=_names(groups),
        default=groups,
        metavar="GROUP,...",
        help=f"groups of rows, out of {', '.join(groups)}",
    )
    add(
        "--sides",
        type=_names(SIDES),
        default=SIDES,
        metavar="SIDE,...",
        help=f"out of {', '.join(SIDES)}; each runs in a process of its own",
    )
    add("--repeats", type=int, default=25)
    add("--quick", action="store_true", help=f"repeat {QUICK} times")
    add("--model", choices=MODELS, default="probe")
    add("--device", default="cpu")
    add("--dtype", default="float32")
    add("--threads", type=int, default=2)
    for name in ("small", "many", "train", "keep"):
        add(f"--{name}", type=_size, default=getattr(Probe, name), metavar="ROWSxTOKENS")
    add("--peer-python", help="the Python of an environment with the peers")
    add("--json", type=Path, help="file for the numbers")
    add("--note", help="a sentence about the circumstances, for the page")
    add(
        "--check",
        nargs="?",
        type=Path,
        const=FILE,
        help="measure the ratios of flexheads, and fail where one is worse than in this file",
    )
    return parser  # fmt: skip


def main(words: Sequence[str] | None = None) -> int:
    """Measures, prints and writes."""
    words = sys.argv[1:] if words is None else words
    asked = parser().parse_args(words)
    make_importable()
    probe = Probe(
        asked.model, asked.device, asked.dtype, asked.threads,
        asked.small, asked.many, asked.train, asked.keep,
    )  # fmt: skip
    repeats = QUICK if asked.quick else asked.repeats
    keys = asked.only or [key for key, row in ROWS.items() if row.group in asked.groups]
    if asked.check:
        return _check(asked.check, probe, keys, repeats)
    if len(asked.sides) == 1:
        results = measure(asked.sides[0], probe, keys, repeats)
    else:
        results = Results()
        rest = _without(words, "--sides", "--json", "--peer-python", "--note")
        for side in asked.sides:
            found = run_apart(side, pythons_for(side, asked.peer_python), rest)
            if found is None:
                print(f"{side} is left out: it is not installed, or it failed", flush=True)
            else:
                results.take(found)
    print(f"\n{table(results)}")
    if asked.note:
        results.made["note"] = asked.note
    if asked.json:
        results.write(asked.json)
    return 0


def _without(words: Sequence[str], *options: str) -> list[str]:
    """The command line without some options that take a value."""
    kept: list[str] = []
    rest = iter(words)
    for word in rest:
        name, has_value, _ = word.partition("=")
        if name not in options:
            kept.append(word)
        elif not has_value:
            next(rest)
    return kept


def _check(file: Path, probe: Probe, keys: Sequence[str], repeats: int) -> int:
    """Measures twice what seems worse at first."""
    committed = Results.read(file)
    keys = [key for key in checked(committed) if key in keys]
    now = measure("flexheads", probe, keys, repeats)
    found, lacking = worse(committed, now), [key for key in keys if key not in now.rows]
    if found:
        print(f"once more: {', '.join(each.key for each in found)}", flush=True)
        again = measure("flexheads", probe, [each.key for each in found], repeats)
        found = worse(committed, again)
    for each in found:
        print(f"worse: {each}")
    for key in lacking:
        print(f"not measured: {key}")
    return int(bool(found or lacking))


if __name__ == "__main__":
    sys.exit(main())
