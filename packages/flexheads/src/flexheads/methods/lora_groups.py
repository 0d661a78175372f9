"""Optimiser groups for two ways of training low-rank adapters."""

from __future__ import annotations

from typing import Any

from torch import nn

from flexheads.errors import ConfigError

Group = dict[str, Any]
"""One entry of the list that every optimiser of torch takes: ``{"params": [...], "lr": ...}``."""


def lora_plus_groups(
    model: nn.Module, lr: float, ratio: float = 16.0, weight_decay: float = 0.0
) -> list[Group]:
    """Groups for LoRA+ (Hayou et al. 2024, arXiv:2402.12354): matrix B learns faster than A.

    Every trainable parameter is in one group; all but the B matrices learn with `lr`.

    Args:
        model: The model, with what is to be trained trainable.
        lr: The learning rate of A, heads and everything else.
        ratio: The learning rate of B over that of A; the paper suggests about 16.
        weight_decay: The weight decay of all groups.

    Raises:
        ConfigError: If there is no trainable B, or `ratio` is not positive.
    """
    if not ratio > 0:
        raise ConfigError(f"ratio={ratio!r} must be positive.")
    products = _products(model, "lora_B")
    up = [p for name, p in _trainable(model) if name in products]
    chosen = {id(p) for p in up}
    rest = [p for _, p in _trainable(model) if id(p) not in chosen]
    groups = [{"params": rest, "lr": lr}, {"params": up, "lr": lr * ratio}]
    return [{**group, "weight_decay": weight_decay} for group in groups if group["params"]]


def lora_fa_groups(model: nn.Module, lr: float, weight_decay: float = 0.0) -> list[Group]:
    """The group for LoRA-FA (Zhang et al. 2023, arXiv:2308.03303): matrix A stays as it is.

    The A matrices stop to require gradients, so that their inputs need not be kept for the
    backward pass; ``train_adapter`` lets them learn again.

    Args:
        model: The model, with what is to be trained trainable.
        lr: The learning rate.
        weight_decay: The weight decay.

    Raises:
        ConfigError: If there is no trainable B.
    """
    products = _products(model, "lora_A")
    for name, parameter in _trainable(model):
        if name in products:
            parameter.requires_grad_(False)
    params = [parameter for _, parameter in _trainable(model)]
    return [{"params": params, "lr": lr, "weight_decay": weight_decay}]


def _trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The trainable parameters with their names.

    Raises:
        ConfigError: If no B is among them.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    products = _products(model, "lora_B")
    if not any(name in products for name, _ in named):
        raise ConfigError(
            "No low-rank adapter is trainable. Call train_adapter(name) before making groups."
        )
    return named


def _products(model: nn.Module, word: str) -> set[str]:
    """The names of the parameters of that word where a module has both factors of a product."""
    names = {name for name, _ in model.named_parameters()}
    stems = {name.rpartition(".")[0] for name in names if name.endswith(".lora_A")}
    return {f"{stem}.{word}" for stem in stems if f"{stem}.lora_B" in names}
