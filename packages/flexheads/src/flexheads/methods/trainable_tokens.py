"""Trainable tokens: embeddings of its own for a few tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PretrainedConfig

from flexheads.errors import ConfigError, UnsupportedError
from flexheads.methods.base import AdapterMethod, seeded
from flexheads.methods.config import AdapterConfig
from flexheads.sites.base import AttachedSite
from flexheads.sites.tokens import AttachedTokens, TokensPart


@dataclasses.dataclass(frozen=True, eq=False)
class TrainableTokensConfig(AdapterConfig):
    """Rows of the token embedding for the tokens that are named, as in PEFT.

    Where the model's output embeddings are tied to it, the tokens are scored with the same rows.

    Attributes:
        token_indices: The ids of the tokens; the one for padding is trained too if it is named.
        init_weights: Whether the rows start as the model's; else they are random.
        init_weights_seed: Seed for random rows.
    """

    architecture: ClassVar[str | None] = "trainable_tokens"

    token_indices: Sequence[int] = ()
    init_weights: bool = True
    init_weights_seed: int | None = None

    def __post_init__(self) -> None:
        ids: list[Any] = list(self.token_indices)
        if wrong := [i for i in ids if isinstance(i, bool) or not isinstance(i, int) or i < 0]:
            raise ConfigError(f"token_indices names {wrong}; ids are whole numbers from 0.")
        if twice := sorted({i for i in ids if ids.count(i) > 1}):
            raise ConfigError(f"token_indices names {twice} more than once.")


class TokenRows(TokensPart):
    """Rows that take the place of those of a few tokens; `rows` is ``(tokens, width)``.

    Args:
        rows: The rows at the start.
        ids: The ids of the tokens, in the order of the rows.
        scale: The factor that the embedding puts on what it looks up, or None.
    """

    ids: Tensor
    sorted: Tensor
    order: Tensor
    scale: Tensor | None

    def __init__(self, rows: Tensor, ids: Sequence[int], scale: Any) -> None:
        super().__init__()
        self.rows = nn.Parameter(rows)
        in_order, order = torch.tensor(ids, device=rows.device).sort()
        scale = None if scale is None else torch.as_tensor(scale, device=rows.device)
        known = {"ids": in_order[order.argsort()], "sorted": in_order, "order": order}
        for name, value in {**known, "scale": scale}.items():
            self.register_buffer(name, value, persistent=False)

    def forward(self, ids: Tensor, embedded: Tensor) -> Tensor:
        """Puts the rows where their tokens are."""
        place = torch.searchsorted(self.sorted, ids.contiguous()).clamp_max(len(self.sorted) - 1)
        own = functional.embedding(self.order[place], self.rows)
        own = own if self.scale is None else own * self.scale.to(own.dtype)
        return torch.where((self.sorted[place] == ids).unsqueeze(-1), own.to(embedded), embedded)

    def scores(self, hidden: Tensor, given: Tensor, logits: Tensor, weight: Tensor) -> Tensor:
        """Scores the tokens with the rows; a bias, which the scores have already, stays."""
        # By the difference, which is exactly zero at the start.
        product = functional.linear(hidden, self.rows - weight[self.ids])
        own = given.index_select(-1, self.ids) + product
        return logits.index_copy(-1, self.ids, own.to(logits.dtype))


class TrainableTokensMethod(AdapterMethod):
    """Puts `TokenRows` at the embedding of token ids."""

    config: TrainableTokensConfig

    def build(
        self, sites: Mapping[str, AttachedSite], model_config: PretrainedConfig
    ) -> dict[str, nn.Module]:
        site = next((site for site in sites.values() if isinstance(site, AttachedTokens)), None)
        if site is None:
            raise UnsupportedError(
                "Trainable tokens need one embedding of token ids, which this architecture does "
                "not have: it reads no tokens, or it has two sides."
            )
        host: Any = site.host
        scale, plain = getattr(host, "embed_scale", None), nn.Embedding.forward
        if (type(host).forward is not plain and scale is None) or host.max_norm is not None:
            raise UnsupportedError(
                f"The embedding ({type(host).__name__}) does more than to look up rows, so rows of "
                "their own for some tokens would not mean the same."
            )
        ids, vocabulary = list(self.config.token_indices), host.num_embeddings
        if not ids:
            raise ConfigError("This TrainableTokensConfig trains nothing: name token_indices.")
        if wrong := [i for i in ids if i >= vocabulary]:
            raise ConfigError(f"token_indices names {wrong}, but there are {vocabulary} tokens.")
        if host.weight.is_meta or not host.weight.is_floating_point():
            raise UnsupportedError(
                "The embedding's weights are kept elsewhere or quantised, so there are no rows to "
                "start from. Load the model without offloading or quantising its embedding."
            )
        rows = host.weight.detach()[ids].clone()
        if not self.config.init_weights:
            with seeded(self.config.init_weights_seed):
                rows = torch.randn(rows.shape).to(rows)
        return {site.address: TokenRows(rows, ids, scale)}

    def merged(
        self, part: nn.Module, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        assert isinstance(part, TokenRows)
        return weight.index_copy(0, part.ids, part.rows.to(weight)), bias
