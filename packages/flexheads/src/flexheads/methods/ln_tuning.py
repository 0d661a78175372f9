"""LN tuning: layer norms with weights and biases of their own."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PretrainedConfig

from flexheads.errors import ConfigError, UnsupportedError
from flexheads.methods.base import AdapterMethod, check_leave_out, lacking
from flexheads.methods.config import AdapterConfig
from flexheads.sites.base import AttachedSite
from flexheads.sites.output import OutputPart


@dataclasses.dataclass(frozen=True, eq=False)
class LNTuningConfig(AdapterConfig):
    """Tuning of layer norms alone (Zhao et al. 2024, arXiv:2312.11420).

    Attributes:
        leave_out: Numbers of the layers whose norms stay as they are.
        outside: Whether norms outside of the layers, such as a last one, are tuned too.
    """

    architecture: ClassVar[str | None] = "ln_tuning"

    leave_out: Sequence[int] = ()
    outside: bool = True


class OwnNorm(OutputPart):
    """The layer norm with parameters of its own, at first those of the model's.

    Behind another one in a chain it takes its place: both compute from what the model's norm gets.

    Args:
        host: The model's norm, of any class; what else it has, such as epsilon, is copied.
    """

    def __init__(self, host: nn.Module) -> None:
        super().__init__()
        self.norm = without_hooks(host).requires_grad_(True)

    def forward(self, given: Tensor, output: Tensor) -> Tensor:
        """The norm of what the model's norm was given; shapes stay."""
        normed: Tensor = self.norm(given)
        return normed


class LNTuningMethod(AdapterMethod):
    """Puts an `OwnNorm` at each layer norm."""

    config: LNTuningConfig

    def build(
        self, sites: Mapping[str, AttachedSite], model_config: PretrainedConfig
    ) -> dict[str, nn.Module]:
        config = self.config
        check_leave_out(config.leave_out, sites)
        norms = [site for site in sites.values() if site.kind == "norm"]
        if not norms:
            raise lacking("LN tuning", ["norms"])
        chosen = [
            site
            for site in norms
            if (config.outside if site.layer is None else site.layer not in config.leave_out)
        ]
        if not chosen:
            raise ConfigError("leave_out names every layer, so this LNTuningConfig tunes nothing.")
        for site in chosen:
            weights = list(site.host.parameters())
            if not weights or any(weight.is_meta for weight in weights):
                raise UnsupportedError(
                    f"The norm at {site.address} has no weights to start from: it has none at "
                    "all, or they are kept elsewhere. Leave its layer out, or load the model "
                    "without offloading."
                )
        return {site.address: OwnNorm(site.host) for site in chosen}

    def merged(
        self, part: nn.Module, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        assert isinstance(part, OwnNorm)
        norm: Any = part.norm
        return norm.weight, None if bias is None else norm.bias


def without_hooks(host: nn.Module) -> nn.Module:
    """A copy of a module, without the hooks that are registered on it.

    They lead to whole models, which must be neither copied nor called.
    """
    kept = vars(host)
    left = {id(h): type(h)() for name, h in kept.items() if "_hooks" in name and h is not None}
    if "_hf_hook" in kept:
        left[id(kept["_hf_hook"])] = ()
    copied = copy.deepcopy(host, left)
    for name in ("_hf_hook", "_old_forward", "forward"):  # what accelerate wraps a module in
        vars(copied).pop(name, None)
    return copied
