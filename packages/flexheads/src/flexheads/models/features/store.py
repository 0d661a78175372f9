"""Features in files: tensors of any length, row behind row, read without being loaded."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexheads.errors import CheckpointError

_FORMAT = 1
_ABOUT, _INDEX = "features.json", "rows.bin"
_DIGEST = 16
_RECORD = 8 + 8 + _DIGEST


@dataclasses.dataclass(frozen=True)
class Field:
    """One tensor of every row.

    Attributes:
        dtype: Its dtype, as ``"float32"``.
        shape: The shape of what is at one position, or of the whole where `long` is false.
        long: Whether it has something for each position.
    """

    dtype: str
    shape: tuple[int, ...]
    long: bool

    @property
    def size(self) -> int:
        """Numbers at one position, or in one sequence."""
        return int(torch.Size(self.shape).numel())


class FeatureStore:
    """A directory with one flat file for each field, and an index.

    A row is one or several sequences of one length. Rows are only ever appended: the tensors first,
    then their record in the index, so that after an interruption at any time the rows of the index
    are whole.

    Args:
        directory: The directory; it is made where it does not exist.
        about: What the features depend on, JSON-plain; a directory about something else is refused.

    Raises:
        CheckpointError: If the directory holds other features, or something else, or is damaged.
    """

    def __init__(self, directory: str | Path, about: Mapping[str, Any]) -> None:
        self.directory, self.about = Path(directory), dict(about)
        self.fields: dict[str, Field] = {}
        self._shapes: list[tuple[int, int]] = []
        self._digests: list[bytes] = []
        self._starts: list[tuple[int, int]] = [(0, 0)]
        self._maps: dict[str, Tensor] = {}
        if (self.directory / _ABOUT).is_file():
            self._open()
        elif self.directory.is_dir() and any(self.directory.iterdir()):
            raise CheckpointError(
                f"{self.directory} is not empty and holds no features. Give another directory."
            )

    def __len__(self) -> int:
        """The rows that are there."""
        return len(self._shapes)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles, for the workers of loaders, map the files anew."""
        return {**self.__dict__, "_maps": {}}

    def digest(self, row: int) -> bytes:
        """What identifies the inputs of a row."""
        return self._digests[row]

    def append(self, digests: list[bytes], rows: list[dict[str, Tensor]]) -> None:
        """Adds rows behind those that are there.

        Args:
            digests: What identifies the inputs of each.
            rows: The tensors of each: ``(sequences, length, ...)``, or ``(sequences, ...)`` for
                fields that have nothing for each position.
        """
        if not self.fields:
            raise CheckpointError("The fields of the features have to be declared first.")
        self._maps.clear()
        for name, field in self.fields.items():
            with (self.directory / f"{name}.bin").open("ab") as file:
                for row in rows:
                    _write(file, row[name], field)
        with (self.directory / _INDEX).open("ab") as file:
            for digest, row in zip(digests, rows, strict=True):
                sequences, length = self._shape(row)
                file.write(sequences.to_bytes(8, "little") + length.to_bytes(8, "little") + digest)
                self._note(sequences, length, digest)

    def declare(self, fields: Mapping[str, Field]) -> None:
        """Says what fields rows have, and begins the files; nothing where they are there.

        Raises:
            CheckpointError: If the rows that are there have other fields.
        """
        if self.fields:
            if dict(fields) != self.fields:
                raise CheckpointError(
                    f"{self.directory} has the fields {self.fields}, not {dict(fields)}."
                )
            return
        self.fields = dict(fields)
        self.directory.mkdir(parents=True, exist_ok=True)
        described = {name: dataclasses.asdict(field) for name, field in fields.items()}
        text = json.dumps({"format": _FORMAT, "about": self.about, "fields": described}, indent=1)
        beside = self.directory / f"{_ABOUT}.new"
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, self.directory / _ABOUT)

    def row(self, number: int) -> dict[str, Tensor]:
        """The tensors of a row, as they were appended; they are the files' own memory."""
        sequences, length = self._shapes[number]
        first, position = self._starts[number]
        found = {}
        for name, field in self.fields.items():
            start, count = (position, sequences * length) if field.long else (first, sequences)
            flat = self._map(name)[start * field.size : (start + count) * field.size]
            shape = (sequences, length, *field.shape) if field.long else (sequences, *field.shape)
            found[name] = flat.view(shape)
        return found

    def close(self) -> None:
        """Writes everything through to the disk."""
        for path in self.directory.glob("*.bin"):
            with path.open("rb") as file:
                os.fsync(file.fileno())

    def _open(self) -> None:
        try:
            found = json.loads((self.directory / _ABOUT).read_text(encoding="utf-8"))
            made, about = found["format"], found["about"]
            fields = {
                n: Field(f["dtype"], tuple(f["shape"]), f["long"])
                for n, f in found["fields"].items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{self.directory / _ABOUT} is damaged: {error!r}.") from error
        if made != _FORMAT:
            raise CheckpointError(
                f"{self.directory} has format {made}; this release reads {_FORMAT}."
            )
        if wrong := [name for name in self.about if about.get(name) != self.about[name]]:
            raise CheckpointError(
                f"{self.directory} holds the features of other {' and '.join(wrong)}. Delete it, "
                "or give another directory."
            )
        self.fields = fields
        index = self.directory / _INDEX
        content = index.read_bytes() if index.is_file() else b""
        for start in range(0, len(content) - _RECORD + 1, _RECORD):
            sequences, length = (
                int.from_bytes(content[start + at : start + at + 8], "little") for at in (0, 8)
            )
            self._note(sequences, length, content[start + 16 : start + _RECORD])
        self._mend()

    def _mend(self) -> None:
        """Cuts off what an interruption has left behind the last whole row.

        Raises:
            CheckpointError: If a file is shorter than its rows.
        """
        sequences, positions = self._starts[-1]
        sizes = {_INDEX: len(self) * _RECORD}
        for name, field in self.fields.items():
            width = field.size * getattr(torch, field.dtype).itemsize
            sizes[f"{name}.bin"] = width * (positions if field.long else sequences)
        for name, size in sizes.items():
            path = self.directory / name
            there = path.stat().st_size if path.is_file() else 0
            if there < size:
                raise CheckpointError(
                    f"{path} is damaged: it has {there} bytes and should have {size}. Delete "
                    f"{self.directory}, and the features are computed anew."
                )
            if there > size:
                os.truncate(path, size)

    def _note(self, sequences: int, length: int, digest: bytes) -> None:
        self._shapes.append((sequences, length))
        self._digests.append(digest)
        first, position = self._starts[-1]
        self._starts.append((first + sequences, position + sequences * length))

    def _shape(self, row: Mapping[str, Tensor]) -> tuple[int, int]:
        """The number of sequences of a row, and their length; 0 where it has no long field."""
        sequences = int(next(iter(row.values())).shape[0])
        lengths = {int(row[name].shape[1]) for name, field in self.fields.items() if field.long}
        assert len(lengths) < 2
        return sequences, lengths.pop() if lengths else 0

    def _map(self, name: str) -> Tensor:
        if name not in self._maps:
            field = self.fields[name]
            sequences, positions = self._starts[-1]
            size = field.size * (positions if field.long else sequences)
            path, dtype = str(self.directory / f"{name}.bin"), getattr(torch, field.dtype)
            # A private map: what a program writes to it stays in that program.
            self._maps[name] = torch.from_file(path, shared=False, size=size, dtype=dtype)
        return self._maps[name]


def field_of(tensor: Tensor, long: bool) -> Field:
    """The field that holds tensors such as this one, ``(sequences, length if long, ...)``."""
    shape = tuple(tensor.shape[2 if long else 1 :])
    return Field(str(tensor.dtype).removeprefix("torch."), shape, long)


def _write(file: Any, tensor: Tensor, field: Field) -> None:
    if field_of(tensor, field.long) != field:
        raise CheckpointError(f"A row has {field_of(tensor, field.long)} in place of {field}.")
    flat = tensor.detach().cpu().contiguous().view(-1)
    if flat.numel():
        file.write(flat.view(torch.uint8).numpy().data)
