"""What holds for the running thread or asynchronous task, in place of what a model has active."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch

from flexheads.plan import Plan

_HELD: ContextVar[Any] = ContextVar("flexheads.active")


class _Context:
    """Reads the context variable in a way that compiled code can follow.

    The getter is a function of C, which compilers call and guard on as they do for a plain
    attribute. Its only argument, this object, is what it gives where nothing has been chosen.
    """

    held: Any = property(_HELD.get)


_CONTEXT = _Context()


class Choice:
    """A plan that has been chosen for one model until its context is left.

    Args:
        runtime: The model's runtime.
        resolve: Makes the plan, or finds the one that is kept.
    """

    def __init__(self, runtime: Any, resolve: Callable[[], Plan]) -> None:
        self.runtime, self._resolve = runtime, resolve
        self._plans = runtime.plans
        self._plan = resolve()
        self._outer: Any = None
        self._token: Any = None

    def plan(self) -> Plan:
        """The plan; one that is resolved anew where adapters or heads have changed since."""
        plans = self.runtime.plans
        if self._plans is plans:
            return self._plan
        plan = self._resolve()
        if not torch.compiler.is_compiling():  # what is built while tracing must not outlive it
            self._plan, self._plans = plan, plans
        return plan

    def enter(self) -> None:
        """Begins to hold, inside of what holds already."""
        self._outer = _CONTEXT.held
        self._token = _HELD.set(self)

    def leave(self) -> None:
        """Ends to hold."""
        _HELD.reset(self._token)


def chosen(runtime: Any) -> Choice | None:
    """What has been chosen last for the model of a runtime, in this thread or task."""
    held = _CONTEXT.held
    while held is not _CONTEXT:
        if held.runtime is runtime:
            found: Choice = held
            return found
        held = held._outer
    return None
