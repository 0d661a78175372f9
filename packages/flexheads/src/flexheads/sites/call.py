"""What the backbone is called with, for sites that act on some positions only."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from flexheads.sites.base import CALL
from flexheads.sites.runtime import Runtime


class CallInputs:
    """Notes the backbone's arguments by name; sites read them with ``runtime.peek(CALL)``.

    Args:
        runtime: Where they are put.
        backbone: The backbone.
    """

    def __init__(self, runtime: Runtime, backbone: nn.Module) -> None:
        self.runtime, self.backbone = runtime, backbone
        self.names = tuple(inspect.signature(type(backbone).forward).parameters)[1:]

    def register(self, hook: str) -> RemovableHandle:
        """Registers the hook."""
        return self.backbone.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if self.runtime.current().ops:
            self.runtime.put(CALL, {**dict(zip(self.names, args, strict=False)), **kwargs})
