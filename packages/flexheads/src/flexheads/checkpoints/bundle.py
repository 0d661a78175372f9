"""The value between files and models: what a format reads into and writes from."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from flexheads.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """The model and the library that something was saved from.

    Attributes:
        model_type: ``config.model_type`` of the model.
        model_class: Its class name.
        model_name: Its name or path, if it had one.
        hidden_size: Its hidden size.
        version: The library that wrote it, as ``"flexheads.0.1.0"``; None before 2022.
        provider: The distribution that the architecture, method or head type came from.
    """

    model_type: str | None = None
    model_class: str | None = None
    model_name: str | None = None
    hidden_size: int | None = None
    version: str | None = None
    provider: str | None = None


@dataclass(frozen=True, kw_only=True)
class SavedAdapter:
    """An adapter: its configuration as plain data, and its tensors by logical address."""

    name: str
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class SavedHead:
    """A flexible head.

    Attributes:
        name: The head's name.
        config: Its configuration with its ``head_type``.
        tensors: Its tensors by logical address.
        embeddings: The output matrix of a tied language-model head, for formats that repeat it.
    """

    name: str
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    embeddings: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class SavedStaticHead:
    """The head of a transformers class, with its tensors by that class's own names."""

    model_class: str
    tensors: Mapping[str, Tensor]
    label2id: Mapping[str, int] | None = None
    problem_type: str | None = None


@dataclass(frozen=True, kw_only=True)
class SavedFusion:
    """An AdapterFusion: the adapters that it fuses, its configuration and its tensors."""

    name: str
    members: tuple[str, ...]
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """What one directory holds: an adapter or a fusion of adapters, a head, or both.

    Attributes:
        adapter: The adapter, if there is one.
        fusion: The AdapterFusion, if there is one.
        head: The head, if there is one.
        adapter_from, fusion_from, head_from: Where each was saved.
        source: The directory, for messages.
    """

    adapter: SavedAdapter | None = None
    fusion: SavedFusion | None = None
    head: SavedHead | SavedStaticHead | None = None
    adapter_from: Provenance = field(default_factory=Provenance)
    fusion_from: Provenance = field(default_factory=Provenance)
    head_from: Provenance = field(default_factory=Provenance)
    source: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What a format must know of the model on the other side.

    Attributes:
        architecture: Name of the architecture.
        model_types: The model types that it answers to.
        hidden_size: The model's hidden size; None where its parts have one each.
        prefix: Where the backbone hangs in a model with a head; a bare backbone has the same.
        prefixes: Further places where it hangs in the models that files come from.
        pooler: Whether the model has a trained pooler.
        paths: The path in AdapterHub files of each site, by logical address.
        renamed: The roles that AdapterHub files call by one another's names.
        interleaved: Whether queries, keys and values take turns in one projection.
    """

    architecture: str
    model_types: tuple[str, ...]
    hidden_size: int | None
    prefix: str
    paths: Mapping[str, str]
    prefixes: tuple[str, ...] = ()
    pooler: bool = True
    renamed: Mapping[str, str] = field(default_factory=dict)
    interleaved: bool = False

    @functools.cached_property
    def sites(self) -> Mapping[str, tuple[str, ...]]:
        """The sites at each path, in order; several where one module is several projections."""
        found: dict[str, tuple[str, ...]] = {}
        for site, path in self.paths.items():
            found[path] = (*found.get(path, ()), site)
        return found

    def site_of(self, address: str) -> str:
        """The site that a tensor's address belongs to.

        Raises:
            KeyError: If the model has none that does.
        """
        end = address.find(".")
        while end > 0 and address[:end] not in self.paths:
            end = address.find(".", end + 1)
        if end < 0:
            raise KeyError(address)
        return address[:end]

    def below(self, key: str) -> str:
        """A tensor's key without the name of the backbone, wherever that hangs."""
        for prefix in filter(None, (self.prefix, *self.prefixes)):
            if key.startswith(f"{prefix}."):
                return key[len(prefix) + 1 :]
        return key

    def check(self, saved: Provenance, what: str, source: Path) -> None:
        """Refuses what was saved from another kind of model.

        Raises:
            CheckpointError: If the model type or the hidden size differs.
        """
        if saved.model_type is not None and saved.model_type not in self.model_types:
            raise CheckpointError(
                f"{source}: this {what} was made for a {saved.model_type!r} model, but this model "
                f"is {self.architecture!r}. Load it into a {saved.model_type!r} model."
            )
        if saved.hidden_size not in (None, self.hidden_size):
            raise CheckpointError(
                f"{source}: this {what} was made for hidden size {saved.hidden_size}, but this "
                f"model has {self.hidden_size}. Load it into a model of that size."
            )


class Format(ABC):
    """A layout of files on disk."""

    @abstractmethod
    def detect(self, directory: Path) -> bool:
        """Whether `directory` holds files of this format."""

    @abstractmethod
    def read(self, directory: Path, layout: Layout, *, with_head: bool = True) -> Bundle:
        """Reads what is there.

        Args:
            directory: The directory.
            layout: The model that it is read for.
            with_head: Whether a head is read too; where not, its files may be damaged.

        Raises:
            CheckpointError: If files are missing, broken, or made for another model.
        """

    @abstractmethod
    def write(self, bundle: Bundle, directory: Path, layout: Layout) -> None:
        """Writes a bundle into an empty directory.

        Raises:
            CheckpointError: If the bundle holds something that this format cannot say.
        """
