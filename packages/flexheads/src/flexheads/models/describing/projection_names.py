"""Which projection of a sub-layer is which: by name, by what they are given, or by experiment."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flexheads.models.describing.tracing import Event, Sums, Trace
from flexheads.specs import FusedBlock

_WORDS = {"query": {"q", "query", "wq"}, "key": {"k", "key", "wk"}, "value": {"v", "value", "wv"}}
_FUSED = re.compile(r"qkv|query_key_value|c_attn|in_proj", flags=re.IGNORECASE)
_POSITIONS = {"pos", "rel", "relative", "position"}


def attention_projections(
    model: Any,
    inputs: Mapping[str, Tensor],
    trace: Trace,
    layer: Event,
    leaves: Sequence[Event],
) -> dict[str, Any] | None:
    """The roles in a sub-layer that attends; None where it does not.

    Args:
        model: The model.
        inputs: What it is called with.
        trace: That call.
        layer: The layer.
        leaves: The leaf modules that ran for the sub-layer.

    Returns:
        Paths below the layer by role, and None for the role of the residual site.
    """
    linear = [event for event in leaves if event.is_linear]
    found = _by_name(linear) or _by_input(linear)
    if found is None:
        return None
    used = {event.path for event in found.values()}
    outputs = [event for event in linear if event.path not in used]
    sums = Sums(())
    cross = not sums.same(sums.key(found["query"].given), sums.key(found["key"].given))
    prefix = "cross_" if cross else ""
    roles: dict[str, Any] = {"cross_attention" if cross else "attention": None}
    roles |= {f"{prefix}{role}": _below(layer, event) for role, event in found.items()}
    if outputs:
        roles[f"{prefix}attention_output"] = _below(layer, outputs[-1])
    if len(used) == 1:
        layout = _layout(model, inputs, trace, found["query"], outputs[-1]) if outputs else {}
        if layout:
            roles["fused"] = layout
        else:  # or each of them would be all of it
            for role in found:
                del roles[f"{prefix}{role}"]
    parents = [path.split(".")[:-1] for path in used]
    common = [words[0] for words in zip(*parents, strict=False) if len(set(words)) == 1]
    holder = ".".join(common)
    if holder != layer.path:
        name = "encoder_attention" if cross else "self_attention"
        roles[name] = holder[len(layer.path) + 1 :]
    return roles


def mlp_projections(layer: Event, leaves: Sequence[Event]) -> dict[str, Any]:
    """The roles in a sub-layer that does not attend, as in `attention_projections`.

    Of several projections of one input that is the one whose result is no activation's input; of
    one that is twice as wide, the block of which that is true.
    """
    linear, sums = [event for event in leaves if event.is_linear], Sums(())
    if len(linear) < 2:
        return {}
    first = sums.key(linear[0].given)
    into = [event for event in linear[:-1] if sums.same(sums.key(event.given), first)]
    activated = [sums.key(event.given) for event in leaves if not event.is_linear]
    plain = [
        event
        for event in into
        if not any(sums.same(sums.key(event.made), key) for key in activated)
    ]
    chosen = plain[0] if len(into) > 1 and plain else into[0]
    roles: dict[str, Any] = {"mlp_in": _below(layer, chosen), "mlp_out": _below(layer, linear[-1])}
    made, wanted = chosen.made, linear[-1].given
    if made is not None and wanted is not None and made.shape[-1] == 2 * wanted.shape[-1]:
        halves = [sums.key(half) for half in made.chunk(2, dim=-1)]
        gates = [any(sums.same(half, key) for key in activated) for half in halves]
        if sum(gates) == 1:
            roles["fused"] = {"mlp_in": FusedBlock(gates.index(False), 2)}
    return roles


def _below(layer: Event, event: Event) -> str:
    return event.path[len(layer.path) + 1 :]


def _by_name(linear: Sequence[Event]) -> dict[str, Event] | None:
    found: dict[str, Event] = {}
    for event in linear:
        name = event.path.rpartition(".")[2]
        words = set(re.split(r"_", name.lower()))
        if _FUSED.search(name):
            return dict.fromkeys(_WORDS, event)
        for role, known in _WORDS.items():
            if words & known and not words & _POSITIONS:
                found.setdefault(role, event)
    return found if len(found) == len(_WORDS) else None


def _by_input(linear: Sequence[Event]) -> dict[str, Event] | None:
    """Three projections of one input; or one, three times as wide, before one that is not."""
    sums = Sums(())
    if not linear:
        return None
    first = sums.key(linear[0].given)
    alike = [event for event in linear if sums.same(sums.key(event.given), first)]
    if len(alike) == len(_WORDS) and len(linear) > len(alike):
        return dict(zip(_WORDS, alike, strict=True))
    return None


def _layout(
    model: Any, inputs: Mapping[str, Tensor], trace: Trace, fused: Event, output: Event
) -> dict[str, FusedBlock]:
    """How queries, keys and values share a projection; none where no guess is right.

    Without values all positions attend to the same, so the right guess makes what the attention
    gives equal at all positions.
    """
    counts = ("num_attention_heads", "num_key_value_heads", "num_key_value_heads")
    guesses: list[tuple[tuple[str, ...], str | None]] = [((), None), ((), counts[0])]
    if getattr(model.config, counts[1], None):
        guesses.append((counts, None))
    for shares, groups in guesses:
        sizes = [int(getattr(model.config, name)) for name in shares] or [1, 1, 1]
        turns = 1 if groups is None else int(getattr(model.config, groups))
        width = 0 if fused.made is None else fused.made.shape[-1]
        mixing = 0 if output.given is None else output.given.shape[-1]
        if width % (turns * sum(sizes)) or width // sum(sizes) * sizes[0] != mixing:
            continue

        def without_values(made: Tensor, turns: int = turns, sizes: Any = sizes) -> Tensor:
            grouped = made.reshape(*made.shape[:-1], turns, -1).clone()
            start = grouped.shape[-1] * sum(sizes[:2]) // sum(sizes)
            grouped[..., start:] = 0
            return grouped.flatten(-2)

        event = Trace(model, inputs, {fused.module: without_values}).last(output.module)
        mixed = None if event is None else event.given
        if mixed is not None and torch.allclose(mixed, mixed[:, :1].expand_as(mixed), atol=1e-6):
            return {
                role: FusedBlock(index, 3, shares=shares, groups=groups)
                for index, role in enumerate(_WORDS)
            }
    return {}
