"""The tokens site: the embedding of token ids, and the output embeddings that are tied to it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from flexheads.sites.base import AttachedSite, HostWeights, first_argument, run_chains
from flexheads.sites.hooking import hook_behind
from flexheads.sites.rows import RowMap
from flexheads.sites.runtime import Runtime


class TokensPart(nn.Module):
    """What an adapter has at the tokens site."""

    def forward(self, ids: Tensor, embedded: Tensor) -> Tensor:
        """Changes the embedding of tokens.

        Args:
            ids: Token ids, ``(batch, sequence)``.
            embedded: Their embeddings so far, ``(batch, sequence, width)``.

        Returns:
            The new embeddings.
        """
        raise NotImplementedError

    def scores(self, hidden: Tensor, given: Tensor, logits: Tensor, weight: Tensor) -> Tensor:
        """Changes the scores of tokens, where the output matrix is that of the embedding.

        Args:
            hidden: What the output matrix was applied to, ``(batch, sequence, width)``.
            given: The model's own scores, ``(batch, sequence, vocabulary)``.
            logits: The scores so far, with those of earlier parts of the chain.
            weight: The matrix, ``(vocabulary, width)``.

        Returns:
            The new scores.
        """
        raise NotImplementedError


class TokensOp(NamedTuple):
    """What the tokens site does in one plan."""

    chains: tuple[tuple[TokensPart, ...], ...]
    rows: RowMap | None
    site: AttachedTokens

    def for_chain(self, chain: int) -> TokensOp:
        """The same for the rows of one chain only."""
        return TokensOp((self.chains[chain],), None, self.site)

    def scores(self, hidden: Tensor, logits: Tensor) -> Tensor:
        """The scores with those of changed tokens replaced; shapes as in `TokensPart.scores`."""
        run = partial(_score, self.site.host.weight)
        return run_chains(self.chains, self.rows, run, hidden, logits)


class AttachedTokens(AttachedSite):
    """The embedding of token ids in a live model; its parts are `TokensPart`.

    Hooks: ``output`` behind the embedding; ``logits`` behind the output embeddings of a static
    language-model head, which acts while the two are tied. Flexible heads ask by themselves.
    """

    kind = "tokens"

    def __init__(
        self,
        address: str,
        host: nn.Embedding,
        runtime: Runtime,
        output_embeddings: nn.Module | None,
    ) -> None:
        super().__init__(address, address, None, host, host.embedding_dim, runtime)
        self.output_embeddings = output_embeddings

    @property
    def projection(self) -> HostWeights:
        """The embedding's weight, for merging."""
        return HostWeights(self.host)

    def needed(self, part: TokensPart) -> frozenset[str]:
        return frozenset({"output"} if self.output_embeddings is None else {"output", "logits"})

    def register(self, hook: str) -> RemovableHandle:
        if hook == "output":
            return hook_behind(self.host, self._after, first=True)
        assert self.output_embeddings is not None
        return self.output_embeddings.register_forward_hook(self._after_output, prepend=True)

    def op(self, chains: Sequence[Sequence[TokensPart]], rows: RowMap | None) -> TokensOp:
        return TokensOp(tuple(map(tuple, chains)), rows, self)

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
        op: TokensOp | None = self.planned()
        if op is None:
            return None
        return run_chains(op.chains, op.rows, _embed, first_argument(args, kwargs), output)

    def _after_output(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        op: TokensOp | None = self.planned()
        if op is None or module.weight is not self.host.weight:
            return None
        return op.scores(args[0], output)


def _embed(parts: Sequence[TokensPart], ids: Tensor, embedded: Tensor) -> Tensor:
    for part in parts:
        embedded = part(ids, embedded)
    return embedded


def _score(weight: Any, parts: Sequence[TokensPart], hidden: Tensor, given: Tensor) -> Tensor:
    logits = given
    for part in parts:
        logits = part.scores(hidden, given, logits, weight)
    return logits
