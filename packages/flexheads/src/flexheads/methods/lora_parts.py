"""What low-rank methods have at a projection: the change of its weight, and how that acts.

Shapes: a hidden state is ``(batch, sequence, in)``, a result ``(batch, sequence, out)``, a weight
``(out, in)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from flexheads.errors import UnsupportedError
from flexheads.methods.base import awaits_values
from flexheads.methods.gating import gate_scores, new_gate
from flexheads.methods.lora_bank import DeltaBank, ScalingBank
from flexheads.methods.lora_configs import LoRAConfig
from flexheads.methods.lora_sums import plus, plus_product
from flexheads.methods.lora_values import draw, factors
from flexheads.sites.derived import Derived
from flexheads.sites.linear import LinearPart
from flexheads.sites.prepared import Step
from flexheads.sites.projection import Projection

Folded = tuple[Tensor, Tensor | None]
"""A projection's weight and bias."""


class _Gated(LinearPart):
    """What additive and scaling parts share: the gate, or else the scaling."""

    own_dtype: str | None = None

    def __init__(self, in_features: int, config: LoRAConfig) -> None:
        super().__init__()
        if config.dtype is not None:
            self.own_dtype = config.dtype
        self.scaling = config.scaling
        self.gate = new_gate(in_features) if config.use_gating else None

    def factor(self, hidden: Tensor) -> Tensor | float:
        """The scaling, or the gate in its place: ``(batch, 1, 1)``."""
        if self.gate is None:
            return self.scaling
        return gate_scores(self, self.gate, hidden)

    def merged(self, weight: Tensor, bias: Tensor | None) -> Folded:
        """The projection's weight and bias with this part folded in.

        Raises:
            UnsupportedError: If the part depends on its input.
        """
        if self.gate is not None:
            raise UnsupportedError("A gated LoRA depends on its input, so it cannot be merged.")
        return self.folded(weight, bias)

    def folded(self, weight: Tensor, bias: Tensor | None) -> Folded:
        """`merged`, of a part without a gate."""
        raise NotImplementedError

    def origin(self, name: str) -> Tensor | float:
        """The value of a parameter from which what it has learned counts; see TIES and DARE."""
        return 0.0


class Scaling(_Gated):
    """``y * (B * scaling)``; `lora_B` is ``(out, 1)`` (IA3, arXiv:2205.05638, equation 1)."""

    def __init__(self, projection: Projection, config: LoRAConfig) -> None:
        super().__init__(projection.in_features, config)
        self.lora_B = nn.Parameter(torch.ones(projection.out_features, 1))
        if config.init_weights == "lora":
            nn.init.zeros_(self.lora_B)
        elif config.init_weights == "bert":
            nn.init.normal_(self.lora_B, std=0.02)

    def forward(self, hidden: Tensor, output: Tensor, projection: Projection) -> Tensor:
        """Maps the projection's input and result to the new result."""
        scale: Tensor = self.lora_B.view(-1)
        if self.gate is not None or self.scaling != 1:
            scale = scale * self.factor(hidden.to(scale.dtype))
        return output * scale.to(output.dtype)

    def prepared(self) -> Step | None:
        vector, scaling = self._parameters.get("lora_B"), self.scaling
        if type(self) is not Scaling or self.gate is not None or vector is None:
            return None

        def step(hidden: Any, output: Tensor) -> Tensor:
            scale = vector.view(-1)
            if scaling != 1:
                scale = scale * scaling
            return output * (scale if scale.dtype == output.dtype else scale.to(output.dtype))

        return step

    def bank(self, parts: Sequence[LinearPart | None]) -> ScalingBank | None:
        alike = all(p is None or (type(p) is Scaling and p.gate is None) for p in parts)
        return ScalingBank(parts) if alike and self.gate is None else None  # type: ignore[arg-type]

    def folded(self, weight: Tensor, bias: Tensor | None) -> Folded:
        scale = (self.lora_B * self.scaling).to(weight.dtype)
        return weight * scale, None if bias is None else bias * scale.view(-1)

    def origin(self, name: str) -> Tensor | float:
        return 1.0 if name == "lora_B" else 0.0


