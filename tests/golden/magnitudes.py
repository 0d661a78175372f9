"""DoRA where the peer is wrong: what its definition gives, and what the peer computes instead.

The definition (arXiv:2402.09353, equation 5) has the whole change inside the norm, and the bias
outside. The peer leaves the scaling out of the norm and multiplies the bias too; merged, it leaves
the scaling out everywhere. Both are written out here on the weights of a plain model, so that the
test says that these are the only differences.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .cases import Case, model_for, run
from .common import assert_close

Weights = tuple[Tensor, Tensor | None]
Rule = Callable[[Tensor, Tensor | None, Tensor, Tensor, float], Weights]


def by_definition(
    weight: Tensor, bias: Tensor | None, change: Tensor, m: Tensor, scale: float
) -> Weights:
    direction = weight + scale * change
    return m * direction / direction.norm(dim=1, keepdim=True), bias


def by_the_peer(
    weight: Tensor, bias: Tensor | None, change: Tensor, m: Tensor, scale: float
) -> Weights:
    ratio = m / (weight + change).norm(dim=1, keepdim=True)
    return ratio * (weight + scale * change), None if bias is None else bias * ratio.view(-1)


def by_the_peer_merged(
    weight: Tensor, bias: Tensor | None, change: Tensor, m: Tensor, scale: float
) -> Weights:
    return by_definition(weight, bias, change, m, 1.0)


def check_dora(case: Case, model: Any) -> None:
    """Ours is the definition; the recorded numbers are the peer's own formula on our weights."""
    ((name, adapter),) = model.adapters.items()
    assert case.entry.get("merge", name) == name
    assert_close(run(case, model), _folded(case, adapter, by_definition))
    theirs = by_the_peer_merged if "merge" in case.entry else by_the_peer
    assert_close(_folded(case, adapter, theirs), case.expected())


@torch.no_grad()
def _folded(case: Case, adapter: Any, rule: Rule) -> dict[str, Tensor]:
    """The outputs of the plain model with an adapter folded into it by a rule."""
    plain = model_for(case.other("base"))
    state, config = adapter.state_dict(), adapter.config
    for address in adapter:
        own = {k[len(address) + 1 :]: t for k, t in state.items() if k.startswith(f"{address}.")}
        if config.vera_d is None:
            change = own["lora_B"] @ own["lora_A"]
        else:
            down, up = state["shared.vera.lora_A"], state["shared.vera.lora_B"]
            change = own["vera_B"] @ up @ own["vera_D"] @ down
        host = plain._attachment.sites[address].projection
        host.write(*rule(host.weight, host.bias, change, own["m.weight"], config.alpha / config.r))
    return run(case, plain, None)
