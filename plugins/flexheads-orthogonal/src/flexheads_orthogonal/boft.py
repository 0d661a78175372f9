"""BOFT: the rotation of a projection's input as a product of sparse ones, and a scale."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor, nn

from flexheads.errors import ConfigError
from flexheads.methods import ProjectionConfig, ProjectionMethod, ProjectionPart
from flexheads.sites import AttachedLinear, Projection
from flexheads_orthogonal.rotations import apply_blocks, cayley, some


@dataclasses.dataclass(frozen=True, eq=False)
class BOFTConfig(ProjectionConfig):
    """Orthogonal butterfly (Liu et al. 2024, arXiv:2311.06243), with the fields of PEFT.

    Attributes:
        boft_block_size: The size of a block; 0 leaves it to `boft_block_num`. Exactly one of them
            is given.
        boft_block_num: The number of blocks.
        boft_n_butterfly_factor: The number of sparse rotations; one is a block-diagonal one, and
            each further one lets twice as many features meet.
        boft_dropout: The share of blocks of one sparse rotation that rotate nothing, both drawn
            anew in each call in training.
        init_weights: Whether it starts as the identity; else at random.
    """

    architecture: ClassVar[str | None] = "boft"

    boft_block_size: int = 4
    boft_block_num: int = 0
    boft_n_butterfly_factor: int = 1
    boft_dropout: float = 0.0
    init_weights: bool = True

    def problems(self) -> list[str]:
        wrong = super().problems()
        size, number = self.boft_block_size, self.boft_block_num
        if min(size, number) < 0 or (size == 0) == (number == 0):
            wrong.append(
                f"give one of boft_block_size={size!r} and boft_block_num={number!r}, "
                "and 0 for the other"
            )
        if self.boft_n_butterfly_factor < 1:
            wrong.append("boft_n_butterfly_factor must be at least 1")
        if not 0.0 <= self.boft_dropout < 1.0:
            wrong.append(f"boft_dropout={self.boft_dropout!r} must be in [0, 1)")
        return wrong


def butterfly(width: int, size: int, level: int) -> Tensor:
    """The order of features in which a level of the butterfly sees its blocks: ``(width,)``.

    Groups of ``2^level`` blocks are cut into halves of blocks; in each group the even halves come
    first, then the odd ones, so that a block of this level takes one half of two blocks that lie
    ``2^(level - 1)`` apart (figure 4 of the paper). Level 0 is the order as it is.

    Args:
        width: The number of features.
        size: The size of a block.
        level: The level.
    """
    if level == 0:
        return torch.arange(width)
    halves = torch.arange(width).view(-1, 2**level, 2, size // 2)
    return halves.transpose(1, 2).flatten()


class ButterflyRotation(ProjectionPart):
    """``y = s * (W R' x) + b`` with a rotation R that is a product of sparse ones.

    ``R = B_m ... B_1``, every B block-diagonal in an order of its own (equation 5 of the paper).

    `boft_R` is ``(m, blocks, size, size)``, of which the skew-symmetric part counts; `boft_s` is
    ``(out, 1)``.

    Args:
        in_features: Width of the projection's input.
        out_features: Width of its result.
        size: The size of a block.
        config: The configuration.
    """

    changes_input, changes_output = True, True
    order: Tensor
    back: Tensor

    def __init__(self, in_features: int, out_features: int, size: int, config: BOFTConfig) -> None:
        super().__init__()
        self.dropout, levels = config.boft_dropout, config.boft_n_butterfly_factor
        self.boft_R = nn.Parameter(torch.zeros(levels, in_features // size, size, size))
        self.boft_s = nn.Parameter(torch.ones(out_features, 1))
        if not config.init_weights:
            nn.init.normal_(self.boft_R, std=0.1)
            nn.init.normal_(self.boft_s, mean=1.0, std=0.1)
        order = torch.stack([butterfly(in_features, size, level) for level in range(levels)])
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("back", order.argsort(dim=1), persistent=False)

    def _rotations(self) -> Tensor:
        """The blocks of every B, ``(m, blocks, size, size)``."""
        return cayley(0.5 * (self.boft_R - self.boft_R.transpose(-2, -1)))

    def _rotate(self, hidden: Tensor, rotations: Tensor) -> Tensor:
        """Multiplies ``(..., in_features)`` with R, from the right."""
        for level in reversed(range(len(rotations))):
            if level == 0:
                return apply_blocks(hidden, rotations[0])
            hidden = apply_blocks(hidden[..., self.back[level]], rotations[level])
            hidden = hidden[..., self.order[level]]
        return hidden

    def enter(self, hidden: Tensor) -> Tensor:
        """Rotates what the projection is given: ``(batch, sequence, in_features)`` both ways."""
        rotations = self._rotations()
        if self.training and self.dropout:
            levels, number, size, _ = rotations.shape
            level = torch.randint(0, levels, (1,), device=rotations.device)
            here = torch.arange(levels, device=rotations.device).view(-1, 1, 1, 1) == level
            idle = here & some(number, self.dropout, rotations.device)
            identity = torch.eye(size, device=rotations.device, dtype=rotations.dtype)
            rotations = torch.where(idle, identity, rotations)
        return self._rotate(hidden, rotations)

    def forward(self, hidden: Tensor, output: Tensor, projection: Projection) -> Tensor:
        """Scales the projection's result, all but its bias."""
        bias, scale = projection.bias, self.boft_s.squeeze(-1)
        return output * scale if bias is None else (output - bias) * scale + bias

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        identity = torch.eye(weight.shape[1], device=weight.device, dtype=weight.dtype)
        rotation = self._rotate(identity, self._rotations())
        return (weight @ rotation.t()) * self.boft_s, bias


class BOFTMethod(ProjectionMethod):
    """Puts a `ButterflyRotation` at the projections that the configuration names."""

    config: BOFTConfig

    def part(self, site: AttachedLinear) -> ButterflyRotation:
        """Builds the rotation for one projection.

        Raises:
            ConfigError: If its input cannot be cut into such blocks, or they cannot be paired.
        """
        config, width = self.config, site.in_features
        given = config.boft_block_size or config.boft_block_num
        if width % given:
            name = "boft_block_size" if config.boft_block_size else "boft_block_num"
            fitting = [n for n in range(1, width + 1) if width % n == 0]
            raise ConfigError(
                f"{name}={given} does not divide the {width} features that enter {site.address}; "
                f"these do: {', '.join(map(str, fitting))}."
            )
        size = config.boft_block_size or width // given
        further, number = config.boft_n_butterfly_factor - 1, width // size
        if further and (size % 2 or number % 2**further):
            raise ConfigError(
                f"boft_n_butterfly_factor={further + 1} needs blocks of an even size, and "
                f"{2**further} or a multiple of them; {site.address} has {number} of size {size}."
            )
        return ButterflyRotation(width, site.out_features, size, config)
