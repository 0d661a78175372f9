"""Reading and writing files: atomically, and without ever running what is in them."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flexheads.errors import CheckpointError


@contextmanager
def staged(directory: Path) -> Iterator[Path]:
    """A directory beside `directory` whose files take their place when the block ends well.

    A new directory appears whole. In an existing one each file is replaced in one step; other
    files stay. Whatever fails before leaves everything as it was.

    Args:
        directory: Where the files are to be.

    Raises:
        CheckpointError: If `directory` is a file.
    """
    directory = directory.absolute()
    file = next((path for path in (directory, *directory.parents) if path.is_file()), None)
    if file is not None:
        raise CheckpointError(f"{file} is a file; give a directory to save into.")
    made = [path for path in directory.parents if not path.exists()]
    directory.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        yield aside
        if directory.exists():
            _replace_files(aside, directory)
        else:
            aside.chmod(0o777 & ~_umask())
            os.rename(aside, directory)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        for path in made:
            with suppress(OSError):  # somebody else may have put something into it
                path.rmdir()
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _replace_files(aside: Path, directory: Path) -> None:
    """Moves all files of `aside` into `directory`, or none."""
    kept = Path(tempfile.mkdtemp(prefix=f".{directory.name}.old.", dir=directory.parent))
    moved: list[str] = []
    try:
        for name in sorted(os.listdir(aside)):
            if (directory / name).exists():
                _keep(directory / name, kept / name)
            os.replace(aside / name, directory / name)
            moved.append(name)
    except BaseException:
        for name in moved:
            if (kept / name).exists():
                os.replace(kept / name, directory / name)
            else:
                (directory / name).unlink()
        raise
    finally:
        shutil.rmtree(kept, ignore_errors=True)


def _keep(file: Path, kept: Path) -> None:
    """Gives a file a second name, or a copy where the file system has no such names."""
    try:
        os.link(file, kept)
    except OSError:
        shutil.copy2(file, kept)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes JSON as the `adapters` library does: two spaces, sorted keys."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        CheckpointError: If the file cannot be read, or is no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"Cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} should hold a JSON object, not {type(content).__name__}.")
    return content


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors as safetensors."""
    written: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        storage = own.untyped_storage().data_ptr()
        # Names that share one storage are written as separate tensors.
        written[name] = own.clone() if storage in storages else own
        storages.add(storage)
    save_file(written, path, metadata={"format": "pt"})


def read_tensors(path: Path, begins: tuple[str, ...] = ("",)) -> dict[str, Tensor]:
    """Reads tensors from safetensors, or from a ``.bin`` that holds nothing but tensors.

    Args:
        path: The file.
        begins: How the names of those that are wanted begin.

    Raises:
        CheckpointError: If the file is broken, or holds anything else.
    """
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {k: file.get_tensor(k) for k in file.keys() if k.startswith(begins)}  # noqa: SIM118
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(f"Cannot read the tensors in {path}: {error}") from error
    except Exception as error:  # pickle's errors, for files that hold more than tensors
        raise CheckpointError(
            f"{path} holds something else than tensors, and code in files is never run: {error}"
        ) from error
    if not isinstance(content, dict) or not all(isinstance(t, Tensor) for t in content.values()):
        raise CheckpointError(f"{path} should hold a dictionary of tensors.")
    return {name: tensor for name, tensor in content.items() if str(name).startswith(begins)}
