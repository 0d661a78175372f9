"""MTL-LoRA: low-rank adapters of several tasks, which may share their projections."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from flexheads.methods.lora_configs import MTLLoRAConfig
from flexheads.methods.lora_parts import Delta, times
from flexheads.methods.lora_values import draw
from flexheads.sites.projection import Projection


class TaskMatrix(nn.Module):
    """MTL-LoRA's matrix of a task: `values` is its diagonal ``(r,)``, or the whole ``(r, r)``."""

    def __init__(self, config: MTLLoRAConfig) -> None:
        super().__init__()
        ones = torch.ones(config.r)
        diagonal = config.task_specific_matrix_type == "singular_values"
        self.values = nn.Parameter(ones if diagonal else ones.diag())


class MultiTask(Delta):
    """``D = sum_i w_i B_i T A`` (MTL-LoRA, arXiv:2410.09437, equations 3 to 5).

    `lora_A` is ``(r, in)``; `lora_B` is ``(n, out, r)``; ``T`` is the task's own matrix; ``w`` is
    the softmax of `weights`, ``(n,)``, over the sharpness.
    """

    def __init__(self, projection: Projection, config: MTLLoRAConfig) -> None:
        super().__init__(projection, config)
        count, out = config.n_up_projection, projection.out_features
        self.lora_A = nn.Parameter(torch.empty(config.r, projection.in_features))
        self.lora_B = nn.Parameter(torch.zeros(count, out, config.r))
        draw(self.lora_A, self.lora_B, config.init_weights)
        self.weights = nn.Parameter(torch.ones(count))
        self.task_specific = TaskMatrix(config)
        self.sharpness = config.weights_sharpness

    @property
    def up(self) -> Tensor:
        """The weighted up-projection, ``(out, r)``."""
        weights = (self.weights / self.sharpness).softmax(dim=0)
        return (weights.view(-1, 1, 1) * self.lora_B).sum(dim=0)

    def product(self, hidden: Tensor) -> Tensor:
        inner = times(functional.linear(hidden, self.lora_A), self.task_specific.values)
        return functional.linear(inner, self.up)

    def factors(self) -> tuple[Tensor, Tensor]:
        return times(self.lora_A.T, self.task_specific.values).T, self.up
