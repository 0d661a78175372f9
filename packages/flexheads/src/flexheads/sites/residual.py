"""The residual site: where a sub-layer's result is added to the residual stream."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from flexheads.sites.banks import Bank, ChainBank, chain_bank
from flexheads.sites.base import AttachedSite, first_argument, first_tensor, with_first
from flexheads.sites.hooking import hook_before
from flexheads.sites.output import OutputPart
from flexheads.sites.prepared import Step
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

    def add(self, delta: Tensor, skip: Tensor | None) -> Stream:
        """The stream with something added.

        Args:
            delta: What is added.
            skip: What it is added to; None is `x`.
        """
        total, x, r, norm = self
        if skip is None:
            total = None if total is None else total + delta
            return Stream(total, None if x is None else x + delta, r, norm)
        x = delta + skip
        return Stream(None if r is None else x + r, x, r, norm)


class ResidualPart(nn.Module):
    """What an adapter has at a residual site.

    Attributes:
        needs: Which of ``total``, ``x`` and ``r`` it reads.
        sees: What `enter` gives: ``"x"``, ``"r"``, or ``"normed"`` for the layer's own result.
        replaces_norm: Whether its `x` is the layer's result, without the layer's own addition and
            norm; counts for the last part of a chain.
    """

    needs: frozenset[str]
    sees: str
    replaces_norm: bool

    def forward(self, stream: Stream) -> Stream:
        """Changes the residual stream."""
        raise NotImplementedError

    def prepared(self) -> Step | None:
        """`forward` as a function, with all that it needs at hand, of a part that reads one tensor.

        It is given the layer norm that follows, of which it may call the ``forward`` (None in a
        pre-LN layer), and what `needs` says, ``total`` or ``x``; it gives what that becomes. It may
        read whatever its modules have, but values of tensors, when it is made; see
        `flexheads.sites.prepared`. None where there is no such function, as things are.
        """
        return None

    def enter(self, stream: Stream) -> tuple[Tensor, Tensor | None]:
        """What it looks at, and what it adds to (None for `x`); AdapterFusion asks for both."""
        raise NotImplementedError

    def fused(self, hidden: Tensor) -> Tensor:
        """What AdapterFusion attends to, from what `enter` gives; the same shape."""
        raise NotImplementedError

    def bank(self, parts: Sequence[ResidualPart | None]) -> Bank[Any] | None:
        """What runs parts of different rows as one product; None where nothing can.

        Args:
            parts: The part of each chain, this one among them, or None.
        """
        return None


class Ran(NamedTuple):
    """What has become of the stream of each chain that has rows, or of all rows together.

    Attributes:
        streams: The streams behind the parts.
        replaces: For each, whether the last part stands in for the layer norm (or the addition).
        rows: What puts them together; None where one stream has all rows.
    """

    streams: Sequence[Stream]
    replaces: Sequence[bool]
    rows: RowMap | None

    def split(self, tensor: Tensor) -> list[Tensor]:
        """The rows of each stream."""
        return [tensor] if self.rows is None else self.rows.split(tensor)

    def merge(self, tensors: Sequence[Any]) -> Tensor:
        """One tensor from those of all streams."""
        return tensors[0] if self.rows is None else self.rows.merge(tensors)


class ResidualOp(NamedTuple):
    """What a residual site does in one plan."""

    chains: tuple[tuple[ResidualPart, ...], ...]
    rows: RowMap | None
    needs: frozenset[str]
    replaces: tuple[bool, ...]
    """For each chain, whether its last part stands in for the layer norm (or the addition)."""
    norms: tuple[tuple[OutputPart, ...], ...] = ()
    """For each chain, the parts at the layer norm itself; empty where there are none."""
    bank: ChainBank | None = None
    """What runs all chains as one product, where their parts are of one shape."""
    straight: str = ""
    """What one chain changes, where it reads no more than that: ``"total"`` or ``"x"``."""
    early: bool = False
    """Whether the chains change the sub-layer's result, before it is added to anything."""

    @property
    def alone(self) -> tuple[str, tuple[ResidualPart, ...]]:
        """The parts that may become one step, and what they change."""
        return self.straight, () if self.norms or not self.straight else self.chains[0]

    def run(self, stream: Stream) -> Ran:
        """The stream of each chain, behind its parts."""
        if self.rows is None:
            if self.norms:
                stream = stream._replace(norm=partial(_normed, stream.norm, self.norms[0]))
            return Ran([_run(self.chains[0], stream)], self.replaces, None)
        given = next(tensor for tensor in stream[:3] if tensor is not None)
        if self.bank is not None and not self.norms and given.dim() == 3:
            together = self.bank(self.rows, given, stream)
            if together is not None:
                return Ran([together], self.replaces[:1], None)
        return self._run_each(stream, self.rows, given.shape[0])

    def _run_each(self, stream: Stream, rows: RowMap, batch: int) -> Ran:
        """The chains one by one."""
        present = rows.present(batch)
        none = [None] * len(present)
        total, x, r = (none if t is None else rows.split(t) for t in stream[:3])
        streams = []
        for number, *own in zip(present, total, x, r, strict=True):
            norm = stream.norm
            if self.norms:
                norm = partial(_normed, norm, self.norms[number])
            given = Stream(own[0], own[1], own[2], norm)
            streams.append(_run(self.chains[number], given))
        return Ran(streams, [self.replaces[number] for number in present], rows)


