"""Tables of configurations and blocks: what ours gives, and what the `adapters` library gave."""

from __future__ import annotations

import re
from collections.abc import Iterator

from pieces import code, table

from flexheads.errors import FlexheadsError
from flexheads.testing.block_matrix import BLOCKS, Bench, configurations

ARCHITECTURES = ("bert", "gpt2", "t5")
"""An encoder, a decoder, and both with cross attention between them."""

_COLUMNS = ("Stack", "BatchSplit", "Parallel", "Average", "Split", "Fuse", "MultiTask")
_NOT = "not implemented"
_LOW_RANK = ("runs", "correct", "correct", "1/N of it", _NOT, _NOT, "correct")
_ONLY_FIRST = (*("first only", "wrong rows", "wrong rows"), *("first only",) * 3, "wrong rows")
_PEER = {
    "seq_bn": ("runs", "correct", "correct", "1/N of it", "runs", "runs", "wrong"),
    "par_bn": ("runs", "correct", "crashes", "1/N of it", "runs", "runs", "correct"),
    "compacter": ("runs", "correct", "correct", "1/N of it", "runs", "runs", "correct"),
    "prefix_tuning": ("runs", "correct", "correct", _NOT, _NOT, _NOT, "correct"),
    "prompt_tuning": _ONLY_FIRST,
    "lora": ("factors chained", *_LOW_RANK[1:]),
    "ia3": _LOW_RANK,
    "vera": _LOW_RANK,
    "dora": ("runs", "wrong rows", "wrong rows", "1/N of it", _NOT, _NOT, "wrong rows"),
    "mtl_lora": _LOW_RANK,
    "noreft": _ONLY_FIRST,
}
"""Measured with `adapters` 1.3.0 on random tiny BERT models: each row against its adapter alone."""


def cells(pages: dict[str, str]) -> str:
    """Every configuration in every block, compared with the definition on all architectures.

    Args:
        pages: The page of each identifier.
    """
    notes: dict[str, int] = {}
    rows = []
    for config in configurations():
        name = config.partition("[")[0]
        rows.append((f"[`{name}`](methods/{pages[name]})", *_row(config, notes)))
    shown = table(("configuration", *(_column(name) for name in BLOCKS)), rows)
    return shown + "\n" + "".join(f"{number}. {reason}\n" for reason, number in notes.items())


def _column(name: str) -> str:
    return code(name) if " " not in name else name


def _row(config: str, notes: dict[str, int]) -> Iterator[str]:
    benches = {}
    for architecture in ARCHITECTURES:
        try:
            benches[architecture] = Bench(architecture, config)
        except FlexheadsError:  # the architecture has no place for it
            continue
    for block in BLOCKS:
        found = {name: _noted(bench.cell(block), notes) for name, bench in benches.items()}
        if len(set(found.values())) == 1:
            yield next(iter(found.values()))
        else:
            yield "; ".join(f"{own} ({name})" for name, own in found.items() if own != "correct")


def _noted(cell: str, notes: dict[str, int]) -> str:
    """A cell with the number of its reason."""
    word, _, reason = cell.partition(": ")
    if not reason:
        return word
    reason = re.sub(r"of \[[\d, ]+\] positions", "of different lengths", reason)
    reason = reason[0].upper() + reason[1:] + "."
    return f"{word} ({notes.setdefault(reason, len(notes) + 1)})"


def peer() -> str:
    """The same as the `adapters` library gave it."""
    rows = ((code(name), *own) for name, own in _PEER.items())
    return table(("`adapters` 1.3.0", *map(code, _COLUMNS)), rows)
