"""What is in force during a call: the plan of this thread, and what sites pass on inside it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from flexheads.errors import CompositionError
from flexheads.plan import Plan
from flexheads.sites.chosen import chosen
from flexheads.sites.derived import Notes, enter_call, leave_call
from flexheads.sites.plan_cache import PlanCache
from flexheads.sites.prepared import NO_STEPS, Prepared, Steps

ONCE = "once"
"""What says that the layers of this call run on one copy of the batch; see `sites.repeat`."""

_FOR_RECOMPUTING = ("call", ONCE)


class _Thread(threading.local):
    """What each thread has of its own; the constructor runs in every thread that looks."""

    def __init__(self) -> None:
        self.plan: Plan | None = None
        self.steps: Steps = NO_STEPS
        self.values: dict[str, Any] = {}


class Runtime:
    """The plan in force for each thread of one model.

    Sites ask `current` in their hooks. A call enters a `scope` with its plan; outside of any scope
    the model's `active` plan holds. Values that one hook hands to another travel through `put` and
    `take`, which keep threads apart. Compiled code reads and writes the same places, whatever part
    of the model is compiled.

    Attributes:
        active: The plan that the model's setters have chosen.
        version: Grows whenever hooks come or go. The model's forward reads it, so that a compiled
            model traces again and sees them.
        plans: Plans that were resolved for single calls.
    """

    def __init__(self) -> None:
        self.active = Plan()
        self.version = 0
        self.plans = PlanCache()
        self.thread = _Thread()
        self._prepared: WeakKeyDictionary[Plan, Prepared | None] = WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles start outside of any call."""
        return {"active": self.active, "version": self.version}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        self.__dict__.update(state)

    def current(self) -> Plan:
        """The plan that holds for the running thread."""
        plan = self.thread.plan
        return self._outside() if plan is None else plan

    def chosen(self) -> Plan:
        """What holds for calls that name nothing: what `flexheads.active` says, or the model."""
        choice = chosen(self)
        return self.active if choice is None else choice.plan()

    def _outside(self) -> Plan:
        """The plan for a backbone that is called by itself, without the model's forward."""
        plan = self.chosen()
        if plan.routing.repeat > 1 or plan.routing.tasks is not None:
            raise CompositionError(
                f"{plan.setup!r} needs what the model's forward prepares: rows that are repeated, "
                "or their tasks. Call the model, not its backbone, or activate another setup."
            )
        return plan

    def entered(self) -> Plan | None:
        """The plan of the scope that the running thread is in, or None outside of any."""
        return self.thread.plan

    def holds(self, plan: Plan) -> bool:
        """Whether the running thread is in a scope of `plan`."""
        return self.thread.plan is plan

    def scope(self, plan: Plan) -> Scope:
        """A context in which `plan` holds for the running thread."""
        return Scope(self, plan)

    def prepared(self, plan: Plan) -> Steps:
        """What is prepared for a call with `plan` that begins now.

        In the first call with a plan nothing is, because that would take longer than it saves.
        """
        if torch.compiler.is_compiling():  # this alone too, where a graph breaks
            return NO_STEPS
        known = self._prepared.get(plan)
        if known is None and plan not in self._prepared:
            self._prepared[plan] = None
            return NO_STEPS
        if known is None or not known.holds():
            known = self._prepared[plan] = Prepared(plan.ops)
        return known.steps()

    def put(self, key: str, value: Any) -> None:
        """Hands a value to a later hook of the same call."""
        self.thread.values[key] = value

    def take(self, key: str) -> Any:
        """What an earlier hook of the same call has put, or None; it is gone then."""
        return self.thread.values.pop(key, None)

    def peek(self, key: str) -> Any:
        """What an earlier hook of the same call has put, or None; it stays."""
        return self.thread.values.get(key)

    @contextmanager
    def apart(self, values: Mapping[str, Any]) -> Iterator[None]:
        """A context with values of its own; those of the call around it come back behind it."""
        around, self.thread.values = self.thread.values, dict(values)
        try:
            yield
        finally:
            self.thread.values = around


