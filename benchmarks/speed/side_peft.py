"""PEFT, on those of the works that it has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.speed import library
from benchmarks.speed.pairing import Found, Trial, compare
from benchmarks.speed.probe import Probe, inference
from peft import IA3Config, LoraConfig, get_peft_model

DISTRIBUTIONS = ("peft",)


def _config(config: str) -> Any:
    if config == "ia3":
        return IA3Config(
            target_modules=r".*\.(key|value|intermediate\.dense)", feedforward_modules=[]
        )
    return LoraConfig(r=8, lora_alpha=8, target_modules=["query", "value", "q_proj", "v_proj"])


class Peft:
    """The library; a model of its kind has an adapter from the beginning."""

    name = "peft"
    imports: Mapping[str, str] = {
        "import": "import peft",
        "import_class": "import peft; peft.get_peft_model",
    }
    environment: Mapping[str, str] = {}

    def fresh(self, probe: Probe) -> Any:
        return get_peft_model(probe.backbone(), _config("lora"), adapter_name="first")

    def add(self, model: Any, name: str, config: str, leave_out: int = 0) -> None:
        model.add_adapter(name, _config(config))

    def train(self, model: Any, name: str) -> None:
        model.set_adapter(name)

    def activate(self, model: Any, name: str) -> None:
        model.set_adapter(name)

    def save(self, model: Any, name: str, folder: Path) -> None:
        model.save_pretrained(str(folder), selected_adapters=[name])

    def load(self, model: Any, name: str, folder: Path) -> None:
        model.load_adapter(str(folder / name), name)

    def from_pretrained(self, folder: Path) -> Any:
        raise NotImplementedError("its adapters are put around a loaded model")


PEER = Peft()


def _model(probe: Probe, config: str, count: int = 1) -> Any:
    model = get_peft_model(probe.backbone(), _config(config), adapter_name="a0")
    for number in range(1, count):
        PEER.add(model, f"a{number}", config)
    return model.to(probe.bare.dtype).eval()  # it keeps adapters in float32 by itself


def _one(probe: Probe, config: str, count: int = 1) -> Trial:
    model, inputs = _model(probe, config, count), probe.inputs()
    model.set_adapter(f"a{count // 2}")
    return Trial(partial(probe.bare, **inputs), partial(model, **inputs))


def _rows(probe: Probe, count: int) -> Trial:
    model, inputs = _model(probe, "lora", count), probe.inputs(probe.many)
    names = [f"a{row % count}" for row in range(probe.many[0])]
    return Trial(partial(probe.bare, **inputs), partial(model, **inputs, adapter_names=names))


TRIALS: dict[str, Callable[[Probe], Trial]] = {
    "lora": partial(_one, config="lora"),
    "ia3": partial(_one, config="ia3"),
    "lora_100": partial(_one, config="lora", count=100),
    "rows_8": partial(_rows, count=8),
    "rows_32": partial(_rows, count=32),
}
ALIKE = (
    "training_lora", "kept_lora", "kept_lora_p0", "add", "load", "save", "switch_alone", "switch",
    "import", "import_class",
)  # fmt: skip


def _forward(probe: Probe, key: str, repeats: int) -> dict[str, Found]:
    trial = TRIALS[key](probe)
    with inference():
        return compare({"peft": trial}, repeats, probe.clocks)


def _alike(probe: Probe, key: str, repeats: int) -> dict[str, Found]:
    return {"peft": library.measured(PEER, probe, key, repeats)}


MEASURES = {**dict.fromkeys(TRIALS, _forward), **dict.fromkeys(ALIKE, _alike)}