class Magnitude(nn.Module):
    """DoRA's magnitude of each output, ``weight`` of ``(out, 1)``: at first the weight's own."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(row_norms(weight.detach()).unsqueeze(1))

    def over(self, weight: Tensor) -> Tensor:
        """``m / ||weight||`` for each output, ``(out,)``; the norm is a constant to gradients."""
        return self.weight.view(-1) / row_norms(weight.detach()).to(self.weight.dtype)


def row_norms(weight: Tensor) -> Tensor:
    """The norm of each row, ``(out,)``, computed in single precision at least."""
    precise = weight if weight.dtype == torch.float64 else weight.float()
    norms: Tensor = torch.linalg.vector_norm(precise, dim=1)
    return norms.to(weight.dtype)


class Delta(_Gated):
    """``y + scaling * D x`` for a change ``D`` of the weight; subclasses say which.

    With a magnitude ``m`` (DoRA, arXiv:2402.09353, equation 5) it is

        ``m * (W x + scaling * D x) / ||W + scaling * D|| + bias``

    with the norm of each row, which gradients take for a constant (section 4.3). What the
    projection has computed is used again: ``W x = y - bias``.
    """

    _learned = "lora_B"
    """A parameter that every part of the class has."""

    def __init__(self, projection: Projection, config: LoRAConfig) -> None:
        super().__init__(projection.in_features, config)
        self.dropout = nn.Dropout(config.dropout) if config.dropout else None
        self.m = Magnitude(projection.weight) if config.use_dora else None
        if config.use_dora:
            self.wants_own_result = True
            self.kept: Derived[Tensor] = Derived()

    def forward(self, hidden: Tensor, output: Tensor, projection: Projection) -> Tensor:
        """Maps the projection's input and result to the new result."""
        hidden = hidden.to(self.dtype)
        if self.gate is None and self.m is None:
            return self.added(self.dropped(hidden), output)
        product = self.product(self.dropped(hidden))
        change = (product * self.factor(hidden)).to(output.dtype)
        if self.m is None:
            return output + change
        return self.turned(output, change, self.ratio(projection), projection)

    def added(self, hidden: Tensor, output: Tensor) -> Tensor:
        """``y + scaling * D x``."""
        return plus(output, self.product(hidden), self.scaling)

    def dropped(self, hidden: Tensor) -> Tensor:
        """The input behind the dropout."""
        return hidden if self.dropout is None else self.dropout(hidden)

    @property
    def drops(self) -> float:
        """The probability of dropping an input."""
        return 0.0 if self.dropout is None else self.dropout.p

    def ratio(self, projection: Projection) -> Tensor:
        """``m / ||W + scaling * D||`` for each output, ``(out,)``, of a part with a magnitude."""
        read = (*self.modules(), projection.host, *getattr(self, "shared", ()))
        ratio = self.kept.get((), lambda: self._ratio(projection), "scaling", read=read)
        return self._ratio(projection) if ratio is None else ratio

    def _ratio(self, projection: Projection) -> Tensor:
        assert self.m is not None
        return self.m.over(self._norm_of(projection.weight))

    @staticmethod
    def turned(output: Tensor, change: Tensor, ratio: Tensor, projection: Projection) -> Tensor:
        """The projection's result and what is added to it, times that ratio."""
        ratio, bias = ratio.to(output.dtype), projection.bias
        bare = output if bias is None else output - bias
        # Written so that a ratio of one leaves the result as it is, bit for bit.
        return output + (ratio - 1) * bare + ratio * change

    def bank(self, parts: Sequence[LinearPart | None]) -> DeltaBank | None:
        alike = all(part is None or self._is_alike(part) for part in parts)
        return DeltaBank(parts) if alike else None  # type: ignore[arg-type]

    def _is_alike(self, part: LinearPart) -> bool:
        """Whether another part differs in its numbers only, so that both can be one product."""
        return (
            type(part) is type(self)
            and self.gate is None is part.gate
            and (self.m is None) == (part.m is None)
            and part.drops == self.drops
            and all(a.shape == b.shape for a, b in zip(part.factors(), self.factors(), strict=True))
        )

    @torch.no_grad()
    def _norm_of(self, weight: Tensor) -> Tensor:
        """``W + scaling * D``; a gate, which differs by row, leaves ``W + D``."""
        factor = self.scaling if self.gate is None else 1.0
        return weight.to(self.dtype) + factor * self.delta()

    def folded(self, weight: Tensor, bias: Tensor | None) -> Folded:
        direction = weight + self.scaling * self.delta().to(weight.dtype)
        if self.m is None:
            return direction, bias
        return self.m.over(direction).to(weight.dtype).unsqueeze(1) * direction, bias

    @property
    def dtype(self) -> torch.dtype:
        """The type in which the part computes."""
        dtype: torch.dtype = getattr(self, self._learned).dtype
        return dtype

    def product(self, hidden: Tensor) -> Tensor:
        """``D x``."""
        raise NotImplementedError

    def factors(self) -> tuple[Tensor, Tensor]:
        """``(r, in)`` and ``(out, r)``: the second times the first is ``D``."""
        raise NotImplementedError

    def delta(self) -> Tensor:
        """``D``, ``(out, in)``."""
        down, up = self.factors()
        return up @ down

    def origin(self, name: str) -> Tensor | float:
        if self.m is not None:
            raise UnsupportedError(
                "A DoRA has magnitudes, which start at those of the backbone; TIES and DARE are "
                "about parameters that start at zero. Use the linear strategy."
            )
        return super().origin(name)


