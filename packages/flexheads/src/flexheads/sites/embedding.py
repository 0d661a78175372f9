"""The embedding site: what enters the first layer, and its way back out of the last."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from flexheads.sites.base import (
    AttachedSite,
    first_argument,
    first_tensor,
    run_chains,
    with_first,
)
from flexheads.sites.hooking import hook_before
from flexheads.sites.rows import RowMap
from flexheads.sites.runtime import Runtime


class EmbeddingPart(nn.Module):
    """What an adapter has at the embedding site; both ways map ``(batch, sequence, hidden)``."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Changes the embeddings."""
        raise NotImplementedError

    def inverse(self, hidden: Tensor) -> Tensor:
        """Undoes `forward`."""
        raise NotImplementedError


class EmbeddingOp(NamedTuple):
    """What the embedding site does in one plan."""

    chains: tuple[tuple[EmbeddingPart, ...], ...]
    rows: RowMap | None

    def for_chain(self, chain: int) -> EmbeddingOp:
        """The same for the rows of one chain only."""
        return EmbeddingOp((self.chains[chain],), None)

    def inverse(self, hidden: Tensor) -> Tensor:
        """Undoes the parts of each chain, last first: ``(batch, sequence, hidden)`` both ways."""
        return run_chains(self.chains, self.rows, _undo, hidden)


class AttachedEmbedding(AttachedSite):
    """The embeddings of a live model; its parts are `EmbeddingPart`.

    Hooks: ``forward`` behind the embeddings, or before the module that they enter; ``inverse``
    before the output embeddings of a static language-model head. Flexible heads ask for the inverse
    themselves.
    """

    kind = "embedding"

    def __init__(
        self,
        address: str,
        host: nn.Module,
        width: int,
        runtime: Runtime,
        output_embeddings: nn.Module | None,
        acts_on: str = "output",
    ) -> None:
        super().__init__(address, address, None, host, width, runtime)
        # Those of a decoder of another size have nothing to do with these embeddings.
        fits = getattr(output_embeddings, "in_features", width) == width
        self.output_embeddings = output_embeddings if fits else None
        self.acts_on = acts_on

    def needed(self, part: EmbeddingPart) -> frozenset[str]:
        return frozenset({"forward"} if self.output_embeddings is None else {"forward", "inverse"})

    def register(self, hook: str) -> RemovableHandle:
        if hook == "forward" and self.acts_on == "input":
            return hook_before(self.host, self._before)
        if hook == "forward":
            return self.host.register_forward_hook(self._after, prepend=True)
        assert self.output_embeddings is not None
        # What was done last is undone first.
        late = self.address != "embeddings"
        return self.output_embeddings.register_forward_pre_hook(self._before_output, prepend=late)

    def op(self, chains: Sequence[Sequence[EmbeddingPart]], rows: RowMap | None) -> EmbeddingOp:
        return EmbeddingOp(tuple(map(tuple, chains)), rows)

    def _after(self, module: nn.Module, args: Any, output: Any) -> Any:
        op: EmbeddingOp | None = self.planned()
        if op is None:
            return None
        hidden = run_chains(op.chains, op.rows, _do, first_tensor(output))
        return with_first(output, hidden)

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        op: EmbeddingOp | None = self.planned()
        if op is None:
            return None
        hidden = run_chains(op.chains, op.rows, _do, first_argument(args, kwargs))
        if args:
            return (hidden, *args[1:]), kwargs
        return args, {**kwargs, next(iter(kwargs)): hidden}

    def _before_output(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        op: EmbeddingOp | None = self.planned()
        return None if op is None else (op.inverse(args[0]), *args[1:])


def _do(parts: Sequence[EmbeddingPart], hidden: Tensor) -> Tensor:
    for part in parts:
        hidden = part(hidden)
    return hidden


def _undo(parts: Sequence[EmbeddingPart], hidden: Tensor) -> Tensor:
    for part in reversed(parts):
        hidden = part.inverse(hidden)
    return hidden


def undo_in_turn(ops: Sequence[EmbeddingOp], hidden: Tensor) -> Tensor:
    """Undoes the parts of several sites, the last first: ``(batch, sequence, hidden)``."""
    for op in reversed(ops):
        hidden = op.inverse(hidden)
    return hidden
