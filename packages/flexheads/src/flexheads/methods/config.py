"""Adapter configurations: frozen values with the names and strings of the `adapters` library."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from flexheads.configs import Config
from flexheads.errors import ConfigError
from flexheads.plugins import registry, resolve

_UNTAGGED = "bottleneck"
"""The method whose saved configurations never had a key that says so."""

Self = TypeVar("Self", bound="AdapterConfig")


@dataclasses.dataclass(frozen=True, eq=False)
class AdapterConfig(Config):
    """Base class of adapter configurations.

    Attributes:
        architecture: Value of the key of that name in files; it says which method a saved
            configuration belongs to.
    """

    architecture: ClassVar[str | None] = None

    @property
    def tag(self) -> str:
        """What the registry knows the method by."""
        return self.architecture or _UNTAGGED

    def to_dict(self) -> dict[str, Any]:
        fields = super().to_dict()
        return (
            fields if self.architecture is None else {"architecture": self.architecture, **fields}
        )

    @classmethod
    def from_dict(cls: type[Self], fields: Mapping[str, Any], *, tolerant: bool = False) -> Self:
        given = {key: value for key, value in fields.items() if key != "architecture"}
        return super().from_dict(given, tolerant=tolerant)

    @classmethod
    def load(cls, config: str | Mapping[str, Any] | None, **changes: Any) -> AdapterConfig:
        """Same as `load_config`; the name that users of the `adapters` library know."""
        return load_config(config, **changes)


def load_config(
    config: str | Mapping[str, Any] | os.PathLike[str] | None,
    *,
    tolerant: bool = False,
    **changes: Any,
) -> AdapterConfig:
    """Resolves whatever users write for a configuration.

    Args:
        config: A configuration; a mapping of its fields; an identifier, with arguments or without
            (``"seq_bn"``, ``"seq_bn[reduction_factor=12, non_linearity=gelu]"``); several of these,
            to be used together (``"prefix_tuning|par_bn"``); or the path of a JSON file, such as a
            saved ``adapter_config.json``. None is ``"seq_bn"``.
        tolerant: Whether unknown fields of a mapping or file are left out instead of refused.
        changes: Fields to set differently.

    Returns:
        The configuration.

    Raises:
        ConfigError: If the string cannot be read, or a field does not exist.
        UnknownNameError: If no installed method answers to the identifier.
    """
    if config is None:
        config = "seq_bn"
    if isinstance(config, AdapterConfig):
        return config.replace(**changes) if changes else config
    if isinstance(config, Mapping):
        method = registry().method_for_tag(config.get("architecture") or _UNTAGGED)
        loaded: AdapterConfig = resolve(method.config).from_dict(config, tolerant=tolerant)
        return loaded.replace(**changes) if changes else loaded
    if not isinstance(config, str | os.PathLike):
        raise ConfigError(
            f"A configuration is an identifier, a mapping of fields or a path, not {config!r}."
        )
    if isinstance(config, os.PathLike) or config.endswith(".json"):
        return load_config(_read_json(Path(config)), tolerant=True, **changes)
    if len(members := _members(config)) > 1:
        union = resolve(registry().method_for_tag("union").config)
        several: AdapterConfig = union(*(load_config(member) for member in members))
        return several.replace(**changes) if changes else several
    name, arguments = _parse(config)
    _, reference, fields = registry().identifier(name)
    preset: AdapterConfig = resolve(reference)(**fields)
    return preset.replace(**{**arguments, **changes})


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"Cannot read an adapter configuration from {path}: {error}") from error
    nested = content.get("config")
    return nested if isinstance(nested, dict) else content


def _members(text: str) -> list[str]:
    """What stands between the bars of a string, other than those inside brackets."""
    pieces = re.split(r"(\[[^\]]*\]|\|)", text)
    members = [""]
    for piece in pieces:
        if piece == "|":
            members.append("")
        else:
            members[-1] += piece
    return members


def _parse(text: str) -> tuple[str, dict[str, Any]]:
    match = re.fullmatch(r"\s*(?P<name>[^\[\]|\n]+?)\s*(?:\[(?P<arguments>.*)\])?\s*", text)
    if match is None:
        raise ConfigError(
            f"Cannot read the configuration {text!r}. Write an identifier, or one with arguments: "
            '"seq_bn[reduction_factor=12]".'
        )
    try:
        call = ast.parse(f"_({match['arguments'] or ''})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            raise ValueError("only keyword arguments")
        return match["name"], {str(k.arg): _literal(k.value) for k in call.keywords if k.arg}
    except (SyntaxError, ValueError) as error:
        raise ConfigError(
            f"Cannot read the arguments in {text!r}. Write them as Python keyword arguments."
        ) from error


def _literal(node: ast.expr) -> Any:
    """The value of a literal; a bare word is the string of that word."""
    return node.id if isinstance(node, ast.Name) else ast.literal_eval(node)
