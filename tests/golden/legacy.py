"""The folders that releases of the ancestor wrote, with inputs and outputs beside the weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import flexheads

from .common import GOLDEN, installed, read_json, unsupported_adapter, unsupported_head


@dataclasses.dataclass(frozen=True)
class Legacy:
    """One folder ``legacy/<release>/<architecture>/<case>``, with ``expected.pt`` in it."""

    folder: Path

    @property
    def name(self) -> str:
        return self.folder.relative_to(GOLDEN).as_posix()

    @property
    def base(self) -> str:
        return str(self.folder.parent / "base")

    @property
    def head(self) -> dict[str, Any]:
        """The content of ``head_config.json``; empty where there is none."""
        file = self.folder / "head_config.json"
        return read_json(file) if file.is_file() else {}

    def left_out(self) -> str | None:
        if self.folder.name == "full_model":
            return "whole model"
        if not (self.folder / "expected.pt").is_file():
            return "no outputs recorded"
        folder = self.folder / "a" if self.folder.name == "fusion" else self.folder
        return unsupported_adapter(folder) or unsupported_head(self.head.get("config"))

    def recorded(self, file: str = "expected.pt") -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The inputs and the outputs that the release has recorded."""
        content = torch.load(self.folder / file, weights_only=True)
        return content["inputs"], content["outputs"]

    def unscaled(self, model: Any, expected: dict[str, Tensor]) -> dict[str, Tensor]:
        """The recorded outputs; that release scaled for a language-model head without one, too."""
        if "last_hidden_state" not in expected:
            return expected
        return {**expected, "last_hidden_state": expected["last_hidden_state"] / model._scale()}

    def flexible(self) -> Any:
        """A model with flexible heads, with the adapter and (converted) heads loaded and active."""
        auto = flexheads.AutoModelWithHeads
        model = auto.from_pretrained(self.base, attn_implementation="eager")
        if self.folder.name == "fusion":
            for name in "ab":
                model.load_adapter(self.folder / name)
            model.load_adapter_fusion(self.folder / "fusion", set_active=True)
            return model
        model.load_adapter(self.folder, set_active=True)
        return model

    def static(self) -> Any:
        """The class that saved the folder, with adapter and head loaded and active."""
        kind = getattr(transformers, self.head["model_class"])
        labels = {"num_labels": len(self.head["label2id"])}
        model = kind.from_pretrained(self.base, attn_implementation="eager", **labels)
        flexheads.init(model.eval()).load_adapter(self.folder, set_active=True)
        return model


def all_legacy() -> list[Legacy]:
    bases = sorted(GOLDEN.glob("legacy/*/*/base"))
    known = [b for b in bases if b.parents[1].name[0].isdigit()]
    known = [base for base in known if installed(base)]
    folders = [folder for base in known for folder in sorted(base.parent.iterdir())]
    return [Legacy(folder) for folder in folders if folder.name != "base"]
