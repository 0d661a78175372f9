"""Specifications as Python source."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

from flexheads.specs import ArchitectureSpec

_WIDTH = 88


def spec_source(spec: ArchitectureSpec, notes: Iterable[str] = ()) -> str:
    """Source that makes a specification, fields with their defaults left out.

    Args:
        spec: The specification.
        notes: Put in front as comments.
    """
    used = sorted(_classes(spec))
    imports = f"from flexheads import {', '.join(used)}"
    comments = [
        line for note in notes for line in textwrap.wrap(f"# {note}", subsequent_indent="# ")
    ]
    body = f"{_identifier(spec.name)} = {_source(spec, 0)}"
    return "\n".join([imports, "", *comments, body])


def _identifier(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name).upper()


def _classes(value: Any) -> set[str]:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        inner = (getattr(value, field.name) for field in dataclasses.fields(value))
        return {type(value).__name__}.union(*(_classes(v) for v in inner))
    if isinstance(value, Mapping):
        return set().union(*(_classes(v) for v in value.values()))
    if isinstance(value, tuple):
        return set().union(*(_classes(v) for v in value))
    return set()


def _source(value: Any, depth: int) -> str:
    """The source of a value at a depth of indentation; on one line where that is short."""
    parts: list[str]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        begin, end = f"{type(value).__name__}(", ")"
        parts = [
            f"{field.name}={_source(getattr(value, field.name), depth + 1)}"
            for field in dataclasses.fields(value)
            if not _is_default(field, getattr(value, field.name))
        ]
    elif isinstance(value, Mapping):
        begin, end = "{", "}"
        parts = [f"{_source(k, 0)}: {_source(v, depth + 1)}" for k, v in value.items()]
    elif isinstance(value, tuple):
        begin, end = "(", ",)" if len(value) == 1 else ")"
        parts = [_source(v, depth + 1) for v in value]
    elif isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    else:
        return repr(value)
    line = f"{begin}{', '.join(parts)}{end}"
    if "\n" not in line and len(line) + 4 * depth <= _WIDTH:
        return line
    inner = "".join(f"\n{'    ' * (depth + 1)}{part}," for part in parts)
    return f"{begin}{inner}\n{'    ' * depth}{end.removeprefix(',')}"


def _is_default(field: dataclasses.Field[Any], value: Any) -> bool:
    if field.default is not dataclasses.MISSING:
        return bool(value == field.default)
    made = field.default_factory
    return made is not dataclasses.MISSING and bool(value == made())
