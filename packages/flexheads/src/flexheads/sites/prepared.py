"""What a plan does at its sites, as functions that have all they need at hand.

Between the layers of a model, whose weights fill the caches of the machine, looking something up
costs many times as much as elsewhere: beside small products, more than the products. So what parts
need is looked up once, and a look at the beginning of a call tells whether that still holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, repeat
from operator import is_
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from flexheads.sites.derived import hooked_everywhere, is_hooked

Step = Callable[[Any, Tensor], Tensor]
"""What a part does: from what else it reads, and what it changes, to what becomes of the latter."""

Steps = Mapping[str, Step]
"""The steps of a call, by the address of a site and what it changes there."""

NO_STEPS: Steps = {}

_REPLACED = ("forward", "_compiled_call_impl")
"""Entries of modules that are run in another way than their class says."""


_ABSENT = object()


class Prepared:
    """The steps of a plan.

    A site has one where one chain of parts changes one thing for all rows, and each part gives a
    function for that: an operation says so by ``alone``, a part by a method ``prepared``. All
    other sites do without.

    Weights may change as they like, because functions read them when they run. Where a module, a
    weight, or anything else that a module has is replaced, steps no longer hold. They are not for
    calls in which somebody waits at a module with a hook.

    Args:
        ops: The operations of a plan.
    """

    def __init__(self, ops: Mapping[str, Any]) -> None:
        chains = dict(_chains(ops))
        inside = {part: list(part.modules()) for parts in chains.values() for part in parts}
        self._modules = list(dict.fromkeys(chain.from_iterable(inside.values())))
        places = [place for module in self._modules for place in _places(module)]
        self._owners, self._keys = [owner for owner, _ in places], [key for _, key in places]
        # What is read first is what a change in the meantime is noticed by.
        self._held = list(self._read())
        self._classes = list(map(type, self._modules))
        self._hooks, self._hooked = RemovableHandle.next_id, any(map(is_hooked, self._modules))
        whole = {part for part, modules in inside.items() if not any(map(_is_replaced, modules))}
        found = {key: _in_turn(parts) for key, parts in chains.items() if whole.issuperset(parts)}
        self._steps: Steps = {key: step for key, step in found.items() if step is not None}

    def holds(self) -> bool:
        """Whether modules still have what they had, and are what they were."""
        unchanged = all(map(is_, self._read(), self._held))
        return unchanged and self._classes == list(map(type, self._modules))

    def _read(self) -> Iterator[object]:
        # What is not there differs from None: a module may take the place of that.
        return map(dict.get, self._owners, self._keys, repeat(_ABSENT))

    def steps(self) -> Steps:
        """The steps for a call that begins now; none where somebody would notice."""
        hooks = RemovableHandle.next_id
        if self._hooked or hooks != self._hooks:  # somewhere a hook was registered since
            self._hooked = any(map(is_hooked, self._modules))
            self._hooks = hooks
        return NO_STEPS if self._hooked or hooked_everywhere() else self._steps


def _chains(ops: Mapping[str, Any]) -> Iterator[tuple[str, Sequence[Any]]]:
    """The chains that may become steps, each by its address and what it changes."""
    for address, op in ops.items():
        changed, parts = getattr(op, "alone", ("", ()))
        if parts and all(isinstance(p, nn.Module) and hasattr(p, "prepared") for p in parts):
            yield f"{address}.{changed}", parts


def _places(module: nn.Module) -> Iterator[tuple[dict[str, Any], str]]:
    """Where a module has what its computation may depend on."""
    own = module.__dict__
    for name in (*own, *_REPLACED):
        if not name.startswith("_") or name in _REPLACED:
            yield own, name
    for held in (module._parameters, module._buffers, module._modules):
        for name in held:
            yield held, name


def _is_replaced(module: nn.Module) -> bool:
    """Whether a module is run in another way than its class says."""
    return any(name in module.__dict__ for name in _REPLACED)


def _in_turn(parts: Sequence[Any]) -> Step | None:
    """The parts of a chain as one step."""
    steps = [part.prepared() for part in parts]
    if None in steps:
        return None
    if len(steps) == 1:
        only: Step = steps[0]
        return only

    def run(read: Any, changed: Tensor) -> Tensor:
        for step in steps:
            changed = step(read, changed)
        return changed

    return run
