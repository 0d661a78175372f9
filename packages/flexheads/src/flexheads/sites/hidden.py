"""The hidden site: what a layer hands to the next one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from flexheads.sites.banks import Bank, ChainBank, chain_bank
from flexheads.sites.base import CALL, AttachedSite, first_tensor, with_first
from flexheads.sites.call import Tokens, tokens_of
from flexheads.sites.rows import RowMap
from flexheads.sites.runtime import Runtime


class HiddenPart(nn.Module):
    """What an adapter has at a hidden site."""

    def forward(self, hidden: Tensor, tokens: Tokens) -> Tensor:
        """Changes a layer's result.

        Args:
            hidden: ``(batch, sequence, hidden)``.
            tokens: Where the first and the last tokens of each row are.
        """
        raise NotImplementedError

    def bank(self, parts: Sequence[HiddenPart | None]) -> Bank[Any] | None:
        """What runs parts of different rows as one product; None where nothing can.

        Args:
            parts: The part of each chain, this one among them, or None.
        """
        return None


class HiddenOp(NamedTuple):
    """What a hidden site does in one plan."""

    chains: tuple[tuple[HiddenPart, ...], ...]
    rows: RowMap | None
    bank: ChainBank | None = None
    """What runs all chains as one product, where their parts are of one shape."""

    def run(self, hidden: Tensor, tokens: Tokens) -> Tensor:
        """Runs each chain on its rows."""
        if self.rows is None:
            return _run(self.chains[0], hidden, tokens)
        if self.bank is not None and hidden.dim() == 3:
            together: Tensor | None = self.bank(self.rows, hidden, hidden, tokens)
            if together is not None:
                return together
        present = [self.chains[number] for number in self.rows.present(hidden.shape[0])]
        split = self.rows.split(hidden), tokens.split(self.rows, hidden)
        return self.rows.merge([_run(*each) for each in zip(present, *split, strict=True)])


class AttachedHidden(AttachedSite):
    """The result of one layer in a live model; its parts are `HiddenPart`.

    Hooks: ``output`` behind the layer, and the note of what the backbone, or the side that the
    layer belongs to, is called with.
    """

    kind = "hidden"

    def __init__(
        self,
        address: str,
        role: str,
        layer: int,
        host: nn.Module,
        width: int,
        runtime: Runtime,
        *,
        side: str | None,
    ) -> None:
        super().__init__(address, role, layer, host, width, runtime)
        self.side = side

    def needed(self, part: HiddenPart) -> frozenset[str]:
        return frozenset({"output", CALL if self.side is None else f"{CALL}.{self.side}"})

    def register(self, hook: str) -> RemovableHandle:
        return self.host.register_forward_hook(self._after, prepend=True)

    def op(self, chains: Sequence[Sequence[HiddenPart]], rows: RowMap | None) -> HiddenOp:
        bank = None if rows is None else chain_bank(chains, changed=0)
        return HiddenOp(tuple(map(tuple, chains)), rows, bank)

    def _after(self, module: nn.Module, args: Any, output: Any) -> Any:
        op: HiddenOp | None = self.planned()
        if op is None:
            return None
        tokens = tokens_of(self.runtime.peek(CALL), self.side)
        hidden = op.run(first_tensor(output), tokens)
        return with_first(output, hidden)


def _run(parts: Sequence[HiddenPart], hidden: Tensor, tokens: Tokens) -> Tensor:
    for part in parts:
        hidden = part(hidden, tokens)
    return hidden
