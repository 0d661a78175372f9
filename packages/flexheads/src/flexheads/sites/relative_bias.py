"""A bias of attention scores that a module makes of relative positions, maybe with projections.

Where the projections of queries and keys are those of the text too (arXiv:2006.03654, section 3.1,
with shared weights), they run twice in each call: on the hidden states, and on one row of
embeddings of relative positions that all rows of the batch share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from flexheads.sites.base import AttachedSite
from flexheads.sites.rows import RowMap
from flexheads.sites.runtime import Runtime

METHOD = "disentangled_attention_bias"
"""The name of the method that makes the bias."""


class RelativeBias:
    """Stands in for that method of one attention module while adapters need it to.

    A prefix has no position, so it has no part in the bias. What adapters change of a projection's
    weight counts in it, as it would merged; where rows follow adapters of their own, so do their
    biases.

    Args:
        host: The attention module.
        address: The address of its site.
        runtime: What is in force.

    Attributes:
        prefix: Gives the length of the prefix that the keys begin with.
        shared: The sites of the projections that it runs.
    """

    def __init__(self, host: nn.Module, address: str, runtime: Runtime) -> None:
        self.host: Any = host
        self.runtime, self.place = runtime, f"{address}.bias"
        self.prefix: Callable[[], int] = _none
        self.shared: list[AttachedSite] = []
        self._users = 0

    @property
    def running(self) -> bool:
        """Whether it runs, so that the projections are given relative positions."""
        return self.runtime.peek(self.place) is not None

    def enter(self) -> None:
        """Takes the method's place."""
        self._users += 1
        vars(self.host)[METHOD] = self

    def leave(self) -> None:
        """Gives it back, where nobody else needs it."""
        self._users -= 1
        if not self._users:
            vars(self.host).pop(METHOD, None)

    def chain(self) -> int | None:
        """The chain whose rows it runs for; None where there is one for all, or it does not run."""
        number: int | None = self.runtime.peek(self.place)
        return None if number == _ALL else number

    def __call__(self, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The bias, ``(batch * heads, queries, keys)``; arguments are those of the method.

        Args:
            query: ``(batch * heads, queries, head size)``.
            key: ``(batch * heads, keys, head size)``, the prefix included.
            *args: What else the method takes; equal for all rows.
            **kwargs: The same, by name.
        """
        length = self.prefix()
        key = key[:, length:]
        rows = self._rows()
        if rows is None:
            bias = self._run(_ALL, query, key, args, kwargs)
        else:
            heads = self.host.num_attention_heads
            present = rows.present(query.shape[0] // heads)
            split = zip(present, _cut(rows, query, heads), _cut(rows, key, heads), strict=True)
            parts = [self._run(*own, args, kwargs) for own in split]
            bias = rows.merge([_by_head(part, heads) for part in parts]).flatten(0, 1)
        return functional.pad(bias, (length, 0)) if isinstance(bias, Tensor) else bias

    def _rows(self) -> RowMap | None:
        """The rows that follow adapters of their own in the projections, if any do."""
        for site in self.shared:
            op = site.planned()
            if op is not None and op.rows is not None:
                rows: RowMap = op.rows
                return rows
        return None

    def _run(self, chain: int, query: Tensor, key: Tensor, args: Any, kwargs: Any) -> Any:
        self.runtime.put(self.place, chain)
        bias = getattr(type(self.host), METHOD)(self.host, query, key, *args, **kwargs)
        self.runtime.take(self.place)
        return bias


_ALL = -1


def _none() -> int:
    return 0


def _cut(rows: RowMap, tensor: Tensor, heads: int) -> list[Tensor]:
    return [own.flatten(0, 1) for own in rows.split(_by_head(tensor, heads))]


def _by_head(tensor: Tensor, heads: int) -> Tensor:
    """``(batch * heads, ...)`` as ``(batch, heads, ...)``."""
    return tensor.reshape(-1, heads, *tensor.shape[1:])


def relative_bias(host: nn.Module, address: str, runtime: Runtime) -> RelativeBias | None:
    """The stand-in for a module's bias by position; None where it has none."""
    return RelativeBias(host, address, runtime) if hasattr(type(host), METHOD) else None


def share_projections(sites: Iterable[AttachedSite]) -> None:
    """Tells projections that a bias by position runs them once more, and the bias which they are.

    Args:
        sites: All sites of a model.
    """
    known = list(sites)
    for attention in known:
        bias: RelativeBias | None = getattr(attention, "bias", None)
        if bias is None or not getattr(attention.host, "share_att_key", False):
            continue
        for site in known:
            mine = site.layer == attention.layer and site.role in ("query", "key")
            if mine and hasattr(site, "again"):
                site.again = bias
                bias.shared.append(site)
