"""The linear site: a projection whose input or result an adapter changes."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from flexheads.errors import ConfigError, UnsupportedError
from flexheads.sites.base import AttachedSite, run_chains
from flexheads.sites.joining import undoing
from flexheads.sites.relative_bias import RelativeBias
from flexheads.sites.rows import RowMap
from flexheads.sites.runtime import Runtime
from flexheads.specs import FusedBlock


class Projection:
    """What adapters may know of a projection: its weight as ``(out, in)``, and its bias.

    Hides that transformers' ``Conv1D`` stores the transpose, that a fused module computes several
    projections at once, and that a quantised module stores other numbers than it computes with.

    Args:
        host: The module.
        block: The block of its output that is this projection; None is all of it.
        config: The model's configuration, for blocks whose sizes stand there.

    Raises:
        ConfigError: If the module's output cannot be cut as `block` says.
    """

    def __init__(
        self, host: nn.Module, block: FusedBlock | None = None, config: Any = None
    ) -> None:
        self.host: Any = host
        self.transposed = isinstance(host, Conv1D)
        self.in_features, self.out_features = _widths(host)
        self.columns, self.groups = None, 1
        if block is not None:
            self.columns, self.groups = _cut(block, self.out_features, config)
            self.out_features = self.groups * (self.columns.stop - self.columns.start)

    @property
    def weight(self) -> Tensor:
        """``(out_features, in_features)``; a view where that is possible.

        Raises:
            UnsupportedError: If the module does not say what numbers it computes with.
        """
        weight = readable(self.host)
        weight = weight.t() if self.transposed else weight
        return self._own(weight)

    @property
    def bias(self) -> Tensor | None:
        """``(out_features,)``, or None."""
        bias: Tensor | None = getattr(self.host, "bias", None)
        return None if bias is None else self._own(bias)

    def _own(self, stored: Tensor) -> Tensor:
        """This projection's rows of the module's weight or bias: ``(out, ...)`` both ways."""
        return stored if self.columns is None else self._rows(stored).flatten(0, 1)

    def _rows(self, stored: Tensor) -> Tensor:
        """The same as a view, ``(groups, rows in a group, ...)``."""
        return stored.view(self.groups, -1, *stored.shape[1:])[:, self.columns]

    def _store(self, stored: Tensor, own: Tensor) -> None:
        """Writes this projection's rows into the module's weight or bias."""
        if self.columns is None:
            stored.copy_(own)
        else:
            own = own.clone()  # it may be a view of the same numbers
            self._rows(stored).copy_(own.view(self.groups, -1, *own.shape[1:]))

    def of(self, output: Tensor) -> Tensor:
        """This projection's part of what the module computes."""
        if self.columns is None:
            return output
        return self._grouped(output)[..., self.columns].flatten(-2)

    def _grouped(self, output: Tensor) -> Tensor:
        """An output as ``(..., groups, columns in a group)``."""
        return output.view(*output.shape[:-1], self.groups, -1)

    def into(self, output: Tensor, own: Tensor) -> Tensor:
        """What the module computes, with this projection's part replaced."""
        if self.columns is None:
            return own
        whole, own = self._grouped(output), self._grouped(own)
        before, behind = whole[..., : self.columns.start], whole[..., self.columns.stop :]
        return torch.cat([before, own, behind], dim=-1).flatten(-2)

    def run(self, hidden: Tensor) -> Tensor:
        """Computes the projection again, without its hooks."""
        return functional.linear(hidden, self.weight.to(hidden.dtype), self.bias)

    # --- replacing weight and bias ---------------------------------------------------------------

    def check_writable(self) -> None:
        """Raises where `write` cannot make the module compute with a new weight.

        Raises:
            UnsupportedError: If the module is quantised, and computes in a way of its own.
        """
        if not _is_plain(self.host.weight) and type(self.host).forward is not nn.Linear.forward:
            raise UnsupportedError(
                f"{type(self.host).__name__} is quantised, so no new weight can be written into "
                "it. Load the model without quantisation to merge an adapter."
            )

    def kept(self) -> tuple[Tensor, Tensor | None]:
        """What `restore` needs to undo `write`."""
        weight, bias = self.host.weight, self.bias
        own = None if bias is None else bias.detach().clone()
        return (self.weight.detach().clone() if _is_plain(weight) else weight), own

    @torch.no_grad()
    def write(self, weight: Tensor, bias: Tensor | None) -> None:
        """Replaces weight and bias; a quantised weight gives way to one that is not."""
        if not _is_plain(self.host.weight):
            plain = readable(self.host).clone()
            self.host.weight = nn.Parameter(plain, requires_grad=False)
        self._replace(weight, bias)

    @torch.no_grad()
    def restore(self, weight: Tensor, bias: Tensor | None) -> None:
        """Brings back what `kept` has given, bit for bit."""
        if _is_plain(weight):
            self._replace(weight, bias)
        else:
            self.host.weight = weight
            self._replace(None, bias)

    def _replace(self, weight: Tensor | None, bias: Tensor | None) -> None:
        own = self.host.weight
        if weight is not None:
            self._store(own.t() if self.transposed else own, weight)
        if bias is not None and self.bias is not None:
            self._store(self.host.bias, bias)


