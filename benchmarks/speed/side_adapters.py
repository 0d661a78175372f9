"""The adapters library, on the same works."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import adapters
from adapters import AutoAdapterModel, Fuse, Parallel, SeqBnConfig
from adapters.composition import BatchSplit
from benchmarks.speed import library
from benchmarks.speed.pairing import Found, Trial, compare
from benchmarks.speed.probe import Probe, inference

DISTRIBUTIONS = ("adapters",)
HEADS = 50


class Adapters:
    """The library."""

    name = "adapters"
    imports: Mapping[str, str] = {
        "import": "import adapters",
        "import_class": "import adapters; adapters.AutoAdapterModel",
    }
    environment: Mapping[str, str] = {}

    def fresh(self, probe: Probe) -> Any:
        model = probe.backbone()
        adapters.init(model)
        return model

    def add(self, model: Any, name: str, config: Any, leave_out: int = 0) -> None:
        own = SeqBnConfig(leave_out=[*range(leave_out)]) if leave_out else config
        model.add_adapter(name, config=own)

    def train(self, model: Any, name: str) -> None:
        model.train_adapter(name)

    def activate(self, model: Any, name: str) -> None:
        model.set_active_adapters(name)

    def save(self, model: Any, name: str, folder: Path) -> None:
        model.save_adapter(str(folder), name, use_safetensors=True)

    def load(self, model: Any, name: str, folder: Path) -> None:
        model.load_adapter(str(folder), load_as=name, use_safetensors=True)

    def from_pretrained(self, folder: Path) -> Any:
        return AutoAdapterModel.from_pretrained(folder)


PEER = Adapters()


def _model(probe: Probe, config: str | None, count: int = 1) -> Any:
    model = PEER.fresh(probe)
    for number in range(count if config else 0):
        PEER.add(model, f"a{number}", config)
    return model.to(probe.bare.device, probe.bare.dtype).eval()


def _one(probe: Probe, config: str, count: int = 1) -> Trial:
    model = _model(probe, config, count)
    return _active(probe, model, f"a{count // 2}")


def _active(probe: Probe, model: Any, setup: Any, size: tuple[int, int] | None = None) -> Trial:
    model.set_active_adapters(setup)
    inputs = probe.inputs(size)
    return Trial(partial(probe.bare, **inputs), partial(model, **inputs))


def _fused(probe: Probe) -> tuple[Any, Any]:
    model, setup = _model(probe, "seq_bn", 3), Fuse("a0", "a1", "a2")
    model.add_adapter_fusion(setup)
    return model.to(probe.bare.device, probe.bare.dtype).eval(), setup


def _fuse(probe: Probe) -> Trial:
    return _active(probe, *_fused(probe))


def _training_fuse(probe: Probe, key: str, repeats: int) -> dict[str, Found]:
    model, setup = _fused(probe)
    model.train_adapter_fusion(setup)
    trial = library.training_trial(probe, model.train())
    return compare({"adapters": trial}, repeats, probe.clocks)


def _rows(probe: Probe, count: int) -> Trial:
    """It takes rows in blocks only: those of one adapter stand together."""
    model, rows = _model(probe, "lora", count), probe.many[0]
    names = [f"a{number}" for number in range(count)]
    setup = BatchSplit(*names, batch_sizes=[rows // count] * count)
    return _active(probe, model, setup, probe.many)


def _parallel(probe: Probe) -> Trial:
    names, inputs = [f"a{number}" for number in range(4)], probe.inputs()
    together, apart = (_model(probe, "seq_bn", 4) for _ in range(2))
    together.set_active_adapters(Parallel(*names))

    def in_turn() -> None:
        for name in names:
            apart.set_active_adapters(name)
            apart(**inputs)

    return Trial(in_turn, partial(together, **inputs))


def _heads(probe: Probe) -> Trial:
    model, inputs = probe.built(AutoAdapterModel.from_config), probe.inputs()
    names = [f"head {number}" for number in range(HEADS)]
    for name in names:
        model.add_classification_head(name, num_labels=2)
    model.active_head = names
    model.to(probe.bare.device, probe.bare.dtype).eval()
    return Trial(partial(probe.bare, **inputs), partial(model, **inputs))


TRIALS: dict[str, Callable[[Probe], Trial]] = {
    "attached": lambda probe: _active(probe, _model(probe, None), None),
    "inactive": lambda probe: _active(probe, _model(probe, "seq_bn"), None),
    **{
        config: partial(_one, config=config)
        for config in ("seq_bn", "double_seq_bn", "lora", "ia3", "prefix_tuning")
    },
    "stack": lambda probe: _active(probe, _model(probe, "seq_bn", 2), ["a0", "a1"]),
    "fuse": _fuse,
    "lora_100": partial(_one, config="lora", count=100),
    "seq_bn_100": partial(_one, config="seq_bn", count=100),
    "parallel": _parallel,
    "rows_8": partial(_rows, count=8),
    "rows_32": partial(_rows, count=32),
    "heads": _heads,
}


def _forward(probe: Probe, key: str, repeats: int) -> dict[str, Found]:
    trial = TRIALS[key](probe)
    with inference():
        return compare({"adapters": trial}, repeats, probe.clocks)


def _alike(probe: Probe, key: str, repeats: int) -> dict[str, Found]:
    return {"adapters": library.measured(PEER, probe, key, repeats)}


ALIKE = [row for row in library.ROWS if row != "import_registry"]
MEASURES = {
    **dict.fromkeys(TRIALS, _forward),
    **dict.fromkeys(ALIKE, _alike),
    "training_fuse": _training_fuse,
}
