"""The attention site: where keys and values of an adapter join those of the attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PretrainedConfig

from flexheads.errors import UnsupportedError
from flexheads.sites.base import AttachedSite
from flexheads.sites.rows import RowMap
from flexheads.sites.runtime import Runtime
from flexheads.specs import Side


class AttentionPart(nn.Module):
    """What an adapter has at an attention site."""

    def forward(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values that come before the attention's own.

        Args:
            query: The queries, ``(batch, heads, sequence, head size)``.

        Returns:
            Two tensors ``(batch, key heads, prefix length, head size)``.
        """
        raise NotImplementedError


class AttentionOp(NamedTuple):
    """What an attention site does in one plan."""

    chains: tuple[tuple[AttentionPart, ...], ...]
    rows: RowMap | None


class AttachedAttention(AttachedSite):
    """An attention module in a live model; its parts are `AttentionPart`.

    Attributes:
        stack: Number of the `LayerSpec` that it belongs to.
        index: Number of its layer in that stack.
        side: The side of an encoder-decoder model, or None.
        key_heads: Number of its key and value heads.
        head_size: Size of each.
    """

    kind = "attention"

    def __init__(
        self,
        address: str,
        role: str,
        layer: int,
        host: nn.Module,
        runtime: Runtime,
        *,
        config: PretrainedConfig,
        stack: int,
        index: int,
        side: Side | None,
    ) -> None:
        super().__init__(address, role, layer, host, config.hidden_size, runtime)
        self.stack, self.index, self.side = stack, index, side
        heads = config.num_attention_heads
        self.head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
        self.key_heads = getattr(config, "num_key_value_heads", None) or heads

    def needed(self, part: AttentionPart) -> frozenset[str]:
        return frozenset({"attention"})

    def register(self, hook: str) -> RemovableHandle:
        raise UnsupportedError("Prefixes are not available in this version of flexheads.")

    def op(self, chains: Sequence[Sequence[AttentionPart]], rows: RowMap | None) -> AttentionOp:
        return AttentionOp(tuple(map(tuple, chains)), rows)
