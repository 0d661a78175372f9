"""Following the residual stream through one layer: where results are added, and where norms are."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter

from torch import Tensor

from flexheads.models.describing.tracing import Event, Key, Sums, Trace
from flexheads.specs import ResidualSite


@dataclasses.dataclass
class Addition:
    """One place where a sub-layer's result meets the stream.

    Attributes:
        output: The event whose output is the result.
        begun: When the sub-layer can have begun.
        residual: The event that shows the residual.
        residual_from: Whether it does so by its input or its output.
        norm: The norm behind the sum, in a post-LN layer.
        beside: The event of a sub-layer whose result is added too.
    """

    output: Event
    begun: int
    residual: Event
    residual_from: str
    norm: Event | None = None
    beside: Event | None = None

    def site(self, layer: str) -> ResidualSite:
        """The site, in paths below the layer's."""

        def below(event: Event) -> str:
            return event.path[len(layer) + 1 :]

        return ResidualSite(
            output=below(self.output),
            residual=below(self.residual),
            residual_from=self.residual_from,  # type: ignore[arg-type]
            norm=None if self.norm is None else below(self.norm),
            beside=None if self.beside is None else below(self.beside),
        )


class Walk:
    """The additions in one layer.

    Args:
        trace: A call.
        layer: The layer's own event in it.

    Attributes:
        additions: What was found, in order.
        complete: Whether the stream was followed to the layer's result.
    """

    def __init__(self, trace: Trace, layer: Event) -> None:
        self.events, self.layer = trace.inside(layer), layer
        self.sums = Sums(())
        self.end = self._key(layer.made)
        calls = Counter(id(event.module) for event in self.events)
        # Modules that run for one sub-layer alone are better places.
        once = [event for event in self.events if calls[id(event.module)] == 1]
        self.complete = self._walk(once) or self._walk(self.events)

    def _walk(self, events: list[Event]) -> bool:
        self.given = [(e, k) for e in events if (k := self._key(e.given)) is not None]
        self.made = [(e, k) for e in events if (k := self._key(e.made)) is not None]
        self.additions: list[Addition] = []
        start = self._key(self.layer.given)
        return start is not None and self.end is not None and self._follow(start)

    def _key(self, tensor: Tensor | None) -> Key | None:
        return self.sums.key(tensor)

    def _follow(self, stream: Key) -> bool:
        assert self.end is not None
        since = self.layer.begun
        for _ in range(8):
            step = self._single(stream, since) or self._parallel(stream, since)
            if step is None:
                return False
            total, since = step
            if self.sums.same(total, self.end):
                return True
            if self._single(total, since, only_look=True) or self._parallel(total, since, True):
                stream = total
                continue
            norm = next((e for e, k in self.given if e.is_norm and self.sums.same(k, total)), None)
            normed = None if norm is None else self._key(norm.made)
            if norm is None or normed is None:
                return False
            self.additions[-1].norm = norm
            since = norm.ended
            if self.sums.same(normed, self.end):
                return True
            stream = normed
        return False

    def _totals(self, since: int) -> list[Key]:
        assert self.end is not None
        return [*(k for e, k in self.given if e.begun > since), self.end]

    def _results(self, since: int) -> list[tuple[Event, Key]]:
        """The results behind a time, each by one event: the last leaf, or else the innermost."""
        found: list[tuple[Event, Key]] = []
        behind = [(e, k) for e, k in self.made if e.ended > since and e.begun >= since]
        for event, key in sorted(behind, key=lambda entry: entry[0].ended):
            same = next((n for n, (_, k) in enumerate(found) if self.sums.same(k, key)), None)
            if same is None:
                found.append((event, key))
            elif event.leaf:
                found[same] = (event, key)
        return found

    def _single(self, stream: Key, since: int, only_look: bool = False) -> tuple[Key, int] | None:
        results = self._results(since)
        keys = [key for _, key in results]
        pairs = list(self.sums.pairs(stream, keys, self._totals(since)))
        if not pairs:
            return None
        output, (_, total) = min(
            ((next(e for e, k in results if k == pair[0]), pair) for pair in pairs),
            key=lambda entry: entry[0].ended,
        )
        if not only_look:
            self._add(output, stream, since)
        return total, output.ended

    def _parallel(self, stream: Key, since: int, only_look: bool = False) -> tuple[Key, int] | None:
        """Two results that are added at once."""
        results = self._results(since)
        for (one, first), (other, second) in itertools.combinations(results, 2):
            if first[0] != stream[0] or second[0] != stream[0]:
                continue
            total = self.sums.added(stream, first, second)
            known = next((k for k in self._totals(since) if self.sums.same(k, total)), None)
            if known is None:
                continue
            if not only_look:
                self._add(one, stream, since)
                self._add(other, stream, one.ended)
                self.additions[-1].beside = one
            return known, other.ended
        return None

    def _add(self, output: Event, stream: Key, since: int) -> None:
        """Notes an addition, with the best of the modules that show the residual."""
        given = [e for e, k in self.given if self.sums.same(k, stream) and e.begun < output.ended]
        made = [e for e, k in self.made if self.sums.same(k, stream) and e.is_norm]
        shown = [
            *((e, "input") for e in given if e.is_norm),
            *((e, "input") for e in given if not e.leaf),
            *((e, "output") for e in made),
            *((e, "input") for e in given),
        ]
        if shown:
            residual, where = shown[0]
            self.additions.append(Addition(output, since, residual, where))
