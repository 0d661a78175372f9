"""Modules and layers of a live model, by the paths that a spec gives."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from flexheads.errors import ConfigError
from flexheads.specs import Path


def find_module(root: nn.Module, path: Path, owner: str) -> nn.Module:
    """The module at the first of the paths that resolves.

    Raises:
        ConfigError: If none resolves; the message names all that were tried.
    """
    for candidate in alternatives(path):
        found: nn.Module | None = root
        for name in candidate.split("."):  # quicker than looking for attributes
            found = None if found is None else found._modules.get(name)
        if found is not None:
            return found
        try:
            return root.get_submodule(candidate)
        except AttributeError:
            continue
    raise ConfigError(
        f"{owner}: {type(root).__name__} has no module at {path!r}. The spec does not fit the "
        "installed transformers; add the new path as an alternative."
    )


def holds(root: nn.Module, path: Path) -> bool:
    """Whether there are layers at a path."""
    try:
        find_stack(root, path, "")
    except ConfigError:
        return False
    return True


def find_stack(root: nn.Module, path: Path, owner: str) -> nn.Module:
    """The list that a path of layers leads to; with ``.*.`` in it, the list before that."""
    return find_module(root, tuple(p.partition(".*.")[0] for p in alternatives(path)), owner)


def find_layers(root: nn.Module, path: Path, owner: str) -> Iterator[tuple[str, nn.Module]]:
    """The layers at a path, each with its own path below the first alternative.

    Args:
        root: The backbone.
        path: The list of layers; ``.*.`` stands for every number of an outer list.
        owner: Who wants them, for messages.
    """
    start, _, rest = first(path).partition(".*.")
    for number, child in enumerate(find_stack(root, path, owner).children()):
        if rest:
            for index, layer in enumerate(find_module(child, rest, owner).children()):
                yield f"{start}.{number}.{rest}.{index}", layer
        else:
            yield f"{start}.{number}", child


def alternatives(path: Path) -> tuple[str, ...]:
    """All alternatives of a path."""
    return (path,) if isinstance(path, str) else path


def first(path: Path) -> str:
    """The first alternative of a path, which AdapterHub files name."""
    return alternatives(path)[0]
