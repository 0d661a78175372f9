"""Configurations of low-rank adaptation and its relatives."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch

from flexheads.errors import ConfigError
from flexheads.methods.config import AdapterConfig

MATRICES = {"q": "query", "k": "key", "v": "value", "o": "attention_output"}
"""The projection of an attention that each letter of ``attn_matrices`` stands for."""

ANCHORED = ("pissa", "olora")
"""Initialisations from the projection's own weight, which act by what they have changed since."""

_INITS = ("lora", "bert", "ia3", "vera", *ANCHORED)


@dataclasses.dataclass(frozen=True, eq=False)
class LoRAConfig(AdapterConfig):
    """Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685).

    Attributes:
        selfattn_lora: Adapt the attention projections that `attn_matrices` names, those of a
            decoder's cross-attention included.
        intermediate_lora: Adapt the first projection of the feed-forward network.
        output_lora: Adapt its second projection.
        leave_out: Numbers of the layers that get no adapter.
        r: The rank.
        alpha: Numerator of the scaling ``alpha / r``.
        dropout: Dropout on the input of the product.
        attn_matrices: Any of ``"q", "k", "v", "o"``.
        composition_mode: ``"add"`` adds the product to the projection's result; ``"scale"``
            multiplies the result with a vector (IA3, Liu et al. 2022, arXiv:2205.05638).
        init_weights: ``"lora"`` (B zero), ``"bert"`` (normal, 0.02), ``"ia3"`` (ones), ``"vera"``
            (both uniform), ``"pissa"`` (the largest singular vectors of the projection, Meng et al.
            2024, arXiv:2404.02948) or ``"olora"`` (its QR factors, Büyükakyüz 2024,
            arXiv:2406.01775). The last two add the product less the product that they start with,
            so that the backbone stays as it is.
        init_weights_seed: Seed for each part; for VeRA that of the shared matrices, None is 0.
        use_gating: A learned gate, averaged over the sequence, in place of the scaling (UniPELT).
        use_dora: A learned magnitude for each output (DoRA, Liu et al. 2024, arXiv:2402.09353).
        vera_d, vera_b: If one is a number: shared random matrices, and learned vectors that start
            at these values (VeRA, Kopiczko et al. 2023, arXiv:2310.11454). The other is then 0.1
            for `vera_d` and 0 for `vera_b`.
        vera_dense: Learned square matrices in place of VeRA's vectors, as files of the `adapters`
            library can hold.
        dtype: Name of the torch type of the parameters; None is that of the projection.
        rank_stabilized: Scale by ``alpha / sqrt(r)`` instead (Kalajdzievski 2023,
            arXiv:2312.03732).
    """

    architecture: ClassVar[str | None] = "lora"

    selfattn_lora: bool = True
    intermediate_lora: bool = False
    output_lora: bool = False
    leave_out: Sequence[int] = ()
    r: int = 8
    alpha: float = 8
    dropout: float = 0.0
    attn_matrices: Sequence[str] = ("q", "v")
    composition_mode: Literal["add", "scale"] = "add"
    init_weights: str = "lora"
    init_weights_seed: int | None = None
    use_gating: bool = False
    use_dora: bool = False
    vera_d: float | None = None
    vera_b: float | None = None
    dtype: str | None = None
    rank_stabilized: bool = False
    vera_dense: bool = False

    def __post_init__(self) -> None:
        if wrong := [*self._wrong_values(), *self._wrong_together()]:
            raise ConfigError(f"{type(self).__name__}: {'; '.join(wrong)}.")

    def _wrong_values(self) -> list[str]:
        wrong = []
        if self.r != int(self.r) or self.r < 1:
            wrong.append(f"r={self.r!r} must be a positive whole number")
        if self.composition_mode not in ("add", "scale"):
            wrong.append(f'composition_mode={self.composition_mode!r} is neither "add" nor "scale"')
        if self.init_weights not in _INITS:
            wrong.append(f"init_weights={self.init_weights!r} is unknown; known are {_INITS}")
        if unknown := [m for m in self.attn_matrices if m not in MATRICES]:
            wrong.append(f"attn_matrices names {unknown}; known are {list(MATRICES)}")
        if not 0.0 <= self.dropout < 1.0:
            wrong.append(f"dropout={self.dropout!r} must be in [0, 1)")
        dtype = None if self.dtype is None else getattr(torch, self.dtype, None)
        if self.dtype is not None and not getattr(dtype, "is_floating_point", False):
            wrong.append(f'dtype={self.dtype!r} names no type of torch; write "bfloat16"')
        return wrong

    def _wrong_together(self) -> list[str]:
        wrong = []
        if self.composition_mode == "scale":
            if self.r != 1 or self.dropout:
                wrong.append('composition_mode="scale" is a vector: it needs r=1 and no dropout')
            if self.use_dora or self.is_vera:
                wrong.append('composition_mode="scale" goes with neither DoRA nor VeRA')
            if self.init_weights in (*ANCHORED, "vera"):
                wrong.append(f'composition_mode="scale" has no init_weights={self.init_weights!r}')
        elif self.init_weights in ANCHORED and self.is_vera:
            wrong.append(f"init_weights={self.init_weights!r} has nothing to act on in VeRA")
        return wrong

    @property
    def is_vera(self) -> bool:
        """Whether random matrices are shared and only vectors are learned."""
        return self.vera_d is not None or self.vera_b is not None

    @property
    def scaling(self) -> float:
        """The factor on the product."""
        if self.composition_mode == "scale":
            return self.alpha
        return self.alpha / (math.sqrt(self.r) if self.rank_stabilized else self.r)

    @property
    def roles(self) -> list[str]:
        """The projections that it adapts; those of a cross-attention come on top."""
        roles = [MATRICES[matrix] for matrix in self.attn_matrices] if self.selfattn_lora else []
        return roles + ["mlp_in"] * self.intermediate_lora + ["mlp_out"] * self.output_lora


