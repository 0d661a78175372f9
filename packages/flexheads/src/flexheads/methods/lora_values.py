"""The values that low-rank factors have at first."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from flexheads.methods.base import awaits_values
from flexheads.methods.lora_configs import LoRAConfig


@torch.no_grad()
def factors(weight: Tensor, rank: int, config: LoRAConfig) -> tuple[Tensor, Tensor]:
    """The factors ``(out, r)`` and ``(r, in)`` of a weight that PiSSA or OLoRA start from."""
    precise = weight if weight.dtype == torch.float64 else weight.float()
    if config.init_weights == "olora":
        q, upper = torch.linalg.qr(precise)
        up, down = q[:, :rank], upper[:rank]
    else:
        u, s, v = torch.linalg.svd(precise, full_matrices=False)
        root = (s[:rank] / config.scaling).sqrt()
        up, down = u[:, :rank] * root, root.unsqueeze(1) * v[:rank]
    return up.to(weight.dtype).contiguous(), down.to(weight.dtype).contiguous()


def draw(down: Tensor, up: Tensor, kind: str) -> None:
    """Initialises the factors ``(r, in)`` and ``(out, r)`` of a product."""
    if awaits_values():
        return
    if kind == "bert":
        nn.init.normal_(down, std=0.02)
        nn.init.normal_(up, std=0.02)
    elif kind == "ia3":
        nn.init.ones_(down)
        nn.init.ones_(up)
    elif kind == "vera":
        nn.init.kaiming_uniform_(down)
        nn.init.kaiming_uniform_(up)
    else:
        nn.init.kaiming_uniform_(down, a=math.sqrt(5))
        nn.init.zeros_(up)
