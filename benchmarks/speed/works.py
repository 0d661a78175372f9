"""The forward works on flexheads, each beside the same by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from benchmarks import heads
from benchmarks.speed import by_hand
from benchmarks.speed.pairing import Call, Found, Trial, compare
from benchmarks.speed.probe import Probe, hidden, inference, stir
from torch import Tensor

import flexheads
from flexheads import AutoModelWithHeads, Fuse, Parallel, Rows

ByHand = Callable[[Any], None]


@dataclass(frozen=True)
class Setup:
    """A model that is set up for a work.

    Attributes:
        model: The model.
        by_hand: Puts the same into a bare backbone; None where there is nothing to put.
        call: What is said in each call beside the inputs.
        size: Rows and tokens; None are the probe's `small`.
    """

    model: Any
    by_hand: ByHand | None = None
    call: Mapping[str, Any] = field(default_factory=dict)
    size: tuple[int, int] | None = None


def flexible(probe: Probe, config: Any = None, count: int = 1) -> Any:
    """A model with heads, and adapters a0, a1 and so on that do something."""
    model = probe.built(AutoModelWithHeads.from_config)
    model.base_model.load_state_dict(probe.bare.state_dict())
    for number in range(count if config else 0):
        model.add_adapter(f"a{number}", config=config)
    stir(model.adapters)
    return model


def _names(count: int) -> list[str]:
    return [f"a{number}" for number in range(count)]


# --- setups -----------------------------------------------------------------------------------


def attached(probe: Probe) -> Setup:
    """A backbone to which adapters could be added."""
    return Setup(flexheads.init(probe.backbone()))


def inactive(probe: Probe) -> Setup:
    """A backbone with an adapter that is not active."""
    model = flexheads.init(probe.backbone())
    model.add_adapter("a0", config="seq_bn")
    return Setup(model)


def one(probe: Probe, config: str, by: Callable[..., None], count: int = 1) -> Setup:
    """One active adapter, maybe of many."""
    model = flexible(probe, config, count)
    name = f"a{count // 2}"
    model.set_active_adapters(name)
    return Setup(model, lambda backbone: by(backbone, model, name))


def stack(probe: Probe) -> Setup:
    """Two bottlenecks, one behind the other."""
    model, names = flexible(probe, "seq_bn", 2), _names(2)
    model.set_active_adapters(names)
    return Setup(model, lambda backbone: by_hand.stack(backbone, model, *names))


def fuse(probe: Probe) -> Setup:
    """Three bottlenecks under AdapterFusion."""
    model, names = flexible(probe, "seq_bn", 3), _names(3)
    model.add_adapter_fusion(Fuse(*names))
    stir(model.adapter_fusions)
    model.set_active_adapters(Fuse(*names))
    return Setup(model, lambda backbone: by_hand.fuse(backbone, model, *names))


def by_row(probe: Probe, count: int) -> Setup:
    """A LoRA for each row, out of some."""
    model = flexible(probe, "lora", count)
    names = [f"a{row % count}" for row in range(probe.many[0])]

    def by(backbone: Any) -> None:
        by_hand.rows(backbone, model, names)

    return Setup(model, by, {"adapter_names": Rows(names)}, probe.many)


SETUPS: dict[str, Callable[[Probe], Setup]] = {
    "attached": attached,
    "inactive": inactive,
    "seq_bn": lambda probe: one(probe, "seq_bn", by_hand.stack),
    "double_seq_bn": lambda probe: one(probe, "double_seq_bn", by_hand.double_seq_bn),
    "lora": lambda probe: one(probe, "lora", by_hand.lora),
    "ia3": lambda probe: one(probe, "ia3", by_hand.ia3),
    "prefix_tuning": lambda probe: one(probe, "prefix_tuning", by_hand.prefix_tuning),
    "stack": stack,
    "fuse": fuse,
    "lora_100": lambda probe: one(probe, "lora", by_hand.lora, 100),
    "seq_bn_100": lambda probe: one(probe, "seq_bn", by_hand.stack, 100),
    "rows_8": lambda probe: by_row(probe, 8),
    "rows_32": lambda probe: by_row(probe, 32),
}


# --- trials -----------------------------------------------------------------------------------


def same(probe: Probe, ours: Call, floor: Call) -> None:
    """Requires that two works give the same numbers.

    Raises:
        AssertionError: If they do not.
    """
    with inference():
        probe.require_same(hidden(ours()), hidden(floor()))


def forward(probe: Probe, key: str) -> dict[str, Trial]:
    """A setup, and the same by hand, over the bare backbone."""
    setup = SETUPS[key](probe)
    inputs = probe.inputs(setup.size)
    bare, ours = partial(probe.bare, **inputs), partial(setup.model, **inputs, **setup.call)
    trials = {"flexheads": Trial(bare, ours)}
    if setup.by_hand is not None:
        backbone = probe.backbone()
        setup.by_hand(backbone)
        floor = partial(backbone, **inputs)
        same(probe, ours, floor)
        trials["floor"] = Trial(bare, floor)
    return trials


def parallel(probe: Probe, key: str) -> dict[str, Trial]:
    """Four adapters in one call, over a call for each."""
    names, inputs = _names(4), probe.inputs()
    model = flexible(probe, "seq_bn", 4)
    many = {
        key: value.repeat(4, 1) if isinstance(value, Tensor) else value
        for key, value in inputs.items()
    }
    together = partial(model, **inputs, adapter_names=Parallel(*names))
    apart = _in_turn([partial(model, **inputs, adapter_names=name) for name in names])
    backbones = [probe.backbone() for _ in range(5)]
    by_hand.parallel(backbones[4], model, *names)
    for backbone, name in zip(backbones, names, strict=False):
        by_hand.stack(backbone, model, name)
    floor = partial(backbones[4], **many)
    same(probe, together, floor)
    return {
        "flexheads": Trial(apart, together),
        "floor": Trial(_in_turn([partial(each, **inputs) for each in backbones[:4]]), floor),
    }


def _in_turn(calls: list[Call]) -> Call:
    def run() -> None:
        for call in calls:
            call()

    return run


def fifty_heads(probe: Probe, key: str) -> dict[str, Trial]:
    """All heads on one pass."""
    model, inputs = flexible(probe), probe.inputs()
    for number in range(heads.HEADS):
        model.add_classification_head(f"head {number}", num_labels=2)
    model.active_head = [f"head {number}" for number in range(heads.HEADS)]
    bare = partial(probe.bare, **inputs)
    ours, floor = partial(model, **inputs), heads.floor(model, bare)
    with inference():
        told = torch.stack([each.logits for each in ours().values()])
        probe.require_same(told, floor())
    return {"flexheads": Trial(bare, ours), "floor": Trial(bare, floor)}


TRIALS: dict[str, Callable[[Probe, str], dict[str, Trial]]] = {
    **dict.fromkeys(SETUPS, forward),
    "parallel": parallel,
    "heads": fifty_heads,
}


def measured(probe: Probe, key: str, repeats: int) -> dict[str, Found]:
    """The ratios of a row."""
    trials = TRIALS[key](probe, key)
    with inference():
        return compare(trials, repeats, probe.clocks)
