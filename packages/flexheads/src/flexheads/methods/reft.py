"""Representation fine-tuning: low-rank edits of what a layer gives, at a few positions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from flexheads.activations import activation
from flexheads.errors import ConfigError, UnsupportedError
from flexheads.methods.base import AdapterMethod, check_layers, seeded
from flexheads.methods.config import AdapterConfig
from flexheads.methods.householder import orthonormal_rows, reflections
from flexheads.methods.reft_bank import ReftBank
from flexheads.sites.base import AttachedSite
from flexheads.sites.call import Tokens
from flexheads.sites.hidden import HiddenPart


@dataclasses.dataclass(frozen=True, eq=False)
class ReftConfig(AdapterConfig):
    """Representation fine-tuning (Wu et al. 2024, arXiv:2404.03592).

    A new adapter changes nothing; for the one exception see `Edit`.

    Attributes:
        layers: Numbers of the layers behind which it acts, or ``"all"``.
        prefix_positions: How many of the first tokens of each row it edits; padding is no token.
        suffix_positions: How many of the last; see `flexheads.sites.call.Tokens`.
        r: The rank.
        orthogonality: Whether the rows of the projection are orthonormal.
        tied_weights: Whether first and last tokens share their edit.
        subtract_projection: Whether the edit replaces the projection (LoReFT, NoReFT) or adds to it
            (DiReFT). Files of the `adapters` library do not say it, so they are read as True.
        dropout: Dropout on the edited states.
        non_linearity: Activation on the learned source.
        dtype: Name of the torch type to compute in; None is that of the layer.
        output_reft: Whether it acts at all.
        init_weights_seed: Seed for each layer.
    """

    architecture: ClassVar[str | None] = "reft"

    layers: Literal["all"] | Sequence[int]
    prefix_positions: int
    suffix_positions: int
    r: int
    orthogonality: bool
    tied_weights: bool = False
    subtract_projection: bool = True
    dropout: float = 0.05
    non_linearity: str | None = None
    dtype: str | None = None
    output_reft: bool = True
    init_weights_seed: int | None = None

    def __post_init__(self) -> None:
        wrong, layers = [], self.layers
        for name, least in (("prefix_positions", 0), ("suffix_positions", 0), ("r", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                wrong.append(f"{name}={value!r} must be a whole number from {least}")
        if not self.prefix_positions and not self.suffix_positions:
            wrong.append("prefix_positions and suffix_positions are both 0, so it edits nothing")
        if isinstance(layers, str) and str(layers) != "all":
            wrong.append(f'layers={layers!r} is neither "all" nor a list of numbers')
        if not 0.0 <= self.dropout < 1.0:
            wrong.append(f"dropout={self.dropout!r} must be in [0, 1)")
        kind = None if self.dtype is None else getattr(torch, self.dtype, None)
        if self.dtype is not None and not getattr(kind, "is_floating_point", False):
            wrong.append(f'dtype={self.dtype!r} names no type of torch; write "bfloat16"')
        if wrong:
            raise ConfigError(f"{type(self).__name__}: {'; '.join(wrong)}.")


@dataclasses.dataclass(frozen=True, eq=False)
class LoReftConfig(ReftConfig):
    """Low-rank linear subspace ReFT (arXiv:2404.03592, equation 2)."""

    layers: Literal["all"] | Sequence[int] = "all"
    prefix_positions: int = 3
    suffix_positions: int = 0
    r: int = 1
    orthogonality: bool = True


@dataclasses.dataclass(frozen=True, eq=False)
class NoReftConfig(LoReftConfig):
    """`LoReftConfig` without the constraint of orthonormal rows."""

    orthogonality: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class DiReftConfig(LoReftConfig):
    """`LoReftConfig` without the constraint and the subtraction (arXiv:2404.03592, equation 3)."""

    orthogonality: bool = False
    subtract_projection: bool = False


class Rows(nn.Module):
    """A projection: `weight` is ``(r, width)``."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self) -> Tensor:
        """The projection."""
        return self.weight


class OrthonormalRows(Rows):
    """A projection with orthonormal rows, of which `weight` holds the reflections."""

    def forward(self) -> Tensor:
        """The projection, in single precision at least."""
        return orthonormal_rows(self.weight)