@dataclasses.dataclass(frozen=True, eq=False)
class IA3Config(LoRAConfig):
    """IA3: learned vectors scale keys, values and the feed-forward (arXiv:2205.05638)."""

    intermediate_lora: bool = True
    r: int = 1
    alpha: float = 1
    attn_matrices: Sequence[str] = ("k", "v")
    composition_mode: Literal["add", "scale"] = "scale"
    init_weights: str = "ia3"


@dataclasses.dataclass(frozen=True, eq=False)
class VeraConfig(LoRAConfig):
    """VeRA: learned vectors between shared random matrices (arXiv:2310.11454)."""

    vera_d: float | None = 0.1
    vera_b: float | None = 0.0
    init_weights: str = "vera"


@dataclasses.dataclass(frozen=True, eq=False)
class DoRAConfig(LoRAConfig):
    """DoRA: low-rank direction and learned magnitude (arXiv:2402.09353)."""

    use_dora: bool = True


@dataclasses.dataclass(frozen=True, eq=False)
class DvoRAConfig(LoRAConfig):
    """DVoRA: DoRA whose direction is VeRA's (arXiv:2402.09353, section 5.5)."""

    use_dora: bool = True
    vera_d: float | None = 0.1
    vera_b: float | None = 0.0
    init_weights: str = "vera"


@dataclasses.dataclass(frozen=True, eq=False)
class MTLLoRAConfig(LoRAConfig):
    """MTL-LoRA (Yang et al. 2024, arXiv:2410.09437): several up-projections, one matrix per task.

    Attributes:
        n_up_projection: Number of up-projections, which are averaged by learned weights.
        task_specific_matrix_type: The matrix between the projections: ``"singular_values"`` is a
            diagonal, ``"linear"`` a whole matrix.
        weights_sharpness: Temperature of the softmax over the learned weights.
    """

    architecture: ClassVar[str | None] = "mtl_lora"

    n_up_projection: int = 1
    task_specific_matrix_type: Literal["singular_values", "linear"] = "singular_values"
    weights_sharpness: float = 0.05

    def _wrong_values(self) -> list[str]:
        wrong = super()._wrong_values()
        kind: Any = self.task_specific_matrix_type
        if kind not in ("singular_values", "linear"):
            wrong.append(
                f'task_specific_matrix_type={kind!r} is neither "singular_values" nor "linear"'
            )
        if self.n_up_projection != int(self.n_up_projection) or self.n_up_projection < 1:
            wrong.append(f"n_up_projection={self.n_up_projection!r} must be 1 or more")
        if not self.weights_sharpness > 0:
            wrong.append(f"weights_sharpness={self.weights_sharpness!r} must be positive")
        return wrong

    def _wrong_together(self) -> list[str]:
        wrong = super()._wrong_together()
        if self.composition_mode == "scale" or self.is_vera or self.init_weights in ANCHORED:
            wrong.append("MTL-LoRA goes with neither a scaling vector, VeRA, PiSSA nor OLoRA")
        return wrong