def _is_plain(weight: Tensor) -> bool:
    """Whether a weight is stored as the numbers that are computed with."""
    if not weight.is_floating_point() or weight.element_size() == 1:
        return False
    return type(weight) in (Tensor, nn.Parameter) or not _dequantises(weight)


def _dequantises(weight: Tensor) -> bool:
    """Whether a weight has a ``dequantize`` of its own; every tensor has one."""
    return type(weight).dequantize is not Tensor.dequantize or "dequantize" in vars(weight)


def readable(host: Any) -> Tensor:
    """The weight of a module as the numbers that it computes with, quantised or not.

    Raises:
        UnsupportedError: If the module does not say what they are, or where they are.
    """
    weight = getattr(host, "weight", None)
    if isinstance(weight, Tensor):
        if weight.device.type == "meta":
            raise UnsupportedError(
                f"The weight of a {type(host).__name__} is not in memory, but this needs it. Load "
                "the model without offloading."
            )
        if _is_plain(weight):
            return weight
        state = getattr(weight, "quant_state", None)
        if state is not None:  # four bits, of bitsandbytes
            bitsandbytes: Any = importlib.import_module("bitsandbytes.functional")
            plain: Tensor = bitsandbytes.dequantize_4bit(weight.data, state)
            return plain
        scales = getattr(weight, "SCB", None)  # eight bits, of bitsandbytes
        scales = getattr(getattr(host, "state", None), "SCB", None) if scales is None else scales
        if isinstance(scales, Tensor) and weight.dtype == torch.int8:
            return weight.data * (scales.view(-1, 1) / 127)
        if _dequantises(weight) or weight.is_quantized:
            return weight.dequantize()
    if callable(getattr(host, "dequantize", None)):
        whole: Tensor = host.dequantize()
        return whole
    raise UnsupportedError(
        f"{type(host).__name__} does not say what numbers it computes with: its weight is "
        f"{'missing' if weight is None else getattr(weight, 'dtype', type(weight))}, and neither "
        "has a dequantize(). Methods that only add to its result work here; this one reads the "
        "weight."
    )


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

    def bank(self, chains: Sequence[Sequence[LinearPart]]) -> Bank | None:
        """What runs the chains of different rows as one product; None where nothing can.

        Args:
            chains: The parts of each chain; the first part of all is this one.
        """
        return None


Bank = Callable[[Tensor, Tensor, Tensor], Tensor | None]
"""From a projection's input and result, ``(batch, sequence, ...)``, and the number of each row's
chain, ``(batch,)``, to its new result; None where the chains have to run one by one after all."""


class LinearOp(NamedTuple):
    """What a linear site does in one plan."""

    chains: tuple[tuple[LinearPart, ...], ...]
    rows: RowMap | None
    enters: bool
    """Whether some part changes the input."""
    plain: bool = False
    """Whether one chain does all there is to do, on the module's whole result as it is."""
    bank: Bank | None = None
    """What runs all chains as one product, where their parts are of one shape."""

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
        bank = None
        if rows is not None and not enters:
            bank = next(part for chain in chains for part in chain).bank(chains)
        return LinearOp(tuple(_beside(chain) for chain in chains), rows, enters, plain, bank)

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        op = self._planned()
        if op is None or not op.enters:
            return None
        hidden = run_chains(op.chains, op.rows, _enter, self.unfolded(args[0]))
        return (self.folded_as(args[0], hidden), *args[1:])

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        op = self._planned()
        if op is None:
            return None
        if op.plain:
            return self._run(op.chains[0], args[0], output)
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
        return op.bank(hidden, own, op.rows.chain_of_row(hidden.shape[0], hidden.device))

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
    return tuple(
        _Beside(part) if place and getattr(part, "wants_own_result", False) else part
        for place, part in enumerate(chain)
    )


def _widths(host: Any) -> tuple[int, int]:
    if isinstance(host, Conv1D):
        return int(host.nx), int(host.nf)
    try:
        return int(host.in_features), int(host.out_features)
    except AttributeError as error:
        raise UnsupportedError(
            f"{type(host).__name__} stands in the place of a projection, but does not say its "
            "in_features and out_features."
        ) from error


def _cut(block: FusedBlock, width: int, config: Any) -> tuple[slice, int]:
    """Where a block is in each group of a fused output of `width` columns, and how many groups."""
    groups = 1 if block.groups is None else int(getattr(config, block.groups))
    shares = [int(getattr(config, name)) for name in block.shares] or [1] * block.of
    total = sum(shares)
    if len(shares) != block.of or width % (groups * total):
        raise ConfigError(
            f"{width} columns cannot be cut into {groups} x {shares}, as {block} says for this "
            "configuration."
        )
    unit = width // (groups * total)
    start = unit * sum(shares[: block.index])
    return slice(start, start + unit * shares[block.index]), groups


def _enter(parts: Sequence[LinearPart], hidden: Tensor) -> Tensor:
    for part in parts:
        hidden = part.enter(hidden)
    return hidden
