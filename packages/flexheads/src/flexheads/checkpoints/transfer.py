"""Between directories and modules: finding a source, choosing its format, filling strictly."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from flexheads.checkpoints.bundle import Bundle, Format, Layout
from flexheads.checkpoints.store import staged
from flexheads.errors import CheckpointError
from flexheads.plugins import registry, resolve

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_MODEL_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")


def find_source(source: str | Path, revision: str | None = None) -> Path:
    """The directory that a source names.

    Args:
        source: A directory, or the id of a repository on the Hugging Face hub.
        revision: Branch, tag or commit on the hub.

    Raises:
        CheckpointError: If there is neither.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{path} is a file; give the directory that it lies in.")
    if not _HUB_ID.fullmatch(str(source)):
        raise CheckpointError(f"There is no directory {path}.")
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", "*.safetensors", "*.bin"]
        return Path(snapshot_download(str(source), revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:  # what the hub's client raises, offline included
        raise CheckpointError(
            f"There is no directory {path}, and no repository {source!r} could be fetched: {error}"
        ) from error


def read_bundle(
    source: str | Path, layout: Layout, revision: str | None = None, *, with_head: bool = True
) -> Bundle:
    """Reads a directory in whichever format it is; see `Format.read`.

    Raises:
        CheckpointError: If it holds none that is known, is damaged, or is for another model.
    """
    directory = find_source(source, revision)
    formats = registry().formats
    for spec in formats.values():
        reader: Format = resolve(spec.format)()
        if reader.detect(directory):
            return reader.read(directory, layout, with_head=with_head)
    raise CheckpointError(
        f"{directory} holds no adapter and no head in a known format ({', '.join(formats)})."
    )


def write_bundle(bundle: Bundle, directory: str | Path, layout: Layout, format_name: str) -> None:
    """Writes a bundle, all of it or nothing.

    Raises:
        CheckpointError: If the directory holds a whole model, whose own files it would break.
        UnknownNameError: If there is no such format.
    """
    target = Path(directory).expanduser()
    if (target / "config.json").is_file() and any((target / n).exists() for n in _MODEL_WEIGHTS):
        raise CheckpointError(
            f"{target} holds a whole model; an adapter_config.json beside it breaks its "
            "from_pretrained. Save into a directory of its own, for example a sub-directory."
        )
    writer: Format = resolve(registry().format(format_name).format)()
    with staged(target) as aside:
        writer.write(bundle, aside, layout)


@torch.no_grad()
def fill(module: nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
    """Copies tensors into a module whose parameters and buffers they match exactly.

    Args:
        module: The module.
        tensors: One tensor for each entry of its state dict.
        what: What is filled, for messages.

    Raises:
        CheckpointError: If one is missing, left over, or of another shape; all are named.
    """
    state = module.state_dict()
    problems = [f"{key} is missing" for key in state if key not in tensors]
    problems += [f"{key} is left over" for key in tensors if key not in state]
    problems += [
        f"{key} has shape {tuple(tensors[key].shape)} instead of {tuple(tensor.shape)}"
        for key, tensor in state.items()
        if key in tensors and tensors[key].shape != tensor.shape
    ]
    if problems:
        shown = "; ".join(problems[:8]) + ("; ..." if len(problems) > 8 else "")
        raise CheckpointError(f"{what} does not fit its configuration: {shown}.")
    for key, tensor in state.items():
        tensor.copy_(tensors[key])
