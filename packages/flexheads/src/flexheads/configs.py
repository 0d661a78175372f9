"""Frozen configurations: dataclasses that are also mappings of their fields, as JSON knows them."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from flexheads.errors import ConfigError

logger = logging.getLogger(__name__)

Self = TypeVar("Self", bound="Config")


@dataclasses.dataclass(frozen=True, eq=False)
class Config(Mapping[str, Any]):
    """Base class of adapter and head configurations: immutable, a mapping of its fields."""

    def __getitem__(self, key: str) -> Any:
        if key in self._names():
            return getattr(self, key)
        raise KeyError(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names())

    def __len__(self) -> int:
        return len(self._names())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Config) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(json.dumps(self.to_dict(), sort_keys=True))

    @classmethod
    @functools.cache  # for each class
    def _names(cls) -> tuple[str, ...]:
        return tuple(field.name for field in dataclasses.fields(cls))

    @classmethod
    def _default(cls, name: str) -> Any:
        """What a field has where nothing is said."""
        return next(f.default for f in dataclasses.fields(cls) if f.name == name)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as it is written into files."""
        return {name: plain(getattr(self, name)) for name in self._names()}

    def replace(self: Self, **changes: Any) -> Self:
        """A copy with other values for some fields.

        Raises:
            ConfigError: If a field does not exist.
        """
        self._check_names(changes)
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_dict(cls: type[Self], fields: Mapping[str, Any], *, tolerant: bool = False) -> Self:
        """A configuration from its fields.

        Args:
            fields: The fields, as `to_dict` gives them.
            tolerant: Leave out unknown fields with a log message, as for files of other releases.

        Raises:
            ConfigError: If a required field is missing, or one is unknown and `tolerant` is false.
        """
        given = dict(fields)
        if tolerant:
            for key in [key for key in given if key not in cls._names()]:
                logger.warning("%s: unknown field %s=%r left out.", cls.__name__, key, given[key])
                del given[key]
        cls._check_names(given)
        required = {
            f.name
            for f in dataclasses.fields(cls)
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        }
        if missing := sorted(required - set(given)):
            raise ConfigError(f"{cls.__name__} needs {', '.join(missing)}.")
        return cls(**given)

    @classmethod
    def _check_names(cls, fields: Mapping[str, Any]) -> None:
        if unknown := sorted(set(fields) - set(cls._names())):
            raise ConfigError(
                f"{cls.__name__} has no field {', '.join(map(repr, unknown))}. "
                f"Its fields are: {', '.join(cls._names())}."
            )


_SIMPLE = frozenset({str, int, float, bool, type(None)})


def plain(value: Any) -> Any:
    """Values as JSON knows them."""
    if type(value) in _SIMPLE:
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value
