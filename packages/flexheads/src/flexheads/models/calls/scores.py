"""Gating scores and fusion attentions, for callers who ask to see them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from flexheads.sites.recording import Recorded, recording

_ASKED = {
    "output_adapter_gating_scores": ("gate", "adapter_gating_scores"),
    "output_adapter_fusion_attentions": ("fusion", "adapter_fusion_attentions"),
}
ARGUMENTS = tuple(_ASKED)
"""The arguments of a forward that ask for scores."""

Scores = dict[str, dict[int, dict[str, Tensor]]]
"""By adapter (or fusion), number of the layer, and role of the site.

Where a layer runs several times in a call, they are those of the last time.
"""


def take_asked(kwargs: dict[str, Any]) -> list[str]:
    """Takes the arguments that ask for scores out of a call; those that ask for something."""
    return [name for name in ARGUMENTS if kwargs.pop(name, False)]


def with_scores(model: Any, asked: Iterable[str], call: Callable[[], Any]) -> Any:
    """Calls, and adds the scores that were asked for to what comes back.

    Args:
        model: The model.
        asked: The arguments that `take_asked` found.
        call: The call itself.

    Returns:
        The output with a field ``adapter_gating_scores`` or ``adapter_fusion_attentions``, see
        `Scores`; a plain tuple gets them at its end.
    """
    with recording() as noted:
        output = call()
    for kind, field in (_ASKED[name] for name in asked):
        modules = model.adapters if kind == "gate" else model.adapter_fusions
        scores = _by_name(modules, [entry for entry in noted if entry[0] == kind])
        if isinstance(output, tuple):
            output = (*output, scores)
        elif isinstance(output, dict):
            output[field] = scores
        else:
            setattr(output, field, scores)
    return output


def _by_name(modules: Any, noted: Recorded) -> Scores:
    places: dict[int, tuple[str, str]] = {}
    for name, module in modules.items():
        for address, part in module.parts.items():
            places[id(part)] = (name, address)
    found: Scores = {}
    for _, part, scores in noted:
        name, address = places[_owner(part, places)]
        _, layer, role = address.split(".", 2)
        found.setdefault(name, {}).setdefault(int(layer), {})[role] = scores
    return found


def _owner(part: nn.Module, places: dict[int, tuple[str, str]]) -> int:
    if id(part) not in places:
        raise RuntimeError(f"{type(part).__name__} noted scores, but is no adapter's part.")
    return id(part)
