"""The linear site: a projection whose input or result an adapter changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from flexheads.sites.banks import Bank, ChainBank, chain_bank
from flexheads.sites.base import AttachedSite, run_chains
from flexheads.sites.joining import undoing
from flexheads.sites.prepared import Step
from flexheads.sites.projection import Projection
from flexheads.sites.relative_bias import RelativeBias
from flexheads.sites.rows import RowMap
from flexheads.sites.runtime import Runtime
from flexheads.specs import FusedBlock


class LinearPart(nn.Module):
    """What an adapter has at a linear site.

    Attributes:
        changes_input: Whether `enter` does something.
        changes_output: Whether `forward` does something.
        wants_own_result: Whether `forward` is about the projection's own result, so that behind
            other parts of a chain it adds what it changes of that.
    """

    changes_input = False
    changes_output = True
    wants_own_result = False

    def enter(self, hidden: Tensor) -> Tensor:
        """Changes what a projection is given: ``(batch, sequence, in_features)`` both ways."""
        return hidden

    def forward(self, hidden: Tensor, output: Tensor, projection: Projection) -> Tensor:
        """Changes a projection's result.

        Args:
            hidden: The projection's input, ``(batch, sequence, in_features)``.
            output: Its result so far, with that of earlier parts of the chain, ``(batch,
                sequence, out_features)``.
            projection: The projection, for methods that read its weight.

        Returns:
            The new result.
        """
        return output

    def prepared(self) -> Step | None:
        """`forward` as a function of input and result, with all that it needs at hand.

        It may read whatever its modules have, but values of tensors, when it is made; see
        `flexheads.sites.prepared`. None where there is no such function, as things are.
        """
        return None

    def bank(self, parts: Sequence[LinearPart | None]) -> Bank[Any] | None:
        """What runs parts of different rows as one product; None where nothing can.

        Args:
            parts: The part of each chain, this one among them, or None.
        """
        return None


class LinearOp(NamedTuple):
    """What a linear site does in one plan."""

    chains: tuple[tuple[LinearPart, ...], ...]
    rows: RowMap | None
    enters: bool
    """Whether some part changes the input."""
    plain: bool = False
    """Whether one chain does all there is to do, on the module's whole result as it is."""
    bank: ChainBank | None = None
    """What runs all chains as one product, where their parts are of one shape."""

    @property
    def alone(self) -> tuple[str, tuple[LinearPart, ...]]:
        """The parts that may become one step, and what they change."""
        return "output", self.chains[0] if self.plain and not self.enters else ()

    def for_chain(self, chain: int) -> LinearOp:
        """The same for the rows of one chain only."""
        return LinearOp((self.chains[chain],), None, self.enters)


class AttachedLinear(AttachedSite):
    """A projection in a live model; its parts are `LinearPart`.

    Attributes:
        projection: The projection.
        in_features, out_features: Widths of its input and output.
        again: What runs the projection once more in a call, on embeddings of positions.
    """

    kind = "linear"

    def __init__(
        self,
        address: str,
        role: str,
        layer: int | None,
        host: nn.Module,
        runtime: Runtime,
        block: FusedBlock | None = None,
        config: Any = None,
    ) -> None:
        self.projection = Projection(host, block, config)
        self.in_features = self.projection.in_features
        self.out_features = self.projection.out_features
        super().__init__(address, role, layer, host, self.out_features, runtime)
        self.again: RelativeBias | None = None
        self._output = f"{address}.output"

    def needed(self, part: LinearPart) -> frozenset[str]:
        if not part.changes_input:
            return frozenset({"output"})
        if self.projection.columns is not None:
            return frozenset({"output"})  # the other projections keep their input
        return frozenset({"input", "output"} if part.changes_output else {"input"})

    def register(self, hook: str) -> RemovableHandle:
        handle = (
            self.host.register_forward_pre_hook(self._before)
            if hook == "input"
            else self.host.register_forward_hook(self._after, prepend=True)
        )
        if self.again is None:
            return handle
        self.again.enter()
        return undoing([handle], self.again.leave)

    def _planned(self) -> LinearOp | None:
        op: LinearOp | None = self.planned()
        chain = None if op is None or self.again is None else self.again.chain()
        return op if op is None or chain is None else op.for_chain(chain)

    def op(self, chains: Sequence[Sequence[LinearPart]], rows: RowMap | None) -> LinearOp:
        enters = any(part.changes_input for chain in chains for part in chain)
        plain = rows is None and not self.folded and self.projection.columns is None
        own = tuple(_beside(chain) for chain in chains)
        bank = None if rows is None or enters else chain_bank(own, changed=1, site=self.projection)
        return LinearOp(own, rows, enters, plain, bank)

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        op = self._planned()
        if op is None or not op.enters:
            return None
        hidden = run_chains(op.chains, op.rows, _enter, self.unfolded(args[0]))
        return (self.folded_as(args[0], hidden), *args[1:])

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        step = self.step(self._output)
        if step is not None:
            return step(args[0], output)
        op: LinearOp | None = self.planned() if self.again is None else self._planned()
        if op is None:
            return None
        if op.plain:
            hidden, projection = args[0], self.projection
            for part in op.chains[0]:
                output = part(hidden, output, projection)
            return output
        hidden, whole = self.unfolded(args[0]), self.unfolded(output)
        own = self.projection.of(whole)
        if op.enters and self.projection.columns is not None:
            hidden = run_chains(op.chains, op.rows, _enter, hidden)
            own = self.projection.run(hidden)
        changed = self._together(op, hidden, own)
        if changed is None:
            changed = run_chains(op.chains, op.rows, self._run, hidden, own)
        return self.folded_as(output, self.projection.into(whole, changed))

    def _together(self, op: LinearOp, hidden: Tensor, own: Tensor) -> Tensor | None:
        """The new result of all rows by one product; None where that cannot be."""
        if op.bank is None or op.rows is None or hidden.dim() != 3:
            return None
        together: Tensor | None = op.bank(op.rows, hidden, hidden, own, self.projection)
        return together

    def _run(self, parts: Sequence[LinearPart], hidden: Tensor, output: Tensor) -> Tensor:
        for part in parts:
            output = part(hidden, output, self.projection)
        return output


class _Beside(LinearPart):
    """Adds what a part changes of the projection's own result to what others have made of it."""

    def __init__(self, part: LinearPart) -> None:
        super().__init__()
        self.parts = (part,)  # in a tuple: not its own

    def forward(self, hidden: Tensor, output: Tensor, projection: Projection) -> Tensor:
        own = projection.run(hidden)
        changed: Tensor = self.parts[0](hidden, own, projection)
        return output + (changed - own)


def _beside(chain: Sequence[LinearPart]) -> tuple[LinearPart, ...]:
    if len(chain) == 1:
        return tuple(chain)
    return tuple(
        _Beside(part) if place and getattr(part, "wants_own_result", False) else part
        for place, part in enumerate(chain)
    )


def _enter(parts: Sequence[LinearPart], hidden: Tensor) -> Tensor:
    for part in parts:
        hidden = part.enter(hidden)
    return hidden
