"""OFT: a projection is given its input rotated, block by block."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor, nn

from flexheads.errors import ConfigError
from flexheads.methods import ProjectionConfig, ProjectionMethod, ProjectionPart
from flexheads.sites import AttachedLinear
from flexheads_orthogonal.rotations import apply_blocks, cayley, cayley_neumann, some


@dataclasses.dataclass(frozen=True, eq=False)
class OFTConfig(ProjectionConfig):
    """Orthogonal fine-tuning (Qiu et al. 2023, arXiv:2306.07280), with the fields of PEFT.

    Attributes:
        r: The number of blocks; 0 leaves it to `oft_block_size`. Exactly one of them is given.
        oft_block_size: The size of a block.
        module_dropout: The share of blocks that rotate nothing, drawn anew in each call in
            training.
        coft: Keep the rotation near the identity (the constrained variant, equation 7).
        eps: How near.
        block_share: Whether all blocks are the same.
        use_cayley_neumann: Compute the rotation by a series instead of a matrix inverse.
        num_cayley_neumann_terms: The number of terms of that series, 2 or more.
        init_weights: Whether it starts as the identity; else at random.
    """

    architecture: ClassVar[str | None] = "oft"

    r: int = 0
    oft_block_size: int = 32
    module_dropout: float = 0.0
    coft: bool = False
    eps: float = 6e-5
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = 5
    init_weights: bool = True

    def problems(self) -> list[str]:
        wrong = super().problems()
        if min(self.r, self.oft_block_size) < 0 or (self.r == 0) == (self.oft_block_size == 0):
            wrong.append(
                f"give one of r={self.r!r} and oft_block_size={self.oft_block_size!r}, "
                "and 0 for the other"
            )
        if not 0.0 <= self.module_dropout < 1.0:
            wrong.append(f"module_dropout={self.module_dropout!r} must be in [0, 1)")
        if not self.eps > 0:
            wrong.append(f"eps={self.eps!r} must be positive")
        if self.num_cayley_neumann_terms < 2:
            wrong.append("num_cayley_neumann_terms must be at least 2; one term rotates nothing")
        return wrong


class BlockRotation(ProjectionPart):
    """``y = W R' x + b`` with a block-diagonal rotation R.

    `weight` holds what is above the diagonals of skew-symmetric matrices, ``(blocks, size * (size -
    1) / 2)``.

    Args:
        in_features: Width of the projection's input.
        size: The size of a block.
        config: The configuration.
    """

    changes_input, changes_output = True, False
    upper: Tensor

    def __init__(self, in_features: int, size: int, config: OFTConfig) -> None:
        super().__init__()
        self.config, self.in_features, self.size = config, in_features, size
        blocks = 1 if config.block_share else in_features // size
        self.weight = nn.Parameter(torch.zeros(blocks, size * (size - 1) // 2))
        if not config.init_weights:
            nn.init.normal_(self.weight, std=0.1)
        self.register_buffer("upper", torch.triu_indices(size, size, 1), persistent=False)

    def skew(self) -> Tensor:
        """The skew-symmetric matrices, ``(blocks, size, size)``."""
        empty = self.weight.new_zeros(self.weight.shape[0], self.size, self.size)
        block = torch.arange(len(empty), device=empty.device).unsqueeze(1)
        above = empty.index_put((block, self.upper[0], self.upper[1]), self._vectors())
        return above - above.transpose(-2, -1)

    def _vectors(self) -> Tensor:
        """The weight; for the constrained variant its projection into the ball that is allowed.

        As projected gradient descent has it, gradients pass the projection as they are, and the
        weight itself is moved in training.
        """
        if not self.config.coft:
            return self.weight
        with torch.no_grad():
            bound = self.config.eps / self.weight.shape[0] ** 0.5
            norm = (2 * self.weight.square().sum(dim=1, keepdim=True)).sqrt()  # of the matrix
            allowed = torch.where(norm > bound, self.weight * (bound / norm), self.weight)
            step = allowed - self.weight
        moved = self.weight + step
        if self.training:
            with torch.no_grad():
                self.weight.copy_(allowed)
        return moved

    def rotations(self) -> Tensor:
        """The blocks of R, ``(blocks, size, size)``."""
        config = self.config
        if config.use_cayley_neumann:
            return cayley_neumann(self.skew(), config.num_cayley_neumann_terms)
        return cayley(self.skew())

    def enter(self, hidden: Tensor) -> Tensor:
        """Rotates what the projection is given: ``(batch, sequence, in_features)`` both ways."""
        blocks = self.rotations()
        if self.training and self.config.module_dropout and len(blocks) > 1:
            idle = some(len(blocks), self.config.module_dropout, blocks.device)
            identity = torch.eye(self.size, device=blocks.device, dtype=blocks.dtype)
            blocks = torch.where(idle, identity, blocks)
        return apply_blocks(hidden, blocks)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        blocks = self.rotations()
        return apply_blocks(weight, blocks.transpose(-2, -1)), bias


class OFTMethod(ProjectionMethod):
    """Puts a `BlockRotation` at the projections that the configuration names."""

    config: OFTConfig

    def part(self, site: AttachedLinear) -> BlockRotation:
        """Builds the rotation for one projection.

        Raises:
            ConfigError: If its input cannot be cut into such blocks.
        """
        config, width = self.config, site.in_features
        given = config.r or config.oft_block_size
        if width % given:
            name = "r" if config.r else "oft_block_size"
            fitting = [n for n in range(1, width + 1) if width % n == 0]
            raise ConfigError(
                f"{name}={given} does not divide the {width} features that enter {site.address}; "
                f"these do: {', '.join(map(str, fitting))}."
            )
        return BlockRotation(width, width // config.r if config.r else given, config)
