"""New adapters and heads from the weights of others."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from flexheads.checkpoints.transfer import fill
from flexheads.errors import ConfigError, UnknownNameError
from flexheads.methods.average import STRATEGIES, combine
from flexheads.methods.base import Adapter, to_be_filled
from flexheads.methods.config import AdapterConfig
from flexheads.models.adapters.mixin import AdapterModelMixin

Names = Sequence[str] | Mapping[str, float]


class AveragingMixin(AdapterModelMixin):
    """``average_adapter``, and ``average_head`` where there are flexible heads."""

    def average_adapter(
        self,
        adapter_name: str,
        adapter_list: Names,
        weights: Sequence[float] | None = None,
        combine_strategy: str = "linear",
        normalize_weights: bool = True,
        overwrite_ok: bool = False,
        set_active: bool = False,
        svd_rank: int | None = None,
        density: float | None = None,
        seed: int | None = None,
    ) -> None:
        """Adds an adapter that is made of the weights of others.

        Args:
            adapter_name: Its name.
            adapter_list: The adapters, of one configuration; a mapping gives their weights too.
            weights: The weight of each; None is the same for all.
            combine_strategy: How they are put together; see `flexheads.methods.average.combine`.
            normalize_weights: Divide the weights by their sum.
            overwrite_ok: Replace an adapter of that name.
            set_active: Activate it.
            svd_rank: The rank of the result of ``"lora_delta_w_svd"``, which scales as any LoRA
                of that rank and `alpha` does.
            density: The share of parameters that ``"ties"`` and ``"dare"`` keep; None is what
                their papers use, 0.2 and 0.1.
            seed: Seed of what ``"dare"`` draws.

        Raises:
            ConfigError: If the name is taken, there is no adapter to average, their configurations
                differ, or weights, rank and density have no meaning.
            UnknownNameError: If an adapter or the strategy does not exist.
            UnsupportedError: If the strategy does not go with the method.
        """
        self._refuse_taken("adapter", adapter_name, overwrite_ok)
        weighted = _weighted(adapter_list, weights, normalize_weights, "adapter")
        members = [self.adapters[name] for name in weighted]
        config = _average_config(members, combine_strategy, svd_rank)
        how: Any = {"rank": svd_rank, "density": density, "seed": seed}
        tensors = combine(members, list(weighted.values()), combine_strategy, **how)
        with to_be_filled():
            adapter = self._build_adapter(adapter_name, config)
        fill(adapter, tensors, f"the average {adapter_name!r}")
        self._install(adapter)
        if set_active:
            self.set_active_adapters(adapter_name)

    def average_head(
        self,
        head_name: str,
        head_list: Names,
        weights: Sequence[float] | None = None,
        normalize_weights: bool = True,
        overwrite_ok: bool = False,
        set_active: bool = False,
    ) -> None:
        """Adds a head that is the weighted mean of others.

        Args:
            head_name: Its name.
            head_list: The heads, of one type and configuration; a mapping gives their weights too.
            weights: The weight of each; None is the same for all.
            normalize_weights: Divide the weights by their sum.
            overwrite_ok: Replace a head of that name.
            set_active: Make it the active head.

        Raises:
            ConfigError: If the name is taken, there is no head to average, or they differ in more
                than their weights.
            UnknownNameError: If a head does not exist.
        """
        model: Any = self
        if not hasattr(self, "heads"):
            raise ConfigError(f"{type(self).__name__} has a head of its own, so no named heads.")
        self._refuse_taken("head", head_name, overwrite_ok)
        weighted = _weighted(head_list, weights, normalize_weights, "head")
        heads = [model.heads[name] for name in weighted]
        _refuse_different(
            {name: model.heads[name].to_dict() for name in weighted}, ("dropout_prob",)
        )
        head = copy.deepcopy(heads[0])
        head.name = head_name
        states = [each.state_dict() for each in heads]
        mean = {
            key: sum(w * state[key] for w, state in zip(weighted.values(), states, strict=True))
            for key in states[0]
        }
        fill(head, mean, f"the average {head_name!r}")
        model._install_head(head)
        if set_active:
            model.active_head = head_name


def _average_config(
    members: Sequence[Adapter], strategy: str, svd_rank: int | None
) -> AdapterConfig:
    """The configuration of an average.

    Raises:
        ConfigError: If those of the members differ, or there is no meaning in the rank.
        UnknownNameError: If there is no such strategy.
    """
    if strategy not in STRATEGIES:
        raise UnknownNameError("combine_strategy", strategy, STRATEGIES)
    _refuse_different(
        {adapter.name: adapter.config.to_dict() for adapter in members},
        ("dropout", "init_weights"),
    )
    if strategy == "lora_delta_w_svd":
        if svd_rank is None or svd_rank < 1:
            raise ConfigError(f"lora_delta_w_svd needs a positive svd_rank, not {svd_rank!r}.")
        rank = {"r": svd_rank} if "r" in members[0].config else {}
        return members[0].config.replace(**rank)
    if svd_rank is not None:
        raise ConfigError("svd_rank is for combine_strategy='lora_delta_w_svd'.")
    return members[0].config


def _weighted(
    names: Names, weights: Sequence[float] | None, normalize: bool, kind: str
) -> dict[str, float]:
    """The weight of each name.

    Raises:
        ConfigError: If there is no name, or the weights do not fit.
    """
    if isinstance(names, str) or not names:
        raise ConfigError(f"Give the {kind}s to average as a list of names, not {names!r}.")
    if isinstance(names, Mapping):
        if weights is not None:
            raise ConfigError("Give the weights in the mapping, or in `weights`, but not in both.")
        weights = list(names.values())
    weights = [1.0 / len(names)] * len(names) if weights is None else list(weights)
    if len(weights) != len(names) or len(set(names)) != len(names):
        raise ConfigError(
            f"{len(names)} {kind}s ({', '.join(names)}) need as many weights, and each its own "
            f"name; there are {len(weights)} weights."
        )
    total = sum(weights) if normalize else 1.0
    if total == 0:
        raise ConfigError("The weights sum up to zero; pass normalize_weights=False.")
    return {name: weight / total for name, weight in zip(names, weights, strict=True)}


def _refuse_different(configs: Mapping[str, Mapping[str, Any]], ignored: Sequence[str]) -> None:
    """Raises where configurations differ in a field that counts.

    Raises:
        ConfigError: If they do; it names the fields.
    """
    first, *others = configs
    for other in others:
        one, two = configs[first], configs[other]
        keys = [k for k in dict.fromkeys([*one, *two]) if k not in ignored]
        if wrong := [k for k in keys if one.get(k) != two.get(k)]:
            raise ConfigError(
                f"{first!r} and {other!r} differ in {', '.join(wrong)}, so their weights have no "
                "mean."
            )
