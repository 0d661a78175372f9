"""Prompt tuning in AdapterHub files."""

from __future__ import annotations

from flexheads.checkpoints.hub.names import AdapterNames

_SITE = "prompt."


class PromptTuningNames(AdapterNames):
    """The prompt lies beside the layers."""

    def keys(self, address: str) -> list[str]:
        suffix = address.removeprefix(_SITE)
        return [f"{self.prefix}prompt_tuning.prompt_tunings.{self.name}.{suffix}"]

    def address(self, key: str) -> str | None:
        stem = f"prompt_tuning.prompt_tunings.{self.name}."
        modern = self.modern(key)
        return f"{_SITE}{modern[len(stem) :]}" if modern.startswith(stem) else None
