"""Compiling a model in place, for more setups than torch expects of one model."""

from __future__ import annotations

import inspect
from typing import Any

import torch

_SETTINGS = {"recompile_limit": 256, "isolate_recompiles": True}
"""What torch takes since 2.12 or so, and what is right where each setup may have a graph."""


class CompilingMixin:
    """``compile``, as `torch.nn.Module` has it."""

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compiles the model in place; see ``torch.nn.Module.compile``.

        A setup compiles once, and one whose adapters are of the same shapes as those of another
        uses its graph. So a model may need more than the eight graphs after which torch stops
        compiling, or raises with ``fullgraph=True``; this allows 256 for this model alone, where
        the installed torch lets that be said. With ``torch.compile(model)`` say it yourself:
        ``recompile_limit=256``.

        Args:
            args: As for ``torch.compile``.
            kwargs: The same.
        """
        known = inspect.signature(torch.compile).parameters
        settings = {name: value for name, value in _SETTINGS.items() if name in known}
        super().compile(*args, **{**settings, **kwargs})  # type: ignore[misc]
