"""The residual site: where a sub-layer's result is added to the residual stream."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from flexheads.sites.base import AttachedSite, first_argument, first_tensor
from flexheads.sites.rows import RowMap
from flexheads.sites.runtime import Runtime


class Stream(NamedTuple):
    """What a residual site hands to an adapter, and gets back changed.

    The layer is about to compute ``norm(x + r)`` (post-LN) or ``x + r`` (pre-LN). A part declares
    in ``needs`` which of `total`, `x` and `r` it reads; the others may be None, and a part that
    changes `x` changes `total` alike where they are given. All are ``(batch, sequence, hidden)``.

    Attributes:
        total: ``x + r``.
        x: The sub-layer's result.
        r: The residual.
        norm: The layer norm that follows, without hooks; None in a pre-LN layer.
    """

    total: Tensor | None
    x: Tensor | None
    r: Tensor | None
    norm: Callable[[Tensor], Tensor] | None


class ResidualOp(NamedTuple):
    """What a residual site does in one plan."""

    chains: tuple[tuple[nn.Module, ...], ...]
    rows: RowMap | None
    needs: frozenset[str]
    replaces: tuple[bool, ...]
    """For each chain, whether its last part stands in for the layer norm (or the addition)."""


class AttachedResidual(AttachedSite):
    """A residual site in a live model.

    A part here is a module ``Stream -> Stream`` with two attributes: ``needs``, a subset of
    ``{"total", "x", "r"}``, and ``replaces_norm``, true where its `x` is the layer's result.

    Hooks: post-LN layers are entered before the norm (``enter``), with taps for ``x`` and ``r``
    where a part reads them and a hook behind the norm (``leave``) where it is replaced. Pre-LN
    layers are entered behind the sub-layer's output (``enter``), with a tap for ``r``.
    """

    kind = "residual"

    def __init__(
        self,
        address: str,
        role: str,
        layer: int,
        host: nn.Module,
        width: int,
        runtime: Runtime,
        *,
        output: nn.Module,
        residual: nn.Module,
        residual_from: str,
        norm: nn.Module | None,
    ) -> None:
        super().__init__(address, role, layer, host, width, runtime)
        self.output, self.residual, self.residual_from = output, residual, residual_from
        self.norm = norm

    def needed(self, part: nn.Module) -> frozenset[str]:
        needs = set(part.needs)
        hooks = {"enter"}
        if self.norm is not None:
            hooks |= needs & {"x", "r"}
            if part.replaces_norm:
                hooks.add("leave")
        elif needs & {"total", "r"} or part.replaces_norm:
            hooks.add("r")
        return frozenset(hooks)

    def register(self, hook: str) -> RemovableHandle:
        if hook == "r" and self.residual_from == "output":
            return self.residual.register_forward_hook(self._tap_residual_output, prepend=True)
        if hook == "r":
            return self.residual.register_forward_pre_hook(self._tap_residual, with_kwargs=True)
        if self.norm is None:
            return self.output.register_forward_hook(self._after_output, prepend=True)
        if hook == "x":
            return self.output.register_forward_hook(self._tap_output, prepend=True)
        if hook == "leave":
            return self.norm.register_forward_hook(self._after_norm, prepend=True)
        return self.norm.register_forward_pre_hook(self._before_norm)

    def op(self, chains: Sequence[Sequence[nn.Module]], rows: RowMap | None) -> ResidualOp:
        parts = [part for chain in chains for part in chain]
        needs = frozenset().union(*(part.needs for part in parts))
        replaces = tuple(bool(chain) and bool(chain[-1].replaces_norm) for chain in chains)
        if self.norm is None and any(replaces):
            needs |= {"r"}
        return ResidualOp(tuple(map(tuple, chains)), rows, needs, replaces)

    # --- taps -------------------------------------------------------------------------------

    def _tap_output(self, module: nn.Module, args: Any, output: Any) -> None:
        op = self.planned()
        if op is not None and "x" in op.needs:
            self.runtime.put(self.address + ".x", first_tensor(output))

    def _tap_residual(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        op = self.planned()
        if op is not None:
            self.runtime.put(self.address + ".r", first_argument(args, kwargs))

    def _tap_residual_output(self, module: nn.Module, args: Any, output: Any) -> None:
        op = self.planned()
        if op is not None:
            self.runtime.put(self.address + ".r", first_tensor(output))

    # --- post-LN ----------------------------------------------------------------------------

    def _before_norm(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        op: ResidualOp | None = self.planned()
        if op is None:
            return None
        take = self.runtime.take
        x, r = take(self.address + ".x"), take(self.address + ".r")
        stream = Stream(args[0], x, r, module.forward)
        if op.rows is None:
            stream = _run(op.chains[0], stream)
            if op.replaces[0]:
                self.runtime.put(self.address + ".out", stream.x)
                return None
            return (stream.total, *args[1:])
        streams = _run_rows(op, stream)
        if any(op.replaces):
            self.runtime.put(self.address + ".out", streams)
        return (op.rows.merge(_norm_inputs(op, streams)), *args[1:])

    def _after_norm(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        op: ResidualOp | None = self.planned()
        if op is None or not any(op.replaces):
            return None
        out = self.runtime.take(self.address + ".out")
        if op.rows is None:
            return out
        normed = op.rows.split(output)
        return op.rows.merge(
            [s.x if whole else n for s, n, whole in zip(out, normed, op.replaces, strict=True)]
        )

    # --- pre-LN -----------------------------------------------------------------------------

    def _after_output(self, module: nn.Module, args: Any, output: Any) -> Any:
        op: ResidualOp | None = self.planned()
        if op is None:
            return None
        x, r = first_tensor(output), self.runtime.take(self.address + ".r")
        stream = Stream(x + r if "total" in op.needs else None, x, r, None)
        streams = [_run(op.chains[0], stream)] if op.rows is None else _run_rows(op, stream)
        # The layer adds r itself; where a part's result is the layer's, that must come to nothing.
        results = [
            s.x - s.r if whole else s.x for s, whole in zip(streams, op.replaces, strict=True)
        ]
        result = results[0] if op.rows is None else op.rows.merge(results)
        return (result, *output[1:]) if isinstance(output, (tuple, list)) else result


def _run(parts: Sequence[nn.Module], stream: Stream) -> Stream:
    for part in parts:
        stream = part(stream)
    return stream


def _run_rows(op: ResidualOp, stream: Stream) -> list[Stream]:
    rows = op.rows
    assert rows is not None
    total, x, r = (
        [None] * len(op.chains) if tensor is None else rows.split(tensor) for tensor in stream[:3]
    )
    return [
        _run(parts, Stream(*own, stream.norm))
        for parts, *own in zip(op.chains, total, x, r, strict=True)
    ]


def _norm_inputs(op: ResidualOp, streams: Sequence[Stream]) -> list[Tensor]:
    """The norm's input for each chain; where the norm is replaced, its result is dropped anyway."""
    return [
        stream.x if replaced and stream.total is None else stream.total
        for stream, replaced in zip(streams, op.replaces, strict=True)
    ]
