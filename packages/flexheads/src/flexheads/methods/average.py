"""The weights of several adapters put together into those of one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flexheads.errors import ConfigError, UnsupportedError
from flexheads.methods.base import Adapter, seeded
from flexheads.methods.lora_parts import LowRank

STRATEGIES = ("linear", "lora_linear_only_negate_b", "lora_delta_w_svd", "ties", "dare")

Tensors = dict[str, Tensor]

_DENSITY = {"ties": 0.2, "dare": 0.1}


@torch.no_grad()
def combine(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    strategy: str,
    *,
    rank: int | None = None,
    density: float | None = None,
    seed: int | None = None,
) -> Tensors:
    """The tensors of the combined adapter, by logical address.

    * ``linear``: the weighted sum of every tensor.
    * ``lora_linear_only_negate_b``: of LoRA; a negative weight negates B alone, so that it negates
      the product (Zhang et al. 2023, arXiv:2306.14870).
    * ``lora_delta_w_svd``: of LoRA; the leading singular vectors of the weighted sum of the
      products ``B A``: ``A = V``, ``B = U S``.
    * ``ties``: TIES (Yadav et al. 2023, arXiv:2306.01708, section 4).
    * ``dare``: DARE (Yu et al. 2023, arXiv:2311.03099, section 3.1), then the weighted sum.

    Args:
        adapters: The adapters, of one configuration.
        weights: The weight of each.
        strategy: One of `STRATEGIES`.
        rank: The rank of the result of ``lora_delta_w_svd``.
        density: The share of parameters that ``ties`` and ``dare`` keep.
        seed: Seed of what ``dare`` draws.

    Raises:
        ConfigError: If the adapters have other tensors, or `density` is no share.
        UnsupportedError: If the strategy does not go with the method.
    """
    states = [adapter.state_dict() for adapter in adapters]
    shapes = [{key: t.shape for key, t in state.items()} for state in states]
    if any(own != shapes[0] for own in shapes):
        raise ConfigError("The adapters have tensors of other names or shapes.")
    if strategy in _DENSITY:
        kept = _DENSITY[strategy] if density is None else density
        if not 0 < kept <= 1:
            raise ConfigError(f"density={kept!r} must be above 0 and at most 1.")
        return _sparse(adapters, states, weights, strategy, kept, seed)
    if density is not None:
        raise ConfigError('density is for combine_strategy="ties" and "dare".')
    if strategy == "linear":
        return _sum(states, weights)
    _refuse_others(adapters[0], strategy)
    if strategy == "lora_delta_w_svd":
        return _svd(adapters, weights, rank or 1)
    ups, downs = _sum(states, weights), _sum(states, [abs(weight) for weight in weights])
    return {key: (ups if key.endswith("lora_B") else downs)[key] for key in ups}


def _refuse_others(adapter: Adapter, strategy: str) -> None:
    """Raises where an adapter has more than the two factors of a LoRA at each site.

    Raises:
        UnsupportedError: If it does.
    """
    parts = adapter.parts.values()
    if any(type(p) is not LowRank or p.gate is not None or p.m is not None for p in parts):
        raise UnsupportedError(
            f'combine_strategy={strategy!r} is about plain LoRA; use "linear" for this adapter.'
        )


def _sum(states: Sequence[Tensors], weights: Sequence[float]) -> Tensors:
    return {
        key: torch.stack([w * s[key] for w, s in zip(weights, states, strict=True)]).sum(dim=0)
        for key in states[0]
    }


def _svd(adapters: Sequence[Adapter], weights: Sequence[float], rank: int) -> Tensors:
    """The leading factors of the weighted sum of the products ``B A`` at each site."""
    found: Tensors = {}
    for address in adapters[0]:
        parts = [adapter.get_submodule(address) for adapter in adapters]
        deltas = [w * p.delta() for w, p in zip(weights, parts, strict=True)]  # type: ignore[operator]
        whole = torch.stack(deltas).sum(dim=0)
        u, s, v = torch.linalg.svd(whole)
        if rank > len(s):
            raise ConfigError(f"svd_rank={rank} is more than the {len(s)} that {address} has.")
        found[f"{address}.lora_A"] = v[:rank]
        found[f"{address}.lora_B"] = u[:, :rank] @ torch.diag(s[:rank])
    return found


def _sparse(
    adapters: Sequence[Adapter],
    states: Sequence[Tensors],
    weights: Sequence[float],
    strategy: str,
    density: float,
    seed: int | None,
) -> Tensors:
    """TIES or DARE on what every adapter has learned, as one vector each."""
    learned = [key for key, _ in adapters[0].named_parameters()]
    given = [key for key in states[0] if key not in set(learned)]
    if any(not torch.equal(state[key], states[0][key]) for state in states for key in given):
        raise UnsupportedError(f"combine_strategy={strategy!r} needs adapters of one origin.")
    origins = [_origins(adapter) for adapter in adapters]
    vectors = torch.stack(
        [
            torch.cat([(state[key] - origin[key]).flatten() for key in learned])
            for state, origin in zip(states, origins, strict=True)
        ]
    )
    if strategy == "ties":
        merged = ties(vectors, weights, density)
    else:
        with seeded(seed):
            merged = dare(vectors, weights, density)
    blocks = torch.split(merged, [states[0][key].numel() for key in learned])
    found = {key: states[0][key] for key in given}
    for key, block in zip(learned, blocks, strict=True):
        found[key] = origins[0][key] + block.view_as(states[0][key])
    return found


def _origins(adapter: Adapter) -> dict[str, Tensor | float]:
    """For each parameter the value from which what it has learned counts: most often zero."""
    origins: dict[str, Tensor | float] = {key: 0.0 for key, _ in adapter.named_parameters()}
    for address, part in adapter.parts.items():
        origin = getattr(part, "origin", None)
        if origin is not None:
            origins |= {f"{address}.{key}": origin(key) for key, _ in part.named_parameters()}
    return origins


def ties(vectors: Tensor, weights: Sequence[float], density: float) -> Tensor:
    """TIES-merging (arXiv:2306.01708, section 4): trim, elect signs, mean of those that agree.

    A negative weight is a negative vector; the sum of the weights is the factor of equation 2.

    Args:
        vectors: One task vector a row, ``(tasks, parameters)``.
        weights: The weight of each.
        density: The share of entries that trimming keeps, the largest of each row.
    """
    signed = torch.tensor(weights, dtype=vectors.dtype, device=vectors.device).unsqueeze(1)
    vectors, amounts = vectors * signed.sign(), signed.abs()
    count = max(1, round(density * vectors.shape[1]))
    largest = vectors.abs().topk(count, dim=1).indices
    trimmed = torch.zeros_like(vectors).scatter(1, largest, vectors.gather(1, largest))
    elected = (trimmed * amounts).sum(dim=0).sign()
    agreeing = amounts * (trimmed.sign() == elected) * (trimmed != 0)
    total = agreeing.sum(dim=0)
    mean = (trimmed * agreeing).sum(dim=0) / total.where(total > 0, 1.0)
    return mean * amounts.sum()


def dare(vectors: Tensor, weights: Sequence[float], density: float) -> Tensor:
    """DARE (arXiv:2311.03099, equation 1): drop at random, rescale the rest, and add up.

    Args:
        vectors: One task vector a row, ``(tasks, parameters)``.
        weights: The weight of each.
        density: The probability of an entry to be kept.
    """
    kept = torch.rand(vectors.shape).to(vectors.device) < density
    amounts = torch.tensor(weights, dtype=vectors.dtype, device=vectors.device).unsqueeze(1)
    return (vectors * kept / density * amounts).sum(dim=0)
