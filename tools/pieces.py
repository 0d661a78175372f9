"""Markdown from plain values: tables, annotations, and what docstrings say of fields."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    lines = [list(head)]
    lines += [["---"] * len(lines[0]), *map(list, rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def code(*words: str) -> str:
    """Words as code, with commas between them."""
    return ", ".join(f"`{word}`" for word in words)


def paper(number: str | None) -> str:
    """A link to a paper by its arXiv number."""
    return "none" if number is None else f"[{number}](https://arxiv.org/abs/{number})"


def annotation(text: str) -> str:
    """A type as people read it; bars would end the cells of a table."""
    return " or ".join(code(word) for word in _alternatives(ast.parse(text, mode="eval").body))


def _alternatives(node: ast.expr) -> list[str]:
    if isinstance(node, ast.BinOp):
        return [*_alternatives(node.left), *_alternatives(node.right)]
    if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "Literal":
        values = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        return [ast.unparse(value).replace("'", '"') for value in values]
    return [ast.unparse(node)]


def attributes(kind: type) -> dict[str, str]:
    """What the docstrings of a class and its bases say of each attribute."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        section = re.search(
            r"^ {4}Attributes:\n(.*?)(?=^ {4}\S|\Z)", base.__doc__ or "", re.M | re.S
        )
        for entry in re.split(r"^ {8}(?=\w)", section[1] if section else "", flags=re.M)[1:]:
            names, _, text = entry.partition(":")
            words = " ".join(text.split()).replace("``", "`").replace("|", "or")
            found |= {name.strip(): words for name in names.split(",")}
    return found


def arxiv(kind: type) -> str | None:
    """The first arXiv number in the docstring of a class, or else in those of its bases."""
    for base in kind.__mro__:
        if match := re.search(r"arXiv:(\d{4}\.\d{4,5})", base.__doc__ or ""):
            return match[1]
    return None


def first_sentence(documented: object) -> str:
    """The first paragraph of a docstring, on one line."""
    return " ".join((documented.__doc__ or "").partition("\n\n")[0].split()).replace("``", "`")
