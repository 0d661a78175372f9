"""The cases that a manifest lists, and the model of a case with its adapters and heads."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import transformers
from safetensors.torch import load_file
from torch import Tensor

import flexheads
from flexheads.composition import BLOCKS

from .common import (
    GOLDEN,
    call,
    chosen,
    installed,
    read_config,
    read_json,
    unsupported_adapter,
    unsupported_head,
)


@dataclasses.dataclass(frozen=True)
class Case:
    """One entry of a manifest.

    Attributes:
        folder: Where the manifest lies.
        entry: The entry.
    """

    folder: Path
    entry: Mapping[str, Any]

    @property
    def name(self) -> str:
        return f"{self.folder.relative_to(GOLDEN).as_posix()}/{self.entry['id']}"

    @property
    def manifest(self) -> Mapping[str, Any]:
        return manifest(self.folder)

    @property
    def newest(self) -> bool:
        """Whether the newest release wrote it."""
        return "legacy" not in self.folder.relative_to(GOLDEN).parts

    def blocks(self) -> set[str]:
        return set() if self.entry.get("setup") is None else set(_types(self.entry["setup"]))

    def left_out(self) -> str | None:
        """Why this version leaves the case out, or None where it takes part."""
        if unknown := sorted(self.blocks() - {"single", *BLOCKS}):
            return f"block {unknown[0]}"
        for folder in self.entry.get("adapters", {}).values():
            if reason := unsupported_adapter(self.folder / folder):
                return reason
        for folder in self.entry.get("heads", {}).values():
            if reason := unsupported_head(read_config(self.folder / folder)["config"]):
                return reason
        return None

    def inputs(self) -> dict[str, Any]:
        tensors = load_file(self.folder / self.manifest["inputs_file"])
        named = self.manifest["inputs"][self.entry["input"]]
        given = {name: tensors[key] for name, key in named.items()}
        if "loss" not in self.entry["outputs"]:
            for label in ("labels", "start_positions", "end_positions"):
                given.pop(label, None)
        return given

    def expected(self) -> dict[str, Tensor]:
        tensors = expected_tensors(self.folder / self.manifest["expected_file"])
        return {name: tensors[key] for name, key in self.entry["outputs"].items()}

    def other(self, case_id: str) -> Case:
        """Another case of the same manifest."""
        return next(case for case in cases(self.folder) if case.entry["id"] == case_id)


def _types(setup: Mapping[str, Any]) -> Iterator[str]:
    yield setup["type"]
    for child in setup["children"]:
        if isinstance(child, dict):
            yield from _types(child)


@functools.cache
def manifest(folder: Path) -> dict[str, Any]:
    return read_json(folder / "manifest.json")


@functools.cache
def expected_tensors(file: Path) -> dict[str, Tensor]:
    return load_file(file)


@functools.cache
def cases(folder: Path) -> tuple[Case, ...]:
    return tuple(Case(folder, entry) for entry in manifest(folder)["cases"])


def all_cases() -> list[Case]:
    files = sorted(
        [
            *GOLDEN.glob("adapters*/*/manifest.json"),
            *GOLDEN.glob("legacy/adapters*/*/manifest.json"),
        ]
    )
    folders = [file.parent for file in files]
    known = [f for f in folders if installed(f / manifest(f)["base"])]
    return [case for folder in known for case in cases(folder)]


def block_of(setup: Mapping[str, Any] | None) -> Any:
    """A composition of the peer's as one of ours."""
    if setup is None:
        return None
    if setup["type"] == "single":
        return setup["children"][0]
    children = [block_of(child) for child in setup["children"]]
    return BLOCKS[setup["type"]](*children, **setup.get("kwargs", {}))


def model_for(case: Case) -> Any:
    """The case's model, with the adapters and heads loaded by us."""
    entry, folder = case.entry, case.folder
    attention = entry.get("attn_implementation") or case.manifest.get("attn_implementation")
    path = folder / entry.get("full", entry.get("model", case.manifest["base"]))
    auto = flexheads.AutoModelWithHeads
    if entry["level"] == "static":
        auto = getattr(transformers, entry["static_class"])
    model = auto.from_pretrained(str(path), attn_implementation=attention or "eager").eval()
    flexheads.init(model)
    heads = bool(entry.get("adapters_with_head"))
    for name, where in entry.get("adapters", {}).items():
        assert model.load_adapter(folder / where, load_as=name, with_head=heads) == name
    if "adapter_setup" in entry:
        model.load_adapter_setup(folder / entry["adapter_setup"])
    for name, where in entry.get("fusions", {}).items():
        assert model.load_adapter_fusion(folder / where, load_as=name, with_head=False) == name
    for name, where in entry.get("heads", {}).items():
        assert model.load_head(folder / where, load_as=name, set_active=False) == name
    if "average" in entry:
        how = dict(entry["average"])
        model.average_adapter(how.pop("name"), how.pop("adapters"), **how)
    if "share_parameters" in entry:
        shared = entry["share_parameters"]
        model.share_parameters(shared["adapters"], shared["name"])
    return model


def run(case: Case, model: Any, setup: Any = ...) -> dict[str, Tensor]:
    """Runs the case with its own setup and head, or with another setup."""
    setup = block_of(case.entry.get("setup")) if setup is ... else setup
    model.set_active_adapters(setup, skip_layers=case.entry.get("skip_layers"))
    if case.entry["level"] == "base":
        model.active_head = None
    elif case.entry.get("active_head") is not None:
        model.active_head = case.entry["active_head"]
    further = case.entry.get("forward", {})
    return chosen(call(model, case.inputs(), **further), case.entry["outputs"])