class LowRank(Delta):
    """``D = B A``; `lora_A` is ``(r, in)``, `lora_B` is ``(out, r)`` (arXiv:2106.09685)."""

    def __init__(self, projection: Projection, config: LoRAConfig) -> None:
        super().__init__(projection, config)
        self.lora_A = nn.Parameter(torch.empty(config.r, projection.in_features))
        self.lora_B = nn.Parameter(torch.empty(projection.out_features, config.r))
        draw(self.lora_A, self.lora_B, config.init_weights)

    def prepared(self) -> Step | None:
        # Something else computes a factor that is no parameter.
        down, up = self._parameters.get("lora_A"), self._parameters.get("lora_B")
        plain = type(self) is LowRank and self.gate is None and self.m is None
        drops = self.dropout is not None and self.dropout.training and self.dropout.p
        if not plain or drops or down is None or up is None:
            return None
        scaling, linear = self.scaling, functional.linear

        def step(hidden: Tensor, output: Tensor) -> Tensor:
            if hidden.dtype != down.dtype:
                hidden = hidden.to(down.dtype)
            return plus_product(output, linear(hidden, down), up, scaling)

        return step

    def added(self, hidden: Tensor, output: Tensor) -> Tensor:
        if type(self).product is not LowRank.product:
            return super().added(hidden, output)
        inner = functional.linear(hidden, self.lora_A)
        return plus_product(output, inner, self.lora_B, self.scaling)

    def product(self, hidden: Tensor) -> Tensor:
        return functional.linear(functional.linear(hidden, self.lora_A), self.lora_B)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.lora_A, self.lora_B


