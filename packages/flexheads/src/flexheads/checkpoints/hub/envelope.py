"""What surrounds every configuration in AdapterHub files, and the weights beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flexheads.checkpoints.bundle import Provenance
from flexheads.errors import CheckpointError


def envelope(
    origin: Provenance, name: str | None, config: Mapping[str, Any] | None
) -> dict[str, Any]:
    """A configuration file around a configuration."""
    return {
        "config": config,
        "hidden_size": origin.hidden_size,
        "model_class": origin.model_class,
        "model_name": origin.model_name,
        "model_type": origin.model_type,
        "name": name,
        "version": origin.version,
        "flexheads": {"provider": origin.provider},
    }


def read_provenance(content: Mapping[str, Any]) -> Provenance:
    """Where the content of a configuration file comes from."""
    keys = ("model_type", "model_class", "model_name", "hidden_size", "version")
    own = content.get("flexheads", {})
    return Provenance(**{key: content.get(key) for key in keys}, provider=own.get("provider"))


def required_field(content: Mapping[str, Any], key: str, directory: Path) -> Any:
    """A value that a configuration file must have.

    Raises:
        CheckpointError: If it has not.
    """
    if content.get(key) is None:
        raise CheckpointError(f"{directory}: the configuration has no {key!r}; it is damaged.")
    return content[key]


def find_weights(directory: Path, names: tuple[str, ...]) -> Path | None:
    """The first of these files that is there."""
    return next((directory / name for name in names if (directory / name).is_file()), None)


def require_weights(directory: Path, names: tuple[str, ...]) -> Path:
    """The first of these files.

    Raises:
        CheckpointError: If none is there.
    """
    path = find_weights(directory, names)
    if path is None:
        raise CheckpointError(
            f"{directory} has a configuration but no weights: there should be a file "
            f"{' or '.join(names)}."
        )
    return path