def _normed(norm: Any, parts: Sequence[OutputPart], given: Tensor) -> Tensor:
    output: Tensor = norm(given)
    for part in parts:
        output = part(given, output)
    return output


def _run(parts: Sequence[Any], stream: Stream) -> Stream:
    for part in parts:
        stream = part(stream)
    return stream


class AttachedResidual(AttachedSite):
    """A residual site in a live model; its parts are `ResidualPart`.

    Hooks: post-LN layers are entered before the norm (``enter``), with taps for ``x`` and ``r``
    where a part reads them and a hook behind the norm (``leave``) where it is replaced; parts that
    read ``x`` alone can change it at its tap. Pre-LN
    layers are entered behind the sub-layer's output (``enter``), with a tap for ``r``, and one for
    the sub-layer ``beside``.

    Sub-layers of a pre-LN layer may share the module that gives their results. The call that is a
    site's own is the first one behind its residual's (``turn``).

    A sub-layer that has ``added`` the residual itself may call the norm inside too; it is entered
    at the call that follows its output.
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
        beside: nn.Module | None = None,
        alone: bool = False,
        added: bool = False,
    ) -> None:
        super().__init__(address, role, layer, host, width, runtime)
        self.output, self.residual, self.residual_from = output, residual, residual_from
        self.norm, self.beside, self.alone, self.added = norm, beside, alone, added
        self.shares_output = False
        self._total, self._x = f"{address}.total", f"{address}.x"

    def needed(self, part: ResidualPart) -> frozenset[str]:
        needs = set(part.needs)
        if self._is_early(needs, part.replaces_norm):
            return frozenset({"x"})
        hooks = {"enter"}
        if self.norm is not None:
            hooks |= needs & {"x", "r"}
            if self.added:
                hooks |= {"x", "r"} if "x" in needs else {"x"}
            if part.replaces_norm:
                hooks.add("leave")
        elif self.shares_output:
            hooks |= {"turn", "r"}
        elif needs & {"total", "r"} or self.added or part.replaces_norm:
            hooks |= {"r"} if self.beside is None else {"r", "beside"}
        return frozenset(hooks)

    def register(self, hook: str) -> RemovableHandle:
        if hook == "turn":
            return self.residual.register_forward_pre_hook(self._begin)
        if hook == "r" and self.residual_from == "output":
            return self.residual.register_forward_hook(self._tap_residual_output, prepend=True)
        if hook == "r":
            return hook_before(self.residual, self._tap_residual)
        if hook == "beside":  # behind the hooks of the sub-layer's own site
            assert self.beside is not None
            return self.beside.register_forward_hook(self._tap_beside)
        if self.norm is None:
            return self.output.register_forward_hook(self._after_output, prepend=True)
        if hook == "x":
            return self.output.register_forward_hook(self._tap_output, prepend=True)
        if hook == "leave":
            return self.norm.register_forward_hook(self._after_norm, prepend=True)
        return self.norm.register_forward_pre_hook(self._before_norm)

    def op(self, chains: Sequence[Sequence[ResidualPart]], rows: RowMap | None) -> ResidualOp:
        needs = frozenset(need for chain in chains for part in chain for need in part.needs)
        replaces = tuple(bool(chain) and bool(chain[-1].replaces_norm) for chain in chains)
        if self.norm is None and ("total" in needs or self.added or any(replaces)):
            needs |= {"r"}
        if self.added and "x" in needs:
            needs |= {"r"}
        bank = None
        if rows is not None and len(set(replaces)) == 1:
            bank = chain_bank(chains, changed=0)
        early = self._is_early(needs, any(replaces))
        straight = "x" if early or self.norm is None else "total"
        if rows or needs != {straight} or any(replaces) or self.added or self.folded:
            straight = ""
        own = tuple(map(tuple, chains))
        return ResidualOp(own, rows, needs, replaces, (), bank, straight, early)

    def _is_early(self, needs: Collection[str], replaces: bool) -> bool:
        """Whether parts act on the sub-layer's result itself, though a norm follows the addition.

        They do where they need nothing else, and what gives the result is the dropout just before
        the addition.
        """
        ends = self.norm is not None and isinstance(self.output, nn.Dropout) and not self.added
        return ends and needs == {"x"} and not replaces

    # --- taps -------------------------------------------------------------------------------

    def _tap_output(self, module: nn.Module, args: Any, output: Any) -> Any:
        step = self.step(self._x)
        if step is not None:
            return with_first(output, step(self.norm, first_tensor(output)))
        op = self.planned()
        if op is None:
            return None
        if op.early:
            return with_first(output, self._changed(op, first_tensor(output)))
        if self.added or "x" in op.needs:
            self.runtime.put(self.address + ".x", first_tensor(output))
        return None

    def _begin(self, module: nn.Module, args: Any) -> None:
        if self.planned() is not None:
            self.runtime.put(self.address + ".turn", True)

    def _tap_residual(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        self._note("r", first_argument(args, kwargs))

    def _tap_residual_output(self, module: nn.Module, args: Any, output: Any) -> None:
        self._note("r", first_tensor(output))

    def _tap_beside(self, module: nn.Module, args: Any, output: Any) -> None:
        self._note("beside", first_tensor(output))

    def _note(self, which: str, tensor: Tensor) -> None:
        op = self.planned()
        if op is not None and "r" in op.needs:
            self.runtime.put(f"{self.address}.{which}", tensor)

    def _take(self, which: str, op: ResidualOp) -> Any:
        """What a tap has put; nothing is touched where the plan does not need it."""
        return self.runtime.take(f"{self.address}.{which}") if which in op.needs else None

    # --- post-LN ----------------------------------------------------------------------------

    def _before_norm(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        step = self.step(self._total)
        if step is not None:
            return (step(module, args[0]), *args[1:])
        op: ResidualOp | None = self.planned()
        if op is None or op.early:
            return None
        if self.added:
            given = self.runtime.take(self.address + ".x")
            if given is None:
                return None  # inside of the sub-layer
            r = self._take("r", op)
            x = given - r if "x" in op.needs else None
        else:
            x, r = self._take("x", op), self._take("r", op)
        ran = op.run(Stream(args[0], x, r, module.forward))
        if any(op.replaces):
            self.runtime.put(self.address + ".out", ran)
        # Where the norm is replaced its result is dropped, so any input will do.
        totals = [s.x if s.total is None else s.total for s in ran.streams]
        return (ran.merge(totals), *args[1:])

    def _after_norm(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        op: ResidualOp | None = self.planned()
        if op is None or not any(op.replaces):
            return None
        ran: Ran | None = self.runtime.take(self.address + ".out")
        if ran is None:
            return None
        normed = zip(ran.streams, ran.split(output), ran.replaces, strict=True)
        return ran.merge([s.x if replaced else own for s, own, replaced in normed])

    # --- pre-LN -----------------------------------------------------------------------------

    def _after_output(self, module: nn.Module, args: Any, output: Any) -> Any:
        step = None if self.shares_output else self.step(self._x)
        if step is not None:
            return with_first(output, step(None, first_tensor(output)))
        op: ResidualOp | None = self.planned()
        if op is None or (self.shares_output and not self.runtime.take(self.address + ".turn")):
            return None
        return with_first(output, self._changed(op, first_tensor(output)))

    # --- the sub-layer's result itself --------------------------------------------------------

    def _changed(self, op: ResidualOp, given: Tensor) -> Tensor:
        """The sub-layer's result, made of the streams of all chains."""
        r: Any = self._take("r", op)
        if r is not None and self.beside is not None:
            r = r + self.runtime.take(self.address + ".beside")
        r = None if r is None else self.unfolded(r)
        x = self.unfolded(given)
        if self.added:
            x = x - r
        total = None
        if "total" in op.needs:
            total = x if self.alone else x + r
        ran = op.run(Stream(total, x, r, None if self.norm is None else self.norm.forward))
        pairs: Any = zip(ran.streams, ran.replaces, strict=True)
        if self.added:
            result = ran.merge([s.x if replaced else s.x + s.r for s, replaced in pairs])
        else:
            # The layer adds r; where a part's result is the layer's, that must come to nothing.
            result = ran.merge([s.x - s.r if replaced else s.x for s, replaced in pairs])
        return self.folded_as(given, result)


def share_outputs(sites: Iterable[AttachedSite]) -> None:
    """Tells sites that share the module of their results that they do."""
    found = [site for site in sites if isinstance(site, AttachedResidual) and site.norm is None]
    counts = Counter(id(site.output) for site in found)
    for site in found:
        site.shares_output = counts[id(site.output)] > 1
