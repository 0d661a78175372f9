"""A table of the adapters in a model: for a terminal, for a notebook, or as plain data."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from typing import Any

from torch import nn

_COLUMNS = {
    "name": "Name",
    "method": "Method",
    "#param": "Parameters",
    "%param": "% of model",
    "active": "Active",
    "train": "Trainable",
    "merged": "Merged",
}


class AdapterSummary:
    """What `adapter_summary` gives; it prints as a table, and shows as one in a notebook.

    Attributes:
        rows: One mapping for each adapter and fusion, and a last one for the whole backbone.
    """

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        self.rows = list(rows)

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        table = Table(*_COLUMNS.values())
        for row in self.rows:
            if row is self.rows[-1]:
                table.add_section()
            table.add_row(*(_shown(row.get(key)) for key in _COLUMNS))
        text = io.StringIO()
        Console(file=text, width=100).print(table)
        return text.getvalue().rstrip()

    __repr__ = __str__

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{title}</th>" for title in _COLUMNS.values())
        lines = (
            "".join(f"<td>{html.escape(_shown(row.get(key)))}</td>" for key in _COLUMNS)
            for row in self.rows
        )
        body = "".join(f"<tr>{cells}</tr>" for cells in lines)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def summarise(model: Any) -> AdapterSummary:
    """The summary of a model's adapters and fusions."""
    total = sum(parameter.numel() for parameter in model._backbone_parameters())
    setup = model.active_adapters
    names = () if setup is None else setup.names()
    fused = {block.name for block in (setup.blocks() if setup else ()) if hasattr(block, "name")}
    rows = [
        {
            "name": name,
            "method": adapter.config.tag,
            **_counts(adapter, total),
            "active": name in names,
            "merged": name in model._merged,
        }
        for name, adapter in model.adapters.items()
    ]
    rows += [
        {"name": name, "method": "fusion", **_counts(f, total), "active": name in fused}
        for name, f in model.adapter_fusions.items()
    ]
    trained = any(parameter.requires_grad for parameter in model._backbone_parameters())
    rows.append({"name": "Full model", "#param": total, "%param": 100.0, "train": trained})
    return AdapterSummary(rows)


def _counts(module: nn.Module, total: int) -> dict[str, Any]:
    parameters = list(module.parameters())
    number = sum(parameter.numel() for parameter in parameters)
    return {
        "#param": number,
        "%param": 100.0 * number / total,
        "train": bool(parameters) and all(parameter.requires_grad for parameter in parameters),
    }


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
