"""Plans that were resolved for single calls, for calls to come; bounded, for all threads."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

from flexheads.plan import Plan
from flexheads.sites.shelf import Shelf

KEPT = 256
"""Plans that are kept. One holds no tensors but numbers of rows, so this is a few megabytes."""


class PlanCache:
    """Keeps the plans that were asked for last.

    A service that names ever new rows fills it with plans that nobody asks for again; those of
    setups that come back stay, because they were asked for since.

    When adapters or heads change, a new cache takes its place. So a plan that a thread resolves
    meanwhile, out of what was there before, is kept where nobody looks for it.

    Args:
        size: How many it keeps.

    Attributes:
        shelf: The weights that are kept for rows; they go with the plans, so that nothing of an
            adapter stays that was deleted.
        wide: Plans that serve all adapters of one kind that rows have named so far.
        kinds: What says that adapters are of one kind, by name.
    """

    def __init__(self, size: int = KEPT) -> None:
        self.shelf = Shelf()
        self.wide: dict[Any, Plan] = {}
        self.kinds: dict[str, Any] = {}
        self._plans: OrderedDict[Any, Plan] = OrderedDict()
        self._lock, self._size = threading.Lock(), size

    def __len__(self) -> int:
        return len(self._plans)

    def get(self, key: Any) -> Plan | None:
        """The plan of that key, or None."""
        with self._lock:
            plan = self._plans.get(key)
            if plan is not None:
                self._plans.move_to_end(key)
            return plan

    def keep(self, key: Any, plan: Plan) -> Plan:
        """Keeps a plan; of two that threads have resolved at once, both get the first."""
        with self._lock:
            kept = self._plans.setdefault(key, plan)
            self._plans.move_to_end(key)
            if len(self._plans) > self._size:
                self._plans.popitem(last=False)
            return kept
