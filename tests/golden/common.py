"""Where the files are, what of them this version supports, and when an output is the same."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flexheads.checkpoints.store import read_tensors
from flexheads.errors import UnknownNameError
from flexheads.plugins import registry

FOLDER = os.environ.get("FLEXHEADS_GOLDEN")
GOLDEN = Path(FOLDER or "not-set")

# What every test file here takes as its `pytestmark`.
MARKS = [
    pytest.mark.golden,
    pytest.mark.skipif(
        FOLDER is None or not GOLDEN.is_dir(), reason="FLEXHEADS_GOLDEN names no folder"
    ),
]

# Fields of adapter configurations that this version does not support when they are set.
UNSUPPORTED_FIELDS = ("use_dora", "vera_d")

# --- reading ----------------------------------------------------------------------------------


def read_json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text("utf-8"))


def read_config(folder: Path) -> dict[str, Any]:
    """An adapter's or a head's configuration file; empty where there is none."""
    files = [folder / "adapter_config.json", folder / "head_config.json"]
    file = next((file for file in files if file.is_file()), None)
    return {} if file is None else read_json(file)


def tensors_of(folder: Path, part: str = "adapter") -> dict[str, Tensor]:
    """The weights of an adapter (or of a ``model_head``), whichever kind of file they are in."""
    safe = folder / f"{part}.safetensors"
    return read_tensors(safe if safe.is_file() else folder / f"pytorch_{part}.bin")


# --- what is supported ------------------------------------------------------------------------


def installed(model: Path) -> bool:
    """Whether the architecture of a saved model is installed here."""
    try:
        registry().architecture_for(read_json(model / "config.json")["model_type"])
    except UnknownNameError:
        return False
    return True


def unsupported_adapter(folder: Path) -> str | None:
    """Why an adapter cannot be loaded by this version, or None."""
    config = read_config(folder)["config"]
    try:
        registry().method_for_tag(config.get("architecture") or "bottleneck")
    except UnknownNameError:
        return f"method {config['architecture']}"
    if config.get("architecture") == "prompt_tuning" and not tensors_of(folder):
        return "method prompt_tuning, of which an old release saved nothing"
    shares = config.get("phm_layer") and config["shared_phm_rule"]
    if shares and not any("shared_parameters." in key for key in tensors_of(folder)):
        return "field phm_layer, with the shared tensors that old releases did not save"
    return next(
        (f"field {f}" for f in UNSUPPORTED_FIELDS if config.get(f) not in (None, False)), None
    )


def unsupported_head(config: Mapping[str, Any] | None) -> str | None:
    """Why a flexible head cannot be loaded by this version, or None."""
    if config is not None and config["head_type"] not in registry().head_types:
        return f"head {config['head_type']}"
    return None


# --- calling and comparing --------------------------------------------------------------------

ATOL = 1e-5
# What is no hidden state or logit but a multiple of one: cosines times exp(2.6592).
SCALES = {"logits_per_text": 14.3}


@torch.no_grad()
def call(model: Any, inputs: Mapping[str, Any], **how: Any) -> Any:
    return model(**inputs, **how)


def pick(output: Any, name: str) -> Tensor:
    """A field of an output; ``1.logits`` is one of the second head's."""
    number, dot, field = name.partition(".")
    return output[int(number)][field] if dot else output[name]


def chosen(output: Any, names: Iterable[str]) -> dict[str, Tensor]:
    return {name: pick(output, name) for name in names}


def assert_close(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """The same tensors by the same names."""
    assert set(got) == set(expected)
    for name, tensor in expected.items():
        assert_tensor_close(got[name], tensor, name)


def assert_tensor_close(got: Tensor, expected: Tensor, what: str) -> None:
    atol = ATOL * SCALES.get(what, 1.0)
    torch.testing.assert_close(got, expected, atol=atol, rtol=0, msg=_named(what))


def _named(name: str) -> Callable[[str], str]:
    return lambda message: f"{name}: {message}"
