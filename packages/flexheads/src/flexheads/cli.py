"""The command line: what is installed, what a directory holds, and what its heads say of texts."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flexheads._registry import KINDS, Provider
from flexheads.plugins import registry
from flexheads.specs import Spec

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)
console = Console()


@app.command()
def plugins() -> None:
    """Lists everything that the installed packages provide, and what was skipped and why."""
    found = registry()
    for kind in KINDS.values():
        specs: Iterable[Spec] = getattr(found, kind.table).values()
        table = Table(title=kind.table.replace("_", " "), title_justify="left")
        for column in (kind.label, "provided by", "version"):
            table.add_column(column)
        for spec in specs:
            provider = found.provider_of(spec)
            table.add_row(spec.name, provider.distribution, provider.version)
        console.print(table)
    for skipped in found.skipped:
        console.print(f"[yellow]skipped[/] {_who(skipped.provider)}: {skipped.reason}")


@app.command()
def doctor() -> None:
    """Prints the versions that matter, and fails where an installed plugin cannot be used."""
    for name in ("flexheads", "torch", "transformers", "safetensors", "pluggy"):
        console.print(f"{name} {_version(name)}")
    found = registry()
    for skipped in found.skipped:
        console.print(f"[red]not usable[/] {_who(skipped.provider)}: {skipped.reason}")
    if found.skipped:
        raise typer.Exit(code=1)
    console.print("All installed plugins are in use.")


@app.command()
def inspect(directory: Annotated[Path, typer.Argument(help="A saved adapter or head.")]) -> None:
    """Shows what the configurations in a directory say, without loading any weights."""
    from flexheads.checkpoints.hub.format import ADAPTER_CONFIG, HEAD_CONFIG
    from flexheads.checkpoints.store import read_json

    found = [directory / name for name in (ADAPTER_CONFIG, HEAD_CONFIG)]
    found = [path for path in found if path.is_file()]
    if not found:
        console.print(f"[red]{directory} holds no {ADAPTER_CONFIG} and no {HEAD_CONFIG}.[/]")
        raise typer.Exit(code=1)
    for path in found:
        table = Table(title=path.name, title_justify="left", show_header=False)
        for key, value in read_json(path).items():
            table.add_row(key, "" if value is None else str(value))
        console.print(table)


@app.command()
def predict(
    directory: Annotated[Path, typer.Argument(help="A saved model with heads.")],
    texts: Annotated[
        list[str] | None, typer.Argument(help="Texts; without any, the lines of the input.")
    ] = None,
    head: Annotated[str | None, typer.Option(help="The head; else the active one.")] = None,
    second: Annotated[
        str | None, typer.Option(help="A second text for each, such as what answers a question.")
    ] = None,
    choice: Annotated[
        list[str] | None, typer.Option(help="What could follow each text; give it several times.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Texts that are read at once.")] = 32,
    as_json: Annotated[
        bool, typer.Option("--json", help="One line of JSON for each text.")
    ] = False,
) -> None:
    """Says what a head of a saved model makes of texts."""
    from flexheads.errors import FlexheadsError
    from flexheads.models.auto import AutoModelWithHeads

    given = texts or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    samples = [(text, choice or second) if choice or second else text for text in given]
    try:
        model: Any = AutoModelWithHeads.from_pretrained(str(directory))
        name = model.active_head if head is None else head
        if not isinstance(name, str):
            known = ", ".join(map(repr, model.heads)) or "none"
            raise typer.BadParameter(f"Name one with --head. There are: {known}.")
        results = model.predict(name, samples, batch_size=batch_size)
    except (FlexheadsError, OSError) as error:
        Console(stderr=True).print(f"[red]{error.__class__.__name__}[/] {escape(str(error))}")
        raise typer.Exit(code=1) from error
    if as_json:
        for text, result in zip(given, results, strict=True):
            print(json.dumps({"text": text, "result": result}, ensure_ascii=False))
    else:
        console.print(_results(name, given, results))


def _results(head: str, texts: Sequence[str], results: Sequence[Any]) -> Table:
    """One line for each thing that was found, with a column for each of its keys."""
    rows = [
        (text, one) for text, result in zip(texts, results, strict=True) for one in _found(result)
    ]
    table = Table(title=head, title_justify="left")
    columns = list(dict.fromkeys(key for _, own in rows for key in own))
    for column in ("input", *columns):
        table.add_column(column)
    last = None
    for text, own in rows:
        cells = ("" if key not in own else _cell(own[key]) for key in columns)
        table.add_row("" if text is last else escape(text), *cells)
        last = text
    return table


def _found(result: Any) -> list[Mapping[str, Any]]:
    """What was found in one text; something empty where nothing was."""
    found = result if isinstance(result, list) else [result]
    if all(isinstance(one, Mapping) for one in found):
        return found or [{}]
    return [{"result": result}]


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    return escape(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _who(provider: Provider) -> str:
    return f"{provider.distribution} {provider.version}"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    app()
