"""The command line: what is installed, and what a directory holds."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
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


def _who(provider: Provider) -> str:
    return f"{provider.distribution} {provider.version}"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    app()
