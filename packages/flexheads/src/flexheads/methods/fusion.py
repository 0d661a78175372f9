"""AdapterFusion: learned attention over what several bottleneck adapters would add."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from flexheads.configs import Config
from flexheads.errors import ConfigError
from flexheads.methods.base import AddressedModules
from flexheads.methods.folding import FoldedFusion, folded
from flexheads.methods.fusion_inside import attend_inside, looks_inside, runs_unseen
from flexheads.sites.derived import Derived, look_together
from flexheads.sites.direct import quiet
from flexheads.sites.recording import record

_FIRST_TEMPERATURE = 50.0


@dataclasses.dataclass(frozen=True, eq=False)
class AdapterFusionConfig(Config):
    """Configuration of AdapterFusion (Pfeiffer et al. 2021, arXiv:2005.00247).

    Attributes:
        key, query, value: Which of the three projections there are.
        query_before_ln: Ask with the sub-layer's result instead of what the adapters see.
        regularization: Whether `get_fusion_regularization_loss` counts this fusion.
        residual_before: Add the skip to every adapter's output before attending, instead of to
            the result.
        temperature: Anneal the softmax in training, from 50 to 1 over 980 forward passes.
        value_before_softmax: Project the values before they are weighed, instead of afterwards.
            Kept for files: the projection is linear, so the result is the same.
        value_initialized: Begin with (almost) the identity as value projection.
        dropout_prob: Dropout on the scores; None takes the model's attention dropout.
    """

    key: bool = True
    query: bool = True
    value: bool = True
    query_before_ln: bool = False
    regularization: bool = True
    residual_before: bool = False
    temperature: bool = False
    value_before_softmax: bool = True
    value_initialized: bool = True
    dropout_prob: float | None = None

    def __post_init__(self) -> None:
        dropout = self.dropout_prob
        if dropout is not None and (type(dropout) not in (int, float) or not 0 <= dropout < 1):
            raise ConfigError(f"dropout_prob={dropout!r} should be a number from 0 to below 1.")

    @classmethod
    def load(cls, config: str | Mapping[str, Any] | None, **changes: Any) -> AdapterFusionConfig:
        """Resolves what users write: ``"dynamic"``, ``"static"``, a mapping, or None (dynamic).

        Raises:
            ConfigError: If there is no such configuration or field.
        """
        if config is None or isinstance(config, str):
            kind = _IDENTIFIERS.get(config or "dynamic")
            if kind is None:
                raise ConfigError(
                    f"There is no fusion configuration {config!r}; known: {list(_IDENTIFIERS)}."
                )
            return kind(**changes)
        if not isinstance(config, AdapterFusionConfig):
            config = AdapterFusionConfig.from_dict(config, tolerant=True)
        return config.replace(**changes) if changes else config


@dataclasses.dataclass(frozen=True, eq=False)
class StaticAdapterFusionConfig(AdapterFusionConfig):
    """Fusion without a value projection."""

    value: bool = False
    regularization: bool = False
    value_initialized: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class DynamicAdapterFusionConfig(AdapterFusionConfig):
    """Fusion with a value projection that begins as the identity; the default."""


_IDENTIFIERS = {"static": StaticAdapterFusionConfig, "dynamic": DynamicAdapterFusionConfig}


class FusionPart(nn.Module):
    """The attention at one residual site (arXiv:2005.00247, equations 1 to 4).

    ``sum_n softmax_n(Q(query) . K(up_n) / T) V(up_n)``, over the adapters n of each position.

    Args:
        width: Hidden size of the model.
        config: The fusion's configuration.
        dropout: Dropout on the scores.
    """

    replaces_norm = False

    def __init__(self, width: int, config: AdapterFusionConfig, dropout: float) -> None:
        super().__init__()
        self.config = config
        before = {"x", "r"} if config.residual_before else set()
        self.needs = frozenset(before | ({"x"} if config.query_before_ln else set()))
        self.query = nn.Linear(width, width) if config.query else None
        self.key = nn.Linear(width, width) if config.key else None
        self.value = nn.Linear(width, width, bias=False) if config.value else None
        self.dropout = nn.Dropout(dropout)
        self.temperature = _FIRST_TEMPERATURE if config.temperature else 1.0
        self.kept: Derived[FoldedFusion | None] = Derived()
        for linear in self.projections():
            nn.init.normal_(linear.weight, std=0.02)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        if self.value is not None and config.value_initialized:
            # Not quite the identity, as in the authors' code.
            nn.init.constant_(self.value.weight, 1e-6)
            self.value.weight.data.fill_diagonal_(1.0)

    def forward(self, query: Tensor, ups: Tensor) -> Tensor:
        """Attends to the outputs of several adapters.

        Args:
            query: ``(batch, sequence, width)``.
            ups: ``(batch, sequence, adapters, width)``.

        Returns:
            ``(batch, sequence, width)``.
        """
        asked = query if self.query is None else self.query(query)
        # For each position these are products too small for a matrix product to be quicker.
        scores = (ups * self._as_keys_see(asked).unsqueeze(-2)).sum(dim=-1)
        if self.key is not None:
            scores = scores + torch.matmul(asked, self.key.bias).unsqueeze(-1)
        attention = self.attention(scores)
        # The projection has no bias, so that of the mean is the mean of those.
        context = (ups * attention.unsqueeze(-1)).sum(dim=-2)
        return context if self.value is None else self.value(context)

    def attention(self, scores: Tensor) -> Tensor:
        """The weights of adapters, ``(batch, sequence, adapters)``, from scores of that shape.

        Training drops scores, and cools the temperature.
        """
        dropout: Any = self._modules["dropout"]
        if dropout.training or not quiet(dropout):
            scores = dropout(scores)
        temperature = self.temperature
        attention = (scores if temperature == 1.0 else scores / temperature).softmax(dim=-1)
        record("fusion", self, attention)
        if self.training and temperature > 1.0:
            self.temperature = max(1.0, temperature - _FIRST_TEMPERATURE / 1000.0)
        return attention

    def attended(
        self, parts: Sequence[Any], hidden: Tensor, query: Tensor, residual: Tensor | None
    ) -> Tensor | None:
        """What it gives without making any adapter's result; None where that cannot be.

        Args:
            parts: The adapters' parts here, in order.
            hidden: What they see, ``(batch, sequence, width)``.
            query: What asks, of that shape.
            residual: What is added to each adapter's output first, or None.
        """
        folded = self._folded(parts)
        if folded is not None and folded.weight.dtype == hidden.dtype == query.dtype:
            return folded(hidden, query, residual)
        if not looks_inside(self, parts) or not runs_unseen(self, parts):
            return None
        if not parts[0].down.weight.dtype == hidden.dtype == query.dtype:
            return None
        if residual is not None and self._drops():
            return None  # what is common to all scores makes a difference where some are dropped
        return attend_inside(self, parts, hidden, query, residual)

    def _folded(self, parts: Sequence[Any]) -> FoldedFusion | None:
        """Itself and the adapters as fewer products, in inference; None where that cannot be."""
        return self.kept.get((*parts, self), lambda: folded(self, parts), "scaling")

    def projections(self) -> list[nn.Linear]:
        """Those of query, key and value that there are."""
        return [each for each in (self.query, self.key, self.value) if each is not None]

    def sees_key_bias(self) -> bool:
        """Whether the bias of the keys counts, which adds the same to all scores.

        Softmax does not see it, unless scores are dropped; but its gradients are zeros, not none.
        """
        assert self.key is not None
        wanted = torch.is_grad_enabled() and self.key.bias.requires_grad
        return wanted or self._drops()

    def _drops(self) -> bool:
        return bool(self.dropout.training and self.dropout.p)

    def _as_keys_see(self, asked: Tensor) -> Tensor:
        """What outputs u are multiplied by: ``q . (K u) = (q K) . u``, so that K acts once."""
        return asked if self.key is None else torch.matmul(asked, self.key.weight)

    def regularization(self) -> Tensor:
        """How far the value projection is from the identity: ``0.01 * sum((I - V)^2)``."""
        assert self.value is not None
        weight = self.value.weight
        identity = torch.eye(weight.shape[0], dtype=weight.dtype, device=weight.device)
        return 0.01 * (identity - weight).pow(2).sum()


class AdapterFusion(AddressedModules):
    """All parameters of one AdapterFusion, keyed by the logical addresses of its sites.

    Args:
        name: The fusion's name.
        members: The adapters that it fuses, in order.
        config: Its configuration.
        parts: Its modules by address.
    """

    def __init__(
        self,
        name: str,
        members: tuple[str, ...],
        config: AdapterFusionConfig,
        parts: Mapping[str, FusionPart],
    ) -> None:
        super().__init__(parts)
        self.name, self.members, self.config = name, members, config
        look_together(part.kept for part in parts.values())

    def regularization(self) -> Tensor | None:
        """The sum over all sites, or None where the configuration has none."""
        if not (self.config.regularization and self.config.value):
            return None
        parts: Any = self.parts.values()
        return torch.stack([part.regularization() for part in parts]).sum()


def fusion_dropout(config: AdapterFusionConfig, model_config: PretrainedConfig) -> float:
    """The dropout on the scores: the fusion's own, or that of the model's attention."""
    if config.dropout_prob is not None:
        return config.dropout_prob
    names = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop")
    found = (getattr(model_config, name, None) for name in names)
    return float(next((value for value in found if value is not None), 0.0))
