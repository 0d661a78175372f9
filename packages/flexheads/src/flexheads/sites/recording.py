"""Scores that a caller asks to see: parts note them while somebody listens."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

Recorded = list[tuple[str, nn.Module, Tensor]]
"""What was noted: its kind (``"gate"`` or ``"fusion"``), the part, and the scores."""


class _Listener(threading.local):
    def __init__(self) -> None:
        self.noted: Recorded | None = None


_listener = _Listener()


def record(kind: str, part: nn.Module, scores: Tensor) -> None:
    """Notes scores, where somebody listens in this thread."""
    noted: Any = _listener.noted
    if noted is not None:
        noted.append((kind, part, scores.detach()))


def listening() -> bool:
    """Whether somebody listens in this thread."""
    return _listener.noted is not None


@contextmanager
def recording() -> Iterator[Recorded]:
    """Listens to what parts note in this thread, inside the block."""
    before, noted = _listener.noted, []  # type: ignore[var-annotated]
    _listener.noted = noted
    try:
        yield noted
    finally:
        _listener.noted = before