class Edit(nn.Module):
    """``R^T (act(W h + b) - R h)``, what is added to a state; without ``- R h`` for DiReFT.

    It starts at zero: ``W = R`` with ``b = 0``, or ``W = 0`` where nothing is subtracted. With a
    non-linearity and a subtraction there is no such start; ``W`` is drawn then. (In the `adapters`
    library all of ``W`` and ``b`` is drawn, so that a new adapter changes the model.)

    Args:
        width: Hidden size.
        config: The adapter's configuration.
    """

    def __init__(self, width: int, config: ReftConfig) -> None:
        super().__init__()
        self.learned_source = nn.Linear(width, config.r)
        if config.orthogonality:
            rows = nn.init.orthogonal_(torch.empty(config.r, width))
            self.projection: Rows = OrthonormalRows(reflections(rows))
        else:
            self.projection = Rows(nn.Linear(width, config.r, bias=False).weight.detach())
        self.activation = activation(config.non_linearity)
        self.subtracts = config.subtract_projection
        self.dropout = nn.Dropout(config.dropout)
        with torch.no_grad():
            if not self.subtracts:
                self.learned_source.weight.zero_()
            elif self.activation is None:
                self.learned_source.weight.copy_(self.projection())
            self.learned_source.bias.zero_()

    def forward(self, states: Tensor) -> Tensor:
        """Maps ``(batch, positions, width)`` to what is added there."""
        return self.finished(
            states, self.learned_source(states), self.projection().to(states.dtype)
        )

    def finished(self, states: Tensor, source: Tensor, rows: Tensor) -> Tensor:
        """What is added, given ``W h + b`` and R, ``(r, width)`` or one for each row."""
        if self.activation is not None:
            source = self.activation(source)
        if self.subtracts:
            source = source - states @ rows.transpose(-1, -2)
        change: Tensor = source @ rows
        if self.training and self.dropout.p > 0.0:
            # Dropout is on the edited state, so it takes away from the state too.
            change = self.dropout(states + change) - states
        return change


class ReftPart(HiddenPart):
    """The edits behind one layer: of the first tokens and of the last, or one for both.

    Args:
        width: Hidden size.
        config: The adapter's configuration.
    """

    def __init__(self, width: int, config: ReftConfig) -> None:
        super().__init__()
        self.first, self.last = config.prefix_positions, config.suffix_positions
        self.kind = (config.r, config.non_linearity, config.subtract_projection, config.dropout)
        self.units = nn.ModuleList(Edit(width, config) for _ in range(2 - config.tied_weights))

    def forward(self, hidden: Tensor, tokens: Tokens) -> Tensor:
        """Maps ``(batch, sequence, width)`` to the same."""
        return self.edited(hidden, tokens, lambda number, states: self.units[number](states))

    def edited(
        self, hidden: Tensor, tokens: Tokens, change_of: Callable[[int, Tensor], Tensor]
    ) -> Tensor:
        """The hidden states with something added to the tokens that are edited.

        Args:
            hidden: ``(batch, sequence, width)``.
            tokens: Where these tokens are.
            change_of: Gives it, from the number of an edit and the states of its tokens.
        """
        columns, real = tokens.edges(hidden, self.first, self.last)
        if columns.shape[1] == 0:
            return hidden
        index = columns.unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
        states = hidden.gather(1, index).to(next(self.parameters()).dtype)
        if len(self.units) == 1:
            change = change_of(0, states)
        else:
            parts = (states[:, : self.first], states[:, self.first :])
            change = torch.cat(
                [change_of(n, own) for n, own in enumerate(parts) if own.shape[1]], dim=1
            )
        change = change.to(hidden.dtype).masked_fill(~real.unsqueeze(-1), 0.0)
        return hidden.scatter_add(1, index, change)

    def bank(self, parts: Sequence[HiddenPart | None]) -> ReftBank | None:
        alike = all(part is None or self._is_alike(part) for part in parts)
        return ReftBank(parts) if alike else None  # type: ignore[arg-type]

    def _is_alike(self, part: HiddenPart) -> bool:
        """Whether another part differs in its numbers only."""
        return (
            isinstance(part, ReftPart)
            and (part.first, part.last, part.kind) == (self.first, self.last, self.kind)
            and len(part.units) == len(self.units)
        )


class ReftMethod(AdapterMethod):
    """Puts a `ReftPart` behind the layers that the configuration names."""

    config: ReftConfig

    def build(
        self, sites: Mapping[str, AttachedSite], model_config: PretrainedConfig
    ) -> dict[str, nn.Module]:
        config = self.config
        if not config.output_reft:
            return {}
        taken = [site for site in sites.values() if site.kind == "hidden"]
        if not taken:
            raise UnsupportedError("This architecture has no layers for ReFT to act behind.")
        if not isinstance(config.layers, str):
            check_layers("layers", config.layers, {site.address: site for site in taken})
            taken = [site for site in taken if site.layer in config.layers]
        parts: dict[str, nn.Module] = {}
        for site in taken:
            if config.orthogonality and config.r >= site.width:
                raise ConfigError(
                    f"r={config.r} must be less than the hidden size, {site.width}: that many "
                    "orthonormal rows leave nothing free."
                )
            with seeded(config.init_weights_seed):
                parts[site.address] = ReftPart(site.width, config)
        return parts