class Anchored(LowRank):
    """``D = B A - B' A'``, where `initial_A` and `initial_B` are what A and B were at first.

    PiSSA (arXiv:2404.02948, equations 2 to 4) and OLoRA (arXiv:2406.01775, section 3) start from
    factors of the projection's weight and take their product out of it. Here the weight stays, and
    the product is taken out of the change.
    """

    def __init__(self, projection: Projection, config: LoRAConfig) -> None:
        super().__init__(projection, config)
        rank, smaller = config.r, min(projection.in_features, projection.out_features)
        if rank > smaller:
            raise UnsupportedError(
                f"init_weights={config.init_weights!r} takes r={rank} directions of a projection "
                f"that has {smaller}. Choose a smaller r."
            )
        if awaits_values():
            up, down = self.lora_B.detach(), self.lora_A.detach()
        else:
            up, down = factors(projection.weight.detach(), rank, config)
        self.lora_A, self.lora_B = nn.Parameter(down), nn.Parameter(up)
        self.register_buffer("initial_A", down.clone())
        self.register_buffer("initial_B", up.clone())
        self.initial_A: Tensor
        self.initial_B: Tensor

    def product(self, hidden: Tensor) -> Tensor:
        initial = functional.linear(functional.linear(hidden, self.initial_A), self.initial_B)
        return super().product(hidden) - initial

    def factors(self) -> tuple[Tensor, Tensor]:
        down = torch.cat([self.lora_A, self.initial_A])
        return down, torch.cat([self.lora_B, -self.initial_B], dim=1)

    def delta(self) -> Tensor:
        return self.lora_B @ self.lora_A - self.initial_B @ self.initial_A

    def origin(self, name: str) -> Tensor | float:
        super().origin(name)
        start = {"lora_A": self.initial_A, "lora_B": self.initial_B}
        return start.get(name, 0.0)


class Projections(nn.Module):
    """VeRA's frozen random matrices, as large as the largest projection; smaller ones use a part.

    Args:
        in_features, out_features: The largest widths.
        config: The configuration; its seed, or 0, says what is drawn.
    """

    def __init__(self, in_features: int, out_features: int, config: LoRAConfig) -> None:
        super().__init__()
        down, up = torch.empty(config.r, in_features), torch.empty(out_features, config.r)
        draw(down, up, "vera" if config.init_weights == "lora" else config.init_weights)
        self.own_dtype = config.dtype
        self.register_buffer("lora_A", down)
        self.register_buffer("lora_B", up)
        self.lora_A: Tensor
        self.lora_B: Tensor


class Vectors(Delta):
    """``D = diag(b) B diag(d) A`` (VeRA, arXiv:2310.11454, equation 2).

    `vera_D` is ``(r,)`` and `vera_B` is ``(out,)``, or both are square matrices.
    """

    _learned = "vera_B"

    def __init__(self, projection: Projection, config: LoRAConfig, shared: Projections) -> None:
        super().__init__(projection, config)
        self.shared = (shared,)  # in a tuple: not its own
        self.sizes = projection.in_features, projection.out_features
        d = torch.full((config.r,), 0.1 if config.vera_d is None else config.vera_d)
        b = torch.full((projection.out_features,), config.vera_b or 0.0)
        self.vera_D = nn.Parameter(d.diag() if config.vera_dense else d)
        self.vera_B = nn.Parameter(b.diag() if config.vera_dense else b)

    @property
    def matrices(self) -> tuple[Tensor, Tensor]:
        """The part of the shared matrices for this projection: ``(r, in)`` and ``(out, r)``."""
        shared, (in_features, out_features) = self.shared[0], self.sizes
        like = self.vera_B
        return shared.lora_A[:, :in_features].to(like), shared.lora_B[:out_features].to(like)

    def product(self, hidden: Tensor) -> Tensor:
        down, up = self.matrices
        inner = times(functional.linear(hidden, down), self.vera_D)
        return times(functional.linear(inner, up), self.vera_B)

    def factors(self) -> tuple[Tensor, Tensor]:
        down, up = self.matrices
        return times(down.T, self.vera_D).T, times(up.T, self.vera_B).T


def times(hidden: Tensor, factor: Tensor) -> Tensor:
    """Each hidden state times a diagonal, given as a vector, or a square matrix."""
    return hidden * factor if factor.ndim == 1 else functional.linear(hidden, factor)