class Scope:
    """The context manager behind `Runtime.scope`; what hooks left behind is dropped on leaving."""

    def __init__(self, runtime: Runtime, plan: Plan) -> None:
        self.runtime, self.thread, self.plan = runtime, runtime.thread, plan
        self.previous: Plan | None = None
        self.steps = NO_STEPS
        self.around: Notes | None = None

    def __enter__(self) -> Plan:
        self.previous = self.thread.plan
        self.thread.plan = self.plan
        self.around = enter_call()
        self.steps, self.thread.steps = self.thread.steps, self.runtime.prepared(self.plan)
        return self.plan

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.thread.plan = self.previous
        self.thread.steps = self.steps
        leave_call(self.around)
        if kind is not None:
            self.thread.values.clear()
        elif self.previous is None:
            self.thread.values.pop("call", None)  # or it would keep inputs and caches alive


class PlannedCheckpoint:
    """A gradient-checkpointing function whose recomputation runs under the plan of its forward.

    The backward pass recomputes activations after the call has ended and, on a GPU, in a thread
    of its own; by then another plan may hold.

    A reentrant checkpoint passes on gradients only where one of its inputs requires them, which
    none does on top of frozen layers; so where something trains, the hidden states are made to.

    Args:
        runtime: The model's runtime.
        checkpoint: The function.
        owner: The module that calls it.
        address: How the addresses of sites inside begin; empty where all of them can be.
    """

    def __init__(
        self, runtime: Runtime, checkpoint: Callable[..., Any], owner: nn.Module, address: str
    ) -> None:
        self.runtime, self.checkpoint = runtime, checkpoint
        self.owner, self.address = owner, address
        self.reentrant = getattr(checkpoint, "keywords", {}).get("use_reentrant", True)

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        plan = self.runtime.current()
        if self.reentrant and torch.is_grad_enabled():
            if self._trains(plan):
                args = _requiring_gradients(args)
            elif not any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
                return function(*args, **kwargs)  # nothing is kept for gradients anyway
        return self.checkpoint(_Replay(self.runtime, plan, function), *args, **kwargs)

    def _trains(self, plan: Plan) -> bool:
        """Whether something in what is computed again may need gradients: adapters, or all of it.

        Layers below the first of them are no part of the backward pass.
        """
        if any(address.startswith(self.address) for address in plan.ops):
            return True
        return any(parameter.requires_grad for parameter in self.owner.parameters())


class _Replay:
    def __init__(self, runtime: Runtime, plan: Plan, function: Callable[..., Any]) -> None:
        self.runtime, self.plan, self.function = runtime, plan, function
        noted = {key: runtime.peek(key) for key in _FOR_RECOMPUTING}
        self.noted = {key: value for key, value in noted.items() if value is not None}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.runtime.holds(self.plan):  # nothing to set, so a compiled checkpoint is pure
            return self.function(*args, **kwargs)
        with self.runtime.apart(self.noted), self.runtime.scope(self.plan):
            return self.function(*args, **kwargs)


def _requiring_gradients(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments, the first of which that can requires gradients where none did."""
    tensors = [arg for arg in args if isinstance(arg, Tensor) and arg.is_floating_point()]
    if not tensors or any(tensor.requires_grad for tensor in tensors):
        return args
    return tuple(a.detach().requires_grad_() if a is tensors[0] else a for a in args)


def may_checkpoint(model: nn.Module, sites: Iterable[Any]) -> list[tuple[nn.Module, str]]:
    """The modules that may checkpoint, each with how the addresses of sites inside begin.

    Args:
        model: The model.
        sites: Its sites.
    """
    layers = {id(site.host): f"layers.{site.layer}." for site in sites if site.kind == "hidden"}
    word = "gradient_checkpointing"  # a module without it is slow to say so
    found = [m for m in model.modules() if word in m.__dict__ or hasattr(type(m), word)]
    return [(module, layers.get(id(module), "")) for module in found]


def plan_checkpoints(modules: Iterable[tuple[Any, str]], runtime: Runtime) -> None:
    """Binds checkpointing functions to the plan of each call.

    Called on entering a training forward, because users and trainers switch checkpointing on at
    any time and at any level of the model.

    Args:
        modules: The modules that may have one, each with how the addresses of sites inside begin.
        runtime: The model's runtime.
    """
    for module, address in modules:
        function = getattr(module, "_gradient_checkpointing_func", None)
        if function is not None and not isinstance(function, PlannedCheckpoint):
            module._gradient_checkpointing_func = PlannedCheckpoint(
                runtime, function, module, address
            )
